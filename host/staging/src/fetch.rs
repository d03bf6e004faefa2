//! Fetching: a source, the stages behind it, and what stops them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::Stager;
use crate::compression::{Compression, decoder};
use crate::error::{Error, ErrorKind};
use crate::hash::{Algorithm, Digest};
use crate::identity::{Identity, on_thread};
use crate::inflow::{Decoded, Feed, Halt, Inflow, Piece, channel, digest};
use crate::limits::Limits;
use crate::meter::{Meter, Progress};
use crate::output::Partial;
use crate::sparse::{self, CopyError, StoreBudget};
use crate::unpack::{Entry, unpack};
use crate::uri::{Scheme, Uri};
use crate::version::{Validators, Versions};
use crate::{ftp, http, local};

/// What to fetch and where to.
#[derive(Debug, Clone)]
pub struct FetchRequest {
    /// Source.
    pub uri: Uri,
    /// Expected digest of the bytes as transferred, that is before decompression.
    pub hash: Option<Digest>,
    /// How the transferred bytes are packed. An archive needs [`Destination::Unpack`].
    pub compression: Option<Compression>,
    /// Where it goes.
    pub destination: Destination,
    /// Whose rights open a `file` URI.
    pub identity: Identity,
}

/// Where a fetch goes. It is written with the process's own rights.
#[derive(Debug, Clone)]
pub enum Destination {
    /// This file, replacing what is there. Made with mode 0600. Its directory exists.
    File(PathBuf),
    /// This directory, which does not exist or is empty. Made with mode 0700. Its parent exists.
    Unpack(PathBuf),
    /// Nowhere: only the digest and the compression are verified. For local files that are used in place.
    Verify,
}

/// What a fetch did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Fetched {
    /// What the server said of the version that it sent.
    pub validators: Validators,
    /// SHA-256 of the bytes as transferred, if it was fetched to be kept ([`Stager::fetch_to_keep`]).
    pub sha256: Option<Digest>,
    /// Bytes transferred.
    pub bytes_read: u64,
    /// Bytes after decompression: the file's length, or that of the tar stream.
    pub bytes_written: u64,
    /// Bytes that take space on disk; holes do not.
    pub bytes_stored: u64,
    /// What an archive contained, parents first. Empty if it was none.
    pub entries: Vec<Entry>,
}

/// How long a cancelled transfer may take to clean up before the caller gets its answer anyway.
const CLEAN_UP: Duration = Duration::from_millis(800);

impl Stager {
    /// Fetches `request.uri`. The destination appears only once everything is complete and verified;
    /// on failure nothing is left of it. Dropping the future cancels the fetch.
    ///
    /// # Errors
    /// An [`Error`] that names the URI without its secrets.
    pub async fn fetch(
        &self,
        request: FetchRequest,
        progress: watch::Sender<Progress>,
        cancel: &CancellationToken,
    ) -> Result<Fetched, Error> {
        let uri = request.uri.clone();
        self.fetch_inner(request, None, progress, cancel)
            .await
            .map_err(|kind| Error::new(&uri, kind))
    }

    /// As [`Stager::fetch`], with what is needed to use the file again. `known` is what the server said of a version that is
    /// there already: `None` is answered if that is what it still has, and nothing was written then. Only HTTP servers are
    /// asked.
    ///
    /// # Errors
    /// As [`Stager::fetch`].
    pub async fn fetch_to_keep(
        &self,
        request: FetchRequest,
        known: Validators,
        progress: watch::Sender<Progress>,
        cancel: &CancellationToken,
    ) -> Result<Option<Fetched>, Error> {
        let uri = request.uri.clone();
        match self
            .fetch_inner(request, Some(known), progress, cancel)
            .await
        {
            Ok(fetched) => Ok(Some(fetched)),
            Err(ErrorKind::Unchanged) => Ok(None),
            Err(kind) => Err(Error::new(&uri, kind)),
        }
    }

