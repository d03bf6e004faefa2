//! The rings, by drivers that are right in unusual ways and drivers that are wrong.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use vm_memory::{Bytes, GuestAddress};
use xbee_vswitch::packet::{HEADER_LEN, SHUTDOWN_SEND, op};

use crate::driver::{Driver, INDIRECT, MEMORY, Part, RINGS, SIZE, memory_file};
use crate::vm::{Switch, eventually};

/// Cuts `len` bytes from `at` into parts of the given sizes, the rest into a last one.
fn cut(at: u64, len: u32, sizes: &[u32]) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut done = 0;
    for &size in sizes {
        let n = size.min(len - done);
        parts.push((at + u64::from(done), n, 0));
        done += n;
    }
    parts.push((at + u64::from(done), len - done, 0));
    parts
}

#[test]
fn chains_of_any_shape_carry_packets() {
    let mut switch = Switch::start();
    switch.add(3, "a").unwrap();
    let mut driver = Driver::start(&switch.spec(3, "a"));
    let uds = switch.uds(3);
    let driver = RefCell::new(&mut driver);
    let shapes = (
        proptest::collection::vec(0u32..200, 0..6),
        0usize..6000,
        any::<bool>(),
        prop_oneof![
            Just(vec![44u32, 4096]),
            Just(vec![4096]),
            Just(vec![45]),
            Just(vec![1, 43, 10, 3000]),
            Just(vec![0, 20, 0, 30, 7]),
        ],
        1024u32..60_000,
    );
    TestRunner::new(Config::with_cases(60))
        .run(&shapes, |(sizes, len, indirect, rx_shape, port)| {
            let driver = &mut **driver.borrow_mut();
            driver.rx_shape = rx_shape;
            let (mut stream, host_port) = driver.accept_from_host(&uds, port);
            // Guest to host.
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
            let at = driver.lay_out(&driver.header(op::RW, port, host_port, len), &bytes);
            let mut parts = cut(at, (HEADER_LEN + len) as u32, &sizes);
            if indirect {
                let table = 0x80_000;
                for (i, part) in parts.iter().enumerate() {
                    let next = (i + 1 < parts.len()).then_some(i as u16 + 1);
                    driver.write_descriptor(table + 16 * i as u64, *part, next);
                }
                parts = vec![(table, 16 * parts.len() as u32, INDIRECT)];
            }
            driver.post(1, &parts);
            driver.kick(1);
            driver.wait_sent();
            let mut read = vec![0; len];
            stream.read_exact(&mut read).unwrap();
            prop_assert_eq!(&read, &bytes);
            // Host to guest.
            stream.write_all(&bytes).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut read = Vec::new();
            loop {
                let (header, payload) = driver.receive();
                if header.op == op::SHUTDOWN {
                    prop_assert_eq!(header.flags, SHUTDOWN_SEND);
                    break;
                }
                read.extend(payload);
            }
            prop_assert_eq!(&read, &bytes);
            let rst = driver.header(op::RST, port, host_port, 0);
            driver.send(&rst, &[]);
            prop_assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
            Ok(())
        })
        .unwrap();
}

#[test]
fn rst_comes_at_once_where_nothing_listens() {
    let mut switch = Switch::start();
    switch.add(3, "a").unwrap();
    let mut driver = Driver::start(&switch.spec(3, "a"));
    let host = driver.header(op::REQUEST, 5000, 999, 0);
    let mut other = host;
    other.dst_cid = 4;
    let mut nobody = host;
    nobody.dst_cid = u64::MAX;
    let unknown = driver.header(op::RW, 5000, 999, 4);
    let mut datagram = host;
    datagram.kind = 3;
    let mut slowest = Duration::ZERO;
    for header in [host, other, nobody, unknown, datagram].repeat(20) {
        let start = Instant::now();
        driver.send(&header, &b"data"[..header.len as usize]);
        let (rst, _) = driver.receive();
        slowest = slowest.max(start.elapsed());
        assert_eq!(
            (rst.op, rst.src_cid, rst.dst_cid),
            (op::RST, header.dst_cid, 3)
        );
        assert_eq!(
            (rst.src_port, rst.dst_port, rst.kind),
            (999, 5000, header.kind)
        );
    }
    println!("slowest RST of 100: {slowest:?}");
    assert!(slowest < Duration::from_secs(1));

    // Never an answer to a RST, nor to a packet in another guest's name.
    driver.send(&driver.header(op::RST, 5000, 999, 0), &[]);
    let mut spoofed = host;
    spoofed.src_cid = 4;
    driver.send(&spoofed, &[]);
    assert!(driver.receive_within(Duration::from_millis(100)).is_none());
}

#[test]
fn a_guest_that_takes_no_answers_is_not_answered_without_bound() {
    let mut switch = Switch::start();
    switch.add(3, "a").unwrap();
    let mut driver = Driver::start(&switch.spec(3, "a"));
    let header = driver.header(op::REQUEST, 5000, 999, 0);
    let at = driver.lay_out(&header, &[]);
    for _ in 0..SIZE {
        driver.post(1, &[(at, HEADER_LEN as u32, 0)]);
    }
    driver.kick(1);
    eventually("64 answers wait", || driver.unsent() <= SIZE - 64);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(driver.unsent(), SIZE - 64);
    for _ in 0..SIZE {
        assert_eq!(driver.receive().0.op, op::RST);
    }
    assert_eq!(driver.unsent(), 0);
}

