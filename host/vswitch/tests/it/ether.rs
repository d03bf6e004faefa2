//! Network cards as QEMU has them: a socket a card, a frame a message. Guests here are hostile; real ones are
//! in the contract of `xbee-hypervisor`.

use std::net::Ipv6Addr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recv, send,
};
use xbee_vswitch::ether::frame::{self, Identity, Verdict};
use xbee_vswitch::ether::neighbour::{LINK_LOCAL, ROUTER_MAC, checksum, of_mac, router_address};
use xbee_vswitch::ether::queue::MAX_BYTES as WAITING_MAX_BYTES;
use xbee_vswitch::ether::{CardSpec, CardStatus, UplinkSpec};

use crate::vm::{Switch, eventually};

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// A guest's card, in QEMU's place.
struct Card {
    cid: u32,
    mac: [u8; 6],
    address: Ipv6Addr,
    socket: OwnedFd,
}

fn mac(number: u8) -> [u8; 6] {
    [0x02, 0xbe, 0, 0, 0, number]
}

fn spec(switch: &Switch, cid: u32, peers: bool) -> CardSpec {
    CardSpec {
        cid,
        socket: switch.dir.path().join(format!("{cid}.card")),
        mac: mac(cid as u8),
        address: format!("fd00:1::{cid:x}").parse().unwrap(),
        peers,
    }
}

fn connect(spec: &CardSpec) -> OwnedFd {
    connect_to(&spec.socket)
}

fn connect_to(path: &Path) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    socket
}

/// The next message that comes within a while.
fn message_within(socket: &OwnedFd, limit: Duration) -> Option<Vec<u8>> {
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    let limit = rustix::event::Timespec::try_from(limit).unwrap();
    if poll(&mut fds, Some(&limit)).unwrap() == 0 {
        return None;
    }
    let mut message = vec![0; frame::MAX_BYTES + 1];
    let (_, len) = recv(socket, &mut message[..], RecvFlags::empty()).unwrap();
    message.truncate(len);
    Some(message)
}

impl Card {
    fn new(switch: &mut Switch, cid: u32, owner: &str, peers: bool) -> Self {
        switch.add(cid, owner).unwrap();
        let spec = spec(switch, cid, peers);
        switch.attach(spec.clone()).unwrap();
        let socket = connect(&spec);
        eventually("the name is removed", || !spec.socket.exists());
        Self {
            cid,
            mac: spec.mac,
            address: spec.address,
            socket,
        }
    }

    fn say(&self, frame: &[u8]) {
        send(&self.socket, frame, SendFlags::NOSIGNAL).unwrap();
    }

    /// The next frame that comes within a while.
    fn hear_within(&self, limit: Duration) -> Option<Vec<u8>> {
        message_within(&self.socket, limit)
    }

    fn hear(&self) -> Vec<u8> {
        self.hear_within(Duration::from_secs(20))
            .expect("no frame comes")
    }

    /// That a frame which another one sent after those in question is what comes first.
    fn hears_only(&self, from: &Card) {
        let marker = udp(from, self, b"marker");
        from.say(&marker);
        assert_eq!(self.hear(), marker);
    }

    fn status(&self, switch: &mut Switch) -> CardStatus {
        let domains = switch.list();
        let domain = domains.iter().find(|d| d.spec.cid == self.cid).unwrap();
        domain.interfaces[0].clone()
    }
}

/// A frame with a packet.
fn packet(
    macs: ([u8; 6], [u8; 6]),
    from: Ipv6Addr,
    to: Ipv6Addr,
    next: u8,
    content: &[u8],
) -> Vec<u8> {
    let mut frame = [macs.1, macs.0].concat();
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend((content.len() as u16).to_be_bytes());
    frame.extend([next, 255]);
    frame.extend(from.octets());
    frame.extend(to.octets());
    frame.extend(content);
    frame
}

fn udp(from: &Card, to: &Card, content: &[u8]) -> Vec<u8> {
    packet((from.mac, to.mac), from.address, to.address, 17, content)
}

