//! Removing trees without leaving the root or crossing into other file systems.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, fstat, openat, statat, unlinkat};
use rustix::io::Errno;

use crate::root::{Root, split};

/// Deeper trees are refused: each level holds a descriptor.
const MAX_DEPTH: usize = 256;

/// Removes a file, link or directory tree. What is not there is removed already.
pub(crate) fn remove(root: &Root, path: &str) -> Result<(), Errno> {
    let (above, name) = split(path).ok_or(Errno::BUSY)?;
    let directory = match root.directory(above) {
        Err(Errno::NOENT) => return Ok(()),
        result => result?,
    };
    let device = fstat(&directory)?.st_dev;
    match entry(directory.as_fd(), name, device, 0) {
        Err(Errno::NOENT) => Ok(()),
        result => result,
    }
}

/// Removes all that is in a directory, and not the directory.
pub(crate) fn empty(directory: BorrowedFd<'_>, device: u64, depth: usize) -> Result<(), Errno> {
    if depth >= MAX_DEPTH {
        return Err(Errno::LOOP);
    }
    let mut first_error = Ok(());
    for item in Dir::read_from(directory)? {
        let item = item?;
        let name = item.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        // The rest goes all the same.
        first_error = first_error.and(entry(directory, name, device, depth));
    }
    first_error
}

fn entry<P: rustix::path::Arg + Copy>(
    directory: BorrowedFd<'_>,
    name: P,
    device: u64,
    depth: usize,
) -> Result<(), Errno> {
    let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if !FileType::from_raw_mode(stat.st_mode).is_dir() {
        return unlinkat(directory, name, AtFlags::empty());
    }
    if stat.st_dev != device {
        return Err(Errno::XDEV);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let below = openat(directory, name, flags, Mode::empty())?;
    empty(below.as_fd(), device, depth + 1)?;
    unlinkat(directory, name, AtFlags::REMOVEDIR)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_tree_goes_and_what_links_lead_to_stays() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open_at(dir.path().to_str().unwrap()).unwrap();
        fs::create_dir_all(dir.path().join("a/b/c")).unwrap();
        fs::create_dir(dir.path().join("kept")).unwrap();
        fs::write(dir.path().join("a/b/f"), "x").unwrap();
        fs::write(dir.path().join("kept/f"), "x").unwrap();
        symlink("../kept", dir.path().join("a/link")).unwrap();
        remove(&root, "/a").unwrap();
        assert!(!dir.path().join("a").exists());
        assert!(dir.path().join("kept/f").exists());
        remove(&root, "a").unwrap();
        remove(&root, "no/such").unwrap();
        assert_eq!(remove(&root, "/").unwrap_err(), Errno::BUSY);
    }
}
