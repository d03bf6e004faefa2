//! Network cards on a bridge of the host: tap devices, which QEMU gets as descriptors. One ends with the last descriptor
//! of it, which is QEMU's.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;
use rustix::ioctl::{Setter, ioctl, opcode};

use crate::error::Error;

const DEVICE: &str = "/dev/net/tun";

/// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`: Ethernet frames as they are, behind the header of virtio-net (Linux, if_tun.h).
const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;
/// Room for an interface's name and its NUL (Linux, if.h, `IFNAMSIZ`).
const NAME_BYTES: usize = 16;

/// `struct ifreq` as `TUNSETIFF` reads it.
#[repr(C)]
struct Request {
    name: [u8; NAME_BYTES],
    flags: u16,
    rest: [u8; 22],
}

/// The name of the tap device of the card with this address: the same after a restart, another for each card, and with
/// the beginning by which the rules of `xen-configs/dom0/xenbee.nft` know guests' ports.
pub(crate) fn name(mac: [u8; 6]) -> String {
    format!("vif{}", mac.map(|byte| format!("{byte:02x}")).concat())
}

/// Makes the device.
///
/// # Errors
/// [`Error::Io`], without the right to make network devices too.
pub(crate) fn create(mac: [u8; 6]) -> Result<OwnedFd, Error> {
    let tap: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(DEVICE)
        .map_err(Error::io("open", DEVICE))?;
    let name = name(mac);
    let mut request = Request {
        name: [0; NAME_BYTES],
        flags: FLAGS,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: `TUNSETIFF` is `_IOW('T', 202, int)`, and reads a `struct ifreq` at its argument, which `Request` is in
    // size and layout; the kernel keeps no pointer to it.
    unsafe {
        ioctl(
            &tap,
            Setter::<{ opcode::write::<i32>(b'T', 202) }, Request>::new(request),
        )
    }
    .map_err(|error| Error::io("make a tap device with", DEVICE)(io::Error::from(error)))?;
    Ok(tap.into())
}
