//! The messages. `schema/gen-1.cddl` is generated from this file by `tests/schema.rs`.

use minicbor::{Decode, Encode};
use uuid::Uuid;

/// From the agent to the host.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum GuestMessage {
    /// Opens the handshake.
    #[n(0)]
    Hello(#[n(0)] GuestHello),
    /// Closes the agent's part of the handshake.
    #[n(1)]
    Proof(#[n(0)] GuestProof),
    /// The agent gives up this connection.
    #[n(2)]
    Refuse(#[n(0)] Failure),
    /// The agent is alive.
    #[n(3)]
    Heartbeat,
    /// The answer to a request.
    #[n(4)]
    Response {
        /// The request's id.
        #[n(0)]
        id: u32,
        /// The answer.
        #[n(1)]
        reply: Reply,
    },
    /// News of a task.
    #[n(5)]
    Task {
        /// The task's conversation.
        #[cbor(n(0), with = "crate::wire::uuid")]
        conversation: Uuid,
        /// The news.
        #[n(1)]
        event: TaskEvent,
    },
    /// The process that `Exec` started on `stream` has ended; its output came before.
    #[n(6)]
    ProcessExited {
        /// Main stream of the process.
        #[n(0)]
        stream: u32,
        /// How it ended.
        #[n(1)]
        status: ExitStatus,
    },
    /// Something on a stream.
    #[n(7)]
    Stream {
        /// Which stream.
        #[n(0)]
        stream: u32,
        /// What.
        #[n(1)]
        body: StreamBody,
    },
}

/// From the host to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[expect(
    clippy::large_enum_variant,
    reason = "one at a time is alive, from the wire to its handler"
)]
pub enum HostMessage {
    /// Answers the agent's hello.
    #[n(0)]
    Hello(#[n(0)] HostHello),
    /// Ends the handshake; the agent is at the host's service.
    #[n(1)]
    Welcome(#[n(0)] Welcome),
    /// The host gives up this connection.
    #[n(2)]
    Refuse(#[n(0)] Failure),
    /// The host is alive.
    #[n(3)]
    Heartbeat,
    /// A request; answered once with the same id.
    #[n(4)]
    Request {
        /// Chosen by the host, not in use.
        #[n(0)]
        id: u32,
        /// What is asked for.
        #[n(1)]
        request: Request,
    },
    /// The host has everything before `offset` durably; the agent may forget it.
    #[n(5)]
    OutputAck {
        /// The task's conversation.
        #[cbor(n(0), with = "crate::wire::uuid")]
        conversation: Uuid,
        /// Which of its outputs.
        #[n(1)]
        stream: OutputStream,
        /// Bytes from the beginning.
        #[n(2)]
        offset: u64,
    },
    /// Something on a stream.
    #[n(6)]
    Stream {
        /// Which stream.
        #[n(0)]
        stream: u32,
        /// What.
        #[n(1)]
        body: StreamBody,
    },
}

/// Opens the handshake.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct GuestHello {
    /// Newest generation that the agent speaks.
    #[n(0)]
    pub generation: u16,
    /// The domain it runs in.
    #[cbor(n(1), with = "crate::wire::uuid")]
    pub domain: Uuid,
    /// Random, new for each connection.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub nonce: [u8; 32],
}

/// The host's answer to a hello.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct HostHello {
    /// The generation spoken from here on: the lower of both.
    #[n(0)]
    pub generation: u16,
    /// Random, new for each connection.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub nonce: [u8; 32],
    /// [`prove`](crate::proof::prove) of the host.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub proof: [u8; 32],
}

/// The agent's proof, and what it says of itself once it knows whom it talks to.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct GuestProof {
    /// [`prove`](crate::proof::prove) of the guest.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub proof: [u8; 32],
    /// The agent and its machine.
    #[n(1)]
    pub info: AgentInfo,
}

/// The agent and its machine.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct AgentInfo {
    /// Version of the agent.
    #[n(0)]
    pub version: String,
    /// Release of the guest's kernel.
    #[n(1)]
    pub kernel: String,
    /// The kernel's boot id; another one means that the guest has rebooted.
    #[cbor(n(2), with = "crate::wire::uuid")]
    pub boot_id: Uuid,
    /// Memory of the guest, in KiB.
    #[n(3)]
    pub memory_kib: u64,
    /// How far the guest is.
    #[n(4)]
    pub phase: Phase,
    /// The tasks that the agent knows of.
    #[n(5)]
    pub conversations: Vec<ConversationInfo>,
}

