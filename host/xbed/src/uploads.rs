//! Files that clients send for jobs to come.
//!
//! An upload is a file in `uploads` of the data directory, and its name, owner and id, is all that is written down of
//! it: what uses it says its task's plan. It goes when no task that is not over names it: at once after the last one,
//! else an hour after its owner has sent anything.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use axum::body::Bytes;
use futures::{Stream, StreamExt};
use sha2::{Digest, Sha256};
use tracing::{info, warn};
use uuid::Uuid;
use xbee_api::Upload;

use crate::fault;
use crate::store::Owner;
use crate::view;

/// Largest upload, bytes: as large as a file that is fetched may be.
const UPLOAD_MAX_BYTES: u64 = 64 << 30;
/// What one user may have at a time, bytes.
const USER_MAX_BYTES: u64 = 256 << 30;
/// How many: one for each job of the largest sweep, and some more.
const USER_MAX_UPLOADS: usize = 16_384;
/// How long one is kept that nothing uses, after its owner has sent anything.
const UNUSED_MAX: Duration = Duration::from_secs(3600);
/// How often it is looked for those.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);
/// How long a sender may say nothing.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// What is written at once, bytes.
const BATCH_BYTES: usize = 1 << 20;
/// Zeros of this length and alignment become a hole, bytes.
const HOLE_BYTES: usize = 64 << 10;
/// After so much it is forced to the disk, so that the end does not take long, and room is looked for, bytes.
const SYNC_BYTES: u64 = 256 << 20;
/// How much of the file system stays free for all else, percent.
const FREE_PERCENT: u64 = 1;
/// What an upload is called that is not complete.
const PART: &str = ".part";

/// Why a file is not taken, or not there.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// It alone is too much.
    #[error(
        "an upload has {UPLOAD_MAX_BYTES} bytes at most: bring the file to a server, and name it there"
    )]
    TooLarge,
    /// Together with others it is.
    #[error(
        "a user has {USER_MAX_UPLOADS} uploads of {USER_MAX_BYTES} bytes together at most: wait until tasks that use some are over, or an hour for unused ones"
    )]
    UserFull,
    /// No room.
    #[error("the disk of {} is full: make room there, or bring the file to a server", .0.display())]
    DiskFull(PathBuf),
    /// Nothing comes any more.
    #[error("nothing came of the upload for {limit} s: send it again", limit = IDLE_MAX.as_secs())]
    Stalled,
    /// It broke off.
    #[error("the upload was cut off: send it again")]
    CutOff(#[source] axum::Error),
    /// The file system's word.
    #[error("cannot keep the upload in {}", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// None of that id, or somebody else's, or in use.
    #[error(
        "there is no unused upload {0} of yours: one is used once, within an hour of the last that was sent; send the file again"
    )]
    Unknown(Uuid),
}

impl UploadError {
    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            UploadError::TooLarge => "upload-too-large",
            UploadError::UserFull => "uploads-full",
            UploadError::DiskFull(_) => "disk-full",
            UploadError::Stalled => "upload-stalled",
            UploadError::CutOff(_) => "upload-cut-off",
            UploadError::Io { .. } => "upload-failed",
            UploadError::Unknown(_) => "upload-unknown",
        }
    }
}

/// One that is there or comes.
#[derive(Debug)]
struct Kept {
    owner: u32,
    /// So much is counted for its owner.
    bytes: u64,
    /// When it came or was asked for last, milliseconds since the Unix epoch.
    since_ms: u64,
    is_complete: bool,
    /// A request has it.
    is_claimed: bool,
}

/// What a user has.
#[derive(Debug, Default)]
struct Share {
    uploads: usize,
    bytes: u64,
}

#[derive(Debug, Default)]
struct Held {
    files: BTreeMap<Uuid, Kept>,
    shares: HashMap<u32, Share>,
    looked_ms: u64,
}

impl Held {
    fn insert(&mut self, id: Uuid, kept: Kept) {
        let share = self.shares.entry(kept.owner).or_default();
        share.uploads += 1;
        share.bytes += kept.bytes;
        self.files.insert(id, kept);
    }

    fn remove(&mut self, id: Uuid) -> Option<Kept> {
        let kept = self.files.remove(&id)?;
        if let Some(share) = self.shares.get_mut(&kept.owner) {
            share.uploads -= 1;
            share.bytes -= kept.bytes;
            if share.uploads == 0 {
                self.shares.remove(&kept.owner);
            }
        }
        Some(kept)
    }
}

/// All uploads of the host.
#[derive(Debug)]
pub struct Uploads {
    directory: PathBuf,
    held: Mutex<Held>,
}

