//! Tasks: what `Execute` starts. They live on when the connection does not.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal};
use xbee_protocol::{
    EndCause, Execute, ExitStatus, Exited, Failure, MAX_DATA_BYTES, OUTPUT_WINDOW_BYTES,
    OutputStream, TaskEvent, Uuid, Variable, code,
};

use crate::console;
use crate::failure::{failure, system_failure, words};
use crate::reap::Ended;
use crate::root::Root;
use crate::spawn::{Command, spawn};
use crate::tree::{MARK, Tree};
use crate::users::{Identity, identity};

/// What a task that has used up its wall-clock time has to end by itself.
const WALL_CLOCK_GRACE: Duration = Duration::from_secs(5);
/// How often it is looked whether a task's processes have gone.
pub(crate) const TREE_INTERVAL: Duration = Duration::from_millis(50);

const DEFAULT_UMASK: u32 = 0o022;

/// A task.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) conversation: Uuid,
    pub(crate) outputs: [Output; 2],
    tree: Tree,
    pid: Option<Pid>,
    started: Instant,
    /// End of its wall-clock time.
    deadline: Option<Instant>,
    cause: Option<EndCause>,
    ending: Option<Ending>,
    ended: Option<Ended>,
    wall_clock_ms: u64,
    /// The last event, once it is certain.
    result: Option<TaskEvent>,
    /// The last event went out on this connection.
    pub(crate) result_sent: bool,
}

/// A termination under way.
#[derive(Debug)]
struct Ending {
    kill_at: Instant,
    killed: bool,
    look_at: Instant,
}

/// One of a task's outputs.
#[derive(Debug)]
pub(crate) struct Output {
    stream: OutputStream,
    pipe: Option<OwnedFd>,
    /// The file that the job names.
    file: Option<Rc<File>>,
    path: String,
    /// What the host has not acknowledged.
    kept: VecDeque<u8>,
    /// Bytes before `kept`.
    base: u64,
    /// Bytes sent on this connection or an earlier one.
    sent: u64,
    /// Everything that the first process wrote is read.
    complete: bool,
}

impl Output {
    fn new(stream: OutputStream) -> Output {
        Output {
            stream,
            pipe: None,
            file: None,
            path: String::new(),
            kept: VecDeque::new(),
            base: 0,
            sent: 0,
            complete: false,
        }
    }

    fn total(&self) -> u64 {
        self.base + self.kept.len() as u64
    }

    /// The pipe, where there is something to be done with what comes.
    pub(crate) fn wanted(&self) -> Option<&OwnedFd> {
        // What comes after the end is thrown away, so that those who are left do not block.
        let room = self.complete || (self.kept.len() as u64) < OUTPUT_WINDOW_BYTES;
        self.pipe.as_ref().filter(|_| room)
    }

    /// Reads what is there. True where it read all.
    pub(crate) fn read(&mut self) -> bool {
        let mut chunk = [0; 16 * 1024];
        loop {
            let Some(pipe) = self.wanted() else {
                return self.pipe.is_none();
            };
            let room = match self.complete {
                true => chunk.len(),
                false => chunk
                    .len()
                    .min((OUTPUT_WINDOW_BYTES - self.kept.len() as u64) as usize),
            };
            match rustix::io::read(pipe, &mut chunk[..room]) {
                Ok(0) => {
                    self.pipe = None;
                    return true;
                }
                Ok(length) => {
                    self.write_file(&chunk[..length]);
                    if !self.complete {
                        self.kept.extend(&chunk[..length]);
                    }
                }
                Err(Errno::AGAIN) => return true,
                Err(Errno::INTR) => {}
                Err(error) => {
                    console::log(&format!("cannot read a task's output: {}", words(error)));
                    self.pipe = None;
                    return true;
                }
            }
        }
    }

    /// What the host gets is not touched by a file that cannot be written.
    fn write_file(&mut self, bytes: &[u8]) {
        let Some(file) = &self.file else { return };
        if let Err(error) = file.as_ref().write_all(bytes) {
            console::log(&format!("cannot write {}: {error}", self.path));
            self.file = None;
        }
    }

    /// The next bytes to send.
    pub(crate) fn next(&mut self) -> Option<TaskEvent> {
        let offset = self.sent;
        let skip = usize::try_from(offset - self.base).ok()?;
        let data = front(&self.kept, skip, MAX_DATA_BYTES);
        if data.is_empty() {
            return None;
        }
        self.sent += data.len() as u64;
        Some(TaskEvent::Output {
            stream: self.stream,
            offset,
            data,
        })
    }