/// How far the guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Phase {
    /// In the initial RAM file system.
    #[n(0)]
    Initramfs,
    /// The root is mounted.
    #[n(1)]
    Mounted,
    /// `Start` is done.
    #[n(2)]
    Started,
}

/// A task that the agent knows of.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ConversationInfo {
    /// Its conversation.
    #[cbor(n(0), with = "crate::wire::uuid")]
    pub conversation: Uuid,
    /// Whether its process has not ended yet.
    #[n(1)]
    pub running: bool,
}

/// What the host already has.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Welcome {
    /// For each task that the host knows, how much of its output it has. The agent goes on from
    /// there; tasks not named go on from what was last acknowledged.
    #[n(0)]
    pub resume: Vec<ResumePoint>,
}

/// How much of a task's output the host has durably. It counts as an acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct ResumePoint {
    /// The task's conversation.
    #[cbor(n(0), with = "crate::wire::uuid")]
    pub conversation: Uuid,
    /// Bytes of standard output.
    #[n(1)]
    pub stdout_bytes: u64,
    /// Bytes of standard error.
    #[n(2)]
    pub stderr_bytes: u64,
}

/// Something that did not work, for programs and for people.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Failure {
    /// One of [`code`](crate::code), or a later agent's.
    #[n(0)]
    pub code: String,
    /// What, where, why.
    #[n(1)]
    pub message: String,
}

