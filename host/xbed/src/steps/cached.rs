//! What a task has of the cache: files that it names, and images that were fetched for another before.

use std::path::{Path, PathBuf};

use uuid::Uuid;
use xbee_api::{CACHE_SCHEME, chain};
use xbee_engine::Failure;
use xbee_staging::{Compression, Destination, Digest, FetchRequest, Identity};

use super::fail;
use super::stage_in::{file_uri, transfer, with_progress};
use crate::cache::{self, Asked, CacheError, Room, Wanted};
use crate::fault;
use crate::task::StepContext;

/// Times that an image is asked for which is removed again before it is used.
const ATTEMPTS: u32 = 3;

fn failed(error: &CacheError) -> Failure {
    fail(error.code(), chain(error))
}

/// Puts the content of an entry that the task names where it is to be.
pub async fn entry(
    context: &StepContext,
    id: Uuid,
    hash: Option<Digest>,
    compression: Option<Compression>,
    destination: Destination,
) -> Result<(), Failure> {
    let host = context.host.clone();
    let owner = context.task.record.owner.uid;
    let whole = cache::blocking(move || host.cache.whole(&host.store, owner, id));
    if whole.await.is_none() {
        return Err(failed(&CacheError::NotFound(id.to_string())));
    }
    let plain_file = match (&destination, compression) {
        (Destination::File(to), None) => Some(to.clone()),
        _ => None,
    };
    if plain_file.is_none() || hash.is_some() {
        let request = FetchRequest {
            uri: file_uri(&context.host.cache.path(id))?,
            hash,
            compression,
            destination: match plain_file {
                Some(_) => Destination::Verify,
                None => destination,
            },
            identity: Identity::current(),
        };
        of_own(context, &format!("{CACHE_SCHEME}{id}"), request).await?;
    }
    if let Some(to) = plain_file
        && !link(context, id, to).await?
    {
        return Err(failed(&CacheError::NotFound(id.to_string())));
    }
    Ok(())
}

/// Reads a file of xbed's own that came from elsewhere.
async fn of_own(context: &StepContext, shown: &str, request: FetchRequest) -> Result<(), Failure> {
    let fetched = transfer(context, shown, request).await;
    fetched.map_err(|error| fail(error.code(), format!("{shown}: {}", chain(error.kind()))))
}

async fn link(context: &StepContext, id: Uuid, to: PathBuf) -> Result<bool, Failure> {
    let host = context.host.clone();
    let linked = cache::blocking(move || host.cache.link(&host.store, id, &to)).await;
    linked.map_err(|error| failed(&error))
}

/// Puts an image into the spool by way of the cache: it is fetched unless it is there, and asked for if it may have changed.
/// False: it was removed again and again before it could be used.
pub async fn image(context: &StepContext, wanted: Wanted, to: &Path) -> Result<bool, Failure> {
    for _ in 0..ATTEMPTS {
        let asked = cache::ask(&context.host, wanted.clone(), false).await;
        let (id, waiter) = match asked.map_err(|error| failed(&error))? {
            Asked::Here(id) => (id, None),
            Asked::Coming(waiter) => {
                let ended = async {
                    tokio::select! {
                        ended = waiter.ended() => Some(ended),
                        () = context.cancel.cancelled() => None,
                    }
                };
                let ended = with_progress(context, &wanted.text, waiter.progress(), ended);
                let Some(ended) = ended.await else {
                    waiter.leave().await;
                    let uri = wanted.uri.to_string();
                    return Err(failed(&CacheError::Cancelled(uri)));
                };
                (ended.map_err(|error| failed(&error))?, Some(waiter))
            }
        };
        fault::point("cache link");
        let linked = link(context, id, to.into()).await?;
        // Until now it could not be evicted.
        drop(waiter);
        let host = context.host.clone();
        cache::blocking(move || host.cache.forget_too_large(&host.store, id)).await;
        cache::make_room(&context.host, Room::Limits).await;
        if linked {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Unpacks an archive that is kept as it comes, packed; `archive` is where it is meanwhile. False as with [`image`].
pub async fn package(
    context: &StepContext,
    wanted: Wanted,
    archive: &Path,
    to: PathBuf,
) -> Result<bool, Failure> {
    let (shown, compression) = (wanted.uri.to_string(), wanted.compression);
    let packed = Wanted {
        compression: None,
        ..wanted
    };
    if !image(context, packed, archive).await? {
        return Ok(false);
    }
    let request = FetchRequest {
        uri: file_uri(archive)?,
        hash: None,
        compression,
        destination: Destination::Unpack(to),
        identity: Identity::current(),
    };
    of_own(context, &shown, request).await?;
    Ok(true)
}
