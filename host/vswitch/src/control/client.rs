//! The control socket's connecting side, for `xbed`.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::Command;
use tokio::time::timeout;

use super::{LINE_MAX, Request, Response};
use crate::ether::{CardSpec, UplinkSpec};
use crate::programs::ProgramsSpec;
use crate::switch::{DomainSpec, DomainStatus};

/// How long an answer may take. The longest, `remove`, waits 5 s itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a started switch may take until it listens.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the switch did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("cannot connect to vswitch at {path}")]
    Connect {
        /// The control socket.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The program cannot be started.
    #[error("cannot start {program}")]
    Start {
        /// The program.
        program: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The program ended, or did not listen in time.
    #[error("vswitch did not start: see {log}")]
    NotReady {
        /// Where it says why.
        log: PathBuf,
    },
    /// The connection broke.
    #[error("the connection to vswitch broke")]
    Io(#[source] io::Error),
    /// No answer in time.
    #[error("vswitch did not answer within {} s", ANSWER_TIMEOUT.as_secs())]
    NoAnswer,
    /// The answer is not one.
    #[error("vswitch gave an answer that is none")]
    BadAnswer(#[source] serde_json::Error),
    /// The switch refused.
    #[error("{message}")]
    Refused {
        /// The switch's stable name for the reason.
        code: String,
        /// The switch's text.
        message: String,
    },
}

impl ClientError {
    /// A stable name for programs; the switch's own where it refused.
    pub fn code(&self) -> &str {
        match self {
            Self::Connect { .. } => "vswitch-unreachable",
            Self::Start { .. } | Self::NotReady { .. } => "vswitch-not-started",
            Self::Io(_) => "vswitch-connection-lost",
            Self::NoAnswer => "vswitch-timeout",
            Self::BadAnswer(_) => "vswitch-bad-answer",
            Self::Refused { code, .. } => code,
        }
    }
}

/// A connection to a running switch.
///
/// After an error other than [`ClientError::Refused`] answers may be out of step: connect anew.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

impl Client {
    /// Connects to the switch that listens on `control`.
    pub async fn connect(control: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(control)
            .await
            .map_err(|source| ClientError::Connect {
                path: control.to_owned(),
                source,
            })?;
        let (reader, writer) = stream.into_split();
        Ok(Self {
            reader: BufReader::new(reader),
            writer,
        })
    }

    /// Connects to the switch on `control`, or starts `program` there and connects.
    ///
    /// The switch gets a process group of its own and outlives the caller. What it logs is appended
    /// to `log`.
    pub async fn spawn(program: &Path, control: &Path, log: &Path) -> Result<Self, ClientError> {
        Self::spawn_by(Command::new(program), control, log).await
    }

    /// The same by a command that becomes the program, and to which the arguments are added.
    pub async fn spawn_by(
        mut command: Command,
        control: &Path,
        log: &Path,
    ) -> Result<Self, ClientError> {
        if let Ok(mut client) = Self::connect(control).await
            && client.ping().await.is_ok()
        {
            return Ok(client);
        }
        let program = PathBuf::from(command.as_std().get_program());
        let start = |source| ClientError::Start {
            program: program.clone(),
            source,
        };
        let log_file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(log)
            .map_err(start)?;
        let mut child = command
            .arg("--control")
            .arg(control)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log_file)
            .process_group(0)
            .kill_on_drop(false)
            .spawn()
            .map_err(start)?;
        // One line says that it listens; the end of the stream that it failed.
        let mut ready = String::new();
        if let Some(stdout) = child.stdout.take() {
            let mut reader = BufReader::new(stdout).take(64);
            // An error or the time limit leave `ready` empty.
            let _ = timeout(START_TIMEOUT, reader.read_line(&mut ready)).await;
        }
        if ready.trim_end() != "ready" {
            // It may have failed because another caller was quicker.
            return Self::connect(control)
                .await
                .map_err(|_| ClientError::NotReady {
                    log: log.to_owned(),
                });
        }
        // Reaped when it ends, should this process still be there.
        tokio::spawn(async move { child.wait().await });
        Self::connect(control).await
    }

    async fn ask(&mut self, request: &Request) -> Result<Response, ClientError> {
        self.ask_with(request, None).await
    }

    /// Asks, and sends a descriptor along.
    async fn ask_with(
        &mut self,
        request: &Request,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Response, ClientError> {
        let mut line = serde_json::to_vec(request).map_err(ClientError::BadAnswer)?;
        line.push(b'\n');
        let exchange = async {
            let sent = match fd {
                Some(fd) => send_fd(self.writer.as_ref(), &line[..1], fd).await?,
                None => 0,
            };
            self.writer.write_all(&line[sent..]).await?;
            let mut answer = Vec::new();
            (&mut self.reader)
                .take(LINE_MAX as u64)
                .read_until(b'\n', &mut answer)
                .await?;
            if answer.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(answer)
        };
        let answer = timeout(ANSWER_TIMEOUT, exchange)
            .await
            .map_err(|_| ClientError::NoAnswer)?
            .map_err(ClientError::Io)?;
        let response: Response = serde_json::from_slice(&answer).map_err(ClientError::BadAnswer)?;
        if response.ok {
            Ok(response)
        } else {
            Err(ClientError::Refused {
                code: response.code.unwrap_or_default(),
                message: response.message.unwrap_or_default(),
            })
        }
    }

    /// Adds a domain. When this returns, QEMU can connect.
    pub async fn add(&mut self, spec: DomainSpec) -> Result<(), ClientError> {
        self.ask(&Request::Add(spec)).await.map(|_| ())
    }

    /// Removes a domain.
    pub async fn remove(&mut self, cid: u32) -> Result<(), ClientError> {
        self.ask(&Request::Remove { cid }).await.map(|_| ())
    }

    /// Gives a domain a network card. When this returns, the connection can be made.
    pub async fn attach_interface(&mut self, card: CardSpec) -> Result<(), ClientError> {
        self.ask(&Request::AttachInterface(card)).await.map(|_| ())
    }

    /// Gives a domain's network card an uplink. When this returns, the gateway's connection can be made.
    pub async fn attach_uplink(&mut self, uplink: UplinkSpec) -> Result<(), ClientError> {
        self.ask(&Request::AttachUplink(uplink)).await.map(|_| ())
    }

    /// Takes a domain's network card away.
    pub async fn detach_interface(&mut self, cid: u32, mac: [u8; 6]) -> Result<(), ClientError> {
        let request = Request::DetachInterface { cid, mac };
        self.ask(&request).await.map(|_| ())
    }

    /// Serves host programs at a socket that is bound to its name and does not listen yet.
    pub async fn serve_programs(
        &mut self,
        spec: ProgramsSpec,
        socket: BorrowedFd<'_>,
    ) -> Result<(), ClientError> {
        let request = Request::ServePrograms(spec);
        self.ask_with(&request, Some(socket)).await.map(|_| ())
    }

    /// Serves no host programs any more.
    pub async fn end_programs(&mut self) -> Result<(), ClientError> {
        self.ask(&Request::EndPrograms).await.map(|_| ())
    }

    /// All domains by CID.
    pub async fn list(&mut self) -> Result<Vec<DomainStatus>, ClientError> {
        let response = self.ask(&Request::List).await?;
        Ok(response.domains.unwrap_or_default())
    }

    /// The version of the running switch.
    pub async fn ping(&mut self) -> Result<String, ClientError> {
        let response = self.ask(&Request::Ping).await?;
        Ok(response.version.unwrap_or_default())
    }

    /// Removes all domains and ends the switch.
    pub async fn stop(mut self) -> Result<(), ClientError> {
        self.ask(&Request::Stop).await.map(|_| ())
    }
}

/// Sends bytes, few enough to go at once, with a descriptor.
async fn send_fd(stream: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let send = || {
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let flags = SendFlags::NOSIGNAL;
        Ok(sendmsg(
            stream,
            &[IoSlice::new(bytes)],
            &mut control,
            flags,
        )?)
    };
    stream.async_io(Interest::WRITABLE, send).await
}
