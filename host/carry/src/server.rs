//! The daemon's end.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::Semaphore;
use uuid::Uuid;
use xbee_envelope::seal::{self, Endpoint};
use xbee_envelope::trust::{self, Role};
use xbee_envelope::{Body, Fault, Message};
use xbee_mq::client::{Received, Subscription};
use xbee_mq::session::AckMode;

use crate::stream::{Carried, Peer};
use crate::wire::{Post, Wire, is_unsealed, reply_to};
use crate::{Address, Error, Options};

/// Connections of one user at a time.
pub const CONNECTIONS_OF_ONE: usize = 64;
/// Connections of all.
pub const CONNECTIONS: usize = 512;
/// Requests in messages of their own that are answered at a time.
const REQUESTS: usize = 64;

/// Header of a certificate that is shown to a pool: the task that is looked for, by its id or the beginning of it.
pub(crate) const TASK_HEADER: &str = "xbee-task";
/// In its place: whoever is there.
pub(crate) const ANY_TASK: &str = "*";
/// Longest value of that header, bytes.
const MAX_TASK_BYTES: usize = 64;

/// An answer to come.
pub type Answer = Pin<Box<dyn Future<Output = Body> + Send>>;

/// What a daemon does for those whom it believes. Subjects are of certificates.
pub trait Service: Send + Sync {
    /// Serves a connection to the API; returns at once.
    fn connection(&self, subject: &str, stream: Carried);
    /// Answers a request that is one message.
    fn request(&self, subject: &str, body: Body) -> Answer;
    /// Whether a task, named by its id or the beginning of it, is here, whoever's it is. Asked of members of a pool.
    fn knows(&self, task: &str) -> bool;
    /// The same, if it is this user's.
    fn has(&self, subject: &str, task: &str) -> Pin<Box<dyn Future<Output = bool> + Send>>;
}

/// Serves a queue until `stop` resolves, or the connection to the broker is lost, which is an error; connections are over
/// then. `ready` is called when it listens.
///
/// # Errors
/// See [`Error`].
pub async fn serve(
    address: &Address,
    options: &Options,
    endpoint: Arc<Endpoint>,
    service: Arc<dyn Service>,
    ready: impl FnOnce(),
    stop: impl Future<Output = ()>,
) -> Result<(), Error> {
    let (wire, mut own) = Wire::open(address, options, endpoint).await?;
    let mut shared = wire
        .mq
        .subscribe(&address.destination(), AckMode::Auto)
        .await?;
    let mut asked = match wire.endpoint.member() {
        Some(_) => {
            let topic = address.pool_topic();
            Some(wire.mq.subscribe(&topic, AckMode::Auto).await?)
        }
        None => None,
    };
    ready();
    let server = Server {
        wire,
        service,
        queue: address.destination(),
        requests: Arc::new(Semaphore::new(REQUESTS)),
    };
    tokio::pin!(stop);
    loop {
        let message = tokio::select! {
            message = own.next() => message,
            message = shared.next() => message,
            message = next(&mut asked) => match message {
                Some(message) => {
                    server.asked(&message);
                    continue;
                }
                None => None,
            },
            () = &mut stop => {
                server.wire.close("xbed ends").await;
                return Ok(());
            }
        };
        let Some(message) = message else {
            server
                .wire
                .cut(None, "the connection to the broker was lost");
            return Err(Error::Lost);
        };
        server.take(message).await;
    }
}

/// The next message of a subscription, if there is one.
async fn next(subscription: &mut Option<Subscription>) -> Option<Received> {
    match subscription {
        Some(subscription) => subscription.next().await,
        None => std::future::pending().await,
    }
}

struct Server {
    wire: Arc<Wire>,
    service: Arc<dyn Service>,
    queue: String,
    requests: Arc<Semaphore>,
}

impl Server {
    async fn take(&self, message: Received) {
        let Some(destination) = reply_to(&message) else {
            tracing::debug!("a message that wants no answer");
            return;
        };
        // It would be an answer to oneself.
        if destination == self.queue || destination == self.wire.topic {
            return;
        }
        let peer = |subject: String| Peer {
            subject,
            destination: destination.clone(),
            member: None,
        };
        if is_unsealed(&message.body) {
            return self.meet(&message.body, destination);
        }
        match self.wire.unseal(message.body).await {
            Ok((message, Role::User)) => {
                let from = peer(message.header.from.clone());
                self.serve(message, from);
            }
            Ok((message, Role::Daemon)) => {
                tracing::warn!(from = message.header.from, "a daemon asks");
                let from = peer(message.header.from);
                self.refuse(from, Fault::Unauthorized, Some(message.header.id));
            }
            Err(error) => {
                if let seal::Error::Trust(
                    trust::Error::NotListed(subject)
                    | trust::Error::Usage(subject)
                    | trust::Error::Chain { subject, .. },
                ) = &error
                {
                    self.wire
                        .cut(Some(subject), "its user is not believed any more");
                }
                self.refuse(peer(String::new()), error.fault(), None);
            }
        }
    }

