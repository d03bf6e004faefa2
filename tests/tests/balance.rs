//! The load balancer: four web servers that share their requests over event channels, as processes of this machine and in
//! four guests.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use xbee_tests::{PATIENCE, Xbed, qemu};

const SERVERS: usize = 4;
/// Of the registry, on vsock.
const REGISTRY_PORT: u32 = 7400;
/// Each server is in two groups, by a process each: one group sends each request to two, the other to one.
const GROUPS: [Group; 2] = [
    Group {
        name: "twice",
        port: 8080,
        copies: 2,
        log_bytes: 4 << 20,
    },
    Group {
        name: "once",
        port: 8081,
        copies: 1,
        log_bytes: 4 << 20,
    },
];
/// A group whose events soon fill a log.
const SMALL: [Group; 1] = [Group {
    name: "small",
    port: 0,
    copies: 2,
    log_bytes: 64 << 10,
}];
const TWICE: usize = 0;
const ONCE: usize = 1;
/// Takes four times as long as the others in the group that sends requests to one.
const SLOW: usize = 3;
/// Is killed. It is the first to be started, so that it is the contact of all channels.
const KILLED: usize = 2;

struct Group {
    name: &'static str,
    /// In a guest.
    port: u16,
    copies: usize,
    log_bytes: usize,
}

impl Group {
    /// The arguments of a server in this group.
    fn arguments(&self, server: usize, registry: &str, listen: &str) -> Vec<String> {
        let slow = if self.copies == 1 && server == SLOW {
            4
        } else {
            1
        };
        let options = [
            ("registry", registry.to_owned()),
            ("listen", listen.to_owned()),
            ("group", self.name.to_owned()),
            ("copies", self.copies.to_string()),
            ("copy-load", "1000".to_owned()),
            ("slow", slow.to_string()),
            ("log-bytes", self.log_bytes.to_string()),
        ];
        let options = options.into_iter();
        options
            .flat_map(|(name, value)| [format!("--{name}"), value])
            .collect()
    }
}

/// Where the servers are.
trait Site {
    /// The port of this machine at which a server's process in a group is to be asked.
    fn port(&self, server: usize, group: usize) -> u16;
    /// Ends a server with all its processes, from one moment to the next.
    fn kill(&mut self, server: usize);
    /// What a server's processes have written.
    fn log(&self, server: usize) -> String;
}

/// Servers in the order in which they are started.
fn in_order() -> impl Iterator<Item = usize> {
    let others = (0..SERVERS).filter(|server| *server != KILLED);
    std::iter::once(KILLED).chain(others)
}

/// A process that ends with this.
struct Process(Child);

impl Process {
    /// Starts one, and returns it with what it says after `listening at`.
    fn start(command: &mut Command, log: &Path) -> (Process, String) {
        let log = File::create(log).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = Process(child.stderr(log).spawn().unwrap());
        let mut line = String::new();
        let mut stdout = BufReader::new(process.0.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let address = line.trim_end().strip_prefix("listening at ");
        let address = address.unwrap_or_else(|| panic!("{command:?}: {line:?}"));
        (process, address.to_owned())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }
}

/// Servers that are processes of this machine.
struct Processes {
    groups: &'static [Group],
    servers: Vec<Vec<(Process, u16)>>,
    _registry: Process,
    directory: tempfile::TempDir,
}

impl Processes {
    fn start(groups: &'static [Group]) -> Processes {
        let directory = tempfile::tempdir().unwrap();
        let [kechod, server] = ["kechod", "examples/balance-server"].map(xbee_tests::program);
        let mut command = Command::new(kechod);
        command.args(["registry", "--listen", "tcp:[::1]:0"]);
        let log = directory.path().join("registry");
        let (registry, address) = Process::start(&mut command, &log);
        let mut processes = Processes {
            groups,
            servers: (0..SERVERS).map(|_| vec![]).collect(),
            _registry: registry,
            directory,
        };
        for one in in_order() {
            for group in groups {
                let mut command = Command::new(&server);
                command
                    .args(group.arguments(one, &address, "127.0.0.1:0"))
                    .env("XDG_RUNTIME_DIR", processes.directory.path());
                let log = processes.log_of(one, group);
                let (process, listens) = Process::start(&mut command, &log);
                let (_, port) = listens.rsplit_once(':').unwrap();
                processes.servers[one].push((process, port.parse().unwrap()));
            }
        }
        processes
    }

