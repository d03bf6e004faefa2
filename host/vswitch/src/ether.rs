//! The guests' Ethernet: a switch that carries IPv6 between guests of one owner, and nothing else.
//!
//! A guest's card is a unix socket that keeps messages apart (`SOCK_SEQPACKET`), one frame a message: what
//! connects to it hands it to QEMU (`-netdev dgram`). [`frame`] says what of a guest's frames may pass. Whose
//! address is whose is known here from the start, so neighbour discovery goes no further than this
//! switch, which answers in everybody's place ([`neighbour`]): no guest can claim anything.
//!
//! One thread serves all cards, a few frames of each in turn. What a guest does not take in time waits
//! in a bounded queue of its own ([`queue`]), from which those who send most lose first.
//!
//! A card may have an uplink: what its guest sends to its router goes there, a packet a message, and what comes back
//! goes to the guest. The switch says of such a card's network that it has a router. Who is at the other end says what
//! may be reached; here it is seen to that nothing goes there that is for the guests' own network, and that nothing comes from
//! there in the name of anybody in it.

use std::collections::HashMap;
use std::io;
use std::net::Ipv6Addr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventFlags};
use serde::{Deserialize, Serialize};

use crate::socket::SocketError;
use frame::{Identity, Verdict};
use line::Line;

mod line;

pub mod frame;
pub mod neighbour;
pub mod queue;

/// Most cards of one guest.
pub const CARDS_MAX: usize = 8;

/// Frames taken from a card before it is another's turn; each copy to a further guest counts, too.
const TURN_FRAMES: usize = 32;

/// How long a guest may believe that it has a router, in seconds; for those that no agent told.
const ROUTER_LIFETIME_S: u16 = 1800;
/// How often it is told again: two of these may get lost.
const ROUTER_PERIOD: Duration = Duration::from_secs(600);

/// A card, as `attach-interface` gets it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CardSpec {
    /// The guest's context identifier.
    pub cid: u32,
    /// Where the connection is made that becomes QEMU's. One is taken, then the name is removed.
    pub socket: PathBuf,
    /// The only hardware address it sends from.
    pub mac: [u8; 6],
    /// The guest's address. It may send from this one, and from those that it makes of its hardware
    /// address in the network of 64 bits that this one is in, and on its link.
    pub address: Ipv6Addr,
    /// Guests of the same owner that say so too may be reached, and may reach it.
    pub peers: bool,
}

/// A card's uplink, as `attach-uplink` gets it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UplinkSpec {
    /// The guest's context identifier.
    pub cid: u32,
    /// The card's hardware address.
    pub mac: [u8; 6],
    /// Where the gateway's connection is made. One is taken, then the name is removed.
    pub socket: PathBuf,
}

/// A card as `list` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CardStatus {
    /// Its hardware address.
    pub mac: [u8; 6],
    /// The guest's address.
    pub address: Ipv6Addr,
    /// Frames that it sent and that were passed on, or answered.
    pub frames_in: u64,
    /// Frames that it was given.
    pub frames_out: u64,
    /// Frames that it sent and may not, or to whom it may not.
    pub denied: u64,
    /// Frames for it that it did not take in time.
    pub dropped: u64,
    /// It has an uplink that is connected.
    #[serde(default)]
    pub uplink: bool,
    /// Packets that it sent and its uplink did not take in time.
    #[serde(default)]
    pub uplink_dropped: u64,
    /// Packets that its uplink sent and may not.
    #[serde(default)]
    pub uplink_denied: u64,
}

/// Why a card could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum EtherError {
    /// Not an address of one card, or the switch's own.
    #[error("{} is no hardware address for a guest", mac_text(.0))]
    InvalidMac([u8; 6]),
    /// Not an address of one machine, or the switch's own.
    #[error("{0} is no address for a guest")]
    InvalidAddress(Ipv6Addr),
    /// Another domain's card has it.
    #[error("the hardware address {} is in use by the domain with CID {cid}", mac_text(.mac))]
    MacInUse {
        /// The address.
        mac: [u8; 6],
        /// Whose it is.
        cid: u32,
    },
    /// Another card has it.
    #[error("the address {address} is in use by the domain with CID {cid}")]
    AddressInUse {
        /// The address.
        address: Ipv6Addr,
        /// Whose it is.
        cid: u32,
    },
    /// The limit is reached.
    #[error("the domain has {CARDS_MAX} network cards already")]
    TooManyCards,
    /// No such card.
    #[error("the domain with CID {cid} has no network card {}", mac_text(.mac))]
    UnknownCard {
        /// The hardware address.
        mac: [u8; 6],
        /// The domain.
        cid: u32,
    },
    /// The socket could not be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// No descriptors, threads or memory left.
    #[error("cannot serve network cards: raise the limit of open files or threads")]
    Resources(#[source] io::Error),
}

