//! A queue: messages in the order of their acceptance, and who takes them.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::broker::ConnectionId;
use crate::message::Message;

/// A message in a queue or with a consumer.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub(crate) message: Arc<Message>,
    /// How often a consumer has sent it back.
    pub(crate) nacks: u32,
    pub(crate) redelivered: bool,
}

/// A subscription, seen from its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Consumer {
    pub(crate) connection: ConnectionId,
    pub(crate) slot: u64,
}

/// A queue, or what waits for one subscriber of a topic.
#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) name: Arc<str>,
    /// Of a topic: goes with its subscription.
    pub(crate) private: bool,
    /// By number.
    ready: VecDeque<Item>,
    /// Messages, those that consumers have among them.
    pub(crate) messages: usize,
    /// Their bytes.
    pub(crate) bytes: usize,
    pub(crate) consumers: usize,
    /// Consumers whose turn it is next; those that cannot take anything are not among them.
    pub(crate) available: VecDeque<Consumer>,
}

impl Queue {
    pub(crate) fn new(name: Arc<str>, private: bool) -> Queue {
        Queue {
            name,
            private,
            ready: VecDeque::new(),
            messages: 0,
            bytes: 0,
            consumers: 0,
            available: VecDeque::new(),
        }
    }

    /// Takes a message that is newer than all others.
    pub(crate) fn push(&mut self, item: Item) {
        self.messages += 1;
        self.bytes += item.message.bytes();
        self.ready.push_back(item);
    }

    /// The oldest message that no consumer has. It still counts until it is settled.
    pub(crate) fn pop(&mut self) -> Option<Item> {
        let item = self.ready.pop_front();
        // A queue that was long once does not keep the memory.
        if self.ready.is_empty() && self.ready.capacity() > 1024 {
            self.ready = VecDeque::new();
        }
        item
    }

    /// Takes a message back to where it was. Of several the newest first, which is quicker.
    pub(crate) fn put_back(&mut self, item: Item) {
        let id = item.message.id;
        let at = self.ready.partition_point(|other| other.message.id < id);
        self.ready.insert(at, item);
    }

    /// A message that was taken out is no more.
    pub(crate) fn settle(&mut self, message: &Message) {
        self.messages -= 1;
        self.bytes -= message.bytes();
    }

    pub(crate) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// All messages that no consumer has.
    pub(crate) fn into_ready(self) -> VecDeque<Item> {
        self.ready
    }
}
