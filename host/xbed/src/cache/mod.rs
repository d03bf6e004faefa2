//! Files that were fetched and are kept: one file an entry, each of one user, never written again.
//!
//! An entry is there once its record is in the store, and its file is on the disk before that. What has no record, or is
//! not what its record says, is removed. A task that uses an entry has a hard link to its file in its spool: so the
//! file is the task's whatever becomes of the entry, and the number of links says what is in use.

mod fetch;
pub mod http;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, DirBuilder, File, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};
use uuid::Uuid;
use xbee_api::{CACHE_SCHEME, chain};
use xbee_staging::{Fetched, Validators};

use crate::config::CacheLimits;
use crate::fault;
use crate::store::{Store, StoreError};
use crate::view;
use fetch::Flight;
pub use fetch::{Asked, Wanted, ask, blocking, digest, make_room, serves};

/// Shortest prefix of an id that names an entry.
const MIN_PREFIX: usize = 4;
/// Bytes in a block, as stat(2) counts them.
const BLOCK_BYTES: u64 = 512;

/// Why the cache does not give or take something. Shared by all who wait for the same file.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CacheError {
    /// There is none.
    #[error("this xbed keeps no cache: its configuration says `max-mib = 0` in [cache]")]
    Off,
    /// No such entry, or not the user's.
    #[error("no entry {0} of yours is in the cache; `xbe cache ls` lists those there are")]
    NotFound(String),
    /// More than one entry begins like this.
    #[error("{prefix} is the beginning of {count} ids of cache entries: give more of it")]
    Ambiguous {
        /// What was given.
        prefix: String,
        /// How many.
        count: usize,
    },
    /// A task has been promised it.
    #[error(
        "cache entry {entry} is named by task {task}, which is not over: `xbe terminate` ends it"
    )]
    InUse {
        /// The entry.
        entry: Uuid,
        /// The task.
        task: Uuid,
    },
    /// The digest is none.
    #[error("{digest:?} is no digest: {reason}; expected one such as sha256:HEX")]
    Digest {
        /// What was given.
        digest: String,
        /// What is wrong.
        reason: String,
    },
    /// It has no place, however much is removed.
    #[error(
        "{uri} takes {size_bytes} bytes of disk, and the whole cache may take {max_bytes}: `max-mib` in [cache] of xbed's configuration"
    )]
    TooLarge {
        /// Which, without credentials.
        uri: String,
        /// It takes.
        size_bytes: u64,
        /// The bound.
        max_bytes: u64,
    },
    /// One user fetches enough.
    #[error(
        "{0} files are fetched for you at this moment, which is all that may be: wait for one of them"
    )]
    Busy(usize),
    /// Nobody waits for it any more.
    #[error("{0}: cancelled")]
    Cancelled(String),
    /// It could not be fetched.
    #[error(transparent)]
    Fetch(Arc<xbee_staging::Error>),
    /// The store.
    #[error("the cache's record could not be written")]
    Store(#[source] Arc<StoreError>),
    /// The file system's word.
    #[error("the cache: cannot {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
}

impl CacheError {
    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            CacheError::Off => "cache-off",
            CacheError::NotFound(_) => "cache-entry-not-found",
            CacheError::Ambiguous { .. } => "cache-entry-ambiguous",
            CacheError::InUse { .. } => "cache-entry-in-use",
            CacheError::Digest { .. } => "invalid-hash",
            CacheError::TooLarge { .. } => "cache-entry-too-large",
            CacheError::Busy(_) => "cache-busy",
            CacheError::Cancelled(_) => "cancelled",
            CacheError::Fetch(error) => error.code(),
            CacheError::Store(error) => error.code(),
            CacheError::File { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "disk-full"
            }
            CacheError::File { .. } => "cache-failed",
        }
    }

    fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CacheError {
        let path = path.into();
        move |source| CacheError::File {
            what,
            path,
            source: Arc::new(source),
        }
    }
}

impl From<StoreError> for CacheError {
    fn from(error: StoreError) -> Self {
        CacheError::Store(Arc::new(error))
    }
}

