//! A server that speaks the API, with tasks that the tests know.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path as UrlPath, Query, Request, State as AxumState};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::net::UnixListener;
use uuid::Uuid;
use xbee_api::exec::{self, read_frame, write_frame};
use xbee_api::*;

/// Ended with exit code 0, in known times.
pub const FINISHED: Uuid = Uuid::from_u128(0x1111_1111_0000_4000_8000_0000_0000_0001);
/// Failed; its reason tries to steer the terminal.
pub const FAILED: Uuid = Uuid::from_u128(0x2222_2222_0000_4000_8000_0000_0000_0002);
/// Runs until it is terminated.
pub const RUNNING: Uuid = Uuid::from_u128(0x3333_3333_0000_4000_8000_0000_0000_0003);
/// What submissions become, if they ask for nothing else: ended with exit code 3.
pub const SUBMITTED: Uuid = Uuid::from_u128(0x4444_4444_0000_4000_8000_0000_0000_0004);

/// Moves files until its status was asked for a few times.
pub const STAGING: Uuid = Uuid::from_u128(0x5555_5555_0000_4000_8000_0000_0000_0005);

/// 2026-01-02T03:04:05Z.
const BEGAN_MS: u64 = 1_767_323_045_000;

/// What the server has been asked.
#[derive(Default)]
pub struct Seen {
    pub submitted: Vec<SubmitRequest>,
    pub removed: Vec<String>,
    pub terminated: Vec<String>,
    /// `from` of each request for events.
    pub events_from: Vec<u64>,
    pub forwarded: Vec<u16>,
    /// How often a status was asked for.
    pub asked: u64,
    /// Tasks do not end when they are terminated.
    pub stubborn: bool,
    /// What is answered to who asks where a job could go.
    pub places: Places,
    /// What is answered to jobs that are placed, one after the other; the last goes on.
    pub reactions: VecDeque<Reaction>,
    pub placements: Vec<PlaceRequest>,
}

/// What becomes of a job that is placed.
#[derive(Clone, Copy)]
pub enum Reaction {
    Take,
    Refuse(u16, &'static str),
    /// Nobody knows.
    HangUp,
}

#[derive(Clone)]
struct Fake {
    seen: Arc<Mutex<Seen>>,
}

/// A running server; ends with the test's process.
pub struct Server {
    seen: Arc<Mutex<Seen>>,
}

impl Server {
    pub fn start(socket: &Path) -> Self {
        let seen = Arc::<Mutex<Seen>>::default();
        let fake = Fake { seen: seen.clone() };
        let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let listener = UnixListener::from_std(listener).unwrap();
                axum::serve(listener, router(fake)).await.unwrap();
            });
        });
        Server { seen }
    }

    pub fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }
}

fn router(fake: Fake) -> Router {
    Router::new()
        .route("/v1/host", get(host))
        .route("/v1/check", post(check))
        .route("/v1/export", post(export))
        .route("/v1/places", post(places))
        .route("/v1/placements", post(place))
        .route("/v1/tasks", get(list).post(submit))
        .route("/v1/tasks/{id}", get(status).delete(remove))
        .route("/v1/tasks/{id}/events", get(events))
        .route("/v1/tasks/{id}/logs/{stream}", get(logs))
        .route("/v1/tasks/{id}/terminate", post(terminate))
        .route("/v1/tasks/{id}/ssh", get(ssh))
        .route("/v1/tasks/{id}/export", get(export_task))
        .route("/v1/tasks/{id}/exec", post(exec_upgrade))
        .route("/v1/tasks/{id}/forward", post(forward))
        .with_state(fake)
}

fn failure(status: StatusCode, code: &str, message: &str) -> Response {
    (
        status,
        Json(ErrorBody {
            code: code.into(),
            message: message.into(),
        }),
    )
        .into_response()
}

