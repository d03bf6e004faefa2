//! What goes wrong with domains.

use std::io;
use std::path::PathBuf;

use crate::domain::{DomainId, DomainState, StopReason};

/// What goes wrong with domains.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such domain.
    #[error("no domain {0} on this host")]
    NotFound(DomainId),
    /// The domain ended.
    #[error("domain {id} ended: {reason}")]
    Gone {
        /// Which.
        id: DomainId,
        /// Why.
        reason: StopReason,
    },
    /// A different domain has this identity already.
    #[error("domain {id} exists already and differs: {detail}")]
    Exists {
        /// Which.
        id: DomainId,
        /// What differs.
        detail: String,
    },
    /// Xen shows a name for each domain, and another domain has this one's.
    #[error(
        "Xen has a domain named {name} already: try again with another identity, or end that one (xl destroy)"
    )]
    NameTaken {
        /// The name.
        name: String,
    },
    /// The domain's state does not allow the operation.
    #[error("cannot {operation} domain {id}: it is {state}")]
    WrongState {
        /// Which.
        id: DomainId,
        /// What was asked for.
        operation: &'static str,
        /// What it is instead.
        state: DomainState,
    },
    /// The specification cannot be met by any host.
    #[error("domain specification: {field}: {detail}")]
    InvalidSpec {
        /// The field at fault.
        field: &'static str,
        /// What is wrong, and what was expected.
        detail: String,
    },
    /// More memory than the host has.
    #[error(
        "the domain asks for {asked_mib} MiB of memory, this host has {available_mib} MiB: ask for less"
    )]
    TooMuchMemory {
        /// Asked for, in MiB.
        asked_mib: u64,
        /// The host's, in MiB.
        available_mib: u64,
    },
    /// More memory than is free now.
    #[error(
        "the domain needs {asked_mib} MiB of memory, {free_mib} MiB are free: wait until others end, or ask for less"
    )]
    NoMemoryNow {
        /// Needed, in MiB, with what the hypervisor takes itself.
        asked_mib: u64,
        /// Free, in MiB.
        free_mib: u64,
    },
    /// A file the domain needs cannot be opened.
    #[error("cannot open the {role} {path}", path = path.display())]
    ImageUnreadable {
        /// `kernel`, `initramfs` or `disk image`.
        role: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A disk image that is none.
    #[error("{path} is not a {expected}: it holds {found}", path = path.display())]
    NotAnImage {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
        /// What it is, and the remedy where there is one.
        found: String,
    },
    /// A kernel of a format that cannot be started.
    #[error(
        "{path} is no kernel that can be started (an ELF vmlinux with a PVH note, or a bzImage): it holds {found}",
        path = path.display()
    )]
    UnknownKernel {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: String,
    },
    /// The hypervisor is not installed.
    #[error("{program} not found: {remedy}")]
    HypervisorMissing {
        /// The program looked for.
        program: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The hypervisor is there and does not work.
    #[error("the hypervisor does not work here: {detail}")]
    HypervisorBroken {
        /// What it said.
        detail: String,
    },
    /// The hypervisor did not start the domain.
    #[error("domain {id} did not start: {detail}")]
    StartFailed {
        /// Which.
        id: DomainId,
        /// What the hypervisor said.
        detail: String,
    },
    /// The hypervisor refused an operation, or did not answer.
    #[error("domain {id}: the hypervisor did not {operation}")]
    Control {
        /// Which.
        id: DomainId,
        /// What was asked for.
        operation: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The rules that keep guests apart are not there, or cannot be changed.
    #[error("the firewall of the guests' bridge: {detail}: {remedy}")]
    Firewall {
        /// What is wrong.
        detail: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A guest's interface cannot be put on the bridge.
    #[error("{port} could not be put on the bridge {bridge}: {detail}: see xbe doctor")]
    Bridge {
        /// The interface, by the name that the host has for it.
        port: String,
        /// The bridge.
        bridge: String,
        /// What is wrong.
        detail: String,
    },
    /// The switch of guests' streams and networks did not do its part.
    #[error("domain {id} could not be {action} the switch vswitch")]
    Switch {
        /// Which.
        id: DomainId,
        /// `added to`, `removed from` and so on.
        action: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The socket by which host programs reach guests cannot be served.
    #[error("cannot serve the socket for guests {path} (`guests-socket`)", path = path.display())]
    GuestsSocket {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The back end cannot do this.
    #[error("cannot {operation} domain {id}: {reason}")]
    Unsupported {
        /// Which.
        id: DomainId,
        /// What was asked for.
        operation: &'static str,
        /// Why it cannot.
        reason: &'static str,
    },
    /// A file that the domain cannot be restored from.
    #[error("cannot restore domain {id} from {path}: {detail}", path = path.display())]
    NotItsSave {
        /// Which.
        id: DomainId,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: &'static str,
    },
    /// The domain could not be saved; it goes on.
    #[error("domain {id} was not saved and goes on")]
    NotSaved {
        /// Which.
        id: DomainId,
        /// Why.
        #[source]
        source: Box<Error>,
    },
    /// Another back end's domains have no description that a tool reads.
    #[error(
        "domains of this back end have no description: only those of xen have one (xbed --backend xen)"
    )]
    NotDescribed,
    /// The operating system refused something.
    #[error("cannot {action} {path}", path = path.display())]
    Io {
        /// What was tried, in words.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Stable identifier of the kind of error, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotFound(_) => "domain-not-found",
            Self::Gone { .. } => "domain-gone",
            Self::Exists { .. } => "domain-exists",
            Self::NameTaken { .. } => "name-taken",
            Self::WrongState { .. } => "domain-wrong-state",
            Self::InvalidSpec { .. } => "domain-invalid",
            Self::TooMuchMemory { .. } => "too-much-memory",
            Self::NoMemoryNow { .. } => "no-memory-now",
            Self::ImageUnreadable { .. } => "image-unreadable",
            Self::NotAnImage { .. } => "not-an-image",
            Self::UnknownKernel { .. } => "unknown-kernel",
            Self::HypervisorMissing { .. } => "hypervisor-missing",
            Self::HypervisorBroken { .. } => "hypervisor-broken",
            Self::StartFailed { .. } => "start-failed",
            Self::Control { .. } => "hypervisor-control",
            Self::Firewall { .. } => "firewall",
            Self::Bridge { .. } => "bridge",
            Self::Switch { .. } => "vsock-switch",
            Self::GuestsSocket { .. } => "guests-socket",
            Self::Unsupported { .. } => "unsupported",
            Self::NotItsSave { .. } => "not-its-save",
            Self::NotSaved { .. } => "not-saved",
            Self::NotDescribed => "domain-not-described",
            Self::Io { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                ) =>
            {
                "disk-full"
            }
            Self::Io { .. } => "host-io",
        }
    }

    /// For `map_err`: names what was tried on which path.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}
