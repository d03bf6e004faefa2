//! Streams between guests of one owner on one host, named by context identifier and port as on
//! vsock, whatever the hypervisor: [`dial`] reaches one, a [`PeerListener`] accepts.
//!
//! Guests of QEMU use `AF_VSOCK`, and the host's switch passes the streams on. Guests of Xen use a
//! vchan of their own for each stream; xenstore and domain 0 bring the two together. A process of
//! such a guest needs root and the kernel modules of vchan, and gets one more thread with its first
//! dial or listener. Which of the two it is, the guest's devices say.
//!
//! | what is there | on vsock | on Xen |
//! |---|---|---|
//! | a guest of one's own, nobody listens | `ConnectionReset` | `ConnectionRefused` |
//! | no such guest, or another owner's | `ConnectionReset` | `ConnectionReset` |
//! | a listener that takes no more | it waits | `ConnectionRefused` |
//! | too much under way | | `ResourceBusy` |
//! | no answer | `TimedOut` | `TimedOut` |
//! | the other guest is destroyed | the end | `ConnectionReset` |
//! | the other program is killed | the end or `ConnectionReset` | the end |
//!
//! A guest's own identifier is a guest of one's own like another: who listens is found without vsock or Xen, by an abstract name of
//! a unix socket, and must be of root or of who dials (otherwise `PermissionDenied`; where nobody listens, `ConnectionRefused`).
//!
//! So an end does not prove that all has come: what matters says so in its own bytes. On Xen there is no half-close, and when a guest is saved its streams end, for
//! itself with `ConnectionReset`, of which it hears five seconds later or when it goes on. A guest's
//! kernel has room for 31 streams that it serves, the host's among them, unless the parameter `limit`
//! of its module `xen-gntalloc` is raised.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFlags, epoll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, listen, socket_with};

use crate::host::HostDoor;
use crate::hub::{self, PeerQueue};
use crate::xenstore::{self, Xenstore};
use crate::{Address, Carrier, Link, own, rendezvous, vsock};

/// Streams that wait to be accepted.
pub(crate) const BACKLOG: usize = 16;

/// Who is at the other end of an accepted stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerAddress {
    /// Context identifier of its guest; [`HOST_CID`](crate::HOST_CID) for the host, on vsock.
    pub cid: u32,
    /// Its port; 0 of a program of this guest.
    pub port: u32,
}

/// Takes streams at a port.
#[derive(Debug)]
pub struct PeerListener(Door);

#[derive(Debug)]
enum Door {
    Guest(GuestDoor),
    Host(HostDoor),
}

/// In a guest: where others come, where its own programs do, and what tells of both.
#[derive(Debug)]
struct GuestDoor {
    others: Others,
    own: OwnedFd,
    cid: u32,
    events: OwnedFd,
}

#[derive(Debug)]
enum Others {
    Socket(OwnedFd),
    Queue(PeerQueue),
}

impl GuestDoor {
    fn new(others: Others, own: OwnedFd, cid: u32) -> io::Result<GuestDoor> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let of_others = match &others {
            Others::Socket(fd) => fd.as_fd(),
            Others::Queue(queue) => queue.as_fd(),
        };
        for door in [of_others, own.as_fd()] {
            let data = epoll::EventData::new_u64(0);
            epoll::add(&events, door, data, epoll::EventFlags::IN)?;
        }
        Ok(GuestDoor {
            others,
            own,
            cid,
            events,
        })
    }

    fn accept(&mut self) -> io::Result<Option<(Link, PeerAddress)>> {
        if let Some(fd) = own::accept(&self.own)? {
            // It has no port of its own.
            let from = PeerAddress {
                cid: self.cid,
                port: 0,
            };
            return Ok(Some((Link(Carrier::Socket(fd)), from)));
        }
        match &mut self.others {
            Others::Queue(queue) => Ok(queue
                .accept()
                .map(|(stream, from)| (Link(Carrier::Peer(stream)), from))),
            Others::Socket(listener) => match vsock::accept(listener) {
                Ok((fd, cid, port)) => {
                    let link = Link(Carrier::Socket(fd));
                    Ok(Some((link, PeerAddress { cid, port })))
                }
                // Who wanted to connect has gone again.
                Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(None),
                Err(error) => Err(error.into()),
            },
        }
    }
}

impl PeerListener {
    /// Listens at a port of this guest.
    ///
    /// # Errors
    /// `AddrInUse`; `InvalidInput` for the port `u32::MAX`, which vsock gives a meaning of its own;
    /// what the system says.
    pub fn bind(port: u32) -> io::Result<PeerListener> {
        if port == vsock::ANY {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // First what shows that a program of this guest has the port.
        let own = own::door(port)?;
        let others = if is_xen() {
            Others::Queue(hub::listen(port)?)
        } else {
            let fd = socket_with(
                AddressFamily::from_raw(libc::AF_VSOCK as u16),
                SocketType::STREAM,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                None,
            )?;
            vsock::bind(&fd, port)?;
            listen(&fd, BACKLOG as i32)?;
            Others::Socket(fd)
        };
        // One that has no identifier yet listens all the same.
        let cid = local_cid().unwrap_or(vsock::ANY);
        Ok(PeerListener(Door::Guest(GuestDoor::new(others, own, cid)?)))
    }

    /// Of a program on the host.
    pub(crate) fn of_host(door: HostDoor) -> PeerListener {
        PeerListener(Door::Host(door))
    }

    /// A stream that has come, with who has dialled it; `None` where there is none now.
    ///
    /// # Errors
    /// What the system says; of [`crate::host::listen`]'s, `BrokenPipe` when the switch has gone.
    pub fn accept(&mut self) -> io::Result<Option<(Link, PeerAddress)>> {
        match &mut self.0 {
            Door::Guest(door) => door.accept(),
            Door::Host(door) => door.accept(),
        }
    }

    /// What to poll the descriptor for.
    pub fn interest(&self) -> PollFlags {
        PollFlags::IN
    }
}

impl AsFd for PeerListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Door::Guest(door) => door.events.as_fd(),
            Door::Host(door) => door.as_fd(),
        }
    }
}

/// Begins to reach a port of another guest of the same owner, or of this one, as [`Link::dial`] does.
///
/// # Errors
/// What the system says. What the table above has may come here or from [`Link::connected`].
pub fn dial(cid: u32, port: u32) -> io::Result<Link> {
    if local_cid().is_ok_and(|own| own == cid) {
        return Ok(Link(Carrier::Socket(own::dial(port)?)));
    }
    // Apart from `Link::dial`, so that the agent, which dials no guest, need not contain all this.
    match is_xen() {
        true => Ok(Link(Carrier::Peer(hub::dial(cid, port)?))),
        false => Link::dial(&Address::Vsock { cid, port }),
    }
}

/// This guest's context identifier.
///
/// # Errors
/// `NotFound` where it has none, or not yet; what the system says.
pub fn local_cid() -> io::Result<u32> {
    if !is_xen() {
        return vsock::local_cid();
    }
    let cid = Xenstore::open()?.read(rendezvous::CID)?;
    let cid = cid.ok_or(io::ErrorKind::NotFound)?;
    rendezvous::number(&cid).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Whether this is a guest of Xen's. One can have vsock's device too, and nothing behind it.
fn is_xen() -> bool {
    Path::new(xenstore::DEVICE).exists()
}
