//! The local front door: HTTP with JSON over a unix socket. Peer credentials say who asks.
//!
//! The routes and types are documented in `xbee_api`.

use std::io;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::rejection::JsonRejection;
use axum::extract::{self, DefaultBodyLimit, FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::serve::IncomingStream;
use axum::{Json, Router};
use futures::stream;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::net::{UnixListener, unix::UCred};
use uuid::Uuid;
use xbee_api::{
    CheckReport, ConfirmRequest, DomainExport, EXEC_HEADER, ErrorBody, ExecRequest, ExportForm,
    FollowQuery, HostInfo, PlaceRequest, Places, ReserveRequest, Reserved, ResultFile, SshAccess,
    SubmitRequest, TaskStatus, TicketRequest, UPGRADE_EXEC, UPGRADE_TCP, Upload, chain,
};
use xbee_engine::QueueError;

use crate::anywhere::AnywhereError;
use crate::cache::{self, CacheError};
use crate::command::{Caller, CommandError, Commands};
use crate::exec;
use crate::logs::Stream;
use crate::pool::PoolError;
use crate::store::{Owner, StoreError};
use crate::task::TaskHandle;
use crate::uploads::UploadError;

/// Largest request, bytes: a document of the largest size with every character escaped.
const MAX_BODY: usize = 8 << 20;
/// Piece of a log that is sent at a time, bytes.
const LOG_CHUNK: usize = 64 << 10;
/// How often a console, which is written by the hypervisor, is looked at for more.
const CONSOLE_INTERVAL: Duration = Duration::from_millis(200);

/// All routes.
pub fn router(commands: Commands) -> Router {
    Router::new()
        .route("/v1/host", get(host))
        .route("/v1/check", post(check))
        .route("/v1/export", post(export))
        .route("/v1/tasks", get(list).post(submit))
        .route("/v1/tasks/{id}", get(status).delete(remove))
        .route("/v1/places", post(places))
        .route("/v1/placements", post(place))
        .route("/v1/reservations", post(reserve))
        .route("/v1/reservations/confirm", post(confirm))
        .route("/v1/reservations/start", post(start))
        .route("/v1/reservations/cancel", post(cancel))
        .route("/v1/cache", get(cache::http::list).post(cache::http::add))
        .route("/v1/cache/{id}", delete(cache::http::remove))
        .route("/v1/uploads", post(upload))
        .route("/v1/uploads/{id}", delete(remove_upload))
        .route("/v1/tasks/{id}/results", get(results))
        .route("/v1/tasks/{id}/results/{number}", get(result))
        .route("/v1/tasks/{id}/events", get(events))
        .route("/v1/tasks/{id}/logs/{stream}", get(logs))
        .route("/v1/tasks/{id}/terminate", post(terminate))
        .route("/v1/tasks/{id}/ssh", get(ssh))
        .route("/v1/tasks/{id}/export", get(export_task))
        .route("/v1/tasks/{id}/exec", post(exec_upgrade))
        .route("/v1/tasks/{id}/forward", post(forward_upgrade))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(commands)
}

/// Serves until `stop` resolves; open streams are then cut.
pub async fn serve(
    listener: UnixListener,
    commands: Commands,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let service = router(commands).into_make_service_with_connect_info::<Peer>();
    let server = axum::serve(listener, service);
    tokio::select! {
        served = server => served,
        () = stop => Ok(()),
    }
}

/// Credentials of the process at the other end.
#[derive(Debug, Clone, Copy)]
struct Peer(Option<UCred>);

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Peer(stream.io().peer_cred().ok())
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        // Put there by a front door that knows.
        if let Some(caller) = parts.extensions.get::<Caller>() {
            return Ok(*caller);
        }
        let peer = parts.extensions.get::<ConnectInfo<Peer>>();
        match peer.and_then(|ConnectInfo(Peer(credentials))| *credentials) {
            Some(credentials) if credentials.uid() >= Owner::FIRST_REMOTE => Err(failure(
                StatusCode::FORBIDDEN,
                "foreign-uid",
                format!(
                    "user ids from {} on stand for users of the message queue here",
                    Owner::FIRST_REMOTE
                ),
            )),
            Some(credentials) => Ok(Caller {
                owner: Owner {
                    uid: credentials.uid(),
                    gid: credentials.gid(),
                },
            }),
            None => Err(failure(
                StatusCode::FORBIDDEN,
                "no-credentials",
                "the kernel does not say who is at the other end of this connection",
            )),
        }
    }
}

