//! Commands beside the task (`Exec`).

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use xbee_protocol::{Exec, ExitStatus, Failure, GuestMessage, Limits, TerminalSize, code};

use crate::failure::{failure, system_failure};
use crate::pump::{Close, Pumped, Sink, Source};
use crate::root::Root;
use crate::session::Outbox;
use crate::spawn::{Command, spawn};
use crate::tree::Tree;
use crate::users::identity;

const UMASK: u32 = 0o022;

/// A command and its streams.
#[derive(Debug)]
pub(crate) struct Process {
    stream: u32,
    pub(crate) pid: Pid,
    tree: Tree,
    pub(crate) stdin: Sink,
    pub(crate) stdout: Source,
    pub(crate) stderr: Option<Source>,
    terminal: Option<OwnedFd>,
    status: Option<ExitStatus>,
}

/// The ends of a command's standard streams: ours, and its own.
struct Ends {
    ours: [OwnedFd; 3],
    own: [OwnedFd; 3],
}

impl Process {
    pub(crate) fn start(root: &Root, request: &Exec) -> Result<Process, Failure> {
        let identity = identity(root, request.user.as_deref(), request.group.as_deref())?;
        let system = |error| system_failure("no streams for the command", error);
        let (stdin, stdout, stderr, terminal, own);
        match request.terminal {
            Some(size) => {
                let (master, slave) = open_terminal(size, identity.uid)?;
                stdin = Sink::new(
                    request.stream,
                    dup(&master).map_err(system)?,
                    Close::Terminal,
                );
                stdout = Source::new(request.stream, dup(&master).map_err(system)?);
                stderr = None;
                terminal = Some(master);
                own = [
                    dup(&slave).map_err(system)?,
                    dup(&slave).map_err(system)?,
                    slave,
                ];
            }
            None => {
                let Some(stderr_stream) = request.stderr_stream else {
                    return Err(failure(code::BAD_REQUEST, "no stream for standard error"));
                };
                let Ends {
                    ours: [input, output, error],
                    own: ends,
                } = pipes().map_err(system)?;
                stdin = Sink::new(request.stream, input, Close::Pipe);
                stdout = Source::new(request.stream, output);
                stderr = Some(Source::new(stderr_stream, error));
                terminal = None;
                own = ends;
            }
        }
        let mut tree = Tree::new("", false, None, &Limits::default());
        let pid = spawn(
            root,
            &Command {
                argv: &request.argv,
                environment: &request.environment,
                working_directory: request.working_directory.as_deref(),
                identity: &identity,
                umask: UMASK,
                limits: &Limits::default(),
                stdio: [own[0].as_fd(), own[1].as_fd(), own[2].as_fd()],
                terminal: terminal.is_some(),
                cgroup: None,
            },
        )?;
        tree.started(pid);
        Ok(Process {
            stream: request.stream,
            pid,
            tree,
            stdin,
            stdout,
            stderr,
            terminal,
            status: None,
        })
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<(), Failure> {
        self.tree.signal_group(signal).map_err(|error| match error {
            Errno::SRCH => failure(code::NOT_FOUND, "the command has ended"),
            error => system_failure("cannot signal the command", error),
        })
    }

    pub(crate) fn resize(&self, size: TerminalSize) -> Result<(), Failure> {
        let terminal = self
            .terminal
            .as_ref()
            .ok_or_else(|| failure(code::WRONG_STATE, "the command has no terminal"))?;
        tcsetwinsize(terminal, window_size(size))
            .map_err(|error| system_failure("cannot resize the terminal", error))
    }

    /// Ends it and what it started.
    pub(crate) fn kill(&self) {
        self.tree.kill();
    }

    pub(crate) fn reaped(&mut self, status: ExitStatus) {
        self.status = Some(status);
        self.tree.leader_reaped();
    }

    /// Once it has ended: passes on what it wrote, and then tells of its end. True when that is done.
    pub(crate) fn settle(&mut self, out: &mut Outbox) -> bool {
        let Some(status) = self.status else {
            return false;
        };
        for source in [Some(&mut self.stdout), self.stderr.as_mut()]
            .into_iter()
            .flatten()
        {
            loop {
                match source.pump(out) {
                    Pumped::More => {}
                    Pumped::NoRoom => return false,
                    Pumped::Empty | Pumped::End => break,
                }
            }
        }
        // Those who are left behind and still hold the pipes are on their own.
        self.stdout.end(out);
        if let Some(stderr) = &mut self.stderr {
            stderr.end(out);
        }
        out.push(&GuestMessage::ProcessExited {
            stream: self.stream,
            status,
        });
        true
    }
}

/// Starts a command of the system's whose streams nobody wants.
pub(crate) fn run_quietly(root: &Root, argv: &[String]) -> Result<(), Failure> {
    let null = root
        .open("/dev/null", OFlags::RDWR, Mode::empty())
        .map_err(|error| system_failure("no /dev/null", error))?;
    let identity = identity(root, None, None)?;
    spawn(
        root,
        &Command {
            argv,
            environment: &[],
            working_directory: Some("/"),
            identity: &identity,
            umask: UMASK,
            limits: &Limits::default(),
            stdio: [null.as_fd(), null.as_fd(), null.as_fd()],
            terminal: false,
            cgroup: None,
        },
    )
    .map(drop)
}

fn dup(fd: &OwnedFd) -> Result<OwnedFd, Errno> {
    rustix::io::fcntl_dupfd_cloexec(fd, 3)
}

fn pipes() -> Result<Ends, Errno> {
    let (stdin_read, stdin_write) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stdout_read, stdout_write) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr_read, stderr_write) = pipe_with(PipeFlags::CLOEXEC)?;
    let ours = [stdin_write, stdout_read, stderr_read];
    for fd in &ours {
        rustix::io::ioctl_fionbio(fd, true)?;
    }
    Ok(Ends {
        ours,
        own: [stdin_read, stdout_write, stderr_write],
    })
}

/// A new terminal that belongs to the user: its master, which does not block, and its slave.
fn open_terminal(size: TerminalSize, uid: u32) -> Result<(OwnedFd, OwnedFd), Failure> {
    let open = || {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = rustix::fs::open(name, flags, Mode::empty())?;
        tcsetwinsize(&master, window_size(size))?;
        rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(uid)), None)?;
        rustix::io::ioctl_fionbio(&master, true)?;
        Ok((master, slave))
    };
    open().map_err(|error| system_failure("no terminal", error))
}

fn window_size(size: TerminalSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
