//! One client's connection.

use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::broker::ConnectionId;
use crate::decode::Decoder;
use crate::destination::Rights;
use crate::frame::{Frame, Version};
use crate::handshake::{self, Accepted, HeartBeats};
use crate::outbox::Outbox;
use crate::refused::Refused;
use crate::server::{Shared, refuse};

/// Nothing is read from a client that does not take this much of what is written to it.
const UNREAD_BYTES: usize = 256 * 1024;
/// Nor from one for which so many receipts wait for the disk.
const RECEIPTS_WAITING: usize = 4096;
/// How often limits on time are looked at, at least.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// The same, at most.
const LOOK_PAUSE: Duration = Duration::from_millis(10);
/// How long a client may take to read its last frame and close.
const LINGER: Duration = Duration::from_secs(2);

/// Serves a client to its end. With `full` it only gets to hear why it cannot stay.
pub(crate) async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    shared: &Rc<Shared>,
    id: ConnectionId,
    stream: S,
    full: Option<Refused>,
) -> io::Result<()> {
    let now = Instant::now();
    let outbox = Rc::new(Outbox::default());
    let mut connection = Connection {
        shared,
        id,
        stream,
        decoder: Decoder::new(Version::V1_2, shared.limits.frame()),
        outbox: outbox.clone(),
        timer: Box::pin(sleep_until(now)),
        heard: now,
        wrote: now,
        frame_since: None,
        heart_beats: HeartBeats::default(),
    };
    match full {
        Some(refused) => refuse(&outbox, Version::V1_2, &refused, None),
        None => {
            let result = connection.session().await;
            shared.leave(id);
            result?;
        }
    }
    connection.end().await
}

enum Event {
    /// So many bytes are in the shared buffer.
    Input(usize),
    /// Something was written.
    Wrote,
    /// There is something new to write, or nothing more.
    Woken,
    Timer,
}

