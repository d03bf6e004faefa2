//! What goes wrong between host and agent.

use std::io;
use std::sync::Arc;

use xbee_protocol::{Failure, FrameError, code, sanitise};

/// Longest text from a guest that is shown to a user, in bytes.
const MAX_GUEST_TEXT_BYTES: usize = 1024;
/// Longest code from a guest, in bytes.
const MAX_GUEST_CODE_BYTES: usize = 64;

/// What goes wrong between host and agent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection failed below the protocol.
    #[error("connection to the agent failed")]
    Io(#[source] io::Error),
    /// The agent closed the connection.
    #[error("the agent closed the connection")]
    Closed,
    /// This side closed the connection: the last handle is gone.
    #[error("the connection to the agent was closed by this host")]
    ClosedHere,
    /// The agent is silent.
    #[error("the agent has been silent for {seconds} s")]
    Silent {
        /// How long, in seconds.
        seconds: u64,
    },
    /// The connection that this operation used was lost.
    #[error("the connection to the agent was lost")]
    Lost(#[source] Arc<Error>),
    /// The bytes are not frames of the protocol.
    #[error("the agent sent what is not a message")]
    Frame(#[source] FrameError),
    /// The agent broke the protocol.
    #[error("the agent broke the protocol: {detail}")]
    Protocol {
        /// Which rule.
        detail: String,
    },
    /// The agent does not know the secret of this boot.
    #[error("the agent does not know the secret of this boot; is it another domain's?")]
    Authentication,
    /// The agent is too old.
    #[error(
        "the agent speaks generation {offered} of the protocol; at least {least} is needed: rebuild the image with a newer agent"
    )]
    Generation {
        /// What the agent offers.
        offered: u16,
        /// What is needed.
        least: u16,
    },
    /// The agent refused the connection.
    #[error("the agent refused the connection: {message} ({code})")]
    Refused {
        /// The agent's code.
        code: String,
        /// The agent's words.
        message: String,
    },
    /// The agent could not do what was asked.
    #[error("{message}")]
    Failed {
        /// The agent's code, one of [`xbee_protocol::code`].
        code: String,
        /// The agent's words.
        message: String,
    },
    /// The agent did not answer in time.
    #[error("the agent did not answer within {seconds} s when asked to {what}")]
    Timeout {
        /// What it was asked to do.
        what: &'static str,
        /// The limit, in seconds.
        seconds: u64,
    },
    /// The request does not fit into a frame.
    #[error("the request is too large for the agent: arguments and environment may have {} bytes together", xbee_protocol::MAX_FRAME_BYTES - 1024)]
    TooLarge(#[source] FrameError),
    /// A bound of the connection is reached.
    #[error("too many {what} at a time on one agent; at most {limit} are possible")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// The content of a file to be put into the guest could not be read.
    #[error("cannot read the content for {path} in the guest")]
    Source {
        /// Path in the guest.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The content of a file from the guest could not be written.
    #[error("cannot write the content of {path} from the guest")]
    Sink {
        /// Path in the guest.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file from the guest is larger than allowed.
    #[error("{path} in the guest is larger than {limit_bytes} bytes, the most that may be fetched")]
    FileTooLarge {
        /// Path in the guest.
        path: String,
        /// The bound, in bytes.
        limit_bytes: u64,
    },
    /// A file changed on its way.
    #[error(
        "{path} did not come through unchanged: sent {sent_bytes} bytes, received {received_bytes} bytes, hashes differ"
    )]
    Corrupt {
        /// Path in the guest.
        path: String,
        /// Bytes sent.
        sent_bytes: u64,
        /// Bytes received.
        received_bytes: u64,
    },
    /// The operating system has no random numbers.
    #[error("no random numbers from the operating system")]
    Random(#[source] getrandom::Error),
}

/// Codes of errors that say no more than that the connection broke: of a domain that has ended, that one hears first.
pub const CONNECTION_CODES: [&str; 2] = ["agent-connection-failed", "agent-connection-closed"];

impl Error {
    /// A stable code for users and programs; that of the agent where it named one.
    pub fn code(&self) -> &str {
        match self {
            Error::Io(_) => CONNECTION_CODES[0],
            Error::Closed | Error::ClosedHere => CONNECTION_CODES[1],
            Error::Silent { .. } => "agent-silent",
            Error::Lost(source) => source.code(),
            Error::Frame(_) | Error::Protocol { .. } => code::PROTOCOL_ERROR,
            Error::Authentication => code::AUTHENTICATION_FAILED,
            Error::Generation { .. } => code::UNSUPPORTED_GENERATION,
            Error::Refused { code, .. } | Error::Failed { code, .. } => code,
            Error::Timeout { .. } => "agent-timeout",
            Error::TooLarge(_) => "request-too-large",
            Error::TooMany { .. } => code::TOO_MANY,
            Error::Source { .. } => "source-unreadable",
            Error::Sink { .. } => "sink-unwritable",
            Error::FileTooLarge { .. } => "file-too-large",
            Error::Corrupt { .. } => "file-corrupt",
            Error::Random(_) => "no-random-numbers",
        }
    }

    /// Whether the connection is gone, so that a new one may help.
    pub fn is_lost(&self) -> bool {
        matches!(
            self,
            Error::Io(_)
                | Error::Closed
                | Error::ClosedHere
                | Error::Silent { .. }
                | Error::Lost(_)
        )
    }

    pub(crate) fn protocol(detail: impl Into<String>) -> Self {
        Error::Protocol {
            detail: detail.into(),
        }
    }

    pub(crate) fn failed(failure: Failure) -> Self {
        let Failure { code, message } = clean(failure);
        Error::Failed { code, message }
    }

    pub(crate) fn refused(failure: Failure) -> Self {
        let Failure { code, message } = clean(failure);
        Error::Refused { code, message }
    }
}

/// A guest's failure with bounded and harmless text.
pub(crate) fn clean(failure: Failure) -> Failure {
    Failure {
        code: sanitise(&failure.code, MAX_GUEST_CODE_BYTES),
        message: sanitise(&failure.message, MAX_GUEST_TEXT_BYTES),
    }
}
