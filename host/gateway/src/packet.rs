//! Packets of IPv6, TCP, UDP and ICMPv6, as far as they are read and written here. Pure; every byte is the guest's word.

use std::net::Ipv6Addr;

/// IPv6's fixed header (RFC 8200, section 3).
pub const IPV6_BYTES: usize = 40;
/// Longest packet: the fixed header and as much as it can say.
pub const MAX_BYTES: usize = IPV6_BYTES + 0xffff;
/// Fixed header of TCP (RFC 9293, section 3.1).
const TCP_BYTES: usize = 20;
/// Header of UDP (RFC 768).
const UDP_BYTES: usize = 8;
/// Header of ICMPv6's errors (RFC 4443, section 3.1).
const ICMP_BYTES: usize = 8;
/// Most of a packet that an error quotes: the error fits in IPv6's smallest MTU (RFC 4443, section 3.1).
const QUOTE_MAX_BYTES: usize = 1280 - IPV6_BYTES - ICMP_BYTES;
/// What routers begin with (RFC 1700).
const HOP_LIMIT: u8 = 64;

/// Next header of TCP.
pub const TCP: u8 = 6;
/// Next header of UDP.
pub const UDP: u8 = 17;
/// Next header of ICMPv6.
pub const ICMP: u8 = 58;

/// Why a packet went nowhere, as ICMPv6 has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreachable {
    /// No route to the destination (type 1, code 0).
    NoRoute,
    /// Communication is administratively prohibited (code 1).
    Prohibited,
    /// Address unreachable (code 3).
    Address,
    /// Port unreachable (code 4).
    Port,
}

/// A packet of IPv6 whose lengths agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet<'p> {
    /// Who sends it.
    pub source: Ipv6Addr,
    /// For whom it is.
    pub destination: Ipv6Addr,
    /// What the content is.
    pub protocol: u8,
    /// What is behind the fixed header.
    pub content: &'p [u8],
    /// All of it.
    pub whole: &'p [u8],
}

fn address(bytes: &[u8]) -> Option<Ipv6Addr> {
    Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

impl<'p> Packet<'p> {
    /// Reads a packet; what is behind it is cut off.
    pub fn read(bytes: &'p [u8]) -> Option<Self> {
        let (header, rest) = bytes.split_at_checked(IPV6_BYTES)?;
        if header.first()? >> 4 != 6 {
            return None;
        }
        let content = rest.get(..u16_at(header, 4)?.into())?;
        Some(Self {
            source: address(header.get(8..24)?)?,
            destination: address(header.get(24..40)?)?,
            protocol: *header.get(6)?,
            content,
            whole: bytes.get(..IPV6_BYTES + content.len())?,
        })
    }

    /// The header of TCP, if it is TCP and its checksum is right.
    pub fn tcp(&self) -> Option<Tcp> {
        let flags = *self.content.get(13)?;
        let header_bytes = usize::from(*self.content.get(12)? >> 4) * 4;
        if self.protocol != TCP || header_bytes < TCP_BYTES || !self.is_whole() {
            return None;
        }
        Some(Tcp {
            source_port: u16_at(self.content, 0)?,
            destination_port: u16_at(self.content, 2)?,
            sequence: u32_at(self.content, 4)?,
            acknowledgement: u32_at(self.content, 8)?,
            flags,
            payload_bytes: self.content.len().checked_sub(header_bytes)? as u32,
        })
    }

    /// The datagram, if it is UDP and its checksum is right, without which IPv6 has none (RFC 8200, section 8.1).
    pub fn udp(&self) -> Option<Udp<'p>> {
        let bytes: usize = u16_at(self.content, 4)?.into();
        if self.protocol != UDP || bytes != self.content.len() || u16_at(self.content, 6)? == 0 {
            return None;
        }
        self.is_whole().then_some(Udp {
            source_port: u16_at(self.content, 0)?,
            destination_port: u16_at(self.content, 2)?,
            payload: self.content.get(UDP_BYTES..)?,
        })
    }

    /// Whether it is an error of ICMPv6, which is never answered (RFC 4443, section 2.4).
    pub fn is_error(&self) -> bool {
        self.protocol == ICMP && self.content.first().is_none_or(|kind| *kind < 128)
    }

    fn is_whole(&self) -> bool {
        checksum(self.source, self.destination, self.protocol, self.content) == 0
    }
}

/// What is read of TCP's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tcp {
    /// The sender's port.
    pub source_port: u16,
    /// The receiver's port.
    pub destination_port: u16,
    /// Number of the first byte, or of SYN.
    pub sequence: u32,
    /// Number of the byte that is expected next.
    pub acknowledgement: u32,
    /// See [`flag`].
    pub flags: u8,
    /// Bytes behind the header.
    pub payload_bytes: u32,
}

