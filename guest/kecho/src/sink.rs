//! A sink: reads the logs and streams of all sources of its channel, in the thread that asks for events.

mod link;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use uuid::Uuid;

use crate::error::Error;
use crate::event::EventRef;
use crate::log::{Reader, SLEEPING};
use crate::memory::{Bell, Page, Ring};
use crate::source::{AttachRequest, Attached, Policy, TypeSelector};
use crate::types::EventType;
use crate::value::Value;
use crate::wire::Wire;

use link::{Carrier, InLink, Step, Stream};

/// The most sources that have gone and whose last event is remembered.
const MAX_REMEMBERED: usize = 4096;

/// What a sink wants.
#[derive(Debug, Clone, Default)]
pub struct SinkOptions {
    /// Which types of events; none: all.
    pub types: Vec<TypeSelector>,
    /// A filter for each source to run, in the language of [`crate::filter`].
    pub filter: Option<String>,
    /// What happens when this sink is slow; `None`: what the channel says.
    pub policy: Option<Policy>,
    /// What OUT-filters and filters see of this sink from the beginning.
    pub state: Vec<(String, Value)>,
}

/// A filter in the sink's process: whether an event is dispatched.
pub type InFilter = Box<dyn FnMut(&EventRef<'_>) -> bool + Send>;

/// What a sink has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SinkCounters {
    /// Events dispatched.
    pub received: u64,
    /// Events that the IN-filter kept back.
    pub filtered: u64,
    /// Events that were dropped because this sink was slow, those its filter would have kept back included.
    pub dropped: u64,
    /// Sources that are attached.
    pub sources: usize,
}

/// An event that was received.
#[derive(Debug, Clone)]
pub struct Event {
    bytes: Vec<u8>,
    kind: Arc<EventType>,
    source: Uuid,
}

impl Event {
    /// What is in it.
    pub fn get(&self) -> EventRef<'_> {
        EventRef::parse_checked(&self.bytes, &self.kind)
    }

    /// An opaque name of its source, the same for all its events.
    pub fn source(&self) -> Uuid {
        self.source
    }
}

/// Events that were received together.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    entries: Vec<(usize, usize, Arc<EventType>, Uuid)>,
}

impl Batch {
    /// How many events there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The events, in the order in which they were received.
    pub fn iter(&self) -> impl Iterator<Item = EventRef<'_>> {
        self.entries
            .iter()
            .map(|(begin, end, kind, _)| EventRef::parse_checked(&self.bytes[*begin..*end], kind))
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.entries.clear();
    }
}

/// What a sink needs of its node.
pub(crate) trait SinkHome: Send + Sync {
    fn relink(&self, source: Uuid);
    fn filter(&self, filter: Option<&str>) -> Result<(), Error>;
    fn state(&self, name: &str, value: &Value) -> Result<(), Error>;
}

enum Change {
    Add(Box<InLink>),
    Lost(Uuid),
    Gone(Uuid),
    Slow,
    InFilter(Option<InFilter>),
}

struct Receiver {
    links: Vec<InLink>,
    turn: usize,
    epoll: Option<OwnedFd>,
    in_filter: Option<InFilter>,
    counters: SinkCounters,
    slow: bool,
}

impl Receiver {
    fn counters(&self) -> SinkCounters {
        SinkCounters {
            sources: self.links.len(),
            ..self.counters
        }
    }
}

/// A sink's part of a channel.
pub(crate) struct SinkCore {
    id: Uuid,
    channel: String,
    bell: Arc<Bell>,
    changed: AtomicBool,
    busy: AtomicBool,
    ended: AtomicBool,
    tokens: AtomicU64,
    changes: Mutex<Vec<Change>>,
    options: Mutex<SinkOptions>,
    /// By source.
    wanted: Mutex<HashMap<Uuid, Arc<AtomicU64>>>,
    /// Held by who receives, as long as that takes.
    receiver: Mutex<Receiver>,
    /// The counters when it last began to wait.
    counters: Mutex<SinkCounters>,
}

