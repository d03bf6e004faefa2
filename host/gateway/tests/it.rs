//! The program, with a guest in `vswitch`'s place: packets on one side, servers of the host on the other.
#![allow(clippy::unwrap_used)]

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as Micros;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};
use xbee_gateway::Plan;
use xbee_gateway::gateway::CONNECTIONS_MAX;
use xbee_gateway::packet::{self, Packet, UDP};

const GUEST: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 3);
const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1);
/// 127.0.0.1, as IPv6 has it.
const LOOPBACK4: Ipv6Addr = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0x7f00, 1);
/// Nothing here takes longer.
const LIMIT: Duration = Duration::from_secs(60);

/// A guest's stack and the gateway's process.
struct Guest {
    gateway: Child,
    link: Link,
    interface: Interface,
    sockets: SocketSet<'static>,
    begun: Instant,
    next_port: u16,
}

/// The guest's side of the connection.
struct Link {
    socket: OwnedFd,
    /// What came that is not TCP.
    others: Vec<Vec<u8>>,
}

struct Came(Vec<u8>);
struct Goes<'l>(&'l OwnedFd);

impl phy::RxToken for Came {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Goes<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        send(self.0, &packet, SendFlags::NOSIGNAL).unwrap();
        result
    }
}

impl Device for Link {
    type RxToken<'t> = Came;
    type TxToken<'t> = Goes<'t>;

    fn receive(&mut self, _: Micros) -> Option<(Came, Goes<'_>)> {
        loop {
            let mut packet = vec![0; packet::MAX_BYTES];
            match recv(&self.socket, &mut packet[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) | Err(_) => return None,
                Ok((_, len)) => packet.truncate(len),
            }
            let read = Packet::read(&packet).expect("no packet came");
            assert_eq!(read.destination, GUEST);
            if read.protocol == packet::TCP {
                return Some((Came(packet), Goes(&self.socket)));
            }
            self.others.push(packet);
        }
    }

    fn transmit(&mut self, _: Micros) -> Option<Goes<'_>> {
        Some(Goes(&self.socket))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = 65_535;
        capabilities
    }
}

fn start(outbound: &str, uid: Option<u32>) -> Guest {
    start_by(Command::new(env!("CARGO_BIN_EXE_gateway")), outbound, uid)
}

fn start_by(mut command: Command, outbound: &str, uid: Option<u32>) -> Guest {
    let flags = SocketFlags::CLOEXEC;
    let (near, far) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let plan = Plan {
        router: ROUTER,
        outbound: serde_json::from_str(outbound).unwrap(),
        uid,
    };
    let mut gateway = command
        .arg(serde_json::to_string(&plan).unwrap())
        .stdin(far)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 6];
    let stdout = gateway.stdout.as_mut().unwrap();
    stdout.read_exact(&mut ready).unwrap();
    assert_eq!(&ready, b"ready\n");
    let mut link = Link {
        socket: near,
        others: vec![],
    };
    let begun = Instant::now();
    let config = Config::new(HardwareAddress::Ip);
    let mut interface = Interface::new(config, &mut link, Micros::ZERO);
    interface.update_ip_addrs(|addresses| {
        let address = IpCidr::new(IpAddress::Ipv6(GUEST), 64);
        addresses.push(address).unwrap();
    });
    interface
        .routes_mut()
        .add_default_ipv6_route(ROUTER)
        .unwrap();
    Guest {
        gateway,
        link,
        interface,
        sockets: SocketSet::new(vec![]),
        begun,
        next_port: 1000,
    }
}

impl Guest {
    fn new(outbound: &str) -> Self {
        start(outbound, None)
    }

