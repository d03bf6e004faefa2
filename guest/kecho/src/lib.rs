//! Event channels between guests and hosts: publish and subscribe, with filters at the source.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod address;
mod attach;
pub mod balance;
mod channel;
mod control;
mod error;
pub mod event;
pub mod filter;
mod log;
mod lookup;
mod membership;
mod memory;
mod message;
mod node;
pub mod registry;
mod sink;
mod socket;
mod source;
mod stream;
mod tls;
pub mod types;
pub mod value;
mod wire;

pub use address::{Address, AddressError, NodeAddress};
pub use channel::{Channel, ChannelOptions};
pub use error::Error;
pub use event::{EventError, EventRef, Submission};
pub use filter::{FilterError, SinkFilter, State};
#[doc(hidden)]
pub use message::probe;
pub use node::{Config, Node, Transports};
pub use registry::{Registry, RegistryConfig};
pub use sink::{Batch, Event, InFilter, Sink, SinkCounters, SinkOptions};
pub use source::{
    Flush, OutFilter, Policy, SinkSet, SinkView, Source, SourceCounters, SubmitError, TypeSelector,
};
pub use tls::TlsFiles;
pub use types::{EventType, FieldKind, TypeError};
pub use value::Value;
