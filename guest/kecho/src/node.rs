//! A node: one process's part in all its channels.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{SocketAddr, SocketAddrV6, UdpSocket};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, getuid, setrlimit};
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use uuid::Uuid;
use xbee_link::HOST_CID;

use crate::address::{Address, NodeAddress};
use crate::control::{Control, End, Handler, Pulse};
use crate::error::Error;
use crate::lookup::Lookup;
use crate::membership::Membership;
use crate::message::{self, Answer, Hello, Notice, Purpose, Reply, Request, VERSION};
use crate::registry::{ACCEPT_PAUSE, HELLO_TIME};
use crate::runtime::OwnRuntime;
use crate::socket::Sender;
use crate::source::SourceCore;
use crate::stream::{Listener, Security, Stream};
use crate::tls::{Tls, TlsFiles};
use crate::transports::{Transports, is_guest, reaches};

/// The most connections to a node that it serves itself. Those that carry events count with their sources.
const MAX_CONNECTIONS: usize = 4096;
/// The most channels of a node.
pub const MAX_CHANNELS: usize = 4096;
/// How long one way to another node is tried.
const DIAL_TIME: Duration = Duration::from_secs(2);
/// How long a node takes to leave its channels when it is shut down.
const SHUTDOWN: Duration = Duration::from_secs(3);
/// The first port of vsock that a node listens at; there may be as many nodes in a guest as follow.
const VSOCK_PORTS: std::ops::Range<u32> = 7401..7529;
/// Sockets that nobody listens at are removed when they are this old, not to meet one that is just being made.
const OLD_SOCKET: Duration = Duration::from_secs(60);
/// The most old sockets that are looked at.
const MAX_OLD_SOCKETS: usize = 1024;

/// What a node is started with.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the registry is. Without one, channels are found by [`Node::open_at`].
    pub registry: Option<Address>,
    /// Where to listen beside a unix socket, vsock, and TCP at the address from which the registry is reached.
    pub listen: Vec<Address>,
    /// For TCP that leaves the machine.
    pub tls: Option<TlsFiles>,
    /// Whether TCP may leave the machine without TLS.
    pub plaintext: bool,
    /// Whether TCP within the machine needs TLS too, because other users of it are not to be trusted.
    pub strict: bool,
    /// Which ways to other nodes are used.
    pub transports: Transports,
    /// On a host, `xbed`'s socket for guests (`guests-socket`). With it the node and those in guests of its user's reach each other
    /// over vsock, whatever `transports` says.
    pub guests: Option<PathBuf>,
    /// Where unix sockets are made; by default `kecho-UID` in `$XDG_RUNTIME_DIR` or `/tmp`.
    pub directory: Option<PathBuf>,
    /// How often a connection carries a sign of life.
    pub heartbeat: Duration,
    /// After what silence a node is dead.
    pub dead_after: Duration,
    /// Bytes of a source's log, if the channel does not say.
    pub log_bytes: usize,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            registry: None,
            listen: Vec::new(),
            tls: None,
            plaintext: false,
            strict: false,
            transports: Transports::default(),
            guests: None,
            directory: None,
            heartbeat: Duration::from_secs(2),
            dead_after: Duration::from_secs(10),
            log_bytes: 4 << 20,
        }
    }
}

/// A running node. It leaves all its channels with its last clone, or when it is shut down.
#[derive(Debug, Clone)]
pub struct Node {
    pub(crate) owner: Arc<Owner>,
}

/// Ends the node's thread.
#[derive(Debug)]
pub(crate) struct Owner {
    pub shared: Arc<Shared>,
    stop: Mutex<Option<oneshot::Sender<()>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the node's tasks and handles share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub id: Uuid,
    pub address: NodeAddress,
    pub transports: Transports,
    pub log_bytes: usize,
    pub pulse: Pulse,
    pub runtime: Handle,
    pub sender: Arc<Sender>,
    pub lookup: Option<Lookup>,
    /// A list of participants has changed, or a sink was attached.
    pub changed: Notify,
    /// Farewells under way.
    pub leaving: watch::Sender<usize>,
    security: Security,
    /// The own context identifier, where there is vsock.
    cid: Option<u32>,
    guests: Option<PathBuf>,
    state: Mutex<State>,
    /// Who waits for the deaths of sinks' processes, by source and sink.
    watchers: Mutex<HashMap<(Uuid, Uuid), AbortHandle>>,
    room: Arc<Semaphore>,
}

