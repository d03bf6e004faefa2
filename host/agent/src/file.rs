//! Files into the guest and out of it.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use xbee_protocol::{FileInfo, MAX_DATA_BYTES, PutFile, Reply, Request};

use crate::Error;
use crate::client::{mismatch, reply};
use crate::state::{Opens, Shared};
use crate::stream::{Piece, StreamReader, StreamWriter};

/// The agent has to take or give something within this time.
const PROGRESS_LIMIT: Duration = Duration::from_secs(60);

/// A file to be put into the guest.
#[derive(Debug, Clone, Default)]
pub struct FileMeta {
    /// Path in the guest's root; missing directories are made.
    pub path: String,
    /// Permission bits, set-id bits included.
    pub mode: u32,
    /// Owner: name or number; root without it.
    pub user: Option<String>,
    /// Group: name or number; the owner's without it.
    pub group: Option<String>,
    /// Size in bytes where it is known.
    pub size: Option<u64>,
}

pub(crate) async fn put(
    shared: &Arc<Shared>,
    meta: FileMeta,
    mut content: impl AsyncRead + Unpin,
) -> Result<FileInfo, Error> {
    let path = meta.path.clone();
    let sent = shared.request(Opens::Put, |stream| {
        Request::PutFile(PutFile {
            stream,
            path: meta.path,
            mode: meta.mode,
            user: meta.user,
            group: meta.group,
            size: meta.size,
        })
    })?;
    // Only a content that was sent to its end may end the stream: everything else resets it.
    let mut writer = ResetOnDrop(StreamWriter::new(Arc::clone(shared), sent.stream));
    let mut hasher = blake3::Hasher::new();
    let mut hole = 0u64;
    let mut size = 0u64;
    let mut chunk = vec![0; MAX_DATA_BYTES];
    loop {
        let length = fill(&mut content, &mut chunk)
            .await
            .map_err(|source| Error::Source {
                path: path.clone(),
                source,
            })?;
        let bytes = &chunk[..length];
        hasher.update(bytes);
        size += length as u64;
        let last = length < MAX_DATA_BYTES;
        if bytes.iter().all(|byte| *byte == 0) {
            hole += length as u64;
        } else if !send(&mut writer.0, std::mem::take(&mut hole), bytes).await? {
            // The agent has refused; its reply says why.
            break;
        }
        if last {
            if hole > 0 {
                writer.0.send_hole(hole)?;
            }
            // What goes wrong here is a lost connection, which the reply shows too.
            let _lost = writer.0.shutdown().await;
            break;
        }
    }
    let info = match reply(shared, "store a file", PROGRESS_LIMIT, sent.reply).await? {
        Reply::File(info) => info,
        other => return Err(mismatch(&other)),
    };
    if info.blake3 != *hasher.finalize().as_bytes() || info.size != size {
        return Err(Error::Corrupt {
            path,
            sent_bytes: size,
            received_bytes: info.size,
        });
    }
    Ok(info)
}

/// Sends zeros and bytes; false where the agent takes no more.
async fn send(writer: &mut StreamWriter, hole: u64, bytes: &[u8]) -> Result<bool, Error> {
    if hole > 0 {
        writer.send_hole(hole)?;
    }
    match timeout(PROGRESS_LIMIT, writer.write_all(bytes)).await {
        Err(_elapsed) => Err(Error::Timeout {
            what: "take a file",
            seconds: PROGRESS_LIMIT.as_secs(),
        }),
        Ok(written) => Ok(written.is_ok()),
    }
}

/// Reads until the chunk is full or the content ends.
async fn fill(content: &mut (impl AsyncRead + Unpin), chunk: &mut [u8]) -> std::io::Result<usize> {
    let mut length = 0;
    while length < chunk.len() {
        match content.read(&mut chunk[length..]).await? {
            0 => break,
            n => length += n,
        }
    }
    Ok(length)
}

/// Breaks a stream off that was not ended.
struct ResetOnDrop(StreamWriter);

impl Drop for ResetOnDrop {
    fn drop(&mut self) {
        if let Err(error) = self.0.reset() {
            tracing::debug!(%error, "the reset of a stream was not sent");
        }
    }
}

pub(crate) async fn get(
    shared: &Arc<Shared>,
    path: &str,
    mut sink: impl AsyncWrite + Unpin,
    max_bytes: u64,
) -> Result<FileInfo, Error> {
    let sent = shared.request(Opens::Get, |stream| Request::GetFile {
        stream,
        path: path.into(),
    })?;
    let canceller = ResetUnlessReplied {
        shared,
        stream: sent.stream,
    };
    let reader = StreamReader::new(Arc::clone(shared), sent.stream);
    let mut hasher = blake3::Hasher::new();
    let mut size = 0u64;
    let zeros = vec![0; MAX_DATA_BYTES];
    let sink_error = |source| Error::Sink {
        path: path.into(),
        source,
    };
    loop {
        let next = poll_fn(|cx| reader.poll_piece(cx, MAX_DATA_BYTES));
        let piece = timeout(PROGRESS_LIMIT, next)
            .await
            .map_err(|_| Error::Timeout {
                what: "send a file",
                seconds: PROGRESS_LIMIT.as_secs(),
            })??;
        let length = match &piece {
            None => break,
            Some(Piece::Bytes(bytes)) => bytes.len() as u64,
            Some(Piece::Hole(bytes)) => *bytes,
        };
        size = size.saturating_add(length);
        if size > max_bytes {
            return Err(Error::FileTooLarge {
                path: path.into(),
                limit_bytes: max_bytes,
            });
        }
        match piece {
            Some(Piece::Bytes(bytes)) => {
                hasher.update(&bytes);
                sink.write_all(&bytes).await.map_err(sink_error)?;
            }
            _ => {
                let mut left = length;
                while left > 0 {
                    let part = &zeros[..left.min(MAX_DATA_BYTES as u64) as usize];
                    hasher.update(part);
                    sink.write_all(part).await.map_err(sink_error)?;
                    left -= part.len() as u64;
                }
            }
        }
    }
    let info = match reply(shared, "send a file", PROGRESS_LIMIT, sent.reply).await? {
        Reply::File(info) => info,
        other => return Err(mismatch(&other)),
    };
    drop(canceller);
    sink.flush().await.map_err(sink_error)?;
    if info.blake3 != *hasher.finalize().as_bytes() || info.size != size {
        return Err(Error::Corrupt {
            path: path.into(),
            sent_bytes: info.size,
            received_bytes: size,
        });
    }
    Ok(info)
}

/// Cancels a `GetFile` that is left early.
struct ResetUnlessReplied<'a> {
    shared: &'a Shared,
    stream: u32,
}

impl Drop for ResetUnlessReplied<'_> {
    fn drop(&mut self) {
        let under_way = self
            .shared
            .lock()
            .stream(self.stream)
            .is_some_and(|stream| !stream.guest_ended);
        if under_way {
            let body = xbee_protocol::StreamBody::Reset;
            let message = xbee_protocol::HostMessage::Stream {
                stream: self.stream,
                body,
            };
            if let Err(error) = self.shared.send(&message) {
                tracing::debug!(%error, "the reset of a stream was not sent");
            }
        }
    }
}
