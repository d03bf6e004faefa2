//! A byte stream between two domains over shared memory and an event channel: Xen's "vchan"
//! protocol, both ends, interoperable with libxenvchan. Nothing blocks.
//!
//! The server grants the memory and announces it in xenstore; a client maps it. One client at a
//! time: what a client has not read, the next one would, so a server serves each client with a
//! channel of its own.
//!
//! A channel does not survive that its domain is saved and restored: neither end hears of it, and
//! a guest's kernel (Linux 6.12 and before) fails when the descriptor is closed afterwards. Close
//! it before. Where that was missed, [`Vchan::abandon`] it, as dropping it does where it sees by the
//! clocks that the domain has been suspended. Nor does an end hear of it when
//! the other's domain is destroyed: watch `@releaseDomain`.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd};

use crate::device::{self, EventChannel, SharedMemory};
use crate::ring::{Broken, CLIENT_LIVE, Memory, Page, Peer, Place, Rings, SERVER_LIVE, Side, Step};
use crate::suspend::Moment;
use crate::xenstore::{self, Access, Xenstore};

/// Size of the ring for each direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RingSize {
    /// 4 KiB.
    Kib4 = 12,
    /// 64 KiB: as much as moves with each change of the running process on one processor, and 31
    /// channels within what a Linux guest may grant by default.
    #[default]
    Kib64 = 16,
    /// 1 MiB: 513 pages of the 1024 that a Linux guest may grant by default.
    Mib1 = 20,
}

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Event channels or shared memory do not work.
    #[error(transparent)]
    Device(#[from] device::Error),
    /// The rendezvous does not work.
    #[error(transparent)]
    Xenstore(#[from] xenstore::Error),
    /// What the server says of its channel cannot be.
    #[error("the vchan at {path:?} is announced wrongly: {what}")]
    Malformed {
        /// The channel's path.
        path: String,
        /// What is wrong.
        what: &'static str,
    },
}

impl Error {
    /// The error's stable name.
    pub fn code(&self) -> &'static str {
        match self {
            Error::Device(device::Error::Missing { .. }) => "xen-device-missing",
            Error::Device(device::Error::Refused { .. }) => "xen-device-refused",
            Error::Xenstore(error) => error.code(),
            Error::Malformed { .. } => "vchan-malformed",
        }
    }
}

/// One end of a channel. Dropping it closes it.
#[derive(Debug)]
pub struct Vchan {
    ends: ManuallyDrop<Ends>,
    /// Before it was made.
    since: Moment,
    /// Where a server has announced it.
    announced: Option<String>,
}

// In this order they go: who shares the memory hears of it by the event channel.
#[derive(Debug)]
struct Ends {
    rings: Rings,
    _memory: Vec<SharedMemory>,
    events: EventChannel,
}

impl Vchan {
    /// Makes a channel for `peer` and announces it under `path` in xenstore, in place of all that
    /// was there. In a guest the path is below `data/`.
    ///
    /// # Errors
    /// Any but [`Error::Malformed`]. [`device::Error::Missing`] where this kernel has no vchan.
    pub fn serve(
        store: &mut Xenstore,
        peer: u16,
        path: &str,
        ring: RingSize,
    ) -> Result<Vchan, Error> {
        // Its port and its grants may be given out again, for this channel even.
        store.remove(path)?;
        let since = Moment::now();
        let events = EventChannel::unbound(peer)?;
        let order = ring as u16;
        let size = 1 << order;
        let ring_pages = size as usize / crate::ring::PAGE_BYTES;
        let (memory, grants) = SharedMemory::grant(peer, 1 + 2 * ring_pages)?;
        memory.on_unmap(SERVER_LIVE, &events)?;
        // SAFETY: the first page, and the two rings in those that follow, are part of `memory`,
        // which goes with the channel; only what is made here reaches them.
        let (page, [left, right]) = unsafe {
            (
                Page::new(memory.page(0)),
                [1, 1 + ring_pages].map(|number| Memory::new(memory.page(number), size)),
            )
        };
        page.announce(order, &grants[1..]);
        let ends = Ends {
            rings: Rings::new(page, Side::Server, left, right),
            _memory: vec![memory],
            events,
        };
        let channel = Vchan {
            ends: ManuallyDrop::new(ends),
            since,
            announced: Some(path.into()),
        };
        store.transaction::<_, Error>(|store| {
            let own = own_domain(store)?;
            for (name, value) in [
                ("ring-ref", grants[0]),
                ("event-channel", channel.ends.events.port()),
            ] {
                let node = format!("{path}/{name}");
                store.write(&node, &value.to_string())?;
                store.set_permissions(&node, (own, Access::None), &[(peer, Access::Read)])?;
            }
            Ok(())
        })?;
        Ok(channel)
    }

