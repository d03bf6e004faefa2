//! The machine that the agent serves, as far as it owns it.

use std::fs;
use std::os::fd::AsRawFd;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, getpid};
use rustix::system::{sysinfo, uname};
use rustix::time::{ClockId, Timespec, clock_settime};
use xbee_protocol::{
    AgentInfo, Failure, MountRoot, Phase, RootInfo, StartInfo, StartMode, Stats, Uuid, code,
};

use crate::failure::{failure, system_failure};
use crate::root::Root;
use crate::{boot, mount, power};

/// An image's init: the first of these that can be executed.
const INITS: [&str; 4] = [
    "/sbin/init",
    "/usr/sbin/init",
    "/lib/systemd/systemd",
    "/usr/lib/systemd/systemd",
];
/// An init that is not linked to its usual place, if this file is there.
const BUSYBOX: (&str, &str) = ("/bin/busybox", "/etc/inittab");
const MAX_TEXT_BYTES: u64 = 64 * 1024;

/// What the agent may do with the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ownership {
    /// Everything: it is PID 1.
    FirstProcess,
    /// Clock, random numbers, switching off; the rest is the init's.
    BesideInit,
    /// Nothing: it runs on somebody's machine, for a test.
    Nothing,
}

/// The machine.
#[derive(Debug)]
pub(crate) struct Machine {
    ownership: Ownership,
    root: Root,
    mounted: Option<RootInfo>,
    started: Option<StartInfo>,
}

impl Machine {
    pub(crate) fn new(ownership: Ownership, root: &str) -> Result<Machine, String> {
        let root = Root::open_at(root).map_err(|error| {
            format!(
                "cannot open the root {root}: {}",
                crate::failure::words(error)
            )
        })?;
        // An image that boots by itself has started before its agent did.
        let started = (ownership == Ownership::BesideInit).then_some(StartInfo { init: None });
        Ok(Machine {
            ownership,
            root,
            mounted: None,
            started,
        })
    }

    pub(crate) fn root(&self) -> &Root {
        &self.root
    }

    pub(crate) fn owns_machine(&self) -> bool {
        self.ownership != Ownership::Nothing
    }

    pub(crate) fn is_first_process(&self) -> bool {
        self.ownership == Ownership::FirstProcess
    }

    /// Everything but the tasks.
    pub(crate) fn info(&self) -> AgentInfo {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        AgentInfo {
            version: env!("CARGO_PKG_VERSION").into(),
            kernel: uname().release().to_string_lossy().into_owned(),
            boot_id: boot_id.trim().parse().unwrap_or(Uuid::nil()),
            memory_kib: memory_kib(),
            phase: match (&self.mounted, &self.started) {
                (_, Some(_)) => Phase::Started,
                (Some(_), None) => Phase::Mounted,
                (None, None) => Phase::Initramfs,
            },
            conversations: Vec::new(),
        }
    }

    pub(crate) fn mount_root(&mut self, request: &MountRoot) -> Result<RootInfo, Failure> {
        if let Some(info) = &self.mounted {
            return Ok(info.clone());
        }
        self.must_be_first_process("mount a root")?;
        if self.started.is_some() {
            return Err(failure(
                code::WRONG_STATE,
                "the task's root is set already: mount before start",
            ));
        }
        let mounted = mount::root(request)?;
        self.root = Root::open_at("/").map_err(|error| system_failure("no root", error))?;
        let info = RootInfo {
            device: mounted.device,
            fs_type: mounted.fs_type,
            init: self.find_init().map(|(path, _)| path.to_owned()),
            os_id: self.os_id(),
        };
        self.mounted = Some(info.clone());
        Ok(info)
    }

    /// The init, and the name it is to be called by.
    fn find_init(&self) -> Option<(&'static str, &'static str)> {
        let executable = |path: &str| self.root.is_executable(path).unwrap_or(false);
        let init = INITS
            .into_iter()
            .find(|path| executable(path))
            .map(|path| (path, path));
        let (busybox, table) = BUSYBOX;
        init.or_else(|| {
            (executable(busybox) && self.root.stat(table).is_ok()).then_some((busybox, "init"))
        })
    }

    fn os_id(&self) -> Option<String> {
        ["/etc/os-release", "/usr/lib/os-release"]
            .into_iter()
            .find_map(|path| {
                let text = self.root.read_text(path, MAX_TEXT_BYTES).ok()?;
                let id = text.lines().find_map(|line| line.strip_prefix("ID="))?;
                Some(id.trim_matches(['"', '\'']).to_owned())
            })
    }

