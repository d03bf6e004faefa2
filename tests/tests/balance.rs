//! The load balancer in four guests: web servers that share their requests over event channels.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use xbee_tests::{PATIENCE, Xbed, qemu};

const GUESTS: usize = 4;
/// Of the registry, on vsock.
const REGISTRY_PORT: u32 = 7400;
/// In each guest are two servers, of one group each: one group sends each request to two, the other to one.
const GROUPS: [(&str, u16, usize); 2] = [("twice", 8080, 2), ("once", 8081, 1)];

/// What runs in guests; `None`, and a printed reason, where it has not been built.
fn program(name: &str) -> Option<PathBuf> {
    let this = std::env::current_exe().unwrap();
    let target = this.ancestors().nth(3).unwrap();
    let path = target.join("x86_64-unknown-linux-musl/release").join(name);
    if path.exists() {
        return Some(path);
    }
    println!(
        "skipped: {} is missing (cargo build -p xbee-kecho --bins --examples --release \
         --target x86_64-unknown-linux-musl)",
        path.display()
    );
    None
}

/// One GET; the status and the body, or nothing where the connection ends early.
fn get(port: u16, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").ok()?;
    let mut response = String::new();
    stream.read_to_string(&mut response).ok()?;
    let (head, body) = response.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    Some((status, body.to_owned()))
}

/// The guests, and the ports of their servers by group.
struct Guests {
    xbed: Xbed,
    tasks: Vec<String>,
    ports: Vec<[u16; 2]>,
}

impl Guests {
    fn start(xbed: Xbed, kechod: &Path, server: &Path) -> Guests {
        let volume = |from: &Path, to: &str| format!("{}:{to}", from.display());
        let job = xbed.xbe([
            "run",
            "--print-jsdl",
            "-v",
            &volume(kechod, "/root/kechod"),
            "-v",
            &volume(server, "/root/balance-server"),
            "--",
            "/bin/sleep",
            "100000",
        ]);
        let document = xbed.document("balance.xsdl", &job.ok().stdout);
        let publish = GROUPS.map(|(_, port, _)| format!("0:{port}"));
        let tasks: Vec<_> = (0..GUESTS)
            .map(|_| {
                let file = document.to_str().unwrap();
                let args = ["submit", "-p", &publish[0], "-p", &publish[1], file];
                xbed.xbe(args).line()
            })
            .collect();
        let ports = tasks.iter().map(|task| {
            let status = xbed.wait_for(task, "Executing");
            GROUPS.map(|(_, guest, _)| {
                let ports = status["ports"].as_array().unwrap();
                let port = ports.iter().find(|port| port["guest"] == guest);
                u16::try_from(port.unwrap()["host"].as_u64().unwrap()).unwrap()
            })
        });
        let ports = ports.collect();
        Guests { xbed, tasks, ports }
    }

    fn sh(&self, guest: usize, script: &str) -> String {
        let task = self.tasks[guest].as_str();
        let ran = self.xbed.xbe(["exec", task, "--", "/bin/sh", "-c", script]);
        ran.ok().stdout
    }

    /// Goes on when this returns, and writes to a file.
    fn leave(&self, guest: usize, command: &str, log: &str) {
        let script = format!("setsid {command} </dev/null >/tmp/{log} 2>&1 &");
        self.sh(guest, &script);
    }

    /// The registry is in the first.
    fn start_servers(&self) {
        let registry = format!("/root/kechod registry --listen vsock:{REGISTRY_PORT}");
        self.leave(0, &registry, "registry.log");
        let cid = self.sh(0, "/root/balance-server cid");
        let registry = format!("vsock:{}:{REGISTRY_PORT}", cid.trim());
        for guest in 0..GUESTS {
            for (group, port, copies) in GROUPS {
                let server = format!(
                    "/root/balance-server --registry {registry} --listen 127.0.0.1:{port} --group {group} \
                     --copies {copies} --copy-load 1000"
                );
                self.leave(guest, &server, &format!("{group}.log"));
            }
        }
    }

    fn port(&self, guest: usize, group: usize) -> u16 {
        self.ports[guest][group]
    }

    /// What a server says of itself; nothing where it cannot be reached.
    fn try_counts(&self, guest: usize, group: usize) -> Option<HashMap<String, u64>> {
        let (status, body) = get(self.port(guest, group), "/counts")?;
        assert_eq!(status, 200, "{body}");
        let counts = body.lines().filter_map(|line| {
            let (name, count) = line.split_once(' ')?;
            Some((name.to_owned(), count.parse().ok()?))
        });
        Some(counts.collect())
    }

    fn counts(&self, group: usize) -> Vec<HashMap<String, u64>> {
        let guests = 0..self.tasks.len();
        guests
            .map(|guest| self.try_counts(guest, group).unwrap())
            .collect()
    }