    /// Becomes the client of the channel that `peer` has announced under `path`. `None` where
    /// nobody serves there: watch the path and try again.
    ///
    /// # Errors
    /// Any.
    pub fn connect(store: &mut Xenstore, peer: u16, path: &str) -> Result<Option<Vchan>, Error> {
        let announced = store.transaction::<_, Error>(|store| {
            let mut number = |name| -> Result<Option<u32>, Error> {
                let Some(text) = store.read(&format!("{path}/{name}"))? else {
                    return Ok(None);
                };
                text.parse()
                    .map(Some)
                    .map_err(|_| malformed(path, "not a number"))
            };
            Ok(number("ring-ref")?.zip(number("event-channel")?))
        })?;
        let Some((grant, port)) = announced else {
            return Ok(None);
        };
        let since = Moment::now();
        // What a killed server leaves behind names a port or pages that are no more.
        let Some(events) = unless_stale(EventChannel::bound(peer, port))? else {
            return Ok(None);
        };
        let Some(first) = unless_stale(SharedMemory::granted(peer, &[grant], true))? else {
            return Ok(None);
        };
        // SAFETY: the page is part of `first`, which goes with the channel; only what is made here
        // reaches it.
        let page = unsafe { Page::new(first.page(0)) };
        // Before anything is written: the page may be another one by now.
        if !page.is_served() {
            return Ok(None);
        }
        first.on_unmap(CLIENT_LIVE, &events)?;
        let places = page
            .places()
            .ok_or_else(|| malformed(path, "rings of such sizes"))?;
        let mut memory = vec![first];
        let mut rings = Vec::with_capacity(2);
        // The client writes to the left one only.
        for (place, write) in places.into_iter().zip([true, false]) {
            rings.push(match place {
                Place::InPage { order } => page.ring(order),
                Place::Granted { grants } => {
                    let granted = SharedMemory::granted(peer, &grants, write);
                    let Some(mapped) = unless_stale(granted)? else {
                        return Ok(None);
                    };
                    let size = (grants.len() * crate::ring::PAGE_BYTES) as u32;
                    // SAFETY: all of this mapping, which goes with the channel, writable where
                    // this end writes; a ring has a power of two of pages. Only what is made here
                    // reaches it.
                    let ring = unsafe { Memory::new(mapped.page(0), size) };
                    memory.push(mapped);
                    ring
                }
            });
        }
        let ends = Ends {
            rings: Rings::new(page, Side::Client, rings[0], rings[1]),
            _memory: memory,
            events,
        };
        let channel = Vchan {
            ends: ManuallyDrop::new(ends),
            since,
            announced: None,
        };
        channel.ends.rings.arrive();
        let told = channel.ends.events.notify();
        Ok(unless_stale(told.map_err(|source| device::Error::Refused {
            what: "notify the server",
            source,
        }))?
        .map(|()| channel))
    }

    /// Whether the other end is there now.
    pub fn is_connected(&self) -> bool {
        self.ends.rings.peer() == Peer::Live
    }

    /// Whether no client has come yet.
    pub fn is_awaited(&self) -> bool {
        self.ends.rings.peer() == Peer::Awaited
    }

