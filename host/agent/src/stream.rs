//! Byte streams within the connection, each with a window in both directions.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use xbee_protocol::{HostMessage, MAX_DATA_BYTES, STREAM_WINDOW_BYTES, StreamBody};

use crate::Error;
use crate::state::Shared;

/// Credit is given when this much has been taken, in bytes.
const CREDIT_STEP_BYTES: u32 = STREAM_WINDOW_BYTES / 4;

/// Content that has come and not been taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Bytes.
    Bytes(Vec<u8>),
    /// So many zeros.
    Hole(u64),
}

/// The state of a stream.
#[derive(Debug, Clone)]
pub(crate) struct Stream {
    carries_holes: bool,
    received: VecDeque<Piece>,
    /// Bytes that the agent may still send.
    receive_window: u32,
    /// Bytes taken since credit was given last.
    taken: u32,
    read_waker: Option<Waker>,
    reader_gone: bool,
    /// The agent has said its last on this stream.
    pub(crate) guest_ended: bool,
    /// The agent has broken it off.
    reset: bool,
    /// Bytes that may be sent.
    send_window: u32,
    write_waker: Option<Waker>,
    /// This side has said its last.
    pub(crate) host_ended: bool,
}

impl Stream {
    pub(crate) fn both_ways() -> Self {
        Stream {
            carries_holes: false,
            received: VecDeque::new(),
            receive_window: STREAM_WINDOW_BYTES,
            taken: 0,
            read_waker: None,
            reader_gone: false,
            guest_ended: false,
            reset: false,
            send_window: STREAM_WINDOW_BYTES,
            write_waker: None,
            host_ended: false,
        }
    }

    pub(crate) fn from_guest() -> Self {
        Stream {
            host_ended: true,
            ..Stream::both_ways()
        }
    }

    pub(crate) fn file_from_guest() -> Self {
        Stream {
            carries_holes: true,
            ..Stream::from_guest()
        }
    }

    pub(crate) fn to_guest() -> Self {
        Stream {
            reader_gone: true,
            receive_window: 0,
            ..Stream::both_ways()
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.guest_ended && self.host_ended && self.reader_gone
    }

    pub(crate) fn wake(&mut self) {
        for waker in [self.read_waker.take(), self.write_waker.take()]
            .into_iter()
            .flatten()
        {
            waker.wake();
        }
    }

    /// Takes up what the agent says; returns credit to be given at once.
    pub(crate) fn receive(&mut self, body: StreamBody) -> Result<u32, Error> {
        let mut credit = 0;
        match body {
            StreamBody::Reset => {
                self.reset = true;
                self.guest_ended = true;
                self.host_ended = true;
            }
            StreamBody::Credit(bytes) => {
                self.send_window = self
                    .send_window
                    .checked_add(bytes)
                    .filter(|window| *window <= STREAM_WINDOW_BYTES)
                    .ok_or_else(|| Error::protocol("more credit than was used"))?;
            }
            _ if self.guest_ended => return Err(Error::protocol("data after the end of a stream")),
            StreamBody::End => self.guest_ended = true,
            StreamBody::Hole(bytes) => {
                if !self.carries_holes {
                    return Err(Error::protocol("a hole in a stream that has none"));
                }
                match self.received.back_mut() {
                    Some(Piece::Hole(hole)) => *hole = hole.saturating_add(bytes),
                    _ => self.received.push_back(Piece::Hole(bytes)),
                }
            }
            StreamBody::Data(data) => {
                let length = data.len() as u32;
                if data.len() > MAX_DATA_BYTES || length > self.receive_window {
                    return Err(Error::protocol("more data than the window allows"));
                }
                self.receive_window -= length;
                if self.reader_gone {
                    credit = self.took(length);
                } else {
                    match self.received.back_mut() {
                        Some(Piece::Bytes(bytes)) if bytes.len() + data.len() <= MAX_DATA_BYTES => {
                            bytes.extend_from_slice(&data);
                        }
                        _ => self.received.push_back(Piece::Bytes(data)),
                    }
                }
            }
        }
        self.wake();
        Ok(credit)
    }

    /// Counts bytes taken; returns credit to be given.
    fn took(&mut self, bytes: u32) -> u32 {
        self.taken += bytes;
        if self.taken < CREDIT_STEP_BYTES || self.guest_ended {
            return 0;
        }
        self.receive_window += self.taken;
        std::mem::take(&mut self.taken)
    }
}

/// What the agent sends on a stream. Dropped, the rest is thrown away.
#[derive(Debug)]
pub struct StreamReader {
    shared: Arc<Shared>,
    id: u32,
}

impl StreamReader {
    pub(crate) fn new(shared: Arc<Shared>, id: u32) -> Self {
        StreamReader { shared, id }
    }

