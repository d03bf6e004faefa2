//! The agent: one thread, one loop, nothing that blocks for long.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use xbee_link::suspend::News;
use xbee_link::{Address, Link};
use xbee_protocol::{
    AgentInfo, BootConfig, ConversationInfo, Failure, GuestMessage, HostMessage, REDIAL_MAX_MS,
    REDIAL_MIN_MS, Reply, StreamBody, Transport, Welcome, code,
};

use crate::console;
use crate::failure::failure;
use crate::forward::{Connecting, Forward};
use crate::machine::Machine;
use crate::network::Expected;
use crate::power;
use crate::process::Process;
use crate::pump::message;
use crate::reap;
use crate::session::{Incoming, Outbox, Session};
use crate::task::Task;
use crate::transfer::{Get, Progress, Put};
use crate::xen::Xen;

/// How long processes have to end when somebody else than the host wants the machine off.
const POWER_OFF_GRACE: Duration = Duration::from_secs(5);
/// So long no channel is open after the tool stack has told the domain something that may have been
/// to suspend: many times what the kernel needs for freezing. Where that does not follow, the host
/// waits in vain.
const SUSPEND_PAUSE: Duration = Duration::from_secs(5);

/// What a stream of the host's is about.
#[derive(Debug)]
pub(crate) enum Stream {
    Process(Box<Process>),
    /// Standard error of the process on another stream.
    StandardError(u32),
    Connecting(Connecting),
    Forward(Box<Forward>),
    Put(Box<Put>),
    Get(Box<Get>),
}

/// The connection to the host, or the lack of one.
#[derive(Debug)]
enum Line {
    Down { retry_at: Instant },
    Dialling(Link),
    Up(Box<Session>),
}

/// How the connection comes about.
#[derive(Debug)]
enum Way {
    Dial(Address),
    Xen(Xen),
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Way::Dial(address) => address.fmt(f),
            Way::Xen(xen) => xen.fmt(f),
        }
    }
}

/// What was waited for.
#[derive(Debug, Clone, Copy)]
enum Token {
    Signals,
    Line,
    Xen,
    Network,
    TaskOutput { task: usize, output: usize },
    Stream(u32),
}

/// The agent.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) machine: Machine,
    boot: BootConfig,
    way: Way,
    line: Line,
    /// An interface that has not appeared yet.
    network: Option<Expected>,
    redial_ms: u64,
    /// The last trouble with the connection, so that it is said once.
    trouble: String,
    pub(crate) tasks: Vec<Task>,
    pub(crate) streams: BTreeMap<u32, Stream>,
    signals: OwnedFd,
    /// The host wants the machine off, and leaves processes so much time.
    pub(crate) shutdown: Option<Duration>,
}

impl Agent {
    pub(crate) fn new(machine: Machine, boot: BootConfig, signals: OwnedFd) -> Agent {
        let way = match &boot.transport {
            Transport::Vsock { port } => Way::Dial(Address::Vsock {
                cid: xbee_link::HOST_CID,
                port: *port,
            }),
            Transport::Unix { path } => Way::Dial(Address::Unix(path.into())),
            Transport::Xen { path, port } => Way::Xen(Xen::new(path.clone(), *port)),
        };
        let network = boot.network.clone().filter(|_| machine.owns_machine());
        Agent {
            machine,
            boot,
            way,
            line: Line::Down {
                retry_at: Instant::now(),
            },
            network: network.and_then(Expected::start),
            redial_ms: REDIAL_MIN_MS,
            trouble: String::new(),
            tasks: Vec::new(),
            streams: BTreeMap::new(),
            signals,
            shutdown: None,
        }
    }

    /// Serves the host until it wants the machine off; says how long processes have to end.
    pub(crate) fn run(&mut self) -> Duration {
        loop {
            self.work(Instant::now());
            // Before the wait: nothing need come from the host any more.
            if let Some(grace) = self.shutdown
                && !matches!(&self.line, Line::Up(session) if session.wants_to_write())
            {
                return grace;
            }
            self.listen(None);
        }
    }

