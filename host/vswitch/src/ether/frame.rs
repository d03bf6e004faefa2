//! What a guest's frame is, and whether it may pass. Pure; every byte is the guest's word.
//!
//! Only IPv6 passes, from the guest's own hardware address and one of its own addresses. Neighbour
//! discovery (RFC 4861) never passes: questions are for the switch, answers and claims are nobody's.

use std::net::Ipv6Addr;

use super::neighbour;

/// Destination, source, type (IEEE 802.3).
pub const ETHERNET_BYTES: usize = 14;
/// IPv6's fixed header (RFC 8200, section 3).
pub const IPV6_BYTES: usize = 40;
/// Longest frame: the longest IPv6 packet.
pub const MAX_BYTES: usize = ETHERNET_BYTES + IPV6_BYTES + 0xffff;

/// Type of frames with IPv6 (RFC 2464, section 3).
pub const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// Most extension headers looked through; packets with more do not pass.
const EXTENSIONS_MAX: usize = 8;

// Next headers (RFC 8200, section 4).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
/// ICMPv6 (RFC 4443).
pub const ICMP: u8 = 58;

// Types of ICMPv6: RFC 2710, RFC 3810, RFC 4861.
const MLD_QUERY: u8 = 130;
const MLD_REPORT: u8 = 131;
const MLD_DONE: u8 = 132;
const ROUTER_SOLICITATION: u8 = 133;
pub(super) const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
pub(super) const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
const MLD2_REPORT: u8 = 143;

/// Who a guest is on the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    mac: [u8; 6],
    address: Ipv6Addr,
}

impl Identity {
    /// Of a card with this hardware address, whose guest was given that address.
    pub fn new(mac: [u8; 6], address: Ipv6Addr) -> Self {
        Self { mac, address }
    }

    /// The hardware address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// The first 64 bits of its address.
    pub fn prefix(&self) -> u64 {
        (self.address.to_bits() >> 64) as u64
    }

    /// Those it may send from: the one it was given, and the two that it makes of its hardware address, on
    /// the link and in the network (RFC 4862, section 5; RFC 4291, appendix A).
    pub fn addresses(&self) -> [Ipv6Addr; 3] {
        [
            self.address,
            neighbour::of_mac(neighbour::LINK_LOCAL, self.mac),
            neighbour::of_mac(self.prefix(), self.mac),
        ]
    }
}

/// What becomes of a frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict<'f> {
    /// It does not pass.
    Denied,
    /// Nothing is wrong with it, and nobody needs it: reports of groups, answers that the switch gives.
    Quiet,
    /// It asks for routers.
    RouterSolicitation,
    /// It asks whose an address is.
    NeighbourSolicitation {
        /// The address.
        target: Ipv6Addr,
        /// Who asks; unspecified: one who wants to take the address.
        from: Ipv6Addr,
    },
    /// It is for one card, if the guest may reach that one.
    Unicast {
        /// The card's hardware address.
        to: [u8; 6],
        /// Without what was behind the packet.
        frame: &'f [u8],
    },
    /// It is for all whom the guest may reach.
    Multicast {
        /// Without what was behind the packet.
        frame: &'f [u8],
    },
}

/// Judges a frame that came from the card with this identity.
pub fn judge<'f>(frame: &'f [u8], who: &Identity) -> Verdict<'f> {
    parse(frame, who).unwrap_or(Verdict::Denied)
}

fn address(bytes: &[u8]) -> Option<Ipv6Addr> {
    Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?))
}

/// `None`: denied.
fn parse<'f>(frame: &'f [u8], who: &Identity) -> Option<Verdict<'f>> {
    let (ethernet, packet) = frame.split_at_checked(ETHERNET_BYTES)?;
    let to: [u8; 6] = ethernet.get(..6)?.try_into().ok()?;
    if ethernet.get(6..12)? != who.mac || ethernet.get(12..)? != ETHERTYPE_IPV6 {
        return None;
    }
    let (header, rest) = packet.split_at_checked(IPV6_BYTES)?;
    if header.first()? >> 4 != 6 {
        return None;
    }
    let payload_bytes: [u8; 2] = header.get(4..6)?.try_into().ok()?;
    let payload = rest.get(..u16::from_be_bytes(payload_bytes).into())?;
    let frame = frame.get(..ETHERNET_BYTES + IPV6_BYTES + payload.len())?;
    let (source, destination) = (address(header.get(8..24)?)?, address(header.get(24..40)?)?);
    let own = who.addresses().contains(&source);
    let (protocol, content) = last(*header.get(6)?, payload)?;
    if protocol == ICMP {
        let kind = *content.first()?;
        match kind {
            MLD_REPORT | MLD_DONE | MLD2_REPORT if own || source.is_unspecified() => {
                return Some(Verdict::Quiet);
            }
            ROUTER_SOLICITATION | NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT => {
                // From the link itself, and whole (RFC 4861, sections 6.1.1, 7.1.1 and 7.1.2).
                let valid = *header.get(7)? == 255
                    && *header.get(6)? == ICMP
                    && *content.get(1)? == 0
                    && (own || source.is_unspecified() && kind != NEIGHBOUR_ADVERTISEMENT)
                    && neighbour::checksum(source, destination, content) == 0;
                return valid
                    .then(|| discovery(kind, content, source, who))
                    .flatten();
            }
            MLD_QUERY..=REDIRECT | MLD2_REPORT => return None,
            _ => {}
        }
    }
    if !own || destination.is_unspecified() || destination.is_loopback() {
        return None;
    }
    // Groups of addresses and groups of cards belong together (RFC 2464, section 7).
    match (destination.is_multicast(), to) {
        (true, [0x33, 0x33, ..]) => Some(Verdict::Multicast { frame }),
        (false, [first, ..]) if first & 1 == 0 => Some(Verdict::Unicast { to, frame }),
        _ => None,
    }
}

