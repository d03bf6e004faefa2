//! A source's part of a channel: its log, its sinks, and what decides which of them get an event.

mod announce;
mod attachment;
mod out_filter;
mod room;
mod slots;
mod wake;

use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use minicbor::{Decode, Encode};
use uuid::Uuid;

use crate::event::{EventError, EventRef, Submission};
use crate::log::{ENDED, ENDED_LEFT, HEAD, HEADER_BYTES, Header, Kind};
use crate::memory::{Bell, Ring};
use crate::socket::{Sender, SocketSink};

use announce::Types;
pub(crate) use attachment::{AttachError, AttachRequest, Attached, Gone};
use attachment::{Attachment, Carrier};
use out_filter::Running;
pub use out_filter::{OutFilter, SinkSet, SinkView};
pub(crate) use slots::Slots;
use wake::Sleeper;

/// The most sinks of a source.
pub const MAX_SINKS: usize = 1024;
/// The most types of events of a source.
pub const MAX_TYPES: usize = 1024;
/// What happens to a sink that does not keep up, when the log is full of what it has not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
pub enum Policy {
    /// Who submits waits for it, but not for it to pass over what it is not to get.
    #[n(0)]
    #[default]
    Block,
    /// It loses the oldest events; they are counted.
    #[n(1)]
    DropOldest,
    /// It is disconnected.
    #[n(2)]
    Disconnect,
}

/// Who sends events to sinks over sockets and wakes those that sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
pub enum Flush {
    /// The submitting thread, unless it submits many at once or has many sinks.
    #[n(0)]
    #[default]
    Auto,
    /// The submitting thread.
    #[n(1)]
    Inline,
    /// A thread of the library.
    #[n(2)]
    Background,
}

/// The way from a source to a sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
#[cbor(index_only)]
pub enum Way {
    /// Within a process.
    #[n(0)]
    Process,
    /// Within a kernel.
    #[n(1)]
    SharedMemory,
    /// Between guests.
    #[n(2)]
    Vsock,
    /// TCP without TLS.
    #[n(3)]
    Tcp,
    /// TLS over TCP.
    #[n(4)]
    Tls,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Way::Process => "process",
            Way::SharedMemory => "shared memory",
            Way::Vsock => "vsock",
            Way::Tcp => "tcp",
            Way::Tls => "tls",
        })
    }
}

/// Which events a sink takes.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct TypeSelector {
    /// The type's name.
    #[n(0)]
    pub name: String,
    /// Its version; `None` for any.
    #[n(1)]
    pub version: Option<u16>,
}

/// Why an event was not submitted.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// There is something wrong with it.
    #[error(transparent)]
    Event(#[from] EventError),
    /// A slow sink has filled the log, and the caller did not want to wait.
    #[error("the log is full: a sink that is waited for is slow")]
    Full,
    /// The source has left the channel.
    #[error("this source has left its channel")]
    Closed,
    /// It comes from the source's own OUT-filter.
    #[error("an OUT-filter submits to its own source: have another thread do it")]
    InFilter,
    /// Too many types.
    #[error("a source has events of at most {MAX_TYPES} types")]
    Types,
}

impl SubmitError {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            SubmitError::Event(error) => error.code(),
            SubmitError::Full => "log-full",
            SubmitError::Closed => "source-closed",
            SubmitError::Types => "limit",
            SubmitError::InFilter => "in-out-filter",
        }
    }
}

/// What a source is made with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SourceOptions {
    /// Bytes of the log.
    pub log_bytes: usize,
    /// For sinks that have none of their own.
    pub policy: Policy,
    /// Who sends.
    pub flush: Flush,
}

/// What a source has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct SourceCounters {
    /// Events submitted.
    #[n(0)]
    pub submitted: u64,
    /// How often an event was kept from a sink by its types, its filter or the OUT-filter.
    #[n(1)]
    pub filtered: u64,
    /// Events dropped for slow sinks over sockets. Sinks in memory count their own.
    #[n(2)]
    pub dropped: u64,
    /// Sinks disconnected because they were slow.
    #[n(3)]
    pub expelled: u64,
    /// How often a submission waited for a slow sink.
    #[n(4)]
    pub waited: u64,
}

