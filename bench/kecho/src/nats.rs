//! NATS, with a client of its own: blocking, and quicker than the crate async-nats, which has a row too.

use std::io::Write as _;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;

use crate::stream::{self, BATCH_BYTES, Frame, Frames};
use crate::system::{Place, Publisher, Result, Subscriber, System, said_version};

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
        let subscribe = format!("SUB {} 1\r\nPING\r\n", place.topic);
        stream::ask(&mut stream, &subscribe, "PONG")?;
        Ok(Box::new(Frames::new(stream, split)))
    }

    fn window(&self) -> Option<u64> {
        Some(WINDOW)
    }
}

fn connect(port: u16) -> Result<TcpStream> {
    let mut stream = stream::connect(port)?;
    let info = stream::line(&mut stream)?;
    if !info.starts_with("INFO ") {
        return Err(format!("nats-server began with {info:?}").into());
    }
    let connect = "CONNECT {\"verbose\":false,\"pedantic\":false}\r\nPING\r\n";
    stream::ask(&mut stream, connect, "PONG")?;
    Ok(stream)
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

fn split(buffer: &[u8]) -> Result<Option<Frame<'_>>> {
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
