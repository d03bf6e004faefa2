//! Listening unix sockets with the right owner and mode, taking over the names dead processes left.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Longest suffix `_<port>` of a guest's connection to the host.
const PORT_SUFFIX_MAX: usize = "_4294967295".len();
/// `sun_path` holds 108 bytes with the final 0.
const PATH_MAX: usize = 107;

/// Why a socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process listens there.
    #[error("{0} is in use: a process listens on it")]
    InUse(PathBuf),
    /// Something else stands there; it is not ours to delete.
    #[error("{0} exists and is not a socket: move it away or use another path")]
    NotASocket(PathBuf),
    /// The path does not fit in a socket address.
    #[error("{path} is too long for a unix socket: {length} bytes, at most {max}")]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
        /// What is allowed.
        max: usize,
    },
    /// The system refused.
    #[error("cannot listen on {path}")]
    Listen {
        /// The path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl SocketError {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::InUse(_) => "socket-in-use",
            Self::NotASocket(_) => "not-a-socket",
            Self::PathTooLong { .. } => "path-too-long",
            Self::Listen { .. } => "cannot-listen",
        }
    }
}

fn check_length(path: &Path, max: usize) -> Result<(), SocketError> {
    let length = path.as_os_str().len();
    if length > max {
        return Err(SocketError::PathTooLong {
            path: path.to_owned(),
            length,
            max,
        });
    }
    Ok(())
}

/// Checks that `<uds>_<port>` fits in a socket address for every port.
pub fn check_uds(uds: &Path) -> Result<(), SocketError> {
    check_length(uds, PATH_MAX - PORT_SUFFIX_MAX)
}

/// Where connections of the guest to the host's `port` go.
pub fn host_path(uds: &Path, port: u32) -> PathBuf {
    let mut path = uds.as_os_str().to_owned();
    path.push(format!("_{port}"));
    path.into()
}

/// Removes a socket's name.
pub fn unlink(path: &Path) {
    if let Err(e) = std::fs::remove_file(path)
        && e.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), error = %e, "cannot remove socket");
    }
}

/// Listens on `path`, mode 0600, non-blocking; the name belongs to `uid` if given.
pub fn listen(path: &Path, uid: Option<u32>) -> Result<UnixListener, SocketError> {
    listen_as(SocketType::STREAM, path, uid).map(UnixListener::from)
}

/// The same for another kind of connection.
pub fn listen_as(kind: SocketType, path: &Path, uid: Option<u32>) -> Result<OwnedFd, SocketError> {
    check_length(path, PATH_MAX)?;
    let listen_error = |source: io::Error| SocketError::Listen {
        path: path.to_owned(),
        source,
    };
    remove_stale(kind, path)?;
    let bind = || -> io::Result<OwnedFd> {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            kind,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        // The name inherits the socket's mode: nobody else can connect at any moment.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        let finish = || -> io::Result<()> {
            if let Some(uid) = uid {
                std::os::unix::fs::lchown(path, Some(uid), None)?;
            }
            Ok(rustix::net::listen(&socket, 128)?)
        };
        if let Err(e) = finish() {
            unlink(path);
            return Err(e);
        }
        Ok(socket)
    };
    bind().map_err(listen_error)
}

/// Removes the name of a socket nobody listens on.
fn remove_stale(kind: SocketType, path: &Path) -> Result<(), SocketError> {
    let listen_error = |source: io::Error| SocketError::Listen {
        path: path.to_owned(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(listen_error(e)),
        Ok(meta) if !meta.file_type().is_socket() => Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) => match connect_as(kind, path) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(listen_error)
            }
            // A full backlog is a listener, too.
            Ok(_) => Err(SocketError::InUse(path.to_owned())),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                Err(SocketError::InUse(path.to_owned()))
            }
            Err(e) => Err(listen_error(e)),
        },
    }
}

/// Connects without ever waiting.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    connect_as(SocketType::STREAM, path).map(UnixStream::from)
}

fn connect_as(kind: SocketType, path: &Path) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        kind,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}