/// What changes.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub channels: HashMap<String, Membership>,
    pub controls: HashMap<Uuid, Arc<Control>>,
    dialing: HashMap<Uuid, Arc<tokio::sync::Mutex<()>>>,
    instances: u64,
    pub down: bool,
}

impl State {
    /// A membership, if it is still that one.
    pub(crate) fn find(&mut self, name: &str, instance: u64) -> Option<&mut Membership> {
        self.channels
            .get_mut(name)
            .filter(|m| m.instance == instance)
    }

    /// The same, unless the application has left it.
    pub(crate) fn find_held(&mut self, name: &str, instance: u64) -> Option<&mut Membership> {
        self.find(name, instance).filter(|m| !m.leaving)
    }

    pub(crate) fn next_instance(&mut self) -> u64 {
        self.instances += 1;
        self.instances
    }
}

/// Why a node could not be dialled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("{text}")]
    Refused { code: String, text: String },
    #[error(transparent)]
    Unreachable(#[from] io::Error),
}

/// All nodes of this process.
static NODES: Mutex<BTreeMap<Uuid, Weak<Shared>>> = Mutex::new(BTreeMap::new());

fn nodes() -> MutexGuard<'static, BTreeMap<Uuid, Weak<Shared>>> {
    NODES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A node of this process.
pub(crate) fn local_node(id: Uuid) -> Option<Arc<Shared>> {
    nodes().get(&id).and_then(Weak::upgrade)
}

/// As many descriptors as the system allows.
fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, raised)
    {
        tracing::debug!(%error, "no more descriptors than before");
    }
}

/// The directory of this user's sockets.
fn directory_path(given: Option<&Path>) -> PathBuf {
    let default = || {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
        let parent = runtime.map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
        parent.join(format!("kecho-{}", getuid().as_raw()))
    };
    given.map_or_else(default, Path::to_owned)
}

/// Makes a directory that only this user can write, if it is not there.
fn make_directory(path: &Path) -> io::Result<()> {
    let uid = getuid().as_raw();
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = std::fs::symlink_metadata(path)?;
    if !found.is_dir() || found.uid() != uid || found.mode() & 0o022 != 0 {
        let text = "it is not a directory that only this user can write";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(())
}

/// Removes what nodes have left behind that were killed.
fn remove_old_sockets(directory: &Path) {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten().take(MAX_OLD_SOCKETS) {
        let path = entry.path();
        let modified = entry.metadata().and_then(|found| found.modified());
        let old = modified.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > OLD_SOCKET));
        if old && path.extension().is_some_and(|kind| kind == "sock") {
            let connected = std::os::unix::net::UnixStream::connect(&path);
            if connected.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
                // Another node may have been faster.
                let _ = std::fs::remove_file(&path);
            }
        }
    }
}

/// The address from which this machine reaches another. Nothing is sent.
fn address_towards(registry: Option<&Address>) -> io::Result<Option<SocketAddrV6>> {
    let Some(Address::Tcp(registry)) = registry else {
        return Ok(None);
    };
    let socket = UdpSocket::bind("[::]:0")?;
    socket.connect(registry)?;
    Ok(match socket.local_addr()? {
        SocketAddr::V6(mut address) => {
            address.set_port(0);
            Some(address)
        }
        SocketAddr::V4(_) => None,
    })
}

/// What a node's unix socket is called, wherever it is.
fn socket_name(id: Uuid) -> String {
    format!("{id}.sock")
}

/// Listeners and what is advertised of them.
struct Doors {
    listeners: Vec<Listener>,
    endpoints: Vec<Address>,
    socket: PathBuf,
    cid: Option<u32>,
}

