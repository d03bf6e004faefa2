//! Stage-Out: results go from the spool to where the job wants them.

use std::time::Duration;

use tokio::sync::watch;
use xbee_api::chain;
use xbee_engine::Failure;
use xbee_staging::{Creation as Put, PutRequest, Repeatable};

use super::stage_in::{identity, parse_uri, with_progress};
use super::{fail, files};
use crate::fault;
use crate::host::log_teardown;
use crate::plan::{Creation, StageOut};
use crate::task::StepContext;

/// How long the file system of a destination may take to give half a result back. A release must not hang on it.
const TAKE_BACK_LIMIT: Duration = Duration::from_secs(30);

/// Sends every result. Repeated after an interruption, it goes on where it was.
pub async fn perform(context: &StepContext) -> Result<(), Failure> {
    for (index, file) in context.task.plan().stage_out.iter().enumerate() {
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

/// Takes back what an interruption left half at the results' destinations, if they are not sent again.
pub async fn take_back(context: &StepContext) {
    for (index, file) in context.task.plan().stage_out.iter().enumerate() {
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
