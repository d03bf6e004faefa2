//! A sink's way to one source: what it reads from its log or stream.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;

use super::SinkCounters;
use crate::event::EventRef;
use crate::log::{
    CURSOR, ENDED, ENDED_SLOW, Found, HEADER_BYTES, Header, Kind, PASSED, Reader, WANTED,
};
use crate::memory::{Bell, MAX_RING_BYTES, Page, Ring};
use crate::source::MAX_TYPES;
use crate::types::EventType;
use crate::wire::Wire;

/// What is read from a socket at once, in bytes.
const READ_BYTES: usize = 64 << 10;

/// How frames come.
pub(super) enum Carrier {
    Memory {
        ring: Arc<Ring>,
        page: Arc<Page>,
        space: Arc<Bell>,
        reader: Reader,
    },
    Socket(Box<Stream>),
}

/// A stream of frames.
pub(super) struct Stream {
    pub wire: Wire,
    /// What was received, of which what is before `begin` was read.
    pub buffer: Vec<u8>,
    pub begin: usize,
    /// Bytes of frames that were read, and of these what was acknowledged.
    pub read: u64,
    pub acked: u64,
    /// How many may be read before they are acknowledged.
    pub ack_bytes: u64,
    /// Acknowledgements that were not sent yet.
    pub acks: Vec<u8>,
    /// It may have more than was received.
    pub ready: bool,
}

/// What a sink has of one source.
pub(super) struct InLink {
    pub source: Uuid,
    pub token: u64,
    pub types: HashMap<u64, Arc<EventType>>,
    /// The type of the last event.
    pub recent: Option<Arc<EventType>>,
    pub carrier: Carrier,
    /// The source's process is gone: what is left is read, and then the link is over.
    pub lost: bool,
    /// The sequence of the event that the sink wants next, over whichever link.
    pub wanted: Arc<AtomicU64>,
    /// What the sink said of that before it was attached.
    pub asked: Option<u64>,
    /// Events that it has lost between this link and the one before.
    pub lost_before: u64,
    /// Events were dropped at some time.
    pub lossy: bool,
}

/// What one link had.
pub(super) enum Step {
    Nothing,
    Event(Arc<EventType>),
    /// It is over: whether it is to be linked again, and whether the sink was too slow.
    Over {
        again: bool,
        slow: bool,
    },
}

