//! Sinks of a source: how each is attached, where it begins to read, and how it goes.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use uuid::Uuid;

use super::{Inner, MAX_SINKS, Policy, SourceCore, TypeSelector, Way, Written};
use crate::filter::{FilterError, SinkFilter, State};
use crate::log::{CURSOR, ENDED_LEFT, Header, Kind, PASSED, sequence};
use crate::memory::{Bell, Page, Ring};
use crate::socket::{SocketSink, SocketTicket};
use crate::types::EventType;
use crate::value::Value;

/// Why a sink was not attached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
    /// Its filter is none.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// It was disconnected because it was slow.
    #[error("the sink was too slow and was disconnected")]
    Slow,
    /// The source has left.
    #[error("the source has left the channel")]
    Closed,
    /// The source's thread cannot be made.
    #[error("the source cannot start its thread")]
    System(#[source] io::Error),
    /// The source has as many as it may have.
    #[error("the source has {MAX_SINKS} sinks already")]
    TooMany,
}

/// A sink that is to be attached.
#[derive(Debug, Clone)]
pub(crate) struct AttachRequest {
    pub sink: Uuid,
    /// None: all.
    pub types: Vec<TypeSelector>,
    pub filter: Option<String>,
    pub policy: Option<Policy>,
    pub state: Vec<(String, Value)>,
    /// The event of this source that it wants next, if it was attached before.
    pub next: Option<u64>,
}

/// Where a sink begins.
#[derive(Debug)]
pub(crate) struct Attached {
    pub slot: usize,
    pub position: u64,
    /// The sequence of the first event that it may get.
    pub sequence: u64,
    /// How many events it has lost since it was attached before.
    pub lost: u64,
    /// What it said that it wants next.
    pub next: Option<u64>,
    /// A sink over a socket acknowledges when it has read so many bytes.
    pub ack_bytes: u64,
    /// The types whose descriptors came before that.
    pub types: Vec<Arc<EventType>>,
}

/// Where in the log a sink begins.
struct Begin {
    position: u64,
    sequence: u64,
    lost: u64,
}

/// How a sink went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gone {
    /// Its connection broke: it may come again.
    Broken,
    /// It left.
    Left,
}

/// How frames reach a sink.
#[derive(Debug)]
pub(super) enum Carrier {
    Memory(Arc<Page>, Arc<Bell>),
    Socket(Arc<SocketSink>),
    /// Its connection broke.
    Awaited {
        position: u64,
        since: Instant,
    },
}

#[derive(Debug)]
pub(super) struct Attachment {
    pub sink: Uuid,
    pub way: Way,
    /// The sink has all that it needs to read, whatever becomes of this node.
    pub confirmed: bool,
    pub policy: Policy,
    pub types: Vec<TypeSelector>,
    /// By type id: whether the sink takes it.
    pub wanted: HashMap<u64, bool>,
    pub filter: Option<SinkFilter>,
    pub state: State,
    pub carrier: Carrier,
    /// What its cursor said last: it never goes back.
    pub cursor: u64,
    /// Up to where nothing is left for it to read: its cursor, or what was passed over after it.
    pub floor: u64,
    /// The end of the last frame with a mask that is for it.
    pub until: u64,
}

impl Attachment {
    #[inline]
    pub fn wants(&mut self, kind: &EventType) -> bool {
        if self.types.is_empty() {
            return true;
        }
        let types = &self.types;
        *self.wanted.entry(kind.id()).or_insert_with(|| {
            let version = |wanted: Option<u16>| wanted.is_none_or(|v| v == kind.version());
            types
                .iter()
                .any(|t| t.name == kind.name() && version(t.version))
        })
    }

    /// Up to where the sink has read; `None` for a cursor that no sink sets.
    pub fn position(&mut self, head: u64) -> Option<u64> {
        let position = match &self.carrier {
            Carrier::Memory(page, _) => page.cell(CURSOR).load(Ordering::Acquire),
            Carrier::Socket(socket) => socket.acked(),
            Carrier::Awaited { position, .. } => *position,
        };
        if position < self.cursor || position > head {
            return None;
        }
        self.cursor = position;
        self.floor = self.floor.max(position);
        Some(self.floor)
    }

