//! Domains: virtual machines and what drives them.
//!
//! [`Hypervisor`] is the border. Nothing outside this crate knows which back end is in use.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::broadcast;
use uuid::Uuid;

/// Identifies a domain on its host; also its UUID towards the hypervisor.
pub type DomainId = Uuid;

/// A reliable byte stream to the agent in a domain.
pub trait AgentStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> AgentStream for T {}

/// Format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// Plain sectors.
    Raw,
    /// QEMU copy-on-write, version 2 or 3.
    Qcow2,
}

/// A disk of a domain. The image is never written: the domain writes to an overlay in its run
/// directory, which goes with the domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The base image.
    pub image: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// The guest sees a read-only device and no overlay is made.
    pub read_only: bool,
}

/// All that is needed to make a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainSpec {
    /// Identity, chosen by the caller and durable before `create` is called.
    pub id: DomainId,
    /// Human-readable name, unique on the host.
    pub name: String,
    /// Virtual CPUs, at least 1.
    pub vcpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Kernel: ELF vmlinux with a PVH note, or bzImage.
    pub kernel: PathBuf,
    /// Initial RAM file system, a newc cpio archive (any compression the kernel knows).
    pub initramfs: Option<PathBuf>,
    /// Kernel arguments beyond those the back end needs itself.
    pub kernel_args: Vec<String>,
    /// Disks in the order the guest sees them.
    pub disks: Vec<Disk>,
    /// Context identifier on the host's vsock switch; at least 3, never used twice at a time.
    pub cid: u32,
    /// Content of `/xbee/boot` in the guest's initial RAM file system (mode 0600), appended to
    /// `initramfs` as a further cpio archive. Carries the per-boot secret: never logged.
    pub boot_config: Vec<u8>,
    /// The domain's own directory: sockets, overlays, console log. Made by `create`, removed by `destroy`.
    pub run_dir: PathBuf,
}

/// What a domain does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum DomainState {
    /// Made, not started.
    Created,
    /// Executing.
    Running,
    /// Halted, memory kept.
    Paused,
    /// Ended; the run directory is still there.
    Stopped {
        /// Why it ended.
        reason: StopReason,
    },
}

/// Why a domain ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum StopReason {
    /// The guest switched itself off.
    GuestShutdown,
    /// The guest asked for a reset (domains are not restarted).
    GuestReset,
    /// The guest's kernel panicked.
    GuestPanic,
    /// `destroy` or a forced `shutdown`.
    Destroyed,
    /// The hypervisor's process ended by itself.
    Failed {
        /// What is known of the cause, for a user's eyes.
        detail: String,
    },
}

/// A change of a domain's state, seen within a second of its happening.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainEvent {
    /// Which domain.
    pub id: DomainId,
    /// What it is now.
    pub state: DomainState,
}

/// A domain as `list` reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainInfo {
    /// Identity.
    pub id: DomainId,
    /// Name.
    pub name: String,
    /// State.
    pub state: DomainState,
}

/// Resources a domain has used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct DomainStats {
    /// CPU time in milliseconds, all virtual CPUs and the hypervisor's own.
    pub cpu_ms: u64,
    /// Resident memory in bytes.
    pub memory_bytes: u64,
}

/// What a back end found on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCapabilities {
    /// `sim`, `qemu` or `xen`.
    pub backend: String,
    /// Version of the hypervisor, as it names itself.
    pub version: String,
    /// What executes guests: `kvm`, `tcg`, `simulated`...
    pub accelerator: String,
    /// Logical CPUs of the host.
    pub cpus: u32,
    /// Memory for domains, in bytes.
    pub memory_bytes: u64,
}

/// How a `shutdown` ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownOutcome {
    /// The guest switched itself off in time.
    Graceful,
    /// The time limit passed and the domain was destroyed by force.
    Forced,
}

/// A back end. One contract suite (`tests/contract.rs`) runs against every one.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// What this host offers; fails with the remedy where the back end cannot work here.
    async fn probe(&self) -> Result<HostCapabilities, Error>;
    /// Makes a domain: run directory, overlays, switch port. Idempotent by `spec.id` and undone by `destroy`.
    async fn create(&self, spec: &DomainSpec) -> Result<(), Error>;
    /// Starts a created domain. Returns once it executes, not once it has booted.
    async fn start(&self, id: DomainId) -> Result<(), Error>;
    /// Waits for the agent of a running domain to connect (again); cancel-safe. Fails with
    /// [`Error::Gone`] when the domain ends meanwhile.
    async fn channel(&self, id: DomainId) -> Result<Box<dyn AgentStream>, Error>;
    /// Path of the console log, which grows while the domain runs.
    async fn console(&self, id: DomainId) -> Result<PathBuf, Error>;
    /// Halts a running domain, keeping its memory.
    async fn pause(&self, id: DomainId) -> Result<(), Error>;
    /// Lets a paused domain go on.
    async fn resume(&self, id: DomainId) -> Result<(), Error>;
    /// Asks the guest to switch off (ACPI or the hypervisor's own way), waits up to `grace`, then forces it.
    async fn shutdown(&self, id: DomainId, grace: Duration) -> Result<ShutdownOutcome, Error>;
    /// Ends the domain at once in whatever state and removes all traces. Idempotent: unknown ids are fine.
    async fn destroy(&self, id: DomainId) -> Result<(), Error>;
    /// Domains there are, those started before a restart of this process included (re-adopted).
    async fn list(&self) -> Result<Vec<DomainInfo>, Error>;
    /// Resources used.
    async fn stats(&self, id: DomainId) -> Result<DomainStats, Error>;
    /// State changes from now on.
    fn events(&self) -> broadcast::Receiver<DomainEvent>;
}

/// What goes wrong with domains.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such domain.
    #[error("no domain {0} on this host")]
    NotFound(DomainId),
    /// The domain ended.
    #[error("domain {id} ended: {reason:?}")]
    Gone {
        /// Which.
        id: DomainId,
        /// Why.
        reason: StopReason,
    },
}
