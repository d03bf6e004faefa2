//! iceoryx2: shared memory. A subscriber sleeps until a notification of the service's events, or polls.

use std::time::{Duration, Instant};

use iceoryx2::config::Config;
use iceoryx2::port::listener::Listener;
use iceoryx2::port::notifier::Notifier;
use iceoryx2::port::publisher::Publisher as Port;
use iceoryx2::port::subscriber::Subscriber as Slot;
use iceoryx2::prelude::*;
use iceoryx2::service::port_factory::{event, publish_subscribe};

use crate::report::SCRATCH;
use crate::system::{Place, Publisher, Result, Subscriber, System, crate_version};

/// Subscribers of a service at most.
const SUBSCRIBERS: usize = 66;
/// Events that a subscriber may be behind; then the publisher waits.
const BUFFER: usize = 1024;
/// Events between notifications when many are pushed.
const BATCH: usize = 64;
/// Bytes of an event at most.
const EVENT_BYTES: usize = 1024;

pub enum Iceoryx {
    Events,
    Polling,
}

type Topic = publish_subscribe::PortFactory<ipc::Service, [u8], ()>;
type Wake = event::PortFactory<ipc::Service>;

impl System for Iceoryx {
    fn name(&self) -> &'static str {
        match self {
            Iceoryx::Events => "iceoryx2",
            Iceoryx::Polling => "iceoryx2, polling",
        }
    }

    fn version(&self) -> Result<String> {
        crate_version("iceoryx2")
    }

    fn polls(&self) -> bool {
        matches!(self, Iceoryx::Polling)
    }

    fn publisher(&self, place: &Place, _subscribers: usize) -> Result<Box<dyn Publisher>> {
        let (node, topic, wake) = open(place)?;
        let port = topic
            .publisher_builder()
            .initial_max_slice_len(EVENT_BYTES)
            .backpressure_strategy(BackpressureStrategy::RetryUntilDelivered)
            .create()?;
        let notifier = match self {
            Iceoryx::Events => Some(wake.notifier_builder().create()?),
            Iceoryx::Polling => None,
        };
        Ok(Box::new(Sending {
            port,
            notifier,
            pushed: 0,
            _services: (node, topic, wake),
        }))
    }

    fn subscriber(&self, place: &Place) -> Result<Box<dyn Subscriber>> {
        let (node, topic, wake) = open(place)?;
        let listener = match self {
            Iceoryx::Events => Some(wake.listener_builder().create()?),
            Iceoryx::Polling => None,
        };
        let slot = topic.subscriber_builder().buffer_size(BUFFER).create()?;
        Ok(Box::new(Receiving {
            slot,
            listener,
            _services: (node, topic, wake),
        }))
    }
}

fn open(place: &Place) -> Result<(Node<ipc::Service>, Topic, Wake)> {
    set_log_level(LogLevel::Error);
    let mut config = Config::default();
    let root = place.directory.join("iceoryx2");
    let root = Path::new(root.as_os_str().as_encoded_bytes())
        .map_err(|error| format!("a path for iceoryx2: {error:?}"))?;
    config.global.set_root_path(&root);
    // What it leaves in /dev/shm has the name of the scratch directory, and goes with that.
    let names = place.directory.components();
    let scratch = names
        .filter_map(|name| name.as_os_str().to_str())
        .find(|name| name.starts_with(SCRATCH))
        .unwrap_or(SCRATCH);
    config.global.prefix = FileName::new(format!("{scratch}-").as_bytes())
        .map_err(|error| format!("a prefix for iceoryx2: {error:?}"))?;
    let node = NodeBuilder::new()
        .config(&config)
        .create::<ipc::Service>()?;
    let name = ServiceName::new(&place.topic)?;
    let topic = node
        .service_builder(&name)
        .publish_subscribe::<[u8]>()
        .enable_safe_overflow(false)
        .subscriber_max_buffer_size(BUFFER)
        .max_subscribers(SUBSCRIBERS)
        .max_publishers(1)
        .max_nodes(2 * SUBSCRIBERS)
        .open_or_create()?;
    let wake = node
        .service_builder(&name)
        .event()
        .max_listeners(SUBSCRIBERS)
        .max_notifiers(1)
        .max_nodes(2 * SUBSCRIBERS)
        .open_or_create()?;
    Ok((node, topic, wake))
}

struct Sending {
    port: Port<ipc::Service, [u8], ()>,
    notifier: Option<Notifier<ipc::Service>>,
    pushed: usize,
    _services: (Node<ipc::Service>, Topic, Wake),
}

impl Publisher for Sending {
    fn send(&mut self, event: &[u8]) -> Result<()> {
        let sample = self.port.loan_slice_uninit(event.len())?;
        sample.write_from_slice(event).send()?;
        self.flush()
    }

    fn push(&mut self, event: &[u8]) -> Result<()> {
        let sample = self.port.loan_slice_uninit(event.len())?;
        sample.write_from_slice(event).send()?;
        self.pushed += 1;
        if self.pushed == BATCH {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.pushed = 0;
        if let Some(notifier) = &self.notifier {
            notifier.notify()?;
        }
        Ok(())
    }
}

struct Receiving {
    slot: Slot<ipc::Service, [u8], ()>,
    listener: Option<Listener<ipc::Service>>,
    _services: (Node<ipc::Service>, Topic, Wake),
}

impl Subscriber for Receiving {
    fn receive(
        &mut self,
        patience: Option<Duration>,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<usize> {
        let until = patience.map(|patience| Instant::now() + patience);
        loop {
            if let Some(sample) = self.slot.receive()? {
                take(sample.payload())?;
                return Ok(1);
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(0);
            }
            match (&self.listener, left) {
                (Some(listener), None) => listener.blocking_wait(|_| {})?,
                (Some(listener), Some(left)) => listener.timed_wait(|_| {}, left)?,
                (None, _) => {
                    std::hint::spin_loop();
                    0
                }
            };
        }
    }
}
