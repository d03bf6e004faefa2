//! Executing: the task runs in the guest.

use std::time::Duration;

use xbee_agent::Agent;
use xbee_agent::protocol::{EndCause, Execute, ExitStatus, Exited, Limits, Variable};
use xbee_engine::Failure;

use super::{agent, agent_failure, fail, session};
use crate::exec::exit_code;
use crate::fault;
use crate::plan::{Command, Work};
use crate::session::Progress;
use crate::task::StepContext;

/// How much longer than the grace a task may take to be gone after KILL.
const KILL_MARGIN: Duration = Duration::from_secs(5);

/// Runs the task to its end, or until the step is cancelled: then the task's processes get TERM
/// and, after the grace, KILL.
pub async fn perform(context: &StepContext) -> Result<Option<i32>, Failure> {
    match &context.task.plan().work {
        Work::Command(command) => {
            tokio::select! {
                ended = run(context, command) => ended.map(Some),
                () = context.cancel.cancelled() => {
                    terminate(context).await;
                    Err(fail("cancelled", "cancelled"))
                }
            }
        }
        Work::Continuous => {
            let session = session(context).await?;
            tokio::select! {
                failure = session.lost() => Err(failure),
                () = context.cancel.cancelled() => Err(fail("cancelled", "cancelled")),
            }
        }
        Work::Nothing => Ok(None),
    }
}

async fn run(context: &StepContext, command: &Command) -> Result<i32, Failure> {
    let id = context.task.record.id;
    let mut progress = session(context).await?.progress();
    // The agent knows the conversation: asked again after an interruption, it runs nothing twice.
    // A connection lost in between is waited for; the session says when to give up.
    loop {
        let agent = agent(context).await?;
        fault::point("execute");
        match agent.execute(request(id, command)).await {
            Ok(_) => {
                fault::point("executing");
                break;
            }
            Err(error) if error.is_lost() => drop_contact(context, agent).await?,
            Err(error) => return Err(agent_failure("the task could not be started", &error)),
        }
    }
    loop {
        match progress.borrow_and_update().clone() {
            Progress::Open => {}
            Progress::Exited(exited) => return ended(command, &exited),
            Progress::Failed(failure) => return Err(failure),
        }
        if progress.changed().await.is_err() {
            return Err(fail("internal", "the session ended without a word"));
        }
    }
}

/// Waits until a connection that is known to be lost is no longer offered.
pub(super) async fn drop_contact(context: &StepContext, lost: Agent) -> Result<(), Failure> {
    let mut agent = context.task.agent.subscribe();
    let session = session(context).await?;
    let is_other = |now: &Option<Agent>| now.as_ref().is_none_or(|now| !now.is_same(&lost));
    tokio::select! {
        // The handle keeps the sender.
        _ = agent.wait_for(is_other) => Ok(()),
        failure = session.lost() => Err(failure),
    }
}

/// A task that a limit ended has failed; any other end is its own affair.
fn ended(command: &Command, exited: &Exited) -> Result<i32, Failure> {
    let limits = &command.limits;
    let (code, text) = match (exited.cause, exited.status) {
        (Some(EndCause::WallClockLimit), _) => {
            let limit = limits.wall_seconds.unwrap_or_default();
            let text = format!("the task was ended after its WallTimeLimit of {limit} s");
            ("wall-time-limit", text)
        }
        (Some(EndCause::MemoryLimit), _) => {
            let text = match limits.memory_bytes {
                Some(limit) => format!(
                    "the task was ended when it wanted more than its MemoryLimit of {limit} bytes"
                ),
                None => "the task was ended when it wanted more memory than its machine has: ask for more \
                         (TotalPhysicalMemory, or `xbe run --memory`)"
                    .to_owned(),
            };
            ("memory-limit", text)
        }
        (Some(EndCause::ProcessLimit), status) => {
            let code = exit_code(status);
            let limit = match limits.processes {
                Some(limit) => format!("its ProcessCountLimit of {limit}"),
                None => "what the memory of its machine allows".to_owned(),
            };
            let text = format!(
                "the task failed with exit code {code} after it was refused a process or thread beyond {limit}"
            );
            ("process-count-limit", text)
        }
        (
            None,
            ExitStatus::Signal {
                signal: SIGXCPU, ..
            },
        ) if limits.cpu_seconds.is_some() => {
            let limit = limits.cpu_seconds.unwrap_or_default();
            let text = format!("the task was ended after its CPUTimeLimit of {limit} s");
            ("cpu-time-limit", text)
        }
        (
            None,
            ExitStatus::Signal {
                signal: SIGXFSZ, ..
            },
        ) if limits.file_size_bytes.is_some() => {
            let limit = limits.file_size_bytes.unwrap_or_default();
            let text = format!(
                "the task was ended when it wrote a file beyond its FileSizeLimit of {limit} bytes"
            );
            ("file-size-limit", text)
        }
        (_, status) => return Ok(exit_code(status)),
    };
    Err(fail(code, text))
}

/// Signals with which Linux ends a process at its limit (signal(7)).
const SIGXCPU: i32 = 24;
const SIGXFSZ: i32 = 25;

async fn terminate(context: &StepContext) {
    let Some(agent) = context.task.agent() else {
        return;
    };
    let grace = context.host.config.terminate_grace;
    fault::point("terminate task");
    let ended = agent.terminate_task(context.task.record.id, grace);
    match tokio::time::timeout(grace + KILL_MARGIN, ended).await {
        Ok(Ok(())) => {}
        // The domain is destroyed next, which ends the task in any case.
        Ok(Err(error)) => crate::host::log_teardown("task not terminated by its agent", &error),
        Err(elapsed) => crate::host::log_teardown("task not terminated by its agent", &elapsed),
    }
}

fn request(conversation: uuid::Uuid, command: &Command) -> Execute {
    let limits = &command.limits;
    Execute {
        conversation,
        argv: command.argv.clone(),
        environment: command
            .environment
            .iter()
            .map(|(name, value)| Variable {
                name: name.clone(),
                value: value.clone(),
            })
            .collect(),
        working_directory: Some(command.working_directory.clone()),
        stdin: command.input.clone(),
        stdout: command.output.clone(),
        stderr: command.error.clone(),
        user: command.user.clone(),
        group: command.group.clone(),
        umask: None,
        limits: Limits {
            cpu_seconds: limits.cpu_seconds,
            file_size_bytes: limits.file_size_bytes,
            core_bytes: limits.core_bytes,
            data_bytes: limits.data_bytes,
            stack_bytes: limits.stack_bytes,
            open_files: limits.open_files,
            processes: limits.processes,
            address_space_bytes: limits.address_space_bytes,
            locked_memory_bytes: limits.locked_memory_bytes,
            memory_bytes: limits.memory_bytes,
            wall_clock_ms: limits.wall_seconds.map(|s| s.saturating_mul(1000)),
        },
    }
}
