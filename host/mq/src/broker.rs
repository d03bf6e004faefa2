//! The broker itself: a state machine that does no I/O and knows no clock.
//!
//! Frames of connected clients go in; effects ([`Effect`]) and changes to the disk ([`Change`]) come out, in order. What is
//! promised here and tried with random sessions in `tests/model.rs`:
//!
//! - A message of a queue is with one consumer or none; what a consumer does not acknowledge before it leaves is delivered
//!   again, to the next in turn, with `redelivered:true`, and before all newer messages.
//! - A message that was accepted is delivered and acknowledged, in a queue, or in the dead-letter queue.
//! - A transaction takes effect as a whole or not at all.
//! - A receipt comes after all changes to the disk that its frame and the client's frames before it have made.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use crate::destination::{self, Kind, Pattern, Rights};
use crate::frame::{Command, Frame, Headers, Version};
use crate::ids::ById;
use crate::limits::Limits;
use crate::message::{AckId, Delivery, Message, OVERHEAD_BYTES};
use crate::queue::{Consumer, Item, Queue};
use crate::refused::Refused;
use crate::session::{AckMode, Key, Pending, Session, Step, Subscription, Transaction};

/// Where messages go that were sent back too often.
pub const DEAD_LETTER_QUEUE: &str = "/queue/dead-letter";

/// Headers of SEND that are not the message's, or that the broker sets in MESSAGE.
const NOT_PASSED_ON: [&str; 8] = [
    "destination",
    "content-length",
    "receipt",
    "transaction",
    "message-id",
    "subscription",
    "ack",
    "redelivered",
];

/// A connection, by a number that is never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// Number of a group of changes to the disk; each is greater than those before.
pub type Ticket = u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct QueueId(u64);

/// Something that the broker wants done, now and in this order.
#[derive(Debug)]
pub enum Effect {
    /// A message to a subscriber.
    Message {
        /// The client.
        to: ConnectionId,
        /// Its version.
        version: Version,
        /// What it gets.
        delivery: Delivery,
    },
    /// A receipt.
    Receipt {
        /// The client.
        to: ConnectionId,
        /// Its version.
        version: Version,
        /// The value of the header `receipt`.
        receipt: Box<str>,
    },
    /// An error; the client is not connected any more.
    Error {
        /// The client.
        to: ConnectionId,
        /// Its version.
        version: Version,
        /// Why.
        refused: Refused,
        /// The receipt that the frame asked for.
        receipt: Option<Box<str>>,
    },
    /// The client has taken its leave; the connection can be closed.
    Close {
        /// The client.
        to: ConnectionId,
    },
    /// A message was thrown away, because it was sent back too often and the dead-letter queue is full.
    Discarded {
        /// The message.
        message: Arc<Message>,
    },
}

/// A change to what is on the disk.
#[derive(Debug, Clone)]
pub enum Change {
    /// The message is there.
    Put(Arc<Message>),
    /// The message with this number is not.
    Delete(u64),
}

/// A message before it is accepted.
#[derive(Debug)]
pub(crate) struct Draft {
    destination: Arc<str>,
    kind: Kind,
    headers: Headers,
    body: Bytes,
    persistent: bool,
}

impl Draft {
    fn bytes(&self) -> usize {
        self.body.len() + self.headers.bytes() + self.destination.len() + OVERHEAD_BYTES
    }
}

/// What an acknowledgement refers to.
enum Target {
    /// These deliveries of a subscription.
    Deliveries(u64, Vec<u64>),
    /// Something that is settled or gone back, which the client could not know.
    Settled,
}

/// The broker.
#[derive(Debug)]
pub struct Broker {
    limits: Limits,
    /// Whether there is a disk.
    stores: bool,
    next_message: u64,
    next_queue: u64,
    sessions: ById<ConnectionId, Session>,
    queues: ById<QueueId, Queue>,
    names: HashMap<Arc<str>, QueueId>,
    topics: HashMap<Arc<str>, Vec<QueueId>>,
    total_bytes: usize,
    effects: Vec<Effect>,
    /// Queues in which something may be delivered now.
    restless: Vec<QueueId>,
    changes: Vec<Change>,
    changes_bytes: usize,
    /// Number that the changes above will have.
    next_ticket: Ticket,
    stored: Ticket,
    /// Groups that are on their way to the disk, and their bytes.
    unstored: VecDeque<(Ticket, usize)>,
    unstored_bytes: usize,
    /// Clients with receipts that wait for the disk.
    waiting: Vec<ConnectionId>,
}

