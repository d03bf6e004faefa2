//! Connections over which two nodes, or a node and the registry, ask and tell each other things.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use uuid::Uuid;

use crate::message::{self, Body, Envelope, Notice, Reply, Request};
use crate::stream::Stream;

/// Frames that wait to be sent; who lets more wait is disconnected.
const MAX_WAITING_FRAMES: usize = 8192;
/// Requests under way.
const MAX_REQUESTS: usize = 8192;

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The other side closed it, or its machine said that nobody is there.
    Closed,
    /// Nothing came for too long.
    Silent,
}

/// Who answers.
pub(crate) trait Handler: Send + Sync + 'static {
    fn request(self: Arc<Self>, control: &Arc<Control>, request: Request) -> Reply;
    fn notice(self: Arc<Self>, control: &Arc<Control>, notice: Notice);
    fn ended(self: Arc<Self>, control: &Arc<Control>, end: End);
}

type Then = Box<dyn FnOnce(Option<Reply>) + Send>;

/// A connection.
pub(crate) struct Control {
    /// Who is at the other end.
    pub node: Uuid,
    out: mpsc::Sender<Vec<u8>>,
    next: AtomicU64,
    /// `None` after the end.
    pending: Mutex<Option<HashMap<u64, Then>>>,
    stop: Notify,
    ended: watch::Sender<bool>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Control({})", self.node)
    }
}

/// How often to say something, and after what silence the other side is dead.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pulse {
    pub heartbeat: Duration,
    pub dead_after: Duration,
}

impl Control {
    /// Begins with a stream whose first frames have been exchanged. `hold` is dropped at the end.
    pub(crate) fn start<H: Handler>(
        stream: Stream,
        node: Uuid,
        handler: Arc<H>,
        pulse: Pulse,
        hold: impl Send + 'static,
    ) -> Arc<Control> {
        let (out, waiting) = mpsc::channel(MAX_WAITING_FRAMES);
        let control = Arc::new(Control {
            node,
            out,
            next: AtomicU64::new(1),
            pending: Mutex::new(Some(HashMap::new())),
            stop: Notify::new(),
            ended: watch::Sender::new(false),
        });
        let run = control.clone();
        tokio::spawn(async move {
            let end = run.clone().run(stream, waiting, &handler, pulse).await;
            let pending = run.pending().take();
            run.ended.send_replace(true);
            handler.ended(&run, end);
            for then in pending.into_iter().flat_map(HashMap::into_values) {
                then(None);
            }
            drop(hold);
        });
        control
    }

    fn pending(&self) -> std::sync::MutexGuard<'_, Option<HashMap<u64, Then>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run<H: Handler>(
        self: Arc<Self>,
        stream: Stream,
        waiting: mpsc::Receiver<Vec<u8>>,
        handler: &Arc<H>,
        pulse: Pulse,
    ) -> End {
        let (mut input, output) = tokio::io::split(stream);
        let read = async {
            loop {
                let envelope = timeout(pulse.dead_after, message::read(&mut input)).await;
                let envelope: Envelope = match envelope {
                    Ok(Ok(envelope)) => envelope,
                    Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => {
                        return End::Silent;
                    }
                    Ok(Err(error)) => {
                        tracing::debug!(node = %self.node, %error, "a control connection ends");
                        return End::Closed;
                    }
                    Err(_) => return End::Silent,
                };
                match envelope.body {
                    Body::Ping => {}
                    Body::Request(request) => {
                        let reply = handler.clone().request(&self, request);
                        self.send(envelope.id, Body::Reply(reply));
                    }
                    Body::Reply(reply) => {
                        let then = self.pending().as_mut().and_then(|p| p.remove(&envelope.id));
                        if let Some(then) = then {
                            then(Some(reply));
                        }
                    }
                    Body::Notice(notice) => handler.clone().notice(&self, notice),
                }
            }
        };
        tokio::select! {
            end = read => end,
            () = write(output, waiting, pulse) => End::Closed,
            () = self.stop.notified() => End::Closed,
        }
    }

    fn send(&self, id: u64, body: Body) {
        let sent = match message::frame(&Envelope { id, body }) {
            Ok(frame) => self.out.try_send(frame).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = sent {
            tracing::warn!(node = %self.node, error, "a control connection is given up");
            self.close();
        }
    }

    /// Tells the other side something.
    pub(crate) fn notify(&self, notice: Notice) {
        self.send(0, Body::Notice(notice));
    }

    /// Asks; `then` gets the answer, before anything that comes after it is looked at, or `None`
    /// where the connection ends first.
    pub(crate) fn request_then(
        &self,
        request: Request,
        then: impl FnOnce(Option<Reply>) + Send + 'static,
    ) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let then: Then = Box::new(then);
        let refused = match &mut *self.pending() {
            Some(pending) if pending.len() < MAX_REQUESTS => {
                pending.insert(id, then);
                None
            }
            _ => Some(then),
        };
        match refused {
            Some(then) => then(None),
            None => self.send(id, Body::Request(request)),
        }
    }

    /// Asks.
    pub(crate) fn request(&self, request: Request) -> oneshot::Receiver<Option<Reply>> {
        let (sender, receiver) = oneshot::channel();
        self.request_then(request, |reply| {
            // Who asked may have gone.
            let _ = sender.send(reply);
        });
        receiver
    }

    /// Whether it has ended.
    pub(crate) fn is_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// Waits for its end.
    pub(crate) async fn wait(&self) {
        // The sender is here.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// Ends it.
    pub(crate) fn close(&self) {
        self.stop.notify_one();
    }

    /// Waits until what was to be sent is sent, as far as the system takes it.
    pub(crate) async fn flushed(&self) {
        // What is taken out of the queue last is under way before others run.
        while self.out.capacity() < MAX_WAITING_FRAMES && !self.is_ended() {
            sleep(Duration::from_millis(1)).await;
        }
        tokio::task::yield_now().await;
    }
}

/// Sends what waits, and signs of life.
async fn write(
    mut output: impl AsyncWrite + Unpin,
    mut waiting: mpsc::Receiver<Vec<u8>>,
    pulse: Pulse,
) {
    let Ok(ping) = message::frame(&Envelope {
        id: 0,
        body: Body::Ping,
    }) else {
        return;
    };
    let mut beat = interval(pulse.heartbeat);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    beat.reset_at(Instant::now() + pulse.heartbeat);
    loop {
        let frame = tokio::select! {
            frame = waiting.recv() => frame,
            _ = beat.tick() => Some(ping.clone()),
        };
        let Some(frame) = frame else { return };
        let sent = async {
            output.write_all(&frame).await?;
            output.flush().await
        };
        if sent.await.is_err() {
            return;
        }
    }
}