/// [`extract::Query`], refused as everything else is.
struct Query<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let query = extract::Query::from_request_parts(parts, state).await;
        query
            .map(|extract::Query(value)| Query(value))
            .map_err(|refused| failure(refused.status(), "invalid-request", refused.body_text()))
    }
}

/// [`extract::Path`], refused as everything else is.
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let path = extract::Path::from_request_parts(parts, state).await;
        path.map(|extract::Path(value)| Path(value))
            .map_err(|refused| failure(refused.status(), "invalid-request", refused.body_text()))
    }
}

/// An error answer.
#[derive(Debug)]
pub struct Failure(StatusCode, ErrorBody);

fn failure(status: StatusCode, code: &str, message: impl Into<String>) -> Failure {
    Failure(
        status,
        ErrorBody {
            code: code.into(),
            message: message.into(),
        },
    )
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

impl From<CommandError> for Failure {
    fn from(error: CommandError) -> Self {
        let status = match &error {
            CommandError::NotFound(_) => StatusCode::NOT_FOUND,
            CommandError::IsArray(_) => StatusCode::CONFLICT,
            CommandError::Ambiguous { .. } | CommandError::Plan(_) | CommandError::NotFetched => {
                StatusCode::BAD_REQUEST
            }
            CommandError::NoSpan { .. } | CommandError::SweepReserved => StatusCode::BAD_REQUEST,
            CommandError::RoomLater { .. } | CommandError::Queue(QueueError::NoRoom { .. }) => {
                StatusCode::CONFLICT
            }
            CommandError::Pool(
                PoolError::Sweep
                | PoolError::Reservation
                | PoolError::Files
                | PoolError::Anywhere
                | PoolError::Seal(_),
            )
            | CommandError::PoolAge => StatusCode::BAD_REQUEST,
            CommandError::Queue(_) | CommandError::Pool(_) => StatusCode::SERVICE_UNAVAILABLE,
            CommandError::Anywhere(error) => match error {
                AnywhereError::Off | AnywhereError::Long(_) => StatusCode::BAD_REQUEST,
                AnywhereError::Away(_) | AnywhereError::Busy | AnywhereError::Nobody { .. } => {
                    StatusCode::SERVICE_UNAVAILABLE
                }
                AnywhereError::NotAtOnce | AnywhereError::Placing | AnywhereError::Gone(_) => {
                    StatusCode::CONFLICT
                }
            },
            CommandError::TicketInvalid
            | CommandError::Priority(_)
            | CommandError::LocalFile(_)
            | CommandError::LocalPort => StatusCode::FORBIDDEN,
            CommandError::AlreadyConfirmed(_) | CommandError::NotConfirmed(_) => {
                StatusCode::CONFLICT
            }
            CommandError::NotCovered { .. } | CommandError::Retries { .. } => {
                StatusCode::BAD_REQUEST
            }
            CommandError::NotFinal(_) | CommandError::NoDomain(_) | CommandError::NoSsh(_) => {
                StatusCode::CONFLICT
            }
            CommandError::Upload(error) => match error {
                UploadError::Unknown(_) => StatusCode::NOT_FOUND,
                UploadError::TooLarge | UploadError::UserFull => StatusCode::PAYLOAD_TOO_LARGE,
                UploadError::Stalled => StatusCode::REQUEST_TIMEOUT,
                UploadError::CutOff(_) => StatusCode::BAD_REQUEST,
                UploadError::DiskFull(_) => StatusCode::INSUFFICIENT_STORAGE,
                UploadError::Io { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            },
            CommandError::NoResult { .. } => StatusCode::NOT_FOUND,
            CommandError::Agent(_) => StatusCode::BAD_GATEWAY,
            CommandError::Export(_) => StatusCode::CONFLICT,
            CommandError::Cache(error) => match error {
                CacheError::NotFound(_) => StatusCode::NOT_FOUND,
                CacheError::InUse { .. } => StatusCode::CONFLICT,
                CacheError::Busy(_) => StatusCode::SERVICE_UNAVAILABLE,
                CacheError::Store(_) | CacheError::File { .. } => StatusCode::INTERNAL_SERVER_ERROR,
                CacheError::Fetch(_) | CacheError::Cancelled(_) => StatusCode::BAD_GATEWAY,
                CacheError::Off
                | CacheError::Ambiguous { .. }
                | CacheError::Digest { .. }
                | CacheError::TooLarge { .. } => StatusCode::BAD_REQUEST,
            },
            CommandError::Store(StoreError::Full { .. }) => StatusCode::INSUFFICIENT_STORAGE,
            CommandError::Store(_) | CommandError::NotWritten(_) => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        failure(status, error.code(), chain(&error))
    }
}

/// What a handler answers.
pub type Answer<T> = Result<T, Failure>;

async fn no_route(request: Request) -> Failure {
    unknown(StatusCode::NOT_FOUND, &request)
}

async fn no_method(request: Request) -> Failure {
    unknown(StatusCode::METHOD_NOT_ALLOWED, &request)
}

fn unknown(status: StatusCode, request: &Request) -> Failure {
    let (method, path) = (request.method(), request.uri().path());
    let message = format!("{method} {path} is not part of the API");
    failure(status, "no-such-route", message)
}

async fn host(State(commands): State<Commands>) -> Json<HostInfo> {
    Json(commands.host())
}

/// The body of a request, or why it is none.
pub fn body<T>(body: Result<Json<T>, JsonRejection>) -> Answer<T> {
    match body {
        Ok(Json(value)) => Ok(value),
        Err(rejection) => Err(failure(
            rejection.status(),
            "invalid-request",
            rejection.body_text(),
        )),
    }
}

async fn check(
    State(commands): State<Commands>,
    caller: Caller,
    request: Result<Json<SubmitRequest>, JsonRejection>,
) -> Answer<Json<CheckReport>> {
    Ok(Json(commands.check(caller, body(request)?).await))
}

async fn export(
    State(commands): State<Commands>,
    caller: Caller,
    Query(form): Query<ExportForm>,
    request: Result<Json<SubmitRequest>, JsonRejection>,
) -> Answer<Json<DomainExport>> {
    Ok(Json(commands.export(caller, body(request)?, form)?))
}

async fn export_task(
    State(commands): State<Commands>,
    caller: Caller,
    Path(id): Path<String>,
    Query(form): Query<ExportForm>,
) -> Answer<Json<DomainExport>> {
    let task = commands.task(caller, &id)?;
    Ok(Json(commands.export_task(&task, form).await?))
}

async fn submit(
    State(commands): State<Commands>,
    caller: Caller,
    request: Result<Json<SubmitRequest>, JsonRejection>,
) -> Answer<(StatusCode, Json<TaskStatus>)> {
    let status = commands.submit(caller, body(request)?).await?;
    Ok((StatusCode::CREATED, Json(status)))
}

async fn places(
    State(commands): State<Commands>,
    caller: Caller,
    request: Result<Json<SubmitRequest>, JsonRejection>,
) -> Answer<Json<Places>> {
    Ok(Json(commands.places(caller, body(request)?).await?))
}

async fn place(
    State(commands): State<Commands>,
    caller: Caller,
    request: Result<Json<PlaceRequest>, JsonRejection>,
) -> Answer<(StatusCode, Json<TaskStatus>)> {
    let status = commands.place(caller, body(request)?).await?;
    Ok((StatusCode::CREATED, Json(status)))
}

/// The body is not bounded as others are: it is written down as it comes.
async fn upload(
    State(commands): State<Commands>,
    caller: Caller,
    request: Request,
) -> Answer<(StatusCode, Json<Upload>)> {
    let body = request.into_body();
    let bytes = body.size_hint().exact();
    let upload = commands.upload(caller, bytes, body.into_data_stream());
    Ok((StatusCode::CREATED, Json(upload.await?)))
}

async fn remove_upload(
    State(commands): State<Commands>,
    caller: Caller,
    Path(id): Path<Uuid>,
) -> Answer<StatusCode> {
    commands.remove_upload(caller, id).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn results(
    State(commands): State<Commands>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<Json<Vec<ResultFile>>> {
    let task = commands.task(caller, &id)?;
    Ok(Json(commands.results(&task).await))
}

async fn result(
    State(commands): State<Commands>,
    caller: Caller,
    Path((id, number)): Path<(String, u32)>,
    Query(query): Query<FollowQuery>,
) -> Answer<Response> {
    let task = commands.task(caller, &id)?;
    let path = commands.result(&task, number).await?;
    let pieces = stream::unfold((path, query.from), |(path, offset)| async move {
        match read_piece(&path, offset).await {
            Ok(piece) if piece.is_empty() => None,
            Ok(piece) => {
                let next = offset + piece.len() as u64;
                Some((Ok(piece), (path, next)))
            }
            Err(error) => Some((Err(error), (path, offset))),
        }
    });
    Ok(streaming(
        "application/octet-stream",
        Body::from_stream(pieces),
    ))
}

async fn reserve(
    State(commands): State<Commands>,
    caller: Caller,
    request: Result<Json<ReserveRequest>, JsonRejection>,
) -> Answer<(StatusCode, Json<Reserved>)> {
    let reserved = commands.reserve(caller, body(request)?).await?;
    Ok((StatusCode::CREATED, Json(reserved)))
}

async fn confirm(
    State(commands): State<Commands>,
    caller: Caller,
    request: Result<Json<ConfirmRequest>, JsonRejection>,
) -> Answer<Json<TaskStatus>> {
    Ok(Json(commands.confirm(caller, body(request)?).await?))
}

async fn start(
    State(commands): State<Commands>,
    caller: Caller,
    request: Result<Json<TicketRequest>, JsonRejection>,
) -> Answer<Json<TaskStatus>> {
    Ok(Json(commands.start(caller, &body(request)?.ticket).await?))
}

async fn cancel(
    State(commands): State<Commands>,
    caller: Caller,
    request: Result<Json<TicketRequest>, JsonRejection>,
) -> Answer<(StatusCode, Json<TaskStatus>)> {
    let status = commands.cancel(caller, &body(request)?.ticket).await?;
    Ok((StatusCode::ACCEPTED, Json(status)))
}

#[derive(Deserialize)]
struct ListQuery {
    #[serde(default)]
    all: bool,
    array: Option<String>,
}

async fn list(
    State(commands): State<Commands>,
    caller: Caller,
    Query(query): Query<ListQuery>,
) -> Answer<Json<Vec<TaskStatus>>> {
    Ok(Json(match query.array {
        Some(id) => commands.list_array(caller, &id, query.all)?,
        None => commands.list(caller, query.all),
    }))
}

async fn status(
    State(commands): State<Commands>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<Json<TaskStatus>> {
    Ok(Json(commands.find(caller, &id)?.status()))
}

async fn terminate(
    State(commands): State<Commands>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<(StatusCode, Json<TaskStatus>)> {
    let found = commands.find(caller, &id)?;
    let status = commands.terminate(&found).await?;
    Ok((StatusCode::ACCEPTED, Json(status)))
}

async fn remove(
    State(commands): State<Commands>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    let found = commands.find(caller, &id)?;
    commands.remove(&found).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn ssh(
    State(commands): State<Commands>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<Json<SshAccess>> {
    let task = commands.task(caller, &id)?;
    Ok(Json(commands.ssh(&task)?))
}

async fn events(
    State(commands): State<Commands>,
    caller: Caller,
    Path(id): Path<String>,
    Query(query): Query<FollowQuery>,
) -> Answer<Response> {
    let found = commands.find(caller, &id)?;
    let changes = found.watch();
    let start = (found, changes, query.from.max(1), false);
    let lines = stream::unfold(start, move |(found, mut changes, from, over)| async move {
        if over {
            return None;
        }
        loop {
            // Final is looked at before the events are read: the last event is never missed.
            let last = !query.follow || found.is_final();
            changes.seen();
            let news = found.events(from);
            if news.is_empty() && !last {
                changes.next().await.ok()?;
                continue;
            }
            let next = news.last().map_or(from, |event| event.seq + 1);
            let mut text = vec![];
            for event in news {
                if serde_json::to_writer(&mut text, &event).is_ok() {
                    text.push(b'\n');
                }
            }
            let piece: io::Result<Bytes> = Ok(text.into());
            return Some((piece, (found, changes, next, last)));
        }
    });
    Ok(streaming("application/x-ndjson", Body::from_stream(lines)))
}

/// An answer that comes in pieces.
pub fn streaming(content_type: &'static str, body: Body) -> Response {
    (
        [(header::CONTENT_TYPE, HeaderValue::from_static(content_type))],
        body,
    )
        .into_response()
}

async fn logs(
    State(commands): State<Commands>,
    caller: Caller,
    Path((id, stream)): Path<(String, String)>,
    Query(query): Query<FollowQuery>,
) -> Answer<Response> {
    let task = commands.task(caller, &id)?;
    let source = match stream.as_str() {
        "stdout" => LogSource::Stream(Stream::Stdout),
        "stderr" => LogSource::Stream(Stream::Stderr),
        "console" => LogSource::Console,
        other => {
            return Err(failure(
                StatusCode::NOT_FOUND,
                "no-such-stream",
                format!("no stream {other:?}: expected stdout, stderr or console"),
            ));
        }
    };
    let reader = LogReader {
        task,
        source,
        offset: query.from,
        follow: query.follow,
    };
    let pieces = stream::unfold(reader, |mut reader| async move {
        match reader.next().await {
            Ok(None) => None,
            Ok(Some(piece)) => Some((Ok(piece), reader)),
            Err(error) => Some((Err(error), reader)),
        }
    });
    Ok(streaming(
        "application/octet-stream",
        Body::from_stream(pieces),
    ))
}

#[derive(Clone, Copy)]
enum LogSource {
    Stream(Stream),
    Console,
}

/// Reads a log piece by piece, waiting for more where it is followed.
struct LogReader {
    task: Arc<TaskHandle>,
    source: LogSource,
    offset: u64,
    follow: bool,
}

impl LogReader {
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        let mut changed = self.task.watch();
        let mut grown = self.task.log_lengths();
        loop {
            let last = !self.follow || self.task.is_final();
            changed.borrow_and_update();
            grown.borrow_and_update();
            let path = match self.source {
                LogSource::Stream(stream) => stream.path(&self.task.spool),
                LogSource::Console => self.task.console_path(),
            };
            let piece = read_piece(&path, self.offset).await?;
            if !piece.is_empty() {
                self.offset += piece.len() as u64;
                return Ok(Some(piece));
            }
            if last {
                return Ok(None);
            }
            let is_console = matches!(self.source, LogSource::Console);
            tokio::select! {
                _ = changed.changed() => {}
                _ = grown.changed() => {}
                () = tokio::time::sleep(CONSOLE_INTERVAL), if is_console => {}
            }
        }
    }
}

/// Up to [`LOG_CHUNK`] bytes of a file; none where there is no such file.
async fn read_piece(path: &FilePath, offset: u64) -> io::Result<Bytes> {
    let mut file = match File::open(path).await {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Bytes::new()),
        Err(error) => return Err(error),
    };
    file.seek(io::SeekFrom::Start(offset)).await?;
    let mut piece = Vec::with_capacity(LOG_CHUNK);
    file.take(LOG_CHUNK as u64).read_to_end(&mut piece).await?;
    Ok(piece.into())
}

/// The upgrade that a request asks for, if it is the expected one.
fn upgrade(request: &mut Request, token: &'static str) -> Answer<OnUpgrade> {
    let asked = request.headers().get(header::UPGRADE);
    if asked.is_none_or(|asked| asked.as_bytes() != token.as_bytes()) {
        return Err(failure(
            StatusCode::UPGRADE_REQUIRED,
            "upgrade-required",
            format!("this route needs `Upgrade: {token}`"),
        ));
    }
    request
        .extensions_mut()
        .remove::<OnUpgrade>()
        .ok_or_else(|| {
            failure(
                StatusCode::UPGRADE_REQUIRED,
                "upgrade-required",
                "this connection cannot be upgraded",
            )
        })
}

fn switching(token: &'static str) -> Response {
    (
        StatusCode::SWITCHING_PROTOCOLS,
        [(header::CONNECTION, "upgrade"), (header::UPGRADE, token)],
    )
        .into_response()
}

async fn exec_upgrade(
    State(commands): State<Commands>,
    caller: Caller,
    Path(id): Path<String>,
    mut request: Request,
) -> Answer<Response> {
    let task = commands.task(caller, &id)?;
    let invalid = |what: String| failure(StatusCode::BAD_REQUEST, "invalid-request", what);
    let header = request
        .headers()
        .get(EXEC_HEADER)
        .map(HeaderValue::as_bytes);
    let Some(header) = header else {
        return Err(invalid(format!("the header {EXEC_HEADER} is missing")));
    };
    let command: ExecRequest = serde_json::from_slice(header).map_err(|error| {
        invalid(format!(
            "the header {EXEC_HEADER} is not as expected: {error}"
        ))
    })?;
    let upgrade = upgrade(&mut request, UPGRADE_EXEC)?;
    let agent = commands.agent(&task)?;
    let process = exec::begin(&agent, command)
        .await
        .map_err(CommandError::from)?;
    tokio::spawn(async move {
        match upgrade.await {
            Ok(connection) => exec::relay(process, TokioIo::new(connection)).await,
            Err(error) => tracing::debug!(%error, "exec connection was not upgraded"),
        }
    });
    Ok(switching(UPGRADE_EXEC))
}

#[derive(Deserialize)]
struct ForwardQuery {
    port: u16,
}

async fn forward_upgrade(
    State(commands): State<Commands>,
    caller: Caller,
    Path(id): Path<String>,
    Query(query): Query<ForwardQuery>,
    mut request: Request,
) -> Answer<Response> {
    let task = commands.task(caller, &id)?;
    let upgrade = upgrade(&mut request, UPGRADE_TCP)?;
    let agent = commands.agent(&task)?;
    let mut guest = agent
        .forward(query.port)
        .await
        .map_err(CommandError::from)?;
    tokio::spawn(async move {
        match upgrade.await {
            Ok(connection) => {
                let mut client = TokioIo::new(connection);
                // Either side may vanish at any time: the end of a copy is not an error.
                let _ = tokio::io::copy_bidirectional(&mut client, &mut guest).await;
            }
            Err(error) => tracing::debug!(%error, "forward connection was not upgraded"),
        }
    });
    Ok(switching(UPGRADE_TCP))
}

/// Why `xbed` cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another one is there.
    #[error("another xbed listens on {0}: stop it, or use another --socket")]
    InUse(PathBuf),
    /// The file system's word.
    #[error("cannot listen on {path}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Binds the socket; one left behind by a killed `xbed` is taken over. Root's socket is for every
/// user of the host (each sees their own tasks), another user's is for that user alone.
pub fn listen(path: &FilePath) -> Result<UnixListener, ListenError> {
    use std::os::unix::fs::PermissionsExt;
    let failed = |source| ListenError::Io {
        path: path.into(),
        source,
    };
    if let Some(parent) = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
    {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    if path.exists() {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(ListenError::InUse(path.into()));
        }
        std::fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let mode = if rustix::process::geteuid().is_root() {
        0o666
    } else {
        0o600
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    Ok(listener)
}
