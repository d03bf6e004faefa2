//! Unpacks a tar archive into a directory that nothing in the archive can reach out of.
//!
//! Every path is resolved by the kernel with `RESOLVE_BENEATH` and without following symbolic links
//! (openat2(2)), so an entry cannot be placed through a link. Symbolic links are kept only if they
//! stay inside, which is looked at again when all of them are there.
//!
//! What the archive says of owners, and modes beyond the permission bits, is not applied on this host
//! but returned as [`Entry`] values: the files are for a guest, and a set-user-ID program made by a
//! stranger must not lie around on the host.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{ErrorKind, tame};
use crate::inflow::Decoded;
use crate::limits::Limits;
use crate::sparse::{self, CopyError, StoreBudget};

/// One thing in an unpacked archive, with the attributes the archive gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path below the destination directory; no `.`, `..` or links in it.
    pub path: PathBuf,
    /// What it is.
    pub kind: EntryKind,
    /// Permission, set-user-ID, set-group-ID and sticky bits. On disk, directories and files have only
    /// the permission bits, and their owner may always read and write them.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last modification, in seconds since 1970.
    pub mtime_s: u64,
}

/// What an [`Entry`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A directory.
    Directory,
    /// A regular file of this many bytes, holes included.
    File {
        /// Length in bytes.
        size_bytes: u64,
    },
    /// A symbolic link that stays inside the directory.
    Symlink {
        /// Target as stored.
        target: PathBuf,
    },
    /// Another name of a file in the same directory tree.
    HardLink {
        /// Path of that file, as in [`Entry::path`].
        target: PathBuf,
    },
}

/// Bytes that the headers of one entry may take: long names, extended attributes, sparse maps.
const HEADER_BYTES: u64 = 1 << 20;

/// Longest path taken, as the kernel's PATH_MAX.
const PATH_BYTES: usize = 4096;

const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// Unpacks the archive `data` into the empty directory `root`. Returns the entries by path, parents
/// first.
pub(crate) fn unpack(
    data: &mut Decoded<'_>,
    root: &Path,
    limits: &Limits,
    budget: &mut StoreBudget<'_>,
) -> Result<Vec<Entry>, ErrorKind> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root_fd = rustix::fs::open(root, flags, Mode::empty())
        .map_err(|errno| ErrorKind::local("cannot open", root, errno.into()))?;
    let mut tree = Tree {
        root: root_fd,
        root_path: root,
        limits,
        parent: None,
        entries: BTreeMap::new(),
        unpacked_bytes: 0,
        seen: 0,
    };
    let header_left = Cell::new(None);
    let mut buffer = sparse::buffer();
    let unpacked = {
        let guarded = HeaderGuard {
            data: &mut *data,
            left: &header_left,
        };
        let mut archive = tar::Archive::new(guarded);
        let mut each = || -> Result<(), ErrorKind> {
            let mut entries = archive.entries().map_err(corrupt)?;
            loop {
                header_left.set(Some(HEADER_BYTES));
                let next = entries.next();
                header_left.set(None);
                match next {
                    Some(entry) => tree.add(entry.map_err(corrupt)?, &mut buffer, budget)?,
                    None => return Ok(()),
                }
            }
        };
        each()
    };
    // Why the reader stopped says more than what the archive made of it.
    if let Err(error) = unpacked {
        return Err(data.halted().unwrap_or(error));
    }
    if data.decoded_bytes() == 0 {
        return Err(corrupt(io::Error::other("there is no data")));
    }
    // What follows the archive's end mark is padding, but its checksum counts.
    io::copy(data, &mut io::sink()).map_err(|error| data.halted().unwrap_or(corrupt(error)))?;
    tree.check_links()?;
    Ok(tree.entries.into_values().collect())
}

fn corrupt(source: io::Error) -> ErrorKind {
    ErrorKind::CorruptArchive {
        format: "tar",
        source,
    }
}

/// Bounds what the tar reader takes into memory between two entries.
struct HeaderGuard<'a, 'd> {
    data: &'a mut Decoded<'d>,
    left: &'a Cell<Option<u64>>,
}

impl Read for HeaderGuard<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let amount = self.data.read(buffer)?;
        if let Some(left) = self.left.get() {
            let left = left.checked_sub(amount as u64).ok_or_else(|| {
                io::Error::other(format!("an entry's headers exceed {HEADER_BYTES} bytes"))
            })?;
            self.left.set(Some(left));
        }
        Ok(amount)
    }
}

