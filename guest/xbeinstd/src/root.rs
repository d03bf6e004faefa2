//! Paths in the guest's root. The kernel keeps them inside (`RESOLVE_IN_ROOT`), whatever links
//! and `..` they lead through.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat, fstat, mkdirat, openat2};
use rustix::io::Errno;

/// The root directory that paths are meant in.
#[derive(Debug)]
pub(crate) struct Root {
    fd: OwnedFd,
}

/// A path cut into its directory and its last name.
pub(crate) fn split(path: &str) -> Option<(&str, &str)> {
    let path = path.trim_end_matches('/');
    let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
    (!name.is_empty() && name != "." && name != "..").then_some((directory, name))
}

impl Root {
    /// The directory at `path`.
    pub(crate) fn open_at(path: &str) -> Result<Root, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Root {
            fd: rustix::fs::open(path, flags, Mode::empty())?,
        })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Opens a path within the root. The empty path is the root itself.
    pub(crate) fn open(&self, path: &str, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { "/" } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.fd, path, flags | OFlags::CLOEXEC, mode, resolve)
    }

    /// A directory, without the right to read it.
    pub(crate) fn directory(&self, path: &str) -> Result<OwnedFd, Errno> {
        self.open(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
    }

    /// A directory that is made, with those above it, where it is not there.
    pub(crate) fn make_directories(&self, path: &str) -> Result<OwnedFd, Errno> {
        match self.directory(path) {
            Err(Errno::NOENT) => {}
            result => return result,
        }
        // Each turn makes one more component; the path has a bounded number of them.
        let mut end = 0;
        let bytes = path.as_bytes();
        while end < bytes.len() {
            end = bytes[end..]
                .iter()
                .skip(1)
                .position(|b| *b == b'/')
                .map_or(bytes.len(), |n| end + 1 + n);
            let prefix = &path[..end];
            if !matches!(self.directory(prefix), Err(Errno::NOENT)) {
                continue;
            }
            let Some((above, name)) = split(prefix) else {
                continue;
            };
            let above = self.directory(above)?;
            match mkdirat(&above, name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error),
            }
        }
        self.directory(path)
    }

    pub(crate) fn stat(&self, path: &str) -> Result<Stat, Errno> {
        fstat(self.open(path, OFlags::PATH, Mode::empty())?)
    }

    /// Whether it is a regular file that someone may execute; an error where it is not there.
    pub(crate) fn is_executable(&self, path: &str) -> Result<bool, Errno> {
        let stat = self.stat(path)?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        Ok(regular && stat.st_mode & 0o111 != 0)
    }

    /// The beginning of a text file.
    pub(crate) fn read_text(&self, path: &str, max_bytes: u64) -> Result<String, Errno> {
        let fd = self.open(path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty())?;
        let mut bytes = Vec::new();
        File::from(fd)
            .take(max_bytes)
            .read_to_end(&mut bytes)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_and_dots_stay_inside() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open_at(dir.path().to_str().unwrap()).unwrap();
        symlink("/", dir.path().join("abs")).unwrap();
        symlink("../../../..", dir.path().join("up")).unwrap();
        for path in ["/abs/a/b", "up/c/d", "../../e", "f/../g"] {
            root.make_directories(path).unwrap();
        }
        for made in ["a/b", "c/d", "e", "f", "g"] {
            assert!(dir.path().join(made).is_dir(), "{made}");
        }
        assert_eq!(root.stat("/abs/etc/passwd").unwrap_err(), Errno::NOENT);
        assert_eq!(split("/a/b/"), Some(("/a", "b")));
        assert_eq!(split("b"), Some(("", "b")));
        assert_eq!(split("/"), None);
        assert_eq!(split("a/.."), None);
    }
}
