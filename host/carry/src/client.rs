//! The client's end.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{Mutex, mpsc};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;
use xbee_envelope::seal::Endpoint;
use xbee_envelope::trust::Role;
use xbee_envelope::{Body, Message};
use xbee_mq::client::{Received, Subscription};

use crate::server::{ANY_TASK, TASK_HEADER};
use crate::stream::{Carried, Peer};
use crate::wire::{Post, Wire, is_unsealed, reply_to};
use crate::{Address, Error, Options};

/// How long a daemon has to answer the first message.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How often it is asked, if somebody else answers: of several who listen on a queue, each gets a message in turn.
const ATTEMPTS: usize = 3;
/// How long a member of a pool has to say that it has a task.
pub const FIND_LIMIT: Duration = Duration::from_secs(5);
/// How often the members are asked meanwhile: one may be about to take it.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// Where several may answer, the first has so long, and each one after an answer so much.
const FIRST_ANSWER: Duration = Duration::from_secs(2);
const NEXT_ANSWER: Duration = Duration::from_millis(500);
/// Answers of members that wait to be looked at.
const ANSWERS: usize = 256;
/// Members of a pool that are known at a time.
const MAX_MEMBERS: usize = 1024;
/// Characters of a whole id.
const ID_CHARS: usize = 36;

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
    /// Who shows a certificate later, and which message that answers.
    answers: mpsc::Receiver<(Uuid, Peer)>,
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
    /// broker is lost; of a pool, one for a task (its id, or the beginning of it) is with the member that has it.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn connect(&self, task: Option<&str>) -> Result<Carried, Error> {
        let mut session = self.session.lock().await;
        let session = self.session(&mut session).await?;
        let peer = match (task, session.daemon.member) {
            (Some(task), Some(_)) => self.find(session, task).await?,
            _ => session.daemon.clone(),
        };
        begin(&session.wire, peer).await
    }

    /// A connection to the daemon's API; of a pool, one to each member that is there.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn connect_all(&self) -> Result<Vec<Carried>, Error> {
        let mut session = self.session.lock().await;
        let session = self.session(&mut session).await?;
        let mut peers = vec![session.daemon.clone()];
        if session.daemon.member.is_some() {
            let others = self.gather(session, ANY_TASK).await?;
            peers.extend(others.into_iter().filter(|peer| *peer != session.daemon));
        }
        let mut all = vec![];
        for peer in peers {
            all.push(begin(&session.wire, peer).await?);
        }
        Ok(all)
    }

    /// The session that there is, or a new one.
    async fn session<'a>(
        &self,
        session: &'a mut Option<Session>,
    ) -> Result<&'a mut Session, Error> {
        if session
            .as_ref()
            .is_some_and(|old| old.is_over.load(Ordering::Acquire))
        {
            *session = None;
        }
        Ok(match session {
            Some(session) => session,
            none => none.insert(self.meet().await?),
        })
    }

    /// The member of a pool that has a task.
    async fn find(&self, session: &mut Session, task: &str) -> Result<Peer, Error> {
        if task.len() < ID_CHARS {
            let mut found = self.gather(session, task).await?;
            let count = found.len();
            return match (found.pop(), count) {
                (None, _) => Err(Error::NotTaken(task.to_owned())),
                (Some(peer), 1) => Ok(peer),
                _ => Err(Error::Ambiguous(task.to_owned(), count)),
            };
        }
        let until = Instant::now() + FIND_LIMIT;
        let mut asked = vec![];
        while Instant::now() < until {
            asked.push(self.ask_all(session, task).await?);
            let again = until.min(Instant::now() + ASK_AGAIN);
            if let Some(peer) = answer_until(session, &asked, again).await? {
                return Ok(peer);
            }
        }
        Err(Error::NotTaken(task.to_owned()))
    }

    /// Those members who say that they have such a task.
    async fn gather(&self, session: &mut Session, task: &str) -> Result<Vec<Peer>, Error> {
        let asked = [self.ask_all(session, task).await?];
        let end = Instant::now() + FIND_LIMIT;
        let mut until = Instant::now() + FIRST_ANSWER;
        let mut found = vec![];
        while let Some(peer) = answer_until(session, &asked, until).await? {
            until = until.max(Instant::now() + NEXT_ANSWER).min(end);
            if !found.contains(&peer) && found.len() < MAX_MEMBERS {
                found.push(peer);
            }
        }
        Ok(found)
    }

    /// Asks all members who has a task; they answer the message of this id.
    async fn ask_all(&self, session: &Session, task: &str) -> Result<Uuid, Error> {
        let hello = self.endpoint.hello("", None)?;
        let id = Message::from_xml(&hello)?.header.id;
        let headers = session.wire.headers().with(TASK_HEADER, task);
        let topic = self.address.pool_topic();
        session.wire.mq.send(&topic, &headers, hello).await?;
        Ok(id)
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
        let (sender, answers) = mpsc::channel(ANSWERS);
        let listener = Listener {
            wire: wire.clone(),
            daemons: HashMap::from([(daemon.destination.clone(), daemon.clone())]),
            subject: daemon.subject.clone(),
            answers: sender,
            is_over: is_over.clone(),
        };
        tokio::spawn(listener.run(messages));
        Ok(Session {
            wire,
            daemon,
            answers,
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
        let hello = self.endpoint.hello("", None)?;
        wire.mq
            .send(&self.address.destination(), &headers, hello)
            .await?;
        loop {
            let answer = messages.next().await.ok_or(Error::Lost)?;
            if !is_unsealed(&answer.body) {
                continue;
            }
            let Message { header, body } = Message::from_xml(&answer.body)?;
            if let Body::Error { fault, text } = body {
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
                    member: header.member,
                });
            }
        }
    }
}

