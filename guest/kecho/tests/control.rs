//! Who is in a channel: joining and leaving, and what dies or is cut off meanwhile.

#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use xbee_kecho::{
    Address, Channel, ChannelOptions, Config, EventType, Node, Registry, RegistryConfig, Sink,
    SinkOptions, Source, Submission, TlsFiles, Transports, Value,
};

/// Longer than anything takes here.
const LONG: Duration = Duration::from_secs(30);

fn registry() -> Registry {
    registry_at("tcp:[::1]:0")
}

fn registry_at(address: &str) -> Registry {
    let listen = vec![address.parse().unwrap()];
    Registry::start(&RegistryConfig {
        listen,
        ..RegistryConfig::default()
    })
    .unwrap()
}

const PROCESS: Transports = Transports {
    same_process: true,
    shared_memory: false,
    vsock: false,
    tcp: false,
};
const MEMORY: Transports = Transports {
    same_process: false,
    shared_memory: true,
    vsock: false,
    tcp: false,
};
const TCP: Transports = Transports {
    same_process: false,
    shared_memory: false,
    vsock: false,
    tcp: true,
};
const ALL: Transports = Transports {
    same_process: true,
    shared_memory: true,
    vsock: false,
    tcp: true,
};

fn config(registry: &Address, transports: Transports) -> Config {
    Config {
        registry: Some(registry.clone()),
        transports,
        directory: Some(std::env::temp_dir().join(format!("kecho-test-{}", rustix_uid()))),
        ..Config::default()
    }
}

fn rustix_uid() -> u32 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").unwrap().uid()
}

fn node(registry: &Registry, transports: Transports) -> Node {
    Node::start(config(&registry.addresses()[0], transports)).unwrap()
}

fn send(source: &Source, text: &str) {
    let kind = EventType::raw("text").unwrap();
    let event = Submission {
        kind: &kind,
        attributes: &[("text", Value::from(text))],
        payload: &[],
    };
    source.submit(&event).unwrap();
}

fn next(sink: &Sink) -> String {
    let event = sink.receive_timeout(LONG).unwrap().expect("no event came");
    match event.get().attribute("text").unwrap().to_value() {
        Value::Text(text) => text,
        other => panic!("{other:?}"),
    }
}

