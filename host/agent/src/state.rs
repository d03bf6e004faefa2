//! The state of one connection, shared by its tasks and its users' handles.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use xbee_protocol::{
    ExitStatus, GuestMessage, HostMessage, MAX_REQUESTS, MAX_STREAMS, Reply, Request, StreamBody,
    encode_frame,
};

use crate::Error;
use crate::event::EventQueue;
use crate::stream::Stream;

/// Data wait while more than this is on its way out, in bytes.
pub(crate) const OUTGOING_DATA_BYTES: usize = 1024 * 1024;
/// An agent that lets this much pile up does not read, in bytes.
const OUTGOING_LIMIT_BYTES: usize = 16 * 1024 * 1024;

/// Shared by all that use the connection.
#[derive(Debug)]
pub(crate) struct Shared {
    state: Mutex<State>,
    /// There are frames to write.
    pub(crate) outgoing_ready: Notify,
    /// There are events to deliver.
    pub(crate) events_ready: Notify,
    /// The connection is closed; [`State::closed`] says why.
    pub(crate) closing: CancellationToken,
}

/// A request without a reply.
#[derive(Debug)]
struct Pending {
    sender: oneshot::Sender<Reply>,
    /// Streams on which the agent says nothing more once it has replied.
    ended_by_reply: Option<u32>,
    /// Streams on which it says nothing more when it has refused.
    ended_by_failure: [Option<u32>; 2],
}

/// Streams that a request opens.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Opens {
    /// None.
    Nothing,
    /// The content of a file, to the agent.
    Put,
    /// The content of a file, from the agent.
    Get,
    /// A command's standard streams.
    Exec {
        /// Standard error has a stream of its own.
        stderr: bool,
    },
    /// A TCP connection.
    Forward,
}

/// The state proper.
#[derive(Debug, Default)]
pub(crate) struct State {
    closed: Option<Arc<Error>>,
    outgoing: Vec<u8>,
    /// Writers of data that wait until `outgoing` has shrunk.
    pub(crate) waiting_for_room: Vec<Waker>,
    next_request: u32,
    requests: HashMap<u32, Pending>,
    next_stream: u32,
    streams: HashMap<u32, Stream>,
    exits: HashMap<u32, oneshot::Sender<ExitStatus>>,
    pub(crate) events: EventQueue,
}

/// A request under way.
#[derive(Debug)]
pub(crate) struct Sent {
    pub(crate) reply: oneshot::Receiver<Reply>,
    /// The first stream it opened.
    pub(crate) stream: u32,
    /// Tells of the end of an `Exec`.
    pub(crate) exit: Option<oneshot::Receiver<ExitStatus>>,
}

impl Shared {
    pub(crate) fn new(events: EventQueue) -> Self {
        Shared {
            state: Mutex::new(State {
                events,
                next_stream: 1,
                ..State::default()
            }),
            outgoing_ready: Notify::new(),
            events_ready: Notify::new(),
            closing: CancellationToken::new(),
        }
    }

    /// No code panics while it holds the state, so poison has no meaning.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the connection, once: the first reason stands.
    pub(crate) fn close(&self, reason: Error) {
        let mut state = self.lock();
        if state.closed.is_none() {
            state.closed = Some(Arc::new(reason));
            // Dropping the senders wakes those who wait for replies.
            state.requests.clear();
            state.exits.clear();
            for stream in state.streams.values_mut() {
                stream.wake();
            }
            for waker in state.waiting_for_room.drain(..) {
                waker.wake();
            }
        }
        drop(state);
        self.closing.cancel();
        self.events_ready.notify_one();
        self.outgoing_ready.notify_one();
    }

    /// Why this connection is of no more use.
    pub(crate) fn lost(&self) -> Error {
        match &self.lock().closed {
            Some(reason) => Error::Lost(Arc::clone(reason)),
            None => Error::Closed,
        }
    }

