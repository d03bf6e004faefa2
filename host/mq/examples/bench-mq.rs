//! `make bench-mq`: the embedded broker against RabbitMQ and ActiveMQ.
//!
//! `bench all [RESULTS]` starts each broker in turn, round by round, and puts the section Message queue into RESULTS.
//! `bench broker [DATA]` is the embedded broker, in a process of its own. What is measured of each: a producer that has
//! [`WINDOW`] receipts outstanding and a consumer that takes all, and then a producer that waits for each receipt.
//!
//! What counts is the ratio of the medians; the machine may be noisy.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a benchmark that cannot measure ends"
)]

use std::fmt::Write as _;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process_group};
use xbee_mq::config::Config;
use xbee_mq::server::Server;

/// Rounds of the comparison.
const ROUNDS: usize = 3;
/// Bytes of a message.
const BODY_BYTES: usize = 1024;
/// Receipts that the quick producer has outstanding.
const WINDOW: u64 = 512;
/// How long each is loaded.
const TIME: Duration = Duration::from_secs(4);
/// How long each has to come up or answer.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ours,
    RabbitMq,
    ActiveMq,
}

const KINDS: [Kind; 3] = [Kind::Ours, Kind::RabbitMq, Kind::ActiveMq];

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Ours => "embedded",
            Kind::RabbitMq => "RabbitMQ",
            Kind::ActiveMq => "ActiveMQ",
        }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["all"] => all(),
        ["broker", address] => broker(address, None),
        ["broker", address, data] => broker(address, Some(data.into())),
        _ => {
            eprintln!("usage: bench all | bench broker ADDRESS [DATA]");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn broker(address: &str, data: Option<PathBuf>) {
    let mut config = Config::new(address.parse().unwrap());
    config.data = data;
    let server = Server::open(config).unwrap();
    server.run(std::future::pending()).unwrap();
}

/// A broker that runs, in processes of its own group.
struct Running {
    process: Child,
    address: SocketAddr,
    listening_ms: f64,
    /// Ends what the broker leaves behind.
    after: Option<Command>,
}

impl Running {
    fn start(kind: Kind, directory: &Path) -> Running {
        use std::os::unix::process::CommandExt as _;
        fs::create_dir_all(directory).unwrap();
        let directory = fs::canonicalize(directory).unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut after = None;
        let mut command = match kind {
            Kind::Ours => {
                // Another program than this one's own, if it is named: `xbed broker` as it is installed.
                match std::env::var_os("XBEE_BENCH_XBED") {
                    Some(xbed) => {
                        let mut command = Command::new(xbed);
                        command.args(["broker", "--listen", &address.to_string(), "--data"]);
                        command.arg(&directory);
                        command
                    }
                    None => {
                        let mut command = Command::new(std::env::current_exe().unwrap());
                        command
                            .args(["broker", &address.to_string()])
                            .arg(&directory);
                        command
                    }
                }
            }
            Kind::RabbitMq => {
                let (command, end) = rabbitmq(address.port(), &directory);
                after = Some(end);
                command
            }
            Kind::ActiveMq => activemq(address.port(), &directory),
        };
        let log = fs::File::create(directory.join("log")).unwrap();
        let started = Instant::now();
        let process = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut running = Running {
            process,
            address,
            listening_ms: 0.0,
            after,
        };
        while TcpStream::connect(address).is_err() {
            assert!(
                started.elapsed() < PATIENCE,
                "{} does not come up",
                kind.name()
            );
            assert!(
                running.process.try_wait().unwrap().is_none(),
                "{} has ended",
                kind.name()
            );
            std::thread::sleep(Duration::from_micros(500));
        }
        running.listening_ms = started.elapsed().as_secs_f64() * 1000.0;
        running
    }

    /// Resident memory of all its processes, in KiB.
    fn resident_kib(&self) -> u64 {
        let group = self.process.id().to_string();
        let processes = said("pgrep", &["-d", ",", "-g", &group]);
        let text = said("ps", &["-o", "rss=", "-p", &processes]);
        let kib = text.split_whitespace().map(|n| n.parse::<u64>().unwrap());
        kib.sum()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(group) = rustix::process::Pid::from_raw(self.process.id() as i32) else {
            return;
        };
        let _ = kill_process_group(group, Signal::TERM);
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until && self.process.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(20));
        }
        // Nothing, if all have ended.
        let _ = kill_process_group(group, Signal::KILL);
        let _ = self.process.wait();
        if let Some(mut after) = self.after.take() {
            let _ = after.stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// RabbitMQ of Debian with the plugin rabbitmq_stomp, and what ends its port mapper.
fn rabbitmq(port: u16, directory: &Path) -> (Command, Command) {
    let (amqp, distribution, mapper) = (free_port(), free_port(), free_port());
    let config =
        format!("listeners.tcp.1 = 127.0.0.1:{amqp}\nstomp.listeners.tcp.1 = 127.0.0.1:{port}\n");
    fs::write(directory.join("rabbitmq.conf"), config).unwrap();
    fs::write(directory.join("plugins"), "[rabbitmq_stomp].\n").unwrap();
    let mut command = Command::new("/usr/lib/rabbitmq/bin/rabbitmq-server");
    command
        .env("HOME", directory)
        .env("RABBITMQ_NODENAME", "bench@localhost")
        .env("RABBITMQ_MNESIA_BASE", directory.join("mnesia"))
        .env("RABBITMQ_LOG_BASE", directory.join("logs"))
        .env("RABBITMQ_PID_FILE", directory.join("pid"))
        .env("RABBITMQ_CONFIG_FILE", directory.join("rabbitmq.conf"))
        .env("RABBITMQ_ENABLED_PLUGINS_FILE", directory.join("plugins"))
        .env("RABBITMQ_DIST_PORT", distribution.to_string())
        .env(
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
            "-kernel inet_dist_use_interface {127,0,0,1}",
        )
        .env("ERL_EPMD_ADDRESS", "127.0.0.1")
        .env("ERL_EPMD_PORT", mapper.to_string());
    let mut end = Command::new("epmd");
    end.args(["-port", &mapper.to_string(), "-kill"]);
    (command, end)
}

/// ActiveMQ of Debian with KahaDB and one connector.
fn activemq(port: u16, directory: &Path) -> Command {
    let data = directory.display();
    let config = format!(
        r#"<beans xmlns="http://www.springframework.org/schema/beans" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
  xsi:schemaLocation="http://www.springframework.org/schema/beans http://www.springframework.org/schema/beans/spring-beans.xsd http://activemq.apache.org/schema/core http://activemq.apache.org/schema/core/activemq-core.xsd">
  <broker xmlns="http://activemq.apache.org/schema/core" brokerName="bench" dataDirectory="{data}" useJmx="false" schedulerSupport="false">
    <persistenceAdapter><kahaDB directory="{data}/kahadb"/></persistenceAdapter>
    <transportConnectors><transportConnector name="stomp" uri="stomp+nio://127.0.0.1:{port}"/></transportConnectors>
  </broker>
</beans>
"#
    );
    let path = directory.join("activemq.xml");
    fs::write(&path, config).unwrap();
    let mut command = Command::new("java");
    command
        .args([
            "-Xms64M",
            "-Xmx512M",
            "-Djava.util.logging.config.file=/dev/null",
        ])
        .arg(format!("-Dactivemq.data={data}"))
        .args([
            "-Dactivemq.home=/usr/share/activemq",
            "-Dactivemq.base=/usr/share/activemq",
        ])
        .arg(format!("-Djava.io.tmpdir={data}"))
        .args(["-jar", "/usr/share/activemq/bin/activemq.jar", "start"])
        .arg(format!("xbean:file:{}", path.display()));
    command
}

fn connect(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let connect = "CONNECT\naccept-version:1.2\nhost:/\nlogin:guest\npasscode:guest\n\n\0";
    stream.write_all(connect.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\0") {
        stream.read_exact(&mut byte).unwrap();
        answer.push(byte[0]);
    }
    assert!(
        answer.trim_ascii_start().starts_with(b"CONNECTED"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
    stream
}

fn message(queue: &str, persistent: bool, receipt: u64, out: &mut Vec<u8>) {
    // "persistent:false" is what all do without it, but to RabbitMQ it says that the queue is another one.
    let persistent = if persistent { "persistent:true\n" } else { "" };
    write!(
        out,
        "SEND\ndestination:{queue}\n{persistent}receipt:{receipt}\ncontent-length:{BODY_BYTES}\n\n"
    )
    .unwrap();
    out.resize(out.len() + BODY_BYTES, b'x');
    out.push(0);
}

/// Frames that end in what is read next: none of them has a NUL within.
fn frames(stream: &mut TcpStream, buffer: &mut [u8]) -> u64 {
    let count = stream.read(buffer).unwrap();
    assert_ne!(count, 0, "the broker has closed the connection");
    let text = &buffer[..count];
    assert!(
        !text.starts_with(b"ERROR"),
        "{}",
        String::from_utf8_lossy(text)
    );
    memchr::memchr_iter(0, text).count() as u64
}

/// Subscribes to a queue, before anybody sends to it: RabbitMQ may refuse one of two that make it at the same time.
fn subscribe(address: SocketAddr, queue: &str) -> TcpStream {
    let mut stream = connect(address);
    let subscribe = format!(
        "SUBSCRIBE\nid:1\nreceipt:1\ndestination:{queue}\nack:auto\nactivemq.prefetchSize:1000\n\n\0"
    );
    stream.write_all(subscribe.as_bytes()).unwrap();
    // Before the receipt there may be an end of line after the last frame.
    while frames(&mut stream, &mut [0; 1024]) == 0 {}
    stream
}

/// Takes all messages, and counts them.
fn consume(mut stream: TcpStream, stop: Arc<AtomicBool>, taken: Arc<AtomicU64>) {
    stream
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let mut buffer = vec![0; 256 * 1024];
    while !stop.load(Ordering::Relaxed) {
        match stream.read(&mut buffer) {
            Ok(count) => {
                assert_ne!(count, 0, "the broker has closed the consumer's connection");
                let count = memchr::memchr_iter(0, &buffer[..count]).count();
                taken.fetch_add(count as u64, Ordering::Relaxed);
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => panic!("{error}"),
        }
    }
    let _ = stream.write_all(b"DISCONNECT\n\n\0");
}

/// Messages a second, and the median time to a receipt in microseconds.
fn load(address: SocketAddr, persistent: bool) -> (f64, f64) {
    let queue = format!("/queue/bench-{persistent}");
    let stop = Arc::new(AtomicBool::new(false));
    let taken = Arc::new(AtomicU64::new(0));
    let consumer = {
        let stream = subscribe(address, &queue);
        let (stop, taken) = (stop.clone(), taken.clone());
        std::thread::spawn(move || consume(stream, stop, taken))
    };
    let mut stream = connect(address);
    let mut buffer = vec![0; 64 * 1024];
    let mut out = Vec::new();
    let (mut sent, mut answered) = (0, 0);
    let wait_for = |count: u64| {
        let until = Instant::now() + PATIENCE;
        while taken.load(Ordering::Relaxed) < count {
            assert!(Instant::now() < until, "messages are missing");
            std::thread::sleep(Duration::from_micros(200));
        }
    };

    let started = Instant::now();
    while started.elapsed() < TIME {
        out.clear();
        while sent - answered < WINDOW {
            message(&queue, persistent, sent, &mut out);
            sent += 1;
        }
        stream.write_all(&out).unwrap();
        while sent - answered > WINDOW / 2 {
            answered += frames(&mut stream, &mut buffer);
        }
    }
    while answered < sent {
        answered += frames(&mut stream, &mut buffer);
    }
    wait_for(sent);
    let rate = sent as f64 / started.elapsed().as_secs_f64();

    let mut times = Vec::new();
    let started = Instant::now();
    while started.elapsed() < TIME / 2 {
        out.clear();
        message(&queue, persistent, sent, &mut out);
        sent += 1;
        let begin = Instant::now();
        stream.write_all(&out).unwrap();
        let mut missing = 1;
        while missing > 0 {
            missing -= frames(&mut stream, &mut buffer);
        }
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    wait_for(sent);
    stop.store(true, Ordering::Relaxed);
    consumer.join().unwrap();
    let _ = stream.write_all(b"DISCONNECT\n\n\0");
    (rate, median(times))
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// All rounds of one broker.
#[derive(Default)]
struct Runs {
    listening_ms: Vec<f64>,
    resident_kib: Vec<f64>,
    idle_kib: Vec<f64>,
    rate: [Vec<f64>; 2],
    p50_us: [Vec<f64>; 2],
}

fn all() {
    let directory = std::env::var_os("XBEE_BENCH_DIR")
        .map_or_else(|| PathBuf::from("target/bench-mq"), PathBuf::from);
    let rounds = std::env::var("XBEE_BENCH_ROUNDS")
        .map_or(ROUNDS, |n| n.parse().expect("a number of rounds"));
    let there = |kind: &Kind| match kind {
        Kind::Ours => true,
        Kind::RabbitMq => Path::new("/usr/lib/rabbitmq/bin/rabbitmq-server").exists(),
        Kind::ActiveMq => Path::new("/usr/share/activemq/bin/activemq.jar").exists(),
    };
    let kinds: Vec<Kind> = KINDS.into_iter().filter(there).collect();
    let load_before = fs::read_to_string("/proc/loadavg").unwrap();
    let mut runs: Vec<Runs> = kinds.iter().map(|_| Runs::default()).collect();
    for round in 0..rounds {
        for (kind, runs) in kinds.iter().zip(&mut runs) {
            let home = directory.join(kind.name());
            if home.exists() {
                fs::remove_dir_all(&home).unwrap();
            }
            let running = Running::start(*kind, &home);
            runs.listening_ms.push(running.listening_ms);
            // What an emulated machine needs at first is nobody's normal state.
            std::thread::sleep(Duration::from_secs(1));
            runs.idle_kib.push(running.resident_kib() as f64);
            for (at, persistent) in [false, true].into_iter().enumerate() {
                let (rate, p50_us) = load(running.address, persistent);
                eprintln!(
                    "round {round}, {}, {}: {rate:.0}/s, p50 {p50_us:.0} us, {} KiB",
                    kind.name(),
                    if persistent {
                        "persistent"
                    } else {
                        "transient"
                    },
                    running.resident_kib()
                );
                runs.rate[at].push(rate);
                runs.p50_us[at].push(p50_us);
            }
            runs.resident_kib.push(running.resident_kib() as f64);
        }
    }
    let section = section(&kinds, runs, rounds, &load_before);
    print!("{section}");
}

fn section(kinds: &[Kind], runs: Vec<Runs>, rounds: usize, load_before: &str) -> String {
    let medians: Vec<[f64; 7]> = runs
        .into_iter()
        .map(|runs| {
            let [rate, rate_persistent] = runs.rate;
            let [p50, p50_persistent] = runs.p50_us;
            [
                median(rate),
                median(p50),
                median(rate_persistent),
                median(p50_persistent),
                median(runs.listening_ms),
                median(runs.idle_kib) / 1024.0,
                median(runs.resident_kib) / 1024.0,
            ]
        })
        .collect();
    let load = |text: &str| {
        text.split_whitespace()
            .take(3)
            .collect::<Vec<_>>()
            .join(" ")
    };
    let mut text = format!(
        "## Message queue\n\nBy `make bench-mq`, {}: messages of {BODY_BYTES} bytes over STOMP 1.2 on loopback, each with a receipt; \
         one producer with {WINDOW} receipts outstanding and one consumer (rate), then one receipt at a time (p50). \
         Each broker alone, in turn, medians of {rounds} rounds, on {} × {}, which the load generator shares; load before and after: {}, {}.\n\n\
         | broker | transient, messages/s | p50, µs | persistent, messages/s | p50, µs | listening after, ms | memory idle, MiB | under load, MiB |\n\
         |---|---|---|---|---|---|---|---|\n",
        said("date", &["-u", "+%F"]),
        std::thread::available_parallelism().unwrap(),
        said(
            "sed",
            &["-n", "s/^model name[[:space:]]*: //p;T;q", "/proc/cpuinfo"]
        ),
        load(load_before),
        load(&fs::read_to_string("/proc/loadavg").unwrap()),
    );
    for (kind, m) in kinds.iter().zip(&medians) {
        writeln!(
            text,
            "| {} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.1} | {:.1} |",
            kind.name(),
            m[0],
            m[1],
            m[2],
            m[3],
            m[4],
            m[5],
            m[6]
        )
        .unwrap();
    }
    if let Some((ours, others)) = medians
        .split_first()
        .filter(|(_, others)| !others.is_empty())
    {
        let most = |at: usize| others.iter().map(|m| m[at]).fold(f64::MIN, f64::max);
        let least = |at: usize| others.iter().map(|m| m[at]).fold(f64::MAX, f64::min);
        writeln!(
            text,
            "| **embedded against the better** | **{:.2}** (aim 3) | **{:.2}** | **{:.2}** (aim 3) | **{:.2}** | (aim 50) | | (aim 20) |",
            ours[0] / most(0),
            ours[1] / least(1),
            ours[2] / most(2),
            ours[3] / least(3),
        )
        .unwrap();
    }
    text
}

fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
