//! The client of the API: one connection a request, over a unix socket or whatever a [`Connector`] makes.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::watch;
use uuid::Uuid;

use crate::upload::FileBody;
use crate::{
    CacheEntry, CacheNews, CacheRequest, CheckReport, ConfirmRequest, DomainExport, EXEC_HEADER,
    ErrorBody, ExecRequest, ExportForm, FollowQuery, HostInfo, PlaceRequest, Places,
    ReserveRequest, Reserved, ResultFile, SshAccess, SubmitRequest, TaskEvent, TaskStatus,
    TicketRequest, UPGRADE_EXEC, UPGRADE_TCP, Upload,
};

/// Longest wait for the head of an answer, for the whole of one that is not a stream, and for `xbed` to take
/// more of an upload.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Largest answer that is not a stream: room for tens of thousands of tasks.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;
/// Longest line of the event stream.
const MAX_LINE_BYTES: usize = 1024 * 1024;
/// Shortest prefix of a task's id that names it, and the length of a whole one.
const TASK_ID_CHARS: std::ops::RangeInclusive<usize> = 4..=36;

/// What can go wrong between the client and `xbed`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not an address of `xbed`.
    #[error(
        "`{uri}` is no address of an xbed: expected unix:///PATH, the path of a socket, or stomp+ssl://HOST/QUEUE"
    )]
    InvalidUri {
        /// What was given.
        uri: String,
    },
    /// Nobody listens there. The cause is part of the text: it is the one thing a user needs.
    #[error(
        "no xbed answers at {} ({reason}): start one with `xbed`, or name another with --server",
        socket.display()
    )]
    NotRunning {
        /// Where it was looked for.
        socket: PathBuf,
        /// The system's reason.
        reason: &'static str,
    },
    /// The socket is there, but not for this user.
    #[error(
        "you may not connect to {}: ask its owner for access, or start your own with `xbed`",
        socket.display()
    )]
    Forbidden {
        /// The socket.
        socket: PathBuf,
    },
    /// The default socket is served by somebody else.
    #[error(
        "{} is served by user {uid}, not by you: name it with --server if that is what you want",
        socket.display()
    )]
    Foreign {
        /// The socket.
        socket: PathBuf,
        /// User id of the process behind it.
        uid: u32,
    },
    /// Any other failure to connect.
    #[error("cannot connect to {}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// What is no unix socket failed to connect.
    #[error("cannot reach an xbed through {server}")]
    Remote {
        /// The address, without a password.
        server: String,
        /// Stable name for programs.
        code: &'static str,
        /// It may be there in a moment.
        is_transient: bool,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The text cannot be the id of a task.
    #[error(
        "`{given}` is no task id: expected an id or its first characters (4 or more), see `xbe ps -a`"
    )]
    InvalidTaskId {
        /// What was given.
        given: String,
    },
    /// The text cannot be the id of a cache entry.
    #[error(
        "`{given}` is no id of a cache entry: expected an id or its first characters (4 or more), see `xbe cache ls`"
    )]
    InvalidEntry {
        /// What was given.
        given: String,
    },
    /// `xbed` answered with an error.
    #[error("{}", body.message)]
    Refused {
        /// The HTTP status.
        status: u16,
        /// What it said.
        body: ErrorBody,
    },
    /// The connection broke.
    #[error("the connection to xbed was lost")]
    Lost(#[source] hyper::Error),
    /// No answer in time.
    #[error("xbed did not answer within {} s: see its log", ANSWER_TIMEOUT.as_secs())]
    Timeout,
    /// The answer is not one that this version understands.
    #[error(
        "xbed answered in a way this xbe does not understand ({what}): are both of one version?"
    )]
    Answer {
        /// Which part.
        what: &'static str,
        /// The parser's view, where there is one.
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
}

