//! Sinks over sockets, seen from the source: what of the log was sent to each, and the thread that sends.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use uuid::Uuid;

use crate::log::{ASKS, HEAD, HEADER_BYTES, Header, Kind, TAIL, WANTED};
use crate::memory::{Bell, Ring};
use crate::source::{Gone, Slots, SourceCore};
use crate::wire::Wire;

/// Bytes of an acknowledgement: how many bytes of the stream were read, little endian.
pub(crate) const ACK_BYTES: usize = 8;

/// How long the sinks of a source that has left may take to read what it has submitted before.
const LEAVING: Duration = Duration::from_secs(5);

/// How long the sending thread stays awake after a burst's last event, giving way to whoever wants its
/// core: being woken for each event is what a burst's submitter would pay most for.
const AWAKE: Duration = Duration::from_micros(50);

/// What was sent to a sink.
#[derive(Debug)]
pub(crate) struct SocketSink {
    pub(crate) id: Uuid,
    slot: usize,
    chunk: usize,
    lossy: bool,
    acked: AtomicU64,
    dropped: AtomicU64,
    /// The source has left: what is in its log is sent, and then the end.
    leaving: AtomicBool,
    outgoing: Mutex<Outgoing>,
}

#[derive(Debug)]
struct Outgoing {
    /// `None` before it starts and after it ended.
    wire: Option<Wire>,
    /// Up to which frame the log was sent or staged.
    sent: u64,
    staging: Vec<u8>,
    /// Bytes of the staging that were written.
    written: usize,
    /// Bytes of the stream up to the end of the staging.
    stream: u64,
    /// Bytes of the stream, and what position of the log they stand for.
    marks: VecDeque<(u64, u64)>,
    /// An acknowledgement that has come in part.
    ack: Vec<u8>,
    next: Next,
    /// The end was sent or staged.
    ended: bool,
    /// It is closed, or to be closed if it has not begun.
    over: bool,
    /// Bytes of the stream up to where the sink was asked for an acknowledgement the last time.
    asked: u64,
}

/// The event that comes next.
#[derive(Debug)]
struct Next {
    sequence: u64,
    /// Events were written over before they were sent.
    overrun: bool,
}

impl SocketSink {
    pub(crate) fn new(
        id: Uuid,
        slot: usize,
        position: u64,
        sequence: u64,
        chunk: usize,
        lossy: bool,
    ) -> SocketSink {
        let outgoing = Outgoing {
            wire: None,
            sent: position,
            staging: Vec::new(),
            written: 0,
            stream: 0,
            marks: VecDeque::new(),
            ack: Vec::new(),
            next: Next {
                sequence,
                overrun: false,
            },
            ended: false,
            over: false,
            asked: 0,
        };
        SocketSink {
            id,
            slot,
            chunk,
            lossy,
            acked: AtomicU64::new(position),
            dropped: AtomicU64::new(0),
            leaving: AtomicBool::new(false),
            outgoing: Mutex::new(outgoing),
        }
    }

    /// Up to what position of the log it has acknowledged.
    pub(crate) fn acked(&self) -> u64 {
        self.acked.load(Ordering::Acquire)
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Has the end sent after what is in the log. The sink closes the stream when it has read it.
    pub(crate) fn leave(&self) {
        self.leaving.store(true, Ordering::SeqCst);
    }

    /// Closes the stream.
    pub(crate) fn end(&self) {
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        // Its last frames are sent as far as they go at once.
        outgoing.wire = None;
        outgoing.over = true;
    }

    /// Sends what there is; `None` where somebody else does, or it takes no more now.
    pub(crate) fn try_flush(&self, core: &SourceCore) -> Option<io::Result<()>> {
        let mut outgoing = match self.outgoing.try_lock() {
            Ok(outgoing) => outgoing,
            Err(TryLockError::WouldBlock) => return None,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        };
        match self.flush(&mut outgoing, core) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            result => Some(result),
        }
    }

    /// Sends what there is and can be sent at once. That a stream has broken is for the sending thread to find.
    pub(crate) fn catch_up(&self, core: &SourceCore) {
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.flush(&mut outgoing, core);
    }

