//! The host's side of [`crate::peer`]: a program of a host's user and the guests of that user, through the socket that the host's
//! switch has for programs (`guests-socket` of `xbed`). Whose a program is, the kernel tells the switch. With Xen there is no such
//! socket yet.
//!
//! | what is there | here |
//! |---|---|
//! | a guest of one's own, nobody listens | `ConnectionReset` |
//! | no such guest, or another owner's | `ConnectionRefused` |
//! | a program of one's own (by [`HOST_CID`](crate::HOST_CID)), nobody listens | `ConnectionRefused` |
//! | a port that another program of one's own has | `AddrInUse` |
//! | too many connections of one's own | `QuotaExceeded` |
//! | a port that is not for programs, a user who has no guests | `PermissionDenied` |

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recv, recvmsg, send, socket_with,
};

use crate::peer::{PeerAddress, PeerListener};
use crate::{Carrier, Link};

/// Longest line of the switch's.
const LINE_MAX_BYTES: usize = 256;
/// How long the switch may take to answer who wants to listen.
const ANSWER: Duration = Duration::from_secs(5);

/// Begins to reach a port of a guest's, or of another program's of this user, as [`Link::dial`] does.
///
/// # Errors
/// What the system says of the socket. What the table above has comes from [`Link::connected`].
pub fn dial(socket: &Path, cid: u32, port: u32) -> io::Result<Link> {
    let fd = say(socket, &format!("CONNECT {cid} {port}\n"))?;
    Ok(Link(Carrier::Host(fd, Vec::new())))
}

/// Listens at a port of the host's for this user's guests and programs, as long as the listener is there and the switch runs. Waits
/// for the switch's answer.
///
/// # Errors
/// What the table above has; `TimedOut`; what the system says of the socket.
pub fn listen(socket: &Path, port: u32) -> io::Result<PeerListener> {
    let fd = say(socket, &format!("LISTEN {port}\n"))?;
    let until = Instant::now() + ANSWER;
    let mut line = Vec::new();
    while !answered(&fd, &mut line)? {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let text = "the switch does not answer";
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        let left = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(PeerListener::of_host(HostDoor {
        fd,
        line: Vec::new(),
        stream: None,
    }))
}

fn say(socket: &Path, line: &str) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&fd, &SocketAddrUnix::new(socket)?)?;
    // Its buffer is empty: the line goes whole. Who was refused at once reads why.
    match send(&fd, line.as_bytes(), SendFlags::NOSIGNAL) {
        Ok(_) | Err(Errno::PIPE) => Ok(fd),
        Err(error) => Err(error.into()),
    }
}

