//! `xbed broker`, the program.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A broker that runs, and is killed at the end.
struct Broker {
    process: Child,
    address: SocketAddr,
}

impl Broker {
    fn start(arguments: &[&str]) -> Broker {
        let mut process = Command::new(env!("CARGO_BIN_EXE_xbed"))
            .args(["broker", "--listen", "127.0.0.1:0"])
            .args(arguments)
            .env("XBED_LOG", "info")
            .env("NO_COLOR", "1")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let address = loop {
            let mut line = String::new();
            assert_ne!(log.read_line(&mut line).unwrap(), 0, "it has ended");
            if let Some((_, rest)) = line.split_once("address=") {
                break rest.split_whitespace().next().unwrap().parse().unwrap();
            }
        };
        // Or it would stop when the pipe is full.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Broker { process, address }
    }

    fn connect(&self, headers: &str) -> Session {
        let stream = TcpStream::connect(self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut session = Session {
            reader: BufReader::new(stream),
        };
        session.write(&format!(
            "CONNECT\naccept-version:1.2\nhost:x\n{headers}\n\0"
        ));
        session
    }

    fn client(&self) -> Session {
        let mut session = self.connect("");
        assert!(session.read().starts_with("CONNECTED\n"));
        session
    }

    /// With SIGKILL.
    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

struct Session {
    reader: BufReader<TcpStream>,
}

impl Session {
    fn write(&mut self, frames: &str) {
        self.reader.get_mut().write_all(frames.as_bytes()).unwrap();
    }

    /// The next frame as text, without its NUL; empty at the end.
    fn read(&mut self) -> String {
        let mut bytes = Vec::new();
        self.reader.read_until(0, &mut bytes).unwrap();
        bytes.pop();
        String::from_utf8(bytes)
            .unwrap()
            .trim_start_matches('\n')
            .to_owned()
    }
}

fn data(directory: &Path) -> &str {
    directory.to_str().unwrap()
}

#[test]
fn kill_9_loses_no_persistent_message_that_has_a_receipt() {
    let directory = tempfile::tempdir().unwrap();
    let arguments = ["--data", data(directory.path())];
    let mut confirmed = Vec::new();
    let mut consumed = Vec::new();
    for round in 0..4 {
        let broker = Broker::start(&arguments);
        let mut client = broker.client();
        if round > 0 {
            // Some of those from before are consumed, and stay so.
            client.write("SUBSCRIBE\nid:1\ndestination:/queue/a\nack:client-individual\nprefetch-count:2\n\n\0");
            for _ in 0..2 {
                let message = client.read();
                assert!(message.contains("\nredelivered:true\n"), "{message}");
                let ack = message
                    .lines()
                    .find_map(|line| line.strip_prefix("ack:"))
                    .unwrap();
                let body = message.rsplit_once("\n\n").unwrap().1.to_owned();
                client.write(&format!("ACK\nid:{ack}\nreceipt:ack-{body}\n\n\0"));
                consumed.push(body);
            }
            client.write("UNSUBSCRIBE\nid:1\nreceipt:done\n\n\0");
            while !client.read().starts_with("RECEIPT\nreceipt-id:done\n") {}
        }
        for n in 0..200 {
            let id = round * 1000 + n;
            client.write(&format!(
                "SEND\ndestination:/queue/a\npersistent:true\nreceipt:{id}\nh:a\\nb\n\n{id}\0"
            ));
            client.write(&format!("SEND\ndestination:/queue/a\n\ntransient-{id}\0"));
        }
        // It is killed while it writes, after some receipts have come.
        for _ in 0..(40 * round + 20) {
            let receipt = client.read();
            let id = receipt
                .strip_prefix("RECEIPT\nreceipt-id:")
                .expect(&receipt);
            confirmed.push(id.trim().to_owned());
        }
        broker.kill();
    }
    let broker = Broker::start(&arguments);
    let mut client = broker.client();
    client.write("SUBSCRIBE\nid:1\ndestination:/queue/a\nack:auto\n\n\0");
    client.write("SEND\ndestination:/queue/a\n\nlast\0");
    let mut found = Vec::new();
    loop {
        let message = client.read();
        let body = message.rsplit_once("\n\n").unwrap().1.to_owned();
        if body == "last" {
            break;
        }
        assert!(message.contains("\nh:a\\nb\n"), "{message}");
        found.push(body);
    }
    for id in &confirmed {
        assert!(
            found.contains(id) != consumed.contains(id),
            "{id}: lost, or consumed and back"
        );
    }
    let mut sorted: Vec<u32> = found.iter().map(|id| id.parse().unwrap()).collect();
    sorted.sort_unstable();
    assert_eq!(
        sorted.iter().map(u32::to_string).collect::<Vec<_>>(),
        found,
        "out of order or twice"
    );
}

#[test]
fn a_second_broker_does_not_take_the_same_messages() {
    let directory = tempfile::tempdir().unwrap();
    let _broker = Broker::start(&["--data", data(directory.path())]);
    let second = Command::new(env!("CARGO_BIN_EXE_xbed"))
        .args([
            "broker",
            "--listen",
            "127.0.0.1:0",
            "--data",
            data(directory.path()),
        ])
        .output()
        .unwrap();
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(
        !second.status.success() && said.contains("another broker"),
        "{said}"
    );
}

#[test]
fn other_machines_are_not_served_without_users() {
    let refused = Command::new(env!("CARGO_BIN_EXE_xbed"))
        .args(["broker", "--listen", "0.0.0.0:0"])
        .output()
        .unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        !refused.status.success() && said.contains("no users are configured"),
        "{said}"
    );
}

#[test]
fn users_come_from_the_file_and_may_what_it_says() {
    let mut hash = Command::new(env!("CARGO_BIN_EXE_xbed"))
        .args(["broker", "--hash-password"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    hash.stdin.take().unwrap().write_all(b"secret\n").unwrap();
    let mut text = String::new();
    hash.stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert!(hash.wait().unwrap().success());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("broker.toml");
    let user = format!(
        "[users.alice]\npassword = \"{}\"\nwrite = [\"/queue/in*\"]\nread = [\"/queue/out\"]\n",
        text.trim()
    );
    std::fs::write(&path, user).unwrap();
    let broker = Broker::start(&["--config", data(&path)]);
    for wrong in [
        "",
        "login:alice\npasscode:Secret\n",
        "login:bob\npasscode:secret\n",
        "login:alice\n",
    ] {
        let mut session = broker.connect(wrong);
        let error = session.read();
        assert!(
            error.starts_with("ERROR\n") && error.contains("code:access-refused"),
            "{error}"
        );
        assert_eq!(session.read(), "");
    }
    for (frame, allowed) in [
        ("SEND\ndestination:/queue/in.1\nreceipt:1\n\n\0", true),
        ("SEND\ndestination:/queue/out\nreceipt:1\n\n\0", false),
        (
            "SUBSCRIBE\nid:1\ndestination:/queue/out\nreceipt:1\n\n\0",
            true,
        ),
        (
            "SUBSCRIBE\nid:1\ndestination:/queue/in.1\nreceipt:1\n\n\0",
            false,
        ),
    ] {
        let mut session = broker.connect("login:alice\npasscode:secret\n");
        assert!(session.read().starts_with("CONNECTED\n"));
        session.write(frame);
        let answer = session.read();
        match allowed {
            true => assert_eq!(answer, "RECEIPT\nreceipt-id:1\n\n"),
            false => assert!(answer.contains("code:access-refused"), "{answer}"),
        }
    }
}

#[test]
fn it_ends_by_a_signal_and_tells_its_clients() {
    let mut broker = Broker::start(&[]);
    let mut client = broker.client();
    let pid = broker.process.id().to_string();
    assert!(Command::new("kill").arg(&pid).status().unwrap().success());
    assert!(client.read().contains("code:stopping"));
    assert!(broker.process.wait().unwrap().success());
}
