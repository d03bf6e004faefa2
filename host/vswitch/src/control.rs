//! The control socket: one JSON object a line each way.
//!
//! Requests are [`Request`]; answers are `{"ok":true,...}` or
//! `{"ok":false,"code":"...","message":"..."}`.

use serde::{Deserialize, Serialize};

use crate::ether::{CardSpec, UplinkSpec};
use crate::programs::ProgramsSpec;
use crate::switch::{DomainSpec, DomainStatus};

mod client;
mod server;

pub use client::{Client, ClientError};
pub use server::{Server, ServerError};

/// Longest line in bytes, either way; `list` answers of a full switch fit.
pub const LINE_MAX: usize = 1 << 20;

/// A request on the control socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Adds a domain. Answered when QEMU and programs of the host can connect.
    Add(DomainSpec),
    /// Removes a domain, cuts its connections and removes its sockets.
    Remove {
        /// Its context identifier.
        cid: u32,
    },
    /// Gives a domain a network card. Answered when the connection can be made that becomes QEMU's.
    AttachInterface(CardSpec),
    /// Takes a domain's network card away. One that is not there is fine.
    DetachInterface {
        /// The domain's context identifier.
        cid: u32,
        /// The card's hardware address.
        mac: [u8; 6],
    },
    /// Gives a domain's network card an uplink. Answered when the gateway's connection can be made.
    AttachUplink(UplinkSpec),
    /// Serves host programs at the socket that comes along as a descriptor: bound to its name, and not listening yet.
    ServePrograms(ProgramsSpec),
    /// Serves no host programs.
    EndPrograms,
    /// Shows all domains.
    List,
    /// Says the switch's version.
    Ping,
    /// Removes all domains and ends the process.
    Stop,
}

/// An answer on the control socket.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Response {
    /// The request was done.
    pub ok: bool,
    /// If not: a stable name of the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// If not: what a person should know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// To `ping`: the version of the program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// To `list`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domains: Option<Vec<DomainStatus>>,
}
