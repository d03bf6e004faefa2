//! Putting: a local file to a URI.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::Stager;
use crate::error::{Error, ErrorKind};
use crate::fetch::finished;
use crate::identity::Identity;
use crate::inflow::{Feed, Halt, Piece, channel};
use crate::meter::{Meter, Progress};
use crate::note::{Note, Noted, Repeatable};
use crate::uri::{Scheme, Uri};
use crate::{ftp, http, local};

/// What to put and where to.
#[derive(Debug, Clone)]
pub struct PutRequest {
    /// Destination.
    pub uri: Uri,
    /// The local file to send; a regular file, not a link. Opened with the process's own rights.
    pub source: PathBuf,
    /// What to do if the destination exists.
    pub creation: Creation,
    /// Whose rights create the file of a `file` URI.
    pub identity: Identity,
    /// There if the put may be cut off by a kill of this process and then called again.
    pub repeatable: Option<Repeatable>,
}

/// What to do if the destination exists: JSDL 1.0, element CreationFlag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Creation {
    /// Replace it. A `file` is replaced as a whole; an FTP server may show a half file meanwhile.
    Overwrite,
    /// Add to its end. Not supported by HTTP.
    Append,
    /// Fail.
    DontOverwrite,
}

impl Stager {
    /// Puts `request.source` to `request.uri` and returns the bytes sent. On failure nothing half is
    /// left, as far as the server allows. Dropping the future cancels the transfer.
    ///
    /// # Errors
    /// An [`Error`] that names the URI without its secrets.
    pub async fn put(
        &self,
        request: PutRequest,
        progress: watch::Sender<Progress>,
        cancel: &CancellationToken,
    ) -> Result<u64, Error> {
        let uri = request.uri.clone();
        self.put_inner(request, progress, cancel)
            .await
            .map_err(|kind| Error::new(&uri, kind))
    }

    async fn put_inner(
        &self,
        request: PutRequest,
        progress: watch::Sender<Progress>,
        cancel: &CancellationToken,
    ) -> Result<u64, ErrorKind> {
        let stop = cancel.child_token();
        let _stop_on_drop = stop.clone().drop_guard();
        let meter = Arc::new(Meter::new(self.limits.transferred_bytes, progress));
        let PutRequest {
            uri,
            source,
            creation,
            identity,
            repeatable,
        } = request;
        let note = repeatable.as_ref().map(|put| Note::open(&put.note));
        let note = note.transpose()?.map(Arc::new);
        let transfer = async {
            let file = finished(local::open_own(source.clone()).await)?;
            if uri.scheme() == Scheme::File {
                let temporary = repeatable.as_ref().map(Repeatable::temporary);
                let target = local::Target {
                    creation,
                    identity,
                    note: note.clone().zip(temporary),
                };
                return local::put(&uri, file, target, meter, stop.clone()).await;
            }
            let len = file
                .metadata()
                .map_err(|error| ErrorKind::local("cannot read", &source, error))?
                .len();
            let (pieces, outflow) = channel();
            let feed = Feed {
                pieces,
                meter: meter.clone(),
            };
            let pump = async {
                local::pump(file, source.clone(), feed.clone()).await?;
                // Whose turn it is, the sending side knows.
                let ended = feed.pieces.send(Piece::End).await;
                ended.map_err(|_| Halt::Consumer)
            };
            let interrupted = self.interrupted(&meter, &stop);
            let send = async {
                match uri.scheme() {
                    Scheme::Ftp => {
                        ftp::put(&uri, &self.limits, creation, outflow, &meter, interrupted).await
                    }
                    _ => {
                        let client = self.put_client()?;
                        tokio::select! {
                            sent = http::put(&client, &uri, creation, len, outflow, &meter) => sent,
                            kind = interrupted => Err(kind),
                        }
                    }
                }
            };
            match tokio::join!(pump, send) {
                // The reader's failure cuts the sender off, so it comes first.
                (Err(Halt::Failed(kind)), _) => return Err(kind),
                (_, sent) => sent?,
            }
            Ok(meter.transferred_bytes())
        };
        if let Some(note) = &note
            && let Noted::Sent(bytes) = note.read()?
        {
            return Ok(bytes);
        }
        let sent = self.until_stopped(transfer, cancel, &stop).await?;
        if let Some(note) = &note {
            note.write(Noted::Sent(sent))?;
        }
        Ok(sent)
    }

    /// Takes back what a repeatable put left half when the process was killed, if it is not called again. Only
    /// of a `file` URI; an FTP server keeps what it has.
    ///
    /// # Errors
    /// An [`Error`] that names the URI without its secrets.
    pub async fn take_back(&self, request: PutRequest) -> Result<(), Error> {
        let uri = request.uri.clone();
        let take_back = async {
            let (Some(put), Scheme::File) = (request.repeatable, request.uri.scheme()) else {
                return Ok(());
            };
            let Some(note) = Note::find(&put.note)? else {
                return Ok(());
            };
            let noted = note.read()?;
            if matches!(noted, Noted::Sent(_)) {
                return Ok(());
            }
            let source = finished(local::open_own(request.source).await)?;
            let temporary = put.temporary();
            local::take_back(&request.uri, source, noted, temporary, request.identity).await
        };
        take_back.await.map_err(|kind| Error::new(&uri, kind))
    }
}
