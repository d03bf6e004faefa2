//! What a Xen domain has in its directory beside what every domain has.

use std::io::Write;
use std::path::PathBuf;

use crate::domain::DomainSpec;
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