/// What is in the log.
struct Written {
    head: u64,
    /// The end of the last frame that was for all.
    common: u64,
    /// The events before this one.
    sequence: u64,
}

struct Inner {
    head: u64,
    tail: u64,
    /// The end of the last frame that was for all sinks that there were.
    common: u64,
    /// Up to here can be written without looking at the sinks again.
    limit: u64,
    sequence: u64,
    types: Types,
    sinks: Vec<Option<Attachment>>,
    sockets: Arc<Vec<Arc<SocketSink>>>,
    sleepers: Arc<Vec<Sleeper>>,
    /// The sinks that there are, those of them that may lose events, and those with something in the log for which
    /// they were not woken yet.
    present: Slots,
    lossy: Slots,
    due: Slots,
    out_filter: Option<OutFilter>,
    /// Whether anything decides about events.
    selective: bool,
    /// How often that, or the sinks, have changed.
    decisions: u64,
    scratch: Vec<u8>,
    mask: Slots,
    /// Submissions that wait for room.
    waiting: usize,
    /// When the time was looked at to find out whether events are submitted quickly.
    last: Instant,
    /// What was found then.
    bursting: bool,
    /// Submissions since then.
    unlooked: u32,
    expelled: VecDeque<Uuid>,
    counters: SourceCounters,
    closed: bool,
}

/// A source's part of a channel.
pub(crate) struct SourceCore {
    pub(crate) id: Uuid,
    ring: Arc<Ring>,
    space: Arc<Bell>,
    policy: Policy,
    flush: Flush,
    inner: Mutex<Inner>,
    /// A sink was attached.
    came: Condvar,
    /// The frames between these two have no mask.
    pub(crate) unmasked: (AtomicU64, AtomicU64),
    /// It waits in the sender's queue.
    pub(crate) dirty: AtomicBool,
    sender: Arc<Sender>,
}

