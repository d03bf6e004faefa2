//! The table of domains: who is there, who may talk to whom, and how they come and go.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::ether::{CardSpec, CardStatus, Ether, EtherError, UplinkSpec};
use crate::port::{Port, PortError};
use crate::programs::{Programs, ProgramsSpec};
use crate::socket::{self, SocketError};

/// Most domains at a time.
pub const DOMAINS_MAX: usize = 1024;

/// Most connection attempts from other guests that wait for a domain's thread.
const INBOX_MAX: usize = 256;

/// How long a CID may still be held by a QEMU that has just gone.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(500);

/// Longest owner name in bytes.
const OWNER_MAX: usize = 256;

/// What a domain is, as `add` gets it and `list` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainSpec {
    /// The guest's context identifier, 3 to 4294967294.
    pub cid: u32,
    /// Where QEMU connects (`-chardev socket,path=`).
    pub vhost_socket: PathBuf,
    /// Where programs of the host connect; `<uds>_<port>` is where the guest's connections go.
    pub uds: PathBuf,
    /// Guests of one owner may connect to each other. Empty: no other guest.
    pub owner: String,
    /// The uid QEMU runs under, to whom `vhost_socket` will belong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
}

/// A domain as `list` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainStatus {
    /// What it was added as.
    #[serde(flatten)]
    pub spec: DomainSpec,
    /// QEMU is connected.
    pub connected: bool,
    /// Open connections of the guest.
    pub connections: usize,
    /// Its network cards.
    #[serde(default)]
    pub interfaces: Vec<CardStatus>,
}

/// Why a domain could not be added or removed.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// The CID is reserved by the standard (virtio 1.2, section 5.10.4).
    #[error("CID {0} is reserved: use 3 to 4294967294")]
    ReservedCid(u32),
    /// Another domain has it.
    #[error("CID {0} is in use by another domain: remove that one first")]
    CidInUse(u32),
    /// Another domain has it.
    #[error("{path} is in use by the domain with CID {cid}")]
    PathInUse {
        /// The path.
        path: PathBuf,
        /// Whose it is.
        cid: u32,
    },
    /// The owner's name is too long.
    #[error("owner name has {0} bytes: at most {OWNER_MAX}")]
    OwnerTooLong(usize),
    /// The limit is reached.
    #[error("{DOMAINS_MAX} domains are connected already: remove one first")]
    TooManyDomains,
    /// No such domain.
    #[error("no domain has CID {0}")]
    UnknownCid(u32),
    /// The domain's thread did not end.
    #[error("domain with CID {0} did not stop in time: it may still hold its sockets")]
    NotStopped(u32),
    /// A socket could not be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The domain's event loop could not be set up.
    #[error(transparent)]
    Port(#[from] PortError),
    /// A network card could not be attached.
    #[error(transparent)]
    Ether(#[from] EtherError),
    /// A request for host programs came without its socket.
    #[error("the request came without a socket for host programs: send one with it (SCM_RIGHTS)")]
    NoSocket,
    /// Host programs cannot be served.
    #[error("cannot serve host programs")]
    Programs(#[source] io::Error),
}

impl SwitchError {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::ReservedCid(_) => "reserved-cid",
            Self::CidInUse(_) => "cid-in-use",
            Self::PathInUse { .. } => "path-in-use",
            Self::OwnerTooLong(_) => "owner-too-long",
            Self::TooManyDomains => "too-many-domains",
            Self::UnknownCid(_) => "unknown-cid",
            Self::NotStopped(_) => "not-stopped",
            Self::Socket(e) => e.code(),
            Self::Port(_) => "no-resources",
            Self::Ether(e) => e.code(),
            Self::NoSocket => "no-socket",
            Self::Programs(_) => "no-programs",
        }
    }
}

/// A connection from another guest or a host program, on its way to a domain's thread.
#[derive(Debug)]
pub struct Dial {
    /// The guest that connects, and its port; `None`: a program.
    pub from: Option<(u32, u32)>,
    /// The port it asks for.
    pub to_port: u32,
    /// The other end is tied to the asking guest's connection, or is the program's.
    pub stream: UnixStream,
}

/// What a domain's thread shares with the rest.
#[derive(Debug)]
pub struct Shared {
    /// What the domain was added as.
    pub spec: DomainSpec,
    /// Open connections, for `list`.
    pub connections: AtomicUsize,
    inbox: Mutex<VecDeque<Dial>>,
    /// An eventfd: something is in the inbox, or the thread should stop.
    pub wake: OwnedFd,
    stop: AtomicBool,
    /// QEMU's connection, to be cut on removal even if the thread waits for it.
    front_end: Mutex<Option<UnixStream>>,
}