impl Uploads {
    /// Those of the data directory. What was coming when `xbed` ended is removed.
    pub fn open(data: &Path) -> io::Result<Uploads> {
        let directory = data.join("uploads");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)?;
        File::open(data)?.sync_all()?;
        let mut held = Held::default();
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some((owner, id)) = name.to_str().and_then(parse_name) else {
                // Nothing else writes here.
                fs::remove_file(entry.path())?;
                continue;
            };
            let meta = entry.metadata()?;
            let age = meta
                .modified()?
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            let kept = Kept {
                owner,
                bytes: meta.len(),
                since_ms: age.as_millis().try_into().unwrap_or(u64::MAX),
                is_complete: true,
                is_claimed: false,
            };
            held.insert(id, kept);
        }
        let held = Mutex::new(held);
        Ok(Uploads { directory, held })
    }

    /// Where one is.
    pub fn path(&self, owner: Owner, id: Uuid) -> PathBuf {
        self.directory.join(format!("{}.{id}", owner.uid))
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, source: io::Error) -> UploadError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                UploadError::DiskFull(self.directory.clone())
            }
            _ => UploadError::Io {
                path: self.directory.clone(),
                source,
            },
        }
    }

    /// Takes a file. Durable on return; dropped before, nothing is left.
    pub async fn receive(
        &self,
        owner: Owner,
        expected: Option<u64>,
        mut pieces: impl Stream<Item = Result<Bytes, axum::Error>> + Unpin,
    ) -> Result<Upload, UploadError> {
        let coming = self.begin(owner)?;
        coming.grow(expected.unwrap_or(0))?;
        self.look_for_room(expected.unwrap_or(0))?;
        let mut sink = Sink::create(&coming.part()).map_err(|e| self.failed(e))?;
        let (mut bytes, mut synced) = (0, 0);
        let mut batch = Vec::new();
        loop {
            let piece = tokio::time::timeout(IDLE_MAX, pieces.next()).await;
            let piece = piece.map_err(|_| UploadError::Stalled)?.transpose();
            let piece = piece.map_err(UploadError::CutOff)?;
            let is_last = piece.is_none();
            let piece = piece.unwrap_or_default();
            bytes += piece.len() as u64;
            coming.grow(bytes)?;
            batch.extend_from_slice(&piece);
            let force = is_last || bytes - synced >= SYNC_BYTES;
            if force || batch.len() >= BATCH_BYTES {
                let full = std::mem::take(&mut batch);
                let written = blocking(move || sink.write(&full, force)).await;
                sink = written.map_err(|e| self.failed(e))?;
            }
            if is_last {
                break;
            }
            if force {
                synced = bytes;
                self.look_for_room(0)?;
            }
        }
        let id = coming.complete().map_err(|e| self.failed(e))?;
        let directory = self.directory.clone();
        let named = blocking(move || File::open(directory)?.sync_all()).await;
        named.map_err(|e| self.failed(e))?;
        fault::point("uploaded");
        let digest = sink.hash.finalize();
        Ok(Upload {
            id,
            bytes,
            sha256: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }

    fn begin(&self, owner: Owner) -> Result<Coming<'_>, UploadError> {
        let id = Uuid::new_v4();
        let mut held = self.lock();
        let share = held.shares.get(&owner.uid);
        if share.is_some_and(|share| share.uploads >= USER_MAX_UPLOADS) {
            return Err(UploadError::UserFull);
        }
        let kept = Kept {
            owner: owner.uid,
            bytes: 0,
            since_ms: view::now_ms(),
            is_complete: false,
            is_claimed: false,
        };
        held.insert(id, kept);
        let uploads = self;
        Ok(Coming { uploads, owner, id })
    }

    fn look_for_room(&self, bytes: u64) -> Result<(), UploadError> {
        let stat = rustix::fs::statvfs(&self.directory).map_err(|e| self.failed(e.into()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        let stays = stat.f_blocks.saturating_mul(stat.f_frsize) / 100 * FREE_PERCENT;
        match free.saturating_sub(bytes) < stays {
            true => Err(UploadError::DiskFull(self.directory.clone())),
            false => Ok(()),
        }
    }

    /// Gives a request the uploads that it names, all or none: no other request gets them.
    pub fn claim(&self, owner: Owner, ids: BTreeSet<Uuid>) -> Result<Claim<'_>, UploadError> {
        let mut held = self.lock();
        for id in &ids {
            let free =
                |kept: &Kept| kept.owner == owner.uid && kept.is_complete && !kept.is_claimed;
            if !held.files.get(id).is_some_and(free) {
                return Err(UploadError::Unknown(*id));
            }
        }
        for id in &ids {
            if let Some(kept) = held.files.get_mut(id) {
                kept.is_claimed = true;
                kept.since_ms = view::now_ms();
            }
        }
        let uploads = self;
        Ok(Claim { uploads, ids })
    }

    /// Removes one that nothing uses, for its owner.
    pub fn discard(&self, owner: Owner, id: Uuid) -> Result<(), UploadError> {
        let claim = self.claim(owner, BTreeSet::from([id]))?;
        self.remove(&claim.ids);
        Ok(())
    }

    /// Removes some, whatever uses them.
    pub fn remove<'a>(&self, ids: impl IntoIterator<Item = &'a Uuid>) {
        for id in ids {
            let Some(kept) = self.lock().remove(*id) else {
                continue;
            };
            let owner = Owner {
                uid: kept.owner,
                gid: kept.owner,
            };
            fault::point("remove upload");
            remove_file(&self.path(owner, *id));
        }
    }

    /// After a start: those that tasks under way name are theirs, and those that only tasks name that are over go.
    pub fn settle(&self, in_use: &HashSet<Uuid>, used_up: &HashSet<Uuid>) {
        let mut gone = vec![];
        for (id, kept) in &mut self.lock().files {
            kept.is_claimed = in_use.contains(id);
            if !kept.is_claimed && used_up.contains(id) {
                gone.push(*id);
            }
        }
        self.remove(&gone);
    }

    /// Those that nobody asked for in an hour, if it is time to look: what uses them is still to be looked at. As long as
    /// an owner sends more, a job may be to come that wants all of it.
    pub fn old(&self, now_ms: u64) -> Vec<Uuid> {
        let ms = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        let mut held = self.lock();
        if now_ms.abs_diff(held.looked_ms) < ms(LOOK_INTERVAL) {
            return vec![];
        }
        held.looked_ms = now_ms;
        let mut last: HashMap<u32, u64> = HashMap::new();
        for kept in held.files.values().filter(|kept| !kept.is_claimed) {
            let last = last.entry(kept.owner).or_default();
            *last = kept.since_ms.max(*last);
        }
        let is_old = |kept: &Kept| {
            let since_ms = last.get(&kept.owner).filter(|_| !kept.is_claimed);
            let since_ms = *since_ms.unwrap_or(&kept.since_ms);
            kept.is_complete && now_ms.saturating_sub(since_ms) >= ms(UNUSED_MAX)
        };
        let old = held.files.iter().filter(|(_, kept)| is_old(kept));
        old.map(|(id, _)| *id).collect()
    }
}

