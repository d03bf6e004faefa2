//! Where the vsock switch delivers what a domain's agent connects to.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

/// Pause between two connections: a guest that dials without end costs little.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// Listens on a unix socket and keeps the newest connection nobody has taken.
#[derive(Debug)]
pub(crate) struct AgentPort {
    slot: Arc<Slot>,
    task: AbortHandle,
}

#[derive(Debug, Default)]
struct Slot {
    newest: Mutex<Option<UnixStream>>,
    arrived: Notify,
}

impl AgentPort {
    /// Listens on `socket`, in place of what an earlier process left there.
    pub(crate) fn listen(socket: &Path) -> io::Result<Self> {
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(socket)?;
        let slot = Arc::new(Slot::default());
        let task = tokio::spawn(accept(listener, Arc::clone(&slot))).abort_handle();
        Ok(Self { slot, task })
    }

    /// The newest connection, as soon as there is one. Cancel-safe.
    pub(crate) async fn next(&self) -> UnixStream {
        loop {
            let arrived = self.slot.arrived.notified();
            let stream = self
                .slot
                .newest
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            if let Some(stream) = stream {
                return stream;
            }
            arrived.await;
        }
    }
}

impl Drop for AgentPort {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: UnixListener, slot: Arc<Slot>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                *slot.newest.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
                slot.arrived.notify_one();
            }
            // Out of descriptors, most likely: it passes.
            Err(error) => tracing::warn!(%error, "cannot accept a domain's agent"),
        }
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}
