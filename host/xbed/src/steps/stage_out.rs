//! Stage-Out: results go from the spool to where the job wants them.

use tokio::sync::watch;
use xbee_api::chain;
use xbee_engine::Failure;
use xbee_staging::{Creation as Put, PutRequest};

use super::stage_in::{identity, parse_uri, with_progress};
use super::{fail, files};
use crate::fault;
use crate::plan::Creation;
use crate::task::StepContext;

/// Sends every result. Repeated after an interruption, it sends all of them again.
pub async fn perform(context: &StepContext) -> Result<(), Failure> {
    for (index, file) in context.task.plan().stage_out.iter().enumerate() {
        let request = PutRequest {
            uri: parse_uri(&file.uri)?,
            source: files::result(&context.task.spool, index),
            creation: match file.creation {
                Creation::Overwrite => Put::Overwrite,
                Creation::Append => Put::Append,
                Creation::DontOverwrite => Put::DontOverwrite,
            },
            identity: identity(context),
        };
        fault::point("put");
        let (progress, seen) = watch::channel(xbee_staging::Progress::default());
        let transfer = context.host.stager.put(request, progress, &context.cancel);
        let sent = with_progress(context, &file.uri, seen, transfer).await;
        sent.map_err(|error| fail(error.code(), chain(&error)))?;
        fault::point("sent");
    }
    Ok(())
}
