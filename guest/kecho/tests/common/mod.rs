//! Members of channels for tests, in this process and in processes of their own, that do what they are told in lines of text.
#![allow(
    dead_code,
    clippy::unwrap_used,
    missing_docs,
    reason = "each test takes what it needs; a panic is the report"
)]

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use xbee_kecho::{
    Address, Channel, ChannelOptions, Config, EventType, Node, Registry, RegistryConfig, Sink,
    SinkOptions, Source, Submission, Transports,
};

/// Longer than anything takes here.
pub const LONG: Duration = Duration::from_secs(60);
/// The name of the test that a process of its own runs, and of the variable that tells it what to be.
const PROCESS: &str = "process";
const TOLD: &str = "KECHO_PROCESS";

pub fn registry() -> Registry {
    registry_at("tcp:[::1]:0", false)
}

pub fn registry_at(address: &str, plaintext: bool) -> Registry {
    Registry::start(&RegistryConfig {
        listen: vec![address.parse().unwrap()],
        plaintext,
        ..RegistryConfig::default()
    })
    .unwrap()
}

/// `process`, `memory`, `tcp` or `all`.
fn transports(name: &str) -> Transports {
    Transports {
        same_process: ["process", "all"].contains(&name),
        shared_memory: ["memory", "all"].contains(&name),
        vsock: false,
        tcp: ["tcp", "all"].contains(&name),
    }
}

pub fn config(registry: &Address, ways: &str) -> Config {
    Config {
        registry: Some(registry.clone()),
        transports: transports(ways),
        directory: Some(std::env::temp_dir().join(format!("kecho-trials-{}", uid()))),
        plaintext: true,
        ..Config::default()
    }
}

pub fn uid() -> u32 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").unwrap().uid()
}

/// Waits for something that is only a question of time.
pub fn until(what: &str, mut yes: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !yes() {
        assert!(Instant::now() < deadline, "{what}: not after {LONG:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Chance that can be repeated: SplitMix64.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// From `KECHO_SEED`, or another each time; printed.
    pub fn seeded() -> Random {
        let seed = std::env::var("KECHO_SEED").map_or_else(
            |_| {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                u64::from(now.unwrap().subsec_nanos())
            },
            |seed| seed.parse().unwrap(),
        );
        println!("KECHO_SEED={seed}");
        Random(seed)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    pub fn chance(&mut self) -> bool {
        self.below(2) == 0
    }
}

/// Submits the n-th event of a source that has this tag.
pub fn submit(source: &Source, tag: u64, n: u64) {
    let kind = EventType::raw("numbered").unwrap();
    let mut payload = [0; 80];
    payload[..8].copy_from_slice(&tag.to_le_bytes());
    payload[8..16].copy_from_slice(&n.to_le_bytes());
    let event = Submission {
        kind: &kind,
        attributes: &[],
        payload: &payload[..16 + (n % 64) as usize],
    };
    source.submit(&event).unwrap();
}

/// What came, by the sources' tags: the number of the first event and the one after the last.
pub type Got = BTreeMap<u64, (u64, u64)>;

/// What a sink has seen.
#[derive(Debug, Default, Clone)]
pub struct Book {
    pub got: Got,
    /// What should not have been.
    pub wrong: Vec<String>,
    /// What the sink says that it has lost.
    pub dropped: u64,
}

impl Book {
    pub fn note(&mut self, payload: &[u8]) {
        let tag = u64::from_le_bytes(payload[..8].try_into().unwrap());
        let n = u64::from_le_bytes(payload[8..16].try_into().unwrap());
        let (_, next) = self.got.entry(tag).or_insert((n, n));
        if *next != n {
            self.wrong.push(format!("{n} instead of {next} of {tag}"));
        }
        *next = n + 1;
    }
}

/// A sink that is read by a thread.
pub struct Collector {
    book: Arc<Mutex<Book>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Sink>>,
}

impl Collector {
    pub fn start(sink: Sink) -> Collector {
        let (book, stop) = (
            Arc::new(Mutex::new(Book::default())),
            Arc::new(AtomicBool::new(false)),
        );
        let (to, stopped) = (book.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match sink.receive_timeout(Duration::from_millis(20)) {
                    Ok(Some(event)) => to.lock().unwrap().note(event.get().payload()),
                    Ok(None) => to.lock().unwrap().dropped = sink.counters().dropped,
                    Err(error) => {
                        to.lock().unwrap().wrong.push(error.to_string());
                        break;
                    }
                }
            }
            sink
        });
        Collector {
            book,
            stop,
            thread: Some(thread),
        }
    }

    pub fn book(&self) -> Book {
        self.book.lock().unwrap().clone()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join().unwrap());
        }
    }
}

