//! From the first instruction to the loop, and what comes after it.

use std::ffi::c_int;
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use rustix::process::getpid;
use xbee_protocol::{BOOT_CONFIG_PATH, BootConfig, Transport};

use crate::agent::Agent;
use crate::arguments::Arguments;
use crate::console;
use crate::machine::{Machine, Ownership};
use crate::task::Task;
use crate::{boot_disk, modules, mount, network, power, reap};

/// Where a service finds its configuration; if it is not there, the service looks at the disks.
const SERVICE_CONFIG_PATH: &str = "/etc/xbee/boot";
/// The configuration's variable.
const CONFIG_VARIABLE: &str = "XBEE_BOOT_CONFIG";

/// Runs the agent as whatever it was started.
pub(crate) fn main(arguments: &[String]) -> c_int {
    if getpid().is_init() {
        // PID 1 must not end: whatever goes wrong, the machine is switched off.
        if let Err(error) = first_process() {
            console::log(&error);
        }
        power::off();
    }
    let result = match arguments {
        [only] if only == power::POWER_OFF_ARGUMENT => power::ask_first_process(),
        _ => beside(arguments),
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            console::log(&error);
            1
        }
    }
}

fn first_process() -> Result<(), String> {
    mount::pseudo_file_systems();
    let boot = read_config(BOOT_CONFIG_PATH)?;
    // Nobody else is to learn the secret.
    fs::remove_file(BOOT_CONFIG_PATH)
        .map_err(|error| format!("cannot remove {BOOT_CONFIG_PATH}: {error}"))?;
    mount::name_host(&boot.hostname);
    network::loopback_up();
    modules::load();
    let mut agent = Agent::new(
        Machine::new(Ownership::FirstProcess, "/")?,
        boot,
        prepare()?,
    );
    power::be_asked_by_the_kernel();
    let grace = agent.run();
    if agent.machine.is_first_process() {
        power::ask_everyone_to_end();
        agent.run_until(Instant::now() + grace, || !reap::has_children());
        power::end_everyone();
        return Ok(());
    }
    power::beside_init(&mut agent, grace)
}

fn beside(arguments: &[String]) -> Result<(), String> {
    let arguments = Arguments::parse(arguments)?;
    let said = arguments
        .boot_config
        .or_else(|| std::env::var(CONFIG_VARIABLE).ok());
    let mut boot = match said {
        Some(path) => read_config(&path)?,
        None if !arguments.service || Path::new(SERVICE_CONFIG_PATH).exists() => {
            read_config(SERVICE_CONFIG_PATH)?
        }
        None => decode_config("the disk with it", &boot_disk::read()?)?,
    };
    if let Some(path) = arguments.connect {
        boot.transport = Transport::Unix { path };
    }
    let ownership = if arguments.service {
        Ownership::BesideInit
    } else {
        Ownership::Nothing
    };
    let machine = Machine::new(ownership, arguments.root.as_deref().unwrap_or("/"))?;
    let mut agent = Agent::new(machine, boot, prepare()?);
    let grace = agent.run();
    if ownership == Ownership::BesideInit {
        power::beside_init(&mut agent, grace);
    }
    agent.tasks.iter().for_each(Task::kill);
    Ok(())
}

fn read_config(path: &str) -> Result<BootConfig, String> {
    let bytes = fs::read(path)
        .map_err(|error| format!("cannot read the boot configuration {path}: {error}"))?;
    decode_config(path, &bytes)
}

fn decode_config(place: &str, bytes: &[u8]) -> Result<BootConfig, String> {
    BootConfig::decode(bytes).map_err(|error| {
        format!("{place} is not a boot configuration of this agent's generation: {error}")
    })
}

/// Makes this process fit for being the agent; the result tells of children that have ended, and
/// of the wish to be off.
pub(crate) fn prepare() -> Result<OwnedFd, String> {
    adopt_orphans();
    // Without it the agent is a candidate like every other.
    let _no_proc = fs::write("/proc/self/oom_score_adj", "-1000");
    // SAFETY: the set is written before it is read; SIG_IGN is a valid disposition; the descriptor
    // that signalfd returns belongs to nobody else.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        libc::sigaddset(&mut set, power::POWER_OFF_SIGNAL);
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        match libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            -1 => Err(format!(
                "cannot watch for children: {}",
                std::io::Error::last_os_error()
            )),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// What tasks leave behind comes to the agent, which can end it.
pub(crate) fn adopt_orphans() {
    // SAFETY: no pointers are involved.
    let result = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    if result == -1 {
        console::log(&format!(
            "cannot adopt orphans: {}",
            std::io::Error::last_os_error()
        ));
    }
}
