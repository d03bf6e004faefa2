//! Client of the QEMU Machine Protocol (QEMU, docs/interop/qmp-spec.txt).
//!
//! One task owns the connection. It answers commands in the order they were given and folds the
//! events that matter into one [`GuestStatus`]. A QEMU process that its guest has taken over is
//! hostile: lines are bounded, and every wait has a limit.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::domain::StopReason;

/// Longest line taken from QEMU, in bytes. The longest answer to a command used here has 2 KiB.
const LINE_MAX_BYTES: usize = 256 << 10;

/// Commands under way at a time.
const PENDING_MAX: usize = 16;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    #[error("cannot connect to QEMU's control socket")]
    Connect(#[source] io::Error),
    #[error("QEMU's control connection is closed")]
    Closed,
    #[error("QEMU did not answer within {limit_ms} ms")]
    Timeout { limit_ms: u128 },
    #[error("QEMU refused: {0}")]
    Refused(String),
    #[error("QEMU refused: {0}")]
    NoDevice(String),
    #[error("QEMU sent what is no QMP: {0}")]
    Protocol(&'static str),
}

/// What QEMU says about the guest. `Off` and `Ended` are final.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum GuestStatus {
    Running,
    Paused,
    /// It switched itself off or was reset, before this connection.
    Off,
    Ended(StopReason),
}

struct Request {
    execute: &'static str,
    arguments: Value,
    /// Goes along with the command.
    fd: Option<OwnedFd>,
    reply: oneshot::Sender<Result<Value, QmpError>>,
}

/// A connection in command mode. Closed when dropped.
#[derive(Debug, Clone)]
pub(crate) struct Qmp {
    requests: mpsc::Sender<Request>,
    /// Names of devices that have been removed; paths of those that have no name.
    removed: broadcast::Sender<String>,
    limit: Duration,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.execute)
    }
}

impl Qmp {
    /// Connects, waits for the greeting, leaves negotiation mode, and asks for the guest's status.
    /// `greeting_limit` bounds the whole, `limit` each later command.
    pub(crate) async fn connect(
        socket: &Path,
        greeting_limit: Duration,
        limit: Duration,
    ) -> Result<(Self, watch::Receiver<GuestStatus>), QmpError> {
        let (requests, receiver) = mpsc::channel(PENDING_MAX);
        let (status, events) = watch::channel(GuestStatus::Running);
        let (removed, _) = broadcast::channel(PENDING_MAX);
        let qmp = Self {
            requests,
            removed: removed.clone(),
            limit,
        };
        let negotiate = async {
            let stream = UnixStream::connect(socket)
                .await
                .map_err(QmpError::Connect)?;
            let mut lines = Lines::new(stream);
            let greeting = lines.next().await?;
            if greeting.get("QMP").is_none() {
                return Err(QmpError::Protocol("the greeting is missing"));
            }
            tokio::spawn(serve(lines, receiver, status, removed));
            qmp.execute("qmp_capabilities").await?;
            qmp.execute("query-status").await.map(drop)
        };
        tokio::time::timeout(greeting_limit, negotiate)
            .await
            .map_err(|_| QmpError::Timeout {
                limit_ms: greeting_limit.as_millis(),
            })??;
        Ok((qmp, events))
    }

    /// Gives a command without arguments and waits for its answer.
    pub(crate) async fn execute(&self, command: &'static str) -> Result<Value, QmpError> {
        self.give(command, json!({}), None).await
    }

    /// Gives a command, with a descriptor if it takes one, and waits for its answer.
    pub(crate) async fn give(
        &self,
        command: &'static str,
        arguments: Value,
        fd: Option<OwnedFd>,
    ) -> Result<Value, QmpError> {
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            let request = Request {
                execute: command,
                arguments,
                fd,
                reply,
            };
            self.requests
                .send(request)
                .await
                .map_err(|_| QmpError::Closed)?;
            answer.await.map_err(|_| QmpError::Closed)?
        };
        tokio::time::timeout(self.limit, exchange)
            .await
            .map_err(|_| QmpError::Timeout {
                limit_ms: self.limit.as_millis(),
            })?
    }
}

impl Qmp {
    /// Names of the devices that are removed from now on.
    pub(crate) fn removed(&self) -> broadcast::Receiver<String> {
        self.removed.subscribe()
    }
}

