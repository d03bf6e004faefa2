//! Processes that have ended.

use rustix::process::Pid;
use xbee_protocol::ExitStatus;

/// How a process ended, and what it used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) cpu_ms: u64,
    pub(crate) max_resident_kib: u64,
}

/// The next child that has ended, adopted ones included.
pub(crate) fn next() -> Option<(Pid, Ended)> {
    let mut status = 0;
    // SAFETY: all-zero bytes are a valid rusage, which has integers only.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to variables of this frame.
    let pid = unsafe { libc::wait4(-1, &mut status, libc::WNOHANG, &mut usage) };
    let pid = Pid::from_raw(pid).filter(|_| pid > 0)?;
    let milliseconds = |time: libc::timeval| time.tv_sec as u64 * 1000 + time.tv_usec as u64 / 1000;
    let status = if libc::WIFSIGNALED(status) {
        ExitStatus::Signal {
            signal: libc::WTERMSIG(status),
            core_dumped: libc::WCOREDUMP(status),
        }
    } else {
        ExitStatus::Code(libc::WEXITSTATUS(status) as u8)
    };
    let ended = Ended {
        status,
        cpu_ms: milliseconds(usage.ru_utime) + milliseconds(usage.ru_stime),
        max_resident_kib: usage.ru_maxrss as u64,
    };
    Some((pid, ended))
}

/// Whether there are children, ended ones included.
pub(crate) fn has_children() -> bool {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    !matches!(waitid(WaitId::All, options), Err(rustix::io::Errno::CHILD))
}
