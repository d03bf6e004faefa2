//! Sessions on a socket, one for each rule.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Broker, text};
use xbee_mq::frame::{Command, Version};

#[test]
fn connected_says_version_session_and_server() {
    let broker = Broker::start();
    let mut sessions = Vec::new();
    for (accept, version) in [
        ("1.2", "1.2"),
        ("1.0,1.1,1.2", "1.2"),
        ("1.0,1.1", "1.1"),
        ("1.0,9.9", "1.0"),
    ] {
        for command in ["CONNECT", "STOMP"] {
            let mut client = broker.dial();
            client.send(format!(
                "{command}\naccept-version:{accept}\nhost:localhost\n\n\0"
            ));
            let connected = client.expect(Command::Connected);
            assert_eq!(connected.headers.get("version"), Some(version));
            assert_eq!(connected.headers.get("heart-beat"), Some("0,0"));
            assert!(
                connected
                    .headers
                    .get("server")
                    .unwrap()
                    .starts_with("xbee-mq/")
            );
            sessions.push(connected.headers.get("session").unwrap().to_owned());
        }
    }
    let mut different = sessions.clone();
    different.sort();
    different.dedup();
    assert_eq!(different.len(), sessions.len());
    broker.connect(Version::V1_0);
    let mut lines = broker.dial();
    lines.send("\n\nCONNECT\r\naccept-version:1.2\r\nhost:localhost\r\n\r\n\0");
    lines.expect(Command::Connected);
}

#[test]
fn without_a_common_version_the_error_says_which_there_are() {
    let broker = Broker::start();
    let mut client = broker.dial();
    client.send("CONNECT\naccept-version:2.0,3.0\nhost:x\n\n\0");
    let error = client.expect_error("version");
    assert_eq!(error.headers.get("version"), Some("1.0,1.1,1.2"));
    assert!(text(&error).contains("1.0 1.1 1.2"));
}

#[test]
fn the_first_frame_is_connect_and_no_other_is() {
    let broker = Broker::start();
    let mut client = broker.dial();
    client.send("SEND\ndestination:/queue/a\nreceipt:7\n\nx\0");
    let error = client.expect_error("not-connected");
    assert_eq!(error.headers.get("receipt-id"), Some("7"));
    let mut client = broker.client();
    client.send("CONNECT\naccept-version:1.2\nhost:x\n\n\0");
    client.expect_error("already-connected");
}

#[test]
fn a_message_has_what_its_sender_gave_it() {
    let broker = Broker::start();
    let mut client = broker.client();
    client.subscribe("s", "/queue/a", "auto");
    client.send(
        "SEND\ndestination:/queue/a\ncontent-type:text/plain\nreceipt:r\nx\\cy:a\\nb\\r\\\\\nx\\cy:second\n\
         message-id:mine\nsubscription:mine\nack:mine\nredelivered:mine\npersistent:true\ncontent-length:3\n\na\0b\0",
    );
    let mut receipt = client.read().unwrap();
    let mut message = client.read().unwrap();
    if message.command == Command::Receipt {
        std::mem::swap(&mut receipt, &mut message);
    }
    assert_eq!(message.command, Command::Message);
    assert_eq!(message.body, b"a\0b");
    let header = |name| message.headers.get(name);
    assert_eq!(header("destination"), Some("/queue/a"));
    assert_eq!(header("subscription"), Some("s"));
    assert_eq!(header("content-type"), Some("text/plain"));
    assert_eq!(header("content-length"), Some("3"));
    assert_eq!(header("x:y"), Some("a\nb\r\\"));
    assert_eq!(header("persistent"), Some("true"));
    assert!(header("message-id").unwrap().parse::<u64>().is_ok());
    assert_eq!(
        (header("ack"), header("redelivered"), header("receipt")),
        (None, None, None)
    );
    let mut names: Vec<_> = message.headers.iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), message.headers.len(), "{:?}", message.headers);
}

