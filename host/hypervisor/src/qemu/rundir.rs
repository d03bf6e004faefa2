//! A domain's directory: what is in it, how it is made, what can be told from it.
//!
//! It belongs to the host manager's user, and the domain's process may only enter it: a process
//! that its guest has taken over can replace nothing in it that the host manager opens.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use xbee_protocol::AGENT_VSOCK_PORT;

use super::overlay;
use crate::domain::{DomainId, DomainSpec, StopReason};
use crate::error::Error;
use crate::{image, spec};

pub(crate) const INITRAMFS: &str = "initramfs.cpio";
/// QEMU adds `.in` and `.out`.
pub(crate) const CONSOLE_PIPE: &str = "console";
const CONSOLE_IN: &str = "console.in";
const CONSOLE_OUT: &str = "console.out";
const CONSOLE_LOG: &str = "console.log";
const ERROR_PIPE: &str = "qemu.err";
const ERROR_LOG: &str = "qemu.log";
const KERNEL: &str = "kernel";
/// Where programs of the host connect to the guest; with `_` and a port added, where they await the
/// guest's connections.
const VSOCK: &str = "vsock";
pub(crate) const VHOST_SOCKET: &str = "vhost.sock";
const QMP_SOCKET: &str = "qmp.sock";
const RECORD: &str = "domain.json";
const STOPPED: &str = "stopped.json";
const STAT: &str = "qemu.stat";

/// Longest run directory, in bytes: a socket's path has 107 (unix(7)).
const PATH_MAX_BYTES: usize = 80;

/// Version of the files' format.
const VERSION: u32 = 1;

/// Name of the overlay of a disk.
pub(crate) fn overlay(index: usize) -> String {
    format!("disk{index}.qcow2")
}

/// What is kept of a domain. Written last: a directory without it was never finished.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    /// The host's boot in which the domain was made: none of its processes survives it.
    pub(crate) boot_id: String,
    pub(crate) spec: DomainSpec,
}

/// A domain's directory.
#[derive(Debug, Clone)]
pub(crate) struct RunDir(PathBuf);

impl RunDir {
    /// Checks that `spec` names a place this back end may use.
    pub(crate) fn of(spec: &DomainSpec, domains_dir: &Path) -> Result<Self, Error> {
        spec::check_run_dir(spec, domains_dir)?;
        let expected = spec.run_dir.clone();
        if expected.as_os_str().len() > PATH_MAX_BYTES {
            return Err(Error::InvalidSpec {
                field: "run_dir",
                detail: format!(
                    "{} is longer than {PATH_MAX_BYTES} bytes, too long for sockets: choose a shorter data directory",
                    expected.display()
                ),
            });
        }
        Ok(Self(expected))
    }

    /// The directory of a domain of which nothing else is known.
    pub(crate) fn named(domains_dir: &Path, id: DomainId) -> Self {
        Self(domains_dir.join(id.to_string()))
    }

