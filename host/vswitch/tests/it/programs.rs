//! Programs of the host's users and their guests.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::Uid;
use xbee_vswitch::packet::op;
use xbee_vswitch::programs::PROGRAMS_PER_USER_MAX;

use crate::driver::Driver;
use crate::vm::{Switch, eventually, read_all, read_line};

const ALICE: u32 = 61_234;
const BOB: u32 = 61_235;

/// A switch and its socket for programs, where there can be some of several users.
fn served() -> Option<(Switch, PathBuf)> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can be several users");
        return None;
    }
    let mut switch = Switch::start();
    let socket = switch.serve_programs();
    Some((switch, socket))
}

/// A connection of a user's: the kernel tells the user of the thread that makes it.
fn connect(uid: u32, socket: &Path) -> UnixStream {
    let socket = socket.to_owned();
    let thread = std::thread::spawn(move || {
        let root = Uid::ROOT;
        rustix::thread::set_thread_res_uid(root, Uid::from_raw(uid), root).unwrap();
        UnixStream::connect(socket).unwrap()
    });
    let stream = thread.join().unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    stream
}

fn say(uid: u32, socket: &Path, line: &str) -> UnixStream {
    let mut stream = connect(uid, socket);
    stream.write_all(line.as_bytes()).unwrap();
    stream
}

/// What a program is told that says this line.
fn told(uid: u32, socket: &Path, line: &str) -> String {
    let answer = read_line(&mut say(uid, socket, line));
    answer + "\n"
}

fn listen(uid: u32, socket: &Path, port: u32) -> UnixStream {
    let mut stream = say(uid, socket, &format!("LISTEN {port}\n"));
    assert_eq!(read_line(&mut stream), format!("OK {port}"));
    stream
}

/// The next that comes to who listens, and who it is from.
fn take(door: &UnixStream) -> (String, UnixStream) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut line = [0; 64];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(door, &mut [IoSliceMut::new(&mut line)], &mut control, flags).unwrap();
    let fds = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let fd: OwnedFd = fds.expect("a descriptor");
    let line = String::from_utf8(line[..got.bytes].to_vec()).unwrap();
    (line, UnixStream::from(fd))
}

const UNREACHABLE: &str =
    "ERR unreachable no guest of yours has this context identifier and takes connections\n";
const IN_USE: &str = "ERR in-use a program of yours listens at this port already\n";
const RESERVED: &str = "ERR reserved-port use a port from 1024 on that is not the agent's\n";
const BAD_LINE: &str = "ERR bad-line expected CONNECT CID PORT or LISTEN PORT\n";

#[test]
fn programs_reach_their_users_guests_and_no_others() {
    let Some((mut switch, socket)) = served() else {
        return;
    };
    switch.add(3, &ALICE.to_string()).unwrap();
    switch.add(4, "").unwrap();
    let mut guest = Driver::start(&switch.spec(3, ""));

    let mut stream = say(ALICE, &socket, "CONNECT 3 1000\n");
    let (request, _) = guest.receive();
    assert_eq!((request.op, request.src_cid), (op::REQUEST, 2));
    assert_eq!(request.dst_port, 1000);
    let mut response = guest.header(op::RESPONSE, 1000, request.src_port, 0);
    guest.send(&response, &[]);
    assert_eq!(read_line(&mut stream), format!("OK {}", request.src_port));
    stream.write_all(b"to the guest").unwrap();
    assert_eq!(guest.receive().1, b"to the guest");
    (response.op, response.len) = (op::RW, 12);
    guest.send(&response, b"to the host\n");
    assert_eq!(read_line(&mut stream), "to the host");

    // It does not accept.
    let mut refused = say(ALICE, &socket, "CONNECT 3 1001\n");
    let (request, _) = guest.receive();
    let answer = guest.header(op::RST, 1001, request.src_port, 0);
    guest.send(&answer, &[]);
    assert_eq!(read_all(&mut refused), "");

    // Somebody else's guest, nobody's, one that is not there: which it is, nobody is told. Root is a user like others here.
    for (uid, cid) in [(BOB, 3), (0, 3), (ALICE, 4), (ALICE, 5), (ALICE, 1)] {
        let line = format!("CONNECT {cid} 1000\n");
        assert_eq!(told(uid, &socket, &line), UNREACHABLE, "{uid} {cid}");
    }
    assert!(guest.receive_within(Duration::from_millis(200)).is_none());
}