/// A message of ICMPv6 with its checksum.
fn message(from: Ipv6Addr, to: Ipv6Addr, kind: u8, body: &[u8]) -> Vec<u8> {
    let mut message = [&[kind, 0, 0, 0], body].concat();
    let sum = checksum(from, to, &message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    message
}

fn icmp(card: &Card, from: Ipv6Addr, to: (Ipv6Addr, [u8; 6]), kind: u8, body: &[u8]) -> Vec<u8> {
    packet(
        (card.mac, to.1),
        from,
        to.0,
        58,
        &message(from, to.0, kind, body),
    )
}

/// The multicast group of those who might have an address (RFC 4291, section 2.7.1).
fn group(target: Ipv6Addr) -> (Ipv6Addr, [u8; 6]) {
    let [.., a, b, c] = target.octets();
    let address = 0xff02_0000_0000_0000_0000_0001_ff00_0000u128;
    let address = Ipv6Addr::from_bits(address | u128::from(u32::from_be_bytes([0, a, b, c])));
    (address, [0x33, 0x33, 0xff, a, b, c])
}

fn solicitation(card: &Card, from: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend(target.octets());
    if !from.is_unspecified() {
        body.extend([1, 1]);
        body.extend(card.mac);
    }
    icmp(card, from, group(target), 135, &body)
}

/// What is said of an address: at which hardware address it is, and the flags.
fn advertised(frame: &[u8], to: &Card) -> (Ipv6Addr, [u8; 6], u8) {
    let address = |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&frame[at..at + 16]).unwrap());
    assert_eq!(frame[..6], to.mac);
    assert_eq!((frame[54], frame[21]), (136, 255));
    assert_eq!(checksum(address(22), address(38), &frame[54..]), 0);
    assert_eq!(frame[78..80], [2, 1]);
    (address(62), frame[80..86].try_into().unwrap(), frame[58])
}

#[test]
fn guests_of_one_owner_that_asked_reach_each_other_and_nobody_else_does() {
    let mut switch = Switch::start();
    let switch = &mut switch;
    let [a, b] = [3, 4].map(|cid| Card::new(switch, cid, "alice", true));
    let shy = Card::new(switch, 5, "alice", false);
    let other = Card::new(switch, 6, "bob", true);
    let nobody = Card::new(switch, 7, "", true);
    let neither = Card::new(switch, 8, "", true);

    let longest = vec![7; 0xffff];
    for content in [&b"hello"[..], &longest] {
        a.say(&udp(&a, &b, content));
        assert_eq!(b.hear(), udp(&a, &b, content));
    }
    // What is behind the packet is not passed on.
    a.say(&[udp(&a, &b, b"short"), vec![0; 30]].concat());
    assert_eq!(b.hear(), udp(&a, &b, b"short"));
    let all = packet(
        (a.mac, [0x33, 0x33, 0, 0, 0, 1]),
        a.address,
        ALL_NODES,
        17,
        b"all",
    );
    a.say(&all);
    assert_eq!(b.hear(), all);

    for (from, to) in [
        (&a, &other),
        (&other, &a),
        (&a, &shy),
        (&shy, &a),
        (&nobody, &neither),
        (&nobody, &a),
    ] {
        from.say(&udp(from, to, b"no"));
        from.say(&solicitation(from, from.address, to.address));
    }
    for (card, denied) in [(&a, 4), (&shy, 2), (&other, 2), (&nobody, 4)] {
        eventually("it is counted", || card.status(switch).denied == denied);
    }
    for card in [&shy, &other, &nobody, &neither] {
        assert_eq!(card.hear_within(Duration::ZERO), None);
        assert_eq!(card.status(switch).frames_out, 0);
    }
    b.hears_only(&a);
    a.hears_only(&b);

    // Who has left is out of reach, and who comes in its place is not taken for it.
    switch.remove(4).unwrap();
    assert_eq!(
        recv(&b.socket, &mut [0; 8][..], RecvFlags::empty())
            .unwrap()
            .1,
        0
    );
    a.say(&udp(&a, &b, b"gone"));
    eventually("it is counted", || a.status(switch).denied == 5);
    let b = Card::new(switch, 4, "bob", true);
    a.say(&udp(&a, &b, b"gone"));
    eventually("it is counted", || a.status(switch).denied == 6);
    other.hears_only(&b);
}

