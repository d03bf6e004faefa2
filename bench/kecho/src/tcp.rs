//! Raw TCP: a length and the event, on one connection a subscriber. What the ratios refer to.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use crate::system::{Place, Publisher, Result, Subscriber, System};

/// Bytes that wait for a write when many events are pushed.
const BATCH_BYTES: usize = 32 * 1024;
const BUFFER_BYTES: usize = 64 * 1024;

pub struct Tcp;

impl System for Tcp {
    fn name(&self) -> &'static str {
        "raw TCP"
    }

    fn version(&self) -> Result<String> {
        Ok(std::fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .into())
    }

    fn publisher(&self, place: &Place, subscribers: usize) -> Result<Box<dyn Publisher>> {
        Ok(Box::new(Sending {
            listener: TcpListener::bind(("127.0.0.1", place.port))?,
            subscribers,
            streams: Vec::new(),
            waiting: Vec::new(),
        }))
    }

    fn subscriber(&self, place: &Place) -> Result<Box<dyn Subscriber>> {
        let stream = TcpStream::connect(("127.0.0.1", place.port))?;
        stream.set_nodelay(true)?;
        Ok(Box::new(Receiving {
            stream,
            patience: None,
            buffer: vec![0; BUFFER_BYTES],
            filled: 0,
        }))
    }
}

struct Sending {
    listener: TcpListener,
    subscribers: usize,
    streams: Vec<TcpStream>,
    waiting: Vec<u8>,
}

impl Publisher for Sending {
    fn send(&mut self, event: &[u8]) -> Result<()> {
        self.push(event)?;
        self.flush()
    }

    fn push(&mut self, event: &[u8]) -> Result<()> {
        self.waiting
            .extend_from_slice(&u32::try_from(event.len())?.to_le_bytes());
        self.waiting.extend_from_slice(event);
        if self.waiting.len() >= BATCH_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        while self.streams.len() < self.subscribers {
            let (stream, _) = self.listener.accept()?;
            stream.set_nodelay(true)?;
            self.streams.push(stream);
        }
        for stream in &mut self.streams {
            stream.write_all(&self.waiting)?;
        }
        self.waiting.clear();
        Ok(())
    }
}

struct Receiving {
    stream: TcpStream,
    patience: Option<Duration>,
    buffer: Vec<u8>,
    filled: usize,
}

impl Subscriber for Receiving {
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
            while let Some((length, after)) = rest.split_first_chunk::<4>() {
                let length = u32::from_le_bytes(*length) as usize;
                let Some((event, after)) = after.split_at_checked(length) else {
                    break;
                };
                take(event)?;
                count += 1;
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
                Ok(0) => return Err("the publisher has closed the connection".into()),
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
