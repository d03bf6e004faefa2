//! What the host asks for.

use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Gid, Mode, Uid, fchmod, fchown, statat, symlinkat, unlinkat};
use rustix::io::Errno;
use rustix::process::Signal;
use xbee_protocol::{
    EndCause, Exec, Execute, Failure, MAX_CONVERSATIONS, MAX_STREAMS, MakeDirectory, MakeSymlink,
    Reply, Request, Uuid, code,
};

use crate::agent::{Agent, Stream};
use crate::failure::{failure, file_failure};
use crate::forward::Connecting;
use crate::process::Process;
use crate::remove;
use crate::root::{Root, split};
use crate::task::Task;
use crate::transfer::{Get, Put};
use crate::users::identity;

impl Agent {
    /// Does what the host asks for. No reply now means that it comes later.
    pub(crate) fn request(&mut self, id: u32, request: Request, now: Instant) -> Option<Reply> {
        self.try_request(id, request, now)
            .unwrap_or_else(|failure| Some(Reply::Failed(failure)))
    }

    fn try_request(
        &mut self,
        id: u32,
        request: Request,
        now: Instant,
    ) -> Result<Option<Reply>, Failure> {
        let reply = match request {
            Request::MountRoot(mount) => Reply::Root(self.machine.mount_root(&mount)?),
            Request::PutFile(put) => {
                let stream = self.new_stream(put.stream, 1)?;
                let put = Put::start(self.machine.root(), id, put)?;
                self.streams.insert(stream, Stream::Put(Box::new(put)));
                return Ok(None);
            }
            Request::GetFile { stream, path } => {
                let stream = self.new_stream(stream, 1)?;
                let get = Get::start(self.machine.root(), id, stream, path)?;
                self.streams.insert(stream, Stream::Get(Box::new(get)));
                return Ok(None);
            }
            Request::MakeDirectory(directory) => {
                done(make_directory(self.machine.root(), &directory)?)
            }
            Request::MakeSymlink(link) => done(make_symlink(self.machine.root(), &link)?),
            Request::Remove { path } => {
                let removed = remove::remove(self.machine.root(), &path);
                done(removed.map_err(|error| file_failure("remove", &path, error))?)
            }
            Request::Start { mode } => {
                let busy = self.tasks.iter().any(Task::is_running)
                    || self
                        .streams
                        .values()
                        .any(|stream| matches!(stream, Stream::Process(_)));
                Reply::Started(self.machine.start(mode, busy)?)
            }
            Request::Execute(task) => self.execute(task)?,
            Request::Terminate {
                conversation,
                grace_ms,
            } => {
                let task = self.task(conversation)?;
                task.terminate(EndCause::Terminated, Duration::from_millis(grace_ms));
                Reply::Done
            }
            Request::SignalTask {
                conversation,
                signal,
            } => {
                let signal = parse_signal(signal)?;
                done(self.task(conversation)?.signal(signal)?)
            }
            Request::Exec(exec) => self.exec(&exec)?,
            Request::SignalProcess { stream, signal } => {
                let signal = parse_signal(signal)?;
                done(self.process(stream)?.signal(signal)?)
            }
            Request::Resize { stream, size } => done(self.process(stream)?.resize(size)?),
            Request::Forward { stream, port } => {
                let stream = self.new_stream(stream, 1)?;
                let connecting = Connecting::start(id, port, now)?;
                self.streams.insert(stream, Stream::Connecting(connecting));
                return Ok(None);
            }
            Request::Stats => Reply::Stats(self.machine.stats()?),
            Request::SetTime {
                unix_seconds,
                nanoseconds,
            } => done(self.machine.set_time(unix_seconds, nanoseconds)?),
            Request::Reseed { seed } => done(self.machine.reseed(&seed)?),
            Request::Shutdown { grace_ms } => {
                self.shutdown = Some(Duration::from_millis(grace_ms));
                Reply::Done
            }
        };
        Ok(Some(reply))
    }

