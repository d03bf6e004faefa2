//! Stage-Out: results go from the spool to where the job wants them, or stay in it until their owner fetches them.

use std::time::Duration;

use tokio::sync::watch;
use xbee_api::{CreationFlag, ResultFile, chain};
use xbee_engine::Failure;
use xbee_staging::{Creation as Put, PutRequest, Repeatable};

use super::stage_in::{identity, parse_uri, with_progress};
use super::{fail, files, io_failure};
use crate::fault;
use crate::host::log_teardown;
use crate::plan::{Creation, StageOut};
use crate::task::{StepContext, TaskHandle};

/// How long the file system of a destination may take to give half a result back. A release must not hang on it.
const TAKE_BACK_LIMIT: Duration = Duration::from_secs(30);

/// What is kept of a task for its owner, bytes: as much as a file has that is fetched.
const KEPT_MAX_BYTES: u64 = 64 << 30;
/// What is kept of all tasks of a user that are over, bytes.
const USER_KEPT_MAX_BYTES: u64 = 256 << 30;

/// Sends every result, or keeps it. Repeated after an interruption, it goes on where it was.
pub async fn perform(context: &StepContext) -> Result<(), Failure> {
    look_for_room(context).await?;
    for (index, file) in context.task.plan().stage_out.iter().enumerate() {
        if file.keep {
            fault::point("keep");
            let spool = context.task.spool.clone();
            let kept = blocking(move || files::keep(&spool, index)).await;
            kept.map_err(|error| io_failure(&file.path, &error))?;
            fault::point("kept");
            continue;
        }
        let request = request(context, index, file)?;
        fault::point("put");
        let (progress, seen) = watch::channel(xbee_staging::Progress::default());
        let transfer = context.host.stager.put(request, progress, &context.cancel);
        let sent = with_progress(context, &file.uri, seen, transfer).await;
        sent.map_err(|error| fail(error.code(), chain(&error)))?;
        fault::point("sent");
    }
    Ok(())
}

/// Whether what is to be kept is not too much.
async fn look_for_room(context: &StepContext) -> Result<(), Failure> {
    let context = context.clone();
    let (own, others) = blocking(move || {
        let own = files::result_bytes(&context.task.spool, context.task.plan());
        let owner = context.task.record.owner;
        let tasks = context.host.tasks().into_iter();
        let others = tasks.filter(|task| own > 0 && task.record.owner == owner);
        Ok((own, others.map(|task| task.kept_bytes()).sum::<u64>()))
    })
    .await
    .map_err(|error| io_failure("the results", &error))?;
    if own > KEPT_MAX_BYTES {
        return Err(fail(
            "results-too-large",
            format!(
                "its results have {own} bytes, and at most {KEPT_MAX_BYTES} are kept until they are fetched: bring them to a server"
            ),
        ));
    }
    if own > 0 && own + others > USER_KEPT_MAX_BYTES {
        return Err(fail(
            "results-full",
            format!(
                "its results have {own} bytes, those of other tasks of yours {others}, and at most {USER_KEPT_MAX_BYTES} are kept of a user: `xbe rm` those that you have fetched"
            ),
        ));
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|panic| Err(std::io::Error::other(panic)))
}

/// The results that a task keeps.
pub async fn kept_results(task: &TaskHandle) -> Vec<ResultFile> {
    let mut results = vec![];
    let files = task.job().map_or(&[][..], |job| &job.plan.stage_out);
    for (number, file) in (0..).zip(files) {
        if !file.keep {
            continue;
        }
        // What is not there was not made.
        if let Ok(meta) = tokio::fs::metadata(files::kept(&task.spool, number)).await {
            results.push(ResultFile {
                number,
                uri: file.uri.clone(),
                creation: match file.creation {
                    Creation::Overwrite => CreationFlag::Overwrite,
                    Creation::Append => CreationFlag::Append,
                    Creation::DontOverwrite => CreationFlag::DontOverwrite,
                },
                bytes: meta.len(),
            });
        }
    }
    results
}

/// Takes back what an interruption left half at the results' destinations, if they are not sent again.
pub async fn take_back(context: &StepContext) {
    for (index, file) in context.task.plan().stage_out.iter().enumerate() {
        if file.keep {
            continue;
        }
        // What cannot be asked for was not sent.
        let Ok(request) = request(context, index, file) else {
            continue;
        };
        let taken = context.host.stager.take_back(request);
        match tokio::time::timeout(TAKE_BACK_LIMIT, taken).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log_teardown("half a result not taken back", &error),
            Err(late) => log_teardown("half a result not taken back", &late),
        }
    }
}

fn request(context: &StepContext, index: usize, file: &StageOut) -> Result<PutRequest, Failure> {
    let task = &context.task;
    Ok(PutRequest {
        uri: parse_uri(&file.uri)?,
        source: files::result(&task.spool, index),
        creation: match file.creation {
            Creation::Overwrite => Put::Overwrite,
            Creation::Append => Put::Append,
            Creation::DontOverwrite => Put::DontOverwrite,
        },
        identity: identity(context),
        repeatable: Some(Repeatable {
            note: files::put_note(&task.spool, index),
            name: format!("{}-{index}", task.record.id),
        }),
    })
}
