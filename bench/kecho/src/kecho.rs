//! Event channels of this repository: `guest/kecho`.

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use xbee_kecho::{
    Batch, Channel, ChannelOptions, Config, EventType, Node, Registry, RegistryConfig, Sink,
    SinkOptions, Source, Submission, Transports,
};

use crate::system::{Place, Publisher, Result, Subscriber, System, crate_version};

/// Events that a subscriber takes at once, at most.
const BATCH: usize = 256;

/// How the events go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kecho {
    /// Over TCP, although the other is on the same machine.
    Tcp,
    /// In memory that both share: what is chosen on one machine.
    Shared,
    /// The same, with a subscriber that never sleeps.
    Polling,
    /// Between two threads of a process.
    Process,
}

/// The registry's address, on 127.0.0.1 as all brokers.
fn registry(port: u16) -> String {
    format!("tcp:[::ffff:127.0.0.1]:{port}")
}

/// What `bench-kecho registry PORT` does.
pub fn serve(port: &str) -> Result<()> {
    let listen = vec![registry(port.parse()?).parse()?];
    let _registry = Registry::start(&RegistryConfig {
        listen,
        ..RegistryConfig::default()
    })?;
    loop {
        std::thread::park();
    }
}

impl Kecho {
    /// This process's node.
    fn node(self, place: &Place) -> Result<&'static Node> {
        static NODE: OnceLock<Node> = OnceLock::new();
        static STARTING: Mutex<()> = Mutex::new(());
        let _starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(node) = NODE.get() {
            return Ok(node);
        }
        let tcp = self == Kecho::Tcp;
        let node = Node::start(Config {
            registry: Some(registry(place.broker).parse()?),
            directory: Some(place.directory.join("kecho")),
            transports: Transports {
                same_process: self == Kecho::Process,
                shared_memory: !tcp,
                vsock: false,
                tcp,
            },
            ..Config::default()
        })?;
        Ok(NODE.get_or_init(|| node))
    }
}

impl System for Kecho {
    fn name(&self) -> &'static str {
        match self {
            Kecho::Tcp => "kecho, tcp",
            Kecho::Shared => "kecho, shared memory",
            Kecho::Polling => "kecho, polling",
            Kecho::Process => "kecho, one process",
        }
    }

    fn version(&self) -> Result<String> {
        crate_version("xbee-kecho")
    }

    fn broker(&self, port: u16, _directory: &Path) -> Result<Option<Command>> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["registry", &port.to_string()]);
        Ok(Some(command))
    }

    fn publisher(&self, place: &Place, _subscribers: usize) -> Result<Box<dyn Publisher>> {
        let channel = self
            .node(place)?
            .create(&place.topic, ChannelOptions::default())?;
        let source = channel.source()?;
        let kind = EventType::raw("bench")?;
        Ok(Box::new(Sending {
            source,
            kind,
            _channel: channel,
        }))
    }

    fn subscriber(&self, place: &Place) -> Result<Box<dyn Subscriber>> {
        let channel = self.node(place)?.open(&place.topic)?;
        let sink = channel.sink(SinkOptions::default())?;
        sink.busy_poll(self.polls());
        Ok(Box::new(Receiving {
            sink,
            batch: Batch::default(),
            _channel: channel,
        }))
    }

    fn is_of_one_process(&self) -> bool {
        *self == Kecho::Process
    }

    fn polls(&self) -> bool {
        *self == Kecho::Polling
    }
}

struct Sending {
    source: Source,
    kind: EventType,
    _channel: Channel,
}

impl Publisher for Sending {
    fn send(&mut self, event: &[u8]) -> Result<()> {
        let event = Submission {
            kind: &self.kind,
            attributes: &[],
            payload: event,
        };
        Ok(self.source.submit(&event)?)
    }
}

struct Receiving {
    sink: Sink,
    batch: Batch,
    _channel: Channel,
}

impl Subscriber for Receiving {
    fn receive(
        &mut self,
        patience: Option<Duration>,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<usize> {
        if let Some(patience) = patience {
            let Some(event) = self.sink.receive_timeout(patience)? else {
                return Ok(0);
            };
            take(event.get().payload())?;
            return Ok(1);
        }
        self.sink.receive_batch(&mut self.batch, BATCH)?;
        for event in self.batch.iter() {
            take(event.payload())?;
        }
        Ok(self.batch.len())
    }
}
