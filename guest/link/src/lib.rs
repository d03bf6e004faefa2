//! The way to the host and to other guests: one non-blocking byte stream, whatever carries it.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod device;
pub mod host;
mod hub;
mod lock;
mod own;
pub mod peer;
pub mod rendezvous;
mod ring;
mod stream;
pub mod suspend;
pub mod vchan;
mod vsock;
pub mod xenstore;

use std::fmt;
use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with,
    bind, connect, listen, recv, send, socket_with, sockopt,
};

use crate::hub::PeerStream;
use crate::vchan::Vchan;

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
    /// TCP the other way round: the host connects, at any IPv6 address of the guest's.
    Listen {
        /// Port.
        port: u16,
    },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Listen { port } => write!(f, "tcp:[::]:{port}"),
        }
    }
}

/// A stream to the host or to another guest, or what is to become one. Nothing blocks.
#[derive(Debug)]
pub struct Link(Carrier);

#[derive(Debug)]
enum Carrier {
    Socket(OwnedFd),
    /// Until the host connects.
    Listener(OwnedFd),
    /// A program of the host's, until the switch has answered it, and what has come of the answer.
    Host(OwnedFd, Vec<u8>),
    Vchan(Vchan),
    Peer(PeerStream),
}

impl Link {
    /// Begins to connect. When the link is ready (see [`Link::interest`]), [`Link::connected`]
    /// tells how it went.
    ///
    /// # Errors
    /// What the system says, other than that it takes its time.
    pub fn dial(address: &Address) -> io::Result<Link> {
        let socket = |family| {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            socket_with(family, SocketType::STREAM, flags, None)
        };
        let (fd, connected) = match address {
            Address::Unix(path) => {
                let fd = socket(AddressFamily::UNIX)?;
                let connected = connect(&fd, &SocketAddrUnix::new(path)?);
                (fd, connected)
            }
            Address::Vsock { cid, port } => {
                let fd = socket(AddressFamily::from_raw(libc::AF_VSOCK as u16))?;
                let connected = vsock::connect(&fd, *cid, *port);
                (fd, connected)
            }
            Address::Listen { port } => {
                let fd = socket(AddressFamily::INET6)?;
                // Connections of before may linger.
                sockopt::set_socket_reuseaddr(&fd, true)?;
                bind(&fd, &SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, *port, 0, 0))?;
                listen(&fd, 1)?;
                return Ok(Link(Carrier::Listener(fd)));
            }
        };
        match connected {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(Link(Carrier::Socket(fd))),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the other end is there now. To be asked when the link is ready, until it says yes.
    ///
    /// # Errors
    /// Why it will not be.
    pub fn connected(&mut self) -> io::Result<bool> {
        match &mut self.0 {
            Carrier::Socket(fd) => {
                sockopt::socket_error(fd)??;
                Ok(true)
            }
            Carrier::Host(fd, answer) => match host::answered(fd, answer)? {
                true => {
                    self.0 = Carrier::Socket(fd.try_clone()?);
                    Ok(true)
                }
                false => Ok(false),
            },
            Carrier::Listener(listener) => {
                match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                    Ok(fd) => {
                        // Small frames wait for nothing.
                        sockopt::set_tcp_nodelay(&fd, true)?;
                        self.0 = Carrier::Socket(fd);
                        Ok(true)
                    }
                    // Who wanted to connect has gone again.
                    Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(false),
                    Err(error) => Err(error.into()),
                }
            }
            Carrier::Vchan(vchan) => {
                vchan.acknowledge()?;
                // One that has gone again already is found out by the first read.
                Ok(!vchan.is_awaited())
            }
            Carrier::Peer(stream) => stream.connected(),
        }
    }

    /// What to poll the descriptor for; `None` where there is something to do without waiting.
    pub fn interest(&self, wants_to_write: bool) -> Option<PollFlags> {
        match &self.0 {
            Carrier::Socket(_) if wants_to_write => Some(PollFlags::IN | PollFlags::OUT),
            Carrier::Vchan(vchan) if vchan.is_ready(wants_to_write) => None,
            Carrier::Peer(stream) if stream.is_ready(wants_to_write) => None,
            // Of a vchan the descriptor tells of changes only, and by being readable.
            _ => Some(PollFlags::IN),
        }
    }

    /// Reads what is there; 0 at the end.
    ///
    /// # Errors
    /// `WouldBlock` where there is nothing now, and what `recv(2)` says.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            Carrier::Socket(fd) => Ok(recv(fd, buffer, RecvFlags::empty())?.0),
            Carrier::Listener(_) | Carrier::Host(..) => Err(io::ErrorKind::NotConnected.into()),
            Carrier::Vchan(vchan) => vchan.read_after_events(buffer),
            Carrier::Peer(stream) => stream.read(buffer),
        }
    }

    /// Writes what fits now. A closed stream is an error, not a signal.
    ///
    /// # Errors
    /// `WouldBlock` where nothing fits now, and what `send(2)` says.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            Carrier::Socket(fd) => Ok(send(fd, bytes, SendFlags::NOSIGNAL)?),
            Carrier::Listener(_) | Carrier::Host(..) => Err(io::ErrorKind::NotConnected.into()),
            Carrier::Vchan(vchan) => vchan.write(bytes),
            Carrier::Peer(stream) => stream.write(bytes),
        }
    }

    /// Gives the link up after its domain was restored elsewhere: see [`Vchan::abandon`].
    pub fn abandon(self) {
        if let Carrier::Vchan(vchan) = self.0 {
            vchan.abandon();
        }
    }
}

impl From<Vchan> for Link {
    fn from(vchan: Vchan) -> Link {
        Link(Carrier::Vchan(vchan))
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Carrier::Socket(fd) | Carrier::Listener(fd) | Carrier::Host(fd, _) => fd.as_fd(),
            Carrier::Vchan(vchan) => vchan.as_fd(),
            Carrier::Peer(stream) => stream.as_fd(),
        }
    }
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
        let mut link = Link::dial(&Address::Unix(path)).unwrap();
        assert!(link.connected().unwrap());
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
    fn the_host_may_come_to_the_guest() {
        // A port that nobody has just now.
        let free = std::net::TcpListener::bind("[::1]:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let mut link = Link::dial(&Address::Listen { port }).unwrap();
        assert_eq!(link.interest(false), Some(PollFlags::IN));
        assert!(!link.connected().unwrap());
        let mut peer = std::net::TcpStream::connect(("::1", port)).unwrap();
        assert!(link.connected().unwrap());
        assert_eq!(link.write(b"to").unwrap(), 2);
        let mut buffer = [0; 2];
        peer.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"to");
        assert_eq!(link.interest(true), Some(PollFlags::IN | PollFlags::OUT));
    }

    #[test]
    fn nobody_listening_is_an_error_at_once() {
        let dir = tempfile::tempdir().unwrap();
        Link::dial(&Address::Unix(dir.path().join("none"))).unwrap_err();
    }
}