#[test]
fn headers_reach_clients_of_other_versions_as_those_write_them() {
    let broker = Broker::start();
    let mut old = broker.connect(Version::V1_0);
    let mut middle = broker.connect(Version::V1_1);
    old.subscribe("o", "/topic/t", "auto");
    middle.subscribe("m", "/topic/t", "auto");
    let mut new = broker.client();
    new.publish(
        "/topic/t\nplain:a\\cb\\\\c\nlines:a\\nb\nodd\\cname:x",
        "hello",
    );
    let message = middle.expect_message("hello");
    assert_eq!(message.headers.get("plain"), Some("a:b\\c"));
    assert_eq!(message.headers.get("lines"), Some("a\nb"));
    assert_eq!(message.headers.get("odd:name"), Some("x"));
    // What 1.0 cannot write is left out.
    let message = old.expect_message("hello");
    assert_eq!(message.headers.get("plain"), Some("a:b\\c"));
    assert_eq!(
        (
            message.headers.get("lines"),
            message.headers.get("odd:name")
        ),
        (None, None)
    );
    assert!(
        !message
            .headers
            .iter()
            .any(|(name, _)| name.starts_with("odd"))
    );
}

#[test]
fn receipts_come_for_every_frame_and_disconnect_ends() {
    let broker = Broker::start();
    let mut client = broker.client();
    client.subscribe("s", "/queue/a", "client");
    client.publish("/queue/a", "1");
    let message = client.expect_message("1");
    client.answer("ACK", &message);
    for frame in [
        "BEGIN\ntransaction:t\nreceipt:r\n\n\0",
        "SEND\ntransaction:t\ndestination:/queue/b\nreceipt:r\n\nx\0",
        "COMMIT\ntransaction:t\nreceipt:r\n\n\0",
        "BEGIN\ntransaction:t\nreceipt:r\n\n\0",
        "ABORT\ntransaction:t\nreceipt:r\n\n\0",
        "UNSUBSCRIBE\nid:s\nreceipt:r\n\n\0",
    ] {
        client.send_with_receipt(frame);
    }
    client.send("SEND\ndestination:/queue/c\nreceipt:a\\c\\\\b\n\nx\0");
    assert_eq!(
        client.expect(Command::Receipt).headers.get("receipt-id"),
        Some("a:\\b")
    );
    client.send("DISCONNECT\nreceipt:77\n\n\0SEND\ndestination:/queue/c\nreceipt:8\n\n\0");
    assert_eq!(
        client.expect(Command::Receipt).headers.get("receipt-id"),
        Some("77")
    );
    assert_eq!(client.read(), None);
    let mut client = broker.client();
    client.send("DISCONNECT\n\n\0");
    assert_eq!(client.read(), None);
}

#[test]
fn messages_wait_for_a_consumer_and_come_in_order() {
    let broker = Broker::start();
    let mut sender = broker.client();
    for n in 0..100 {
        sender.send(format!("SEND\ndestination:/queue/a\n\n{n}\0"));
    }
    sender.expect_nothing();
    let mut client = broker.client();
    client.send("SUBSCRIBE\nid:1\ndestination:/queue/a\n\n\0");
    for n in 0..100 {
        client.expect_message(&n.to_string());
    }
}

#[test]
fn consumers_of_a_queue_share_and_subscribers_of_a_topic_each_get_all() {
    let broker = Broker::start();
    let (mut one, mut two, mut sender) = (broker.client(), broker.client(), broker.client());
    for client in [&mut one, &mut two] {
        client.subscribe("q", "/queue/a", "client-individual");
        client.subscribe("t", "/topic/a", "auto");
    }
    sender.publish("/queue/a", "1");
    sender.publish("/queue/a", "2");
    one.expect_message("1");
    two.expect_message("2");
    sender.publish("/topic/a", "3");
    one.expect_message("3");
    two.expect_message("3");
    // Nobody is there any more: a topic keeps nothing.
    one.send_with_receipt("UNSUBSCRIBE\nid:t\nreceipt:r\n\n\0");
    sender.publish("/topic/a", "4");
    two.expect_message("4");
    one.subscribe("t", "/topic/a", "auto");
    one.expect_nothing();
}