    /// Reads what is there; 0 once the other end has gone and all of its bytes are read.
    ///
    /// # Errors
    /// `WouldBlock` where there is nothing now: the descriptor becomes readable when there is.
    /// `InvalidData` where the peer breaks the protocol.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let step = self.ends.rings.read(buffer);
        Ok(self.finish(step)?.unwrap_or(0))
    }

    /// [`Vchan::read`] that looks again, if there is nothing, once it has taken the events.
    pub(crate) fn read_after_events(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.acknowledge()?;
                self.read(buffer)
            }
            result => result,
        }
    }

    /// Writes what fits now.
    ///
    /// # Errors
    /// `WouldBlock` where nothing fits, or no client has come yet: the descriptor becomes readable
    /// when that changes. `BrokenPipe` where the other end has gone. `InvalidData` where the peer
    /// breaks the protocol.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let step = self.ends.rings.write(bytes);
        self.finish(step)?
            .ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }

    /// The bytes that moved; `None` where the channel is closed.
    fn finish(&self, step: Result<Step, Broken>) -> io::Result<Option<usize>> {
        match step {
            Ok(Step::Moved { bytes, tell }) => {
                if tell {
                    self.ends.events.notify()?;
                }
                Ok(Some(bytes))
            }
            Ok(Step::Blocked) => Err(io::ErrorKind::WouldBlock.into()),
            Ok(Step::Closed) => Ok(None),
            Err(broken) => Err(io::Error::new(io::ErrorKind::InvalidData, broken)),
        }
    }

    /// Asks to be woken, and says whether there is something to do already: bytes or the end to
    /// read, or room where this end `wants_to_write`. If not, the descriptor becomes readable when
    /// there is.
    pub fn is_ready(&self, wants_to_write: bool) -> bool {
        self.ends.rings.is_ready(wants_to_write)
    }

    /// Takes the events that have made the descriptor readable. To be called before looking for
    /// what they are about.
    ///
    /// # Errors
    /// What the device says.
    pub fn acknowledge(&self) -> io::Result<()> {
        self.ends.events.acknowledge()
    }

    /// Closes the channel and takes its announcement back.
    ///
    /// # Errors
    /// What xenstore says. The channel is closed nevertheless.
    pub fn close(mut self, store: &mut Xenstore) -> Result<(), xenstore::Error> {
        let announced = self.announced.take();
        drop(self);
        announced.map_or(Ok(()), |path| store.remove(&path))
    }

    /// Gives up a channel that was open while its domain was saved and restored, without touching
    /// it: its memory, 33 of the 1024 pages that a guest may grant by default, and its descriptors
    /// stay until the process ends. Not even the memory can be given back: with it the kernel lets go
    /// of the event channel that is to tell of this, by a number that is another channel's by now.
    pub fn abandon(self) {
        std::mem::forget(self);
    }
}

impl Drop for Vchan {
    fn drop(&mut self) {
        // A guest may have been frozen on its way to here.
        if self.since.is_before_suspending() {
            return;
        }
        self.ends.rings.leave();
        // The kernel notifies once more when the memory goes.
        let _notified = self.ends.events.notify();
        // SAFETY: they are used no more.
        unsafe { ManuallyDrop::drop(&mut self.ends) };
    }
}

impl AsFd for Vchan {
    /// Readable after something has changed that this end has asked for by reading or writing. Never
    /// to be polled for writing: the device is always writable.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ends.events.as_fd()
    }
}

fn own_domain(store: &mut Xenstore) -> Result<u16, Error> {
    let own = store.read("domid")?.and_then(|id| id.parse().ok());
    own.ok_or_else(|| malformed("domid", "not the number of a domain"))
}

fn malformed(path: &str, what: &'static str) -> Error {
    Error::Malformed {
        path: path.into(),
        what,
    }
}

/// `None` where the peer's port or memory is not there (any more).
fn unless_stale<T>(result: Result<T, device::Error>) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(device::Error::Refused { source, .. })
            if matches!(
                source.raw_os_error(),
                Some(libc::EINVAL | libc::ENOENT | libc::ESRCH)
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}
