//! Requests that are one message, by somebody who speaks STOMP, to a daemon behind a broker.
#![allow(clippy::unwrap_used)]

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;
use uuid::Uuid;
use xbee_carry::identity::Files;
use xbee_carry::stream::Carried;
use xbee_carry::{Address, Answer, Options, Service};
use xbee_envelope::pki::{self, Kind};
use xbee_envelope::seal::Endpoint;
use xbee_envelope::trust::Role;
use xbee_envelope::{Body, Fault, MAX_MESSAGE_BYTES, TaskState};
use xbee_mq::client::{Client, Subscription};
use xbee_mq::config::Config;
use xbee_mq::frame::Headers;
use xbee_mq::server::Server;
use xbee_mq::session::AckMode;

/// A test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);
const TOPIC: &str = "/topic/xbee.test";

/// Has more tasks than a message can list, and lets those wait who ask for one.
#[derive(Default)]
struct Daemon {
    connections: Mutex<Vec<Carried>>,
}

impl Service for Daemon {
    fn connection(&self, _: &str, stream: Carried) {
        self.connections.lock().unwrap().push(stream);
    }

    fn knows(&self, _: &str) -> bool {
        false
    }

    fn has(&self, _: &str, _: &str) -> Pin<Box<dyn Future<Output = bool> + Send>> {
        Box::pin(std::future::ready(false))
    }

    fn request(&self, _: &str, body: Body) -> Answer {
        Box::pin(async move {
            match body {
                Body::StatusRequest { task: None } => {
                    let task = TaskState {
                        task: Uuid::new_v4(),
                        state: "Pending".to_owned(),
                        substate: None,
                        exit_code: None,
                        reason: Some("x".repeat(100)),
                    };
                    Body::StatusList(vec![task; MAX_MESSAGE_BYTES / 100])
                }
                _ => std::future::pending().await,
            }
        })
    }
}

struct User {
    endpoint: Endpoint,
    mq: Client,
    messages: Subscription,
    daemon: String,
    destination: String,
}

impl User {
    async fn ask(&self, body: Body) {
        let sealed = self.endpoint.seal(&self.daemon, None, body, None).unwrap();
        let headers = Headers::new().with("reply-to", TOPIC);
        self.mq
            .post(&self.destination, &headers, sealed)
            .await
            .unwrap();
    }

    async fn answer(&mut self) -> Body {
        let answer = tokio::time::timeout(PATIENCE, self.messages.next()).await;
        let answer = answer.expect("no answer").unwrap();
        self.endpoint.open(&answer.body).unwrap().0.body
    }
}

/// A broker, a daemon, and somebody who has met it.
async fn user(daemon: Arc<Daemon>) -> (tempfile::TempDir, User) {
    let dir = tempfile::tempdir().unwrap();
    pki::init(dir.path(), "site", Kind::P256).unwrap();
    for (name, role) in [("host", Role::Daemon), ("alice", Role::User)] {
        pki::issue(dir.path(), name, Kind::P256).unwrap();
        pki::list(dir.path(), name, role).unwrap();
    }
    let endpoint = |name: &str| Files::find(&dir.path().join(name)).unwrap().open(None);

    let broker = Server::open(Config::new("127.0.0.1:0".parse().unwrap())).unwrap();
    let uri = format!("stomp://{}/host", broker.address());
    let address: Address = uri.parse().unwrap();
    std::thread::spawn(move || broker.run(std::future::pending::<()>()));
    let (own, at) = (Arc::new(endpoint("host").unwrap()), address.clone());
    let (ready, listens) = oneshot::channel();
    tokio::spawn(async move {
        let ready = || ready.send(()).unwrap();
        let never = std::future::pending();
        xbee_carry::serve(&at, &Options::default(), own, daemon, ready, never).await
    });
    listens.await.unwrap();

    let endpoint = endpoint("alice").unwrap();
    let mq = Client::connect(&uri).await.unwrap();
    let mut messages = mq.subscribe(TOPIC, AckMode::Auto).await.unwrap();
    let headers = Headers::new().with("reply-to", TOPIC);
    let hello = endpoint.hello("", None).unwrap();
    mq.send(&address.destination(), &headers, hello)
        .await
        .unwrap();
    let answer = messages.next().await.unwrap();
    let (daemon, _) = endpoint.meet(&answer.body).unwrap();
    let destination = answer.headers.get("reply-to").unwrap().to_owned();
    let user = User {
        endpoint,
        mq,
        messages,
        daemon,
        destination,
    };
    (dir, user)
}

#[tokio::test]
async fn an_answer_that_is_too_long_is_said_to_be_and_ends_no_connection() {
    let daemon = Arc::new(Daemon::default());
    let (_dir, mut user) = user(daemon.clone()).await;
    let connection = Uuid::new_v4();
    user.ask(Body::Connect { connection }).await;
    user.ask(Body::StatusRequest { task: None }).await;
    let Body::Error { fault, text } = user.answer().await else {
        panic!("not an error");
    };
    assert_eq!(fault, Fault::BadRequest);
    assert!(text.contains("ask for less"), "{text}");
    // What is said on the connection is still taken.
    let bytes = b"still here".to_vec();
    user.ask(Body::Data {
        connection,
        offset: 0,
        bytes,
    })
    .await;
    let mut carried = daemon.connections.lock().unwrap().pop().unwrap();
    let mut said = [0; 10];
    let read = tokio::io::AsyncReadExt::read_exact(&mut carried, &mut said);
    tokio::time::timeout(PATIENCE, read).await.unwrap().unwrap();
    assert_eq!(&said, b"still here");
}

#[tokio::test]
async fn more_requests_than_are_answered_at_a_time_are_told_so() {
    let (_dir, mut user) = user(Arc::default()).await;
    let task = Some(Uuid::new_v4());
    for _ in 0..65 {
        user.ask(Body::StatusRequest { task }).await;
    }
    let Body::Error { fault, text } = user.answer().await else {
        panic!("not an error");
    };
    assert_eq!(fault, Fault::Busy);
    assert!(text.contains("64 requests"), "{text}");
}
