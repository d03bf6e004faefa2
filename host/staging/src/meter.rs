//! Counts a transfer's bytes, tells its progress, and notices silence.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::error::ErrorKind;

/// How far a transfer is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes transferred so far.
    pub transferred_bytes: u64,
    /// Bytes to transfer, where the source tells.
    pub total_bytes: Option<u64>,
}

/// Whose turn it is: a slow disk on this side must not look like a silent peer.
enum Turn {
    Peer(Instant),
    Own,
}

pub(crate) struct Meter {
    limit_bytes: u64,
    transferred_bytes: AtomicU64,
    progress: watch::Sender<Progress>,
    turn: Mutex<Turn>,
}

impl Meter {
    pub(crate) fn new(limit_bytes: u64, progress: watch::Sender<Progress>) -> Self {
        progress.send_replace(Progress::default());
        Self {
            limit_bytes,
            transferred_bytes: AtomicU64::new(0),
            progress,
            turn: Mutex::new(Turn::Peer(Instant::now())),
        }
    }

    fn too_large(&self) -> ErrorKind {
        ErrorKind::SizeLimit {
            limit: self.limit_bytes,
            what: "bytes to transfer",
        }
    }

    /// The source says how many bytes will come. Refuses at once what would be refused later.
    pub(crate) fn expect(&self, total_bytes: u64) -> Result<(), ErrorKind> {
        if total_bytes > self.limit_bytes {
            return Err(self.too_large());
        }
        self.progress
            .send_modify(|progress| progress.total_bytes = Some(total_bytes));
        Ok(())
    }

    /// `bytes` more were transferred.
    pub(crate) fn add(&self, bytes: u64) -> Result<(), ErrorKind> {
        let before = self.transferred_bytes.fetch_add(bytes, Ordering::Relaxed);
        let transferred_bytes = before.saturating_add(bytes);
        if transferred_bytes > self.limit_bytes {
            return Err(self.too_large());
        }
        self.progress
            .send_modify(|progress| progress.transferred_bytes = transferred_bytes);
        Ok(())
    }

    pub(crate) fn transferred_bytes(&self) -> u64 {
        self.transferred_bytes.load(Ordering::Relaxed)
    }

    fn set_turn(&self, turn: Turn) {
        *self
            .turn
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = turn;
    }

    /// It is the peer's turn from now on.
    pub(crate) fn peer_turn(&self) {
        self.set_turn(Turn::Peer(Instant::now()));
    }

    /// It is this side's turn: the peer may wait as long as it takes.
    pub(crate) fn own_turn(&self) {
        self.set_turn(Turn::Own);
    }

    /// Resolves when the peer was silent for `limit` in its turn.
    pub(crate) async fn silence(&self, limit: Duration) -> ErrorKind {
        loop {
            let deadline = {
                let turn = self
                    .turn
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                match *turn {
                    Turn::Peer(since) => since + limit,
                    Turn::Own => Instant::now() + limit,
                }
            };
            if deadline <= Instant::now() {
                return ErrorKind::Timeout {
                    what: "waiting for the server",
                    after: limit,
                };
            }
            tokio::time::sleep_until(deadline).await;
        }
    }
}
