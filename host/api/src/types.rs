//! The types on the wire.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Header that carries an [`ExecRequest`] as JSON on an exec upgrade.
pub const EXEC_HEADER: &str = "x-xbee-exec";
/// `Upgrade:` token of exec connections.
pub const UPGRADE_EXEC: &str = "xbee-exec/1";
/// `Upgrade:` token of forwarded TCP connections.
pub const UPGRADE_TCP: &str = "xbee-tcp/1";

/// What the URI of an entry of the cache begins with, in documents; its id, or the beginning of that, follows.
pub const CACHE_SCHEME: &str = "cache:";

/// A job to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubmitRequest {
    /// The JSDL document.
    pub jsdl: String,
    /// Accept what `xbe check --lenient` accepts.
    #[serde(default)]
    pub lenient: bool,
    /// Guest TCP ports to publish on the host's loopback.
    #[serde(default)]
    pub publish: Vec<PublishedPort>,
    /// Of tasks that wait, those with the higher number come first. More than 0 is the operator's to give.
    #[serde(default)]
    pub priority: i8,
    /// How often it is tried again after a failure that may pass and before anything was executed; the host's choice
    /// if it is not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retries: Option<u32>,
    /// `file:` URIs of the document mean files of the client, which need not be on this host: sources are among
    /// `uploads`, and what goes to targets is kept until the client has it ([`ResultFile`]).
    #[serde(default, skip_serializing_if = "is_false")]
    pub client_files: bool,
    /// Sources, word for word as in the document, and the [`Upload`]s that are taken instead of them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub uploads: BTreeMap<String, Uuid>,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// A file that was sent to the host, for a job to come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    /// Its id, which one request may use, within an hour of the last that its owner sent.
    pub id: Uuid,
    /// Its length in bytes.
    pub bytes: u64,
    /// SHA-256 of what arrived, in hexadecimal.
    pub sha256: String,
}

/// A result that is kept for the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResultFile {
    /// Its number, by which it is asked for.
    pub number: u32,
    /// Where it is to go, as in the document: a `file:` URI of the client's machine.
    pub uri: String,
    /// What is to happen to a file that is there.
    pub creation: CreationFlag,
    /// Its length in bytes.
    pub bytes: u64,
}

/// What happens to a file that is there (GFD.136, CreationFlag).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CreationFlag {
    /// It is replaced.
    Overwrite,
    /// It is added to.
    Append,
    /// It stays.
    DontOverwrite,
}

/// Capacity to hold for a task to come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReserveRequest {
    /// A name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// From when, milliseconds since the Unix epoch; now, if it is not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_ms: Option<u64>,
    /// For how long, seconds.
    pub duration_s: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Disk of the host in bytes.
    #[serde(default)]
    pub disk_bytes: u64,
}

/// A reservation that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reserved {
    /// Who has it may use the reservation, nobody else; it is not told again.
    pub ticket: String,
    /// The task, which is public.
    pub task: TaskStatus,
}

/// What a reserved task is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfirmRequest {
    /// The ticket of the reservation.
    pub ticket: String,
    /// The job.
    pub request: SubmitRequest,
    /// Start it when the reservation begins; else when it is told to ([`TicketRequest`]).
    pub start: bool,
}

/// Starts or cancels a reserved task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TicketRequest {
    /// The ticket of the reservation.
    pub ticket: String,
}

/// A job for the host that was asked for it before, see [`Places`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlaceRequest {
    /// Made by the client, for this job alone: however often it is asked with the same key, the host has the job once.
    pub key: Uuid,
    /// Not at all, unless it begins at once.
    pub at_once: bool,
    /// The job.
    pub request: SubmitRequest,
}

/// Where a job could be placed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Places {
    /// Hosts, the best first.
    pub places: Vec<Place>,
    /// Other hosts that answered, those that could not among them.
    pub asked: usize,
    /// Why no other host was asked, though this one cannot begin at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// A host that offers to take a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The address of its `xbed`, as a client names it; the one that was asked if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// Its name, for people.
    pub host: String,
    /// It would begin now; else when others have ended.
    pub at_once: bool,
}

/// A guest's TCP port made reachable on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    /// Port on the host's loopback; 0 lets the host choose.
    pub host: u16,
    /// Port in the guest.
    pub guest: u16,
}

/// State of a task, in the words of OGSA-BES 1.0 (section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum State {
    /// Accepted, not begun.
    Pending,
    /// Begun.
    Running,
    /// Ended by itself; see the exit code.
    Finished,
    /// Could not be brought to its end; see the reason.
    Failed,
    /// Ended on request.
    Terminated,
}

