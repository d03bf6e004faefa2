//! What can go wrong in `xbe` itself.

use std::io;
use std::path::PathBuf;

use xbee_api::client;

/// An error of a command.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `xbed`, or the way to it.
    #[error(transparent)]
    Api(#[from] client::Error),
    /// A file named on the command line.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A document that cannot be sent.
    #[error("{} is not in UTF-8: convert it before it is submitted, see iconv(1)", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
    },
    /// Own output; a closed pipe ends `xbe` quietly.
    #[error("cannot write the output")]
    Output(#[source] io::Error),
    /// Only files are staged.
    #[error("{} is no file: only files can be staged, pack a directory with tar", path.display())]
    NotAFile {
        /// What it is instead.
        path: PathBuf,
    },
    /// The directory of a result does not exist.
    #[error("cannot put a result at {}: its directory does not exist", path.display())]
    NoDirectory {
        /// Where the result was to go.
        path: PathBuf,
    },
    /// A value that no document can hold.
    #[error(transparent)]
    Document(#[from] xbee_jsdl::WriteError),
    /// The certification authority.
    #[error(transparent)]
    Pki(#[from] xbee_envelope::pki::Error),
    /// Output that is not a stream.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The address of a message broker's queue.
    #[error("--server or XBE_SERVER")]
    Address(#[source] xbee_carry::address::BadAddress),
    /// The same, named by an `xbed`.
    #[error("the address of another host")]
    Told(#[source] xbee_carry::address::BadAddress),
    /// A `file:` URI, or what it is to become.
    #[error(transparent)]
    Staging(#[from] xbee_staging::Error),
    /// Another machine wants to write something here.
    #[error(
        "xbed wants to write {uri}, which is no target of the document: nothing was written there"
    )]
    ForeignTarget {
        /// What.
        uri: String,
    },
    /// A result that is not as long as was said.
    #[error("{uri} has {bytes} bytes, of which xbed sent {got}: nothing was written there")]
    WrongLength {
        /// Where it was to go.
        uri: String,
        /// What it has.
        bytes: u64,
        /// What came.
        got: u64,
    },
    /// There are no results yet.
    #[error("task {task} is not over: `xbe watch {task}` waits for that")]
    NotOver {
        /// The task.
        task: uuid::Uuid,
    },
    /// A port of this machine.
    #[error("cannot listen on port {port} of 127.0.0.1: choose another with -p, or 0 for any")]
    Port {
        /// Which.
        port: u16,
        /// Why.
        source: io::Error,
    },
    /// Ports without somebody who stays.
    #[error(
        "ports of a task on another machine are forwarded by xbe while it runs: `xbe run` and `xbe submit --wait` do that; or leave -p out, and use `xbe ssh TASK -- -L PORT:localhost:PORT`"
    )]
    NobodyListens,
    /// Nobody takes the job.
    #[error("no host took the job: {}", refusals.join("; "))]
    NotPlaced {
        /// Who not, and why not.
        refusals: Vec<String>,
    },
    /// A host may have the job or not.
    #[error(
        "{host} did not say whether it has the job: before you submit it again, see `xbe {}ps -a`",
        server.as_ref().map(|server| format!("--server {server} ")).unwrap_or_default()
    )]
    Unsure {
        /// Which.
        host: String,
        /// Its address, where it is not the one that was asked first.
        server: Option<String>,
        /// What it said, or why it said nothing.
        source: Box<client::Error>,
    },
    /// A socket of another machine.
    #[error("{server} is a socket of the machine of the xbed that names it, which this is not")]
    OtherMachine {
        /// What was named.
        server: String,
    },
    /// The stream of an exec or of a forwarded port broke.
    #[error("the connection to the guest was lost")]
    Tunnel(#[source] io::Error),
    /// A command in the guest could not be started.
    #[error("{0}")]
    Exec(String),
    /// No OpenSSH on this side.
    #[error("ssh was not found: install OpenSSH's client (Debian: apt install openssh-client)")]
    NoSsh,
    /// The operating system refused something basic.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
}

impl Error {
    /// Stable name for programs.
    pub fn code(&self) -> &str {
        match self {
            Error::Api(error) => error.code(),
            Error::Pki(error) => error.code(),
            Error::Address(_) | Error::Told(_) => "invalid-server",
            Error::Read { .. } => "cannot-read",
            Error::NotAFile { .. } => "not-a-file",
            Error::NoDirectory { .. } => "no-directory",
            Error::Document(_) | Error::NotUtf8 { .. } => "invalid-document",
            Error::Output(_) | Error::Write { .. } => "cannot-write",
            Error::Staging(error) => error.code(),
            Error::ForeignTarget { .. } => "foreign-target",
            Error::WrongLength { .. } => "wrong-length",
            Error::NotOver { .. } => "task-not-final",
            Error::Port { .. } => "port-unavailable",
            Error::NobodyListens => "nobody-listens",
            Error::NotPlaced { .. } => "not-placed",
            Error::Unsure { .. } => "placement-unsure",
            Error::OtherMachine { .. } => "other-machine",
            Error::Tunnel(_) => "connection-lost",
            Error::Exec(_) => "exec-failed",
            Error::NoSsh => "no-ssh",
            Error::System { .. } => "system",
        }
    }

    /// The reader of our output has gone: no error for anybody.
    pub fn is_closed_pipe(&self) -> bool {
        matches!(self, Error::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}