    fn signal(&self, server: usize, signal: &str) {
        for (process, _) in &self.servers[server] {
            let pid = process.0.id().to_string();
            let sent = Command::new("kill").args([signal, &pid]).status();
            assert!(sent.unwrap().success());
        }
    }

    fn log_of(&self, server: usize, group: &Group) -> PathBuf {
        let name = format!("{}-{server}.log", group.name);
        self.directory.path().join(name)
    }
}

impl Site for Processes {
    fn port(&self, server: usize, group: usize) -> u16 {
        self.servers[server][group].1
    }

    fn kill(&mut self, server: usize) {
        self.servers[server].clear();
    }

    fn log(&self, server: usize) -> String {
        let logs = self.groups.iter().map(|group| self.log_of(server, group));
        logs.map(|log| fs::read_to_string(log).unwrap()).collect()
    }
}

/// What runs in guests; `None`, and a printed reason, where it has not been built.
fn guests_program(name: &str) -> Option<PathBuf> {
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

/// Servers in guests, which reach each other over vsock. The registry is in the first guest.
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
        let publish = GROUPS.map(|group| format!("0:{}", group.port));
        let tasks: Vec<_> = (0..SERVERS)
            .map(|_| {
                let file = document.to_str().unwrap();
                let args = ["submit", "-p", &publish[0], "-p", &publish[1], file];
                xbed.xbe(args).line()
            })
            .collect();
        let ports = tasks.iter().map(|task| {
            let status = xbed.wait_for(task, "Executing");
            GROUPS.map(|group| {
                let ports = status["ports"].as_array().unwrap();
                let port = ports.iter().find(|port| port["guest"] == group.port);
                u16::try_from(port.unwrap()["host"].as_u64().unwrap()).unwrap()
            })
        });
        let ports = ports.collect();
        let guests = Guests { xbed, tasks, ports };
        guests.start_servers();
        guests
    }

    fn sh(&self, guest: usize, script: &str) -> String {
        let task = self.tasks[guest].as_str();
        let ran = self.xbed.xbe(["exec", task, "--", "/bin/sh", "-c", script]);
        ran.ok().stdout
    }

    /// Goes on when this returns, and writes to a file.
    fn leave(&self, guest: usize, command: &str, log: &str) {
        let script = format!("setsid {command} </dev/null >/tmp/{log}.log 2>&1 &");
        self.sh(guest, &script);
    }

    fn start_servers(&self) {
        for guest in 0..SERVERS {
            self.sh(guest, "chmod 755 /root/kechod /root/balance-server");
        }
        let cid = self.sh(0, "/root/balance-server cid");
        let registry = format!("vsock:{}:{REGISTRY_PORT}", cid.trim());
        let command = format!("/root/kechod registry --listen {registry}");
        self.leave(0, &command, "registry");
        let listens = "until grep -q vsock: /tmp/registry.log; do sleep 0.1; done";
        self.sh(0, listens);
        for guest in in_order() {
            for group in GROUPS {
                let listen = format!("127.0.0.1:{}", group.port);
                let arguments = group.arguments(guest, &registry, &listen).join(" ");
                let command = format!("/root/balance-server {arguments}");
                self.leave(guest, &command, group.name);
            }
        }
    }
}

impl Site for Guests {
    fn port(&self, server: usize, group: usize) -> u16 {
        self.ports[server][group]
    }

    fn kill(&mut self, server: usize) {
        let task = self.tasks[server].as_str();
        self.xbed.xbe(["terminate", task]).ok();
    }

