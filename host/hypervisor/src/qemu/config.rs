//! How the QEMU back end is set up.

use std::path::{Path, PathBuf};
use std::time::Duration;

use xbee_gateway::rules::Outbound;

use crate::error::Error;

/// What executes guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Accelerator {
    /// KVM where a probe guest ran with it, otherwise TCG.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// QEMU's own translation to host code: works everywhere, about ten times slower.
    Tcg,
}

/// A bridge that guests' interfaces are on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// Its name.
    pub name: String,
    /// Domains with an interface are started only where the rules of `xen-configs/dom0/xenbee.nft`
    /// are loaded, and these are told of each. Otherwise something else must keep guests apart.
    pub firewall: bool,
}

/// Where programs of the host's users reach their guests by vsock, and are reached (see `xbee_vswitch::programs`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestsSocket {
    /// A unix socket in a directory that nobody but root or this user can write; the directory is made where it is missing.
    pub path: PathBuf,
    /// Owners' numbers from here on are no user ids of this host.
    pub users_end: u32,
}

/// Settings of the QEMU back end.
#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// Holds the run directories, each named by its domain's identity. Made on
    /// demand. What is found here at start is adopted, and what is incomplete is removed. The vsock
    /// switch's control socket and log are here too.
    pub domains_dir: PathBuf,
    /// The QEMU program; `None`: `qemu-system-x86_64` in `PATH`.
    pub program: Option<PathBuf>,
    /// The vsock switch; `None`: `vswitch` in the directory of the running program.
    pub vswitch_program: Option<PathBuf>,
    /// What puts QEMU into its cage; `None`: `cage` in the directory of the running program.
    pub cage_program: Option<PathBuf>,
    /// What a guest's way out is served by; `None`: `gateway` in the directory of the running program.
    pub gateway_program: Option<PathBuf>,
    /// What guests with a network may reach beyond it. It holds for interfaces from their start on.
    pub outbound: Outbound,
    /// A bridge of the host that guests' interfaces are on, instead of the switch's network. It needs the right to make
    /// network devices.
    pub bridge: Option<Bridge>,
    /// A socket for host programs; `None`: they reach no guests.
    pub guests_socket: Option<GuestsSocket>,
    /// What executes guests.
    pub accelerator: Accelerator,
    /// With root's rights, a domain's process runs as user and group `uid_base + cid`. The range
    /// above must belong to nobody else.
    pub uid_base: u32,
    /// Most bytes kept of a domain's console.
    pub console_max_bytes: u64,
    /// Kernel that is booted to find out whether KVM works; `None`: KVM is not used.
    pub kvm_probe_kernel: Option<PathBuf>,
    /// How long a probe guest may take to boot.
    pub kvm_probe_limit: Duration,
    /// How long a QEMU process may take until it answers on its control socket.
    pub start_limit: Duration,
    /// How long it may take to answer a command, or to go when killed.
    pub command_limit: Duration,
}

impl QemuConfig {
    /// The defaults.
    #[must_use]
    pub fn new(domains_dir: PathBuf) -> Self {
        Self {
            domains_dir,
            program: None,
            vswitch_program: None,
            cage_program: None,
            gateway_program: None,
            outbound: Outbound::Off,
            bridge: None,
            guests_socket: None,
            accelerator: Accelerator::Auto,
            uid_base: 200_000,
            console_max_bytes: 4 << 20,
            kvm_probe_kernel: None,
            kvm_probe_limit: Duration::from_secs(5),
            start_limit: Duration::from_secs(30),
            command_limit: Duration::from_secs(10),
        }
    }
}

/// A program of ours: the one that is configured, else that of this name beside the running program.
pub(crate) fn companion(configured: Option<&Path>, name: &str) -> Result<PathBuf, Error> {
    match configured {
        Some(program) => Ok(program.to_owned()),
        None => Ok(std::env::current_exe()
            .map_err(Error::io("find the directory of", "/proc/self/exe"))?
            .with_file_name(name)),
    }
}
