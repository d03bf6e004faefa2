//! A domain's directory: what is in it with every back end that has real files, how it is made, what
//! can be told from it.
//!
//! It belongs to the host manager's user, and a domain's process may only enter it: a process
//! that its guest has taken over can replace nothing in it that the host manager opens.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::domain::{Disk, DomainId, DomainSpec, Hardware, StopReason};
use crate::error::Error;
use crate::image::DiskImage;
use crate::kept::Transfer;
use crate::{image, overlay, save_file, spec};

pub(crate) const INITRAMFS: &str = "initramfs.cpio";
/// The boot's configuration where no initial RAM file system carries it: the same archive, as a disk.
pub(crate) const BOOT_DISK: &str = "boot.img";
const CONSOLE_LOG: &str = "console.log";
const RECORD: &str = "domain.json";
const STOPPED: &str = "stopped.json";

/// Longest run directory, in bytes: a socket's path has 107 (unix(7)).
const PATH_MAX_BYTES: usize = 80;

/// Version of the files' format.
const VERSION: u32 = 1;

/// Name of the overlay of a disk.
pub(crate) fn overlay(index: usize) -> String {
    format!("disk{index}.qcow2")
}

/// Identifies this boot of the host.
pub(crate) fn boot_id() -> Result<String, Error> {
    const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(BOOT_ID).map_err(Error::io("read", BOOT_ID))?;
    Ok(text.trim().to_owned())
}

/// What is kept of a domain. Written last: a directory without it was never finished.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    /// The host's boot in which the domain was made or restored: none of its processes survives it.
    pub(crate) boot_id: String,
    pub(crate) spec: DomainSpec,
    #[serde(default)]
    pub(crate) transfer: Transfer,
    /// What it is to have now; `None`: what the specification says.
    #[serde(default)]
    pub(crate) hardware: Option<Hardware>,
}

impl Record {
    pub(crate) fn new(spec: DomainSpec, boot_id: String) -> Self {
        Self {
            version: VERSION,
            boot_id,
            spec,
            transfer: Transfer::None,
            hardware: None,
        }
    }
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

    /// Makes the directory and all in it; `contents` adds what the back end wants there. What a
    /// cut-off earlier attempt left is replaced, and a failure leaves nothing.
    pub(crate) fn make(
        &self,
        record: &Record,
        owner: Option<u32>,
        contents: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.remove()?;
        let made = self.fill(record, owner, contents);
        if made.is_err() {
            self.remove()?;
        }
        made
    }

    fn fill(
        &self,
        record: &Record,
        owner: Option<u32>,
        contents: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        if let Some(parent) = self.0.parent() {
            make_domains_dir(parent)?;
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
        match record.spec.kernel {
            Some(_) => self.initramfs(&record.spec, owner)?,
            None => self.boot_disk(&record.spec, owner)?,
        }
        contents()?;
        let console = self.console_log();
        new_file(&console).map_err(Error::io("make", &console))?;
        self.write_record(record)
    }

    pub(crate) fn write_record(&self, record: &Record) -> Result<(), Error> {
        self.write_json(RECORD, record)
    }

    /// Makes the overlay of a disk that `image` is the base of. With `backing`, it names its base
    /// by that; without, who opens it must.
    pub(crate) fn make_overlay(
        &self,
        index: usize,
        disk: &Disk,
        image: &DiskImage,
        backing: Option<&overlay::Backing>,
    ) -> Result<(), Error> {
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
            overlay::write(&mut file, image.virtual_size_bytes, backing)
        };
        write().map_err(Error::io("write", &path))
    }

    /// Removes the overlay of a disk, if there is one.
    pub(crate) fn remove_overlay(&self, index: usize) -> Result<(), Error> {
        save_file::forget(&self.path(&overlay(index)))
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

    fn boot_disk(&self, spec: &DomainSpec, owner: Option<u32>) -> Result<(), Error> {
        let content = sectors(boot_archive(&spec.boot_config)?);
        if content.is_empty() {
            return Ok(());
        }
        let path = self.path(BOOT_DISK);
        let write = || {
            new_file(&path)?.write_all(&content)?;
            give(&path, owner)
        };
        write().map_err(Error::io("write", &path))
    }

    /// Whether `asked` is the domain of this directory, which was made as `existing`.
    pub(crate) fn check_same(
        &self,
        existing: &DomainSpec,
        asked: &DomainSpec,
    ) -> Result<(), Error> {
        spec::check_same(existing, asked)?;
        if self.has_boot_config(asked)? {
            Ok(())
        } else {
            Err(spec::other_boot_config(asked.id))
        }
    }

    /// Whether the boot configuration in the directory is this one.
    fn has_boot_config(&self, asked: &DomainSpec) -> Result<bool, Error> {
        let archive = boot_archive(&asked.boot_config)?;
        let (path, addition) = match asked.kernel {
            Some(_) => (self.path(INITRAMFS), archive),
            None => (self.path(BOOT_DISK), sectors(archive)),
        };
        match fs::read(&path) {
            Ok(content) => Ok(content.ends_with(&addition)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(addition.is_empty()),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    /// What the domain gets its boot's configuration by, its initial RAM file system or a disk, if
    /// it has either.
    pub(crate) fn boot_file(&self) -> Option<PathBuf> {
        let names = [INITRAMFS, BOOT_DISK];
        names
            .map(|name| self.path(name))
            .into_iter()
            .find(|path| path.exists())
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

    /// Forgets that the domain had ended: it has been restored.
    #[cfg(feature = "xen")]
    pub(crate) fn clear_stop_reason(&self) -> Result<(), Error> {
        save_file::forget(&self.path(STOPPED))
    }

    pub(crate) fn set_stop_reason(&self, reason: &StopReason) -> Result<(), Error> {
        self.write_json(STOPPED, reason)
    }

    pub(crate) fn console_log(&self) -> PathBuf {
        self.path(CONSOLE_LOG)
    }

    pub(crate) fn as_path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), Error> {
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
            // What a saved domain is known by outlives a restart of the host.
            file.sync_all()?;
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

/// Filled up to what a disk can be.
fn sectors(mut content: Vec<u8>) -> Vec<u8> {
    let sector = usize::try_from(image::SECTOR_BYTES).unwrap_or(usize::MAX);
    content.resize(content.len().next_multiple_of(sector), 0);
    content
}

pub(crate) fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

/// Makes the directory of all domains, where it is missing.
pub(crate) fn make_domains_dir(path: &Path) -> Result<(), Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(Error::io("make", path))
}

pub(crate) fn give(path: &Path, owner: Option<u32>) -> io::Result<()> {
    match owner {
        Some(id) => std::os::unix::fs::chown(path, Some(id), Some(id)),
        None => Ok(()),
    }
}
