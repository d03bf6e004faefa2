//! The way to a domain's agent: a vchan that the agent serves, or, where its kernel has none, TCP
//! over the bridge. Either is announced by the agent in xenstore, and awaited there.

use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use xbee_link::vchan::Vchan;
use xbee_link::xenstore::{self, Xenstore};

use crate::domain::AgentStream;
use crate::readable::readable;
use crate::work;

/// Where an agent announces itself, below its domain's own directory in xenstore.
pub(crate) const AGENT_PATH: &str = "data/xbee/agent";

/// Whether a domain's agent can be spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Streams {
    /// Yes; counted, so that those from before a save are told from those after.
    Open(u32),
    /// Not while it is saved: no channel may be open then.
    Cut,
    /// The domain's end has been seen, and what is left of it is being removed.
    Ended,
}
/// An agent is found in a few looks. A guest that writes there without end is looked at no more often
/// than this.
const LOOKS_FREE: u32 = 16;
const LOOK_PAUSE: Duration = Duration::from_millis(500);

/// Events in a row with which nothing moved: a peer that keeps the protocol sends few of them. One
/// that goes on is heard no more often than this; its event channel is masked meanwhile.
const IDLE_EVENTS_MAX: u32 = 64;
const IDLE_EVENTS_PAUSE: Duration = Duration::from_millis(50);

/// What was found under the agent's path.
enum Found {
    Vchan(Box<Vchan>),
    /// A TCP port.
    Port(u16),
    Nothing,
}

/// Waits until the agent of the domain serves. Cancel-safe. The stream lives as long as `streams` is
/// `open`: of the domain's end, and of a save, it hears in no other way.
pub(crate) async fn connect(
    domid: u32,
    address: Option<Ipv6Addr>,
    open: Streams,
    streams: watch::Receiver<Streams>,
) -> Result<Box<dyn AgentStream>, io::Error> {
    let path = format!("/local/domain/{domid}/{AGENT_PATH}");
    let watched = path.clone();
    let mut store = work::blocking(move || {
        let mut store = Xenstore::open().map_err(|error| broken(&error))?;
        store
            .watch(&watched, "agent")
            .map_err(|error| broken(&error))?;
        Ok(store)
    })
    .await
    .map_err(io::Error::other)?;
    let events = readable(store.as_fd().try_clone_to_owned()?)?;
    let peer = u16::try_from(domid).map_err(io::Error::other)?;
    for looks in 0u32.. {
        if looks >= LOOKS_FREE {
            if looks == LOOKS_FREE {
                tracing::warn!(
                    domid,
                    "the guest announces and announces its agent, and none is there"
                );
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        let path = path.clone();
        let (found, again, back) = work::blocking(move || {
            let found = look(&mut store, peer, &path)?;
            // Events come with replies, too, and then the descriptor does not tell of them.
            let again = store
                .next_event()
                .map_err(|error| broken(&error))?
                .is_some();
            Ok((found, again, store))
        })
        .await
        .map_err(io::Error::other)?;
        store = back;
        match (found, address) {
            (Found::Vchan(vchan), _) => {
                return Ok(Box::new(AgentChannel::new(*vchan, open, streams)?));
            }
            (Found::Port(port), Some(address)) => {
                // Refused or lost: the agent announces itself anew when it listens again.
                match TcpStream::connect((address, port)).await {
                    Ok(stream) => return Ok(Box::new(stream)),
                    Err(error) => tracing::debug!(domid, %error, "the agent's port"),
                }
            }
            (Found::Port(_), None) => {
                return Err(io::Error::other(
                    "the guest's kernel has no vchan, and the domain has no network interface",
                ));
            }
            (Found::Nothing, _) => {}
        }
        if !again {
            events.readable().await?.clear_ready();
        }
    }
    Err(io::Error::other("the guest announced its agent too often"))
}

fn look(store: &mut Xenstore, peer: u16, path: &str) -> Result<Found, crate::Error> {
    // Only after these have been taken is a new event seen as one.
    while store
        .next_event()
        .map_err(|error| broken(&error))?
        .is_some()
    {}
    match Vchan::connect(store, peer, path) {
        Ok(Some(vchan)) => return Ok(Found::Vchan(Box::new(vchan))),
        Ok(None) => {}
        // What the guest wrote is none of the host's failures: it may write something better.
        Err(error) => tracing::debug!(peer, %error, "the agent's channel"),
    }
    let port = store
        .read(&format!("{path}/ipv6"))
        .map_err(|error| broken(&error))?;
    Ok(match port.and_then(|port| port.parse().ok()) {
        Some(port) => Found::Port(port),
        None => Found::Nothing,
    })
}

pub(crate) fn broken(error: &xenstore::Error) -> crate::Error {
    crate::Error::HypervisorBroken {
        detail: format!("xenstore: {}", crate::error::chain(error)),
    }
}

pub(crate) fn store() -> Result<Xenstore, crate::Error> {
    Xenstore::open().map_err(|error| broken(&error))
}

/// What xenstore has under a path.
pub(crate) fn read(path: &str) -> Result<Option<String>, crate::Error> {
    store()?.read(path).map_err(|error| broken(&error))
}

/// A vchan as a stream. There is no half-close: its peer sees the end when this is dropped.
#[derive(Debug)]
pub(crate) struct AgentChannel {
    shared: Arc<Mutex<Shared>>,
    driver: AbortHandle,
}

#[derive(Debug)]
struct Shared {
    /// `None` once the stream has been dropped or cut.
    vchan: Option<Vchan>,
    /// Reads and writes that moved something, or found that nothing ever will.
    moves: u64,
    /// The domain has ended, or the channel's events cannot be had.
    ended: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Shared {
    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()]
            .into_iter()
            .flatten()
        {
            waker.wake();
        }
    }
}

impl AgentChannel {
    pub(crate) fn new(
        vchan: Vchan,
        open: Streams,
        streams: watch::Receiver<Streams>,
    ) -> io::Result<Self> {
        let events = readable(vchan.as_fd().try_clone_to_owned()?)?;
        let shared = Arc::new(Mutex::new(Shared {
            vchan: Some(vchan),
            moves: 0,
            ended: false,
            reader: None,
            writer: None,
        }));
        let driver = tokio::spawn(drive(events, Arc::clone(&shared), open, streams)).abort_handle();
        Ok(Self { shared, driver })
    }

    fn poll(
        &self,
        operate: impl FnOnce(&mut Vchan) -> io::Result<usize>,
        at_end: io::Result<usize>,
        waker: impl FnOnce(&mut Shared) -> &mut Option<Waker>,
        context: &Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let mut shared = lock(&self.shared);
        let Some(vchan) = &mut shared.vchan else {
            return Poll::Ready(at_end);
        };
        match operate(vchan) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if shared.ended {
                    return Poll::Ready(at_end);
                }
                // The driver wakes under the lock, so nothing is missed in between.
                *waker(&mut shared) = Some(context.waker().clone());
                Poll::Pending
            }
            result => {
                shared.moves += 1;
                Poll::Ready(result)
            }
        }
    }
}

