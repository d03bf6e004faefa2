//! Copies a named pipe into a file that cannot grow without bound.
//!
//! QEMU writes the guest's console (and its own errors) into pipes, not files: what a guest prints
//! while nobody reads fills the pipe and then waits or is lost, and the disk stays as it is.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use tokio::net::unix::pipe;

/// Room in the pipe, in bytes: what a guest can print before it waits while nobody reads.
const PIPE_BYTES: usize = 256 << 10;

/// Read at a time, in bytes, and the pause after as much: together they hold a guest that floods
/// its console to about 3 MiB/s.
const CHUNK_BYTES: usize = 32 << 10;
const FLOOD_PAUSE: Duration = Duration::from_millis(10);

/// Room for the line that stands for what was dropped.
const MARK_MAX_BYTES: u64 = 64;

/// A log fed by a named pipe.
#[derive(Debug)]
pub(crate) struct PipeLog {
    pipe: pipe::Receiver,
    log: File,
    len_bytes: u64,
    max_bytes: u64,
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
        let log = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(log)?;
        let len_bytes = log.metadata()?.len();
        Ok(Self {
            pipe,
            log,
            len_bytes,
            max_bytes,
            broken: false,
        })
    }

    /// Copies for ever; returns on a failure of the pipe only. Cancel-safe.
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
        // A full disk loses console output and nothing else.
        match self.append(&chunk[..len]) {
            Ok(()) => self.broken = false,
            Err(error) if !self.broken => {
                self.broken = true;
                tracing::warn!(%error, "cannot write a domain's log");
            }
            Err(_) => {}
        }
        Ok(len)
    }

    fn append(&mut self, data: &[u8]) -> io::Result<()> {
        if self.len_bytes + data.len() as u64 > self.max_bytes {
            let keep = self
                .max_bytes
                .saturating_sub(data.len() as u64 + MARK_MAX_BYTES)
                / 2;
            let dropped = self.len_bytes.saturating_sub(keep);
            self.log.seek(SeekFrom::Start(dropped))?;
            let mut tail = Vec::new();
            (&self.log).take(keep).read_to_end(&mut tail)?;
            self.log.set_len(0)?;
            let mark = format!("[{dropped} bytes of older output dropped]\n");
            self.log.write_all(mark.as_bytes())?;
            self.log.write_all(&tail)?;
            self.len_bytes = (mark.len() + tail.len()) as u64;
        }
        self.log.write_all(data)?;
        self.len_bytes += data.len() as u64;
        Ok(())
    }
}

/// The last `max_bytes` of a log as text, without control characters.
pub(crate) fn tail(log: &Path, max_bytes: u64) -> io::Result<String> {
    let mut file = File::open(log)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(max_bytes)))?;
    let mut bytes = Vec::new();
    file.take(max_bytes).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes)
        .chars()
        .filter(|c| *c == '\n' || !c.is_control())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

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