/// The directory being filled.
struct Tree<'a> {
    root: OwnedFd,
    root_path: &'a Path,
    limits: &'a Limits,
    /// The last parent directory used: most entries share it with the one before.
    parent: Option<(PathBuf, OwnedFd)>,
    entries: BTreeMap<PathBuf, Entry>,
    unpacked_bytes: u64,
    seen: u64,
}

impl Tree<'_> {
    fn add<R: Read>(
        &mut self,
        mut source: tar::Entry<'_, R>,
        buffer: &mut [u8],
        budget: &mut StoreBudget<'_>,
    ) -> Result<(), ErrorKind> {
        self.count()?;
        let stored = source.path_bytes().into_owned();
        let refuse = |reason: String| unsafe_entry(&stored, reason);
        let path = beneath(&stored).map_err(|reason| refuse(reason.into()))?;
        let kind = source.header().entry_type();
        if kind.is_pax_global_extensions() {
            return drain(&mut source);
        }
        if let Some(extensions) = source.pax_extensions().map_err(corrupt)? {
            for extension in extensions {
                let extension = extension.map_err(corrupt)?;
                if extension.key_bytes().starts_with(b"GNU.sparse.") {
                    return Err(corrupt(io::Error::other(
                        "sparse files in POSIX form are not supported; use tar --format=gnu",
                    )));
                }
            }
        }
        let mut entry = Entry {
            path: path.clone(),
            kind: EntryKind::Directory,
            mode: source.header().mode().map_err(corrupt)? & 0o7777,
            uid: id(source.header().uid().map_err(corrupt)?)?,
            gid: id(source.header().gid().map_err(corrupt)?)?,
            mtime_s: source.header().mtime().map_err(corrupt)?,
        };
        if path.as_os_str().is_empty() {
            // The archive's own top directory, "./".
            return match kind.is_dir() {
                true => drain(&mut source),
                false => Err(refuse("it has no name".into())),
            };
        }
        if kind.is_dir() {
            self.directory(&path, entry.mode, &stored)?;
            drain(&mut source)?;
        } else if kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse() {
            let size_bytes = source.size();
            self.grow(size_bytes)?;
            let file = self.new_file(&path, entry.mode, &stored)?;
            let written =
                sparse::copy(&mut source, &file, buffer, budget).map_err(|error| match error {
                    CopyError::Read(source) => corrupt(source),
                    CopyError::Write(source) => {
                        ErrorKind::local("cannot write", &self.root_path.join(&path), source)
                    }
                    CopyError::Refused(kind) => kind,
                })?;
            if written != size_bytes {
                return Err(corrupt(io::Error::from(io::ErrorKind::UnexpectedEof)));
            }
            entry.kind = EntryKind::File { size_bytes };
        } else if kind.is_symlink() {
            let target = link_target(&source, &stored)?;
            check_symlink(&path, &target).map_err(|reason| refuse(reason.into()))?;
            self.symlink(&path, &target, &stored)?;
            drain(&mut source)?;
            entry.kind = EntryKind::Symlink { target };
        } else if kind.is_hard_link() {
            let target = link_target(&source, &stored)?;
            let target = beneath(target.as_os_str().as_bytes())
                .map_err(|reason| refuse(format!("its link target: {reason}")))?;
            self.hard_link(&path, &target, &stored)?;
            drain(&mut source)?;
            entry.kind = EntryKind::HardLink { target };
        } else {
            let what = match kind {
                tar::EntryType::Fifo => "a pipe",
                tar::EntryType::Char | tar::EntryType::Block => "a device",
                _ => "of an unknown type",
            };
            return Err(refuse(format!("it is {what}")));
        }
        self.entries.insert(path, entry);
        Ok(())
    }

    fn count(&mut self) -> Result<(), ErrorKind> {
        self.seen += 1;
        if self.seen > self.limits.entries {
            return Err(ErrorKind::SizeLimit {
                limit: self.limits.entries,
                what: "entries in the archive",
            });
        }
        Ok(())
    }

    /// Counts a file's length before it is made: a sparse one may claim any.
    fn grow(&mut self, bytes: u64) -> Result<(), ErrorKind> {
        self.unpacked_bytes = self.unpacked_bytes.saturating_add(bytes);
        if self.unpacked_bytes > self.limits.unpacked_bytes {
            return Err(ErrorKind::SizeLimit {
                limit: self.limits.unpacked_bytes,
                what: "bytes in the archive's files",
            });
        }
        Ok(())
    }

    /// Makes the directory `path`, or takes the one that is there.
    fn directory(&mut self, path: &Path, mode: u32, stored: &[u8]) -> Result<(), ErrorKind> {
        let name = self.enter_parent(path, stored)?;
        let mode = Mode::from_raw_mode(mode & 0o777 | 0o700);
        let parent = self.parent_fd();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::mkdirat(parent, &name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(self.failed(path, stored, errno)),
        }
        rustix::fs::openat2(parent, &name, flags, Mode::empty(), RESOLVE)
            .and_then(|directory| rustix::fs::fchmod(&directory, mode))
            .map_err(|errno| self.failed(path, stored, errno))
    }

    /// Makes an empty file in place of what had the name. A directory is not replaced.
    fn new_file(&mut self, path: &Path, mode: u32, stored: &[u8]) -> Result<File, ErrorKind> {
        let name = self.enter_parent(path, stored)?;
        self.clear(&name, path, stored)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat2(self.parent_fd(), &name, flags, Mode::RUSR, RESOLVE)
            .and_then(|file| {
                rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & 0o777 | 0o600))?;
                Ok(file)
            })
            .map_err(|errno| self.failed(path, stored, errno))?;
        Ok(file.into())
    }

    fn symlink(&mut self, path: &Path, target: &Path, stored: &[u8]) -> Result<(), ErrorKind> {
        let name = self.enter_parent(path, stored)?;
        self.clear(&name, path, stored)?;
        rustix::fs::symlinkat(target, self.parent_fd(), &name)
            .map_err(|errno| self.failed(path, stored, errno))
    }

    fn hard_link(&mut self, path: &Path, target: &Path, stored: &[u8]) -> Result<(), ErrorKind> {
        let is_file = matches!(
            self.entries.get(target).map(|entry| &entry.kind),
            Some(EntryKind::File { .. } | EntryKind::HardLink { .. })
        );
        if !is_file || path == target {
            return Err(unsafe_entry(
                stored,
                "its link target is no file that came before it".into(),
            ));
        }
        let target_name = self.enter_parent(target, stored)?;
        let target_parent = rustix::io::fcntl_dupfd_cloexec(self.parent_fd(), 0)
            .map_err(|errno| self.failed(path, stored, errno))?;
        let name = self.enter_parent(path, stored)?;
        self.clear(&name, path, stored)?;
        rustix::fs::linkat(
            &target_parent,
            &target_name,
            self.parent_fd(),
            &name,
            AtFlags::empty(),
        )
        .map_err(|errno| self.failed(path, stored, errno))
    }

    /// Removes the file or link `name` in the current parent, if there is one.
    fn clear(&self, name: &Path, path: &Path, stored: &[u8]) -> Result<(), ErrorKind> {
        match rustix::fs::unlinkat(self.parent_fd(), name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR) => Err(unsafe_entry(
                stored,
                "it would replace a directory".to_owned(),
            )),
            Err(errno) => Err(self.failed(path, stored, errno)),
        }
    }

    fn parent_fd(&self) -> &OwnedFd {
        match &self.parent {
            Some((_, fd)) => fd,
            None => &self.root,
        }
    }

    /// Makes the parent of `path` current, creating what is missing of it, and returns the last name.
    fn enter_parent(&mut self, path: &Path, stored: &[u8]) -> Result<PathBuf, ErrorKind> {
        let name = PathBuf::from(path.file_name().unwrap_or_default());
        let parent = path.parent().unwrap_or(Path::new(""));
        if parent.as_os_str().is_empty() {
            self.parent = None;
            return Ok(name);
        }
        if matches!(&self.parent, Some((current, _)) if current == parent) {
            return Ok(name);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat2(&self.root, parent, flags, Mode::empty(), RESOLVE) {
            Err(Errno::NOENT) => {
                self.imply(parent, stored)?;
                rustix::fs::openat2(&self.root, parent, flags, Mode::empty(), RESOLVE)
            }
            opened => opened,
        };
        let fd = fd.map_err(|errno| self.failed(path, stored, errno))?;
        self.parent = Some((parent.to_path_buf(), fd));
        Ok(name)
    }

    /// Makes directories that the archive uses but does not list.
    fn imply(&mut self, directory: &Path, stored: &[u8]) -> Result<(), ErrorKind> {
        let missing: Vec<PathBuf> = directory
            .ancestors()
            .take_while(|path| !path.as_os_str().is_empty() && !self.entries.contains_key(*path))
            .map(Path::to_path_buf)
            .collect();
        for path in missing.into_iter().rev() {
            self.count()?;
            self.directory(&path, 0o755, stored)?;
            let entry = Entry {
                path: path.clone(),
                kind: EntryKind::Directory,
                mode: 0o755,
                uid: 0,
                gid: 0,
                mtime_s: 0,
            };
            self.entries.insert(path, entry);
        }
        Ok(())
    }

    /// With all links in place, lets the kernel follow each: one link may lead out through another.
    fn check_links(&self) -> Result<(), ErrorKind> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        for entry in self.entries.values() {
            if !matches!(entry.kind, EntryKind::Symlink { .. }) {
                continue;
            }
            match rustix::fs::openat2(&self.root, &entry.path, flags, Mode::empty(), resolve) {
                // A dangling link or a loop leads nowhere.
                Ok(_) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(Errno::XDEV) => {
                    return Err(unsafe_entry(
                        entry.path.as_os_str().as_bytes(),
                        "it leads out of the directory".into(),
                    ));
                }
                Err(errno) => {
                    return Err(self.failed(&entry.path, entry.path.as_os_str().as_bytes(), errno));
                }
            }
        }
        Ok(())
    }

    fn failed(&self, path: &Path, stored: &[u8], errno: Errno) -> ErrorKind {
        match errno {
            Errno::LOOP | Errno::XDEV => unsafe_entry(stored, "a link is in its path".into()),
            Errno::NOTDIR => unsafe_entry(stored, "a file is in its path".into()),
            Errno::NAMETOOLONG => unsafe_entry(stored, "its name is too long".into()),
            errno => ErrorKind::local("cannot unpack", &self.root_path.join(path), errno.into()),
        }
    }
}

