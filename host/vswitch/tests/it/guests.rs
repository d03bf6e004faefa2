//! Real guests talk through the switch. Needs the kernel of `make images`; skipped with a printed
//! reason otherwise.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::vm::{Boot, Guest, Pattern, Switch, eventually, read_all, read_line};

const MIB: u64 = 1 << 20;

/// A connection the guest opens to the host, running `command` on it, and the guest's report.
fn from_guest(guest: &Guest, port: u32, command: &str) -> (UnixStream, UnixStream) {
    let listener = guest.listen(port);
    let mut report = guest.command(&format!("dial 2 {port} {command}"));
    let (stream, _) = listener.accept().unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let answer = read_line(&mut report);
    assert!(answer.starts_with("connected "), "{answer}");
    (stream, report)
}

fn echoes(stream: &mut UnixStream) {
    stream.write_all(b"hello").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(stream), "hello");
}

#[test]
fn host_and_guest_talk_both_ways() {
    let mut switch = Switch::start();
    let Some(boot) = Boot::new(switch.dir.path()) else {
        return;
    };
    let guest = switch.boot(&boot, 3, "alice");

    echoes(&mut guest.command("echo"));
    let (mut stream, mut report) = from_guest(&guest, 5000, "echo");
    echoes(&mut stream);
    assert_eq!(read_all(&mut report), "done\n");

    // Half-close: the guest's answer comes after the end of what it was sent.
    let stream = guest.command("half");
    Pattern(1).send(&stream, 100_000);
    assert_eq!(read_all(&mut { stream }), "100000\n");

    // The guest stops reading: the host's writes fail, its reads go on.
    let mut stream = guest.command("shutread");
    eventually("writing to a guest that does not read fails", || {
        stream.write_all(&[0; 4096]).is_err()
    });
    assert_eq!(
        stream.write_all(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    assert_eq!(read_line(&mut stream), "shut");

    // Nothing listens: RST, at once.
    let start = Instant::now();
    assert!(guest.connect(999).is_none());
    println!(
        "host to a guest port where nothing listens: {:?}",
        start.elapsed()
    );
    // A guest that does not answer at all is given 5 s.
    assert!(start.elapsed() < Duration::from_secs(4));
    let report = read_all(&mut guest.command("dial 2 5999 echo"));
    println!("guest to a host port where nothing listens: {report}");
    let words: Vec<&str> = report.split_whitespace().collect();
    assert_eq!(words[..2], ["errno", "104"], "expected ECONNRESET");
    // No such guest.
    let report = read_all(&mut guest.command("dial 77 1000 echo"));
    assert!(report.starts_with("errno 104 "), "{report}");

    // A hundred connections at a time.
    let mut streams: Vec<_> = (0..100).map(|_| guest.command("echo")).collect();
    for (i, stream) in streams.iter_mut().enumerate() {
        write!(stream, "number {i}").unwrap();
    }
    for (i, mut stream) in streams.into_iter().enumerate() {
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_all(&mut stream), format!("number {i}"));
    }
    eventually("no connection is left", || {
        switch.list()[0].connections == 0
    });
}

#[test]
fn streams_are_exact_both_ways() {
    let mut switch = Switch::start();
    let Some(boot) = Boot::new(switch.dir.path()) else {
        return;
    };
    let guest = switch.boot(&boot, 3, "alice");
    for (len, chunk) in [(MIB, 64 << 10), (64 * MIB, MIB), (3 * MIB + 1, 4097)] {
        println!("{len} bytes");
        let start = Instant::now();
        let stream = guest.command(&format!("source {len} 7 {chunk}"));
        Pattern(7).expect(&stream, len);
        println!("  guest to host: {:?}", start.elapsed());

        let start = Instant::now();
        let stream = guest.command(&format!("sink {len} 8"));
        Pattern(8).send(&stream, len);
        assert_eq!(read_all(&mut { stream }), "ok\n");
        println!("  host to guest: {:?}", start.elapsed());
    }
    // On connections the guest opened.
    let (stream, _report) = from_guest(&guest, 5001, &format!("source {MIB} 9 65536"));
    Pattern(9).expect(&stream, MIB);
    let (stream, _report) = from_guest(&guest, 5002, &format!("sink {MIB} 10"));
    Pattern(10).send(&stream, MIB);
    assert_eq!(read_all(&mut { stream }), "ok\n");

    // Both directions of one connection at a time.
    let stream = guest.command("echo");
    thread::scope(|scope| {
        scope.spawn(|| Pattern(11).send(&stream, 8 * MIB));
        Pattern(11).expect(&stream, 8 * MIB);
    });

    // The reader is late: the writer waits, nothing is lost, and the end comes after the last byte.
    let stream = guest.command(&format!("source {MIB} 12 65536"));
    thread::sleep(Duration::from_secs(2));
    Pattern(12).expect(&stream, MIB);
    let stream = guest.command("deaf 2000");
    Pattern(13).send(&stream, 2 * MIB);
    assert_eq!(read_all(&mut { stream }), format!("{}\n", 2 * MIB));

    // Figures: no pattern in the way.
    let start = Instant::now();
    let mut stream = guest.command(&format!("zeros {}", 64 * MIB));
    let mut buffer = vec![0; 1 << 20];
    while stream.read(&mut buffer).unwrap() > 0 {}
    let rate = 64.0 / start.elapsed().as_secs_f64();
    println!("guest to host: {rate:.0} MiB/s");
    let stream = guest.command("half");
    let start = Instant::now();
    for _ in 0..64 {
        (&stream).write_all(&buffer).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&mut { stream }), format!("{}\n", 64 * MIB));
    let rate = 64.0 / start.elapsed().as_secs_f64();
    println!("host to guest: {rate:.0} MiB/s");
    let mut stream = guest.command("echo");
    let mut trips: Vec<_> = (0..1000)
        .map(|_| {
            let start = Instant::now();
            stream.write_all(b"x").unwrap();
            stream.read_exact(&mut buffer[..1]).unwrap();
            start.elapsed()
        })
        .collect();
    trips.sort();
    println!("round trip: median {:?}, 99% {:?}", trips[500], trips[990]);
}

