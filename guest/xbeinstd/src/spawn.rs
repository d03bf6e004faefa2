//! Starting processes in the guest's root.

use std::ffi::{CString, c_char, c_int};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;
use xbee_protocol::{Failure, Limits, Variable, code};

use crate::failure::{failure, words};
use crate::root::Root;
use crate::users::Identity;

/// Where commands are looked for when the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What to start, and as whom.
#[derive(Debug)]
pub(crate) struct Command<'a> {
    pub(crate) argv: &'a [String],
    pub(crate) environment: &'a [Variable],
    pub(crate) working_directory: Option<&'a str>,
    pub(crate) identity: &'a Identity,
    pub(crate) umask: u32,
    pub(crate) limits: &'a Limits,
    /// Standard input, output and error.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
    /// Standard input is a terminal, and becomes the controlling one.
    pub(crate) terminal: bool,
    /// `cgroup.procs` of the control group it joins.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

/// Between SIGXCPU and SIGKILL.
const CPU_GRACE_SECONDS: u64 = 2;

/// Where in the child it went wrong.
const STEP_SETUP: u8 = 0;
const STEP_LIMIT: u8 = 1;
const STEP_USER: u8 = 2;
const STEP_DIRECTORY: u8 = 3;
const STEP_EXEC: u8 = 4;

/// Starts a process in a session of its own.
///
/// # Errors
/// The failure as the host is to see it, told apart by its code.
pub(crate) fn spawn(root: &Root, command: &Command<'_>) -> Result<Pid, Failure> {
    let prepared = Prepared::new(root, command)?;
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)
        .map_err(|error| failure(code::SYSTEM_ERROR, format!("no pipe: {}", words(error))))?;
    // SAFETY: the agent has one thread, so the child may do what any process may. It uses what was
    // prepared, and leaves by `execve` or `_exit`, so that nothing of the parent is dropped twice.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let (step, error) = prepared.become_command();
        let report = [step, error as u8];
        // An error number fits a byte on Linux. If the pipe fails there is nobody left to tell.
        let _unreported = rustix::io::write(&writer, &report);
        // SAFETY: ends this process without running the parent's destructors.
        unsafe { libc::_exit(127) };
    }
    let Some(pid) = Pid::from_raw(pid).filter(|_| pid > 0) else {
        let error = std::io::Error::last_os_error();
        return Err(failure(code::SYSTEM_ERROR, format!("cannot fork: {error}")));
    };
    drop(writer);
    let mut report = [0; 2];
    let told = loop {
        match rustix::io::read(&reader, &mut report) {
            Err(Errno::INTR) => {}
            other => break other,
        }
    };
    match told {
        Ok(2) => {
            // It is a zombie by now, or in a moment; the loop reaps it as one of nobody's.
            Err(prepared.explain(
                root,
                command,
                report[0],
                Errno::from_raw_os_error(report[1].into()),
            ))
        }
        _ => Ok(pid),
    }
}

/// Everything the child needs, made before the fork.
struct Prepared {
    path: CString,
    argv: Vec<CString>,
    environment: Vec<CString>,
    shell_argv: Vec<CString>,
    directory: CString,
    directory_is_default: bool,
    /// To be changed into first, where the root is not the agent's own.
    chroot: Option<OwnedFd>,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    umask: u32,
    limits: Vec<(c_int, u64)>,
    stdio: [c_int; 3],
    terminal: bool,
    cgroup: Option<c_int>,
}