/// What is known of an entry; its record in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its id, and its file's name.
    pub id: Uuid,
    /// User id of the one who may use it.
    pub owner: u32,
    /// Digest of what was asked for, credentials in the URI included ([`Wanted::key`]).
    pub key: String,
    /// From where, without credentials.
    pub uri: String,
    /// The digest that was demanded, as `sha256:HEX`.
    pub hash: Option<String>,
    /// How it was packed when it came; it is kept unpacked.
    pub compression: Option<String>,
    /// Length.
    pub size_bytes: u64,
    /// Space on the disk.
    pub allocated_bytes: u64,
    /// Time of last modification, seconds and nanoseconds: another one is another file.
    pub modified: (i64, i64),
    /// SHA-256 of the bytes as they came, hexadecimal.
    pub sha256: String,
    /// When, milliseconds since the Unix epoch.
    pub fetched_ms: u64,
    /// What the server said of its version.
    pub etag: Option<String>,
    /// What the server said of its version.
    pub last_modified: Option<String>,
}

impl Entry {
    fn validators(&self) -> Validators {
        Validators {
            etag: self.etag.clone(),
            last_modified: self.last_modified.clone(),
        }
    }

    /// A file as its record says, as far as can be seen without reading it.
    fn is(&self, file: &Metadata) -> bool {
        file.is_file()
            && file.len() == self.size_bytes
            && (file.mtime(), file.mtime_nsec()) == self.modified
    }
}

/// An entry and when it was used last.
#[derive(Debug, Clone)]
pub struct Held {
    /// The entry.
    pub entry: Arc<Entry>,
    /// Milliseconds since the Unix epoch.
    pub used_ms: u64,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<Uuid, Held>,
    /// Fetches under way, as long as somebody waits.
    flights: HashMap<(u32, String), Weak<Flight>>,
}

impl State {
    fn total_bytes(&self) -> u64 {
        let entries = self.entries.values();
        entries.map(|held| held.entry.allocated_bytes).sum()
    }

    /// What somebody fetches, or is about to use.
    fn awaited(&self) -> HashSet<Uuid> {
        let flights = self.flights.values().filter_map(Weak::upgrade);
        flights.flat_map(|flight| flight.ids()).collect()
    }
}

/// How much room is wanted.
#[derive(Debug, Clone, Copy)]
pub enum Room {
    /// What the cache's own limits ask for.
    Limits,
    /// So many bytes free on the disk; all that can be had, if it is not known how many.
    Disk(Option<u64>),
}

/// The entries.
#[derive(Debug)]
pub struct Cache {
    directory: PathBuf,
    limits: CacheLimits,
    state: Mutex<State>,
}

/// The entry that a URI `cache:ENTRY` of a plan names.
pub fn named(uri: &str) -> Option<Uuid> {
    uri.strip_prefix(CACHE_SCHEME)?.parse().ok()
}