impl Broker {
    /// A broker without messages. Theirs will have numbers from `first_message`; it keeps those that are persistent on
    /// the disk if `stores`, by [`Broker::take_changes`].
    pub fn new(limits: Limits, first_message: u64, stores: bool) -> Broker {
        Broker {
            limits,
            stores,
            next_message: first_message,
            next_queue: 0,
            sessions: ById::default(),
            queues: ById::default(),
            names: HashMap::new(),
            topics: HashMap::new(),
            total_bytes: 0,
            effects: Vec::new(),
            restless: Vec::new(),
            changes: Vec::new(),
            changes_bytes: 0,
            next_ticket: 1,
            stored: 0,
            unstored: VecDeque::new(),
            unstored_bytes: 0,
            waiting: Vec::new(),
        }
    }

    /// Takes up a message from the disk; the oldest first. Nobody knows whether it was delivered before.
    pub fn restore(&mut self, message: Message) {
        self.next_message = self.next_message.max(message.id + 1);
        let queue = self.queue_named(&message.destination.clone());
        self.total_bytes += message.bytes();
        self.queue(queue).push(Item {
            message: Arc::new(message),
            nacks: 0,
            redelivered: true,
        });
    }

    /// What is to be done now.
    pub fn effects(&mut self) -> std::vec::Drain<'_, Effect> {
        self.effects.drain(..)
    }

    /// What is to be written to the disk as a whole; [`Broker::stored`] says when it is there.
    pub fn take_changes(&mut self) -> Option<(Ticket, Vec<Change>)> {
        if self.changes.is_empty() {
            return None;
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.unstored.push_back((ticket, self.changes_bytes));
        self.changes_bytes = 0;
        Some((ticket, std::mem::take(&mut self.changes)))
    }

    /// All groups of changes up to this one are on the disk.
    pub fn stored(&mut self, ticket: Ticket) {
        self.stored = self.stored.max(ticket);
        while let Some(&(_, bytes)) = self.unstored.front().filter(|(t, _)| *t <= self.stored) {
            self.unstored_bytes -= bytes;
            self.unstored.pop_front();
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|&id| !self.give_receipts(id));
        self.waiting = waiting;
    }

    /// A client has connected, in this version and with these rights.
    pub fn connect(&mut self, id: ConnectionId, version: Version, rights: Arc<Rights>) {
        self.sessions.insert(id, Session::new(version, rights));
    }

    /// A client's connection is gone.
    pub fn gone(&mut self, id: ConnectionId) {
        self.release(id);
        self.sessions.remove(&id);
        self.pump();
    }

    /// Of what was delivered to this client, so many bytes are not written yet.
    pub fn unsent(&mut self, id: ConnectionId, bytes: usize) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        session.unsent_bytes = bytes;
        if !session.starved || bytes > self.limits.outgoing_bytes / 2 {
            return;
        }
        session.starved = false;
        for (&slot, subscription) in &mut session.subscriptions {
            if subscription.available || subscription.is_full() {
                continue;
            }
            subscription.available = true;
            if let Some(queue) = self.queues.get_mut(&subscription.queue) {
                queue.available.push_back(Consumer {
                    connection: id,
                    slot,
                });
                self.restless.push(subscription.queue);
            }
        }
        self.pump();
    }

    /// How many receipts of this client wait for the disk.
    pub fn receipts_waiting(&self, id: ConnectionId) -> usize {
        self.sessions.get(&id).map_or(0, |s| s.receipts.len())
    }

    /// Messages in all queues, those that consumers have among them.
    pub fn messages(&self) -> usize {
        self.queues.values().map(|queue| queue.messages).sum()
    }

    /// Bytes of all messages; topics' count once for each subscriber that they wait for.
    pub fn bytes(&self) -> usize {
        self.total_bytes
    }

    /// A client cannot stay.
    pub fn refuse(&mut self, id: ConnectionId, refused: Refused, receipt: Option<Box<str>>) {
        self.error(id, refused, receipt);
        self.pump();
    }

    /// A frame of a connected client.
    pub fn frame(&mut self, id: ConnectionId, frame: Frame) {
        if self.sessions.get(&id).is_none_or(|s| s.closing) {
            return;
        }
        let receipt = frame.headers.get("receipt").map(Box::<str>::from);
        let changes = self.changes.len();
        let result = self.process(id, frame);
        if self.changes.len() > changes
            && let Some(session) = self.sessions.get_mut(&id)
        {
            session.last_ticket = self.next_ticket;
        }
        match result {
            Ok(()) => {
                if let Some(receipt) = receipt {
                    self.receipt(id, receipt);
                }
                self.close_if_done(id);
            }
            Err(refused) => self.error(id, refused, receipt),
        }
        self.pump();
    }

    fn process(&mut self, id: ConnectionId, frame: Frame) -> Result<(), Refused> {
        let command = frame.command;
        let version = self.sessions[&id].version;
        // Before 1.2 a body that is not to be is passed over, by the letter for SUBSCRIBE; ends of line are taken for
        // carelessness.
        if version == Version::V1_2
            && !command.may_have_body()
            && frame.body.iter().any(|b| !matches!(b, b'\r' | b'\n'))
        {
            return Err(Refused::Body(command));
        }
        match command {
            Command::Send => self.send(id, frame),
            Command::Subscribe => self.subscribe(id, &frame),
            Command::Unsubscribe => self.unsubscribe(id, &frame),
            Command::Ack => self.acknowledge(id, &frame),
            Command::Nack if version > Version::V1_0 => self.acknowledge(id, &frame),
            Command::Begin => self.begin(id, &frame),
            Command::Commit => self.commit(id, &frame),
            Command::Abort => self.abort(id, &frame),
            Command::Disconnect => {
                self.release(id);
                if let Some(session) = self.sessions.get_mut(&id) {
                    session.closing = true;
                }
                Ok(())
            }
            Command::Connect | Command::Stomp => Err(Refused::Connected(command)),
            _ => Err(Refused::NotForClients(command, version)),
        }
    }

    fn session(&mut self, id: ConnectionId) -> &mut Session {
        self.sessions.get_mut(&id).expect("a connected client")
    }

    fn queue(&mut self, id: QueueId) -> &mut Queue {
        self.queues.get_mut(&id).expect("a queue that is there")
    }

    // Receipts and errors

    fn receipt(&mut self, id: ConnectionId, receipt: Box<str>) {
        let stored = self.stored;
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        let (version, ticket) = (session.version, session.last_ticket);
        if ticket <= stored {
            self.effects.push(Effect::Receipt {
                to: id,
                version,
                receipt,
            });
            return;
        }
        if session.receipts.is_empty() {
            self.waiting.push(id);
        }
        session.receipts.push_back((ticket, receipt));
    }

    /// Gives the receipts that waited for what is stored now; true if no more wait.
    fn give_receipts(&mut self, id: ConnectionId) -> bool {
        let Some(session) = self.sessions.get_mut(&id) else {
            return true;
        };
        while let Some(&(ticket, _)) = session.receipts.front() {
            if ticket > self.stored {
                return false;
            }
            if let Some((_, receipt)) = session.receipts.pop_front() {
                self.effects.push(Effect::Receipt {
                    to: id,
                    version: session.version,
                    receipt,
                });
            }
        }
        self.close_if_done(id);
        true
    }

    fn close_if_done(&mut self, id: ConnectionId) {
        let done = |session: &Session| session.closing && session.receipts.is_empty();
        if self.sessions.get(&id).is_some_and(done) {
            self.sessions.remove(&id);
            self.effects.push(Effect::Close { to: id });
        }
    }

    fn error(&mut self, id: ConnectionId, refused: Refused, receipt: Option<Box<str>>) {
        self.release(id);
        if let Some(session) = self.sessions.remove(&id) {
            self.effects.push(Effect::Error {
                to: id,
                version: session.version,
                refused,
                receipt,
            });
        }
    }

    // Sending

    fn send(&mut self, id: ConnectionId, frame: Frame) -> Result<(), Refused> {
        let name = required(&frame, "destination")?;
        let kind = destination::kind(name, self.limits.destination_bytes)?;
        let session = &self.sessions[&id];
        allowed(&session.rights.write, "send to", name)?;
        let transaction = frame.headers.get("transaction").map(Box::<str>::from);
        let destination = match self.names.get_key_value(name) {
            Some((name, _)) => name.clone(),
            None => Arc::from(name),
        };
        let draft = Draft {
            kind,
            persistent: frame.headers.get("persistent") == Some("true"),
            headers: passed_on(&frame.headers),
            body: Bytes::from(frame.body),
            destination,
        };
        match transaction {
            None => {
                self.check_room(std::iter::once(&draft))?;
                self.publish(draft);
            }
            Some(name) => {
                let limits = self.limits;
                let session = self.session(id);
                let others: usize = session.transactions.values().map(|t| t.bytes).sum();
                limit(
                    "bytes of transactions",
                    others + draft.bytes(),
                    limits.transaction_bytes,
                )?;
                let transaction = step_of(session, &name, &limits)?;
                transaction.bytes += draft.bytes();
                transaction.steps.push(Step::Send(draft));
            }
        }
        Ok(())
    }

    /// Whether there is room for all of these.
    fn check_room<'a>(&self, drafts: impl Iterator<Item = &'a Draft>) -> Result<(), Refused> {
        let limits = &self.limits;
        let (mut all_bytes, mut stored_bytes, mut new) = (0, 0, 0);
        let mut sums: Vec<(&str, usize, usize)> = Vec::new();
        for draft in drafts {
            all_bytes += draft.bytes();
            if draft.kind == Kind::Topic {
                continue;
            }
            if draft.persistent && self.stores {
                stored_bytes += draft.bytes();
            }
            let sum = match sums
                .iter()
                .position(|(name, ..)| **name == *draft.destination)
            {
                Some(at) => &mut sums[at],
                None => sums.push_mut((&draft.destination, 0, 0)),
            };
            sum.1 += 1;
            sum.2 += draft.bytes();
        }
        for (name, messages, bytes) in sums {
            let (has_messages, has_bytes) = match self.names.get(name) {
                Some(queue) => (self.queues[queue].messages, self.queues[queue].bytes),
                None => {
                    new += 1;
                    (0, 0)
                }
            };
            limit(
                "messages in the queue",
                has_messages + messages,
                limits.queue_messages,
            )?;
            limit("bytes in the queue", has_bytes + bytes, limits.queue_bytes)?;
        }
        limit("queues", self.names.len() + new, limits.queues)?;
        limit(
            "bytes of all messages",
            self.total_bytes + all_bytes,
            limits.total_bytes,
        )?;
        if stored_bytes > 0 {
            limit(
                "bytes of messages that wait for the disk",
                self.unstored_bytes + stored_bytes,
                limits.unstored_bytes,
            )?;
        }
        Ok(())
    }

    fn publish(&mut self, draft: Draft) {
        let id = self.next_message;
        self.next_message += 1;
        let stored = draft.persistent && self.stores && draft.kind == Kind::Queue;
        let message = Arc::new(Message {
            id,
            destination: draft.destination,
            headers: draft.headers,
            body: draft.body,
            stored,
        });
        let item = Item {
            message: message.clone(),
            nacks: 0,
            redelivered: false,
        };
        match draft.kind {
            Kind::Queue => {
                let queue = self.queue_named(&message.destination);
                self.total_bytes += message.bytes();
                self.queue(queue).push(item);
                self.restless.push(queue);
                if stored {
                    self.change(Change::Put(message));
                }
            }
            Kind::Topic => {
                let Some(queues) = self.topics.get(&message.destination) else {
                    return;
                };
                for queue in queues.clone() {
                    self.total_bytes += message.bytes();
                    self.queue(queue).push(item.clone());
                    self.restless.push(queue);
                }
            }
        }
    }

    fn change(&mut self, change: Change) {
        let bytes = match &change {
            Change::Put(message) => message.bytes(),
            Change::Delete(_) => OVERHEAD_BYTES,
        };
        self.changes_bytes += bytes;
        self.unstored_bytes += bytes;
        self.changes.push(change);
    }

    fn queue_named(&mut self, name: &Arc<str>) -> QueueId {
        if let Some(&id) = self.names.get(name) {
            return id;
        }
        let id = self.new_queue(name.clone(), false);
        self.names.insert(name.clone(), id);
        id
    }

    fn new_queue(&mut self, name: Arc<str>, private: bool) -> QueueId {
        let id = QueueId(self.next_queue);
        self.next_queue += 1;
        self.queues.insert(id, Queue::new(name, private));
        id
    }

    /// Forgets a queue that has nothing and nobody.
    fn forget_if_unused(&mut self, id: QueueId) {
        let unused = |queue: &Queue| queue.messages == 0 && queue.consumers == 0;
        if self.queues.get(&id).is_some_and(unused)
            && let Some(queue) = self.queues.remove(&id)
            && !queue.private
        {
            self.names.remove(&queue.name);
        }
    }

    // Subscriptions

    fn subscribe(&mut self, id: ConnectionId, frame: &Frame) -> Result<(), Refused> {
        let name = required(frame, "destination")?;
        let kind = destination::kind(name, self.limits.destination_bytes)?;
        let limits = self.limits;
        let topics = self.topics.values().map(Vec::len).sum::<usize>();
        let session = &self.sessions[&id];
        allowed(&session.rights.read, "subscribe to", name)?;
        let name: Arc<str> = Arc::from(name);
        let key = match frame.headers.get("id") {
            Some(id) => Key::Id(id.into()),
            None if session.version == Version::V1_0 => Key::Destination(name.clone()),
            None => return Err(Refused::Missing(frame.command, "id")),
        };
        if session.keys.contains_key(&key) {
            return Err(Refused::SubscriptionExists(
                frame.headers.get("id").unwrap_or(&name).into(),
            ));
        }
        limit(
            "subscriptions of a connection",
            session.subscriptions.len() + 1,
            limits.subscriptions,
        )?;
        if frame
            .headers
            .get("selector")
            .is_some_and(|s| !s.trim().is_empty())
        {
            return Err(Refused::Selector);
        }
        let mode = match frame.headers.get("ack") {
            None | Some("auto") => AckMode::Auto,
            Some("client") => AckMode::Client,
            Some("client-individual") => AckMode::ClientIndividual,
            Some(other) => {
                return Err(Refused::BadHeader {
                    name: "ack",
                    value: other.into(),
                    expected: "auto, client or client-individual",
                });
            }
        };
        let prefetch = prefetch(&frame.headers, &limits)?;
        let new = match kind {
            Kind::Queue => usize::from(!self.names.contains_key(&name)),
            Kind::Topic => 1,
        };
        limit("queues", self.names.len() + topics + new, limits.queues)?;

        let queue = match kind {
            Kind::Queue => self.queue_named(&name),
            Kind::Topic => {
                let queue = self.new_queue(name.clone(), true);
                self.topics.entry(name).or_default().push(queue);
                queue
            }
        };
        let session = self.session(id);
        let slot = session.next_slot;
        session.next_slot += 1;
        session.keys.insert(key.clone(), slot);
        session.subscriptions.insert(
            slot,
            Subscription {
                key,
                queue,
                mode,
                prefetch,
                pending: Default::default(),
                next_tag: 1,
                acknowledged: 0,
                available: true,
            },
        );
        let queue_id = queue;
        let queue = self.queue(queue_id);
        queue.consumers += 1;
        queue.available.push_back(Consumer {
            connection: id,
            slot,
        });
        self.restless.push(queue_id);
        Ok(())
    }

    fn unsubscribe(&mut self, id: ConnectionId, frame: &Frame) -> Result<(), Refused> {
        let session = self.session(id);
        let (key, text) = match frame.headers.get("id") {
            Some(id) => (Key::Id(id.into()), id),
            None if session.version == Version::V1_0 => {
                let name = required(frame, "destination")?;
                (Key::Destination(name.into()), name)
            }
            None => return Err(Refused::Missing(frame.command, "id")),
        };
        let slot = session
            .keys
            .remove(&key)
            .ok_or_else(|| Refused::NoSubscription(text.into()))?;
        self.end_subscription(id, slot);
        Ok(())
    }

    /// Takes a subscription away; what it had not acknowledged goes back.
    fn end_subscription(&mut self, id: ConnectionId, slot: u64) {
        let Some(subscription) = self.session(id).subscriptions.remove(&slot) else {
            return;
        };
        let queue_id = subscription.queue;
        let queue = self.queue(queue_id);
        queue.consumers -= 1;
        if queue.private {
            if let Some(queue) = self.queues.remove(&queue_id) {
                self.total_bytes -= queue.bytes;
                if let Some(queues) = self.topics.get_mut(&queue.name) {
                    queues.retain(|other| *other != queue_id);
                    if queues.is_empty() {
                        self.topics.remove(&queue.name);
                    }
                }
                // Nobody else has them: what is left of the topic's messages goes with it.
                drop(queue.into_ready());
            }
            return;
        }
        if subscription.available {
            queue.available.retain(|consumer| {
                *consumer
                    != Consumer {
                        connection: id,
                        slot,
                    }
            });
        }
        for (_, pending) in subscription.pending.into_iter().rev() {
            let mut item = pending.item;
            item.redelivered = true;
            queue.put_back(item);
        }
        self.restless.push(queue_id);
        self.forget_if_unused(queue_id);
    }

    /// Takes back all that a client has.
    fn release(&mut self, id: ConnectionId) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        session.transactions.clear();
        session.keys.clear();
        let slots: Vec<u64> = session.subscriptions.keys().copied().collect();
        for slot in slots {
            self.end_subscription(id, slot);
        }
    }

    // Acknowledgements

    fn acknowledge(&mut self, id: ConnectionId, frame: &Frame) -> Result<(), Refused> {
        let nack = frame.command == Command::Nack;
        let limits = self.limits;
        let session = self.session(id);
        let transaction = frame.headers.get("transaction");
        if let Some(name) = transaction {
            // Before anything is marked.
            step_of(session, name, &limits)?;
        }
        let Target::Deliveries(slot, tags) = target(session, frame)? else {
            return Ok(());
        };
        let Some(name) = transaction else {
            self.settle(id, slot, &tags, nack);
            return Ok(());
        };
        if let Some(subscription) = session.subscriptions.get_mut(&slot) {
            for tag in &tags {
                if let Some(pending) = subscription.pending.get_mut(tag) {
                    pending.in_transaction = true;
                }
            }
        }
        let transaction = step_of(session, name, &limits)?;
        transaction.steps.push(match nack {
            true => Step::Nack { slot, tags },
            false => Step::Ack { slot, tags },
        });
        Ok(())
    }

    /// Takes deliveries as consumed, or as sent back.
    fn settle(&mut self, id: ConnectionId, slot: u64, tags: &[u64], nack: bool) {
        let session = self.sessions.get_mut(&id).expect("a connected client");
        // A subscription that has ended since has given its messages back.
        let Some(subscription) = session.subscriptions.get_mut(&slot) else {
            return;
        };
        let queue_id = subscription.queue;
        let mut items = Vec::new();
        for tag in tags.iter().rev() {
            if let Some(pending) = subscription.pending.remove(tag) {
                let message = &pending.item.message;
                subscription.acknowledged = subscription.acknowledged.max(message.id);
                items.push(pending.item);
            }
        }
        if !subscription.available && !subscription.is_full() {
            subscription.available = true;
            self.queue(queue_id).available.push_back(Consumer {
                connection: id,
                slot,
            });
        }
        self.restless.push(queue_id);
        for mut item in items {
            let last = item.nacks >= self.limits.redeliveries;
            if !nack || (last && *item.message.destination != *DEAD_LETTER_QUEUE) {
                self.settle_item(queue_id, &item.message);
                if nack {
                    self.bury(&item.message);
                }
                continue;
            }
            item.nacks = item.nacks.saturating_add(1);
            item.redelivered = true;
            self.queue(queue_id).put_back(item);
        }
        self.forget_if_unused(queue_id);
    }

    /// A message of this queue is no more.
    fn settle_item(&mut self, queue: QueueId, message: &Message) {
        self.total_bytes -= message.bytes();
        self.queue(queue).settle(message);
        if message.stored {
            self.change(Change::Delete(message.id));
        }
    }

    /// Puts a message into the dead-letter queue.
    fn bury(&mut self, message: &Arc<Message>) {
        let mut headers = message.headers.clone();
        headers.push("original-destination", &message.destination);
        headers.push_display("original-message-id", message.id);
        headers.push("dead-letter-reason", "sent back too often");
        let draft = Draft {
            destination: Arc::from(DEAD_LETTER_QUEUE),
            kind: Kind::Queue,
            headers,
            body: message.body.clone(),
            persistent: message.stored,
        };
        match self.check_room(std::iter::once(&draft)) {
            Ok(()) => self.publish(draft),
            Err(_) => self.effects.push(Effect::Discarded {
                message: message.clone(),
            }),
        }
    }

    // Transactions

    fn begin(&mut self, id: ConnectionId, frame: &Frame) -> Result<(), Refused> {
        let name = required(frame, "transaction")?;
        let most = self.limits.transactions;
        let session = self.session(id);
        if session.transactions.contains_key(name) {
            return Err(Refused::TransactionExists(name.into()));
        }
        limit(
            "transactions of a connection",
            session.transactions.len() + 1,
            most,
        )?;
        session
            .transactions
            .insert(name.into(), Transaction::default());
        Ok(())
    }

    fn commit(&mut self, id: ConnectionId, frame: &Frame) -> Result<(), Refused> {
        let name = required(frame, "transaction")?;
        let transaction = self
            .session(id)
            .transactions
            .remove(name)
            .ok_or_else(|| Refused::NoTransaction(name.into()))?;
        self.check_room(transaction.steps.iter().filter_map(|step| match step {
            Step::Send(draft) => Some(draft),
            _ => None,
        }))?;
        for step in transaction.steps {
            match step {
                Step::Send(draft) => self.publish(draft),
                Step::Ack { slot, tags } => self.settle(id, slot, &tags, false),
                Step::Nack { slot, tags } => self.settle(id, slot, &tags, true),
            }
        }
        Ok(())
    }

    /// What was acknowledged in the transaction stays with the client, which can acknowledge it again.
    fn abort(&mut self, id: ConnectionId, frame: &Frame) -> Result<(), Refused> {
        let name = required(frame, "transaction")?;
        let session = self.session(id);
        let transaction = session
            .transactions
            .remove(name)
            .ok_or_else(|| Refused::NoTransaction(name.into()))?;
        for step in transaction.steps {
            let (Step::Ack { slot, tags } | Step::Nack { slot, tags }) = step else {
                continue;
            };
            if let Some(subscription) = session.subscriptions.get_mut(&slot) {
                for tag in tags {
                    if let Some(pending) = subscription.pending.get_mut(&tag) {
                        pending.in_transaction = false;
                    }
                }
            }
        }
        Ok(())
    }

    // Delivery

    /// Delivers what can be delivered.
    fn pump(&mut self) {
        while let Some(queue) = self.restless.pop() {
            self.deliver(queue);
        }
    }

    fn deliver(&mut self, id: QueueId) {
        while let Some(queue) = self.queues.get_mut(&id)
            && queue.has_ready()
        {
            let Some(consumer) = queue.available.pop_front() else {
                break;
            };
            let Some(session) = self.sessions.get_mut(&consumer.connection) else {
                continue;
            };
            let Some(subscription) = session.subscriptions.get_mut(&consumer.slot) else {
                continue;
            };
            let starved = session.unsent_bytes >= self.limits.outgoing_bytes;
            session.starved |= starved;
            if starved || subscription.is_full() {
                // It stands in line again when it has written or acknowledged something.
                subscription.available = false;
                continue;
            }
            let Some(item) = queue.pop() else { break };
            queue.available.push_back(consumer);
            let tag = subscription.next_tag;
            subscription.next_tag += 1;
            session.unsent_bytes += item.message.bytes();
            let automatic = subscription.mode == AckMode::Auto;
            self.effects.push(Effect::Message {
                to: consumer.connection,
                version: session.version,
                delivery: Delivery {
                    subscription: match &subscription.key {
                        Key::Id(id) => Some(id.clone()),
                        Key::Destination(_) => None,
                    },
                    ack: (!automatic).then_some(AckId {
                        slot: consumer.slot,
                        tag,
                    }),
                    redelivered: item.redelivered,
                    message: item.message.clone(),
                },
            });
            if automatic {
                self.settle_item(id, &item.message);
            } else {
                subscription.pending.insert(
                    tag,
                    Pending {
                        item,
                        in_transaction: false,
                    },
                );
            }
        }
        self.drop_if_slow(id);
        self.forget_if_unused(id);
    }

    /// Ends a subscriber of a topic for whom too much waits.
    fn drop_if_slow(&mut self, id: QueueId) {
        let Some(queue) = self.queues.get(&id).filter(|queue| queue.private) else {
            return;
        };
        let limits = &self.limits;
        let (limit, unit) = if queue.messages > limits.topic_messages {
            (limits.topic_messages, "messages")
        } else if queue.bytes > limits.topic_bytes && queue.messages > 1 {
            (limits.topic_bytes, "bytes")
        } else {
            return;
        };
        let refused = Refused::Slow {
            destination: queue.name.to_string(),
            limit,
            unit,
        };
        let owns = |session: &Session| session.subscriptions.values().any(|s| s.queue == id);
        let owner = self.sessions.iter().find(|(_, s)| owns(s)).map(|(c, _)| *c);
        if let Some(owner) = owner {
            self.error(owner, refused, None);
        }
    }
}

