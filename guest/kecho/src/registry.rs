//! The registry: which node is to be asked about which channel. It is kept in memory; contacts
//! register again and again, and after a restart it knows all that are alive within a second or two.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, oneshot};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::address::{Address, NodeAddress};
use crate::control::{Control, End, Handler, Pulse};
use crate::error::Error;
use crate::message::{self, Answer, Hello, Notice, Purpose, Reply, Request, VERSION};
use crate::runtime::OwnRuntime;
use crate::stream::{Listener, Security, Stream};
use crate::tls::{Tls, TlsFiles};

/// The most channels.
pub const MAX_CHANNELS: usize = 100_000;
/// The most connections.
pub const MAX_CONNECTIONS: usize = 4096;
/// How long a registration is good for.
pub const LEASE: Duration = Duration::from_secs(10);
/// How long it is good for when its connection has ended: time for another node to take over.
const ORPHANED: Duration = Duration::from_secs(2);
/// How long the first frames of a connection may take.
pub(crate) const HELLO_TIME: Duration = Duration::from_secs(5);
/// Names in a list; more come with the next one.
const LIST: usize = 4096;
/// How long to wait when the system has no more descriptors.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// A channel that is this much older than another of its name and epoch is the one.
const OLDER: Duration = Duration::from_secs(1);

/// What a registry is started with.
#[derive(Debug, Clone, Default)]
pub struct RegistryConfig {
    /// Where to listen; port 0 for any.
    pub listen: Vec<Address>,
    /// For connections from other machines.
    pub tls: Option<TlsFiles>,
    /// Whether they may come without.
    pub plaintext: bool,
    /// Whether TCP within the machine needs TLS too.
    pub strict: bool,
    /// On a host, where its socket for guests is: needed to listen at `vsock:2:PORT`.
    pub guests: Option<PathBuf>,
}

