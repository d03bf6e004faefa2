//! What a simulated agent serves: root, files, tasks, commands.

use std::collections::{BTreeMap, VecDeque};

use tokio::time::Instant;
use xbee_protocol::{
    ConversationInfo, Exec, Execute, Failure, GuestMessage, HostMessage, MAX_CONVERSATIONS,
    MAX_STREAMS, MountRoot, Phase, PutFile, Reply, Request, RootInfo, StartInfo, StartMode, Stats,
    StreamBody, Uuid, Welcome, code,
};

use super::command::{self, absolute};
use super::failure;
use super::files::{File, Files, Node};
use super::stream::{Get, Process, Put, Stream};
use super::task::Task;
use crate::domain::DomainSpec;

pub(super) struct Machine {
    has_disk: bool,
    init: Option<String>,
    memory_kib: u64,
    booted: Instant,
    files: Files,
    mounted: Option<RootInfo>,
    started: Option<StartInfo>,
    tasks: Vec<Task>,
    streams: BTreeMap<u32, Stream>,
    /// Answers and the like, in their order.
    out: VecDeque<GuestMessage>,
    last_pid: i32,
    shutdown: bool,
}

impl Machine {
    pub(super) fn new(domain: &DomainSpec, init: Option<String>) -> Self {
        Self {
            has_disk: !domain.disks.is_empty(),
            init,
            memory_kib: domain.memory_bytes / 1024,
            booted: Instant::now(),
            files: Files::new(domain.memory_bytes),
            mounted: None,
            started: None,
            tasks: Vec::new(),
            streams: BTreeMap::new(),
            out: VecDeque::new(),
            last_pid: 100,
            shutdown: false,
        }
    }

    pub(super) fn phase(&self) -> Phase {
        match (&self.started, &self.mounted) {
            (Some(_), _) => Phase::Started,
            (None, Some(_)) => Phase::Mounted,
            (None, None) => Phase::Initramfs,
        }
    }

    pub(super) fn conversations(&self) -> Vec<ConversationInfo> {
        let info = |task: &Task| ConversationInfo {
            conversation: task.conversation,
            running: task.is_running(),
        };
        self.tasks.iter().map(info).collect()
    }

    pub(super) fn shutdown_wanted(&self) -> bool {
        self.shutdown && self.out.is_empty()
    }

    /// What belonged to the connection goes with it.
    pub(super) fn disconnected(&mut self) {
        self.streams.clear();
        self.out.clear();
    }

    pub(super) fn resume(&mut self, welcome: &Welcome) -> Result<(), Failure> {
        for task in &mut self.tasks {
            let mut points = welcome.resume.iter();
            let point = points.find(|point| point.conversation == task.conversation);
            if !task.resume(point.map(|point| [point.stdout_bytes, point.stderr_bytes])) {
                return Err(failure(
                    code::RESUME_MISMATCH,
                    format!(
                        "the host's offsets do not fit the output of task {}",
                        task.conversation
                    ),
                ));
            }
        }
        Ok(())
    }

    pub(super) fn wake_at(&self) -> Option<Instant> {
        let tasks = self.tasks.iter().filter_map(Task::wake_at);
        let streams = self.streams.values().filter_map(Stream::wake_at);
        tasks.chain(streams).min()
    }

    pub(super) fn tick(&mut self, now: Instant) {
        for task in &mut self.tasks {
            task.tick(now);
        }
    }