    async fn fetch_inner(
        &self,
        request: FetchRequest,
        keep: Option<Validators>,
        progress: watch::Sender<Progress>,
        cancel: &CancellationToken,
    ) -> Result<Fetched, ErrorKind> {
        let archive = request.compression.is_some_and(Compression::is_archive);
        match (&request.destination, archive) {
            (Destination::File(_), true) => {
                return Err(ErrorKind::Unsupported {
                    what: "unpacking an archive into a file",
                });
            }
            (Destination::Unpack(_), false) => {
                return Err(ErrorKind::Unsupported {
                    what: "unpacking what is no archive into a directory",
                });
            }
            _ => {}
        }
        let stop = cancel.child_token();
        let _stop_on_drop = stop.clone().drop_guard();
        let meter = Arc::new(Meter::new(self.limits.transferred_bytes, progress));
        let keeps = keep.is_some();
        let plain = request.hash.is_none() && request.compression.is_none() && !keeps;
        if let (Scheme::File, Destination::File(path), true) =
            (request.uri.scheme(), &request.destination, plain)
        {
            let source = local::open(&request.uri, request.identity);
            let copied = local::fetch_copy(source, path.clone(), meter, stop.clone());
            return self.until_stopped(copied, cancel, &stop).await;
        }
        let (pieces, inflow) = channel();
        let feed = Feed {
            pieces,
            meter: meter.clone(),
        };
        let worker = Worker {
            hash: request.hash.clone(),
            keeps,
            compression: request.compression,
            destination: request.destination.clone(),
            limits: self.limits.clone(),
            meter,
            stop: stop.clone(),
        };
        let worker = on_thread("stage-write", move || worker.run(inflow));
        let versions = Versions::new(keep.unwrap_or_default());
        let source = self.feed(request.uri, request.identity, feed, &versions, &stop);
        let mut fetched = self
            .until_stopped(join(source, worker, &stop), cancel, &stop)
            .await?;
        fetched.validators = versions.seen();
        Ok(fetched)
    }

    /// Runs the source to its end.
    async fn feed(
        &self,
        uri: Uri,
        identity: Identity,
        feed: Feed,
        versions: &Versions,
        stop: &CancellationToken,
    ) -> Result<(), Halt> {
        let meter = feed.meter.clone();
        let transfer = async {
            match uri.scheme() {
                Scheme::File => local::read(&uri, identity, feed.clone()).await?,
                Scheme::Ftp => ftp::get(&uri, &self.limits, &feed).await?,
                Scheme::Http | Scheme::Https => {
                    let client = self.fetch_client()?;
                    http::get(&client, &uri, &self.limits, versions, &feed).await?;
                }
            }
            feed.end().await
        };
        if uri.scheme() == Scheme::File {
            meter.own_turn();
        }
        tokio::select! {
            result = transfer => result,
            kind = self.interrupted(&meter, stop) => Err(kind.into()),
        }
    }

    /// Resolves when a transfer must end before its time: it was stopped, or the peer is silent.
    pub(crate) async fn interrupted(&self, meter: &Meter, stop: &CancellationToken) -> ErrorKind {
        tokio::select! {
            () = stop.cancelled() => ErrorKind::Cancelled,
            silence = meter.silence(self.limits.idle) => silence,
        }
    }

    /// Runs `work` until it ends, the caller cancels, or the time is up.
    pub(crate) async fn until_stopped<T>(
        &self,
        work: impl Future<Output = Result<T, ErrorKind>>,
        cancel: &CancellationToken,
        stop: &CancellationToken,
    ) -> Result<T, ErrorKind> {
        tokio::pin!(work);
        let kind = tokio::select! {
            biased;
            () = cancel.cancelled() => ErrorKind::Cancelled,
            result = &mut work => return result,
            () = tokio::time::sleep(self.limits.total) => ErrorKind::Timeout {
                what: "the whole transfer",
                after: self.limits.total,
            },
        };
        // Everything that works watches the token, and removes what it has written. It is waited for,
        // so that the caller sees it gone.
        stop.cancel();
        if tokio::time::timeout(CLEAN_UP, work).await.is_err() {
            tracing::debug!("a stopped transfer is still cleaning up");
        }
        Err(kind)
    }
}

/// Waits for source and worker. Whichever fails first stops the other, and says why.
async fn join<T>(
    source: impl Future<Output = Result<(), Halt>>,
    mut worker: oneshot::Receiver<Result<T, ErrorKind>>,
    stop: &CancellationToken,
) -> Result<T, ErrorKind> {
    let fed = tokio::select! {
        biased;
        result = &mut worker => return finished(result),
        fed = source => fed,
    };
    match fed {
        Ok(()) | Err(Halt::Consumer) => finished(worker.await),
        Err(Halt::Failed(kind)) => {
            stop.cancel();
            if tokio::time::timeout(CLEAN_UP, worker).await.is_err() {
                tracing::debug!("partial output is still being removed");
            }
            Err(kind)
        }
    }
}

/// A worker's result; its thread ends without one only if it panicked.
pub(crate) fn finished<T>(
    result: Result<Result<T, ErrorKind>, oneshot::error::RecvError>,
) -> Result<T, ErrorKind> {
    result.unwrap_or_else(|gone| {
        Err(ErrorKind::local(
            "a staging thread ended unexpectedly",
            Path::new(""),
            std::io::Error::other(gone),
        ))
    })
}

/// The stages behind the source.
struct Worker {
    hash: Option<Digest>,
    /// SHA-256 is wanted too.
    keeps: bool,
    compression: Option<Compression>,
    destination: Destination,
    limits: Arc<Limits>,
    meter: Arc<Meter>,
    stop: CancellationToken,
}