    fn flush(&self, outgoing: &mut Outgoing, core: &SourceCore) -> io::Result<()> {
        let Outgoing {
            wire: Some(wire),
            sent,
            staging,
            written,
            stream,
            marks,
            next,
            ended,
            asked,
            ..
        } = outgoing
        else {
            return Ok(());
        };
        let ring: &Ring = core.ring();
        loop {
            while *written < staging.len() {
                *written += wire.write(&staging[*written..])?;
            }
            let leaving = self.leaving.load(Ordering::SeqCst);
            let head = ring.cell(HEAD).load(Ordering::Acquire);
            staging.clear();
            *written = 0;
            if *sent == head {
                // Who waits for room must hear of all that was read, of the last few bytes too.
                let waited_for = ring.cell(WANTED).load(Ordering::Relaxed) != 0;
                if leaving && !*ended {
                    staging.extend(Header::word(0, 0, Kind::End).to_le_bytes());
                    *ended = true;
                    marks.push_back((*stream + staging.len() as u64, *sent));
                } else if waited_for && !marks.is_empty() && *asked < *stream {
                    // Without a mark: who has read all before it need not read this one to free what follows.
                    staging.extend(Header::word(0, 0, Kind::Ask).to_le_bytes());
                    *asked = *stream + staging.len() as u64;
                } else {
                    return wire.flush();
                }
                *stream += staging.len() as u64;
                continue;
            }
            let before = *stream;
            let unmasked =
                core.unmasked.0.load(Ordering::Acquire)..core.unmasked.1.load(Ordering::Acquire);
            if let (false, true, Some(socket)) = (self.lossy, unmasked.contains(sent), wire.plain())
            {
                // As it lies there: it is not written over before it is acknowledged.
                let end = head.min(unmasked.end).min(*sent + self.chunk as u64);
                let count = ring.send(*sent, (end - *sent) as usize, socket)?;
                let mut boundary = *sent;
                let reached = *sent + count as u64;
                while boundary < reached {
                    boundary += Header::read(ring.load(boundary)).stride() as u64;
                }
                // The rest of a frame that was sent in part.
                ring.copy_bytes(reached, boundary, staging);
                *stream += boundary - *sent;
                *sent = boundary;
            } else {
                self.stage(ring, sent, head, staging, next);
                *stream += staging.len() as u64;
            }
            match marks.back_mut() {
                _ if *stream > before => marks.push_back((*stream, *sent)),
                // Nothing of it was for this sink, which has nothing to acknowledge.
                Some(mark) => mark.1 = *sent,
                None => {
                    if self.advance(core, *sent) {
                        core.space().ring();
                    }
                }
            }
        }
    }

    /// All before this position is read; whether somebody may have waited for that.
    fn advance(&self, core: &SourceCore, position: u64) -> bool {
        let before = self.acked.swap(position, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        let wanted = core.ring().cell(WANTED).load(Ordering::Relaxed);
        wanted != 0 && before < wanted - 1 && position >= wanted - 1
    }

    /// Copies what the sink is to have of the next frames.
    fn stage(
        &self,
        ring: &Ring,
        sent: &mut u64,
        head: u64,
        staging: &mut Vec<u8>,
        next: &mut Next,
    ) {
        let mut last = None;
        while *sent < head && staging.len() < self.chunk {
            let begin = staging.len();
            let header = Header::read(ring.load(*sent));
            let sequence = ring.load(*sent + HEADER_BYTES as u64);
            let is_event = header.kind == Some(Kind::Event);
            let lost = if is_event && next.overrun {
                sequence.saturating_sub(next.sequence)
            } else {
                0
            };
            if lost > 0 {
                staging.extend(Header::word(8, 0, Kind::Dropped).to_le_bytes());
                staging.extend(lost.to_le_bytes());
            }
            if header.stride() <= ring.capacity() && header.selects(ring, *sent, self.slot) {
                last = Some(staging.len());
                ring.copy_out(*sent, header.sent_bytes(), staging);
            }
            if self.lossy {
                // What was copied counts only if it was not written over meanwhile.
                fence(Ordering::Acquire);
                let tail = ring.cell(TAIL).load(Ordering::Relaxed);
                if tail > *sent {
                    staging.truncate(begin);
                    *sent = tail;
                    next.overrun = true;
                    continue;
                }
            }
            if is_event {
                self.dropped.fetch_add(lost, Ordering::Relaxed);
                *next = Next {
                    sequence: sequence + 1,
                    overrun: false,
                };
            }
            *sent += header.stride() as u64;
        }
        // What is not for this sink may fill the log while it works on the last one that is, and reads nothing.
        if let (false, Some(at)) = (self.lossy, last) {
            staging[at + HEADER_BYTES - 1] |= ASKS;
        }
    }

    /// Takes the acknowledgements that have come; whether the source may wait for what they free.
    fn take_acks(&self, core: &SourceCore) -> io::Result<bool> {
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        let Outgoing {
            wire: Some(wire),
            ack,
            marks,
            stream,
            ..
        } = &mut *outgoing
        else {
            return Ok(false);
        };
        let mut position = self.acked();
        let mut buffer = [0; 64 * ACK_BYTES];
        loop {
            let count = match wire.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            ack.extend_from_slice(&buffer[..count]);
            let (whole, rest) = ack.as_chunks::<ACK_BYTES>();
            if let Some(last) = whole.last() {
                let read = u64::from_le_bytes(*last);
                if read > *stream {
                    return Err(io::Error::other(
                        "a sink that acknowledges what it was not sent",
                    ));
                }
                while marks.front().is_some_and(|mark| mark.0 <= read) {
                    position = marks.pop_front().map_or(position, |mark| mark.1);
                }
            }
            *ack = rest.to_vec();
        }
        Ok(self.advance(core, position))
    }
}

/// The thread that sends to sinks over sockets and wakes those in memory where who submits does not, one a node.
#[derive(Debug)]
pub(crate) struct Sender {
    epoll: OwnedFd,
    bell: Bell,
    /// The thread sleeps, or is about to.
    idle: AtomicBool,
    /// There is something in the state for it.
    work: AtomicBool,
    state: Mutex<State>,
    /// The last of those has gone that were leaving.
    gone: Condvar,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    queue: Vec<Weak<SourceCore>>,
    sockets: HashMap<u64, (Weak<SourceCore>, Arc<SocketSink>)>,
    /// Streams that have something to do without their descriptors saying so.
    ready: Vec<u64>,
    /// Sources that have left, with something in their logs, and when they go all the same.
    leaving: Vec<(Arc<SourceCore>, Instant)>,
    next: u64,
    stop: bool,
}

const BELL: u64 = 0;

impl Sender {
    /// A node's. Its thread begins with the first sink.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn start() -> io::Result<Arc<Sender>> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let bell = Bell::create()?;
        epoll::add(&epoll, &bell, EventData::new_u64(BELL), EventFlags::IN)?;
        let (idle, work) = (AtomicBool::new(true), AtomicBool::new(false));
        Ok(Arc::new(Sender {
            epoll,
            bell,
            idle,
            work,
            state: Mutex::default(),
            gone: Condvar::new(),
        }))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether its thread does not sleep just now.
    pub(crate) fn is_awake(&self) -> bool {
        !self.idle.load(Ordering::Relaxed)
    }

