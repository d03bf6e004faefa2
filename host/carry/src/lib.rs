//! Connections to `xbed` through a message broker, from behind whatever network: bytes of an HTTP/1.1 connection in sealed
//! messages, both ways.
//!
//! A daemon listens on a queue, which clients know from their [`address`]. Client and daemon have a topic of their own
//! each, with a random name for each connection to the broker, which the other learns from the header `reply-to`; a topic
//! goes with its listener, on every broker, and leaves nothing behind. The first message of a client to the queue, and the
//! answer to it, are certificates. From then on all is sealed, to the daemon that answered.
//!
//! Daemons that share a certificate and a queue are a pool: whichever answers is spoken with, and who has a task is found by
//! asking all on a topic that they share. [`pool`] is how they share tasks.
//!
//! [`Remote`] is the client's end, [`serve`] the daemon's. How bytes go over a connection is in [`stream`]: nothing is
//! ever missing silently, whatever the broker loses, repeats or exchanges.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod address;
mod client;
pub mod identity;
pub mod pool;
mod server;
pub mod stream;
mod wire;

use std::path::PathBuf;

use xbee_envelope::{Fault, MessageError};
use xbee_mq::client::{ClientError, ClientOptions};

pub use address::Address;
pub use client::Remote;
pub use server::{Answer, Service, serve};

/// How to reach the broker.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Certificates (PEM) of authorities that the broker's may come from, beside the platform's.
    pub broker_ca: Option<PathBuf>,
}

impl Options {
    pub(crate) fn client(&self) -> ClientOptions {
        ClientOptions {
            ca_file: self.broker_ca.clone(),
            // What was under way is lost then, and who uses it has to know.
            give_up_after: std::time::Duration::ZERO,
            ..ClientOptions::default()
        }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The broker.
    #[error(transparent)]
    Broker(#[from] ClientError),
    /// The own identity.
    #[error(transparent)]
    Identity(#[from] identity::Error),
    /// A message cannot be made, or is not to be believed.
    #[error("no sealed message")]
    Seal(#[from] xbee_envelope::seal::Error),
    /// What should be a message is none.
    #[error("the answer is no message")]
    Message(#[from] MessageError),
    /// Nobody.
    #[error(
        "no xbed answers on {0} within {limit} s: is it running, and on this queue?",
        limit = client::ANSWER_LIMIT.as_secs()
    )]
    NoAnswer(String),
    /// The daemon's refusal, which cannot be sealed to somebody who is not believed.
    #[error("{} {}: {text}", fault.code(), fault.name())]
    Refused {
        /// The kind.
        fault: Fault,
        /// For people.
        text: String,
    },
    /// Somebody who is believed, but is no daemon.
    #[error("{0} answers, who is in the list of subjects, but not as a daemon")]
    NoDaemon(String),
    /// No member of the pool has it.
    #[error(
        "no member of the pool has task {0}: it may still wait there to be taken, or its host may be down"
    )]
    NotTaken(String),
    /// Several have such tasks.
    #[error("{0} is the beginning of task ids on {1} hosts of the pool: give more of it")]
    Ambiguous(String, usize),
    /// The connection to the broker.
    #[error("the connection to the broker was lost")]
    Lost,
}

impl Error {
    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Error::Broker(error) => error.code(),
            Error::Identity(error) => error.code(),
            Error::Seal(_) | Error::Message(_) | Error::NoDaemon(_) => "not-believed",
            Error::NoAnswer(_) => "no-answer",
            Error::Refused { .. } => "refused",
            Error::NotTaken(_) => "task-not-found",
            Error::Ambiguous(..) => "task-ambiguous",
            Error::Lost => "connection-lost",
        }
    }

    /// It may be better in a moment.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Broker(error) => matches!(
                error,
                ClientError::Connect { .. } | ClientError::Interrupted | ClientError::Closed
            ),
            Error::NoAnswer(_) | Error::NotTaken(_) | Error::Lost => true,
            _ => false,
        }
    }
}