impl std::fmt::Debug for SourceCore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceCore")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl SourceCore {
    pub(crate) fn create(
        id: Uuid,
        options: &SourceOptions,
        sender: Arc<Sender>,
    ) -> io::Result<Arc<SourceCore>> {
        let ring = Ring::create(options.log_bytes)?;
        let inner = Inner {
            head: 0,
            tail: 0,
            common: 0,
            limit: ring.capacity() as u64,
            sequence: 0,
            types: Types::default(),
            sinks: Vec::new(),
            sockets: Arc::default(),
            sleepers: Arc::default(),
            present: Slots::default(),
            lossy: Slots::default(),
            due: Slots::default(),
            out_filter: None,
            selective: false,
            decisions: 0,
            scratch: Vec::new(),
            mask: Slots::default(),
            waiting: 0,
            last: Instant::now(),
            bursting: false,
            unlooked: 0,
            expelled: VecDeque::new(),
            counters: SourceCounters::default(),
            closed: false,
        };
        Ok(Arc::new(SourceCore {
            id,
            ring: Arc::new(ring),
            space: Arc::new(Bell::create()?),
            policy: options.policy,
            flush: options.flush,
            inner: Mutex::new(inner),
            came: Condvar::new(),
            unmasked: (AtomicU64::new(0), AtomicU64::new(u64::MAX)),
            dirty: AtomicBool::new(false),
            sender,
        }))
    }

    pub(crate) fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }

    pub(crate) fn space(&self) -> &Arc<Bell> {
        &self.space
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        match self.try_lock() {
            Some(inner) => inner,
            None => panic!("an OUT-filter asks its own source, which is locked while it runs"),
        }
    }

    /// `None` in the source's own OUT-filter.
    fn try_lock(&self) -> Option<MutexGuard<'_, Inner>> {
        // What a panicking OUT-filter left behind is whole: it only had a mask to write.
        match self.inner.try_lock() {
            Ok(inner) => Some(inner),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if Running::within(self) => None,
            Err(TryLockError::WouldBlock) => {
                Some(self.inner.lock().unwrap_or_else(PoisonError::into_inner))
            }
        }
    }

    /// The longest frame: two of them fit beside what a sink over a socket has not acknowledged.
    fn frame_limit(&self) -> usize {
        self.ring.capacity() / 2 - 64
    }

    pub(crate) fn submit(
        self: &Arc<Self>,
        event: &Submission<'_>,
        block: bool,
    ) -> Result<(), SubmitError> {
        let bytes = event.size()?;
        // Room for the largest mask too.
        let limit = self.frame_limit() - HEADER_BYTES - MAX_SINKS / 8;
        if bytes > limit {
            return Err(EventError::TooLarge { bytes, limit }.into());
        }
        let mut inner = self.try_lock().ok_or(SubmitError::InFilter)?;
        if inner.closed {
            return Err(SubmitError::Closed);
        }
        if inner.present.is_empty() {
            inner.count(None);
            return Ok(());
        }
        let (header, chosen, passed_over) = loop {
            let running = inner.out_filter.is_some().then(|| Running::begin(self));
            let passed_over = inner.select(event)?;
            drop(running);
            if passed_over.is_some() && inner.mask.is_empty() {
                inner.count(passed_over);
                return Ok(());
            }
            // Not left there: while this one waits, others may choose.
            let mask = passed_over.map(|_| std::mem::take(&mut inner.mask));
            let scratch = std::mem::take(&mut inner.scratch);
            let words = mask.as_ref().map_or(0, |mask| mask.words().len());
            let header = Header::word(bytes, words, Kind::Event);
            let decisions = inner.decisions;
            inner = self.announce(inner, event.kind, mask.as_ref(), block)?;
            inner = self.reserve(inner, Header::read(header).stride(), block)?;
            // While it waited for room a sink may have come, or a filter, that was not asked.
            if inner.decisions == decisions {
                break (header, mask.map(|mask| (mask, scratch)), passed_over);
            }
        };
        self.ring.store(inner.head, header);
        let mut pen = self.ring.pen(inner.head + HEADER_BYTES as u64);
        let mut end;
        match chosen {
            None => {
                event.encode(inner.sequence, |piece| pen.put(piece));
                end = pen.finish();
                inner.common = end;
                let Inner { due, present, .. } = &mut *inner;
                due.add(present);
            }
            Some((mask, scratch)) => {
                // As the filters have seen it, but for its number: another may have come before it.
                pen.put(&inner.sequence.to_le_bytes());
                pen.put(&scratch[8..]);
                end = pen.finish();
                for word in mask.words() {
                    self.ring.store(end, *word);
                    end += 8;
                }
                inner.mark(&mask, end);
                inner.due.add(&mask);
                (inner.mask, inner.scratch) = (mask, scratch);
            }
        }
        inner.count(passed_over);
        self.publish(&mut inner, end);
        let inline = self.wake(&mut inner);
        if inner.waiting > 0 {
            self.space.ring();
        }
        if let Some(sockets) = inline {
            drop(inner);
            self.send_now(&sockets);
            self.lock().last = Instant::now();
        }
        Ok(())
    }

    fn publish(&self, inner: &mut Inner, end: u64) {
        inner.head = end;
        self.ring.cell(HEAD).store(end, Ordering::Release);
    }

    pub(crate) fn sockets(&self) -> Arc<Vec<Arc<SocketSink>>> {
        self.lock().sockets.clone()
    }

    pub(crate) fn attached(&self) -> Vec<Uuid> {
        self.lock().attached().collect()
    }

    /// How many sinks are attached by which way, and how far the slowest of them is behind, in bytes.
    pub(crate) fn sinks(&self) -> (BTreeMap<Way, u32>, u64) {
        let mut inner = self.lock();
        let head = inner.head;
        let mut ways = BTreeMap::new();
        let mut behind = 0;
        let written = inner.written();
        for (slot, sink) in inner.sinks.iter_mut().enumerate() {
            let Some(sink) = sink else { continue };
            if matches!(sink.carrier, Carrier::Awaited { .. }) {
                continue;
            }
            *ways.entry(sink.way).or_default() += 1;
            if sink.position(head).is_some() {
                sink.pass_over(&self.ring, slot, &written, head);
                // One that lies about what it has read may have led past it.
                behind = behind.max(head.saturating_sub(sink.floor));
            }
        }
        (ways, behind)
    }

    /// Waits until so many sinks are attached; false when they were not in this time.
    fn wait_for_sinks(&self, count: usize, limit: Duration) -> bool {
        let enough = |inner: &mut Inner| inner.attached().count() < count && !inner.closed;
        let waited = self.came.wait_timeout_while(self.lock(), limit, enough);
        let (inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        inner.attached().count() >= count
    }

    pub(crate) fn counters(&self) -> SourceCounters {
        let inner = self.lock();
        let dropped = inner
            .sockets
            .iter()
            .map(|socket| socket.dropped())
            .sum::<u64>();
        SourceCounters {
            dropped: inner.counters.dropped + dropped,
            ..inner.counters
        }
    }

    fn set_out_filter(&self, filter: Option<OutFilter>) {
        let mut inner = self.lock();
        let before = std::mem::replace(&mut inner.out_filter, filter);
        inner.refresh(self);
        drop(inner);
        // What it holds may ask this source when it goes.
        drop(before);
    }

    /// Ends all attachments. What is in the log can still be read, and is still sent.
    pub(crate) fn close(self: &Arc<Self>) {
        let mut inner = self.lock();
        if std::mem::replace(&mut inner.closed, true) {
            return;
        }
        for socket in inner.sockets.iter() {
            socket.leave();
        }
        inner.remove_all(&self.sender, |sink| {
            !matches!(sink.carrier, Carrier::Socket(_))
        });
        let sends = !inner.sockets.is_empty();
        drop(inner);
        self.came.notify_all();
        self.space.ring();
        if sends {
            self.sender.leave(self);
        }
    }

    /// Ends what is left of the attachments.
    pub(crate) fn abandon(&self) {
        self.lock().remove_all(&self.sender, |_| true);
    }
}