impl Error {
    /// Stable name for programs.
    pub fn code(&self) -> &str {
        match self {
            Error::InvalidUri { .. } => "invalid-server",
            Error::NotRunning { .. } => "not-running",
            Error::Forbidden { .. } => "forbidden",
            Error::Foreign { .. } => "foreign-server",
            Error::Connect { .. } => "cannot-connect",
            Error::Remote { code, .. } => code,
            Error::InvalidTaskId { .. } => "invalid-task-id",
            Error::InvalidEntry { .. } => "invalid-cache-entry",
            Error::Refused { body, .. } => &body.code,
            Error::Lost(_) => "connection-lost",
            Error::Timeout => "timeout",
            Error::Answer { .. } => "unknown-answer",
        }
    }

    /// The server may be back in a moment: an open stream can be asked for again.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::NotRunning { .. } | Error::Lost(_) => true,
            Error::Remote { is_transient, .. } => *is_transient,
            _ => false,
        }
    }

    /// Nothing of the request has reached a server.
    pub fn is_unsent(&self) -> bool {
        match self {
            Error::InvalidUri { .. }
            | Error::NotRunning { .. }
            | Error::Forbidden { .. }
            | Error::Foreign { .. }
            | Error::Connect { .. }
            | Error::Remote { .. }
            | Error::InvalidTaskId { .. }
            | Error::InvalidEntry { .. } => true,
            Error::Refused { .. } | Error::Lost(_) | Error::Timeout | Error::Answer { .. } => false,
        }
    }

    fn answer(what: &'static str) -> Self {
        Error::Answer { what, source: None }
    }
}

/// One of a task's logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Log {
    /// The task's standard output.
    Stdout,
    /// The task's standard error.
    Stderr,
    /// The domain's console.
    Console,
}

impl Log {
    /// Name in paths and in output.
    pub fn name(self) -> &'static str {
        match self {
            Log::Stdout => "stdout",
            Log::Stderr => "stderr",
            Log::Console => "console",
        }
    }
}

/// A connection that has left HTTP.
pub type Tunnel = TokioIo<Upgraded>;

/// A connection to an `xbed`.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A value to come.
pub type Later<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What makes connections to an `xbed` that is not on a unix socket.
pub trait Connector: fmt::Debug + Send + Sync {
    /// A new connection, for a task (its id, or the beginning of it) to the `xbed` that has it, if there are several; an
    /// [`Error::Remote`] otherwise.
    fn connect<'a>(&'a self, task: Option<&'a str>) -> Later<'a, Result<Box<dyn Stream>, Error>>;
    /// A new connection to each `xbed` that there is.
    fn connect_all(&self) -> Later<'_, Result<Vec<Box<dyn Stream>>, Error>>;
    /// Ends all connections, and waits until the other side can know of it.
    fn close(&self) -> Later<'_, ()>;
}

/// The client.
#[derive(Debug, Clone)]
pub struct Client {
    way: Way,
}

#[derive(Debug, Clone)]
enum Way {
    Socket {
        path: PathBuf,
        /// It was not chosen by the user: only the user's own `xbed` or root's is trusted.
        is_default: bool,
    },
    Other {
        uri: String,
        connector: Arc<dyn Connector>,
    },
}

impl Client {
    /// The client of this user's own `xbed`, see [`crate::default_socket`]; of root's where there
    /// is no own one.
    pub fn local() -> Self {
        let own = crate::default_socket();
        let system = Path::new(crate::SYSTEM_SOCKET);
        let path = if !own.exists() && system.exists() {
            system.to_owned()
        } else {
            own
        };
        let is_default = true;
        let way = Way::Socket { path, is_default };
        Client { way }
    }