    /// The next message to the host.
    pub(super) fn next(&mut self) -> Option<GuestMessage> {
        if let Some(message) = self.out.pop_front() {
            return Some(message);
        }
        if let Some(message) = self.tasks.iter_mut().find_map(Task::next) {
            return Some(message);
        }
        let now = Instant::now();
        let mut over = None;
        for (id, stream) in &mut self.streams {
            if let Some(message) = stream.next(*id) {
                return Some(message);
            }
            if stream.is_over(now) {
                over = Some(*id);
                break;
            }
        }
        match (over?, self.streams.remove(&over?)?) {
            (_, Stream::Get(get)) => Some(response(get.request, Ok(Reply::File(get.info)))),
            (id, Stream::Process(process)) => {
                if let Some(stderr) = process.exec.stderr_stream {
                    self.streams.remove(&stderr);
                }
                let mut last = process.last_words(id);
                let first = last.pop_front();
                self.out.extend(last);
                first
            }
            // These are never over by themselves.
            (_, Stream::Put(_) | Stream::StandardError(_)) => None,
        }
    }

    pub(super) fn handle(&mut self, message: HostMessage, now: Instant) {
        match message {
            HostMessage::Request { id, request } => match self.request(id, request, now) {
                Ok(None) => {}
                Ok(Some(reply)) => self.out.push_back(response(id, Ok(reply))),
                Err(failure) => self.out.push_back(response(id, Err(failure))),
            },
            HostMessage::OutputAck {
                conversation,
                stream,
                offset,
            } => {
                if let Ok(task) = self.task(conversation) {
                    task.acknowledge(stream, offset);
                }
            }
            HostMessage::Stream { stream, body } => self.on_stream(stream, body, now),
            HostMessage::Heartbeat
            | HostMessage::Hello(_)
            | HostMessage::Welcome(_)
            | HostMessage::Refuse(_) => {}
        }
    }

    /// No reply now means that it comes later.
    fn request(
        &mut self,
        id: u32,
        request: Request,
        now: Instant,
    ) -> Result<Option<Reply>, Failure> {
        Ok(Some(match request {
            Request::MountRoot(request) => Reply::Root(self.mount_root(request)?),
            Request::PutFile(request) => {
                self.put_file(id, request)?;
                return Ok(None);
            }
            Request::GetFile { stream, path } => {
                let stream = self.new_stream(stream)?;
                let get = Get::new(id, self.files.get(&path)?);
                self.streams.insert(stream, Stream::Get(get));
                return Ok(None);
            }
            Request::MakeDirectory(request) => {
                owner(request.user.as_deref(), request.group.as_deref())?;
                self.files.put(&request.path, Node::Directory)?;
                Reply::Done
            }
            Request::MakeSymlink(request) => {
                owner(request.user.as_deref(), request.group.as_deref())?;
                self.files.put(&request.path, Node::Link(request.target))?;
                Reply::Done
            }
            Request::Remove { path } => {
                self.files.remove(&path);
                Reply::Done
            }
            Request::Start { mode } => Reply::Started(self.start(mode)?),
            Request::Execute(request) => self.execute(request, now)?,
            Request::Terminate { conversation, .. } => {
                self.task(conversation)?.terminate(now);
                Reply::Done
            }
            Request::SignalTask {
                conversation,
                signal,
            } => {
                if !self.task(conversation)?.signal(signal, now) {
                    return Err(failure(code::NOT_FOUND, "the task has ended"));
                }
                Reply::Done
            }
            Request::Exec(exec) => self.exec(exec, now)?,
            Request::SignalProcess { stream, signal } => {
                self.process(stream)?.kill(signal, now);
                Reply::Done
            }
            Request::Resize { stream, .. } => {
                self.process(stream)?;
                Reply::Done
            }
            Request::Forward { port, .. } => {
                return Err(failure(
                    code::CONNECTION_REFUSED,
                    format!("nothing listens on TCP port {port} in the guest"),
                ));
            }
            Request::Stats => Reply::Stats(Stats {
                memory_total_kib: self.memory_kib,
                memory_available_kib: self.memory_kib / 2,
                load_milli: 0,
                agent_resident_kib: 1_024,
                uptime_ms: u64::try_from(self.booted.elapsed().as_millis()).unwrap_or(u64::MAX),
            }),
            Request::SetTime { .. } | Request::Reseed { .. } => Reply::Done,
            Request::Shutdown { .. } => {
                self.shutdown = true;
                Reply::Done
            }
        }))
    }

