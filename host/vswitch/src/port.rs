//! One domain's port of the switch: a thread that moves packets between the guest's rings, unix
//! sockets of the host and other domains.
//!
//! Everything of a domain happens on its one thread, vhost-user messages included, so nothing of
//! it is shared, and a guest or front-end that stalls or breaks its thread hurts only itself.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use vhost::vhost_user::BackendReqHandler;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use crate::chain::{RxChain, read_packet};
use crate::conn::{BUF_ALLOC, Conn, FROM_HOST_MAX, Key};
use crate::device::{Device, RX, TX, Vring};
use crate::link::{Greeting, Hello, Link, read_hello};
use crate::packet::{HOST_CID, Header, TYPE_STREAM, op};
use crate::socket;
use crate::switch::{Dial, Shared, Switch};

/// Most connections of one guest, those that only wait for the host side to read included.
pub const LINKS_MAX: usize = 512;
/// Most RSTs that wait for a receive buffer; the guest's transmit queue waits beyond that.
const REPLIES_MAX: usize = 64;
/// Packets moved in one direction before other events are looked at.
const BUDGET: usize = 256;
/// How long a program may take for its `CONNECT` line.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long what a gone guest said last is kept for host programs that have not read it.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

const WAKE: u64 = 0;
const VHOST_LISTENER: u64 = 1;
const FRONT_END: u64 = 2;
const HOST_LISTENER: u64 = 3;
/// Kick of queue n is `KICK + n`.
const KICK: u64 = 4;
/// Tokens of streams start here; none is used twice.
const STREAMS: u64 = 16;

/// First port given to host programs' ends of connections.
const HOST_PORT_FIRST: u32 = 1 << 30;

