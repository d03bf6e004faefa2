//! The control socket's listening side.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, Shutdown, recvmsg};

use super::{LINE_MAX, Request, Response};
use crate::socket::{self, SocketError};
use crate::switch::{Switch, SwitchError};

/// Most control connections at a time.
const CLIENTS_MAX: usize = 16;

/// How long a client may take to read its answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the control socket is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Another switch serves the same path.
    #[error("another vswitch runs on {0}: stop it first, or use another --control path")]
    AlreadyRunning(PathBuf),
    /// The lock file cannot be made.
    #[error("cannot lock {path}")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The socket does not give connections any more.
    #[error("cannot accept control connections")]
    Accept(#[source] io::Error),
}

impl ServerError {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::AlreadyRunning(_) => "already-running",
            Self::Lock { .. } => "cannot-lock",
            Self::Socket(e) => e.code(),
            Self::Accept(_) => "cannot-accept",
        }
    }
}

/// A bound control socket.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    switch: Arc<Switch>,
    /// Held for life: two switches on one path would take each other's socket away.
    _lock: File,
}

impl Server {
    /// Listens on `path`. A socket that a dead switch left is taken over.
    pub fn bind(path: &Path) -> Result<Self, ServerError> {
        let lock = lock(path)?;
        let listener = socket::listen(path, None)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            switch: Switch::new(),
            _lock: lock,
        })
    }

    /// Serves until a client says `stop`.
    pub fn serve(self) -> Result<(), ServerError> {
        self.listener
            .set_nonblocking(false)
            .map_err(ServerError::Accept)?;
        let listener = Arc::new(self.listener);
        let clients = Arc::new(AtomicUsize::new(0));
        let stopped = Arc::new(std::sync::atomic::AtomicBool::new(false));
        loop {
            let accepted = listener.accept();
            if stopped.load(Ordering::Acquire) {
                break;
            }
            let (stream, _) = accepted.map_err(ServerError::Accept)?;
            if clients.fetch_add(1, Ordering::AcqRel) >= CLIENTS_MAX {
                clients.fetch_sub(1, Ordering::AcqRel);
                refuse(stream);
                continue;
            }
            let client = ClientCount(Arc::clone(&clients));
            let switch = Arc::clone(&self.switch);
            let stopped = Arc::clone(&stopped);
            let listener = Arc::clone(&listener);
            let spawned = std::thread::Builder::new()
                .name("control".into())
                .spawn(move || {
                    let _client = client;
                    match serve_client(&switch, stream) {
                        Ok(End::Left) => {}
                        Ok(End::Stop) => {
                            stopped.store(true, Ordering::Release);
                            // Ends the accept above, even if the socket's name is gone by now.
                            let woken = rustix::net::shutdown(&*listener, Shutdown::Both);
                            if let Err(e) = woken {
                                tracing::error!(error = %e, "cannot end the control socket");
                            }
                        }
                        Err(e) => tracing::warn!(error = %e, "control connection failed"),
                    }
                });
            if let Err(e) = spawned {
                tracing::warn!(error = %e, "no thread for a control connection");
            }
        }
        socket::unlink(&self.path);
        Ok(())
    }
}

struct ClientCount(Arc<AtomicUsize>);

impl Drop for ClientCount {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn lock(control: &Path) -> Result<File, ServerError> {
    let mut path = control.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    let error = |source: io::Error| ServerError::Lock {
        path: path.clone(),
        source,
    };
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(error)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ServerError::AlreadyRunning(control.to_owned())),
        Err(e) => Err(error(e.into())),
    }
}

fn refuse(stream: UnixStream) {
    let response = failure(
        "too-many-clients",
        format!("{CLIENTS_MAX} control connections are open already"),
    );
    // The client may be gone; then nobody misses the answer.
    let _ = respond(&stream, &response);
}

enum End {
    Left,
    Stop,
}

fn serve_client(switch: &Arc<Switch>, stream: UnixStream) -> io::Result<End> {
    stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
    let mut reader = BufReader::new(Incoming {
        stream: &stream,
        fd: None,
    });
    loop {
        let mut line = Vec::new();
        let n = (&mut reader)
            .take(LINE_MAX as u64 + 1)
            .read_until(b'\n', &mut line)?;
        if n == 0 {
            return Ok(End::Left);
        }
        if line.pop() != Some(b'\n') {
            respond(
                &stream,
                &failure(
                    "bad-request",
                    format!("a request is one line of at most {LINE_MAX} bytes"),
                ),
            )?;
            return Ok(End::Left);
        }
        let request = match serde_json::from_slice(&line) {
            Ok(request) => request,
            Err(e) => {
                respond(&stream, &failure("bad-request", e.to_string()))?;
                continue;
            }
        };
        let stop = request == Request::Stop;
        let response = handle(switch, request, reader.get_mut().fd.take());
        let stop = stop && response.ok;
        respond(&stream, &response)?;
        if stop {
            return Ok(End::Stop);
        }
    }
}

/// Reads a control connection, and keeps the last descriptor that came along.
struct Incoming<'a> {
    stream: &'a UnixStream,
    fd: Option<OwnedFd>,
}

impl Read for Incoming<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = recvmsg(
            self.stream,
            &mut [IoSliceMut::new(buffer)],
            &mut control,
            flags,
        )?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fd = fds.last().or(self.fd.take());
            }
        }
        Ok(got.bytes)
    }
}

fn handle(switch: &Arc<Switch>, request: Request, fd: Option<OwnedFd>) -> Response {
    let ok = Response {
        ok: true,
        ..Response::default()
    };
    let done = |result: Result<(), SwitchError>| match result {
        Ok(()) => ok.clone(),
        Err(e) => failure(e.code(), with_causes(&e)),
    };
    match request {
        Request::Add(spec) => done(switch.add(spec)),
        Request::Remove { cid } => done(switch.remove(cid)),
        Request::AttachInterface(card) => done(switch.attach(card)),
        Request::AttachUplink(uplink) => done(switch.attach_uplink(uplink)),
        Request::DetachInterface { cid, mac } => {
            switch.detach(cid, mac);
            ok
        }
        Request::ServePrograms(spec) => done(match fd {
            Some(socket) => switch.serve_programs(socket, spec),
            None => Err(SwitchError::NoSocket),
        }),
        Request::EndPrograms => {
            switch.end_programs();
            ok
        }
        Request::Stop => {
            switch.end_programs();
            done(switch.remove_all())
        }
        Request::Ping => Response {
            version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            ..ok
        },
        Request::List => Response {
            domains: Some(switch.list()),
            ..ok
        },
    }
}

/// An error and its causes on one line, since they leave the process as text.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text.push_str(": ");
        text.push_str(&e.to_string());
        cause = e.source();
    }
    text
}

fn failure(code: &str, message: String) -> Response {
    Response {
        ok: false,
        code: Some(code.to_owned()),
        message: Some(message),
        ..Response::default()
    }
}

fn respond(mut stream: &UnixStream, response: &Response) -> io::Result<()> {
    let mut line = serde_json::to_vec(response)?;
    line.push(b'\n');
    stream.write_all(&line)
}