    /// With a rule for each of these ports of the host's loopback.
    fn of_ports(ports: &[u16]) -> Self {
        let rules: Vec<String> = ports
            .iter()
            .flat_map(|port| [format!("\"[::1]:{port}\""), format!("\"127.0.0.1:{port}\"")])
            .collect();
        Self::new(&format!("[{}]", rules.join(",")))
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn port(&mut self) -> u16 {
        self.next_port += 1;
        self.next_port
    }

    fn connect(&mut self, to: (Ipv6Addr, u16)) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 100_000]);
        let handle = self.sockets.add(Socket::new(buffer(), buffer()));
        let port = self.port();
        let socket = self.sockets.get_mut::<Socket>(handle);
        socket
            .connect(self.interface.context(), to, (GUEST, port))
            .unwrap();
        handle
    }

    fn work(&mut self) {
        let now = Micros::from_micros(self.begun.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.link, &mut self.sockets);
    }

    /// Works until something holds.
    fn until<T>(&mut self, what: &str, mut holds: impl FnMut(&mut Self) -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            self.work();
            if let Some(result) = holds(self) {
                return result;
            }
            assert!(begun.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
            let mut fds = [PollFd::new(&self.link.socket, PollFlags::IN)];
            let limit = Timespec {
                tv_sec: 0,
                tv_nsec: 2_000_000,
            };
            poll(&mut fds, Some(&limit)).unwrap();
        }
    }

    fn until_state(&mut self, handle: SocketHandle, state: State) {
        self.until(&format!("{state}"), |guest| {
            (guest.socket(handle).state() == state).then_some(())
        });
    }

    fn open(&mut self, to: (Ipv6Addr, u16)) -> SocketHandle {
        let handle = self.connect(to);
        self.until_state(handle, State::Established);
        handle
    }

    fn say(&self, packet: &[u8]) {
        send(&self.link.socket, packet, SendFlags::NOSIGNAL).unwrap();
    }

    /// The next thing that comes and is not TCP.
    fn other(&mut self) -> Vec<u8> {
        self.until("something comes", |guest| {
            (!guest.link.others.is_empty()).then(|| guest.link.others.remove(0))
        })
    }

    /// The code of the error "destination unreachable" that comes, which is about this port.
    fn unreachable(&mut self, port: u16) -> u8 {
        let error = self.other();
        let error = Packet::read(&error).unwrap();
        assert_eq!((error.protocol, error.source), (packet::ICMP, ROUTER));
        assert_eq!(error.content[0], 1, "not unreachable");
        let quoted = &error.content[8..];
        assert_eq!(quoted[42..44], port.to_be_bytes(), "about another port");
        error.content[1]
    }

    /// The code of the error that a connection ends with.
    fn refused(&mut self, address: Ipv6Addr, port: u16) -> u8 {
        let handle = self.connect((address, port));
        let code = self.until("it is refused", |guest| {
            let errors = std::mem::take(&mut guest.link.others);
            // One that was asked for twice is answered twice.
            errors.iter().find_map(|error| {
                let error = Packet::read(error)?;
                let quoted = Packet::read(error.content.get(8..)?)?;
                (quoted.destination == address).then_some(error.content[1])
            })
        });
        self.sockets.remove(handle);
        code
    }

    /// Sends all of it and ends; what comes until the other side ends.
    fn exchange(&mut self, handle: SocketHandle, bytes: &[u8]) -> Vec<u8> {
        let (mut sent, mut came) = (0, Vec::new());
        self.until("the other side ends", |guest| {
            let socket = guest.socket(handle);
            if sent < bytes.len() && socket.can_send() {
                sent += socket.send_slice(&bytes[sent..]).unwrap();
            }
            if sent == bytes.len() {
                socket.close();
            }
            while socket.can_recv() {
                socket
                    .recv(|part| {
                        came.extend_from_slice(part);
                        (part.len(), ())
                    })
                    .unwrap();
            }
            (sent == bytes.len() && !socket.may_recv()).then_some(())
        });
        came
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.gateway.kill();
        self.gateway.wait().unwrap();
    }
}

/// Bytes of which none is like its neighbours for long.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// Gives back all that comes, then ends.
fn echo(mut stream: TcpStream) {
    let mut writer = stream.try_clone().unwrap();
    std::io::copy(&mut stream, &mut writer).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
}

#[test]
fn bytes_go_both_ways_exactly() {
    let (six, port) = listen();
    let four = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let mut guest = Guest::of_ports(&[port]);
    for (address, listener) in [(ROUTER, six), (LOOPBACK4, four)] {
        let server = thread::spawn(move || {
            for stream in listener.incoming().take(3) {
                echo(stream.unwrap());
            }
        });
        for len in [0, 1, 20_000_000] {
            let bytes = pattern(len);
            let handle = guest.open((address, port));
            let begun = Instant::now();
            let came = guest.exchange(handle, &bytes);
            assert!(
                came == bytes,
                "{len} bytes by {address}: {} came",
                came.len()
            );
            let rate = len as f64 / 1e6 / begun.elapsed().as_secs_f64();
            println!("{len} bytes out and back by {address}: {rate:.0} MB/s each way");
        }
        server.join().unwrap();
    }
}

