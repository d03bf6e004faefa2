//! Event channels between guests and hosts: publish and subscribe, with filters at the source.
//!
//! ```
//! use xbee_kecho::{ChannelOptions, Config, EventType, FieldKind, Node, SinkOptions, Submission, Value};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let node = Node::start(Config::default())?;
//! let channel = node.create("load", ChannelOptions::default())?;
//! // The filter runs where the events are submitted: what it does not want goes nowhere.
//! let sink = channel.sink(SinkOptions {
//!     filter: Some("cpu < 0.5 && @host != \"a\"".to_owned()),
//!     ..SinkOptions::default()
//! })?;
//! let source = channel.source()?;
//! let load = EventType::new("load", 1, [("cpu", FieldKind::F64)])?;
//! for (host, cpu) in [("a", 0.1), ("b", 0.9), ("c", 0.2)] {
//!     source.submit(&Submission {
//!         kind: &load,
//!         attributes: &[("host", Value::from(host))],
//!         payload: &load.payload(&[Value::from(cpu)])?,
//!     })?;
//! }
//! let event = sink.receive()?;
//! assert_eq!(event.get().attribute("host"), Some(Value::from("c").borrow()));
//! # Ok(())
//! # }
//! ```
//!
//! Members of a channel in other processes find it by its name at a registry ([`Config::registry`],
//! `kechod registry`), or at another member ([`Node::open_at`]). Events go from each source to each
//! sink directly, by the shortest way there is.
//!
//! ```no_run
//! use xbee_kecho::{ChannelOptions, Config, Node, SinkOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let node = Node::start(Config {
//!     registry: Some("tcp:[::1]:7400".parse()?),
//!     ..Config::default()
//! })?;
//! // Whoever comes first creates it.
//! let channel = node.open_or_create("load", ChannelOptions::default())?;
//! let callback = channel.sink(SinkOptions::default())?.on_event(|event| {
//!     println!("{:?}", event.attribute("host"));
//! })?;
//! // Until the channel is destroyed.
//! eprintln!("{}", callback.wait());
//! # Ok(())
//! # }
//! ```
//!
//! # Threads
//!
//! A node has a thread of its own, and one more for sinks over sockets. What is called here blocks its caller, without
//! need of any runtime; in a task of one, what may wait (all but [`Source::try_submit`] and [`Sink::poll`]) belongs into
//! its `spawn_blocking`. Filters in the process and callbacks say what they must not wait for: [`OutFilter`],
//! [`InFilter`], [`Sink::on_event`].
//!
//! # Who is let in
//!
//! Over unix sockets, and so to shared memory: processes of the same user, and root's. Over vsock: guests of one owner.
//! Over TCP within the machine: all its users, unless [`Config::strict`]; from elsewhere who has a certificate of
//! [`Config::tls`]'s authority. Whoever is let in can submit, listen, and destroy channels.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod address;
mod attach;
pub mod balance;
mod callback;
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
mod reach;
pub mod registry;
mod runtime;
mod sink;
mod socket;
mod source;
mod status;
mod stream;
mod tls;
mod transports;
pub mod types;
pub mod value;
mod wire;

pub use address::{Address, AddressError, NodeAddress};
pub use callback::Callback;
pub use channel::{Channel, ChannelOptions};
pub use error::Error;
pub use event::{EventError, EventRef, Submission};
pub use filter::{FilterError, SinkFilter, State};
pub use message::is_channel_name;
#[doc(hidden)]
pub use message::probe;
pub use node::{Config, Node};
pub use registry::{Registry, RegistryConfig};
pub use sink::{Batch, Event, InFilter, Sink, SinkCounters, SinkOptions};
pub use source::{
    Flush, OutFilter, Policy, SinkSet, SinkView, Source, SourceCounters, SubmitError, TypeSelector,
    Way,
};
pub use status::{NodeStatus, SourceStatus, Status};
pub use tls::TlsFiles;
pub use transports::Transports;
pub use types::{EventType, FieldKind, TypeError};
pub use value::Value;