impl InLink {
    /// Reads the next event, appended to `out`.
    pub fn step(&mut self, out: &mut Vec<u8>, counters: &mut SinkCounters) -> Step {
        let begin = out.len();
        loop {
            let header = match &mut self.carrier {
                Carrier::Memory {
                    ring,
                    page,
                    space,
                    reader,
                } => {
                    let (before, lost) = (reader.position, reader.lost);
                    let found = reader.next(ring, out);
                    counters.dropped = counters.dropped.saturating_add(reader.lost - lost);
                    if reader.position != before {
                        page.cell(CURSOR).store(reader.position, Ordering::Release);
                        let wanted = ring.cell(WANTED).load(Ordering::Relaxed);
                        if wanted != 0 && before < wanted - 1 && reader.position >= wanted - 1 {
                            space.ring();
                        }
                    }
                    match found {
                        Found::Nothing => {
                            return match page.cell(ENDED).load(Ordering::Acquire) {
                                // What was written before the end is read first.
                                0 if self.lost && !reader.is_behind(ring) => Step::Over {
                                    again: true,
                                    slow: false,
                                },
                                0 => Step::Nothing,
                                _ if reader.is_behind(ring) => continue,
                                why => Step::Over {
                                    again: false,
                                    slow: why == ENDED_SLOW,
                                },
                            };
                        }
                        Found::Frame(header) => header,
                        Found::Overrun => {
                            reader.spare(page.cell(PASSED).load(Ordering::Acquire));
                            self.lossy = true;
                            continue;
                        }
                        Found::Nonsense => {
                            return Step::Over {
                                again: false,
                                slow: false,
                            };
                        }
                    }
                }
                Carrier::Socket(stream) => match stream.next(out) {
                    Ok(Some(header)) => header,
                    Ok(None) => return Step::Nothing,
                    Err(_) => {
                        return Step::Over {
                            again: true,
                            slow: false,
                        };
                    }
                },
            };
            match header.kind {
                Some(Kind::Event) => {
                    let id = EventRef::type_id(&out[begin..]).unwrap_or(0);
                    let kind = match &self.recent {
                        Some(kind) if kind.id() == id => kind.clone(),
                        _ => match self.types.get(&id) {
                            Some(kind) => kind.clone(),
                            // Its descriptor was lost with what was dropped; it comes again soon.
                            None if self.lossy => {
                                counters.dropped = counters.dropped.saturating_add(1);
                                if let Some(sequence) = out[begin..].first_chunk() {
                                    let next = u64::from_le_bytes(*sequence).saturating_add(1);
                                    self.wanted.store(next, Ordering::Relaxed);
                                }
                                out.truncate(begin);
                                continue;
                            }
                            None => {
                                return Step::Over {
                                    again: false,
                                    slow: false,
                                };
                            }
                        },
                    };
                    let sequence = match EventRef::parse(&out[begin..], &kind) {
                        Ok(event) => event.sequence(),
                        Err(_) => {
                            return Step::Over {
                                again: false,
                                slow: false,
                            };
                        }
                    };
                    let next = sequence.saturating_add(1);
                    // Or it has come over the link before this one.
                    if sequence >= self.wanted.load(Ordering::Relaxed) {
                        self.wanted.store(next, Ordering::Relaxed);
                        self.recent = Some(kind.clone());
                        return Step::Event(kind);
                    }
                }
                Some(Kind::Type) => {
                    let Ok(kind) = EventType::decode(&out[begin..]) else {
                        return Step::Over {
                            again: false,
                            slow: false,
                        };
                    };
                    if self.types.len() < MAX_TYPES {
                        self.types.insert(kind.id(), Arc::new(kind));
                    }
                }
                Some(Kind::Dropped) => {
                    let count = out[begin..]
                        .first_chunk()
                        .map_or(0, |bytes| u64::from_le_bytes(*bytes));
                    counters.dropped = counters.dropped.saturating_add(count);
                    self.lossy = true;
                }
                Some(Kind::Ask) => {
                    if let Carrier::Socket(stream) = &mut self.carrier {
                        stream.tell();
                    }
                }
                Some(Kind::End) | None => {
                    return Step::Over {
                        again: false,
                        slow: false,
                    };
                }
            }
            out.truncate(begin);
        }
    }

    pub fn is_behind(&self) -> bool {
        match &self.carrier {
            Carrier::Memory {
                ring, page, reader, ..
            } => reader.is_behind(ring) || page.cell(ENDED).load(Ordering::Acquire) != 0,
            Carrier::Socket(stream) => stream.ready || stream.wire.is_ready(false),
        }
    }
}

impl Stream {
    /// The next frame, its body appended to `out`.
    fn next(&mut self, out: &mut Vec<u8>) -> io::Result<Option<Header>> {
        loop {
            let mut wanted = READ_BYTES;
            if let Some(word) = self.buffer[self.begin..].first_chunk() {
                let header = Header::read(u64::from_le_bytes(*word));
                if header.bytes > MAX_RING_BYTES / 2 {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                let end = self.begin + header.sent_bytes();
                if let Some(bytes) = self.buffer.get(self.begin + HEADER_BYTES..end) {
                    out.extend_from_slice(&bytes[..header.bytes]);
                    self.begin = end;
                    self.read += header.sent_bytes() as u64;
                    if header.asks || self.read - self.acked >= self.ack_bytes {
                        self.tell();
                    } else if !self.acks.is_empty() {
                        self.send();
                    }
                    return Ok(Some(header));
                }
                // A hostile length makes room only as the bytes come.
                wanted = wanted.max((end - self.buffer.len()).min(1 << 20));
            }
            self.buffer.drain(..self.begin);
            self.begin = 0;
            let filled = self.buffer.len();
            self.buffer.resize(filled + wanted, 0);
            let read = self.wire.read(&mut self.buffer[filled..]);
            self.buffer.truncate(filled + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.ready = false;
                    return Ok(None);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Tells the source how much was read.
    fn tell(&mut self) {
        self.acked = self.read;
        self.acks.extend(self.read.to_le_bytes());
        self.send();
    }

    fn send(&mut self) {
        // What does not fit goes with the next frame; a stream that broke says so when it is read.
        if let Ok(sent) = self.wire.write(&self.acks) {
            self.acks.drain(..sent);
        }
    }
}
