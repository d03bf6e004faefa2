//! The two rings of a vchan, and the page that tells of them: what both ends do in shared memory.
//! Nothing here makes a system call.
//!
//! Layout and numbers are those of Xen's public header `io/libxenvchan.h`. The page holds for each
//! direction the index that its writer moves (`prod`) and the one that its reader moves (`cons`),
//! both counting bytes for ever; the orders of the rings' sizes; a byte for each end that says
//! whether it is there; and a byte for each end in which the other asks to be woken.
//!
//! The peer may write anything at any time. An end keeps its own index to itself, and takes the
//! peer's for nothing but a distance, which is refused when it is longer than the ring.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::SeqCst};

/// Size of a page, in bytes.
pub(crate) const PAGE_BYTES: usize = 4096;
/// Byte in which a client says that it is there.
pub(crate) const CLIENT_LIVE: usize = 20;
/// Byte in which a server says that it is there.
pub(crate) const SERVER_LIVE: usize = 21;

/// Left is what the client writes and the server reads.
const LEFT_CONS: usize = 0;
const LEFT_PROD: usize = 4;
const RIGHT_CONS: usize = 8;
const RIGHT_PROD: usize = 12;
/// Two numbers of 16 bits, the left one first.
const ORDERS: usize = 16;
/// What the server asks the client for; [`SERVER_NOTIFY`] the other way.
const CLIENT_NOTIFY: usize = 22;
const SERVER_NOTIFY: usize = 23;
const GRANTS: usize = 24;

/// In a notify byte: wake me when you have written.
const WRITTEN: u8 = 1;
/// In a notify byte: wake me when you have read.
const CONSUMED: u8 = 2;

const LIVE: u8 = 1;
/// What a server puts into [`CLIENT_LIVE`] for the time until a client comes.
const AWAITED: u8 = 2;

/// Rings of these orders lie in the page itself, at an offset that is their size.
const IN_PAGE_ORDERS: [u16; 2] = [10, 11];
const PAGE_ORDER: u16 = 12;
const MAX_ORDER: u16 = 20;

/// The peer's index cannot be: it is hostile, or its memory has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer's index is beyond the ring")]
pub(crate) struct Broken;

/// Which end of the channel this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Server,
    Client,
}

/// Whether the other end is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    Awaited,
    Live,
    Gone,
}

/// What came of an attempt to read or write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// So many bytes moved. `tell` says that the peer has asked to hear of it.
    Moved { bytes: usize, tell: bool },
    /// Nothing can move now. The peer has been asked to say when.
    Blocked,
    /// The peer has gone, and nothing is left to read.
    Closed,
}

/// A page in shared memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Page(NonNull<u8>);