#[test]
fn the_switch_says_who_is_where_and_nobody_else() {
    let mut switch = Switch::start();
    let switch = &mut switch;
    let [a, b] = [3, 4].map(|cid| Card::new(switch, cid, "alice", true));
    let local = |card: &Card| of_mac(LINK_LOCAL, card.mac);

    for target in [b.address, local(&b), of_mac(0xfd00_0001_0000_0000, b.mac)] {
        a.say(&solicitation(&a, a.address, target));
        assert_eq!(advertised(&a.hear(), &a), (target, b.mac, 0x60));
    }
    let router = of_mac(LINK_LOCAL, ROUTER_MAC);
    for target in [router, router_address(0xfd00_0001_0000_0000)] {
        a.say(&solicitation(&a, local(&a), target));
        assert_eq!(advertised(&a.hear(), &a), (target, ROUTER_MAC, 0xe0));
    }
    // One that wants to take another's address is told, and one that wants its own is not.
    let nobody = Ipv6Addr::UNSPECIFIED;
    a.say(&solicitation(&a, nobody, a.address));
    a.say(&solicitation(&a, nobody, b.address));
    let heard = a.hear();
    assert_eq!(advertised(&heard, &a), (b.address, b.mac, 0x20));
    assert_eq!(heard[38..54], ALL_NODES.octets());

    // What the network is.
    a.say(&icmp(
        &a,
        local(&a),
        ("ff02::2".parse().unwrap(), [0x33, 0x33, 0, 0, 0, 2]),
        133,
        &[0; 4],
    ));
    let heard = a.hear();
    assert_eq!(checksum(router, ALL_NODES, &heard[54..]), 0);
    assert_eq!((heard[54], heard[21]), (134, 255));
    assert_eq!(heard[60..62], [0, 0], "it is no default router");
    let options = &heard[70..];
    assert_eq!(options[..8], [&[1, 1][..], &ROUTER_MAC].concat());
    assert_eq!(options[8..16], [5, 1, 0, 0, 0, 0, 0xff, 0xff]);
    assert_eq!(options[16..20], [3, 4, 64, 0xc0]);
    assert_eq!(
        options[24..28],
        [0; 4],
        "addresses made of it are not preferred"
    );
    assert_eq!(
        options[32..48],
        "fd00:1::".parse::<Ipv6Addr>().unwrap().octets()
    );

    // Claims, of its own address and of others', reach nobody; nor do routers that are none, not even
    // behind other headers or in fragments.
    let before = a.status(switch).denied;
    let claim = |target: Ipv6Addr| {
        let body = [&[0x20, 0, 0, 0], &target.octets()[..], &[2, 1], &a.mac].concat();
        icmp(&a, a.address, (b.address, b.mac), 136, &body)
    };
    a.say(&claim(a.address));
    let mut denied = vec![claim(b.address), claim("fd00:1::99".parse().unwrap())];
    let all = (ALL_NODES, [0x33, 0x33, 0, 0, 0, 1]);
    for from in [a.address, local(&a)] {
        for (kind, body) in [(134, &[0; 12][..]), (137, &[0; 36]), (130, &[0; 20])] {
            denied.push(icmp(&a, from, all, kind, body));
        }
    }
    let advert = message(local(&a), ALL_NODES, 134, &[0; 12]);
    for headers in [
        (0, vec![58, 0, 1, 4, 0, 0, 0, 0]),
        (60, vec![58, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (44, vec![58, 0, 0, 0, 0, 0, 0, 1]),
        (44, vec![60, 0, 0, 1, 0, 0, 0, 1, 58, 0, 1, 4, 0, 0, 0, 0]),
        (0, vec![44, 0, 1, 4, 0, 0, 0, 0, 58, 0, 0, 0, 0, 0, 0, 1]),
    ] {
        let content = [headers.1, advert.clone()].concat();
        denied.push(packet(
            (a.mac, all.1),
            local(&a),
            all.0,
            headers.0,
            &content,
        ));
    }
    // Not from the link, with a wrong checksum, with a code.
    let mut far = solicitation(&a, a.address, b.address);
    far[21] = 64;
    let mut broken = solicitation(&a, a.address, b.address);
    broken[56] ^= 1;
    denied.extend([far, broken]);
    for frame in &denied {
        a.say(frame);
    }
    eventually("they are counted", || {
        a.status(switch).denied == before + denied.len() as u64
    });
    b.hears_only(&a);
    a.hears_only(&b);
}

#[test]
fn a_guest_sends_only_as_who_it_is() {
    let mut switch = Switch::start();
    let switch = &mut switch;
    let [a, b] = [3, 4].map(|cid| Card::new(switch, cid, "alice", true));
    let mut denied = Vec::new();
    for mac in [mac(9), b.mac, ROUTER_MAC, [0; 6], [0xff; 6]] {
        denied.push(packet((mac, b.mac), a.address, b.address, 17, b"mac"));
    }
    for from in [
        "fd00:1::9",
        "fd00:1::4",
        "fd00:1::1",
        "::",
        "::1",
        "ff02::1",
        "fe80::1",
        "2001:db8::3",
    ] {
        let from = from.parse().unwrap();
        denied.push(packet((a.mac, b.mac), from, b.address, 17, b"address"));
        denied.push(solicitation(&a, from, "fd00:1::77".parse().unwrap()));
    }
    for (to, mac) in [("::", b.mac), ("::1", b.mac), ("ff02::1", b.mac)] {
        denied.push(packet(
            (a.mac, mac),
            a.address,
            to.parse().unwrap(),
            17,
            b"to",
        ));
    }
    denied.push(packet(
        (a.mac, [0xff; 6]),
        a.address,
        b.address,
        17,
        b"broadcast",
    ));
    denied.push(packet(
        (a.mac, [0x33, 0x33, 0, 0, 0, 1]),
        a.address,
        b.address,
        17,
        b"group",
    ));
    let good = udp(&a, &b, b"good");
    // IPv4, ARP, a tag of IEEE 802.1Q, no IPv6 inside, cut off.
    for kind in [[8, 0], [8, 6], [0x81, 0]] {
        let mut frame = good.clone();
        frame[12..14].copy_from_slice(&kind);
        denied.push(frame);
    }
    let mut four = good.clone();
    four[14] = 0x45;
    denied.push(four);
    denied.extend((1..good.len()).map(|len| good[..len].to_vec()));
    denied.push(vec![0; frame::MAX_BYTES + 1]);
    for frame in &denied {
        a.say(frame);
    }
    eventually("they are counted", || {
        a.status(switch).denied == denied.len() as u64
    });
    b.hears_only(&a);
    a.hears_only(&b);
}

#[test]
fn a_guest_that_does_not_take_its_frames_or_floods_hurts_no_other() {
    let mut switch = Switch::start();
    let switch = &mut switch;
    let [a, b, deaf] = [3, 4, 5].map(|cid| Card::new(switch, cid, "alice", true));
    // More than waits for it, and the switch goes on.
    let frame = udp(&a, &deaf, &[1; 60_000]);
    for _ in 0..3 * WAITING_MAX_BYTES / frame.len() {
        a.say(&frame);
    }
    b.hears_only(&a);
    let status = deaf.status(switch);
    assert!(status.dropped > 0, "{status:?}");
    // When it takes them again, it gets no more than may wait, and then the newest.
    let mut bytes = 0;
    while let Some(frame) = deaf.hear_within(Duration::from_millis(500)) {
        bytes += frame.len();
    }
    assert!(bytes < 2 * WAITING_MAX_BYTES, "{bytes}");
    deaf.hears_only(&a);

    // One floods, with what is denied, what is for all and what is for nobody: two others still talk.
    let flood = [
        vec![0xff; 1000],
        packet(
            (deaf.mac, [0x33, 0x33, 0, 0, 0, 1]),
            deaf.address,
            ALL_NODES,
            17,
            &[0; 1000],
        ),
        udp(&deaf, &b, &[0; 60_000]),
    ];
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (sent, worst) = std::thread::scope(|scope| {
        let flooding = scope.spawn(|| {
            let mut sent = 0u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for frame in &flood {
                    deaf.say(frame);
                    sent += 1;
                }
            }
            sent
        });
        let mut worst = Duration::ZERO;
        for n in 0..200u32 {
            let begun = Instant::now();
            let question = udp(&a, &b, &n.to_be_bytes());
            a.say(&question);
            while b.hear() != question {}
            worst = worst.max(begun.elapsed());
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        (flooding.join().unwrap(), worst)
    });
    println!("of 200 frames beside a flood of {sent} the slowest took {worst:?}");
}

/// Gives a card an uplink and connects to it.
fn uplink(switch: &mut Switch, card: &Card) -> OwnedFd {
    let socket = switch.dir.path().join(format!("{}.uplink", card.cid));
    let spec = UplinkSpec {
        cid: card.cid,
        mac: card.mac,
        socket: socket.clone(),
    };
    switch.attach_uplink(spec).unwrap();
    let connection = connect_to(&socket);
    eventually("the name is removed", || !socket.exists());
    connection
}

/// For how many seconds a guest is told that it has a router, when it asks.
fn router_lifetime_s(card: &Card) -> u16 {
    let local = of_mac(LINK_LOCAL, card.mac);
    let routers = ("ff02::2".parse().unwrap(), [0x33, 0x33, 0, 0, 0, 2]);
    card.say(&icmp(card, local, routers, 133, &[0; 4]));
    let heard = card.hear();
    assert_eq!(heard[54], 134);
    u16::from_be_bytes([heard[60], heard[61]])
}

#[test]
fn an_uplink_carries_what_is_for_elsewhere_and_nothing_else() {
    let mut switch = Switch::start();
    let switch = &mut switch;
    let [a, b] = [3, 4].map(|cid| Card::new(switch, cid, "alice", true));
    assert_eq!(router_lifetime_s(&a), 0);
    let uplink = uplink(switch, &a);
    assert_eq!(router_lifetime_s(&a), 1800);
    assert_eq!(router_lifetime_s(&b), 0);
    let far: Ipv6Addr = "2001:db8::1".parse().unwrap();
    let router = router_address(0xfd00_0001_0000_0000);
    let local = |card: &Card| of_mac(LINK_LOCAL, card.mac);
    let to = |from: Ipv6Addr, to: Ipv6Addr| packet((a.mac, ROUTER_MAC), from, to, 17, b"out");

    for destination in [far, router, "64:ff9b::1".parse().unwrap()] {
        let frame = to(a.address, destination);
        // What is behind the packet is not passed on.
        a.say(&[&frame[..], &[0; 9]].concat());
        let heard = message_within(&uplink, Duration::from_secs(20)).unwrap();
        assert_eq!(heard, frame[14..]);
    }
    let denied = [
        to(a.address, b.address),
        to(a.address, a.address),
        to(a.address, "fd00:1::99".parse().unwrap()),
        to(a.address, local(&b)),
        to(a.address, of_mac(LINK_LOCAL, ROUTER_MAC)),
        to(local(&a), far),
        to(b.address, far),
        to(far, far),
    ];
    let before = a.status(switch).denied;
    for frame in &denied {
        a.say(frame);
    }
    eventually("they are counted", || {
        a.status(switch).denied == before + denied.len() as u64
    });
    assert_eq!(message_within(&uplink, Duration::ZERO), None);
    // Who has no uplink of its own has none.
    b.say(&packet((b.mac, ROUTER_MAC), b.address, far, 17, b"out"));
    eventually("it is counted", || b.status(switch).denied == 1);
    assert_eq!(message_within(&uplink, Duration::ZERO), None);

    // What comes back.
    let from = |from: Ipv6Addr, to: Ipv6Addr, next: u8, content: &[u8]| {
        packet((ROUTER_MAC, a.mac), from, to, next, content)
    };
    let of_card = of_mac(0xfd00_0001_0000_0000, a.mac);
    for (source, destination) in [(far, a.address), (router, a.address), (far, of_card)] {
        for content in [&b""[..], b"in", &[7; 0xffff]] {
            let frame = from(source, destination, 17, content);
            send(&uplink, &frame[14..], SendFlags::NOSIGNAL).unwrap();
            assert_eq!(a.hear(), frame);
        }
    }
    let good = from(far, a.address, 17, b"in");
    let advert = message(router, a.address, 134, &[0; 12]);
    let mut denied = vec![
        from(b.address, a.address, 17, b"in"),
        from(a.address, a.address, 17, b"in"),
        from(of_mac(LINK_LOCAL, ROUTER_MAC), a.address, 17, b"in"),
        from(ALL_NODES, a.address, 17, b"in"),
        from(Ipv6Addr::UNSPECIFIED, a.address, 17, b"in"),
        from(Ipv6Addr::LOCALHOST, a.address, 17, b"in"),
        from(far, b.address, 17, b"in"),
        from(far, ALL_NODES, 17, b"in"),
        from(far, local(&a), 17, b"in"),
        from(router, a.address, 58, &advert),
        from(
            router,
            a.address,
            0,
            &[&[58, 0, 1, 4, 0, 0, 0, 0], &advert[..]].concat(),
        ),
        from(
            router,
            a.address,
            44,
            &[&[58, 0, 0, 0, 0, 0, 0, 1], &advert[..]].concat(),
        ),
        good[..good.len() - 1].to_vec(),
        [&good[..], b"x"].concat(),
    ];
    denied.push(good.clone());
    denied.last_mut().unwrap()[14] = 0x45;
    for frame in &denied {
        send(&uplink, &frame[14..], SendFlags::NOSIGNAL).unwrap();
    }
    eventually("they are counted", || {
        a.status(switch).uplink_denied == denied.len() as u64
    });
    a.hears_only(&b);
    b.hears_only(&a);

    // Without its gateway it has no router, and is told.
    drop(uplink);
    let heard = a.hear();
    assert_eq!((heard[54], &heard[60..62]), (134, &[0, 0][..]));
    a.say(&to(a.address, far));
    eventually("it is counted", || {
        let status = a.status(switch);
        !status.uplink && status.denied == before + 9
    });
}

#[test]
fn an_uplink_waits_for_a_guest_that_is_slow_and_nothing_is_lost() {
    let mut switch = Switch::start();
    let switch = &mut switch;
    let a = Card::new(switch, 3, "alice", true);
    let uplink = uplink(switch, &a);
    let far: Ipv6Addr = "2001:db8::1".parse().unwrap();
    let count = 3 * WAITING_MAX_BYTES / 60_000;
    let frame = |n: usize| {
        let content = [&n.to_be_bytes()[..], &[7; 60_000]].concat();
        packet((ROUTER_MAC, a.mac), far, a.address, 17, &content)
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..count {
                send(&uplink, &frame(n)[14..], SendFlags::NOSIGNAL).unwrap();
            }
        });
        // It waits for a guest that does not take its frames.
        std::thread::sleep(Duration::from_millis(300));
        for n in 0..count {
            assert!(a.hear() == frame(n), "frame {n}");
        }
    });
    assert_eq!(a.status(switch).dropped, 0);

    // An uplink that does not take packets waits too, within a bound.
    let out = packet((a.mac, ROUTER_MAC), a.address, far, 17, &[7; 60_000]);
    for _ in 0..count {
        a.say(&out);
    }
    eventually("packets are lost", || a.status(switch).uplink_dropped > 0);
    let mut came = 0;
    while message_within(&uplink, Duration::from_millis(500)).is_some() {
        came += 1;
    }
    assert!(came * out.len() < 2 * WAITING_MAX_BYTES, "{came}");
    a.say(&out);
    let limit = Duration::from_secs(20);
    assert_eq!(message_within(&uplink, limit).unwrap(), out[14..]);
}

