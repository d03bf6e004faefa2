//! Sockets of `AF_VSOCK`, whose addresses the standard library does not know.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

/// Of any context identifier of this guest's (`VMADDR_CID_ANY`).
pub(crate) const ANY: u32 = u32::MAX;
/// The device that tells the guest's own context identifier.
pub(crate) const DEVICE: &str = "/dev/vsock";
/// `IOCTL_VM_SOCKETS_GET_LOCAL_CID` of `linux/vm_sockets.h`.
const GET_LOCAL_CID: u32 = 0x07b9;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all-zero bytes are a valid sockaddr_vm, which has integers only.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

const LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

pub(crate) fn connect(fd: &OwnedFd, cid: u32, port: u32) -> Result<(), Errno> {
    let address = address(cid, port);
    // SAFETY: the pointer is to a sockaddr_vm of the length given, alive during the call; the
    // descriptor is open.
    match unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), LENGTH) } {
        0 => Ok(()),
        _ => Err(last_error()),
    }
}

pub(crate) fn bind(fd: &OwnedFd, port: u32) -> Result<(), Errno> {
    let address = address(ANY, port);
    // SAFETY: as in `connect`.
    match unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), LENGTH) } {
        0 => Ok(()),
        _ => Err(last_error()),
    }
}

/// A connection that has come, non-blocking, and the context identifier and port it is from.
pub(crate) fn accept(listener: &OwnedFd) -> Result<(OwnedFd, u32, u32), Errno> {
    let mut from = address(ANY, ANY);
    let mut length = LENGTH;
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the pointers are to a sockaddr_vm and to its length, alive during the call; the
    // descriptor is open.
    let fd = unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            (&raw mut from).cast(),
            &raw mut length,
            flags,
        )
    };
    if fd < 0 {
        return Err(last_error());
    }
    // SAFETY: the kernel has just made it, for this call.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok((fd, from.svm_cid, from.svm_port))
}

/// The guest's own context identifier.
pub(crate) fn local_cid() -> io::Result<u32> {
    let device = std::fs::File::open(DEVICE)?;
    let mut cid = ANY;
    // C libraries differ in the type of a request.
    // SAFETY: the request writes an unsigned int to where the pointer is to, alive during the
    // call; the descriptor is open.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), GET_LOCAL_CID as _, &raw mut cid) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // So the kernel says that it has no device for it yet.
    if cid == ANY {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(cid)
}
