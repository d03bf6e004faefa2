//! A client of STOMP 1.2 brokers that comes back after its connection was lost.
//!
//! [`Client::send`] returns when the broker has said that it has the message. A connection that breaks is made again, with
//! pauses that grow; subscriptions go on then. What was under way ends with [`ClientError::Interrupted`]: the broker may
//! have it or not, and only the caller knows whether it may be sent twice.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::decode::{Decoder, FrameLimits, Malformed};
use crate::frame::{Command, Frame, Headers, Version};
use crate::handshake::{self, HeartBeats};
use crate::session::AckMode;
use crate::tls::{self, TlsError};
use crate::uri::{BadBrokerUri, BrokerUri};

/// Requests that wait for the connection before further ones wait outside.
const REQUESTS: usize = 64;
/// Nothing more is taken while this much waits to be written.
const OUTGOING_BYTES: usize = 256 * 1024;
const READ_BYTES: usize = 32 * 1024;
/// A connection that has held so long was a good one: the next pause is short again.
const GOOD_AFTER: Duration = Duration::from_secs(10);

/// How a client behaves.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Certificates (PEM) trusted beside the platform's.
    pub ca_file: Option<PathBuf>,
    /// Time for one attempt to connect.
    pub connect_timeout: Duration,
    /// Heart-beats that are offered and asked for; zero for none.
    pub heart_beat: Duration,
    /// The first pause before another attempt; each is twice as long as the one before.
    pub pause: Duration,
    /// The longest one.
    pub pause_max: Duration,
    /// How long a connection that is lost is tried to make again; zero: not at all.
    pub give_up_after: Duration,
    /// Messages that a subscription has without an acknowledgement.
    pub prefetch: usize,
    /// How large frames may be.
    pub frame: FrameLimits,
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions {
            ca_file: None,
            connect_timeout: Duration::from_secs(10),
            heart_beat: Duration::from_secs(10),
            pause: Duration::from_millis(100),
            pause_max: Duration::from_secs(10),
            give_up_after: Duration::from_secs(600),
            prefetch: 100,
            frame: FrameLimits::default(),
        }
    }
}

/// What goes wrong.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The URI.
    #[error("the broker's URI cannot be read")]
    Uri(#[from] BadBrokerUri),
    /// TLS cannot be set up.
    #[error("no TLS to the broker")]
    Tls(#[source] Arc<TlsError>),
    /// The connection cannot be made.
    #[error("cannot connect to the broker {uri}")]
    Connect {
        /// Where.
        uri: BrokerUri,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// The broker's answer is no STOMP.
    #[error("the broker {uri} does not speak STOMP")]
    Malformed {
        /// Where.
        uri: BrokerUri,
        /// Why.
        #[source]
        source: Malformed,
    },
    /// The broker says no.
    #[error("the broker refuses: {message}: {detail}")]
    Refused {
        /// The header `message` of its ERROR.
        message: String,
        /// The body.
        detail: String,
    },
    /// The connection was lost before the broker has answered.
    #[error("the connection to the broker was lost before it has answered")]
    Interrupted,
    /// The message was delivered over a connection that is gone; it will be delivered again.
    #[error("the connection that the message came over is gone: it will be delivered again")]
    Stale,
    /// The connection could not be made again, or was closed.
    #[error("there is no connection to the broker any more")]
    Closed,
}

impl ClientError {
    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            ClientError::Uri(_) => "broker-uri",
            ClientError::Tls(_) => "broker-tls",
            ClientError::Connect { .. } => "broker-connect",
            ClientError::Malformed { .. } => "broker-protocol",
            ClientError::Refused { .. } => "broker-refused",
            ClientError::Interrupted => "broker-interrupted",
            ClientError::Stale => "broker-stale",
            ClientError::Closed => "broker-closed",
        }
    }
}

/// A message that was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// All headers of the MESSAGE frame.
    pub headers: Headers,
    /// The body.
    pub body: Vec<u8>,
    /// Number of the connection that it came over.
    connection: u64,
}

impl Received {
    /// Whether it may have been delivered before.
    pub fn is_redelivered(&self) -> bool {
        self.headers.get("redelivered") == Some("true")
    }
}

type Answer = oneshot::Sender<Result<(), ClientError>>;

enum Request {
    /// A frame whose receipt is waited for; of this connection or of any.
    Frame(Frame, Option<u64>, Answer),
    /// Frames of one transaction of this connection; the receipt of the last one is waited for.
    Frames(Vec<Frame>, Frame, u64, Answer),
    /// A frame without receipt.
    Post(Frame),
    Subscribe(String, Frame, mpsc::Sender<Received>, Answer),
    Unsubscribe(String),
    Close(Answer),
}

