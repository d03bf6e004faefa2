//! The client against the broker: acknowledgement, TLS, logins, and connections that break.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{Broker, PATIENCE};
use xbee_mq::access::{PasswordHash, User, Users};
use xbee_mq::client::{Client, ClientError, ClientOptions};
use xbee_mq::config::TlsFiles;
use xbee_mq::destination::{Pattern, Rights};
use xbee_mq::frame::{Headers, Version};
use xbee_mq::session::AckMode;

fn quick() -> ClientOptions {
    ClientOptions {
        pause: Duration::from_millis(20),
        pause_max: Duration::from_millis(100),
        heart_beat: Duration::from_millis(200),
        prefetch: 10,
        ..ClientOptions::default()
    }
}

async fn connect(uri: &str) -> Result<Client, ClientError> {
    Client::connect_with(uri.parse().unwrap(), quick()).await
}

fn uri(broker: &Broker) -> String {
    format!("stomp://{}", broker.address)
}

#[tokio::test]
async fn messages_are_sent_received_and_acknowledged() {
    let broker = Broker::start();
    let client = connect(&uri(&broker)).await.unwrap();
    let headers = Headers::new().with("mine", "a:b\n");
    for body in ["1", "2"] {
        client.send("/queue/a", &headers, body).await.unwrap();
    }
    let mut subscription = client
        .subscribe("/queue/a", AckMode::ClientIndividual)
        .await
        .unwrap();
    let one = subscription.next().await.unwrap();
    assert_eq!(
        (&one.body[..], one.headers.get("mine"), one.is_redelivered()),
        (&b"1"[..], Some("a:b\n"), false)
    );
    client.nack(&one).await.unwrap();
    let two = subscription.next().await.unwrap();
    client.ack(&two).await.unwrap();
    let again = subscription.next().await.unwrap();
    assert!(again.body == b"1" && again.is_redelivered());
    // What it does not acknowledge goes back with the subscription.
    drop(subscription);
    let mut next = client.subscribe("/queue/a", AckMode::Auto).await.unwrap();
    assert_eq!(next.next().await.unwrap().body, b"1");
    client.clone().close().await.unwrap();
    assert!(matches!(
        client.send("/queue/a", &headers, "3").await,
        Err(ClientError::Closed)
    ));
    assert!(next.next().await.is_none());
}

#[tokio::test]
async fn one_message_is_exchanged_for_another_or_nothing_is_done() {
    let broker = Broker::limited(|limits| limits.queue_messages = 3);
    let client = connect(&uri(&broker)).await.unwrap();
    let none = Headers::new();
    for body in ["1", "2"] {
        client.send("/queue/a", &none, body).await.unwrap();
    }
    for _ in 0..3 {
        client.send("/queue/full", &none, "").await.unwrap();
    }
    let one_at_a_time = ClientOptions {
        prefetch: 1,
        give_up_after: Duration::ZERO,
        ..quick()
    };
    let taker = Client::connect_with(uri(&broker).parse().unwrap(), one_at_a_time).await;
    let taker = taker.unwrap();
    let mut a = taker
        .subscribe("/queue/a", AckMode::ClientIndividual)
        .await
        .unwrap();
    let one = a.next().await.unwrap();
    taker
        .exchange(&one, "/queue/b", &none, "one")
        .await
        .unwrap();
    let two = a.next().await.unwrap();
    // There is no room, which shows at the COMMIT: the broker refuses all of it, and ends the connection.
    let refused = taker.exchange(&two, "/queue/full", &none, "two").await;
    assert!(refused.is_err());
    assert!(a.next().await.is_none());
    let mut a = client.subscribe("/queue/a", AckMode::Auto).await.unwrap();
    let again = tokio::time::timeout(PATIENCE, a.next()).await;
    let again = again.expect("it is lost").unwrap();
    assert!(again.body == b"2" && again.is_redelivered());
    let mut b = client.subscribe("/queue/b", AckMode::Auto).await.unwrap();
    assert_eq!(b.next().await.unwrap().body, b"one");
    client.send("/queue/b", &none, "last").await.unwrap();
    assert_eq!(b.next().await.unwrap().body, b"last");
}

#[tokio::test]
async fn more_than_a_subscription_takes_waits_and_heart_beats_go_on() {
    let broker = Broker::start();
    let client = connect(&uri(&broker)).await.unwrap();
    let mut subscription = client.subscribe("/queue/a", AckMode::Auto).await.unwrap();
    let mut sender = broker.connect(Version::V1_2);
    for n in 0..500 {
        sender.publish("/queue/a", &n.to_string());
    }
    // Longer than a silent client lives.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    for n in 0..500 {
        assert_eq!(
            subscription.next().await.unwrap().body,
            n.to_string().as_bytes()
        );
    }
    client.close().await.unwrap();
}