#[test]
fn a_slow_reader_slows_and_loses_nothing() {
    let (listener, port) = listen();
    let mut guest = Guest::of_ports(&[port]);
    let handle = guest.open((ROUTER, port));
    let (mut stream, _) = listener.accept().unwrap();
    // The guest is not read from for a while, then does not read.
    let bytes = pattern(8_000_000);
    let expected = bytes.clone();
    let server = thread::spawn(move || {
        thread::sleep(Duration::from_millis(500));
        let mut came = vec![];
        stream.read_to_end(&mut came).unwrap();
        assert!(came == expected, "{} bytes came", came.len());
        stream.write_all(&came).unwrap();
    });
    let mut sent = 0;
    guest.until("all is sent", |guest| {
        let socket = guest.socket(handle);
        if socket.can_send() {
            sent += socket.send_slice(&bytes[sent..]).unwrap();
        }
        (sent == bytes.len()).then_some(())
    });
    guest.socket(handle).close();
    let quiet = Instant::now() + Duration::from_millis(500);
    guest.until("a while passes", |_| {
        (Instant::now() >= quiet).then_some(())
    });
    let came = guest.exchange(handle, &[]);
    assert!(came == bytes, "{} bytes came", came.len());
    server.join().unwrap();
}

#[test]
fn what_no_rule_names_is_prohibited() {
    let (listener, port) = listen();
    listener.set_nonblocking(true).unwrap();
    let datagrams = UdpSocket::bind(("::1", port)).unwrap();
    datagrams.set_nonblocking(true).unwrap();
    let elsewhere = format!("[\"[2001:db8::1]:{port}\", \"::/0:{port}\", \"0.0.0.0/0:*\"]");
    for outbound in ["\"off\"", "\"open\"", &elsewhere, "[\"[::1]:1\"]"] {
        let mut guest = Guest::new(outbound);
        for address in [ROUTER, LOOPBACK4] {
            assert_eq!(guest.refused(address, port), 1, "{outbound}");
            guest.say(&packet::datagram((GUEST, 7), (address, port), b"hello"));
            assert_eq!(guest.unreachable(port), 1, "{outbound}");
        }
        // Nothing is behind these either.
        for address in ["fd00:1::4", "fe80::1", "ff02::1", "::ffff:127.0.0.1"] {
            let address = address.parse().unwrap();
            guest.say(&packet::datagram((GUEST, 7), (address, port), b"hello"));
            assert_eq!(guest.unreachable(port), 1, "{outbound} {address}");
        }
    }
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    let came = datagrams.recv(&mut [0; 8]);
    assert_eq!(came.unwrap_err().kind(), ErrorKind::WouldBlock);
}

/// Two hosts with a wire between them, each a network namespace; removed at the end.
struct Hosts([String; 2]);

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.0 {
            ip(&format!("netns del {name}"));
        }
    }
}

fn ip(args: &str) {
    let status = Command::new("ip").args(args.split(' ')).status().unwrap();
    assert!(status.success(), "ip {args}");
}

impl Hosts {
    /// Their addresses end in 1 and 2.
    fn new() -> Self {
        let names = ["a", "b"].map(|name| format!("xbee-gateway-{}-{name}", std::process::id()));
        let hosts = Self(names);
        for name in &hosts.0 {
            ip(&format!("netns add {name}"));
        }
        let [a, b] = &hosts.0;
        ip(&format!(
            "-n {a} link add wire type veth peer name wire netns {b}"
        ));
        for (number, name) in [a, b].iter().enumerate() {
            let number = number + 1;
            ip(&format!(
                "-n {name} addr add fd99::{number}/64 dev wire nodad"
            ));
            ip(&format!("-n {name} addr add 10.99.0.{number}/24 dev wire"));
            ip(&format!("-n {name} link set wire up"));
        }
        hosts
    }

    /// Has something done on the second host.
    fn on_second<T: Send>(&self, done: impl FnOnce() -> T + Send) -> T {
        let name = std::fs::File::open(format!("/run/netns/{}", self.0[1])).unwrap();
        thread::scope(|scope| {
            let on_it = || {
                rustix::thread::move_into_link_name_space(
                    name.as_fd(),
                    Some(rustix::thread::LinkNameSpaceType::Network),
                )
                .unwrap();
                done()
            };
            scope.spawn(on_it).join().unwrap()
        })
    }
}