    /// Hands the machine over, or keeps it. `busy` says that something runs already.
    pub(crate) fn start(&mut self, mode: StartMode, busy: bool) -> Result<StartInfo, Failure> {
        if let Some(info) = &self.started {
            return Ok(info.clone());
        }
        // In the initial RAM file system the init is the agent itself.
        let init = self.mounted.as_ref().and_then(|_| self.find_init());
        let init = match mode {
            StartMode::Agent => None,
            StartMode::Auto => init,
            StartMode::Init => Some(init.ok_or_else(|| {
                failure(
                    code::NO_INIT,
                    format!("no init in the image; looked for {}", INITS.join(", ")),
                )
            })?),
        };
        let info = StartInfo {
            init: init.map(|(path, _)| path.to_owned()),
        };
        if let Some((path, name)) = init {
            self.must_be_first_process("start an init")?;
            if busy {
                return Err(failure(
                    code::WRONG_STATE,
                    "commands still run: end them before the init starts",
                ));
            }
            power::hand_over(path, name)
                .map_err(|error| system_failure("cannot start the init", error))?;
            // From here on this is the child beside the init.
            boot::adopt_orphans();
            self.ownership = Ownership::BesideInit;
        }
        self.started = Some(info.clone());
        Ok(info)
    }

    fn must_be_first_process(&self, what: &str) -> Result<(), Failure> {
        match self.is_first_process() {
            true => Ok(()),
            false => Err(failure(
                code::NOT_PERMITTED,
                format!(
                    "cannot {what}: the agent is process {}, not the first one",
                    number(getpid())
                ),
            )),
        }
    }

    fn must_own(&self, what: &str) -> Result<(), Failure> {
        match self.owns_machine() {
            true => Ok(()),
            false => Err(failure(
                code::NOT_PERMITTED,
                format!("cannot {what}: the agent does not own this machine"),
            )),
        }
    }

    pub(crate) fn stats(&self) -> Result<Stats, Failure> {
        let info = sysinfo();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let available = meminfo
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:"))
            .and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        let status = fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let pages: u64 = status
            .split(' ')
            .nth(1)
            .and_then(|pages| pages.parse().ok())
            .unwrap_or(0);
        let uptime = rustix::time::clock_gettime(ClockId::Boottime);
        Ok(Stats {
            memory_total_kib: memory_kib(),
            memory_available_kib: available
                .ok_or_else(|| failure(code::SYSTEM_ERROR, "no /proc/meminfo in the guest"))?,
            // Fixed point with 16 bits after the point.
            load_milli: info.loads[0] as u64 * 1000 / 65536,
            agent_resident_kib: pages * (rustix::param::page_size() as u64 / 1024),
            uptime_ms: uptime.tv_sec as u64 * 1000 + uptime.tv_nsec as u64 / 1_000_000,
        })
    }

    pub(crate) fn set_time(&self, seconds: u64, nanoseconds: u32) -> Result<(), Failure> {
        self.must_own("set the clock")?;
        let tv_sec = i64::try_from(seconds)
            .map_err(|_| failure(code::BAD_REQUEST, "a time beyond all clocks"))?;
        let time = Timespec {
            tv_sec,
            tv_nsec: nanoseconds.into(),
        };
        clock_settime(ClockId::Realtime, time)
            .map_err(|error| system_failure("cannot set the clock", error))
    }

    pub(crate) fn reseed(&self, seed: &[u8]) -> Result<(), Failure> {
        self.must_own("reseed the random numbers")?;
        if !(32..=512).contains(&seed.len()) {
            return Err(failure(code::BAD_REQUEST, "a seed has 32 to 512 bytes"));
        }
        add_entropy(seed).map_err(|error| {
            failure(
                code::SYSTEM_ERROR,
                format!("cannot reseed the random numbers: {error}"),
            )
        })
    }
}

fn number(pid: Pid) -> i32 {
    pid.as_raw_nonzero().get()
}

fn memory_kib() -> u64 {
    let info = sysinfo();
    info.totalram as u64 * u64::from(info.mem_unit) / 1024
}

/// `random(4)`: credits the seed, and makes the generator use it at once.
fn add_entropy(seed: &[u8]) -> std::io::Result<()> {
    /// `RNDADDENTROPY`, `_IOW('R', 3, int[2])`.
    const ADD: u64 = 0x4008_5203;
    /// `RNDRESEEDCRNG`, `_IO('R', 7)`.
    const RESEED: u64 = 0x5207;
    let random = rustix::fs::open(
        "/dev/urandom",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    // struct rand_pool_info: bits of entropy, bytes, the bytes.
    let mut pool = Vec::with_capacity(8 + seed.len());
    pool.extend_from_slice(&(seed.len() as i32 * 8).to_ne_bytes());
    pool.extend_from_slice(&(seed.len() as i32).to_ne_bytes());
    pool.extend_from_slice(seed);
    // SAFETY: the buffer has the layout of rand_pool_info and as many bytes as it says.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), ADD as _, pool.as_ptr()) };
    // SAFETY: the request takes no argument.
    let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RESEED as _, 0) };
    match (added, reseeded) {
        (-1, _) | (_, -1) => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}