/// Why a port could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// No descriptors, threads or memory left.
    #[error("cannot start the domain's event loop: raise the limit of open files or threads")]
    Resources(#[source] io::Error),
    /// The ring code refused its parameters.
    #[error("cannot set up the rings")]
    Rings(#[source] virtio_queue::Error),
}

/// Why a guest's rings can no longer be used.
#[derive(Debug, thiserror::Error)]
enum RingError {
    #[error("invalid ring")]
    Queue(#[from] virtio_queue::Error),
    #[error("receive buffer outside the guest's memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// A program of the host that has not said `CONNECT` yet.
struct Caller {
    stream: UnixStream,
    deadline: Instant,
}

/// A domain's port. See the module's documentation.
pub struct Port {
    switch: Arc<Switch>,
    shared: Arc<Shared>,
    epoll: Arc<OwnedFd>,
    device: Arc<Mutex<Device>>,
    vhost_listener: Option<UnixListener>,
    front_end: Option<BackendReqHandler<Mutex<Device>>>,
    host_listener: UnixListener,

    callers: HashMap<u64, Caller>,
    links: HashMap<u64, Link>,
    by_key: HashMap<Key, u64>,
    /// Links that may have a packet for the guest, each once.
    ready: VecDeque<u64>,
    /// Packets that belong to no link.
    replies: VecDeque<Header>,
    deadlines: BTreeSet<(Instant, u64)>,
    next_token: u64,
    next_host_port: u32,
    payload: Vec<u8>,
    buffer: Box<[u8]>,
}

impl Port {
    /// An eventfd that wakes a port's thread.
    pub fn wake_event() -> Result<OwnedFd, PortError> {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| PortError::Resources(e.into()))
    }

    /// Starts a domain's thread.
    pub fn spawn(
        switch: Arc<Switch>,
        shared: Arc<Shared>,
        vhost_listener: UnixListener,
        host_listener: UnixListener,
    ) -> Result<(), PortError> {
        let resources = |e: rustix::io::Errno| PortError::Resources(e.into());
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).map_err(resources)?);
        let watch = |source: &dyn std::os::fd::AsFd, token| {
            epoll::add(
                &epoll,
                source.as_fd(),
                epoll::EventData::new_u64(token),
                epoll::EventFlags::IN,
            )
            .map_err(resources)
        };
        watch(&shared.wake, WAKE)?;
        watch(&vhost_listener, VHOST_LISTENER)?;
        watch(&host_listener, HOST_LISTENER)?;
        let cid = shared.spec.cid;
        let device = Device::new(cid, Arc::clone(&epoll), KICK).map_err(PortError::Rings)?;
        let mut port = Self {
            switch,
            shared,
            epoll,
            device: Arc::new(Mutex::new(device)),
            vhost_listener: Some(vhost_listener),
            front_end: None,
            host_listener,
            callers: HashMap::new(),
            links: HashMap::new(),
            by_key: HashMap::new(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            deadlines: BTreeSet::new(),
            next_token: STREAMS,
            next_host_port: HOST_PORT_FIRST,
            payload: Vec::new(),
            buffer: vec![0; FROM_HOST_MAX].into_boxed_slice(),
        };
        std::thread::Builder::new()
            .name(format!("port-{cid}"))
            .spawn(move || port.run())
            .map_err(PortError::Resources)?;
        Ok(())
    }

    fn run(&mut self) {
        let cid = self.shared.spec.cid;
        // A panic in here must not leave the CID and the sockets behind; Drop does the same.
        match self.serve() {
            Ok(()) => tracing::info!(cid, "domain removed"),
            Err(e) => tracing::info!(cid, reason = %e, "domain's QEMU is gone"),
        }
        self.guest_gone();
        self.front_end = None;
        self.switch.leave(&self.shared);
        if !self.shared.is_stopped() {
            self.drain();
        }
    }

    /// Works until the domain is removed (Ok) or its QEMU goes away (Err).
    fn serve(&mut self) -> Result<(), vhost::vhost_user::Error> {
        let mut events = Vec::with_capacity(64);
        let mut again = false;
        loop {
            if let Err(e) = self.wait(&mut events, again, None) {
                tracing::error!(cid = self.shared.spec.cid, error = %e, "epoll failed");
                return Err(vhost::vhost_user::Error::ReqHandlerError(e));
            }
            let mut front_end = false;
            for event in events.drain(..) {
                match event.data.u64() {
                    WAKE => {
                        // Non-blocking; empty only if it was read before.
                        let _ = rustix::io::read(&self.shared.wake, &mut [0u8; 8]);
                    }
                    VHOST_LISTENER => self.accept_front_end()?,
                    FRONT_END => front_end = true,
                    HOST_LISTENER => self.accept_callers(),
                    token if token < STREAMS => {} // a kick: the rings are looked at anyway
                    token => self.on_stream(token, event.flags),
                }
            }
            if self.shared.is_stopped() {
                return Ok(());
            }
            for dial in self.shared.take_dials() {
                self.on_dial(dial);
            }
            self.expire();
            again = self.run_rings();
            if front_end && let Some(handler) = &mut self.front_end {
                let result = handler.handle_request();
                if result.is_err() {
                    // What the guest sent last is still in its memory.
                    while self.run_rings() {}
                }
                result?;
                again |= self.run_rings();
            }
        }
    }

    fn wait(
        &self,
        events: &mut Vec<epoll::Event>,
        again: bool,
        until: Option<Instant>,
    ) -> io::Result<()> {
        let deadline = [self.deadlines.first().map(|d| d.0), until]
            .into_iter()
            .flatten()
            .min();
        let timeout = if again {
            Some(Duration::ZERO)
        } else {
            deadline.map(|d| d.saturating_duration_since(Instant::now()))
        };
        let timeout = timeout.map(|t| Timespec {
            tv_sec: t.as_secs() as i64,
            tv_nsec: t.subsec_nanos().into(),
        });
        events.clear();
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(events),
            timeout.as_ref(),
        ) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Gives host programs what the guest said last.
    fn drain(&mut self) {
        let until = Instant::now() + DRAIN_TIMEOUT;
        let mut events = Vec::with_capacity(64);
        self.callers.clear();
        self.deadlines.clear();
        while !self.links.is_empty() && Instant::now() < until && !self.shared.is_stopped() {
            if self.wait(&mut events, false, Some(until)).is_err() {
                return;
            }
            for event in events.drain(..) {
                if event.data.u64() >= STREAMS {
                    self.on_stream(event.data.u64(), event.flags);
                }
            }
        }
    }

    // ---- who connects ----

    fn accept_front_end(&mut self) -> Result<(), vhost::vhost_user::Error> {
        let Some(listener) = &self.vhost_listener else {
            return Ok(());
        };
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(vhost::vhost_user::Error::ReqHandlerError(e)),
        };
        let set_up = || -> io::Result<UnixStream> {
            stream.set_nonblocking(false)?;
            let cut = stream.try_clone()?;
            epoll::add(
                &self.epoll,
                &stream,
                epoll::EventData::new_u64(FRONT_END),
                epoll::EventFlags::IN,
            )?;
            Ok(cut)
        };
        let cut = set_up().map_err(vhost::vhost_user::Error::ReqHandlerError)?;
        self.shared.set_front_end(cut);
        self.front_end = Some(BackendReqHandler::from_stream(
            stream,
            Arc::clone(&self.device),
        ));
        // One QEMU a domain: nobody else can connect from here on.
        self.vhost_listener = None;
        socket::unlink(&self.shared.spec.vhost_socket);
        Ok(())
    }

    fn accept_callers(&mut self) {
        loop {
            match self.host_listener.accept() {
                Ok((stream, _)) => self.add_caller(stream),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    tracing::warn!(cid = self.shared.spec.cid, error = %e, "cannot accept");
                    return;
                }
            }
        }
    }

    fn is_full(&self) -> bool {
        self.callers.len() + self.links.len() >= LINKS_MAX
    }

    fn add_caller(&mut self, stream: UnixStream) {
        // Dropping the stream tells the program.
        if self.is_full() || stream.set_nonblocking(true).is_err() {
            return;
        }
        let Some(token) = self.watch(&stream) else {
            return;
        };
        let deadline = Instant::now() + HELLO_TIMEOUT;
        self.deadlines.insert((deadline, token));
        self.callers.insert(token, Caller { stream, deadline });
    }

    /// Watches a stream by a new token.
    fn watch(&mut self, stream: &UnixStream) -> Option<u64> {
        use epoll::EventFlags;
        let token = self.next_token;
        self.next_token += 1;
        epoll::add(
            &self.epoll,
            stream,
            epoll::EventData::new_u64(token),
            EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET,
        )
        .inspect_err(|e| tracing::warn!(cid = self.shared.spec.cid, error = %e, "cannot watch"))
        .ok()?;
        Some(token)
    }

    fn on_caller(&mut self, token: u64) {
        let Some(caller) = self.callers.get(&token) else {
            return;
        };
        let hello = match read_hello(&caller.stream) {
            Ok(Hello::Partial) => return,
            Ok(Hello::Connect(port)) => Some(port),
            Ok(Hello::Invalid) | Err(_) => None,
        };
        let Some(caller) = self.callers.remove(&token) else {
            return;
        };
        self.deadlines.remove(&(caller.deadline, token));
        let Some(guest_port) = hello else {
            return;
        };
        let key = self.free_key(guest_port);
        let conn = Conn::requested(self.shared.spec.cid, key);
        let greeting = Greeting::Port(key.peer_port);
        self.insert(token, Link::new(conn, caller.stream, Some(greeting)));
    }

    /// A name for a host program's connection. There are more ports than links.
    fn free_key(&mut self, guest_port: u32) -> Key {
        loop {
            let key = Key {
                guest_port,
                peer_cid: HOST_CID,
                peer_port: self.next_host_port,
            };
            self.next_host_port = self
                .next_host_port
                .checked_add(1)
                .unwrap_or(HOST_PORT_FIRST);
            if !self.by_key.contains_key(&key) {
                return key;
            }
        }
    }

    /// Another guest connects to this one. Dropping the stream refuses.
    fn on_dial(&mut self, dial: Dial) {
        let key = Key {
            guest_port: dial.to_port,
            peer_cid: dial.from_cid,
            peer_port: dial.from_port,
        };
        if self.is_full() || self.by_key.contains_key(&key) {
            return;
        }
        if let Some(token) = self.watch(&dial.stream) {
            let conn = Conn::requested(self.shared.spec.cid, key);
            self.insert(token, Link::new(conn, dial.stream, Some(Greeting::Guest)));
        }
    }

    fn insert(&mut self, token: u64, link: Link) {
        self.by_key.insert(link.conn.key(), token);
        self.links.insert(token, link);
        self.count();
        self.tend(token);
    }

    fn count(&self) {
        self.shared
            .connections
            .store(self.links.len(), Ordering::Relaxed);
    }

    // ---- links ----

    fn on_stream(&mut self, token: u64, flags: epoll::EventFlags) {
        if let Some(link) = self.links.get_mut(&token) {
            link.on_event(flags);
            self.tend(token);
        } else {
            self.on_caller(token);
        }
    }

    /// After anything happened to a link: moves bytes to the host side and queues the link, since
    /// it may have a packet for the guest.
    fn tend(&mut self, token: u64) {
        if let Some(link) = self.links.get_mut(&token) {
            link.flush();
            if !link.queued {
                link.queued = true;
                self.ready.push_back(token);
            }
            self.settle(token);
        }
    }

    /// Keeps the tables true to a link's state.
    fn settle(&mut self, token: u64) {
        let Some(link) = self.links.get_mut(&token) else {
            return;
        };
        let limit = link.conn.time_limit();
        match (link.deadline, limit) {
            (None, Some(limit)) => {
                let deadline = Instant::now() + limit;
                link.deadline = Some(deadline);
                self.deadlines.insert((deadline, token));
            }
            (Some(deadline), None) => {
                link.deadline = None;
                self.deadlines.remove(&(deadline, token));
            }
            _ => {}
        }
        if link.conn.is_closed() {
            let key = link.conn.key();
            if self.by_key.get(&key) == Some(&token) {
                self.by_key.remove(&key);
            }
        }
        if link.conn.is_finished() {
            self.links.remove(&token);
            self.count();
        }
    }

    fn expire(&mut self) {
        let now = Instant::now();
        while let Some(&(deadline, token)) = self.deadlines.first() {
            if deadline > now {
                return;
            }
            self.deadlines.pop_first();
            self.callers.remove(&token);
            if let Some(link) = self.links.get_mut(&token) {
                link.deadline = None;
                link.conn.refuse();
                self.tend(token);
            }
        }
    }

    /// The guest's driver is gone or new: its connections are over, what it sent is not lost.
    fn guest_gone(&mut self) {
        self.replies.clear();
        self.ready.clear();
        let tokens: Vec<u64> = self.links.keys().copied().collect();
        for token in tokens {
            if let Some(link) = self.links.get_mut(&token) {
                link.queued = false;
                link.conn.guest_gone();
                link.flush();
                self.settle(token);
            }
        }
    }

    // ---- rings ----

    /// Moves packets both ways. True: there is more to do at once.
    fn run_rings(&mut self) -> bool {
        let device = Arc::clone(&self.device);
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        if device.take_changes().reset {
            self.guest_gone();
        }
        let moved = self
            .transmit(&mut device)
            .and_then(|again| Ok((again, self.receive(&mut device)?)));
        match moved {
            // Transmitting stops when too many replies wait, and goes on when some are gone.
            Ok((Pause::Replies, more)) => more || self.replies.len() < REPLIES_MAX,
            Ok((Pause::Budget, _)) => true,
            Ok((Pause::Empty, more)) => more,
            Err(e) => {
                let chain: &dyn std::error::Error = &e;
                tracing::warn!(
                    cid = self.shared.spec.cid,
                    error = %e,
                    cause = chain.source().map(tracing::field::display),
                    "the guest broke its rings: its device is stopped until it is set up anew"
                );
                device.break_rings();
                self.guest_gone();
                false
            }
        }
    }

    /// Guest to host, until the ring is empty, the budget spent, or too many replies wait.
    fn transmit(&mut self, device: &mut Device) -> Result<Pause, RingError> {
        let Some((mem, ring)) = device.ring(TX) else {
            return Ok(Pause::Empty);
        };
        let mem: &GuestMemoryMmap = &mem;
        let mut moved = 0;
        let pause = 'ring: loop {
            ring.queue.disable_notification(mem)?;
            loop {
                if moved == BUDGET {
                    break 'ring Pause::Budget;
                }
                if self.replies.len() >= REPLIES_MAX {
                    break 'ring Pause::Replies;
                }
                let Some(chain) = ring.queue.iter(mem)?.next() else {
                    break;
                };
                let head = chain.head_index();
                let mut payload = std::mem::take(&mut self.payload);
                match read_packet(mem, chain, &mut payload, BUF_ALLOC as usize) {
                    Ok(header) => self.on_packet(&header, &payload),
                    Err(Some(header)) => self.on_malformed(&header),
                    Err(None) => {}
                }
                self.payload = payload;
                ring.queue.add_used(mem, head, 0)?;
                moved += 1;
            }
            if !ring.queue.enable_notification(mem)? {
                break Pause::Empty;
            }
        };
        if moved > 0 {
            ring.notify(mem)?;
        }
        Ok(pause)
    }

    /// Host to guest, until nothing is left to send, no buffer is left, or the budget is spent
    /// (true).
    fn receive(&mut self, device: &mut Device) -> Result<bool, RingError> {
        let Some((mem, ring)) = device.ring(RX) else {
            return Ok(false);
        };
        let mem: &GuestMemoryMmap = &mem;
        let mut moved = 0;
        let result = self.fill_buffers(mem, ring, &mut moved);
        if moved > 0 {
            ring.notify(mem)?;
        }
        result
    }

    fn fill_buffers(
        &mut self,
        mem: &GuestMemoryMmap,
        ring: &mut Vring,
        moved: &mut usize,
    ) -> Result<bool, RingError> {
        while !(self.replies.is_empty() && self.ready.is_empty()) {
            if *moved == BUDGET {
                return Ok(true);
            }
            let Some(chain) = ring.queue.iter(mem)?.next() else {
                if ring.queue.enable_notification(mem)? {
                    continue;
                }
                return Ok(false);
            };
            let chain = RxChain::new(chain);
            let written = match chain.room() {
                // Too small for any packet: goes back unused.
                None => Some(0),
                Some(room) => self.write_next(mem, &chain, room)?,
            };
            let Some(written) = written else {
                ring.queue.go_to_previous_position();
                return Ok(false);
            };
            ring.queue.add_used(mem, chain.head, written)?;
            *moved += 1;
        }
        Ok(false)
    }

    /// Writes the next packet that waits for the guest. `None`: there is none.
    fn write_next(
        &mut self,
        mem: &GuestMemoryMmap,
        chain: &RxChain,
        room: usize,
    ) -> Result<Option<u32>, RingError> {
        if let Some(reply) = self.replies.pop_front() {
            return Ok(Some(chain.write_packet(mem, &reply, &[])?));
        }
        // Links take turns, a packet each.
        while let Some(token) = self.ready.pop_front() {
            let Some(link) = self.links.get_mut(&token) else {
                continue;
            };
            link.queued = false;
            if !link.conn.has_from_host() {
                link.fill(&mut self.buffer);
            }
            let written = match link.conn.next_packet(room) {
                Some(packet) => Some(chain.write_packet(mem, &packet.header, packet.payload)?),
                None => None,
            };
            if written.is_some() {
                self.tend(token);
                return Ok(written);
            }
            self.settle(token);
        }
        Ok(None)
    }

    // ---- packets of the guest ----

    /// The name of the connection a packet belongs to. `None`: it claims another sender.
    fn key_of(&self, header: &Header) -> Option<Key> {
        if header.src_cid != u64::from(self.shared.spec.cid) {
            return None;
        }
        Some(Key {
            guest_port: header.src_port,
            // A CID beyond 32 bits is nobody's; u32::MAX is the standard's "any" and nobody's, too.
            peer_cid: u32::try_from(header.dst_cid).unwrap_or(u32::MAX),
            peer_port: header.dst_port,
        })
    }

    fn on_packet(&mut self, header: &Header, payload: &[u8]) {
        let Some(key) = self.key_of(header) else {
            return;
        };
        if header.kind != TYPE_STREAM {
            self.reply_rst(header);
        } else if let Some(&token) = self.by_key.get(&key) {
            if let Some(link) = self.links.get_mut(&token) {
                link.conn.on_packet(header, payload);
                self.tend(token);
            }
        } else if header.op == op::REQUEST {
            self.on_request(key, header);
        } else {
            self.reply_rst(header);
        }
    }

    /// The payload cannot be had: the connection, if any, has lost bytes and ends.
    fn on_malformed(&mut self, header: &Header) {
        let Some(key) = self.key_of(header) else {
            return;
        };
        if let Some(&token) = self.by_key.get(&key) {
            if let Some(link) = self.links.get_mut(&token) {
                link.conn.refuse();
                self.tend(token);
            }
        } else {
            self.reply_rst(header);
        }
    }

    fn reply_rst(&mut self, header: &Header) {
        if header.op != op::RST {
            self.replies.push_back(header.rst_for());
        }
    }

    /// The guest opens a connection.
    fn on_request(&mut self, key: Key, header: &Header) {
        let stream = if self.is_full() {
            None
        } else if key.peer_cid == HOST_CID {
            socket::connect(&socket::host_path(&self.shared.spec.uds, key.peer_port)).ok()
        } else {
            self.switch
                .dial(
                    &self.shared.spec,
                    key.guest_port,
                    key.peer_cid,
                    key.peer_port,
                )
                .inspect_err(
                    |e| tracing::warn!(cid = self.shared.spec.cid, error = %e, "cannot connect"),
                )
                .ok()
                .flatten()
        };
        let watched = stream.and_then(|stream| Some((self.watch(&stream)?, stream)));
        let Some((token, stream)) = watched else {
            self.reply_rst(header);
            return;
        };
        let mut conn = Conn::dialling(self.shared.spec.cid, key, header);
        if key.peer_cid == HOST_CID {
            conn.accept();
        }
        self.insert(token, Link::new(conn, stream, None));
    }
}

/// Why transmitting paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    Empty,
    Budget,
    Replies,
}

impl Drop for Port {
    fn drop(&mut self) {
        self.switch.leave(&self.shared);
    }
}
