//! What can be asked of `xbed`, whatever the front door: HTTP today, a message queue later.
//!
//! A front door turns its requests into calls of [`Commands`] with the [`Caller`] it has
//! authenticated, and answers or [`CommandError`]s into its own words.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;
use xbee_agent::Agent;
use xbee_api::{
    CheckReport, DomainExport, ExportForm, HostInfo, SshAccess, SubmitRequest, TaskEvent,
    TaskStatus, chain,
};
use xbee_engine::QueueError;

use crate::export;
use crate::host::Host;
use crate::plan::Plan;
use crate::store::{Owner, StoreError};
use crate::task::TaskHandle;
use crate::translate::PlanError;

/// Shortest prefix of an id that names a task.
const MIN_PREFIX: usize = 4;
/// How long an answer waits for the journal.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// Who asks, as the front door knows for certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The user.
    pub owner: Owner,
}

impl Caller {
    /// Root and the user `xbed` runs as may do everything; others only what is theirs.
    fn may(self, owner: Owner) -> bool {
        let uid = self.owner.uid;
        uid == 0 || uid == owner.uid || uid == rustix::process::geteuid().as_raw()
    }
}

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
    Queue(#[from] QueueError),
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
    /// The store failed.
    #[error("the task could not be written down")]
    Store(#[from] StoreError),
    /// A wish is known and not durable.
    #[error(
        "the end of task {0} is asked for but could not be written down within {limit} s, and is forgotten if xbed ends now: make room on the disk of its data directory if that is full",
        limit = WRITE_LIMIT.as_secs()
    )]
    NotWritten(Uuid),
}

impl CommandError {
    /// Stable code for programs.
    pub fn code(&self) -> &str {
        match self {
            CommandError::NotFound(_) => "task-not-found",
            CommandError::Ambiguous { .. } => "task-ambiguous",
            CommandError::Plan(error) => error.code(),
            CommandError::Queue(QueueError::Full { .. }) => "queue-full",
            CommandError::Queue(_) => "no-capacity",
            CommandError::NotFinal(_) => "task-not-final",
            CommandError::NoDomain(_) => "no-domain",
            CommandError::NoSsh(_) => "no-ssh",
            CommandError::Agent(error) => error.code(),
            CommandError::NotFetched => "image-not-fetched",
            CommandError::Export(error) => error.code(),
            CommandError::Store(error) => error.code(),
            CommandError::NotWritten(_) => "not-written",
        }
    }
}

/// The command layer.
#[derive(Clone)]
pub struct Commands {
    host: Arc<Host>,
}

impl Commands {
    /// Commands of this host.
    pub fn new(host: Arc<Host>) -> Self {
        Commands { host }
    }

    /// What the host is.
    pub fn host(&self) -> HostInfo {
        self.host.info()
    }

    /// Whether a job would be taken.
    pub fn check(&self, request: &SubmitRequest) -> CheckReport {
        let plan = Plan::from_request(request, &self.host.images);
        let refused = match &plan {
            Ok((plan, _)) => self.host.fits(plan.demand()).err().map(|e| e.to_string()),
            Err(error) => Some(chain(error)),
        };
        CheckReport {
            accepted: refused.is_none(),
            reasons: refused.into_iter().collect(),
            warnings: plan.map(|(_, warnings)| warnings).unwrap_or_default(),
        }
    }

    /// Takes a job. When this returns, the task is durable.
    pub async fn submit(
        &self,
        caller: Caller,
        request: SubmitRequest,
    ) -> Result<TaskStatus, CommandError> {
        let (plan, _) = Plan::from_request(&request, &self.host.images)?;
        let task = self.host.accept(caller.owner, request, plan).await?;
        Ok(task.status())
    }

    /// The domain that a job would get.
    pub fn export(
        &self,
        caller: Caller,
        request: &SubmitRequest,
        form: ExportForm,
    ) -> Result<DomainExport, CommandError> {
        let (plan, _) = Plan::from_request(request, &self.host.images)?;
        export::of_job(&self.host, caller.owner, &plan, form)
    }

    /// The domain that a task has now.
    pub async fn export_task(
        &self,
        task: &TaskHandle,
        form: ExportForm,
    ) -> Result<DomainExport, CommandError> {
        export::of_task(&self.host, task, form).await
    }

    /// Tasks of the caller, oldest first.
    pub fn list(&self, caller: Caller, all: bool) -> Vec<TaskStatus> {
        let mut tasks = self.host.tasks();
        tasks.retain(|task| caller.may(task.record.owner) && (all || !task.is_final()));
        tasks.sort_by_key(|task| task.number);
        tasks.iter().map(|task| task.status()).collect()
    }

    /// One task, by its id or the beginning of it.
    pub fn task(&self, caller: Caller, id: &str) -> Result<Arc<TaskHandle>, CommandError> {
        let not_found = || CommandError::NotFound(id.into());
        let prefix = id.to_ascii_lowercase();
        if prefix.len() < MIN_PREFIX {
            return Err(not_found());
        }
        let mut found: Vec<Arc<TaskHandle>> = match Uuid::parse_str(&prefix) {
            Ok(id) => self.host.task(id).into_iter().collect(),
            Err(_) => self.host.tasks_with_prefix(&prefix),
        };
        found.retain(|task| caller.may(task.record.owner));
        match found.len() {
            0 => Err(not_found()),
            1 => found.pop().ok_or_else(not_found),
            count => Err(CommandError::Ambiguous {
                prefix: id.into(),
                count,
            }),
        }
    }

    /// State changes of a task from event `from` on (1 is the first).
    pub fn events(&self, task: &TaskHandle, from: u64) -> Vec<TaskEvent> {
        let mut events = task.events();
        events.retain(|event| event.seq >= from);
        events
    }

    /// Asks for a task's end. When this returns, the wish is durable.
    pub async fn terminate(&self, task: &TaskHandle) -> Result<TaskStatus, CommandError> {
        task.terminate("terminated on request");
        match tokio::time::timeout(WRITE_LIMIT, task.ending()).await {
            Ok(()) => Ok(task.status()),
            Err(_) => Err(CommandError::NotWritten(task.record.id)),
        }
    }

    /// Forgets a task that is over, with its spool.
    pub async fn remove(&self, task: &TaskHandle) -> Result<(), CommandError> {
        if !task.is_final() {
            return Err(CommandError::NotFinal(task.record.id));
        }
        Ok(self.host.forget(task).await?)
    }

    /// The agent in a task's domain.
    pub fn agent(&self, task: &TaskHandle) -> Result<Agent, CommandError> {
        task.agent().ok_or(CommandError::NoDomain(task.record.id))
    }

    /// How to reach a domain by SSH.
    pub fn ssh(&self, task: &TaskHandle) -> Result<SshAccess, CommandError> {
        self.agent(task)?;
        crate::ssh::access(task).ok_or(CommandError::NoSsh(task.record.id))
    }
}
