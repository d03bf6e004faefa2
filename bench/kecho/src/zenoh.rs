//! zenoh between peers, over TCP.

use std::time::Duration;

use zenoh::Wait as _;
use zenoh::handlers::FifoChannelHandler;
use zenoh::pubsub::Publisher as Declared;
use zenoh::qos::CongestionControl;
use zenoh::sample::Sample;
use zenoh::{Config, Session};

use crate::system::{Place, Publisher, Result, Subscriber, System, crate_version};

pub struct Zenoh;

impl System for Zenoh {
    fn name(&self) -> &'static str {
        "zenoh"
    }

    fn version(&self) -> Result<String> {
        crate_version("zenoh")
    }

    fn publisher(&self, place: &Place, _subscribers: usize) -> Result<Box<dyn Publisher>> {
        let session = session("listen", place)?;
        // Not express: that was no quicker for one event, and cost a hundred times as much for many.
        let publisher = session
            .declare_publisher(place.topic.clone())
            .congestion_control(CongestionControl::Block)
            .wait()?;
        Ok(Box::new(Sending {
            publisher,
            _session: session,
        }))
    }

    fn subscriber(&self, place: &Place) -> Result<Box<dyn Subscriber>> {
        let session = session("connect", place)?;
        let subscriber = session.declare_subscriber(place.topic.clone()).wait()?;
        Ok(Box::new(Receiving {
            subscriber,
            _session: session,
        }))
    }
}

/// One that looks for nobody: the publisher listens, the subscribers connect.
fn session(side: &str, place: &Place) -> Result<Session> {
    let mut config = Config::default();
    for (key, value) in [
        ("mode", "\"peer\"".into()),
        ("scouting/multicast/enabled", "false".into()),
        ("scouting/gossip/enabled", "false".into()),
        ("listen/endpoints", "[]".into()),
        (
            &format!("{side}/endpoints"),
            format!("[\"tcp/127.0.0.1:{}\"]", place.port),
        ),
    ] {
        config
            .insert_json5(key, &value)
            .map_err(|error| format!("zenoh's setting {key}: {error}"))?;
    }
    zenoh::open(config).wait()
}

struct Sending {
    publisher: Declared<'static>,
    _session: Session,
}

impl Publisher for Sending {
    fn send(&mut self, event: &[u8]) -> Result<()> {
        self.publisher.put(event).wait()
    }
}

struct Receiving {
    subscriber: zenoh::pubsub::Subscriber<FifoChannelHandler<Sample>>,
    _session: Session,
}

impl Subscriber for Receiving {
    fn receive(
        &mut self,
        patience: Option<Duration>,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<usize> {
        let sample = match patience {
            None => Some(self.subscriber.recv()?),
            Some(patience) => self.subscriber.recv_timeout(patience)?,
        };
        let Some(sample) = sample else { return Ok(0) };
        take(&sample.payload().to_bytes())?;
        Ok(1)
    }
}
