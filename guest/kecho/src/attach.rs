//! How a sink gets to a source: the link that the sink's node keeps up, and what the source's node does.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::address::NodeAddress;
use crate::error::Error;
use crate::membership::Membership;
use crate::memory::{Bell, Page, Ring};
use crate::message::{self, Answer, Attach, Position, Purpose, Role};
use crate::node::{DialError, Shared, local_node};
use crate::sink::SinkCore;
use crate::source::{AttachError, Attached, Gone, SourceCore, Way};
use crate::stream::{self, Side, Stream};
use crate::types::EventType;

/// How long to wait after the first failure; twice as long after each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// How long to wait at most.
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// How long a source's node may take to attach a sink.
pub(crate) const ATTACH_TIME: Duration = Duration::from_secs(5);

/// A sink's way to a source.
#[derive(Debug)]
pub(crate) struct Link {
    again: Arc<Notify>,
    progress: watch::Receiver<Progress>,
    /// `None` when it is to end by itself.
    task: Option<AbortHandle>,
}

/// How far it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Progress {
    Trying,
    Attached,
    Refused { code: String, text: String },
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Link {
    /// Attaches anew: what was there has broken.
    pub(crate) fn again(&self) {
        self.again.notify_one();
    }

    /// It found no such source in the list, which may have been one of a contact that did not know all yet.
    fn is_lost(&self) -> bool {
        let ended = self.task.as_ref().is_none_or(AbortHandle::is_finished);
        ended && !matches!(*self.progress.borrow(), Progress::Refused { .. })
    }

    /// Ends it, because the source has left. One that is just being attached is attached first: what was submitted
    /// until then is for this sink too.
    pub(crate) fn leave(mut self) {
        if *self.progress.borrow() == Progress::Trying {
            self.task = None;
        }
        self.again.notify_one();
    }

    pub(crate) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }
}

/// What holds an attachment.
enum Held {
    /// Within the process.
    Local(LocalLink),
    /// A connection whose end says that the source's process died.
    Memory(UnixStream),
    /// The sink itself sees the end.
    Socket,
}

/// Within a process nothing breaks: the sink goes when the link does.
struct LocalLink(Arc<SourceCore>, Uuid);

impl Drop for LocalLink {
    fn drop(&mut self) {
        self.0.detach(self.1, Gone::Left);
    }
}

/// Why a sink was not attached.
enum Failure {
    Refused { code: String, text: String },
    Broken(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Broken(error)
    }
}

impl From<AttachError> for Failure {
    fn from(error: AttachError) -> Failure {
        let (code, text) = refusal(&error);
        Failure::Refused { code, text }
    }
}

impl From<DialError> for Failure {
    fn from(error: DialError) -> Failure {
        match error {
            DialError::Refused { code, text } => Failure::Refused { code, text },
            DialError::Unreachable(error) => Failure::Broken(error),
        }
    }
}

const BAD_FILTER: &str = "bad-filter";
const TOO_SLOW: &str = "too-slow";
const NO_SOURCE: &str = "no-such-source";

fn refusal(error: &AttachError) -> (String, String) {
    let code = match error {
        AttachError::Filter(_) => BAD_FILTER,
        AttachError::Slow => TOO_SLOW,
        AttachError::Closed => NO_SOURCE,
        AttachError::TooMany => "limit",
        AttachError::System(_) => "system",
    };
    (code.to_owned(), error.to_string())
}

impl Shared {
    /// Begins the links between this node's sinks and the channel's sources that are not there.
    pub(crate) fn start_links(self: &Arc<Self>, m: &mut Membership) {
        let ports = m.participants.values().flat_map(|p| &p.ports);
        let sources = ports
            .filter(|port| port.role == Role::Source)
            .map(|port| port.id);
        let sources: Vec<Uuid> = sources.collect();
        for sink in m.sinks.values_mut() {
            for source in &sources {
                if sink.links.get(source).is_some_and(|link| !link.is_lost()) {
                    continue;
                }
                let again = Arc::new(Notify::new());
                let (sender, progress) = watch::channel(Progress::Trying);
                let link = Arc::clone(self).link(
                    m.name.clone(),
                    *source,
                    sink.core.clone(),
                    again.clone(),
                    sender,
                );
                let task = self.runtime.spawn(link).abort_handle();
                sink.links.insert(
                    *source,
                    Link {
                        again,
                        progress,
                        task: Some(task),
                    },
                );
            }
        }
    }