    /// The client of the `xbed` at `uri`: `unix:///PATH`, or a path alone.
    ///
    /// # Errors
    /// [`Error::InvalidUri`].
    pub fn from_uri(uri: &str) -> Result<Self, Error> {
        let path = match uri.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') => path,
            None if !uri.is_empty() => uri,
            _ => {
                return Err(Error::InvalidUri {
                    uri: uri.to_owned(),
                });
            }
        };
        let way = Way::Socket {
            path: PathBuf::from(path),
            is_default: false,
        };
        Ok(Client { way })
    }

    /// The same for an address that the user has not chosen: only the user's own `xbed` or root's is trusted there.
    ///
    /// # Errors
    /// [`Error::InvalidUri`].
    pub fn from_told_uri(uri: &str) -> Result<Self, Error> {
        let mut client = Client::from_uri(uri)?;
        if let Way::Socket { is_default, .. } = &mut client.way {
            *is_default = true;
        }
        Ok(client)
    }

    /// The client of the `xbed` that the connector reaches; `uri` names it for other processes.
    pub fn through(uri: String, connector: Arc<dyn Connector>) -> Self {
        let way = Way::Other { uri, connector };
        Client { way }
    }

    /// `xbed` may be on another machine: its files, and its loopback, are not this side's.
    pub fn is_remote(&self) -> bool {
        matches!(self.way, Way::Other { .. })
    }

    /// The address that another process of this user needs to reach the same `xbed`. It may hold a password.
    ///
    /// # Errors
    /// The current directory is not known, and the address relative to it.
    pub fn server(&self) -> io::Result<OsString> {
        match &self.way {
            Way::Socket { path, .. } => Ok(std::path::absolute(path)?.into_os_string()),
            Way::Other { uri, .. } => Ok(uri.into()),
        }
    }

    /// Ends all connections, and waits until `xbed` can know of it.
    pub async fn close(&self) {
        match &self.way {
            // The kernel tells it.
            Way::Socket { .. } => {}
            Way::Other { connector, .. } => connector.close().await,
        }
    }

    /// `GET /v1/host`.
    ///
    /// # Errors
    /// See [`Error`]; so for all that follow.
    pub async fn host(&self) -> Result<HostInfo, Error> {
        self.get("/v1/host").await
    }

    /// `POST /v1/check`.
    pub async fn check(&self, request: &SubmitRequest) -> Result<CheckReport, Error> {
        self.post("/v1/check", request).await
    }

    /// `POST /v1/export`.
    pub async fn export(
        &self,
        request: &SubmitRequest,
        form: ExportForm,
    ) -> Result<DomainExport, Error> {
        self.post(&format!("/v1/export?form={}", form.name()), request)
            .await
    }

    /// `GET /v1/tasks/{id}/export`.
    pub async fn export_task(&self, task: &str, form: ExportForm) -> Result<DomainExport, Error> {
        let end = format!("/export?form={}", form.name());
        self.get(&task_path(task, &end)?).await
    }

    /// `POST /v1/tasks`: durable once it returns.
    pub async fn submit(&self, request: &SubmitRequest) -> Result<TaskStatus, Error> {
        self.post("/v1/tasks", request).await
    }

    /// `POST /v1/places`.
    pub async fn places(&self, request: &SubmitRequest) -> Result<Places, Error> {
        self.post("/v1/places", request).await
    }

    /// `POST /v1/placements`: durable once it returns. If it fails, [`Error::is_unsent`] and an answer say that the host has not
    /// got it.
    pub async fn place(&self, request: &PlaceRequest) -> Result<TaskStatus, Error> {
        self.post("/v1/placements", request).await
    }

    /// `POST /v1/reservations`: durable once it returns.
    pub async fn reserve(&self, request: &ReserveRequest) -> Result<Reserved, Error> {
        self.post("/v1/reservations", request).await
    }

    /// `POST /v1/reservations/confirm`: durable once it returns; so for those that follow.
    pub async fn confirm(&self, request: &ConfirmRequest) -> Result<TaskStatus, Error> {
        self.post("/v1/reservations/confirm", request).await
    }

    /// `POST /v1/reservations/start`.
    pub async fn start(&self, ticket: &TicketRequest) -> Result<TaskStatus, Error> {
        self.post("/v1/reservations/start", ticket).await
    }

    /// `POST /v1/reservations/cancel`.
    pub async fn cancel(&self, ticket: &TicketRequest) -> Result<TaskStatus, Error> {
        self.post("/v1/reservations/cancel", ticket).await
    }

    /// `GET /v1/cache`.
    pub async fn cached(&self) -> Result<Vec<CacheEntry>, Error> {
        self.get("/v1/cache").await
    }

    /// `POST /v1/cache`. To drop what it returns is to want the file no more.
    pub async fn cache(&self, file: &CacheRequest) -> Result<CacheFetch, Error> {
        let answer = self.post_answer("/v1/cache", file).await?;
        Ok(CacheFetch(Lines::new(answer)))
    }

    /// `DELETE /v1/cache/{id}`.
    pub async fn uncache(&self, entry: &str) -> Result<(), Error> {
        let is_id = |byte: u8| byte.is_ascii_hexdigit() || byte == b'-';
        if !TASK_ID_CHARS.contains(&entry.len()) || !entry.bytes().all(is_id) {
            return Err(Error::InvalidEntry {
                given: entry.to_owned(),
            });
        }
        let path = format!("/v1/cache/{}", entry.to_ascii_lowercase());
        self.send(request(Method::DELETE, &path)?).await?;
        Ok(())
    }

    /// `GET /v1/tasks`.
    pub async fn list(&self, all: bool) -> Result<Vec<TaskStatus>, Error> {
        let path = match all {
            true => "/v1/tasks?all=true",
            false => "/v1/tasks",
        };
        let Way::Other { connector, .. } = &self.way else {
            return self.get(path).await;
        };
        let mut tasks: Vec<TaskStatus> = vec![];
        for stream in connector.connect_all().await? {
            let answer = exchange(stream, request(Method::GET, path)?).await?;
            tasks.extend(json::<Vec<TaskStatus>>(answer).await?);
        }
        // Each list is in its order already.
        tasks.sort_by_key(|task| task.times.first().map(|first| first.at_ms));
        Ok(tasks)
    }

    /// `GET /v1/tasks` of the tasks of an array.
    pub async fn list_array(&self, array: &str, all: bool) -> Result<Vec<TaskStatus>, Error> {
        // Looked at as an id only.
        task_path(array, "")?;
        self.get(&format!("/v1/tasks?all={all}&array={array}"))
            .await
    }

    /// `GET /v1/tasks/{id}`.
    pub async fn status(&self, task: &str) -> Result<TaskStatus, Error> {
        self.get(&task_path(task, "")?).await
    }

    /// `POST /v1/tasks/{id}/terminate`.
    pub async fn terminate(&self, task: &str) -> Result<TaskStatus, Error> {
        let request = request(Method::POST, &task_path(task, "/terminate")?)?;
        json(self.send(request).await?).await
    }

    /// `DELETE /v1/tasks/{id}`.
    pub async fn remove(&self, task: &str) -> Result<(), Error> {
        self.send(request(Method::DELETE, &task_path(task, "")?)?)
            .await?;
        Ok(())
    }

    /// `GET /v1/tasks/{id}/ssh`.
    pub async fn ssh(&self, task: &str) -> Result<SshAccess, Error> {
        self.get(&task_path(task, "/ssh")?).await
    }

    /// `GET /v1/tasks/{id}/events`.
    pub async fn events(&self, task: &str, query: FollowQuery) -> Result<Events, Error> {
        let path = task_path(task, &format!("/events?{}", follow(query)))?;
        let answer = self.send(request(Method::GET, &path)?).await?;
        Ok(Events(Lines::new(answer)))
    }

    /// `GET /v1/tasks/{id}/logs/{stream}`.
    pub async fn logs(
        &self,
        task: &str,
        log: Log,
        query: FollowQuery,
    ) -> Result<Bytestream, Error> {
        let path = task_path(task, &format!("/logs/{}?{}", log.name(), follow(query)))?;
        Ok(Bytestream(
            self.send(request(Method::GET, &path)?).await?.into_body(),
        ))
    }

    /// `POST /v1/uploads`: the next `bytes` of a file, of which `sent` tells how many have gone. Durable once it returns.
    pub async fn upload(
        &self,
        file: File,
        bytes: u64,
        sent: watch::Sender<u64>,
    ) -> Result<Upload, Error> {
        let seen = sent.subscribe();
        let request = request(Method::POST, "/v1/uploads")?.map(drop);
        let request = FileBody::of(request, file, bytes, sent);
        let stream = self.connect(None).await?;
        let mut exchange = std::pin::pin!(exchange(stream, request));
        let mut before = 0;
        let answer = loop {
            match tokio::time::timeout(ANSWER_TIMEOUT, &mut exchange).await {
                Ok(answer) => break answer?,
                Err(_) if *seen.borrow() == before => return Err(Error::Timeout),
                Err(_) => before = *seen.borrow(),
            }
        };
        json(answer).await
    }

    /// `DELETE /v1/uploads/{id}`.
    pub async fn remove_upload(&self, id: Uuid) -> Result<(), Error> {
        self.send(request(Method::DELETE, &format!("/v1/uploads/{id}"))?)
            .await?;
        Ok(())
    }

    /// `GET /v1/tasks/{id}/results`.
    pub async fn results(&self, task: &str) -> Result<Vec<ResultFile>, Error> {
        self.get(&task_path(task, "/results")?).await
    }

    /// `GET /v1/tasks/{id}/results/{number}`, from a byte on.
    pub async fn result(&self, task: &str, number: u32, from: u64) -> Result<Bytestream, Error> {
        let path = task_path(task, &format!("/results/{number}?from={from}"))?;
        let answer = self.send(request(Method::GET, &path)?).await?;
        Ok(Bytestream(answer.into_body()))
    }

    /// `POST /v1/tasks/{id}/exec`: a connection of frames, see [`crate::exec`].
    pub async fn exec(&self, task: &str, exec: &ExecRequest) -> Result<Tunnel, Error> {
        let header = ascii_json(exec)?;
        let mut request = request(Method::POST, &task_path(task, "/exec")?)?;
        let header = header
            .try_into()
            .map_err(|source: hyper::header::InvalidHeaderValue| Error::Answer {
                what: "exec request",
                source: Some(source.into()),
            })?;
        request.headers_mut().insert(EXEC_HEADER, header);
        self.upgrade(request, UPGRADE_EXEC).await
    }

    /// `POST /v1/tasks/{id}/forward`: a connection to a TCP port of the guest.
    pub async fn forward(&self, task: &str, port: u16) -> Result<Tunnel, Error> {
        let path = task_path(task, &format!("/forward?port={port}"))?;
        self.upgrade(request(Method::POST, &path)?, UPGRADE_TCP)
            .await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        json(self.send(request(Method::GET, path)?).await?).await
    }

    async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, Error> {
        json(self.post_answer(path, body).await?).await
    }

    async fn post_answer<B: Serialize>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<Response<Incoming>, Error> {
        let mut request = request(Method::POST, path)?;
        let body = serde_json::to_vec(body).map_err(answer("request"))?;
        *request.body_mut() = Full::new(body.into());
        let json = hyper::header::HeaderValue::from_static("application/json");
        request.headers_mut().insert(CONTENT_TYPE, json);
        self.send(request).await
    }

    async fn upgrade(
        &self,
        mut request: Request<Full<Bytes>>,
        protocol: &'static str,
    ) -> Result<Tunnel, Error> {
        let headers = request.headers_mut();
        headers.insert(
            CONNECTION,
            hyper::header::HeaderValue::from_static("upgrade"),
        );
        headers.insert(UPGRADE, hyper::header::HeaderValue::from_static(protocol));
        let answer = self.send(request).await?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(Error::answer("no change of protocol"));
        }
        Ok(TokioIo::new(
            hyper::upgrade::on(answer).await.map_err(Error::Lost)?,
        ))
    }

    /// Sends one request and turns error answers into errors.
    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Error> {
        let stream = self.connect(task_of(request.uri())).await?;
        tokio::time::timeout(ANSWER_TIMEOUT, exchange(stream, request))
            .await
            .map_err(|_| Error::Timeout)?
    }

    async fn connect(&self, task: Option<&str>) -> Result<Box<dyn Stream>, Error> {
        let (socket, is_default) = match &self.way {
            Way::Socket { path, is_default } => (path.clone(), *is_default),
            Way::Other { connector, .. } => return connector.connect(task).await,
        };
        let stream = match UnixStream::connect(&socket).await {
            Ok(stream) => stream,
            Err(source) => {
                return Err(match source.kind() {
                    io::ErrorKind::NotFound => Error::NotRunning {
                        socket,
                        reason: "no such socket",
                    },
                    io::ErrorKind::ConnectionRefused => Error::NotRunning {
                        socket,
                        reason: "connection refused",
                    },
                    io::ErrorKind::PermissionDenied => Error::Forbidden { socket },
                    _ => Error::Connect { socket, source },
                });
            }
        };
        // Its directory may be in /tmp, where anybody could have made it first.
        if is_default {
            let uid = match stream.peer_cred() {
                Ok(peer) => peer.uid(),
                Err(source) => return Err(Error::Connect { socket, source }),
            };
            if uid != 0 && uid != rustix::process::geteuid().as_raw() {
                return Err(Error::Foreign { socket, uid });
            }
        }
        Ok(Box::new(stream))
    }
}

