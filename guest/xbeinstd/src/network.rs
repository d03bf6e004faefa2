//! Interfaces: up, and with the address that the host has chosen.

use std::fs;
use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, netlink, socket, socket_with};
use xbee_protocol::Network;

use crate::console;

const INTERFACES: &str = "/sys/class/net";
const SETTINGS: &str = "/proc/sys/net/ipv6/conf";
/// `RTMGRP_LINK` (rtnetlink(7)): tells of interfaces that come and change.
const LINKS: u32 = 1;

/// An interface that is to be set up when its driver has found it.
#[derive(Debug)]
pub(crate) struct Expected {
    network: Network,
    links: OwnedFd,
}

impl Expected {
    /// Sets the interface up, or gives what to wait for. What fails is said on the console: the
    /// machine may do without.
    pub(crate) fn start(network: Network) -> Option<Expected> {
        match subscribe() {
            Ok(links) => Expected { network, links }.go_on(),
            Err(error) => {
                console::log(&format!("cannot watch for interfaces: {error}"));
                None
            }
        }
    }

    /// Looks again; nothing is left when the interface has been there.
    pub(crate) fn go_on(self) -> Option<Expected> {
        let mut news = [0; 4096];
        while rustix::io::read(&self.links, &mut news).is_ok() {}
        let Some(name) = find(self.network.mac) else {
            return Some(self);
        };
        if let Err(error) = set_up(&name, &self.network) {
            console::log(&format!("cannot set interface {name} up: {error}"));
        }
        None
    }
}

impl AsFd for Expected {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.links.as_fd()
    }
}

fn subscribe() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    // Without a protocol it is NETLINK_ROUTE.
    let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    bind(&fd, &netlink::SocketAddrNetlink::new(0, LINKS))?;
    Ok(fd)
}

/// The name of the interface with a hardware address.
fn find(mac: [u8; 6]) -> Option<String> {
    let wanted = mac.map(|byte| format!("{byte:02x}")).join(":");
    fs::read_dir(INTERFACES).ok()?.flatten().find_map(|entry| {
        let address = fs::read_to_string(entry.path().join("address")).ok()?;
        (address.trim() == wanted).then(|| entry.file_name().to_string_lossy().into_owned())
    })
}

fn set_up(name: &str, network: &Network) -> io::Result<()> {
    // Nobody else has the address, and the first packet is not to wait for finding that out.
    for setting in ["accept_dad", "dad_transmits"] {
        fs::write(format!("{SETTINGS}/{name}/{setting}"), "0")?;
    }
    let index = fs::read_to_string(format!("{INTERFACES}/{name}/ifindex"))?;
    let index: i32 = index.trim().parse().map_err(io::Error::other)?;
    up(name)?;
    let socket = socket(AddressFamily::INET6, SocketType::DGRAM, None)?;
    let mut address = Address {
        address: network.address.octets(),
        prefix_length: network.prefix_length.into(),
        index,
    };
    // SAFETY: the request takes an in6_ifreq, whose layout this is.
    unsafe { request(&socket, libc::SIOCSIFADDR as u32, &mut address) }?;
    if let Some(gateway) = network.gateway {
        let mut route = Route {
            destination: Ipv6Addr::UNSPECIFIED.octets(),
            source: Ipv6Addr::UNSPECIFIED.octets(),
            gateway: gateway.octets(),
            kind: 0,
            lengths: [0; 2],
            metric: ROUTE_METRIC,
            info: 0,
            flags: u32::from(libc::RTF_UP | libc::RTF_GATEWAY),
            index,
        };
        // SAFETY: the request takes an in6_rtmsg, whose layout this is.
        unsafe { request(&socket, libc::SIOCADDRT as u32, &mut route) }?;
    }
    Ok(())
}

/// What route(8) uses.
const ROUTE_METRIC: u32 = 1;

/// `struct in6_ifreq` (linux/ipv6.h).
#[repr(C)]
struct Address {
    address: [u8; 16],
    prefix_length: u32,
    index: i32,
}

/// `struct in6_rtmsg` (linux/ipv6_route.h).
#[repr(C)]
struct Route {
    destination: [u8; 16],
    source: [u8; 16],
    gateway: [u8; 16],
    kind: u32,
    /// Of destination and source: all of the network.
    lengths: [u16; 2],
    metric: u32,
    info: libc::c_ulong,
    flags: u32,
    index: i32,
}

/// Brings the loopback interface up, which needs nothing else.
pub(crate) fn loopback_up() {
    if let Err(error) = up("lo") {
        console::log(&format!("cannot bring the loopback interface up: {error}"));
    }
}

fn up(name: &str) -> io::Result<()> {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    let room = interface.ifr_name.len() - 1;
    for (to, from) in interface.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    interface.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request takes an ifreq, which this one is, with its name and flags set.
    unsafe { request(&socket, libc::SIOCSIFFLAGS as u32, &mut interface) }
}

/// Asks for something that may have been done before.
///
/// # Safety
/// The argument has the layout that the request wants.
unsafe fn request<T>(socket: &OwnedFd, request: u32, argument: &mut T) -> io::Result<()> {
    // SAFETY: the caller's promise; the descriptor is open.
    let result = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            request as _,
            std::ptr::from_mut(argument),
        )
    };
    match result {
        -1 => match io::Error::last_os_error() {
            error if Errno::from_io_error(&error) == Some(Errno::EXIST) => Ok(()),
            error => Err(error),
        },
        _ => Ok(()),
    }
}
