//! Why commands are not carried out, with what users are told and the codes for programs.

use uuid::Uuid;
use xbee_engine::QueueError;

use super::WRITE_LIMIT;
use crate::anywhere::AnywhereError;
use crate::cache::CacheError;
use crate::pool::PoolError;
use crate::store::StoreError;
use crate::translate::PlanError;
use crate::uploads::UploadError;
use crate::view;

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// No such task, or not the caller's.
    #[error("no task {0}; `xbe ps -a` lists the tasks there are")]
    NotFound(String),
    /// More than one task begins like this.
    #[error("{prefix} is the beginning of {count} task ids: give more of it")]
    Ambiguous {
        /// What was given.
        prefix: String,
        /// How many tasks.
        count: usize,
    },
    /// The document cannot become a task.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The queue does not take it.
    #[error(transparent)]
    Queue(QueueError),
    /// Others have what is asked for, but not for ever.
    #[error(
        "there is not so much free at that time: from {from} on there is, for as long as you ask"
    )]
    RoomLater {
        /// RFC 3339.
        from: String,
    },
    /// The span of time makes no sense.
    #[error("a reservation from {from} to {until} is over or has no length: give a time to come")]
    NoSpan {
        /// RFC 3339.
        from: String,
        /// RFC 3339.
        until: String,
    },
    /// It is not one task.
    #[error(
        "the document is a parameter sweep: a reservation is for one task, so submit it without, or confirm one job of it"
    )]
    SweepReserved,
    /// Nothing is held under this ticket, or not for the caller.
    #[error(
        "501 TICKET_INVALID: no reservation of yours has this ticket; it may be over or cancelled, and `xbe ps -a` lists your tasks"
    )]
    TicketInvalid,
    /// The reservation has its document.
    #[error(
        "task {0} is confirmed: its document cannot be changed; cancel it, or start it if that is not done"
    )]
    AlreadyConfirmed(Uuid),
    /// The reservation has no document.
    #[error("task {0} is not confirmed: `xbe confirm` tells it what to do")]
    NotConfirmed(Uuid),
    /// The job does not fit into what is held for it.
    #[error(
        "the job needs {vcpus} CPUs and {memory_bytes} bytes of memory, which is more than the {held_vcpus} CPUs and {held_memory_bytes} bytes that are reserved for it"
    )]
    NotCovered {
        /// It needs.
        vcpus: u32,
        /// It needs.
        memory_bytes: u64,
        /// There are.
        held_vcpus: u32,
        /// There are.
        held_memory_bytes: u64,
    },
    /// More than others is the operator's to give.
    #[error("priority {0} is more than 0, which only root and the user of xbed may give")]
    Priority(i8),
    /// There are bounds.
    #[error("{wanted} retries are wanted, this host makes at most {most}")]
    Retries {
        /// Asked for.
        wanted: u32,
        /// The bound.
        most: u32,
    },
    /// A file of this host, for somebody who is not on it, or one of the client's that it keeps.
    #[error(
        "{0} is no file for this job: the client did not send it or does not fetch it, and files of xbed's host are not for users on other machines; use an xbe that does, or take it from or bring it to a server"
    )]
    LocalFile(String),
    /// A file that is sent, or was not.
    #[error(transparent)]
    Upload(#[from] UploadError),
    /// It was not kept, or has another number.
    #[error(
        "task {task} keeps no result {number}: those it keeps are listed by GET /v1/tasks/{task}/results once it is over"
    )]
    NoResult {
        /// The task.
        task: Uuid,
        /// What was asked for.
        number: u32,
    },
    /// A port of this host, for somebody who is not on it.
    #[error(
        "ports are published on xbed's host, which users on other machines do not reach: `xbe run` and `xbe submit --wait` of this version listen on their own machine, and so does `xbe ssh TASK -- -L PORT:localhost:PORT`"
    )]
    LocalPort,
    /// It is not one task.
    #[error(
        "{0} is an array of tasks: name one of them, as {0}.1; `xbe ps -a --array {0}` lists them"
    )]
    IsArray(String),
    /// The task is not over.
    #[error("task {0} is not over: `xbe terminate` ends it")]
    NotFinal(Uuid),
    /// The task has no domain that could be talked to.
    #[error("task {0} has no running domain now")]
    NoDomain(Uuid),
    /// The image has no SSH set up for this task.
    #[error("task {0} has no SSH access: its domain is not up yet")]
    NoSsh(Uuid),
    /// What the agent said.
    #[error(transparent)]
    Agent(#[from] xbee_agent::Error),
    /// Of what boots, some is known only when it has been fetched.
    #[error(
        "this job brings its own image, which is not fetched for that: submit it and export the task while it runs"
    )]
    NotFetched,
    /// The domain cannot be described.
    #[error(transparent)]
    Export(xbee_hypervisor::Error),
    /// The cache's word.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// Other hosts.
    #[error(transparent)]
    Anywhere(#[from] AnywhereError),
    /// The pool.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// No member of the pool took it.
    #[error(
        "no host of the pool took the task within 30 days: submit it again, if it is still wanted"
    )]
    PoolAge,
    /// The store failed.
    #[error("the task could not be written down")]
    Store(#[from] StoreError),
    /// A wish is known and not durable.
    #[error(
        "what was asked of task {0} could not be written down within {limit} s, and is forgotten if xbed ends now: make room on the disk of its data directory if that is full",
        limit = WRITE_LIMIT.as_secs()
    )]
    NotWritten(Uuid),
}

