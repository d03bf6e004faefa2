//! Event channels between guests and hosts: publish and subscribe, with filters at the source.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod balance;
pub mod event;
pub mod filter;
mod log;
mod memory;
pub mod types;
pub mod value;
mod wire;

pub use event::{EventError, EventRef, Submission};
pub use filter::{FilterError, SinkFilter, State};
pub use types::{EventType, FieldKind, TypeError};
pub use value::Value;