    fn mount_root(&mut self, request: MountRoot) -> Result<RootInfo, Failure> {
        if let Some(info) = &self.mounted {
            return Ok(info.clone());
        }
        if self.started.is_some() {
            return Err(failure(
                code::WRONG_STATE,
                "the task's root is set already: mount before start",
            ));
        }
        if !self.has_disk {
            return Err(failure(code::NO_ROOT_DEVICE, "no disk in the guest"));
        }
        let info = RootInfo {
            device: request.device.unwrap_or_else(|| "/dev/vda".to_owned()),
            fs_type: request.fs_type.unwrap_or_else(|| "ext4".to_owned()),
            init: self.init.clone(),
            os_id: None,
        };
        self.mounted = Some(info.clone());
        Ok(info)
    }

    fn start(&mut self, mode: StartMode) -> Result<StartInfo, Failure> {
        if let Some(info) = &self.started {
            return Ok(info.clone());
        }
        // Without a disk it is the agent's own root, which has no other init.
        let found = self.mounted.as_ref().and_then(|info| info.init.clone());
        let no_init = || failure(code::NO_INIT, "no init in the image");
        let init = match mode {
            StartMode::Agent => None,
            StartMode::Auto => found,
            StartMode::Init => Some(found.ok_or_else(no_init)?),
        };
        let info = StartInfo { init };
        self.started = Some(info.clone());
        Ok(info)
    }

    fn execute(&mut self, request: Execute, now: Instant) -> Result<Reply, Failure> {
        let conversation = request.conversation;
        if self.task(conversation).is_ok() {
            return Ok(Reply::Accepted { known: true });
        }
        if self.tasks.len() >= MAX_CONVERSATIONS {
            return Err(failure(
                code::TOO_MANY,
                format!("more than {MAX_CONVERSATIONS} tasks at a time in one guest"),
            ));
        }
        let task = match self.try_execute(request, now) {
            Ok(task) => task,
            Err(failure) => Task::failed(conversation, failure, now),
        };
        self.tasks.push(task);
        Ok(Reply::Accepted { known: false })
    }

    fn try_execute(&mut self, request: Execute, now: Instant) -> Result<Task, Failure> {
        owner(request.user.as_deref(), request.group.as_deref())?;
        let bad_stream = |error: Failure| failure(code::BAD_STANDARD_STREAM, error.message);
        let directory = request.working_directory.as_deref().unwrap_or("/root");
        let stdin = match &request.stdin {
            None => &[],
            Some(path) => {
                let file = self.files.get(&absolute(directory, path));
                file.map_err(bad_stream)?.content.as_slice()
            }
        };
        let run = command::run(
            &self.files,
            &request.argv,
            &request.environment,
            directory,
            stdin,
        )?;
        let redirections = [
            (&request.stdout, &run.stdout),
            (&request.stderr, &run.stderr),
        ];
        for (path, _) in redirections {
            let Some(path) = path else { continue };
            // One file for both gets both.
            let contents = redirections
                .iter()
                .filter(|(other, _)| other.as_ref() == Some(path));
            let file = File {
                content: contents
                    .flat_map(|(_, content)| content.iter().copied())
                    .collect(),
                mode: 0o644,
                ..File::default()
            };
            let path = absolute(directory, path);
            self.files
                .put(&path, Node::File(file))
                .map_err(bad_stream)?;
        }
        let limit = request.limits.wall_clock_ms;
        Ok(Task::new(request.conversation, run, limit, now))
    }

    fn exec(&mut self, exec: Exec, now: Instant) -> Result<Reply, Failure> {
        let stream = self.new_stream(exec.stream)?;
        let stderr = exec
            .stderr_stream
            .map(|id| self.new_stream(id))
            .transpose()?;
        if stderr == Some(stream) {
            return Err(failure(code::BAD_REQUEST, "two streams with one number"));
        }
        let process = Process::start(exec, &self.files, now)?;
        self.streams.insert(stream, Stream::Process(process));
        if let Some(stderr) = stderr {
            self.streams.insert(stderr, Stream::StandardError(stream));
        }
        self.last_pid += 1;
        Ok(Reply::Process { pid: self.last_pid })
    }

