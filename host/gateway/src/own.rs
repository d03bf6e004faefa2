//! Which addresses are the host's own: the kernel's routing says so (rtnetlink(7)).

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send};

/// Where an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It is the host's own, or one for all: whatever is not plainly another machine's.
    Here,
    /// Another machine's.
    Elsewhere,
    /// There is no way to it.
    Nowhere,
}

// linux/rtnetlink.h, linux/netlink.h
const RTM_GETROUTE: u16 = 26;
const RTM_NEWROUTE: u16 = 24;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const RTA_DST: u16 = 1;
const RTN_UNICAST: u8 = 1;

/// Bytes of `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// Bytes of `struct rtmsg`.
const ROUTE_BYTES: usize = 12;
/// Where `rtm_type` is in it.
const TYPE_AT: usize = 7;

/// Asks the kernel.
#[derive(Debug)]
pub struct Lookup {
    socket: OwnedFd,
}

impl Lookup {
    /// A connection to the kernel.
    pub fn new() -> io::Result<Self> {
        // Without a protocol it is NETLINK_ROUTE. What is asked is answered before `send` returns.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        Ok(Self { socket })
    }

    /// Where an address is at this moment.
    pub fn place(&self, address: IpAddr) -> io::Result<Place> {
        send(&self.socket, &question(address), SendFlags::empty())?;
        let mut answer = [0; 4096];
        let (_, len) = recv(&self.socket, &mut answer[..], RecvFlags::empty())?;
        understand(answer.get(..len).unwrap_or(&answer))
            .ok_or_else(|| io::Error::other("the kernel's answer is none"))
    }
}

fn question(address: IpAddr) -> Vec<u8> {
    let (family, octets) = match address {
        IpAddr::V4(address) => (AddressFamily::INET, address.octets().to_vec()),
        IpAddr::V6(address) => (AddressFamily::INET6, address.octets().to_vec()),
    };
    // An address has 16 bytes at most.
    let attribute_bytes = 4 + octets.len() as u16;
    let total = (HEADER_BYTES + ROUTE_BYTES) as u32 + u32::from(attribute_bytes);
    let mut question = Vec::with_capacity(total as usize);
    question.extend(total.to_ne_bytes());
    question.extend(RTM_GETROUTE.to_ne_bytes());
    question.extend(NLM_F_REQUEST.to_ne_bytes());
    question.extend([0; 8]);
    // Family, bits of the destination; the rest is any.
    question.extend([family.as_raw() as u8, octets.len() as u8 * 8]);
    question.extend([0; ROUTE_BYTES - 2]);
    question.extend(attribute_bytes.to_ne_bytes());
    question.extend(RTA_DST.to_ne_bytes());
    question.extend(octets);
    question
}

fn understand(answer: &[u8]) -> Option<Place> {
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    let content = answer.get(HEADER_BYTES..)?;
    match kind {
        RTM_NEWROUTE => Some(match *content.get(TYPE_AT)? {
            RTN_UNICAST => Place::Elsewhere,
            _ => Place::Here,
        }),
        NLMSG_ERROR => {
            let error = i32::from_ne_bytes(content.get(..4)?.try_into().ok()?);
            let nowhere = [libc::ENETUNREACH, libc::EHOSTUNREACH];
            nowhere.contains(&-error).then_some(Place::Nowhere)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_here() {
        let lookup = Lookup::new().unwrap();
        for address in ["::1", "127.0.0.1", "127.3.2.1", "255.255.255.255"] {
            let place = lookup.place(address.parse().unwrap()).unwrap();
            assert_eq!(place, Place::Here, "{address}");
        }
    }

    #[test]
    fn what_is_no_answer_is_none() {
        let answer = |kind: u16, content: &[u8]| {
            let mut answer = vec![0; HEADER_BYTES];
            answer[4..6].copy_from_slice(&kind.to_ne_bytes());
            answer.extend(content);
            understand(&answer)
        };
        let route = |kind| [&[0; TYPE_AT][..], &[kind, 0, 0, 0, 0]].concat();
        assert_eq!(answer(RTM_NEWROUTE, &route(1)), Some(Place::Elsewhere));
        for kind in [0, 2, 3, 4, 5, 6, 7, 8] {
            assert_eq!(answer(RTM_NEWROUTE, &route(kind)), Some(Place::Here));
        }
        let error = |errno: i32| answer(NLMSG_ERROR, &(-errno).to_ne_bytes());
        assert_eq!(error(libc::ENETUNREACH), Some(Place::Nowhere));
        assert_eq!(error(libc::EPERM), None);
        assert_eq!(answer(RTM_NEWROUTE, &[0; 3]), None);
        assert_eq!(understand(&[]), None);
    }
}