    /// Every directory of a domain there is, with its record; those without one (a creation that
    /// was cut off) are removed.
    pub(crate) fn scan(domains_dir: &Path) -> Result<Vec<(Self, Record)>, Error> {
        let mut found = Vec::new();
        let entries = match fs::read_dir(domains_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            Err(error) => return Err(Error::io("read", domains_dir)(error)),
        };
        for entry in entries {
            let entry = entry.map_err(Error::io("read", domains_dir))?;
            // Only what a domain's directory is named like is ours.
            if entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<Uuid>().ok())
                .is_none()
            {
                continue;
            }
            let dir = Self(entry.path());
            match fs::read(dir.path(RECORD)) {
                Ok(text) => match serde_json::from_slice::<Record>(&text) {
                    Ok(record) if record.version == VERSION && record.spec.run_dir == dir.0 => {
                        found.push((dir, record));
                    }
                    Ok(record) => tracing::warn!(dir = %dir.0.display(), version = record.version,
                        "left alone: a domain of another version or place"),
                    Err(error) => {
                        tracing::warn!(dir = %dir.0.display(), %error, "left alone: the domain's record cannot be read")
                    }
                },
                Err(error) if error.kind() == io::ErrorKind::NotFound => dir.remove()?,
                Err(error) => return Err(Error::io("read", dir.path(RECORD))(error)),
            }
        }
        Ok(found)
    }

    /// Makes the directory and all in it. What a cut-off earlier attempt left is replaced, and a
    /// failure leaves nothing.
    pub(crate) fn make(
        &self,
        spec: &DomainSpec,
        boot_id: &str,
        owner: Option<u32>,
    ) -> Result<(), Error> {
        self.remove()?;
        let made = self.fill(spec, boot_id, owner);
        if made.is_err() {
            self.remove()?;
        }
        made
    }

    fn fill(&self, spec: &DomainSpec, boot_id: &str, owner: Option<u32>) -> Result<(), Error> {
        if let Some(parent) = self.0.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(parent)
                .map_err(Error::io("make", parent))?;
        }
        DirBuilder::new()
            .mode(0o700)
            .create(&self.0)
            .map_err(Error::io("make", &self.0))?;
        if let Some(gid) = owner {
            // The domain's group may go through, not look around or write.
            std::os::unix::fs::chown(&self.0, None, Some(gid))
                .map_err(Error::io("give away", &self.0))?;
            fs::set_permissions(&self.0, fs::Permissions::from_mode(0o710))
                .map_err(Error::io("open to its domain", &self.0))?;
        }
        self.initramfs(spec, owner)?;
        for (index, disk) in spec.disks.iter().enumerate() {
            let image = image::open_disk(disk)?;
            if disk.read_only {
                continue;
            }
            if image.virtual_size_bytes > overlay::DISK_MAX_BYTES {
                return Err(Error::NotAnImage {
                    path: disk.image.clone(),
                    expected: "disk image",
                    found: format!(
                        "a disk of {} bytes, at most {} are possible",
                        image.virtual_size_bytes,
                        overlay::DISK_MAX_BYTES
                    ),
                });
            }
            let path = self.path(&overlay(index));
            let write = || {
                let mut file = new_file(&path)?;
                overlay::write(&mut file, image.virtual_size_bytes)?;
                give(&path, owner)
            };
            write().map_err(Error::io("write", &path))?;
        }
        for name in [CONSOLE_IN, CONSOLE_OUT, ERROR_PIPE] {
            let path = self.path(name);
            let make = || {
                rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
                give(&path, owner)
            };
            make().map_err(Error::io("make", &path))?;
        }
        let console = self.console_log();
        new_file(&console).map_err(Error::io("make", &console))?;
        let record = Record {
            version: VERSION,
            boot_id: boot_id.to_owned(),
            spec: spec.clone(),
        };
        self.write_json(RECORD, &record)
    }

    /// The base archive and, behind it, one with the boot configuration.
    fn initramfs(&self, spec: &DomainSpec, owner: Option<u32>) -> Result<(), Error> {
        let addition = boot_archive(&spec.boot_config)?;
        if spec.initramfs.is_none() && addition.is_empty() {
            return Ok(());
        }
        let path = self.path(INITRAMFS);
        let mut base = spec
            .initramfs
            .as_deref()
            .map(image::open_initramfs)
            .transpose()?;
        let mut write = || {
            let mut file = new_file(&path)?;
            if let Some(base) = &mut base {
                let len = io::copy(base, &mut file)?;
                // The kernel takes up a further archive at a multiple of four bytes (Linux,
                // Documentation/driver-api/early-userspace/buffer-format.rst).
                let padding = len.next_multiple_of(4) - len;
                file.write_all(&[0; 4][..usize::try_from(padding).unwrap_or(0)])?;
            }
            file.write_all(&addition)?;
            give(&path, owner)
        };
        write().map_err(Error::io("write", &path))
    }

    /// Whether the boot configuration in the directory is this one.
    pub(crate) fn has_boot_config(&self, boot_config: &[u8]) -> Result<bool, Error> {
        let addition = boot_archive(boot_config)?;
        let path = self.path(INITRAMFS);
        match fs::read(&path) {
            Ok(content) => Ok(content.ends_with(&addition)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(addition.is_empty()),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    pub(crate) fn has_initramfs(&self) -> bool {
        self.path(INITRAMFS).exists()
    }

    /// Removes the directory with all in it, if it is there.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        // First what makes it a domain: a removal that is cut off is then completed by `scan`.
        for path in [self.path(RECORD), self.0.clone()] {
            let removed = if path == self.0 {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            match removed {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    pub(crate) fn stop_reason(&self) -> Result<Option<StopReason>, Error> {
        let path = self.path(STOPPED);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|error| Error::io("understand", path)(error.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    pub(crate) fn set_stop_reason(&self, reason: &StopReason) -> Result<(), Error> {
        self.write_json(STOPPED, reason)
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

    pub(crate) fn console_log(&self) -> PathBuf {
        self.path(CONSOLE_LOG)
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

    pub(crate) fn as_path(&self) -> &Path {
        &self.0
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), Error> {
        let path = self.path(name);
        let partial = self.path(&format!("{name}.partial"));
        let write = || {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&partial)?;
            file.write_all(&serde_json::to_vec(value)?)?;
            fs::rename(&partial, &path)
        };
        write().map_err(Error::io("write", &path))
    }
}

fn boot_archive(boot_config: &[u8]) -> Result<Vec<u8>, Error> {
    if boot_config.is_empty() {
        return Ok(Vec::new());
    }
    let archive = || {
        let mut writer = xbee_initramfs::Writer::new(Vec::new());
        writer.dir("xbee", 0o700)?;
        writer.file("xbee/boot", 0o600, boot_config)?;
        writer.finish()
    };
    archive().map_err(|error: xbee_initramfs::Error| Error::InvalidSpec {
        field: "boot_config",
        detail: error.to_string(),
    })
}

fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

fn give(path: &Path, owner: Option<u32>) -> io::Result<()> {
    match owner {
        Some(id) => std::os::unix::fs::chown(path, Some(id), Some(id)),
        None => Ok(()),
    }
}