fn not_found(id: &str) -> Response {
    let message = format!("no task {id}: see `xbe ps -a`");
    failure(StatusCode::NOT_FOUND, "task-not-found", &message)
}

fn transition(state: State, substate: Option<SubState>, after_ms: u64) -> Transition {
    let at = format!(
        "2026-01-02T03:04:{:02}.{:03}Z",
        5 + after_ms / 1000,
        after_ms % 1000
    );
    Transition {
        state,
        substate,
        at,
        at_ms: BEGAN_MS + after_ms,
    }
}

fn task(id: Uuid, name: Option<&str>, times: Vec<Transition>) -> TaskStatus {
    let last = times.last().unwrap();
    TaskStatus {
        id,
        name: name.map(str::to_owned),
        owner: 0,
        state: last.state,
        substate: last.substate,
        exit_code: None,
        reason: None,
        reason_code: None,
        progress: None,
        image: "image:base".to_owned(),
        address: None,
        reservation: None,
        array: None,
        member: None,
        ports: Vec::new(),
        times,
    }
}

fn life(last: State) -> Vec<Transition> {
    use SubState::*;
    vec![
        transition(State::Pending, Some(Reserved), 0),
        transition(State::Pending, Some(Confirmed), 2),
        transition(State::Running, Some(StageIn), 3),
        transition(State::Running, Some(InstanceStarting), 1203),
        transition(State::Running, Some(Executing), 2600),
        transition(State::Running, Some(InstanceStopping), 12_600),
        transition(State::Running, Some(StageOut), 12_700),
        transition(last, None, 13_000),
    ]
}

impl Fake {
    /// A task by its id or the beginning of it.
    fn find(&self, id: &str) -> Option<TaskStatus> {
        let finished = TaskStatus {
            exit_code: Some(0),
            ports: vec![PublishedPort {
                host: 8080,
                guest: 80,
            }],
            ..task(FINISHED, Some("hello"), life(State::Finished))
        };
        let mut times = life(State::Failed);
        times.drain(4..7);
        let failed = TaskStatus {
            reason: Some("the agent did not come within 60 s\nconsole: \x1b[2Jpanic".to_owned()),
            reason_code: Some("agent-silent".to_owned()),
            ..task(FAILED, None, times)
        };
        let mut times = life(State::Terminated);
        times.drain(5..7);
        let terminated = {
            let seen = self.seen.lock().unwrap();
            !seen.terminated.is_empty() && !seen.stubborn
        };
        if !terminated {
            times.pop();
        }
        let running = TaskStatus {
            reason: terminated.then(|| "asked by its owner".to_owned()),
            ..task(RUNNING, Some("server"), times)
        };
        let submitted = TaskStatus {
            exit_code: Some(3),
            ports: self
                .seen
                .lock()
                .unwrap()
                .submitted
                .last()
                .map_or(vec![], |request| {
                    let taken = |port: &PublishedPort| PublishedPort {
                        host: port.host.max(40000),
                        ..*port
                    };
                    request.publish.iter().map(taken).collect()
                }),
            ..task(SUBMITTED, None, life(State::Finished))
        };
        let asked = self.seen.lock().unwrap().asked;
        let mut times = life(State::Finished);
        if asked < 4 {
            times.truncate(3);
        }
        let staging = TaskStatus {
            progress: (asked < 4).then(|| Progress {
                what: "ftp://host/\x1b[2Jdata".to_owned(),
                done_bytes: asked << 20,
                total_bytes: Some(4 << 20),
            }),
            exit_code: (asked >= 4).then_some(0),
            ..task(STAGING, None, times)
        };
        [finished, failed, running, submitted, staging]
            .into_iter()
            .find(|task| task.id.to_string().starts_with(id))
    }
}

async fn host() -> Json<HostInfo> {
    Json(HostInfo {
        version: "0.1.0".to_owned(),
        backend: "sim".to_owned(),
        hypervisor: "sim 1".to_owned(),
        accelerator: "none".to_owned(),
        cpus: 2,
        memory_bytes: 4 << 30,
        images: vec!["base".to_owned(), "povray".to_owned()],
        channel: None,
    })
}