impl Cache {
    /// Opens the directory, and removes what a kill or a power cut has left half.
    pub fn open(
        directory: PathBuf,
        limits: CacheLimits,
        store: &Store,
    ) -> Result<Cache, CacheError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(CacheError::file("make", &directory))?;
        let cache = Cache {
            directory,
            limits,
            state: Mutex::default(),
        };
        for (id, record, used_ms) in store.cached()? {
            let entry = serde_json::from_str::<Entry>(&record).ok();
            let path = cache.directory.join(&id);
            let is_whole = |entry: &Entry| {
                entry.id.to_string() == id
                    && path.symlink_metadata().is_ok_and(|file| entry.is(&file))
            };
            match entry.filter(is_whole) {
                Some(entry) => {
                    let (id, entry) = (entry.id, Arc::new(entry));
                    cache.lock().entries.insert(id, Held { entry, used_ms });
                }
                None => {
                    warn!(entry = id, "its file is not what was cached: removed");
                    store.uncache(&id)?;
                }
            }
        }
        cache.remove_older(store)?;
        cache.remove_unknown()?;
        Ok(cache)
    }

    /// Forgets what was about to be, because a newer one of the same had come.
    fn remove_older(&self, store: &Store) -> Result<(), CacheError> {
        let mut newest = HashSet::new();
        for Held { entry, .. } in self.list().into_iter().rev() {
            if !newest.insert((entry.owner, entry.key.clone())) {
                self.lock().entries.remove(&entry.id);
                store.uncache(&entry.id.to_string())?;
            }
        }
        Ok(())
    }

    fn remove_unknown(&self) -> Result<(), CacheError> {
        let read = fs::read_dir(&self.directory).map_err(CacheError::file("read", &self.directory));
        for file in read?.flatten() {
            let name = file.file_name();
            let id = name.to_str().and_then(|name| name.parse::<Uuid>().ok());
            if id.is_some_and(|id| self.lock().entries.contains_key(&id)) {
                continue;
            }
            let path = file.path();
            info!(path = %path.display(), "file of no cache entry: removed");
            fs::remove_file(&path).map_err(CacheError::file("remove", &path))?;
        }
        Ok(())
    }

    /// There is one.
    pub fn is_on(&self) -> bool {
        self.limits.max_bytes > 0
    }

    /// All entries, oldest first.
    pub fn list(&self) -> Vec<Held> {
        let mut list: Vec<Held> = self.lock().entries.values().cloned().collect();
        list.sort_by_key(|held| (held.entry.fetched_ms, held.entry.id));
        list
    }

    /// The entry with this id.
    pub fn get(&self, id: Uuid) -> Option<Held> {
        self.lock().entries.get(&id).cloned()
    }

    /// The entry that an id or its beginning means, of those that `may` be seen.
    pub fn find(&self, name: &str, may: impl Fn(u32) -> bool) -> Result<Held, CacheError> {
        let prefix = name.to_ascii_lowercase();
        let mut found = self.list();
        found
            .retain(|held| may(held.entry.owner) && held.entry.id.to_string().starts_with(&prefix));
        match (found.len(), found.pop()) {
            (1, Some(held)) if prefix.len() >= MIN_PREFIX => Ok(held),
            (count @ 2.., _) if prefix.len() >= MIN_PREFIX => Err(CacheError::Ambiguous {
                prefix: name.into(),
                count,
            }),
            _ => Err(CacheError::NotFound(name.into())),
        }
    }

    /// Where an entry's file is.
    pub fn path(&self, id: Uuid) -> PathBuf {
        self.directory.join(id.to_string())
    }

    /// The user's entry of this id, if its file is what it was; else it is forgotten.
    pub fn whole(&self, store: &Store, owner: u32, id: Uuid) -> Option<Held> {
        let held = self.get(id).filter(|held| held.entry.owner == owner)?;
        let file = self.path(id).symlink_metadata();
        if file.is_ok_and(|file| held.entry.is(&file)) {
            return Some(held);
        }
        warn!(entry = %id, "its file is not what was cached any more: removed");
        self.forget(store, id);
        None
    }

    /// The user's entry for what is wanted, if its file is what it was.
    fn look_up(&self, store: &Store, owner: u32, key: &str) -> Option<Held> {
        let is_it = |held: &&Held| held.entry.owner == owner && held.entry.key == key;
        let id = self.lock().entries.values().find(is_it)?.entry.id;
        self.whole(store, owner, id)
    }

    /// Makes a fetched file an entry. Durable on return; one that was there for the same is no more.
    fn keep(
        &self,
        store: &Store,
        wanted: &Wanted,
        id: Uuid,
        fetched: &Fetched,
    ) -> Result<(), CacheError> {
        let path = self.path(id);
        let kept = self.record(wanted, id, fetched).and_then(|entry| {
            let record = serde_json::to_string(&entry)
                .map_err(|error| CacheError::file("describe", &path)(error.into()))?;
            fault::point("cache record");
            store.cache(&id.to_string(), &record, entry.fetched_ms)?;
            fault::point("cached");
            Ok(entry)
        });
        let entry = match kept {
            Ok(entry) => Arc::new(entry),
            Err(error) => {
                self.remove_file(id);
                return Err(error);
            }
        };
        let mut before = vec![];
        {
            let mut state = self.lock();
            before.extend(state.entries.values().filter_map(|held| {
                let is_older = (held.entry.owner, &held.entry.key) == (entry.owner, &entry.key);
                is_older.then_some(held.entry.id)
            }));
            let used_ms = entry.fetched_ms;
            state.entries.insert(id, Held { entry, used_ms });
        }
        before.into_iter().for_each(|id| self.forget(store, id));
        Ok(())
    }

    /// Forces the file to the disk, and describes it.
    fn record(&self, wanted: &Wanted, id: Uuid, fetched: &Fetched) -> Result<Entry, CacheError> {
        let path = self.path(id);
        let sync = || -> io::Result<Metadata> {
            let file = File::open(&path)?;
            file.set_permissions(Permissions::from_mode(0o400))?;
            file.sync_all()?;
            File::open(&self.directory)?.sync_all()?;
            file.metadata()
        };
        let file = sync().map_err(CacheError::file("force to the disk", &path))?;
        Ok(Entry {
            id,
            owner: wanted.owner.uid,
            key: wanted.key(),
            uri: wanted.uri.to_string(),
            hash: wanted.hash.as_ref().map(|hash| format!("{hash:?}")),
            compression: wanted
                .compression
                .map(|kind| format!("{kind:?}").to_ascii_lowercase()),
            size_bytes: file.len(),
            allocated_bytes: file.blocks().saturating_mul(BLOCK_BYTES),
            modified: (file.mtime(), file.mtime_nsec()),
            sha256: fetched
                .sha256
                .as_ref()
                .map(xbee_staging::Digest::to_hex)
                .unwrap_or_default(),
            fetched_ms: view::now_ms(),
            etag: fetched.validators.etag.clone(),
            last_modified: fetched.validators.last_modified.clone(),
        })
    }

    /// Gives the entry's file a name in a task's spool, too. False: it is no more.
    pub fn link(&self, store: &Store, id: Uuid, to: &Path) -> Result<bool, CacheError> {
        let Some(held) = self.get(id) else {
            return Ok(false);
        };
        match fs::hard_link(self.path(id), to) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(CacheError::file("link into the task's spool", to)(error)),
        }
        fault::point("cache linked");
        self.touch(store, held.entry.id);
        Ok(true)
    }

    /// Notes that it is used now.
    pub fn touch(&self, store: &Store, id: Uuid) {
        let used_ms = view::now_ms();
        if let Some(held) = self.lock().entries.get_mut(&id) {
            held.used_ms = used_ms;
        }
        // Only the order in which entries go depends on it.
        if let Err(error) = store.cache_used(&id.to_string(), used_ms) {
            warn!(entry = %id, error = chain(&error), "its use is not noted");
        }
    }

    /// Removes an entry. Tasks that have its file keep it.
    pub fn forget(&self, store: &Store, id: Uuid) {
        self.lock().entries.remove(&id);
        fault::point("uncache");
        // Without its file the record is forgotten at the next start.
        if let Err(error) = store.uncache(&id.to_string()) {
            warn!(entry = %id, error = chain(&error), "its record is not removed");
        }
        fault::point("uncached");
        self.remove_file(id);
    }

    fn remove_file(&self, id: Uuid) {
        let path = self.path(id);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(path = %path.display(), %error, "cached file not removed");
        }
    }

    /// Some task has a link to its file.
    pub fn is_linked(&self, id: Uuid) -> bool {
        let file = self.path(id).symlink_metadata();
        file.is_ok_and(|file| file.nlink() > 1)
    }

    /// Removes entries that were not used for longest until there is room, but none of `spared` and none in use. Says
    /// whether any was.
    pub fn evict(&self, store: &Store, spared: &HashMap<Uuid, Uuid>, room: Room) -> bool {
        let mut evicted = false;
        let mut candidates = self.list();
        candidates.sort_by_key(|held| held.used_ms);
        for held in candidates {
            if self.has(room) {
                break;
            }
            let id = held.entry.id;
            let is_spared = spared.contains_key(&id)
                || self.is_linked(id)
                || self.lock().awaited().contains(&id);
            if is_spared {
                continue;
            }
            info!(entry = %id, uri = held.entry.uri, "evicted from the cache");
            self.forget(store, id);
            evicted = true;
        }
        evicted
    }

    fn has(&self, room: Room) -> bool {
        match room {
            Room::Limits => {
                let state = self.lock();
                state.entries.len() <= self.limits.entries
                    && state.total_bytes() <= self.limits.max_bytes
            }
            Room::Disk(None) => false,
            Room::Disk(Some(wanted)) => rustix::fs::statvfs(&self.directory)
                .is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) >= wanted),
        }
    }

    /// Whether it could stay if all others went.
    pub fn fits(&self, entry: &Entry) -> Result<(), CacheError> {
        match entry.allocated_bytes <= self.limits.max_bytes {
            true => Ok(()),
            false => Err(CacheError::TooLarge {
                uri: entry.uri.clone(),
                size_bytes: entry.allocated_bytes,
                max_bytes: self.limits.max_bytes,
            }),
        }
    }

    /// Forgets an entry that could not stay if all others went, when nobody waits for it. Who has its file keeps it.
    pub fn forget_too_large(&self, store: &Store, id: Uuid) {
        let held = self.get(id);
        let is_too_large = held.is_some_and(|held| self.fits(&held.entry).is_err());
        if is_too_large && !self.lock().awaited().contains(&id) {
            self.forget(store, id);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