impl State {
    /// No further change comes.
    pub fn is_final(self) -> bool {
        matches!(self, State::Finished | State::Failed | State::Terminated)
    }

    /// Its name, on the wire too.
    pub fn name(self) -> &'static str {
        match self {
            State::Pending => "Pending",
            State::Running => "Running",
            State::Finished => "Finished",
            State::Failed => "Failed",
            State::Terminated => "Terminated",
        }
    }
}

/// Sub-state, XenBEE's specialisation of the BES states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SubState {
    /// Resources held, not confirmed.
    Reserved,
    /// In the queue.
    Confirmed,
    /// Image and files are being fetched.
    #[serde(rename = "Stage-In")]
    StageIn,
    /// The domain is being made and boots.
    #[serde(rename = "Instance-Starting")]
    InstanceStarting,
    /// The task runs.
    Executing,
    /// The domain is being shut down.
    #[serde(rename = "Instance-Stopping")]
    InstanceStopping,
    /// Results are being sent.
    #[serde(rename = "Stage-Out")]
    StageOut,
}

impl SubState {
    /// Its name, on the wire too.
    pub fn name(self) -> &'static str {
        match self {
            SubState::Reserved => "Reserved",
            SubState::Confirmed => "Confirmed",
            SubState::StageIn => "Stage-In",
            SubState::InstanceStarting => "Instance-Starting",
            SubState::Executing => "Executing",
            SubState::InstanceStopping => "Instance-Stopping",
            SubState::StageOut => "Stage-Out",
        }
    }
}

/// How far a transfer is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being moved, with credentials removed.
    pub what: String,
    /// Bytes so far.
    pub done_bytes: u64,
    /// Bytes in all, where known.
    pub total_bytes: Option<u64>,
}

/// Time of a transition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// State entered.
    pub state: State,
    /// Sub-state entered.
    pub substate: Option<SubState>,
    /// When, RFC 3339 with milliseconds, UTC.
    pub at: String,
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// A task as seen from outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskStatus {
    /// The task's id.
    pub id: Uuid,
    /// The job's name, from its document.
    pub name: Option<String>,
    /// User id of its owner.
    pub owner: u32,
    /// State.
    pub state: State,
    /// Sub-state while not final.
    pub substate: Option<SubState>,
    /// Exit code of the task in the guest; 128 + N if signal N ended it.
    pub exit_code: Option<i32>,
    /// Why it failed or was terminated, for a user's eyes.
    pub reason: Option<String>,
    /// Stable code of the failure, for programs.
    pub reason_code: Option<String>,
    /// Each transition with its time, oldest first.
    pub times: Vec<Transition>,
    /// Transfer under way.
    pub progress: Option<Progress>,
    /// Image the domain boots; empty while a reservation is not confirmed.
    pub image: String,
    /// IPv6 address of its domain, while it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// The span of time for which capacity is held for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation: Option<ReservationStatus>,
    /// Of an array: what its tasks are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub array: Option<ArrayCounts>,
    /// Of a task of an array: which one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<ArrayMember>,
    /// Ports published on the host, with the port that was really taken.
    pub ports: Vec<PublishedPort>,
}

/// How many tasks of an array are in each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrayCounts {
    /// Accepted, not begun.
    pub pending: u32,
    /// Begun.
    pub running: u32,
    /// Ended by themselves.
    pub finished: u32,
    /// Could not be brought to their end.
    pub failed: u32,
    /// Ended on request.
    pub terminated: u32,
}

impl ArrayCounts {
    /// Tasks in all.
    pub fn total(&self) -> u32 {
        self.pending + self.running + self.ended()
    }

    /// Tasks in a final state.
    pub fn ended(&self) -> u32 {
        self.finished + self.failed + self.terminated
    }
}

/// A task's place in an array: the job of a parameter sweep (GFD.149).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrayMember {
    /// The array's id.
    pub array: Uuid,
    /// Its place, counted from 1.
    pub number: u32,
    /// What makes it differ from the others, for people.
    pub assigned: String,
}

/// Capacity held for a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReservationStatus {
    /// From when, RFC 3339, UTC.
    pub from: String,
    /// Until when.
    pub until: String,
    /// From when, milliseconds since the Unix epoch.
    pub from_ms: u64,
    /// Until when.
    pub until_ms: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Disk in bytes.
    pub disk_bytes: u64,
}

/// One line of the event stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskEvent {
    /// Position in the task's stream, from 1 without gaps.
    pub seq: u64,
    /// The state entered and when.
    #[serde(flatten)]
    pub transition: Transition,
    /// Exit code, once known.
    pub exit_code: Option<i32>,
    /// Why.
    pub reason: Option<String>,
}