/// Owner and id of a complete one.
fn parse_name(name: &str) -> Option<(u32, Uuid)> {
    let (owner, id) = name.split_once('.')?;
    Some((owner.parse().ok()?, id.parse().ok()?))
}

fn remove_file(path: &Path) {
    match fs::remove_file(path) {
        Ok(()) => info!(path = %path.display(), "upload removed"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => warn!(path = %path.display(), %error, "upload not removed"),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|panic| Err(io::Error::other(panic)))
}

/// One that comes. Dropped, it is as if it never had.
struct Coming<'a> {
    uploads: &'a Uploads,
    owner: Owner,
    id: Uuid,
}

impl Coming<'_> {
    fn part(&self) -> PathBuf {
        let mut path = self.uploads.path(self.owner, self.id).into_os_string();
        path.push(PART);
        path.into()
    }

    /// It has so many bytes, or will have.
    fn grow(&self, bytes: u64) -> Result<(), UploadError> {
        if bytes > UPLOAD_MAX_BYTES {
            return Err(UploadError::TooLarge);
        }
        let held = &mut *self.uploads.lock();
        let kept = held.files.get_mut(&self.id);
        let share = held.shares.get_mut(&self.owner.uid);
        let (Some(kept), Some(share)) = (kept, share) else {
            return Ok(());
        };
        kept.since_ms = view::now_ms();
        if bytes > kept.bytes {
            let all = share.bytes - kept.bytes + bytes;
            if all > USER_MAX_BYTES {
                return Err(UploadError::UserFull);
            }
            (share.bytes, kept.bytes) = (all, bytes);
        }
        Ok(())
    }

    /// Gives it its name. Nothing is waited for: it cannot be dropped half done.
    fn complete(self) -> io::Result<Uuid> {
        fault::point("upload");
        fs::rename(self.part(), self.uploads.path(self.owner, self.id))?;
        if let Some(kept) = self.uploads.lock().files.get_mut(&self.id) {
            kept.is_complete = true;
            kept.since_ms = view::now_ms();
        }
        Ok(self.id)
    }
}

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        let mut held = self.uploads.lock();
        if held
            .files
            .get(&self.id)
            .is_some_and(|kept| !kept.is_complete)
        {
            held.remove(self.id);
            drop(held);
            remove_file(&self.part());
        }
    }
}