#[test]
fn other_names_are_queues() {
    let broker = Broker::start();
    let mut client = broker.client();
    client.publish("jobs", "1");
    client.subscribe("s", "jobs", "auto");
    let message = client.expect_message("1");
    assert_eq!(message.headers.get("destination"), Some("jobs"));
    client.subscribe("t", "/queue/jobs", "auto");
    client.expect_nothing();
}

#[test]
fn ack_in_mode_client_covers_all_before_and_in_client_individual_one() {
    let broker = Broker::start();
    for (mode, left) in [("client", vec!["3"]), ("client-individual", vec!["1", "3"])] {
        let mut client = broker.client();
        let queue = format!("/queue/{mode}");
        client.subscribe("s", &queue, mode);
        let mut messages = Vec::new();
        for body in ["1", "2", "3"] {
            client.publish(&queue, body);
            messages.push(client.expect_message(body));
        }
        client.answer("ACK", &messages[1]);
        drop(client);
        let mut next = broker.client();
        next.subscribe("s", &queue, "auto");
        for body in left {
            let message = next.expect_message(body);
            assert_eq!(message.headers.get("redelivered"), Some("true"));
        }
        next.expect_nothing();
    }
}

#[test]
fn each_version_acknowledges_by_its_own_headers() {
    let broker = Broker::start();
    for version in Version::ALL {
        let mut client = broker.connect(version);
        let queue = format!("/queue/{version}");
        client.subscribe("s", &queue, "client");
        client.publish(&queue, "1");
        let message = client.expect_message("1");
        let id = message.headers.get("message-id").unwrap();
        assert_eq!(
            message.headers.get("ack").is_some(),
            version == Version::V1_2
        );
        match version {
            Version::V1_0 => {
                client.send_with_receipt(format!("ACK\nmessage-id:{id}\nreceipt:r\n\n\0"))
            }
            Version::V1_1 => client.send_with_receipt(format!(
                "ACK\nmessage-id:{id}\nsubscription:s\nreceipt:r\n\n\0"
            )),
            Version::V1_2 => client.answer("ACK", &message),
        }
        client.send_with_receipt("UNSUBSCRIBE\nid:s\nreceipt:r\n\n\0");
        client.subscribe("t", &queue, "auto");
        client.expect_nothing();
    }
}

#[test]
fn a_client_of_1_0_needs_no_id() {
    let broker = Broker::start();
    let mut client = broker.connect(Version::V1_0);
    client.send_with_receipt("SUBSCRIBE\ndestination: /queue/a\nack: client\nreceipt: r\n\n\0");
    client.publish("/queue/a", "1");
    let message = client.expect_message("1");
    assert_eq!(message.headers.get("subscription"), None);
    client.send_with_receipt("UNSUBSCRIBE\ndestination:/queue/a\nreceipt:r\n\n\0");
    client.publish("/queue/a", "2");
    client.expect_nothing();
    client.send("NACK\nmessage-id:1\n\n\0");
    client.expect_error("unknown-command");
    let mut newer = broker.connect(Version::V1_1);
    newer.send("SUBSCRIBE\ndestination:/queue/a\n\n\0");
    newer.expect_error("header-missing");
}

