//! Raw TCP: a length and the event, on one connection a subscriber. What the ratios refer to.

use std::io::Write as _;
use std::net::{TcpListener, TcpStream};

use crate::stream::{self, BATCH_BYTES, Frame, Frames};
use crate::system::{Place, Publisher, Result, Subscriber, System};

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
        Ok(Box::new(Frames::new(stream::connect(place.port)?, split)))
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

fn split(buffer: &[u8]) -> Result<Option<Frame<'_>>> {
    let Some((length, rest)) = buffer.split_first_chunk::<4>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes(*length) as usize;
    Ok(rest
        .split_at_checked(length)
        .map(|(event, rest)| (rest, Some(event))))
}
