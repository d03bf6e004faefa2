//! What a Xen domain has in its directory beside what every domain has.

use std::io::Write;
use std::path::PathBuf;

use crate::domain::{Disk, DiskFormat, DomainSpec};
use crate::error::Error;
use crate::image;
use crate::overlay::Backing;
use crate::rundir::{RunDir, new_file, overlay};

/// The domain as it was described to libvirt. Written before it is started: without it, nothing was.
const DESCRIPTION: &str = "domain.xml";

/// Who serves a disk to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Server {
    /// A QEMU in user space, which reads qcow2 overlays. It serves none that is read-only: it opens
    /// the file so, and then wants to write the format in it ("Block node is read-only", 7.2).
    Qemu,
    /// The control domain's kernel, which hands on sectors and looks at nothing in them.
    Kernel,
}

pub(crate) fn server(disk: &Disk) -> Server {
    match (disk.read_only, disk.format) {
        (true, DiskFormat::Raw) => Server::Kernel,
        _ => Server::Qemu,
    }
}

/// The file that the guest sees as its disk. Of those that it can write it is an overlay: a qcow2
/// image can refer to other files, and an overlay decides what is opened with it.
pub(crate) fn source(index: usize, disk: &Disk, dir: &RunDir) -> PathBuf {
    match server(disk) {
        Server::Qemu => dir.path(&overlay(index)),
        Server::Kernel => disk.image.clone(),
    }
}

/// The files that the guest sees as its disks when it starts.
pub(crate) fn sources(spec: &DomainSpec, dir: &RunDir) -> Vec<PathBuf> {
    let disks = spec.disks.iter().enumerate();
    disks
        .map(|(index, disk)| source(index, disk, dir))
        .collect()
}

/// Where the overlays of a domain that is only described may be made.
const OVERLAYS_TO_BE: &str = "/var/tmp";

/// What a domain that has no run directory would see as its disks.
pub(crate) fn sources_to_be(spec: &DomainSpec) -> Vec<PathBuf> {
    let source = |(index, disk): (usize, &Disk)| match server(disk) {
        Server::Qemu => {
            let name = format!("{}-{}", super::xml::name(spec.id), overlay(index));
            PathBuf::from(OVERLAYS_TO_BE).join(name)
        }
        Server::Kernel => disk.image.clone(),
    };
    spec.disks.iter().enumerate().map(source).collect()
}

/// The commands that make those of them that are overlays.
pub(crate) fn commands(spec: &DomainSpec, sources: &[PathBuf]) -> Result<Vec<String>, Error> {
    let command = |(disk, overlay): (&Disk, &PathBuf)| {
        let image = super::xml::text("disks", &disk.image)?;
        Ok(format!(
            "qemu-img create -f qcow2 -F {} -b {} {}",
            disk.format,
            quoted(image),
            overlay.display()
        ))
    };
    let disks = spec.disks.iter().zip(sources);
    disks
        .filter(|(disk, _)| server(disk) == Server::Qemu)
        .map(command)
        .collect()
}

/// One word for a shell (POSIX, "Single-Quotes").
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

impl RunDir {
    /// Makes what a disk needs: an overlay, which names its base.
    pub(crate) fn make_disk_for_xen(&self, index: usize, disk: &Disk) -> Result<(), Error> {
        let image = image::open_disk(disk)?;
        if server(disk) == Server::Kernel {
            return Ok(());
        }
        let invalid = |detail: &str| Error::InvalidSpec {
            field: "disks",
            detail: format!("{}: {detail}", disk.image.display()),
        };
        if disk.read_only {
            return Err(invalid(
                "read-only and qcow2, which QEMU does not do as Xen's disk back end: convert it to raw",
            ));
        }
        let backing = Backing::new(&disk.image, disk.format)
            .ok_or_else(|| invalid("the path is too long for an overlay, or no text"))?;
        self.make_overlay(index, disk, &image, Some(&backing))
    }

    /// Notes that the domain is about to be started.
    pub(crate) fn mark_started(&self, description: &str) -> Result<(), Error> {
        let path = self.path(DESCRIPTION);
        new_file(&path)
            .and_then(|mut file| file.write_all(description.as_bytes()))
            .map_err(Error::io("write", path))
    }

    pub(crate) fn has_started(&self) -> bool {
        self.path(DESCRIPTION).exists()
    }
}
