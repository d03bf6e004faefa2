//! Xen's devices for user space: event channels and granted memory. Layouts and numbers are those
//! of Linux' public headers `xen/evtchn.h`, `xen/gntalloc.h` and `xen/gntdev.h`.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, read, write};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::ring::PAGE_BYTES;

const EVENT_CHANNELS: &str = "/dev/xen/evtchn";
const GRANTING: &str = "/dev/xen/gntalloc";
const MAPPING: &str = "/dev/xen/gntdev";

const BIND_INTERDOMAIN: u32 = 0x0008_4501;
const BIND_UNBOUND_PORT: u32 = 0x0004_4502;
const NOTIFY: u32 = 0x0004_4504;
const ALLOC_GREF: u32 = 0x0018_4705;
const MAP_GRANT_REF: u32 = 0x0018_4700;
/// The same number on both devices for memory.
const SET_UNMAP_NOTIFY: u32 = 0x0010_4707;

const WRITABLE: u32 = 1;
const CLEAR_BYTE: u32 = 1;
const SEND_EVENT: u32 = 2;

/// A page of the peer's may be on its way back from disk: so often it is tried again, after a
/// millisecond each.
const MAP_TRIES: u32 = 100;
/// More ports than ever wait on a descriptor with one bound.
const PORTS: usize = 16;

/// Why a device did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device is not there.
    #[error("cannot open {path}: not a Xen domain, or the device's kernel module is not loaded")]
    Missing {
        /// The device.
        path: &'static str,
        /// What opening said.
        #[source]
        source: io::Error,
    },
    /// The device refused.
    #[error("cannot {what}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// The system's words.
        #[source]
        source: io::Error,
    },
}

fn open_device(path: &'static str) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    open(path, flags, Mode::empty()).map_err(|error| Error::Missing {
        path,
        source: error.into(),
    })
}

/// # Safety
/// The words have the layout that the request wants of its argument, and are as many.
unsafe fn ioctl(
    fd: &OwnedFd,
    request: u32,
    words: &mut [u32],
    what: &'static str,
) -> Result<u32, Error> {
    // C libraries differ in the type of a request.
    // SAFETY: the caller's promise; the descriptor is open.
    let result: c_int = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, words.as_mut_ptr()) };
    u32::try_from(result).map_err(|_| Error::Refused {
        what,
        source: io::Error::last_os_error(),
    })
}

/// One bound event channel.
#[derive(Debug)]
pub(crate) struct EventChannel {
    fd: OwnedFd,
    port: u32,
}

impl EventChannel {
    /// A port that `peer` may bind to.
    pub(crate) fn unbound(peer: u16) -> Result<EventChannel, Error> {
        let fd = open_device(EVENT_CHANNELS)?;
        let mut request = [u32::from(peer)];
        let what = "allocate an event channel";
        // SAFETY: the argument is the domain.
        let port = unsafe { ioctl(&fd, BIND_UNBOUND_PORT, &mut request, what) }?;
        Ok(EventChannel { fd, port })
    }

    /// Binds to a port of `peer`'s.
    pub(crate) fn bound(peer: u16, remote_port: u32) -> Result<EventChannel, Error> {
        let fd = open_device(EVENT_CHANNELS)?;
        let mut request = [u32::from(peer), remote_port];
        let what = "bind to the peer's event channel";
        // SAFETY: the argument is the domain and its port.
        let port = unsafe { ioctl(&fd, BIND_INTERDOMAIN, &mut request, what) }?;
        Ok(EventChannel { fd, port })
    }

    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// Wakes the peer.
    pub(crate) fn notify(&self) -> io::Result<()> {
        // SAFETY: the argument is the port.
        match unsafe { ioctl(&self.fd, NOTIFY, &mut [self.port], "notify") } {
            Ok(_) => Ok(()),
            Err(Error::Refused { source, .. } | Error::Missing { source, .. }) => Err(source),
        }
    }