/// A connection to a broker. Clones share it; it ends with the last of them and of its subscriptions.
#[derive(Debug, Clone)]
pub struct Client {
    requests: mpsc::Sender<Request>,
    next_subscription: Arc<AtomicU64>,
    next_transaction: Arc<AtomicU64>,
    prefetch: usize,
}

impl Client {
    /// Connects; the first attempt must succeed.
    pub async fn connect(uri: &str) -> Result<Client, ClientError> {
        Client::connect_with(uri.parse()?, ClientOptions::default()).await
    }

    /// The same with other options.
    pub async fn connect_with(
        uri: BrokerUri,
        options: ClientOptions,
    ) -> Result<Client, ClientError> {
        let tls = match uri.tls {
            false => None,
            true => Some(
                tls::client(options.ca_file.as_deref())
                    .map_err(|error| ClientError::Tls(Arc::new(error)))?,
            ),
        };
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let prefetch = options.prefetch.max(1);
        let dialer = Dialer { uri, options, tls };
        let link = dialer.dial(1).await?;
        tokio::spawn(
            Task {
                dialer,
                requests: receiver,
                subscriptions: HashMap::new(),
                next_receipt: 1,
                stalled: None,
            }
            .run(link),
        );
        Ok(Client {
            requests,
            next_subscription: Arc::new(AtomicU64::new(1)),
            next_transaction: Arc::new(AtomicU64::new(1)),
            prefetch,
        })
    }

    /// Sends a message, and waits until the broker has it.
    pub async fn send(
        &self,
        destination: &str,
        headers: &Headers,
        body: impl Into<Vec<u8>>,
    ) -> Result<(), ClientError> {
        let frame = message(destination, headers, body);
        self.ask(|answer| Request::Frame(frame, None, answer)).await
    }

    /// Sends a message after those before it, and does not wait: it is lost with the connection, and nobody is told.
    pub async fn post(
        &self,
        destination: &str,
        headers: &Headers,
        body: impl Into<Vec<u8>>,
    ) -> Result<(), ClientError> {
        let post = Request::Post(message(destination, headers, body));
        self.requests
            .send(post)
            .await
            .map_err(|_| ClientError::Closed)
    }

    /// Subscribes, and waits until the broker has understood.
    pub async fn subscribe(
        &self,
        destination: &str,
        mode: AckMode,
    ) -> Result<Subscription, ClientError> {
        let (sender, messages) = mpsc::channel(self.prefetch);
        let id = self
            .next_subscription
            .fetch_add(1, Ordering::Relaxed)
            .to_string();
        let frame = Frame::new(Command::Subscribe)
            .header("id", &id)
            .header("destination", destination)
            .header("ack", mode.as_str())
            // RabbitMQ's and ActiveMQ's name for it.
            .header("prefetch-count", &self.prefetch.to_string())
            .header("activemq.prefetchSize", &self.prefetch.to_string());
        // Made before, so that it is taken back if this call is given up.
        let subscription = Subscription {
            id: id.clone(),
            messages,
            client: self.clone(),
        };
        self.ask(|answer| Request::Subscribe(id, frame, sender, answer))
            .await?;
        Ok(subscription)
    }

    /// Says that this message is consumed, in mode `client` all before it too, and waits until the broker knows.
    pub async fn ack(&self, message: &Received) -> Result<(), ClientError> {
        self.answer(Command::Ack, message).await
    }

    /// Gives this message back.
    pub async fn nack(&self, message: &Received) -> Result<(), ClientError> {
        self.answer(Command::Nack, message).await
    }

    /// Consumes this message and sends one, both or neither, and waits until the broker has done it. After an error it may
    /// have been done. Where a broker applies a transaction step by step, the message is sent first.
    pub async fn exchange(
        &self,
        message: &Received,
        destination: &str,
        headers: &Headers,
        body: impl Into<Vec<u8>>,
    ) -> Result<(), ClientError> {
        // Of one connection, and one that was never ended is taken back with it.
        let number = self.next_transaction.fetch_add(1, Ordering::Relaxed);
        let of = |frame: Frame| frame.header("transaction", &number.to_string());
        let id = message.headers.get("ack").unwrap_or_default();
        let steps = vec![
            of(Frame::new(Command::Begin)),
            of(self::message(destination, headers, body)),
            of(Frame::new(Command::Ack).header("id", id)),
        ];
        let commit = of(Frame::new(Command::Commit));
        let connection = message.connection;
        self.ask(|answer| Request::Frames(steps, commit, connection, answer))
            .await
    }

