//! Memory that processes share: rings of words, and pages beside them. All `unsafe` that has to do with memory is here.
//!
//! What another process can write, or could have made too short, is never seen as a reference to
//! anything but an atomic, and a file is mapped only when it is sealed against being shortened.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Bytes before a ring's words, and of a [`Page`].
const PAGE: usize = 4096;
/// Bytes between two cells of a page: each has a cache line of its own, and its neighbour's too.
const CELL: usize = 128;
/// The smallest ring, in bytes.
pub const MIN_RING_BYTES: usize = 64 << 10;
/// The largest ring, in bytes.
pub const MAX_RING_BYTES: usize = 1 << 30;

/// From how many bytes on a string instruction is quicker than word after word.
#[cfg(target_arch = "x86_64")]
const STRING_BYTES: usize = 256;

/// Copies between memory that others may write meanwhile and memory of one's own. What comes then is a
/// mix of old and new, as with words one by one: it is an instruction, and no access that the language knows of.
///
/// # Safety
/// `bytes` bytes can be read at `from` and written at `to`, and do not overlap.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy_string(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: the caller's promise; the direction flag is clear, as everywhere.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") bytes => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
}

/// A mapping, undone when dropped.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is plain memory that any thread may use; all access is by atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `base` and `bytes` are those of a mapping that this value alone owns, and nothing
        // borrowed from it outlives it.
        let undone = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert!(undone.is_ok());
    }
}

impl Mapping {
    fn cell(&self, at: usize) -> &AtomicU64 {
        debug_assert!(at.is_multiple_of(8) && at + 8 <= self.bytes);
        // SAFETY: the callers keep `at` within the mapping and a multiple of 8; the mapping is
        // page-aligned and readable. It may be read-only: then only loads are made, which are
        // plain loads for 8 bytes on the 64-bit machines that this runs on. Everybody else's access
        // is by atomics of the same size.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(at).cast()) }
    }
}

/// A file of shared memory that cannot change its size.
fn sealed(name: &str, bytes: usize, more: SealFlags) -> io::Result<OwnedFd> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, bytes as u64)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | more)?;
    Ok(fd)
}

/// The size of a file that another process gave, if it cannot shrink.
fn checked_size(fd: &OwnedFd) -> io::Result<usize> {
    let seals = fcntl_get_seals(fd)?;
    if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
        return Err(io::Error::other("shared memory that is not sealed"));
    }
    usize::try_from(fstat(fd)?.st_size).map_err(io::Error::other)
}

/// A page of cells that two processes write.
#[derive(Debug)]
pub struct Page {
    mapping: Mapping,
}

impl Page {
    /// A new one, all zeros, and its file to be given to another process.
    ///
    /// # Errors
    /// What the system says.
    pub fn create() -> io::Result<(Page, OwnedFd)> {
        let fd = sealed("kecho-sink", PAGE, SealFlags::SEAL)?;
        Ok((Page::map(&fd)?, fd))
    }

    /// One that another process made.
    ///
    /// # Errors
    /// It is no such page; what the system says.
    pub fn open(fd: OwnedFd) -> io::Result<Page> {
        if checked_size(&fd)? != PAGE {
            return Err(io::Error::other("a sink's page of another size"));
        }
        Page::map(&fd)
    }

    fn map(fd: &OwnedFd) -> io::Result<Page> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice touches nothing that exists.
        let base = unsafe { mmap(null_mut(), PAGE, protection, MapFlags::SHARED, fd, 0)? };
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        Ok(Page {
            mapping: Mapping { base, bytes: PAGE },
        })
    }

    /// The n-th cell.
    pub fn cell(&self, n: usize) -> &AtomicU64 {
        assert!(n < PAGE / CELL);
        self.mapping.cell(n * CELL)
    }
}

/// A ring of words with a page of cells before it. Positions only grow; a position's word lies at
/// its remainder by the capacity. The ring is mapped twice in a row, so that what begins before
/// its end can be read on without a seam.
#[derive(Debug)]
pub struct Ring {
    mapping: Mapping,
    capacity: usize,
    /// Of one that this process made, to be given to others.
    fd: Option<OwnedFd>,
}

