//! What a Xen domain has in its directory beside what every domain has.

use std::io::Write;
use std::path::PathBuf;

use crate::domain::{Disk, DomainSpec};
use crate::error::Error;
use crate::image;
use crate::overlay::Backing;
use crate::rundir::{INITRAMFS, RunDir, new_file, overlay};

/// The domain as it was described to libvirt. Written before it is started: without it, nothing was.
const DESCRIPTION: &str = "domain.xml";

/// The files that the guest sees as its disks: overlays, all of them. A qcow2 image can refer to
/// other files, and an overlay decides what is opened with it.
pub(crate) fn sources(spec: &DomainSpec, dir: &RunDir) -> Vec<PathBuf> {
    let path = |index| dir.path(&overlay(index));
    (0..spec.disks.len()).map(path).collect()
}

/// Where the overlays of a domain that is only described may be made.
const OVERLAYS_TO_BE: &str = "/var/tmp";

/// Overlays for a domain that has no run directory.
pub(crate) fn overlays_to_be(spec: &DomainSpec) -> Vec<PathBuf> {
    let name = |index| format!("{}-{}", super::xml::name(spec.id), overlay(index));
    (0..spec.disks.len())
        .map(|index| PathBuf::from(OVERLAYS_TO_BE).join(name(index)))
        .collect()
}

/// The commands that make them.
pub(crate) fn commands(spec: &DomainSpec, overlays: &[PathBuf]) -> Result<Vec<String>, Error> {
    let command = |(disk, overlay): (&Disk, &PathBuf)| {
        let image = super::xml::text("disks", &disk.image)?;
        Ok(format!(
            "qemu-img create -f qcow2 -F {} -b {} {}",
            disk.format,
            quoted(image),
            overlay.display()
        ))
    };
    spec.disks.iter().zip(overlays).map(command).collect()
}

/// One word for a shell (POSIX, "Single-Quotes").
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

impl RunDir {
    /// Makes overlays, which name their bases.
    pub(crate) fn make_for_xen(&self, spec: &DomainSpec) -> Result<(), Error> {
        for (index, disk) in spec.disks.iter().enumerate() {
            let image = image::open_disk(disk)?;
            if disk.read_only {
                return Err(Error::InvalidSpec {
                    field: "disks",
                    detail: format!(
                        "{}: read-only, which QEMU does not do as Xen's disk back end",
                        disk.image.display()
                    ),
                });
            }
            let backing =
                Backing::new(&disk.image, disk.format).ok_or_else(|| Error::InvalidSpec {
                    field: "disks",
                    detail: format!(
                        "{}: the path is too long for an overlay, or no text",
                        disk.image.display()
                    ),
                })?;
            self.make_overlay(index, disk, &image, Some(&backing), None)?;
        }
        Ok(())
    }

    pub(crate) fn initramfs_path(&self) -> Option<PathBuf> {
        self.has_initramfs().then(|| self.path(INITRAMFS))
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
