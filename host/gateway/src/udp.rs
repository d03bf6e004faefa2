//! One guest's datagrams to one address and port, and what comes back.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send};

use crate::gateway::Key;
use crate::packet::{DATAGRAM_MAX_BYTES, datagram};

/// How long without a datagram either way. Questions about names take seconds.
pub const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// Datagrams taken from the host before it is another flow's turn.
const TURN_DATAGRAMS: usize = 16;

/// A flow of datagrams.
#[derive(Debug)]
pub struct Flow {
    key: Key,
    socket: OwnedFd,
    token: u64,
    last: Instant,
}

/// Makes a socket of the host that begins to connect to an address.
pub fn connect(kind: SocketType, to: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = match to {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, kind, flags, None)?;
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(e) => Err(e),
    }
}

impl Flow {
    /// Between the guest's end and the world's, over a connected socket. `token`: what epoll calls it.
    pub fn new(key: Key, socket: OwnedFd, token: u64, now: Instant) -> Self {
        Self {
            key,
            socket,
            token,
            last: now,
        }
    }

    /// What epoll calls it.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// When there was a datagram last.
    pub fn last(&self) -> Instant {
        self.last
    }

    /// The guest's datagram goes on. What the host does not take is lost, as datagrams are.
    pub fn send(&mut self, payload: &[u8], now: Instant) -> Result<(), Errno> {
        self.last = now;
        match send(
            &self.socket,
            payload,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        ) {
            Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS | Errno::MSGSIZE) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Gives some of what came back to `give`, as packets. An error: nobody is there, says the other side.
    pub fn take(
        &mut self,
        buffer: &mut [u8],
        now: Instant,
        mut give: impl FnMut(Vec<u8>),
    ) -> Result<(), Errno> {
        let room = buffer.len().min(DATAGRAM_MAX_BYTES);
        for _ in 0..TURN_DATAGRAMS {
            match recv(&self.socket, &mut buffer[..room], RecvFlags::DONTWAIT) {
                Ok((_, len)) => {
                    self.last = now;
                    let payload = buffer.get(..len).unwrap_or_default();
                    give(datagram(self.key.world, self.key.guest, payload));
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The guest's end as a packet of its own, without what it carried: for an error about it.
    pub fn asked(&self) -> Vec<u8> {
        datagram(self.key.guest, self.key.world, &[])
    }
}