/// Sends a request over a connection of its own and turns error answers into errors.
async fn exchange<B>(
    stream: Box<dyn Stream>,
    request: Request<B>,
) -> Result<Response<Incoming>, Error>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(Error::Lost)?;
    // Its errors come back through the answer and its body.
    tokio::spawn(connection.with_upgrades());
    let answer = sender.send_request(request).await.map_err(Error::Lost)?;
    let status = answer.status();
    if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
        return Ok(answer);
    }
    let body = collect(answer.into_body()).await?;
    let body = serde_json::from_slice(&body).map_err(answer_error)?;
    Err(Error::Refused {
        status: status.as_u16(),
        body,
    })
}

/// The task or array that a request is about.
fn task_of(uri: &Uri) -> Option<&str> {
    let in_path = uri.path().strip_prefix("/v1/tasks/");
    let in_query = || {
        let mut parts = uri.query()?.split('&');
        parts.find_map(|part| part.strip_prefix("array="))
    };
    let id = match in_path {
        Some(rest) => rest.split('/').next()?,
        None => in_query()?,
    };
    id.split('.').next()
}

/// The body of an answer as it comes.
#[derive(Debug)]
pub struct Bytestream(Incoming);

impl Bytestream {
    /// The next piece; `None` at the end. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        while let Some(frame) = self.0.frame().await {
            if let Ok(data) = frame.map_err(Error::Lost)?.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }
}

