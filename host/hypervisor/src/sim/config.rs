//! What a simulated host is like, and what goes wrong on it.

use std::ops::RangeInclusive;
use std::path::PathBuf;

/// A simulated host. The same seed and the same domain identities give the same faults.
#[derive(Debug, Clone)]
pub struct SimConfig {
    /// Where all chance comes from.
    pub seed: u64,
    /// Holds the domains' run directories, which in turn hold their console logs.
    pub domains_dir: PathBuf,
    /// Logical CPUs of the host.
    pub cpus: u32,
    /// Memory for domains, in bytes.
    pub memory_bytes: u64,
    /// Kernels and disk images must be there and be what they are said to be.
    pub check_images: bool,
    /// Time from the start of a domain to its agent's connection, in milliseconds.
    pub boot_ms: RangeInclusive<u64>,
    /// Time a domain needs to switch off, in milliseconds.
    pub shutdown_ms: RangeInclusive<u64>,
    /// The init that every disk image has, if any.
    pub init: Option<String>,
    /// Probability that a `create` fails.
    pub refused_create: f64,
    /// Probability that a `start` fails.
    pub refused_start: f64,
    /// Probability that a domain's agent never connects.
    pub lost_agent: f64,
    /// Probability that a domain's hypervisor crashes, and when, in milliseconds after the start.
    pub crash: f64,
    /// See `crash`.
    pub crash_ms: RangeInclusive<u64>,
    /// Probability that a guest prints without end.
    pub console_flood: f64,
    /// Most bytes kept of a domain's console.
    pub console_max_bytes: u64,
}

impl SimConfig {
    /// A host of 64 CPUs and 1 TiB where all goes well.
    #[must_use]
    pub fn new(domains_dir: PathBuf) -> Self {
        Self {
            seed: 0,
            domains_dir,
            cpus: 64,
            memory_bytes: 1 << 40,
            check_images: false,
            boot_ms: 5..=20,
            shutdown_ms: 1..=5,
            init: None,
            refused_create: 0.0,
            refused_start: 0.0,
            lost_agent: 0.0,
            crash: 0.0,
            crash_ms: 0..=1_000,
            console_flood: 0.0,
            console_max_bytes: 256 << 10,
        }
    }
}

/// Something that happens to a simulated domain, on demand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SimEvent {
    /// The guest switches itself off.
    PowerOff,
    /// The guest resets.
    Reset,
    /// The guest's kernel panics.
    Panic,
    /// The hypervisor's process ends.
    Crash {
        /// What it is said to have printed.
        detail: String,
    },
    /// The guest prints without end.
    FloodConsole,
    /// The guest prints a line now and then.
    Count,
    /// The guest is deaf to the power button from now on.
    IgnorePowerButton,
    /// The agent's connection breaks; it dials again.
    DropConnection,
    /// The agent says nothing more, but stays connected.
    SilenceAgent,
}