    async fn link(
        self: Arc<Self>,
        channel: String,
        source: Uuid,
        core: Arc<SinkCore>,
        again: Arc<Notify>,
        progress: watch::Sender<Progress>,
    ) {
        let mut pause = FIRST_PAUSE;
        loop {
            // The link is ended when the source has left, and begun anew if it was not on the list for a while only.
            let Some(address) = self.node_of(&channel, source) else {
                return;
            };
            // What was said before of what was there before.
            tokio::select! {
                biased;
                () = again.notified() => {}
                () = std::future::ready(()) => {}
            }
            match self.attach(&channel, source, &core, &address).await {
                Ok(held) => {
                    progress.send_replace(Progress::Attached);
                    pause = FIRST_PAUSE;
                    match held {
                        Held::Local(_local) => again.notified().await,
                        Held::Memory(stream) => {
                            tokio::select! {
                                () = stream::ended(&stream) => {}
                                () = again.notified() => {}
                            }
                            core.lost(source);
                        }
                        Held::Socket => again.notified().await,
                    }
                    progress.send_replace(Progress::Trying);
                    continue;
                }
                // It may be about to leave: the contact will say so.
                Err(Failure::Refused { code, text }) if code != NO_SOURCE => {
                    tracing::info!(channel, %source, code, text, "a sink is refused");
                    core.refused(source, code == TOO_SLOW);
                    progress.send_replace(Progress::Refused { code, text });
                    return;
                }
                Err(Failure::Refused { text, .. }) => {
                    tracing::debug!(channel, %source, text, "cannot attach");
                }
                Err(Failure::Broken(error)) => {
                    tracing::debug!(channel, %source, %error, "cannot attach");
                }
            }
            sleep(pause).await;
            pause = (2 * pause).min(LAST_PAUSE);
        }
    }

    /// Attaches a sink of this node, by the shortest way.
    async fn attach(
        self: &Arc<Self>,
        channel: &str,
        source: Uuid,
        core: &Arc<SinkCore>,
        address: &NodeAddress,
    ) -> Result<Held, Failure> {
        let request = core.request(source);
        let next = request.next;
        if self.transports.same_process
            && let Some(other) = local_node(address.node)
        {
            let found = other.find_source(channel, source);
            let found = found.map_err(|(code, text)| Failure::Refused { code, text })?;
            let page = Arc::new(Page::create()?.0);
            let sink = request.sink;
            let attached =
                found.attach_memory(request, Way::Process, page.clone(), core.bell().clone())?;
            core.add_memory(
                source,
                found.ring().clone(),
                page,
                found.space().clone(),
                attached,
            );
            found.confirm(sink);
            other.changed.notify_waiters();
            return Ok(Held::Local(LocalLink(found, sink)));
        }
        let purpose = Purpose::Attach(Attach::new(channel.to_owned(), source, request));
        let mut stream = self.dial(address, &purpose).await?.0;
        let attached = timeout(ATTACH_TIME, async {
            let (page, file) = Page::create()?;
            if let Stream::Unix(stream) = &stream {
                use std::os::fd::AsFd;
                stream::send_fds(stream, [file.as_fd(), core.bell().as_fd()]).await?;
            }
            let position = match message::read(&mut stream).await? {
                Answer::Attached(position) => position,
                Answer::Refusal { code, text } => return Err(Failure::Refused { code, text }),
                Answer::Welcome { .. } => {
                    return Err(io::Error::from(io::ErrorKind::InvalidData).into());
                }
            };
            let attached = attached(&position, next)?;
            let memory = match &stream {
                Stream::Unix(stream) => Some(stream::receive_fds(stream).await?),
                _ => None,
            };
            Ok((page, attached, memory))
        });
        let late = |_| Failure::Broken(io::ErrorKind::TimedOut.into());
        let (page, attached, memory) = attached.await.map_err(late)??;
        match (stream, memory) {
            (Stream::Unix(stream), Some([ring, space])) => {
                let (ring, space) = (Arc::new(Ring::open(ring)?), Arc::new(Bell::open(space)));
                core.add_memory(source, ring, Arc::new(page), space, attached);
                Ok(Held::Memory(stream))
            }
            (stream, _) => {
                core.add_socket(source, stream.into_wire(Side::Sink, self.pulse)?, attached);
                Ok(Held::Socket)
            }
        }
    }

    /// A source of this node.
    pub(crate) fn find_source(
        &self,
        channel: &str,
        source: Uuid,
    ) -> Result<Arc<SourceCore>, (String, String)> {
        let state = self.state();
        let found = state
            .channels
            .get(channel)
            .and_then(|m| m.sources.get(&source));
        found.map(|port| port.core.clone()).ok_or_else(|| {
            let text = format!("the channel '{channel}' has no source {source} here");
            (NO_SOURCE.to_owned(), text)
        })
    }

