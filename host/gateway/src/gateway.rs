//! All connections of one guest, and the one thread that serves them.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketType, recv, send, sockopt};

use crate::Plan;
use crate::packet::{self, MAX_BYTES, Packet, Unreachable};
use crate::policy::{Judgement, Policy};
use crate::tcp::{self, Clock, Found};
use crate::udp;

/// Most connections of a guest at a time, those included that are being made.
pub const CONNECTIONS_MAX: usize = 256;
/// Most flows of datagrams at a time; of more the oldest go.
pub const DATAGRAM_FLOWS_MAX: usize = 128;
/// Most bytes that wait for `vswitch` to take them; packets for which something waits otherwise do.
const OUTGOING_MAX_BYTES: usize = 1 << 20;
/// Packets of the guest taken before the host's sockets are looked at.
const TURN_PACKETS: usize = 64;

const UPLINK: u64 = 0;

/// A flow's two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Address and port of the guest.
    pub guest: (Ipv6Addr, u16),
    /// Address and port as the guest knows them.
    pub world: (Ipv6Addr, u16),
}

/// What waits to be sent to the guest.
#[derive(Debug, Default)]
pub struct Outgoing {
    packets: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Something was not sent for want of room.
    refused: bool,
}

impl Outgoing {
    /// Whether a connection may send a packet now. If not, it is asked again when there is room.
    pub fn has_room(&mut self) -> bool {
        let has = self.bytes < OUTGOING_MAX_BYTES;
        self.refused |= !has;
        has
    }

    /// Adds a packet, for which there is room.
    pub fn push(&mut self, packet: Vec<u8>) {
        self.bytes += packet.len();
        self.packets.push_back(packet);
    }

    /// Adds a packet that may get lost.
    fn offer(&mut self, packet: Vec<u8>) {
        if self.bytes < OUTGOING_MAX_BYTES {
            self.push(packet);
        }
    }

