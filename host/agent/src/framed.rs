//! Frames over an asynchronous byte stream. For either side: a simulated agent uses them too.

use minicbor::{Decode, Encode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use xbee_protocol::{FrameBuffer, decode, encode_frame};

use crate::Error;

/// Reads messages.
#[derive(Debug)]
pub struct FrameReader<R> {
    source: R,
    frames: FrameBuffer,
    chunk: Box<[u8]>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads from `source`.
    pub fn new(source: R) -> Self {
        FrameReader {
            source,
            frames: FrameBuffer::default(),
            chunk: vec![0; 64 * 1024].into(),
        }
    }

    /// The next message; `None` where the stream ends between two frames. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Frame`], and [`Error::Closed`] where the stream ends in a frame.
    pub async fn next<M: for<'b> Decode<'b, ()>>(&mut self) -> Result<Option<M>, Error> {
        loop {
            if let Some(body) = self.frames.next_body().map_err(Error::Frame)? {
                return decode(body).map(Some).map_err(Error::Frame);
            }
            match self.source.read(&mut self.chunk).await.map_err(Error::Io)? {
                0 if self.frames.is_empty() => return Ok(None),
                0 => return Err(Error::Closed),
                n => self.frames.extend(&self.chunk[..n]),
            }
        }
    }
}

/// Writes messages.
#[derive(Debug)]
pub struct FrameWriter<W> {
    sink: W,
    buffer: Vec<u8>,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// Writes to `sink`.
    pub fn new(sink: W) -> Self {
        FrameWriter {
            sink,
            buffer: Vec::new(),
        }
    }

    /// Writes a message and flushes. Not cancel-safe.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::TooLarge`] with nothing written.
    pub async fn send<M: Encode<()>>(&mut self, message: &M) -> Result<(), Error> {
        self.buffer.clear();
        encode_frame(message, &mut self.buffer).map_err(Error::TooLarge)?;
        self.send_encoded(None).await
    }

    /// Writes frames that are encoded already, `None` for those in the buffer.
    pub(crate) async fn send_encoded(&mut self, frames: Option<&[u8]>) -> Result<(), Error> {
        self.sink
            .write_all(frames.unwrap_or(&self.buffer))
            .await
            .map_err(Error::Io)?;
        self.sink.flush().await.map_err(Error::Io)
    }
}