    /// Moves its floor on over what is not for it: it need not wake for that, and misses nothing when it is written
    /// over. All there is, if nothing else is left for it; else, if it is waited for, to `wanted` at the most.
    pub fn pass_over(&mut self, ring: &Ring, slot: usize, written: &Written, wanted: u64) {
        let Carrier::Memory(page, _) = &self.carrier else {
            return;
        };
        let mut passed = None;
        if self.floor >= self.until.max(written.common) {
            self.floor = written.head;
            passed = Some(written.sequence);
        }
        while self.policy != Policy::DropOldest && self.floor < wanted {
            let header = Header::read(ring.load(self.floor));
            if header.selects(ring, self.floor, slot) {
                break;
            }
            if header.kind == Some(Kind::Event) {
                passed = Some(sequence(ring, self.floor) + 1);
            }
            self.floor += header.stride() as u64;
        }
        if let Some(passed) = passed {
            page.cell(PASSED).store(passed, Ordering::Release);
        }
    }
}

impl SourceCore {
    fn attach(
        &self,
        inner: &mut Inner,
        request: AttachRequest,
        way: Way,
        carrier: impl FnOnce(usize, u64, u64, Policy) -> Carrier,
    ) -> Result<Attached, AttachError> {
        if inner.closed {
            return Err(AttachError::Closed);
        }
        if inner.expelled.contains(&request.sink) {
            return Err(AttachError::Slow);
        }
        let filter = request
            .filter
            .as_deref()
            .map(SinkFilter::compile)
            .transpose()?;
        let (head, tail) = (inner.head, inner.tail);
        let place = |s: &Option<Attachment>| s.as_ref().is_some_and(|s| s.sink == request.sink);
        let mut slot = inner.sinks.iter().position(place);
        let old = slot.and_then(|slot| inner.sinks[slot].as_mut());
        let floor = old.and_then(|sink| sink.position(head));
        // Those before it in the log were not meant for the slot that it will have.
        let common = !inner.selective && filter.is_none() && request.types.is_empty();
        let begin = match (request.next, floor) {
            // All that was there for it still is.
            (Some(next), Some(floor)) if floor >= tail => self.find(floor, head, next, None),
            (Some(next), Some(_)) => self.find(tail, head, next, Some(inner.sequence)),
            (Some(next), None) if common => {
                let from = tail.max(self.unmasked.0.load(Ordering::Relaxed));
                self.find(from, head, next, Some(inner.sequence))
            }
            (Some(next), None) => self.find(head, head, next, Some(inner.sequence)),
            (None, _) => Begin {
                position: head,
                sequence: inner.sequence,
                lost: 0,
            },
        };
        if floor.is_none() {
            slot = None;
        }
        inner.remove(request.sink, ENDED_LEFT, &self.sender);
        let slot = match slot.or_else(|| inner.sinks.iter().position(Option::is_none)) {
            Some(slot) => slot,
            None if inner.sinks.len() < MAX_SINKS => {
                inner.sinks.push(None);
                inner.sinks.len() - 1
            }
            None => return Err(AttachError::TooMany),
        };
        let policy = request.policy.unwrap_or(self.policy);
        let mut state = State::default();
        for (name, value) in request.state {
            // Beyond the bounds it is as if it had not been said.
            let _ = state.set(&name, value);
        }
        inner.sinks[slot] = Some(Attachment {
            sink: request.sink,
            way,
            confirmed: false,
            policy,
            types: request.types,
            wanted: HashMap::new(),
            filter,
            state,
            carrier: carrier(slot, begin.position, begin.sequence, policy),
            cursor: begin.position,
            floor: begin.position,
            until: head,
        });
        inner.limit = inner.head;
        inner.refresh(self);
        let types = inner.types.tell(slot);
        let ack_bytes = (self.ring.capacity() / 8).min(64 << 10) as u64;
        Ok(Attached {
            slot,
            position: begin.position,
            sequence: begin.sequence,
            lost: begin.lost,
            next: request.next,
            ack_bytes,
            types,
        })
    }