impl Page {
    /// # Safety
    /// `base` is page-aligned and points to [`PAGE_BYTES`] that can be read and written for as long
    /// as this value and what is made of it are used, and that Rust code reaches through such
    /// values only.
    pub(crate) unsafe fn new(base: NonNull<u8>) -> Page {
        Page(base)
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < PAGE_BYTES);
        // SAFETY: within the page, which lives for as long as this value.
        unsafe { AtomicU8::from_ptr(self.0.as_ptr().add(offset)) }
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset <= PAGE_BYTES - 4);
        // SAFETY: within the page, which lives for as long as this value, and aligned.
        unsafe { AtomicU32::from_ptr(self.0.as_ptr().add(offset).cast()) }
    }

    /// Makes it the page of a new channel with rings of `order` in pages granted as `grants`.
    pub(crate) fn announce(&self, order: u16, grants: &[u32]) {
        for offset in [LEFT_CONS, LEFT_PROD, RIGHT_CONS, RIGHT_PROD] {
            self.word(offset).store(0, SeqCst);
        }
        let order = u32::from(order);
        self.word(ORDERS).store(order | order << 16, SeqCst);
        for (index, grant) in grants.iter().enumerate() {
            self.word(GRANTS + 4 * index).store(*grant, SeqCst);
        }
        self.byte(CLIENT_LIVE).store(AWAITED, SeqCst);
        self.byte(SERVER_LIVE).store(LIVE, SeqCst);
        // So that the first byte of a client that has not asked for anything yet wakes the server.
        self.byte(CLIENT_NOTIFY).store(WRITTEN, SeqCst);
        self.byte(SERVER_NOTIFY).store(0, SeqCst);
    }

    /// Whether it is the page of a server that is there.
    pub(crate) fn is_served(&self) -> bool {
        self.byte(SERVER_LIVE).load(SeqCst) == LIVE
    }

    /// Where a server says that the rings are, left and right. Read once: it may change.
    pub(crate) fn places(&self) -> Option<[Place; 2]> {
        let orders = self.word(ORDERS).load(SeqCst);
        let orders = [orders as u16, (orders >> 16) as u16];
        if orders[0] == orders[1] && IN_PAGE_ORDERS.contains(&orders[0]) {
            return None;
        }
        let mut grants = (GRANTS..PAGE_BYTES).step_by(4);
        let mut place = |order: u16| {
            if IN_PAGE_ORDERS.contains(&order) {
                return Some(Place::InPage { order });
            }
            if !(PAGE_ORDER..=MAX_ORDER).contains(&order) {
                return None;
            }
            let pages = 1 << (order - PAGE_ORDER);
            let grants: Vec<u32> = grants
                .by_ref()
                .take(pages)
                .map(|offset| self.word(offset).load(SeqCst))
                .collect();
            Some(Place::Granted { grants })
        };
        Some([place(orders[0])?, place(orders[1])?])
    }

    /// The ring of an order that lies in the page.
    pub(crate) fn ring(&self, order: u16) -> Memory {
        let size = 1 << order;
        assert!(IN_PAGE_ORDERS.contains(&order));
        Memory {
            // SAFETY: both orders' offset and size are within the page.
            base: unsafe { self.0.add(size) },
            size: size as u32,
        }
    }
}

/// Where a ring is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the page: [`Page::ring`].
    InPage { order: u16 },
    /// In pages of its own.
    Granted { grants: Vec<u32> },
}

/// The memory of a ring: a power of two of bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    base: NonNull<u8>,
    size: u32,
}

impl Memory {
    /// # Safety
    /// `base` points to `size` bytes that can be read, and written where this end writes to the
    /// ring, for as long as this value and what is made of it are used, and that Rust code reaches
    /// through such values only.
    pub(crate) unsafe fn new(base: NonNull<u8>, size: u32) -> Memory {
        assert!(size.is_power_of_two());
        Memory { base, size }
    }

    /// Where the byte of an index is, and how many follow it up to the end of the ring.
    fn at(&self, index: u32) -> (*mut u8, usize) {
        let offset = index & (self.size - 1);
        // SAFETY: the offset is less than the size.
        let place = unsafe { self.base.as_ptr().add(offset as usize) };
        (place, (self.size - offset) as usize)
    }

    fn copy_out(&self, index: u32, buffer: &mut [u8]) {
        assert!(buffer.len() <= self.size as usize);
        let (place, straight) = self.at(index);
        let (first, second) = buffer.split_at_mut(straight.min(buffer.len()));
        // SAFETY: `straight` bytes are in the ring from `place` on, and all that is left, which is
        // less than the ring, from its beginning. A peer that writes meanwhile changes which bytes
        // are read; they are its own.
        unsafe {
            place.copy_to_nonoverlapping(first.as_mut_ptr(), first.len());
            (self.base.as_ptr()).copy_to_nonoverlapping(second.as_mut_ptr(), second.len());
        }
    }

    fn copy_in(&self, index: u32, bytes: &[u8]) {
        assert!(bytes.len() <= self.size as usize);
        let (place, straight) = self.at(index);
        let (first, second) = bytes.split_at(straight.min(bytes.len()));
        // SAFETY: as in `copy_out`; this end writes to the ring, so that its memory is writable.
        unsafe {
            place.copy_from_nonoverlapping(first.as_ptr(), first.len());
            (self.base.as_ptr()).copy_from_nonoverlapping(second.as_ptr(), second.len());
        }
    }
}