impl std::fmt::Debug for SinkCore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SinkCore")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SinkCore {
    pub(crate) fn create(
        id: Uuid,
        channel: &str,
        options: SinkOptions,
    ) -> io::Result<Arc<SinkCore>> {
        let receiver = Receiver {
            links: Vec::new(),
            turn: 0,
            epoll: None,
            in_filter: None,
            counters: SinkCounters::default(),
            slow: false,
        };
        Ok(Arc::new(SinkCore {
            id,
            channel: channel.to_owned(),
            bell: Arc::new(Bell::create()?),
            changed: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            tokens: AtomicU64::new(1),
            changes: Mutex::default(),
            options: Mutex::new(options),
            wanted: Mutex::default(),
            receiver: Mutex::new(receiver),
            counters: Mutex::default(),
        }))
    }

    pub(crate) fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    fn change(&self, change: Change) {
        locked(&self.changes).push(change);
        self.changed.store(true, Ordering::SeqCst);
        self.bell.ring();
    }

    fn link(&self, source: Uuid, carrier: Carrier, attached: Attached) {
        let types = attached
            .types
            .into_iter()
            .map(|kind| (kind.id(), kind))
            .collect();
        let wanted = {
            let mut all = locked(&self.wanted);
            if all.len() >= MAX_REMEMBERED {
                all.retain(|_, wanted| Arc::strong_count(wanted) > 1);
            }
            let first = || Arc::new(AtomicU64::new(attached.sequence));
            all.entry(source).or_insert_with(first).clone()
        };
        self.change(Change::Add(Box::new(InLink {
            source,
            token: self.tokens.fetch_add(1, Ordering::Relaxed),
            types,
            recent: None,
            carrier,
            lost: false,
            wanted,
            asked: attached.next,
            lost_before: attached.lost,
            lossy: false,
        })));
    }

    pub(crate) fn add_memory(
        &self,
        source: Uuid,
        ring: Arc<Ring>,
        page: Arc<Page>,
        space: Arc<Bell>,
        attached: Attached,
    ) {
        let reader = Reader::new(attached.position, attached.sequence, attached.slot);
        self.link(
            source,
            Carrier::Memory {
                ring,
                page,
                space,
                reader,
            },
            attached,
        );
    }

    pub(crate) fn add_socket(&self, source: Uuid, wire: Wire, attached: Attached) {
        let carrier = Carrier::Socket(Box::new(Stream {
            wire,
            buffer: Vec::new(),
            begin: 0,
            read: 0,
            acked: 0,
            ack_bytes: attached.ack_bytes.max(1),
            acks: Vec::new(),
            ready: true,
        }));
        self.link(source, carrier, attached);
    }

    pub(crate) fn lost(&self, source: Uuid) {
        self.change(Change::Lost(source));
    }

    pub(crate) fn refused(&self, source: Uuid, slow: bool) {
        self.change(if slow {
            Change::Slow
        } else {
            Change::Gone(source)
        });
    }

    pub(crate) fn gone(&self, source: Uuid) {
        self.change(Change::Gone(source));
    }

    pub(crate) fn request(&self, source: Uuid) -> AttachRequest {
        let options = locked(&self.options).clone();
        AttachRequest {
            sink: self.id,
            types: options.types,
            filter: options.filter,
            policy: options.policy,
            state: options.state,
            next: locked(&self.wanted)
                .get(&source)
                .map(|wanted| wanted.load(Ordering::Relaxed)),
        }
    }

    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.bell.ring();
    }
}

/// A sink of a channel's events. It leaves the channel when it is dropped.
pub struct Sink {
    core: Arc<SinkCore>,
    home: Arc<dyn SinkHome>,
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.core.fmt(f)
    }
}

impl Sink {
    pub(crate) fn new(core: Arc<SinkCore>, home: Arc<dyn SinkHome>) -> Sink {
        Sink { core, home }
    }

    pub(crate) fn core(&self) -> &Arc<SinkCore> {
        &self.core
    }

    /// The next event; waits for it.
    ///
    /// # Errors
    /// [`Error::Destroyed`]; [`Error::Slow`].
    pub fn receive(&self) -> Result<Event, Error> {
        loop {
            if let Some(event) = self.next(None)? {
                return Ok(event);
            }
        }
    }

    /// The next event, if one comes within this time.
    ///
    /// # Errors
    /// As [`Sink::receive`].
    pub fn receive_timeout(&self, limit: Duration) -> Result<Option<Event>, Error> {
        self.next(Some(limit))
    }

    /// The next event, if one is there.
    ///
    /// # Errors
    /// As [`Sink::receive`].
    pub fn poll(&self) -> Result<Option<Event>, Error> {
        self.next(Some(Duration::ZERO))
    }

    /// Waits for an event and takes at most `max` that are there, in the place of what was in `batch`.
    ///
    /// # Errors
    /// As [`Sink::receive`].
    pub fn receive_batch(&self, batch: &mut Batch, max: usize) -> Result<(), Error> {
        loop {
            self.receive_batch_timeout(batch, max, None)?;
            if !batch.is_empty() || max == 0 {
                return Ok(());
            }
        }
    }