impl Inner {
    fn attached(&self) -> impl Iterator<Item = Uuid> {
        let there =
            |sink: &&Attachment| sink.confirmed && !matches!(sink.carrier, Carrier::Awaited { .. });
        let sinks = self.sinks.iter().flatten();
        sinks.filter(there).map(|sink| sink.sink)
    }

    fn written(&self) -> Written {
        Written {
            head: self.head,
            common: self.common,
            sequence: self.sequence,
        }
    }

    /// The frame that ends here is for these sinks.
    fn mark(&mut self, mask: &Slots, end: u64) {
        for (word, sinks) in mask.words().iter().zip(self.sinks.chunks_mut(64)) {
            let mut left = *word;
            while left != 0 {
                if let Some(Some(sink)) = sinks.get_mut(left.trailing_zeros() as usize) {
                    sink.until = end;
                }
                left &= left - 1;
            }
        }
    }

    /// One more event was submitted, and kept from so many sinks.
    fn count(&mut self, passed_over: Option<u64>) {
        self.sequence += 1;
        self.counters.submitted += 1;
        self.counters.filtered += passed_over.unwrap_or(0);
    }

    /// Decides which sinks get an event, and says how many do not; `None` where nothing decides and all do.
    fn select(&mut self, event: &Submission<'_>) -> Result<Option<u64>, SubmitError> {
        if !self.selective {
            return Ok(None);
        }
        self.scratch.clear();
        let scratch = &mut self.scratch;
        event.encode(self.sequence, |piece| scratch.extend_from_slice(piece));
        let seen = EventRef::parse(&self.scratch, event.kind)?;
        self.mask.reset(self.sinks.len());
        let mut all = 0;
        for (slot, sink) in self.sinks.iter_mut().enumerate() {
            let Some(sink) = sink else { continue };
            all += 1;
            let passes = sink.wants(event.kind)
                && sink
                    .filter
                    .as_mut()
                    .is_none_or(|filter| filter.passes(&seen, event.kind, &sink.state));
            if passes {
                self.mask.insert(slot);
            }
        }
        if let Some(filter) = &mut self.out_filter {
            filter(
                &seen,
                &mut SinkSet {
                    sinks: &self.sinks,
                    mask: self.mask.words_mut(),
                },
            );
        }
        Ok(Some(all - self.mask.len() as u64))
    }