impl Ring {
    /// A new one, all zeros, that this process alone can write. The capacity is rounded up to a power of two.
    ///
    /// # Errors
    /// What the system says.
    pub fn create(capacity: usize) -> io::Result<Ring> {
        let capacity = capacity
            .clamp(MIN_RING_BYTES, MAX_RING_BYTES)
            .next_power_of_two();
        let fd = sealed("kecho-log", PAGE + capacity, SealFlags::empty())?;
        let ring = Ring::map(&fd, capacity, ProtFlags::READ | ProtFlags::WRITE)?;
        // From here on nobody can map it for writing, this process neither.
        fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE | SealFlags::SEAL)?;
        Ok(Ring {
            fd: Some(fd),
            ..ring
        })
    }

    /// One that another process made, to read.
    ///
    /// # Errors
    /// It is no such ring; what the system says.
    pub fn open(fd: OwnedFd) -> io::Result<Ring> {
        let capacity = checked_size(&fd)?.saturating_sub(PAGE);
        if !capacity.is_power_of_two() || !(MIN_RING_BYTES..=MAX_RING_BYTES).contains(&capacity) {
            return Err(io::Error::other("a ring of another size"));
        }
        Ring::map(&fd, capacity, ProtFlags::READ)
    }

    fn map(fd: &OwnedFd, capacity: usize, protection: ProtFlags) -> io::Result<Ring> {
        let bytes = PAGE + 2 * capacity;
        // SAFETY: a new mapping at a place of the kernel's choice touches nothing that exists.
        let base =
            unsafe { mmap_anonymous(null_mut(), bytes, ProtFlags::empty(), MapFlags::PRIVATE)? };
        let base = NonNull::new(base.cast::<u8>()).ok_or(Errno::NOMEM)?;
        let mapping = Mapping { base, bytes };
        let fixed = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: both replace parts of the mapping just made, which nothing refers to: its page and
        // the first copy of the ring, then the second copy.
        unsafe {
            mmap(
                base.as_ptr().cast(),
                PAGE + capacity,
                protection,
                fixed,
                fd,
                0,
            )?;
            let second = base.as_ptr().add(PAGE + capacity);
            mmap(second.cast(), capacity, protection, fixed, fd, PAGE as u64)?;
        }
        Ok(Ring {
            mapping,
            capacity,
            fd: None,
        })
    }

    /// Its file, if this process made it.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// How many bytes of the past it holds.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The n-th cell of the page before the ring.
    pub fn cell(&self, n: usize) -> &AtomicU64 {
        assert!(n < PAGE / CELL);
        self.mapping.cell(n * CELL)
    }

    /// Where a position lies in the mapping.
    fn at(&self, position: u64) -> usize {
        PAGE + (position as usize & (self.capacity - 1))
    }

    /// The word at a position, a multiple of 8.
    #[inline]
    pub fn load(&self, position: u64) -> u64 {
        self.mapping
            .cell(self.at(position & !7))
            .load(Ordering::Relaxed)
    }

    /// Sets the word at a position, a multiple of 8. Only whoever made the ring may.
    #[inline]
    pub fn store(&self, position: u64, word: u64) {
        self.mapping
            .cell(self.at(position & !7))
            .store(word, Ordering::Relaxed);
    }

    /// Appends `bytes` bytes from a position on, a multiple of 8, to `out`.
    ///
    /// # Panics
    /// For more bytes than the ring has.
    #[inline]
    pub fn copy_out(&self, position: u64, bytes: usize, out: &mut Vec<u8>) {
        assert!(bytes <= self.capacity);
        let begin = out.len();
        #[cfg(target_arch = "x86_64")]
        if bytes >= STRING_BYTES {
            out.reserve(bytes);
            // SAFETY: the range lies within the mapping, which has the ring twice, and there is room for it
            // after what `out` has, which is all written then.
            unsafe {
                let from = self.mapping.base.as_ptr().add(self.at(position & !7));
                copy_string(from, out.as_mut_ptr().add(begin), bytes);
                out.set_len(begin + bytes);
            }
            return;
        }
        out.resize(begin + bytes, 0);
        let mut at = self.at(position & !7);
        let mut chunks = out[begin..].chunks_exact_mut(8);
        for chunk in &mut chunks {
            chunk.copy_from_slice(&self.mapping.cell(at).load(Ordering::Relaxed).to_ne_bytes());
            at += 8;
        }
        let rest = chunks.into_remainder();
        if !rest.is_empty() {
            let word = self.mapping.cell(at).load(Ordering::Relaxed).to_ne_bytes();
            rest.copy_from_slice(&word[..rest.len()]);
        }
    }

    /// Appends what lies between two positions, of which the first need not begin a word, to `out`.
    pub fn copy_bytes(&self, from: u64, to: u64, out: &mut Vec<u8>) {
        let begin = out.len();
        let skip = (from & 7) as usize;
        self.copy_out(from, (to - (from & !7)) as usize, out);
        out.drain(begin..begin + skip);
    }

    /// Sends `bytes` bytes from a position on over a socket, as many as fit now.
    ///
    /// # Errors
    /// What `send(2)` says.
    ///
    /// # Panics
    /// For more bytes than the ring has.
    pub fn send(&self, position: u64, bytes: usize, socket: BorrowedFd<'_>) -> io::Result<usize> {
        use std::os::fd::AsRawFd;
        assert!(bytes <= self.capacity);
        // SAFETY: the range lies within the mapping, which has the ring twice. The kernel reads it;
        // no reference is made. If it is written meanwhile, what is sent is neither the old nor the new,
        // which is the caller's affair.
        let sent = unsafe {
            let from = self.mapping.base.as_ptr().add(self.at(position));
            libc::send(
                socket.as_raw_fd(),
                from.cast(),
                bytes,
                libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Writes from a position on, a multiple of 8. Only whoever made the ring may.
    pub fn pen(&self, position: u64) -> Pen<'_> {
        Pen {
            ring: self,
            position,
            word: [0; 8],
            filled: 0,
        }
    }
}

/// Puts bytes into a ring, word by word.
#[derive(Debug)]
pub struct Pen<'a> {
    ring: &'a Ring,
    position: u64,
    word: [u8; 8],
    filled: usize,
}