impl Prepared {
    fn new(root: &Root, command: &Command<'_>) -> Result<Self, Failure> {
        let identity = command.identity;
        let directory = command.working_directory.unwrap_or(&identity.home);
        let environment = environment(command);
        let path = find_command(root, command.argv, &environment, directory)?;
        let argv = command
            .argv
            .iter()
            .map(|arg| c_string("argument", arg))
            .collect::<Result<Vec<_>, _>>()?;
        let shell_argv = ["/bin/sh", &path]
            .into_iter()
            .chain(command.argv.iter().skip(1).map(String::as_str))
            .map(|arg| c_string("argument", arg))
            .collect::<Result<Vec<_>, _>>()?;
        let environment = environment
            .iter()
            .map(|(name, value)| c_string("environment variable", &format!("{name}={value}")))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Prepared {
            path: c_string("command", &path)?,
            argv,
            environment,
            shell_argv,
            directory: c_string("working directory", directory)?,
            directory_is_default: command.working_directory.is_none(),
            chroot: foreign_root(root)?,
            uid: identity.uid,
            gid: identity.gid,
            groups: identity.groups.clone(),
            umask: command.umask,
            limits: resource_limits(command.limits),
            stdio: command.stdio.map(|fd| fd.as_raw_fd()),
            terminal: command.terminal,
            cgroup: command.cgroup.map(|fd| fd.as_raw_fd()),
        })
    }

    /// In the child: becomes the command, or says at which step and why not.
    fn become_command(&self) -> (u8, i32) {
        match self.steps() {
            Ok(never) => match never {},
            Err((step, error)) => (step, error),
        }
    }

    fn steps(&self) -> Result<std::convert::Infallible, (u8, i32)> {
        let check = |step: u8, result: c_int| match result {
            -1 => Err((
                step,
                std::io::Error::last_os_error()
                    .raw_os_error()
                    .unwrap_or(libc::EIO),
            )),
            _ => Ok(()),
        };
        // Before the limits are set, which allocation may not survive.
        let (argv, shell_argv) = (pointers(&self.argv), pointers(&self.shell_argv));
        let environment = pointers(&self.environment);
        // SAFETY: plain system calls in a process with one thread; pointers are to values that
        // `self` or this frame owns, and descriptors were open at the fork.
        unsafe {
            check(STEP_SETUP, libc::setsid())?;
            if let Some(cgroup) = self.cgroup {
                check(
                    STEP_SETUP,
                    libc::write(cgroup, c"0".as_ptr().cast(), 1) as c_int,
                )?;
            }
            forgive_out_of_memory();
            // Moved out of the way of 0, 1 and 2 first, which may be among them.
            let mut high = [0; 3];
            for (high, fd) in high.iter_mut().zip(self.stdio) {
                *high = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3);
                check(STEP_SETUP, *high)?;
            }
            for (target, fd) in (0..).zip(high) {
                check(STEP_SETUP, libc::dup2(fd, target))?;
            }
            if self.terminal {
                check(STEP_SETUP, libc::ioctl(0, libc::TIOCSCTTY as _, 0))?;
            }
            for (resource, value) in &self.limits {
                // At the hard limit of CPU time comes SIGKILL: SIGXCPU, which says why, comes first.
                let hard = match *resource == libc::RLIMIT_CPU as c_int {
                    true => value.saturating_add(CPU_GRACE_SECONDS),
                    false => *value,
                };
                let limit = libc::rlimit {
                    rlim_cur: *value,
                    rlim_max: hard,
                };
                check(STEP_LIMIT, libc::setrlimit(*resource as _, &limit))?;
            }
            if let Some(root) = &self.chroot {
                check(STEP_SETUP, libc::fchdir(root.as_raw_fd()))?;
                check(STEP_SETUP, libc::chroot(c".".as_ptr()))?;
            }
            check(
                STEP_USER,
                libc::setgroups(self.groups.len(), self.groups.as_ptr()),
            )?;
            check(STEP_USER, libc::setresgid(self.gid, self.gid, self.gid))?;
            check(STEP_USER, libc::setresuid(self.uid, self.uid, self.uid))?;
            libc::umask(self.umask & 0o777);
            if libc::chdir(self.directory.as_ptr()) == -1 {
                // A home that is not there is no reason not to run.
                check(
                    STEP_DIRECTORY,
                    if self.directory_is_default {
                        libc::chdir(c"/".as_ptr())
                    } else {
                        -1
                    },
                )?;
            }
            restore_signals();
            libc::execve(self.path.as_ptr(), argv.as_ptr(), environment.as_ptr());
            let mut error = std::io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO);
            if error == libc::ENOEXEC {
                // A script without its first line, as shells have run them always.
                libc::execve(
                    c"/bin/sh".as_ptr(),
                    shell_argv.as_ptr(),
                    environment.as_ptr(),
                );
                error = libc::ENOEXEC;
            }
            Err((STEP_EXEC, error))
        }
    }

    /// The child's report in words.
    fn explain(&self, root: &Root, command: &Command<'_>, step: u8, error: Errno) -> Failure {
        let name = command.argv.first().map_or("", String::as_str);
        let directory = self.directory.to_string_lossy();
        match (step, error) {
            (STEP_LIMIT, _) => failure(
                code::BAD_LIMIT,
                format!("cannot set the limits for {name:?}: {}", words(error)),
            ),
            (STEP_USER, _) => failure(
                code::UNKNOWN_USER,
                format!(
                    "cannot become user {} for {name:?}: {}",
                    command.identity.name,
                    words(error)
                ),
            ),
            (STEP_DIRECTORY, _) => failure(
                code::BAD_WORKING_DIRECTORY,
                format!(
                    "cannot enter the working directory {directory} in the guest: {}",
                    words(error)
                ),
            ),
            (STEP_EXEC, Errno::NOENT | Errno::NOTDIR) if !self.exists(root) => not_found(name),
            (STEP_EXEC, Errno::NOENT) => failure(
                code::COMMAND_NOT_EXECUTABLE,
                format!(
                    "cannot execute {name:?} in the guest: the interpreter or loader that it names is not there"
                ),
            ),
            (STEP_EXEC, Errno::TOOBIG) => failure(
                code::BAD_REQUEST,
                format!(
                    "the arguments and environment of {name:?} are too long for the guest's kernel"
                ),
            ),
            (STEP_EXEC, _) => failure(
                code::COMMAND_NOT_EXECUTABLE,
                format!("cannot execute {name:?} in the guest: {}", words(error)),
            ),
            _ => failure(
                code::SYSTEM_ERROR,
                format!("cannot start {name:?}: {}", words(error)),
            ),
        }
    }

    fn exists(&self, root: &Root) -> bool {
        let path = join(
            &self.directory.to_string_lossy(),
            &self.path.to_string_lossy(),
        );
        root.stat(&path).is_ok()
    }
}