#[test]
fn connections_and_bytes_of_a_guest_are_bounded() {
    let mut switch = Switch::start();
    switch.add(3, "a").unwrap();
    let mut driver = Driver::start(&switch.spec(3, "a"));
    let listener = UnixListener::bind(format!("{}_7", switch.uds(3).display())).unwrap();
    let mut streams = Vec::new();
    for port in 0..512 {
        driver.send(&driver.header(op::REQUEST, port, 7, 0), &[]);
        streams.push(listener.accept().unwrap());
        assert_eq!(driver.receive().0.op, op::RESPONSE);
    }
    driver.send(&driver.header(op::REQUEST, 1000, 7, 0), &[]);
    assert_eq!(driver.receive().0.op, op::RST);
    assert_eq!(switch.list()[0].connections, 512);

    // More than its credit, unread by the host: that one connection ends.
    let rst = (0..40)
        .find_map(|_| {
            driver.send(&driver.header(op::RW, 8, 7, 60_000), &[0; 60_000]);
            driver
                .receive_within(Duration::from_millis(20))
                .filter(|(header, _)| header.op == op::RST)
        })
        .expect("a guest that ignores its credit is not stopped");
    assert_eq!(rst.0.dst_port, 8);
}

/// Writes one round of garbage into a driver's rings.
fn vandalise(driver: &mut Driver, rng: &mut TestRng) {
    match rng.random_range(0..4) {
        // Everything, the indices included.
        0 => {
            let mut noise = vec![0; 0x8000];
            rng.fill_bytes(&mut noise);
            driver
                .memory
                .write_slice(&noise, GuestAddress(RINGS))
                .unwrap();
        }
        // Believable descriptors with wrong contents, and loops.
        1 | 2 => {
            for queue in 0..2 {
                for i in 0..u64::from(SIZE) {
                    let addr = match rng.random_range(0..4) {
                        0 => rng.random(),
                        1 => MEMORY - rng.random_range(0..100),
                        _ => rng.random_range(0..MEMORY),
                    };
                    let len = match rng.random_range(0..4) {
                        0 => rng.random(),
                        _ => rng.random_range(0..5000),
                    };
                    let flags = rng.random_range(0..8u16);
                    let next = rng.random_range(0..2 * SIZE);
                    driver.write_descriptor(
                        RINGS + queue * 0x4000 + 16 * i,
                        (addr, len, flags),
                        rng.random::<bool>().then_some(next),
                    );
                }
                for _ in 0..rng.random_range(1..32) {
                    let head = rng.random_range(0..SIZE + 4);
                    driver.publish(queue as usize, head);
                }
            }
        }
        // Right chains with packets at random.
        _ => {
            for _ in 0..16 {
                let len = rng.random_range(0..3000usize);
                let mut header = driver.header(rng.random_range(0..9), 1, 2, len);
                header.flags = rng.random();
                header.buf_alloc = rng.random();
                header.fwd_cnt = rng.random();
                header.dst_cid = rng.random_range(0..5);
                header.src_port = rng.random_range(1000..1003);
                header.dst_port = rng.random_range(1000..1003);
                if rng.random::<bool>() {
                    header.len = rng.random();
                }
                let at = driver.lay_out(&header, &vec![0; len]);
                driver.post(1, &[(at, (HEADER_LEN + len) as u32, 0)]);
            }
        }
    }
    driver.kick(0);
    driver.kick(1);
}

#[test]
fn garbage_hurts_only_its_own_device() {
    let mut switch = Switch::start();
    switch.add(3, "a").unwrap();
    switch.add(4, "a").unwrap();
    let pid = switch.pid();
    let mut good = Driver::start(&switch.spec(3, "a"));
    let (mut stream, host_port) = good.accept_from_host(&switch.uds(3), 1000);
    let mut bad = Driver::start(&switch.spec(4, "a"));

    let mut rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let start = Instant::now();
    let mut rounds = 0;
    while start.elapsed() < Duration::from_secs(5) {
        rounds += 1;
        vandalise(&mut bad, &mut rng);
        if rounds % 8 == 0 {
            // A stopped device comes back with a new driver.
            bad.take_down();
            bad.bring_up();
        }
        // The other guest does not notice.
        let data = good.header(op::RW, 1000, host_port, 5);
        good.send(&data, b"hello");
        let mut buffer = [0; 5];
        stream.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"hello");
    }
    println!("{rounds} rounds of garbage");
    bad.take_down();
    bad.bring_up();
    bad.rx_shape = vec![4096];
    let (mut stream, port) = bad.accept_from_host(&switch.uds(4), 1000);
    bad.send(&bad.header(op::RW, 1000, port, 4), b"back");
    let mut buffer = [0; 4];
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"back");
    assert_eq!(switch.pid(), pid);
    assert_eq!(switch.list().len(), 2);
}

#[test]
fn memory_that_could_be_taken_away_is_refused() {
    let mut switch = Switch::start();
    switch.add(3, "a").unwrap();
    assert!(Driver::connect(&switch.spec(3, "a"), memory_file(false)).is_err());
    eventually("the domain leaves", || switch.list().is_empty());
    let log = switch.log();
    assert!(
        log.contains("guest memory is not sealed against shrinking"),
        "{log}"
    );
}

#[test]
fn half_a_message_does_not_keep_a_domain() {
    let mut switch = Switch::start();
    switch.add(3, "a").unwrap();
    let mut stream = UnixStream::connect(switch.spec(3, "a").vhost_socket).unwrap();
    stream.write_all(&[1, 0, 0, 0, 1]).unwrap();
    eventually("the front-end is connected", || switch.list()[0].connected);
    switch.remove(3).unwrap();
    assert!(switch.list().is_empty());
}
