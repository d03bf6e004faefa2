//! Redis with the crate redis, blocking.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ::redis::{Connection, PubSub};

use crate::redis;
use crate::system::{Place, Publisher, Result, Subscriber, System, crate_version, said_version};

/// Commands in a write when many events are pushed.
const BATCH: usize = 128;
/// Answers that a publisher of many has outstanding.
const OUTSTANDING: usize = 4 * BATCH;

pub struct RedisRs;

impl System for RedisRs {
    fn name(&self) -> &'static str {
        "Redis, redis-rs"
    }

    fn version(&self) -> Result<String> {
        Ok(format!(
            "{}, redis-rs {}",
            said_version("redis-server", "--version")?,
            crate_version("redis")?
        ))
    }

    fn broker(&self, port: u16, directory: &Path) -> Result<Option<Command>> {
        redis::server(port, directory)
    }

    fn publisher(&self, place: &Place, _subscribers: usize) -> Result<Box<dyn Publisher>> {
        Ok(Box::new(Sending {
            connection: connect(place.broker)?,
            topic: place.topic.clone(),
            waiting: Vec::new(),
            commands: 0,
            outstanding: 0,
        }))
    }

    fn subscriber(&self, place: &Place) -> Result<Box<dyn Subscriber>> {
        // A PubSub borrows its connection; this one lives as long as the process.
        let connection = Box::leak(Box::new(connect(place.broker)?));
        let mut subscription = connection.as_pubsub();
        subscription.subscribe(&place.topic)?;
        Ok(Box::new(Receiving {
            subscription,
            patience: None,
        }))
    }

    fn window(&self) -> Option<u64> {
        Some(redis::WINDOW)
    }
}

fn connect(port: u16) -> Result<Connection> {
    Ok(::redis::Client::open(format!("redis://127.0.0.1:{port}"))?.get_connection()?)
}

struct Sending {
    connection: Connection,
    topic: String,
    waiting: Vec<u8>,
    commands: usize,
    outstanding: usize,
}

impl Sending {
    fn answers(&mut self, left: usize) -> Result<()> {
        while self.outstanding > left {
            self.connection.recv_response()?;
            self.outstanding -= 1;
        }
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        if self.commands == 0 {
            return Ok(());
        }
        self.connection.send_packed_command(&self.waiting)?;
        self.waiting.clear();
        self.outstanding += self.commands;
        self.commands = 0;
        Ok(())
    }
}

impl Publisher for Sending {
    fn send(&mut self, event: &[u8]) -> Result<()> {
        self.push(event)?;
        self.flush()
    }

    fn push(&mut self, event: &[u8]) -> Result<()> {
        let mut command = ::redis::cmd("PUBLISH");
        command.arg(&self.topic).arg(event);
        command.write_packed_command(&mut self.waiting);
        self.commands += 1;
        if self.commands == BATCH {
            self.write()?;
            self.answers(OUTSTANDING)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.write()?;
        self.answers(0)
    }
}

struct Receiving {
    subscription: PubSub<'static>,
    patience: Option<Duration>,
}

impl Subscriber for Receiving {
    fn receive(
        &mut self,
        patience: Option<Duration>,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<usize> {
        if patience != self.patience {
            self.subscription.set_read_timeout(patience)?;
            self.patience = patience;
        }
        match self.subscription.get_message() {
            Ok(message) => {
                take(message.get_payload_bytes())?;
                Ok(1)
            }
            Err(error) if error.is_timeout() => Ok(0),
            Err(error) => Err(error.into()),
        }
    }
}
