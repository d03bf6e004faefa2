//! A connection of a guest tied to a unix stream: [`Conn`] with its I/O.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::epoll::EventFlags;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use crate::conn::Conn;

/// What the host side is told when the guest takes its connection.
#[derive(Debug)]
pub enum Greeting {
    /// `OK <port>\n`, to a program of the host that said `CONNECT`.
    Port(u32),
    /// One byte, to the switch's own end of another guest's connection.
    Guest,
}

/// The byte of [`Greeting::Guest`].
const ACCEPTED: &[u8] = b"\x01";

/// A connection and its unix stream.
#[derive(Debug)]
pub struct Link {
    /// The guest's side.
    pub conn: Conn,
    stream: UnixStream,
    greeting: Option<Greeting>,
    readable: bool,
    writable: bool,
    write_ended: bool,
    read_ended: bool,
    /// The link stands in the queue of links that may have a packet.
    pub queued: bool,
    /// When the present state has lasted too long.
    pub deadline: Option<Instant>,
}

impl Link {
    /// Ties `conn` to `stream`.
    pub fn new(conn: Conn, stream: UnixStream, greeting: Option<Greeting>) -> Self {
        Self {
            conn,
            stream,
            greeting,
            readable: true,
            writable: true,
            write_ended: false,
            read_ended: false,
            queued: false,
            deadline: None,
        }
    }

    /// Takes note of an edge-triggered event on the stream.
    pub fn on_event(&mut self, events: EventFlags) {
        let hung_up = events.intersects(EventFlags::HUP | EventFlags::ERR);
        self.readable |= hung_up || events.intersects(EventFlags::IN | EventFlags::RDHUP);
        self.writable |= hung_up || events.contains(EventFlags::OUT);
        if events.contains(EventFlags::HUP) {
            self.conn.host_deaf();
        }
    }

    /// Reads once from the stream, as much as the guest has room for.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        if !self.readable {
            return;
        }
        if self.conn.is_dialling() {
            match self.read(&mut buffer[..1]) {
                Some(0) => self.conn.refuse(),
                Some(_) => self.conn.accept(),
                None => return,
            }
        }
        let window = self.conn.host_window().min(buffer.len());
        if window == 0 {
            self.conn.want_credit();
            return;
        }
        match self.read(&mut buffer[..window]) {
            Some(0) => self.conn.host_eof(),
            Some(n) => self.conn.push_from_host(&buffer[..n]),
            None => {}
        }
    }

    /// `None`: nothing there yet. 0: the end, by whatever cause.
    fn read(&mut self, buffer: &mut [u8]) -> Option<usize> {
        loop {
            match recv(&self.stream, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((n, _)) => return Some(n),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    self.readable = false;
                    return None;
                }
                Err(_) => {
                    // The other end is gone for good; so is what it would have read.
                    self.conn.host_deaf();
                    return Some(0);
                }
            }
        }
    }

    /// Writes what the guest sent, and passes on ended directions.
    pub fn flush(&mut self) {
        if self.conn.is_established()
            && let Some(greeting) = self.greeting.take()
        {
            let text = match greeting {
                Greeting::Port(port) => format!("OK {port}\n").into_bytes(),
                Greeting::Guest => ACCEPTED.to_vec(),
            };
            // The stream's buffer is empty: a short write can only mean that nobody reads.
            if self.write(&text) != Ok(text.len()) {
                self.conn.host_deaf();
            }
        }
        while self.writable && !self.conn.to_host().is_empty() {
            match self.write(self.conn.to_host()) {
                Ok(n) => self.conn.delivered(n),
                Err(rustix::io::Errno::AGAIN) => self.writable = false,
                Err(_) => self.conn.host_deaf(),
            }
        }
        if self.conn.to_host_ended() && !self.write_ended {
            self.write_ended = true;
            // Fails only if the other end is gone, which its own event reports.
            let _ = shutdown(&self.stream, Shutdown::Write);
        }
        if self.conn.guest_deaf() && !self.read_ended {
            self.read_ended = true;
            let _ = shutdown(&self.stream, Shutdown::Read);
        }
    }

    fn write(&self, bytes: &[u8]) -> rustix::io::Result<usize> {
        rustix::io::retry_on_intr(|| {
            send(
                &self.stream,
                bytes,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            )
        })
    }
}

/// What a host program's first line says.
#[derive(Debug, PartialEq, Eq)]
pub enum Hello {
    /// `CONNECT <port>\n`.
    Connect(u32),
    /// The line is not complete.
    Partial,
    /// Not that line, or the end of the stream.
    Invalid,
}

/// Reads `CONNECT <port>\n` and not a byte more (Firecracker's hybrid vsock convention).
pub fn read_hello(stream: &UnixStream) -> io::Result<Hello> {
    let line = match read_line(stream)? {
        Line::Text(line) => line,
        Line::Partial => return Ok(Hello::Partial),
        Line::Invalid => return Ok(Hello::Invalid),
    };
    let port = line.strip_prefix("CONNECT ").and_then(|p| p.parse().ok());
    Ok(port.map_or(Hello::Invalid, Hello::Connect))
}

/// The first line of a host program.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// What it says, without spaces at its end.
    Text(String),
    /// It is not complete.
    Partial,
    /// It is too long or no text, or the stream has ended.
    Invalid,
}

/// Longest first line in bytes: `CONNECT 4294967295 4294967295\n` and a little grace.
const LINE_MAX: usize = 48;

/// Reads a line and not a byte more.
pub fn read_line(stream: &UnixStream) -> io::Result<Line> {
    let mut line = [0u8; LINE_MAX];
    let n = match recv(
        stream.as_fd(),
        &mut line,
        RecvFlags::PEEK | RecvFlags::DONTWAIT,
    ) {
        Ok((n, _)) => n,
        Err(rustix::io::Errno::AGAIN) => return Ok(Line::Partial),
        Err(e) => return Err(e.into()),
    };
    let Some(end) = line[..n].iter().position(|&b| b == b'\n') else {
        return Ok(if n == 0 || n == LINE_MAX {
            Line::Invalid
        } else {
            Line::Partial
        });
    };
    recv(stream.as_fd(), &mut line[..=end], RecvFlags::DONTWAIT)?;
    let text = std::str::from_utf8(&line[..end]);
    Ok(text.map_or(Line::Invalid, |text| Line::Text(text.trim_end().to_owned())))
}
