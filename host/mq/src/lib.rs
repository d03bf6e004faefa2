//! STOMP 1.0, 1.1 and 1.2: codec, client, and a message broker to embed.
//!
//! [`decode`] and [`encode`](frame::Frame::encode) are the codec, without I/O; [`broker`] is the broker as a state machine,
//! without I/O and clock; [`server`] puts it on a socket, one thread for all connections; [`client`] speaks to any broker.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod access;
pub mod broker;
pub mod client;
pub mod config;
mod connection;
pub mod decode;
pub mod destination;
mod encode;
pub mod frame;
pub mod handshake;
mod ids;
pub mod limits;
pub mod message;
mod outbox;
mod queue;
pub mod refused;
pub mod server;
pub mod session;
mod store;
pub mod tls;
pub mod uri;