    /// Waits until each server of a group knows that many.
    fn wait_until_known(&self, group: usize, servers: u64) {
        let begun = Instant::now();
        for guest in 0..self.tasks.len() {
            loop {
                let counts = self.try_counts(guest, group);
                if counts
                    .as_ref()
                    .is_some_and(|counts| counts["known"] == servers)
                {
                    break;
                }
                assert!(
                    begun.elapsed() < PATIENCE,
                    "guest {guest} has {counts:?}: {}",
                    self.sh(guest, "cat /tmp/*.log")
                );
                sleep(Duration::from_millis(50));
            }
        }
    }

    /// Clients that ask these servers, each its own requests one after the other; the answers as they come.
    fn load(
        &self,
        group: usize,
        guests: &[usize],
        clients: usize,
        each: usize,
        query: &str,
    ) -> Receiver<Answer> {
        let (sender, answers) = channel();
        for client in 0..clients {
            let port = self.port(guests[client % guests.len()], group);
            let (sender, query) = (sender.clone(), query.to_owned());
            spawn(move || {
                for number in 0..each {
                    let path = format!("/client/{client}/{number}{query}");
                    let response = get(port, &path);
                    sender.send(Answer { path, response }).unwrap();
                }
            });
        }
        answers
    }
}

#[derive(Debug)]
struct Answer {
    path: String,
    response: Option<(u16, String)>,
}

impl Answer {
    /// The server that gave the answer, which is the right one to what was asked.
    fn server(&self) -> String {
        let (status, body) = self.response.as_ref().unwrap_or_else(|| panic!("{self:?}"));
        assert_eq!(*status, 200, "{self:?}");
        let rest = body.strip_prefix(&format!("path={}\nserver=", self.path));
        rest.unwrap_or_else(|| panic!("{self:?}"))
            .trim_end()
            .to_owned()
    }
}

fn sum(counts: &[HashMap<String, u64>], name: &str) -> u64 {
    counts.iter().map(|counts| counts[name]).sum()
}

#[test]
fn four_guests_share_their_requests() {
    let (Some(kechod), Some(server)) = (program("kechod"), program("examples/balance-server"))
    else {
        return;
    };
    let Some(xbed) = qemu() else { return };
    let mut guests = Guests::start(xbed, &kechod, &server);
    guests.start_servers();

    // Each request goes to two; all come to two of the four.
    let (group, clients, each) = (0, 16, 25);
    guests.wait_until_known(group, GUESTS as u64);
    let answers: Vec<_> = guests
        .load(group, &[0, 1], clients, each, "")
        .iter()
        .collect();
    let total = (clients * each) as u64;
    assert_eq!(answers.len() as u64, total);
    let mut by_server: HashMap<String, u64> = HashMap::new();
    for answer in &answers {
        *by_server.entry(answer.server()).or_default() += 1;
    }
    assert_eq!(by_server.len(), GUESTS, "{by_server:?}");
    assert!(
        by_server.values().all(|count| *count >= total / 20),
        "{by_server:?}"
    );
    // The rest of the second copies end, or are stopped.
    let begun = Instant::now();
    let counts = loop {
        let counts = guests.counts(group);
        if sum(&counts, "worked") + sum(&counts, "stopped") == sum(&counts, "sent") {
            break counts;
        }
        assert!(begun.elapsed() < PATIENCE, "{counts:?}");
        sleep(Duration::from_millis(50));
    };
    assert_eq!(
        (sum(&counts, "taken"), sum(&counts, "answered")),
        (total, total),
        "{counts:?}"
    );
    assert_eq!(sum(&counts, "given-up"), 0, "{counts:?}");
    // A copy whose answer did not count was cancelled, and was stopped by that or answered in vain.
    let (worked, stopped, dropped) = (
        sum(&counts, "worked"),
        sum(&counts, "stopped"),
        sum(&counts, "dropped"),
    );
    assert!(stopped > 0 && dropped > 0, "{counts:?}");
    assert_eq!(worked, total + dropped, "{counts:?}");
    assert_eq!(sum(&counts, "cancelled"), stopped + dropped, "{counts:?}");

    // Each request goes to one, and a guest ends that has some.
    let group = 1;
    guests.wait_until_known(group, GUESTS as u64);
    let (clients, each) = (24, 4);
    let answers = guests.load(group, &[0, 1, 2], clients, each, "?ms=400");
    let busy = |guests: &Guests| {
        guests
            .try_counts(3, group)
            .is_some_and(|counts| counts["load"] >= 2)
    };
    let begun = Instant::now();
    while !busy(&guests) {
        assert!(begun.elapsed() < PATIENCE, "guest 3 gets nothing to do");
        sleep(Duration::from_millis(10));
    }
    let last = guests.tasks.pop().unwrap();
    guests.xbed.xbe(["terminate", last.as_str()]).ok();
    let answers: Vec<_> = answers.iter().collect();
    assert_eq!(answers.len(), clients * each);
    for answer in &answers {
        answer.server();
    }
    let counts = guests.counts(group);
    assert_eq!(
        sum(&counts, "answered"),
        (clients * each) as u64,
        "{counts:?}"
    );
    assert!(sum(&counts, "forwarded") > 0, "{counts:?}");
    guests.wait_until_known(group, GUESTS as u64 - 1);
    for task in &guests.tasks {
        guests.xbed.xbe(["terminate", task]).ok();
    }
}