fn unsafe_entry(stored: &[u8], reason: String) -> ErrorKind {
    ErrorKind::UnsafeArchiveEntry {
        entry: tame(&String::from_utf8_lossy(stored)),
        reason,
    }
}

fn drain(source: &mut impl Read) -> Result<(), ErrorKind> {
    io::copy(source, &mut io::sink())
        .map(|_| ())
        .map_err(corrupt)
}

fn id(number: u64) -> Result<u32, ErrorKind> {
    u32::try_from(number)
        .map_err(|_| corrupt(io::Error::other(format!("{number} is no user or group id"))))
}

fn link_target<R: Read>(source: &tar::Entry<'_, R>, stored: &[u8]) -> Result<PathBuf, ErrorKind> {
    match source.link_name_bytes() {
        Some(target) if !target.is_empty() && target.len() < PATH_BYTES && !target.contains(&0) => {
            Ok(PathBuf::from(OsStr::from_bytes(&target)))
        }
        _ => Err(unsafe_entry(stored, "its link target is no path".into())),
    }
}

/// A stored path as one below the destination: without `.` and empty parts, refused if it is absolute
/// or contains `..`.
fn beneath(stored: &[u8]) -> Result<PathBuf, &'static str> {
    if stored.starts_with(b"/") {
        return Err("an absolute path");
    }
    if stored.len() >= PATH_BYTES {
        return Err("the path is too long");
    }
    if stored.contains(&0) {
        return Err("a zero byte in the path");
    }
    let mut path = PathBuf::new();
    for part in stored.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err("\"..\" in the path"),
            part => path.push(OsStr::from_bytes(part)),
        }
    }
    Ok(path)
}

/// Refuses a link that leads out by its own text.
fn check_symlink(path: &Path, target: &Path) -> Result<(), &'static str> {
    if target.is_absolute() {
        return Err("it links to an absolute path");
    }
    let mut depth = path.components().count() - 1;
    for part in target.components() {
        match part {
            std::path::Component::Normal(_) => depth += 1,
            std::path::Component::ParentDir => {
                depth = depth
                    .checked_sub(1)
                    .ok_or("it links out of the directory")?;
            }
            _ => {}
        }
    }
    Ok(())
}