#[test]
fn guests_reach_the_programs_of_their_owner_that_listen() {
    let Some((mut switch, socket)) = served() else {
        return;
    };
    switch.add(3, &ALICE.to_string()).unwrap();
    switch.add(4, &BOB.to_string()).unwrap();
    switch.add(5, "").unwrap();
    let [mut three, mut four, mut five] = [3, 4, 5].map(|cid| Driver::start(&switch.spec(cid, "")));
    assert_eq!(three.ask_host(5000, 7400), op::RST);

    let door = listen(ALICE, &socket, 7400);
    assert_eq!(three.ask_host(5001, 7400), op::RESPONSE);
    let (from, mut stream) = take(&door);
    assert_eq!(from, "3 5001\n");
    stream.write_all(b"to the guest").unwrap();
    assert_eq!(three.receive().1, b"to the guest");
    let data = three.header(op::RW, 5001, 7400, 12);
    three.send(&data, b"to the host\n");
    assert_eq!(read_line(&mut stream), "to the host");
    // Guests of nobody's and of others do not.
    assert_eq!(four.ask_host(5001, 7400), op::RST);
    assert_eq!(five.ask_host(5001, 7400), op::RST);

    // A port is one program's, and another user's all the same.
    assert_eq!(told(ALICE, &socket, "LISTEN 7400\n"), IN_USE);
    let other = listen(BOB, &socket, 7400);
    assert_eq!(four.ask_host(5002, 7400), op::RESPONSE);
    assert_eq!(take(&other).0, "4 5002\n");

    // Programs of a user reach each other too.
    let mut own = say(ALICE, &socket, "CONNECT 2 7400\n");
    assert_eq!(read_line(&mut own), "OK 7400");
    let (from, mut stream) = take(&door);
    assert_eq!(from, "2 7400\n");
    own.write_all(b"hello\n").unwrap();
    assert_eq!(read_line(&mut stream), "hello");
    assert_eq!(told(ALICE, &socket, "CONNECT 2 7401\n"), UNREACHABLE);

    // Its end frees the port, as a kill does.
    drop(door);
    let mut from = 6000;
    eventually("nobody listens", || {
        from += 1;
        three.ask_host(from, 7400) == op::RST
    });
    assert_eq!(four.ask_host(5003, 7400), op::RESPONSE);
    drop(listen(ALICE, &socket, 7400));
    drop(other);
}

#[test]
fn what_is_made_for_a_domain_comes_before_programs() {
    let Some((mut switch, socket)) = served() else {
        return;
    };
    switch.add(3, &ALICE.to_string()).unwrap();
    let mut guest = Driver::start(&switch.spec(3, ""));
    let door = listen(ALICE, &socket, 7400);
    let path = format!("{}_7400", switch.uds(3).display());
    let agent = UnixListener::bind(&path).unwrap();
    assert_eq!(guest.ask_host(5000, 7400), op::RESPONSE);
    agent.accept().unwrap();
    door.set_nonblocking(true).unwrap();
    (&door).read(&mut [0; 8]).unwrap_err();
    // The agent's own port is nobody's even while nobody is there.
    for port in [0, 1023, 22594, u32::MAX] {
        assert_eq!(told(ALICE, &socket, &format!("LISTEN {port}\n")), RESERVED);
    }
    assert_eq!(guest.ask_host(5001, 22594), op::RST);
}

#[test]
fn who_takes_nothing_holds_no_guest_up() {
    let Some((mut switch, socket)) = served() else {
        return;
    };
    switch.add(3, &ALICE.to_string()).unwrap();
    let mut guest = Driver::start(&switch.spec(3, ""));
    let stalled = listen(ALICE, &socket, 7400);
    let other = listen(ALICE, &socket, 7401);
    let mut accepted = 0;
    while guest.ask_host(6000 + accepted, 7400) == op::RESPONSE {
        accepted += 1;
        assert!(
            accepted < 300,
            "nothing bounds what a program does not take"
        );
    }
    println!("{accepted} connections wait for a program that takes none");
    assert!(accepted >= 4);
    // Others are served, and it too when it goes on: what waits comes first.
    assert_eq!(guest.ask_host(5000, 7401), op::RESPONSE);
    assert_eq!(take(&other).0, "3 5000\n");
    let streams: Vec<_> = (0..accepted)
        .map(|n| {
            let (from, stream) = take(&stalled);
            assert_eq!(from, format!("3 {}\n", 6000 + n));
            stream
        })
        .collect();
    assert_eq!(guest.ask_host(5001, 7400), op::RESPONSE);
    assert_eq!(take(&stalled).0, "3 5001\n");
    drop(streams);
    // One that is gone with connections that it has not taken: the guest hears of it.
    assert_eq!(guest.ask_host(5002, 7400), op::RESPONSE);
    drop(stalled);
    eventually("the guest is told that nobody is there", || {
        let told = guest.receive_within(Duration::from_millis(100));
        told.is_some_and(|(header, _)| header.op == op::SHUTDOWN && header.dst_port == 5002)
    });
}

