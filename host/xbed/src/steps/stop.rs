//! Instance-Stopping: results are taken out of the domain, then it is shut down.

use std::time::Duration;

use xbee_engine::Failure;
use xbee_hypervisor::DomainState;

use super::release::keep_console;
use super::{agent, agent_failure, files, hypervisor_failure, run_scripts};
use crate::fault;
use crate::plan::When;
use crate::task::StepContext;

/// Time that processes in the guest have to end by themselves. The task is over by now.
const PROCESS_GRACE: Duration = Duration::from_secs(2);

/// Takes the results and ends the domain, gracefully if there is reason to and the guest plays along.
pub async fn perform(context: &StepContext) -> Result<(), Failure> {
    // Whether the domain still is there no longer matters then.
    if !files::has_results(&context.task.spool) {
        let agent = agent(context).await?;
        let plan = context.task.plan();
        run_scripts(context, &agent, When::Cleanup).await?;
        for (index, file) in plan.stage_out.iter().enumerate() {
            fault::point("take");
            files::take_from_guest(context, &agent, index, file).await?;
        }
        run_scripts(context, &agent, When::PostCleanup).await?;
        files::results_taken(&context.task.spool).await?;
        fault::point("results taken");
        if has_disks(context).await? {
            shut_down(context, &agent).await?;
        }
    }
    keep_console(&context.task).await;
    fault::point("destroy");
    let destroyed = context
        .host
        .hypervisor
        .destroy(context.task.record.id)
        .await;
    fault::point("destroyed");
    destroyed.map_err(|error| hypervisor_failure(&error))
}

/// Whether the guest has more than memory: a system of its own, which may have others to say farewell to. What
/// is in memory only can be switched off.
async fn has_disks(context: &StepContext) -> Result<bool, Failure> {
    let list = context.host.hypervisor.list().await;
    let list = list.map_err(|error| hypervisor_failure(&error))?;
    let id = context.task.record.id;
    Ok(list
        .iter()
        .any(|domain| domain.id == id && !domain.hardware.disks.is_empty()))
}

/// Has the guest switch itself off, or waits until it had time to.
async fn shut_down(context: &StepContext, agent: &xbee_agent::Agent) -> Result<(), Failure> {
    let id = context.task.record.id;
    let hypervisor = &context.host.hypervisor;
    // Subscribed before the guest is asked: its end cannot be missed.
    let mut events = hypervisor.events();
    fault::point("shut down");
    match agent.shutdown(PROCESS_GRACE).await {
        Ok(()) => {}
        Err(error) if error.is_lost() => {}
        Err(error) => return Err(agent_failure("the guest could not be shut down", &error)),
    }
    let stopped = async {
        loop {
            match events.recv().await {
                Ok(event)
                    if event.id == id && matches!(event.state, DomainState::Stopped { .. }) =>
                {
                    return;
                }
                Ok(_) => {}
                // Too many events at once: look instead.
                Err(_) => {
                    let list = hypervisor.list().await.unwrap_or_default();
                    let running = list.iter().any(|domain| {
                        domain.id == id && !matches!(domain.state, DomainState::Stopped { .. })
                    });
                    if !running {
                        return;
                    }
                }
            }
        }
    };
    let grace = context.host.config.shutdown_grace;
    if tokio::time::timeout(grace, stopped).await.is_err() {
        tracing::warn!(task = %id, ?grace, "guest did not switch off in time, forced");
    }
    Ok(())
}