#[test]
fn a_killed_guest_leaves_its_cid_to_the_next() {
    let mut switch = Switch::start();
    let Some(boot) = Boot::new(switch.dir.path()) else {
        return;
    };
    for round in 0..2 {
        // Added at once after the kill, as a manager that has reaped QEMU does.
        let mut guest = switch.boot(&boot, 3, "alice");
        assert!(switch.list()[0].connected);
        let mut stream = guest.command("echo");
        stream.write_all(b"alive").unwrap();
        stream.read_exact(&mut [0; 5]).unwrap();
        guest.kill();
        assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0, "round {round}");
    }
    eventually("the domain leaves", || switch.list().is_empty());
    assert!(!switch.uds(3).exists());

    // A guest's last words reach a reader that comes to them after QEMU has ended.
    let mut guest = switch.boot(&boot, 3, "alice");
    let stream = guest.command("poweroff 200000 5");
    guest.qemu.wait().unwrap();
    eventually("the domain leaves", || switch.list().is_empty());
    Pattern(5).expect(&stream, 200_000);

    // Removed by the manager.
    let guest = switch.boot(&boot, 3, "alice");
    let mut stream = guest.command("echo");
    // What nobody has read when a socket closes makes the end a reset.
    stream.write_all(b"alive").unwrap();
    stream.read_exact(&mut [0; 5]).unwrap();
    switch.remove(3).unwrap();
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(switch.remove(3).unwrap_err().code(), "unknown-cid");
}

#[test]
fn a_paused_guest_keeps_its_connections_and_a_reset_one_does_not() {
    let mut switch = Switch::start();
    let Some(boot) = Boot::new(switch.dir.path()) else {
        return;
    };
    let guest = switch.boot(&boot, 3, "alice");
    let mut stream = guest.command("echo");
    let mut buffer = [0; 5];
    stream.write_all(b"one--").unwrap();
    stream.read_exact(&mut buffer).unwrap();

    guest.qmp("stop");
    stream.write_all(b"two--").unwrap();
    guest.qmp("cont");
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"two--");

    guest.qmp("system_reset");
    assert_eq!(stream.read(&mut buffer).unwrap(), 0);
    guest.wait_ready();
    echoes(&mut guest.command("echo"));
}