#[test]
fn uplinks_come_and_go() {
    let mut switch = Switch::start();
    let switch = &mut switch;
    let a = Card::new(switch, 3, "alice", true);
    let of = |cid, mac| UplinkSpec {
        cid,
        mac,
        socket: switch.dir.path().join("uplink"),
    };
    let (right, wrong) = (of(3, a.mac), [of(4, a.mac), of(3, mac(9))]);
    for wrong in wrong {
        let error = switch.attach_uplink(wrong).unwrap_err();
        assert_eq!(error.code(), "unknown-card");
    }
    // Attached again, before and after the connection: the last one counts.
    switch.attach_uplink(right.clone()).unwrap();
    switch.attach_uplink(right.clone()).unwrap();
    let first = connect_to(&right.socket);
    eventually("the name is removed", || !right.socket.exists());
    switch.attach_uplink(right.clone()).unwrap();
    let ended = |socket: &OwnedFd| {
        let (_, len) = recv(socket, &mut [0; 8][..], RecvFlags::empty()).unwrap();
        len == 0
    };
    assert!(ended(&first));
    let second = connect_to(&right.socket);
    eventually("it is connected", || a.status(switch).uplink);
    // It goes with its card, which leaves no name behind.
    switch.detach(3, a.mac).unwrap();
    assert!(ended(&second));
    let card = spec(switch, 3, true);
    switch.attach(card).unwrap();
    switch.attach_uplink(right.clone()).unwrap();
    switch.remove(3).unwrap();
    assert!(!right.socket.exists());
}

