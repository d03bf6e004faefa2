//! A task's standard output and error, kept in its spool as they arrive.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::watch;

use crate::fault;

/// Most that is kept of one stream, bytes.
pub const STREAM_LIMIT_BYTES: u64 = 1 << 30;

/// Which stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn index(self) -> usize {
        match self {
            Stream::Stdout => 0,
            Stream::Stderr => 1,
        }
    }

    /// The stream's file in a spool.
    pub fn path(self, spool: &Path) -> PathBuf {
        spool.join(match self {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        })
    }
}

/// What goes wrong with a log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file system.
    #[error("cannot keep the task's output in {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The agent left something out.
    #[error("the agent sent output from byte {got}, expected {expected}")]
    Gap {
        /// Expected offset.
        expected: u64,
        /// Offset that came.
        got: u64,
    },
    /// Too much.
    #[error(
        "the task wrote more than {STREAM_LIMIT_BYTES} bytes to one of its output streams; write to a file in the domain and stage it out instead"
    )]
    Limit,
}

impl LogError {
    /// It is for want of room, which there may be later.
    pub fn is_full(&self) -> bool {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, LogError::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded))
    }
}

/// Writes both streams and tells followers how long they are.
#[derive(Debug)]
pub struct LogWriter {
    files: Arc<[File; 2]>,
    spool: PathBuf,
    lengths: watch::Sender<[u64; 2]>,
}

impl LogWriter {
    /// Opens the logs of a spool, continuing where an earlier process stopped.
    pub fn open(spool: &Path, lengths: watch::Sender<[u64; 2]>) -> Result<LogWriter, LogError> {
        let open = |stream: Stream| {
            let path = stream.path(spool);
            let file = OpenOptions::new().create(true).append(true).open(&path);
            let length = file.and_then(|file| Ok((file.metadata()?.len(), file)));
            length.map_err(|source| LogError::Io { path, source })
        };
        let (stdout_length, stdout) = open(Stream::Stdout)?;
        let (stderr_length, stderr) = open(Stream::Stderr)?;
        lengths.send_replace([stdout_length, stderr_length]);
        Ok(LogWriter {
            files: Arc::new([stdout, stderr]),
            spool: spool.into(),
            lengths,
        })
    }

    /// Bytes held of a stream.
    pub fn length(&self, stream: Stream) -> u64 {
        self.lengths.borrow()[stream.index()]
    }

    /// What was added is on the disk when this returns.
    pub async fn sync(&self) -> Result<(), LogError> {
        if *self.lengths.borrow() == [0, 0] {
            return Ok(());
        }
        let (files, spool) = (self.files.clone(), self.spool.clone());
        let sync = move || -> std::io::Result<()> {
            files.iter().try_for_each(File::sync_all)?;
            // And the files' names.
            for directory in spool.ancestors().take(2) {
                File::open(directory)?.sync_all()?;
            }
            Ok(())
        };
        let synced = tokio::task::spawn_blocking(sync).await;
        let synced = synced.unwrap_or_else(|panic| Err(std::io::Error::other(panic)));
        synced.map_err(|source| LogError::Io {
            path: self.spool.clone(),
            source,
        })
    }

    /// Adds bytes that begin at `offset` of the stream; what is known already is passed over.
    /// Returns how many bytes of the stream are now held.
    pub fn append(&mut self, stream: Stream, offset: u64, data: &[u8]) -> Result<u64, LogError> {
        let have = self.length(stream);
        let end = offset.saturating_add(data.len() as u64);
        if offset > have {
            return Err(LogError::Gap {
                expected: have,
                got: offset,
            });
        }
        if end > STREAM_LIMIT_BYTES {
            return Err(LogError::Limit);
        }
        let known = usize::try_from(have - offset).unwrap_or(usize::MAX);
        let Some(new) = data.get(known..).filter(|new| !new.is_empty()) else {
            return Ok(have);
        };
        fault::point("log");
        let mut file = &self.files[stream.index()];
        let written = file.write_all(new);
        // A part may have been written.
        let length = match written {
            Ok(()) => Ok(end),
            Err(_) => file.metadata().map(|meta| meta.len()),
        };
        let failed = |source| LogError::Io {
            path: stream.path(&self.spool),
            source,
        };
        let length = length.map_err(failed)?;
        self.lengths
            .send_modify(|lengths| lengths[stream.index()] = length);
        written.map_err(failed)?;
        fault::point("logged");
        Ok(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_and_overlapping_output_is_kept_once_and_gaps_are_refused() {
        let spool = tempfile::tempdir().unwrap();
        let (lengths, seen) = watch::channel([0, 0]);
        let mut log = LogWriter::open(spool.path(), lengths.clone()).unwrap();
        assert_eq!(log.append(Stream::Stdout, 0, b"abc").unwrap(), 3);
        assert_eq!(log.append(Stream::Stdout, 0, b"abc").unwrap(), 3);
        assert_eq!(log.append(Stream::Stdout, 2, b"cde").unwrap(), 5);
        assert!(matches!(
            log.append(Stream::Stdout, 6, b"x"),
            Err(LogError::Gap {
                expected: 5,
                got: 6
            })
        ));
        assert_eq!(*seen.borrow(), [5, 0]);
        drop(log);
        let mut log = LogWriter::open(spool.path(), lengths).unwrap();
        assert_eq!(log.append(Stream::Stdout, 5, b"f").unwrap(), 6);
        assert_eq!(
            std::fs::read(Stream::Stdout.path(spool.path())).unwrap(),
            b"abcdef"
        );
    }

    #[test]
    fn a_flood_is_stopped_at_the_limit() {
        let spool = tempfile::tempdir().unwrap();
        let mut log = LogWriter::open(spool.path(), watch::channel([0, 0]).0).unwrap();
        log.lengths.send_replace([STREAM_LIMIT_BYTES - 1, 0]);
        assert!(matches!(
            log.append(Stream::Stdout, STREAM_LIMIT_BYTES - 1, b"xy"),
            Err(LogError::Limit)
        ));
    }
}
