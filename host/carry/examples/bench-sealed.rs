//! `make bench-mq`: what sealing costs, through the embedded broker, beside the same without a seal.
//!
//! `bench-sealed all` measures, `bench-sealed broker`, `daemon` and `echo` are the other processes. A request and its
//! answer go through the broker, each message of as many bytes, sealed and not, in turn; then a request on a carried
//! connection, and many bytes on it, there and back.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a benchmark that cannot measure ends"
)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::pin::Pin;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use uuid::Uuid;
use xbee_carry::identity::Files;
use xbee_carry::stream::Carried;
use xbee_carry::{Address, Answer, Options, Remote, Service};
use xbee_envelope::pki::{self, Kind};
use xbee_envelope::seal::Endpoint;
use xbee_envelope::trust::Role;
use xbee_envelope::{Body, TaskState};
use xbee_mq::client::{Client, Subscription};
use xbee_mq::config::Config;
use xbee_mq::frame::Headers;
use xbee_mq::server::Server;
use xbee_mq::session::AckMode;

/// Rounds of the comparison, and requests of each in a round.
const ROUNDS: usize = 20;
const REQUESTS: usize = 100;
/// Bytes that go over a connection, and come back, in a round.
const BYTES: usize = 8 << 20;
/// Bytes of a request on a connection.
const REQUEST_BYTES: usize = 100;
/// Where the user listens.
const TOPIC: &str = "/topic/xbee.bench";

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["all"] => all().await,
        ["broker"] => {
            let server = Server::open(Config::new("127.0.0.1:0".parse().unwrap())).unwrap();
            println!("{}", server.address());
            let run = move || server.run(std::future::pending::<()>());
            tokio::task::spawn_blocking(run).await.unwrap().unwrap();
        }
        ["daemon", dir, uri] => daemon(Path::new(dir), uri).await,
        ["echo", uri] => echo(uri).await,
        _ => {
            eprintln!("usage: bench-sealed all");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

/// A further process of this program, which has said a line.
struct Process {
    child: Child,
    said: String,
}

impl Process {
    fn start(arguments: &[&str]) -> Process {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut said)
            .unwrap();
        let said = said.trim().to_owned();
        Process { child, said }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn endpoint(dir: &Path, name: &str) -> Endpoint {
    Files::find(&dir.join(name)).unwrap().open(None).unwrap()
}

/// Answers with one task, and what is said on connections with the same.
struct Daemon;

impl Service for Daemon {
    fn connection(&self, _: &str, stream: Carried) {
        tokio::spawn(async move {
            let (mut from, mut to) = tokio::io::split(stream);
            // Its end is the user's.
            let _ = tokio::io::copy(&mut from, &mut to).await;
        });
    }

    fn knows(&self, _: &str) -> bool {
        false
    }

    fn has(&self, _: &str, _: &str) -> Pin<Box<dyn Future<Output = bool> + Send>> {
        Box::pin(std::future::ready(false))
    }

    fn request(&self, _: &str, _: Body) -> Answer {
        let task = TaskState {
            task: Uuid::new_v4(),
            state: "Running".to_owned(),
            substate: Some("Executing".to_owned()),
            exit_code: None,
            reason: None,
        };
        Box::pin(async move { Body::StatusList(vec![task]) })
    }
}

async fn daemon(dir: &Path, uri: &str) {
    let own = Arc::new(endpoint(dir, "host"));
    let address: Address = uri.parse().unwrap();
    let ready = || println!("ready");
    let never = std::future::pending();
    xbee_carry::serve(
        &address,
        &Options::default(),
        own,
        Arc::new(Daemon),
        ready,
        never,
    )
    .await
    .unwrap();
}

/// Sends back what comes.
async fn echo(uri: &str) {
    let mq = Client::connect(uri).await.unwrap();
    let mut requests = mq.subscribe("/queue/echo", AckMode::Auto).await.unwrap();
    println!("ready");
    while let Some(request) = requests.next().await {
        let to = request.headers.get("reply-to").unwrap().to_owned();
        let headers = Headers::new();
        mq.post(&to, &headers, request.body).await.unwrap();
    }
}

/// Somebody who has met the daemon.
struct User {
    endpoint: Endpoint,
    mq: Client,
    answers: Subscription,
    daemon: String,
    destination: String,
    sealed_bytes: usize,
}

impl User {
    async fn meet(dir: &Path, uri: &str) -> User {
        let endpoint = endpoint(dir, "alice");
        let address: Address = uri.parse().unwrap();
        let mq = Client::connect(uri).await.unwrap();
        let mut answers = mq.subscribe(TOPIC, AckMode::Auto).await.unwrap();
        let headers = Headers::new().with("reply-to", TOPIC);
        let hello = endpoint.hello("", None).unwrap();
        mq.send(&address.destination(), &headers, hello)
            .await
            .unwrap();
        let answer = answers.next().await.unwrap();
        let (daemon, _) = endpoint.meet(&answer.body).unwrap();
        let destination = answer.headers.get("reply-to").unwrap().to_owned();
        User {
            endpoint,
            mq,
            answers,
            daemon,
            destination,
            sealed_bytes: 0,
        }
    }

    /// A request in a message of its own, from its beginning to its opened answer; microseconds.
    async fn sealed(&mut self) -> f64 {
        let begun = Instant::now();
        let body = Body::StatusRequest {
            task: Some(Uuid::new_v4()),
        };
        let sealed = self.endpoint.seal(&self.daemon, None, body, None).unwrap();
        self.sealed_bytes = sealed.len();
        let headers = Headers::new().with("reply-to", TOPIC);
        self.mq
            .post(&self.destination, &headers, sealed)
            .await
            .unwrap();
        let answer = self.answers.next().await.unwrap();
        let (message, _) = self.endpoint.open(&answer.body).unwrap();
        assert!(matches!(message.body, Body::StatusList(_)));
        begun.elapsed().as_secs_f64() * 1e6
    }

    /// As many bytes, there and back.
    async fn plain(&mut self) -> f64 {
        let begun = Instant::now();
        let headers = Headers::new().with("reply-to", TOPIC);
        let bytes = vec![b'x'; self.sealed_bytes];
        self.mq.post("/queue/echo", &headers, bytes).await.unwrap();
        let answer = self.answers.next().await.unwrap();
        assert_eq!(answer.body.len(), self.sealed_bytes);
        begun.elapsed().as_secs_f64() * 1e6
    }
}

/// A short request on a connection and its answer; microseconds.
async fn on_connection(carried: &mut Carried) -> f64 {
    let begun = Instant::now();
    carried.write_all(&[1; REQUEST_BYTES]).await.unwrap();
    carried.flush().await.unwrap();
    let mut answer = [0; REQUEST_BYTES];
    carried.read_exact(&mut answer).await.unwrap();
    begun.elapsed().as_secs_f64() * 1e6
}

/// Many bytes there and back at the same time; MiB/s each way.
async fn many(carried: &mut Carried) -> f64 {
    let begun = Instant::now();
    let (mut from, mut to) = tokio::io::split(carried);
    let write = async {
        for _ in 0..BYTES / (64 << 10) {
            to.write_all(&[1; 64 << 10]).await.unwrap();
        }
        to.flush().await.unwrap();
    };
    let read = async {
        let mut left = vec![0; BYTES];
        from.read_exact(&mut left).await.unwrap();
    };
    tokio::join!(write, read);
    BYTES as f64 / (1 << 20) as f64 / begun.elapsed().as_secs_f64()
}

fn at(sorted: &mut [f64], part: f64) -> f64 {
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * part) as usize]
}

