//! Ports of this machine that lead into a task's domain on another.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use xbee_api::PublishedPort;
use xbee_api::client::Client;

use crate::error::Error;
use crate::tasks::published;
use crate::term::note;

/// Connections at a time: an `xbed` takes 64 of a user, and some are for other things.
const MAX_CONNECTIONS: usize = 48;
/// Before it is tried again to accept one, which most often fails for want of descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Ports that are listened on.
pub struct Ports(Vec<(TcpListener, PublishedPort)>);

impl Ports {
    /// Those that a task is to have, if its `xbed` is on another machine: one on this listens itself.
    ///
    /// # Errors
    /// A port is taken.
    pub async fn listen(client: &Client, wanted: &mut Vec<PublishedPort>) -> Result<Ports, Error> {
        let mut ports = vec![];
        if client.is_remote() {
            for port in std::mem::take(wanted) {
                let bound = TcpListener::bind(("127.0.0.1", port.host)).await;
                let bound = bound.and_then(|listener| Ok((listener.local_addr()?, listener)));
                let (address, listener) = bound.map_err(|source| Error::Port {
                    port: port.host,
                    source,
                })?;
                let host = address.port();
                ports.push((listener, PublishedPort { host, ..port }));
            }
        }
        Ok(Ports(ports))
    }

    /// Says which.
    pub fn tell(&self) {
        for (_, port) in &self.0 {
            note(format_args!("port {}", published(port)));
        }
    }

    /// Carries connections until it is dropped.
    pub async fn serve(self, client: &Client, task: &str) -> Infallible {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut listening = JoinSet::new();
        for (listener, port) in self.0 {
            let (client, task, room) = (client.clone(), task.to_owned(), room.clone());
            listening.spawn(accept(listener, port.guest, client, task, room));
        }
        // They do not end.
        while listening.join_next().await.is_some() {}
        std::future::pending().await
    }
}

async fn accept(
    listener: TcpListener,
    guest: u16,
    client: Client,
    task: String,
    room: Arc<Semaphore>,
) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        // Never closed.
        let Ok(place) = room.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (client, task) = (client.clone(), task.clone());
                connections.spawn(async move {
                    forward(stream, guest, &client, &task).await;
                    drop(place);
                });
            }
            Err(error) => {
                note(format_args!(
                    "cannot accept connections for port {guest} of the task: {error}"
                ));
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Who connects when nobody serves there, or before the task executes, is hung up on: as on `xbed`'s own host.
async fn forward(mut near: TcpStream, guest: u16, client: &Client, task: &str) {
    if let Ok(mut far) = client.forward(task, guest).await {
        // Either side may vanish at any time: the end of a copy is not an error.
        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
    }
}