    async fn answer(&self, command: Command, message: &Received) -> Result<(), ClientError> {
        let id = message.headers.get("ack").unwrap_or_default();
        let frame = Frame::new(command).header("id", id);
        let connection = Some(message.connection);
        self.ask(|answer| Request::Frame(frame, connection, answer))
            .await
    }

    /// Waits until the broker has processed all that was sent, and ends the connection.
    pub async fn close(self) -> Result<(), ClientError> {
        self.ask(Request::Close).await
    }

    async fn ask(&self, request: impl FnOnce(Answer) -> Request) -> Result<(), ClientError> {
        let (answer, answered) = oneshot::channel();
        self.requests
            .send(request(answer))
            .await
            .map_err(|_| ClientError::Closed)?;
        answered.await.map_err(|_| ClientError::Closed)?
    }
}

fn message(destination: &str, headers: &Headers, body: impl Into<Vec<u8>>) -> Frame {
    let mut frame = Frame::new(Command::Send)
        .header("destination", destination)
        .body(body);
    for (name, value) in headers.iter() {
        frame.headers.push(name, value);
    }
    frame
}

/// Messages of a destination. Dropped, it ends.
#[derive(Debug)]
pub struct Subscription {
    id: String,
    messages: mpsc::Receiver<Received>,
    client: Client,
}

impl Subscription {
    /// The next message; `None` when there is no connection any more.
    ///
    /// In mode `auto` a subscription that is not asked holds up the whole connection, when it has as many messages as
    /// [`ClientOptions::prefetch`] says.
    pub async fn next(&mut self) -> Option<Received> {
        self.messages.recv().await
    }

    /// The connection that it belongs to.
    pub fn client(&self) -> &Client {
        &self.client
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        // Where there is no room for it now, the next message tells that nobody wants it.
        let _ = self
            .client
            .requests
            .try_send(Request::Unsubscribe(self.id.clone()));
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A connection that the broker has accepted.
struct Link {
    number: u64,
    reader: ReadHalf<Box<dyn Stream>>,
    writer: WriteHalf<Box<dyn Stream>>,
    decoder: Decoder,
    /// What came after CONNECTED.
    input: Vec<u8>,
    heart_beats: HeartBeats,
}

struct Dialer {
    uri: BrokerUri,
    options: ClientOptions,
    tls: Option<Arc<rustls::ClientConfig>>,
}

impl Dialer {
    /// One attempt to connect.
    async fn dial(&self, number: u64) -> Result<Link, ClientError> {
        let failed = |source: io::Error| ClientError::Connect {
            uri: self.uri.clone(),
            source: Arc::new(source),
        };
        match timeout(self.options.connect_timeout, self.try_dial(number)).await {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => Err(failed(io::ErrorKind::TimedOut.into())),
        }
    }

    async fn try_dial(&self, number: u64) -> io::Result<Result<Link, ClientError>> {
        let uri = &self.uri;
        let tcp = TcpStream::connect((uri.host.as_str(), uri.port)).await?;
        tcp.set_nodelay(true)?;
        let stream: Box<dyn Stream> = match &self.tls {
            None => Box::new(tcp),
            Some(config) => {
                let name = ServerName::try_from(uri.host.clone()).map_err(io::Error::other)?;
                let connector = tokio_rustls::TlsConnector::from(config.clone());
                Box::new(connector.connect(name, tcp).await?)
            }
        };
        let (mut reader, mut writer) = tokio::io::split(stream);
        let every = u64::try_from(self.options.heart_beat.as_millis()).unwrap_or(u64::MAX);
        let mut connect = Frame::new(Command::Connect)
            .header("accept-version", "1.2")
            .header("host", &uri.virtual_host)
            .header("heart-beat", &format!("{every},{every}"));
        for (name, value) in [("login", &uri.login), ("passcode", &uri.passcode)] {
            if let Some(value) = value {
                connect.headers.push(name, value);
            }
        }
        let mut bytes = Vec::new();
        connect.encode(Version::V1_2, &mut bytes);
        writer.write_all(&bytes).await?;
        writer.flush().await?;

        let mut decoder = Decoder::new(Version::V1_2, self.options.frame);
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let count = reader.read(&mut buffer).await?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut input = &buffer[..count];
            let frame = match decoder.decode(&mut input) {
                Ok(Some(frame)) => frame,
                Ok(None) => continue,
                Err(source) => {
                    return Ok(Err(ClientError::Malformed {
                        uri: uri.clone(),
                        source,
                    }));
                }
            };
            if frame.command != Command::Connected {
                return Ok(Err(refused(&frame)));
            }
            // A broker that says nonsense here gets no heart-beats, and none are expected of it.
            let (can_send, wants) = handshake::read_heart_beat(&frame).unwrap_or_default();
            return Ok(Ok(Link {
                number,
                reader,
                writer,
                decoder,
                input: input.to_vec(),
                heart_beats: HeartBeats::agree((every, every), (can_send, wants)),
            }));
        }
    }
}

fn refused(frame: &Frame) -> ClientError {
    let message = frame.headers.get("message");
    ClientError::Refused {
        message: message.unwrap_or(frame.command.as_str()).to_owned(),
        detail: String::from_utf8_lossy(&frame.body).trim().to_owned(),
    }
}

/// Why a link ends.
enum End {
    /// It is lost: make another.
    Lost,
    /// Nobody wants it any more.
    Closed,
}

/// A message for which its subscription has no room, and what came after it.
struct Stalled {
    sender: mpsc::Sender<Received>,
    message: Received,
    rest: Vec<u8>,
}

struct Task {
    dialer: Dialer,
    requests: mpsc::Receiver<Request>,
    subscriptions: HashMap<String, (Frame, mpsc::Sender<Received>)>,
    next_receipt: u64,
    stalled: Option<Stalled>,
}

impl Task {
    async fn run(mut self, mut link: Link) {
        let options = self.dialer.options.clone();
        let mut pause = options.pause;
        loop {
            let (number, since) = (link.number, Instant::now());
            let mut answers = HashMap::new();
            let end = self.serve(link, &mut answers).await;
            for (_, answer) in answers.drain() {
                // Whoever asked may be gone.
                let _ = answer.send(Err(ClientError::Interrupted));
            }
            if let End::Closed = end {
                return;
            }
            if options.give_up_after.is_zero() {
                return;
            }
            if since.elapsed() >= GOOD_AFTER {
                pause = options.pause;
            }
            let lost = Instant::now();
            link = loop {
                // Somewhat at random, so that a broker's clients do not all come back at once.
                sleep(pause.mul_f64(0.5 + fraction() / 2.0)).await;
                pause = (pause * 2).min(options.pause_max);
                match self.dialer.dial(number + 1).await {
                    Ok(link) => break link,
                    Err(error) if lost.elapsed() >= options.give_up_after => {
                        tracing::error!(%error, "the broker is given up");
                        return;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "no connection to the broker; trying again");
                    }
                }
            };
        }
    }

