//! The switch for QEMU guests: of their vsock streams, as a vhost-user back end (virtio 1.2, section 5.10),
//! and of their Ethernet ([`ether`]).
//!
//! One process serves every domain of a host. Each domain is a thread with a guest's two rings on
//! one side and unix sockets on the other:
//!
//! - a program of the host connects to the domain's socket `uds`, writes `CONNECT <port>\n`, reads
//!   `OK <port>\n` and then has a stream to that port of the guest;
//! - the guest connects to CID 2 and a port; the switch connects to the unix socket `<uds>_<port>`;
//! - the guest connects to another guest's CID, if both have the same owner;
//! - programs of the host's users reach their guests, and are reached, by [`programs`].
//!
//! [`control`] is how domains come and go at run time.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod chain;
pub mod conn;
pub mod control;
pub mod ether;
pub mod packet;
pub mod programs;
pub mod switch;

mod device;
mod link;
mod port;
mod socket;