    /// Attaches a sink of another process to a source of this node.
    pub(crate) async fn serve_attach(self: Arc<Self>, mut stream: Stream, attach: Attach) {
        let (source, sink) = (attach.source, attach.sink);
        match timeout(ATTACH_TIME, self.try_attach(&mut stream, attach)).await {
            Ok(Ok(Some((core, ticket)))) => {
                if let Some(ticket) = ticket {
                    let started = stream
                        .into_wire(Side::Source, self.pulse)
                        .and_then(|wire| ticket.start(wire));
                    if let Err(error) = started {
                        tracing::warn!(%source, %sink, %error, "cannot serve a sink");
                        core.detach(sink, Gone::Broken);
                    }
                    core.confirm(sink);
                } else if let Stream::Unix(stream) = stream {
                    core.confirm(sink);
                    self.watch(core, sink, stream);
                }
                self.changed.notify_waiters();
            }
            Ok(Ok(None)) => {}
            Ok(Err(error)) => tracing::debug!(%source, %sink, %error, "cannot attach a sink"),
            Err(_) => tracing::debug!(%source, %sink, "a sink does not attach"),
        }
    }

    async fn try_attach(
        &self,
        stream: &mut Stream,
        attach: Attach,
    ) -> io::Result<Option<(Arc<SourceCore>, Option<crate::socket::SocketTicket>)>> {
        // What is attached and cannot be told so is broken.
        struct Undo<'a>(&'a SourceCore, Uuid);
        impl Drop for Undo<'_> {
            fn drop(&mut self) {
                self.0.detach(self.1, Gone::Broken);
            }
        }
        let sink = attach.sink;
        let memory = match &*stream {
            Stream::Unix(stream) => {
                let [page, bell] = stream::receive_fds(stream).await?;
                Some((Arc::new(Page::open(page)?), Arc::new(Bell::open(bell))))
            }
            _ => None,
        };
        let found = match self.find_source(&attach.channel, attach.source) {
            Ok(found) => found,
            Err((code, text)) => {
                message::write(stream, &Answer::Refusal { code, text }).await?;
                return Ok(None);
            }
        };
        if let Some(before) = self.watchers().remove(&(attach.source, sink)) {
            before.abort();
        }
        let shared = memory.is_some();
        let way = match &*stream {
            Stream::Unix(_) => Way::SharedMemory,
            Stream::Link(_) => Way::Vsock,
            Stream::Tcp(_) => Way::Tcp,
            Stream::Tls(..) => Way::Tls,
        };
        let attached = match memory {
            Some((page, bell)) => found
                .attach_memory(attach.request(), way, page, bell)
                .map(|attached| (attached, None)),
            None => found
                .attach_socket(attach.request(), way)
                .map(|(attached, ticket)| (attached, Some(ticket))),
        };
        let (attached, ticket) = match attached {
            Ok(attached) => attached,
            Err(error) => {
                let (code, text) = refusal(&error);
                message::write(stream, &Answer::Refusal { code, text }).await?;
                return Ok(None);
            }
        };
        let undo = Undo(&found, sink);
        message::write(stream, &Answer::Attached(position(&attached))).await?;
        if let (true, Stream::Unix(stream)) = (shared, &*stream) {
            use std::os::fd::AsFd;
            let ring = found.ring().file().ok_or(io::ErrorKind::Unsupported)?;
            stream::send_fds(stream, [ring, found.space().as_fd()]).await?;
        }
        std::mem::forget(undo);
        Ok(Some((found, ticket)))
    }

    /// Waits for the death of a sink's process.
    fn watch(self: &Arc<Self>, core: Arc<SourceCore>, sink: Uuid, stream: UnixStream) {
        let key = (core.id, sink);
        let node = self.clone();
        let task = self.runtime.spawn(async move {
            stream::ended(&stream).await;
            // One that came again has ended this task.
            core.detach(sink, Gone::Broken);
            node.watchers().remove(&key);
        });
        if let Some(before) = self.watchers().insert(key, task.abort_handle()) {
            before.abort();
        }
    }
}

fn position(attached: &Attached) -> Position {
    Position {
        slot: attached.slot as u32,
        position: attached.position,
        ack_bytes: attached.ack_bytes,
        sequence: attached.sequence,
        lost: attached.lost,
        types: attached
            .types
            .iter()
            .map(|kind| kind.encode().into())
            .collect(),
    }
}

fn attached(position: &Position, next: Option<u64>) -> io::Result<Attached> {
    let types = position.types.iter().map(|bytes| {
        let kind = EventType::decode(bytes);
        kind.map(Arc::new)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    });
    Ok(Attached {
        slot: position.slot as usize,
        position: position.position,
        ack_bytes: position.ack_bytes,
        sequence: position.sequence,
        lost: position.lost,
        next,
        types: types.collect::<io::Result<_>>()?,
    })
}

/// What a sink's creator is told of a refusal.
pub(crate) fn refused(code: String, text: String) -> Error {
    Error::Refused { code, text }
}