/// The events of a task as they come.
#[derive(Debug)]
pub struct Events(Lines);

impl Events {
    /// The next event; `None` at the end. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::Answer`].
    pub async fn next(&mut self) -> Result<Option<TaskEvent>, Error> {
        self.0.next().await
    }
}

/// What is told of a fetch into the cache, as it comes.
#[derive(Debug)]
pub struct CacheFetch(Lines);

impl CacheFetch {
    /// What is told next: progress, or the entry, after which nothing comes. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Refused`] if it could not be fetched, [`Error::Lost`], [`Error::Answer`].
    pub async fn next(&mut self) -> Result<CacheNews, Error> {
        match self.0.next().await? {
            Some(CacheNews::Error(body)) => Err(Error::Refused {
                status: StatusCode::BAD_GATEWAY.as_u16(),
                body,
            }),
            Some(news) => Ok(news),
            None => Err(Error::answer("a fetch without an end")),
        }
    }
}

/// Lines of JSON as they come.
#[derive(Debug)]
struct Lines {
    bytes: Bytestream,
    line: Vec<u8>,
}

impl Lines {
    fn new(answer: Response<Incoming>) -> Self {
        Lines {
            bytes: Bytestream(answer.into_body()),
            line: Vec::new(),
        }
    }

    async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        loop {
            if let Some(end) = self.line.iter().position(|&byte| byte == b'\n') {
                let event = serde_json::from_slice(&self.line[..end]).map_err(answer("event"))?;
                self.line.drain(..=end);
                return Ok(Some(event));
            }
            if self.line.len() > MAX_LINE_BYTES {
                return Err(Error::answer("an endless event"));
            }
            match self.bytes.next().await? {
                Some(data) => self.line.extend_from_slice(&data),
                None if self.line.is_empty() => return Ok(None),
                None => return Err(Error::answer("half an event")),
            }
        }
    }
}