fn required<'a>(frame: &'a Frame, name: &'static str) -> Result<&'a str, Refused> {
    frame
        .headers
        .get(name)
        .ok_or(Refused::Missing(frame.command, name))
}

fn limit(what: &'static str, wanted: usize, limit: usize) -> Result<(), Refused> {
    match wanted > limit {
        true => Err(Refused::Limit { what, limit }),
        false => Ok(()),
    }
}

fn allowed(patterns: &[Pattern], action: &'static str, name: &str) -> Result<(), Refused> {
    match patterns.iter().any(|pattern| pattern.matches(name)) {
        true => Ok(()),
        false => Err(Refused::Access {
            action,
            destination: name.into(),
        }),
    }
}

/// The transaction with this name, if there is room for a step in it.
fn step_of<'a>(
    session: &'a mut Session,
    name: &str,
    limits: &Limits,
) -> Result<&'a mut Transaction, Refused> {
    let transaction = session
        .transactions
        .get_mut(name)
        .ok_or_else(|| Refused::NoTransaction(name.into()))?;
    limit(
        "frames of a transaction",
        transaction.steps.len() + 1,
        limits.transaction_frames,
    )?;
    Ok(transaction)
}

/// How many messages a subscriber wants at a time; RabbitMQ's header and ActiveMQ's are understood, 0 means many.
fn prefetch(headers: &Headers, limits: &Limits) -> Result<usize, Refused> {
    for name in ["prefetch-count", "activemq.prefetchSize"] {
        let Some(text) = headers.get(name) else {
            continue;
        };
        let number: usize = text.trim().parse().map_err(|_| Refused::BadHeader {
            name,
            value: text.into(),
            expected: "a number of messages",
        })?;
        return Ok(match number {
            0 => limits.prefetch_max,
            number => number.min(limits.prefetch_max),
        });
    }
    Ok(limits.prefetch)
}

