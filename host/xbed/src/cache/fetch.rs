//! Fetching into the cache: at most once at a time for each file and user, however many wait for it.

use std::sync::{Arc, Weak};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use xbee_api::chain;
use xbee_staging::{
    Compression, Destination, Digest, FetchRequest, Identity, Progress, Scheme, Uri, Validators,
};

use super::{CacheError, Held, Room};
use crate::fault;
use crate::host::Host;
use crate::store::Owner;

/// Files that are fetched for one user at a time because they asked for that alone.
const ASKED_AT_A_TIME: usize = 8;

/// What somebody wants to have in the cache.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Who.
    pub owner: Owner,
    /// From where, as it was written, credentials included.
    pub text: String,
    /// From where.
    pub uri: Uri,
    /// What it must be, as it comes.
    pub hash: Option<Digest>,
    /// How it comes.
    pub compression: Option<Compression>,
}

impl Wanted {
    /// Two with the same key and owner want the same.
    pub fn key(&self) -> String {
        use sha2::{Digest as _, Sha256};
        let hash = self.hash.as_ref().map(|hash| format!("{hash:?}"));
        let parts = (&self.text, hash, self.compression.map(|c| format!("{c:?}")));
        let digest = Sha256::digest(format!("{parts:?}"));
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Whether an image from there is taken through the cache: its content is known by a hash, or the server can be asked whether
/// it has changed.
pub fn serves(uri: &Uri, hash: Option<&Digest>) -> bool {
    match uri.scheme() {
        Scheme::Http | Scheme::Https => true,
        Scheme::Ftp => hash.is_some(),
        // Used in place, or with rights that may be others tomorrow.
        Scheme::File => false,
    }
}

type Outcome = Result<Uuid, CacheError>;

/// A fetch under way.
#[derive(Debug)]
pub(super) struct Flight {
    /// The entry that it makes, and the one that it may find unchanged.
    ids: (Uuid, Option<Uuid>),
    progress: watch::Receiver<Progress>,
    outcome: watch::Receiver<Option<Outcome>>,
    cancel: CancellationToken,
}

impl Flight {
    pub(super) fn ids(&self) -> impl Iterator<Item = Uuid> + use<> {
        std::iter::once(self.ids.0).chain(self.ids.1)
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // The last who waited has gone.
        self.cancel.cancel();
    }
}

/// Somebody who waits for a fetch. The entry is not evicted while it lives.
#[derive(Debug)]
pub struct Waiter {
    flight: Arc<Flight>,
    uri: String,
    /// The fetch began with this one.
    is_first: bool,
}

impl Waiter {
    /// What it is, without credentials.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The fetch began with this one.
    pub fn is_first(&self) -> bool {
        self.is_first
    }

    /// How far it is.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.flight.progress.clone()
    }

    /// The entry, when it is there. Cancel safe.
    pub async fn ended(&self) -> Outcome {
        let mut outcome = self.flight.outcome.clone();
        let ended = outcome.wait_for(Option::is_some).await;
        let ended = ended.ok().and_then(|ended| ended.clone());
        ended.unwrap_or_else(|| Err(CacheError::Cancelled(self.uri.clone())))
    }

    /// Waits no more. If nobody else does, the fetch ends, and this returns when it has.
    pub async fn leave(self) {
        let mut outcome = self.flight.outcome.clone();
        if let Some(flight) = Arc::into_inner(self.flight) {
            drop(flight);
            // It has an end of its own, or its sender is gone: both are the end.
            let _ = outcome.wait_for(Option::is_some).await;
        }
    }
}

/// An answer to who wants a file.
#[derive(Debug)]
pub enum Asked {
    /// It is there, with a content that is known to be right.
    Here(Uuid),
    /// It is fetched, or the server is asked for a newer one.
    Coming(Waiter),
}

/// Asks for a file. `is_asked`: by a user for its own sake; tasks are bounded otherwise.
pub async fn ask(host: &Arc<Host>, wanted: Wanted, is_asked: bool) -> Result<Asked, CacheError> {
    if !host.cache.is_on() {
        return Err(CacheError::Off);
    }
    let key = (wanted.owner.uid, wanted.key());
    let (on, of) = (host.clone(), key.clone());
    let found = blocking(move || on.cache.look_up(&on.store, of.0, &of.1)).await;
    if let (Some(held), Some(_)) = (&found, &wanted.hash) {
        return Ok(Asked::Here(held.entry.id));
    }
    let uri = wanted.uri.to_string();
    let mut state = host.cache.lock();
    let under_way = state.flights.get(&key).and_then(Weak::upgrade);
    if let Some(flight) = under_way.filter(|flight| flight.outcome.borrow().is_none()) {
        return Ok(Asked::Coming(Waiter {
            flight,
            uri,
            is_first: false,
        }));
    }
    state.flights.retain(|_, flight| flight.strong_count() > 0);
    let of_one = state.flights.keys().filter(|(owner, _)| *owner == key.0);
    if is_asked && of_one.count() >= ASKED_AT_A_TIME {
        return Err(CacheError::Busy(ASKED_AT_A_TIME));
    }
    let (progress, seen) = watch::channel(Progress::default());
    let (end, outcome) = watch::channel(None);
    let flight = Arc::new(Flight {
        ids: (Uuid::new_v4(), found.as_ref().map(|held| held.entry.id)),
        progress: seen,
        outcome,
        cancel: CancellationToken::new(),
    });
    state.flights.insert(key, Arc::downgrade(&flight));
    let fetch = Fetch {
        host: host.clone(),
        wanted,
        id: flight.ids.0,
        known: found,
        progress,
        cancel: flight.cancel.clone(),
    };
    tokio::spawn(async move {
        let outcome = fetch.run().await;
        end.send_replace(Some(outcome));
    });
    Ok(Asked::Coming(Waiter {
        flight,
        uri,
        is_first: true,
    }))
}

/// Runs what waits for the disk beside the runtime.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}

/// Removes entries until there is room; says whether any was. None goes that a task names or has.
pub async fn make_room(host: &Arc<Host>, room: Room) -> bool {
    if !host.cache.is_on() || host.cache.has(room) {
        return false;
    }
    let (host, spared) = (host.clone(), host.cached_names());
    blocking(move || host.cache.evict(&host.store, &spared, room)).await
}

struct Fetch {
    host: Arc<Host>,
    wanted: Wanted,
    id: Uuid,
    known: Option<Held>,
    progress: watch::Sender<Progress>,
    cancel: CancellationToken,
}

impl Fetch {
    async fn run(self) -> Outcome {
        fault::point("cache fetch");
        let mut fetched = self.fetch().await;
        if fetched
            .as_ref()
            .is_err_and(|error| error.code() == "disk-full")
        {
            // As many as come; of what is unpacked nobody knows.
            let bytes = self.progress.borrow().total_bytes;
            let bytes = bytes.filter(|_| self.wanted.compression.is_none());
            if make_room(&self.host, Room::Disk(bytes)).await {
                fetched = self.fetch().await;
            }
        }
        let fetched = fetched.map_err(|error| match error.code() {
            "cancelled" => CacheError::Cancelled(self.wanted.uri.to_string()),
            _ => CacheError::Fetch(Arc::new(error)),
        })?;
        let (Some(fetched), host, id) = (fetched, self.host, self.id) else {
            let known = self.known.map(|held| held.entry.id);
            return known.ok_or_else(|| CacheError::NotFound(self.wanted.uri.to_string()));
        };
        fault::point("cache fetched");
        let wanted = self.wanted;
        blocking(move || host.cache.keep(&host.store, &wanted, id, &fetched)).await?;
        Ok(id)
    }