    /// Takes the events that have come, so that the next one makes the descriptor readable again.
    pub(crate) fn acknowledge(&self) -> io::Result<()> {
        let mut ports = [0; 4 * PORTS];
        loop {
            match read(&self.fd, &mut ports) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(()),
                // The port is masked until it is written back.
                Ok(length) => drop(write(&self.fd, &ports[..length])?),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for EventChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Memory that two domains share, and the device that keeps it.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    base: NonNull<u8>,
    length: usize,
    /// Where the device knows it.
    index: u64,
    device: OwnedFd,
}

// SAFETY: the mapping belongs to no thread.
unsafe impl Send for SharedMemory {}

impl SharedMemory {
    /// New pages of zeros that `peer` may map and write to, and the references to grant them by.
    pub(crate) fn grant(peer: u16, pages: usize) -> Result<(SharedMemory, Vec<u32>), Error> {
        let device = open_device(GRANTING)?;
        // Domain and flags in 16 bits each, count, index, references; the kernel takes no less
        // than the structure with two of them.
        let mut request = vec![0; (4 + pages).max(6)];
        request[0] = u32::from(peer) | WRITABLE << 16;
        request[1] = pages as u32;
        let what = "grant memory to the peer";
        // SAFETY: the layout above, with room for as many references as are asked for.
        unsafe { ioctl(&device, ALLOC_GREF, &mut request, what) }?;
        let index = u64::from(request[2]) | u64::from(request[3]) << 32;
        let memory = Self::map(device, index, pages, ProtFlags::READ | ProtFlags::WRITE)?;
        Ok((memory, request[4..4 + pages].to_vec()))
    }

    /// Pages that `peer` has granted.
    pub(crate) fn granted(peer: u16, references: &[u32], write: bool) -> Result<Self, Error> {
        let device = open_device(MAPPING)?;
        let pages = references.len();
        // Count, padding, index, and a domain and a reference for each.
        let mut request = vec![pages as u32, 0, 0, 0];
        for reference in references {
            request.extend([u32::from(peer), *reference]);
        }
        let what = "take the peer's grants";
        // SAFETY: the layout above, with as many pairs as it says, at least one.
        unsafe { ioctl(&device, MAP_GRANT_REF, &mut request, what) }?;
        let index = u64::from(request[2]) | u64::from(request[3]) << 32;
        let protection = if write {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        Self::map(device, index, pages, protection)
    }

    fn map(
        device: OwnedFd,
        index: u64,
        pages: usize,
        protection: ProtFlags,
    ) -> Result<SharedMemory, Error> {
        let length = pages * PAGE_BYTES;
        let refused = |source| Error::Refused {
            what: "map the shared memory",
            source,
        };
        let mut tries = MAP_TRIES;
        let base = loop {
            // SAFETY: a new mapping, where the kernel likes, that nothing refers to yet.
            let mapped = unsafe {
                mmap(
                    ptr::null_mut(),
                    length,
                    protection,
                    MapFlags::SHARED,
                    &device,
                    index,
                )
            };
            match mapped {
                Ok(base) => break base,
                Err(Errno::AGAIN) if tries > 0 => tries -= 1,
                Err(error) => return Err(refused(error.into())),
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        Ok(SharedMemory {
            base: NonNull::new(base.cast())
                .ok_or_else(|| refused(io::ErrorKind::AddrNotAvailable.into()))?,
            length,
            index,
            device,
        })
    }

    /// The address of a page.
    pub(crate) fn page(&self, number: usize) -> NonNull<u8> {
        assert!(number < self.length / PAGE_BYTES);
        // SAFETY: within the mapping.
        unsafe { self.base.add(number * PAGE_BYTES) }
    }

    /// Whatever way this end goes: a byte of the first page becomes 0, and the peer is notified.
    pub(crate) fn on_unmap(&self, byte: usize, events: &EventChannel) -> Result<(), Error> {
        let place = self.index + byte as u64;
        let (low, high) = (place as u32, (place >> 32) as u32);
        let mut request = [low, high, CLEAR_BYTE | SEND_EVENT, events.port];
        let what = "ask for a notice when the memory goes";
        // SAFETY: the argument is the index with the byte's offset, the actions and the port.
        unsafe { ioctl(&self.device, SET_UNMAP_NOTIFY, &mut request, what) }.map(drop)
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: this mapping, whole; what was made of it is not used any more, as `page` asks.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.length) };
        debug_assert!(unmapped.is_ok(), "a mapping of its own: {unmapped:?}");
    }
}