/// The packet of a frame that may pass and is for the router, if it is for elsewhere than the link and the guests' own network,
/// of which only the router's address is left. From there nobody can answer a link-local address.
pub fn leaving<'f>(frame: &'f [u8], who: &Identity) -> Option<&'f [u8]> {
    let packet = frame.get(ETHERNET_BYTES..)?;
    let (source, destination) = (address(packet.get(8..24)?)?, address(packet.get(24..40)?)?);
    (is_outside(destination, who) && !source.is_unicast_link_local()).then_some(packet)
}

/// The frame for a guest that a packet from elsewhere becomes, if it is in order, for that guest, and not in the name of
/// anybody in the guests' own network but the router.
pub fn entering(packet: &[u8], who: &Identity) -> Option<Vec<u8>> {
    let (header, content) = packet.split_at_checked(IPV6_BYTES)?;
    let (source, destination) = (address(header.get(8..24)?)?, address(header.get(24..40)?)?);
    let payload_bytes: [u8; 2] = header.get(4..6)?.try_into().ok()?;
    let in_order = header.first()? >> 4 == 6
        && usize::from(u16::from_be_bytes(payload_bytes)) == content.len()
        && is_outside(source, who)
        && who.addresses().contains(&destination)
        && !destination.is_unicast_link_local();
    let (protocol, content) = last(*header.get(6)?, content)?;
    // What belongs to a link comes from nowhere else.
    let of_link =
        protocol == ICMP && matches!(*content.first()?, MLD_QUERY..=REDIRECT | MLD2_REPORT);
    (in_order && !of_link).then(|| {
        let mut frame = Vec::with_capacity(ETHERNET_BYTES + packet.len());
        frame.extend(who.mac);
        frame.extend(neighbour::ROUTER_MAC);
        frame.extend(ETHERTYPE_IPV6);
        frame.extend(packet);
        frame
    })
}

/// Whether an address is neither of the link nor in the guests' own network, or the router's.
fn is_outside(address: Ipv6Addr, who: &Identity) -> bool {
    let prefix = (address.to_bits() >> 64) as u64;
    let nowhere = address.is_multicast()
        || address.is_unspecified()
        || address.is_loopback()
        || address.is_unicast_link_local();
    !nowhere && (prefix != who.prefix() || address == neighbour::router_address(prefix))
}

fn discovery(kind: u8, content: &[u8], from: Ipv6Addr, who: &Identity) -> Option<Verdict<'static>> {
    if kind == ROUTER_SOLICITATION {
        return (content.len() >= 8).then_some(Verdict::RouterSolicitation);
    }
    let target = address(content.get(8..24)?)?;
    if kind == NEIGHBOUR_ADVERTISEMENT {
        // What it says of itself is known here already.
        return who.addresses().contains(&target).then_some(Verdict::Quiet);
    }
    (!target.is_multicast() && !target.is_unspecified())
        .then_some(Verdict::NeighbourSolicitation { target, from })
}

/// What is behind the extension headers. `None` where that cannot be told, and for fragments of what
/// must be looked into.
fn last(mut next: u8, mut rest: &[u8]) -> Option<(u8, &[u8])> {
    for _ in 0..=EXTENSIONS_MAX {
        match next {
            HOP_BY_HOP | ROUTING | DESTINATION => {
                let bytes = (usize::from(*rest.get(1)?) + 1) * 8;
                next = *rest.first()?;
                rest = rest.get(bytes..)?;
            }
            FRAGMENT => {
                // Of a fragment only the first header is known (RFC 8200, section 4.5). Discovery in
                // fragments is forbidden anyway (RFC 6980).
                let content = rest.get(8..)?;
                return match *rest.first()? {
                    HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT | ICMP => None,
                    protocol => Some((protocol, content)),
                };
            }
            _ => return Some((next, rest)),
        }
    }
    None
}