    /// Uses a link until it ends. `answers` are to the receipts that are waited for.
    async fn serve(&mut self, mut link: Link, answers: &mut HashMap<String, Answer>) -> End {
        let mut out = Vec::new();
        self.stalled = None;
        self.subscriptions
            .retain(|_, (_, sender)| !sender.is_closed());
        for (frame, _) in self.subscriptions.values() {
            frame.encode(Version::V1_2, &mut out);
        }
        let mut closing = false;
        let mut buffer = vec![0; READ_BYTES];
        let (mut heard, mut wrote) = (Instant::now(), Instant::now());
        let first = std::mem::take(&mut link.input);
        if !self.take(&mut link, &first, &mut out, answers) {
            return End::Lost;
        }
        loop {
            // While nothing is read, a silence is no sign.
            let dead = match self.stalled {
                None => link.heart_beats.dead_after().map(|after| heard + after),
                Some(_) => None,
            };
            let beat = link.heart_beats.send_after().map(|after| wrote + after);
            let timer = dead.into_iter().chain(beat).min();
            let alarm = async {
                match timer {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let stalled = self.stalled.as_ref().map(|stalled| stalled.sender.clone());
            let room = async {
                match stalled {
                    Some(sender) => sender.reserve_owned().await.ok(),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                written = async {
                    let count = link.writer.write(&out).await?;
                    link.writer.flush().await?;
                    Ok::<usize, io::Error>(count)
                }, if !out.is_empty() => match written {
                    Ok(count) if count > 0 => {
                        out.drain(..count);
                        wrote = Instant::now();
                    }
                    _ => return End::Lost,
                },
                permit = room => if let Some(stalled) = self.stalled.take() {
                    if let Some(permit) = permit {
                        permit.send(stalled.message);
                    }
                    heard = Instant::now();
                    if !self.take(&mut link, &stalled.rest, &mut out, answers) {
                        return End::Lost;
                    }
                },
                read = link.reader.read(&mut buffer), if self.stalled.is_none() => match read {
                    Ok(count) if count > 0 => {
                        heard = Instant::now();
                        if !self.take(&mut link, &buffer[..count], &mut out, answers) {
                            return End::Lost;
                        }
                        if closing && answers.is_empty() {
                            return End::Closed;
                        }
                    }
                    _ if closing => return End::Closed,
                    _ => return End::Lost,
                },
                request = self.requests.recv(), if !closing && out.len() < OUTGOING_BYTES => match request {
                    None => {
                        Frame::new(Command::Disconnect).encode(Version::V1_2, &mut out);
                        // Nobody waits for more than that it is on its way.
                        let last = timeout(Duration::from_secs(1), link.writer.write_all(&out));
                        if let Ok(Err(error)) = last.await {
                            tracing::debug!(%error, "the broker did not hear of the end");
                        }
                        return End::Closed;
                    }
                    Some(request) => closing = self.request(request, link.number, &mut out, answers),
                },
                () = alarm => {
                    let now = Instant::now();
                    if dead.is_some_and(|at| at <= now) {
                        tracing::warn!("the broker is silent");
                        return End::Lost;
                    }
                    if out.is_empty() {
                        out.push(b'\n');
                    }
                    wrote = now;
                }
            }
        }
    }

    /// Writes what is asked for; true if nothing comes after it.
    fn request(
        &mut self,
        request: Request,
        number: u64,
        out: &mut Vec<u8>,
        answers: &mut HashMap<String, Answer>,
    ) -> bool {
        let (frame, answer) = match request {
            Request::Frame(_, Some(connection), answer)
            | Request::Frames(_, _, connection, answer)
                if connection != number =>
            {
                // Whoever asked may be gone.
                let _ = answer.send(Err(ClientError::Stale));
                return false;
            }
            Request::Frame(frame, _, answer) => (frame, answer),
            Request::Frames(steps, last, _, answer) => {
                for step in steps {
                    step.encode(Version::V1_2, out);
                }
                (last, answer)
            }
            Request::Post(frame) => {
                frame.encode(Version::V1_2, out);
                return false;
            }
            Request::Subscribe(id, frame, sender, answer) => {
                self.subscriptions.insert(id, (frame.clone(), sender));
                (frame, answer)
            }
            Request::Unsubscribe(id) => {
                self.forget(&id, out);
                return false;
            }
            Request::Close(answer) => (Frame::new(Command::Disconnect), answer),
        };
        let last = frame.command == Command::Disconnect;
        let receipt = self.next_receipt.to_string();
        self.next_receipt += 1;
        frame.header("receipt", &receipt).encode(Version::V1_2, out);
        answers.insert(receipt, answer);
        last
    }

    /// Ends a subscription that nobody wants any more.
    fn forget(&mut self, id: &str, out: &mut Vec<u8>) {
        if self.subscriptions.remove(id).is_some() {
            let frame = Frame::new(Command::Unsubscribe).header("id", id);
            frame.encode(Version::V1_2, out);
        }
    }

    /// Takes what was read; false if that is the end.
    fn take(
        &mut self,
        link: &mut Link,
        mut input: &[u8],
        out: &mut Vec<u8>,
        answers: &mut HashMap<String, Answer>,
    ) -> bool {
        while !input.is_empty() {
            let frame = match link.decoder.decode(&mut input) {
                Ok(Some(frame)) => frame,
                Ok(None) => continue,
                Err(error) => {
                    tracing::warn!(%error, "the broker does not speak STOMP any more");
                    return false;
                }
            };
            let receipt = frame.headers.get("receipt-id");
            let answer = receipt.and_then(|receipt| answers.remove(receipt));
            match frame.command {
                Command::Message => {
                    let id = frame.headers.get("subscription").unwrap_or_default();
                    let Some((_, sender)) = self.subscriptions.get(id) else {
                        continue;
                    };
                    let (id, sender) = (id.to_owned(), sender.clone());
                    let message = Received {
                        connection: link.number,
                        headers: frame.headers,
                        body: frame.body,
                    };
                    match sender.try_send(message) {
                        Ok(()) => {}
                        Err(TrySendError::Closed(_)) => self.forget(&id, out),
                        Err(TrySendError::Full(message)) => {
                            self.stalled = Some(Stalled {
                                sender,
                                message,
                                rest: input.to_vec(),
                            });
                            return true;
                        }
                    }
                }
                Command::Receipt => {
                    if let Some(answer) = answer {
                        let _ = answer.send(Ok(()));
                    }
                }
                Command::Error => {
                    let error = refused(&frame);
                    tracing::warn!(%error, "the broker ends the connection");
                    if let Some(answer) = answer {
                        let _ = answer.send(Err(error));
                    }
                    return false;
                }
                _ => {}
            }
        }
        true
    }
}

/// Somewhere from 0 to 1.
fn fraction() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    f64::from(since.map_or(0, |since| since.subsec_nanos() % 1000)) / 1000.0
}
