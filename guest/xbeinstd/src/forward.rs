//! TCP connections to the guest's loopback (`Forward`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};
use xbee_protocol::{Failure, code};

use crate::failure::{failure, system_failure, words};
use crate::pump::{Close, Sink, Source};

/// The loopback answers at once, unless the listener's queue is full.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// A connection that is being made.
#[derive(Debug)]
pub(crate) struct Connecting {
    pub(crate) request: u32,
    pub(crate) fd: OwnedFd,
    pub(crate) deadline: Instant,
    port: u16,
    /// Tried when this one is refused.
    next: Option<IpAddr>,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Forward {
    pub(crate) source: Source,
    pub(crate) sink: Sink,
}

impl Connecting {
    /// Begins with IPv4.
    pub(crate) fn start(request: u32, port: u16, now: Instant) -> Result<Connecting, Failure> {
        if port == 0 {
            return Err(failure(code::BAD_REQUEST, "port 0 is no port"));
        }
        let deadline = now + CONNECT_LIMIT;
        let first = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let second = IpAddr::V6(Ipv6Addr::LOCALHOST);
        match dial(first, port) {
            Ok(fd) => Ok(Connecting {
                request,
                fd,
                deadline,
                port,
                next: Some(second),
            }),
            Err(_) => Self::second(request, second, port, deadline),
        }
    }

    fn second(
        request: u32,
        ip: IpAddr,
        port: u16,
        deadline: Instant,
    ) -> Result<Connecting, Failure> {
        match dial(ip, port) {
            Ok(fd) => Ok(Connecting {
                request,
                fd,
                deadline,
                port,
                next: None,
            }),
            Err(error) => Err(refused(port, error)),
        }
    }

    /// The socket is writable: it is connected, or the other address is tried, or it has failed.
    pub(crate) fn ready(self, stream: u32) -> Result<Result<Forward, Connecting>, Failure> {
        let Connecting {
            request,
            fd,
            deadline,
            port,
            next,
        } = self;
        match (sockopt::socket_error(&fd), next) {
            (Ok(Ok(())), _) => {
                let second = rustix::io::fcntl_dupfd_cloexec(&fd, 3)
                    .map_err(|error| system_failure("no descriptor", error))?;
                Ok(Ok(Forward {
                    source: Source::new(stream, fd),
                    sink: Sink::new(stream, second, Close::Socket),
                }))
            }
            (Ok(Err(_)), Some(next)) => Self::second(request, next, port, deadline).map(Err),
            (Ok(Err(error)) | Err(error), _) => Err(refused(port, error)),
        }
    }

    pub(crate) fn timed_out(&self) -> Failure {
        refused(self.port, Errno::TIMEDOUT)
    }
}

impl Forward {
    /// Both directions have ended.
    pub(crate) fn is_done(&self) -> bool {
        self.source.has_ended() && self.sink.has_ended()
    }
}

fn refused(port: u16, error: Errno) -> Failure {
    let message = match error {
        Errno::CONNREFUSED => format!("nothing listens on TCP port {port} in the guest"),
        error => format!(
            "cannot connect to TCP port {port} in the guest: {}",
            words(error)
        ),
    };
    failure(code::CONNECTION_REFUSED, message)
}

fn dial(ip: IpAddr, port: u16) -> Result<OwnedFd, Errno> {
    let family = match ip {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let fd = socket_with(
        family,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    match connect(&fd, &SocketAddr::new(ip, port)) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(fd),
        Err(error) => Err(error),
    }
}