    /// As [`Sink::receive_batch`], but leaves the batch empty if no event comes within this time.
    ///
    /// # Errors
    /// As [`Sink::receive`].
    pub fn receive_batch_timeout(
        &self,
        batch: &mut Batch,
        max: usize,
        limit: Option<Duration>,
    ) -> Result<(), Error> {
        batch.clear();
        if max == 0 {
            return Ok(());
        }
        let mut receiver = locked(&self.core.receiver);
        self.take(&mut receiver, batch, max, limit)
    }

    /// Never sleeps while it waits, for the last microseconds: it takes a core.
    pub fn busy_poll(&self, busy: bool) {
        self.core.busy.store(busy, Ordering::Relaxed);
    }

    /// Sets the filter in this process, from the next event on that is taken. Does not wait for a thread that waits for events.
    pub fn set_in_filter(&self, filter: Option<InFilter>) {
        locked(&self.core.changes).retain(|change| !matches!(change, Change::InFilter(_)));
        self.core.change(Change::InFilter(filter));
    }

    /// Places another filter at all sources, or none.
    ///
    /// # Errors
    /// It is none; a source cannot be reached.
    pub fn set_filter(&self, filter: Option<&str>) -> Result<(), Error> {
        locked(&self.core.options).filter = filter.map(str::to_owned);
        self.home.filter(filter)
    }

    /// Tells all sources something of this sink, for their filters.
    ///
    /// # Errors
    /// A source cannot be reached.
    pub fn set_state(&self, name: &str, value: Value) -> Result<(), Error> {
        {
            let mut options = locked(&self.core.options);
            options.state.retain(|(other, _)| other != name);
            options.state.push((name.to_owned(), value.clone()));
        }
        self.home.state(name, &value)
    }

    /// What it has seen so far. Does not wait for a thread that waits for events.
    pub fn counters(&self) -> SinkCounters {
        match self.core.receiver.try_lock() {
            Ok(receiver) => receiver.counters(),
            Err(TryLockError::Poisoned(receiver)) => receiver.into_inner().counters(),
            Err(TryLockError::WouldBlock) => *locked(&self.core.counters),
        }
    }

    fn next(&self, limit: Option<Duration>) -> Result<Option<Event>, Error> {
        let mut batch = Batch::default();
        let mut receiver = locked(&self.core.receiver);
        self.take(&mut receiver, &mut batch, 1, limit)?;
        let Batch { bytes, mut entries } = batch;
        Ok(entries.pop().map(|(_, _, kind, source)| Event {
            bytes,
            kind,
            source,
        }))
    }

    fn take(
        &self,
        receiver: &mut Receiver,
        batch: &mut Batch,
        max: usize,
        limit: Option<Duration>,
    ) -> Result<(), Error> {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let mut told = None;
        loop {
            if self.core.changed.load(Ordering::Relaxed) {
                self.apply(receiver)?;
            }
            self.sweep(receiver, batch, max);
            if !batch.is_empty() {
                return Ok(());
            }
            if receiver.slow {
                return Err(Error::Slow);
            }
            if self.core.ended.load(Ordering::SeqCst) {
                return Err(Error::Destroyed(self.core.channel.clone()));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(());
            }
            let counters = Some(receiver.counters());
            if told != counters {
                *locked(&self.core.counters) = receiver.counters();
                told = counters;
            }
            if self.core.busy.load(Ordering::Relaxed) {
                std::hint::spin_loop();
                continue;
            }
            self.sleep(receiver, left)?;
        }
    }

    /// Takes what the links have, each in turn.
    fn sweep(&self, receiver: &mut Receiver, batch: &mut Batch, max: usize) {
        let Receiver {
            links,
            turn,
            in_filter,
            counters,
            slow,
            ..
        } = receiver;
        let mut over = Vec::new();
        for n in 0..links.len() {
            let at = (*turn + n) % links.len();
            let link = &mut links[at];
            while batch.len() < max {
                let begin = batch.bytes.len();
                match link.step(&mut batch.bytes, counters) {
                    Step::Nothing => break,
                    Step::Over {
                        again,
                        slow: expelled,
                    } => {
                        *slow |= expelled;
                        over.push((link.source, again));
                        break;
                    }
                    Step::Event(kind) => {
                        let end = batch.bytes.len();
                        let passes = in_filter.as_mut().is_none_or(|filter| {
                            filter(&EventRef::parse_checked(&batch.bytes[begin..end], &kind))
                        });
                        if !passes {
                            counters.filtered += 1;
                            batch.bytes.truncate(begin);
                            continue;
                        }
                        counters.received += 1;
                        batch.entries.push((begin, end, kind, link.source));
                    }
                }
            }
            if batch.len() >= max {
                *turn = at + 1;
                break;
            }
        }
        for (source, again) in over {
            Self::forget(receiver, source);
            if again {
                self.home.relink(source);
            }
        }
    }

