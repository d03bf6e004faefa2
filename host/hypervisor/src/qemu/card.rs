//! Network cards: their other sides are sockets of the switch or tap devices, which QEMU gets as descriptors.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

use crate::domain::Interface;

/// Longest packet that a card of the switch takes, in bytes: all that IPv6 can be. The fewer there are, the less an
/// emulated guest has to do.
const MTU_BYTES: u32 = 65_535;

/// What is at a card's other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// The switch.
    Switch,
    /// A bridge of the host.
    Bridge,
}

/// The card's name in QEMU, and that of its socket.
pub(crate) fn id(mac: [u8; 6]) -> String {
    format!("net{}", mac.map(|byte| format!("{byte:02x}")).concat())
}

/// What QEMU calls the other side of a card.
pub(crate) fn backend_id(mac: [u8; 6]) -> String {
    format!("{}-socket", id(mac))
}

/// The other side of a card. `descriptor`: a number that QEMU has inherited, or the name of one it was given.
pub(crate) fn backend(side: Side, mac: [u8; 6], descriptor: &str) -> Value {
    match side {
        Side::Switch => json!({
            "type": "dgram", "id": backend_id(mac), "local": { "type": "fd", "str": descriptor },
        }),
        Side::Bridge => json!({
            "type": "tap", "id": backend_id(mac), "fd": descriptor, "vhost": false,
        }),
    }
}

/// What the guest sees of it. No firmware boots from it.
pub(crate) fn device(side: Side, mac: [u8; 6]) -> Value {
    let mut device = json!({
        "driver": "virtio-net-pci", "id": id(mac), "netdev": backend_id(mac),
        "mac": mac.map(|byte| format!("{byte:02x}")).join(":"), "romfile": "",
    });
    if side == Side::Switch {
        device["host_mtu"] = MTU_BYTES.into();
    }
    device
}

/// What the switch is to know of it.
pub(crate) fn spec(
    cid: u32,
    socket: &Path,
    interface: &Interface,
) -> xbee_vswitch::ether::CardSpec {
    xbee_vswitch::ether::CardSpec {
        cid,
        socket: socket.to_owned(),
        mac: interface.mac,
        address: interface.address,
        peers: interface.peers,
    }
}

/// Makes the connection that becomes QEMU's. Never waits.
pub(crate) fn connect(socket: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::connect(&fd, &SocketAddrUnix::new(socket)?)?;
    Ok(fd)
}
