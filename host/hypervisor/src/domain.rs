//! What a domain is: its specification, its states, what is known of it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv6Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use uuid::Uuid;

/// Identifies a domain on its host; also its UUID towards the hypervisor.
pub type DomainId = Uuid;

/// Lowest context identifier a domain can have: 0 to 2 are reserved (virtio 1.2, section 5.10.4).
pub const CID_MIN: u32 = 3;

/// Least memory a domain can have, in bytes: no current kernel boots with less.
pub const MEMORY_MIN_BYTES: u64 = 32 << 20;

/// Most virtual CPUs a domain can have: what an 8-bit APIC identifier can tell apart.
pub const VCPUS_MAX: u32 = 255;

/// A reliable byte stream to the agent in a domain.
pub trait AgentStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> AgentStream for T {}

/// Format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// Plain sectors.
    Raw,
    /// QEMU copy-on-write, version 2 or 3, without a backing file of its own.
    Qcow2,
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
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

/// A network interface of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Hardware address, never used twice at a time on one bridge.
    pub mac: [u8; 6],
    /// The address the guest takes.
    pub address: Ipv6Addr,
    /// Other domains of the same owner that say so too may be reached, and may reach it.
    #[serde(default)]
    pub peers: bool,
}

/// All that is needed to make a domain.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainSpec {
    /// Identity, chosen by the caller and durable before `create` is called.
    pub id: DomainId,
    /// Human-readable name, unique on the host.
    pub name: String,
    /// Whom the domain belongs to; domains of different owners cannot reach each other by vsock.
    pub owner: String,
    /// Virtual CPUs, 1 to [`VCPUS_MAX`].
    pub vcpus: u32,
    /// Most that it can be given while it runs; `None`: as many as it has.
    #[serde(default)]
    pub vcpus_max: Option<u32>,
    /// Memory in bytes, at least [`MEMORY_MIN_BYTES`]; rounded up to a MiB.
    pub memory_bytes: u64,
    /// Most that it can be given while it runs; `None`: as much as it has.
    #[serde(default)]
    pub memory_max_bytes: Option<u64>,
    /// Kernel: ELF vmlinux with a PVH note, or bzImage. `None`: the firmware boots the first disk, which
    /// has its own boot loader; there is neither `initramfs` nor are there `kernel_args` then.
    #[serde(default)]
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system, a newc cpio archive (any compression the kernel knows).
    pub initramfs: Option<PathBuf>,
    /// Kernel arguments beyond those the back end needs itself.
    pub kernel_args: Vec<String>,
    /// Disks in the order the guest sees them.
    pub disks: Vec<Disk>,
    /// Context identifier on the host's vsock switch; at least [`CID_MIN`], never used twice at a time.
    pub cid: u32,
    /// On the back end's bridge, for those that have one.
    pub interface: Option<Interface>,
    /// Content of `/xbee/boot` in the guest's initial RAM file system (mode 0600), appended to
    /// `initramfs` as a further cpio archive. Without a kernel, that archive is the content of one
    /// more disk, which is read-only and has no number here. Carries the per-boot secret: never
    /// logged, and not part of the serialised form.
    #[serde(skip)]
    pub boot_config: Vec<u8>,
    /// The domain's own directory: sockets, overlays, console log. Made by `create`, removed by
    /// `destroy`. A direct child of the directory the back end was configured with.
    pub run_dir: PathBuf,
}

impl DomainSpec {
    pub(crate) fn vcpus_limit(&self) -> u32 {
        self.vcpus_max.unwrap_or(self.vcpus)
    }

    pub(crate) fn memory_limit_bytes(&self) -> u64 {
        self.memory_max_bytes.unwrap_or(self.memory_bytes)
    }
}

/// What a domain has now; at first what its specification says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hardware {
    /// Virtual CPUs that its guest may use.
    pub vcpus: u32,
    /// Memory in bytes that its guest may use.
    pub memory_bytes: u64,
    /// Disks by their numbers; the guest sees number 0 as its first.
    pub disks: BTreeMap<usize, Disk>,
    /// Network interfaces.
    pub interfaces: Vec<Interface>,
}