#[test]
fn guests_of_one_owner_talk_and_others_do_not() {
    let mut switch = Switch::start();
    let Some(boot) = Boot::new(switch.dir.path()) else {
        return;
    };
    let three = switch.boot(&boot, 3, "alice");
    let four = switch.boot(&boot, 4, "alice");

    // Both at once with the host.
    thread::scope(|scope| {
        for guest in [&three, &four] {
            scope.spawn(move || {
                let stream = guest.command(&format!("source {} 7 65536", 8 * MIB));
                Pattern(7).expect(&stream, 8 * MIB);
            });
        }
    });

    // With each other, both ways.
    for (from, to) in [(&three, 4), (&four, 3)] {
        let mut report = from.command(&format!("dial {to} 1000 copy {MIB} 21 65536 sink {MIB} 21"));
        assert!(read_line(&mut report).starts_with("connected "));
        assert_eq!(read_all(&mut report), "ok\n");
        let copy = format!(
            "dial {to} 1000 copy {} 23 {MIB} sink {} 23",
            8 * MIB,
            8 * MIB
        );
        let mut report = from.command(&copy);
        assert!(read_line(&mut report).starts_with("connected "));
        assert_eq!(read_all(&mut report), "ok\n");
        let mut report = from.command(&format!("dial {to} 1000 copy 5000 22 4096 half"));
        assert!(read_line(&mut report).starts_with("connected "));
        assert_eq!(read_all(&mut report), "5000\n");
        let report = read_all(&mut from.command(&format!("dial {to} 999 echo")));
        assert!(report.starts_with("errno 104 "), "{report}");
    }

    // The other end vanishes.
    let mut report = three.command("dial 4 1000 copy 0 1 1 echo");
    assert!(read_line(&mut report).starts_with("connected "));
    drop(four);
    eventually("the domain leaves", || switch.list().len() == 1);

    // Another owner, and no owner.
    let _four = switch.boot(&boot, 4, "bob");
    let report = read_all(&mut three.command("dial 4 1000 echo"));
    assert!(report.starts_with("errno 104 "), "{report}");
    echoes(&mut three.command("echo"));
}

/// Says that it is over, also when the test fails.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn domains_come_and_go_while_others_talk() {
    let mut switch = Switch::start();
    let Some(boot) = Boot::new(switch.dir.path()) else {
        return;
    };
    let three = switch.boot(&boot, 3, "alice");
    let four = switch.boot(&boot, 4, "alice");
    let len = 8 * MIB;
    let enough = AtomicBool::new(false);
    thread::scope(|scope| {
        // Others talk until all have come and gone.
        let talking = scope.spawn(|| {
            let mut streams = 0;
            while !enough.load(Ordering::Relaxed) {
                let copy = format!("dial 4 1000 copy {len} 31 {MIB} sink {len} 31");
                let mut between = three.command(&copy);
                assert!(read_line(&mut between).starts_with("connected "));
                Pattern(32).expect(&four.command(&format!("source {len} 32 {MIB}")), len);
                assert_eq!(read_all(&mut between), "ok\n");
                streams += 2;
            }
            streams
        });
        let comings_and_goings = Ending(&enough);
        for round in 0..3 {
            // One that nobody connects to.
            for _ in 0..10 {
                switch.add(5, "alice").unwrap();
                switch.remove(5).unwrap();
            }
            // One whose QEMU is killed, one that is removed, and of other owners.
            let mut guest = switch.boot(&boot, 6 + round, &format!("owner {round}"));
            echoes(&mut guest.command("echo"));
            match round {
                1 => switch.remove(7).unwrap(),
                _ => guest.kill(),
            }
        }
        drop(comings_and_goings);
        let streams = talking.join().unwrap();
        println!("{streams} streams of {len} bytes beside 30 domains and 3 guests");
        assert!(streams > 0, "nobody talked");
    });
}

#[test]
#[ignore = "takes minutes: make soak"]
fn a_gibibyte_in_every_direction_is_exact() {
    let mut switch = Switch::start();
    let Some(boot) = Boot::new(switch.dir.path()) else {
        return;
    };
    let three = switch.boot(&boot, 3, "alice");
    let _four = switch.boot(&boot, 4, "alice");
    let len = 1024 * MIB;
    for chunk in [64 << 10, MIB] {
        let told = |direction: &str, start: Instant| {
            println!(
                "1 GiB {direction} in writes of {chunk}: {:?}",
                start.elapsed()
            );
        };
        let start = Instant::now();
        Pattern(41).expect(&three.command(&format!("source {len} 41 {chunk}")), len);
        told("guest to host", start);
        let start = Instant::now();
        let stream = three.command(&format!("sink {len} 42"));
        Pattern(42).send_in(&stream, len, chunk as usize);
        assert_eq!(read_all(&mut { stream }), "ok\n");
        told("host to guest", start);
        let start = Instant::now();
        let copy = format!("dial 4 1000 copy {len} 43 {chunk} sink {len} 43");
        let mut report = three.command(&copy);
        report
            .set_read_timeout(Some(Duration::from_secs(1800)))
            .unwrap();
        assert!(read_line(&mut report).starts_with("connected "));
        assert_eq!(read_all(&mut report), "ok\n");
        told("guest to guest", start);
    }
}