#[test]
fn other_machines_are_reached_and_the_host_beside_them_is_not() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: network namespaces of one's own need root");
        return;
    }
    if Command::new("ip").arg("-V").output().is_err() {
        println!("skipped: no program ip (iproute2)");
        return;
    }
    let hosts = Hosts::new();
    let (listener, datagrams) = hosts.on_second(|| {
        (
            TcpListener::bind("[::]:80").unwrap(),
            UdpSocket::bind("[fd99::2]:53").unwrap(),
        )
    });
    datagrams.set_read_timeout(Some(LIMIT)).unwrap();
    let server = thread::spawn(move || {
        for stream in listener.incoming() {
            echo(stream.unwrap());
        }
    });
    let other: Ipv6Addr = "fd99::2".parse().unwrap();
    let other4: Ipv6Addr = "64:ff9b::10.99.0.2".parse().unwrap();
    let list = "[\"fd99::/64:80\", \"10.99.0.0/24:80\", \"[fd99::2]:53\", \"2001:db8::/32:80\"]";
    for outbound in ["\"open\"", list] {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &hosts.0[0]]);
        command.arg(env!("CARGO_BIN_EXE_gateway"));
        let mut guest = start_by(command, outbound, Some(65_534));
        let bytes = pattern(3_000_000);
        for address in [other, other4] {
            let handle = guest.open((address, 80));
            assert!(
                guest.exchange(handle, &bytes) == bytes,
                "{outbound} {address}"
            );
        }
        guest.say(&packet::datagram((GUEST, 7), (other, 53), b"who?"));
        let (len, peer) = datagrams.recv_from(&mut [0; 8]).unwrap();
        assert_eq!((len, peer.ip().to_string().as_str()), (4, "fd99::1"));
        // The host itself, by all addresses of its interface.
        for address in ["fd99::1", "64:ff9b::10.99.0.1", "64:ff9b::10.99.0.255"] {
            let code = guest.refused(address.parse().unwrap(), 80);
            assert_eq!(code, 1, "{outbound} {address}");
        }
        // Nobody has this address, which takes the host a while to find out, and there is no way to that one.
        if outbound == list {
            assert_eq!(guest.refused("fd99::3".parse().unwrap(), 80), 3);
        }
        assert_eq!(guest.refused("2001:db8::1".parse().unwrap(), 80), 0);
    }
    // It waits for a connection that nobody makes any more.
    drop(server);
}

#[test]
fn ends_and_resets_are_told_to_the_other_side() {
    let (listener, port) = listen();
    let mut guest = Guest::of_ports(&[port, 1]);
    // Where nobody listens.
    let handle = guest.connect((ROUTER, 1));
    guest.until_state(handle, State::Closed);
    assert!(guest.link.others.is_empty());

    // The guest resets.
    let handle = guest.open((ROUTER, port));
    let (mut stream, _) = listener.accept().unwrap();
    guest.socket(handle).abort();
    guest.work();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let error = stream.read(&mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);

    // The host's side resets: it goes away with bytes unread.
    let handle = guest.open((ROUTER, port));
    let (stream, _) = listener.accept().unwrap();
    guest.socket(handle).send_slice(b"hello").unwrap();
    guest.until("it is there", |_| {
        (stream.peek(&mut [0; 8]).unwrap() == 5).then_some(())
    });
    drop(stream);
    guest.until_state(handle, State::Closed);

    // The host's side ends first, and the guest still speaks.
    let handle = guest.open((ROUTER, port));
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(b"bye").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    guest.until_state(handle, State::CloseWait);
    assert_eq!(guest.exchange(handle, b"and you"), b"bye");
    guest.until_state(handle, State::Closed);
    let mut came = String::new();
    stream.read_to_string(&mut came).unwrap();
    assert_eq!(came, "and you");
}

#[test]
fn connections_are_bounded() {
    let (listener, port) = listen();
    let mut guest = Guest::of_ports(&[port]);
    let mut open = vec![];
    for _ in 0..CONNECTIONS_MAX {
        let handle = guest.open((ROUTER, port));
        open.push((handle, listener.accept().unwrap().0));
    }
    let one_more = guest.connect((ROUTER, port));
    guest.until_state(one_more, State::Closed);
    // All of them live.
    for (handle, stream) in &mut open {
        stream.write_all(b"x").unwrap();
        guest.until("it comes", |guest| {
            guest.socket(*handle).can_recv().then_some(())
        });
    }
    let (handle, stream) = open.pop().unwrap();
    drop(stream);
    guest.socket(handle).abort();
    let handle = guest.open((ROUTER, port));
    assert_eq!(guest.socket(handle).state(), State::Established);
}