impl Hardware {
    pub(crate) fn of(spec: &DomainSpec) -> Self {
        Self {
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
            disks: spec.disks.iter().cloned().enumerate().collect(),
            interfaces: spec.interface.into_iter().collect(),
        }
    }
}

impl fmt::Debug for DomainSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DomainSpec")
            .field("id", &self.id)
            .field("name", &self.name)
            .field("owner", &self.owner)
            .field("vcpus", &self.vcpus)
            .field("vcpus_max", &self.vcpus_max)
            .field("memory_bytes", &self.memory_bytes)
            .field("memory_max_bytes", &self.memory_max_bytes)
            .field("kernel", &self.kernel)
            .field("initramfs", &self.initramfs)
            .field("kernel_args", &self.kernel_args)
            .field("disks", &self.disks)
            .field("cid", &self.cid)
            .field("interface", &self.interface)
            .field(
                "boot_config",
                &format_args!("[{} bytes]", self.boot_config.len()),
            )
            .field("run_dir", &self.run_dir)
            .finish()
    }
}

/// Whose words a domain is described in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DescriptionForm {
    /// Configuration file of `xl` (xl.cfg(5)).
    Xl,
    /// XML of libvirt (<https://libvirt.org/formatdomain.html>).
    Libvirt,
}

/// A domain as its hypervisor's own tools take it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The text.
    pub text: String,
    /// Commands that make the files it names and that are not there, for a shell.
    pub prepare: Vec<String>,
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

impl DomainState {
    /// Whether no other state can follow: a saved domain can be restored.
    pub(crate) fn is_final(&self) -> bool {
        matches!(self, Self::Stopped { reason } if *reason != StopReason::Saved)
    }
}

impl fmt::Display for DomainState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Created => f.write_str("created"),
            Self::Running => f.write_str("running"),
            Self::Paused => f.write_str("paused"),
            Self::Stopped { reason } => write!(f, "stopped: {reason}"),
        }
    }
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
    /// `save`: `restore` brings it back.
    Saved,
    /// The hypervisor's process ended by itself.
    Failed {
        /// What is known of the cause, for a user's eyes.
        detail: String,
    },
}

impl StopReason {
    /// How a `shutdown` ended that ended so.
    pub(crate) fn shutdown_outcome(&self) -> ShutdownOutcome {
        match self {
            Self::GuestShutdown => ShutdownOutcome::Graceful,
            Self::Destroyed => ShutdownOutcome::Forced,
            _ => ShutdownOutcome::EndedOtherwise,
        }
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GuestShutdown => f.write_str("the guest switched itself off"),
            Self::GuestReset => f.write_str("the guest asked for a reset"),
            Self::GuestPanic => f.write_str("the guest's kernel panicked"),
            Self::Destroyed => f.write_str("it was ended by force"),
            Self::Saved => f.write_str("it was saved to a file"),
            Self::Failed { detail } => f.write_str(detail),
        }
    }
}

/// A change of a domain's state, seen within a second of its happening; a pause by another tool than
/// the host manager within a few.
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
    /// What it has.
    pub hardware: Hardware,
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
    /// Why this accelerator and no faster one, for a user's eyes; empty where there is none.
    pub accelerator_note: String,
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
    /// The domain ended in time, but not by switching itself off (a reset, a panic, a failure):
    /// its state says how.
    EndedOtherwise,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specifications_from_before_there_were_images_with_boot_loaders_are_read() {
        let old = r#"{"id":"7bf4280f-fe99-4e19-829e-6705512a33dd","name":"n","owner":"0","vcpus":1,
            "memory_bytes":201326592,"kernel":"/k","initramfs":"/i","kernel_args":["a"],"disks":[],
            "cid":5,"interface":null,"run_dir":"/r"}"#;
        let mut spec: DomainSpec = serde_json::from_str(old).unwrap();
        assert_eq!(spec.kernel.as_deref(), Some(std::path::Path::new("/k")));
        spec.kernel = None;
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<DomainSpec>(&text).unwrap(), spec);
    }
}