/// Bits of [`Tcp::flags`].
pub mod flag {
    #![allow(missing_docs)] // the names are the standard's
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const ACK: u8 = 16;
}

impl Tcp {
    /// Whether it asks for a connection.
    pub fn opens(&self) -> bool {
        self.flags & (flag::SYN | flag::ACK | flag::RST | flag::FIN) == flag::SYN
    }
}

/// A datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Udp<'p> {
    /// The sender's port.
    pub source_port: u16,
    /// The receiver's port.
    pub destination_port: u16,
    /// What it carries.
    pub payload: &'p [u8],
}

/// The Internet checksum with IPv6's pseudo-header (RFC 8200, section 8.1); 0 for content that has the right one in it.
pub fn checksum(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, content: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u64 {
        let (pairs, rest) = bytes.as_chunks::<2>();
        let sum: u64 = pairs
            .iter()
            .map(|pair| u64::from(u16::from_be_bytes(*pair)))
            .sum();
        sum + rest.first().map_or(0, |last| u64::from(*last) << 8)
    };
    let mut sum = words(&source.octets())
        + words(&destination.octets())
        + content.len() as u64
        + u64::from(protocol)
        + words(content);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A packet whose content has its checksum at `checksum_at`, which must be in it. At most 65,535 bytes of content.
fn packet(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    protocol: u8,
    checksum_at: usize,
    mut content: Vec<u8>,
) -> Vec<u8> {
    let mut sum = checksum(source, destination, protocol, &content);
    if protocol == UDP && sum == 0 {
        // 0 would say that there is none (RFC 768).
        sum = 0xffff;
    }
    if let Some(field) = content.get_mut(checksum_at..checksum_at + 2) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
    let mut packet = Vec::with_capacity(IPV6_BYTES + content.len());
    packet.extend([0x60, 0, 0, 0]);
    packet.extend((content.len() as u16).to_be_bytes());
    packet.extend([protocol, HOP_LIMIT]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(content);
    packet
}

/// Longest payload of a datagram, in bytes.
pub const DATAGRAM_MAX_BYTES: usize = 0xffff - UDP_BYTES;

/// A packet with a datagram, of at most [`DATAGRAM_MAX_BYTES`].
pub fn datagram(
    (source, source_port): (Ipv6Addr, u16),
    (destination, destination_port): (Ipv6Addr, u16),
    payload: &[u8],
) -> Vec<u8> {
    let mut content = Vec::with_capacity(UDP_BYTES + payload.len());
    content.extend(source_port.to_be_bytes());
    content.extend(destination_port.to_be_bytes());
    content.extend(((UDP_BYTES + payload.len()) as u16).to_be_bytes());
    content.extend([0; 2]);
    content.extend(payload);
    packet(source, destination, UDP, 6, content)
}

/// The error that answers a packet, from the router.
pub fn unreachable(router: Ipv6Addr, why: Unreachable, asked: &Packet<'_>) -> Vec<u8> {
    let code = match why {
        Unreachable::NoRoute => 0,
        Unreachable::Prohibited => 1,
        Unreachable::Address => 3,
        Unreachable::Port => 4,
    };
    let mut content = vec![1, code, 0, 0, 0, 0, 0, 0];
    content.extend(asked.whole.iter().take(QUOTE_MAX_BYTES));
    packet(router, asked.source, ICMP, 2, content)
}

/// The reset that answers a segment which belongs to no connection (RFC 9293, section 3.5.2).
pub fn reset(asked: &Packet<'_>, tcp: &Tcp) -> Vec<u8> {
    let has = |bit: u8| tcp.flags & bit != 0;
    let (sequence, acknowledgement, flags) = if has(flag::ACK) {
        (tcp.acknowledgement, 0, flag::RST)
    } else {
        let taken = tcp.payload_bytes + u32::from(has(flag::SYN)) + u32::from(has(flag::FIN));
        (0, tcp.sequence.wrapping_add(taken), flag::RST | flag::ACK)
    };
    let mut content = Vec::with_capacity(TCP_BYTES);
    content.extend(tcp.destination_port.to_be_bytes());
    content.extend(tcp.source_port.to_be_bytes());
    content.extend(sequence.to_be_bytes());
    content.extend(acknowledgement.to_be_bytes());
    content.extend([5 << 4, flags, 0, 0, 0, 0, 0, 0]);
    packet(asked.destination, asked.source, TCP, 16, content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GUEST: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 3);
    const OTHER: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9);

    /// A segment of TCP with its checksum.
    fn segment(sequence: u32, acknowledgement: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut content = [1000u16.to_be_bytes(), 80u16.to_be_bytes()].concat();
        content.extend(sequence.to_be_bytes());
        content.extend(acknowledgement.to_be_bytes());
        content.extend([5 << 4, flags, 0, 0, 0, 0, 0, 0]);
        content.extend(payload);
        packet(GUEST, OTHER, TCP, 16, content)
    }

    #[test]
    fn a_checksum_is_that_of_the_standard() {
        // RFC 1071, section 3: the words 0001 f203 f4f5 f6f7 sum up to ddf2.
        let nobody = Ipv6Addr::UNSPECIFIED;
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(checksum(nobody, nobody, 0, &data), !(0xddf2 + 8));
        assert_eq!(checksum(nobody, nobody, 0, &[0xab]), !(0xab00 + 1));
    }

    #[test]
    fn a_datagram_is_read_as_it_was_written() {
        for payload in [&b""[..], b"x", b"four", &[7; DATAGRAM_MAX_BYTES]] {
            let bytes = datagram((GUEST, 5000), (OTHER, 53), payload);
            let packet = Packet::read(&bytes).unwrap();
            assert_eq!((packet.source, packet.destination), (GUEST, OTHER));
            let udp = packet.udp().unwrap();
            assert_eq!((udp.source_port, udp.destination_port), (5000, 53));
            assert_eq!(udp.payload, payload);
            let mut broken = bytes.clone();
            *broken.last_mut().unwrap() ^= 1;
            assert_eq!(Packet::read(&broken).unwrap().udp(), None);
        }
    }

    #[test]
    fn resets_are_those_that_the_other_side_believes() {
        let of = |bytes: &[u8]| {
            let asked = Packet::read(bytes).unwrap();
            let bytes = reset(&asked, &asked.tcp().unwrap());
            let answer = Packet::read(&bytes).unwrap();
            assert_eq!((answer.source, answer.destination), (OTHER, GUEST));
            let tcp = answer.tcp().unwrap();
            assert_eq!((tcp.source_port, tcp.destination_port), (80, 1000));
            (tcp.sequence, tcp.acknowledgement, tcp.flags)
        };
        let syn = segment(u32::MAX, 0, flag::SYN, b"");
        assert!(Packet::read(&syn).unwrap().tcp().unwrap().opens());
        assert_eq!(of(&syn), (0, 0, flag::RST | flag::ACK));
        let data = segment(10, 77, flag::ACK, b"12345");
        assert_eq!(of(&data), (77, 0, flag::RST));
        let fin = segment(10, 0, flag::FIN, b"12345");
        assert_eq!(of(&fin), (0, 16, flag::RST | flag::ACK));
    }

    #[test]
    fn errors_quote_what_they_are_about_and_fit() {
        let router = "fd00:1::1".parse().unwrap();
        for payload in [&b"short"[..], &[9; 60_000]] {
            let asked = datagram((GUEST, 5000), (OTHER, 53), payload);
            let bytes = unreachable(
                router,
                Unreachable::Prohibited,
                &Packet::read(&asked).unwrap(),
            );
            assert!(bytes.len() <= 1280);
            let error = Packet::read(&bytes).unwrap();
            assert!(error.is_error());
            assert_eq!((error.source, error.destination), (router, GUEST));
            assert_eq!(error.content[..2], [1, 1]);
            assert_eq!(checksum(router, GUEST, ICMP, error.content), 0);
            assert!(asked.starts_with(&error.content[ICMP_BYTES..]));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_not(
            mut bytes in prop::collection::vec(any::<u8>(), 0..200),
            protocol in prop::sample::select(vec![TCP, UDP, ICMP, 0, 44]),
        ) {
            Packet::read(&bytes);
            let content = bytes.split_off(bytes.len() / 2);
            let at = if protocol == TCP { 16 } else { 6 };
            let bytes = packet(GUEST, OTHER, protocol, at, content);
            let read = Packet::read(&bytes).unwrap();
            prop_assert_eq!(read.whole, &bytes[..]);
            if let Some(tcp) = read.tcp() {
                prop_assert!(tcp.payload_bytes as usize + TCP_BYTES <= read.content.len());
                reset(&read, &tcp);
            }
            if let Some(udp) = read.udp() {
                prop_assert_eq!(udp.payload.len() + UDP_BYTES, read.content.len());
            }
            unreachable(GUEST, Unreachable::Port, &read);
        }
    }
}