async fn check(Json(request): Json<SubmitRequest>) -> Json<CheckReport> {
    let accepted = !request.jsdl.contains("/bin/huge");
    let reasons = vec!["the job needs 99 CPUs, the host has 2".to_owned()];
    Json(CheckReport {
        accepted,
        reasons: if accepted { Vec::new() } else { reasons },
        warnings: Vec::new(),
    })
}

async fn export(
    Query(form): Query<ExportForm>,
    Json(request): Json<SubmitRequest>,
) -> Json<DomainExport> {
    let lines = request.jsdl.lines().count();
    Json(DomainExport {
        text: format!(
            "{} of {lines} lines, lenient {}\n",
            form.name(),
            request.lenient
        ),
        prepare: vec!["qemu-img create 'a\u{1b}[2J'".to_owned()],
    })
}

async fn export_task(UrlPath(id): UrlPath<String>, Query(form): Query<ExportForm>) -> Response {
    if id != "1111" {
        return not_found(&id);
    }
    let text = format!("{} of {id}\n", form.name());
    let prepare = vec![];
    Json(DomainExport { text, prepare }).into_response()
}

async fn list(
    AxumState(fake): AxumState<Fake>,
    Query(query): Query<HashMap<String, String>>,
) -> Json<Vec<TaskStatus>> {
    let tasks = [FINISHED, FAILED, RUNNING].map(|id| fake.find(&id.to_string()).unwrap());
    let all = query.get("all").is_some_and(|all| all == "true");
    Json(
        tasks
            .into_iter()
            .filter(|task| all || !task.state.is_final())
            .collect(),
    )
}

async fn submit(AxumState(fake): AxumState<Fake>, Json(request): Json<SubmitRequest>) -> Response {
    if !request.jsdl.contains("JobDefinition") {
        return failure(
            StatusCode::BAD_REQUEST,
            "invalid-document",
            "line 1: the document is empty, expected jsdl:JobDefinition",
        );
    }
    let becomes = match &request.jsdl {
        jsdl if jsdl.contains("become-failed") => FAILED,
        jsdl if jsdl.contains("become-running") => RUNNING,
        _ => SUBMITTED,
    };
    fake.seen.lock().unwrap().submitted.push(request);
    let status = fake.find(&becomes.to_string()).unwrap();
    (StatusCode::CREATED, Json(status)).into_response()
}

async fn places(AxumState(fake): AxumState<Fake>, Json(_): Json<SubmitRequest>) -> Json<Places> {
    Json(fake.seen.lock().unwrap().places.clone())
}

async fn place(AxumState(fake): AxumState<Fake>, Json(request): Json<PlaceRequest>) -> Response {
    let reaction = {
        let mut seen = fake.seen.lock().unwrap();
        seen.placements.push(request);
        match seen.reactions.len() {
            0 => Reaction::Take,
            1 => seen.reactions[0],
            _ => seen.reactions.pop_front().unwrap(),
        }
    };
    match reaction {
        Reaction::Take => {
            let status = fake.find(&SUBMITTED.to_string()).unwrap();
            (StatusCode::CREATED, Json(status)).into_response()
        }
        Reaction::Refuse(status, code) => {
            failure(StatusCode::from_u16(status).unwrap(), code, "not this one")
        }
        // The connection ends with its task.
        Reaction::HangUp => std::panic::resume_unwind(Box::new(())),
    }
}

async fn status(AxumState(fake): AxumState<Fake>, UrlPath(id): UrlPath<String>) -> Response {
    fake.seen.lock().unwrap().asked += 1;
    fake.find(&id)
        .map_or_else(|| not_found(&id), |task| Json(task).into_response())
}

