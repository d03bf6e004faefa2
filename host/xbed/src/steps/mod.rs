//! The steps of a task. Each can be performed again after a crash; what they made is undone by
//! [`release`].

mod attempt;
mod cached;
mod execute;
mod files;
mod release;
mod stage_in;
mod stage_out;
mod start;
mod stop;

use std::time::Duration;

use tokio::io::AsyncReadExt;
use uuid::Uuid;
use xbee_agent::protocol::{EndCause, Execute, ExitStatus, Limits};
use xbee_agent::{Agent, CONNECTION_CODES, ExecSpec, StreamReader};
use xbee_api::chain;
use xbee_engine::{Failure, Step};

use crate::exec::exit_code;
use crate::fault;
use crate::plan::When;
use crate::session::{Session, script_conversation};
use crate::task::StepContext;

pub use files::{has_results, kept as kept_result, result_bytes};
pub use release::{has_temporary, release, remove_temporary};
pub use stage_in::BootFiles;
pub use stage_out::kept_results;
pub use start::{Identity, address, domain};

/// Where scripts are put in the guest.
const SCRIPT_DIRECTORY: &str = "/tmp/xbee-scripts";
/// How much of a script's standard error is quoted, bytes.
const QUOTED_BYTES: u64 = 2048;
/// How long it may take until the end of a domain is heard of, after that of the connection to its agent.
const END_LIMIT: Duration = Duration::from_secs(5);
/// How long a script may take.
const SCRIPT_TIMEOUT: Duration = Duration::from_secs(600);

/// Carries out a step; the exit code is that of the task, given by [`Step::Execute`].
pub async fn perform(step: Step, context: &StepContext) -> Result<Option<i32>, Failure> {
    match step {
        Step::StageIn => stage_in::perform(context).await?,
        Step::Start => {
            stage_in::renew(context).await?;
            until_cancelled(context, start::perform(context)).await?;
        }
        Step::Execute => return execute::perform(context).await,
        Step::Stop => until_cancelled(context, stop::perform(context)).await?,
        Step::StageOut => stage_out::perform(context).await?,
    }
    Ok(None)
}

/// For steps that may be dropped at any point.
async fn until_cancelled<T>(
    context: &StepContext,
    step: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    tokio::select! {
        () = context.cancel.cancelled() => Err(fail("cancelled", "cancelled")),
        done = step => match done {
            Err(failure) if CONNECTION_CODES.contains(&failure.code.as_str()) => {
                Err(domains_end(context).await.unwrap_or(failure))
            }
            done => done,
        },
    }
}

/// The end of the domain, if the connection broke with it.
async fn domains_end(context: &StepContext) -> Option<Failure> {
    let session = context.session.get()?;
    let ended = tokio::time::timeout(END_LIMIT, session.lost()).await;
    ended.ok()
}

fn fail(code: &str, reason: impl Into<String>) -> Failure {
    Failure {
        code: code.into(),
        reason: reason.into(),
    }
}

fn hypervisor_failure(error: &xbee_hypervisor::Error) -> Failure {
    fail(error.code(), chain(error))
}

/// An agent's failure, with what was tried.
fn agent_failure(what: &str, error: &xbee_agent::Error) -> Failure {
    fail(error.code(), format!("{what}: {}", chain(error)))
}

fn io_failure(what: impl std::fmt::Display, error: &std::io::Error) -> Failure {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    let code = match error.kind() {
        StorageFull | QuotaExceeded => "disk-full",
        _ => "host-io",
    };
    fail(code, format!("{what}: {error}"))
}

/// The session of the task's domain; opened if this is the first step that needs it. Its agent was heard of before.
async fn session(context: &StepContext) -> Result<&Session, Failure> {
    let open = || Session::open(context.host.clone(), context.task.clone(), None);
    context.session.get_or_try_init(open).await
}

/// The agent, as soon as there is a connection to it.
async fn agent(context: &StepContext) -> Result<Agent, Failure> {
    session(context).await?.agent(&context.task).await
}

