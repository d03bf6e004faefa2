//! Revocation lists: who is on one gets in nowhere, and who is put on one while connected is cut off.
#![allow(clippy::unwrap_used)]

mod common;

use std::cell::Cell;
use std::path::PathBuf;
use std::time::Duration;

use common::{Random, config, submit, until};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer,
    KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber, date_time_ymd,
};
use xbee_kecho::{
    ChannelOptions, Config, Error, Node, Registry, RegistryConfig, Sink, SinkOptions, TlsFiles,
};

/// An authority with its list of revoked certificates.
struct Authority {
    directory: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
    issued: Cell<u64>,
}

impl Authority {
    fn new() -> Authority {
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        let authority = Authority {
            directory: tempfile::tempdir().unwrap(),
            issuer: Issuer::new(parameters, key),
            issued: Cell::new(0),
        };
        authority.put("ca", &certificate.pem());
        authority.list("crl", &[], 2049);
        authority
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// In the place of what was there, at once.
    fn put(&self, name: &str, text: &str) {
        std::fs::write(self.path("new"), text).unwrap();
        std::fs::rename(self.path("new"), self.path(name)).unwrap();
    }

    /// Writes a list with these on it, which is good up to a year.
    fn list(&self, file: &str, revoked: &[u64], until: i32) {
        let revoked = revoked.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2025, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(until, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer).unwrap();
        self.put(file, &list.pem().unwrap());
    }

    /// A new certificate with its serial number; who has it looks into this list.
    fn issue(&self, list: &str) -> (u64, TlsFiles) {
        let serial = self.issued.get() + 1;
        self.issued.set(serial);
        let mut parameters = CertificateParams::new(vec![format!("n{serial}")]).unwrap();
        parameters.serial_number = Some(SerialNumber::from(serial));
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        let (crt, pem) = (format!("{serial}.crt"), format!("{serial}.key"));
        self.put(&crt, &certificate.pem());
        self.put(&pem, &key.serialize_pem());
        let files = TlsFiles {
            ca: self.path("ca"),
            certificate: self.path(&crt),
            key: self.path(&pem),
            crl: Some(self.path(list)),
        };
        (serial, files)
    }

    fn registry(&self) -> Registry {
        Registry::start(&RegistryConfig {
            listen: vec!["tcp:[::1]:0".parse().unwrap()],
            tls: Some(self.issue("crl").1),
            strict: true,
            ..RegistryConfig::default()
        })
        .unwrap()
    }
}

fn start(registry: &Registry, tls: TlsFiles) -> Result<Node, Error> {
    Node::start(Config {
        tls: Some(tls),
        strict: true,
        plaintext: false,
        heartbeat: Duration::from_millis(100),
        dead_after: Duration::from_millis(500),
        ..config(&registry.addresses()[0], "tcp")
    })
}

/// The tags of the sources of which something has come.
fn come(sink: &Sink) -> Vec<u64> {
    let mut tags = Vec::new();
    while let Some(event) = sink.receive_timeout(Duration::from_millis(500)).unwrap() {
        let payload = event.get().payload();
        tags.push(u64::from_le_bytes(payload[..8].try_into().unwrap()));
    }
    tags.sort_unstable();
    tags
}

#[test]
fn who_is_on_the_list_gets_in_nowhere_and_nobody_goes_there() {
    let authority = Authority::new();
    let registry = authority.registry();
    let good = start(&registry, authority.issue("crl").1).unwrap();
    // The bad one has a list that does not have it.
    let (serial, files) = authority.issue("old");
    authority.list("old", &[], 2049);
    authority.list("crl", &[serial], 2049);
    let bad = start(&registry, files).unwrap();
    let error = bad.create("x", ChannelOptions::default()).unwrap_err();
    assert_eq!(error.code(), "registry-unreachable", "{error}");
    let _channel = good.create("x", ChannelOptions::default()).unwrap();
    let error = bad.open_at("x", good.address()).unwrap_err();
    assert_eq!(error.code(), "no-contact", "{error}");
    // Its certificate has another name than the address, which is of no interest.
    let error = good.open_at("y", bad.address()).unwrap_err();
    assert_eq!(error.code(), "no-contact", "{error}");
    assert!(error.to_string().contains("Revoked"), "{error}");
}

/// Three nodes in a channel, of which the `out`-th is put on the list.
fn cut_off(out: usize) {
    let authority = Authority::new();
    let registry = authority.registry();
    authority.list("old", &[], 2049);
    let issued: Vec<_> = (0..3)
        .map(|n| authority.issue(["crl", "old"][usize::from(n == out)]))
        .collect();
    let serial = issued[out].0;
    let nodes: Vec<Node> = issued
        .into_iter()
        .map(|(_, files)| start(&registry, files).unwrap())
        .collect();
    let first = nodes[0].create("x", ChannelOptions::default()).unwrap();
    let rest = nodes[1..].iter().map(|node| node.open("x").unwrap());
    let channels: Vec<_> = std::iter::once(first).chain(rest).collect();
    let all = channels.iter();
    let sinks: Vec<_> = all
        .clone()
        .map(|channel| channel.sink(SinkOptions::default()).unwrap())
        .collect();
    let sources: Vec<_> = all.map(|channel| channel.source().unwrap()).collect();
    let submit_all = |n| {
        for (tag, source) in (0..).zip(&sources) {
            submit(source, tag, n);
        }
    };
    submit_all(0);
    let others = [0, 1, 2].into_iter().filter(|n| *n != out);
    for sink in &sinks {
        for tag in 0..3 {
            let event = sink.receive_timeout(Duration::from_secs(30)).unwrap();
            assert!(event.is_some(), "event {tag} of 3");
        }
    }
    authority.list("crl", &[serial], 2049);
    for n in others.clone() {
        until("the revoked node's sink is cut off", || {
            sources[n].sinks() == 2
        });
    }
    // It does not come back.
    std::thread::sleep(Duration::from_secs(2));
    submit_all(1);
    for n in others.clone() {
        assert_eq!(sources[n].sinks(), 2);
    }
    // Each of the others' events comes to the others, and to itself.
    for (n, sink) in sinks.iter().enumerate() {
        let expected: Vec<u64> = match n == out {
            true => vec![out as u64],
            false => others.clone().map(|tag| tag as u64).collect(),
        };
        assert_eq!(come(sink), expected, "sink {n}");
    }
    let there = others.clone().next().unwrap();
    until("it is off the list of members", || {
        nodes[there].status("x").is_ok_and(|x| x.nodes.len() == 2)
    });
}

#[test]
fn a_member_that_is_put_on_the_list_is_cut_off() {
    cut_off(2);
}

#[test]
fn a_contact_that_is_put_on_the_list_is_cut_off() {
    cut_off(0);
}

#[test]
fn without_a_list_that_holds_nobody_is_believed() {
    let mut random = Random::seeded();
    let authority = Authority::new();
    let registry = authority.registry();
    // At the start it is said.
    for (name, text) in [
        ("missing", None),
        ("empty", Some("")),
        ("garbage", Some("-----BEGIN X509 CRL-----\nAAAA\n")),
    ] {
        if let Some(text) = text {
            authority.put(name, text);
        }
        let error = start(&registry, authority.issue(name).1).unwrap_err();
        assert_eq!(error.code(), "tls", "{error}");
        assert!(error.to_string().contains(name), "{error}");
    }
    // Out of date: nobody is believed, and the registry is a server as others.
    authority.list("late", &[], 2025);
    let late = start(&registry, authority.issue("late").1).unwrap();
    let error = late.create("x", ChannelOptions::default()).unwrap_err();
    assert_eq!(error.code(), "registry-unreachable", "{error}");
    assert!(error.to_string().contains("xpired"), "{error}");
    // While connected, and put right again.
    let [a, b] = [0; 2].map(|_| start(&registry, authority.issue("crl").1).unwrap());
    let channel = a.create("x", ChannelOptions::default()).unwrap();
    let source = channel.source().unwrap();
    let other = b.open("x").unwrap();
    let sink = other.sink(SinkOptions::default()).unwrap();
    until("it is attached", || source.sinks() == 1);
    for broken in [random.below(3), 3] {
        match broken {
            0 => std::fs::remove_file(authority.path("crl")).unwrap(),
            1 => authority.put("crl", ""),
            2 => authority.put("crl", "-----BEGIN X509 CRL-----\nAAAA\n"),
            _ => authority.list("crl", &[], 2025),
        }
        until("it is cut off", || source.sinks() == 0);
        authority.list("crl", &[], 2049);
        until("it is back", || {
            // Who reads sees that its connection has ended.
            assert!(sink.poll().unwrap().is_none());
            source.sinks() == 1
        });
        submit(&source, broken, 0);
        let event = sink.receive_timeout(common::LONG).unwrap().unwrap();
        assert_eq!(event.get().payload()[..8], broken.to_le_bytes());
    }
}