/// Waits for something that is only a question of time.
fn until(what: &str, mut yes: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !yes() {
        assert!(Instant::now() < deadline, "{what}: not after {LONG:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn sink(channel: &Channel) -> Sink {
    channel.sink(SinkOptions::default()).unwrap()
}

fn events_pass(transports: Transports) {
    let registry = registry();
    let [a, b, c] = [0; 3].map(|_| node(&registry, transports));
    let first = a.create("news", ChannelOptions::default()).unwrap();
    let early = sink(&first);
    let second = b.open("news").unwrap();
    let source = second.source().unwrap();
    assert_eq!(source.sinks(), 1);
    send(&source, "one");
    let late = sink(&c.open("news").unwrap());
    assert_eq!(source.sinks(), 2);
    send(&source, "two");
    assert_eq!([next(&early), next(&early)], ["one", "two"]);
    assert_eq!(next(&late), "two");
    drop(late);
    until("the sink that was dropped is gone", || source.sinks() == 1);
    send(&source, "three");
    assert_eq!(next(&early), "three");
    first.leave();
    until("the sink is gone whose channel was left", || {
        source.sinks() == 0
    });
}

#[test]
fn a_sink_of_a_node_that_is_shut_down_has_ended() {
    let registry = registry();
    let node = node(&registry, ALL);
    let sink = sink(&node.create("x", ChannelOptions::default()).unwrap());
    let waits = std::thread::spawn(move || sink.receive_timeout(LONG).map(|event| event.is_some()));
    node.shutdown();
    let error = waits.join().unwrap().unwrap_err();
    assert_eq!(error.code(), "channel-destroyed");
}

#[test]
fn who_cannot_reach_the_registry_says_why() {
    let nobody = std::net::TcpListener::bind("[::1]:0").unwrap();
    let address = format!("tcp:{}", nobody.local_addr().unwrap());
    drop(nobody);
    let node = Node::start(config(&address.parse().unwrap(), TCP)).unwrap();
    let error = node.create("x", ChannelOptions::default()).unwrap_err();
    assert_eq!(error.code(), "registry-unreachable");
    assert!(error.to_string().contains("refused"), "{error}");
}

#[test]
fn events_pass_within_a_process() {
    events_pass(PROCESS);
}

#[test]
fn events_pass_through_shared_memory() {
    events_pass(MEMORY);
}

#[test]
fn events_pass_over_tcp() {
    events_pass(TCP);
}

#[test]
fn a_sink_in_the_sources_own_node() {
    let registry = registry();
    let node = node(&registry, ALL);
    let channel = node.create("own", ChannelOptions::default()).unwrap();
    let sink = sink(&channel);
    let source = node.open("own").unwrap().source().unwrap();
    send(&source, "here");
    assert_eq!(next(&sink), "here");
}

#[test]
fn a_name_is_one_channels() {
    let registry = registry();
    let [a, b] = [0; 2].map(|_| node(&registry, ALL));
    let code = |result: Result<Channel, xbee_kecho::Error>| result.unwrap_err().code().to_owned();
    assert_eq!(code(b.open("x")), "no-such-channel");
    assert_eq!(
        code(b.create("a b", ChannelOptions::default())),
        "channel-name"
    );
    let channel = a.create("x", ChannelOptions::default()).unwrap();
    assert_eq!(
        code(a.create("x", ChannelOptions::default())),
        "channel-exists"
    );
    assert_eq!(
        code(b.create("x", ChannelOptions::default())),
        "channel-exists"
    );
    assert_eq!(b.channels().unwrap(), ["x"]);
    let other = b.open_or_create("x", ChannelOptions::default()).unwrap();
    channel.destroy().unwrap();
    until("the other node hears of it", || other.source().is_err());
    assert_eq!(other.source().unwrap_err().code(), "channel-destroyed");
    b.create("x", ChannelOptions::default()).unwrap();
}

#[test]
fn without_a_registry_a_channel_is_found_at_a_node() {
    let registry = registry();
    let bare = || {
        let config = config(&registry.addresses()[0], ALL);
        Node::start(Config {
            registry: None,
            ..config
        })
        .unwrap()
    };
    let [a, b] = [bare(), bare()];
    let channel = a.create("x", ChannelOptions::default()).unwrap();
    let source = channel.source().unwrap();
    let sink = sink(&b.open_at("x", a.address()).unwrap());
    send(&source, "found");
    assert_eq!(next(&sink), "found");
    assert_eq!(
        b.open_at("y", a.address()).unwrap_err().code(),
        "no-such-channel"
    );
}

#[test]
fn a_filter_that_is_none_is_refused() {
    let registry = registry();
    let channel = node(&registry, ALL)
        .create("x", ChannelOptions::default())
        .unwrap();
    let options = SinkOptions {
        filter: Some("load <".to_owned()),
        ..SinkOptions::default()
    };
    let error = channel.sink(options).unwrap_err();
    assert!(error.code().starts_with("filter-"), "{error}");
}

#[test]
fn the_creator_leaves_and_the_others_stay() {
    let registry = registry();
    let [a, b, c, d] = [0; 4].map(|_| node(&registry, MEMORY));
    let first = a.create("x", ChannelOptions::default()).unwrap();
    let source = b.open("x").unwrap().source().unwrap();
    let here = sink(&c.open("x").unwrap());
    first.leave();
    send(&source, "one");
    assert_eq!(next(&here), "one");
    let new = sink(&d.open("x").unwrap());
    send(&source, "two");
    assert_eq!([next(&here), next(&new)], ["two", "two"]);
    // Nobody is there any more who could say that it exists.
    drop((source, here, new));
    // If the last two leave at once, the name is free when the registry's lease is over.
    until("the name is free again", || {
        a.create("x", ChannelOptions::default()).is_ok()
    });
}

#[test]
fn a_registry_that_is_started_anew_hears_of_all_channels() {
    let port = TcpListener::bind("[::1]:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let address = format!("tcp:[::1]:{port}");
    let registry = registry_at(&address);
    let [a, b] = [0; 2].map(|_| node(&registry, ALL));
    let channel = a.create("x", ChannelOptions::default()).unwrap();
    let source = channel.source().unwrap();
    drop(registry);
    let registry = registry_at(&address);
    // At once: it waits until the contact has registered again.
    let sink = sink(&b.open("x").unwrap());
    send(&source, "still here");
    assert_eq!(next(&sink), "still here");
    assert_eq!(b.open("y").unwrap_err().code(), "no-such-channel");
    drop(registry);
    // Without any, what is there goes on.
    send(&source, "alone");
    assert_eq!(next(&sink), "alone");
}

/// A process with a node, which does what it is told on its standard input.
struct Process {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Process {
    fn start(registry: &Registry, transports: &str) -> Process {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process", "--nocapture", "--test-threads=1"])
            .env(
                "KECHO_PROCESS",
                format!("{} {transports}", registry.addresses()[0]),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut process = Process { child, output };
        process.wait("started");
        process
    }

    /// Reads lines up to this one.
    fn wait(&mut self, expected: &str) {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(
                self.output.read_line(&mut line).unwrap(),
                0,
                "no '{expected}'"
            );
            // The test's harness has written something before.
            if line.trim().ends_with(expected) {
                return;
            }
        }
    }

    fn tell(&mut self, command: &str) {
        writeln!(self.child.stdin.as_ref().unwrap(), "{command}").unwrap();
    }

    /// Has something done.
    fn ask(&mut self, command: &str) {
        self.tell(command);
        self.wait("done");
    }

    fn signal(&self, signal: &str) {
        let id = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &id])
                .status()
                .unwrap()
                .success()
        );
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// What a [`Process`] runs.
#[test]
fn process() {
    let Ok(told) = std::env::var("KECHO_PROCESS") else {
        return;
    };
    let (registry, transports) = told.split_once(' ').unwrap();
    let transports = match transports {
        "memory" => MEMORY,
        _ => TCP,
    };
    let mut config = config(&registry.parse().unwrap(), transports);
    config.heartbeat = Duration::from_millis(100);
    config.dead_after = Duration::from_millis(500);
    let node = Node::start(config).unwrap();
    println!("started");
    let mut channel = None;
    let mut source = None;
    let mut here = None;
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (command, argument) = line.split_once(' ').unwrap_or((&line, ""));
        match command {
            "create" => channel = Some(node.create(argument, ChannelOptions::default()).unwrap()),
            "open" => channel = Some(node.open(argument).unwrap()),
            "source" => source = Some(channel.as_ref().unwrap().source().unwrap()),
            "sink" => here = Some(sink(channel.as_ref().unwrap())),
            "send" => send(source.as_ref().unwrap(), argument),
            "expect" => loop {
                if next(here.as_ref().unwrap()) == argument {
                    break;
                }
            },
            _ => panic!("{line}"),
        }
        println!("done");
    }
}

fn impatient(registry: &Registry, transports: Transports) -> Node {
    Node::start(Config {
        heartbeat: Duration::from_millis(100),
        dead_after: Duration::from_millis(500),
        ..config(&registry.addresses()[0], transports)
    })
    .unwrap()
}

fn contact_dies(transports: Transports, name: &str) {
    let registry = registry();
    let mut contact = Process::start(&registry, name);
    contact.ask("create x");
    let [b, c, d] = [0; 3].map(|_| node(&registry, transports));
    let source = b.open("x").unwrap().source().unwrap();
    let here = sink(&c.open("x").unwrap());
    contact.ask("sink");
    assert_eq!(source.sinks(), 2);
    contact.signal("-KILL");
    for number in 0..100 {
        send(&source, &number.to_string());
        std::thread::sleep(Duration::from_millis(1));
    }
    let got: Vec<String> = (0..100).map(|_| next(&here)).collect();
    assert_eq!(
        got,
        (0..100)
            .map(|number| number.to_string())
            .collect::<Vec<_>>()
    );
    let new = sink(&d.open("x").unwrap());
    send(&source, "with another contact");
    assert_eq!(next(&new), "with another contact");
    assert_eq!(next(&here), "with another contact");
    until("the dead sink is gone", || source.sinks() == 2);
}

#[test]
fn the_contact_is_killed_beside_shared_memory() {
    contact_dies(MEMORY, "memory");
}

#[test]
fn the_contact_is_killed_behind_tcp() {
    contact_dies(TCP, "tcp");
}

#[test]
fn a_participant_is_killed() {
    let registry = registry();
    let a = node(&registry, MEMORY);
    let channel = a.create("x", ChannelOptions::default()).unwrap();
    let here = sink(&channel);
    let source = channel.source().unwrap();
    let mut other = Process::start(&registry, "memory");
    other.ask("open x");
    other.ask("source");
    other.ask("sink");
    assert_eq!(source.sinks(), 2);
    other.ask("send last words");
    other.signal("-KILL");
    assert_eq!(next(&here), "last words");
    until("it is gone", || a.status("x").unwrap().nodes.len() == 1);
    send(&source, "to those who are left");
    assert_eq!(next(&here), "to those who are left");
}

#[test]
fn two_contacts_become_one() {
    let registry = registry();
    // The contact sleeps so long that another takes over, and wakes up again.
    let mut sleeper = Process::start(&registry, "tcp");
    sleeper.ask("create x");
    sleeper.ask("source");
    let [b, c] = [0; 2].map(|_| impatient(&registry, TCP));
    let channel = b.open("x").unwrap();
    let source = channel.source().unwrap();
    let here = sink(&c.open("x").unwrap());
    sleeper.ask("sink");
    assert_eq!(source.sinks(), 2);
    sleeper.signal("-STOP");
    until("another takes over, and who sleeps is gone", || {
        b.status("x")
            .is_ok_and(|x| x.epoch == 2 && x.nodes.len() == 2)
    });
    send(&source, "while it slept");
    assert_eq!(next(&here), "while it slept");
    sleeper.signal("-CONT");
    until("it is back", || source.sinks() == 2);
    send(&source, "to both");
    assert_eq!(next(&here), "to both");
    sleeper.ask("expect to both");
    sleeper.ask("send from there");
    assert_eq!(next(&here), "from there");
}

/// An authority and certificates of it, in files.
struct Authority {
    directory: tempfile::TempDir,
    key: rcgen::KeyPair,
}

impl Authority {
    fn new() -> Authority {
        let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca"), certificate.pem()).unwrap();
        Authority { directory, key }
    }

    /// A certificate of this authority, which trusts those of another.
    fn files(&self, name: &str, trusts: &Authority) -> TlsFiles {
        let parameters = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let issuer = rcgen::CertificateParams::new(Vec::new()).unwrap();
        let issuer = rcgen::Issuer::new(issuer, &self.key);
        let certificate = parameters.signed_by(&key, &issuer).unwrap();
        let path = |what: &str| self.directory.path().join(format!("{name}.{what}"));
        std::fs::write(path("crt"), certificate.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        TlsFiles {
            ca: trusts.directory.path().join("ca"),
            certificate: path("crt"),
            key: path("key"),
            crl: None,
        }
    }
}

#[test]
fn with_tls_only_those_with_a_certificate_get_in() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let strict = |files: Option<TlsFiles>| RegistryConfig {
        listen: vec!["tcp:[::1]:0".parse().unwrap()],
        tls: files,
        strict: true,
        ..RegistryConfig::default()
    };
    let registry = Registry::start(&strict(Some(ours.files("registry", &ours)))).unwrap();
    let start = |files: Option<TlsFiles>| {
        let config = config(&registry.addresses()[0], TCP);
        Node::start(Config {
            tls: files,
            strict: true,
            ..config
        })
        .unwrap()
    };
    let [a, b] = ["a", "b"].map(|name| start(Some(ours.files(name, &ours))));
    let channel = a.create("secret", ChannelOptions::default()).unwrap();
    let source = channel.source().unwrap();
    let here = sink(&b.open("secret").unwrap());
    for number in 0..1000 {
        send(&source, &number.to_string());
    }
    for number in 0..1000 {
        assert_eq!(next(&here), number.to_string());
    }
    // Of another authority; trusting this one only; with nothing at all.
    for files in [
        Some(theirs.files("x", &ours)),
        Some(ours.files("y", &theirs)),
        None,
    ] {
        let stranger = start(files);
        let error = stranger.open_at("secret", a.address()).unwrap_err();
        assert_eq!(error.code(), "no-contact", "{error}");
    }
    assert_eq!(source.sinks(), 1);
    let stranger = start(Some(theirs.files("z", &ours)));
    let error = stranger
        .create("mine", ChannelOptions::default())
        .unwrap_err();
    assert_eq!(error.code(), "registry-unreachable");
    println!("{error}");
}

#[test]
fn what_is_no_frame_ends_a_connection_and_nothing_else() {
    use std::io::Read;
    let registry = registry();
    let [a, b] = [0; 2].map(|_| node(&registry, TCP));
    let channel = a.create("x", ChannelOptions::default()).unwrap();
    let source = channel.source().unwrap();
    let mut doors = vec![registry.addresses()[0].clone()];
    doors.extend(a.address().endpoints.iter().cloned());
    let garbage: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[0; 64],
        &[0xff; 64],
        &[0x16; 64],
        &[0, 0, 0, 1, 0x80],
    ];
    for door in doors {
        let Address::Tcp(door) = door else { continue };
        for bytes in garbage {
            let mut stream = std::net::TcpStream::connect(door).unwrap();
            stream.write_all(bytes).unwrap();
            // It may have been closed already.
            let _ = stream.shutdown(std::net::Shutdown::Write);
            // Closed, whether cleanly or not.
            let _ = stream.read_to_end(&mut Vec::new());
        }
    }
    let here = sink(&b.open("x").unwrap());
    send(&source, "unharmed");
    assert_eq!(next(&here), "unharmed");
}
