//! One connection of the guest: its TCP ends here, in a stack of its own (smoltcp), and a socket of the host goes on.
//!
//! The host's connection is made first. So the guest hears of a port where nobody listens as it would from the machine
//! itself, and a stack is there only for connections that are.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, sockopt};
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as Micros;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, IpListenEndpoint};

use crate::gateway::{Key, Outgoing};

/// How long the host may take to connect.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// How long the guest may leave bytes unacknowledged. A guest that is paused has that long.
const ACKNOWLEDGE_LIMIT: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(600);

/// How long a connection may carry nothing (RFC 5382, REQ-5: not less than 2 h 4 min).
const IDLE_LIMIT: Duration = Duration::from_secs(2 * 3600 + 4 * 60);

/// Bytes that wait in each direction.
const BUFFER_BYTES: usize = 128 << 10;

/// Longest packet, as on the guests' network.
const MTU_BYTES: usize = 65_535;

/// A connection.
pub struct Flow {
    stream: OwnedFd,
    token: u64,
    stage: Stage,
    last: Instant,
}

enum Stage {
    /// The host connects; the guest's question waits.
    Connecting { question: Vec<u8> },
    /// Both have a connection.
    Open(Box<Open>),
}

/// What a look at a connection found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// It goes on.
    Lives,
    /// It is over on both sides.
    Over,
    /// The host could not connect.
    Failed(Errno),
}

struct Open {
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    /// The guest sends no more, and the host's side was told.
    guest_ended: bool,
    /// The host's side sends no more, and the guest was told.
    host_ended: bool,
}

impl Flow {
    /// For the guest's first segment, over a socket that connects.
    /// `token`: what epoll calls it.
    pub fn new(stream: OwnedFd, token: u64, question: Vec<u8>, now: Instant) -> Self {
        Self {
            stream,
            token,
            stage: Stage::Connecting { question },
            last: now,
        }
    }

    /// What epoll calls it.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// The first segment, while the host connects.
    pub fn question(&self) -> Option<&[u8]> {
        match &self.stage {
            Stage::Connecting { question } => Some(question),
            Stage::Open(_) => None,
        }
    }

    /// Moves what can be moved. `packet`: one that the guest sent on this connection.
    pub fn tend(
        &mut self,
        key: Key,
        packet: Option<Vec<u8>>,
        clock: Clock,
        outgoing: &mut Outgoing,
    ) -> Found {
        let mut packet = packet;
        if let Stage::Connecting { question } = &mut self.stage {
            match connected(&self.stream) {
                Ok(false) if clock.now >= self.last + CONNECT_LIMIT => {
                    return Found::Failed(Errno::TIMEDOUT);
                }
                Ok(false) => return Found::Lives,
                Ok(true) => {}
                Err(e) => return Found::Failed(e),
            }
            let Some(open) = Open::new(key, clock) else {
                return Found::Failed(Errno::NOMEM);
            };
            // The guest may have asked again; the first time is enough.
            packet = Some(std::mem::take(question));
            self.stage = Stage::Open(Box::new(open));
            self.last = clock.now;
        }
        let Stage::Open(open) = &mut self.stage else {
            return Found::Lives;
        };
        if clock.now >= self.last + IDLE_LIMIT {
            open.socket().abort();
        }
        let (found, moved) = open.tend(&self.stream, packet, clock, outgoing);
        if moved {
            self.last = clock.now;
        }
        found
    }

    /// When it is to be looked at, if nothing happens before.
    pub fn deadline(&mut self, clock: Clock) -> Instant {
        match &mut self.stage {
            Stage::Connecting { .. } => self.last + CONNECT_LIMIT,
            Stage::Open(open) => {
                let idle = self.last + IDLE_LIMIT;
                let wanted = open.interface.poll_delay(clock.micros(), &open.sockets);
                wanted.map_or(idle, |wanted| idle.min(clock.now + wanted.into()))
            }
        }
    }
}

/// Whether the host is connected; why it never will be.
fn connected(stream: &OwnedFd) -> Result<bool, Errno> {
    sockopt::socket_error(stream)??;
    match rustix::net::getpeername(stream) {
        Ok(_) => Ok(true),
        Err(Errno::NOTCONN) => Ok(false),
        Err(e) => Err(e),
    }
}