/// The headers of a message: of repeated ones the first, without those that are the broker's.
fn passed_on(headers: &Headers) -> Headers {
    let mut passed = Headers::new();
    for (name, value) in headers.iter() {
        if !NOT_PASSED_ON.contains(&name) && passed.get(name).is_none() {
            passed.push(name, value);
        }
    }
    passed.shrink();
    passed
}

/// Which deliveries an ACK or NACK is about.
fn target(session: &Session, frame: &Frame) -> Result<Target, Refused> {
    if session.version == Version::V1_2 {
        let text = required(frame, "id")?;
        let unknown = || Refused::NoDelivery(text.into());
        let AckId { slot, tag } = AckId::parse(text).ok_or_else(unknown)?;
        let Some(subscription) = session.subscriptions.get(&slot) else {
            // One that has ended gave its messages back; the client may not have known.
            return match (1..session.next_slot).contains(&slot) {
                true => Ok(Target::Settled),
                false => Err(unknown()),
            };
        };
        return deliveries(slot, subscription, tag, unknown);
    }
    let text = required(frame, "message-id")?;
    let unknown = || Refused::NoDelivery(text.into());
    let message: u64 = text.parse().map_err(|_| unknown())?;
    let within = match frame.headers.get("subscription") {
        Some(id) => Some(session.keys.get(&Key::Id(id.into())).ok_or_else(unknown)?),
        None if session.version == Version::V1_1 => {
            return Err(Refused::Missing(frame.command, "subscription"));
        }
        None => None,
    };
    let candidates = || {
        let all = session.subscriptions.iter();
        all.filter(move |(slot, _)| within.is_none_or(|only| only == *slot))
    };
    for (&slot, subscription) in candidates() {
        let is_it = |(_, p): &(&u64, &Pending)| p.item.message.id == message && !p.in_transaction;
        if let Some((&tag, _)) = subscription.pending.iter().find(is_it) {
            return deliveries(slot, subscription, tag, unknown);
        }
    }
    let settled =
        |(_, s): (&u64, &Subscription)| s.mode == AckMode::Client && message <= s.acknowledged;
    match candidates().any(settled) {
        true => Ok(Target::Settled),
        false => Err(unknown()),
    }
}

/// The delivery, and in mode `client` those before it.
fn deliveries(
    slot: u64,
    subscription: &Subscription,
    tag: u64,
    unknown: impl Fn() -> Refused,
) -> Result<Target, Refused> {
    let free = |p: &Pending| !p.in_transaction;
    if !(1..subscription.next_tag).contains(&tag) {
        return Err(unknown());
    }
    match subscription.mode {
        AckMode::Auto => Err(unknown()),
        AckMode::ClientIndividual => match subscription.pending.get(&tag).is_some_and(free) {
            true => Ok(Target::Deliveries(slot, vec![tag])),
            false => Err(unknown()),
        },
        // One that was covered by a later one is settled, and to say so again does no harm.
        AckMode::Client => {
            let up_to = subscription.pending.range(..=tag);
            let tags: Vec<u64> = up_to.filter(|(_, p)| free(p)).map(|(t, _)| *t).collect();
            match tags.is_empty() {
                true => Ok(Target::Settled),
                false => Ok(Target::Deliveries(slot, tags)),
            }
        }
    }
}