    pub(crate) fn acknowledge(&mut self, offset: u64) {
        // Never more than was sent: the host cannot have it.
        let gone = offset.min(self.sent).saturating_sub(self.base);
        self.kept.drain(..gone as usize);
        self.base += gone;
        if self.kept.is_empty() {
            // A task may be silent for long.
            self.kept.shrink_to(4096);
        }
    }

    /// Goes on from where the host stopped. False where that is not possible.
    fn resume(&mut self, offset: Option<u64>) -> bool {
        let offset = offset.unwrap_or(self.base);
        if offset < self.base || offset > self.total() {
            return false;
        }
        self.sent = offset;
        // The host has what is before, even if its acknowledgement was lost with the connection. Not to
        // count it would be a deadlock where the window is full of it.
        self.acknowledge(offset);
        true
    }
}

impl Task {
    /// Starts a task. One that cannot be started has its failure as its result.
    pub(crate) fn start(root: &Root, owns_machine: bool, request: Execute) -> Task {
        let name = format!("xbee-{}", request.conversation);
        let now = Instant::now();
        let mut task = Task {
            conversation: request.conversation,
            outputs: [
                Output::new(OutputStream::Stdout),
                Output::new(OutputStream::Stderr),
            ],
            tree: Tree::new(
                &name,
                owns_machine,
                Some(request.conversation.to_string()),
                &request.limits,
            ),
            pid: None,
            started: now,
            deadline: request
                .limits
                .wall_clock_ms
                .and_then(|limit| now.checked_add(Duration::from_millis(limit))),
            cause: None,
            ending: None,
            ended: None,
            wall_clock_ms: 0,
            result: None,
            result_sent: false,
        };
        if let Err(failure) = task.spawn(root, request) {
            task.outputs = [
                Output::new(OutputStream::Stdout),
                Output::new(OutputStream::Stderr),
            ];
            task.result = Some(TaskEvent::Failed(failure));
        }
        task
    }

    fn spawn(&mut self, root: &Root, mut request: Execute) -> Result<(), Failure> {
        let identity = identity(root, request.user.as_deref(), request.group.as_deref())?;
        let umask = request.umask.unwrap_or(DEFAULT_UMASK);
        let directory = request
            .working_directory
            .as_deref()
            .unwrap_or(&identity.home);
        let standard = StandardFiles {
            root,
            identity: &identity,
            directory,
            umask,
        };
        let stdin = standard.input(request.stdin.as_deref())?;
        let [stdout, stderr] = &mut self.outputs;
        if let Some(path) = &request.stdout {
            stdout.file = Some(Rc::new(standard.output(path)?));
            stdout.path.clone_from(path);
        }
        if let Some(path) = &request.stderr {
            // One file for both is opened once, so that neither overwrites the other.
            stderr.file = match &stdout.file {
                Some(file) if request.stdout.as_ref() == Some(path) => Some(Rc::clone(file)),
                _ => Some(Rc::new(standard.output(path)?)),
            };
            stderr.path.clone_from(path);
        }
        let (stdout_read, stdout_write) = output_pipe()?;
        let (stderr_read, stderr_write) = output_pipe()?;
        if !self.tree.bounds_memory() {
            // The next best: private writable memory of each process.
            let data = request.limits.data_bytes.into_iter();
            request.limits.data_bytes = data.chain(request.limits.memory_bytes).min();
        }
        request.environment.push(Variable {
            name: MARK.into(),
            value: request.conversation.to_string(),
        });
        let pid = spawn(
            root,
            &Command {
                argv: &request.argv,
                environment: &request.environment,
                working_directory: request.working_directory.as_deref(),
                identity: &identity,
                umask,
                limits: &request.limits,
                stdio: [stdin.as_fd(), stdout_write.as_fd(), stderr_write.as_fd()],
                terminal: false,
                cgroup: self.tree.cgroup_procs(),
            },
        )?;
        stdout.pipe = Some(stdout_read);
        stderr.pipe = Some(stderr_read);
        self.pid = Some(pid);
        self.tree.started(pid);
        Ok(())
    }

