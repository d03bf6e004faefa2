//! Writing with holes: blocks of zeros take no space and no time.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::sync_channel;

use crate::error::ErrorKind;
use crate::limits::Limits;
use crate::meter::Meter;

/// The unit of holes, aligned in the file: the block size of the usual file systems.
const BLOCK_BYTES: usize = 4096;

/// Read and written at once. A multiple of [`BLOCK_BYTES`].
const BUFFER_BYTES: usize = 256 << 10;

/// How a copy ended early.
pub(crate) enum CopyError {
    /// The data could not be read.
    Read(io::Error),
    /// The file could not be written.
    Write(io::Error),
    /// Too much was stored for what was transferred.
    Refused(ErrorKind),
}

/// Bytes on disk that a transfer may cost; see [`Limits::max_ratio`].
pub(crate) struct StoreBudget<'a> {
    limits: &'a Limits,
    meter: &'a Meter,
    compressed: bool,
    stored_bytes: u64,
}

impl<'a> StoreBudget<'a> {
    pub(crate) fn new(limits: &'a Limits, meter: &'a Meter, compressed: bool) -> Self {
        Self {
            limits,
            meter,
            compressed,
            stored_bytes: 0,
        }
    }

    pub(crate) fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    fn add(&mut self, bytes: usize) -> Result<(), CopyError> {
        self.stored_bytes = self.stored_bytes.saturating_add(bytes as u64);
        let allowed = self
            .meter
            .transferred_bytes()
            .saturating_mul(self.limits.max_ratio)
            .max(self.limits.ratio_floor_bytes);
        if self.compressed && self.stored_bytes > allowed {
            return Err(CopyError::Refused(ErrorKind::SizeLimit {
                limit: self.limits.max_ratio,
                what: "bytes stored for each byte transferred",
            }));
        }
        Ok(())
    }
}

/// The buffer for [`copy`], to be used for many files.
pub(crate) fn buffer() -> Vec<u8> {
    vec![0; BUFFER_BYTES]
}

/// Copies `data` to its end into the empty `file`, leaving holes. Returns the file's length.
pub(crate) fn copy(
    data: &mut dyn Read,
    file: &File,
    buffer: &mut [u8],
    budget: &mut StoreBudget<'_>,
) -> Result<u64, CopyError> {
    let mut offset = 0;
    loop {
        let filled = fill(data, buffer).map_err(CopyError::Read)?;
        write_blocks(file, &buffer[..filled], offset, budget)?;
        offset += filled as u64;
        if filled < buffer.len() {
            file.set_len(offset).map_err(CopyError::Write)?;
            return Ok(offset);
        }
    }
}

/// Buffers of [`copy_apart`].
const BUFFERS: usize = 4;

/// Like [`copy`], but writes on a second thread, so that decoding need not wait for it.
pub(crate) fn copy_apart(
    data: &mut dyn Read,
    file: &File,
    budget: &mut StoreBudget<'_>,
) -> Result<u64, CopyError> {
    let (full, to_write) = sync_channel::<(Vec<u8>, usize)>(BUFFERS);
    let (empty, to_fill) = sync_channel(BUFFERS);
    for _ in 0..BUFFERS {
        // There is room for all.
        let _ = empty.try_send(buffer());
    }
    std::thread::scope(|scope| {
        let writer = std::thread::Builder::new().name("stage-holes".into());
        let writer = writer.spawn_scoped(scope, move || {
            let mut offset = 0;
            for (buffer, filled) in to_write {
                write_blocks(file, &buffer[..filled], offset, budget)?;
                offset += filled as u64;
                // At the end nobody fills it again.
                let _ = empty.try_send(buffer);
            }
            file.set_len(offset).map_err(CopyError::Write)?;
            Ok(offset)
        });
        let writer = writer.map_err(CopyError::Write)?;
        let mut read = Ok(());
        // Ends when the writer has failed, too.
        for mut buffer in to_fill {
            match fill(data, &mut buffer) {
                Ok(filled) => {
                    let last = filled < buffer.len();
                    if full.send((buffer, filled)).is_err() || last {
                        break;
                    }
                }
                Err(error) => {
                    read = Err(CopyError::Read(error));
                    break;
                }
            }
        }
        drop(full);
        let written = writer.join().unwrap_or_else(|_| {
            Err(CopyError::Write(io::Error::other(
                "a writing thread ended unexpectedly",
            )))
        });
        let written = written?;
        read.map(|()| written)
    })
}

/// Reads until `buffer` is full or the data ends, so that the next write is aligned.
fn fill(data: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match data.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(amount) => filled += amount,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Writes each run of blocks that are not all zeros.
fn write_blocks(
    file: &File,
    bytes: &[u8],
    offset: u64,
    budget: &mut StoreBudget<'_>,
) -> Result<(), CopyError> {
    let mut write = |from: usize, to: usize| -> Result<(), CopyError> {
        if from == to {
            return Ok(());
        }
        budget.add(to - from)?;
        file.write_all_at(&bytes[from..to], offset + from as u64)
            .map_err(CopyError::Write)
    };
    let mut run = 0;
    for (index, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
        if is_zero(block) {
            write(run, index * BLOCK_BYTES)?;
            run = index * BLOCK_BYTES + block.len();
        }
    }
    write(run, bytes.len())
}

/// Whether all bytes are zero. Stops at the first 256 bytes that are not.
fn is_zero(block: &[u8]) -> bool {
    block
        .chunks(256)
        .all(|part| part.iter().fold(0, |any, byte| any | byte) == 0)
}
