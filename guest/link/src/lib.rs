//! The agent's way to the host: one non-blocking byte stream, whatever carries it.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod device;
mod ring;
pub mod vchan;
pub mod xenstore;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv,
    send, socket_with, sockopt,
};

/// The host's context identifier on vsock.
pub const HOST_CID: u32 = 2;

/// Whom to dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `AF_VSOCK`.
    Vsock {
        /// Context identifier.
        cid: u32,
        /// Port.
        port: u32,
    },
    /// A unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A stream to the host. Nothing blocks.
#[derive(Debug)]
pub struct Link {
    fd: OwnedFd,
}

impl Link {
    /// Begins to connect. When the stream is writable, [`Link::connected`] tells how it went.
    ///
    /// # Errors
    /// What `socket(2)` and `connect(2)` say, other than that it takes its time.
    pub fn dial(address: &Address) -> io::Result<Link> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (family, connected);
        let fd = match address {
            Address::Unix(path) => {
                family = AddressFamily::UNIX;
                let fd = socket_with(family, SocketType::STREAM, flags, None)?;
                connected = connect(&fd, &SocketAddrUnix::new(path)?);
                fd
            }
            Address::Vsock { cid, port } => {
                family = AddressFamily::from_raw(libc::AF_VSOCK as u16);
                let fd = socket_with(family, SocketType::STREAM, flags, None)?;
                connected = connect_vsock(&fd, *cid, *port);
                fd
            }
        };
        match connected {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(Link { fd }),
            Err(error) => Err(error.into()),
        }
    }

    /// How connecting went.
    ///
    /// # Errors
    /// Why it failed.
    pub fn connected(&self) -> io::Result<()> {
        Ok(sockopt::socket_error(&self.fd)??)
    }

    /// Reads what is there; 0 at the end.
    ///
    /// # Errors
    /// `WouldBlock` where there is nothing now, and what `recv(2)` says.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let (length, _) = recv(&self.fd, buffer, RecvFlags::empty())?;
        Ok(length)
    }

    /// Writes what fits now. A closed stream is an error, not a signal.
    ///
    /// # Errors
    /// `WouldBlock` where nothing fits now, and what `send(2)` says.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(&self.fd, bytes, SendFlags::NOSIGNAL)?)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn connect_vsock(fd: &OwnedFd, cid: u32, port: u32) -> Result<(), Errno> {
    // SAFETY: all-zero bytes are a valid sockaddr_vm, which has integers only.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    // SAFETY: the pointer is to a sockaddr_vm of the size given, alive during the call; the
    // descriptor is open.
    let result = unsafe {
        libc::connect(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn bytes_pass_both_ways_and_the_end_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let link = Link::dial(&Address::Unix(path)).unwrap();
        link.connected().unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        let mut buffer = [0; 8];
        assert_eq!(
            link.read(&mut buffer).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        assert_eq!(link.write(b"to").unwrap(), 2);
        peer.read_exact(&mut buffer[..2]).unwrap();
        assert_eq!(&buffer[..2], b"to");
        peer.write_all(b"fro").unwrap();
        assert_eq!(link.read(&mut buffer).unwrap(), 3);
        drop(peer);
        assert_eq!(link.read(&mut buffer).unwrap(), 0);
        assert_eq!(
            link.write(b"x").unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }

    #[test]
    fn nobody_listening_is_an_error_at_once() {
        let dir = tempfile::tempdir().unwrap();
        Link::dial(&Address::Unix(dir.path().join("none"))).unwrap_err();
    }
}