impl Shared {
    fn wake(&self) {
        // EAGAIN means that the counter is full, so the thread wakes up all the same.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
        if let Some(stream) = &*lock(&self.front_end) {
            // Not connected any more is what is wanted.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// The thread should end.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Connections from other guests that came in since the last call.
    pub fn take_dials(&self) -> VecDeque<Dial> {
        std::mem::take(&mut lock(&self.inbox))
    }

    /// QEMU has connected.
    pub fn set_front_end(&self, stream: UnixStream) {
        *lock(&self.front_end) = Some(stream);
    }

    fn dial(&self, dial: Dial) -> bool {
        let mut inbox = lock(&self.inbox);
        if inbox.len() >= INBOX_MAX {
            return false;
        }
        inbox.push_back(dial);
        drop(inbox);
        self.wake();
        true
    }
}

/// A thread that panicked left its data whole as far as these locks are concerned: each critical
/// section is a single assignment or map operation.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All domains of this host.
#[derive(Debug, Default)]
pub struct Switch {
    domains: Mutex<HashMap<u32, Arc<Shared>>>,
    /// A domain has left.
    left: Condvar,
    ether: Arc<Ether>,
    /// Host programs, where they may come.
    programs: Mutex<Option<Arc<Programs>>>,
}

impl Switch {
    /// An empty switch.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Adds a domain. When this returns, QEMU and programs of the host can connect.
    pub fn add(self: &Arc<Self>, spec: DomainSpec) -> Result<(), SwitchError> {
        let cid = spec.cid;
        if !(3..u32::MAX).contains(&cid) {
            return Err(SwitchError::ReservedCid(cid));
        }
        if spec.owner.len() > OWNER_MAX {
            return Err(SwitchError::OwnerTooLong(spec.owner.len()));
        }
        // The caller may know of QEMU's end before the domain's thread does.
        let mut domains = self.wait_until_left(cid, LEAVE_TIMEOUT);
        if domains.contains_key(&cid) {
            return Err(SwitchError::CidInUse(cid));
        }
        if domains.len() >= DOMAINS_MAX {
            return Err(SwitchError::TooManyDomains);
        }
        for path in [&spec.vhost_socket, &spec.uds] {
            if let Some(other) = domains
                .values()
                .find(|d| d.spec.vhost_socket == *path || d.spec.uds == *path)
            {
                return Err(SwitchError::PathInUse {
                    path: path.clone(),
                    cid: other.spec.cid,
                });
            }
        }
        socket::check_uds(&spec.uds)?;
        let vhost_listener = socket::listen(&spec.vhost_socket, spec.uid)?;
        let host_listener = match socket::listen(&spec.uds, None) {
            Ok(listener) => listener,
            Err(e) => {
                socket::unlink(&spec.vhost_socket);
                return Err(e.into());
            }
        };
        let started = Port::wake_event().and_then(|wake| {
            let shared = Arc::new(Shared {
                spec: spec.clone(),
                connections: AtomicUsize::new(0),
                inbox: Mutex::default(),
                wake,
                stop: AtomicBool::new(false),
                front_end: Mutex::default(),
            });
            Port::spawn(
                Arc::clone(self),
                Arc::clone(&shared),
                vhost_listener,
                host_listener,
            )?;
            Ok(shared)
        });
        match started {
            Ok(shared) => {
                domains.insert(cid, shared);
                Ok(())
            }
            Err(e) => {
                socket::unlink(&spec.vhost_socket);
                socket::unlink(&spec.uds);
                Err(e.into())
            }
        }
    }

    /// Waits up to `limit` for a domain to be gone.
    fn wait_until_left(
        &self,
        cid: u32,
        limit: Duration,
    ) -> MutexGuard<'_, HashMap<u32, Arc<Shared>>> {
        let until = Instant::now() + limit;
        let mut domains = lock(&self.domains);
        while domains.contains_key(&cid) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            domains = self
                .left
                .wait_timeout(domains, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        domains
    }

    /// Removes a domain: its connections are cut, its sockets are gone when this returns.
    pub fn remove(&self, cid: u32) -> Result<(), SwitchError> {
        lock(&self.domains)
            .get(&cid)
            .ok_or(SwitchError::UnknownCid(cid))?
            .stop();
        if self
            .wait_until_left(cid, Duration::from_secs(5))
            .contains_key(&cid)
        {
            return Err(SwitchError::NotStopped(cid));
        }
        Ok(())
    }

    /// Gives a domain a network card.
    pub fn attach(&self, card: CardSpec) -> Result<(), SwitchError> {
        // Held until it is done: a domain that leaves meanwhile takes its cards along.
        let domains = lock(&self.domains);
        let domain = domains
            .get(&card.cid)
            .ok_or(SwitchError::UnknownCid(card.cid))?;
        Ok(self.ether.attach(card, &domain.spec.owner)?)
    }

    /// Gives a domain's network card an uplink.
    pub fn attach_uplink(&self, uplink: UplinkSpec) -> Result<(), SwitchError> {
        Ok(self.ether.attach_uplink(uplink)?)
    }

    /// Takes a domain's network card away. One that is not there is fine.
    pub fn detach(&self, cid: u32, mac: [u8; 6]) {
        self.ether.detach(cid, mac);
    }

    /// Removes all domains.
    pub fn remove_all(&self) -> Result<(), SwitchError> {
        let cids: Vec<u32> = lock(&self.domains).keys().copied().collect();
        for cid in cids {
            match self.remove(cid) {
                // It may have left by itself.
                Ok(()) | Err(SwitchError::UnknownCid(_)) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// All domains by CID.
    pub fn list(&self) -> Vec<DomainStatus> {
        let mut all: Vec<_> = lock(&self.domains)
            .values()
            .map(|d| DomainStatus {
                spec: d.spec.clone(),
                connected: lock(&d.front_end).is_some(),
                connections: d.connections.load(Ordering::Relaxed),
                interfaces: self.ether.list(d.spec.cid),
            })
            .collect();
        all.sort_by_key(|d| d.spec.cid);
        all
    }

    /// A guest asks for a port of another guest. Refused, by `None`, unless both have the same
    /// owner. The stream is the asking guest's end: one byte comes when the other guest accepts,
    /// the end of the stream when it does not.
    pub fn dial(
        &self,
        from: &DomainSpec,
        from_port: u32,
        to_cid: u32,
        to_port: u32,
    ) -> io::Result<Option<UnixStream>> {
        let Some(to) = lock(&self.domains).get(&to_cid).cloned() else {
            return Ok(None);
        };
        if from.owner.is_empty() || from.owner != to.spec.owner {
            return Ok(None);
        }
        let (here, there) = UnixStream::pair()?;
        let accepted = to.dial(Dial {
            from: Some((from.cid, from_port)),
            to_port,
            stream: there,
        });
        Ok(accepted.then_some(here))
    }

    /// A host program asks for a port of a guest. Refused unless the guest is this owner's. The program is answered when the
    /// guest accepts; its stream ends when the guest does not.
    pub fn dial_from_host(
        &self,
        owner: &str,
        to_cid: u32,
        to_port: u32,
        stream: UnixStream,
    ) -> bool {
        let to = lock(&self.domains).get(&to_cid).cloned();
        let Some(to) = to.filter(|to| !owner.is_empty() && to.spec.owner == owner) else {
            return false;
        };
        to.dial(Dial {
            from: None,
            to_port,
            stream,
        })
    }

    /// A stream to the host program that listens at a port for an owner's guests, if there is one.
    pub fn offer(
        &self,
        owner: &str,
        port: u32,
        from: (u32, u32),
    ) -> io::Result<Option<UnixStream>> {
        let programs = lock(&self.programs).clone();
        programs.map_or(Ok(None), |programs| programs.offer(owner, port, from))
    }

    /// Serves host programs at a socket that is bound, in the place of the one before.
    pub fn serve_programs(
        self: &Arc<Self>,
        socket: OwnedFd,
        spec: ProgramsSpec,
    ) -> Result<(), SwitchError> {
        let started = Programs::start(Arc::downgrade(self), socket, spec);
        let started = started.map_err(SwitchError::Programs)?;
        let before = lock(&self.programs).replace(started);
        if let Some(before) = before {
            before.end();
        }
        Ok(())
    }

    /// Serves no host programs any more. Streams that guests have taken stay.
    pub fn end_programs(&self) {
        let before = lock(&self.programs).take();
        if let Some(before) = before {
            before.end();
        }
    }

    /// Called by a domain's thread at its end: the sockets' names and the CID become free.
    pub fn leave(&self, shared: &Arc<Shared>) {
        let mut domains = lock(&self.domains);
        if domains
            .get(&shared.spec.cid)
            .is_some_and(|d| Arc::ptr_eq(d, shared))
        {
            unlink_both(&shared.spec.vhost_socket, &shared.spec.uds);
            self.ether.remove_domain(shared.spec.cid);
            domains.remove(&shared.spec.cid);
            self.left.notify_all();
        }
    }
}

fn unlink_both(a: &Path, b: &Path) {
    socket::unlink(a);
    socket::unlink(b);
}
