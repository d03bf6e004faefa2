//! Streams between nodes before it is known what they carry, and who may have one.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg, sockopt,
};
use rustls::pki_types::ServerName;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::time::sleep;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use xbee_link::peer::{self, PeerListener};
use xbee_link::{HOST_CID, Link, host};

use crate::address::Address;
use crate::control::Pulse;
use crate::tls::{Peer, Session, Tls};
use crate::wire::Wire;

/// The first byte of a TLS connection. Frames begin with a smaller one.
const TLS_HANDSHAKE: u8 = 0x16;

/// The most unanswered signs of life that the system sends on one connection.
const MAX_PROBES: u64 = 100;

/// What protects streams that leave the machine.
#[derive(Debug, Clone)]
pub(crate) struct Security {
    pub tls: Option<Tls>,
    /// They may go without.
    pub plaintext: bool,
    /// Those within the machine are protected too.
    pub strict: bool,
}

impl Security {
    /// Whether a connection may go without TLS though there is some.
    fn trusts(&self, stream: &TcpStream) -> io::Result<bool> {
        Ok(!self.strict && is_local(stream.local_addr()?, stream.peer_addr()?))
    }
}

/// A connected stream.
#[derive(Debug)]
pub(crate) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>, Arc<Session>),
    Link(LinkStream),
}

fn refused(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}

/// Whether both ends are on this machine.
fn is_local(ours: SocketAddr, theirs: SocketAddr) -> bool {
    let loopback = |ip: IpAddr| ip.to_canonical().is_loopback();
    ours.ip() == theirs.ip() || loopback(theirs.ip())
}

/// Who has a stream of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Sink,
}