/// Begins a connection.
async fn begin(wire: &Arc<Wire>, peer: Peer) -> Result<Carried, Error> {
    let connection = Uuid::new_v4();
    // Told first, and then what is said on it.
    let connect = Post::new(peer.clone(), Body::Connect { connection });
    wire.post(connect).await;
    wire.connect(connection, peer).ok_or(Error::Lost)
}

/// Who answers one of these messages by that time.
async fn answer_until(
    session: &mut Session,
    asked: &[Uuid],
    until: Instant,
) -> Result<Option<Peer>, Error> {
    loop {
        match timeout_at(until, session.answers.recv()).await {
            Err(_) => return Ok(None),
            Ok(None) => return Err(Error::Lost),
            Ok(Some((answers, peer))) if asked.contains(&answers) => return Ok(Some(peer)),
            // Of an earlier question.
            Ok(Some(_)) => {}
        }
    }
}

/// Passes on what daemons say, until the connection to the broker is lost.
struct Listener {
    wire: Arc<Wire>,
    /// By where they are. All have one certificate.
    daemons: HashMap<String, Peer>,
    subject: String,
    answers: mpsc::Sender<(Uuid, Peer)>,
    is_over: Arc<AtomicBool>,
}

impl Listener {
    async fn run(mut self, mut messages: Subscription) {
        while let Some(message) = messages.next().await {
            if is_unsealed(&message.body) {
                self.unsealed(&message);
                continue;
            }
            let from = reply_to(&message).and_then(|from| self.daemons.get(&from).cloned());
            match self.wire.unseal(message.body).await {
                Ok((message, Role::Daemon)) if message.header.from == self.subject => {
                    if let Some(daemon) = from {
                        self.wire.deliver(daemon, message.body);
                    }
                }
                Ok((message, _)) => {
                    tracing::warn!(from = message.header.from, "a message of somebody else");
                }
                // It is in the log, and missing from its connection, if it was of one.
                Err(_) => {}
            }
        }
        self.is_over.store(true, Ordering::Release);
        self.wire.cut(None, "the connection to the broker was lost");
    }

    fn unsealed(&mut self, message: &Received) {
        let Ok(Message { header, body }) = Message::from_xml(&message.body) else {
            return;
        };
        match body {
            // Anybody may have said so; but whoever can send here can as well keep all from coming.
            Body::Error { fault, text } => {
                let reason = format!("the other side: {} {}: {text}", fault.code(), fault.name());
                self.is_over.store(true, Ordering::Release);
                self.wire.cut(None, &reason);
            }
            Body::Certificate(_) => {
                let (Some(destination), Some(answers)) = (reply_to(message), header.answers) else {
                    return;
                };
                match self.wire.endpoint.meet(&message.body) {
                    Ok((subject, Role::Daemon)) if subject == self.subject => {
                        let member = header.member;
                        let peer = Peer {
                            subject,
                            destination,
                            member,
                        };
                        if self.daemons.len() < MAX_MEMBERS
                            || self.daemons.contains_key(&peer.destination)
                        {
                            self.daemons.insert(peer.destination.clone(), peer.clone());
                            // Who asks does not wait any more, or asks again.
                            let _ = self.answers.try_send((answers, peer));
                        }
                    }
                    // It is in the log.
                    _ => {}
                }
            }
            _ => {}
        }
    }
}