/// Runs until QEMU closes the connection or misbehaves, or the last [`Qmp`] is dropped.
async fn serve(
    mut lines: Lines,
    mut requests: mpsc::Receiver<Request>,
    status: watch::Sender<GuestStatus>,
    removed: broadcast::Sender<String>,
) {
    let mut pending: HashMap<u64, Request> = HashMap::new();
    let mut id = 0;
    loop {
        tokio::select! {
            request = requests.recv() => {
                let Some(mut request) = request else { return };
                pending.retain(|_, request| !request.reply.is_closed());
                if pending.len() >= PENDING_MAX {
                    let _ = request.reply.send(Err(QmpError::Protocol("too many answers are missing")));
                    continue;
                }
                id += 1;
                let arguments = std::mem::take(&mut request.arguments);
                let line = json!({
                    "execute": request.execute, "arguments": arguments, "id": id,
                })
                .to_string()
                    + "\n";
                let fd = request.fd.take();
                pending.insert(id, request);
                // A QEMU that no longer reads would hold this task for ever.
                let write = send(&mut lines.stream, line.as_bytes(), fd);
                if !matches!(tokio::time::timeout(Duration::from_secs(5), write).await, Ok(Ok(()))) {
                    return;
                }
            }
            line = lines.next() => {
                let Ok(line) = line else { return };
                if let Some(event) = line.get("event").and_then(Value::as_str) {
                    let data = line.get("data").unwrap_or(&Value::Null);
                    fold(&status, event_status(event, data));
                    let name = data.get("device").or(data.get("path"));
                    if event == "DEVICE_DELETED" && let Some(Value::String(name)) = name {
                        // Nobody listening is fine.
                        let _ = removed.send(name.clone());
                    }
                } else if let Some(id) = line.get("id").and_then(Value::as_u64)
                    && let Some(request) = pending.remove(&id)
                {
                    if request.execute == "query-status" {
                        let run_state = line.pointer("/return/status").and_then(Value::as_str);
                        fold(&status, run_state.and_then(run_state_status));
                    }
                    // The caller may have stopped waiting.
                    let _ = request.reply.send(answer(&line));
                }
            }
        }
    }
}

/// Sends a line, and with its first byte a descriptor.
async fn send(stream: &mut UnixStream, mut line: &[u8], fd: Option<OwnedFd>) -> io::Result<()> {
    if let Some(fd) = fd {
        let socket = &*stream;
        let with_fd = || {
            let fds = [fd.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let parts = [IoSlice::new(line)];
            Ok(rustix::net::sendmsg(
                socket,
                &parts,
                &mut control,
                SendFlags::NOSIGNAL,
            )?)
        };
        let sent = socket.async_io(Interest::WRITABLE, with_fd).await?;
        line = &line[sent..];
    }
    stream.write_all(line).await
}

fn answer(line: &Value) -> Result<Value, QmpError> {
    let Some(error) = line.get("error") else {
        return Ok(line.get("return").cloned().unwrap_or_default());
    };
    let text = error.get("desc").and_then(Value::as_str);
    let text = text.unwrap_or("no reason given").to_owned();
    // QEMU, qapi/error.json.
    Err(match error.get("class").and_then(Value::as_str) {
        Some("DeviceNotFound") => QmpError::NoDevice(text),
        _ => QmpError::Refused(text),
    })
}

/// What an event says (QEMU, qapi/run-state.json and qapi/misc.json).
fn event_status(event: &str, data: &Value) -> Option<GuestStatus> {
    Some(match event {
        "STOP" => GuestStatus::Paused,
        "RESUME" => GuestStatus::Running,
        "GUEST_PANICKED" => GuestStatus::Ended(StopReason::GuestPanic),
        "SHUTDOWN" => GuestStatus::Ended(match data.get("reason").and_then(Value::as_str) {
            Some("guest-shutdown") => StopReason::GuestShutdown,
            Some("guest-reset") => StopReason::GuestReset,
            Some("guest-panic") => StopReason::GuestPanic,
            reason => StopReason::Failed {
                detail: format!("QEMU ended: {}", reason.unwrap_or("no reason given")),
            },
        }),
        _ => return None,
    })
}

/// What a run state says (QEMU, qapi/run-state.json).
fn run_state_status(run_state: &str) -> Option<GuestStatus> {
    Some(match run_state {
        "running" => GuestStatus::Running,
        "paused" => GuestStatus::Paused,
        "shutdown" => GuestStatus::Off,
        "guest-panicked" => GuestStatus::Ended(StopReason::GuestPanic),
        "internal-error" | "io-error" => GuestStatus::Ended(StopReason::Failed {
            detail: format!("QEMU cannot go on: {run_state}"),
        }),
        _ => return None,
    })
}

fn fold(status: &watch::Sender<GuestStatus>, next: Option<GuestStatus>) {
    let Some(next) = next else { return };
    status.send_if_modified(|current| {
        // QEMU halts the guest after it ended: that is no pause. The first cause is the true one.
        if matches!(current, GuestStatus::Off | GuestStatus::Ended(_)) || *current == next {
            return false;
        }
        *current = next;
        true
    });
}

/// Splits the stream into JSON lines.
struct Lines {
    stream: UnixStream,
    buffer: Vec<u8>,
    /// Bytes at the start of `buffer` known to hold no line end.
    searched: usize,
}

impl Lines {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            searched: 0,
        }
    }

    /// The next line. Cancel-safe: what was read stays in the buffer.
    async fn next(&mut self) -> Result<Value, QmpError> {
        loop {
            if let Some(end) = self.buffer[self.searched..]
                .iter()
                .position(|b| *b == b'\n')
            {
                let line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
                self.searched = 0;
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return serde_json::from_slice(&line)
                    .map_err(|_| QmpError::Protocol("a line is not JSON"));
            }
            self.searched = self.buffer.len();
            if self.searched > LINE_MAX_BYTES {
                return Err(QmpError::Protocol("a line is too long"));
            }
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) | Err(_) => return Err(QmpError::Closed),
                Ok(_) => {}
            }
        }
    }
}
