//! Bytes between descriptors and streams, within the windows.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use xbee_protocol::{GuestMessage, MAX_DATA_BYTES, STREAM_WINDOW_BYTES, StreamBody};

use crate::session::Outbox;

/// Credit is given when this much has been passed on, in bytes.
pub(crate) const CREDIT_STEP_BYTES: u32 = STREAM_WINDOW_BYTES / 4;
/// Read from one descriptor in one go; then it is others' turn.
const CHUNK_BYTES: usize = 32 * 1024;

pub(crate) fn message(stream: u32, body: StreamBody) -> GuestMessage {
    GuestMessage::Stream { stream, body }
}

/// From a descriptor to the host.
#[derive(Debug)]
pub(crate) struct Source {
    stream: u32,
    fd: Option<OwnedFd>,
    /// Bytes that may be sent.
    window: u32,
    ended: bool,
}

/// What became of a [`Source::pump`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pumped {
    /// There is nothing more now.
    Empty,
    /// There may be more.
    More,
    /// The window or the connection has no room.
    NoRoom,
    /// It has ended.
    End,
}

impl Source {
    pub(crate) fn new(stream: u32, fd: OwnedFd) -> Source {
        Source {
            stream,
            fd: Some(fd),
            window: STREAM_WINDOW_BYTES,
            ended: false,
        }
    }

    pub(crate) fn stream(&self) -> u32 {
        self.stream
    }

    pub(crate) fn credit(&mut self, bytes: u32) {
        self.window = self.window.saturating_add(bytes);
    }

    /// The descriptor, if what it has can be sent.
    pub(crate) fn wanted(&self) -> Option<&OwnedFd> {
        self.fd.as_ref().filter(|_| self.window > 0)
    }

    /// Sends what is there.
    pub(crate) fn pump(&mut self, out: &mut Outbox) -> Pumped {
        let Some(fd) = &self.fd else {
            return Pumped::End;
        };
        let room = CHUNK_BYTES.min(MAX_DATA_BYTES).min(self.window as usize);
        if room == 0 || !out.has_room() {
            return Pumped::NoRoom;
        }
        let mut data = vec![0; room];
        match rustix::io::read(fd, &mut data) {
            Ok(length) if length > 0 => {
                data.truncate(length);
                self.window -= length as u32;
                out.push(&message(self.stream, StreamBody::Data(data)));
                Pumped::More
            }
            Err(Errno::AGAIN) => Pumped::Empty,
            Err(Errno::INTR) => Pumped::More,
            // The end; a terminal without processes says EIO, a broken connection what broke it.
            _ => {
                self.end(out);
                Pumped::End
            }
        }
    }

    /// Closes it and tells the host, once.
    pub(crate) fn end(&mut self, out: &mut Outbox) {
        self.fd = None;
        if !std::mem::replace(&mut self.ended, true) {
            out.push(&message(self.stream, StreamBody::End));
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }
}

/// How a descriptor is told that nothing more comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Close {
    /// A pipe: by closing it.
    Pipe,
    /// A socket: by shutting one direction down.
    Socket,
    /// A terminal: by its end-of-file character.
    Terminal,
}

/// From the host to a descriptor.
#[derive(Debug)]
pub(crate) struct Sink {
    stream: u32,
    fd: Option<OwnedFd>,
    close: Close,
    buffer: VecDeque<u8>,
    /// Bytes passed on since credit was given last.
    passed: u32,
    /// The host has said its last.
    end_seen: bool,
}

/// End of transmission, `VEOF` of a terminal as it is opened.
const END_OF_TRANSMISSION: u8 = 4;

impl Sink {
    pub(crate) fn new(stream: u32, fd: OwnedFd, close: Close) -> Sink {
        Sink {
            stream,
            fd: Some(fd),
            close,
            buffer: VecDeque::new(),
            passed: 0,
            end_seen: false,
        }
    }

    /// The descriptor, if there is something for it.
    pub(crate) fn wanted(&self) -> Option<&OwnedFd> {
        self.fd.as_ref().filter(|_| !self.buffer.is_empty())
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.end_seen && self.fd.is_none()
    }

    /// Takes bytes from the host.
    pub(crate) fn data(&mut self, bytes: &[u8], out: &mut Outbox) {
        if self.fd.is_some() {
            self.buffer.extend(bytes);
            self.pump(out);
        } else {
            // Nobody reads: as with `>/dev/null`, the host is not to wait.
            self.passed(bytes.len(), out);
        }
    }

    /// Nothing more comes from the host.
    pub(crate) fn end(&mut self, out: &mut Outbox) {
        self.end_seen = true;
        self.pump(out);
    }

    /// Writes what fits.
    pub(crate) fn pump(&mut self, out: &mut Outbox) {
        while let Some(fd) = &self.fd {
            let (front, _) = self.buffer.as_slices();
            if front.is_empty() {
                break;
            }
            match rustix::io::write(fd, front) {
                Ok(length) => {
                    self.buffer.drain(..length);
                    self.passed(length, out);
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => {
                    // The other end is gone.
                    let rest = self.buffer.len();
                    self.buffer.clear();
                    self.fd = None;
                    self.passed(rest, out);
                }
            }
        }
        if self.end_seen && self.buffer.is_empty() {
            self.close();
        }
    }

    fn close(&mut self) {
        let Some(fd) = self.fd.take() else { return };
        // Who is gone already need not be told.
        match self.close {
            Close::Pipe => {}
            Close::Socket => {
                let _gone = rustix::net::shutdown(&fd, rustix::net::Shutdown::Write);
            }
            Close::Terminal => {
                let _gone = rustix::io::write(&fd, &[END_OF_TRANSMISSION]);
            }
        }
    }

    fn passed(&mut self, bytes: usize, out: &mut Outbox) {
        self.passed += bytes as u32;
        if self.passed >= CREDIT_STEP_BYTES {
            out.push(&message(
                self.stream,
                StreamBody::Credit(std::mem::take(&mut self.passed)),
            ));
        }
    }
}