/// One direction, as one end sees it.
#[derive(Debug)]
struct Ring {
    memory: Memory,
    /// The index that this end moves. What the page says of it is for the peer.
    mine: u32,
    mine_at: usize,
    peers_at: usize,
}

/// One end of both rings.
#[derive(Debug)]
pub(crate) struct Rings {
    page: Page,
    side: Side,
    incoming: Ring,
    outgoing: Ring,
}

// SAFETY: the pointers are to shared memory that belongs to no thread, and what is reached through
// `&self` is atomic.
unsafe impl Send for Rings {}

impl Rings {
    /// An end of a channel whose page has been announced: goes on where the indexes are.
    pub(crate) fn new(page: Page, side: Side, left: Memory, right: Memory) -> Rings {
        let ring = |memory, mine_at, peers_at| Ring {
            memory,
            mine: page.word(mine_at).load(SeqCst),
            mine_at,
            peers_at,
        };
        let (incoming, outgoing) = match side {
            Side::Server => (
                ring(left, LEFT_CONS, LEFT_PROD),
                ring(right, RIGHT_PROD, RIGHT_CONS),
            ),
            Side::Client => (
                ring(right, RIGHT_CONS, RIGHT_PROD),
                ring(left, LEFT_PROD, LEFT_CONS),
            ),
        };
        Rings {
            page,
            side,
            incoming,
            outgoing,
        }
    }

    /// Says that a client is there now; the server is to be notified.
    pub(crate) fn arrive(&self) {
        self.page.byte(CLIENT_LIVE).store(LIVE, SeqCst);
        self.ask(WRITTEN);
    }

    /// Says that this end is not there any more; the peer is to be notified.
    pub(crate) fn leave(&self) {
        let own = match self.side {
            Side::Server => SERVER_LIVE,
            Side::Client => CLIENT_LIVE,
        };
        self.page.byte(own).store(0, SeqCst);
    }

    /// Whether the other end is there.
    pub(crate) fn peer(&self) -> Peer {
        let live = match self.side {
            Side::Server => CLIENT_LIVE,
            Side::Client => SERVER_LIVE,
        };
        match (self.side, self.page.byte(live).load(SeqCst)) {
            (_, LIVE) => Peer::Live,
            (Side::Server, AWAITED) => Peer::Awaited,
            _ => Peer::Gone,
        }
    }