#[test]
fn cards_come_and_go() {
    let mut switch = Switch::start();
    let switch = &mut switch;
    let a = Card::new(switch, 3, "alice", true);
    switch.add(4, "alice").unwrap();
    let code = |switch: &mut Switch, change: &dyn Fn(&mut CardSpec)| {
        let mut spec = spec(switch, 4, true);
        change(&mut spec);
        switch.attach(spec).unwrap_err().code().to_owned()
    };
    assert_eq!(code(switch, &|card| card.cid = 9), "unknown-cid");
    assert_eq!(code(switch, &|card| card.mac = mac(3)), "mac-in-use");
    for invalid in [[0; 6], [0xff; 6], [0x33, 0x33, 0, 0, 0, 1], ROUTER_MAC] {
        assert_eq!(code(switch, &|card| card.mac = invalid), "invalid-mac");
    }
    assert_eq!(
        code(switch, &|card| card.address = a.address),
        "address-in-use"
    );
    for invalid in ["::", "::1", "ff02::1", "fe80::5", "fd00:1::1"] {
        let invalid = invalid.parse().unwrap();
        assert_eq!(
            code(switch, &|card| card.address = invalid),
            "invalid-address"
        );
    }
    // Attached again, before and after the connection: the last one counts.
    let card = spec(switch, 4, true);
    switch.attach(card.clone()).unwrap();
    switch.attach(card.clone()).unwrap();
    let first = connect(&card);
    eventually("the name is removed", || !card.socket.exists());
    switch.attach(card.clone()).unwrap();
    assert_eq!(
        recv(&first, &mut [0; 8][..], RecvFlags::empty()).unwrap().1,
        0
    );
    let b = Card {
        cid: 4,
        mac: card.mac,
        address: card.address,
        socket: connect(&card),
    };
    eventually("it is connected", || !card.socket.exists());
    a.hears_only(&b);
    switch.detach(4, b.mac).unwrap();
    switch.detach(4, b.mac).unwrap();
    switch.detach(4, a.mac).unwrap();
    assert_eq!(
        recv(&b.socket, &mut [0; 8][..], RecvFlags::empty())
            .unwrap()
            .1,
        0
    );
    // One whose QEMU ends is gone with it.
    assert_eq!(switch.list()[0].interfaces.len(), 1);
    drop(a);
    eventually("the card is gone", || {
        switch.list()[0].interfaces.is_empty()
    });
    // A connection that is never made leaves no name behind.
    switch.attach(card.clone()).unwrap();
    switch.remove(4).unwrap();
    assert!(!card.socket.exists());
}

proptest! {
    /// Whatever bytes there are, what passes is the guest's own and holds together.
    #[test]
    fn frames_of_any_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..200), next in prop::sample::select(vec![0u8, 17, 43, 44, 58, 60]), kind in 126u8..150) {
        let who = Identity::new(mac(3), "fd00:1::3".parse().unwrap());
        frame::judge(&bytes, &who);
        // The same behind headers that would pass.
        let content = bytes.split_off(bytes.len() / 2);
        let mut content = [&[58, 0], &content[..]].concat();
        if next == 58 {
            content[0] = kind;
        }
        let bytes = packet((mac(3), mac(4)), who.addresses()[0], "fd00:1::4".parse().unwrap(), next, &content);
        match frame::judge(&bytes, &who) {
            Verdict::Unicast { to, frame } => {
                prop_assert_eq!(to, mac(4));
                prop_assert_eq!(frame, &bytes[..]);
                prop_assert!(next != 58 || !(130..=137).contains(&kind));
            }
            Verdict::Multicast { .. } => prop_assert!(false),
            _ => {}
        }
    }
}
