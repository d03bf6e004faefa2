//! Clients that mean harm, or are broken: each gets an error and no more than its limit, and others go on.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::time::Duration;

use common::{Broker, Client};
use xbee_mq::frame::{Command, Version};

/// Another client is served.
fn serves(broker: &Broker) {
    let mut client = broker.client();
    client.subscribe("s", "/queue/others", "auto");
    client.publish("/queue/others", "hello");
    client.expect_message("hello");
}

#[test]
fn what_is_not_stomp_is_told_so_and_closed() {
    let broker = Broker::start();
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..],
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"CONNECT\nno colon\n",
        b"CONNECT\naccept-version:1.2\nhost:x\0",
        b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        b"CONNECTCONNECTCONNECTCONNECT",
    ] {
        let mut client = broker.dial();
        client.send(bytes);
        client.expect(Command::Error);
        assert_eq!(client.read(), None);
    }
    serves(&broker);
}

#[test]
fn one_who_says_nothing_or_too_little_is_not_kept() {
    let broker = Broker::limited(|limits| {
        limits.connect_timeout_s = 1;
        limits.frame_timeout_s = 1;
    });
    let mut silent = broker.dial();
    let mut slow = broker.dial();
    slow.send("CONN");
    let mut later = broker.client();
    later.send("SEND\ndestination:/queue/a\ncontent-length:100\n\nabc");
    silent.expect_error("timeout");
    slow.expect_error("timeout");
    later.expect_error("timeout");
    serves(&broker);
}

#[test]
fn frames_beyond_the_limits_are_refused_before_they_have_come() {
    let broker = Broker::limited(|limits| {
        limits.body_bytes = 1000;
        limits.frame_headers = 10;
        limits.header_line_bytes = 100;
    });
    let many = "a:b\n".repeat(11);
    let long = "a".repeat(200);
    for frame in [
        "SEND\ndestination:/queue/a\ncontent-length:1001\n\n".to_owned(),
        format!("SEND\ndestination:/queue/a\n\n{}", "x".repeat(1001)),
        format!("SEND\n{many}"),
        format!("SEND\n{long}"),
    ] {
        let mut client = broker.client();
        client.send(frame);
        client.expect_error("frame-too-large");
    }
    // The error comes though the client goes on to write.
    let mut client = broker.client();
    client.send("SEND\ndestination:/queue/a\ncontent-length:99999999\n\n");
    for _ in 0..50 {
        client.send([b'x'; 10_000]);
    }
    client.expect_error("frame-too-large");
    serves(&broker);
}

#[test]
fn limits_of_a_connection_are_errors() {
    let broker = Broker::limited(|limits| {
        limits.subscriptions = 2;
        limits.transactions = 2;
        limits.transaction_frames = 2;
        limits.transaction_bytes = 2000;
        limits.queues = 5;
        limits.queue_messages = 3;
        limits.queue_bytes = 5000;
        limits.destination_bytes = 20;
    });
    let send = "SEND\ndestination:/queue/a\ntransaction:1\n\n\0";
    let big = format!("SEND\ndestination:/queue/b\n\n{}\0", "x".repeat(3000));
    let subscribe = |n| format!("SUBSCRIBE\nid:{n}\ndestination:/topic/{n}\n\n\0");
    for frames in [
        (0..3).map(subscribe).collect::<String>(),
        (0..3)
            .map(|n| format!("BEGIN\ntransaction:{n}\n\n\0"))
            .collect(),
        format!("BEGIN\ntransaction:1\n\n\0{send}{send}{send}"),
        format!(
            "BEGIN\ntransaction:1\n\n\0SEND\ndestination:/queue/a\ntransaction:1\n\n{}\0",
            "x".repeat(2000)
        ),
        "SEND\ndestination:/queue/a\n\n\0".repeat(4),
        format!("{big}{big}"),
        (0..6)
            .map(|n| format!("SEND\ndestination:/queue/n{n}\n\n\0"))
            .collect(),
    ] {
        let mut client = broker.client();
        client.send(&frames);
        client.expect_error("limit");
        // What was accepted is taken out again.
        for queue in ["a", "b", "n0", "n1", "n2", "n3", "n4"] {
            let mut client = broker.client();
            client.send(format!("SUBSCRIBE\nid:1\ndestination:/queue/{queue}\n\n\0"));
            client.send("UNSUBSCRIBE\nid:1\n\n\0DISCONNECT\nreceipt:end\n\n\0");
            while client.read().is_some() {}
        }
    }
    let mut client = broker.client();
    client.send("SEND\ndestination:/queue/aaaaaaaaaaaaaaaaaaaaaaaaa\n\n\0");
    client.expect_error("bad-destination");
    serves(&broker);
}

