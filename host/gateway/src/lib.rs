//! The way out of one QEMU guest's network card: what of the world beyond the guests' own network it may reach, by rule
//! ([`rules`]), and how it does without any privilege of the host's.
//!
//! `vswitch` hands over the packets that a guest sends to its router, one a message, and takes those for the guest back.
//! Here the guest's TCP ends ([`tcp`]), as does its UDP ([`udp`]), and sockets of the host go on in their place. So nothing
//! that a guest makes of packets reaches a network, and the host's kernel needs neither routes nor forwarding.
//!
//! Each card has a process of its own, in a cage ([`confine`]): one that its guest crashes or takes over has that guest's
//! connections and nothing else. It ends with the card.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod confine;
pub mod gateway;
pub mod packet;
pub mod policy;
pub mod rules;

mod own;
mod tcp;
mod udp;

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

/// What the program is told, as JSON in its one argument. Its standard input is the connection to `vswitch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The guest's router, of whose network (64 bits) nothing is reached this way. It stands for the host's loopback.
    pub router: Ipv6Addr,
    /// What may be reached.
    pub outbound: rules::Outbound,
    /// The user and group to become, which needs root; `None`: stay who it is.
    pub uid: Option<u32>,
}
