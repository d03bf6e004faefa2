//! Descriptors that are awaited until something can be read.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A descriptor to await. It must not block.
pub(crate) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` stays open, under one number, for as long as it exists.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}
