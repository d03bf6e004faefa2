//! What can go wrong with nodes and channels.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::address::{Address, AddressError};
use crate::filter::{FilterError, StateError};

/// Why something about a node or a channel did not happen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A channel's name that is none.
    #[error(
        "'{0}' cannot be a channel's name: 1 to 128 ASCII letters, digits, '_', '-', '.', '/' or ':'"
    )]
    Name(String),
    /// There is a channel of this name.
    #[error("there is a channel '{0}' already: open it, or take another name")]
    AlreadyExists(String),
    /// There is none.
    #[error("there is no channel '{0}': create it first")]
    NoSuchChannel(String),
    /// The channel was destroyed, or this node has left it.
    #[error("the channel '{0}' was destroyed or left")]
    Destroyed(String),
    /// A channel is there, and who is to be asked about it does not answer.
    #[error("nobody answers for the channel '{channel}': {why}")]
    NoContact {
        /// The channel.
        channel: String,
        /// What the last try said.
        why: String,
    },
    /// The registry does not answer.
    #[error(
        "the registry at {address} does not answer ({why}): see that `kechod registry` runs there"
    )]
    Registry {
        /// Where it should be.
        address: Address,
        /// What the last try said.
        why: String,
    },
    /// A configuration that cannot be.
    #[error(
        "a heartbeat of {heartbeat:?} and death after {dead_after:?}: both must be more than nothing, and death come later than a heartbeat"
    )]
    Times {
        /// How often a sign of life was to be sent.
        heartbeat: Duration,
        /// After what silence a node was to be dead.
        dead_after: Duration,
    },
    /// Another node does not answer.
    #[error("the node at {to} cannot be reached")]
    Unreachable {
        /// Where it should be.
        to: String,
        /// The last try.
        #[source]
        source: io::Error,
    },
    /// A filter that is none.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// A state that a sink cannot have.
    #[error(transparent)]
    State(#[from] StateError),
    /// Another node said no.
    #[error("refused: {text} ({code})")]
    Refused {
        /// A stable name for programs.
        code: String,
        /// Why.
        text: String,
    },
    /// Too much of something.
    #[error("no room for one more: at most {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
    /// An address that is none.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// A file of TLS's.
    #[error("{}: no use for TLS: {why}", path.display())]
    Tls {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// What was to be set up could not be.
    #[error("cannot {what}")]
    System {
        /// What.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A sink was disconnected because it was slow, as its policy or the channel's has it.
    #[error("this sink was too slow and was disconnected: read faster, or take another policy")]
    Slow,
    /// The node was shut down.
    #[error("this node was shut down")]
    Shutdown,
}

impl Error {
    /// A stable name for programs.
    pub fn code(&self) -> &str {
        match self {
            Error::Name(_) => "channel-name",
            Error::AlreadyExists(_) => "channel-exists",
            Error::NoSuchChannel(_) => "no-such-channel",
            Error::Destroyed(_) => "channel-destroyed",
            Error::NoContact { .. } => "no-contact",
            Error::Registry { .. } => "registry-unreachable",
            Error::Times { .. } => "config",
            Error::Unreachable { .. } => "node-unreachable",
            Error::Filter(error) => error.code(),
            Error::State(error) => error.code(),
            Error::Refused { code, .. } => code,
            Error::Limit { .. } => "limit",
            Error::Address(_) => "address",
            Error::Tls { .. } => "tls",
            Error::System { .. } => "system",
            Error::Slow => "too-slow",
            Error::Shutdown => "shutdown",
        }
    }

    /// What the system said to `what`.
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::System {
            what: what.into(),
            source,
        }
    }
}
