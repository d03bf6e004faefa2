//! The broker on a socket: one thread that serves all connections around the state machine of [`crate::broker`].
//!
//! One thread, because what a message costs is mostly system calls and being waked; with several, each message would be
//! handed from one to another, and all would wait for the one that has the queues.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::LocalSet;
use tracing::{info, warn};

use crate::access::Users;
use crate::broker::{Broker, ConnectionId, Effect};
use crate::config::{Config, ConfigError};
use crate::connection;
use crate::encode;
use crate::frame::{Command, Version};
use crate::handshake;
use crate::ids::ById;
use crate::limits::Limits;
use crate::outbox::Outbox;
use crate::refused::Refused;
use crate::store::{Store, StoreError};
use crate::tls::{self, TlsError};

/// What is read from a connection at once; one buffer serves them all.
const READ_BYTES: usize = 64 * 1024;
/// Passwords that are checked at a time.
const LOGINS_AT_A_TIME: usize = 2;
/// How long clients get to hear that the broker stops.
const STOP_GRACE: Duration = Duration::from_secs(1);
/// Pause after a connection could not be accepted, as for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why there is no broker.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The messages on the disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The address.
    #[error("the broker cannot listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The runtime.
    #[error("the broker's runtime cannot be started")]
    Runtime(#[source] io::Error),
}

impl ServerError {
    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            ServerError::Config(error) => error.code(),
            ServerError::Store(error) => error.code(),
            ServerError::Tls(error) => error.code(),
            ServerError::Listen { .. } => "broker-listen",
            ServerError::Runtime(_) => "system",
        }
    }
}

/// A broker that listens.
#[derive(Debug)]
pub struct Server {
    config: Config,
    listener: TcpListener,
    address: SocketAddr,
    broker: Broker,
    store: Option<Store>,
    tls: Option<Arc<ServerConfig>>,
    start_ms: u64,
}

