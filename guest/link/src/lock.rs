//! Numbers of which each belongs to one process of this machine, until it lets go of it or ends.
//!
//! They are locks on the bytes of a file (`F_OFD_SETLK`, fcntl(2)), so that whatever way a process
//! ends, its numbers are free, and others can see that what it has left behind is nobody's.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// A process's way to the numbers. Those taken go with it.
#[derive(Debug)]
pub(crate) struct Numbers(File);

impl Numbers {
    /// All who open the same file share the numbers.
    pub(crate) fn open(path: &str) -> io::Result<Numbers> {
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Numbers(file))
    }

    /// Takes a number; `false` where somebody else has it.
    pub(crate) fn take(&self, number: i64) -> io::Result<bool> {
        let mut lock = byte(number, libc::F_WRLCK);
        match self.fcntl(libc::F_OFD_SETLK, &mut lock) {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Lets go of a number.
    pub(crate) fn give_back(&self, number: i64) -> io::Result<()> {
        self.fcntl(libc::F_OFD_SETLK, &mut byte(number, libc::F_UNLCK))
    }

    /// Whether somebody else has the number.
    pub(crate) fn is_taken(&self, number: i64) -> io::Result<bool> {
        let mut lock = byte(number, libc::F_WRLCK);
        self.fcntl(libc::F_OFD_GETLK, &mut lock)?;
        Ok(i32::from(lock.l_type) != libc::F_UNLCK)
    }

    fn fcntl(&self, command: i32, lock: &mut libc::flock) -> io::Result<()> {
        // SAFETY: the commands take a pointer to a flock, alive during the call; the descriptor is
        // open.
        match unsafe { libc::fcntl(self.0.as_raw_fd(), command, std::ptr::from_mut(lock)) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn byte(number: i64, kind: i32) -> libc::flock {
    // SAFETY: all-zero bytes are a valid flock, which has integers only.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as _;
    lock.l_whence = libc::SEEK_SET as _;
    lock.l_start = number;
    lock.l_len = 1;
    lock
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_has_one_owner_until_it_goes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let (one, other) = (Numbers::open(path).unwrap(), Numbers::open(path).unwrap());
        assert!(one.take(5).unwrap());
        assert!(one.take(1 << 33).unwrap());
        assert!(!other.take(5).unwrap());
        assert!(other.take(6).unwrap());
        assert!(other.is_taken(5).unwrap() && !one.is_taken(5).unwrap());
        one.give_back(5).unwrap();
        assert!(!other.is_taken(5).unwrap() && other.take(5).unwrap());
        drop(one);
        assert!(other.take(1 << 33).unwrap());
    }
}
