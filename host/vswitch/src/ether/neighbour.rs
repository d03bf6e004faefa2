//! What the switch itself says on the network: who has which address, and what the network is (RFC 4861).

use std::net::Ipv6Addr;

use super::frame::{
    ETHERNET_BYTES, ETHERTYPE_IPV6, ICMP, IPV6_BYTES, Identity, NEIGHBOUR_ADVERTISEMENT,
    ROUTER_ADVERTISEMENT,
};

/// The switch's hardware address: that of the network's first number, which is the host's.
pub const ROUTER_MAC: [u8; 6] = [0x02, 0xbe, 0, 0, 0, 1];

/// The first 64 bits of addresses on the link (RFC 4291, section 2.5.6).
pub const LINK_LOCAL: u64 = 0xfe80 << 48;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Longest packet that cards take and the switch carries, in bytes: all that IPv6 can be.
pub const MTU_BYTES: u32 = 65_535;

/// Of a prefix that stays (RFC 4861, section 4.6.2).
const FOR_EVER: u32 = u32::MAX;

/// The address that is made of a hardware address (RFC 4291, appendix A).
pub fn of_mac(prefix: u64, mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let interface = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    Ipv6Addr::from_bits(u128::from(prefix) << 64 | u128::from(interface))
}

/// The switch's own address in a network.
pub fn router_address(prefix: u64) -> Ipv6Addr {
    Ipv6Addr::from_bits(u128::from(prefix) << 64 | 1)
}

/// Whether an address is the switch's own.
pub fn is_router(address: Ipv6Addr, prefix: u64) -> bool {
    address == router_address(prefix) || address == of_mac(LINK_LOCAL, ROUTER_MAC)
}

/// The answer to a router solicitation: what the network is, and for how many seconds the switch is a router to
/// elsewhere; 0: it is none. Addresses made of the network are for guests that got theirs from nobody else: they are never
/// preferred to those.
pub fn router_advertisement(to: &Identity, lifetime_s: u16) -> Vec<u8> {
    let mut message = vec![ROUTER_ADVERTISEMENT, 0, 0, 0];
    // Hop limit; no address by DHCP; the lifetime; nothing about the times of discovery.
    message.extend([64, 0]);
    message.extend(lifetime_s.to_be_bytes());
    message.extend([0; 8]);
    message.extend([1, 1]); // the source's hardware address
    message.extend(ROUTER_MAC);
    message.extend([5, 1, 0, 0]); // MTU
    message.extend(MTU_BYTES.to_be_bytes());
    message.extend([3, 4, 64, 0xc0]); // prefix: on the link, and for addresses
    message.extend(FOR_EVER.to_be_bytes());
    message.extend([0; 8]);
    message.extend(to.prefix().to_be_bytes());
    message.extend([0; 8]);
    frame(to, of_mac(LINK_LOCAL, ROUTER_MAC), ALL_NODES, message)
}

/// The answer to a neighbour solicitation: `target` is at `mac`. `asked_by` is the solicitation's source.
pub fn advertisement(
    to: &Identity,
    target: Ipv6Addr,
    mac: [u8; 6],
    asked_by: Ipv6Addr,
    is_router: bool,
) -> Vec<u8> {
    let solicited = !asked_by.is_unspecified();
    let flags = u8::from(is_router) << 7 | u8::from(solicited) << 6 | 1 << 5;
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend(target.octets());
    message.extend([2, 1]); // the target's hardware address
    message.extend(mac);
    let destination = if solicited { asked_by } else { ALL_NODES };
    frame(to, target, destination, message)
}

/// A whole frame for a card, from the switch.
fn frame(to: &Identity, source: Ipv6Addr, destination: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
    let sum = checksum(source, destination, &message);
    if let Some(field) = message.get_mut(2..4) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
    let mut frame = Vec::with_capacity(ETHERNET_BYTES + IPV6_BYTES + message.len());
    frame.extend(to.mac());
    frame.extend(ROUTER_MAC);
    frame.extend(ETHERTYPE_IPV6);
    frame.extend([0x60, 0, 0, 0]);
    // A message is a few dozen bytes long.
    frame.extend((message.len() as u16).to_be_bytes());
    frame.extend([ICMP, 255]);
    frame.extend(source.octets());
    frame.extend(destination.octets());
    frame.extend(message);
    frame
}

/// The checksum of a message of ICMPv6 (RFC 4443, section 2.3); 0 for one that has the right one in it.
pub fn checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u64 {
        bytes
            .chunks(2)
            .map(|pair| match *pair {
                [high, low] => u64::from(u16::from_be_bytes([high, low])),
                [high] => u64::from(high) << 8,
                _ => 0,
            })
            .sum()
    };
    let mut sum = words(&source.octets())
        + words(&destination.octets())
        + message.len() as u64
        + u64::from(ICMP)
        + words(message);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
