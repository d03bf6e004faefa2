//! What a QEMU domain has in its directory beside what every domain has.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;

use rustix::fs::{CWD, FileType, Mode};
use xbee_protocol::AGENT_VSOCK_PORT;

use super::card;
use crate::domain::{Disk, DomainSpec};
use crate::error::Error;
use crate::image;
use crate::rundir::{self, RunDir, give, new_file};

/// QEMU adds `.in` and `.out`.
pub(crate) const CONSOLE_PIPE: &str = "console";
pub(crate) const CONSOLE_IN: &str = "console.in";
pub(crate) const CONSOLE_OUT: &str = "console.out";
const ERROR_PIPE: &str = "qemu.err";
const ERROR_LOG: &str = "qemu.log";
const KERNEL: &str = "kernel";
/// Where programs of the host connect to the guest; with `_` and a port added, where they await the
/// guest's connections.
const VSOCK: &str = "vsock";
const VHOST_SOCKET: &str = "vhost.sock";
const QMP_SOCKET: &str = "qmp.sock";
const STAT: &str = "qemu.stat";
const CGROUPS: &str = "qemu.cgroups";

/// What is behind a disk.
pub(crate) struct DiskFiles {
    pub(crate) base: File,
    pub(crate) overlay: Option<File>,
}

pub(crate) fn caged(error: xbee_cage::Error) -> Error {
    Error::HypervisorBroken {
        detail: crate::error::chain(&error),
    }
}

impl RunDir {
    /// Makes overlays and pipes. The overlays name no base: QEMU is told it at start, by descriptor.
    pub(crate) fn make_for_qemu(&self, spec: &DomainSpec, owner: Option<u32>) -> Result<(), Error> {
        for (index, disk) in spec.disks.iter().enumerate() {
            self.make_disk_for_qemu(index, disk)?;
        }
        for name in [CONSOLE_IN, CONSOLE_OUT, ERROR_PIPE] {
            let path = self.path(name);
            let make = || {
                rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
                give(&path, owner)
            };
            make().map_err(Error::io("make", &path))?;
        }
        Ok(())
    }

    /// Makes the overlay of a disk, if it has one.
    pub(crate) fn make_disk_for_qemu(&self, index: usize, disk: &Disk) -> Result<(), Error> {
        let image = image::open_disk(disk)?;
        match disk.read_only {
            true => Ok(()),
            false => self.make_overlay(index, disk, &image, None),
        }
    }

    /// Opens what is behind a disk.
    pub(crate) fn open_disk_for_qemu(&self, index: usize, disk: &Disk) -> Result<DiskFiles, Error> {
        let base = image::open_disk(disk)?.file;
        let overlay = match disk.read_only {
            true => None,
            false => {
                let path = self.path(&rundir::overlay(index));
                let file = File::options().read(true).write(true).open(&path);
                Some(file.map_err(Error::io("open", path))?)
            }
        };
        Ok(DiskFiles { base, overlay })
    }

    /// What QEMU reads in its directory, by name.
    pub(crate) fn readable_for_qemu(&self) -> Vec<String> {
        let names = [rundir::INITRAMFS, rundir::BOOT_DISK];
        let there = names.into_iter().filter(|name| self.path(name).exists());
        there.map(str::to_owned).collect()
    }

    /// Notes the control groups that the domain is to have: made or not, they go with it.
    pub(crate) fn note_cgroups(&self, group: &[PathBuf]) -> Result<(), Error> {
        self.write_json(CGROUPS, &group)
    }

    /// The control groups that were noted.
    pub(crate) fn cgroups(&self) -> Result<Vec<PathBuf>, Error> {
        let path = self.path(CGROUPS);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|error| Error::io("understand", path)(error.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(vec![]),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    /// Removes the control groups of a domain whose process is gone.
    pub(crate) fn remove_cgroups(&self) -> Result<(), Error> {
        xbee_cage::cgroup::remove(&self.cgroups()?).map_err(caged)
    }

    /// The line with which the domain's process identified itself; empty: none was started.
    pub(crate) fn process_stat(&self) -> Result<String, Error> {
        let path = self.path(STAT);
        match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            read => read.map_err(Error::io("read", path)),
        }
    }

    pub(crate) fn create_stat(&self) -> Result<File, Error> {
        let path = self.path(STAT);
        new_file(&path).map_err(Error::io("make", path))
    }

    pub(crate) fn console_pipe(&self) -> PathBuf {
        self.path(CONSOLE_OUT)
    }

    pub(crate) fn error_log(&self) -> PathBuf {
        self.path(ERROR_LOG)
    }

    pub(crate) fn error_pipe(&self) -> PathBuf {
        self.path(ERROR_PIPE)
    }

    pub(crate) fn vsock(&self) -> PathBuf {
        self.path(VSOCK)
    }

    pub(crate) fn vhost_socket(&self) -> PathBuf {
        self.path(VHOST_SOCKET)
    }

    /// Where the connection is made that becomes a network card.
    pub(crate) fn card_socket(&self, mac: [u8; 6]) -> PathBuf {
        self.path(&card::id(mac))
    }

    /// Where the connection is made that becomes a network card's way out.
    pub(crate) fn uplink_socket(&self, mac: [u8; 6]) -> PathBuf {
        self.path(&format!("{}-up", card::id(mac)))
    }

    /// Where the vsock switch delivers connections to the agent's port.
    pub(crate) fn agent_socket(&self) -> PathBuf {
        self.path(&format!("{VSOCK}_{AGENT_VSOCK_PORT}"))
    }

    /// Copies a kernel that the domain's user may not read.
    pub(crate) fn copy_kernel(&self, mut kernel: File, owner: u32) -> Result<File, Error> {
        let path = self.path(KERNEL);
        let mut copy = || {
            io::copy(&mut kernel, &mut new_file(&path)?)?;
            give(&path, Some(owner))?;
            File::open(&path)
        };
        copy().map_err(Error::io("copy the kernel to", &path))
    }

    pub(crate) fn qmp_socket(&self) -> PathBuf {
        self.path(QMP_SOCKET)
    }
}
