//! Mosquitto with the crate rumqttc, quality of service 0.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rumqttc::{
    Client, Connection, Event, MqttOptions, NetworkOptions, Packet, QoS, RecvTimeoutError,
};

use crate::system::{Place, Publisher, Result, Subscriber, System, crate_version, said_version};

/// Events between the caller and the client's thread.
const QUEUE: usize = 1024;
/// Events that a publisher is ahead of the slowest subscriber: for quality of service 0 the broker drops what a
/// connection does not take.
const WINDOW: u64 = 4 * 1024;

pub struct Mosquitto;

impl System for Mosquitto {
    fn name(&self) -> &'static str {
        "Mosquitto"
    }

    fn version(&self) -> Result<String> {
        Ok(format!(
            "{}, rumqttc {}",
            said_version("/usr/sbin/mosquitto", "-h")?,
            crate_version("rumqttc")?
        ))
    }

    fn broker(&self, port: u16, directory: &Path) -> Result<Option<Command>> {
        let config = directory.join("mosquitto.conf");
        // Run by root it would change its user, who may not enter the directory.
        std::fs::write(
            &config,
            format!(
                "listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nmax_queued_messages 0\nset_tcp_nodelay true\nlog_type error\nuser root\n"
            ),
        )?;
        let mut command = Command::new("/usr/sbin/mosquitto");
        command.arg("-c").arg(config);
        Ok(Some(command))
    }

    fn publisher(&self, place: &Place, _subscribers: usize) -> Result<Box<dyn Publisher>> {
        let (client, mut connection) = connect(place);
        std::thread::spawn(move || {
            for event in connection.iter() {
                if let Err(error) = event {
                    eprintln!("rumqttc: {error}");
                    return;
                }
            }
        });
        Ok(Box::new(Sending {
            client,
            topic: place.topic.clone(),
        }))
    }

    fn subscriber(&self, place: &Place) -> Result<Box<dyn Subscriber>> {
        let (client, mut connection) = connect(place);
        client.subscribe(&place.topic, QoS::AtMostOnce)?;
        loop {
            if let Event::Incoming(Packet::SubAck(_)) = connection.recv().map_err(gone)?? {
                break;
            }
        }
        Ok(Box::new(Receiving {
            _client: client,
            connection,
        }))
    }

    fn window(&self) -> Option<u64> {
        Some(WINDOW)
    }
}

fn connect(place: &Place) -> (Client, Connection) {
    static NAMES: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let number = NAMES.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let name = format!("bench-{}-{number}", std::process::id());
    let options = MqttOptions::new(name, "127.0.0.1", place.broker);
    let (client, mut connection) = Client::new(options, QUEUE);
    let mut network = NetworkOptions::new();
    network.set_tcp_nodelay(true);
    connection.eventloop.set_network_options(network);
    (client, connection)
}

/// Errors of this crate are no errors to Rust.
fn gone(error: impl std::fmt::Debug) -> Box<dyn std::error::Error + Send + Sync> {
    format!("rumqttc: {error:?}").into()
}

struct Sending {
    client: Client,
    topic: String,
}

impl Publisher for Sending {
    fn send(&mut self, event: &[u8]) -> Result<()> {
        Ok(self
            .client
            .publish(&self.topic, QoS::AtMostOnce, false, event)?)
    }
}

struct Receiving {
    _client: Client,
    connection: Connection,
}

impl Subscriber for Receiving {
    fn receive(
        &mut self,
        patience: Option<Duration>,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<usize> {
        loop {
            let event = match patience {
                None => self.connection.recv().map_err(gone)?,
                Some(patience) => match self.connection.recv_timeout(patience) {
                    Ok(event) => event,
                    Err(RecvTimeoutError::Timeout) => return Ok(0),
                    Err(error) => return Err(gone(error)),
                },
            };
            if let Event::Incoming(Packet::Publish(publish)) = event? {
                take(&publish.payload)?;
                return Ok(1);
            }
        }
    }
}