    fn forget(receiver: &mut Receiver, source: Uuid) {
        receiver.links.retain(|link| link.source != source);
    }

    fn apply(&self, receiver: &mut Receiver) -> Result<(), Error> {
        self.core.changed.store(false, Ordering::SeqCst);
        let changes = std::mem::take(&mut *locked(&self.core.changes));
        for change in changes {
            match change {
                Change::Add(link) => {
                    Self::forget(receiver, link.source);
                    // What the link before it still had was read meanwhile.
                    let wanted = link.wanted.load(Ordering::Relaxed);
                    let read = wanted.saturating_sub(link.asked.unwrap_or(wanted));
                    let lost = link.lost_before.saturating_sub(read);
                    let dropped = &mut receiver.counters.dropped;
                    *dropped = dropped.saturating_add(lost);
                    if let Carrier::Socket(stream) = &link.carrier {
                        let epoll = match &mut receiver.epoll {
                            Some(epoll) => epoll,
                            empty => {
                                let epoll =
                                    epoll::create(CreateFlags::CLOEXEC).map_err(|error| {
                                        Error::system("wait for streams")(error.into())
                                    })?;
                                epoll::add(
                                    &epoll,
                                    &*self.core.bell,
                                    EventData::new_u64(0),
                                    EventFlags::IN,
                                )
                                .map_err(|error| Error::system("wait for streams")(error.into()))?;
                                empty.insert(epoll)
                            }
                        };
                        epoll::add(
                            &*epoll,
                            stream.wire.as_fd(),
                            EventData::new_u64(link.token),
                            EventFlags::IN,
                        )
                        .map_err(|error| Error::system("wait for streams")(error.into()))?;
                    }
                    receiver.links.push(*link);
                }
                Change::Lost(source) => {
                    receiver
                        .links
                        .iter_mut()
                        .filter(|link| link.source == source)
                        .for_each(|link| link.lost = true);
                }
                // What it sent before it left is read first, and then its end is found.
                Change::Gone(source) => {
                    let memory = |link: &InLink| matches!(link.carrier, Carrier::Memory { .. });
                    receiver
                        .links
                        .iter_mut()
                        .filter(|link| link.source == source && memory(link))
                        .for_each(|link| link.lost = true);
                }
                Change::Slow => receiver.slow = true,
                Change::InFilter(filter) => receiver.in_filter = filter,
            }
        }
        Ok(())
    }

    /// Waits until something is to be read, changed, or over.
    fn sleep(&self, receiver: &mut Receiver, limit: Option<Duration>) -> Result<(), Error> {
        for link in &receiver.links {
            if let Carrier::Memory { page, .. } = &link.carrier {
                page.cell(SLEEPING).store(1, Ordering::Relaxed);
            }
        }
        // Between that and the last look: see `SourceCore::wake`.
        fence(Ordering::SeqCst);
        let more = receiver.links.iter().any(InLink::is_behind)
            || self.core.changed.load(Ordering::SeqCst)
            || self.core.ended.load(Ordering::SeqCst);
        if !more {
            let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
            let waited = match &receiver.epoll {
                Some(epoll) => {
                    let mut events = Vec::with_capacity(64);
                    let waited = epoll::wait(
                        epoll,
                        rustix::buffer::spare_capacity(&mut events),
                        limit.as_ref(),
                    )
                    .map(|_| ());
                    for event in &events {
                        match event.data.u64() {
                            0 => self.core.bell.clear(),
                            token => {
                                let link =
                                    receiver.links.iter_mut().find(|link| link.token == token);
                                if let Some(Carrier::Socket(stream)) =
                                    link.map(|link| &mut link.carrier)
                                {
                                    stream.ready = true;
                                }
                            }
                        }
                    }
                    waited
                }
                None => {
                    let mut fds = [PollFd::new(&*self.core.bell, PollFlags::IN)];
                    let waited = poll(&mut fds, limit.as_ref()).map(|_| ());
                    self.core.bell.clear();
                    waited
                }
            };
            match waited {
                Ok(()) | Err(Errno::INTR) => {}
                Err(error) => return Err(Error::system("wait for events")(error.into())),
            }
        }
        for link in &receiver.links {
            if let Carrier::Memory { page, .. } = &link.carrier {
                page.cell(SLEEPING).store(0, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}
