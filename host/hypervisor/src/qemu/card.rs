//! Network cards: sockets of the switch, which QEMU gets as descriptors.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

use crate::domain::Interface;

/// Longest packet that a card takes, in bytes: all that IPv6 can be. The fewer there are, the less an
/// emulated guest has to do.
const MTU_BYTES: u32 = 65_535;

/// The card's name in QEMU, and that of its socket.
pub(crate) fn id(mac: [u8; 6]) -> String {
    format!("net{}", mac.map(|byte| format!("{byte:02x}")).concat())
}

/// What QEMU calls the other side of a card. `descriptor`: a number that it has inherited, or the name of one
/// it was given.
pub(crate) fn backend(mac: [u8; 6], descriptor: &str) -> Value {
    json!({
        "type": "dgram", "id": format!("{}-socket", id(mac)),
        "local": { "type": "fd", "str": descriptor },
    })
}

/// What the guest sees of it. No firmware boots from it.
pub(crate) fn device(mac: [u8; 6]) -> Value {
    json!({
        "driver": "virtio-net-pci", "id": id(mac), "netdev": format!("{}-socket", id(mac)),
        "mac": mac.map(|byte| format!("{byte:02x}")).join(":"), "host_mtu": MTU_BYTES, "romfile": "",
    })
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