/// Has the system find out that nobody is at the other end any more: a sink waits for events, and at most some
/// acknowledgements are on their way, which a source takes at once. Not by `TCP_USER_TIMEOUT` for a source: that ends the
/// connections of slow sinks too. It looks itself ([`crate::reach`]).
fn keep_alive(stream: BorrowedFd<'_>, side: Side, pulse: Pulse) -> io::Result<()> {
    let second = Duration::from_secs(1);
    let beat = pulse.heartbeat.max(second);
    let beats = (pulse.dead_after.as_secs() / beat.as_secs()).clamp(1, MAX_PROBES);
    sockopt::set_tcp_keepidle(stream, beat)?;
    sockopt::set_tcp_keepintvl(stream, beat)?;
    sockopt::set_tcp_keepcnt(stream, beats as u32)?;
    sockopt::set_socket_keepalive(stream, true)?;
    if side == Side::Sink {
        let limit = u32::try_from(pulse.dead_after.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(stream, limit)?;
    }
    Ok(())
}

impl Stream {
    /// Connects, with TLS where it must be; to guests by the host's socket for them, if there is one.
    pub(crate) async fn connect(
        address: &Address,
        security: &Security,
        guests: Option<&Path>,
    ) -> io::Result<Stream> {
        match address {
            Address::Unix(path) => {
                let stream = Stream::Unix(UnixStream::connect(path).await?);
                stream.admit(security).await
            }
            Address::Vsock { cid, port } => {
                let link = match guests {
                    Some(socket) => host::dial(socket, *cid, *port)?,
                    None => peer::dial(*cid, *port)?,
                };
                let mut link = LinkStream::new(link)?;
                link.connected().await?;
                Ok(Stream::Link(link))
            }
            Address::Tcp(address) => {
                let stream = TcpStream::connect(SocketAddr::V6(*address)).await?;
                stream.set_nodelay(true)?;
                if security.trusts(&stream)? {
                    return Ok(Stream::Tcp(stream));
                }
                match &security.tls {
                    Some(tls) => {
                        let name = ServerName::IpAddress(IpAddr::V6(*address.ip()).into());
                        let connector = TlsConnector::from(tls.client.clone());
                        let stream = connector.connect(name, stream).await?;
                        let (socket, connection) = stream.get_ref();
                        let chain = connection.peer_certificates();
                        let session = tls.trust.watch(socket.as_fd(), Peer::Server, chain)?;
                        Ok(Stream::Tls(Box::new(stream.into()), session))
                    }
                    None if security.plaintext => Ok(Stream::Tcp(stream)),
                    None => Err(refused(
                        "TLS is needed to get there, or plaintext must be allowed",
                    )),
                }
            }
        }
    }

    /// Looks at who has connected, and does TLS's part.
    pub(crate) async fn admit(self, security: &Security) -> io::Result<Stream> {
        match self {
            Stream::Unix(stream) => {
                let uid = stream.peer_cred()?.uid();
                match uid == 0 || uid == rustix::process::getuid().as_raw() {
                    true => Ok(Stream::Unix(stream)),
                    false => Err(refused("another user's process")),
                }
            }
            Stream::Tcp(stream) => {
                stream.set_nodelay(true)?;
                let local = security.trusts(&stream)?;
                let mut first = [0];
                stream.peek(&mut first).await?;
                match (&security.tls, first[0] == TLS_HANDSHAKE) {
                    (Some(tls), true) => {
                        let acceptor = TlsAcceptor::from(tls.server.clone());
                        let stream = acceptor.accept(stream).await?;
                        let (socket, connection) = stream.get_ref();
                        let chain = connection.peer_certificates();
                        let session = tls.trust.watch(socket.as_fd(), Peer::Client, chain)?;
                        Ok(Stream::Tls(Box::new(stream.into()), session))
                    }
                    (None, true) => Err(refused("TLS, and there is no certificate for it")),
                    (_, false) if local || security.plaintext => Ok(Stream::Tcp(stream)),
                    (_, false) => Err(refused("it comes without TLS")),
                }
            }
            Stream::Tls(..) | Stream::Link(_) => Ok(self),
        }
    }

    /// The same for events, which goes on at the byte at which this has stopped.
    pub(crate) fn into_wire(self, side: Side, pulse: Pulse) -> io::Result<Wire> {
        Ok(match self {
            Stream::Unix(stream) => Wire::Plain(stream.into_std()?.into()),
            Stream::Tcp(stream) => {
                keep_alive(stream.as_fd(), side, pulse)?;
                Wire::Plain(stream.into_std()?.into())
            }
            Stream::Tls(stream, session) => match *stream {
                TlsStream::Client(stream) => {
                    let (stream, connection) = stream.into_inner();
                    keep_alive(stream.as_fd(), side, pulse)?;
                    Wire::tls(stream.into_std()?.into(), connection.into(), session)
                }
                TlsStream::Server(stream) => {
                    let (stream, connection) = stream.into_inner();
                    keep_alive(stream.as_fd(), side, pulse)?;
                    Wire::tls(stream.into_std()?.into(), connection.into(), session)
                }
            },
            Stream::Link(stream) => Wire::Link(stream.link),
        })
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
            Stream::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Stream::Tls(stream, _) => Pin::new(stream).poll_read(cx, buffer),
            Stream::Link(stream) => stream.poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Tls(stream, _) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Link(stream) => stream.poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tls(stream, _) => Pin::new(stream).poll_flush(cx),
            Stream::Unix(_) | Stream::Tcp(_) | Stream::Link(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream, _) => Pin::new(stream).poll_shutdown(cx),
            Stream::Link(_) => Poll::Ready(Ok(())),
        }
    }
}