/// A source whose events are numbered.
struct Publisher {
    source: Source,
    next: Arc<AtomicU64>,
    endless: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
}

/// A node in a channel.
pub struct Member {
    channel: Option<Channel>,
    publishers: HashMap<u64, Publisher>,
    collector: Option<Collector>,
    node: Node,
}

impl Member {
    pub fn start(config: Config) -> Member {
        Member {
            channel: None,
            publishers: HashMap::new(),
            collector: None,
            node: Node::start(config).unwrap(),
        }
    }

    /// Does what it is told, and says what is to be said of it.
    fn ask(&mut self, line: &str) -> Vec<String> {
        let mut words = line.split(' ');
        let command = words.next().unwrap();
        let mut number = || -> u64 { words.next().unwrap().parse().unwrap() };
        match command {
            "source" => {
                let source = self.channel.as_ref().unwrap().source().unwrap();
                let publisher = Publisher {
                    source,
                    next: Arc::default(),
                    endless: None,
                };
                self.publishers.insert(number(), publisher);
            }
            "burst" => {
                let tag = number();
                let publisher = &self.publishers[&tag];
                for _ in 0..number() {
                    let n = publisher.next.fetch_add(1, Ordering::SeqCst);
                    submit(&publisher.source, tag, n);
                }
            }
            "endless" => {
                let tag = number();
                let publisher = self.publishers.get_mut(&tag).unwrap();
                let (source, next) = (publisher.source.clone(), publisher.next.clone());
                let stop = Arc::new(AtomicBool::new(false));
                let stopped = stop.clone();
                let thread = std::thread::spawn(move || {
                    while !stopped.load(Ordering::Relaxed) {
                        for _ in 0..5 {
                            submit(&source, tag, next.load(Ordering::SeqCst));
                            next.fetch_add(1, Ordering::SeqCst);
                        }
                        std::thread::sleep(Duration::from_millis(2));
                    }
                });
                publisher.endless = Some((stop, thread));
            }
            "stop" => {
                let publisher = self.publishers.get_mut(&number()).unwrap();
                let (stop, thread) = publisher.endless.take().unwrap();
                stop.store(true, Ordering::Relaxed);
                thread.join().unwrap();
            }
            "total" => {
                let next = &self.publishers[&number()].next;
                return vec![next.load(Ordering::SeqCst).to_string()];
            }
            "sinks" => return vec![self.publishers[&number()].source.sinks().to_string()],
            "unsource" => drop(self.publishers.remove(&number()).unwrap()),
            "sink" => {
                let sink = self.channel.as_ref().unwrap();
                let sink = sink.sink(SinkOptions::default()).unwrap();
                self.collector = Some(Collector::start(sink));
            }
            "unsink" => drop(self.collector.take().unwrap()),
            "report" => {
                let book = self.collector.as_ref().unwrap().book();
                let got = book.got.into_iter();
                let got = got.map(|(tag, (first, next))| format!("{tag} {first} {next}"));
                let wrong = book.wrong.into_iter().map(|text| format!("wrong {text}"));
                let dropped = std::iter::once(format!("dropped {}", book.dropped));
                return got.chain(wrong).chain(dropped).collect();
            }
            "status" => {
                let name = words.next().unwrap();
                let own = self.node.address().node;
                let status = match self.node.status(name) {
                    Ok(status) => status,
                    Err(error) => return vec![format!("{own}: {error}")],
                };
                let nodes = status.nodes.iter();
                let nodes =
                    nodes.map(|n| format!("{} {} {:?}", n.address.node, n.sinks, n.sources));
                let head = format!("{own}: {} epoch {}", status.contact.node, status.epoch);
                return std::iter::once(head).chain(nodes).collect();
            }
            "descriptors" => {
                let count = std::fs::read_dir("/proc/self/fd").unwrap().count();
                return vec![count.to_string()];
            }
            // While there is nobody to ask now, too.
            "enter" => {
                let name = words.next().unwrap();
                let deadline = Instant::now() + LONG;
                self.channel = Some(loop {
                    let entered = self.node.open_or_create(name, ChannelOptions::default());
                    match entered {
                        Ok(channel) => break channel,
                        Err(error) => assert!(Instant::now() < deadline, "{error}"),
                    }
                });
            }
            "leave" => self.channel.take().unwrap().leave(),
            _ => {
                let name = words.next().unwrap();
                let options = ChannelOptions {
                    log_bytes: words.next().map(|bytes| bytes.parse().unwrap()),
                    ..ChannelOptions::default()
                };
                self.channel = Some(match command {
                    "create" => self.node.create(name, options).unwrap(),
                    "open" => self.node.open(name).unwrap(),
                    _ => panic!("{line}"),
                });
            }
        }
        Vec::new()
    }
}