    /// Reads what is there.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Result<Step, Broken> {
        // The second look is after asking, so that nothing can come unnoticed in between.
        for asked in [false, true] {
            if asked {
                self.ask(WRITTEN);
            }
            // In this order: what was written before the peer left is seen.
            let peer = self.peer();
            let bytes = self.readable()?.min(buffer.len());
            if bytes > 0 {
                let ring = &mut self.incoming;
                ring.memory.copy_out(ring.mine, &mut buffer[..bytes]);
                ring.mine = ring.mine.wrapping_add(bytes as u32);
                self.page.word(ring.mine_at).store(ring.mine, SeqCst);
                let tell = self.is_asked(CONSUMED);
                return Ok(Step::Moved { bytes, tell });
            }
            if peer == Peer::Gone {
                return Ok(Step::Closed);
            }
        }
        Ok(Step::Blocked)
    }

    /// Writes what fits.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<Step, Broken> {
        for asked in [false, true] {
            if asked {
                self.ask(CONSUMED);
            }
            match self.peer() {
                Peer::Gone => return Ok(Step::Closed),
                // A client that comes always says so.
                Peer::Awaited => return Ok(Step::Blocked),
                Peer::Live => {}
            }
            let length = self.writable()?.min(bytes.len());
            if length > 0 {
                let ring = &mut self.outgoing;
                ring.memory.copy_in(ring.mine, &bytes[..length]);
                ring.mine = ring.mine.wrapping_add(length as u32);
                self.page.word(ring.mine_at).store(ring.mine, SeqCst);
                let tell = self.is_asked(WRITTEN);
                return Ok(Step::Moved {
                    bytes: length,
                    tell,
                });
            }
        }
        Ok(Step::Blocked)
    }

    /// Asks to be woken and looks whether there is something to do now: bytes to read, room where
    /// this end `wants_to_write`, or that the peer has gone.
    pub(crate) fn is_ready(&self, wants_to_write: bool) -> bool {
        self.ask(if wants_to_write {
            WRITTEN | CONSUMED
        } else {
            WRITTEN
        });
        match self.peer() {
            Peer::Awaited => false,
            Peer::Gone => true,
            Peer::Live => self.readable() != Ok(0) || wants_to_write && self.writable() != Ok(0),
        }
    }

    fn readable(&self) -> Result<usize, Broken> {
        let ring = &self.incoming;
        let used = self
            .page
            .word(ring.peers_at)
            .load(SeqCst)
            .wrapping_sub(ring.mine);
        if used > ring.memory.size {
            return Err(Broken);
        }
        Ok(used as usize)
    }

    fn writable(&self) -> Result<usize, Broken> {
        let ring = &self.outgoing;
        let used = ring
            .mine
            .wrapping_sub(self.page.word(ring.peers_at).load(SeqCst));
        let room = ring.memory.size.checked_sub(used).ok_or(Broken)?;
        Ok(room as usize)
    }

    /// Asks the peer to notify.
    fn ask(&self, what: u8) {
        let to = match self.side {
            Side::Server => CLIENT_NOTIFY,
            Side::Client => SERVER_NOTIFY,
        };
        self.page.byte(to).fetch_or(what, SeqCst);
    }

    /// Whether the peer has asked; it asks again when it wants more.
    fn is_asked(&self, what: u8) -> bool {
        let to = match self.side {
            Side::Server => SERVER_NOTIFY,
            Side::Client => CLIENT_NOTIFY,
        };
        self.page.byte(to).fetch_and(!what, SeqCst) & what != 0
    }
}

#[cfg(test)]
mod tests {
    use std::alloc::{Layout, alloc_zeroed, dealloc};
    use std::sync::{Arc, Condvar, Mutex};
    use std::thread;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    /// Memory that two ends share, with guards around it that must stay as they are.
    struct Shared {
        base: NonNull<u8>,
        ring_bytes: usize,
    }

    // SAFETY: the memory belongs to no thread; it is freed when no end is left.
    unsafe impl Send for Shared {}
    // SAFETY: as above; only the ends reach it.
    unsafe impl Sync for Shared {}

    const GUARD: u8 = 0xa5;

    impl Shared {
        /// The page and both rings in pages of their own, or in the page for orders below 12.
        fn new(order: u16) -> Shared {
            let ring_bytes = 1 << order;
            let layout = Self::layout(ring_bytes);
            // SAFETY: the layout has a size.
            let base = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap();
            let shared = Shared { base, ring_bytes };
            for guard in shared.guards() {
                // SAFETY: a page of the allocation.
                unsafe { guard.write_bytes(GUARD, PAGE_BYTES) };
            }
            shared.page().announce(order, &[]);
            shared
        }

        fn layout(ring_bytes: usize) -> Layout {
            // Guard, page, guard, left, guard, right, guard.
            Layout::from_size_align(5 * PAGE_BYTES + 2 * ring_bytes, PAGE_BYTES).unwrap()
        }

        fn at(&self, offset: usize) -> NonNull<u8> {
            assert!(offset < Self::layout(self.ring_bytes).size());
            // SAFETY: within the allocation.
            unsafe { self.base.add(offset) }
        }

        fn left_at(&self) -> usize {
            3 * PAGE_BYTES
        }

        fn right_at(&self) -> usize {
            self.left_at() + self.ring_bytes + PAGE_BYTES
        }

        fn guards(&self) -> [NonNull<u8>; 4] {
            let offsets = [
                0,
                2 * PAGE_BYTES,
                self.left_at() + self.ring_bytes,
                self.right_at() + self.ring_bytes,
            ];
            offsets.map(|offset| self.at(offset))
        }

