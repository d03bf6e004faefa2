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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Limits;
    use crate::note::FileId;
    use std::fs;
    use std::path::Path;

    const SOURCE: &[u8] = b"what is sent";

    fn request(directory: &Path, creation: Creation) -> PutRequest {
        let source = directory.join("source");
        fs::write(&source, SOURCE).unwrap();
        let target = url::Url::from_file_path(directory.join("target")).unwrap();
        PutRequest {
            uri: target.as_str().parse().unwrap(),
            source,
            creation,
            identity: Identity::current(),
            repeatable: Some(Repeatable {
                note: directory.join("note"),
                name: "a-0".into(),
            }),
        }
    }

    async fn put(request: &PutRequest) -> Result<u64, Error> {
        let progress = watch::channel(Progress::default()).0;
        let stager = Stager::new(Limits::default());
        let never = CancellationToken::new();
        stager.put(request.clone(), progress, &never).await
    }

    async fn take_back(request: &PutRequest) {
        let stager = Stager::new(Limits::default());
        stager.take_back(request.clone()).await.unwrap();
    }

    /// What a put leaves that was killed after it had added so much of the source.
    fn cut_off_append(directory: &Path, added: &[u8]) {
        let target = directory.join("target");
        fs::write(&target, "before ").unwrap();
        let id = FileId::of(&fs::metadata(&target).unwrap());
        let note = Note::open(&directory.join("note")).unwrap();
        note.write(Noted::Appending(id, 7)).unwrap();
        fs::write(&target, [b"before ", added].concat()).unwrap();
    }

    #[tokio::test]
    async fn an_append_that_was_cut_off_anywhere_is_there_once() {
        for length in 0..=SOURCE.len() {
            let directory = tempfile::tempdir().unwrap();
            let request = request(directory.path(), Creation::Append);
            cut_off_append(directory.path(), &SOURCE[..length]);
            for _ in 0..2 {
                assert_eq!(put(&request).await.unwrap(), SOURCE.len() as u64);
                let target = fs::read(directory.path().join("target")).unwrap();
                assert_eq!(
                    target,
                    [b"before ", SOURCE].concat(),
                    "after {length} bytes"
                );
            }
        }
    }

    #[tokio::test]
    async fn what_others_have_appended_since_stays() {
        for (added, then) in [
            (&b"what is sent, and theirs"[..], &b""[..]),
            (b"theirs", SOURCE),
        ] {
            let directory = tempfile::tempdir().unwrap();
            let request = request(directory.path(), Creation::Append);
            cut_off_append(directory.path(), added);
            put(&request).await.unwrap();
            let target = fs::read(directory.path().join("target")).unwrap();
            assert_eq!(target, [b"before ", added, then].concat());
        }
    }

    #[tokio::test]
    async fn half_an_append_is_taken_back_and_a_whole_one_is_not() {
        for (added, left) in [
            (&SOURCE[..4], &b""[..]),
            (SOURCE, SOURCE),
            (b"theirs", b"theirs"),
        ] {
            let directory = tempfile::tempdir().unwrap();
            let request = request(directory.path(), Creation::Append);
            cut_off_append(directory.path(), added);
            take_back(&request).await;
            let target = fs::read(directory.path().join("target")).unwrap();
            assert_eq!(target, [b"before ", left].concat());
        }
    }

    #[tokio::test]
    async fn a_temporary_file_that_was_left_is_replaced_or_taken_back() {
        for again in [true, false] {
            let directory = tempfile::tempdir().unwrap();
            let request = request(directory.path(), Creation::Overwrite);
            let left = directory.path().join(".xbee-stage-a-0");
            fs::write(&left, "half").unwrap();
            Note::open(&directory.path().join("note")).unwrap();
            if again {
                put(&request).await.unwrap();
                assert_eq!(fs::read(directory.path().join("target")).unwrap(), SOURCE);
            } else {
                take_back(&request).await;
                assert!(!directory.path().join("target").exists());
            }
            assert!(!left.exists());
        }
    }

    #[tokio::test]
    async fn a_file_that_had_its_name_is_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let request = request(directory.path(), Creation::DontOverwrite);
        let target = directory.path().join("target");
        fs::write(&target, SOURCE).unwrap();
        let id = FileId::of(&fs::metadata(&target).unwrap());
        let note = Note::open(&directory.path().join("note")).unwrap();
        note.write(Noted::Named(id)).unwrap();
        assert_eq!(put(&request).await.unwrap(), SOURCE.len() as u64);
        let other = tempfile::tempdir().unwrap();
        let request = self::request(other.path(), Creation::DontOverwrite);
        fs::write(other.path().join("target"), SOURCE).unwrap();
        let error = put(&request).await.unwrap_err();
        assert_eq!(error.code(), "exists");
    }
}
