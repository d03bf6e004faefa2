//! A connection to the broker, and all that goes over it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;
use uuid::Uuid;
use xbee_envelope::seal::{self, Endpoint};
use xbee_envelope::trust::Role;
use xbee_envelope::{Body, Fault, MAX_MESSAGE_BYTES, Message, MessageError};
use xbee_mq::client::{Client, Received, Subscription};
use xbee_mq::frame::Headers;
use xbee_mq::session::AckMode;

use crate::stream::{Carried, Event, Handle, Peer, side};
use crate::{Address, Error, Options};

/// Messages that wait to be sealed.
const POSTS: usize = 16;
/// Longest destination that is answered to, bytes.
const MAX_DESTINATION_BYTES: usize = 255;
/// How long the last messages may take.
const LAST: Duration = Duration::from_secs(2);

/// A message to be sent.
#[derive(Debug)]
pub(crate) struct Post {
    pub peer: Peer,
    pub body: Body,
    pub answers: Option<Uuid>,
}

impl Post {
    pub fn new(peer: Peer, body: Body) -> Post {
        let answers = None;
        Post {
            peer,
            body,
            answers,
        }
    }

    pub fn answer(peer: Peer, body: Body, to: Uuid) -> Post {
        let answers = Some(to);
        Post {
            peer,
            body,
            answers,
        }
    }
}

/// What is done in its order.
enum Job {
    Send(Post),
    /// All before it is done.
    Done(oneshot::Sender<()>),
}

type Connections = HashMap<(String, Uuid), Handle>;

/// A connection to the broker.
pub(crate) struct Wire {
    pub endpoint: Arc<Endpoint>,
    pub mq: Client,
    /// The own destination.
    pub topic: String,
    jobs: mpsc::Sender<Job>,
    connections: Mutex<Connections>,
    sides: TaskTracker,
}

impl Wire {
    /// Connects, and listens on a topic of its own.
    pub async fn open(
        address: &Address,
        options: &Options,
        endpoint: Arc<Endpoint>,
    ) -> Result<(Arc<Wire>, Subscription), Error> {
        let mq = Client::connect_with(address.broker.clone(), options.client()).await?;
        let topic = format!("/topic/xbee.{}", Uuid::new_v4().simple());
        let messages = mq.subscribe(&topic, AckMode::Auto).await?;
        let (jobs, receiver) = mpsc::channel(POSTS);
        let wire = Arc::new(Wire {
            endpoint,
            mq,
            topic,
            jobs,
            connections: Mutex::default(),
            sides: TaskTracker::new(),
        });
        tokio::spawn(seal_all(Arc::downgrade(&wire), receiver));
        Ok((wire, messages))
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections with somebody, and with all.
    pub fn count(&self, subject: &str) -> (usize, usize) {
        let connections = self.lock();
        let of_one = connections.keys().filter(|(peer, _)| peer == subject);
        (of_one.count(), connections.len())
    }

    /// Begins a connection; `None` if there is one of this number.
    pub fn connect(self: &Arc<Self>, id: Uuid, peer: Peer) -> Option<Carried> {
        let mut connections = self.lock();
        let key = (peer.subject.clone(), id);
        if connections.contains_key(&key) {
            return None;
        }
        let (carried, handle, side) = side(self.clone(), id, peer);
        connections.insert(key, handle);
        self.sides.spawn(side.run());
        Some(carried)
    }

    /// A connection is over.
    pub fn forget(&self, subject: &str, id: Uuid) {
        self.lock().remove(&(subject.to_owned(), id));
    }

    /// Ends all connections, or those with somebody. The other side is not told.
    pub fn cut(&self, subject: Option<&str>, reason: &str) {
        self.lock().retain(|(peer, _), handle| {
            let stays = subject.is_some_and(|subject| subject != peer);
            if !stays {
                // The first reason is the one.
                let _ = handle.reason.set(reason.to_owned());
            }
            stays
        });
    }

    /// Tells all other sides that their connections are over, and ends.
    pub async fn close(&self, reason: &str) {
        let peers: Vec<_> = self.lock().drain().collect();
        for (_, handle) in peers {
            let _ = handle.reason.set(reason.to_owned());
        }
        self.finish().await;
    }

    /// Waits until all connections are over and all is sent, but not for ever.
    pub async fn finish(&self) {
        self.sides.close();
        let rest = async {
            self.sides.wait().await;
            let (done, all_done) = oneshot::channel();
            // Without its other end there is nothing to wait for.
            if self.jobs.send(Job::Done(done)).await.is_ok() {
                let _ = all_done.await;
            }
            self.mq.clone().close().await
        };
        match tokio::time::timeout(LAST, rest).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the broker did not hear of the end"),
            Err(_) => tracing::debug!("the broker takes nothing any more"),
        }
    }

    /// Sends a message after those before it. If it cannot be sealed, its receiver is told so.
    pub async fn post(&self, post: Post) {
        // Without its other end all connections are about to be cut.
        let _ = self.jobs.send(Job::Send(post)).await;
    }

    /// The same for what may be left out when there is much to send: who reads messages must not wait until some are sent.
    pub fn try_post(&self, post: Post) {
        if self.jobs.try_send(Job::Send(post)).is_err() {
            tracing::debug!("no room for an answer");
        }
    }

