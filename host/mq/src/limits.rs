//! How much the broker takes. Every limit can be set in the table `[limits]` of its configuration.

use serde::Deserialize;

use crate::decode::FrameLimits;

/// The broker's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// Connections at a time.
    pub connections: usize,
    /// Time from a connection to the end of its CONNECT, TLS included, in seconds.
    pub connect_timeout_s: u64,
    /// Time that a frame may take from its first byte to its last, in seconds.
    pub frame_timeout_s: u64,
    /// Time that a client may take nothing of what is to be written to it, in seconds.
    pub write_timeout_s: u64,
    /// Headers of a frame.
    pub frame_headers: usize,
    /// Bytes of a header line.
    pub header_line_bytes: usize,
    /// Bytes of a frame's header lines together.
    pub frame_header_bytes: usize,
    /// Bytes of a frame's body.
    pub body_bytes: usize,
    /// Bytes of a destination's name.
    pub destination_bytes: usize,
    /// Subscriptions of a connection.
    pub subscriptions: usize,
    /// Messages that a subscription with acknowledgement has at a time, unless it says otherwise.
    pub prefetch: usize,
    /// The same, whatever it says.
    pub prefetch_max: usize,
    /// Transactions of a connection at a time.
    pub transactions: usize,
    /// Frames of a transaction.
    pub transaction_frames: usize,
    /// Bytes of the messages of a connection's transactions.
    pub transaction_bytes: usize,
    /// Queues that have a message or a consumer.
    pub queues: usize,
    /// Messages of a queue, those that a consumer has among them.
    pub queue_messages: usize,
    /// Bytes of a queue's messages.
    pub queue_bytes: usize,
    /// Bytes of all messages.
    pub total_bytes: usize,
    /// Messages that wait for a slow subscriber of a topic.
    pub topic_messages: usize,
    /// Bytes of them.
    pub topic_bytes: usize,
    /// Bytes of persistent messages that wait to be written to the disk.
    pub unstored_bytes: usize,
    /// Bytes that wait to be written to a client, before its subscriptions get no more messages.
    pub outgoing_bytes: usize,
    /// Times that a message is delivered again after a NACK, before it goes to the dead-letter queue.
    pub redeliveries: u32,
    /// Shortest time between heart-beats that is agreed to, in milliseconds.
    pub heart_beat_min_ms: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        let frame = FrameLimits::default();
        Limits {
            connections: 1024,
            connect_timeout_s: 10,
            frame_timeout_s: 60,
            write_timeout_s: 60,
            frame_headers: frame.headers,
            header_line_bytes: frame.header_line_bytes,
            frame_header_bytes: frame.header_bytes,
            body_bytes: frame.body_bytes,
            destination_bytes: 255,
            subscriptions: 256,
            prefetch: 1000,
            prefetch_max: 65_536,
            transactions: 64,
            transaction_frames: 10_000,
            transaction_bytes: 64 << 20,
            queues: 10_000,
            queue_messages: 1_000_000,
            queue_bytes: 256 << 20,
            total_bytes: 1 << 30,
            topic_messages: 10_000,
            topic_bytes: 16 << 20,
            unstored_bytes: 64 << 20,
            outgoing_bytes: 128 * 1024,
            redeliveries: 5,
            heart_beat_min_ms: 100,
        }
    }
}

impl Limits {
    /// Those of a frame.
    pub fn frame(&self) -> FrameLimits {
        FrameLimits {
            headers: self.frame_headers,
            header_line_bytes: self.header_line_bytes,
            header_bytes: self.frame_header_bytes,
            body_bytes: self.body_bytes,
        }
    }
}
