//! One connection: bytes both ways, in pieces that say where they belong.
//!
//! Of what was said, [`WINDOW`] bytes and [`PIECES`] pieces at most are not yet taken by the other side. A piece that is not
//! the next one ends the connection: the broker has lost or repeated a message. Each side gives a sign of life every
//! [`SIGN`]; who hears nothing for [`SILENCE`] ends it.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, ReadHalf, WriteHalf,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval};
use uuid::Uuid;
use xbee_envelope::Body;

use crate::wire::{Post, Wire};

/// Bytes on their way, one way, of one connection.
pub const WINDOW: u64 = 256 << 10;
/// Pieces on their way.
pub const PIECES: usize = 64;
/// Bytes of a piece at most.
pub const PIECE: usize = 64 << 10;
/// Time between signs of life.
pub const SIGN: Duration = Duration::from_secs(10);
/// A connection of which nothing is heard for so long is over.
pub const SILENCE: Duration = Duration::from_secs(30);
/// What is said of one connection and waits to be looked at: all pieces, what they are acknowledged with, and an end.
const EVENTS: usize = 4 * PIECES;

/// A connection that is carried in messages. Dropped, it ends on the other side too.
#[derive(Debug)]
pub struct Carried {
    io: DuplexStream,
    fate: Arc<OnceLock<String>>,
    _held: oneshot::Sender<()>,
}

impl Carried {
    fn failure(&self) -> Option<io::Error> {
        let reason = self.fate.get()?;
        Some(io::Error::new(
            io::ErrorKind::ConnectionReset,
            reason.clone(),
        ))
    }
}

impl AsyncRead for Carried {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        let is_end = matches!(read, Poll::Ready(Ok(()))) && buffer.filled().len() == before;
        match self.failure() {
            Some(failure) if is_end && buffer.remaining() > 0 => Poll::Ready(Err(failure)),
            _ => read,
        }
    }
}

impl AsyncWrite for Carried {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.io).poll_write(context, bytes) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(self.failure().unwrap_or(error))),
            other => other,
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

/// What the other side says.
#[derive(Debug)]
pub(crate) enum Event {
    Data(u64, Vec<u8>),
    Taken(u64),
    End(u64),
}

/// A connection, for those who pass on what the other side says. Dropped, the connection is over.
#[derive(Debug)]
pub(crate) struct Handle {
    pub events: mpsc::Sender<Event>,
    pub reason: Arc<OnceLock<String>>,
}

/// Where the other side is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    /// Its subject.
    pub subject: String,
    /// Its own destination.
    pub destination: String,
    /// Which one it is of a pool.
    pub member: Option<Uuid>,
}

/// Why a connection ends early.
#[derive(Debug)]
struct Broken {
    reason: String,
    /// The other side does not know.
    is_news: bool,
}

fn broken(reason: impl Into<String>) -> Broken {
    Broken {
        reason: reason.into(),
        is_news: true,
    }
}

/// One side of a connection at work.
pub(crate) struct Side {
    wire: Arc<Wire>,
    id: Uuid,
    peer: Peer,
    events: mpsc::Receiver<Event>,
    /// Why `events` has ended.
    reason: Arc<OnceLock<String>>,
    fate: Arc<OnceLock<String>>,
    reader: ReadHalf<DuplexStream>,
    writer: WriteHalf<DuplexStream>,
    released: oneshot::Receiver<()>,
    is_released: bool,
    // What this side says.
    said: u64,
    acknowledged: u64,
    /// Ends of the pieces that are not acknowledged.
    pieces: VecDeque<u64>,
    has_ended: bool,
    // What the other side says.
    heard: u64,
    taken: u64,
    told: u64,
    /// Pieces taken since `told`.
    untold: usize,
    waiting: VecDeque<Vec<u8>>,
    /// Of the first that waits.
    written: usize,
    peer_ended: bool,
    is_shut: bool,
}

/// Makes a side, and both things that belong to it.
pub(crate) fn side(wire: Arc<Wire>, id: Uuid, peer: Peer) -> (Carried, Handle, Side) {
    let (near, far) = tokio::io::duplex(PIECE);
    let (reader, writer) = tokio::io::split(far);
    let (sender, events) = mpsc::channel(EVENTS);
    let (held, released) = oneshot::channel();
    let (fate, reason) = (Arc::new(OnceLock::new()), Arc::new(OnceLock::new()));
    let carried = Carried {
        io: near,
        fate: fate.clone(),
        _held: held,
    };
    let handle = Handle {
        events: sender,
        reason: reason.clone(),
    };
    let side = Side {
        wire,
        id,
        peer,
        events,
        reason,
        fate,
        reader,
        writer,
        released,
        is_released: false,
        said: 0,
        acknowledged: 0,
        pieces: VecDeque::new(),
        has_ended: false,
        heard: 0,
        taken: 0,
        told: 0,
        untold: 0,
        waiting: VecDeque::new(),
        written: 0,
        peer_ended: false,
        is_shut: false,
    };
    (carried, handle, side)
}

impl Side {
    /// Works until the connection is over.
    pub async fn run(mut self) {
        if let Err(Broken { reason, is_news }) = self.work().await {
            tracing::debug!(connection = %self.id, peer = self.peer.subject, reason, "broken");
            if is_news {
                self.reset(&reason).await;
            }
            // Said once.
            let _ = self.fate.set(reason);
        }
        self.wire.forget(&self.peer.subject, self.id);
    }

