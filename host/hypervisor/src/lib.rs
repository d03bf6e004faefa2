//! Domains: virtual machines and what drives them.
//!
//! [`Hypervisor`] is the border. Nothing outside this crate knows which back end is in use:
//! [`sim`] simulates domains and their agents, [`qemu`] runs one QEMU process a domain, and `xen`
//! (with the feature of that name) drives Xen through libvirt.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod bridge;
mod domain;
mod error;
pub mod image;
mod kept;
mod lifecycle;
mod log;
mod overlay;
mod pipe_log;
pub mod qemu;
mod readable;
mod rundir;
mod save_file;
pub mod sim;
mod spec;
mod work;
#[cfg(feature = "xen")]
pub mod xen;

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::broadcast;
use xbee_protocol::Transport;

pub use domain::{
    AgentStream, CID_MIN, Description, DescriptionForm, Disk, DiskFormat, DomainEvent, DomainId,
    DomainInfo, DomainSpec, DomainState, DomainStats, Hardware, HostCapabilities, Interface,
    MEMORY_MIN_BYTES, ShutdownOutcome, StopReason, VCPUS_MAX,
};
pub use error::Error;

/// A back end. One contract suite (`tests/contract.rs`) runs against every one.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// How the agent of a domain of this back end reaches the host: for the boot configuration.
    fn transport(&self) -> Transport;
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
    /// Writes memory and state of a running or paused domain to `file` (an absolute path) and ends
    /// it as [`StopReason::Saved`]; its disks stay in the run directory. What was in `file` is replaced
    /// when all is written, and the newest save is the only valid one. A save that fails, for want of
    /// space for example, is [`Error::NotSaved`]: the domain goes on.
    async fn save(&self, id: DomainId, file: &Path) -> Result<(), Error>;
    /// Brings a saved domain back from the file it was saved to: the guest goes on where it was, halted
    /// if it was, and its agent connects again. The file is gone then: with disks that are written to, it
    /// is worth nothing any more. A domain that has been restored already is fine.
    async fn restore(&self, id: DomainId, file: &Path) -> Result<(), Error>;
    /// Gives a running or paused domain a further disk and returns its number. As at creation, the image
    /// is never written.
    async fn attach_disk(&self, id: DomainId, disk: &Disk) -> Result<usize, Error>;
    /// Takes a disk away, with all that was written to it. One that is not there is fine; one that the
    /// guest does not let go stays.
    async fn detach_disk(&self, id: DomainId, index: usize) -> Result<(), Error>;
    /// Gives a running or paused domain a further network interface. One that it has already is fine.
    async fn attach_interface(&self, id: DomainId, interface: Interface) -> Result<(), Error>;
    /// Takes an interface away. One that is not there is fine.
    async fn detach_interface(&self, id: DomainId, mac: [u8; 6]) -> Result<(), Error>;
    /// Has the guest of a running or paused domain use so much memory, up to the specification's
    /// `memory_max_bytes`. Returns when it has been asked to: it gives back what it can.
    async fn set_memory(&self, id: DomainId, bytes: u64) -> Result<(), Error>;
    /// Has the guest of a running or paused domain use so many virtual CPUs, up to the specification's
    /// `vcpus_max`. Returns when it has been asked to.
    async fn set_vcpus(&self, id: DomainId, vcpus: u32) -> Result<(), Error>;
    /// Asks the guest to switch off (ACPI or the hypervisor's own way), waits up to `grace`, then forces it.
    async fn shutdown(&self, id: DomainId, grace: Duration) -> Result<ShutdownOutcome, Error>;
    /// Ends the domain at once in whatever state and removes all traces. Idempotent: unknown ids are fine.
    async fn destroy(&self, id: DomainId) -> Result<(), Error>;
    /// Domains there are, those started before a restart of this process included (re-adopted).
    async fn list(&self) -> Result<Vec<DomainInfo>, Error>;
    /// Resources used.
    async fn stats(&self, id: DomainId) -> Result<DomainStats, Error>;
    /// A domain in the words of its hypervisor's own tools, without the secret of its boot. The files are
    /// those of its run directory; of a domain that was not created, those it would be made from.
    fn describe(&self, _spec: &DomainSpec, _form: DescriptionForm) -> Result<Description, Error> {
        Err(Error::NotDescribed)
    }
    /// State changes from now on.
    fn events(&self) -> broadcast::Receiver<DomainEvent>;
}