    /// Puts a message on its way.
    pub(crate) fn send(&self, message: &HostMessage) -> Result<(), Error> {
        let result = self.lock().queue(message);
        self.outgoing_ready.notify_one();
        result
    }

    /// Puts a request on its way. `build` makes it from the id of the first stream it opens;
    /// a second one has the next id.
    pub(crate) fn request(
        &self,
        opens: Opens,
        build: impl FnOnce(u32) -> Request,
    ) -> Result<Sent, Error> {
        let sent = self.lock().request(opens, build);
        self.outgoing_ready.notify_one();
        sent
    }

    /// Acts on a message from the agent.
    pub(crate) fn receive(&self, message: GuestMessage) -> Result<(), Error> {
        let mut state = self.lock();
        match message {
            GuestMessage::Heartbeat => Ok(()),
            GuestMessage::Response { id, reply } => state.response(id, reply),
            GuestMessage::Task {
                conversation,
                event,
            } => {
                state.events.push(conversation, event)?;
                self.events_ready.notify_one();
                Ok(())
            }
            GuestMessage::ProcessExited { stream, status } => {
                // The process's handle may be gone; the agent must not say it twice, though.
                let sender = state
                    .exits
                    .remove(&stream)
                    .ok_or_else(|| Error::protocol("end of a process that does not run"))?;
                let _gone = sender.send(status);
                Ok(())
            }
            GuestMessage::Stream { stream, body } => {
                let result = state.on_stream(stream, body);
                drop(state);
                // It may have made credit to be sent.
                self.outgoing_ready.notify_one();
                result
            }
            GuestMessage::Refuse(failure) => Err(Error::refused(failure)),
            GuestMessage::Hello(_) | GuestMessage::Proof(_) => {
                Err(Error::protocol("a second handshake"))
            }
        }
    }
}

impl State {
    /// Why the connection is of no more use, if it is.
    pub(crate) fn closed(&self) -> Option<Error> {
        self.closed
            .as_ref()
            .map(|reason| Error::Lost(Arc::clone(reason)))
    }

    /// The reason for the last event.
    pub(crate) fn close_reason(&self) -> Option<Arc<Error>> {
        self.closed.clone()
    }

    pub(crate) fn queue(&mut self, message: &HostMessage) -> Result<(), Error> {
        if let Some(lost) = self.closed() {
            return Err(lost);
        }
        if self.outgoing.len() > OUTGOING_LIMIT_BYTES {
            return Err(Error::protocol(
                "the agent does not read what is sent to it",
            ));
        }
        encode_frame(message, &mut self.outgoing).map_err(Error::TooLarge)
    }

    /// Whether data may be queued now.
    pub(crate) fn has_room(&self) -> bool {
        self.outgoing.len() < OUTGOING_DATA_BYTES
    }

    /// The frames to write now; `spare` becomes the new, empty queue.
    pub(crate) fn take_outgoing(&mut self, spare: &mut Vec<u8>) {
        spare.clear();
        std::mem::swap(&mut self.outgoing, spare);
        for waker in self.waiting_for_room.drain(..) {
            waker.wake();
        }
    }

