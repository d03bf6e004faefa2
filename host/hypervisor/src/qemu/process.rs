//! QEMU's process: started in a cage, found again after a restart, seen when it ends.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus};
use rustix::thread::UnshareFlags;
use tokio::io::unix::AsyncFd;
use xbee_cage::{Cage, Plan};

use crate::readable::readable;

/// A process to start.
pub(crate) struct Launch<'a> {
    pub(crate) program: &'a Path,
    pub(crate) args: Vec<OsString>,
    /// Working directory, by descriptor: its parents may be closed to the process.
    pub(crate) directory: &'a OwnedFd,
    /// Gets `/proc/self/stat` of the process before it becomes QEMU, so that a crash of this one
    /// between fork and any note of ours leaves no process that nobody knows of.
    pub(crate) stat_file: &'a File,
    /// Standard error.
    pub(crate) stderr: OwnedFd,
    /// Descriptors that stay open under their numbers.
    pub(crate) inherit: Vec<RawFd>,
    pub(crate) cage: &'a Cage,
    /// What it is left with in the cage. The fences that the host has are added here.
    pub(crate) plan: Plan,
}

/// Most open files of a domain's process.
const OPEN_FILES_MAX: u64 = 1024;

/// Starts a process that outlives this one.
pub(crate) fn launch(launch: Launch<'_>) -> io::Result<Process> {
    let parts = launch.cage.report.parts;
    let plan = Plan {
        parts,
        open_files_max: OPEN_FILES_MAX,
        ..launch.plan
    };
    let mut command = Command::new(&launch.cage.program);
    command
        .arg(serde_json::to_string(&plan)?)
        .arg(launch.program)
        .args(&launch.args)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(launch.stderr);
    let directory = launch.directory.as_raw_fd();
    let stat_file = launch.stat_file.as_raw_fd();
    let inherit = launch.inherit;
    // SAFETY: runs between fork and exec and only makes system calls on values made before the
    // fork: no allocation, no lock. The descriptors are borrowed from `launch`, which outlives
    // the call to `spawn`.
    unsafe {
        command.pre_exec(move || {
            use rustix::fd::BorrowedFd;
            // A session of its own: signals to this one's terminal do not reach it.
            rustix::process::setsid()?;
            // SAFETY: see above: open until `spawn` returns.
            let directory = BorrowedFd::borrow_raw(directory);
            rustix::process::fchdir(directory)?;
            for fd in &inherit {
                // SAFETY: see above.
                let fd = BorrowedFd::borrow_raw(*fd);
                rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
            }
            let stat = rustix::fs::open(
                c"/proc/self/stat",
                rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )?;
            let mut buffer = [0; 1024];
            let len = rustix::io::read(&stat, &mut buffer)?;
            // SAFETY: see above.
            let stat_file = BorrowedFd::borrow_raw(stat_file);
            rustix::io::write(stat_file, &buffer[..len])?;
            Ok(())
        });
    }
    let child = match parts.processes {
        true => spawn_apart(&mut command)?,
        false => command.spawn()?,
    };
    // The child is not reaped before `Process::exited` sees its end: its identifier cannot have
    // been given to another process yet.
    let pid = Pid::from_child(&child);
    Ok(Process {
        pid,
        pidfd: readable(rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)?)?,
    })
}

/// Starts a process that is the first of a process namespace: it sees no process of the host.
fn spawn_apart(command: &mut Command) -> io::Result<Child> {
    // The namespace is that of all further children of a thread, so of one that has no more.
    std::thread::scope(|scope| {
        let apart = || {
            // SAFETY: descriptors are not unshared.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }?;
            command.spawn()
        };
        let started = scope.spawn(apart).join();
        started.unwrap_or_else(|_| Err(io::Error::other("the thread that starts QEMU panicked")))
    })
}

/// How a process ended, as far as this one could see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Code(i32),
    Signal(i32),
    /// It was no child of this process: the kernel told its parent.
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Unknown => f.write_str("exit code unknown"),
        }
    }
}

/// A running (or just ended) process, held by descriptor.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
}

impl Process {
    /// The process that wrote `stat` (content of the stat file), if it still runs.
    pub(crate) fn adopt(stat: &str) -> io::Result<Option<Self>> {
        let Some(then) = Stat::parse(stat) else {
            return Ok(None);
        };
        let Some(pid) = Pid::from_raw(then.pid) else {
            return Ok(None);
        };
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Read after the descriptor was opened: if the numbers agree now, the descriptor cannot
        // belong to another process, since that one would have had to end before ours began.
        match Stat::read(pid)? {
            Some(now) if now.start_ticks == then.start_ticks && !now.ended => Ok(Some(Self {
                pid,
                pidfd: readable(pidfd)?,
            })),
            _ => Ok(None),
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Sends SIGKILL. A process that is gone already is fine.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for the end, and reaps the process if it was a child. Cancel-safe.
    pub(crate) async fn exited(&self) -> io::Result<Exit> {
        let _ = self.pidfd.readable().await?;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match rustix::process::waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), options) {
            Ok(Some(status)) => Ok(describe(&status)),
            Ok(None) | Err(rustix::io::Errno::CHILD) => Ok(Exit::Unknown),
            Err(error) => Err(error.into()),
        }
    }

    /// CPU time used in milliseconds and resident memory in bytes; `None` once it has ended.
    pub(crate) fn usage(&self) -> io::Result<Option<(u64, u64)>> {
        let ticks_per_s = rustix::param::clock_ticks_per_second().max(1);
        let page_bytes = rustix::param::page_size() as u64;
        Ok(Stat::read(self.pid)?
            .filter(|stat| !stat.ended)
            .map(|stat| {
                (
                    stat.cpu_ticks * 1000 / ticks_per_s,
                    stat.resident_pages * page_bytes,
                )
            }))
    }
}

fn describe(status: &WaitIdStatus) -> Exit {
    if let Some(code) = status.exit_status() {
        Exit::Code(code)
    } else if let Some(signal) = status.terminating_signal() {
        Exit::Signal(signal)
    } else {
        Exit::Unknown
    }
}

/// What `/proc/PID/stat` says (proc_pid_stat(5)).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    pid: i32,
    ended: bool,
    cpu_ticks: u64,
    start_ticks: u64,
    resident_pages: u64,
}

impl Stat {
    fn read(pid: Pid) -> io::Result<Option<Self>> {
        match std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())) {
            Ok(text) => Ok(Self::parse(&text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            // The process went between open and read.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        // The second field is the program's name in parentheses, and may hold any character.
        let (before, after) = text.rsplit_once(')')?;
        let pid = before.split(' ').next()?.parse().ok()?;
        let fields: Vec<&str> = after.split_ascii_whitespace().collect();
        // Field 3 of the manual is the first here.
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        Some(Self {
            pid,
            ended: matches!(*fields.first()?, "Z" | "X" | "x"),
            cpu_ticks: number(14)? + number(15)?,
            start_ticks: number(22)?,
            resident_pages: number(24)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_of_a_program_with_a_wild_name() {
        let stat =
            Stat::parse("7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 9001 4096 33 1")
                .unwrap();
        assert_eq!(
            stat,
            Stat {
                pid: 7,
                ended: false,
                cpu_ticks: 11,
                start_ticks: 9001,
                resident_pages: 33
            }
        );
        assert_eq!(Stat::parse("7 (a"), None);
        assert_eq!(Stat::parse(""), None);
    }
}
