//! Why the broker does not do what a frame asks for. The client gets an ERROR, and its connection is closed.

use crate::decode::Malformed;
use crate::destination::BadDestination;
use crate::frame::{Command, Version};

/// Why a frame is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is no frame.
    #[error("malformed frame: {0}")]
    Malformed(#[from] Malformed),
    /// The first frame is another one.
    #[error("{} before CONNECT", .0.as_str())]
    NotConnected(Command),
    /// CONNECT again.
    #[error("{} on a connection that is connected", .0.as_str())]
    Connected(Command),
    /// A frame that only servers send, or that the version does not have.
    #[error("{} is no frame that a client sends in STOMP {}", .0.as_str(), .1)]
    NotForClients(Command, Version),
    /// No common version.
    #[error("no common version: supported protocol versions are 1.0 1.1 1.2")]
    Version,
    /// A header is missing.
    #[error("{} without the header {}", .0.as_str(), .1)]
    Missing(Command, &'static str),
    /// A header makes no sense.
    #[error("the header {name} cannot be {value:?}: {expected}")]
    BadHeader {
        /// Its name.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it can be.
        expected: &'static str,
    },
    /// A body where none may be.
    #[error("{} with a body", .0.as_str())]
    Body(Command),
    /// No destination.
    #[error("the header destination names none: {0}")]
    Destination(#[from] BadDestination),
    /// Login or passcode is wrong.
    #[error("access refused: login or passcode is wrong")]
    Login,
    /// The user may not.
    #[error("access refused: this login may not {action} {destination}")]
    Access {
        /// What it wanted.
        action: &'static str,
        /// Where.
        destination: String,
    },
    /// The subscription is there already.
    #[error("there is a subscription {0:?} on this connection")]
    SubscriptionExists(String),
    /// There is no such subscription.
    #[error("there is no subscription {0:?} on this connection")]
    NoSubscription(String),
    /// Selectors are not supported.
    #[error("selectors are not supported: subscribe without one")]
    Selector,
    /// Nothing to acknowledge.
    #[error("no message on this connection waits for the acknowledgement {0:?}")]
    NoDelivery(String),
    /// The transaction is there already.
    #[error("there is a transaction {0:?} on this connection")]
    TransactionExists(String),
    /// There is no such transaction.
    #[error("there is no transaction {0:?} on this connection")]
    NoTransaction(String),
    /// A limit.
    #[error("limit reached: {what} ({limit})")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How much there may be.
        limit: usize,
    },
    /// The client does not take what it subscribed to.
    #[error("slow consumer: more than {limit} {unit} wait for the subscription of {destination}")]
    Slow {
        /// The topic.
        destination: String,
        /// How much may wait.
        limit: usize,
        /// Of what.
        unit: &'static str,
    },
    /// Too long without a complete frame, or silence where heart-beats were agreed.
    #[error("timeout: {0}")]
    Timeout(&'static str),
    /// The broker stops.
    #[error("the broker stops")]
    Stopping,
}

impl Refused {
    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Refused::Malformed(malformed) => malformed.code(),
            Refused::NotConnected(_) => "not-connected",
            Refused::Connected(_) => "already-connected",
            Refused::NotForClients(..) => "unknown-command",
            Refused::Version => "version",
            Refused::Missing(..) => "header-missing",
            Refused::BadHeader { .. } => "bad-header",
            Refused::Body(_) => "malformed-frame",
            Refused::Destination(_) => "bad-destination",
            Refused::Login | Refused::Access { .. } => "access-refused",
            Refused::SubscriptionExists(_) => "subscription-exists",
            Refused::NoSubscription(_) => "no-subscription",
            Refused::Selector => "selector",
            Refused::NoDelivery(_) => "no-delivery",
            Refused::TransactionExists(_) => "transaction-exists",
            Refused::NoTransaction(_) => "no-transaction",
            Refused::Limit { .. } => "limit",
            Refused::Slow { .. } => "slow-consumer",
            Refused::Timeout(_) => "timeout",
            Refused::Stopping => "stopping",
        }
    }
}
