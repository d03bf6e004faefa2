//! The way to the channel.

use std::sync::Arc;

use xbee_kecho::{EventError, EventType, Submission, Value};

use super::Kecho;
use crate::host::Host;

/// Why this host is not on the channel.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It cannot be, yet.
    #[error(
        "this xbed has no event channels yet, and cannot be on {channel:?} at {registry}: leave the table [kecho] out of its configuration"
    )]
    NotYet {
        /// The channel that was asked for.
        channel: String,
        /// Its registry.
        registry: String,
    },
}

/// A channel: none, so far.
pub enum Talk {}

impl Talk {
    /// Says something to the others.
    ///
    /// # Errors
    /// It is no event.
    pub fn say(
        &self,
        kind: &EventType,
        attribute: (&'static str, Value),
        payload: &[u8],
    ) -> Result<(), EventError> {
        let attributes = &[attribute];
        let event = Submission {
            kind,
            attributes,
            payload,
        };
        event.size()?;
        match *self {}
    }
}

/// Has this host take part.
///
/// # Errors
/// [`StartError`].
pub fn start(_: &Arc<Host>, config: Kecho) -> Result<(), StartError> {
    Err(StartError::NotYet {
        channel: config.channel,
        registry: config.registry,
    })
}