/// The path of a task; the id comes from a command line.
fn task_path(task: &str, rest: &str) -> Result<String, Error> {
    let (id, number) = task.split_once('.').unwrap_or((task, "1"));
    let valid = TASK_ID_CHARS.contains(&id.len())
        && id
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
        && number.parse::<u32>().is_ok_and(|number| number > 0);
    if !valid {
        return Err(Error::InvalidTaskId {
            given: task.to_owned(),
        });
    }
    Ok(format!("/v1/tasks/{}{rest}", task.to_ascii_lowercase()))
}

fn follow(query: FollowQuery) -> String {
    format!("follow={}&from={}", query.follow, query.from)
}

fn request(method: Method, path: &str) -> Result<Request<Full<Bytes>>, Error> {
    Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "xbed")
        .body(Full::default())
        .map_err(|source| Error::Answer {
            what: "request",
            source: Some(source.into()),
        })
}

async fn collect(body: Incoming) -> Result<Bytes, Error> {
    let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
    match body {
        Ok(body) => Ok(body.to_bytes()),
        Err(source) => match source.downcast::<hyper::Error>() {
            Ok(lost) => Err(Error::Lost(*lost)),
            Err(_) => Err(Error::answer("an answer of endless length")),
        },
    }
}

async fn json<T: DeserializeOwned>(answer: Response<Incoming>) -> Result<T, Error> {
    let body = tokio::time::timeout(ANSWER_TIMEOUT, collect(answer.into_body()))
        .await
        .map_err(|_| Error::Timeout)??;
    serde_json::from_slice(&body).map_err(answer_error)
}