impl Worker {
    /// Decodes and writes what `pieces` bring; commits if the digest is right.
    fn run(self, pieces: mpsc::Receiver<Piece>) -> Result<Fetched, ErrorKind> {
        let mut algorithms: Vec<Algorithm> = self.hash.iter().map(Digest::algorithm).collect();
        if self.keeps && !algorithms.contains(&Algorithm::Sha256) {
            algorithms.push(Algorithm::Sha256);
        }
        if algorithms.is_empty() {
            let (fetched, partial) = self.decode(&mut Inflow::new(pieces, self.stop.clone()))?;
            return self.commit(fetched, partial);
        }
        let (next, digested) = channel();
        let got = on_thread("stage-digest", move || {
            Ok(digest(&algorithms, pieces, &next))
        });
        let mut inflow = Inflow::new(digested, self.stop.clone());
        let decoded = self.decode(&mut inflow);
        match decoded {
            Ok(_) => {}
            // Wrong data seldom decodes. That it is the wrong data is what the user must know.
            Err(ErrorKind::CorruptArchive { .. } | ErrorKind::UnsafeArchiveEntry { .. }) => {
                inflow.drain().map_err(|_| ErrorKind::Cancelled)?;
            }
            Err(kind) => return Err(kind),
        }
        let mut got = finished(got.blocking_recv())?.ok_or(ErrorKind::Cancelled)?;
        let wrong = |expected: &Digest| {
            let got = got
                .iter()
                .find(|got| got.algorithm() == expected.algorithm());
            got.filter(|got| *got != expected)
                .map(|got| ErrorKind::HashMismatch {
                    algorithm: got.algorithm(),
                    expected: expected.to_hex(),
                    got: got.to_hex(),
                })
        };
        if let Some(kind) = self.hash.as_ref().and_then(wrong) {
            return Err(kind);
        }
        let (mut fetched, partial) = decoded?;
        got.retain(|got| self.keeps && got.algorithm() == Algorithm::Sha256);
        fetched.sha256 = got.pop();
        self.commit(fetched, partial)
    }

    fn commit(&self, mut fetched: Fetched, partial: Option<Partial>) -> Result<Fetched, ErrorKind> {
        if self.stop.is_cancelled() {
            return Err(ErrorKind::Cancelled);
        }
        fetched.bytes_read = self.meter.transferred_bytes();
        if let Some(partial) = partial {
            partial.commit()?;
        }
        Ok(fetched)
    }

    fn decode(&self, inflow: &mut Inflow) -> Result<(Fetched, Option<Partial>), ErrorKind> {
        let decoder = decoder(self.compression, &mut *inflow)
            .map_err(|error| ErrorKind::local("cannot start the decoder", Path::new(""), error))?;
        let mut decoded = Decoded::new(decoder, self.limits.unpacked_bytes, self.stop.clone());
        let written = self.write(&mut decoded);
        let halted = decoded.halted();
        drop(decoded);
        match written {
            // The source, or whoever stopped it, says why.
            Err(_) if inflow.interrupted() => Err(ErrorKind::Cancelled),
            Err(kind) => Err(halted.unwrap_or(kind)),
            Ok(written) => {
                // A decoder may leave bytes it has no use for; the digest needs them.
                inflow.drain().map_err(|_| ErrorKind::Cancelled)?;
                Ok(written)
            }
        }
    }

    fn write(&self, decoded: &mut Decoded<'_>) -> Result<(Fetched, Option<Partial>), ErrorKind> {
        let packed = self.compression.is_some_and(|c| c != Compression::Tar);
        let mut budget = StoreBudget::new(&self.limits, &self.meter, packed);
        let format = self.compression.map_or("plain", Compression::format);
        let corrupt = |source| ErrorKind::CorruptArchive { format, source };
        let mut entries = Vec::new();
        let partial = match &self.destination {
            Destination::File(path) => {
                let (partial, file) = Partial::file(path, 0o600)?;
                sparse::copy_apart(decoded, &file, &mut budget).map_err(|error| match error {
                    CopyError::Read(source) => corrupt(source),
                    CopyError::Write(source) => ErrorKind::local("cannot write", path, source),
                    CopyError::Refused(kind) => kind,
                })?;
                Some(partial)
            }
            Destination::Unpack(path) => {
                let partial = Partial::directory(path)?;
                entries = unpack(decoded, partial.path(), &self.limits, &mut budget)?;
                Some(partial)
            }
            Destination::Verify => {
                std::io::copy(decoded, &mut std::io::sink()).map_err(corrupt)?;
                None
            }
        };
        let fetched = Fetched {
            validators: Validators::default(),
            sha256: None,
            bytes_read: 0,
            bytes_written: decoded.decoded_bytes(),
            bytes_stored: budget.stored_bytes(),
            entries,
        };
        Ok((fetched, partial))
    }
}