/// Tells of what happens to a descriptor.
fn events(fd: BorrowedFd<'_>, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    let fd = fd.try_clone_to_owned()?;
    // SAFETY: an `OwnedFd` stays open, under one number, for as long as it exists.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// A link in the runtime.
#[derive(Debug)]
pub(crate) struct LinkStream {
    link: Link,
    events: AsyncFd<OwnedFd>,
    /// Who waits to write where the descriptor tells of all changes by being readable.
    writer: Option<Waker>,
}

impl LinkStream {
    pub(crate) fn new(link: Link) -> io::Result<LinkStream> {
        let events = events(link.as_fd(), Interest::READABLE | Interest::WRITABLE)?;
        Ok(LinkStream {
            link,
            events,
            writer: None,
        })
    }

    /// Waits until the other end is there.
    async fn connected(&mut self) -> io::Result<()> {
        let interest = match self.link.interest(true) {
            Some(flags) if flags.contains(PollFlags::OUT) => Interest::WRITABLE,
            _ => Interest::READABLE,
        };
        loop {
            let mut ready = self.events.ready(interest).await?;
            if self.link.connected()? {
                return Ok(());
            }
            ready.clear_ready();
        }
    }

    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            match self.link.read(buffer.initialize_unfilled()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => {
                    buffer.advance(read?);
                    return Poll::Ready(Ok(()));
                }
            }
            let mut ready = ready!(self.events.poll_read_ready(cx))?;
            if let Some(writer) = self.writer.take() {
                writer.wake();
            }
            match self.link.read(buffer.initialize_unfilled()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                read => {
                    buffer.advance(read?);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match self.link.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
            let interest = self.link.interest(true);
            if !interest.is_some_and(|flags| flags.contains(PollFlags::OUT)) {
                // Whoever reads, and of a control connection somebody always does, wakes this.
                self.writer = Some(cx.waker().clone());
                return Poll::Pending;
            }
            let mut ready = ready!(self.events.poll_write_ready(cx))?;
            match self.link.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                written => return Poll::Ready(written),
            }
        }
    }
}

/// Takes streams.
#[derive(Debug)]
pub(crate) enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
    Vsock(PeerDoor),
    Guests(GuestsDoor),
}

/// Where guests come, and what tells of them.
#[derive(Debug)]
pub(crate) struct PeerDoor {
    listener: PeerListener,
    events: AsyncFd<OwnedFd>,
}

impl PeerDoor {
    fn new(listener: PeerListener) -> io::Result<PeerDoor> {
        let events = events(listener.as_fd(), Interest::READABLE)?;
        Ok(PeerDoor { listener, events })
    }

    async fn accept(&mut self) -> io::Result<Stream> {
        loop {
            if let Some((link, _)) = self.listener.accept()? {
                return Ok(Stream::Link(LinkStream::new(link)?));
            }
            let mut ready = self.events.readable().await?;
            match self.listener.accept()? {
                Some((link, _)) => return Ok(Stream::Link(LinkStream::new(link)?)),
                None => ready.clear_ready(),
            }
        }
    }
}

/// The same on the host, at a port that is taken again when the switch, which it is listened by, was started anew.
#[derive(Debug)]
pub(crate) struct GuestsDoor {
    socket: PathBuf,
    port: u32,
    door: Option<PeerDoor>,
}

impl GuestsDoor {
    async fn accept(&mut self) -> Stream {
        loop {
            if let Some(door) = &mut self.door {
                match door.accept().await {
                    Ok(stream) => return stream,
                    Err(error) => tracing::warn!(port = self.port, %error, "guests cannot come"),
                }
                self.door = None;
            }
            let (socket, port) = (self.socket.clone(), self.port);
            // It waits for the switch's answer.
            let listening = tokio::task::spawn_blocking(move || host::listen(&socket, port));
            let listening = listening.await.map_err(io::Error::other).flatten();
            match listening.and_then(PeerDoor::new) {
                Ok(door) => {
                    tracing::info!(port = self.port, "guests can come again");
                    self.door = Some(door);
                }
                Err(error) => {
                    tracing::debug!(port = self.port, %error, "guests cannot come yet");
                    sleep(LISTEN_PAUSE).await;
                }
            }
        }
    }
}