#[test]
fn what_a_consumer_leaves_goes_to_the_next_marked_and_first() {
    let broker = Broker::start();
    let mut first = broker.client();
    first.subscribe("s", "/queue/a", "client");
    first.publish("/queue/a", "1");
    first.publish("/queue/a", "2");
    let one = first.expect_message("1");
    first.expect_message("2");
    let mut second = broker.client();
    second.subscribe("s", "/queue/a", "auto");
    // By UNSUBSCRIBE; an ACK that crosses it does no harm.
    first.send_with_receipt("UNSUBSCRIBE\nid:s\nreceipt:r\n\n\0");
    first.answer("ACK", &one);
    for body in ["1", "2"] {
        let message = second.expect_message(body);
        assert_eq!(message.headers.get("redelivered"), Some("true"));
    }
    // By the end of the connection, in each way.
    for end in ["DISCONNECT\n\n\0", "", "BAD"] {
        let mut leaving = broker.client();
        let mut stays = broker.client();
        leaving.subscribe("s", "/queue/b", "client-individual");
        stays.publish("/queue/b", "3");
        let sent = leaving.expect_message("3");
        leaving.send(end);
        stays.publish("/queue/b", "4");
        if end != "BAD" {
            drop(leaving);
        } else {
            leaving.send("\n");
            while leaving.read().is_some() {}
        }
        stays.subscribe("s", "/queue/b", "auto");
        let mut again = stays.expect(Command::Message);
        if text(&again) != "3" {
            // The other had not gone when 4 was delivered here.
            again = stays.expect(Command::Message);
        } else {
            stays.expect_message("4");
        }
        assert_eq!(again.headers.get("redelivered"), Some("true"));
        assert_eq!(
            again.headers.get("message-id"),
            sent.headers.get("message-id")
        );
        // Or the next round's messages might still be this one's.
        stays.send_with_receipt("UNSUBSCRIBE\nid:s\nreceipt:r\n\n\0");
    }
}

#[test]
fn nack_delivers_again_and_in_the_end_to_the_dead_letter_queue() {
    let broker = Broker::limited(|limits| limits.redeliveries = 2);
    let mut client = broker.client();
    client.subscribe("s", "/queue/a", "client-individual");
    client.send_with_receipt("SEND\ndestination:/queue/a\nmine:yes\nreceipt:r\n\n1\0");
    for attempt in 0..3 {
        let message = client.expect_message("1");
        assert_eq!(
            message.headers.get("redelivered"),
            (attempt > 0).then_some("true")
        );
        client.send(format!(
            "NACK\nid:{}\n\n\0",
            message.headers.get("ack").unwrap()
        ));
    }
    client.expect_nothing();
    client.subscribe("d", "/queue/dead-letter", "client");
    let message = client.expect_message("1");
    assert_eq!(message.headers.get("mine"), Some("yes"));
    assert_eq!(
        message.headers.get("original-destination"),
        Some("/queue/a")
    );
    // From there it goes nowhere else.
    let mut message = message;
    for _ in 0..5 {
        client.send(format!(
            "NACK\nid:{}\n\n\0",
            message.headers.get("ack").unwrap()
        ));
        message = client.expect_message("1");
    }
}

#[test]
fn nack_in_mode_client_is_for_all_before() {
    let broker = Broker::start();
    let mut client = broker.client();
    client.subscribe("s", "/queue/a", "client");
    for body in ["1", "2", "3"] {
        client.publish("/queue/a", body);
    }
    let all = ["1", "2", "3"].map(|body| client.expect_message(body));
    client.send(format!(
        "NACK\nid:{}\n\n\0",
        all[1].headers.get("ack").unwrap()
    ));
    client.expect_message("1");
    client.expect_message("2");
    client.expect_nothing();
}

#[test]
fn acknowledgements_of_nothing_are_errors() {
    let broker = Broker::start();
    for (frame, code) in [
        ("ACK\nid:1-1\n\n\0", "no-delivery"),
        ("ACK\nid:nonsense\n\n\0", "no-delivery"),
        ("NACK\nid:1-99\n\n\0", "no-delivery"),
        ("ACK\nmessage-id:1\nsubscription:s\n\n\0", "header-missing"),
        ("ACK\nid:1-1\ntransaction:none\n\n\0", "no-transaction"),
    ] {
        let mut client = broker.client();
        client.subscribe("s", "/queue/a", "client-individual");
        client.send(frame);
        client.expect_error(code);
    }
    let mut client = broker.client();
    client.subscribe("s", "/queue/b", "client-individual");
    client.publish("/queue/b", "1");
    let message = client.expect_message("1");
    client.answer("ACK", &message);
    client.send(format!(
        "ACK\nid:{}\n\n\0",
        message.headers.get("ack").unwrap()
    ));
    client.expect_error("no-delivery");
}