impl EtherError {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidMac(_) => "invalid-mac",
            Self::InvalidAddress(_) => "invalid-address",
            Self::MacInUse { .. } => "mac-in-use",
            Self::AddressInUse { .. } => "address-in-use",
            Self::TooManyCards => "too-many-cards",
            Self::UnknownCard { .. } => "unknown-card",
            Self::Socket(e) => e.code(),
            Self::Resources(_) => "no-resources",
        }
    }
}

fn mac_text(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// A card and the guest behind it.
#[derive(Debug)]
struct Card {
    spec: CardSpec,
    owner: String,
    identity: Identity,
    /// To QEMU.
    line: Line,
    /// To the gateway.
    uplink: Option<Line>,
    frames_in: u64,
    frames_out: u64,
    denied: u64,
    uplink_denied: u64,
}

impl Card {
    /// Whether the two see each other: the one place that says so.
    fn sees(&self, other: &Self) -> bool {
        self.spec.cid != other.spec.cid
            && self.spec.peers
            && other.spec.peers
            && !self.owner.is_empty()
            && self.owner == other.owner
    }

    fn status(&self) -> CardStatus {
        CardStatus {
            mac: self.spec.mac,
            address: self.spec.address,
            frames_in: self.frames_in,
            frames_out: self.frames_out,
            denied: self.denied,
            dropped: self.line.dropped(),
            uplink: self.has_uplink(),
            uplink_dropped: self.uplink.as_ref().map_or(0, Line::dropped),
            uplink_denied: self.uplink_denied,
        }
    }

    fn has_uplink(&self) -> bool {
        self.uplink.as_ref().is_some_and(Line::is_connected)
    }

    /// What its network is at the moment.
    fn advertisement(&self) -> Vec<u8> {
        let lifetime_s = if self.uplink.is_some() {
            ROUTER_LIFETIME_S
        } else {
            0
        };
        neighbour::router_advertisement(&self.identity, lifetime_s)
    }
}

/// Cards by number; no number is used twice, for an uplink neither.
#[derive(Debug, Default)]
struct Table {
    cards: HashMap<u64, Card>,
    by_mac: HashMap<[u8; 6], u64>,
    by_address: HashMap<Ipv6Addr, u64>,
    /// Cards by the numbers of their uplinks.
    by_uplink: HashMap<u64, u64>,
    next: u64,
}

/// The switch of all cards of this host.
#[derive(Debug, Default)]
pub struct Ether {
    table: Mutex<Table>,
    /// What the thread waits with, once there is one: it begins with the first card.
    epoll: OnceLock<Arc<OwnedFd>>,
}

impl Ether {
    /// Each critical section of the thread ends with the table in order, also if a card's own state is
    /// not.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a card of an owner's guest. When this returns, the connection can be made. The same guest's card
    /// of the same hardware address is replaced.
    pub fn attach(self: &Arc<Self>, spec: CardSpec, owner: &str) -> Result<(), EtherError> {
        let identity = Identity::new(spec.mac, spec.address);
        // The first byte: neither a group's address (IEEE 802, clause 8), nor nobody's.
        if spec.mac[0] & 1 != 0 || spec.mac == [0; 6] || spec.mac == neighbour::ROUTER_MAC {
            return Err(EtherError::InvalidMac(spec.mac));
        }
        let address = spec.address;
        if address.is_multicast()
            || address.is_loopback()
            || address.is_unspecified()
            || address.is_unicast_link_local()
            || address == neighbour::router_address(identity.prefix())
        {
            return Err(EtherError::InvalidAddress(address));
        }
        let mut table = self.table();
        let epoll = self.start()?;
        if let Some(card) = table.of_mac(spec.mac) {
            if card.spec.cid != spec.cid {
                return Err(EtherError::MacInUse {
                    mac: spec.mac,
                    cid: card.spec.cid,
                });
            }
            table.remove_mac(spec.mac);
        }
        for address in identity.addresses() {
            if let Some(card) = table.of_address(address) {
                return Err(EtherError::AddressInUse {
                    address,
                    cid: card.spec.cid,
                });
            }
        }
        if table.of_domain(spec.cid).count() >= CARDS_MAX {
            return Err(EtherError::TooManyCards);
        }
        let number = table.next;
        let line = Line::listen(&epoll, spec.socket.clone(), number)?;
        table.next += 1;
        table.by_mac.insert(spec.mac, number);
        for address in identity.addresses() {
            table.by_address.insert(address, number);
        }
        let card = Card {
            spec,
            owner: owner.to_owned(),
            identity,
            line,
            uplink: None,
            frames_in: 0,
            frames_out: 0,
            denied: 0,
            uplink_denied: 0,
        };
        table.cards.insert(number, card);
        Ok(())
    }

    /// Gives a guest's card an uplink, in the place of one that it has. When this returns, the connection can be made.
    pub fn attach_uplink(self: &Arc<Self>, spec: UplinkSpec) -> Result<(), EtherError> {
        let UplinkSpec { cid, mac, socket } = spec;
        let mut table = self.table();
        let epoll = self.start()?;
        let number = table.by_mac.get(&mac).copied();
        let card = number.and_then(|number| table.cards.get(&number));
        let (Some(number), true) = (number, card.is_some_and(|card| card.spec.cid == cid)) else {
            return Err(EtherError::UnknownCard { mac, cid });
        };
        table.remove_uplink(number);
        let token = table.next;
        let line = Line::listen(&epoll, socket, token)?;
        table.next += 1;
        table.by_uplink.insert(token, number);
        if let Some(card) = table.cards.get_mut(&number) {
            card.uplink = Some(line);
        }
        Ok(())
    }

    /// Removes a guest's card. One that is not there is fine.
    pub fn detach(&self, cid: u32, mac: [u8; 6]) {
        let mut table = self.table();
        if table.of_mac(mac).is_some_and(|card| card.spec.cid == cid) {
            table.remove_mac(mac);
        }
    }

    /// Removes all cards of a domain.
    pub fn remove_domain(&self, cid: u32) {
        let mut table = self.table();
        let macs: Vec<_> = table.of_domain(cid).map(|card| card.spec.mac).collect();
        for mac in macs {
            table.remove_mac(mac);
        }
    }

    /// A domain's cards, by hardware address.
    pub fn list(&self, cid: u32) -> Vec<CardStatus> {
        let table = self.table();
        let mut all: Vec<_> = table.of_domain(cid).map(Card::status).collect();
        all.sort_by_key(|status| status.mac);
        all
    }

    /// Starts the thread, unless it runs. The caller holds the table, so that there is one.
    fn start(self: &Arc<Self>) -> Result<Arc<OwnedFd>, EtherError> {
        if let Some(epoll) = self.epoll.get() {
            return Ok(Arc::clone(epoll));
        }
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|e| EtherError::Resources(e.into()))?;
        let epoll = Arc::new(epoll);
        let (this, watched) = (Arc::clone(self), Arc::clone(&epoll));
        std::thread::Builder::new()
            .name("ether".into())
            .spawn(move || this.serve(&watched))
            .map_err(EtherError::Resources)?;
        Ok(Arc::clone(self.epoll.get_or_init(|| epoll)))
    }

    fn serve(&self, epoll: &OwnedFd) {
        let mut buffer = vec![0; frame::MAX_BYTES];
        let mut events = Vec::with_capacity(64);
        let mut advertised = Instant::now();
        loop {
            events.clear();
            let room = rustix::buffer::spare_capacity(&mut events);
            let left = ROUTER_PERIOD.saturating_sub(advertised.elapsed());
            let timeout = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            };
            match epoll::wait(epoll, room, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => {
                    tracing::error!(error = %e, "network cards are served no more");
                    return;
                }
            }
            for event in &events {
                // Let go after each turn: who attaches must not wait for all of them.
                let mut table = self.table();
                table.turn(epoll, event.data.u64(), event.flags, &mut buffer);
            }
            if advertised.elapsed() >= ROUTER_PERIOD {
                advertised = Instant::now();
                self.table().advertise(epoll);
            }
        }
    }
}