    async fn work(&mut self) -> Result<(), Broken> {
        let mut sign = interval(SIGN);
        sign.set_missed_tick_behavior(MissedTickBehavior::Delay);
        sign.reset();
        let mut last = Instant::now();
        let mut buffer = vec![0; PIECE];
        let mut is_cut = false;
        loop {
            if self.waiting.is_empty() && self.peer_ended && !self.is_shut {
                self.is_shut = true;
                // Whoever is to hear of it may be gone.
                let _ = self.writer.shutdown().await;
            }
            if self.has_ended && self.is_shut {
                return Ok(());
            }
            if self.has_ended && self.is_released {
                self.reset("closed").await;
                return Ok(());
            }
            let room = (WINDOW - (self.said - self.acknowledged)).min(PIECE as u64) as usize;
            let may_say = !self.has_ended && room > 0 && self.pieces.len() < PIECES;
            let front = self
                .waiting
                .front()
                .map_or(&[][..], |piece| &piece[self.written..]);
            tokio::select! {
                event = self.events.recv(), if !is_cut => match event {
                    Some(event) => {
                        last = Instant::now();
                        self.take(event)?;
                    }
                    // All was heard: what it does not take any more is no loss to this side.
                    None if self.peer_ended => (is_cut, self.has_ended) = (true, true),
                    None => return Err(Broken {
                        reason: self.reason.get().cloned().unwrap_or_else(|| "the connection has ended".into()),
                        is_news: false,
                    }),
                },
                count = self.writer.write(front), if !front.is_empty() => match count {
                    Ok(count) => self.wrote(count, is_cut).await,
                    Err(_) => {
                        self.is_released = true;
                        let rest: usize = self.waiting.drain(..).map(|piece| piece.len()).sum();
                        self.taken += (rest - self.written) as u64;
                        self.written = 0;
                    }
                },
                count = self.reader.read(&mut buffer[..room]), if may_say => {
                    // A duplex has no errors.
                    let count = count.unwrap_or(0);
                    self.say(&buffer[..count]).await;
                }
                _ = &mut self.released, if !self.is_released => self.is_released = true,
                _ = sign.tick(), if !is_cut => {
                    if last.elapsed() >= SILENCE {
                        return Err(broken(format!("nothing was heard of the other side for {} s", SILENCE.as_secs())));
                    }
                    self.tell().await;
                }
            }
        }
    }

    fn take(&mut self, event: Event) -> Result<(), Broken> {
        match event {
            Event::Data(offset, bytes) => {
                self.check_next(offset)?;
                self.heard += bytes.len() as u64;
                if self.heard - self.taken > WINDOW
                    || self.waiting.len() >= PIECES
                    || bytes.is_empty()
                {
                    return Err(broken("more was sent than may be on its way"));
                }
                match self.is_released {
                    true => self.taken += bytes.len() as u64,
                    false => self.waiting.push_back(bytes),
                }
            }
            Event::Taken(offset) => {
                if offset < self.acknowledged || offset > self.said {
                    return Err(broken("something was acknowledged that was not sent"));
                }
                self.acknowledged = offset;
                while self.pieces.front().is_some_and(|end| *end <= offset) {
                    self.pieces.pop_front();
                }
            }
            Event::End(offset) => {
                self.check_next(offset)?;
                self.peer_ended = true;
            }
        }
        Ok(())
    }

    /// Whether this is where the other side's next word belongs.
    fn check_next(&self, offset: u64) -> Result<(), Broken> {
        if offset != self.heard || self.peer_ended {
            return Err(broken(format!(
                "the broker has lost or repeated a message: byte {offset} came where byte {} was to come",
                self.heard
            )));
        }
        Ok(())
    }

    /// So much of the first piece that waits was written.
    async fn wrote(&mut self, count: usize, is_cut: bool) {
        self.taken += count as u64;
        self.written += count;
        if self
            .waiting
            .front()
            .is_some_and(|piece| piece.len() == self.written)
        {
            self.waiting.pop_front();
            self.written = 0;
            self.untold += 1;
        }
        if !is_cut && (self.taken - self.told >= WINDOW / 4 || self.untold >= PIECES / 4) {
            self.tell().await;
        }
    }

    async fn tell(&mut self) {
        (self.told, self.untold) = (self.taken, 0);
        let (connection, offset) = (self.id, self.taken);
        self.post(Body::Taken { connection, offset }).await;
    }

    /// Sends a piece; none is the end.
    async fn say(&mut self, bytes: &[u8]) {
        let (connection, offset) = (self.id, self.said);
        if bytes.is_empty() {
            self.has_ended = true;
            return self.post(Body::End { connection, offset }).await;
        }
        self.said += bytes.len() as u64;
        self.pieces.push_back(self.said);
        let bytes = bytes.to_vec();
        let data = Body::Data {
            connection,
            offset,
            bytes,
        };
        self.post(data).await;
    }

    async fn reset(&self, reason: &str) {
        let (connection, reason) = (self.id, reason.to_owned());
        self.post(Body::Reset { connection, reason }).await;
    }

    async fn post(&self, body: Body) {
        let peer = self.peer.clone();
        self.wire.post(Post::new(peer, body)).await;
    }
}
