//! What the streams of a connection to a simulated agent are about.

use std::collections::VecDeque;

use tokio::time::Instant;
use xbee_protocol::{
    Exec, ExitStatus, Failure, FileInfo, GuestMessage, MAX_DATA_BYTES, STREAM_WINDOW_BYTES,
    StreamBody, code,
};

use super::command;
use super::failure;
use super::files::{File, Files, Node};
use super::task::later;

/// Credit is given when this much has been taken, in bytes.
const CREDIT_STEP_BYTES: u32 = STREAM_WINDOW_BYTES / 4;

/// SIGKILL on Linux.
const KILL: i32 = 9;

/// Input of a command that is kept, in bytes; more ends it.
const INPUT_MAX_BYTES: usize = 16 << 20;

pub(super) enum Stream {
    Put(Put),
    Get(Get),
    Process(Process),
    /// Standard error of the command on another stream.
    StandardError(u32),
}

impl Stream {
    pub(super) fn wake_at(&self) -> Option<Instant> {
        match self {
            // Afterwards it waits for the host's credit.
            Self::Process(process) => process.ends_at.filter(|at| *at > Instant::now()),
            _ => None,
        }
    }

    /// The next data to the host.
    pub(super) fn next(&mut self, id: u32) -> Option<GuestMessage> {
        let (stream, body) = match self {
            Self::Get(get) => (id, get.data.next()?),
            Self::Process(process) => match (process.stdout.next(), process.exec.stderr_stream) {
                (Some(body), _) => (id, body),
                (None, Some(stderr)) => (stderr, process.stderr.next()?),
                (None, None) => return None,
            },
            Self::Put(_) | Self::StandardError(_) => return None,
        };
        Some(GuestMessage::Stream { stream, body })
    }

    /// All is sent, and nothing more will come.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        match self {
            Self::Get(get) => get.data.is_empty(),
            Self::Process(process) => {
                let stderr_sent = process.exec.stderr_stream.is_none() || process.stderr.is_empty();
                let ended = process.ends_at.is_some_and(|at| now >= at);
                ended && process.stdout.is_empty() && stderr_sent
            }
            Self::Put(_) | Self::StandardError(_) => false,
        }
    }
}

/// Bytes that go to the host as its window allows.
pub(super) struct Outgoing {
    data: Vec<u8>,
    sent: usize,
    window: u32,
}

impl Outgoing {
    fn new(data: Vec<u8>) -> Self {
        Self {
            data,
            sent: 0,
            window: STREAM_WINDOW_BYTES,
        }
    }

    pub(super) fn credit(&mut self, bytes: u32) {
        self.window = self.window.saturating_add(bytes);
    }

    fn next(&mut self) -> Option<StreamBody> {
        let waiting = self.data.len() - self.sent;
        let len = waiting.min(MAX_DATA_BYTES).min(self.window as usize);
        if len == 0 {
            return None;
        }
        let body = StreamBody::Data(self.data[self.sent..self.sent + len].to_vec());
        self.sent += len;
        // At most the window.
        self.window -= len as u32;
        Some(body)
    }

    fn is_empty(&self) -> bool {
        self.sent == self.data.len()
    }

    fn clear(&mut self) {
        self.sent = self.data.len();
    }
}

/// Counts bytes taken; gives the credit that is due.
fn took(taken: &mut u32, data: &[u8]) -> Option<StreamBody> {
    // At most a frame's worth.
    *taken += data.len() as u32;
    (*taken >= CREDIT_STEP_BYTES).then(|| StreamBody::Credit(std::mem::take(taken)))
}

/// A file that comes.
pub(super) struct Put {
    pub(super) request: u32,
    path: String,
    file: File,
    taken: u32,
}

impl Put {
    pub(super) fn new(request: u32, path: String, mode: u32, uid: u32, gid: u32) -> Self {
        Self {
            request,
            path,
            file: File {
                content: Vec::new(),
                mode: mode & 0o7777,
                uid,
                gid,
                modified_unix_seconds: 0,
            },
            taken: 0,
        }
    }