impl Drop for AgentChannel {
    fn drop(&mut self) {
        self.driver.abort();
        lock(&self.shared).vchan = None;
    }
}

fn lock(shared: &Mutex<Shared>) -> std::sync::MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wakes reader and writer when the other end has done something, and when its domain has ended.
async fn drive(
    events: AsyncFd<OwnedFd>,
    shared: Arc<Mutex<Shared>>,
    open: Streams,
    mut streams: watch::Receiver<Streams>,
) {
    let (mut moves, mut idle) = (0, 0u32);
    let end = loop {
        tokio::select! {
            // An error is the end of the back end itself.
            now = async { streams.wait_for(|streams| *streams != open).await.map_or(Streams::Ended, |now| *now) } => {
                if now != Streams::Ended {
                    lock(&shared).vchan = None;
                }
                break None;
            }
            ready = events.readable() => match ready {
                Ok(mut ready) => {
                    ready.clear_ready();
                    let moved = lock(&shared).moves;
                    idle = if moved == moves { idle.saturating_add(1) } else { 0 };
                    moves = moved;
                    if idle > IDLE_EVENTS_MAX {
                        tokio::time::sleep(IDLE_EVENTS_PAUSE).await;
                    }
                    let mut shared = lock(&shared);
                    let Some(vchan) = &shared.vchan else { return };
                    if let Err(error) = vchan.acknowledge() {
                        break Some(error);
                    }
                    shared.wake();
                }
                Err(error) => break Some(error),
            },
        }
    };
    if let Some(error) = end {
        tracing::warn!(%error, "the events of an agent's channel are lost");
    }
    let mut shared = lock(&shared);
    shared.ended = true;
    shared.wake();
}

impl AsyncRead for AgentChannel {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let unfilled = buffer.initialize_unfilled();
        let read = self.poll(
            |vchan| vchan.read(unfilled),
            Ok(0),
            |shared| &mut shared.reader,
            context,
        );
        read.map_ok(|len| buffer.advance(len))
    }
}

impl AsyncWrite for AgentChannel {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll(
            |vchan| vchan.write(bytes),
            Err(io::ErrorKind::BrokenPipe.into()),
            |shared| &mut shared.writer,
            context,
        )
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
