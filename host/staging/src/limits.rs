//! What a transfer may cost.

use std::time::Duration;

/// Bounds on one transfer. Each breach is an error that names the limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes transferred over the network or read from the local source.
    pub transferred_bytes: u64,
    /// Bytes after decompression; for archives also the sum of the files' sizes. Holes count.
    pub unpacked_bytes: u64,
    /// Bytes stored on disk (holes do not count) for each byte transferred, once
    /// [`Limits::ratio_floor_bytes`] are stored. A sparse image of zeros passes, a bomb does not.
    pub max_ratio: u64,
    /// Stored bytes below which the ratio is not looked at.
    pub ratio_floor_bytes: u64,
    /// Entries in an archive, implied parent directories included.
    pub entries: u64,
    /// HTTP redirects followed.
    pub redirects: usize,
    /// Times that one download goes on after its connection broke.
    pub resumes: u32,
    /// Time to establish one connection.
    pub connect: Duration,
    /// Time a remote peer may stay silent while it is its turn.
    pub idle: Duration,
    /// Time for the whole transfer, however busy it is.
    pub total: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            transferred_bytes: 64 << 30,
            unpacked_bytes: 256 << 30,
            max_ratio: 2000,
            ratio_floor_bytes: 256 << 20,
            entries: 500_000,
            redirects: 5,
            resumes: 10,
            connect: Duration::from_secs(30),
            idle: Duration::from_secs(60),
            total: Duration::from_secs(24 * 3600),
        }
    }
}