    fn new_stream(&self, stream: u32, count: usize) -> Result<u32, Failure> {
        if self.streams.len() + count > MAX_STREAMS {
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
        self.tasks
            .iter_mut()
            .find(|task| task.conversation == conversation)
            .ok_or_else(|| {
                failure(
                    code::NOT_FOUND,
                    format!("no task {conversation} in this guest"),
                )
            })
    }

    fn process(&self, stream: u32) -> Result<&Process, Failure> {
        match self.streams.get(&stream) {
            Some(Stream::Process(process)) => Ok(process),
            _ => Err(failure(code::NOT_FOUND, "the command has ended")),
        }
    }

    fn execute(&mut self, task: Execute) -> Result<Reply, Failure> {
        if self
            .tasks
            .iter()
            .any(|known| known.conversation == task.conversation)
        {
            return Ok(Reply::Accepted { known: true });
        }
        if self.tasks.len() >= MAX_CONVERSATIONS {
            // The oldest that nobody needs any more makes room.
            match self.tasks.iter().position(Task::is_settled) {
                Some(oldest) => drop(self.tasks.remove(oldest)),
                None => {
                    let message =
                        format!("more than {MAX_CONVERSATIONS} tasks at a time in one guest");
                    return Err(failure(code::TOO_MANY, message));
                }
            }
        }
        let task = Task::start(self.machine.root(), self.machine.owns_machine(), task);
        self.tasks.push(task);
        Ok(Reply::Accepted { known: false })
    }

    fn exec(&mut self, exec: &Exec) -> Result<Reply, Failure> {
        let stream = self.new_stream(exec.stream, 2)?;
        let stderr = match exec.stderr_stream.filter(|_| exec.terminal.is_none()) {
            Some(stderr) if stderr == stream => {
                return Err(failure(code::BAD_REQUEST, "two streams with one number"));
            }
            Some(stderr) => Some(self.new_stream(stderr, 2)?),
            None => None,
        };
        let process = Process::start(self.machine.root(), exec)?;
        let pid = process.pid.as_raw_nonzero().get();
        self.streams
            .insert(stream, Stream::Process(Box::new(process)));
        if let Some(stderr) = stderr {
            self.streams.insert(stderr, Stream::StandardError(stream));
        }
        Ok(Reply::Process { pid })
    }
}

fn done((): ()) -> Reply {
    Reply::Done
}

fn parse_signal(number: i32) -> Result<Signal, Failure> {
    Signal::from_named_raw(number)
        .ok_or_else(|| failure(code::BAD_REQUEST, format!("no signal has number {number}")))
}

/// Permission bits of a directory for which none are given.
const DEFAULT_DIRECTORY_MODE: u32 = 0o755;

fn make_directory(root: &Root, request: &MakeDirectory) -> Result<(), Failure> {
    let fail = |error| file_failure("make directory", &request.path, error);
    let owner = identity(root, request.user.as_deref(), request.group.as_deref())?;
    let is_there = root.directory(&request.path).is_ok();
    root.make_directories(&request.path).map_err(fail)?;
    let mode = match request.mode {
        None if is_there => return Ok(()),
        None => DEFAULT_DIRECTORY_MODE,
        Some(mode) => mode,
    };
    // Not by path alone: a descriptor that may change mode and owner.
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
    let directory = root
        .open(&request.path, flags, Mode::empty())
        .map_err(fail)?;
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    fchown(&directory, Some(uid), Some(gid)).map_err(fail)?;
    fchmod(&directory, Mode::from_raw_mode(mode & 0o7777)).map_err(fail)
}

fn make_symlink(root: &Root, request: &MakeSymlink) -> Result<(), Failure> {
    let fail = |error| file_failure("make link", &request.path, error);
    let owner = identity(root, request.user.as_deref(), request.group.as_deref())?;
    let (above, name) = split(&request.path).ok_or_else(|| fail(Errno::ISDIR))?;
    let directory = root.make_directories(above).map_err(fail)?;
    match symlinkat(&request.target, &directory, name) {
        Err(Errno::EXIST) => {
            let stat = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
            if FileType::from_raw_mode(stat.st_mode).is_dir() {
                return Err(fail(Errno::ISDIR));
            }
            unlinkat(&directory, name, AtFlags::empty()).map_err(fail)?;
            symlinkat(&request.target, &directory, name).map_err(fail)?;
        }
        result => result.map_err(fail)?,
    }
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    rustix::fs::chownat(
        &directory,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .map_err(fail)
}