#[test]
fn datagrams_are_answered() {
    let server = UdpSocket::bind("[::1]:0").unwrap();
    server.set_read_timeout(Some(LIMIT)).unwrap();
    let port = server.local_addr().unwrap().port();
    let mut guest = Guest::of_ports(&[port, 1]);
    let mut peers = vec![];
    for own in [4000, 4001] {
        for question in [&b"who?"[..], &[7; 9000]] {
            guest.say(&packet::datagram((GUEST, own), (ROUTER, port), question));
            let mut buffer = vec![0; 10_000];
            let (len, peer) = server.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..len], question);
            peers.push(peer);
            server.send_to(b"me", peer).unwrap();
            let answer = guest.other();
            let answer = Packet::read(&answer).unwrap();
            assert_eq!(answer.source, ROUTER);
            let answer = answer.udp().unwrap();
            assert_eq!((answer.source_port, answer.destination_port), (port, own));
            assert_eq!(answer.payload, b"me");
        }
    }
    // One flow, one port of the host's.
    assert!(peers[0] == peers[1] && peers[2] == peers[3] && peers[0] != peers[2]);
    // Who was not asked does not get in.
    let stranger = UdpSocket::bind("[::1]:0").unwrap();
    stranger.send_to(b"hello", peers[0]).unwrap();
    // Where nobody is: that is heard of by the next question at the latest.
    guest.say(&packet::datagram((GUEST, 5000), (ROUTER, 1), b"who?"));
    assert_eq!(guest.unreachable(1), 4);
    assert!(guest.link.others.is_empty());
}

#[test]
fn garbage_does_not_end_it() {
    let (listener, port) = listen();
    let mut guest = Guest::of_ports(&[port]);
    let noise = pattern(200_000);
    for (n, chunk) in noise.chunks(97).enumerate() {
        guest.say(chunk);
        // The same behind headers that would do, of each protocol.
        let protocol = [packet::TCP, UDP, packet::ICMP, 0, 43, 44, 60][n % 7];
        let mut bytes = packet::datagram((GUEST, 9), (ROUTER, port), chunk);
        bytes[6] = protocol;
        // A length that is wrong, now and then.
        bytes[5] ^= u8::from(n % 5 == 0);
        guest.say(&bytes);
        if n % 16 == 0 {
            guest.work();
        }
    }
    guest.link.others.clear();
    let handle = guest.open((ROUTER, port));
    let (stream, _) = listener.accept().unwrap();
    let server = thread::spawn(move || echo(stream));
    assert_eq!(guest.exchange(handle, b"still there"), b"still there");
    server.join().unwrap();
    assert!(guest.gateway.try_wait().unwrap().is_none());
}

#[test]
fn it_is_caged_and_ends_with_its_connection() {
    let root = rustix::process::geteuid().is_root();
    let uid = root.then_some(65_534);
    let (listener, port) = listen();
    let mut guest = start(&format!("[\"[::1]:{port}\"]"), uid);
    let status = std::fs::read_to_string(format!("/proc/{}/status", guest.gateway.id())).unwrap();
    let line = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap()
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(line("Seccomp:"), "2");
    assert_eq!(line("NoNewPrivs:"), "1");
    assert_eq!(line("Threads:"), "1");
    if root {
        assert_eq!(line("Uid:"), "65534 65534 65534 65534");
        assert_eq!(line("Groups:"), "");
        assert_eq!(line("CapEff:"), "0000000000000000");
    }
    println!("resident: {}", line("VmRSS:"));
    // It works in there.
    let handle = guest.open((ROUTER, port));
    let (stream, _) = listener.accept().unwrap();
    let server = thread::spawn(move || echo(stream));
    assert_eq!(guest.exchange(handle, b"hello"), b"hello");
    server.join().unwrap();

    rustix::net::shutdown(guest.link.socket.as_fd(), rustix::net::Shutdown::Both).unwrap();
    assert!(guest.gateway.wait().unwrap().success());
}