impl Pen<'_> {
    /// Puts these bytes after those before.
    #[inline]
    pub fn put(&mut self, mut bytes: &[u8]) {
        if self.filled > 0 {
            let more = bytes.len().min(8 - self.filled);
            self.word[self.filled..self.filled + more].copy_from_slice(&bytes[..more]);
            self.filled += more;
            bytes = &bytes[more..];
            if self.filled < 8 {
                return;
            }
            self.flush();
        }
        let (words, rest) = bytes.as_chunks::<8>();
        #[cfg(target_arch = "x86_64")]
        if words.len() >= STRING_BYTES / 8 {
            assert!(bytes.len() <= self.ring.capacity);
            // SAFETY: the range lies within the mapping, which has the ring twice, and only who makes a ring,
            // which maps it writable, has a pen. The words are as many bytes as are read.
            unsafe {
                let to = self.ring.mapping.base.as_ptr();
                let to = to.add(self.ring.at(self.position));
                copy_string(bytes.as_ptr(), to, 8 * words.len());
            }
            self.position += 8 * words.len() as u64;
            self.word[..rest.len()].copy_from_slice(rest);
            self.filled = rest.len();
            return;
        }
        for word in words {
            self.ring.store(self.position, u64::from_ne_bytes(*word));
            self.position += 8;
        }
        self.word[..rest.len()].copy_from_slice(rest);
        self.filled = rest.len();
    }

    fn flush(&mut self) {
        self.ring
            .store(self.position, u64::from_ne_bytes(self.word));
        self.position += 8;
        self.filled = 0;
    }

    /// Fills the last word with zeros and tells the position after it.
    #[inline]
    pub fn finish(mut self) -> u64 {
        if self.filled > 0 {
            self.word[self.filled..].fill(0);
            self.flush();
        }
        self.position
    }
}

/// A counter that wakes whoever reads it: `eventfd(2)`.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    /// A new one.
    ///
    /// # Errors
    /// What the system says.
    pub fn create() -> io::Result<Bell> {
        Ok(Bell(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    /// One that another process gave.
    pub fn open(fd: OwnedFd) -> Bell {
        Bell(fd)
    }

    /// Wakes.
    pub fn ring(&self) {
        // It fails where the counter is full, and then it wakes all the same; or where the other process gave
        // something that is no eventfd, and then it is its own loss.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Forgets what has rung.
    pub fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_over_the_seam_is_read_back() {
        let ring = Ring::create(1).unwrap();
        assert_eq!(ring.capacity(), MIN_RING_BYTES);
        let fd = ring.file().unwrap().try_clone_to_owned();
        let reader = Ring::open(fd.unwrap()).unwrap();
        for bytes in [45u64, 255, 256, 257, 1003, 50_000] {
            let position = ring.capacity() as u64 - 16;
            let text: Vec<u8> = (0..bytes).map(|n| (n % 251) as u8).collect();
            let mut pen = ring.pen(position);
            for piece in [&text[..3], &text[3..20], &text[20..21], &text[21..]] {
                pen.put(piece);
            }
            assert_eq!(pen.finish(), position + bytes.next_multiple_of(8));
            let mut out = vec![9];
            reader.copy_out(position, bytes as usize, &mut out);
            assert!(out[1..] == text, "{bytes} bytes");
            assert_eq!(reader.load(position), ring.load(position));
        }
    }

    #[test]
    fn a_reader_cannot_write_and_nobody_can_shorten() {
        let ring = Ring::create(1).unwrap();
        let fd = ring.file().unwrap().try_clone_to_owned().unwrap();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, if there is one at all.
        let mapped = unsafe { mmap(null_mut(), PAGE, protection, MapFlags::SHARED, &fd, 0) };
        assert_eq!(mapped, Err(Errno::PERM));
        assert_eq!(ftruncate(&fd, 0), Err(Errno::PERM));
        let unsealed = memfd_create("x", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&unsealed, (PAGE + MIN_RING_BYTES) as u64).unwrap();
        let error = Ring::open(unsealed).unwrap_err();
        assert_eq!(error.to_string(), "shared memory that is not sealed");
    }
}
