//! Handing the machine to an init, and switching it off.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount_remount};

use crate::agent::Agent;
use crate::console;
use crate::failure::words;
use crate::process::run_quietly;
use crate::reap;
use crate::spawn::restore_signals;

/// systemd's "start poweroff.target" (systemd(1)): SIGRTMIN+4 as the GNU C library counts, which
/// is not how every C library counts.
const SYSTEMD_POWER_OFF: i32 = 38;
/// There only while systemd is the init.
const SYSTEMD_MARK: &str = "/run/systemd/system";
/// What other inits bring for being asked; `busybox poweroff` is the last resort.
const POWER_OFF_COMMANDS: [&[&str]; 4] = [
    &["/sbin/poweroff"],
    &["/usr/sbin/poweroff"],
    &["/bin/poweroff"],
    &["/bin/busybox", "poweroff"],
];
/// Tells the agent, as the first process, to switch the machine off: what busybox' `poweroff` sends
/// to its init.
pub(crate) const POWER_OFF_SIGNAL: i32 = libc::SIGUSR2;
/// The argument that makes a further process of this program send that signal.
pub(crate) const POWER_OFF_ARGUMENT: &str = "--power-off";
/// What the kernel runs when the machine is to be switched off in order, as Xen's tool stack asks.
const POWER_OFF_SETTING: &str = "/proc/sys/kernel/poweroff_cmd";
const DEFAULT_POWER_OFF: &str = "/sbin/poweroff";
/// Time for what was killed to be reaped.
const KILL_LIMIT: Duration = Duration::from_secs(2);

/// Makes the kernel ask the agent to switch off: there need not be a program for it in the root.
pub(crate) fn be_asked_by_the_kernel() {
    set_power_off_command(&format!("/proc/1/exe {POWER_OFF_ARGUMENT}"));
}

fn set_power_off_command(command: &str) {
    if let Err(error) = fs::write(POWER_OFF_SETTING, command) {
        console::log(&format!("cannot write {POWER_OFF_SETTING}: {error}"));
    }
}

/// Asks the agent that is the first process.
///
/// # Errors
/// What kill(2) says.
pub(crate) fn ask_first_process() -> Result<(), String> {
    // SAFETY: no memory is involved.
    match unsafe { libc::kill(1, POWER_OFF_SIGNAL) } {
        -1 => Err(format!(
            "cannot signal the first process: {}",
            std::io::Error::last_os_error()
        )),
        _ => Ok(()),
    }
}

/// Becomes the init in this process, PID 1, and lets the agent go on in a child. Returns in the child.
///
/// # Errors
/// Nothing has changed, then.
pub(crate) fn hand_over(path: &str, name: &str) -> Result<(), Errno> {
    let last_error = || Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO);
    // SAFETY: the agent has one thread. The parent touches nothing but its own memory until it execs
    // or switches off; descriptors close on exec.
    match unsafe { libc::fork() } {
        -1 => Err(last_error()),
        0 => {
            // A session of its own: the init's is not the agent's. A child is no leader: this works.
            rustix::process::setsid().map(drop)
        }
        _ => {
            match become_init(path, name) {
                Ok(never) => match never {},
                Err(error) => console::log(&format!("cannot execute {path}: {}", words(error))),
            }
            off()
        }
    }
}

fn become_init(path: &str, name: &str) -> Result<Infallible, Errno> {
    // Without /proc there is nothing to undo.
    let _no_proc = fs::write("/proc/self/oom_score_adj", "0");
    set_power_off_command(DEFAULT_POWER_OFF);
    restore_signals();
    let path = CString::new(path).map_err(|_| Errno::INVAL)?;
    let name = CString::new(name).map_err(|_| Errno::INVAL)?;
    let environment: Vec<CString> = [c"HOME=/", c"TERM=linux"]
        .map(|entry| entry.to_owned())
        .into();
    let argv = [name.as_ptr(), std::ptr::null()];
    let environment: Vec<_> = environment
        .iter()
        .map(|entry| entry.as_ptr())
        .chain([std::ptr::null()])
        .collect();
    // SAFETY: all are NUL-terminated strings and null-terminated lists that outlive the call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), environment.as_ptr()) };
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// Tells every process to end.
pub(crate) fn ask_everyone_to_end() {
    signal_everyone(libc::SIGTERM);
    signal_everyone(libc::SIGCONT);
}

/// Ends every process but this one.
pub(crate) fn end_everyone() {
    signal_everyone(libc::SIGKILL);
    let deadline = Instant::now() + KILL_LIMIT;
    while Instant::now() < deadline && reap::has_children() {
        while reap::next().is_some() {}
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn signal_everyone(signal: i32) {
    // SAFETY: no memory is involved. As PID 1 this is everyone but the caller. That there is nobody is no error.
    unsafe { libc::kill(-1, signal) };
}

/// Writes everything to the disks and switches the machine off.
pub(crate) fn off() -> ! {
    rustix::fs::sync();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for line in mounts.lines().rev() {
        let mut fields = line.split(' ');
        let (Some(source), Some(target)) = (fields.next(), fields.next()) else {
            continue;
        };
        if !source.starts_with("/dev/") {
            continue;
        }
        if let Err(error) = mount_remount(target, MountFlags::RDONLY, "") {
            console::log(&format!("{target} stays writable: {}", words(error)));
        }
    }
    rustix::fs::sync();
    loop {
        // SAFETY: no memory is involved.
        unsafe { libc::reboot(libc::RB_POWER_OFF) };
        console::log(&format!(
            "cannot switch off: {}",
            std::io::Error::last_os_error()
        ));
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Asks the init to switch off, and does it by force when the time is over.
pub(crate) fn beside_init(agent: &mut Agent, grace: Duration) -> ! {
    let deadline = Instant::now() + grace;
    match ask_init(agent) {
        Ok(()) => agent.run_until(deadline, || false),
        Err(message) => console::log(&message),
    }
    console::log("the init has not switched off: doing it by force");
    signal_everyone(libc::SIGTERM);
    off()
}

fn ask_init(agent: &Agent) -> Result<(), String> {
    if Path::new(SYSTEMD_MARK).exists() {
        // SAFETY: no memory is involved.
        return match unsafe { libc::kill(1, SYSTEMD_POWER_OFF) } {
            -1 => Err(format!(
                "cannot signal systemd: {}",
                std::io::Error::last_os_error()
            )),
            _ => Ok(()),
        };
    }
    for command in POWER_OFF_COMMANDS {
        let argv: Vec<String> = command.iter().map(|&word| word.to_owned()).collect();
        if run_quietly(agent.machine.root(), &argv).is_ok() {
            return Ok(());
        }
    }
    Err("no command in the guest asks its init to switch off".into())
}