impl Table {
    fn of_mac(&self, mac: [u8; 6]) -> Option<&Card> {
        self.cards.get(self.by_mac.get(&mac)?)
    }

    fn of_address(&self, address: Ipv6Addr) -> Option<&Card> {
        self.cards.get(self.by_address.get(&address)?)
    }

    fn of_domain(&self, cid: u32) -> impl Iterator<Item = &Card> {
        self.cards.values().filter(move |card| card.spec.cid == cid)
    }

    fn remove_mac(&mut self, mac: [u8; 6]) {
        if let Some(number) = self.by_mac.get(&mac) {
            self.remove(*number);
        }
    }

    /// QEMU and the gateway are told by the ends of their connections.
    fn remove(&mut self, number: u64) {
        self.remove_uplink(number);
        let Some(card) = self.cards.remove(&number) else {
            return;
        };
        self.by_mac.remove(&card.spec.mac);
        for address in card.identity.addresses() {
            self.by_address.remove(&address);
        }
        for other in self.cards.values_mut() {
            other.line.queue().forget(number);
        }
    }

    fn remove_uplink(&mut self, number: u64) {
        if let Some(card) = self.cards.get_mut(&number)
            && let Some(uplink) = card.uplink.take()
        {
            card.line.queue().forget(uplink.token());
            self.by_uplink.remove(&uplink.token());
        }
    }

