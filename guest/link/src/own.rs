//! A guest's way to itself, which vsock and Xen have none for: beside each port that a program listens at, a unix socket with an
//! abstract name made of the port.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with, sockopt,
};
use rustix::process::geteuid;

use crate::peer::BACKLOG;

fn name(port: u32) -> io::Result<SocketAddrUnix> {
    Ok(SocketAddrUnix::new_abstract_name(
        format!("xbee-peer-{port}").as_bytes(),
    )?)
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        flags,
        None,
    )?)
}

/// Connects to who listens at a port here. Anybody can take an abstract name, so it must be root or this user.
pub(crate) fn dial(port: u32) -> io::Result<OwnedFd> {
    let fd = socket()?;
    connect(&fd, &name(port)?)?;
    let user = sockopt::socket_peercred(&fd)?.uid;
    if !user.is_root() && user != geteuid() {
        let text = format!(
            "user {} listens there, neither root nor this one",
            user.as_raw()
        );
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(fd)
}

/// Listens beside a port.
pub(crate) fn door(port: u32) -> io::Result<OwnedFd> {
    let fd = socket()?;
    bind(&fd, &name(port)?)?;
    listen(&fd, BACKLOG as i32)?;
    Ok(fd)
}

/// A connection that has come. From whom matters no more than on vsock, where all users of all guests come.
pub(crate) fn accept(door: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    match accept_with(door, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{RecvFlags, SendFlags, recv, send};
    use rustix::process::Uid;

    use super::*;

    /// Of this process alone, for tests run beside each other.
    fn port(number: u32) -> u32 {
        (1 << 31) + 16 * std::process::id() + number
    }

    #[test]
    fn a_guest_reaches_itself() {
        let port = port(0);
        let refused = dial(port).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let own = door(port).unwrap();
        assert!(accept(&own).unwrap().is_none());
        assert_eq!(door(port).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let here = dial(port).unwrap();
        let there = accept(&own).unwrap().unwrap();
        send(&here, b"hello", SendFlags::NOSIGNAL).unwrap();
        let mut bytes = [0; 8];
        assert_eq!(recv(&there, &mut bytes, RecvFlags::empty()).unwrap().0, 5);
        drop(own);
        dial(port).unwrap_err();
    }

    #[test]
    fn another_user_cannot_pass_for_this_one() {
        if !geteuid().is_root() {
            println!("skipped: only root can be two users");
            return;
        }
        let become_user = |uid| {
            let root = Uid::ROOT;
            rustix::thread::set_thread_res_uid(root, Uid::from_raw(uid), root).unwrap();
        };
        // What listens has the user of the thread that made it do so.
        let listening = |uid, port| {
            let thread = std::thread::spawn(move || {
                become_user(uid);
                door(port).unwrap()
            });
            thread.join().unwrap()
        };
        let dialled = |uid, port| {
            let thread = std::thread::spawn(move || {
                become_user(uid);
                dial(port).map(drop).map_err(|error| error.to_string())
            });
            thread.join().unwrap()
        };
        let _alice = listening(61_234, port(1));
        let _root = listening(0, port(2));
        assert_eq!(dialled(61_234, port(1)), Ok(()));
        assert_eq!(dialled(61_234, port(2)), Ok(()));
        let refused = "user 61234 listens there, neither root nor this one".to_owned();
        assert_eq!(dialled(61_235, port(1)), Err(refused.clone()));
        assert_eq!(dialled(0, port(1)), Err(refused));
    }
}