    /// Goes on serving while the machine is being switched off, so that the host hears of it.
    pub(crate) fn run_until(&mut self, deadline: Instant, is_over: impl Fn() -> bool) {
        while Instant::now() < deadline && !is_over() {
            self.work(Instant::now());
            self.listen(Some(deadline));
        }
    }

    /// Waits for something to happen, and serves it.
    fn listen(&mut self, deadline: Option<Instant>) {
        match self.wait(deadline) {
            Ok(ready) => ready.into_iter().for_each(|token| self.serve(token)),
            Err(Errno::INTR) => {}
            Err(error) => {
                // Out of memory is all that is left; it passes or the kernel acts.
                console::log(&format!(
                    "cannot wait for events: {}",
                    crate::failure::words(error)
                ));
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }

    /// Everything that time, and what was served, make due.
    fn work(&mut self, now: Instant) {
        match &mut self.line {
            Line::Down { retry_at } if now >= *retry_at => self.dial(now),
            Line::Down { .. } | Line::Dialling(_) => {}
            Line::Up(session) => {
                if !session.tick(now) {
                    self.hang_up(failure(code::PROTOCOL_ERROR, "the host is silent"), now);
                }
            }
        }
        for task in &mut self.tasks {
            if task.wake_at().is_some_and(|at| now >= at) {
                task.tick(now);
            }
            task.settle(now);
        }
        let Line::Up(session) = &mut self.line else {
            return;
        };
        if session.is_ready() {
            let out = &mut session.out;
            send_output(&mut self.tasks, out);
            let before = self.streams.len();
            self.streams.retain(|_, stream| !advance(stream, now, out));
            if self.streams.len() < before {
                let processes: BTreeSet<u32> = self.streams.keys().copied().collect();
                self.streams.retain(|_, stream| match stream {
                    Stream::StandardError(process) => processes.contains(process),
                    _ => true,
                });
            }
        }
        if let Err(error) = session.write() {
            self.hang_up(failure(code::PROTOCOL_ERROR, error.to_string()), now);
        }
    }

    fn wait(&self, deadline: Option<Instant>) -> Result<Vec<Token>, Errno> {
        let mut tokens = vec![Token::Signals];
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        let mut wake_at = deadline;
        let mut wake = |at: Instant| wake_at = Some(wake_at.map_or(at, |known| known.min(at)));
        let mut add = |token, fd, flags| {
            tokens.push(token);
            fds.push(PollFd::from_borrowed_fd(fd, flags));
        };
        if let Way::Xen(xen) = &self.way
            && let Some(events) = xen.events()
        {
            add(Token::Xen, events, PollFlags::IN);
        }
        if let Some(network) = &self.network {
            add(Token::Network, network.as_fd(), PollFlags::IN);
        }
        let mut room = false;
        let mut busy = false;
        let mut line_is_ready = false;
        let mut flags_of = |link: &'_ Link, wants_to_write| {
            let interest = link.interest(wants_to_write);
            line_is_ready = interest.is_none();
            interest.unwrap_or(PollFlags::IN)
        };
        match &self.line {
            Line::Down { retry_at } => wake(*retry_at),
            Line::Dialling(link) => add(Token::Line, link.as_fd(), flags_of(link, true)),
            Line::Up(session) => {
                let flags = flags_of(&session.link, session.wants_to_write());
                add(Token::Line, session.link.as_fd(), flags);
                wake(session.wake_at());
                room = session.out.has_room();
                busy = self.streams.values().any(|stream| match stream {
                    Stream::Put(put) => put.is_busy(),
                    Stream::Get(get) => get.is_busy(&session.out),
                    _ => false,
                });
            }
        }
        for (index, task) in self.tasks.iter().enumerate() {
            task.wake_at().into_iter().for_each(&mut wake);
            for (output, state) in task.outputs.iter().enumerate() {
                if let Some(pipe) = state.wanted() {
                    add(
                        Token::TaskOutput {
                            task: index,
                            output,
                        },
                        pipe.as_fd(),
                        PollFlags::IN,
                    );
                }
            }
        }
        // Without a connection nothing comes from them and nothing goes to them.
        let streams = matches!(self.line, Line::Up(_)).then_some(&self.streams);
        for (id, stream) in streams.into_iter().flatten() {
            let (sink, sources) = match stream {
                Stream::Process(p) => (Some(&p.stdin), [Some(&p.stdout), p.stderr.as_ref()]),
                Stream::Forward(f) => (Some(&f.sink), [Some(&f.source), None]),
                Stream::Connecting(connecting) => {
                    add(Token::Stream(*id), connecting.fd.as_fd(), PollFlags::OUT);
                    wake(connecting.deadline);
                    continue;
                }
                Stream::StandardError(_) | Stream::Put(_) | Stream::Get(_) => continue,
            };
            if let Some(fd) = sink.and_then(|sink| sink.wanted()) {
                add(Token::Stream(*id), fd.as_fd(), PollFlags::OUT);
            }
            for fd in sources
                .into_iter()
                .flatten()
                .filter(|_| room)
                .filter_map(|s| s.wanted())
            {
                add(Token::Stream(*id), fd.as_fd(), PollFlags::IN);
            }
        }
        let timeout = match busy || line_is_ready {
            true => Some(Duration::ZERO),
            false => wake_at.map(|at| at.saturating_duration_since(Instant::now())),
        };
        let timeout = timeout.map(|duration| Timespec {
            tv_sec: duration.as_secs() as i64,
            tv_nsec: duration.subsec_nanos().into(),
        });
        poll(&mut fds, timeout.as_ref())?;
        Ok(tokens
            .into_iter()
            .zip(fds.iter().map(PollFd::revents))
            .filter(|(token, flags)| {
                !flags.is_empty() || line_is_ready && matches!(token, Token::Line)
            })
            .map(|(token, _)| token)
            .collect())
    }

    fn serve(&mut self, token: Token) {
        let now = Instant::now();
        match token {
            Token::Signals => self.signals(now),
            Token::Line => self.serve_line(now),
            Token::Xen => self.heed_xen(now),
            Token::Network => self.network = self.network.take().and_then(Expected::go_on),
            Token::TaskOutput { task, output } => {
                if let Some(output) = self
                    .tasks
                    .get_mut(task)
                    .and_then(|t| t.outputs.get_mut(output))
                {
                    output.read();
                }
            }
            Token::Stream(id) => self.serve_stream(id),
        }
    }

    fn serve_stream(&mut self, id: u32) {
        let Line::Up(session) = &mut self.line else {
            return;
        };
        let out = &mut session.out;
        match self.streams.get_mut(&id) {
            Some(Stream::Process(process)) => {
                process.stdin.pump(out);
                process.stdout.pump(out);
                if let Some(stderr) = &mut process.stderr {
                    stderr.pump(out);
                }
            }
            Some(Stream::Forward(forward)) => {
                forward.sink.pump(out);
                forward.source.pump(out);
            }
            Some(Stream::Connecting(_)) => {
                let Some(Stream::Connecting(connecting)) = self.streams.remove(&id) else {
                    return;
                };
                let request = connecting.request;
                match connecting.ready(id) {
                    Ok(Ok(forward)) => {
                        self.streams.insert(id, Stream::Forward(Box::new(forward)));
                        out.push(&GuestMessage::Response {
                            id: request,
                            reply: Reply::Done,
                        });
                    }
                    Ok(Err(again)) => {
                        self.streams.insert(id, Stream::Connecting(again));
                    }
                    Err(failure) => out.push(&GuestMessage::Response {
                        id: request,
                        reply: Reply::Failed(failure),
                    }),
                }
            }
            // These are served with every turn of the loop.
            Some(Stream::Put(_) | Stream::Get(_) | Stream::StandardError(_)) | None => {}
        }
    }

    fn signals(&mut self, now: Instant) {
        let mut power_off = false;
        // struct signalfd_siginfo: it begins with the signal's number.
        let mut info = [0u8; 128];
        while rustix::io::read(&self.signals, &mut info).is_ok_and(|length| length == info.len()) {
            let [a, b, c, d, ..] = info;
            power_off |= i32::from_ne_bytes([a, b, c, d]) == power::POWER_OFF_SIGNAL;
        }
        if power_off && self.machine.is_first_process() && self.shutdown.is_none() {
            self.shutdown = Some(POWER_OFF_GRACE);
            // The host is to hear of it, even if this looked like suspending at first.
            if let Line::Down { retry_at } = &mut self.line {
                *retry_at = now;
            }
        }
        // Whatever the signals were.
        self.reap();
    }

    fn reap(&mut self) {
        while let Some((pid, ended)) = reap::next() {
            if self.tasks.iter_mut().any(|task| task.reaped(pid, ended)) {
                continue;
            }
            let process = self.streams.values_mut().find_map(|stream| match stream {
                Stream::Process(process) if process.pid == pid => Some(process),
                _ => None,
            });
            // Others are orphans: reaping them is all that they need.
            if let Some(process) = process {
                process.reaped(ended.status);
            }
        }
    }

    fn dial(&mut self, now: Instant) {
        // Of a connection that was closed for suspending.
        self.end_streams();
        let dialled = match &mut self.way {
            Way::Dial(address) => Link::dial(address).map_err(|error| error.to_string()),
            Way::Xen(xen) => xen.dial(),
        };
        match dialled {
            Ok(link) => self.line = Line::Dialling(link),
            Err(trouble) => self.redial(&trouble, now),
        }
        // Events may have come with the replies.
        self.heed_xen(now);
    }

    fn heed_xen(&mut self, now: Instant) {
        let Way::Xen(xen) = &mut self.way else {
            return;
        };
        match xen.news() {
            // Switching off, it is not saved any more.
            Ok(Some(News::Suspending)) if self.shutdown.is_none() => {
                // First of all: the kernel may freeze this process at any moment, and then it is too late.
                self.line = Line::Down {
                    retry_at: now + SUSPEND_PAUSE,
                };
                // What belonged to it goes with the next dial. A process that ends now takes its connection
                // to xenstore with it, and a kernel (Linux, `unregister_xenbus_watch`) that gives up a
                // watch while it suspends waits for itself without end.
                self.say("the machine is to be suspended or switched off");
            }
            Ok(Some(News::Restored)) => {
                let line = std::mem::replace(&mut self.line, Line::Down { retry_at: now });
                match line {
                    Line::Down { .. } => {}
                    Line::Dialling(link) => link.abandon(),
                    Line::Up(session) => session.link.abandon(),
                }
                self.end_streams();
            }
            Ok(_) => {}
            Err(trouble) => console::log(&trouble),
        }
    }

    /// Says, once, why there is no connection.
    fn say(&mut self, trouble: &str) {
        if self.trouble != trouble {
            console::log(&format!(
                "no connection to the host at {}: {trouble}",
                self.way
            ));
            self.trouble = trouble.into();
        }
    }

    fn redial(&mut self, trouble: &str, now: Instant) {
        self.say(trouble);
        self.line = Line::Down {
            retry_at: now + Duration::from_millis(self.redial_ms),
        };
        self.redial_ms = (self.redial_ms * 2).min(REDIAL_MAX_MS);
    }

    /// Gives the connection up. Tasks stay; what belonged to the connection goes.
    fn hang_up(&mut self, reason: Failure, now: Instant) {
        if let Line::Up(session) = &mut self.line {
            if reason.code != code::CANCELLED {
                session.out.push(&GuestMessage::Refuse(reason.clone()));
                // The host learns why, if it still listens.
                let _gone = session.write();
            }
            self.end_streams();
        }
        self.redial(&reason.message, now);
    }

    /// Ends what belonged to a connection that is no more.
    fn end_streams(&mut self) {
        for stream in self.streams.values() {
            if let Stream::Process(process) = stream {
                process.kill();
            }
        }
        self.streams.clear();
    }

    fn serve_line(&mut self, now: Instant) {
        let connected = match &mut self.line {
            Line::Down { .. } => return,
            Line::Dialling(link) => Some(link.connected()),
            Line::Up(_) => None,
        };
        match connected {
            None => self.serve_session(now),
            Some(Err(error)) => self.redial(&error.to_string(), now),
            Some(Ok(false)) => {}
            Some(Ok(true)) => {
                let down = Line::Down { retry_at: now };
                if let Line::Dialling(link) = std::mem::replace(&mut self.line, down) {
                    match Session::new(link, &self.boot, now) {
                        Ok(session) => self.line = Line::Up(Box::new(session)),
                        Err(failure) => self.redial(&failure.message, now),
                    }
                }
            }
        }
    }

    fn serve_session(&mut self, now: Instant) {
        let Line::Up(session) = &mut self.line else {
            return;
        };
        let end = match session.read(now) {
            Ok(true) => None,
            Ok(false) => Some("the host has closed the connection".to_owned()),
            Err(error) => Some(error.to_string()),
        };
        // What came before the end counts.
        while let Line::Up(session) = &mut self.line {
            let tasks = &self.tasks;
            let machine = &self.machine;
            match session.next(&self.boot, || agent_info(machine, tasks)) {
                Ok(None) => break,
                Ok(Some(Incoming::Handshake)) => {}
                Ok(Some(Incoming::Ready(welcome))) => self.resume(&welcome, now),
                Ok(Some(Incoming::Message(message))) => self.handle(*message, now),
                Err(reason) => self.hang_up(reason, now),
            }
        }
        if let (Some(end), Line::Up(_)) = (end, &self.line) {
            self.hang_up(failure(code::CANCELLED, end), now);
        }
    }

    /// The handshake is over: goes on from where the host stopped.
    fn resume(&mut self, welcome: &Welcome, now: Instant) {
        self.redial_ms = REDIAL_MIN_MS;
        self.trouble.clear();
        for task in &mut self.tasks {
            let point = welcome
                .resume
                .iter()
                .find(|point| point.conversation == task.conversation);
            if !task.resume(point.map(|point| [point.stdout_bytes, point.stderr_bytes])) {
                let message = format!(
                    "the host's offsets do not fit the output of task {}",
                    task.conversation
                );
                return self.hang_up(failure(code::RESUME_MISMATCH, message), now);
            }
        }
    }

    fn handle(&mut self, message: HostMessage, now: Instant) {
        match message {
            HostMessage::Request { id, request } => {
                if let Some(reply) = self.request(id, request, now) {
                    self.reply(id, reply);
                }
            }
            HostMessage::OutputAck {
                conversation,
                stream,
                offset,
            } => {
                let task = self
                    .tasks
                    .iter_mut()
                    .find(|task| task.conversation == conversation);
                if let Some(task) = task {
                    task.outputs[stream as usize].acknowledge(offset);
                }
            }
            HostMessage::Stream { stream, body } => self.on_stream(stream, body),
            HostMessage::Heartbeat => {}
            // The session deals with these.
            HostMessage::Hello(_) | HostMessage::Welcome(_) | HostMessage::Refuse(_) => {}
        }
    }

    pub(crate) fn reply(&mut self, id: u32, reply: Reply) {
        if let Line::Up(session) = &mut self.line {
            session.out.push(&GuestMessage::Response { id, reply });
        }
    }

    fn on_stream(&mut self, id: u32, body: StreamBody) {
        let Line::Up(session) = &mut self.line else {
            return;
        };
        let out = &mut session.out;
        let process = match self.streams.get(&id) {
            Some(Stream::StandardError(process)) => *process,
            _ => id,
        };
        match (self.streams.get_mut(&process), body) {
            (Some(Stream::Process(p)), StreamBody::Data(data)) => p.stdin.data(&data, out),
            (Some(Stream::Process(p)), StreamBody::End) => p.stdin.end(out),
            (Some(Stream::Process(p)), StreamBody::Reset) => p.kill(),
            (Some(Stream::Process(p)), StreamBody::Credit(bytes)) => {
                let stderr = p.stderr.as_mut().filter(|stderr| stderr.stream() == id);
                stderr.unwrap_or(&mut p.stdout).credit(bytes);
            }
            (Some(Stream::Forward(f)), StreamBody::Data(data)) => f.sink.data(&data, out),
            (Some(Stream::Forward(f)), StreamBody::End) => f.sink.end(out),
            (Some(Stream::Forward(f)), StreamBody::Credit(bytes)) => f.source.credit(bytes),
            (Some(Stream::Forward(_)), StreamBody::Reset) => {
                self.streams.remove(&id);
                out.push(&message(id, StreamBody::Reset));
            }
            (Some(Stream::Connecting(connecting)), StreamBody::Reset) => {
                let reply = Reply::Failed(failure(
                    code::CANCELLED,
                    "the host cancelled the connection",
                ));
                out.push(&GuestMessage::Response {
                    id: connecting.request,
                    reply,
                });
                self.streams.remove(&id);
            }
            (Some(Stream::Put(put)), body) => put.receive(body),
            (Some(Stream::Get(get)), StreamBody::Credit(bytes)) => get.credit(bytes),
            (Some(Stream::Get(get)), StreamBody::Reset) => {
                let reply = Reply::Failed(failure(code::CANCELLED, "the host cancelled the file"));
                out.push(&GuestMessage::Response {
                    id: get.request,
                    reply,
                });
                self.streams.remove(&id);
            }
            // It crossed with the stream's end.
            _ => {}
        }
    }
}

/// Sends what tasks have written, each in its turn, while there is room.
fn send_output(tasks: &mut [Task], out: &mut Outbox) {
    let mut sent = true;
    while sent {
        sent = false;
        for task in &mut *tasks {
            let conversation = task.conversation;
            for output in &mut task.outputs {
                if !out.has_room() {
                    return;
                }
                if let Some(event) = output.next() {
                    out.push(&GuestMessage::Task {
                        conversation,
                        event,
                    });
                    sent = true;
                }
            }
        }
    }
    for task in tasks {
        if let Some(event) = task.take_result() {
            out.push(&GuestMessage::Task {
                conversation: task.conversation,
                event,
            });
        }
    }
}

/// Gets a stream on; true where it is over.
fn advance(stream: &mut Stream, now: Instant, out: &mut Outbox) -> bool {
    let (request, progress) = match stream {
        Stream::Put(put) => (put.request, put.step(out)),
        Stream::Get(get) => (get.request, get.step(out)),
        Stream::Process(process) => return process.settle(out),
        Stream::Forward(forward) => return forward.is_done(),
        Stream::Connecting(connecting) => {
            if now < connecting.deadline {
                return false;
            }
            let reply = Reply::Failed(connecting.timed_out());
            out.push(&GuestMessage::Response {
                id: connecting.request,
                reply,
            });
            return true;
        }
        Stream::StandardError(_) => return false,
    };
    let Progress::Done(result) = progress else {
        return false;
    };
    let reply = result.map_or_else(Reply::Failed, Reply::File);
    out.push(&GuestMessage::Response { id: request, reply });
    true
}

fn agent_info(machine: &Machine, tasks: &[Task]) -> AgentInfo {
    let conversations = tasks
        .iter()
        .map(|task| ConversationInfo {
            conversation: task.conversation,
            running: task.is_running(),
        })
        .collect();
    AgentInfo {
        conversations,
        ..machine.info()
    }
}