fn answer(what: &'static str) -> impl FnOnce(serde_json::Error) -> Error {
    move |source| Error::Answer {
        what,
        source: Some(source.into()),
    }
}

fn answer_error(source: serde_json::Error) -> Error {
    answer("body")(source)
}

/// JSON in ASCII, as header values have to be.
fn ascii_json<T: Serialize>(value: &T) -> Result<String, Error> {
    let text = serde_json::to_string(value).map_err(answer("request"))?;
    let mut ascii = String::with_capacity(text.len());
    for unit in text.encode_utf16() {
        match u8::try_from(unit) {
            Ok(byte @ b' '..=b'~') => ascii.push(byte.into()),
            _ => ascii.push_str(&format!("\\u{unit:04x}")),
        }
    }
    Ok(ascii)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (uri, socket) in [
            ("unix:///run/x.sock", "/run/x.sock"),
            ("/run/x.sock", "/run/x.sock"),
            ("x", "x"),
        ] {
            let server = Client::from_uri(uri).unwrap().server().unwrap();
            assert_eq!(server, std::path::absolute(socket).unwrap());
        }
        for uri in ["", "unix://run/x", "http://host:80", "tcp://host:80"] {
            let error = Client::from_uri(uri).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "`{uri}` is no address of an xbed: expected unix:///PATH, the path of a socket, or stomp+ssl://HOST/QUEUE"
                )
            );
        }
    }

    #[test]
    fn ids_from_the_command_line_cannot_change_the_path() {
        assert_eq!(task_path("AB12-", "/ssh").unwrap(), "/v1/tasks/ab12-/ssh");
        for id in [
            "",
            "abc",
            "../../v1/host",
            "abcd?x",
            "abcd/exec",
            &"a".repeat(37),
        ] {
            assert!(
                matches!(task_path(id, ""), Err(Error::InvalidTaskId { .. })),
                "{id}"
            );
        }
    }

    #[test]
    fn a_request_says_which_task_it_is_about() {
        for (uri, task) in [
            (
                "/v1/tasks/ab12.7/logs/stdout?follow=true&from=0",
                Some("ab12"),
            ),
            ("/v1/tasks/ab12", Some("ab12")),
            ("/v1/tasks?all=true&array=ab12", Some("ab12")),
            ("/v1/tasks?all=true", None),
            ("/v1/reservations/start", None),
        ] {
            assert_eq!(task_of(&uri.parse().unwrap()), task, "{uri}");
        }
    }

    #[test]
    fn exec_requests_fit_a_header() {
        let text = ascii_json(&["ü", "𝄞", "a\n\u{7f}"]).unwrap();
        assert!(text.is_ascii());
        let back: Vec<String> = serde_json::from_str(&text).unwrap();
        assert_eq!(back, ["ü", "𝄞", "a\n\u{7f}"]);
    }
}