#[test]
fn a_transaction_is_all_or_nothing() {
    let broker = Broker::start();
    let (mut client, mut other) = (broker.client(), broker.client());
    other.subscribe("o", "/queue/out", "auto");
    client.subscribe("s", "/queue/in", "client-individual");
    client.publish("/queue/in", "in");
    let message = client.expect_message("in");
    let ack = message.headers.get("ack").unwrap();
    // Given up.
    client.send("BEGIN\ntransaction:t\n\n\0SEND\ntransaction:t\ndestination:/queue/out\n\n1\0");
    client.send(format!(
        "ACK\nid:{ack}\ntransaction:t\n\n\0ABORT\ntransaction:t\nreceipt:r\n\n\0"
    ));
    client.expect(Command::Receipt);
    other.expect_nothing();
    // Done: the same acknowledgement again, for it never was.
    client.send("BEGIN\ntransaction:t\n\n\0SEND\ntransaction:t\ndestination:/queue/out\n\n2\0");
    client.send(format!("ACK\nid:{ack}\ntransaction:t\n\n\0"));
    client.send("SEND\ntransaction:t\ndestination:/queue/out\n\n3\0");
    client.expect_nothing();
    other.expect_nothing();
    client.send("COMMIT\ntransaction:t\n\n\0");
    other.expect_message("2");
    other.expect_message("3");
    // Left open at the end.
    client.publish("/queue/in", "again");
    let message = client.expect_message("again");
    let ack = message.headers.get("ack").unwrap();
    client.send("BEGIN\ntransaction:u\n\n\0SEND\ntransaction:u\ndestination:/queue/out\n\n4\0");
    client.send(format!(
        "ACK\nid:{ack}\ntransaction:u\nreceipt:r\n\n\0DISCONNECT\n\n\0"
    ));
    client.expect(Command::Receipt);
    assert_eq!(client.read(), None);
    other.expect_nothing();
    other.subscribe("i", "/queue/in", "auto");
    other.expect_message("again");
}

#[test]
fn transactions_have_names() {
    let broker = Broker::start();
    for (frames, code) in [
        ("BEGIN\n\n\0", "header-missing"),
        ("COMMIT\ntransaction:t\n\n\0", "no-transaction"),
        ("ABORT\ntransaction:t\n\n\0", "no-transaction"),
        (
            "SEND\ndestination:/queue/a\ntransaction:t\n\n\0",
            "no-transaction",
        ),
        (
            "BEGIN\ntransaction:t\n\n\0BEGIN\ntransaction:t\n\n\0",
            "transaction-exists",
        ),
    ] {
        let mut client = broker.client();
        client.send(frames);
        client.expect_error(code);
    }
}

