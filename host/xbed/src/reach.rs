//! What `file:` URIs of a job mean for who asks: files of this host, or of the client's machine.

use std::collections::BTreeMap;

use uuid::Uuid;
use xbee_api::SubmitRequest;
use xbee_staging::{Scheme, Uri};

use crate::command::{Caller, CommandError};
use crate::plan::Plan;

/// What is wanted of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To be a task.
    Take,
    /// To be looked at only: what is to be sent need not have come.
    Look,
}

/// How far a request reaches.
#[derive(Debug)]
pub struct Reach {
    is_remote: bool,
    publishes: bool,
    client_files: bool,
    uploads: BTreeMap<String, Uuid>,
    purpose: Purpose,
}

impl Reach {
    /// That of a request, from which the uploads are taken: the plan has those that are used, and of the jobs of a sweep
    /// each would have all.
    pub fn take(caller: Caller, request: &mut SubmitRequest, purpose: Purpose) -> Reach {
        Reach {
            is_remote: caller.owner.is_remote(),
            publishes: !request.publish.is_empty(),
            client_files: request.client_files,
            uploads: std::mem::take(&mut request.uploads),
            purpose,
        }
    }

    /// Writes into a plan what its `file:` URIs mean. What is only of this host is not for those who are not on it.
    pub fn apply(&self, plan: &mut Plan) -> Result<(), CommandError> {
        if self.is_remote && self.publishes {
            return Err(CommandError::LocalPort);
        }
        let is_here = !self.is_remote && !self.client_files;
        for source in plan.sources_mut() {
            if !is_file(&source.uri) {
                continue;
            }
            source.upload = self.uploads.get(&source.uri).copied();
            let comes = self.client_files && self.purpose == Purpose::Look;
            if source.upload.is_none() && !comes && !is_here {
                return Err(CommandError::LocalFile(source.uri.clone()));
            }
        }
        for file in &mut plan.stage_out {
            if !is_file(&file.uri) {
                continue;
            }
            file.keep = self.client_files;
            if !file.keep && !is_here {
                return Err(CommandError::LocalFile(file.uri.clone()));
            }
        }
        Ok(())
    }
}

/// Whether it names a file of some machine.
pub fn is_file(uri: &str) -> bool {
    let uri = uri.parse::<Uri>();
    uri.is_ok_and(|uri| uri.scheme() == Scheme::File)
}