#[test]
fn nonsense_and_too_much_are_refused() {
    let Some((_switch, socket)) = served() else {
        return;
    };
    for line in [
        "\n",
        "CONNECT 3\n",
        "CONNECT 3 4 5\n",
        "CONNECT a b\n",
        "CONNECT -3 1\n",
        "CONNECT 4294967296 1\n",
        "LISTEN\n",
        "LISTEN x\n",
        "listen 7400\n",
        "\u{1b}[2J\n",
        "CONNECT 3 00000000000000000000000000000000000000000000000000001\n",
    ] {
        assert_eq!(told(ALICE, &socket, line), BAD_LINE, "{line:?}");
    }
    assert_eq!(told(1 << 31, &socket, ""), NOT_A_USER);
    assert_eq!(told(65534, &socket, ""), NOT_A_USER);
    // Who listens has nothing more to say.
    let mut door = listen(ALICE, &socket, 7400);
    door.write_all(b"more").unwrap();
    assert_eq!(door.read(&mut [0; 8]).unwrap_or(0), 0);
    drop(door);

    let mut open: Vec<_> = (0..PROGRAMS_PER_USER_MAX - 1)
        .map(|_| connect(ALICE, &socket))
        .collect();
    open.push(listen(ALICE, &socket, 7400));
    let limit = "ERR limit too many connections wait or listen: close some and try again\n";
    assert_eq!(told(ALICE, &socket, ""), limit);
    drop(listen(BOB, &socket, 7400));
    // Those that say nothing are not kept.
    for mut silent in open.drain(..PROGRAMS_PER_USER_MAX - 1) {
        assert_eq!(read_all(&mut silent), BAD_LINE);
    }
    assert_eq!(told(ALICE, &socket, "LISTEN 7400\n"), IN_USE);
}

const NOT_A_USER: &str = "ERR not-a-user your user id has no guests here\n";

#[test]
fn the_operator_gives_and_takes_the_socket() {
    let own = rustix::process::geteuid().as_raw();
    let mut switch = Switch::start();
    let stream = UnixStream::connect(switch.control()).unwrap();
    let spec = "\"users_end\":9,\"unknown_user\":8,\"reserved_ports\":[]";
    writeln!(&stream, "{{\"op\":\"serve-programs\",{spec}}}").unwrap();
    let answer = read_line(&mut { stream });
    assert!(answer.contains("\"code\":\"no-socket\""), "{answer}");

    let line = |socket: &Path| {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.write_all(b"LISTEN 7400\n").unwrap();
        assert_eq!(read_line(&mut stream), "OK 7400");
        stream
    };
    switch.add(3, &own.to_string()).unwrap();
    let mut guest = Driver::start(&switch.spec(3, ""));
    let socket = switch.serve_programs();
    let mut before = line(&socket);
    assert_eq!(guest.ask_host(5000, 7400), op::RESPONSE);
    let (_, mut stream) = take(&before);
    // Another socket: who listened at the one before is told, what a guest has goes on.
    let socket = switch.serve_programs();
    assert_eq!(before.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(guest.ask_host(5001, 7400), op::RST);
    let mut after = line(&socket);
    assert_eq!(guest.ask_host(5002, 7400), op::RESPONSE);
    stream.write_all(b"still").unwrap();
    assert_eq!(guest.receive().1, b"still");
    // None.
    switch.end_programs();
    assert_eq!(read_all(&mut after.try_clone().unwrap()).len(), 7);
    assert_eq!(after.read(&mut [0; 8]).unwrap(), 0);
    eventually("nobody serves the socket", || {
        UnixStream::connect(&socket).is_err()
    });
    assert_eq!(guest.ask_host(5003, 7400), op::RST);
}