/// The own context identifier, where vsock is to be used.
fn own_cid(config: &Config) -> Option<u32> {
    if config.guests.is_some() {
        return Some(HOST_CID);
    }
    let cid = xbee_link::peer::local_cid().ok()?;
    (config.transports.vsock && is_guest(cid)).then_some(cid)
}

/// Opens all doors, within the runtime.
fn open_doors(id: Uuid, config: &Config) -> Result<Doors, Error> {
    let bind = |address: &Address| {
        let bound = Listener::bind(address, config.guests.as_deref());
        bound.map_err(Error::system(format!("listen at {address}")))
    };
    let path = directory_path(config.directory.as_deref());
    let unusable = format!("use {} as the directory for unix sockets", path.display());
    make_directory(&path).map_err(Error::system(unusable))?;
    remove_old_sockets(&path);
    let socket = path.join(socket_name(id));
    let unix = Address::Unix(socket.clone());
    let mut doors = Doors {
        listeners: vec![bind(&unix)?],
        endpoints: vec![unix],
        socket,
        cid: own_cid(config),
    };
    if let Some(cid) = doors.cid {
        for port in VSOCK_PORTS {
            let address = Address::Vsock { cid, port };
            match Listener::bind(&address, config.guests.as_deref()) {
                Ok(listener) => {
                    doors.listeners.push(listener);
                    doors.endpoints.push(address);
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                // It was asked for.
                Err(error) if cid == HOST_CID => {
                    return Err(Error::system(format!("listen at {address}"))(error));
                }
                Err(error) => {
                    tracing::warn!(%address, %error, "other guests cannot reach this node over vsock");
                    break;
                }
            }
        }
    }
    let towards = address_towards(config.registry.as_ref());
    let towards = towards.map_err(Error::system("find the way to the registry"))?;
    let mut wanted = config.listen.clone();
    if config.transports.tcp {
        wanted.extend(towards.map(Address::Tcp));
    }
    for mut address in wanted {
        let listener = bind(&address)?;
        if let (Address::Tcp(address), Some(port)) = (&mut address, listener.tcp_port()) {
            address.set_port(port);
        }
        doors.listeners.push(listener);
        match (&mut address, towards) {
            (Address::Tcp(any), Some(towards)) if any.ip().is_unspecified() => {
                any.set_ip(*towards.ip());
            }
            _ => {}
        }
        doors.endpoints.push(address);
    }
    Ok(doors)
}

impl Node {
    /// Starts a node, with a thread of its own, and lets this process have as many descriptors as the system allows
    /// it (`RLIMIT_NOFILE`). It may be called anywhere, but like all that waits in this crate it blocks its thread.
    ///
    /// # Errors
    /// What of the configuration cannot be had.
    pub fn start(config: Config) -> Result<Node, Error> {
        let (heartbeat, dead_after) = (config.heartbeat, config.dead_after);
        if heartbeat.is_zero() || dead_after <= heartbeat {
            return Err(Error::Times {
                heartbeat,
                dead_after,
            });
        }
        raise_limit();
        let id = Uuid::new_v4();
        let tls = config.tls.as_ref().map(Tls::load).transpose()?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        let boot = boot.map_err(Error::system("read /proc/sys/kernel/random/boot_id"))?;
        let runtime = OwnRuntime::create().map_err(Error::system("start the node's runtime"))?;
        let doors = {
            let _within = runtime.enter();
            open_doors(id, &config)?
        };
        let shared = Arc::new(Shared {
            id,
            address: NodeAddress {
                node: id,
                boot: boot.trim().to_owned(),
                endpoints: doors.endpoints,
            },
            transports: config.transports,
            log_bytes: config.log_bytes,
            pulse: Pulse {
                heartbeat: config.heartbeat,
                dead_after: config.dead_after,
            },
            runtime: runtime.handle().clone(),
            sender: Sender::start().map_err(Error::system("prepare sending"))?,
            lookup: config.registry.map(Lookup::new),
            changed: Notify::new(),
            leaving: watch::Sender::new(0),
            security: Security {
                tls,
                plaintext: config.plaintext,
                strict: config.strict,
            },
            cid: doors.cid,
            guests: config.guests,
            state: Mutex::default(),
            watchers: Mutex::default(),
            room: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        });
        let (stop, stopped) = oneshot::channel::<()>();
        let (node, listeners, socket) = (shared.clone(), doors.listeners, doors.socket);
        let thread = std::thread::Builder::new().name("kecho".to_owned());
        let thread = thread.spawn(move || {
            runtime.block_on(async {
                for listener in listeners {
                    tokio::spawn(node.clone().accept(listener));
                }
                tokio::spawn(node.clone().keep_registered());
                tokio::spawn(node.clone().keep_reaching());
                if let Some(tls) = &node.security.tls {
                    tokio::spawn(tls.trust.clone().keep_checking());
                }
                // Also when the owner was forgotten.
                let _ = stopped.await;
                node.leave_all().await;
            });
            nodes().remove(&node.id);
            node.sender.wait(SHUTDOWN);
            node.sender.stop();
            // The directory may have been removed.
            let _ = std::fs::remove_file(socket);
        });
        let thread = thread.map_err(Error::system("start the node's thread"))?;
        nodes().insert(id, Arc::downgrade(&shared));
        Ok(Node {
            owner: Arc::new(Owner {
                shared,
                stop: Mutex::new(Some(stop)),
                thread: Mutex::new(Some(thread)),
            }),
        })
    }

    /// Where it is.
    pub fn address(&self) -> &NodeAddress {
        &self.owner.shared.address
    }

    /// Leaves all channels and ends. What still holds channels, sources or sinks of it gets errors.
    pub fn shutdown(self) {
        self.owner.shutdown();
    }

    /// The names of all channels, as the registry knows them.
    ///
    /// # Errors
    /// It does not answer.
    pub fn channels(&self) -> Result<Vec<String>, Error> {
        let shared = self.owner.shared.clone();
        self.owner.wait(async move { shared.list().await })
    }
}

impl Owner {
    /// Runs something in the node's thread and waits for it. It must have a time limit of its own.
    pub(crate) fn wait<T: Send + 'static>(
        &self,
        future: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        self.shared.runtime.spawn(async move {
            // Who waits does so until the end.
            let _ = sender.send(future.await);
        });
        receiver.recv().unwrap_or(Err(Error::Shutdown))
    }

    fn shutdown(&self) {
        drop(
            self.stop
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // Not where the node's own thread has dropped the last handle.
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("a node's thread has panicked");
        }
        self.shared.sender.stop();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Shared {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn watchers(&self) -> MutexGuard<'_, HashMap<(Uuid, Uuid), AbortHandle>> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who has a port of a channel.
    pub(crate) fn node_of(&self, channel: &str, port: Uuid) -> Option<NodeAddress> {
        self.state().channels.get(channel)?.owner(port).cloned()
    }

    /// Runs a farewell that the end of the node waits for.
    pub(crate) fn farewell(self: &Arc<Self>, farewell: impl Future<Output = ()> + Send + 'static) {
        self.leaving.send_modify(|count| *count += 1);
        let node = self.clone();
        self.runtime.spawn(async move {
            farewell.await;
            node.leaving.send_modify(|count| *count -= 1);
        });
    }

    async fn leave_all(self: &Arc<Self>) {
        let all: Vec<(String, u64)> = {
            let mut state = self.state();
            state.down = true;
            // Who waits for events is told now, and not only when it has let go of its sink.
            for sink in state.channels.values().flat_map(|m| m.sinks.values()) {
                sink.core.end();
            }
            state
                .channels
                .values()
                .map(|m| (m.name.clone(), m.instance))
                .collect()
        };
        for (name, instance) in all {
            if let Some(farewell) = self.leave(&name, instance) {
                self.farewell(farewell);
            }
        }
        let controls: Vec<_> = self.state().controls.values().cloned().collect();
        let done = async {
            // The sender is here.
            let _ = self.leaving.subscribe().wait_for(|count| *count == 0).await;
            for control in controls {
                control.flushed().await;
            }
        };
        if timeout(SHUTDOWN, done).await.is_err() {
            tracing::debug!("not all could be told that this node ends");
        }
    }

    async fn accept(self: Arc<Self>, mut listener: Listener) {
        loop {
            let stream = match listener.accept().await {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = self.room.clone().try_acquire_owned() else {
                tracing::warn!("{MAX_CONNECTIONS} connections: no room for one more");
                continue;
            };
            let node = self.clone();
            tokio::spawn(async move {
                match timeout(HELLO_TIME, node.welcome(stream)).await {
                    Ok(Ok((stream, from, Purpose::Attach(attach)))) => {
                        tracing::trace!(%from, "a sink comes");
                        node.serve_attach(stream, attach).await;
                        drop(permit);
                    }
                    Ok(Ok((stream, from, _))) => {
                        let control =
                            Control::start(stream, from, node.clone(), node.pulse, permit);
                        node.state().controls.entry(from).or_insert(control);
                    }
                    Ok(Err(error)) => tracing::debug!(%error, "a connection is refused"),
                    Err(_) => tracing::debug!("a connection says nothing"),
                }
            });
        }
    }

    async fn welcome(&self, stream: Stream) -> io::Result<(Stream, Uuid, Purpose)> {
        let mut stream = stream.admit(&self.security).await?;
        let hello: Hello = message::read(&mut stream).await?;
        let refusal = match (hello.version, &hello.purpose) {
            (VERSION, Purpose::Registry) => Some(("no-registry", "this is no registry".to_owned())),
            (VERSION, _) => None,
            (other, _) => {
                let text = format!("version {other}: this node speaks version {VERSION}");
                Some(("version", text))
            }
        };
        if let Some((code, text)) = refusal {
            let answer = Answer::Refusal {
                code: code.to_owned(),
                text: text.clone(),
            };
            message::write(&mut stream, &answer).await?;
            return Err(io::Error::other(text));
        }
        message::write(&mut stream, &Answer::Welcome { node: self.id }).await?;
        Ok((stream, hello.node, hello.purpose))
    }

    /// How near an address of another node is; `None` where it cannot be used.
    fn distance(&self, to: &NodeAddress, address: &Address) -> Option<u8> {
        match address {
            // Where only the address is known, it is the caller's choice.
            _ if to.boot.is_empty() => Some(0),
            // Where it is, is another member's word, perhaps a guest's: it must not have this one speak to any other socket of its
            // user's.
            Address::Unix(path) if !path.ends_with(socket_name(to.node)) => None,
            Address::Unix(_) => {
                let here = self.transports.same_process && local_node(to.node).is_some();
                let near = self.transports.shared_memory || here;
                (near && to.boot == self.address.boot).then_some(0)
            }
            Address::Vsock { cid, .. } => {
                reaches(self.cid, *cid, to.boot == self.address.boot).then_some(1)
            }
            Address::Tcp(_) => self.transports.tcp.then_some(2),
        }
    }

    /// Connects to a node by the nearest way that works, and says what for.
    pub(crate) async fn dial(
        &self,
        to: &NodeAddress,
        purpose: &Purpose,
    ) -> Result<(Stream, Uuid), DialError> {
        let ways = to
            .endpoints
            .iter()
            .filter_map(|at| Some((self.distance(to, at)?, at)));
        let mut ways: Vec<_> = ways.collect();
        ways.sort_by_key(|way| way.0);
        let mut last = io::Error::new(io::ErrorKind::AddrNotAvailable, "no way to this node");
        for (_, address) in ways {
            match timeout(DIAL_TIME, self.greet(to.node, address, purpose)).await {
                Ok(Ok(greeted)) => return Ok(greeted),
                Ok(Err(DialError::Unreachable(error))) => last = error,
                Ok(Err(refused)) => return Err(refused),
                Err(_) => last = io::ErrorKind::TimedOut.into(),
            }
            tracing::debug!(node = %to.node, %address, error = %last, "cannot reach a node");
        }
        Err(last.into())
    }

    async fn greet(
        &self,
        expected: Uuid,
        address: &Address,
        purpose: &Purpose,
    ) -> Result<(Stream, Uuid), DialError> {
        let mut stream = Stream::connect(address, &self.security, self.guests.as_deref()).await?;
        let hello = Hello {
            version: VERSION,
            node: self.id,
            boot: self.address.boot.clone(),
            purpose: purpose.clone(),
        };
        message::write(&mut stream, &hello).await?;
        match message::read(&mut stream).await? {
            Answer::Welcome { node } if node == expected || expected.is_nil() => Ok((stream, node)),
            Answer::Refusal { code, text } => Err(DialError::Refused { code, text }),
            _ => Err(io::Error::other("another node listens there").into()),
        }
    }

    /// A control connection to a node, the one that is there or a new one.
    pub(crate) async fn control_to(
        self: &Arc<Self>,
        to: &NodeAddress,
    ) -> Result<Arc<Control>, DialError> {
        let known = |state: &State| {
            let known = state.controls.get(&to.node);
            known.filter(|control| !control.is_ended()).cloned()
        };
        let turn = {
            let mut state = self.state();
            if let Some(control) = known(&state) {
                return Ok(control);
            }
            state.dialing.entry(to.node).or_default().clone()
        };
        let _turn = turn.lock().await;
        if let Some(control) = known(&self.state()) {
            return Ok(control);
        }
        let dialled = self.dial(to, &Purpose::Control).await;
        let mut state = self.state();
        state.dialing.remove(&to.node);
        let (stream, node) = dialled?;
        let control = Control::start(stream, node, self.clone(), self.pulse, ());
        state.controls.insert(node, control.clone());
        Ok(control)
    }

    /// Does what another node asks of a source of this one.
    fn at_source(
        &self,
        channel: &str,
        source: Uuid,
        act: impl FnOnce(&SourceCore) -> Result<(), (String, String)>,
    ) -> Reply {
        match self
            .find_source(channel, source)
            .and_then(|source| act(&source))
        {
            Ok(()) => Reply::Done,
            Err((code, text)) => Reply::Refused { code, text },
        }
    }
}

impl Handler for Shared {
    fn request(self: Arc<Self>, control: &Arc<Control>, request: Request) -> Reply {
        match request {
            Request::Join {
                channel,
                participant,
                epoch,
            } => self.serve_join(Some(control), &channel, participant, epoch),
            Request::Leave { channel, epoch } => self.serve_leave(control, &channel, epoch),
            Request::Destroy { channel } => self.serve_destroy(&channel),
            Request::SetFilter {
                channel,
                source,
                sink,
                filter,
            } => self.at_source(&channel, source, |source| {
                let set = source.set_filter(sink, filter.as_deref());
                set.map_err(|error| ("bad-filter".to_owned(), error.to_string()))
            }),
            Request::SetState {
                channel,
                source,
                sink,
                name,
                value,
            } => self.at_source(&channel, source, |source| {
                let set = source.set_state(sink, &name, value);
                set.map_err(|error| (error.code().to_owned(), error.to_string()))
            }),
            Request::Describe { channel } => self.serve_describe(&channel),
            Request::Register { .. }
            | Request::Lookup { .. }
            | Request::Unregister { .. }
            | Request::List { .. } => Reply::Refused {
                code: "no-registry".to_owned(),
                text: "this is no registry".to_owned(),
            },
        }
    }

    fn notice(self: Arc<Self>, control: &Arc<Control>, notice: Notice) {
        self.noticed(control, notice);
    }

    fn ended(self: Arc<Self>, control: &Arc<Control>, end: End) {
        self.connection_ended(control, end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_member_has_a_node_speak_to_any_socket() {
        let node = Node::start(Config::default()).unwrap();
        let shared = &node.owner.shared;
        let mut other = shared.address.clone();
        other.node = Uuid::new_v4();
        let unix = |name: String| Address::Unix(PathBuf::from("/run").join(name));
        let its_own = unix(format!("{}.sock", other.node));
        assert_eq!(shared.distance(&other, &its_own), Some(0));
        for name in [
            "xbed.sock".to_owned(),
            format!("x{}.sock", other.node),
            format!("{}.sock", shared.id),
        ] {
            assert_eq!(shared.distance(&other, &unix(name)), None);
        }
    }
}