impl From<QueueError> for CommandError {
    /// The queue knows milliseconds, people want a date.
    fn from(error: QueueError) -> Self {
        match error {
            QueueError::NoRoom {
                earliest_ms: Some(at_ms),
            } => CommandError::RoomLater {
                from: view::rfc3339(at_ms),
            },
            QueueError::NoSpan { from_ms, until_ms } => CommandError::NoSpan {
                from: view::rfc3339(from_ms),
                until: view::rfc3339(until_ms),
            },
            error => CommandError::Queue(error),
        }
    }
}

impl CommandError {
    /// Stable code for programs.
    pub fn code(&self) -> &str {
        match self {
            CommandError::NotFound(_) => "task-not-found",
            CommandError::Ambiguous { .. } => "task-ambiguous",
            CommandError::Plan(error) => error.code(),
            CommandError::Queue(error) => match error {
                QueueError::TooManyCpus { .. }
                | QueueError::TooMuchMemory { .. }
                | QueueError::TooMuchDisk { .. } => "no-capacity",
                error => error.code(),
            },
            CommandError::RoomLater { .. } => "no-room",
            CommandError::NoSpan { .. } => "invalid-reservation",
            CommandError::SweepReserved => "sweep-reserved",
            CommandError::TicketInvalid => "ticket-invalid",
            CommandError::AlreadyConfirmed(_) => "already-confirmed",
            CommandError::NotConfirmed(_) => "not-confirmed",
            CommandError::NotCovered { .. } => "not-covered",
            CommandError::Priority(_) => "priority",
            CommandError::Retries { .. } => "too-many-retries",
            CommandError::LocalFile(_) => "local-file",
            CommandError::LocalPort => "local-port",
            CommandError::Upload(error) => error.code(),
            CommandError::NoResult { .. } => "no-such-result",
            CommandError::IsArray(_) => "is-array",
            CommandError::NotFinal(_) => "task-not-final",
            CommandError::NoDomain(_) => "no-domain",
            CommandError::NoSsh(_) => "no-ssh",
            CommandError::Agent(error) => error.code(),
            CommandError::NotFetched => "image-not-fetched",
            CommandError::Export(error) => error.code(),
            CommandError::Cache(error) => error.code(),
            CommandError::Anywhere(error) => error.code(),
            CommandError::Pool(error) => error.code(),
            CommandError::PoolAge => "pool-age",
            CommandError::Store(error) => error.code(),
            CommandError::NotWritten(_) => "not-written",
        }
    }
}