/// A member in a process of its own.
pub struct Process {
    child: Child,
    lines: Receiver<String>,
}

impl Process {
    /// `before` comes before the program and its arguments: `ip netns exec x`, or nothing.
    pub fn start(before: &[&str], told: &str) -> Process {
        let this = std::env::current_exe().unwrap();
        let mut command = match before.split_first() {
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(this);
                command
            }
            None => Command::new(this),
        };
        let mut child = command
            .args(["--exact", PROCESS, "--nocapture", "--test-threads=1"])
            .env(TOLD, told)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let process = Process { child, lines };
        process.answer("to start");
        process
    }

    pub fn tell(&self, command: &str) {
        writeln!(self.child.stdin.as_ref().unwrap(), "{command}").unwrap();
    }

    /// What it says up to its `done`; `to` what, for the panic.
    pub fn answer(&self, to: &str) -> Vec<String> {
        let mut said = Vec::new();
        loop {
            let line = self.lines.recv_timeout(LONG);
            let line = line.unwrap_or_else(|error| panic!("no answer to '{to}': {error}"));
            // The test's harness has written something before.
            match line.trim().strip_prefix("= ") {
                Some(line) => said.push(line.to_owned()),
                None if line.trim().ends_with("done") => return said,
                None => {}
            }
        }
    }

    pub fn ask(&self, command: &str) -> Vec<String> {
        self.tell(command);
        self.answer(command)
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Has it shut its node down.
    pub fn quit(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a [`Process`] runs: `registry ADDRESS`, or a member: `HEARTBEAT DEAD REGISTRY WAYS`, times in milliseconds.
pub fn process() {
    let Ok(told) = std::env::var(TOLD) else {
        return;
    };
    let words: Vec<&str> = told.split(' ').collect();
    if let ["registry", address] = words[..] {
        let _registry = registry_at(address, true);
        println!("done");
        // Until the other end is closed.
        std::io::stdin().lines().for_each(drop);
        return;
    }
    let [heartbeat, dead, registry, ways] = words[..] else {
        panic!("{told}")
    };
    let milliseconds = |text: &str| Duration::from_millis(text.parse().unwrap());
    let mut member = Member::start(Config {
        heartbeat: milliseconds(heartbeat),
        dead_after: milliseconds(dead),
        ..config(&registry.parse().unwrap(), ways)
    });
    println!("done");
    for line in std::io::stdin().lines() {
        for line in member.ask(&line.unwrap()) {
            println!("= {line}");
        }
        println!("done");
    }
}

/// A member, wherever it is.
pub enum Peer {
    Here(Box<Member>),
    Process(Process),
}

impl Peer {
    pub fn here(registry: &Registry, ways: &str) -> Peer {
        Peer::Here(Box::new(Member::start(config(
            &registry.addresses()[0],
            ways,
        ))))
    }

    pub fn process(registry: &Registry, ways: &str) -> Peer {
        let told = format!("2000 10000 {} {ways}", registry.addresses()[0]);
        Peer::Process(Process::start(&[], &told))
    }

    pub fn ask(&mut self, command: &str) -> Vec<String> {
        match self {
            Peer::Here(member) => member.ask(command),
            Peer::Process(process) => process.ask(command),
        }
    }

    /// Has it shut its node down.
    pub fn quit(self) {
        if let Peer::Process(process) = self {
            process.quit();
        }
    }

    pub fn number(&mut self, command: &str) -> u64 {
        self.ask(command)[0].parse().unwrap()
    }

    pub fn report(&mut self) -> Book {
        let mut book = Book::default();
        for line in self.ask("report") {
            if let Some(text) = line.strip_prefix("wrong ") {
                book.wrong.push(text.to_owned());
                continue;
            }
            if let Some(count) = line.strip_prefix("dropped ") {
                book.dropped = count.parse().unwrap();
                continue;
            }
            let numbers: Vec<u64> = line.split(' ').map(|n| n.parse().unwrap()).collect();
            book.got.insert(numbers[0], (numbers[1], numbers[2]));
        }
        book
    }

    /// Waits until all these events have come.
    pub fn expect(&mut self, who: &str, expected: &Got) {
        let mut last = Book::default();
        let deadline = Instant::now() + LONG;
        loop {
            let book = self.report();
            assert!(book.wrong.is_empty(), "{who}: {:?}", book.wrong);
            let there = |tag: &u64| book.got.get(tag) == expected.get(tag);
            if expected.keys().all(there) {
                return;
            }
            if Instant::now() > deadline {
                let missing = expected.iter().filter(|(tag, _)| !there(tag));
                let missing: Vec<_> = missing.map(|(t, e)| (t, e, last.got.get(t))).collect();
                panic!("{who} (tag, expected, got): {missing:?}");
            }
            last = book;
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