    fn request(&mut self, opens: Opens, build: impl FnOnce(u32) -> Request) -> Result<Sent, Error> {
        if self.requests.len() >= MAX_REQUESTS {
            return Err(Error::TooMany {
                what: "requests",
                limit: MAX_REQUESTS,
            });
        }
        let opened: &[Stream] = &match opens {
            Opens::Nothing => vec![],
            Opens::Put => vec![Stream::to_guest()],
            Opens::Get => vec![Stream::file_from_guest()],
            Opens::Exec { stderr: false } => vec![Stream::both_ways()],
            Opens::Exec { stderr: true } => vec![Stream::both_ways(), Stream::from_guest()],
            Opens::Forward => vec![Stream::both_ways()],
        };
        if self.streams.len() + opened.len() > MAX_STREAMS {
            return Err(Error::TooMany {
                what: "streams",
                limit: MAX_STREAMS,
            });
        }
        let first = self.next_stream;
        // Ids are not used twice, so that what is still on its way for an old stream hits no new one.
        let Some(next_stream) = first.checked_add(opened.len() as u32) else {
            return Err(Error::TooMany {
                what: "streams in its life",
                limit: u32::MAX as usize,
            });
        };
        let id = self.next_request;
        let request = build(first);
        if let Request::Execute(task) = &request {
            self.events.executing(task.conversation);
        }
        self.queue(&HostMessage::Request { id, request })?;
        self.next_request = id.wrapping_add(1);
        self.next_stream = next_stream;
        for (id, stream) in (first..).zip(opened) {
            self.streams.insert(id, stream.clone());
        }
        let (sender, reply) = oneshot::channel();
        let exit = matches!(opens, Opens::Exec { .. }).then(|| {
            let (sender, receiver) = oneshot::channel();
            self.exits.insert(first, sender);
            receiver
        });
        self.requests.insert(
            id,
            Pending {
                sender,
                ended_by_reply: matches!(opens, Opens::Put | Opens::Get).then_some(first),
                ended_by_failure: match opens {
                    Opens::Exec { stderr: true } => [Some(first), Some(first + 1)],
                    Opens::Exec { stderr: false } | Opens::Forward => [Some(first), None],
                    Opens::Nothing | Opens::Put | Opens::Get => [None, None],
                },
            },
        );
        Ok(Sent {
            reply,
            stream: first,
            exit,
        })
    }

    fn response(&mut self, id: u32, reply: Reply) -> Result<(), Error> {
        let pending = self
            .requests
            .remove(&id)
            .ok_or_else(|| Error::protocol("reply to a request that was not made"))?;
        let failed = matches!(reply, Reply::Failed(_));
        for stream in pending
            .ended_by_failure
            .into_iter()
            .flatten()
            .filter(|_| failed)
        {
            self.exits.remove(&stream);
            self.end_by_guest(stream);
        }
        if let Some(stream) = pending.ended_by_reply {
            self.end_by_guest(stream);
        }
        // Who asked may have gone away.
        let _gone = pending.sender.send(reply);
        Ok(())
    }

    fn end_by_guest(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.guest_ended = true;
            stream.host_ended = true;
            stream.wake();
        }
        self.forget_if_done(id);
    }

    fn on_stream(&mut self, id: u32, body: StreamBody) -> Result<(), Error> {
        let used = id < self.next_stream;
        let Some(stream) = self.streams.get_mut(&id) else {
            return match body {
                // These may cross with the end of a stream.
                StreamBody::Credit(_) | StreamBody::Reset if used => Ok(()),
                _ => Err(Error::protocol("message on a stream that is not open")),
            };
        };
        let credit = stream.receive(body)?;
        self.grant(id, credit)?;
        self.forget_if_done(id);
        Ok(())
    }

    /// Lets the agent send as much more.
    pub(crate) fn grant(&mut self, id: u32, bytes: u32) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        self.queue(&HostMessage::Stream {
            stream: id,
            body: StreamBody::Credit(bytes),
        })
    }

    pub(crate) fn stream(&mut self, id: u32) -> Option<&mut Stream> {
        self.streams.get_mut(&id)
    }

    /// Whether a command that was started on the stream still runs.
    pub(crate) fn runs(&self, stream: u32) -> bool {
        self.exits.contains_key(&stream)
    }

    pub(crate) fn forget_if_done(&mut self, id: u32) {
        if self.streams.get(&id).is_some_and(Stream::is_done) {
            self.streams.remove(&id);
        }
    }

    /// What is known of a task's output is durable here.
    pub(crate) fn acknowledge(
        &mut self,
        conversation: Uuid,
        stream: xbee_protocol::OutputStream,
        offset: u64,
    ) -> Result<(), Error> {
        if self.events.acknowledge(conversation, stream, offset) {
            self.queue(&HostMessage::OutputAck {
                conversation,
                stream,
                offset,
            })?;
        }
        Ok(())
    }
}
