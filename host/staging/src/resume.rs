//! When a download goes on after its connection broke: only where the server says that the file is the same.

use std::time::Duration;

use crate::error::ErrorKind;
use crate::inflow::{Feed, Halt};
use crate::limits::Limits;
use crate::meter::Meter;

/// Pause before the first new connection; it doubles with each.
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// The longest pause before a new connection.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// How far a download has come.
pub(crate) struct Resume {
    received_bytes: u64,
    /// Bytes that come again because the server begins anew.
    skip_bytes: u64,
    /// Times that it may still go on.
    left: u32,
    pause: Duration,
}

impl Resume {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            received_bytes: 0,
            skip_bytes: 0,
            left: limits.resumes,
            pause: FIRST_PAUSE,
        }
    }

    /// Bytes that were passed on.
    pub(crate) fn received_bytes(&self) -> u64 {
        self.received_bytes
    }

    /// The server sends all bytes, those received before too.
    pub(crate) fn begins_anew(&mut self) {
        self.skip_bytes = self.received_bytes;
    }

    /// The server sends what was not received.
    pub(crate) fn goes_on(&mut self) {
        self.skip_bytes = 0;
    }

    /// Passes on what of `chunk` was not received before.
    pub(crate) async fn push(&mut self, feed: &Feed, mut chunk: bytes::Bytes) -> Result<(), Halt> {
        let again = usize::try_from(self.skip_bytes)
            .unwrap_or(usize::MAX)
            .min(chunk.len());
        bytes::Buf::advance(&mut chunk, again);
        self.skip_bytes -= again as u64;
        if chunk.is_empty() {
            feed.meter.peer_turn();
            return Ok(());
        }
        self.received_bytes += chunk.len() as u64;
        feed.push(chunk).await
    }

    /// Waits until it is time for another connection, or gives `halt` back if that would not help. `same` is whether the
    /// server's file can be recognised.
    pub(crate) async fn again(
        &mut self,
        same: bool,
        halt: Halt,
        meter: &Meter,
    ) -> Result<(), Halt> {
        let kind = match halt {
            Halt::Failed(kind) if same && self.left > 0 && broke(&kind) => kind,
            halt => return Err(halt),
        };
        self.left -= 1;
        tracing::info!(
            received_bytes = self.received_bytes,
            error = %kind,
            "a connection broke; the download goes on in {:?}",
            self.pause
        );
        meter.own_turn();
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(MAX_PAUSE);
        meter.peer_turn();
        Ok(())
    }
}

/// Whether it may go better with another connection.
fn broke(kind: &ErrorKind) -> bool {
    matches!(kind, ErrorKind::Transfer { .. } | ErrorKind::Connect { .. })
}

/// The file is another one now.
pub(crate) fn changed() -> Halt {
    Halt::Failed(ErrorKind::Changed)
}