    fn log(&self, server: usize) -> String {
        self.sh(server, "tail -n 50 /tmp/*.log")
    }
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

type Counts = HashMap<String, u64>;

/// What a server says of itself; nothing where it cannot be reached.
fn try_counts(site: &dyn Site, server: usize, group: usize) -> Option<Counts> {
    let (status, body) = get(site.port(server, group), "/counts")?;
    assert_eq!(status, 200, "{body}");
    let counts = body.lines().filter_map(|line| {
        let (name, count) = line.split_once(' ')?;
        Some((name.to_owned(), count.parse().ok()?))
    });
    Some(counts.collect())
}

/// Waits until what these servers say of themselves is as it should be.
fn wait_for(
    site: &dyn Site,
    servers: &[usize],
    group: usize,
    what: impl Fn(&[Counts]) -> bool,
) -> Vec<Counts> {
    let begun = Instant::now();
    loop {
        let counts = servers
            .iter()
            .map(|server| try_counts(site, *server, group));
        let counts: Vec<_> = counts.collect();
        if counts.iter().all(Option::is_some) {
            let counts: Vec<_> = counts.iter().flatten().cloned().collect();
            if what(&counts) {
                return counts;
            }
        }
        if begun.elapsed() > PATIENCE {
            let logs: Vec<_> = servers.iter().map(|server| site.log(*server)).collect();
            panic!("{counts:?}: {}", logs.join("\n"));
        }
        sleep(Duration::from_millis(20));
    }
}

fn wait_until_known(site: &dyn Site, servers: &[usize], group: usize) {
    let all = servers.len() as u64;
    wait_for(site, servers, group, |counts| {
        counts.iter().all(|counts| counts["known"] == all)
    });
}

fn sum(counts: &[Counts], name: &str) -> u64 {
    counts.iter().map(|counts| counts[name]).sum()
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

/// Clients that ask these servers, each its own requests one after the other; the answers as they come.
fn load(
    site: &dyn Site,
    servers: &[usize],
    group: usize,
    (clients, each): (usize, usize),
    query: &str,
) -> Receiver<Answer> {
    let (sender, answers) = channel();
    for client in 0..clients {
        let port = site.port(servers[client % servers.len()], group);
        let (sender, query) = (sender.clone(), query.to_owned());
        spawn(move || {
            for number in 0..each {
                let path = format!("/client/{client}/{number}{query}");
                let response = get(port, &path);
                // Who takes them may have failed.
                let _ = sender.send(Answer { path, response });
            }
        });
    }
    answers
}

/// How many answers came by server; each right, and as many as were asked for.
fn by_server(answers: &Receiver<Answer>, (clients, each): (usize, usize)) -> HashMap<String, u64> {
    let answers: Vec<_> = answers.iter().collect();
    assert_eq!(answers.len(), clients * each);
    let mut by_server = HashMap::new();
    for answer in &answers {
        *by_server.entry(answer.server()).or_default() += 1;
    }
    by_server
}

/// Each request goes to two; all come to two of the four.
fn two_copies(site: &dyn Site) {
    let all = [0, 1, 2, 3];
    wait_until_known(site, &all, TWICE);
    let requests = (16, 25);
    let answers = load(site, &[0, 1], TWICE, requests, "");
    let by_server = by_server(&answers, requests);
    let total = (requests.0 * requests.1) as u64;
    assert_eq!(by_server.len(), SERVERS, "{by_server:?}");
    assert!(
        by_server.values().all(|count| *count >= total / 20),
        "{by_server:?}"
    );
    // Second copies are worked on for a while after the first answer, unless a cancel stops them before. Each was told to stop: it
    // did, or its answer was dropped.
    let counts = wait_for(site, &all, TWICE, |counts| {
        let [sent, worked, stopped, dropped, filtered, cancelled] = [
            "sent",
            "worked",
            "stopped",
            "dropped",
            "filtered",
            "cancelled",
        ]
        .map(|name| sum(counts, name));
        worked + stopped == sent
            && worked == total + dropped
            && dropped == filtered
            && stopped + dropped == cancelled
    });
    for (name, count) in [("taken", total), ("answered", total), ("given-up", 0)] {
        assert_eq!(sum(&counts, name), count, "{name} of {counts:?}");
    }
    assert!(
        sum(&counts, "sent") >= 2 * total && sum(&counts, "lost") == 0,
        "{counts:?}"
    );
    assert!(
        sum(&counts, "stopped") > 0 && sum(&counts, "dropped") > 0,
        "{counts:?}"
    );
    println!("two copies: {by_server:?}, {counts:?}");
}

/// Each request goes to one, and one of the servers is slow.
fn a_slow_one(site: &dyn Site) {
    let all = [0, 1, 2, 3];
    wait_until_known(site, &all, ONCE);
    let requests = (24, 8);
    let answers = load(site, &[0, 1], ONCE, requests, "");
    by_server(&answers, requests);
    let counts = wait_for(site, &all, ONCE, |counts| sum(counts, "load") == 0);
    let worked: Vec<_> = counts.iter().map(|counts| counts["worked"]).collect();
    for (server, others) in worked.iter().enumerate() {
        assert!(*others > 0, "{worked:?}");
        assert!(server == SLOW || *others > 2 * worked[SLOW], "{worked:?}");
    }
    println!("a slow one: {worked:?}\n{counts:?}");
}

/// Each request goes to one, and a server ends that has some.
fn a_dead_one(site: &mut dyn Site) {
    let rest: Vec<_> = (0..SERVERS).filter(|server| *server != KILLED).collect();
    let requests = (24, 3);
    let before = wait_for(site, &rest, ONCE, |_| true);
    let answers = load(site, &rest, ONCE, requests, "?ms=400");
    // What waits there nobody else has.
    wait_for(site, &[KILLED], ONCE, |counts| counts[0]["load"] >= 3);
    site.kill(KILLED);
    by_server(&answers, requests);
    wait_until_known(site, &rest, ONCE);
    let counts = wait_for(site, &rest, ONCE, |_| true);
    let more = |name| sum(&counts, name) - sum(&before, name);
    assert_eq!(more("answered"), (requests.0 * requests.1) as u64);
    assert!(more("forwarded") > 0, "{counts:?}");
    println!("a dead one: {counts:?}");

    // The other group has seen nothing of all this but the end of a server.
    wait_until_known(site, &rest, TWICE);
    let requests = (6, 4);
    let answers = load(site, &rest, TWICE, requests, "");
    by_server(&answers, requests);
}

fn share(site: &mut dyn Site) {
    two_copies(site);
    a_slow_one(site);
    a_dead_one(site);
}

#[test]
fn four_processes_share_their_requests() {
    share(&mut Processes::start(&GROUPS));
}

#[test]
fn a_server_that_stands_still_holds_nobody_up() {
    let site = Processes::start(&SMALL);
    let all = [0, 1, 2, 3];
    wait_until_known(&site, &all, 0);
    site.signal(KILLED, "-STOP");
    let requests = (8, 60);
    let answers = load(&site, &[0], 0, requests, "?ms=0");
    by_server(&answers, requests);
    site.signal(KILLED, "-CONT");
    // Nobody has waited for it, and it goes on with what there is now.
    let counts = wait_for(&site, &[KILLED], 0, |counts| counts[0]["lost"] > 0);
    println!("one that stood still: {counts:?}");
    wait_until_known(&site, &all, 0);
}

#[test]
fn four_guests_share_their_requests() {
    let (Some(kechod), Some(server)) = (
        guests_program("kechod"),
        guests_program("examples/balance-server"),
    ) else {
        return;
    };
    let Some(xbed) = qemu() else { return };
    let mut guests = Guests::start(xbed, &kechod, &server);
    share(&mut guests);
    for guest in (0..SERVERS).filter(|guest| *guest != KILLED) {
        guests.kill(guest);
    }
}
