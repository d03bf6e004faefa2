//! A stream that carries a source's frames to a sink in another kernel: TCP, TLS over it, or a link between guests.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::net::{RecvFlags, SendFlags, recv, send};
use xbee_link::Link;

use crate::tls::Session;

/// What rustls may hold that was not sent, in bytes.
const TLS_BUFFER_BYTES: usize = 256 << 10;

/// A connected stream. Nothing blocks.
#[derive(Debug)]
pub enum Wire {
    /// A socket.
    Plain(OwnedFd),
    /// TLS over a socket.
    Tls(Box<Tls>),
    /// A stream between guests, or between a guest and its host.
    Link(Link),
}

/// TLS over a socket, after its handshake.
#[derive(Debug)]
pub struct Tls {
    socket: Socket,
    connection: rustls::Connection,
    /// Whoever is at the other end is looked at as long as this is there.
    _session: Arc<Session>,
}

/// A socket as `Read` and `Write`.
#[derive(Debug)]
struct Socket(OwnedFd);

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(recv(&self.0, buffer, RecvFlags::DONTWAIT)?.0)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(
            &self.0,
            bytes,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Tls {
    /// Sends what rustls holds, as much as fits now.
    fn drain(&mut self) -> io::Result<()> {
        while self.connection.wants_write() {
            self.connection.write_tls(&mut self.socket)?;
        }
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
            // Nothing is there any more: the end, without TLS's word for it.
            if self.connection.read_tls(&mut self.socket)? == 0 {
                return Ok(0);
            }
            self.connection
                .process_new_packets()
                .map_err(io::Error::other)?;
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.connection.writer().write(bytes)?;
        match self.drain() {
            // Taken all the same: `flush` sends it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && taken > 0 => Ok(taken),
            Err(error) => Err(error),
            Ok(()) => Ok(taken),
        }
    }
}

impl Wire {
    /// TLS whose handshake is done, over this socket.
    pub(crate) fn tls(
        socket: OwnedFd,
        mut connection: rustls::Connection,
        session: Arc<Session>,
    ) -> Wire {
        connection.set_buffer_limit(Some(TLS_BUFFER_BYTES));
        Wire::Tls(Box::new(Tls {
            socket: Socket(socket),
            connection,
            _session: session,
        }))
    }

    /// The socket, where bytes go over it as they are.
    pub fn plain(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Wire::Plain(fd) => Some(fd.as_fd()),
            Wire::Tls(_) | Wire::Link(_) => None,
        }
    }

    /// Reads what is there; 0 at the end.
    ///
    /// # Errors
    /// `WouldBlock` where there is nothing now; what the system or TLS says.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Wire::Plain(fd) => Ok(recv(fd, buffer, RecvFlags::DONTWAIT)?.0),
            Wire::Tls(tls) => tls.read(buffer),
            Wire::Link(link) => link.read(buffer),
        }
    }

    /// Writes what fits now.
    ///
    /// # Errors
    /// `WouldBlock` where nothing fits now; what the system or TLS says.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Wire::Plain(fd) => Ok(send(fd, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?),
            Wire::Tls(tls) => tls.write(bytes),
            Wire::Link(link) => link.write(bytes),
        }
    }

    /// Sends what was taken and not sent yet.
    ///
    /// # Errors
    /// `WouldBlock` where not all fits now; what the system says.
    pub fn flush(&mut self) -> io::Result<()> {
        match self {
            Wire::Tls(tls) => tls.drain(),
            Wire::Plain(_) | Wire::Link(_) => Ok(()),
        }
    }

    /// Whether there is something to do without waiting for the descriptor.
    pub fn is_ready(&self, wants_to_write: bool) -> bool {
        match self {
            Wire::Link(link) => link.interest(wants_to_write).is_none(),
            Wire::Plain(_) | Wire::Tls(_) => false,
        }
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Wire::Plain(fd) => fd.as_fd(),
            Wire::Tls(tls) => tls.socket.0.as_fd(),
            Wire::Link(link) => link.as_fd(),
        }
    }
}