    fn put_file(&mut self, request: u32, put: PutFile) -> Result<(), Failure> {
        let stream = self.new_stream(put.stream)?;
        let (uid, gid) = owner(put.user.as_deref(), put.group.as_deref())?;
        self.files.check_room(&put.path, put.size.unwrap_or(0))?;
        let put = Put::new(request, put.path, put.mode, uid, gid);
        self.streams.insert(stream, Stream::Put(put));
        Ok(())
    }

    fn on_stream(&mut self, id: u32, body: StreamBody, now: Instant) {
        let main = match self.streams.get(&id) {
            Some(Stream::StandardError(main)) => *main,
            _ => id,
        };
        match self.streams.get_mut(&main) {
            Some(Stream::Put(put)) => {
                let (credit, result) = put.receive(body, &mut self.files);
                if let Some(body) = credit {
                    self.out
                        .push_back(GuestMessage::Stream { stream: id, body });
                }
                if let Some(result) = result {
                    self.out
                        .push_back(response(put.request, result.map(Reply::File)));
                    self.streams.remove(&main);
                }
            }
            Some(Stream::Get(get)) => match body {
                StreamBody::Credit(bytes) => get.data.credit(bytes),
                StreamBody::Reset => {
                    let cancelled = failure(code::CANCELLED, "the host cancelled the file");
                    self.out.push_back(response(get.request, Err(cancelled)));
                    self.streams.remove(&main);
                }
                _ => {}
            },
            Some(Stream::Process(process)) => {
                if let Some(body) = process.receive(id == main, body, &self.files, now) {
                    self.out
                        .push_back(GuestMessage::Stream { stream: id, body });
                }
            }
            // It crossed with the stream's end.
            Some(Stream::StandardError(_)) | None => {}
        }
    }

    fn new_stream(&self, stream: u32) -> Result<u32, Failure> {
        if self.streams.len() >= MAX_STREAMS {
            return Err(failure(
                code::TOO_MANY,
                format!("more than {MAX_STREAMS} streams at a time"),
            ));
        }
        match self.streams.contains_key(&stream) {
            true => Err(failure(
                code::BAD_REQUEST,
                format!("stream {stream} is open already"),
            )),
            false => Ok(stream),
        }
    }

    fn task(&mut self, conversation: Uuid) -> Result<&mut Task, Failure> {
        let mut tasks = self.tasks.iter_mut();
        let found = tasks.find(|task| task.conversation == conversation);
        let missing = || format!("no task {conversation} in this guest");
        found.ok_or_else(|| failure(code::NOT_FOUND, missing()))
    }

    fn process(&mut self, stream: u32) -> Result<&mut Process, Failure> {
        match self.streams.get_mut(&stream) {
            Some(Stream::Process(process)) => Ok(process),
            _ => Err(failure(code::NOT_FOUND, "the command has ended")),
        }
    }
}

fn response(id: u32, result: Result<Reply, Failure>) -> GuestMessage {
    GuestMessage::Response {
        id,
        reply: result.unwrap_or_else(Reply::Failed),
    }
}

/// The simulated guest knows root, and numbers.
fn owner(user: Option<&str>, group: Option<&str>) -> Result<(u32, u32), Failure> {
    let number = |name: &str| match name {
        "root" => Ok(0),
        name => name.parse().map_err(|_| {
            failure(
                code::UNKNOWN_USER,
                format!("no user or group {name:?} in the guest"),
            )
        }),
    };
    let uid = user.map_or(Ok(0), number)?;
    let gid = group.map_or(Ok(uid), number)?;
    Ok((uid, gid))
}
