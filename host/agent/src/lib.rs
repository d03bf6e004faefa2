//! The host's side of the agent protocol.
//!
//! [`Agent::connect`] takes the stream of an agent that has dialled, authenticates both sides and
//! gives a handle for requests and a receiver of [`Event`]s. The handle is cheap to clone; the
//! connection closes when the last clone is dropped.
//!
//! The guest is hostile: whatever breaks the protocol (unknown streams, more data than the window
//! allows, gaps in the output) closes the connection with [`Error::Protocol`]. Memory held for a
//! guest is bounded by the windows of the protocol, however slowly its data are consumed.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod client;
mod connection;
mod error;
mod event;
mod file;
mod framed;
mod handshake;
mod process;
mod state;
mod stream;

pub use client::Agent;
pub use error::{CONNECTION_CODES, Error};
pub use event::{Event, Resume};
pub use file::FileMeta;
pub use framed::{FrameReader, FrameWriter};
pub use process::{ExecSpec, Process};
pub use stream::{StreamReader, StreamWriter, Tunnel};
pub use xbee_protocol as protocol;