/// Something on a stream. `Data` counts against the window; the other parts do not.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum StreamBody {
    /// The next bytes, at most [`MAX_DATA_BYTES`](crate::MAX_DATA_BYTES).
    #[n(0)]
    Data(#[cbor(n(0), with = "minicbor::bytes")] Vec<u8>),
    /// The next bytes are this many zeros. Only in `PutFile` and `GetFile`.
    #[n(1)]
    Hole(#[n(0)] u64),
    /// Nothing more comes in this direction.
    #[n(2)]
    End,
    /// The receiver has dealt with this many bytes; the sender may send as many more.
    #[n(3)]
    Credit(#[n(0)] u32),
    /// The stream is broken off, in both directions.
    #[n(4)]
    Reset,
}

/// What the host asks for. Streams named here are new.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[expect(
    clippy::large_enum_variant,
    reason = "one at a time is alive, from the wire to its handler"
)]
pub enum Request {
    /// Mounts the root file system and makes it `/`. Done once; a repetition gives the same reply.
    #[n(0)]
    MountRoot(#[n(0)] MountRoot),
    /// Receives a file on `stream` (data, holes, end). Answered when the file is in place.
    #[n(1)]
    PutFile(#[n(0)] PutFile),
    /// Sends a file on `stream` (data, holes). The reply follows the last byte, in place of `End`.
    #[n(2)]
    GetFile {
        /// New stream.
        #[n(0)]
        stream: u32,
        /// Path in the root.
        #[n(1)]
        path: String,
    },
    /// Makes a directory and its parents; one that is there takes mode and owner, if a mode is given.
    #[n(3)]
    MakeDirectory(#[n(0)] MakeDirectory),
    /// Makes a symbolic link, in place of a file or link that is there.
    #[n(4)]
    MakeSymlink(#[n(0)] MakeSymlink),
    /// Removes a file or, with all that is in it, a directory. What is not there is removed already.
    #[n(5)]
    Remove {
        /// Path in the root.
        #[n(0)]
        path: String,
    },
    /// Hands the machine to the image's init, or keeps it. Done once; a repetition gives the same reply.
    #[n(6)]
    Start {
        /// To whom.
        #[n(0)]
        mode: StartMode,
    },
    /// Starts a task. A conversation that is known is not started again.
    #[n(7)]
    Execute(#[n(0)] Execute),
    /// Ends everything a task has started: TERM, and KILL after the grace.
    #[n(8)]
    Terminate {
        /// The task's conversation.
        #[cbor(n(0), with = "crate::wire::uuid")]
        conversation: Uuid,
        /// Time between TERM and KILL, in milliseconds.
        #[n(1)]
        grace_ms: u64,
    },
    /// Sends a signal to a task's process group.
    #[n(9)]
    SignalTask {
        /// The task's conversation.
        #[cbor(n(0), with = "crate::wire::uuid")]
        conversation: Uuid,
        /// Number of the signal on Linux.
        #[n(1)]
        signal: i32,
    },
    /// Starts a command beside the task. It ends with the connection.
    #[n(10)]
    Exec(#[n(0)] Exec),
    /// Sends a signal to the process group of a command.
    #[n(11)]
    SignalProcess {
        /// Main stream of the command.
        #[n(0)]
        stream: u32,
        /// Number of the signal on Linux.
        #[n(1)]
        signal: i32,
    },
    /// Tells a command the new size of its terminal.
    #[n(12)]
    Resize {
        /// Main stream of the command.
        #[n(0)]
        stream: u32,
        /// The size.
        #[n(1)]
        size: TerminalSize,
    },
    /// Connects `stream` to a TCP port on the guest's loopback.
    #[n(13)]
    Forward {
        /// New stream.
        #[n(0)]
        stream: u32,
        /// TCP port.
        #[n(1)]
        port: u16,
    },
    /// Asks for resources in use.
    #[n(14)]
    Stats,
    /// Sets the guest's clock.
    #[n(15)]
    SetTime {
        /// Seconds since 1970-01-01 00:00 UTC.
        #[n(0)]
        unix_seconds: u64,
        /// Nanoseconds of that second.
        #[n(1)]
        nanoseconds: u32,
    },
    /// Feeds the guest's random number generator and makes it begin anew.
    #[n(16)]
    Reseed {
        /// Random bytes, 32 to 512.
        #[cbor(n(0), with = "minicbor::bytes")]
        seed: Vec<u8>,
    },
    /// Switches the guest off. Answered at once.
    #[n(17)]
    Shutdown {
        /// Time that processes have to end by themselves, in milliseconds.
        #[n(0)]
        grace_ms: u64,
    },
}

/// The root file system.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct MountRoot {
    /// Block device; without it the first disk, and on it the first partition that mounts.
    #[n(0)]
    pub device: Option<String>,
    /// Type of the file system; without it those that the kernel knows are tried.
    #[n(1)]
    pub fs_type: Option<String>,
    /// Mounts it read-only.
    #[n(2)]
    pub read_only: bool,
}

/// A file to be put into the guest. It appears under its name when it is whole.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PutFile {
    /// New stream that carries the content.
    #[n(0)]
    pub stream: u32,
    /// Path in the root; missing directories are made.
    #[n(1)]
    pub path: String,
    /// Permission bits, set-id bits included.
    #[n(2)]
    pub mode: u32,
    /// Owner: name or number; root without it.
    #[n(3)]
    pub user: Option<String>,
    /// Group: name or number; the owner's without it.
    #[n(4)]
    pub group: Option<String>,
    /// Size in bytes where it is known: disk space is looked for before anything is sent.
    #[n(5)]
    pub size: Option<u64>,
}

/// A directory to be made.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MakeDirectory {
    /// Path in the root; missing directories above are made.
    #[n(0)]
    pub path: String,
    /// Permission bits; without them a directory that is there stays as it is.
    #[n(1)]
    pub mode: Option<u32>,
    /// Owner: name or number; root without it.
    #[n(2)]
    pub user: Option<String>,
    /// Group: name or number; the owner's without it.
    #[n(3)]
    pub group: Option<String>,
}

/// A symbolic link to be made.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MakeSymlink {
    /// Path in the root; missing directories are made.
    #[n(0)]
    pub path: String,
    /// What it says.
    #[n(1)]
    pub target: String,
    /// Owner: name or number; root without it.
    #[n(2)]
    pub user: Option<String>,
    /// Group: name or number; the owner's without it.
    #[n(3)]
    pub group: Option<String>,
}

/// Who has the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum StartMode {
    /// The image's init if it has one, else the agent.
    #[n(0)]
    Auto,
    /// The image's init.
    #[n(1)]
    Init,
    /// The agent.
    #[n(2)]
    Agent,
}

/// A variable of a process's environment.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Variable {
    /// Name.
    #[n(0)]
    pub name: String,
    /// Value.
    #[n(1)]
    pub value: String,
}

