//! One domain's port of the switch: a thread that moves packets between the guest's rings, unix
//! sockets of the host and other domains.
//!
//! Everything of a domain happens on its one thread, vhost-user messages included, so nothing of
//! it is shared, and a guest or front-end that stalls or breaks its thread hurts only itself.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use crate::conn::{Conn, FROM_HOST_MAX, Key};
use crate::device::Device;
use crate::link::{Greeting, Hello, Link, read_hello};
use crate::packet::{HOST_CID, Header};
use crate::socket;
use crate::switch::{Dial, Shared, Switch};

mod links;
mod rings;

/// Most connections of one guest, those that only wait for the host side to read included.
pub const LINKS_MAX: usize = 512;
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

/// Why a domain's thread ends by itself.
#[derive(Debug)]
enum End {
    FrontEnd(VhostError),
    Io(io::Error),
}

impl From<VhostError> for End {
    fn from(e: VhostError) -> Self {
        Self::FrontEnd(e)
    }
}

impl From<io::Error> for End {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
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
    host_listener: Option<UnixListener>,

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
        let watch = |source: &dyn AsFd, token, flags| {
            epoll::add(
                &epoll,
                source.as_fd(),
                epoll::EventData::new_u64(token),
                flags,
            )
            .map_err(resources)
        };
        watch(&shared.wake, WAKE, EventFlags::IN)?;
        watch(&vhost_listener, VHOST_LISTENER, EventFlags::IN)?;
        // Edge-triggered: without free descriptors a waiting caller must not keep the thread busy.
        watch(
            &host_listener,
            HOST_LISTENER,
            EventFlags::IN | EventFlags::ET,
        )?;
        let cid = shared.spec.cid;
        let device = Device::new(cid, Arc::clone(&epoll), KICK).map_err(PortError::Rings)?;
        let mut port = Self {
            switch,
            shared,
            epoll,
            device: Arc::new(Mutex::new(device)),
            vhost_listener: Some(vhost_listener),
            front_end: None,
            host_listener: Some(host_listener),
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
            Err(End::FrontEnd(VhostError::Disconnected)) => {
                tracing::info!(cid, "domain's QEMU is gone");
            }
            Err(End::FrontEnd(e)) => tracing::warn!(cid, error = %e, "domain's QEMU is dropped"),
            Err(End::Io(e)) => tracing::error!(cid, error = %e, "domain is dropped"),
        }
        self.guest_gone();
        self.front_end = None;
        self.device
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .detach();
        self.vhost_listener = None;
        self.host_listener = None;
        self.switch.leave(&self.shared);
        if !self.shared.is_stopped() {
            self.drain();
        }
    }

    /// Works until the domain is removed (Ok) or its QEMU goes away (Err).
    fn serve(&mut self) -> Result<(), End> {
        let mut events = Vec::with_capacity(64);
        let mut again = false;
        loop {
            self.wait(&mut events, again, None)?;
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
                // After an error, too: what the guest sent last is still in its memory.
                again |= self.run_rings();
                result?;
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
        // Nobody answers this one any more, and unanswered it would keep the thread awake.
        let _ = epoll::delete(&self.epoll, &self.shared.wake);
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

    fn accept_front_end(&mut self) -> io::Result<()> {
        let Some(listener) = &self.vhost_listener else {
            return Ok(());
        };
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e),
        };
        epoll::add(
            &self.epoll,
            &stream,
            epoll::EventData::new_u64(FRONT_END),
            EventFlags::IN,
        )?;
        self.shared.set_front_end(stream.try_clone()?);
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
        while let Some(listener) = &self.host_listener {
            match listener.accept() {
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
        if self.is_full() {
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

    /// Another guest, or a host program of the owner's, connects to this one. Dropping the stream refuses.
    fn on_dial(&mut self, dial: Dial) {
        let (key, greeting) = match dial.from {
            Some((peer_cid, peer_port)) => {
                let key = Key {
                    guest_port: dial.to_port,
                    peer_cid,
                    peer_port,
                };
                (key, Greeting::Guest)
            }
            None => {
                let key = self.free_key(dial.to_port);
                (key, Greeting::Port(key.peer_port))
            }
        };
        if self.is_full() || self.by_key.contains_key(&key) {
            return;
        }
        if let Some(token) = self.watch(&dial.stream) {
            let conn = Conn::requested(self.shared.spec.cid, key);
            self.insert(token, Link::new(conn, dial.stream, Some(greeting)));
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.switch.leave(&self.shared);
    }
}