    /// The next piece of at most `max_bytes`, where bytes are concerned; `None` at the end.
    pub(crate) fn poll_piece(
        &self,
        cx: &Context<'_>,
        max_bytes: usize,
    ) -> Poll<Result<Option<Piece>, Error>> {
        let mut state = self.shared.lock();
        let lost = state.closed();
        let Some(stream) = state.stream(self.id) else {
            return Poll::Ready(Ok(None));
        };
        let piece = match stream.received.pop_front() {
            Some(Piece::Bytes(mut bytes)) => {
                if bytes.len() > max_bytes {
                    let rest = bytes.split_off(max_bytes);
                    stream.received.push_front(Piece::Bytes(rest));
                }
                Piece::Bytes(bytes)
            }
            Some(hole) => hole,
            None if stream.reset => {
                return Poll::Ready(Err(Error::failed(xbee_protocol::Failure {
                    code: xbee_protocol::code::CANCELLED.into(),
                    message: "the connection was reset in the guest".into(),
                })));
            }
            None if stream.guest_ended => return Poll::Ready(Ok(None)),
            None => {
                if let Some(lost) = lost {
                    return Poll::Ready(Err(lost));
                }
                stream.read_waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
        };
        let credit = match &piece {
            Piece::Bytes(bytes) => stream.took(bytes.len() as u32),
            Piece::Hole(_) => 0,
        };
        // A connection that is lost needs no credit, and says so at the next read.
        if lost.is_none() {
            state.grant(self.id, credit)?;
            drop(state);
            self.shared.outgoing_ready.notify_one();
        }
        Poll::Ready(Ok(Some(piece)))
    }
}

impl AsyncRead for StreamReader {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        match ready!(self.poll_piece(cx, buffer.remaining())).map_err(io::Error::other)? {
            Some(Piece::Bytes(bytes)) => buffer.put_slice(&bytes),
            // Holes are refused where a stream of this kind receives them.
            Some(Piece::Hole(_)) | None => {}
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        let Some(stream) = state.stream(self.id) else {
            return;
        };
        stream.reader_gone = true;
        let mut credit = 0;
        for piece in std::mem::take(&mut stream.received) {
            if let Piece::Bytes(bytes) = piece {
                credit += stream.took(bytes.len() as u32);
            }
        }
        if let Err(error) = state.grant(self.id, credit) {
            tracing::debug!(%error, "no credit for a stream that is not read");
        }
        state.forget_if_done(self.id);
        drop(state);
        self.shared.outgoing_ready.notify_one();
    }
}

/// What is sent to the agent on a stream. Dropped or shut down, the stream ends in this direction.
#[derive(Debug)]
pub struct StreamWriter {
    shared: Arc<Shared>,
    id: u32,
}

impl StreamWriter {
    pub(crate) fn new(shared: Arc<Shared>, id: u32) -> Self {
        StreamWriter { shared, id }
    }

    /// Sends so many zeros. For files only.
    pub(crate) fn send_hole(&self, bytes: u64) -> Result<(), Error> {
        self.shared.send(&HostMessage::Stream {
            stream: self.id,
            body: StreamBody::Hole(bytes),
        })
    }

    fn end(&self, body: StreamBody) -> Result<(), Error> {
        let mut state = self.shared.lock();
        let Some(stream) = state.stream(self.id) else {
            return Ok(());
        };
        if std::mem::replace(&mut stream.host_ended, true) {
            return Ok(());
        }
        let result = state.queue(&HostMessage::Stream {
            stream: self.id,
            body,
        });
        state.forget_if_done(self.id);
        drop(state);
        self.shared.outgoing_ready.notify_one();
        result
    }

    /// Breaks the stream off.
    pub(crate) fn reset(&self) -> Result<(), Error> {
        self.end(StreamBody::Reset)
    }
}

impl AsyncWrite for StreamWriter {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let mut state = self.shared.lock();
        if let Some(lost) = state.closed() {
            return Poll::Ready(Err(io::Error::other(lost)));
        }
        if !state.has_room() {
            state.waiting_for_room.push(cx.waker().clone());
            return Poll::Pending;
        }
        let Some(stream) = state.stream(self.id).filter(|stream| !stream.host_ended) else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        if stream.send_window == 0 {
            stream.write_waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let length = bytes
            .len()
            .min(MAX_DATA_BYTES)
            .min(stream.send_window as usize);
        stream.send_window -= length as u32;
        let body = StreamBody::Data(bytes[..length].to_vec());
        state
            .queue(&HostMessage::Stream {
                stream: self.id,
                body,
            })
            .map_err(io::Error::other)?;
        drop(state);
        self.shared.outgoing_ready.notify_one();
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Nothing is held back here.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.end(StreamBody::End).map_err(io::Error::other))
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        if let Err(error) = self.end(StreamBody::End) {
            tracing::debug!(%error, "the end of a stream was not sent");
        }
    }
}

/// A TCP connection within the guest. Dropped before both directions have ended, it is reset.
#[derive(Debug)]
pub struct Tunnel {
    // Dropped in this order, after `drop` below.
    writer: StreamWriter,
    reader: StreamReader,
}

impl Tunnel {
    pub(crate) fn new(shared: &Arc<Shared>, id: u32) -> Self {
        Tunnel {
            writer: StreamWriter::new(Arc::clone(shared), id),
            reader: StreamReader::new(Arc::clone(shared), id),
        }
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        let both_ended = {
            let mut state = self.writer.shared.lock();
            state
                .stream(self.writer.id)
                .is_none_or(|stream| stream.guest_ended && stream.host_ended)
        };
        if both_ended {
            return;
        }
        // `end` says nothing where this side has ended before: the reset has to be sent all the same.
        let body = StreamBody::Reset;
        let message = HostMessage::Stream {
            stream: self.writer.id,
            body,
        };
        {
            let mut state = self.writer.shared.lock();
            if let Some(stream) = state.stream(self.writer.id) {
                stream.host_ended = true;
            }
        }
        if let Err(error) = self.writer.shared.send(&message) {
            tracing::debug!(%error, "the reset of a stream was not sent");
        }
    }
}
