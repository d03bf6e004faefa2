//! What a Xen domain has in its directory beside what every domain has.

use std::io::Write;
use std::path::PathBuf;

use super::xml::Source;
use crate::domain::{Disk, DiskFormat, DomainSpec};
use crate::error::Error;
use crate::image;
use crate::overlay::Backing;
use crate::rundir::{INITRAMFS, RunDir, new_file, overlay};

/// The domain as it was described to libvirt. Written before it is started: without it, nothing was.
const DESCRIPTION: &str = "domain.xml";

/// Whether the guest sees the image itself. A qcow2 image can refer to other files: it is
/// always opened through an overlay, which decides what is opened with it.
fn is_direct(disk: &Disk) -> bool {
    disk.read_only && disk.format == DiskFormat::Raw
}

/// The files that the guest sees as its disks.
pub(crate) fn sources(spec: &DomainSpec, dir: &RunDir) -> Vec<Source> {
    let source = |(index, disk): (usize, &Disk)| {
        let (path, format) = if is_direct(disk) {
            (disk.image.clone(), DiskFormat::Raw)
        } else {
            (dir.path(&overlay(index)), DiskFormat::Qcow2)
        };
        Source {
            path,
            format,
            read_only: disk.read_only,
        }
    };
    spec.disks.iter().enumerate().map(source).collect()
}

impl RunDir {
    /// Makes overlays, which name their bases.
    pub(crate) fn make_for_xen(&self, spec: &DomainSpec) -> Result<(), Error> {
        for (index, disk) in spec.disks.iter().enumerate() {
            let image = image::open_disk(disk)?;
            if is_direct(disk) {
                continue;
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