impl Open {
    fn new(key: Key, clock: Clock) -> Option<Self> {
        let mut seed = [0; 8];
        // Sequence numbers that a guest can foresee are those of its own connections.
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty()).ok()?;
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = u64::from_ne_bytes(seed);
        let mut outgoing = Outgoing::default();
        let mut wire = Wire {
            incoming: None,
            outgoing: &mut outgoing,
        };
        let mut interface = Interface::new(config, &mut wire, clock.micros());
        let (address, port) = key.world;
        interface.update_ip_addrs(|addresses| {
            // There is room for one at least.
            let _ = addresses.push(IpCidr::new(IpAddress::Ipv6(address), 128));
        });
        // The guest is behind the one wire that there is.
        interface
            .routes_mut()
            .add_default_ipv6_route(address)
            .ok()?;
        let buffer = || SocketBuffer::new(vec![0; BUFFER_BYTES]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket.set_timeout(Some(ACKNOWLEDGE_LIMIT));
        let listen = IpListenEndpoint {
            addr: Some(IpAddress::Ipv6(address)),
            port,
        };
        socket.listen(listen).ok()?;
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Some(Self {
            interface,
            sockets,
            handle,
            guest_ended: false,
            host_ended: false,
        })
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// Also says whether bytes went either way.
    fn tend(
        &mut self,
        stream: &OwnedFd,
        packet: Option<Vec<u8>>,
        clock: Clock,
        outgoing: &mut Outgoing,
    ) -> (Found, bool) {
        let mut wire = Wire {
            incoming: packet,
            outgoing,
        };
        let mut moved_any = false;
        // Ends: what comes from the guest is in the packet, and what goes to it in a buffer that only it empties.
        loop {
            let polled = self
                .interface
                .poll(clock.micros(), &mut wire, &mut self.sockets);
            let moved = self.give_host(stream) | self.give_guest(stream);
            moved_any |= moved;
            if !moved && polled == PollResult::None {
                break;
            }
        }
        let (guest_ended, host_ended) = (self.guest_ended, self.host_ended);
        let found = match self.socket().state() {
            // Whoever waits for the last acknowledgement to get lost waits for a reset.
            State::TimeWait => Found::Over,
            State::Closed => {
                if !(guest_ended && host_ended) {
                    // Cut off, not ended: so is the host's connection when it is closed.
                    let _ = sockopt::set_socket_linger(stream, Some(Duration::ZERO));
                }
                Found::Over
            }
            _ => Found::Lives,
        };
        (found, moved_any)
    }

    fn give_host(&mut self, stream: &OwnedFd) -> bool {
        let mut moved = false;
        let ended = self.guest_ended;
        let socket = self.socket();
        while !ended && socket.can_recv() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let sent = socket.recv(|bytes| match send(stream, bytes, flags) {
                Ok(len) => (len, Ok(())),
                Err(e) => (0, Err(e)),
            });
            match sent {
                Ok(Ok(())) => moved = true,
                Ok(Err(Errno::INTR)) => {}
                Ok(Err(Errno::AGAIN)) => return moved,
                Ok(Err(_)) | Err(_) => {
                    socket.abort();
                    return true;
                }
            }
        }
        let by_guest = matches!(
            socket.state(),
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait
        );
        if by_guest && !ended && !socket.can_recv() {
            // Not connected any more: the next read says why.
            let _ = rustix::net::shutdown(stream, Shutdown::Write);
            self.guest_ended = true;
            moved = true;
        }
        moved
    }

    fn give_guest(&mut self, stream: &OwnedFd) -> bool {
        let mut moved = false;
        let ended = self.host_ended;
        let socket = self.socket();
        while !ended && socket.can_send() {
            let taken = socket.send(|room| {
                if room.is_empty() {
                    return (0, Err(Errno::NOBUFS));
                }
                match recv(stream, room, RecvFlags::DONTWAIT) {
                    Ok((_, len)) => (len, Ok(len)),
                    Err(e) => (0, Err(e)),
                }
            });
            match taken {
                Ok(Ok(0)) => {
                    socket.close();
                    self.host_ended = true;
                    return true;
                }
                Ok(Ok(_)) => moved = true,
                Ok(Err(Errno::INTR)) => {}
                Ok(Err(Errno::AGAIN | Errno::NOBUFS)) => return moved,
                Ok(Err(_)) | Err(_) => {
                    socket.abort();
                    return true;
                }
            }
        }
        moved
    }
}

/// One moment, as the host and as smoltcp count it.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    /// The process's beginning.
    pub start: Instant,
    /// The moment.
    pub now: Instant,
}

impl Clock {
    fn micros(self) -> Micros {
        let micros = (self.now - self.start).as_micros();
        // 292,000 years.
        Micros::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }
}

/// The wire to the guest, for a moment.
struct Wire<'w> {
    incoming: Option<Vec<u8>>,
    outgoing: &'w mut Outgoing,
}

struct Incoming(Vec<u8>);

struct Room<'w>(&'w mut Outgoing);

impl phy::RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for Wire<'_> {
    type RxToken<'t>
        = Incoming
    where
        Self: 't;
    type TxToken<'t>
        = Room<'t>
    where
        Self: 't;

    fn receive(&mut self, _: Micros) -> Option<(Incoming, Room<'_>)> {
        // Room for the one answer that a packet gets was seen to when it was read.
        let packet = self.incoming.take()?;
        Some((Incoming(packet), Room(self.outgoing)))
    }

    fn transmit(&mut self, _: Micros) -> Option<Room<'_>> {
        self.outgoing.has_room().then_some(Room(self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU_BYTES;
        capabilities
    }
}
