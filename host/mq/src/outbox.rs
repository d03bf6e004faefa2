//! What waits to be written to a client.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use tokio::io::AsyncWrite;

/// An empty buffer that is larger than this is given back.
const KEEP_BYTES: usize = 256 * 1024;

/// Bytes on their way to one client. Filled by whoever has something for it, emptied by its connection.
#[derive(Debug, Default)]
pub(crate) struct Outbox(RefCell<Inner>);

#[derive(Debug, Default)]
struct Inner {
    bytes: Vec<u8>,
    /// So many of them are written.
    written: usize,
    /// Nothing comes after them.
    closed: bool,
    reader: Option<Waker>,
}

impl Outbox {
    /// Appends what `fill` appends.
    pub(crate) fn fill(&self, fill: impl FnOnce(&mut Vec<u8>)) {
        let mut inner = self.0.borrow_mut();
        if inner.closed {
            return;
        }
        fill(&mut inner.bytes);
        if let Some(waker) = inner.reader.take() {
            waker.wake();
        }
    }

    /// Nothing comes after what is in it.
    pub(crate) fn close(&self) {
        let mut inner = self.0.borrow_mut();
        inner.closed = true;
        if let Some(waker) = inner.reader.take() {
            waker.wake();
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.0.borrow().closed
    }

    /// Bytes that are not written.
    pub(crate) fn len(&self) -> usize {
        let inner = self.0.borrow();
        inner.bytes.len() - inner.written
    }

    /// Wakes this task when there is something new.
    pub(crate) fn register(&self, cx: &Context<'_>) {
        let mut inner = self.0.borrow_mut();
        match &mut inner.reader {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
    }

    /// Gives back memory that is not used now.
    pub(crate) fn shrink(&self) {
        let mut inner = self.0.borrow_mut();
        if inner.bytes.is_empty() {
            inner.bytes = Vec::new();
        }
    }

    /// Writes some of it. There must be something.
    pub(crate) fn poll_write<S: AsyncWrite + Unpin>(
        &self,
        cx: &mut Context<'_>,
        stream: &mut S,
    ) -> Poll<io::Result<()>> {
        let mut inner = self.0.borrow_mut();
        let count = ready!(Pin::new(stream).poll_write(cx, &inner.bytes[inner.written..]))?;
        if count == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        inner.written += count;
        if inner.written == inner.bytes.len() {
            inner.written = 0;
            inner.bytes.clear();
            if inner.bytes.capacity() > KEEP_BYTES {
                inner.bytes = Vec::new();
            }
        } else if inner.written > inner.bytes.len() / 2 && inner.written > KEEP_BYTES {
            let written = std::mem::take(&mut inner.written);
            inner.bytes.drain(..written);
        }
        Poll::Ready(Ok(()))
    }
}
