//! NATS, with a client of its own: blocking, and quicker than the crate async-nats, which has a row too.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::system::{Place, Publisher, Result, Subscriber, System, said_version};

/// Bytes that wait for a write when many events are pushed.
const BATCH_BYTES: usize = 32 * 1024;
const BUFFER_BYTES: usize = 64 * 1024;
/// Events that a publisher is ahead: the server drops a subscriber that is too slow.
pub const WINDOW: u64 = 16 * 1024;

pub struct Nats;

/// The server, which never gives a subscriber up.
pub fn server(port: u16, directory: &Path) -> Result<Option<Command>> {
    let config = directory.join("nats.conf");
    std::fs::write(
        &config,
        format!(
            "host: 127.0.0.1\nport: {port}\nmax_pending: 1GB\nwrite_deadline: \"60s\"\nping_interval: \"3600s\"\n"
        ),
    )?;
    let mut command = Command::new("nats-server");
    command.arg("-c").arg(config);
    Ok(Some(command))
}

impl System for Nats {
    fn name(&self) -> &'static str {
        "NATS"
    }

    fn version(&self) -> Result<String> {
        Ok(format!(
            "{}, blocking client of this program",
            said_version("nats-server", "--version")?
        ))
    }

    fn broker(&self, port: u16, directory: &Path) -> Result<Option<Command>> {
        server(port, directory)
    }

    fn publisher(&self, place: &Place, _subscribers: usize) -> Result<Box<dyn Publisher>> {
        Ok(Box::new(Sending {
            stream: connect(place.broker)?,
            topic: place.topic.clone(),
            waiting: Vec::new(),
        }))
    }

    fn subscriber(&self, place: &Place) -> Result<Box<dyn Subscriber>> {
        let mut stream = connect(place.broker)?;
        stream.write_all(format!("SUB {} 1\r\nPING\r\n", place.topic).as_bytes())?;
        let line = line(&mut stream)?;
        if line != "PONG" {
            return Err(format!("nats-server said {line:?} to SUB").into());
        }
        Ok(Box::new(Receiving {
            stream,
            patience: None,
            buffer: vec![0; BUFFER_BYTES],
            filled: 0,
        }))
    }

    fn window(&self) -> Option<u64> {
        Some(WINDOW)
    }
}

fn connect(port: u16) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_nodelay(true)?;
    let info = line(&mut stream)?;
    if !info.starts_with("INFO ") {
        return Err(format!("nats-server began with {info:?}").into());
    }
    stream.write_all(b"CONNECT {\"verbose\":false,\"pedantic\":false}\r\nPING\r\n")?;
    match line(&mut stream)?.as_str() {
        "PONG" => Ok(stream),
        other => Err(format!("nats-server said {other:?} to CONNECT").into()),
    }
}

/// Byte by byte: nothing after it is read.
fn line(stream: &mut TcpStream) -> Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\r\n") {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    line.truncate(line.len() - 2);
    Ok(String::from_utf8(line)?)
}

struct Sending {
    stream: TcpStream,
    topic: String,
    waiting: Vec<u8>,
}

impl Publisher for Sending {
    fn send(&mut self, event: &[u8]) -> Result<()> {
        self.push(event)?;
        self.flush()
    }

    fn push(&mut self, event: &[u8]) -> Result<()> {
        write!(self.waiting, "PUB {} {}\r\n", self.topic, event.len())?;
        self.waiting.extend_from_slice(event);
        self.waiting.extend_from_slice(b"\r\n");
        if self.waiting.len() >= BATCH_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.stream.write_all(&self.waiting)?;
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

/// What follows the first frame, if that is complete, and its event if it has one.
fn frame(buffer: &[u8]) -> Result<Option<(&[u8], Option<&[u8]>)>> {
    let Some(end) = buffer.iter().position(|byte| *byte == b'\n') else {
        return Ok(None);
    };
    let (line, rest) = (&buffer[..end], &buffer[end + 1..]);
    let Some(line) = line.strip_prefix(b"MSG ") else {
        return Ok(Some((rest, None)));
    };
    let length = line.trim_ascii().rsplit(|byte| *byte == b' ').next();
    let length: usize = std::str::from_utf8(length.unwrap_or_default())?.parse()?;
    match rest.split_at_checked(length + 2) {
        Some((event, rest)) => Ok(Some((rest, Some(&event[..length])))),
        None => Ok(None),
    }
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
            while let Some((after, event)) = frame(rest)? {
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
                Ok(0) => return Err("nats-server has closed the connection".into()),
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
