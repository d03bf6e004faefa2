//! Copies a named pipe or a terminal into a file that cannot grow without bound.
//!
//! The guest's console (and QEMU's own errors) go into pipes, with Xen into a terminal, not into files:
//! what a guest prints while nobody reads fills that and then waits or is lost, and the disk stays as it is.

#[cfg(feature = "xen")]
use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

#[cfg(feature = "xen")]
use rustix::fs::{Mode, OFlags};
use tokio::net::unix::pipe;

use crate::log::BoundedLog;

/// Room in the pipe, in bytes: what a guest can print before it waits while nobody reads.
const PIPE_BYTES: usize = 256 << 10;

/// Read at a time, in bytes, and the pause after as much: together they hold a guest that floods
/// its console to about 3 MiB/s.
const CHUNK_BYTES: usize = 32 << 10;
const FLOOD_PAUSE: Duration = Duration::from_millis(10);

/// A log fed by a named pipe or a terminal.
#[derive(Debug)]
pub(crate) struct PipeLog {
    pipe: pipe::Receiver,
    log: BoundedLog,
    /// Writing failed, which has been reported.
    broken: bool,
}

impl PipeLog {
    /// Opens both; the pipe must exist. An existing log is continued. At most about `max_bytes`
    /// are kept, the oldest are dropped.
    pub(crate) fn open(fifo: &Path, log: &Path, max_bytes: u64) -> io::Result<Self> {
        // Open for writing too: the pipe then never reports an end, whoever else has it open.
        let pipe = pipe::OpenOptions::new()
            .read_write(true)
            .open_receiver(fifo)?;
        // Refused above the user's limit; then the pipe keeps its size.
        let _ = rustix::pipe::fcntl_setpipe_size(&pipe, PIPE_BYTES);
        Ok(Self {
            pipe,
            log: BoundedLog::open(log, max_bytes)?,
            broken: false,
        })
    }

    /// As [`PipeLog::open`], from a terminal in raw mode.
    #[cfg(feature = "xen")]
    pub(crate) fn open_terminal(terminal: &Path, log: &Path, max_bytes: u64) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(terminal, flags, Mode::empty())?);
        // Not a pipe, but read without blocking and awaited in the same way.
        Ok(Self {
            pipe: pipe::Receiver::from_file_unchecked(file)?,
            log: BoundedLog::open(log, max_bytes)?,
            broken: false,
        })
    }

    /// Copies for ever; returns when the pipe fails or a terminal has been closed. Cancel-safe.
    pub(crate) async fn run(&mut self) -> io::Error {
        loop {
            if let Err(error) = self.pipe.readable().await {
                return error;
            }
            match self.copy_chunk() {
                Ok(CHUNK_BYTES) => tokio::time::sleep(FLOOD_PAUSE).await,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return error,
            }
        }
    }

    /// Copies what is in the pipe now.
    pub(crate) fn drain(&mut self) {
        // The pipe may be filled while it is drained, so not without limit.
        for _ in 0..=PIPE_BYTES / CHUNK_BYTES {
            if self.copy_chunk().is_err() {
                return;
            }
        }
    }

    fn copy_chunk(&mut self) -> io::Result<usize> {
        let mut chunk = [0; CHUNK_BYTES];
        let len = self.pipe.try_read(&mut chunk)?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // A full disk loses console output and nothing else.
        match self.log.append(&chunk[..len]) {
            Ok(()) => self.broken = false,
            Err(error) if !self.broken => {
                self.broken = true;
                tracing::warn!(%error, "cannot write a domain's log");
            }
            Err(_) => {}
        }
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;

    use super::*;
    use crate::log::tail;

    #[tokio::test]
    async fn a_flood_is_bounded_and_its_end_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (fifo, log) = (dir.path().join("fifo"), dir.path().join("log"));
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let mut pipe_log = PipeLog::open(&fifo, &log, 64 << 10).unwrap();
        let mut writer = OpenOptions::new().write(true).open(&fifo).unwrap();
        let flood = std::thread::spawn(move || {
            for line in 0..50_000 {
                writeln!(writer, "line {line}").unwrap();
            }
        });
        while !tail(&log, 100).unwrap().ends_with("line 49999\n") {
            assert!(
                tokio::time::timeout(Duration::from_millis(100), pipe_log.run())
                    .await
                    .is_err(),
                "the pipe failed"
            );
            assert!(log.metadata().unwrap().len() <= 64 << 10);
        }
        flood.join().unwrap();
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(text.starts_with('[') && text.contains("line 49000\n"));
    }
}