impl Listener {
    /// Listens, within the runtime. A unix socket that nobody listens at any more is replaced. `guests`: where the host's socket
    /// for guests is.
    pub(crate) fn bind(address: &Address, guests: Option<&Path>) -> io::Result<Listener> {
        match address {
            Address::Unix(path) => {
                let dead = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
                if let Err(error) = std::os::unix::net::UnixStream::connect(path)
                    && dead(&error)
                {
                    std::fs::remove_file(path)?;
                }
                Ok(Listener::Unix(UnixListener::bind(path)?))
            }
            Address::Vsock {
                cid: HOST_CID,
                port,
            } => {
                let socket = guests.ok_or_else(|| {
                    let text = "a host's program needs xbed's socket for guests: name it (--guests, KECHO_GUESTS)";
                    io::Error::new(io::ErrorKind::InvalidInput, text)
                })?;
                Ok(Listener::Guests(GuestsDoor {
                    socket: socket.to_owned(),
                    port: *port,
                    door: Some(PeerDoor::new(host::listen(socket, *port)?)?),
                }))
            }
            Address::Vsock { .. } if guests.is_some() => {
                let text = "a host's program listens at vsock:2:PORT";
                Err(io::Error::new(io::ErrorKind::InvalidInput, text))
            }
            Address::Vsock { port, .. } => {
                Ok(Listener::Vsock(PeerDoor::new(PeerListener::bind(*port)?)?))
            }
            Address::Tcp(address) => {
                let socket = tokio::net::TcpSocket::new_v6()?;
                // Connections of before may linger.
                socket.set_reuseaddr(true)?;
                socket.bind(SocketAddr::V6(*address))?;
                Ok(Listener::Tcp(socket.listen(BACKLOG)?))
            }
        }
    }

    /// Where it listens, if the system chose.
    pub(crate) fn tcp_port(&self) -> Option<u16> {
        match self {
            Listener::Tcp(listener) => listener.local_addr().ok().map(|address| address.port()),
            Listener::Unix(_) | Listener::Vsock(_) | Listener::Guests(_) => None,
        }
    }

    /// The next stream, before [`Stream::admit`].
    pub(crate) async fn accept(&mut self) -> io::Result<Stream> {
        match self {
            Listener::Unix(listener) => Ok(Stream::Unix(listener.accept().await?.0)),
            Listener::Tcp(listener) => Ok(Stream::Tcp(listener.accept().await?.0)),
            Listener::Vsock(door) => door.accept().await,
            Listener::Guests(door) => Ok(door.accept().await),
        }
    }
}

/// Connections that wait to be accepted.
const BACKLOG: u32 = 256;
/// How long to wait before the host's socket for guests is tried again.
const LISTEN_PAUSE: Duration = Duration::from_secs(1);

/// Sends two descriptors with one byte.
pub(crate) async fn send_fds(stream: &UnixStream, fds: [BorrowedFd<'_>; 2]) -> io::Result<()> {
    let send = || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let byte = [IoSlice::new(&[0])];
        let sent = sendmsg(stream.as_fd(), &byte, &mut control, SendFlags::NOSIGNAL)?;
        Ok(sent)
    };
    stream.async_io(Interest::WRITABLE, send).await.map(drop)
}

/// Receives what [`send_fds`] has sent.
pub(crate) async fn receive_fds(stream: &UnixStream) -> io::Result<[OwnedFd; 2]> {
    let receive = || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let mut parts = [IoSliceMut::new(&mut byte)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = recvmsg(stream.as_fd(), &mut parts, &mut control, flags)?;
        if got.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        fds.try_into()
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "expected two descriptors"))
    };
    stream.async_io(Interest::READABLE, receive).await
}

/// Waits until the other side has closed.
pub(crate) async fn ended(stream: &UnixStream) {
    let mut byte = [0; 16];
    loop {
        if stream.readable().await.is_err() {
            return;
        }
        match stream.try_read(&mut byte) {
            Ok(1..) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(0) | Err(_) => return,
        }
    }
}
