//! The socket by which host programs reach guests, and are reached. It is made here, at a name that the switch in its cage does not
//! see, and served by the switch: so it outlives this process as guests do.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with, sockopt,
};
use rustix::process::Pid;
use xbee_protocol::AGENT_VSOCK_PORT;
use xbee_vswitch::control::Client;
use xbee_vswitch::programs::ProgramsSpec;

use super::config::GuestsSocket;
use crate::error::Error;
use crate::work::blocking;

/// Everybody connects; the switch asks the kernel who it is.
const MODE: u32 = 0o666;
/// Of a directory that is made for it.
const DIRECTORY_MODE: u32 = 0o755;
/// Writable for the group or for all.
const WRITABLE: u32 = 0o022;
/// What the kernel says of users that it cannot name in a user namespace, and what it says where this file cannot be read.
const UNKNOWN_USER: (&str, u32) = ("/proc/sys/kernel/overflowuid", 65534);

/// What a switch answers that does not know the request.
const OLD_SWITCH: &str = "bad-request";

/// What is found at the name.
enum Found {
    /// The switch serves it.
    Served,
    /// A new socket, which does not listen yet.
    New(OwnedFd),
}

/// Has the switch, whose control socket is given, serve the socket, unless it does. Whether it does then.
pub(crate) async fn open(
    socket: &GuestsSocket,
    control: &Path,
    client: &mut Client,
) -> Result<bool, Error> {
    let (own, control) = (socket.clone(), control.to_owned());
    let found = blocking(move || find(&own.path, &control)).await?;
    let Found::New(fd) = found else {
        return Ok(true);
    };
    let text = fs::read_to_string(UNKNOWN_USER.0).unwrap_or_default();
    let spec = ProgramsSpec {
        users_end: socket.users_end,
        unknown_user: text.trim().parse().unwrap_or(UNKNOWN_USER.1),
        reserved_ports: vec![AGENT_VSOCK_PORT],
    };
    match client.serve_programs(spec, fd.as_fd()).await {
        Ok(()) => Ok(true),
        Err(error) if error.code() == OLD_SWITCH => {
            remove(&socket.path);
            tracing::warn!(
                "the switch that runs is of an earlier version: host programs reach no guests until it is \
                 started anew, which it is when xbed is started after its last domain has ended"
            );
            Ok(false)
        }
        Err(source) => {
            remove(&socket.path);
            Err(Error::GuestsSocket {
                path: socket.path.clone(),
                source: Box::new(source),
            })
        }
    }
}

/// Removes the name of a socket that is served no more.
pub(crate) fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove the socket for guests");
    }
}

fn find(path: &Path, control: &Path) -> Result<Found, Error> {
    let failed = |source: io::Error| Error::GuestsSocket {
        path: path.to_owned(),
        source: Box::new(source),
    };
    let unfit = |text: &str| failed(io::Error::new(io::ErrorKind::PermissionDenied, text));
    let directory = path
        .parent()
        .filter(|_| path.is_absolute())
        .ok_or_else(|| unfit("it must be an absolute path"))?;
    match DirBuilder::new().mode(DIRECTORY_MODE).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        Ok(()) | Err(_) => {}
    }
    let of_directory = fs::metadata(directory).map_err(failed)?;
    let own = rustix::process::geteuid().as_raw();
    let is_ours = [0, own].contains(&of_directory.uid());
    if !is_ours || of_directory.mode() & WRITABLE != 0 {
        return Err(unfit(
            "its directory must belong to root or to xbed's user, who alone may write to it",
        ));
    }
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(there) if !there.file_type().is_socket() => {
            return Err(unfit(
                "something else is there: move it away or use another path",
            ));
        }
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
            Ok(stream) => {
                let switch = UnixStream::connect(control).map_err(failed)?;
                return match pid(&stream).map_err(failed)? == pid(&switch).map_err(failed)? {
                    true => Ok(Found::Served),
                    false => Err(unfit(
                        "another process serves it, perhaps another xbed's switch: use another path",
                    )),
                };
            }
        },
    }
    let flags = SocketFlags::CLOEXEC;
    let make = || -> io::Result<OwnedFd> {
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        bind(&fd, &SocketAddrUnix::new(path)?)?;
        // Nobody else can put something in its place.
        fs::set_permissions(path, Permissions::from_mode(MODE))?;
        Ok(fd)
    };
    Ok(Found::New(make().map_err(failed)?))
}

/// Who serves a socket.
fn pid(stream: &UnixStream) -> io::Result<Pid> {
    Ok(sockopt::socket_peercred(stream)?.pid)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_switch_of_an_earlier_version_serves_no_programs_and_all_else_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let control = directory.path().join("control");
        let listener = UnixListener::bind(&control).unwrap();
        let old = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            reader.read_line(&mut request).unwrap();
            let answer = br#"{"ok":false,"code":"bad-request","message":"no such request"}"#;
            stream.write_all(&[answer, &b"\n"[..]].concat()).unwrap();
            request
        });
        let mut client = Client::connect(&control).await.unwrap();
        let socket = GuestsSocket {
            path: directory.path().join("sockets/guests"),
            users_end: 1 << 31,
        };
        assert!(!open(&socket, &control, &mut client).await.unwrap());
        assert!(!socket.path.exists());
        assert!(old.join().unwrap().contains("serve-programs"));
    }
}
