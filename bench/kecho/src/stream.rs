//! Events framed on a TCP connection, read and written in batches by blocking calls: what raw TCP and the quick clients of
//! brokers have in common.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use crate::system::{Result, Subscriber};

/// Bytes that wait for a write when many events are pushed.
pub const BATCH_BYTES: usize = 32 * 1024;
/// Bytes that are read at once, at most.
const BUFFER_BYTES: usize = 64 * 1024;

/// What follows a frame, and its event if it has one.
pub type Frame<'a> = (&'a [u8], Option<&'a [u8]>);

/// Splits the first frame off, if it is complete.
pub type Split = for<'a> fn(&'a [u8]) -> Result<Option<Frame<'a>>>;

pub fn connect(port: u16) -> Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A line without its end. Byte by byte: nothing after it is read.
pub fn line(stream: &mut TcpStream) -> Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\r\n") {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    line.truncate(line.len() - 2);
    Ok(String::from_utf8(line)?)
}

/// Sends what it is told and expects a line.
pub fn ask(stream: &mut TcpStream, question: &str, answer: &str) -> Result<()> {
    stream.write_all(question.as_bytes())?;
    match line(stream)? {
        line if line == answer => Ok(()),
        line => Err(format!("{line:?} is the answer to {question:?}, not {answer:?}").into()),
    }
}

pub struct Frames {
    stream: TcpStream,
    split: Split,
    patience: Option<Duration>,
    buffer: Vec<u8>,
    filled: usize,
}

impl Frames {
    pub fn new(stream: TcpStream, split: Split) -> Frames {
        Frames {
            stream,
            split,
            patience: None,
            buffer: vec![0; BUFFER_BYTES],
            filled: 0,
        }
    }
}

impl Subscriber for Frames {
    fn receive(
        &mut self,
        patience: Option<Duration>,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<usize> {
        if patience != self.patience {
            self.stream.set_read_timeout(patience)?;
            self.patience = patience;
        }
        loop {
            let mut count = 0;
            let mut rest = &self.buffer[..self.filled];
            while let Some((after, event)) = (self.split)(rest)? {
                if let Some(event) = event {
                    take(event)?;
                    count += 1;
                }
                rest = after;
            }
            let kept = rest.len();
            let from = self.filled - kept;
            self.buffer.copy_within(from..self.filled, 0);
            self.filled = kept;
            if count > 0 {
                return Ok(count);
            }
            match self.stream.read(&mut self.buffer[self.filled..]) {
                Ok(0) => return Err("the other side has closed the connection".into()),
                Ok(count) => self.filled += count,
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    return Ok(0);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}
