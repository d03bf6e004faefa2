//! What lies in a source's ring: frames one after the other, which go over sockets as they are.
//!
//! A frame is a word, then its body filled with zeros to whole words, then words of a mask: a bit
//! for each of the source's sinks, by its slot, where not all of them are to have it. The word has the body's bytes in
//! its low 32 bits, then the words of the mask in 16, then what the body is in 8; on sockets the highest bit asks for
//! an acknowledgement at once. The mask does not go over sockets.

use std::sync::atomic::Ordering;

use crate::memory::Ring;

/// Cell: up to where the ring is written.
pub const HEAD: usize = 0;
/// Cell: from where on it still holds what was written.
pub const TAIL: usize = 1;
/// Cell: one more than the position that slow sinks must reach for the source to be woken; 0 while it does not wait.
pub const WANTED: usize = 2;

/// Cell of a sink's page: up to where it has read.
pub const CURSOR: usize = 0;
/// Cell of a sink's page: 1 while it sleeps and wants to be woken.
pub const SLEEPING: usize = 1;
/// Cell of a sink's page: the events before this one were not for it, as far as it has not read them.
pub const PASSED: usize = 3;
/// Cell of a sink's page: why the source wants it no longer, or 0.
pub const ENDED: usize = 2;

/// The source was left or its process ended.
pub const ENDED_LEFT: u64 = 1;
/// The sink was too slow.
pub const ENDED_SLOW: u64 = 2;

/// Bytes of a frame before its body.
pub const HEADER_BYTES: usize = 8;

/// Bit of the last byte of a frame's word, on sockets only: it is to be acknowledged as soon as it is taken.
pub const ASKS: u8 = 0x80;

/// What a frame's body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An event.
    Event,
    /// The descriptor of a type, which the events after it may be of.
    Type,
    /// On sockets only: how many events were dropped before the next one, 8 bytes.
    Dropped,
    /// On sockets only: the source has left, and nothing follows.
    End,
    /// On sockets only: the sink is to acknowledge what it has read.
    Ask,
}

/// The word before a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the body.
    pub bytes: usize,
    /// Words of the mask.
    pub mask_words: usize,
    /// What the body is; `None` for what this version does not know.
    pub kind: Option<Kind>,
    /// Whether it is to be acknowledged as soon as it is taken.
    pub asks: bool,
}

impl Header {
    /// The word of a header.
    pub fn word(bytes: usize, mask_words: usize, kind: Kind) -> u64 {
        let kind: u64 = match kind {
            Kind::Event => 1,
            Kind::Type => 2,
            Kind::Dropped => 3,
            Kind::End => 4,
            Kind::Ask => 5,
        };
        (bytes as u64 & 0xffff_ffff) | ((mask_words as u64 & 0xffff) << 32) | (kind << 48)
    }

    /// The header in a word.
    pub fn read(word: u64) -> Header {
        Header {
            bytes: (word & 0xffff_ffff) as usize,
            mask_words: (word >> 32 & 0xffff) as usize,
            asks: word >> 63 == 1,
            kind: match word >> 48 & 0x7fff {
                1 => Some(Kind::Event),
                2 => Some(Kind::Type),
                3 => Some(Kind::Dropped),
                4 => Some(Kind::End),
                5 => Some(Kind::Ask),
                _ => None,
            },
        }
    }

    /// Bytes of the frame without its mask: what goes over a socket.
    pub fn sent_bytes(self) -> usize {
        HEADER_BYTES + self.bytes.next_multiple_of(8)
    }

    /// Bytes of the frame in the ring.
    pub fn stride(self) -> usize {
        self.sent_bytes() + 8 * self.mask_words
    }

    /// Whether the sink of a slot is to have the frame at `position`.
    pub fn selects(self, ring: &Ring, position: u64, slot: usize) -> bool {
        if self.mask_words == 0 {
            return true;
        }
        let word = slot / 64;
        let at = position + self.sent_bytes() as u64 + 8 * word as u64;
        word < self.mask_words && ring.load(at) >> (slot % 64) & 1 == 1
    }
}

/// What a reader finds in a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing that was not read.
    Nothing,
    /// A frame, whose body was appended.
    Frame(Header),
    /// What came next is no longer there; it goes on with what still is.
    Overrun,
    /// What no source writes.
    Nonsense,
}

/// Where a reader of a ring is.
#[derive(Debug)]
pub struct Reader {
    /// Up to where it has read.
    pub position: u64,
    /// Which bit of masks is its own.
    pub slot: usize,
    /// Up to where it is known to be written.
    head: u64,
    /// The sequence after that of the last event, or of those that were not for this sink.
    next: u64,
    /// What was written over has not been counted yet.
    overrun: bool,
    /// Events that were written over before they were read, all in all.
    pub lost: u64,
}

/// The sequence of the event whose frame is at `position`.
#[inline]
pub fn sequence(ring: &Ring, position: u64) -> u64 {
    u64::from_le(ring.load(position + HEADER_BYTES as u64))
}

impl Reader {
    /// One that begins at a frame, with the event of this sequence.
    pub fn new(position: u64, next: u64, slot: usize) -> Reader {
        Reader {
            position,
            slot,
            head: position,
            next,
            overrun: false,
            lost: 0,
        }
    }

    /// The events before this one were not for this sink: that they were written over is no loss.
    pub fn spare(&mut self, passed: u64) {
        self.next = self.next.max(passed);
    }

    /// Whether there is something to read, or a closer look is needed.
    pub fn is_behind(&self, ring: &Ring) -> bool {
        ring.cell(HEAD).load(Ordering::Acquire) != self.position
    }

    /// Reads the next frame for this sink and appends its body to `out`.
    #[inline]
    pub fn next(&mut self, ring: &Ring, out: &mut Vec<u8>) -> Found {
        let begin = out.len();
        loop {
            if self.position == self.head {
                self.head = ring.cell(HEAD).load(Ordering::Acquire);
                if self.position == self.head {
                    return Found::Nothing;
                }
            }
            let header = Header::read(ring.load(self.position));
            let sequence = sequence(ring, self.position);
            let selected = header.stride() <= ring.capacity() && {
                let selected = header.selects(ring, self.position, self.slot);
                if selected {
                    ring.copy_out(self.position + HEADER_BYTES as u64, header.bytes, out);
                }
                selected
            };
            // What was read counts only if it was not written over meanwhile: the writer moves the tail before it writes.
            std::sync::atomic::fence(Ordering::Acquire);
            let tail = ring.cell(TAIL).load(Ordering::Acquire);
            if tail > self.position {
                out.truncate(begin);
                self.position = tail;
                self.head = ring.cell(HEAD).load(Ordering::Acquire).max(tail);
                self.overrun = true;
                return Found::Overrun;
            }
            let end = self.position.wrapping_add(header.stride() as u64);
            if header.kind.is_none() || end > self.head {
                out.truncate(begin);
                return Found::Nonsense;
            }
            self.position = end;
            if header.kind == Some(Kind::Event) {
                if std::mem::take(&mut self.overrun) {
                    let lost = sequence.saturating_sub(self.next);
                    self.lost = self.lost.saturating_add(lost);
                }
                self.next = sequence.saturating_add(1);
            }
            if selected {
                return Found::Frame(header);
            }
        }
    }
}