struct Connection<'a, S> {
    shared: &'a Shared,
    id: ConnectionId,
    stream: S,
    decoder: Decoder,
    outbox: Rc<Outbox>,
    timer: Pin<Box<Sleep>>,
    /// When something was read last.
    heard: Instant,
    /// When something was written last.
    wrote: Instant,
    /// When the frame began that is not complete.
    frame_since: Option<Instant>,
    heart_beats: HeartBeats,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<'_, S> {
    /// All until the last frame is in the outbox.
    async fn session(&mut self) -> io::Result<()> {
        let limit = Duration::from_secs(self.shared.limits.connect_timeout_s);
        let deadline = Instant::now() + limit;
        let first = tokio::time::timeout_at(deadline, self.first_frame()).await;
        let (frame, rest) = match first {
            Ok(Ok(Ok(first))) => first,
            Ok(Ok(Err(refused))) => {
                refuse(&self.outbox, Version::V1_2, &refused, None);
                return Ok(());
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                let refused = Refused::Timeout("no CONNECT in time");
                refuse(&self.outbox, Version::V1_2, &refused, None);
                return Ok(());
            }
        };
        let accepted = handshake::accept(&frame, self.shared.limits.heart_beat_min_ms);
        let (accepted, rights) = match accepted {
            Ok(accepted) => match self.log_in(&frame, &accepted).await {
                Some(rights) => (accepted, rights),
                None => {
                    refuse(&self.outbox, accepted.version, &Refused::Login, None);
                    return Ok(());
                }
            },
            Err(refused) => {
                let receipt = match refused {
                    Refused::NotConnected(_) => frame.headers.get("receipt"),
                    _ => None,
                };
                refuse(&self.outbox, Version::V1_2, &refused, receipt);
                return Ok(());
            }
        };
        self.decoder.set_version(accepted.version);
        self.heart_beats = accepted.heart_beats;
        let session = format!("{:x}-{}", self.shared.start_ms, self.id.0);
        let answer = handshake::connected(&accepted, &session);
        self.outbox.fill(|out| answer.encode(accepted.version, out));
        self.shared.join(self.id, &self.outbox);
        let (id, version) = (self.id, accepted.version);
        self.shared
            .with_broker(|broker| broker.connect(id, version, rights));
        self.heard = Instant::now();
        self.wrote = self.heard;
        self.take(&rest);
        self.look();
        while !self.outbox.is_closed() {
            match self.event().await? {
                Event::Input(0) => return Ok(()),
                Event::Input(count) => {
                    self.heard = Instant::now();
                    let shared = self.shared;
                    let input = shared.input.borrow();
                    self.take(&input[..count]);
                }
                Event::Wrote => {
                    self.wrote = Instant::now();
                    let unsent = self.outbox.len();
                    self.shared.with_broker(|broker| broker.unsent(id, unsent));
                }
                Event::Woken => {}
                Event::Timer => self.look(),
            }
        }
        Ok(())
    }

    /// The first frame, and what came with it.
    async fn first_frame(&mut self) -> io::Result<Result<(Frame, Vec<u8>), Refused>> {
        loop {
            let count = match self.event().await? {
                Event::Input(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Event::Input(count) => count,
                Event::Timer => {
                    self.timer.as_mut().reset(Instant::now() + LOOK_EVERY);
                    continue;
                }
                _ => continue,
            };
            let input = self.shared.input.borrow();
            let mut rest = &input[..count];
            match self.decoder.decode(&mut rest) {
                Ok(Some(frame)) => return Ok(Ok((frame, rest.to_vec()))),
                Ok(None) => {}
                Err(malformed) => return Ok(Err(malformed.into())),
            }
        }
    }

    async fn log_in(&self, frame: &Frame, accepted: &Accepted) -> Option<Arc<Rights>> {
        let users = self.shared.users.clone();
        if users.is_open() {
            return users.check(None, None);
        }
        let passcode = handshake::credential(frame, accepted.version, "passcode");
        let (login, passcode) = (accepted.login.clone(), passcode.map(str::to_owned));
        let shown = login.clone().unwrap_or_default();
        let _turn = self.shared.logins.acquire().await.ok()?;
        let check = move || users.check(login.as_deref(), passcode.as_deref());
        let rights = tokio::task::spawn_blocking(check).await.ok().flatten();
        if rights.is_none() {
            tracing::warn!(login = ?shown, "login refused");
        }
        rights
    }

    /// Takes what was read.
    fn take(&mut self, mut input: &[u8]) {
        let (id, decoder) = (self.id, &mut self.decoder);
        self.shared.with_broker(|broker| {
            while !input.is_empty() {
                match decoder.decode(&mut input) {
                    Ok(Some(frame)) => {
                        self.frame_since = None;
                        broker.frame(id, frame);
                    }
                    Ok(None) => {}
                    Err(malformed) => {
                        let receipt = decoder.receipt().map(Box::from);
                        broker.refuse(id, malformed.into(), receipt);
                        break;
                    }
                }
            }
        });
        match self.decoder.is_within_frame() {
            true => self.frame_since = self.frame_since.or(Some(self.heard)),
            false => self.frame_since = None,
        }
    }

    /// Looks at what has to happen by the clock, and says when to look again.
    fn look(&mut self) {
        let now = Instant::now();
        let limits = &self.shared.limits;
        let seconds = Duration::from_secs;
        let (frame, write) = (
            seconds(limits.frame_timeout_s),
            seconds(limits.write_timeout_s),
        );
        let over = |since: Instant, limit: Duration| now.duration_since(since) >= limit;
        let mut next = now + LOOK_EVERY.min(frame / 2).min(write / 2).max(LOOK_PAUSE);
        let mut ended = None;
        if self.frame_since.is_some_and(|since| over(since, frame)) {
            ended = Some("a frame was not complete in time");
        }
        if self.outbox.len() > 0 && over(self.wrote, write) {
            ended = Some("what was written was not taken in time");
        }
        // Where we do not read because the client does not, its silence is our doing.
        if let Some(after) = self.heart_beats.dead_after().filter(|_| self.reads()) {
            if over(self.heard, after) {
                ended = Some("no heart-beat");
            }
            next = next.min(self.heard + after);
        }
        if let Some(after) = self.heart_beats.send_after() {
            if over(self.wrote, after) {
                if self.outbox.len() == 0 {
                    self.outbox.fill(|out| out.push(b'\n'));
                }
                next = next.min(now + after);
            } else {
                next = next.min(self.wrote + after);
            }
        }
        self.outbox.shrink();
        self.timer.as_mut().reset(next);
        if let Some(why) = ended {
            let id = self.id;
            self.shared
                .with_broker(|broker| broker.refuse(id, Refused::Timeout(why), None));
        }
    }

    /// Whether anything is read now.
    fn reads(&self) -> bool {
        self.outbox.len() < UNREAD_BYTES
    }

    async fn event(&mut self) -> io::Result<Event> {
        let waiting = self
            .shared
            .with_broker(|broker| broker.receipts_waiting(self.id));
        let reads = waiting < RECEIPTS_WAITING;
        let mut first = true;
        poll_fn(|cx| {
            let first = std::mem::take(&mut first);
            self.poll_event(cx, reads, first)
        })
        .await
    }

    fn poll_event(
        &mut self,
        cx: &mut Context<'_>,
        reads: bool,
        first: bool,
    ) -> Poll<io::Result<Event>> {
        // First, or a client that always has something for us would never get a heart-beat.
        if self.timer.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(Event::Timer));
        }
        if self.outbox.len() > 0 {
            if self.outbox.poll_write(cx, &mut self.stream)?.is_ready() {
                return Poll::Ready(Ok(Event::Wrote));
            }
        } else {
            // What TLS holds back.
            let _ = Pin::new(&mut self.stream).poll_flush(cx)?;
        }
        if reads && self.reads() {
            let mut input = self.shared.input.borrow_mut();
            let mut buffer = ReadBuf::new(&mut input);
            if Pin::new(&mut self.stream)
                .poll_read(cx, &mut buffer)?
                .is_ready()
            {
                return Poll::Ready(Ok(Event::Input(buffer.filled().len())));
            }
        }
        self.outbox.register(cx);
        match first {
            true => Poll::Pending,
            false => Poll::Ready(Ok(Event::Woken)),
        }
    }

    /// Writes what is left, closes our side, and waits until the client has read it: a socket that is closed with something
    /// unread in it takes back what was written.
    async fn end(mut self) -> io::Result<()> {
        let all = async {
            poll_fn(|cx| {
                while self.outbox.len() > 0 {
                    std::task::ready!(self.outbox.poll_write(cx, &mut self.stream))?;
                }
                Pin::new(&mut self.stream).poll_shutdown(cx)
            })
            .await?;
            loop {
                let count = poll_fn(|cx| {
                    let mut input = self.shared.input.borrow_mut();
                    let mut buffer = ReadBuf::new(&mut input);
                    Pin::new(&mut self.stream)
                        .poll_read(cx, &mut buffer)
                        .map_ok(|()| buffer.filled().len())
                });
                if count.await? == 0 {
                    return Ok(());
                }
            }
        };
        tokio::time::timeout(LINGER, all)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}