#[test]
fn frames_that_cannot_be_done_are_errors_with_their_receipt() {
    let broker = Broker::start();
    for (frame, code) in [
        ("SEND\n\nx\0", "header-missing"),
        ("SEND\ndestination:\n\nx\0", "bad-destination"),
        ("SEND\ndestination:/queue/\n\nx\0", "bad-destination"),
        ("SUBSCRIBE\nid:1\n\n\0", "header-missing"),
        ("SUBSCRIBE\ndestination:/queue/a\n\n\0", "header-missing"),
        (
            "SUBSCRIBE\nid:1\ndestination:/queue/a\nack:never\n\n\0",
            "bad-header",
        ),
        (
            "SUBSCRIBE\nid:1\ndestination:/queue/a\nselector:a = 1\n\n\0",
            "selector",
        ),
        (
            "SUBSCRIBE\nid:1\ndestination:/queue/a\nprefetch-count:x\n\n\0",
            "bad-header",
        ),
        ("UNSUBSCRIBE\nid:1\n\n\0", "no-subscription"),
        ("UNSUBSCRIBE\n\n\0", "header-missing"),
        (
            "SUBSCRIBE\nid:1\ndestination:/queue/a\n\nbody\0",
            "malformed-frame",
        ),
        ("MESSAGE\n\n\0", "unknown-command"),
        ("NOSUCH\n\n\0", "unknown-command"),
        ("send\ndestination:/queue/a\n\n\0", "unknown-command"),
        ("SEND\ndestination:/queue/a\nx:\\t\n\n\0", "malformed-frame"),
        (
            "SEND\ndestination:/queue/a\nnothing\n\n\0",
            "malformed-frame",
        ),
        (
            "SEND\ndestination:/queue/a\ncontent-length:2\n\nabc\0",
            "malformed-frame",
        ),
        (
            "SEND\ndestination:/queue/a\ncontent-length:99999999\n\n",
            "frame-too-large",
        ),
    ] {
        let (command, rest) = frame.split_once('\n').unwrap();
        let mut client = broker.client();
        client.send(format!("{command}\nreceipt:r1\n{rest}"));
        let error = client.expect_error(code);
        if command != "NOSUCH" && command != "send" {
            assert_eq!(error.headers.get("receipt-id"), Some("r1"), "{frame}");
        }
        assert_eq!(error.headers.get("content-type"), Some("text/plain"));
    }
    let mut client = broker.client();
    client.subscribe("1", "/queue/a", "auto");
    client.send("SUBSCRIBE\nid:1\ndestination:/queue/b\n\n\0");
    client.expect_error("subscription-exists");
}

#[test]
fn heart_beats_go_both_ways_as_agreed() {
    let broker = Broker::start();
    let mut client = broker.dial();
    client.send("CONNECT\naccept-version:1.2\nhost:x\nheart-beat:0,200\n\n\0");
    let connected = client.expect(Command::Connected);
    assert_eq!(connected.headers.get("heart-beat"), Some("200,0"));
    let heard = client.listen(Duration::from_millis(1100));
    assert!(heard.iter().all(|&b| b == b'\n'), "{heard:?}");
    assert!(heard.len() >= 4, "{} heart-beats in 1.1 s", heard.len());

    // A client that said it would write and does not is dead.
    let mut client = broker.dial();
    client.send("CONNECT\naccept-version:1.1\nhost:x\nheart-beat:100,0\n\n\0");
    let connected = client.expect(Command::Connected);
    assert_eq!(connected.headers.get("heart-beat"), Some("0,100"));
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(1500) {
        std::thread::sleep(Duration::from_millis(50));
        client.send("\n");
    }
    client.expect_nothing();
    client.expect_error("timeout");
}

#[test]
fn a_consumer_has_no_more_messages_than_it_wants() {
    let broker = Broker::start();
    for header in ["prefetch-count", "activemq.prefetchSize"] {
        let mut client = broker.client();
        let mut sender = broker.client();
        client.send_with_receipt(format!(
            "SUBSCRIBE\nid:s\ndestination:/queue/{header}\nack:client-individual\n{header}:2\nreceipt:r\n\n\0"
        ));
        for n in 0..4 {
            sender.publish(&format!("/queue/{header}"), &n.to_string());
        }
        client.expect_message("0");
        let message = client.expect_message("1");
        client.expect_nothing();
        client.send(format!(
            "ACK\nid:{}\n\n\0",
            message.headers.get("ack").unwrap()
        ));
        client.expect_message("2");
        client.expect_nothing();
    }
}

#[test]
fn bodies_of_any_size_come_as_they_were() {
    let broker = Broker::start();
    let mut client = broker.client();
    client.subscribe("s", "/queue/a", "auto");
    for size in [0, 1, 65_535, 65_536, 1 << 20, 16 << 20] {
        let body: Vec<u8> = (0..size).map(|n: u32| (n ^ n >> 8) as u8).collect();
        client.send(format!(
            "SEND\ndestination:/queue/a\ncontent-length:{size}\n\n"
        ));
        client.send(&body);
        client.send("\0");
        assert!(client.expect(Command::Message).body == body, "{size}");
    }
}
