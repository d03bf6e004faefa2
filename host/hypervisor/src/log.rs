//! Log files of bounded size, which guests fill.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Room for the line that stands for what was dropped.
const MARK_MAX_BYTES: u64 = 64;

/// A file of which the oldest part is dropped when it becomes too long. It shrinks in place: who
/// follows it by an open descriptor sees that.
#[derive(Debug)]
pub(crate) struct BoundedLog {
    file: File,
    len_bytes: u64,
    max_bytes: u64,
}

impl BoundedLog {
    /// Opens a log, continuing what is there. At most `max_bytes` are kept.
    pub(crate) fn open(path: &Path, max_bytes: u64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)?;
        let len_bytes = file.metadata()?.len();
        Ok(Self {
            file,
            len_bytes,
            max_bytes,
        })
    }

    /// Appends data of at most half the bound.
    pub(crate) fn append(&mut self, data: &[u8]) -> io::Result<()> {
        let new_bytes = data.len() as u64;
        if self.len_bytes + new_bytes > self.max_bytes {
            // Half of what is possible, so that this is done seldom.
            let keep = self.max_bytes.saturating_sub(new_bytes + MARK_MAX_BYTES) / 2;
            let dropped = self.len_bytes.saturating_sub(keep);
            self.file.seek(SeekFrom::Start(dropped))?;
            let mut tail = Vec::new();
            (&self.file).take(keep).read_to_end(&mut tail)?;
            self.file.set_len(0)?;
            let mark = format!("[{dropped} bytes of older output dropped]\n");
            self.file.write_all(mark.as_bytes())?;
            self.file.write_all(&tail)?;
            self.len_bytes = (mark.len() + tail.len()) as u64;
        }
        self.file.write_all(data)?;
        self.len_bytes += new_bytes;
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