    /// Sends what the other side takes. True: all of it.
    fn flush(&mut self, uplink: &OwnedFd) -> io::Result<bool> {
        while let Some(packet) = self.packets.front() {
            match send(uplink, packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(_) => {}
                Err(Errno::AGAIN | Errno::NOBUFS) => return Ok(false),
                Err(Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
            }
            self.bytes -= packet.len();
            self.packets.pop_front();
        }
        Ok(true)
    }
}

/// Which flow a token of epoll's stands for.
#[derive(Debug, Clone, Copy)]
enum Watched {
    Tcp(Key),
    Udp(Key),
}

/// The guest's way out.
pub struct Gateway {
    router: Ipv6Addr,
    policy: Policy,
    uplink: OwnedFd,
    epoll: OwnedFd,
    start: Instant,
    connections: HashMap<Key, tcp::Flow>,
    datagrams: HashMap<Key, udp::Flow>,
    watched: HashMap<u64, Watched>,
    next_token: u64,
    outgoing: Outgoing,
    buffer: Vec<u8>,
}

impl Gateway {
    /// Takes the connection to `vswitch`, on which a message is a packet.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn new(plan: Plan, uplink: OwnedFd) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let gateway = Self {
            router: plan.router,
            policy: Policy::new(plan.router, plan.outbound)?,
            uplink,
            epoll,
            start: Instant::now(),
            connections: HashMap::new(),
            datagrams: HashMap::new(),
            watched: HashMap::new(),
            next_token: UPLINK + 1,
            outgoing: Outgoing::default(),
            buffer: vec![0; MAX_BYTES],
        };
        gateway.watch(&gateway.uplink, UPLINK, EventFlags::IN)?;
        Ok(gateway)
    }

    fn watch(&self, source: &impl AsFd, token: u64, flags: EventFlags) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token);
        Ok(epoll::add(&self.epoll, source, data, flags)?)
    }

    /// Serves until `vswitch` closes the connection.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn serve(mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(64);
        let mut was_watched = EventFlags::IN;
        loop {
            let all_sent = self.outgoing.flush(&self.uplink)?;
            if self.outgoing.bytes < OUTGOING_MAX_BYTES / 2
                && std::mem::take(&mut self.outgoing.refused)
            {
                self.tend_all();
                continue;
            }
            // Without room for answers no questions are taken.
            let mut wanted = EventFlags::empty();
            wanted.set(EventFlags::OUT, !all_sent);
            wanted.set(EventFlags::IN, self.outgoing.bytes < OUTGOING_MAX_BYTES);
            if wanted != was_watched {
                let data = epoll::EventData::new_u64(UPLINK);
                epoll::modify(&self.epoll, &self.uplink, data, wanted)?;
                was_watched = wanted;
            }
            self.wait(&mut events)?;
            let mut from_guest = false;
            for event in events.drain(..) {
                match event.data.u64() {
                    UPLINK => from_guest = true,
                    token => self.on_socket(token),
                }
            }
            if from_guest && !self.take()? {
                return Ok(());
            }
            self.expire();
        }
    }

    fn clock(&self) -> Clock {
        Clock {
            start: self.start,
            now: Instant::now(),
        }
    }

    fn wait(&mut self, events: &mut Vec<epoll::Event>) -> io::Result<()> {
        let clock = self.clock();
        let of_datagrams = self.datagrams.values().map(|f| f.last() + udp::IDLE_LIMIT);
        let of_datagrams = of_datagrams.min();
        // Those that have something to send and cannot wait for room.
        let connections = self.connections.values_mut();
        let of_connections = match self.outgoing.refused {
            true => None,
            false => connections.map(|flow| flow.deadline(clock)).min(),
        };
        let deadline = of_datagrams.into_iter().chain(of_connections).min();
        // A millisecond more than is left: what is due is done when it is due, and not just before.
        let timeout = deadline.map(|deadline| {
            deadline.saturating_duration_since(clock.now) + Duration::from_millis(1)
        });
        let timeout = timeout.map(|left| Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        });
        events.clear();
        let room = rustix::buffer::spare_capacity(events);
        match epoll::wait(&self.epoll, room, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Takes packets of the guest. False: there will be no more.
    fn take(&mut self) -> io::Result<bool> {
        for _ in 0..TURN_PACKETS {
            if self.outgoing.bytes >= OUTGOING_MAX_BYTES {
                break;
            }
            let mut buffer = std::mem::take(&mut self.buffer);
            let received = recv(&self.uplink, &mut buffer[..], RecvFlags::DONTWAIT);
            let result = match received {
                Ok((_, 0)) => Ok(false),
                Ok((_, len)) => {
                    if let Some(packet) = buffer.get(..len).and_then(Packet::read) {
                        self.on_packet(&packet);
                    }
                    Ok(true)
                }
                Err(Errno::AGAIN) => Err(None),
                Err(Errno::INTR) => Ok(true),
                Err(Errno::CONNRESET) => Ok(false),
                Err(e) => Err(Some(e)),
            };
            self.buffer = buffer;
            match result {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(None) => break,
                Err(Some(e)) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    fn on_packet(&mut self, packet: &Packet<'_>) {
        if let Some(tcp) = packet.tcp() {
            self.on_segment(packet, &tcp);
        } else if let Some(datagram) = packet.udp() {
            self.on_datagram(packet, &datagram);
        } else if !packet.is_error() {
            self.refuse(packet, Unreachable::Prohibited);
        }
    }

    fn refuse(&mut self, packet: &Packet<'_>, why: Unreachable) {
        let error = packet::unreachable(self.router, why, packet);
        self.outgoing.offer(error);
    }

    /// Where a packet may go on; otherwise it is answered.
    fn judge(&mut self, packet: &Packet<'_>, port: u16) -> Option<SocketAddr> {
        match self.policy.judge(packet.destination, port) {
            Judgement::Allowed(to) => return Some(to),
            Judgement::Prohibited => self.refuse(packet, Unreachable::Prohibited),
            Judgement::NoRoute => self.refuse(packet, Unreachable::NoRoute),
        }
        None
    }

    // ---- connections ----

    fn on_segment(&mut self, packet: &Packet<'_>, tcp: &packet::Tcp) {
        let key = Key {
            guest: (packet.source, tcp.source_port),
            world: (packet.destination, tcp.destination_port),
        };
        if self.connections.contains_key(&key) {
            self.tend(key, Some(packet.whole.to_vec()));
            return;
        }
        if !tcp.opens() {
            if tcp.flags & packet::flag::RST == 0 {
                self.outgoing.offer(packet::reset(packet, tcp));
            }
            return;
        }
        let Some(to) = self.judge(packet, tcp.destination_port) else {
            return;
        };
        if self.connections.len() >= CONNECTIONS_MAX {
            self.outgoing.offer(packet::reset(packet, tcp));
            return;
        }
        let token = self.next_token;
        let begun = udp::connect(SocketType::STREAM, to).and_then(|stream| {
            sockopt::set_tcp_nodelay(&stream, true)?;
            sockopt::set_socket_keepalive(&stream, true)?;
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            epoll::add(
                &self.epoll,
                &stream,
                epoll::EventData::new_u64(token),
                flags,
            )?;
            Ok(stream)
        });
        match begun {
            Ok(stream) => {
                self.next_token += 1;
                self.watched.insert(token, Watched::Tcp(key));
                let question = packet.whole.to_vec();
                let now = Instant::now();
                self.connections
                    .insert(key, tcp::Flow::new(stream, token, question, now));
                // It may be connected already.
                self.tend(key, None);
            }
            Err(e) => self.fail(packet, tcp, e),
        }
    }

    /// Tells the guest why the host could not connect.
    fn fail(&mut self, packet: &Packet<'_>, tcp: &packet::Tcp, why: Errno) {
        match why {
            Errno::NETUNREACH => self.refuse(packet, Unreachable::NoRoute),
            Errno::HOSTUNREACH | Errno::TIMEDOUT => self.refuse(packet, Unreachable::Address),
            Errno::ACCESS | Errno::PERM => self.refuse(packet, Unreachable::Prohibited),
            _ => self.outgoing.offer(packet::reset(packet, tcp)),
        }
    }

    fn tend(&mut self, key: Key, packet: Option<Vec<u8>>) {
        let clock = self.clock();
        let Some(flow) = self.connections.get_mut(&key) else {
            return;
        };
        let found = flow.tend(key, packet, clock, &mut self.outgoing);
        if found == Found::Lives {
            return;
        }
        let Some(flow) = self.connections.remove(&key) else {
            return;
        };
        self.watched.remove(&flow.token());
        if let (Found::Failed(why), Some(question)) = (found, flow.question())
            && let Some(packet) = Packet::read(question)
            && let Some(tcp) = packet.tcp()
        {
            self.fail(&packet, &tcp, why);
        }
    }

    fn tend_all(&mut self) {
        let keys: Vec<Key> = self.connections.keys().copied().collect();
        for key in keys {
            self.tend(key, None);
        }
    }

    // ---- datagrams ----

    fn on_datagram(&mut self, packet: &Packet<'_>, datagram: &packet::Udp<'_>) {
        let key = Key {
            guest: (packet.source, datagram.source_port),
            world: (packet.destination, datagram.destination_port),
        };
        let now = Instant::now();
        if !self.datagrams.contains_key(&key) {
            let Some(to) = self.judge(packet, datagram.destination_port) else {
                return;
            };
            if self.datagrams.len() >= DATAGRAM_FLOWS_MAX {
                let oldest = self.datagrams.iter().min_by_key(|(_, flow)| flow.last());
                if let Some(oldest) = oldest.map(|(key, _)| *key) {
                    self.forget_datagrams(oldest);
                }
            }
            let token = self.next_token;
            let begun = udp::connect(SocketType::DGRAM, to).and_then(|socket| {
                let data = epoll::EventData::new_u64(token);
                epoll::add(&self.epoll, &socket, data, EventFlags::IN)?;
                Ok(socket)
            });
            match begun {
                Ok(socket) => {
                    self.next_token += 1;
                    self.watched.insert(token, Watched::Udp(key));
                    self.datagrams
                        .insert(key, udp::Flow::new(key, socket, token, now));
                }
                Err(Errno::NETUNREACH) => return self.refuse(packet, Unreachable::NoRoute),
                // As if it had got lost.
                Err(_) => return,
            }
        }
        let sent = self
            .datagrams
            .get_mut(&key)
            .map(|flow| flow.send(datagram.payload, now));
        if let Some(Err(_)) = sent {
            self.forget_datagrams(key);
            self.refuse(packet, Unreachable::Port);
        }
    }

    fn forget_datagrams(&mut self, key: Key) -> Option<udp::Flow> {
        let flow = self.datagrams.remove(&key)?;
        self.watched.remove(&flow.token());
        Some(flow)
    }

    // ---- sockets and time ----

    fn on_socket(&mut self, token: u64) {
        match self.watched.get(&token) {
            Some(Watched::Tcp(key)) => self.tend(*key, None),
            Some(Watched::Udp(key)) => self.answers(*key),
            // Removed since the event.
            None => {}
        }
    }

    fn answers(&mut self, key: Key) {
        let now = Instant::now();
        let Some(flow) = self.datagrams.get_mut(&key) else {
            return;
        };
        let outgoing = &mut self.outgoing;
        let taken = flow.take(&mut self.buffer, now, |packet| outgoing.offer(packet));
        if taken.is_err()
            && let Some(flow) = self.forget_datagrams(key)
        {
            let asked = flow.asked();
            if let Some(asked) = Packet::read(&asked) {
                self.refuse(&asked, Unreachable::Port);
            }
        }
    }

    fn expire(&mut self) {
        let clock = self.clock();
        let idle = |flow: &udp::Flow| clock.now >= flow.last() + udp::IDLE_LIMIT;
        let old: Vec<Key> = self
            .datagrams
            .iter()
            .filter(|(_, flow)| idle(flow))
            .map(|(key, _)| *key)
            .collect();
        for key in old {
            self.forget_datagrams(key);
        }
        if self.outgoing.refused {
            return;
        }
        let due: Vec<Key> = self
            .connections
            .iter_mut()
            .filter_map(|(key, flow)| (flow.deadline(clock) <= clock.now).then_some(*key))
            .collect();
        for key in due {
            self.tend(key, None);
        }
    }
}
