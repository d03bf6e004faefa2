//! The host's end of a simulated agent's connection, which a save cuts.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::watch;

pub(super) struct Connection {
    stream: DuplexStream,
    /// Ready when it is cut; `None` once it is.
    cut: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Connection {
    /// `saves` changes with each save.
    pub(super) fn new(stream: DuplexStream, mut saves: watch::Receiver<u32>) -> Self {
        let cut = async move {
            // An error is the end of the domain, which closes the stream.
            let _ = saves.changed().await;
        };
        Self {
            stream,
            cut: Some(Box::pin(cut)),
        }
    }

    fn is_cut(&mut self, context: &mut Context<'_>) -> bool {
        let cut = match &mut self.cut {
            Some(cut) => cut.as_mut().poll(context).is_ready(),
            None => true,
        };
        if cut {
            self.cut = None;
        }
        cut
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_cut(context) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.cut.is_none() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