    /// Where a sink goes on that wants this event next, from `from` on. With the sequence of the event that will be
    /// submitted next, those that are wanted and not there are counted.
    fn find(&self, from: u64, head: u64, next: u64, submitted: Option<u64>) -> Begin {
        let (mut at, mut found, mut there) = (from, None, 0);
        while at < head && (found.is_none() || submitted.is_some()) {
            let header = Header::read(self.ring.load(at));
            let sequence = sequence(&self.ring, at);
            if header.kind == Some(Kind::Event) && sequence >= next {
                there += 1;
                found = found.or(Some((at, sequence)));
            }
            at += header.stride() as u64;
        }
        let wanted = submitted.map_or(0, |submitted| submitted.saturating_sub(next));
        let lost = wanted.saturating_sub(there);
        let (position, sequence) = found.unwrap_or((head, next + lost));
        Begin {
            position,
            sequence: if lost == 0 { next } else { sequence },
            lost,
        }
    }

    pub(crate) fn attach_memory(
        &self,
        request: AttachRequest,
        way: Way,
        page: Arc<Page>,
        bell: Arc<Bell>,
    ) -> Result<Attached, AttachError> {
        self.sender.run().map_err(AttachError::System)?;
        let mut inner = self.lock();
        self.attach(&mut inner, request, way, |_, position, _, _| {
            page.cell(PASSED).store(0, Ordering::Relaxed);
            page.cell(CURSOR).store(position, Ordering::Release);
            Carrier::Memory(page, bell)
        })
    }

    pub(crate) fn attach_socket(
        self: &Arc<Self>,
        request: AttachRequest,
        way: Way,
    ) -> Result<(Attached, SocketTicket), AttachError> {
        let mut inner = self.lock();
        let sink = request.sink;
        let mut made = None;
        let chunk = (self.ring.capacity() / 8).min(256 << 10);
        let attached = self.attach(
            &mut inner,
            request,
            way,
            |slot, position, sequence, policy| {
                let lossy = policy == Policy::DropOldest;
                let socket = Arc::new(SocketSink::new(
                    sink, slot, position, sequence, chunk, lossy,
                ));
                made = Some(socket.clone());
                Carrier::Socket(socket)
            },
        )?;
        let socket = made.ok_or(AttachError::Closed)?;
        let ticket = SocketTicket::new(self.clone(), socket, self.sender.clone());
        Ok((attached, ticket))
    }

    /// The sink knows that it is attached, and how.
    pub(crate) fn confirm(&self, sink: Uuid) {
        let mut inner = self.lock();
        for other in inner.sinks.iter_mut().flatten() {
            other.confirmed |= other.sink == sink;
        }
        self.came.notify_all();
    }

    pub(crate) fn detach(&self, sink: Uuid, gone: Gone) {
        let mut inner = self.lock();
        let head = inner.head;
        let gone = match inner.closed {
            true => Gone::Left,
            false => gone,
        };
        let found = inner
            .sinks
            .iter_mut()
            .flatten()
            .find(|other| other.sink == sink);
        match (gone, found) {
            (Gone::Broken, Some(found)) if !matches!(found.carrier, Carrier::Awaited { .. }) => {
                let Some(position) = found.position(head) else {
                    inner.remove(sink, ENDED_LEFT, &self.sender);
                    return;
                };
                if let Carrier::Socket(socket) = &found.carrier {
                    self.sender.forget(socket);
                }
                found.carrier = Carrier::Awaited {
                    position,
                    since: Instant::now(),
                };
                inner.refresh(self);
            }
            (Gone::Broken, _) => return,
            (Gone::Left, _) => inner.remove(sink, ENDED_LEFT, &self.sender),
        }
        inner.limit = inner.head;
        self.space.ring();
    }

    pub(crate) fn set_filter(&self, sink: Uuid, filter: Option<&str>) -> Result<(), FilterError> {
        let filter = filter.map(SinkFilter::compile).transpose()?;
        let mut inner = self.lock();
        if let Some(found) = inner
            .sinks
            .iter_mut()
            .flatten()
            .find(|other| other.sink == sink)
        {
            found.filter = filter;
        }
        inner.refresh(self);
        Ok(())
    }

    pub(crate) fn set_state(&self, sink: Uuid, name: &str, value: Value) -> bool {
        let mut inner = self.lock();
        let found = inner
            .sinks
            .iter_mut()
            .flatten()
            .find(|other| other.sink == sink);
        found.is_some_and(|found| found.state.set(name, value).is_ok())
    }
}
