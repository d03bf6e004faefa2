//! The wire protocol between the host manager and the agent in a domain.
//!
//! One connection, opened by the agent, carries [frames](frame) of CBOR (RFC 8949): a
//! [`GuestMessage`] or a [`HostMessage`] each. The handshake is
//!
//! ```text
//! agent                                   host
//!   GuestHello { generation, nonce } ->
//!                                      <- HostHello { generation, nonce, proof }
//!   GuestProof { proof, info }       ->
//!                                      <- Welcome { resume }
//! ```
//!
//! Both sides prove that they know the secret of this boot ([`proof`]); it never crosses the wire.
//! Afterwards the host asks ([`Request`], [`Reply`]), the agent tells of the task
//! ([`TaskEvent`]), and byte [streams](StreamBody) with a window each run beside one another.
//!
//! A stream is opened by the host in a request that names an id it has not used before on this
//! connection. It ends for both sides with the agent's final word on it: `End` or `Reset` on a
//! stream that carries data from the agent, the reply where it does not (`PutFile`).
//!
//! This crate does no I/O and knows no clock. Everything it decodes is hostile: sizes are bounded
//! by [`MAX_FRAME_BYTES`], and no input makes it panic.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod boot;
pub mod code;
pub mod frame;
mod message;
pub mod proof;
mod text;
mod wire;

pub use boot::{BootConfig, Network, Transport};
pub use frame::{FrameBuffer, FrameError, decode, encode_frame};
pub use message::*;
pub use proof::Secret;
pub use text::sanitise;
pub use uuid::Uuid;

/// The newest generation of the protocol that this crate speaks.
pub const GENERATION: u16 = 1;

/// The vsock port on the host (context 2) that the agent dials.
pub const AGENT_VSOCK_PORT: u32 = 22594;

/// Where the agent finds its [`BootConfig`] in the initial RAM file system.
pub const BOOT_CONFIG_PATH: &str = "/xbee/boot";

/// The longest body of a frame, in bytes. Room for [`MAX_DATA_BYTES`] and what surrounds them.
pub const MAX_FRAME_BYTES: usize = 128 * 1024 + 4096;

/// The most payload in one data or output message, in bytes.
pub const MAX_DATA_BYTES: usize = 64 * 1024;

/// What each side may send on a stream beyond what the other has granted, in bytes.
pub const STREAM_WINDOW_BYTES: u32 = 256 * 1024;

/// Unacknowledged output that the agent keeps for each of a task's two output streams, in bytes.
/// When it is full, the task's pipe is no longer read.
pub const OUTPUT_WINDOW_BYTES: u64 = 1024 * 1024;

/// Streams open at a time on one connection.
pub const MAX_STREAMS: usize = 512;

/// Conversations (tasks) that an agent remembers.
pub const MAX_CONVERSATIONS: usize = 64;

/// Requests without a reply on one connection.
pub const MAX_REQUESTS: usize = 1024;

/// Both sides send a heartbeat at this interval, in milliseconds.
pub const HEARTBEAT_INTERVAL_MS: u64 = 1_000;

/// A side that hears nothing for this long takes the connection for lost, in milliseconds.
/// Emulated guests on a loaded host are slow.
pub const SILENCE_LIMIT_MS: u64 = 10_000;

/// First pause before the agent dials again, in milliseconds; it doubles up to [`REDIAL_MAX_MS`].
pub const REDIAL_MIN_MS: u64 = 10;

/// Longest pause before the agent dials again, in milliseconds.
pub const REDIAL_MAX_MS: u64 = 1_000;