/// A task.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Execute {
    /// Names this task, whatever connection it is spoken of on.
    #[cbor(n(0), with = "crate::wire::uuid")]
    pub conversation: Uuid,
    /// Command and arguments; a command without `/` is looked up along `PATH` in the root.
    #[n(1)]
    pub argv: Vec<String>,
    /// Environment, beside `PATH`, `HOME`, `USER`, `LOGNAME` and `SHELL` where it does not name them.
    #[n(2)]
    pub environment: Vec<Variable>,
    /// Working directory; the user's home without it, or `/`.
    #[n(3)]
    pub working_directory: Option<String>,
    /// File of standard input; empty input without it.
    #[n(4)]
    pub stdin: Option<String>,
    /// File that standard output is written to, beside its being sent.
    #[n(5)]
    pub stdout: Option<String>,
    /// File that standard error is written to, beside its being sent.
    #[n(6)]
    pub stderr: Option<String>,
    /// User: name or number; root without it.
    #[n(7)]
    pub user: Option<String>,
    /// Group: name or number; the user's own without it.
    #[n(8)]
    pub group: Option<String>,
    /// File mode creation mask; 0o022 without it.
    #[n(9)]
    pub umask: Option<u32>,
    /// Bounds on what it may use.
    #[n(10)]
    pub limits: Limits,
}

/// Bounds on what each process of a task may use (`setrlimit(2)`), and on the whole task's time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct Limits {
    /// CPU time in seconds (`RLIMIT_CPU`).
    #[n(0)]
    pub cpu_seconds: Option<u64>,
    /// Size of a file it writes, in bytes (`RLIMIT_FSIZE`).
    #[n(1)]
    pub file_size_bytes: Option<u64>,
    /// Size of a core dump in bytes (`RLIMIT_CORE`).
    #[n(2)]
    pub core_bytes: Option<u64>,
    /// Data segment in bytes (`RLIMIT_DATA`).
    #[n(3)]
    pub data_bytes: Option<u64>,
    /// Stack in bytes (`RLIMIT_STACK`).
    #[n(4)]
    pub stack_bytes: Option<u64>,
    /// Open files (`RLIMIT_NOFILE`).
    #[n(5)]
    pub open_files: Option<u64>,
    /// Processes and threads of the whole task; where the guest has no control groups, of the user
    /// (`RLIMIT_NPROC`).
    #[n(6)]
    pub processes: Option<u64>,
    /// Address space in bytes (`RLIMIT_AS`).
    #[n(7)]
    pub address_space_bytes: Option<u64>,
    /// Locked memory in bytes (`RLIMIT_MEMLOCK`).
    #[n(8)]
    pub locked_memory_bytes: Option<u64>,
    /// Time from start to end of the whole task, in milliseconds; it is terminated then.
    #[n(9)]
    pub wall_clock_ms: Option<u64>,
    /// Memory of the whole task, in bytes; it is ended where it wants more. Where the guest has no control
    /// groups, of the data segment of each process.
    #[n(10)]
    pub memory_bytes: Option<u64>,
}