    /// Has a source's sockets served.
    pub(crate) fn enqueue(&self, core: &Arc<SourceCore>) {
        if !core.dirty.load(Ordering::Relaxed) && !core.dirty.swap(true, Ordering::SeqCst) {
            self.state().queue.push(Arc::downgrade(core));
            self.work.store(true, Ordering::SeqCst);
            if self.idle.swap(false, Ordering::SeqCst) {
                self.bell.ring();
            }
        }
    }

    /// Sends what a source has submitted that has left.
    pub(crate) fn leave(&self, core: &Arc<SourceCore>) {
        let deadline = Instant::now() + LEAVING;
        self.state().leaving.push((core.clone(), deadline));
        self.enqueue(core);
    }

    /// Waits until all is sent of sources that have left.
    pub(crate) fn wait(&self, limit: Duration) {
        let more = |state: &mut State| state.running && !state.leaving.is_empty();
        let waited = self.gone.wait_timeout_while(self.state(), limit, more);
        if waited.is_ok_and(|(_, waited)| waited.timed_out()) {
            tracing::warn!("not all events were sent to slow sinks before this node ended");
        }
    }

    /// Lets those go that have left and are done or late; how long the others may take.
    fn let_go(&self) -> Option<Duration> {
        let leaving = self.state().leaving.clone();
        let now = Instant::now();
        let mut gone = Vec::new();
        for (core, deadline) in &leaving {
            if *deadline <= now {
                core.abandon();
            }
            if core.sockets().is_empty() {
                gone.push(core.id);
            }
        }
        let mut state = self.state();
        state.leaving.retain(|(core, _)| !gone.contains(&core.id));
        if state.leaving.is_empty() {
            self.gone.notify_all();
        }
        let deadlines = state.leaving.iter().map(|(_, deadline)| *deadline);
        deadlines.min().map(|deadline| deadline - now)
    }

    /// Ends the thread.
    pub(crate) fn stop(&self) {
        self.state().stop = true;
        self.work.store(true, Ordering::SeqCst);
        self.bell.ring();
    }

    /// Takes a socket out.
    pub(crate) fn forget(&self, socket: &Arc<SocketSink>) {
        self.state()
            .sockets
            .retain(|_, (_, other)| !Arc::ptr_eq(other, socket));
    }

    fn start_socket(
        self: &Arc<Self>,
        core: &Arc<SourceCore>,
        socket: &Arc<SocketSink>,
        wire: Wire,
    ) -> io::Result<()> {
        self.run()?;
        {
            let mut outgoing = socket
                .outgoing
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if outgoing.over {
                // The sink was too slow already, or the source has left: it sees that when this is closed.
                return Ok(());
            }
            let mut state = self.state();
            state.next += 1;
            let token = state.next;
            let interest = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            epoll::add(
                &self.epoll,
                wire.as_fd(),
                EventData::new_u64(token),
                interest,
            )?;
            state
                .sockets
                .insert(token, (Arc::downgrade(core), socket.clone()));
            outgoing.wire = Some(wire);
        }
        self.enqueue(core);
        Ok(())
    }