/// Where it is written.
struct Sink {
    file: File,
    hash: Sha256,
}

impl Sink {
    fn create(path: &Path) -> io::Result<Sink> {
        let mut new = OpenOptions::new();
        let file = new.write(true).create_new(true).mode(0o600).open(path)?;
        let hash = Sha256::new();
        Ok(Sink { file, hash })
    }

    /// Adds a batch, zeros in it as holes; forces all to the disk.
    fn write(mut self, batch: &[u8], force: bool) -> io::Result<Sink> {
        self.hash.update(batch);
        for block in batch.chunks(HOLE_BYTES) {
            match block.len() == HOLE_BYTES && block.iter().all(|byte| *byte == 0) {
                true => drop(self.file.seek(SeekFrom::Current(HOLE_BYTES as i64))?),
                false => self.file.write_all(block)?,
            }
        }
        if force {
            let end = self.file.stream_position()?;
            self.file.set_len(end)?;
            self.file.sync_all()?;
        }
        Ok(self)
    }
}

/// Uploads that a request has. Dropped, others may have them, unless they are kept.
#[must_use]
pub struct Claim<'a> {
    uploads: &'a Uploads,
    ids: BTreeSet<Uuid>,
}

impl Claim<'_> {
    /// There is a task that names them.
    pub fn keep(mut self) {
        self.ids.clear();
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut held = self.uploads.lock();
        for id in &self.ids {
            if let Some(kept) = held.files.get_mut(id) {
                kept.is_claimed = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::stream;

    const OWNER: Owner = Owner { uid: 7, gid: 7 };
    const OTHER: Owner = Owner { uid: 8, gid: 8 };

    fn open() -> (tempfile::TempDir, Uploads) {
        let data = tempfile::tempdir().unwrap();
        let uploads = Uploads::open(data.path()).unwrap();
        (data, uploads)
    }

    fn pieces(
        pieces: &[&'static [u8]],
    ) -> impl Stream<Item = Result<Bytes, axum::Error>> + Unpin + use<> {
        let pieces: Vec<_> = pieces
            .iter()
            .map(|piece| Ok(Bytes::from_static(piece)))
            .collect();
        stream::iter(pieces)
    }

    async fn upload(uploads: &Uploads) -> Uuid {
        let received = uploads.receive(OWNER, None, pieces(&[b"ab", b"c"])).await;
        received.unwrap().id
    }

    fn names(uploads: &Uploads) -> usize {
        fs::read_dir(&uploads.directory).unwrap().count()
    }

    #[tokio::test]
    async fn what_was_sent_is_there_with_its_holes_and_its_digest() {
        let (_data, uploads) = open();
        let block: &'static [u8] = vec![0; 8 * BATCH_BYTES].leak();
        let sent = uploads
            .receive(OWNER, Some(2), pieces(&[b"ab"]))
            .await
            .unwrap();
        assert_eq!(sent.bytes, 2);
        let hash = "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603";
        assert_eq!(sent.sha256, hash);
        let sparse = uploads
            .receive(OWNER, None, pieces(&[block, b"end"]))
            .await
            .unwrap();
        let path = uploads.path(OWNER, sparse.id);
        assert!(fs::read(&path).unwrap() == [block, b"end"].concat());
        use std::os::unix::fs::MetadataExt;
        let meta = fs::metadata(&path).unwrap();
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
        assert_eq!(meta.mode() & 0o777, 0o600);
        assert_eq!(
            fs::metadata(&uploads.directory).unwrap().mode() & 0o777,
            0o700
        );
    }

    #[tokio::test]
    async fn what_is_cut_off_too_large_or_dropped_leaves_nothing() {
        let (_data, uploads) = open();
        let cut = stream::iter([Ok(Bytes::from_static(b"a")), Err(axum::Error::new("gone"))]);
        let error = uploads.receive(OWNER, Some(2), cut).await.unwrap_err();
        assert_eq!(error.code(), "upload-cut-off");
        let large = Some(UPLOAD_MAX_BYTES + 1);
        let error = uploads
            .receive(OWNER, large, pieces(&[]))
            .await
            .unwrap_err();
        assert_eq!(error.code(), "upload-too-large");
        let endless = stream::once(async { Ok(Bytes::from_static(b"a")) });
        let endless = Box::pin(endless.chain(stream::pending()));
        let waited = uploads.receive(OWNER, None, endless);
        let waited = tokio::time::timeout(Duration::from_millis(50), waited).await;
        assert!(waited.is_err());
        assert_eq!(names(&uploads), 0);
        assert!(uploads.lock().files.is_empty() && uploads.lock().shares.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_is_not_waited_for() {
        let (_data, uploads) = open();
        let error = uploads
            .receive(OWNER, None, stream::pending())
            .await
            .unwrap_err();
        assert_eq!(error.code(), "upload-stalled");
        assert_eq!(names(&uploads), 0);
    }

    #[tokio::test]
    async fn a_user_has_so_much_and_another_as_much() {
        let (_data, uploads) = open();
        let id = upload(&uploads).await;
        let share = Share {
            uploads: 1,
            bytes: USER_MAX_BYTES,
        };
        uploads.lock().shares.insert(OWNER.uid, share);
        let error = uploads
            .receive(OWNER, None, pieces(&[b"a"]))
            .await
            .unwrap_err();
        assert_eq!(error.code(), "uploads-full");
        uploads.lock().shares.get_mut(&OWNER.uid).unwrap().uploads = USER_MAX_UPLOADS;
        let error = uploads.receive(OWNER, None, pieces(&[])).await.unwrap_err();
        assert_eq!(error.code(), "uploads-full");
        uploads.receive(OTHER, None, pieces(&[b"a"])).await.unwrap();
        assert!(uploads.path(OWNER, id).exists());
    }

    #[tokio::test]
    async fn an_upload_is_its_owners_and_one_requests() {
        let (_data, uploads) = open();
        let (one, two) = (upload(&uploads).await, upload(&uploads).await);
        let claim = |owner, ids: &[Uuid]| uploads.claim(owner, ids.iter().copied().collect());
        assert!(claim(OTHER, &[one]).is_err());
        assert!(uploads.discard(OTHER, one).is_err());
        // All or none.
        assert!(claim(OWNER, &[one, Uuid::new_v4()]).is_err());
        let held = claim(OWNER, &[one]).unwrap();
        assert!(claim(OWNER, &[one, two]).is_err());
        assert!(uploads.discard(OWNER, one).is_err());
        drop(held);
        claim(OWNER, &[one]).unwrap().keep();
        assert!(claim(OWNER, &[one]).is_err());
        uploads.discard(OWNER, two).unwrap();
        assert_eq!(names(&uploads), 1);
    }

    #[tokio::test]
    async fn a_restart_keeps_what_is_whole_and_settles_what_is_used() {
        let (data, uploads) = open();
        let (used, over, unused) = (
            upload(&uploads).await,
            upload(&uploads).await,
            upload(&uploads).await,
        );
        let part = uploads
            .directory
            .join(format!("7.{}{PART}", Uuid::new_v4()));
        fs::write(&part, "half").unwrap();
        drop(uploads);
        let uploads = Uploads::open(data.path()).unwrap();
        assert!(!part.exists());
        assert_eq!(uploads.lock().shares[&7].bytes, 9);
        uploads.settle(&HashSet::from([used]), &HashSet::from([used, over]));
        assert_eq!(names(&uploads), 2);
        assert!(uploads.claim(OWNER, BTreeSet::from([used])).is_err());
        uploads.discard(OWNER, unused).unwrap();
        assert_eq!(uploads.lock().shares[&7].bytes, 3);
    }

    #[tokio::test]
    async fn what_nobody_asks_for_is_old_after_an_hour() {
        let (_data, uploads) = open();
        let id = upload(&uploads).await;
        let now_ms = view::now_ms();
        assert!(uploads.old(now_ms).is_empty());
        assert!(uploads.old(now_ms + 3_590_000).is_empty());
        assert_eq!(uploads.old(now_ms + 3_670_000), [id]);
        assert!(
            uploads.old(now_ms + 3_680_000).is_empty(),
            "looked at too often"
        );
        // Its owner sends more.
        let coming = uploads.begin(OWNER).unwrap();
        let later = |held: &mut Held| held.files.get_mut(&coming.id).unwrap().since_ms += 3_000_000;
        later(&mut uploads.lock());
        assert!(uploads.old(now_ms + 5_000_000).is_empty());
        drop(coming);
        assert_eq!(uploads.old(now_ms + 6_000_000), [id]);
    }
}