    /// Its first process has not ended.
    pub(crate) fn is_running(&self) -> bool {
        self.pid.is_some()
    }

    /// Nothing of it changes any more, and the host has all of it.
    pub(crate) fn is_settled(&self) -> bool {
        self.result.is_some() && self.outputs.iter().all(|output| output.kept.is_empty())
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<(), Failure> {
        self.tree.signal_group(signal).map_err(|error| match error {
            Errno::SRCH => failure(code::NOT_FOUND, "the task has ended"),
            error => system_failure("cannot signal the task", error),
        })
    }

    /// Ends everything it has started.
    pub(crate) fn terminate(&mut self, cause: EndCause, grace: Duration) {
        if self.result.is_some() {
            return;
        }
        let now = Instant::now();
        let kill_at = now
            .checked_add(grace)
            .unwrap_or(now + Duration::from_secs(86_400 * 365));
        if let Some(ending) = &mut self.ending {
            // A second request may be more impatient, not less.
            ending.kill_at = ending.kill_at.min(kill_at);
            return;
        }
        if self.pid.is_some() {
            self.cause = Some(cause);
        }
        if !grace.is_zero() {
            self.tree.terminate();
        }
        self.ending = Some(Ending {
            kill_at,
            killed: false,
            look_at: now,
        });
    }

    /// If the process is this task's first, it has ended.
    pub(crate) fn reaped(&mut self, pid: Pid, ended: Ended) -> bool {
        if self.pid != Some(pid) {
            return false;
        }
        self.pid = None;
        self.tree.leader_reaped();
        self.deadline = None;
        self.wall_clock_ms = self.started.elapsed().as_millis() as u64;
        self.ended = Some(ended);
        true
    }

    /// When [`Task::tick`] is wanted.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        match &self.ending {
            Some(ending) if self.result.is_none() => Some(ending.look_at),
            _ => self.deadline,
        }
    }

    /// Does what the time demands.
    pub(crate) fn tick(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.deadline = None;
            self.terminate(EndCause::WallClockLimit, WALL_CLOCK_GRACE);
        }
        if let Some(ending) = &mut self.ending {
            if now >= ending.kill_at {
                // Again and again: what was forked at the wrong moment is met the next time.
                self.tree.kill();
                ending.killed = true;
            }
            ending.look_at = now + TREE_INTERVAL;
            if !ending.killed {
                ending.look_at = ending.look_at.min(ending.kill_at);
            }
        }
    }

    /// Looks whether it is over: its first process reaped, what that wrote read, and, where it is
    /// being terminated, everything else gone.
    pub(crate) fn settle(&mut self, now: Instant) {
        let Some(ended) = &self.ended else { return };
        if self.result.is_some() {
            return;
        }
        if let Some(ending) = &mut self.ending
            && !self.tree.is_empty()
        {
            ending.look_at = now + TREE_INTERVAL;
            return;
        }
        for output in self.outputs.iter_mut().filter(|output| !output.complete) {
            // What the first process wrote is in the pipe by now.
            output.complete = output.read();
        }
        let [stdout, stderr] = &self.outputs;
        if stdout.complete && stderr.complete {
            // One that goes well all the same is left its success.
            let failed = ended.status != ExitStatus::Code(0);
            let bound_hit = self.tree.bound_hit().filter(|_| failed);
            self.tree.release();
            self.result = Some(TaskEvent::Exited(Exited {
                status: ended.status,
                cause: self.cause.or(bound_hit),
                stdout_bytes: stdout.total(),
                stderr_bytes: stderr.total(),
                cpu_ms: ended.cpu_ms,
                wall_clock_ms: self.wall_clock_ms,
                max_resident_kib: ended.max_resident_kib,
            }));
        }
    }

    /// The last event, when everything before it is sent.
    pub(crate) fn take_result(&mut self) -> Option<TaskEvent> {
        if self.result_sent
            || self
                .outputs
                .iter()
                .any(|output| output.sent < output.total())
        {
            return None;
        }
        let result = self.result.clone()?;
        self.result_sent = true;
        Some(result)
    }

    /// A new connection: goes on from where the host stopped.
    pub(crate) fn resume(&mut self, offsets: Option<[u64; 2]>) -> bool {
        self.result_sent = false;
        let offsets = offsets.map_or([None, None], |[out, err]| [Some(out), Some(err)]);
        self.outputs
            .iter_mut()
            .zip(offsets)
            .all(|(output, offset)| output.resume(offset))
    }

    /// Ends everything now: the machine is being switched off.
    pub(crate) fn kill(&self) {
        self.tree.kill();
    }
}

