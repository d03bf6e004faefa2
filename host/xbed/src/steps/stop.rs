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
        let plan = context.task.plan();
        run_scripts(context, &agent(context).await?, When::Cleanup).await?;
        for (index, file) in plan.stage_out.iter().enumerate() {
            fault::point("take");
            files::take_from_guest(context, index, file).await?;
        }
        // There may be another connection by now.
        let agent = agent(context).await?;
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use clap::Parser;
    use xbee_api::{State, SubmitRequest, TaskStatus};
    use xbee_hypervisor::sim::{SimConfig, SimEvent, SimHost, SimHypervisor};
    use xbee_staging::{Limits, Stager};

    use crate::command::{Caller, Commands};
    use crate::config::{Config, Options};
    use crate::host::Host;
    use crate::steps::files;
    use crate::store::Owner;

    /// So long that something can happen while it is taken out.
    const RESULT_BYTES: usize = 48 << 20;

    /// Stages a file in and out again; something happens while it comes out.
    async fn disturbed(event: SimEvent) -> (TaskStatus, bool) {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let options = ["xbed", "--backend", "sim", "--data", data.to_str().unwrap()];
        let config = Config::load(Options::parse_from(options)).unwrap();
        let sim = SimHost::new(SimConfig::new(config.domains()));
        let hypervisor = Arc::new(SimHypervisor::new(sim.clone()));
        let host = Host::open(config, hypervisor, Stager::new(Limits::default()));
        let host = host.await.unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let content: Vec<u8> = (0..RESULT_BYTES).map(|n| (n >> 8) as u8).collect();
        std::fs::write(&from, &content).unwrap();
        let jsdl = format!(
            r#"<jsdl:JobDefinition xmlns:jsdl="http://schemas.ggf.org/jsdl/2005/11/jsdl" xmlns:posix="http://schemas.ggf.org/jsdl/2005/11/jsdl-posix">
<jsdl:JobDescription><jsdl:Application><posix:POSIXApplication><posix:Executable>true</posix:Executable></posix:POSIXApplication></jsdl:Application>
<jsdl:DataStaging><jsdl:FileName>in</jsdl:FileName><jsdl:CreationFlag>overwrite</jsdl:CreationFlag><jsdl:Source><jsdl:URI>file://{}</jsdl:URI></jsdl:Source><jsdl:Target><jsdl:URI>file://{}</jsdl:URI></jsdl:Target></jsdl:DataStaging>
</jsdl:JobDescription></jsdl:JobDefinition>"#,
            from.display(),
            to.display()
        );
        let caller = Caller {
            owner: Owner {
                uid: rustix::process::geteuid().as_raw(),
                gid: rustix::process::getegid().as_raw(),
            },
        };
        let request = SubmitRequest {
            jsdl,
            ..SubmitRequest::default()
        };
        let id = Commands::new(host.clone())
            .submit(caller, request)
            .await
            .unwrap()
            .id;
        let task = host.task(id).unwrap();
        let taken = files::result(&task.spool, 0);
        let mut event = Some(event);
        while !task.is_final() {
            let bytes = std::fs::metadata(&taken).map_or(0, |meta| meta.len());
            if bytes > 0
                && let Some(event) = event.take()
            {
                assert!(bytes < RESULT_BYTES as u64, "it happens too late");
                sim.inject(id, event).unwrap();
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        assert_eq!(event, None, "it never happened");
        let same = std::fs::read(&to).is_ok_and(|there| there == content);
        (task.status(), same)
    }

    #[tokio::test]
    async fn a_result_is_taken_again_over_a_new_connection() {
        let (status, same) = disturbed(SimEvent::DropConnection).await;
        assert_eq!(status.state, State::Finished, "{:?}", status.reason);
        assert!(same, "the result is another one");
    }

    #[tokio::test]
    async fn a_domain_that_is_lost_with_its_results_is_said_to_be() {
        let detail = "killed".to_owned();
        let (status, _) = disturbed(SimEvent::Crash { detail }).await;
        assert_eq!(status.reason_code.as_deref(), Some("domain-lost"));
    }
}
