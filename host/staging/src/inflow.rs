//! The stages of a fetch behind the source: a bounded channel of chunks, a digest thread, and a reader
//! for the decoder.

use std::io::{self, BufRead, Read};
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::error::ErrorKind;
use crate::hash::{Algorithm, Digest, Hasher};
use crate::meter::Meter;

/// Chunks that may wait between two stages. With chunks of up to 256 KiB: 4 MiB.
const QUEUE_CHUNKS: usize = 16;

/// What a stage hands to the next. A channel that closes without `End` was cut off.
pub(crate) enum Piece {
    Data(Bytes),
    End,
}

pub(crate) fn channel() -> (mpsc::Sender<Piece>, mpsc::Receiver<Piece>) {
    mpsc::channel(QUEUE_CHUNKS)
}

/// Why a source stopped.
pub(crate) enum Halt {
    /// The consuming side has ended; it knows why.
    Consumer,
    /// The source itself failed.
    Failed(ErrorKind),
}

impl From<ErrorKind> for Halt {
    fn from(kind: ErrorKind) -> Self {
        Self::Failed(kind)
    }
}

/// Where a source puts its chunks.
#[derive(Clone)]
pub(crate) struct Feed {
    pub(crate) pieces: mpsc::Sender<Piece>,
    pub(crate) meter: Arc<Meter>,
}

impl Feed {
    /// Takes a chunk that came from the network.
    pub(crate) async fn push(&self, chunk: Bytes) -> Result<(), Halt> {
        self.meter.add(chunk.len() as u64)?;
        self.meter.own_turn();
        let sent = self.pieces.send(Piece::Data(chunk)).await;
        self.meter.peer_turn();
        sent.map_err(|_| Halt::Consumer)
    }

    /// Takes a chunk that was read by a thread.
    pub(crate) fn push_blocking(&self, chunk: Bytes) -> Result<(), Halt> {
        self.meter.add(chunk.len() as u64)?;
        self.pieces
            .blocking_send(Piece::Data(chunk))
            .map_err(|_| Halt::Consumer)
    }

    /// All chunks were delivered.
    pub(crate) async fn end(self) -> Result<(), Halt> {
        self.meter.own_turn();
        self.pieces
            .send(Piece::End)
            .await
            .map_err(|_| Halt::Consumer)
    }
}

/// Digests all pieces while passing them on. `None` if the flow was cut off on either side.
pub(crate) fn digest(
    algorithms: &[Algorithm],
    mut pieces: mpsc::Receiver<Piece>,
    next: &mpsc::Sender<Piece>,
) -> Option<Vec<Digest>> {
    let mut hashers: Vec<Hasher> = algorithms.iter().copied().map(Hasher::new).collect();
    loop {
        match pieces.blocking_recv()? {
            Piece::Data(chunk) => {
                hashers.iter_mut().for_each(|hasher| hasher.update(&chunk));
                next.blocking_send(Piece::Data(chunk)).ok()?;
            }
            Piece::End => {
                next.blocking_send(Piece::End).ok()?;
                return Some(hashers.into_iter().map(Hasher::finish).collect());
            }
        }
    }
}

/// Reads the chunks in the decoder's thread. Ends with an error, and remembers it as interrupted, if the
/// flow is cut off.
pub(crate) struct Inflow {
    pieces: mpsc::Receiver<Piece>,
    chunk: Bytes,
    ended: bool,
    interrupted: bool,
    stop: CancellationToken,
}

impl Inflow {
    pub(crate) fn new(pieces: mpsc::Receiver<Piece>, stop: CancellationToken) -> Self {
        Self {
            pieces,
            chunk: Bytes::new(),
            ended: false,
            interrupted: false,
            stop,
        }
    }

    /// Whether reading failed because the flow was cut off, not because of what was in it.
    pub(crate) fn interrupted(&self) -> bool {
        self.interrupted
    }

    /// Reads what is left to its end and forgets it.
    pub(crate) fn drain(&mut self) -> io::Result<()> {
        loop {
            let len = self.fill_buf()?.len();
            if len == 0 {
                return Ok(());
            }
            self.consume(len);
        }
    }
}

impl BufRead for Inflow {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.chunk.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Data(chunk)) if !self.stop.is_cancelled() => self.chunk = chunk,
                Some(Piece::End) => self.ended = true,
                Some(Piece::Data(_)) | None => {
                    self.interrupted = true;
                    return Err(io::Error::other("the transfer was cut off"));
                }
            }
        }
        Ok(&self.chunk)
    }

    fn consume(&mut self, amount: usize) {
        bytes::Buf::advance(&mut self.chunk, amount);
    }
}

impl Read for Inflow {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let amount = available.len().min(buffer.len());
        buffer[..amount].copy_from_slice(&available[..amount]);
        self.consume(amount);
        Ok(amount)
    }
}

/// Decoded data: counts it against the limit and looks at the stop token.
pub(crate) struct Decoded<'a> {
    decoder: Box<dyn Read + 'a>,
    bytes: u64,
    limit_bytes: u64,
    stop: CancellationToken,
    halted: Option<ErrorKind>,
}

impl<'a> Decoded<'a> {
    pub(crate) fn new(
        decoder: Box<dyn Read + 'a>,
        limit_bytes: u64,
        stop: CancellationToken,
    ) -> Self {
        Self {
            decoder,
            bytes: 0,
            limit_bytes,
            stop,
            halted: None,
        }
    }

    /// Bytes decoded so far.
    pub(crate) fn decoded_bytes(&self) -> u64 {
        self.bytes
    }

    /// Why reading failed, if not because of the data.
    pub(crate) fn halted(&mut self) -> Option<ErrorKind> {
        self.halted.take()
    }
}

impl Read for Decoded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_cancelled() {
            self.halted = Some(ErrorKind::Cancelled);
            return Err(io::Error::other("cancelled"));
        }
        let amount = self.decoder.read(buffer)?;
        self.bytes = self.bytes.saturating_add(amount as u64);
        if self.bytes > self.limit_bytes {
            self.halted = Some(ErrorKind::SizeLimit {
                limit: self.limit_bytes,
                what: "bytes after decompression",
            });
            return Err(io::Error::other("size limit"));
        }
        Ok(amount)
    }
}
