//! The signals that end a command on a terminal: the first one is passed on, the second one obeyed.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::Error;
use crate::exit;

/// SIGINT and SIGTERM, caught as long as this lives.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Begins to catch them.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn catch() -> Result<Self, Error> {
        Ok(Signals {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    /// The next one, and the exit code that tells of it. Cancel safe.
    pub async fn next(&mut self) -> (SignalKind, u8) {
        tokio::select! {
            _ = self.interrupt.recv() => (SignalKind::interrupt(), exit::INTERRUPTED),
            _ = self.terminate.recv() => (SignalKind::terminate(), exit::KILLED),
        }
    }
}

/// Begins to catch one kind of signal.
///
/// # Errors
/// [`Error::System`].
pub fn listen(kind: SignalKind) -> Result<Signal, Error> {
    signal(kind).map_err(|source| Error::System {
        action: "listen to signals",
        source,
    })
}