impl Server {
    /// Takes up what is on the disk, and listens. Clients are served by [`Server::run`].
    pub fn open(config: Config) -> Result<Server, ServerError> {
        config.check()?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let start_ms = since.map_or(0, |since| since.as_millis() as u64);
        // Numbers of messages go on from one start to the next, unless more than a million a millisecond are sent.
        let mut broker = Broker::new(config.limits, start_ms << 20, config.data.is_some());
        let tls = config.tls.as_ref().map(tls::server).transpose()?;
        let store = match &config.data {
            None => None,
            Some(directory) => Some(Store::open(directory, |message| broker.restore(message))?),
        };
        let failed = |source| ServerError::Listen {
            address: config.listen,
            source,
        };
        let listener = TcpListener::bind(config.listen).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Server {
            config,
            listener,
            address,
            broker,
            store,
            tls,
            start_ms,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves clients on this thread until `stop` is ready; then tells them, and waits until all is on the disk.
    pub fn run(self, stop: impl Future<Output = ()>) -> Result<(), ServerError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(ServerError::Runtime)?;
        let local = LocalSet::new();
        local.block_on(&runtime, self.serve(stop))
    }

    async fn serve(self, stop: impl Future<Output = ()>) -> Result<(), ServerError> {
        let listener = tokio::net::TcpListener::from_std(self.listener).map_err(|source| {
            ServerError::Listen {
                address: self.address,
                source,
            }
        })?;
        info!(
            address = %self.address,
            messages = self.broker.messages(),
            tls = self.tls.is_some(),
            "the broker serves"
        );
        let shared = Rc::new(Shared {
            broker: RefCell::new(self.broker),
            store: self.store,
            outboxes: RefCell::default(),
            input: RefCell::new(vec![0; READ_BYTES].into_boxed_slice()),
            connections: Cell::new(0),
            logins: Semaphore::new(LOGINS_AT_A_TIME),
            users: Arc::new(self.config.users),
            limits: self.config.limits,
            start_ms: self.start_ms,
        });
        let stored = shared.store.as_ref().map(|store| {
            let shared = shared.clone();
            let mut stored = store.stored();
            tokio::task::spawn_local(async move {
                while stored.changed().await.is_ok() {
                    let ticket = *stored.borrow_and_update();
                    shared.with_broker(|broker| broker.stored(ticket));
                }
            })
        });
        let tls = self.tls.map(tokio_rustls::TlsAcceptor::from);
        let mut next_connection = 1;
        let mut stop = std::pin::pin!(stop);
        loop {
            tokio::select! {
                biased;
                () = &mut stop => break,
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => {
                        let id = ConnectionId(next_connection);
                        next_connection += 1;
                        serve_one(&shared, id, stream, peer, tls.clone());
                    }
                    Err(error) => {
                        warn!(%error, "a connection cannot be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(listener);
        shared.stop().await;
        if let Some(stored) = stored {
            stored.abort();
            // It fails with nothing but the abortion.
            let _ = stored.await;
        }
        // Connections that did not end in time may still have it; their tasks end with this runtime.
        if let Some(store) = Rc::into_inner(shared).and_then(|shared| shared.store) {
            store.close();
        }
        Ok(())
    }
}

fn serve_one(
    shared: &Rc<Shared>,
    id: ConnectionId,
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<tokio_rustls::TlsAcceptor>,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "the connection has gone already");
        return;
    }
    // So that a client whose machine is gone does not stay for ever without heart-beats.
    if let Err(error) = rustix::net::sockopt::set_socket_keepalive(&stream, true) {
        warn!(%peer, %error, "no TCP keep-alive");
    }
    let limit = shared.limits.connections;
    let count = shared.connections.get() + 1;
    if count > limit.saturating_mul(2) {
        return;
    }
    shared.connections.set(count);
    let full = (count > limit).then_some(Refused::Limit {
        what: "connections",
        limit,
    });
    let shared = shared.clone();
    tokio::task::spawn_local(async move {
        let result = match tls {
            None => connection::serve(&shared, id, stream, full).await,
            Some(acceptor) => {
                let time = Duration::from_secs(shared.limits.connect_timeout_s);
                match tokio::time::timeout(time, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => connection::serve(&shared, id, stream, full).await,
                    Ok(Err(error)) => Err(error),
                    Err(_) => Err(io::ErrorKind::TimedOut.into()),
                }
            }
        };
        if let Err(error) = result {
            tracing::debug!(%peer, %error, "connection ended");
        }
        shared.connections.set(shared.connections.get() - 1);
    });
}

/// What all connections share.
pub(crate) struct Shared {
    broker: RefCell<Broker>,
    store: Option<Store>,
    outboxes: RefCell<ById<ConnectionId, Rc<Outbox>>>,
    /// What was read last; whoever has read takes it before it waits for anything.
    pub(crate) input: RefCell<Box<[u8]>>,
    connections: Cell<usize>,
    pub(crate) logins: Semaphore,
    pub(crate) users: Arc<Users>,
    pub(crate) limits: Limits,
    pub(crate) start_ms: u64,
}

impl Shared {
    /// Does something with the broker, and then what the broker wants done.
    pub(crate) fn with_broker<T>(&self, work: impl FnOnce(&mut Broker) -> T) -> T {
        let broker = &mut *self.broker.borrow_mut();
        let result = work(broker);
        if let Some(store) = &self.store
            && let Some(group) = broker.take_changes()
        {
            store.put(group);
        }
        let outboxes = self.outboxes.borrow();
        for effect in broker.effects() {
            match effect {
                Effect::Message {
                    to,
                    version,
                    delivery,
                } => {
                    if let Some(outbox) = outboxes.get(&to) {
                        outbox.fill(|out| delivery.encode(version, out));
                    }
                }
                Effect::Receipt {
                    to,
                    version,
                    receipt,
                } => {
                    if let Some(outbox) = outboxes.get(&to) {
                        outbox.fill(|out| {
                            encode::command(out, Command::Receipt);
                            encode::header(out, Some(version), "receipt-id", &receipt);
                            encode::body(out, b"");
                        });
                    }
                }
                Effect::Error {
                    to,
                    version,
                    refused,
                    receipt,
                } => {
                    if let Some(outbox) = outboxes.get(&to) {
                        refuse(outbox, version, &refused, receipt.as_deref());
                    }
                }
                Effect::Close { to } => {
                    if let Some(outbox) = outboxes.get(&to) {
                        outbox.close();
                    }
                }
                Effect::Discarded { message } => warn!(
                    id = message.id,
                    destination = %message.destination,
                    "a message that was sent back too often is lost: the dead-letter queue is full"
                ),
            }
        }
        result
    }

    /// From now on the broker's words to this client go into its outbox.
    pub(crate) fn join(&self, id: ConnectionId, outbox: &Rc<Outbox>) {
        self.outboxes.borrow_mut().insert(id, outbox.clone());
    }

    /// The client is gone.
    pub(crate) fn leave(&self, id: ConnectionId) {
        self.outboxes.borrow_mut().remove(&id);
        self.with_broker(|broker| broker.gone(id));
    }

    async fn stop(&self) {
        let clients: Vec<ConnectionId> = self.outboxes.borrow().keys().copied().collect();
        self.with_broker(|broker| {
            for id in clients {
                broker.refuse(id, Refused::Stopping, None);
            }
        });
        let all_gone = async {
            while self.connections.get() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(STOP_GRACE, all_gone).await.is_err() {
            info!(
                left = self.connections.get(),
                "clients that do not go are left"
            );
        }
    }
}

/// Says why a connection ends.
pub(crate) fn refuse(outbox: &Outbox, version: Version, refused: &Refused, receipt: Option<&str>) {
    // What strangers can bring about as often as they like does not fill the log.
    tracing::debug!(code = refused.code(), "client refused: {refused}");
    outbox.fill(|out| handshake::error(refused, receipt).encode(version, out));
    outbox.close();
}