/// Runs the scripts of one occasion in the guest. A clean-up script, whose domain may have been taken up again,
/// runs once.
async fn run_scripts(context: &StepContext, agent: &Agent, when: When) -> Result<(), Failure> {
    for (index, _) in context.task.plan().scripts_at(when) {
        let path = format!("{SCRIPT_DIRECTORY}/{index}-{}", when.name());
        let spool = files::script(&context.task.spool, index);
        files::put(agent, &spool, &path, 0o755).await?;
        let argv = vec![path, "/".into()];
        let what = format!("the {} script", when.name());
        fault::point("script");
        let (status, quoted) = if when.is_clean_up() {
            let conversation = script_conversation(context.task.record.id, index);
            run_once(context, conversation, argv, &what).await?
        } else {
            run_script(agent, argv, &what).await?
        };
        fault::point("script ran");
        let code = exit_code(status);
        if code != 0 {
            let text = xbee_agent::protocol::sanitise(
                String::from_utf8_lossy(&quoted).trim(),
                quoted.len(),
            );
            return Err(fail(
                "script-failed",
                format!("{what} ended with exit code {code}: {text}"),
            ));
        }
    }
    Ok(())
}

fn script_timeout(what: &str) -> Failure {
    let seconds = SCRIPT_TIMEOUT.as_secs();
    fail(
        "script-timeout",
        format!("{what} did not end within {seconds} s"),
    )
}

/// Runs a script, which ends with the connection.
async fn run_script(
    agent: &Agent,
    argv: Vec<String>,
    what: &str,
) -> Result<(ExitStatus, Vec<u8>), Failure> {
    let spec = ExecSpec {
        argv,
        ..ExecSpec::default()
    };
    let run = async {
        let mut process = agent.exec(spec).await?;
        drop(process.stdin.take());
        let (stdout, stderr) = (process.stdout.take(), process.stderr.take());
        let (_, quoted) = tokio::join!(beginning(stdout, 0), beginning(stderr, QUOTED_BYTES));
        Ok::<_, xbee_agent::Error>((process.wait().await?, quoted))
    };
    tokio::time::timeout(SCRIPT_TIMEOUT, run)
        .await
        .map_err(|_| script_timeout(what))?
        .map_err(|error| agent_failure(what, &error))
}

/// Runs a script in a conversation: asked again after an interruption, the agent goes on with the one that runs,
/// or tells how it ended.
async fn run_once(
    context: &StepContext,
    conversation: Uuid,
    argv: Vec<String>,
    what: &str,
) -> Result<(ExitStatus, Vec<u8>), Failure> {
    let mut scripts = session(context).await?.scripts();
    loop {
        let agent = agent(context).await?;
        let limits = Limits {
            wall_clock_ms: Some(SCRIPT_TIMEOUT.as_secs() * 1000),
            ..Limits::default()
        };
        let script = Execute {
            conversation,
            argv: argv.clone(),
            environment: vec![],
            working_directory: None,
            stdin: None,
            stdout: None,
            stderr: None,
            user: None,
            group: None,
            umask: None,
            limits,
        };
        match agent.execute(script).await {
            Ok(_) => break,
            Err(error) if error.is_lost() => execute::drop_contact(context, agent).await?,
            Err(error) => return Err(agent_failure(what, &error)),
        }
    }
    fault::point("script runs");
    let run = scripts
        .wait_for(|runs| runs.get(&conversation).is_some_and(|run| run.end.is_some()))
        .await
        .map(|runs| runs[&conversation].clone())
        // The session ends when the domain does, or says nothing any more.
        .map_err(|_| fail("domain-lost", format!("the domain was lost during {what}")))?;
    match run.end {
        Some(Ok(exited)) if exited.cause == Some(EndCause::WallClockLimit) => {
            Err(script_timeout(what))
        }
        Some(Ok(exited)) => Ok((exited.status, run.quoted)),
        Some(Err(failure)) => Err(fail(&failure.code, format!("{what}: {}", failure.reason))),
        None => Err(fail("internal", "a script ended without a word")),
    }
}

/// The first bytes of a stream; the rest is read and dropped, so that the writer is not held up.
async fn beginning(stream: Option<StreamReader>, bytes: u64) -> Vec<u8> {
    let mut kept = vec![];
    if let Some(stream) = stream {
        let mut limited = stream.take(bytes);
        // A stream that breaks off ends the command too, and that is reported.
        let _ = limited.read_to_end(&mut kept).await;
        let _ = tokio::io::copy(&mut limited.into_inner(), &mut tokio::io::sink()).await;
    }
    kept
}