async fn remove(AxumState(fake): AxumState<Fake>, UrlPath(id): UrlPath<String>) -> Response {
    match fake.find(&id) {
        None => not_found(&id),
        Some(task) if !task.state.is_final() => failure(
            StatusCode::CONFLICT,
            "task-not-final",
            "the task has not ended: terminate it first",
        ),
        Some(task) => {
            fake.seen.lock().unwrap().removed.push(task.id.to_string());
            StatusCode::NO_CONTENT.into_response()
        }
    }
}

async fn terminate(AxumState(fake): AxumState<Fake>, UrlPath(id): UrlPath<String>) -> Response {
    match fake.find(&id) {
        None => not_found(&id),
        Some(task) => {
            fake.seen
                .lock()
                .unwrap()
                .terminated
                .push(task.id.to_string());
            (StatusCode::ACCEPTED, Json(fake.find(&id))).into_response()
        }
    }
}

/// A body that is written by `write` as the client reads it.
fn stream<F: Future<Output = ()> + Send + 'static>(
    write: impl FnOnce(tokio::io::DuplexStream) -> F,
) -> Response {
    let (near, mut far) = duplex(4096);
    tokio::spawn(write(near));
    let (sender, body) = axum_body();
    tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        while let Ok(read @ 1..) = far.read(&mut buffer).await {
            if sender.send(buffer[..read].to_vec()).await.is_err() {
                return;
            }
        }
    });
    body.into_response()
}

fn axum_body() -> (tokio::sync::mpsc::Sender<Vec<u8>>, Body) {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    (sender, Body::new(Pieces(receiver)))
}

/// Pieces of a body; the empty one breaks the connection.
struct Pieces(tokio::sync::mpsc::Receiver<Vec<u8>>);

impl hyper::body::Body for Pieces {
    type Data = hyper::body::Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
        self.0.poll_recv(context).map(|piece| {
            piece.map(|piece| match piece.is_empty() {
                true => Err(std::io::ErrorKind::BrokenPipe.into()),
                false => Ok(hyper::body::Frame::data(piece.into())),
            })
        })
    }
}