    /// Shows the own certificate to who looks for a task, if it is here and theirs. Others may have it, so there is no other
    /// answer.
    fn asked(&self, message: &Received) {
        let task = message.headers.get(TASK_HEADER).unwrap_or_default();
        let (Some(destination), true) = (reply_to(message), task.len() <= MAX_TASK_BYTES) else {
            return;
        };
        // Before anything that costs more.
        if task != ANY_TASK && !self.service.knows(task) {
            return;
        }
        let Ok(hello) = Message::from_xml(&message.body) else {
            return;
        };
        let Ok((subject, Role::User)) = self.wire.endpoint.meet(&message.body) else {
            return;
        };
        let (service, task) = (self.service.clone(), task.to_owned());
        self.aside(move |wire: Arc<Wire>| async move {
            if task == ANY_TASK || service.has(&subject, &task).await {
                show(&wire, &subject, &destination, hello.header.id).await;
            }
        });
    }

    /// Takes the certificate of somebody, and shows the own.
    fn meet(&self, hello: &[u8], destination: String) {
        let id = match Message::from_xml(hello) {
            // Not answered, or two daemons would never end.
            Ok(Message {
                body: Body::Error { .. },
                ..
            }) => return,
            Ok(message) => Some(message.header.id),
            Err(_) => None,
        };
        match self.wire.endpoint.meet(hello) {
            Ok((_, Role::Daemon)) => {}
            Ok((subject, Role::User)) => {
                self.aside(move |wire: Arc<Wire>| async move {
                    show(&wire, &subject, &destination, id).await;
                });
            }
            Err(error) => {
                let subject = String::new();
                let to = Peer {
                    subject,
                    destination,
                    member: None,
                };
                self.refuse(to, error.fault(), id);
            }
        }
    }

    fn refuse(&self, to: Peer, fault: Fault, answers: Option<Uuid>) {
        self.aside(move |wire: Arc<Wire>| async move { wire.refuse(&to, fault, answers).await });
    }

    /// Answers beside what is read next; `false` if too many do already.
    fn aside<F: Future<Output = ()> + Send + 'static>(
        &self,
        answer: impl FnOnce(Arc<Wire>) -> F,
    ) -> bool {
        let Ok(permit) = self.requests.clone().try_acquire_owned() else {
            tracing::warn!("more than {REQUESTS} requests at a time: one is not answered");
            return false;
        };
        let answer = answer(self.wire.clone());
        tokio::spawn(async move {
            answer.await;
            drop(permit);
        });
        true
    }

    fn serve(&self, message: Message, from: Peer) {
        let id = message.header.id;
        match message.body {
            body if body.within().is_some() => self.wire.deliver(from, body),
            Body::Connect { connection } => self.connect(connection, from),
            body => {
                let answer = self.service.request(&from.subject, body);
                let to = from.clone();
                let is_begun = self.aside(move |wire: Arc<Wire>| async move {
                    wire.post(Post::answer(to, answer.await, id)).await;
                });
                if !is_begun {
                    let busy = Body::Error {
                        fault: Fault::Busy,
                        text: format!("{REQUESTS} requests are being answered: ask again"),
                    };
                    self.wire.try_post(Post::answer(from, busy, id));
                }
            }
        }
    }

    fn connect(&self, connection: Uuid, from: Peer) {
        let (of_one, of_all) = self.wire.count(&from.subject);
        let carried = match of_one < CONNECTIONS_OF_ONE && of_all < CONNECTIONS {
            true => self.wire.connect(connection, from.clone()),
            false => None,
        };
        match carried {
            Some(carried) => self.service.connection(&from.subject, carried),
            None => {
                let reason = "too many connections at a time".to_owned();
                self.wire
                    .try_post(Post::new(from, Body::Reset { connection, reason }));
            }
        }
    }
}

/// Shows the own certificate to somebody.
async fn show(wire: &Wire, subject: &str, destination: &str, answers: impl Into<Option<Uuid>>) {
    let own = match wire.endpoint.hello(subject, answers.into()) {
        Ok(own) => own,
        Err(error) => return tracing::warn!(%error, "no certificate can be shown"),
    };
    if let Err(error) = wire.mq.post(destination, &wire.headers(), own).await {
        tracing::debug!(%error, "no answer can be sent");
    }
}
