//! What a system has to do to be measured.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

/// Of whatever a client or a system says; a system that cannot run says it in its row.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Where the processes of a measurement meet.
#[derive(Debug, Clone)]
pub struct Place {
    /// Of this run only; sockets and files go here.
    pub directory: PathBuf,
    /// On which the broker listens, on 127.0.0.1.
    pub broker: u16,
    /// What is published on: a name of its own for each measurement.
    pub topic: String,
    /// On which a publisher without a broker listens, on 127.0.0.1.
    pub port: u16,
}

impl Place {
    /// A file of this topic.
    pub fn file(&self, kind: &str) -> PathBuf {
        self.directory.join(format!("{}.{kind}", self.topic))
    }

    /// As an argument of a worker.
    pub fn argument(&self) -> String {
        let directory = self.directory.display();
        format!("{}:{}:{}:{directory}", self.topic, self.port, self.broker)
    }
}

impl FromStr for Place {
    type Err = Box<dyn Error + Send + Sync>;

    fn from_str(text: &str) -> Result<Place> {
        let mut parts = text.splitn(4, ':');
        let mut part = || parts.next().ok_or("a place is TOPIC:PORT:BROKER:DIRECTORY");
        Ok(Place {
            topic: part()?.into(),
            port: part()?.parse()?,
            broker: part()?.parse()?,
            directory: Path::new(part()?).into(),
        })
    }
}

/// One way to get events from one process to others.
pub trait System: Sync {
    /// As the tables say it.
    fn name(&self) -> &'static str;

    /// Of the broker or library, and of the client.
    fn version(&self) -> Result<String>;

    /// The broker, if it has one: listening on `port` of 127.0.0.1, with its files in `directory`.
    fn broker(&self, _port: u16, _directory: &Path) -> Result<Option<Command>> {
        Ok(None)
    }

    /// Made before the subscribers, of which there will be as many.
    fn publisher(&self, place: &Place, subscribers: usize) -> Result<Box<dyn Publisher>>;

    /// Made after the publisher; may wait for it.
    fn subscriber(&self, place: &Place) -> Result<Box<dyn Subscriber>>;

    /// Events that a publisher may be ahead of the slowest subscriber, where the system itself does not slow a publisher
    /// down but drops events or the subscriber.
    fn window(&self) -> Option<u64> {
        None
    }

    /// Publisher and subscriber are threads of one process.
    fn is_of_one_process(&self) -> bool {
        false
    }

    /// A subscriber keeps a core busy while it waits, so that only one is measured.
    fn polls(&self) -> bool {
        false
    }
}

/// Publishes on one topic.
pub trait Publisher {
    /// Hands an event over, which leaves without another call.
    fn send(&mut self, event: &[u8]) -> Result<()>;

    /// Hands an event over, which may wait for others or for `flush`: what is quickest for many.
    fn push(&mut self, event: &[u8]) -> Result<()> {
        self.send(event)
    }

    /// All that was pushed leaves.
    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Subscribes to one topic.
pub trait Subscriber {
    /// Waits for events, as long as `patience` if there is one, and gives each to `take`. Says how many there were: 0 only if
    /// there was none in time.
    fn receive(
        &mut self,
        patience: Option<Duration>,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<usize>;
}

/// The version of a crate this program was built with.
pub fn crate_version(name: &str) -> Result<String> {
    let lock = include_str!("../Cargo.lock");
    let after = lock.split_once(&format!("name = \"{name}\"\nversion = \""));
    let version = after.and_then(|(_, rest)| rest.split('"').next());
    Ok(version
        .ok_or_else(|| format!("no crate {name} in Cargo.lock"))?
        .into())
}

/// The first number with a dot that a command prints.
pub fn said_version(program: &str, argument: &str) -> Result<String> {
    let output = Command::new(program)
        .arg(argument)
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let word = text
        .split([' ', '\n', '='])
        .map(|word| word.trim_start_matches('v'))
        .find(|word| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()));
    Ok(word
        .ok_or_else(|| format!("{program} {argument} says no version"))?
        .into())
}