    /// Takes up a part: credit for the host, and the result once it is over.
    pub(super) fn receive(
        &mut self,
        body: StreamBody,
        files: &mut Files,
    ) -> (Option<StreamBody>, Option<Result<FileInfo, Failure>>) {
        let content = &mut self.file.content;
        let more = match &body {
            StreamBody::Data(data) => data.len() as u64,
            StreamBody::Hole(bytes) => *bytes,
            _ => 0,
        };
        let size = more.saturating_add(content.len() as u64);
        if let Err(error) = files.check_room(&self.path, size) {
            return (None, Some(Err(error)));
        }
        match body {
            StreamBody::Data(data) => {
                content.extend_from_slice(&data);
                (took(&mut self.taken, &data), None)
            }
            StreamBody::Hole(_) => {
                // Less than the guest's memory, which is this process's.
                content.resize(usize::try_from(size).unwrap_or(usize::MAX), 0);
                (None, None)
            }
            StreamBody::Credit(_) => (None, None),
            StreamBody::Reset => {
                let cancelled = failure(code::CANCELLED, "the host cancelled the file");
                (None, Some(Err(cancelled)))
            }
            StreamBody::End => {
                let info = self.file.info();
                let file = std::mem::take(&mut self.file);
                let put = files.put(&self.path, Node::File(file));
                (None, Some(put.map(|()| info)))
            }
        }
    }
}

/// A file that goes.
pub(super) struct Get {
    pub(super) request: u32,
    pub(super) data: Outgoing,
    pub(super) info: FileInfo,
}

impl Get {
    pub(super) fn new(request: u32, file: &File) -> Self {
        Self {
            request,
            data: Outgoing::new(file.content.clone()),
            info: file.info(),
        }
    }
}

/// A command beside the task. One that reads its input begins when it has all of it.
pub(super) struct Process {
    pub(super) exec: Exec,
    input: Vec<u8>,
    taken: u32,
    ends_at: Option<Instant>,
    status: ExitStatus,
    stdout: Outgoing,
    stderr: Outgoing,
}

impl Process {
    pub(super) fn start(exec: Exec, files: &Files, now: Instant) -> Result<Self, Failure> {
        let mut process = Self {
            exec,
            input: Vec::new(),
            taken: 0,
            ends_at: None,
            status: ExitStatus::Code(0),
            stdout: Outgoing::new(Vec::new()),
            stderr: Outgoing::new(Vec::new()),
        };
        let run = process.run(files)?;
        if !run.reads {
            process.ran(run, now);
        }
        Ok(process)
    }

    fn run(&self, files: &Files) -> Result<command::Run, Failure> {
        let Exec {
            argv,
            environment,
            working_directory,
            ..
        } = &self.exec;
        let directory = working_directory.as_deref().unwrap_or("/root");
        command::run(files, argv, environment, directory, &self.input)
    }

    fn ran(&mut self, run: command::Run, now: Instant) {
        self.ends_at = Some(later(now, run.duration));
        self.status = run.status;
        // Credit may have come before.
        self.stdout.data = run.stdout;
        self.stderr.data = run.stderr;
    }

    pub(super) fn kill(&mut self, signal: i32, now: Instant) {
        self.status = ExitStatus::Signal {
            signal,
            core_dumped: false,
        };
        self.ends_at = Some(now);
    }

    /// Takes up a part of its input, or credit for its outputs; gives credit that is due.
    pub(super) fn receive(
        &mut self,
        is_main: bool,
        body: StreamBody,
        files: &Files,
        now: Instant,
    ) -> Option<StreamBody> {
        match body {
            StreamBody::Data(data) => {
                if self.input.len() + data.len() > INPUT_MAX_BYTES {
                    self.kill(KILL, now);
                } else {
                    self.input.extend_from_slice(&data);
                }
                return took(&mut self.taken, &data);
            }
            StreamBody::Credit(bytes) if is_main => self.stdout.credit(bytes),
            StreamBody::Credit(bytes) => self.stderr.credit(bytes),
            StreamBody::End if self.ends_at.is_none() => match self.run(files) {
                Ok(run) => self.ran(run, now),
                // Its file is gone since.
                Err(_) => self.kill(KILL, now),
            },
            StreamBody::Reset => {
                self.kill(KILL, now);
                self.stdout.clear();
                self.stderr.clear();
            }
            StreamBody::End | StreamBody::Hole(_) => {}
        }
        None
    }

    /// The end of its streams, and how it ended.
    pub(super) fn last_words(&self, id: u32) -> VecDeque<GuestMessage> {
        let end = |stream| GuestMessage::Stream {
            stream,
            body: StreamBody::End,
        };
        let status = self.status;
        let mut last: VecDeque<_> = self.exec.stderr_stream.map(end).into_iter().collect();
        last.push_back(end(id));
        last.push_back(GuestMessage::ProcessExited { stream: id, status });
        last
    }
}