#[test]
fn a_transaction_that_does_not_fit_does_nothing() {
    let broker = Broker::limited(|limits| limits.queue_messages = 2);
    let mut client = broker.client();
    client.send("BEGIN\ntransaction:1\n\n\0");
    for _ in 0..3 {
        client.send("SEND\ndestination:/queue/a\ntransaction:1\n\nx\0");
    }
    client.send("COMMIT\ntransaction:1\nreceipt:c\n\n\0");
    let error = client.expect_error("limit");
    assert_eq!(error.headers.get("receipt-id"), Some("c"));
    let mut client = broker.client();
    client.subscribe("s", "/queue/a", "auto");
    client.expect_nothing();
}

#[test]
fn there_are_only_so_many_connections() {
    let broker = Broker::limited(|limits| limits.connections = 3);
    let all: Vec<Client> = (0..3).map(|_| broker.client()).collect();
    let mut one_more = broker.dial();
    one_more.expect_error("limit");
    drop(one_more);
    drop(all);
    // The others' end takes a moment to be seen.
    for _ in 0..100 {
        let mut client = broker.dial();
        client.send("CONNECT\naccept-version:1.2\nhost:x\n\n\0");
        if client
            .read()
            .is_some_and(|frame| frame.command == Command::Connected)
        {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("places are not given back");
}

#[test]
fn a_slow_subscriber_of_a_topic_is_ended_and_one_of_a_queue_waits() {
    let broker = Broker::limited(|limits| {
        limits.topic_messages = 100;
        limits.write_timeout_s = 2;
    });
    let body = "x".repeat(100_000);
    let mut slow = broker.client();
    slow.subscribe("t", "/topic/t", "auto");
    let mut sender = broker.client();
    for _ in 0..300 {
        sender.publish("/topic/t", &body);
    }
    let mut count = 0;
    let code = loop {
        let frame = slow.read().expect("an error before the end");
        match frame.command {
            Command::Message => count += 1,
            _ => break frame.headers.get("code").map(str::to_owned),
        }
    };
    assert_eq!(code.as_deref(), Some("slow-consumer"));
    assert!(count < 300);
    // A queue's messages stay there, and the memory for one who does not read has a bound.
    let mut slow = broker.client();
    slow.subscribe("q", "/queue/q", "auto");
    for _ in 0..300 {
        sender.publish("/queue/q", &body);
    }
    let mut quick = broker.client();
    quick.subscribe("q", "/queue/q", "auto");
    quick.expect_message(&body);
}

#[test]
fn a_flood_hurts_nobody_else() {
    let broker = Broker::limited(|limits| limits.write_timeout_s = 1);
    let address = broker.address;
    let floods: Vec<_> = (0..4)
        .map(|n| {
            std::thread::spawn(move || {
                let mut client = Client::dial(address);
                client.connect(Version::V1_2);
                // Asks for receipts and reads none.
                let frame = "BEGIN\ntransaction:t\nreceipt:aaaaaaaaaaaaaaaaaaaaaaaaaaaa\n\n\0ABORT\ntransaction:t\n\n\0";
                let block = frame.repeat(1000);
                client.stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
                for _ in 0..200 * (n + 1) {
                    if client.stream.write_all(block.as_bytes()).is_err() {
                        return;
                    }
                }
            })
        })
        .collect();
    for _ in 0..20 {
        serves(&broker);
    }
    for flood in floods {
        flood.join().unwrap();
    }
    serves(&broker);
}

#[test]
fn connections_that_come_and_go_leave_nothing() {
    let broker = Broker::limited(|limits| limits.connections = 50);
    for round in 0..500 {
        let mut client = broker.dial();
        match round % 4 {
            0 => {}
            1 => client.send("CONNECT\n"),
            2 => client.send("CONNECT\n\n\0SUBSCRIBE\nid:1\ndestination:/queue/a\n\n\0"),
            _ => {
                client.connect(Version::V1_1);
                client.send("DISCONNECT\nreceipt:1\n\n\0");
                let mut rest = Vec::new();
                client.stream.read_to_end(&mut rest).unwrap();
                assert!(rest.starts_with(b"RECEIPT\n"));
            }
        }
    }
    std::thread::sleep(Duration::from_millis(200));
    serves(&broker);
}