    /// After the sinks or what decides about events have changed.
    fn refresh(&mut self, core: &SourceCore) {
        self.decisions += 1;
        let mut sockets = Vec::new();
        let mut sleepers = Vec::new();
        let mut selective = self.out_filter.is_some();
        self.present.reset(self.sinks.len());
        self.lossy.reset(self.sinks.len());
        for (slot, sink) in self.sinks.iter().enumerate() {
            let Some(sink) = sink else { continue };
            self.present.insert(slot);
            if sink.policy == Policy::DropOldest {
                self.lossy.insert(slot);
            }
            selective |= sink.filter.is_some() || !sink.types.is_empty();
            match &sink.carrier {
                Carrier::Memory(page, bell) => sleepers.push(Sleeper {
                    slot,
                    page: page.clone(),
                    bell: bell.clone(),
                }),
                Carrier::Socket(socket) => sockets.push(socket.clone()),
                Carrier::Awaited { .. } => {}
            }
        }
        self.sleepers = Arc::new(sleepers);
        self.sockets = Arc::new(sockets);
        if selective && !self.selective {
            core.unmasked.1.store(self.head, Ordering::Release);
        } else if !selective && self.selective {
            core.unmasked.0.store(self.head, Ordering::Release);
            core.unmasked.1.store(u64::MAX, Ordering::Release);
        }
        self.selective = selective;
    }

    fn remove_all(&mut self, sender: &Sender, which: impl Fn(&Attachment) -> bool) {
        let sinks = self.sinks.iter().flatten();
        let sinks: Vec<Uuid> = sinks.filter(|sink| which(sink)).map(|s| s.sink).collect();
        for sink in sinks {
            self.remove(sink, ENDED_LEFT, sender);
        }
    }

    fn remove(&mut self, sink: Uuid, why: u64, sender: &Sender) {
        let Some(slot) = self
            .sinks
            .iter()
            .position(|s| s.as_ref().is_some_and(|s| s.sink == sink))
        else {
            return;
        };
        let Some(gone) = self.sinks[slot].take() else {
            return;
        };
        self.present.remove(slot);
        self.lossy.remove(slot);
        match gone.carrier {
            Carrier::Memory(page, bell) => {
                Arc::make_mut(&mut self.sleepers).retain(|other| other.slot != slot);
                page.cell(ENDED).store(why, Ordering::Release);
                bell.ring();
            }
            Carrier::Socket(socket) => {
                Arc::make_mut(&mut self.sockets).retain(|other| !Arc::ptr_eq(other, &socket));
                self.counters.dropped += socket.dropped();
                socket.end();
                sender.forget(&socket);
            }
            Carrier::Awaited { .. } => {}
        }
        self.limit = self.head;
    }
}

/// A source of events on a channel. It leaves the channel with its last clone.
#[derive(Clone)]
pub struct Source {
    core: Arc<SourceCore>,
    _keep: Arc<dyn Any + Send + Sync>,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.core.fmt(f)
    }
}

impl Source {
    pub(crate) fn new(core: Arc<SourceCore>, keep: Arc<dyn Any + Send + Sync>) -> Source {
        Source { core, _keep: keep }
    }

    /// Submits an event to all sinks that take it. Waits while a sink is slow that is to be waited for.
    ///
    /// # Errors
    /// [`SubmitError`].
    pub fn submit(&self, event: &Submission<'_>) -> Result<(), SubmitError> {
        self.core.submit(event, true)
    }

    /// Submits an event, unless it would have to wait.
    ///
    /// # Errors
    /// [`SubmitError::Full`] then; the others of [`SubmitError`].
    pub fn try_submit(&self, event: &Submission<'_>) -> Result<(), SubmitError> {
        self.core.submit(event, false)
    }

    /// Sets what decides, in this process, which sinks get an event. Waits for a submission that waits for a filter.
    pub fn set_out_filter(&self, filter: Option<OutFilter>) {
        self.core.set_out_filter(filter);
    }

    /// Waits until so many sinks are attached; false when there were fewer all this time, or the
    /// source has left the channel.
    pub fn wait_for_sinks(&self, count: usize, limit: Duration) -> bool {
        self.core.wait_for_sinks(count, limit)
    }

    /// How many sinks are attached and have heard so. One that was just made elsewhere may not count yet, though it gets
    /// what is submitted: [`Source::wait_for_sinks`].
    pub fn sinks(&self) -> usize {
        self.core.attached().len()
    }

    /// What was done so far.
    pub fn counters(&self) -> SourceCounters {
        self.core.counters()
    }
}

#[cfg(test)]
mod tests;
