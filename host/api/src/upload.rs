//! A file on its way to `xbed`: the body of `POST /v1/uploads`.

use std::io;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use hyper::body::{Body, Bytes, Frame, SizeHint};
use hyper::header::{CONTENT_TYPE, EXPECT, HeaderValue};
use hyper::{Request, StatusCode};
use tokio::fs::File;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::{oneshot, watch};

/// Bytes read at once.
const CHUNK_BYTES: usize = 64 << 10;

/// Whether `xbed` wants what is to be sent.
#[derive(Debug)]
enum Wanted {
    /// Not said yet: it may still refuse, and be heard.
    Unknown(oneshot::Receiver<()>),
    Yes,
    /// It has refused; the answer to that is still to be read.
    No,
}

/// The next so many bytes of a file.
#[derive(Debug)]
pub(crate) struct FileBody {
    file: File,
    left: u64,
    wanted: Wanted,
    sent: watch::Sender<u64>,
}

impl FileBody {
    /// Makes them the body of a request that is sent only once `xbed` has said that it wants it.
    pub fn of(
        mut request: Request<()>,
        file: File,
        bytes: u64,
        sent: watch::Sender<u64>,
    ) -> Request<FileBody> {
        let (want, wanted) = oneshot::channel();
        let want = Mutex::new(Some(want));
        hyper::ext::on_informational(&mut request, move |answer| {
            if answer.status() == StatusCode::CONTINUE
                && let Some(want) = want.lock().unwrap_or_else(PoisonError::into_inner).take()
            {
                // Who does not wait any more is over.
                let _ = want.send(());
            }
        });
        let headers = request.headers_mut();
        headers.insert(EXPECT, HeaderValue::from_static("100-continue"));
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        );
        request.map(|()| FileBody {
            file,
            left: bytes,
            wanted: Wanted::Unknown(wanted),
            sent,
        })
    }
}

impl Body for FileBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        if let Wanted::Unknown(wanted) = &mut self.wanted {
            self.wanted = match ready!(Pin::new(wanted).poll(context)) {
                Ok(()) => Wanted::Yes,
                Err(_) => Wanted::No,
            };
        }
        if matches!(self.wanted, Wanted::No) {
            return Poll::Pending;
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        let mut chunk = vec![0; most.min(CHUNK_BYTES)];
        let mut buffer = ReadBuf::new(&mut chunk);
        ready!(Pin::new(&mut self.file).poll_read(context, &mut buffer))?;
        let count = buffer.filled().len();
        if count == 0 {
            let shrunk = "the file became shorter while it was sent";
            return Poll::Ready(Some(Err(io::Error::other(shrunk))));
        }
        chunk.truncate(count);
        self.left -= count as u64;
        self.sent.send_modify(|sent| *sent += count as u64);
        Poll::Ready(Some(Ok(Frame::data(chunk.into()))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
