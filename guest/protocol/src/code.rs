//! Codes of [failures](crate::Failure). Stable: programs and users match on them.

/// The command is not in the guest: no such file, or not found along `PATH`.
pub const COMMAND_NOT_FOUND: &str = "command-not-found";
/// The command is there but cannot be executed (mode, format, missing interpreter).
pub const COMMAND_NOT_EXECUTABLE: &str = "command-not-executable";
/// A user or group is unknown in the guest.
pub const UNKNOWN_USER: &str = "unknown-user";
/// The working directory cannot be entered.
pub const BAD_WORKING_DIRECTORY: &str = "bad-working-directory";
/// A file of the task's standard input, output or error cannot be opened.
pub const BAD_STANDARD_STREAM: &str = "bad-standard-stream";
/// A resource limit cannot be set.
pub const BAD_LIMIT: &str = "bad-limit";
/// The root file system cannot be mounted.
pub const MOUNT_FAILED: &str = "mount-failed";
/// No disk, or no partition of it, carries a file system.
pub const NO_ROOT_DEVICE: &str = "no-root-device";
/// The image has no init system, but one was asked for.
pub const NO_INIT: &str = "no-init";
/// A file operation failed in the guest.
pub const FILE_ERROR: &str = "file-error";
/// There is no such file in the guest.
pub const FILE_NOT_FOUND: &str = "file-not-found";
/// Nothing listens on the port in the guest.
pub const CONNECTION_REFUSED: &str = "connection-refused";
/// A system call failed in the guest.
pub const SYSTEM_ERROR: &str = "system-error";
/// No such conversation, process or stream.
pub const NOT_FOUND: &str = "not-found";
/// The request does not fit the agent's present state.
pub const WRONG_STATE: &str = "wrong-state";
/// A bound of the agent is reached.
pub const TOO_MANY: &str = "too-many";
/// The request itself is wrong.
pub const BAD_REQUEST: &str = "bad-request";
/// The agent does not own this machine (it runs beside other things) and leaves it alone.
pub const NOT_PERMITTED: &str = "not-permitted";
/// The host cancelled the operation.
pub const CANCELLED: &str = "cancelled";
/// The peer does not know the secret of this boot.
pub const AUTHENTICATION_FAILED: &str = "authentication-failed";
/// The peer's generation is not spoken here.
pub const UNSUPPORTED_GENERATION: &str = "unsupported-generation";
/// The host claims more output than the agent has produced: it resumes another boot's task.
pub const RESUME_MISMATCH: &str = "resume-mismatch";
/// The peer broke the protocol.
pub const PROTOCOL_ERROR: &str = "protocol-error";