    async fn fetch(&self) -> Result<Option<xbee_staging::Fetched>, xbee_staging::Error> {
        let owner = self.wanted.owner;
        let request = FetchRequest {
            uri: self.wanted.uri.clone(),
            hash: self.wanted.hash.clone(),
            compression: self.wanted.compression,
            destination: Destination::File(self.host.cache.path(self.id)),
            identity: Identity {
                uid: owner.uid,
                gid: owner.gid,
                groups: vec![],
            },
        };
        let known = self.known.as_ref().map(|held| held.entry.validators());
        let known: Validators = known.unwrap_or_default();
        let progress = self.progress.clone();
        let stager = &self.host.stager;
        stager
            .fetch_to_keep(request, known, progress, &self.cancel)
            .await
    }
}

/// A digest as `sha256:HEX`.
pub fn digest(text: &str) -> Result<Digest, CacheError> {
    let invalid = |reason: String| CacheError::Digest {
        digest: text.into(),
        reason,
    };
    let (algorithm, hex) = text
        .split_once(':')
        .ok_or_else(|| invalid("it names no algorithm".into()))?;
    let algorithm = algorithm.parse().map_err(|error| invalid(chain(&error)))?;
    Digest::from_hex(algorithm, hex).map_err(|error| invalid(chain(&error)))
}