#[tokio::test]
async fn a_connection_that_breaks_is_made_again_and_subscriptions_go_on() {
    let broker = Broker::start();
    let address = broker.address;
    let client = connect(&uri(&broker)).await.unwrap();
    let mut subscription = client
        .subscribe("/queue/a", AckMode::ClientIndividual)
        .await
        .unwrap();
    client.send("/queue/a", &Headers::new(), "1").await.unwrap();
    let old = subscription.next().await.unwrap();
    broker.stop();
    let broker = Broker::with(|config| config.listen = address);
    // What is asked for meanwhile waits for the new connection; some may be lost with the old one, and says so.
    let mut tries = 0;
    while let Err(error) = client.send("/queue/a", &Headers::new(), "2").await {
        assert!(matches!(error, ClientError::Interrupted), "{error}");
        tries += 1;
        assert!(tries < 10);
    }
    assert!(matches!(client.ack(&old).await, Err(ClientError::Stale)));
    let message = subscription.next().await.unwrap();
    assert_eq!(message.body, b"2");
    client.ack(&message).await.unwrap();
    drop((client, subscription));
    drop(broker);
}

#[tokio::test]
async fn what_the_broker_refuses_is_told() {
    let broker = Broker::start();
    let client = connect(&uri(&broker)).await.unwrap();
    let error = client
        .send("/queue/", &Headers::new(), "x")
        .await
        .unwrap_err();
    assert!(matches!(error, ClientError::Refused { .. }), "{error}");
    // The connection is made again.
    client.send("/queue/a", &Headers::new(), "x").await.unwrap();
    let error = Client::connect("stomp://127.0.0.1:1").await.unwrap_err();
    assert_eq!(error.code(), "broker-connect");
    assert_eq!(
        Client::connect("http://x").await.unwrap_err().code(),
        "broker-uri"
    );
}

/// A certificate of `localhost` in this directory.
fn certificate(directory: &Path) -> TlsFiles {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let files = TlsFiles {
        certificate: directory.join("certificate.pem"),
        key: directory.join("key.pem"),
    };
    std::fs::write(&files.certificate, made.cert.pem()).unwrap();
    std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    files
}

#[tokio::test]
async fn tls_and_logins() {
    let directory = tempfile::tempdir().unwrap();
    let files = certificate(directory.path());
    let password = PasswordHash::with_iterations("p:w/", NonZeroU32::new(1000).unwrap()).unwrap();
    let all = |text: &str| vec![Pattern::try_from(text.to_owned()).unwrap()];
    let user = User {
        password,
        rights: Arc::new(Rights {
            read: all("/queue/a"),
            write: all("/queue/*"),
        }),
    };
    let broker = Broker::with(|config| {
        config.tls = Some(files.clone());
        config.users = Users::new(HashMap::from([("me".to_owned(), user)]));
    });
    let port = broker.address.port();
    let connect = |uri: String, ca_file| {
        let options = ClientOptions { ca_file, ..quick() };
        Client::connect_with(uri.parse().unwrap(), options)
    };
    let trusted = || Some(files.certificate.clone());
    let client = connect(
        format!("stomp+ssl://me:p%3Aw%2F@localhost:{port}"),
        trusted(),
    )
    .await
    .unwrap();
    let mut subscription = client.subscribe("/queue/a", AckMode::Client).await.unwrap();
    let body = vec![7; 3 << 20];
    client
        .send("/queue/a", &Headers::new(), body.clone())
        .await
        .unwrap();
    let message = subscription.next().await.unwrap();
    assert!(message.body == body);
    client.ack(&message).await.unwrap();
    let error = client
        .subscribe("/queue/b", AckMode::Auto)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("access refused"), "{error}");

    let wrong = connect(format!("stomp+ssl://me:wrong@localhost:{port}"), trusted()).await;
    assert_eq!(wrong.unwrap_err().code(), "broker-refused");
    let untrusted = connect(format!("stomp+ssl://me:p%3Aw%2F@localhost:{port}"), None).await;
    assert_eq!(untrusted.unwrap_err().code(), "broker-connect");
    let another_name = connect(
        format!("stomp+ssl://me:p%3Aw%2F@127.0.0.1:{port}"),
        trusted(),
    )
    .await;
    assert_eq!(another_name.unwrap_err().code(), "broker-connect");
    let plain = connect(format!("stomp://me:p%3Aw%2F@localhost:{port}"), None).await;
    assert!(plain.is_err());
}
