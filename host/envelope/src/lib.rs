//! XenBEE's XML messages. The only crate that knows their XML.
//!
//! A [`Message`] is what client and daemon say to each other over a broker; [`seal`] protects it on the way, [`trust`]
//! says whom to believe, [`pki`] makes the certificates. [`activity_status`] is a task in the words of OGSA-BES 1.0 (GFD.108).
#![cfg_attr(test, allow(clippy::unwrap_used))]

#[cfg(test)]
mod hostile;
mod message;
pub mod pki;
pub mod seal;
mod status;
pub mod trust;
mod xml;

pub use message::{
    Body, CacheEntry, Error as MessageError, Fault, Header, MAX_MESSAGE_BYTES, Message, Millis,
    TaskState,
};
pub use status::activity_status;

/// Namespace of a message, its header and its body.
pub const MSG: &str = "http://www.xenbee.net/schema/2008/02/xbe-msg";
/// Namespace of OGSA-BES 1.0 (GFD.108).
pub const BES: &str = "http://schemas.ggf.org/bes/2006/08/bes-factory";
/// Namespace of what XenBEE adds.
pub const XBE: &str = "http://www.xenbee.net/schema/2008/02/xbe";
