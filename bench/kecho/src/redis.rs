//! Redis, with a client of its own: blocking, and quicker than the crate redis, which has a row too.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;

use crate::stream::{self, BATCH_BYTES, Frame, Frames};
use crate::system::{Place, Publisher, Result, Subscriber, System, said_version};

/// Answers that a publisher of many has outstanding.
const OUTSTANDING: usize = 1024;
/// Events that a publisher is ahead of the slowest subscriber.
pub const WINDOW: u64 = 16 * 1024;

pub struct Redis;

/// The server, which keeps nothing on the disk and never gives a subscriber up.
pub fn server(port: u16, directory: &Path) -> Result<Option<Command>> {
    let config = directory.join("redis.conf");
    let directory = directory.display();
    std::fs::write(
        &config,
        format!(
            "bind 127.0.0.1\nport {port}\ndir {directory}\nsave \"\"\nappendonly no\nclient-output-buffer-limit pubsub 0 0 0\n"
        ),
    )?;
    let mut command = Command::new("redis-server");
    command.arg(config);
    Ok(Some(command))
}

impl System for Redis {
    fn name(&self) -> &'static str {
        "Redis"
    }

    fn version(&self) -> Result<String> {
        Ok(format!(
            "{}, blocking client of this program",
            said_version("redis-server", "--version")?
        ))
    }

    fn broker(&self, port: u16, directory: &Path) -> Result<Option<Command>> {
        server(port, directory)
    }

    fn publisher(&self, place: &Place, _subscribers: usize) -> Result<Box<dyn Publisher>> {
        Ok(Box::new(Sending {
            stream: stream::connect(place.broker)?,
            topic: place.topic.clone(),
            waiting: Vec::new(),
            commands: 0,
            outstanding: 0,
            buffer: vec![0; 16 * 1024],
        }))
    }

    fn subscriber(&self, place: &Place) -> Result<Box<dyn Subscriber>> {
        let mut stream = stream::connect(place.broker)?;
        let subscribe = format!("SUBSCRIBE {}\r\n", place.topic);
        stream::ask(&mut stream, &subscribe, "*3")?;
        for _ in 0..5 {
            stream::line(&mut stream)?;
        }
        Ok(Box::new(Frames::new(stream, split)))
    }

    fn window(&self) -> Option<u64> {
        Some(WINDOW)
    }
}

struct Sending {
    stream: TcpStream,
    topic: String,
    waiting: Vec<u8>,
    commands: usize,
    outstanding: usize,
    buffer: Vec<u8>,
}

impl Sending {
    fn write(&mut self) -> Result<()> {
        self.stream.write_all(&self.waiting)?;
        self.waiting.clear();
        self.outstanding += self.commands;
        self.commands = 0;
        Ok(())
    }

    /// Each answer is a line, how many have got the event.
    fn answers(&mut self, left: usize) -> Result<()> {
        while self.outstanding > left {
            let count = self.stream.read(&mut self.buffer)?;
            let text = &self.buffer[..count];
            if count == 0 || text.contains(&b'-') {
                return Err(format!("redis: {}", String::from_utf8_lossy(text)).into());
            }
            self.outstanding -= text.iter().filter(|byte| **byte == b'\n').count();
        }
        Ok(())
    }
}

impl Publisher for Sending {
    fn send(&mut self, event: &[u8]) -> Result<()> {
        self.push(event)?;
        self.flush()
    }

    fn push(&mut self, event: &[u8]) -> Result<()> {
        write!(
            self.waiting,
            "*3\r\n$7\r\nPUBLISH\r\n${}\r\n{}\r\n${}\r\n",
            self.topic.len(),
            self.topic,
            event.len()
        )?;
        self.waiting.extend_from_slice(event);
        self.waiting.extend_from_slice(b"\r\n");
        self.commands += 1;
        if self.waiting.len() >= BATCH_BYTES {
            self.write()?;
            self.answers(OUTSTANDING)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.write()?;
        self.answers(0)
    }
}

/// `*3`, then `message`, the channel and the event, each after its length.
fn split(buffer: &[u8]) -> Result<Option<Frame<'_>>> {
    let Some(mut rest) = buffer.strip_prefix(b"*3\r\n") else {
        return match buffer.len() {
            0..4 => Ok(None),
            _ => Err("redis sent something else than a message".into()),
        };
    };
    let mut last: &[u8] = &[];
    for _ in 0..3 {
        let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
            return Ok(None);
        };
        let length = rest[..end].trim_ascii().strip_prefix(b"$");
        let length = length.ok_or("redis sent something else than a string")?;
        let length: usize = std::str::from_utf8(length)?.parse()?;
        let Some((part, after)) = rest[end + 1..].split_at_checked(length + 2) else {
            return Ok(None);
        };
        last = &part[..length];
        rest = after;
    }
    Ok(Some((rest, Some(last))))
}
