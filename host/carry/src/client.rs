//! The client's end.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;
use xbee_envelope::seal::Endpoint;
use xbee_envelope::trust::Role;
use xbee_envelope::{Body, Message};
use xbee_mq::client::Subscription;

use crate::stream::{Carried, Peer};
use crate::wire::{Post, Wire, is_unsealed, reply_to};
use crate::{Address, Error, Options};

/// How long a daemon has to answer the first message.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How often it is asked, if somebody else answers: of several who listen on a queue, each gets a message in turn.
const ATTEMPTS: usize = 3;

/// A daemon behind a broker.
pub struct Remote {
    address: Address,
    options: Options,
    endpoint: Arc<Endpoint>,
    session: Mutex<Option<Session>>,
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Remote").field(&self.address).finish()
    }
}

/// A daemon that has answered.
struct Session {
    wire: Arc<Wire>,
    daemon: Peer,
    is_over: Arc<AtomicBool>,
}

impl Remote {
    /// Nothing is connected yet.
    pub fn new(address: Address, options: Options, endpoint: Endpoint) -> Remote {
        Remote {
            address,
            options,
            endpoint: Arc::new(endpoint),
            session: Mutex::new(None),
        }
    }

    /// Where it is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// A connection to the daemon's API. All are with the daemon that was the first to answer, until the connection to the
    /// broker is lost.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn connect(&self) -> Result<Carried, Error> {
        let mut session = self.session.lock().await;
        if session
            .as_ref()
            .is_some_and(|old| old.is_over.load(Ordering::Acquire))
        {
            *session = None;
        }
        let Session { wire, daemon, .. } = match &mut *session {
            Some(session) => session,
            none => none.insert(self.meet().await?),
        };
        let connection = Uuid::new_v4();
        // Told first, and then what is said on it.
        let connect = Post::new(daemon.clone(), Body::Connect { connection });
        wire.post(connect).await;
        wire.connect(connection, daemon.clone()).ok_or(Error::Lost)
    }

    /// Ends what is open, and waits until the daemon can know of it.
    pub async fn close(&self) {
        if let Some(session) = self.session.lock().await.take() {
            session.wire.finish().await;
        }
    }

    async fn meet(&self) -> Result<Session, Error> {
        let (address, endpoint) = (&self.address, self.endpoint.clone());
        let (wire, mut messages) = Wire::open(address, &self.options, endpoint).await?;
        let until = Instant::now() + ANSWER_LIMIT;
        let mut attempt = 1;
        let daemon = loop {
            match timeout_at(until, self.ask(&wire, &mut messages)).await {
                Err(_) => return Err(Error::NoAnswer(address.to_string())),
                Ok(Ok(daemon)) => break daemon,
                Ok(Err(error)) if error.is_transient() || attempt == ATTEMPTS => return Err(error),
                Ok(Err(_)) => attempt += 1,
            }
        };
        let is_over = Arc::new(AtomicBool::new(false));
        tokio::spawn(listen(
            wire.clone(),
            messages,
            daemon.clone(),
            is_over.clone(),
        ));
        Ok(Session {
            wire,
            daemon,
            is_over,
        })
    }

    /// Shows the own certificate to one of those who listen, and takes its answer.
    async fn ask(&self, wire: &Wire, messages: &mut Subscription) -> Result<Peer, Error> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        // So that nothing is left when nobody listens: RabbitMQ's word for it, and ActiveMQ's.
        let expires = now.saturating_add(ANSWER_LIMIT).as_millis();
        let headers = wire
            .headers()
            .with("expiration", &ANSWER_LIMIT.as_millis().to_string())
            .with("expires", &expires.to_string());
        let hello = self.endpoint.hello("")?;
        wire.mq
            .send(&self.address.destination(), &headers, hello)
            .await?;
        loop {
            let answer = messages.next().await.ok_or(Error::Lost)?;
            if !is_unsealed(&answer.body) {
                continue;
            }
            if let Body::Error { fault, text } = Message::from_xml(&answer.body)?.body {
                return Err(Error::Refused { fault, text });
            }
            let (subject, role) = self.endpoint.meet(&answer.body)?;
            if role != Role::Daemon {
                return Err(Error::NoDaemon(subject));
            }
            if let Some(destination) = reply_to(&answer) {
                return Ok(Peer {
                    subject,
                    destination,
                });
            }
        }
    }
}

/// Passes on what the daemon says, until the connection to the broker is lost.
async fn listen(
    wire: Arc<Wire>,
    mut messages: Subscription,
    daemon: Peer,
    is_over: Arc<AtomicBool>,
) {
    while let Some(message) = messages.next().await {
        if is_unsealed(&message.body) {
            // Anybody may have said so; but whoever can send here can as well keep all from coming.
            if let Ok(Message {
                body: Body::Error { fault, text },
                ..
            }) = Message::from_xml(&message.body)
            {
                let reason = format!("the other side: {} {}: {text}", fault.code(), fault.name());
                is_over.store(true, Ordering::Release);
                wire.cut(None, &reason);
            }
            continue;
        }
        match wire.unseal(message.body).await {
            Ok((message, Role::Daemon)) if message.header.from == daemon.subject => {
                wire.deliver(daemon.clone(), message.body);
            }
            Ok((message, _)) => {
                tracing::warn!(from = message.header.from, "a message of somebody else");
            }
            // It is in the log, and missing from its connection, if it was of one.
            Err(_) => {}
        }
    }
    is_over.store(true, Ordering::Release);
    wire.cut(None, "the connection to the broker was lost");
}