/// A registry that runs. It ends when dropped.
#[derive(Debug)]
pub struct Registry {
    addresses: Vec<Address>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Lease {
    contact: NodeAddress,
    epoch: u64,
    born: Instant,
    until: Instant,
    /// Over which connection it was made.
    control: Arc<Control>,
}

/// What the registry knows.
#[derive(Debug)]
struct Leases {
    since: Instant,
    channels: Mutex<BTreeMap<String, Lease>>,
}

impl Registry {
    /// Starts one.
    ///
    /// # Errors
    /// Where it cannot listen; TLS's files.
    pub fn start(config: &RegistryConfig) -> Result<Registry, Error> {
        let tls = config.tls.as_ref().map(Tls::load).transpose()?;
        let security = Arc::new(Security {
            tls,
            plaintext: config.plaintext,
            strict: config.strict,
        });
        let runtime = OwnRuntime::create().map_err(Error::system("start the registry"))?;
        let mut addresses = Vec::new();
        let mut listeners = Vec::new();
        {
            let _within = runtime.enter();
            for address in &config.listen {
                let bound = Listener::bind(address, config.guests.as_deref());
                let listener = bound.map_err(Error::system(format!("listen at {address}")))?;
                let mut address = address.clone();
                if let (Address::Tcp(address), Some(port)) = (&mut address, listener.tcp_port()) {
                    address.set_port(port);
                }
                addresses.push(address);
                listeners.push(listener);
            }
        }
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("kecho-registry".into());
        let thread = thread.spawn(move || {
            runtime.block_on(async {
                let leases = Arc::new(Leases::new());
                let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
                if let Some(tls) = &security.tls {
                    tokio::spawn(tls.trust.clone().keep_checking());
                }
                for listener in listeners {
                    let (leases, security, room) = (leases.clone(), security.clone(), room.clone());
                    tokio::spawn(accept(listener, leases, security, room));
                }
                // Also when the registry was forgotten: then nobody can stop it.
                if stopped.await.is_err() {
                    tracing::debug!("the registry is dropped");
                }
            });
        });
        let thread = thread.map_err(Error::system("start the registry's thread"))?;
        Ok(Registry {
            addresses,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the registry's thread has panicked");
        }
        for address in &self.addresses {
            if let Address::Unix(path) = address {
                // It may have been replaced or removed.
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

async fn accept(
    mut listener: Listener,
    leases: Arc<Leases>,
    security: Arc<Security>,
    room: Arc<Semaphore>,
) {
    loop {
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = room.clone().try_acquire_owned() else {
            tracing::warn!("{MAX_CONNECTIONS} connections: no room for one more");
            continue;
        };
        let (leases, security) = (leases.clone(), security.clone());
        tokio::spawn(async move {
            let welcomed = timeout(HELLO_TIME, leases.welcome(stream, &security)).await;
            match welcomed {
                Ok(Ok((stream, node))) => {
                    let pulse = Pulse {
                        heartbeat: LEASE / 5,
                        dead_after: LEASE,
                    };
                    Control::start(stream, node, leases, pulse, permit);
                }
                Ok(Err(error)) => tracing::debug!(%error, "a connection is refused"),
                Err(_) => tracing::debug!("a connection says nothing"),
            }
        });
    }
}

impl Leases {
    fn new() -> Leases {
        Leases {
            since: Instant::now(),
            channels: Mutex::default(),
        }
    }

    async fn welcome(
        &self,
        stream: Stream,
        security: &Security,
    ) -> std::io::Result<(Stream, Uuid)> {
        let mut stream = stream.admit(security).await?;
        let hello: Hello = message::read(&mut stream).await?;
        let code = match (hello.version, hello.purpose) {
            (VERSION, Purpose::Registry) => None,
            (VERSION, _) => Some("registry"),
            (_, _) => Some("version"),
        };
        if let Some(code) = code {
            let text = format!("this is a registry of version {VERSION}");
            let answer = Answer::Refusal {
                code: code.to_owned(),
                text,
            };
            message::write(&mut stream, &answer).await?;
            return Err(std::io::Error::other(
                "it wants no registry of this version",
            ));
        }
        message::write(&mut stream, &Answer::Welcome { node: Uuid::nil() }).await?;
        Ok((stream, hello.node))
    }

    fn register(
        &self,
        control: &Arc<Control>,
        channel: String,
        contact: NodeAddress,
        epoch: u64,
        create: bool,
        age: Duration,
    ) -> Reply {
        let now = Instant::now();
        let born = now.checked_sub(age).unwrap_or(now);
        let mut channels = self.channels();
        if let Some(known) = channels.get(&channel)
            && known.until > now
        {
            let other = known.contact.node != contact.node;
            let older = known.born.saturating_duration_since(born) > OLDER;
            let stays = known.epoch > epoch || known.epoch == epoch && !older;
            if create || other && stays {
                return Reply::Taken {
                    contact: known.contact.clone(),
                    epoch: known.epoch,
                };
            }
        } else if channels.len() >= MAX_CHANNELS && !channels.contains_key(&channel) {
            channels.retain(|_, lease| lease.until > now);
            if channels.len() >= MAX_CHANNELS {
                let text = format!("the registry has {MAX_CHANNELS} channels already");
                return Reply::Refused {
                    code: "limit".to_owned(),
                    text,
                };
            }
        }
        let control = control.clone();
        let until = now + LEASE;
        channels.insert(
            channel,
            Lease {
                contact,
                epoch,
                born,
                until,
                control,
            },
        );
        Reply::Registered {
            ttl_ms: LEASE.as_millis() as u64,
        }
    }

    fn channels(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Lease>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handler for Leases {
    fn request(self: Arc<Self>, control: &Arc<Control>, request: Request) -> Reply {
        let now = Instant::now();
        match request {
            Request::Register {
                channel,
                contact,
                epoch,
                create,
                age_ms,
            } => {
                // Whose it is, is said by the connection.
                if contact.node != control.node {
                    let text = "a node registers itself only".to_owned();
                    return Reply::Refused {
                        code: "registry".to_owned(),
                        text,
                    };
                }
                let age = Duration::from_millis(age_ms);
                self.register(control, channel, contact, epoch, create, age)
            }
            Request::Lookup { channel } => match self.channels().get(&channel) {
                Some(lease) if lease.until > now => Reply::Found {
                    contact: lease.contact.clone(),
                    epoch: lease.epoch,
                },
                _ => Reply::Unknown {
                    since_ms: self.since.elapsed().as_millis() as u64,
                },
            },
            Request::Unregister { channel } => {
                let mut channels = self.channels();
                let own = channels.get(&channel);
                if own.is_some_and(|lease| lease.contact.node == control.node) {
                    channels.remove(&channel);
                }
                Reply::Done
            }
            Request::List { after } => {
                let channels = self.channels();
                let rest = (Bound::Excluded(after), Bound::Unbounded);
                let rest = channels.range::<String, _>(rest);
                let live = rest.filter(|(_, lease)| lease.until > now);
                Reply::Channels {
                    names: live.map(|(name, _)| name.clone()).take(LIST).collect(),
                }
            }
            _ => Reply::Refused {
                code: "registry".to_owned(),
                text: "this is a registry".to_owned(),
            },
        }
    }

    fn notice(self: Arc<Self>, _: &Arc<Control>, _: Notice) {}

    fn ended(self: Arc<Self>, control: &Arc<Control>, _: End) {
        let soon = Instant::now() + ORPHANED;
        for lease in self.channels().values_mut() {
            if Arc::ptr_eq(&lease.control, control) {
                lease.until = lease.until.min(soon);
            }
        }
    }
}