        fn page(&self) -> Page {
            // SAFETY: aligned, and freed after the ends.
            unsafe { Page::new(self.at(PAGE_BYTES)) }
        }

        fn end(&self, side: Side) -> Rings {
            let [left, right] = [self.left_at(), self.right_at()].map(|offset| {
                // SAFETY: so many bytes are there, and freed after the ends.
                unsafe { Memory::new(self.at(offset), self.ring_bytes as u32) }
            });
            Rings::new(self.page(), side, left, right)
        }
    }

    impl Drop for Shared {
        fn drop(&mut self) {
            for guard in self.guards() {
                for offset in 0..PAGE_BYTES {
                    // SAFETY: a page of the allocation; no end is left.
                    let byte = unsafe { guard.add(offset).read() };
                    if byte != GUARD && !thread::panicking() {
                        panic!("something was written beside the rings");
                    }
                }
            }
            // SAFETY: allocated with this layout, once.
            unsafe { dealloc(self.base.as_ptr(), Self::layout(self.ring_bytes)) };
        }
    }

    /// An event channel: events are a count, and one that waits takes all of them.
    #[derive(Default)]
    struct Events(Mutex<u64>, Condvar);

    impl Events {
        fn notify(&self) {
            *self.0.lock().unwrap() += 1;
            self.1.notify_one();
        }

        /// Panics where none comes: the wake-up was lost.
        fn wait(&self) {
            let (mut events, timeout) = self
                .1
                .wait_timeout_while(self.0.lock().unwrap(), Duration::from_secs(20), |events| {
                    *events == 0
                })
                .unwrap();
            assert!(!timeout.timed_out(), "a wake-up was lost");
            *events = 0;
        }
    }