async fn events(
    AxumState(fake): AxumState<Fake>,
    UrlPath(id): UrlPath<String>,
    Query(query): Query<FollowQuery>,
) -> Response {
    if fake.find(&id).is_none() {
        return not_found(&id);
    }
    fake.seen.lock().unwrap().events_from.push(query.from);
    let (sender, body) = axum_body();
    tokio::spawn(async move {
        let mut seq = 0;
        loop {
            let Some(task) = fake.find(&id) else { return };
            for transition in task.times.iter().skip(seq) {
                seq += 1;
                let last = transition.state.is_final();
                let event = TaskEvent {
                    seq: seq as u64,
                    transition: transition.clone(),
                    exit_code: task.exit_code.filter(|_| last),
                    reason: task.reason.clone().filter(|_| last),
                };
                if event.seq < query.from {
                    continue;
                }
                // The submitted task's stream breaks once in the middle.
                if task.id == SUBMITTED && query.from == 1 && seq == 4 {
                    let _ = sender.send(Vec::new()).await;
                    return;
                }
                let mut line = serde_json::to_vec(&event).unwrap();
                line.push(b'\n');
                // In two pieces: lines are not packets.
                let rest = line.split_off(line.len() / 2);
                if sender.send(line).await.is_err() || sender.send(rest).await.is_err() {
                    return;
                }
            }
            if task.state.is_final() || !query.follow {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    body.into_response()
}

async fn logs(
    AxumState(fake): AxumState<Fake>,
    UrlPath((id, log)): UrlPath<(String, String)>,
    Query(query): Query<FollowQuery>,
) -> Response {
    let Some(task) = fake.find(&id) else {
        return not_found(&id);
    };
    let endless = task.id == RUNNING && query.follow && log == "stdout";
    let text = format!(
        "{log} of {}\nline without end",
        task.name.as_deref().unwrap_or("it")
    );
    stream(async move |mut writer| {
        let mut rest = text
            .as_bytes()
            .get(query.from as usize..)
            .unwrap_or_default();
        if endless {
            while fake.find(&id).is_some_and(|task| !task.state.is_final()) {
                if writer.write_all(b"more and more and more\n").await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            rest = b"";
        }
        let _ = writer.write_all(rest).await;
    })
}

async fn ssh(AxumState(fake): AxumState<Fake>, UrlPath(id): UrlPath<String>) -> Response {
    match fake.find(&id) {
        None => not_found(&id),
        Some(task) if task.state.is_final() => failure(
            StatusCode::CONFLICT,
            "no-domain",
            "the task has ended: it has no domain",
        ),
        Some(_) => Json(SshAccess {
            user: "root".to_owned(),
            port: 22,
            private_key: "THE PRIVATE KEY".to_owned(),
            host_key: "ssh-ed25519 AAAATHEHOSTKEY".to_owned(),
        })
        .into_response(),
    }
}

/// The answer to a request for an upgrade; `then` gets the connection.
fn upgrade<F: Future<Output = ()> + Send>(
    mut request: Request,
    protocol: &'static str,
    then: impl FnOnce(TokioIo<Upgraded>) -> F + Send + 'static,
) -> Response {
    let asked = request.headers().get(header::UPGRADE);
    if asked.is_none_or(|asked| asked != protocol) {
        return failure(StatusCode::UPGRADE_REQUIRED, "upgrade-required", protocol);
    }
    let upgrade = request.extensions_mut().remove::<OnUpgrade>().unwrap();
    tokio::spawn(async move { then(TokioIo::new(upgrade.await.unwrap())).await });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, protocol)];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

/// Says what it was asked on standard error, echoes input, ends with 7; or waits for a signal.
async fn exec_upgrade(headers: HeaderMap, request: Request) -> Response {
    let asked: ExecRequest =
        serde_json::from_slice(headers.get(EXEC_HEADER).unwrap().as_bytes()).unwrap();
    upgrade(request, UPGRADE_EXEC, async move |mut stream| {
        if asked.argv[0] == "missing" {
            let text = b"missing: no such file in the guest";
            return write_frame(&mut stream, exec::ERROR, text).await.unwrap();
        }
        if asked.argv[0] == "vanish" {
            return;
        }
        let said = format!(
            "argv {:?} env {:?} tty {:?}\n",
            asked.argv, asked.env, asked.tty
        );
        write_frame(&mut stream, exec::STDERR, said.as_bytes())
            .await
            .unwrap();
        let mut code = 7;
        while let Some(frame) = read_frame(&mut stream).await.unwrap() {
            match frame.kind {
                exec::STDIN if frame.data.is_empty() && asked.argv[0] != "sleep" => break,
                exec::STDIN if frame.data.is_empty() => {}
                exec::STDIN => write_frame(&mut stream, exec::STDOUT, &frame.data)
                    .await
                    .unwrap(),
                exec::SIGNAL => {
                    code = 128 + i32::from_be_bytes(frame.data.try_into().unwrap());
                    break;
                }
                _ => {}
            }
        }
        write_frame(&mut stream, 99, b"a kind of a later version")
            .await
            .unwrap();
        write_frame(&mut stream, exec::EXIT, &i32::to_be_bytes(code))
            .await
            .unwrap();
    })
}

/// Answers in capitals.
async fn forward(
    AxumState(fake): AxumState<Fake>,
    Query(query): Query<HashMap<String, u16>>,
    request: Request,
) -> Response {
    fake.seen.lock().unwrap().forwarded.push(query["port"]);
    upgrade(request, UPGRADE_TCP, async move |mut stream| {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            buffer[..read].make_ascii_uppercase();
            stream.write_all(&buffer[..read]).await.unwrap();
        }
    })
}
