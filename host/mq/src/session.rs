//! What the broker knows of a connected client.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use crate::broker::{Draft, QueueId, Ticket};
use crate::destination::Rights;
use crate::frame::Version;
use crate::queue::Item;

/// How a subscription's messages are acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AckMode {
    /// By being sent.
    Auto,
    /// All up to the one that is named.
    Client,
    /// One by one.
    ClientIndividual,
}

impl AckMode {
    /// As it stands in SUBSCRIBE.
    pub fn as_str(self) -> &'static str {
        match self {
            AckMode::Auto => "auto",
            AckMode::Client => "client",
            AckMode::ClientIndividual => "client-individual",
        }
    }
}

/// What a client calls a subscription: in 1.0 it may have no `id` but its destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    Id(Arc<str>),
    Destination(Arc<str>),
}

/// A message that a consumer has and has not acknowledged.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) item: Item,
    /// Acknowledged in a transaction that is open.
    pub(crate) in_transaction: bool,
}

#[derive(Debug)]
pub(crate) struct Subscription {
    pub(crate) key: Key,
    pub(crate) queue: QueueId,
    pub(crate) mode: AckMode,
    pub(crate) prefetch: usize,
    pub(crate) pending: BTreeMap<u64, Pending>,
    /// Number of the next delivery.
    pub(crate) next_tag: u64,
    /// The newest message that was acknowledged.
    pub(crate) acknowledged: u64,
    /// Whether it stands among its queue's available consumers.
    pub(crate) available: bool,
}

impl Subscription {
    pub(crate) fn is_full(&self) -> bool {
        self.mode != AckMode::Auto && self.pending.len() >= self.prefetch
    }
}

#[derive(Debug)]
pub(crate) enum Step {
    Send(Draft),
    Ack { slot: u64, tags: Vec<u64> },
    Nack { slot: u64, tags: Vec<u64> },
}

#[derive(Debug, Default)]
pub(crate) struct Transaction {
    pub(crate) steps: Vec<Step>,
    pub(crate) bytes: usize,
}

#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) version: Version,
    pub(crate) rights: Arc<Rights>,
    pub(crate) keys: HashMap<Key, u64>,
    pub(crate) subscriptions: BTreeMap<u64, Subscription>,
    pub(crate) next_slot: u64,
    pub(crate) transactions: HashMap<Box<str>, Transaction>,
    /// Bytes of deliveries that are not written yet, an estimate from above.
    pub(crate) unsent_bytes: usize,
    /// A subscription stands aside until some of that is written.
    pub(crate) starved: bool,
    /// The last group of changes to the disk that a frame of this client was part of.
    pub(crate) last_ticket: Ticket,
    /// Receipts that wait for such a group, in order.
    pub(crate) receipts: VecDeque<(Ticket, Box<str>)>,
    /// DISCONNECT has come.
    pub(crate) closing: bool,
}

impl Session {
    pub(crate) fn new(version: Version, rights: Arc<Rights>) -> Session {
        Session {
            version,
            rights,
            keys: HashMap::new(),
            subscriptions: BTreeMap::new(),
            next_slot: 1,
            transactions: HashMap::new(),
            unsent_bytes: 0,
            starved: false,
            last_ticket: 0,
            receipts: VecDeque::new(),
            closing: false,
        }
    }
}