/// Query of streams that can be followed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FollowQuery {
    /// Keep the answer open until the task is final.
    #[serde(default)]
    pub follow: bool,
    /// Events: the first wanted `seq`; logs: the byte offset.
    #[serde(default)]
    pub from: u64,
}

/// How to reach a domain's SSH server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshAccess {
    /// User to log in as.
    pub user: String,
    /// Port of the SSH server in the guest.
    pub port: u16,
    /// Private key in OpenSSH form, made for this domain alone.
    pub private_key: String,
    /// Public host key, `ssh-ed25519 AAAA...`.
    pub host_key: String,
}

/// A command to run beside the task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments; never a shell string.
    pub argv: Vec<String>,
    /// Allocate a terminal of this size.
    pub tty: Option<WindowSize>,
    /// Environment on top of the guest's default.
    #[serde(default)]
    pub env: Vec<(String, String)>,
}

/// Size of a terminal in character cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// Whether the host would take a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// It would.
    pub accepted: bool,
    /// Why not.
    pub reasons: Vec<String>,
    /// Valid parts of the document that this host ignores.
    pub warnings: Vec<String>,
}

/// Query of `export`: whose words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "form", rename_all = "kebab-case")]
pub enum ExportForm {
    /// Configuration file of Xen's `xl`.
    Xl,
    /// XML of libvirt.
    Libvirt,
}

impl ExportForm {
    /// Name in queries.
    pub fn name(self) -> &'static str {
        match self {
            ExportForm::Xl => "xl",
            ExportForm::Libvirt => "libvirt",
        }
    }
}

/// A domain as its hypervisor's own tools take it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainExport {
    /// The text.
    pub text: String,
    /// Commands for a shell that make the files it names and that are not there.
    pub prepare: Vec<String>,
}

/// A file to fetch into the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheRequest {
    /// From where.
    pub uri: String,
    /// What it must be, as `sha256:HEX`, or another algorithm that documents may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// A fetched file that is kept for its owner's tasks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheEntry {
    /// Its id: documents name it by the URI `cache:ID`.
    pub id: Uuid,
    /// User id of its owner.
    pub owner: u32,
    /// From where, with credentials and query removed.
    pub uri: String,
    /// The digest that was demanded, as `sha256:HEX`.
    pub digest: Option<String>,
    /// How it was packed; it is kept unpacked.
    pub compression: Option<String>,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Space that it takes on the disk, in bytes; holes take none.
    pub allocated_bytes: u64,
    /// SHA-256 of the bytes as they came, hexadecimal.
    pub sha256: String,
    /// When it was fetched, RFC 3339, UTC.
    pub fetched: String,
    /// The same in milliseconds since the Unix epoch.
    pub fetched_ms: u64,
    /// When a task took it last, RFC 3339, UTC.
    pub used: String,
    /// The same in milliseconds since the Unix epoch.
    pub used_ms: u64,
    /// The `ETag` that came with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    /// The `Last-Modified` that came with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_modified: Option<String>,
    /// A task has it at this moment.
    pub in_use: bool,
}

/// One line of what is told of a fetch into the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheNews {
    /// How far it is.
    Progress(Progress),
    /// It is there. Nothing follows.
    Entry(CacheEntry),
    /// It failed. Nothing follows.
    Error(ErrorBody),
}

/// The host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Version of `xbed`.
    pub version: String,
    /// Back end: `sim`, `qemu`.
    pub backend: String,
    /// Hypervisor's version.
    pub hypervisor: String,
    /// What executes guests.
    pub accelerator: String,
    /// Logical CPUs.
    pub cpus: u32,
    /// Memory for domains in bytes.
    pub memory_bytes: u64,
    /// Names of the images `image:NAME` can refer to.
    pub images: Vec<String>,
    /// The channel on which hosts find each other, if it is to be on one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<ChannelState>,
}

/// How it stands with the channel of hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelState {
    /// Its name.
    pub channel: String,
    /// Where its registry is.
    pub registry: String,
    /// Why the host is not on it; `None` if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub away: Option<String>,
}

/// Body of every error answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// Stable code, kebab-case, for programs (`task-not-found`, `invalid-document`...).
    pub code: String,
    /// What is wrong, where, what was expected, what to do.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_on_the_wire() {
        use State::*;
        use SubState::*;
        for state in [Pending, Running, Finished, Failed, Terminated] {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
        for substate in [
            Reserved,
            Confirmed,
            StageIn,
            InstanceStarting,
            Executing,
            InstanceStopping,
            StageOut,
        ] {
            assert_eq!(serde_json::to_value(substate).unwrap(), substate.name());
        }
    }
}