/// Reads the switch's answer as far as it is there, and not a byte more; whether it is yes.
pub(crate) fn answered(fd: &OwnedFd, line: &mut Vec<u8>) -> io::Result<bool> {
    loop {
        let mut byte = [0];
        match recv(fd, &mut byte, RecvFlags::empty()) {
            // Nobody listens in the guest.
            Ok((0, _)) => return Err(io::ErrorKind::ConnectionReset.into()),
            Ok(_) if byte == *b"\n" => return verdict(line),
            Ok(_) if line.len() < LINE_MAX_BYTES => line.extend(byte),
            Ok(_) => return Err(nonsense()),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}

fn nonsense() -> io::Error {
    let text = "an answer that is none: is this xbed's socket for guests?";
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn verdict(line: &[u8]) -> io::Result<bool> {
    let line = String::from_utf8_lossy(line);
    if line.starts_with("OK ") {
        return Ok(true);
    }
    let refusal = line.strip_prefix("ERR ").ok_or_else(nonsense)?;
    let (code, text) = refusal.split_once(' ').unwrap_or((refusal, refusal));
    let kind = match code {
        "unreachable" => io::ErrorKind::ConnectionRefused,
        "in-use" => io::ErrorKind::AddrInUse,
        "limit" => io::ErrorKind::QuotaExceeded,
        "reserved-port" | "not-a-user" => io::ErrorKind::PermissionDenied,
        _ => io::ErrorKind::InvalidData,
    };
    Err(io::Error::new(kind, text.to_owned()))
}

/// Where the switch's streams come.
#[derive(Debug)]
pub(crate) struct HostDoor {
    fd: OwnedFd,
    /// What has come of a line, and the descriptor with it.
    line: Vec<u8>,
    stream: Option<OwnedFd>,
}

impl HostDoor {
    /// The next stream; `None` where there is none now.
    pub(crate) fn accept(&mut self) -> io::Result<Option<(Link, PeerAddress)>> {
        loop {
            if let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.line.drain(..=end).collect();
                let from = address(&line[..end]).ok_or_else(nonsense)?;
                let stream = self.stream.take().ok_or_else(nonsense)?;
                // The mode of a descriptor is that of who has made it.
                rustix::io::ioctl_fionbio(&stream, true)?;
                return Ok(Some((Link(Carrier::Socket(stream)), from)));
            }
            if self.line.len() > LINE_MAX_BYTES {
                return Err(nonsense());
            }
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            // The kernel ends a read after what a descriptor came with, so one line comes at a time.
            let mut bytes = [0; LINE_MAX_BYTES];
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let got = match recvmsg(&self.fd, &mut parts, &mut control, flags) {
                Ok(got) => got.bytes,
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            if got == 0 {
                let text = "the switch has closed the socket for guests";
                return Err(io::Error::new(io::ErrorKind::BrokenPipe, text));
            }
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    self.stream = fds.last().or(self.stream.take());
                }
            }
            self.line.extend(&bytes[..got]);
        }
    }
}

impl AsFd for HostDoor {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn address(line: &[u8]) -> Option<PeerAddress> {
    let (cid, port) = std::str::from_utf8(line).ok()?.split_once(' ')?;
    Some(PeerAddress {
        cid: cid.parse().ok()?,
        port: port.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, IoSlice, Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, sendmsg};

    use super::*;

    /// Plays the switch for one connection.
    fn switch<T: Send + 'static>(
        play: impl FnOnce(UnixStream, String) -> T + Send + 'static,
    ) -> (tempfile::TempDir, std::thread::JoinHandle<T>) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            play(stream, line)
        });
        (dir, thread)
    }

    fn connected(link: &mut Link) -> io::Result<()> {
        while !link.connected()? {
            let interest = link.interest(true).unwrap();
            poll(&mut [PollFd::new(&*link, interest)], None).unwrap();
        }
        Ok(())
    }

    #[test]
    fn a_stream_begins_behind_the_answer() {
        let (dir, played) = switch(|mut stream, line| {
            assert_eq!(line, "CONNECT 7 1000\n");
            stream.write_all(b"OK 107").unwrap();
            stream.write_all(b"3741824\nhello").unwrap();
            let mut bytes = [0; 2];
            stream.read_exact(&mut bytes).unwrap();
            assert_eq!(&bytes, b"to");
        });
        let mut link = dial(&dir.path().join("s"), 7, 1000).unwrap();
        assert_eq!(
            link.read(&mut [0; 8]).unwrap_err().kind(),
            io::ErrorKind::NotConnected
        );
        connected(&mut link).unwrap();
        let mut bytes = [0; 8];
        assert_eq!(link.read(&mut bytes).unwrap(), 5);
        assert_eq!(&bytes[..5], b"hello");
        assert_eq!(link.write(b"to").unwrap(), 2);
        played.join().unwrap();
    }

    #[test]
    fn refusals_are_told_apart() {
        for (answer, kind, text) in [
            (
                "ERR unreachable none\n",
                io::ErrorKind::ConnectionRefused,
                "none",
            ),
            ("ERR in-use taken\n", io::ErrorKind::AddrInUse, "taken"),
            ("ERR limit full\n", io::ErrorKind::QuotaExceeded, "full"),
            (
                "ERR reserved-port no\n",
                io::ErrorKind::PermissionDenied,
                "no",
            ),
            ("ERR not-a-user no\n", io::ErrorKind::PermissionDenied, "no"),
            ("ERR new why\n", io::ErrorKind::InvalidData, "why"),
            (
                "HTTP/1.1 400\n",
                io::ErrorKind::InvalidData,
                "an answer that is none: is this xbed's socket for guests?",
            ),
            ("", io::ErrorKind::ConnectionReset, "connection reset"),
        ] {
            let (dir, _) = switch(move |mut stream, _| stream.write_all(answer.as_bytes()));
            let mut link = dial(&dir.path().join("s"), 7, 1000).unwrap();
            let error = connected(&mut link).unwrap_err();
            assert_eq!((error.kind(), error.to_string().as_str()), (kind, text));
        }
        let (dir, _) = switch(|mut stream, _| stream.write_all(&[b'x'; LINE_MAX_BYTES + 1]));
        let error = listen(&dir.path().join("s"), 7400).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn streams_come_one_by_one_until_the_switch_has_gone() {
        let (dir, played) = switch(|mut stream, line| {
            assert_eq!(line, "LISTEN 7400\n");
            stream.write_all(b"OK 7400\n").unwrap();
            [0, 1].map(|n| {
                let (here, there) = UnixStream::pair().unwrap();
                let fds = [there.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                control.push(SendAncillaryMessage::ScmRights(&fds));
                let line = format!("3 500{n}\n");
                let line = [IoSlice::new(line.as_bytes())];
                sendmsg(&stream, &line, &mut control, SendFlags::empty()).unwrap();
                here
            })
        });
        let mut listener = listen(&dir.path().join("s"), 7400).unwrap();
        let ends = played.join().unwrap();
        for (n, mut end) in ends.into_iter().enumerate() {
            let (mut link, from) = listener.accept().unwrap().unwrap();
            assert_eq!((from.cid, from.port), (3, 5000 + n as u32));
            assert_eq!(
                link.read(&mut [0; 8]).unwrap_err().kind(),
                io::ErrorKind::WouldBlock
            );
            assert_eq!(link.write(b"to").unwrap(), 2);
            let mut bytes = [0; 2];
            end.read_exact(&mut bytes).unwrap();
        }
        let gone = listener.accept().unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::BrokenPipe);
    }
}
