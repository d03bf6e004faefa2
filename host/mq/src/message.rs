//! Messages and their delivery.

use std::sync::Arc;

use bytes::Bytes;

use crate::encode;
use crate::frame::{Command, Headers, Version};

/// What the broker keeps for a message beside its text, in bytes; an estimate, so that empty messages count too.
pub(crate) const OVERHEAD_BYTES: usize = 192;

/// A message that a client has sent. It never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Number; greater than those of all messages that were accepted before it.
    pub id: u64,
    /// Where it was sent to.
    pub destination: Arc<str>,
    /// The sender's headers, without those that the broker sets.
    pub headers: Headers,
    /// The body.
    pub body: Bytes,
    /// Whether it is on the disk, or on its way to it.
    pub stored: bool,
}

impl Message {
    /// What it counts for in the limits, in bytes.
    pub fn bytes(&self) -> usize {
        self.body.len() + self.headers.bytes() + self.destination.len() + OVERHEAD_BYTES
    }
}

/// What an ACK or NACK refers to: a delivery of a subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AckId {
    /// Number of the subscription within its connection.
    pub slot: u64,
    /// Number of the delivery within its subscription.
    pub tag: u64,
}

impl AckId {
    /// Reads the value of an `ack` header.
    pub fn parse(text: &str) -> Option<AckId> {
        let (slot, tag) = text.split_once('-')?;
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| text.parse().ok()).flatten()
        };
        Some(AckId {
            slot: number(slot)?,
            tag: number(tag)?,
        })
    }
}

/// A message on its way to a subscriber.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// The subscription's `id`; clients of 1.0 may have given none.
    pub subscription: Option<Arc<str>>,
    /// What the client acknowledges it by, if it is to.
    pub ack: Option<AckId>,
    /// It may have been delivered before.
    pub redelivered: bool,
    /// The message.
    pub message: Arc<Message>,
}

impl Delivery {
    /// Appends the MESSAGE frame.
    pub fn encode(&self, version: Version, out: &mut Vec<u8>) {
        let message = &*self.message;
        out.reserve(message.bytes() + 64);
        encode::command(out, Command::Message);
        let mut header = |name, value| encode::header(out, Some(version), name, value);
        // The first of repeated headers counts, so ours come first.
        if let Some(subscription) = &self.subscription {
            header("subscription", subscription);
        }
        header("destination", &message.destination);
        if self.redelivered {
            header("redelivered", "true");
        }
        encode::number(out, "message-id", message.id);
        if let (Some(ack), Version::V1_2) = (self.ack, version) {
            out.extend_from_slice(b"ack:");
            encode::digits(out, ack.slot);
            out.push(b'-');
            encode::digits(out, ack.tag);
            out.push(b'\n');
        }
        encode::number(out, "content-length", message.body.len() as u64);
        for (name, value) in message.headers.iter() {
            encode::header(out, Some(version), name, value);
        }
        encode::body(out, &message.body);
    }
}