    /// A run of numbers that look random.
    fn noise(seed: u64) -> impl FnMut() -> u64 {
        let mut state = seed | 1;
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        }
    }

    /// Sends and receives `total` bytes of noise at once, in pieces of random sizes, sleeping when blocked.
    fn exchange(
        rings: &mut Rings,
        seed: [u64; 2],
        total: usize,
        max_piece: usize,
        [own, peers]: [&Events; 2],
    ) {
        let mut sizes = noise(seed[0] ^ 0x55);
        let [mut outgoing, mut expected] = seed.map(noise);
        let mut waiting: Vec<u8> = Vec::new();
        let (mut sent, mut received) = (0, 0);
        while sent < total || received < total {
            let mut progress = false;
            if sent < total {
                if waiting.is_empty() {
                    let length = (sizes() as usize % max_piece + 1).min(total - sent);
                    waiting = (0..length).map(|_| outgoing() as u8).collect();
                }
                match rings.write(&waiting).unwrap() {
                    Step::Moved { bytes, tell } => {
                        sent += bytes;
                        waiting.drain(..bytes);
                        progress = true;
                        if tell {
                            peers.notify();
                        }
                    }
                    Step::Blocked => {}
                    Step::Closed => panic!("closed"),
                }
            }
            if received < total {
                let mut buffer = vec![0; sizes() as usize % max_piece + 1];
                match rings.read(&mut buffer).unwrap() {
                    Step::Moved { bytes, tell } => {
                        for byte in &buffer[..bytes] {
                            assert_eq!(*byte, expected() as u8, "after {received} bytes");
                            received += 1;
                        }
                        progress = true;
                        if tell {
                            peers.notify();
                        }
                    }
                    Step::Blocked => {}
                    Step::Closed => panic!("closed"),
                }
            }
            if !progress {
                own.wait();
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn every_byte_arrives_once_and_in_order_and_no_wake_up_is_lost(
            order in 10u16..15,
            max_piece in 1usize..70_000,
            seed in any::<u64>(),
        ) {
            let total = 200_000;
            let shared = Arc::new(Shared::new(order));
            let events = Arc::new([Events::default(), Events::default()]);
            let mut server = shared.end(Side::Server);
            let mut client = shared.end(Side::Client);
            client.arrive();
            let theirs = {
                let (shared, events) = (Arc::clone(&shared), Arc::clone(&events));
                thread::spawn(move || {
                    exchange(&mut client, [seed, !seed], total, max_piece, [&events[1], &events[0]]);
                    drop(shared);
                })
            };
            exchange(&mut server, [!seed, seed], total, max_piece, [&events[0], &events[1]]);
            theirs.join().unwrap();
            prop_assert_eq!(server.read(&mut [0; 8]), Ok(Step::Blocked));
        }

        /// The peer writes anything anywhere, at any time: it gets errors, and nothing else of ours.
        #[test]
        fn a_hostile_peer_gets_nowhere(
            side in prop_oneof![Just(Side::Server), Just(Side::Client)],
            order in 10u16..14,
            acts in prop::collection::vec((any::<u8>(), 0usize..PAGE_BYTES / 4, any::<u32>()), 1..200),
        ) {
            let shared = Shared::new(order);
            let mut rings = shared.end(side);
            let mut buffer = vec![0; 3 << order];
            let most = 1 << order;
            for (act, word, value) in acts {
                // Most often at what matters.
                let word = if act & 0x80 == 0 { word % 6 } else { word };
                shared.page().word(4 * word).store(value, SeqCst);
                let step = match act % 3 {
                    0 => rings.read(&mut buffer),
                    1 => rings.write(&buffer),
                    _ => {
                        rings.is_ready(act & 0x40 != 0);
                        continue;
                    }
                };
                if let Ok(Step::Moved { bytes, .. }) = step {
                    prop_assert!(bytes > 0 && bytes <= most);
                }
            }
        }

        #[test]
        fn whatever_a_server_announces_is_a_place_or_nothing(words in any::<[u32; 2]>()) {
            let shared = Shared::new(12);
            shared.page().word(ORDERS).store(words[0] & 0x1f_001f, SeqCst);
            shared.page().word(GRANTS).store(words[1], SeqCst);
            let orders = [words[0] as u16 & 0x1f, (words[0] >> 16) as u16 & 0x1f];
            let places = shared.page().places();
            let valid = orders.iter().all(|order| (10..=20).contains(order))
                && (orders[0] != orders[1] || orders[0] >= 12);
            prop_assert_eq!(places.is_some(), valid);
            for (place, order) in places.into_iter().flatten().zip(orders) {
                match place {
                    Place::InPage { order: own } => prop_assert_eq!(own, order),
                    Place::Granted { grants } => {
                        prop_assert_eq!(grants.len() * PAGE_BYTES, 1 << order);
                    }
                }
            }
        }
    }

    #[test]
    fn a_peer_that_changes_the_page_while_it_is_used_does_no_harm() {
        let shared = Arc::new(Shared::new(12));
        let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let hostile = {
            let (shared, over) = (Arc::clone(&shared), Arc::clone(&over));
            thread::spawn(move || {
                let mut random = noise(7);
                while !over.load(SeqCst) {
                    let word = 4 * (random() as usize % 6);
                    shared.page().word(word).store(random() as u32, SeqCst);
                }
            })
        };
        let mut buffer = vec![0; 10_000];
        for side in [Side::Server, Side::Client] {
            let mut rings = shared.end(side);
            for _ in 0..50_000 {
                for step in [rings.read(&mut buffer), rings.write(&buffer)] {
                    if let Ok(Step::Moved { bytes, .. }) = step {
                        assert!(bytes <= PAGE_BYTES);
                    }
                }
            }
        }
        over.store(true, SeqCst);
        hostile.join().unwrap();
    }

    #[test]
    fn the_rings_in_the_page_lie_behind_its_header_and_apart() {
        let shared = Shared::new(12);
        let page = shared.page();
        page.word(ORDERS).store(10 | 11 << 16, SeqCst);
        assert_eq!(
            page.places(),
            Some([Place::InPage { order: 10 }, Place::InPage { order: 11 }])
        );
        let base = page.0.as_ptr() as usize;
        for (order, offset) in [(10, 1024), (11, 2048)] {
            let ring = page.ring(order);
            assert_eq!(ring.base.as_ptr() as usize - base, offset);
            assert_eq!(ring.size as usize, offset);
        }
    }

    #[test]
    fn what_was_written_before_leaving_is_read_and_then_the_end() {
        let shared = Shared::new(12);
        let mut server = shared.end(Side::Server);
        let mut client = shared.end(Side::Client);
        assert!(shared.page().is_served());
        assert_eq!(server.peer(), Peer::Awaited);
        assert_eq!(server.read(&mut [0; 8]), Ok(Step::Blocked));
        assert_eq!(server.write(b"early"), Ok(Step::Blocked));
        client.arrive();
        assert_eq!(server.peer(), Peer::Live);
        // The server wants to hear of the first bytes, though it has not read since.
        let told = Step::Moved {
            bytes: 4,
            tell: true,
        };
        assert_eq!(client.write(b"last"), Ok(told));
        client.leave();
        assert!(server.is_ready(false));
        let mut buffer = [0; 8];
        assert!(matches!(
            server.read(&mut buffer),
            Ok(Step::Moved { bytes: 4, .. })
        ));
        assert_eq!(&buffer[..4], b"last");
        assert_eq!(server.read(&mut buffer), Ok(Step::Closed));
        assert_eq!(server.write(b"x"), Ok(Step::Closed));
    }

    #[test]
    fn the_peer_is_told_only_of_what_it_has_asked_for() {
        let shared = Shared::new(12);
        let mut server = shared.end(Side::Server);
        let mut client = shared.end(Side::Client);
        client.arrive();
        let moved = |bytes, tell| Ok(Step::Moved { bytes, tell });
        assert_eq!(server.write(b"1"), moved(1, true));
        assert_eq!(server.write(b"2"), moved(1, false));
        let mut buffer = vec![0; 8192];
        assert_eq!(client.read(&mut buffer), moved(2, false));
        assert_eq!(client.read(&mut buffer), Ok(Step::Blocked));
        assert!(!client.is_ready(false));
        assert_eq!(server.write(b"3"), moved(1, true));
        assert!(client.is_ready(false));

        assert_eq!(client.write(&buffer), moved(4096, true));
        assert_eq!(client.write(&buffer), Ok(Step::Blocked));
        assert_eq!(server.read(&mut buffer[..10]), moved(10, true));
        assert_eq!(server.read(&mut buffer[..10]), moved(10, false));
        assert!(client.is_ready(true));
    }

    #[test]
    fn indexes_go_on_beyond_32_bits() {
        let shared = Shared::new(12);
        for offset in [LEFT_CONS, LEFT_PROD, RIGHT_CONS, RIGHT_PROD] {
            shared.page().word(offset).store(u32::MAX - 100, SeqCst);
        }
        let mut server = shared.end(Side::Server);
        let mut client = shared.end(Side::Client);
        client.arrive();
        let bytes: Vec<u8> = (0..=255).cycle().take(1000).collect();
        let mut buffer = vec![0; 1000];
        for _ in 0..10 {
            assert!(matches!(
                client.write(&bytes),
                Ok(Step::Moved { bytes: 1000, .. })
            ));
            assert!(matches!(
                server.read(&mut buffer),
                Ok(Step::Moved { bytes: 1000, .. })
            ));
            assert_eq!(buffer, bytes);
        }
    }

    #[test]
    fn an_index_beyond_the_ring_is_refused() {
        let shared = Shared::new(12);
        let mut server = shared.end(Side::Server);
        let mut client = shared.end(Side::Client);
        client.arrive();
        shared.page().word(LEFT_PROD).store(4097, SeqCst);
        assert_eq!(server.read(&mut [0; 8]), Err(Broken));
        assert!(server.is_ready(false), "the error is to be noticed");
        shared.page().word(LEFT_CONS).store(1, SeqCst);
        assert_eq!(client.write(&[0; 8]), Err(Broken));
    }
}