/// Up to `max` bytes from `skip` on.
fn front(bytes: &VecDeque<u8>, skip: usize, max: usize) -> Vec<u8> {
    let (first, second) = bytes.as_slices();
    let first = first.get(skip..).unwrap_or_default();
    let skip = (skip + first.len()).saturating_sub(bytes.len() - second.len());
    let second = second.get(skip..).unwrap_or_default();
    let from_first = &first[..first.len().min(max)];
    let from_second = &second[..second.len().min(max - from_first.len())];
    [from_first, from_second].concat()
}

/// A pipe whose end here does not block.
fn output_pipe() -> Result<(OwnedFd, OwnedFd), Failure> {
    let system = |error| system_failure("no pipe for the task's output", error);
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(system)?;
    rustix::io::ioctl_fionbio(&read, true).map_err(system)?;
    Ok((read, write))
}

/// Opens the files that the job names for its standard streams, with the rights of its user.
struct StandardFiles<'a> {
    root: &'a Root,
    identity: &'a Identity,
    directory: &'a str,
    umask: u32,
}

impl StandardFiles<'_> {
    fn input(&self, path: Option<&str>) -> Result<File, Failure> {
        // Not blocking: a FIFO without a writer must not stop the agent.
        let path = path.unwrap_or("/dev/null");
        match self.open(path, OFlags::RDONLY | OFlags::NONBLOCK, "read") {
            // A root without devices has nothing to read from either.
            Err(_) if path == "/dev/null" => {
                let (read, _write) = pipe_with(PipeFlags::CLOEXEC)
                    .map_err(|error| system_failure("no pipe for the task's input", error))?;
                Ok(read.into())
            }
            result => {
                let file = result?;
                rustix::io::ioctl_fionbio(&file, false)
                    .map_err(|error| system_failure("cannot open the task's input", error))?;
                Ok(file)
            }
        }
    }

    fn output(&self, path: &str) -> Result<File, Failure> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NONBLOCK;
        self.open(path, flags, "write")
    }

    fn open(&self, path: &str, flags: OFlags, what: &str) -> Result<File, Failure> {
        let full = match path.starts_with('/') {
            true => path.to_owned(),
            false => format!("{}/{path}", self.directory),
        };
        let _rights = FileRights::take(self.identity, self.umask);
        let mode = if flags.contains(OFlags::CREATE) {
            Mode::from_raw_mode(0o666)
        } else {
            Mode::empty()
        };
        self.root
            .open(&full, flags | OFlags::NOCTTY, mode)
            .map(File::from)
            .map_err(|error| {
                failure(
                    code::BAD_STANDARD_STREAM,
                    format!(
                        "cannot {what} {full} in the guest as user {}: {}",
                        self.identity.name,
                        words(error)
                    ),
                )
            })
    }
}

/// While it lives, the agent's file accesses have another's rights.
struct FileRights {
    umask: libc::mode_t,
}

impl FileRights {
    fn take(identity: &Identity, umask: u32) -> FileRights {
        // SAFETY: these change the calling thread's credentials and have no memory effects; there is
        // one thread. That they fail shows in the access that follows.
        unsafe {
            libc::setfsgid(identity.gid);
            libc::setfsuid(identity.uid);
            FileRights {
                umask: libc::umask(umask & 0o777),
            }
        }
    }
}

impl Drop for FileRights {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe {
            libc::setfsuid(libc::geteuid());
            libc::setfsgid(libc::getegid());
            libc::umask(self.umask);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn front_crosses_the_seam() {
        let mut bytes: VecDeque<u8> = VecDeque::with_capacity(8);
        let capacity = bytes.capacity() as u8;
        bytes.extend(0..capacity);
        bytes.drain(..6);
        bytes.extend(100..104);
        assert!(
            !bytes.as_slices().1.is_empty(),
            "the test is about two slices"
        );
        let all: Vec<u8> = bytes.iter().copied().collect();
        for skip in 0..=all.len() {
            for max in 0..=all.len() + 1 {
                let end = all.len().min(skip + max);
                assert_eq!(front(&bytes, skip, max), all[skip..end], "{skip} {max}");
            }
        }
    }
}