    /// A card's turn, or that of an uplink. One whose QEMU has gone is removed.
    fn turn(&mut self, epoll: &OwnedFd, token: u64, events: EventFlags, buffer: &mut [u8]) {
        if let Some(number) = self.by_uplink.get(&token) {
            self.turn_of_uplink(epoll, *number, events, buffer);
            return;
        }
        // It may have been removed since the event.
        let Some(card) = self.cards.get_mut(&token) else {
            return;
        };
        if !card.line.is_connected() {
            if let Err(e) = card.line.accept(epoll) {
                tracing::warn!(cid = card.spec.cid, error = %e, "network card without connection");
            }
            return;
        }
        if events.contains(EventFlags::OUT) {
            card.frames_out += card.line.give(epoll);
            if card.line.queue().is_empty()
                && let Some(uplink) = &mut card.uplink
            {
                uplink.pause(epoll, false);
            }
        }
        if events.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR)
            && let Err(e) = self.take(epoll, token, buffer)
        {
            if let Some(card) = self.cards.get(&token) {
                tracing::info!(cid = card.spec.cid, reason = %e, "network card is gone");
            }
            self.remove(token);
        }
    }

    /// An uplink's turn. One whose gateway has gone is removed; the guest is told that it has no router any more.
    fn turn_of_uplink(
        &mut self,
        epoll: &OwnedFd,
        number: u64,
        events: EventFlags,
        buffer: &mut [u8],
    ) {
        let Some(card) = self.cards.get_mut(&number) else {
            return;
        };
        let Some(uplink) = &mut card.uplink else {
            return;
        };
        if !uplink.is_connected() {
            if let Err(e) = uplink.accept(epoll) {
                tracing::warn!(cid = card.spec.cid, error = %e, "uplink without connection");
            }
            return;
        }
        if events.contains(EventFlags::OUT) {
            uplink.give(epoll);
        }
        if !events.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
            return;
        }
        let token = uplink.token();
        for _ in 0..TURN_FRAMES {
            let Some(uplink) = &mut card.uplink else {
                return;
            };
            let len = match uplink.receive(buffer) {
                Ok(Some(len)) => len,
                Ok(None) => return,
                Err(e) => {
                    tracing::info!(cid = card.spec.cid, reason = %e, "uplink is gone");
                    self.remove_uplink(number);
                    self.advertise_to(epoll, number);
                    return;
                }
            };
            let entering = buffer
                .get(..len)
                .and_then(|packet| frame::entering(packet, &card.identity));
            let Some(frame) = entering else {
                card.uplink_denied += 1;
                continue;
            };
            if !card.line.is_connected() {
                continue;
            }
            if card.line.send(epoll, token, &frame) {
                card.frames_out += 1;
            } else {
                // The gateway waits, and nothing of its gets lost.
                uplink.pause(epoll, true);
                return;
            }
        }
    }

    /// Says to all guests that have one that they have a router.
    fn advertise(&mut self, epoll: &OwnedFd) {
        let with_uplink = self.cards.iter().filter(|(_, card)| card.uplink.is_some());
        let numbers: Vec<u64> = with_uplink.map(|(number, _)| *number).collect();
        for number in numbers {
            self.advertise_to(epoll, number);
        }
    }

    fn advertise_to(&mut self, epoll: &OwnedFd, number: u64) {
        if let Some(card) = self.cards.get(&number) {
            let frame = card.advertisement();
            self.send(epoll, number, number, &frame);
        }
    }

    /// Takes frames from a card until it is another's turn. An error: there will be no more.
    fn take(&mut self, epoll: &OwnedFd, number: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut left = TURN_FRAMES;
        while left > 0 {
            let Some(card) = self.cards.get_mut(&number) else {
                return Ok(());
            };
            let Some(len) = card.line.receive(buffer)? else {
                return Ok(());
            };
            left -= 1;
            let Some(frame) = buffer.get(..len) else {
                card.denied += 1;
                continue;
            };
            match frame::judge(frame, &card.identity) {
                Verdict::Denied => card.denied += 1,
                Verdict::Quiet => card.frames_in += 1,
                Verdict::RouterSolicitation => {
                    card.frames_in += 1;
                    self.advertise_to(epoll, number);
                }
                Verdict::NeighbourSolicitation { target, from } => {
                    self.answer_for(epoll, number, target, from);
                }
                Verdict::Unicast { to, frame } if to == neighbour::ROUTER_MAC => {
                    let leaving = frame::leaving(frame, &card.identity);
                    let uplink = card.uplink.as_mut().filter(|uplink| uplink.is_connected());
                    if let (Some(packet), Some(uplink)) = (leaving, uplink) {
                        card.frames_in += 1;
                        uplink.send(epoll, number, packet);
                    } else {
                        card.denied += 1;
                    }
                }
                Verdict::Unicast { to, frame } => {
                    let other = self.by_mac.get(&to).copied();
                    let may = other.filter(|other| self.may(number, *other));
                    self.count(number, may.is_some());
                    if let Some(other) = may {
                        self.send(epoll, number, other, frame);
                    }
                }
                Verdict::Multicast { frame } => {
                    let others: Vec<u64> = self
                        .cards
                        .keys()
                        .copied()
                        .filter(|other| self.may(number, *other))
                        .collect();
                    self.count(number, true);
                    left = left.saturating_sub(others.len());
                    for other in others {
                        self.send(epoll, number, other, frame);
                    }
                }
            }
        }
        Ok(())
    }

    fn may(&self, from: u64, to: u64) -> bool {
        match (self.cards.get(&from), self.cards.get(&to)) {
            (Some(from), Some(to)) => from.sees(to),
            _ => false,
        }
    }

    fn count(&mut self, number: u64, allowed: bool) {
        if let Some(card) = self.cards.get_mut(&number) {
            if allowed {
                card.frames_in += 1;
            } else {
                card.denied += 1;
            }
        }
    }

    /// Answers a guest's question whose an address is.
    fn answer_for(&mut self, epoll: &OwnedFd, number: u64, target: Ipv6Addr, from: Ipv6Addr) {
        let Some(card) = self.cards.get(&number) else {
            return;
        };
        let of_router = neighbour::is_router(target, card.identity.prefix());
        let mac = if of_router {
            Some(neighbour::ROUTER_MAC)
        } else {
            let other = self.of_address(target).filter(|other| card.sees(other));
            other.map(|other| other.spec.mac)
        };
        let own = card.identity.addresses().contains(&target);
        let answer =
            mac.map(|mac| neighbour::advertisement(&card.identity, target, mac, from, of_router));
        // Whether somebody else has one's own address is everybody's to ask, and answered by silence.
        self.count(number, answer.is_some() || own);
        if let Some(answer) = answer {
            self.send(epoll, number, number, &answer);
        }
    }

    /// Gives a card a frame, now or when it takes one again.
    fn send(&mut self, epoll: &OwnedFd, from: u64, to: u64, frame: &[u8]) {
        let Some(card) = self.cards.get_mut(&to) else {
            return;
        };
        if card.line.is_connected() && card.line.send(epoll, from, frame) {
            card.frames_out += 1;
        }
    }
}
