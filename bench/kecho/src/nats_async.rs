//! NATS with the crate async-nats.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use async_nats::Client;
use futures_util::StreamExt as _;
use tokio::runtime::Runtime;

use crate::nats;
use crate::system::{Place, Publisher, Result, Subscriber, System, crate_version, said_version};

pub struct NatsAsync;

impl System for NatsAsync {
    fn name(&self) -> &'static str {
        "NATS, async-nats"
    }

    fn version(&self) -> Result<String> {
        Ok(format!(
            "{}, async-nats {}",
            said_version("nats-server", "--version")?,
            crate_version("async-nats")?
        ))
    }

    fn broker(&self, port: u16, directory: &Path) -> Result<Option<Command>> {
        nats::server(port, directory)
    }

    fn publisher(&self, place: &Place, _subscribers: usize) -> Result<Box<dyn Publisher>> {
        let (runtime, client) = connect(place.broker)?;
        Ok(Box::new(Sending {
            runtime,
            client,
            topic: async_nats::Subject::from(place.topic.as_str()),
        }))
    }

    fn subscriber(&self, place: &Place) -> Result<Box<dyn Subscriber>> {
        let (runtime, client) = connect(place.broker)?;
        let subscription = runtime.block_on(async {
            let subscription = client.subscribe(place.topic.clone()).await?;
            client.flush().await?;
            Result::Ok(subscription)
        })?;
        Ok(Box::new(Receiving {
            runtime,
            _client: client,
            subscription,
        }))
    }

    fn window(&self) -> Option<u64> {
        Some(nats::WINDOW)
    }
}

/// The connection has a thread of its own: with a runtime in the caller's thread nothing would leave until the next call.
fn connect(port: u16) -> Result<(Runtime, Client)> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let options =
        async_nats::ConnectOptions::new().subscription_capacity(8 * nats::WINDOW as usize);
    let client = runtime.block_on(options.connect(format!("127.0.0.1:{port}")))?;
    Ok((runtime, client))
}

struct Sending {
    runtime: Runtime,
    client: Client,
    topic: async_nats::Subject,
}

impl Publisher for Sending {
    fn send(&mut self, event: &[u8]) -> Result<()> {
        let event = bytes::Bytes::copy_from_slice(event);
        Ok(self
            .runtime
            .block_on(self.client.publish(self.topic.clone(), event))?)
    }

    fn flush(&mut self) -> Result<()> {
        Ok(self.runtime.block_on(self.client.flush())?)
    }
}

struct Receiving {
    runtime: Runtime,
    _client: Client,
    subscription: async_nats::Subscriber,
}

impl Subscriber for Receiving {
    fn receive(
        &mut self,
        patience: Option<Duration>,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<usize> {
        let next = self.subscription.next();
        let message = self.runtime.block_on(async {
            match patience {
                None => Some(next.await),
                Some(patience) => tokio::time::timeout(patience, next).await.ok(),
            }
        });
        match message {
            None => Ok(0),
            Some(None) => Err("the subscription has ended".into()),
            Some(Some(message)) => {
                take(&message.payload)?;
                Ok(1)
            }
        }
    }
}