fn not_found(name: &str) -> Failure {
    failure(
        code::COMMAND_NOT_FOUND,
        format!("command {name:?} not found in the guest"),
    )
}

fn c_string(what: &str, text: &str) -> Result<CString, Failure> {
    CString::new(text)
        .map_err(|_| failure(code::BAD_REQUEST, format!("a NUL character in a {what}")))
}

/// A list for `execve`: pointers, and a null at the end.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|s| s.as_ptr())
        .chain([ptr::null()])
        .collect()
}

/// The root's descriptor where it is another directory than the agent's own root.
fn foreign_root(root: &Root) -> Result<Option<OwnedFd>, Failure> {
    let system = |error| failure(code::SYSTEM_ERROR, format!("no root: {}", words(error)));
    let own = rustix::fs::stat("/").map_err(system)?;
    let other = rustix::fs::fstat(root.fd()).map_err(system)?;
    if (own.st_dev, own.st_ino) == (other.st_dev, other.st_ino) {
        return Ok(None);
    }
    rustix::io::fcntl_dupfd_cloexec(root.fd(), 3)
        .map(Some)
        .map_err(system)
}

/// The command's environment: what was asked for, and what every program expects.
fn environment(command: &Command<'_>) -> Vec<(String, String)> {
    let identity = command.identity;
    let mut all: Vec<(String, String)> = command
        .environment
        .iter()
        .map(|variable| (variable.name.clone(), variable.value.clone()))
        .collect();
    for (name, value) in [
        ("PATH", DEFAULT_PATH),
        ("HOME", &identity.home),
        ("USER", &identity.name),
        ("LOGNAME", &identity.name),
        ("SHELL", &identity.shell),
    ] {
        if !all.iter().any(|(known, _)| known == name) {
            all.push((name.into(), value.into()));
        }
    }
    if command.terminal && !all.iter().any(|(known, _)| known == "TERM") {
        all.push(("TERM".into(), "linux".into()));
    }
    all
}

/// The path to execute. One with a slash is taken as it is: the kernel knows best.
fn find_command(
    root: &Root,
    argv: &[String],
    environment: &[(String, String)],
    directory: &str,
) -> Result<String, Failure> {
    let name = argv
        .first()
        .filter(|name| !name.is_empty())
        .ok_or_else(|| failure(code::BAD_REQUEST, "no command given"))?;
    if name.contains('/') {
        return Ok(name.clone());
    }
    let path = environment
        .iter()
        .rfind(|(known, _)| known == "PATH")
        .map_or("", |(_, value)| value);
    let mut refused = None;
    for entry in path.split(':') {
        let candidate = join(entry, name);
        match root.is_executable(&join(directory, &candidate)) {
            Ok(true) => return Ok(candidate),
            Ok(false) => refused = Some(candidate),
            Err(_) => {}
        }
    }
    Err(match refused {
        Some(path) => failure(
            code::COMMAND_NOT_EXECUTABLE,
            format!("cannot execute {name:?} in the guest: {path} is not an executable file"),
        ),
        None => not_found(name),
    })
}

fn join(directory: &str, name: &str) -> String {
    match (name.starts_with('/'), directory.trim_end_matches('/')) {
        (true, _) => name.into(),
        (false, _) if directory.is_empty() => format!("./{name}"),
        (false, directory) => format!("{directory}/{name}"),
    }
}

fn resource_limits(limits: &Limits) -> Vec<(c_int, u64)> {
    [
        (libc::RLIMIT_CPU, limits.cpu_seconds),
        (libc::RLIMIT_FSIZE, limits.file_size_bytes),
        (libc::RLIMIT_CORE, limits.core_bytes),
        (libc::RLIMIT_DATA, limits.data_bytes),
        (libc::RLIMIT_STACK, limits.stack_bytes),
        (libc::RLIMIT_NOFILE, limits.open_files),
        (libc::RLIMIT_NPROC, limits.processes),
        (libc::RLIMIT_AS, limits.address_space_bytes),
        (libc::RLIMIT_MEMLOCK, limits.locked_memory_bytes),
    ]
    .into_iter()
    .filter_map(|(resource, value)| Some((resource as c_int, value?)))
    .collect()
}

/// The agent is spared when memory runs out; what it starts is not.
fn forgive_out_of_memory() {
    // Not a reason to fail: without /proc there is nothing to undo.
    let _no_proc = std::fs::write("/proc/self/oom_score_adj", "0");
}

/// Undoes what the agent set for itself: signals blocked and ignored.
pub(crate) fn restore_signals() {
    // SAFETY: an empty set is written before it is read; SIG_DFL is a valid disposition.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}