/// A command beside the task.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Exec {
    /// New stream: standard input one way and standard output the other.
    #[n(0)]
    pub stream: u32,
    /// New stream for standard error. Not looked at with a terminal, which has one output only.
    #[n(1)]
    pub stderr_stream: Option<u32>,
    /// Command and arguments, as in [`Execute`].
    #[n(2)]
    pub argv: Vec<String>,
    /// Environment, as in [`Execute`].
    #[n(3)]
    pub environment: Vec<Variable>,
    /// Working directory, as in [`Execute`].
    #[n(4)]
    pub working_directory: Option<String>,
    /// User: name or number; root without it.
    #[n(5)]
    pub user: Option<String>,
    /// Group: name or number; the user's own without it.
    #[n(6)]
    pub group: Option<String>,
    /// Gives it a terminal of this size.
    #[n(7)]
    pub terminal: Option<TerminalSize>,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct TerminalSize {
    /// Lines.
    #[n(0)]
    pub rows: u16,
    /// Characters in a line.
    #[n(1)]
    pub columns: u16,
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Reply {
    /// It did not work.
    #[n(0)]
    Failed(#[n(0)] Failure),
    /// It is done, and there is nothing to tell.
    #[n(1)]
    Done,
    /// To `MountRoot`.
    #[n(2)]
    Root(#[n(0)] RootInfo),
    /// To `PutFile` and `GetFile`.
    #[n(3)]
    File(#[n(0)] FileInfo),
    /// To `Start`.
    #[n(4)]
    Started(#[n(0)] StartInfo),
    /// To `Execute`: news of the task follow as events.
    #[n(5)]
    Accepted {
        /// The conversation was known before; nothing was started.
        #[n(0)]
        known: bool,
    },
    /// To `Exec`.
    #[n(6)]
    Process {
        /// Process id in the guest.
        #[n(0)]
        pid: i32,
    },
    /// To `Stats`.
    #[n(7)]
    Stats(#[n(0)] Stats),
}

/// What was found in the root file system.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RootInfo {
    /// The device that was mounted.
    #[n(0)]
    pub device: String,
    /// Type of its file system.
    #[n(1)]
    pub fs_type: String,
    /// The init that `Start` would hand the machine to.
    #[n(2)]
    pub init: Option<String>,
    /// `ID` of `os-release`.
    #[n(3)]
    pub os_id: Option<String>,
}

/// A file as it came through.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct FileInfo {
    /// Size in bytes.
    #[n(0)]
    pub size: u64,
    /// Permission bits.
    #[n(1)]
    pub mode: u32,
    /// Owner.
    #[n(2)]
    pub uid: u32,
    /// Group.
    #[n(3)]
    pub gid: u32,
    /// Last change, seconds since 1970-01-01 00:00 UTC.
    #[n(4)]
    pub modified_unix_seconds: i64,
    /// BLAKE3 hash of the content, holes included as zeros.
    #[cbor(n(5), with = "minicbor::bytes")]
    pub blake3: [u8; 32],
}

/// Who has the machine now.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StartInfo {
    /// The init that was started; the agent itself without it.
    #[n(0)]
    pub init: Option<String>,
}

/// Resources in use.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Stats {
    /// Memory of the guest, in KiB.
    #[n(0)]
    pub memory_total_kib: u64,
    /// Memory available to new processes, in KiB.
    #[n(1)]
    pub memory_available_kib: u64,
    /// Load average of the last minute, in thousandths.
    #[n(2)]
    pub load_milli: u64,
    /// Resident memory of the agent, in KiB.
    #[n(3)]
    pub agent_resident_kib: u64,
    /// Time since the guest's boot, in milliseconds.
    #[n(4)]
    pub uptime_ms: u64,
}

/// News of a task. After `Exited` or `Failed` there is no more.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum TaskEvent {
    /// The next bytes of an output.
    #[n(0)]
    Output {
        /// Which output.
        #[n(0)]
        stream: OutputStream,
        /// Bytes before these.
        #[n(1)]
        offset: u64,
        /// At most [`MAX_DATA_BYTES`](crate::MAX_DATA_BYTES).
        #[cbor(n(2), with = "minicbor::bytes")]
        data: Vec<u8>,
    },
    /// It has ended and all of its output is sent. Repeated on each new connection.
    #[n(1)]
    Exited(#[n(0)] Exited),
    /// It could not be started. Repeated on each new connection.
    #[n(2)]
    Failed(#[n(0)] Failure),
}

/// Which output of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
#[cbor(index_only)]
pub enum OutputStream {
    /// Standard output.
    #[n(0)]
    Stdout,
    /// Standard error.
    #[n(1)]
    Stderr,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum ExitStatus {
    /// By itself.
    #[n(0)]
    Code(#[n(0)] u8),
    /// By a signal.
    #[n(1)]
    Signal {
        /// Number of the signal on Linux.
        #[n(0)]
        signal: i32,
        /// A core was dumped.
        #[n(1)]
        core_dumped: bool,
    },
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Exited {
    /// How its first process ended.
    #[n(0)]
    pub status: ExitStatus,
    /// Why the agent ended it, if it did.
    #[n(1)]
    pub cause: Option<EndCause>,
    /// Bytes of standard output in all.
    #[n(2)]
    pub stdout_bytes: u64,
    /// Bytes of standard error in all.
    #[n(3)]
    pub stderr_bytes: u64,
    /// CPU time of the first process and those it waited for, in milliseconds.
    #[n(4)]
    pub cpu_ms: u64,
    /// Time from start to end, in milliseconds.
    #[n(5)]
    pub wall_clock_ms: u64,
    /// The largest resident size among these processes, in KiB.
    #[n(6)]
    pub max_resident_kib: u64,
}

/// Why the agent ended a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum EndCause {
    /// The host asked for it.
    #[n(0)]
    Terminated,
    /// Its wall-clock time was over.
    #[n(1)]
    WallClockLimit,
    /// It wanted more memory than its limit or, without one, than the machine has.
    #[n(2)]
    MemoryLimit,
    /// It failed by itself, after it was refused a process or thread beyond its limit or, without one, beyond
    /// what the machine has memory for.
    #[n(3)]
    ProcessLimit,
}