    /// The headers of every message.
    pub fn headers(&self) -> Headers {
        Headers::new().with("reply-to", &self.topic)
    }

    /// Opens a message. One at a time: their order matters.
    pub async fn unseal(&self, sealed: Vec<u8>) -> Result<(Message, Role), seal::Error> {
        let endpoint = self.endpoint.clone();
        let opened = tokio::task::spawn_blocking(move || endpoint.open(&sealed)).await;
        opened.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }

    /// Passes on what belongs to a connection.
    pub fn deliver(&self, peer: Peer, body: Body) {
        let Some(id) = body.within() else { return };
        let key = (peer.subject.clone(), id);
        let (event, reason) = match body {
            Body::Data { offset, bytes, .. } => (Some(Event::Data(offset, bytes)), String::new()),
            Body::Taken { offset, .. } => (Some(Event::Taken(offset)), String::new()),
            Body::End { offset, .. } => (Some(Event::End(offset)), String::new()),
            Body::Reset { reason, .. } => (None, reason),
            _ => return,
        };
        let is_reset = event.is_none();
        let reached = {
            let mut connections = self.lock();
            let sent = match (connections.get(&key), event) {
                (None, _) => None,
                (Some(_), None) => Some(Err(format!("the other side: {reason}"))),
                (Some(handle), Some(event)) => Some(
                    handle
                        .events
                        .try_send(event)
                        .map_err(|_| "more was sent than may be on its way".to_owned()),
                ),
            };
            if let Some(Err(reason)) = &sent
                && let Some(handle) = connections.remove(&key)
            {
                let _ = handle.reason.set(reason.clone());
            }
            sent
        };
        if !is_reset && !matches!(reached, Some(Ok(()))) {
            let reason = "there is no such connection".to_owned();
            let connection = id;
            self.try_post(Post::new(peer, Body::Reset { connection, reason }));
        }
    }

    async fn seal(
        &self,
        to: &Peer,
        body: Body,
        answers: Option<Uuid>,
    ) -> Result<Vec<u8>, seal::Error> {
        let (endpoint, to, member) = (self.endpoint.clone(), to.subject.clone(), to.member);
        let seal = move || endpoint.seal(&to, member, body, answers);
        let sealed = tokio::task::spawn_blocking(seal).await;
        sealed.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }

    /// Says, unsealed, that nothing is sealed to somebody.
    pub async fn refuse(&self, to: &Peer, fault: Fault, answers: Option<Uuid>) {
        let text = match fault {
            Fault::Unauthorized => {
                "not believed here: unknown, foreign, expired, revoked, or not in the list of subjects"
            }
            Fault::Busy => "too much at a time",
            Fault::Internal => "this side failed",
            _ => "a message that was altered, repeated, late, or is none",
        };
        let made = self
            .endpoint
            .refusal(&to.subject, fault, text.to_owned(), answers);
        let sent = match made {
            Ok(bytes) => self.mq.post(&to.destination, &self.headers(), bytes).await,
            Err(error) => return tracing::warn!(%error, "no answer can be made"),
        };
        if let Err(error) = sent {
            tracing::debug!(%error, "no answer can be sent");
        }
    }
}

/// Where a message wants its answer, if that is a destination at all.
pub(crate) fn reply_to(message: &Received) -> Option<String> {
    let destination = message.headers.get("reply-to")?;
    let good = destination.starts_with('/') && destination.len() <= MAX_DESTINATION_BYTES;
    good.then(|| destination.to_owned())
}

/// Whether bytes are a message that is not sealed. A sealed one is a sequence in DER.
pub(crate) fn is_unsealed(bytes: &[u8]) -> bool {
    bytes.first() != Some(&0x30)
}

/// Seals what is posted, in its order.
async fn seal_all(wire: std::sync::Weak<Wire>, mut jobs: mpsc::Receiver<Job>) {
    while let Some(job) = jobs.recv().await {
        let Post {
            peer,
            body,
            answers,
        } = match job {
            Job::Send(post) => post,
            Job::Done(done) => {
                // Whoever asked may not wait any more.
                let _ = done.send(());
                continue;
            }
        };
        let Some(wire) = wire.upgrade() else { return };
        let sealed = match (wire.seal(&peer, body, answers).await, answers) {
            // Who asked for it can be told, and keeps the connections that there are.
            (Err(seal::Error::Message(MessageError::Large(bytes))), Some(_)) => {
                let fault = Fault::BadRequest;
                let text = format!(
                    "the answer has {bytes} bytes, a message at most {MAX_MESSAGE_BYTES}: ask for less, as the status of one task"
                );
                wire.seal(&peer, Body::Error { fault, text }, answers).await
            }
            (sealed, _) => sealed,
        };
        match sealed {
            Ok(bytes) => {
                if let Err(error) = wire
                    .mq
                    .post(&peer.destination, &wire.headers(), bytes)
                    .await
                {
                    tracing::debug!(%error, "nothing can be sent any more");
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(to = peer.subject, %error, "a message cannot be sealed");
                let reason = format!("no message can be sealed to {}: {error}", peer.subject);
                wire.cut(Some(&peer.subject), &reason);
                wire.refuse(&peer, error.fault(), answers).await;
            }
        }
    }
}
