//! One connection that keeps messages apart, to QEMU or to a gateway: what listens for it, then what waits for it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, SocketType};

use super::queue::Queue;
use super::{EtherError, TURN_FRAMES};
use crate::socket;

/// A connection. See the module's documentation.
#[derive(Debug)]
pub struct Line {
    path: PathBuf,
    /// What epoll calls it.
    token: u64,
    /// The listening socket, then the connection.
    socket: OwnedFd,
    connected: bool,
    /// What was not taken in time.
    queue: Queue,
    /// What it is watched for.
    watched: EventFlags,
    /// Nothing is read from it for a while.
    paused: bool,
}

impl Line {
    /// Listens on `path`, where one connection is taken; then the name is removed.
    pub fn listen(epoll: &OwnedFd, path: PathBuf, token: u64) -> Result<Self, EtherError> {
        let listener = socket::listen_as(SocketType::SEQPACKET, &path, None)?;
        if let Err(e) = watch(epoll, &listener, token) {
            socket::unlink(&path);
            return Err(EtherError::Resources(e));
        }
        Ok(Self {
            path,
            token,
            socket: listener,
            connected: false,
            queue: Queue::default(),
            watched: EventFlags::IN,
            paused: false,
        })
    }

    /// What epoll calls it.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// Whether the connection was made.
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// What waits for the other side to take it.
    pub fn queue(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Messages that were lost for want of room.
    pub fn dropped(&self) -> u64 {
        self.queue.dropped()
    }

    /// Takes the one connection that it has.
    pub fn accept(&mut self, epoll: &OwnedFd) -> io::Result<()> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let connection = match rustix::net::accept_with(&self.socket, flags) {
            Ok(connection) => connection,
            Err(Errno::AGAIN) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        watch(epoll, &connection, self.token)?;
        self.socket = connection;
        self.connected = true;
        socket::unlink(&self.path);
        Ok(())
    }

    /// The length of the next message, of which the buffer has what fits. `None`: there is none now. An error: nor will there be.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
        loop {
            return match rustix::net::recv(&self.socket, &mut *buffer, flags) {
                Ok((_, 0)) => Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((_, len)) => Ok(Some(len)),
                Err(Errno::AGAIN) => Ok(None),
                Err(Errno::INTR) => continue,
                Err(e) => Err(e.into()),
            };
        }
    }

    /// Gives the other side a message, now (true) or when it takes one again.
    pub fn send(&mut self, epoll: &OwnedFd, from: u64, message: &[u8]) -> bool {
        if self.queue.is_empty() && write(&self.socket, message) {
            return true;
        }
        self.queue.push(from, message);
        self.watch_for(epoll);
        false
    }

    /// Gives the other side what has waited for it; how many messages.
    pub fn give(&mut self, epoll: &OwnedFd) -> u64 {
        let mut given = 0;
        while given < TURN_FRAMES as u64
            && let Some(message) = self.queue.first()
            && write(&self.socket, message)
        {
            self.queue.pop();
            given += 1;
        }
        self.watch_for(epoll);
        given
    }

    /// Stops reading from it, or goes on.
    pub fn pause(&mut self, epoll: &OwnedFd, paused: bool) {
        self.paused = paused;
        self.watch_for(epoll);
    }

    fn watch_for(&mut self, epoll: &OwnedFd) {
        let mut wanted = EventFlags::empty();
        wanted.set(EventFlags::IN, !self.paused);
        wanted.set(EventFlags::OUT, !self.queue.is_empty());
        if wanted == self.watched {
            return;
        }
        let data = epoll::EventData::new_u64(self.token);
        match epoll::modify(epoll, &self.socket, data, wanted) {
            Ok(()) => self.watched = wanted,
            Err(e) => tracing::error!(error = %e, "a network card is not watched as it should be"),
        }
    }
}

impl Drop for Line {
    /// Closing the socket takes it out of what is watched, and tells the other side.
    fn drop(&mut self) {
        if !self.connected {
            socket::unlink(&self.path);
        }
    }
}

fn watch(epoll: &OwnedFd, socket: &impl AsFd, token: u64) -> io::Result<()> {
    let data = epoll::EventData::new_u64(token);
    Ok(epoll::add(epoll, socket, data, EventFlags::IN)?)
}

/// Whether the message is done with: taken, or nobody is there any more, which the next read says.
fn write(socket: &OwnedFd, message: &[u8]) -> bool {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let written = rustix::io::retry_on_intr(|| rustix::net::send(socket, message, flags));
    !matches!(written, Err(Errno::AGAIN | Errno::NOBUFS))
}