async fn all() {
    let dir = tempfile::tempdir().unwrap();
    pki::init(dir.path(), "bench", Kind::P256).unwrap();
    for (name, role) in [("host", Role::Daemon), ("alice", Role::User)] {
        pki::issue(dir.path(), name, Kind::P256).unwrap();
        pki::list(dir.path(), name, role).unwrap();
    }
    let broker = Process::start(&["broker"]);
    let uri = format!("stomp://{}/host", broker.said);
    let _daemon = Process::start(&["daemon", dir.path().to_str().unwrap(), &uri]);
    let _echo = Process::start(&["echo", &format!("stomp://{}", broker.said)]);

    let mut user = User::meet(dir.path(), &uri).await;
    let remote = Remote::new(
        uri.parse().unwrap(),
        Options::default(),
        endpoint(dir.path(), "alice"),
    );
    let mut carried = remote.connect(None).await.unwrap();
    let (mut sealed, mut plain, mut connection, mut rate) = (vec![], vec![], vec![], vec![]);
    for round in 0..=ROUNDS {
        let mut of = [vec![], vec![], vec![]];
        for _ in 0..REQUESTS {
            of[0].push(user.sealed().await);
            of[1].push(user.plain().await);
            of[2].push(on_connection(&mut carried).await);
        }
        let bytes = many(&mut carried).await;
        // The first warms both sides.
        if round > 0 {
            let [one, two, three] = of;
            sealed.extend(one);
            plain.extend(two);
            connection.extend(three);
            rate.push(bytes);
        }
    }
    let base = at(&mut plain, 0.5);
    println!(
        "## Sealed messages\n\nBy `make bench-mq`: a request and its answer through the embedded broker, four processes on loopback; \
         ECDSA and ECDH on P-256. {} of each, in turn.\n\n\
         | what | p50, µs | p99, µs | p50 against plain |\n|---|---|---|---|",
        ROUNDS * REQUESTS
    );
    let bytes = user.sealed_bytes;
    for (what, mut times) in [
        (
            format!("{bytes} bytes and as many back, not sealed"),
            plain.clone(),
        ),
        ("`StatusRequest` and its answer, sealed".to_owned(), sealed),
        (
            format!("{REQUEST_BYTES} bytes on a carried connection, and back"),
            connection,
        ),
    ] {
        let (p50, p99) = (at(&mut times, 0.5), at(&mut times, 0.99));
        println!("| {what} | {p50:.0} | {p99:.0} | {:.2} |", p50 / base);
    }
    println!(
        "\nOver a carried connection, there and back at the same time: {:.0} MiB/s each way, median of {ROUNDS}.",
        at(&mut rate, 0.5)
    );
}