    /// Has the thread run.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn run(self: &Arc<Self>) -> io::Result<()> {
        let mut state = self.state();
        if !state.running {
            let sender = self.clone();
            let thread = std::thread::Builder::new().name("kecho-send".into());
            thread.spawn(move || sender.serve_all())?;
            state.running = true;
        }
        Ok(())
    }

    fn serve_all(&self) {
        let mut events = Vec::with_capacity(256);
        let mut due = Slots::default();
        let mut awake_until = Instant::now();
        loop {
            let (mut queue, mut ready) = (Vec::new(), Vec::new());
            if self.work.swap(false, Ordering::SeqCst) {
                let mut state = self.state();
                if state.stop {
                    return;
                }
                queue = std::mem::take(&mut state.queue);
                ready = std::mem::take(&mut state.ready);
            }
            for core in queue.iter().filter_map(Weak::upgrade) {
                core.dirty.store(false, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                for socket in core.wake_sleepers(&mut due).iter() {
                    if let Some(Err(_)) = socket.try_flush(&core) {
                        core.detach(socket.id, Gone::Broken);
                    }
                }
            }
            if !queue.is_empty() {
                awake_until = Instant::now() + AWAKE;
            }
            let mut busy = !queue.is_empty() || !ready.is_empty();
            for token in ready {
                self.serve(token);
            }
            if !busy && Instant::now() < awake_until {
                std::thread::yield_now();
                busy = true;
            }
            if !busy {
                self.idle.store(true, Ordering::SeqCst);
                if self.work.load(Ordering::SeqCst) {
                    self.idle.store(false, Ordering::SeqCst);
                    continue;
                }
            }
            let limit = match busy {
                true => Some(Duration::ZERO),
                false => self.let_go(),
            };
            let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
            events.clear();
            let spare = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, spare, limit.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "kecho's sending thread cannot wait");
                    return;
                }
            }
            self.idle.store(false, Ordering::SeqCst);
            for event in &events {
                match event.data.u64() {
                    BELL => self.bell.clear(),
                    token => self.serve(token),
                }
            }
        }
    }

    fn serve(&self, token: u64) {
        let found = self.state().sockets.get(&token).cloned();
        let Some((core, socket)) = found else { return };
        let Some(core) = core.upgrade() else {
            self.forget(&socket);
            return;
        };
        let served = socket.take_acks(&core).and_then(|freed| {
            if freed {
                core.space().ring();
            }
            // A submitting thread that is at it finds out itself that more fits.
            match socket.try_flush(&core) {
                Some(result) => result,
                None => Ok(()),
            }
        });
        if served.is_err() {
            core.detach(socket.id, Gone::Broken);
            return;
        }
        if socket.is_ready() {
            self.state().ready.push(token);
            self.work.store(true, Ordering::SeqCst);
        }
    }
}

impl SocketSink {
    fn is_ready(&self) -> bool {
        let outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = outgoing.written < outgoing.staging.len();
        outgoing
            .wire
            .as_ref()
            .is_some_and(|wire| wire.is_ready(waiting))
    }
}

/// A sink that is attached and not yet served.
#[derive(Debug)]
pub(crate) struct SocketTicket {
    core: Arc<SourceCore>,
    socket: Arc<SocketSink>,
    sender: Arc<Sender>,
}

impl SocketTicket {
    pub(crate) fn new(core: Arc<SourceCore>, socket: Arc<SocketSink>, sender: Arc<Sender>) -> Self {
        SocketTicket {
            core,
            socket,
            sender,
        }
    }

    /// Begins to send.
    pub(crate) fn start(self, wire: Wire) -> io::Result<()> {
        self.sender.start_socket(&self.core, &self.socket, wire)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::source::{AttachRequest, Flush, Policy, SourceOptions, Way};

    #[test]
    fn a_sink_that_is_gone_before_it_is_served_sees_the_end() {
        let options = SourceOptions {
            log_bytes: 1,
            policy: Policy::Block,
            flush: Flush::Auto,
        };
        let core = SourceCore::create(Uuid::nil(), &options, Sender::start().unwrap()).unwrap();
        let request = AttachRequest {
            sink: Uuid::from_u128(1),
            types: Vec::new(),
            filter: None,
            policy: None,
            state: Vec::new(),
            next: None,
        };
        let (_, ticket) = core.attach_socket(request, Way::Tcp).unwrap();
        core.detach(Uuid::from_u128(1), Gone::Left);
        let (here, mut there) = UnixStream::pair().unwrap();
        ticket.start(Wire::Plain(here.into())).unwrap();
        there
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        assert_eq!(there.read(&mut [0; 8]).unwrap(), 0);
    }
}
