//! The handle to an agent.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use uuid::Uuid;
use xbee_protocol::{
    AgentInfo, Execute, FileInfo, MakeDirectory, MakeSymlink, MountRoot, OutputStream, Reply,
    Request, RootInfo, Secret, StartInfo, StartMode, Stats,
};

use crate::event::EventQueue;
use crate::handshake::{Established, handshake};
use crate::process::{ExecSpec, Process};
use crate::state::{Opens, Shared};
use crate::stream::Tunnel;
use crate::{Error, Event, FileMeta, FrameReader, FrameWriter, Resume, connection, file};

/// Most requests are answered at once; emulated guests are slow.
const REPLY_LIMIT: Duration = Duration::from_secs(60);
/// Journals are replayed and disks waited for.
const MOUNT_LIMIT: Duration = Duration::from_secs(180);
/// Events on their way to the receiver.
const EVENTS: usize = 16;

/// A connected agent. Clones share the connection, which closes with the last one.
#[derive(Debug, Clone)]
pub struct Agent {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    established: Established,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.close(Error::ClosedHere);
    }
}

impl Agent {
    /// Whether both are of one connection.
    pub fn is_same(&self, other: &Agent) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Shakes hands with the agent at the other end of `stream`: both sides prove that they know
    /// the boot's `secret`. `resume` says how much of each task's output is durable here already.
    /// The receiver yields what happens with tasks, [`Event::Lost`] last.
    ///
    /// # Errors
    /// [`Error::Authentication`], [`Error::Generation`], [`Error::Refused`], and those of a
    /// connection that is lost or breaks the protocol.
    pub async fn connect<S>(
        stream: S,
        secret: &Secret,
        resume: Resume,
    ) -> Result<(Agent, mpsc::Receiver<Event>), Error>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (read_half, write_half) = tokio::io::split(stream);
        let mut reader = FrameReader::new(read_half);
        let mut writer = FrameWriter::new(write_half);
        let mut events = EventQueue::default();
        for point in &resume.points {
            events.resume(point);
        }
        let established = handshake(&mut reader, &mut writer, secret, resume.points).await?;
        for known in &established.info.conversations {
            events.known_to_agent(known.conversation);
        }
        let shared = Arc::new(Shared::new(events));
        let (sender, receiver) = mpsc::channel(EVENTS);
        tokio::spawn(connection::read(reader, Arc::clone(&shared)));
        tokio::spawn(connection::write(writer, Arc::clone(&shared)));
        tokio::spawn(connection::deliver(Arc::clone(&shared), sender));
        Ok((
            Agent {
                inner: Arc::new(Inner {
                    shared,
                    established,
                }),
            },
            receiver,
        ))
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.inner.shared
    }

    /// What the agent said of itself when it connected.
    pub fn hello(&self) -> &AgentInfo {
        &self.inner.established.info
    }

    /// The domain that the agent says it runs in. Its proof covers this.
    pub fn domain(&self) -> Uuid {
        self.inner.established.domain
    }

    /// The generation of the protocol that is spoken.
    pub fn generation(&self) -> u16 {
        self.inner.established.generation
    }

    /// Mounts the guest's root file system and makes it `/`. May be repeated.
    ///
    /// # Errors
    /// [`Error::Failed`] with `no-root-device` or `mount-failed`, and those of a lost connection.
    pub async fn mount_root(&self, root: MountRoot) -> Result<RootInfo, Error> {
        match self
            .ask("mount its root", MOUNT_LIMIT, Request::MountRoot(root))
            .await?
        {
            Reply::Root(info) => Ok(info),
            other => Err(mismatch(&other)),
        }
    }

    /// Puts a file into the guest: under its name only when it is whole and its hash is right.
    /// Runs of zeros become holes. Dropping the future cancels it.
    ///
    /// # Errors
    /// [`Error::Failed`] with `file-error`, [`Error::Source`], [`Error::Corrupt`], and those of a lost connection.
    pub async fn put_file(
        &self,
        meta: FileMeta,
        content: impl AsyncRead + Unpin,
    ) -> Result<FileInfo, Error> {
        file::put(self.shared(), meta, content).await
    }

    /// Fetches a regular file of at most `max_bytes` from the guest; holes are written as zeros.
    /// The hash of what was written is compared with the agent's.
    ///
    /// # Errors
    /// [`Error::Failed`] with `file-error`, [`Error::FileTooLarge`], [`Error::Sink`], [`Error::Corrupt`],
    /// and those of a lost connection.
    pub async fn get_file(
        &self,
        path: &str,
        sink: impl AsyncWrite + Unpin,
        max_bytes: u64,
    ) -> Result<FileInfo, Error> {
        file::get(self.shared(), path, sink, max_bytes).await
    }

    /// Makes a directory and those above it.
    ///
    /// # Errors
    /// [`Error::Failed`] with `file-error`, and those of a lost connection.
    pub async fn mkdir(&self, directory: MakeDirectory) -> Result<(), Error> {
        self.simple("make a directory", Request::MakeDirectory(directory))
            .await
    }

    /// Makes a symbolic link.
    ///
    /// # Errors
    /// [`Error::Failed`] with `file-error`, and those of a lost connection.
    pub async fn symlink(&self, link: MakeSymlink) -> Result<(), Error> {
        self.simple("make a symbolic link", Request::MakeSymlink(link))
            .await
    }

    /// Removes a file or a directory with all that is in it. What is not there is no error.
    ///
    /// # Errors
    /// [`Error::Failed`] with `file-error`, and those of a lost connection.
    pub async fn remove(&self, path: &str) -> Result<(), Error> {
        self.simple("remove a file", Request::Remove { path: path.into() })
            .await
    }

    /// Hands the machine to the image's init, or keeps it. May be repeated.
    ///
    /// # Errors
    /// [`Error::Failed`] with `no-init`, and those of a lost connection.
    pub async fn start(&self, mode: StartMode) -> Result<StartInfo, Error> {
        match self
            .ask("start", REPLY_LIMIT, Request::Start { mode })
            .await?
        {
            Reply::Started(info) => Ok(info),
            other => Err(mismatch(&other)),
        }
    }

    /// Starts a task; what becomes of it comes as events. Returns whether the agent knew the
    /// conversation before: nothing is started twice.
    ///
    /// # Errors
    /// [`Error::TooLarge`], and those of a lost connection.
    pub async fn execute(&self, task: Execute) -> Result<bool, Error> {
        match self
            .ask("execute a task", REPLY_LIMIT, Request::Execute(task))
            .await?
        {
            Reply::Accepted { known } => Ok(known),
            other => Err(mismatch(&other)),
        }
    }

    /// Says that a task's output before `offset` is durable here, so that the agent may forget
    /// it and the task may go on writing. What is not acknowledged is sent again after a reconnect.
    ///
    /// # Errors
    /// Those of a lost connection.
    pub fn ack_output(
        &self,
        conversation: Uuid,
        stream: OutputStream,
        offset: u64,
    ) -> Result<(), Error> {
        let result = self
            .shared()
            .lock()
            .acknowledge(conversation, stream, offset);
        self.shared().outgoing_ready.notify_one();
        result
    }

    /// Ends all that a task has started: TERM, and KILL after `grace`. Its end comes as an event.
    ///
    /// # Errors
    /// [`Error::Failed`] with `not-found`, and those of a lost connection.
    pub async fn terminate_task(&self, conversation: Uuid, grace: Duration) -> Result<(), Error> {
        let request = Request::Terminate {
            conversation,
            grace_ms: milliseconds(grace),
        };
        self.simple("terminate a task", request).await
    }

    /// Sends a signal (number on Linux) to a task's process group.
    ///
    /// # Errors
    /// [`Error::Failed`] with `not-found`, and those of a lost connection.
    pub async fn signal(&self, conversation: Uuid, signal: i32) -> Result<(), Error> {
        self.simple(
            "signal a task",
            Request::SignalTask {
                conversation,
                signal,
            },
        )
        .await
    }

    /// Starts a command beside the task. It ends with the connection.
    ///
    /// # Errors
    /// [`Error::Failed`] with `command-not-found` and its like, [`Error::TooLarge`], [`Error::TooMany`],
    /// and those of a lost connection.
    pub async fn exec(&self, spec: ExecSpec) -> Result<Process, Error> {
        Process::start(self, spec).await
    }

    /// Connects to a TCP port on the guest's loopback.
    ///
    /// # Errors
    /// [`Error::Failed`] with `connection-refused`, [`Error::TooMany`], and those of a lost connection.
    pub async fn forward(&self, port: u16) -> Result<Tunnel, Error> {
        let sent = self
            .shared()
            .request(Opens::Forward, |stream| Request::Forward { stream, port })?;
        let tunnel = Tunnel::new(self.shared(), sent.stream);
        match reply(self.shared(), "connect to a port", REPLY_LIMIT, sent.reply).await? {
            Reply::Done => Ok(tunnel),
            other => Err(mismatch(&other)),
        }
    }

    /// Resources in use.
    ///
    /// # Errors
    /// Those of a lost connection.
    pub async fn stats(&self) -> Result<Stats, Error> {
        match self
            .ask("tell what it uses", REPLY_LIMIT, Request::Stats)
            .await?
        {
            Reply::Stats(stats) => Ok(stats),
            other => Err(mismatch(&other)),
        }
    }

    /// Sets the guest's clock to `now`.
    ///
    /// # Errors
    /// [`Error::Failed`], and those of a lost connection.
    pub async fn time_sync(&self, now: SystemTime) -> Result<(), Error> {
        // No guest lives before 1970.
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let request = Request::SetTime {
            unix_seconds: since.as_secs(),
            nanoseconds: since.subsec_nanos(),
        };
        self.simple("set its clock", request).await
    }

    /// Gives the guest's random number generator a new seed, as a clone needs it.
    ///
    /// # Errors
    /// [`Error::Failed`], [`Error::Random`], and those of a lost connection.
    pub async fn reseed(&self) -> Result<(), Error> {
        let mut seed = vec![0; 64];
        getrandom::fill(&mut seed).map_err(Error::Random)?;
        self.simple("reseed its random numbers", Request::Reseed { seed })
            .await
    }

    /// Asks the guest to switch itself off: processes have `grace` to end. Returns when the agent has agreed;
    /// the connection is lost soon after.
    ///
    /// # Errors
    /// [`Error::Failed`], and those of a lost connection.
    pub async fn shutdown(&self, grace: Duration) -> Result<(), Error> {
        self.simple(
            "switch off",
            Request::Shutdown {
                grace_ms: milliseconds(grace),
            },
        )
        .await
    }

    pub(crate) async fn simple(&self, what: &'static str, request: Request) -> Result<(), Error> {
        match self.ask(what, REPLY_LIMIT, request).await? {
            Reply::Done => Ok(()),
            other => Err(mismatch(&other)),
        }
    }

    async fn ask(
        &self,
        what: &'static str,
        limit: Duration,
        request: Request,
    ) -> Result<Reply, Error> {
        let sent = self.shared().request(Opens::Nothing, |_| request)?;
        reply(self.shared(), what, limit, sent.reply).await
    }

    pub(crate) async fn process_reply(
        &self,
        receiver: oneshot::Receiver<Reply>,
    ) -> Result<i32, Error> {
        match reply(self.shared(), "start a command", REPLY_LIMIT, receiver).await? {
            Reply::Process { pid } => Ok(pid),
            other => Err(mismatch(&other)),
        }
    }
}

/// Waits for a reply; a failure in the guest becomes an error.
pub(crate) async fn reply(
    shared: &Shared,
    what: &'static str,
    limit: Duration,
    receiver: oneshot::Receiver<Reply>,
) -> Result<Reply, Error> {
    match timeout(limit, receiver).await {
        Err(_elapsed) => Err(Error::Timeout {
            what,
            seconds: limit.as_secs(),
        }),
        Ok(Err(_closed)) => Err(shared.lost()),
        Ok(Ok(Reply::Failed(failure))) => Err(Error::failed(failure)),
        Ok(Ok(reply)) => Ok(reply),
    }
}

/// The agent answered another question.
pub(crate) fn mismatch(reply: &Reply) -> Error {
    let kind = match reply {
        Reply::Failed(_) => "failed",
        Reply::Done => "done",
        Reply::Root(_) => "root",
        Reply::File(_) => "file",
        Reply::Started(_) => "started",
        Reply::Accepted { .. } => "accepted",
        Reply::Process { .. } => "process",
        Reply::Stats(_) => "stats",
    };
    Error::protocol(format!("a reply of the wrong kind: {kind}"))
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
