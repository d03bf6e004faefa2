//! Tests: what a hostile broker can do with sealed messages, and what `openssl` on the command line makes of them.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use openssl::cms::{CMSOptions, CmsContentInfo};
use openssl::stack::Stack;
use openssl::symm::Cipher;
use openssl::x509::X509;
use uuid::Uuid;

use crate::pki::{self, Kind};
use crate::seal::{self, Endpoint, Identity, WINDOW_MS};
use crate::trust::{self, Files, Role, Trust};
use crate::{Body, Message, Millis};

const CLIENT: &str = "CN=client";
const DAEMON: &str = "CN=daemon";

/// A CA, its people, and two of them who have met.
struct Site {
    dir: tempfile::TempDir,
    client: Endpoint,
    daemon: Endpoint,
}

impl Site {
    fn new(kind: Kind) -> Site {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        pki::init(at, "Test-CA", kind).unwrap();
        for name in ["client", "daemon", "mallory"] {
            pki::issue(at, name, kind).unwrap();
        }
        let list = format!("# who\n\nuser {CLIENT}\ndaemon {DAEMON}\nuser CN=mallory\n");
        fs::write(at.join("subjects"), list).unwrap();
        let client = endpoint(at, "client");
        let daemon = endpoint(at, "daemon");
        let site = Site {
            dir,
            client,
            daemon,
        };
        introduce(&site.client, &site.daemon);
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    fn certificate(&self, name: &str) -> X509 {
        X509::from_pem(&self.read(name)).unwrap()
    }

    fn sealed(&self) -> Vec<u8> {
        self.client.seal(DAEMON, None, request(), None).unwrap()
    }

    /// Bytes encrypted to the daemon, as anybody can.
    fn encrypted(&self, bytes: &[u8], cipher: Cipher) -> Vec<u8> {
        let mut to = Stack::new().unwrap();
        to.push(self.certificate("daemon.pem")).unwrap();
        let cms = CmsContentInfo::encrypt(&to, bytes, cipher, CMSOptions::BINARY).unwrap();
        cms.to_der().unwrap()
    }
}

fn identity(dir: &Path, name: &str) -> Identity {
    let read = |end: &str| fs::read(dir.join(format!("{name}.{end}"))).unwrap();
    Identity::from_pem(&read("pem"), &read("key")).unwrap()
}

fn endpoint(dir: &Path, name: &str) -> Endpoint {
    endpoint_with(dir, name, dir.join(format!("{name}.streams")))
}

fn endpoint_with(dir: &Path, name: &str, streams: PathBuf) -> Endpoint {
    let files = Files {
        authorities: dir.join("ca.pem"),
        revoked: dir.join("crl.pem"),
        subjects: dir.join("subjects"),
    };
    Endpoint::new(identity(dir, name), Trust::new(files), streams).unwrap()
}

fn introduce(client: &Endpoint, daemon: &Endpoint) {
    let met = daemon.meet(&client.hello(DAEMON, None).unwrap()).unwrap();
    assert_eq!(met, (CLIENT.to_owned(), Role::User));
    let met = client.meet(&daemon.hello(CLIENT, None).unwrap()).unwrap();
    assert_eq!(met, (DAEMON.to_owned(), Role::Daemon));
}

fn request() -> Body {
    Body::StartRequest {
        ticket: "8a7d".into(),
    }
}

/// The code with which a message is refused; `Err` with the message that is not.
fn refused(daemon: &Endpoint, sealed: &[u8]) -> Result<u16, Box<Message>> {
    match daemon.open(sealed) {
        Ok((message, _)) => Err(Box::new(message)),
        Err(error) => Ok(error.code()),
    }
}

#[test]
fn what_is_sealed_is_opened_both_ways() {
    for kind in [Kind::P256, Kind::Rsa3072] {
        let site = Site::new(kind);
        let sealed = site.sealed();
        assert!(!sealed.windows(4).any(|text| text == b"8a7d"));
        let (message, role) = site.daemon.open(&sealed).unwrap();
        assert_eq!((message.body, role), (request(), Role::User));
        let answers = Some(message.header.id);
        let answer = site
            .daemon
            .seal(CLIENT, None, Body::StatusList(vec![]), answers);
        let (message, role) = site.client.open(&answer.unwrap()).unwrap();
        assert_eq!(message.header.answers, answers);
        assert_eq!(
            (message.body, role),
            (Body::StatusList(vec![]), Role::Daemon)
        );
    }
}

/// What a broker does, and the codes that the daemon's answers have.
type Act = (
    &'static str,
    fn(&Site) -> Vec<Result<u16, Box<Message>>>,
    u16,
);

const ACTS: &[Act] = &[
    (
        "replays",
        |site| {
            let sealed = site.sealed();
            site.daemon.open(&sealed).unwrap();
            let again = refused(&site.daemon, &sealed);
            // The daemon starts again and has met the client.
            let daemon = endpoint(site.dir.path(), "daemon");
            introduce(&site.client, &daemon);
            vec![again, refused(&daemon, &sealed)]
        },
        503,
    ),
    (
        "reorders",
        |site| {
            let (first, second) = (site.sealed(), site.sealed());
            site.daemon.open(&second).unwrap();
            vec![refused(&site.daemon, &first)]
        },
        503,
    ),
    (
        "truncates",
        |site| {
            let sealed = site.sealed();
            (0..sealed.len())
                .map(|n| refused(&site.daemon, &sealed[..n]))
                .collect()
        },
        503,
    ),
    (
        "truncates and mends the length",
        |site| {
            let sealed = site.sealed();
            assert_eq!(sealed[..2], [0x30, 0x82]);
            (4..sealed.len())
                .map(|n| {
                    let mut cut = sealed[..n].to_vec();
                    cut[2..4].copy_from_slice(&u16::try_from(n - 4).unwrap().to_be_bytes());
                    refused(&site.daemon, &cut)
                })
                .collect()
        },
        503,
    ),
    (
        "adds bytes",
        |site| {
            let mut sealed = site.sealed();
            sealed.push(0);
            vec![refused(&site.daemon, &sealed)]
        },
        503,
    ),
    (
        "alters the text",
        |site| {
            let sealed = site.sealed();
            // The tag is last, before it the algorithm's text: all of the last 1000 bytes are authenticated.
            (sealed.len() - 1000..sealed.len())
                .map(|n| {
                    let mut altered = sealed.clone();
                    altered[n] ^= 1;
                    refused(&site.daemon, &altered)
                })
                .collect()
        },
        503,
    ),
    (
        "truncates what is signed, and encrypts it",
        |site| {
            let signed =
                seal::decrypt(&identity(site.dir.path(), "daemon"), &site.sealed()).unwrap();
            (0..signed.len())
                .step_by(7)
                .map(|n| {
                    refused(
                        &site.daemon,
                        &site.encrypted(&signed[..n], Cipher::aes_256_gcm()),
                    )
                })
                .collect()
        },
        503,
    ),
    (
        "alters what is signed, and encrypts it",
        |site| {
            let signed =
                seal::decrypt(&identity(site.dir.path(), "daemon"), &site.sealed()).unwrap();
            let text = b"8a7d";
            let at = signed.windows(4).position(|window| window == text).unwrap();
            let mut altered = signed.clone();
            altered[at] = b'9';
            vec![refused(
                &site.daemon,
                &site.encrypted(&altered, Cipher::aes_256_gcm()),
            )]
        },
        503,
    ),
    (
        "encrypts what is not signed",
        |site| {
            let xml = site
                .client
                .message(DAEMON, request(), None)
                .to_xml()
                .unwrap();
            vec![refused(
                &site.daemon,
                &site.encrypted(&xml, Cipher::aes_256_gcm()),
            )]
        },
        503,
    ),
    (
        "encrypts without authentication",
        |site| {
            let signed =
                seal::decrypt(&identity(site.dir.path(), "daemon"), &site.sealed()).unwrap();
            vec![refused(
                &site.daemon,
                &site.encrypted(&signed, Cipher::aes_256_cbc()),
            )]
        },
        503,
    ),
    (
        "sends it without a seal",
        |site| {
            let xml = site
                .client
                .message(DAEMON, request(), None)
                .to_xml()
                .unwrap();
            vec![refused(&site.daemon, &xml)]
        },
        503,
    ),
    (
        "signs it as another",
        |site| {
            let xml = site
                .client
                .message(DAEMON, request(), None)
                .to_xml()
                .unwrap();
            let mallory = identity(site.dir.path(), "mallory");
            let daemon = site.certificate("daemon.pem");
            vec![refused(
                &site.daemon,
                &seal::seal_bytes(&mallory, &daemon, &xml).unwrap(),
            )]
        },
        503,
    ),
    (
        "passes on what is for somebody else",
        |site| {
            let xml = site
                .client
                .message("CN=mallory", request(), None)
                .to_xml()
                .unwrap();
            let client = identity(site.dir.path(), "client");
            let daemon = site.certificate("daemon.pem");
            vec![refused(
                &site.daemon,
                &seal::seal_bytes(&client, &daemon, &xml).unwrap(),
            )]
        },
        503,
    ),
    (
        "keeps it for another receiver's key",
        |site| {
            let mallory = endpoint(site.dir.path(), "mallory");
            vec![refused(&mallory, &site.sealed())]
        },
        503,
    ),
    (
        "delivers it late, or early",
        |site| {
            let sealed = site.sealed();
            let now = Millis::now().get();
            [now + WINDOW_MS + 60_000, now - WINDOW_MS - 60_000]
                .into_iter()
                .map(
                    |at| match site.daemon.open_at(&sealed, Millis::new(at).unwrap()) {
                        Ok((message, _)) => Err(Box::new(message)),
                        Err(error) => Ok(error.code()),
                    },
                )
                .collect()
        },
        503,
    ),
    (
        "sends as a stranger",
        |site| {
            let mallory = endpoint(site.dir.path(), "mallory");
            mallory
                .meet(&site.daemon.hello("CN=mallory", None).unwrap())
                .unwrap();
            let sealed = mallory.seal(DAEMON, None, request(), None).unwrap();
            vec![refused(&site.daemon, &sealed)]
        },
        502,
    ),
    (
        "shows a certificate of a foreign CA",
        |site| {
            let foreign = Site::new(Kind::P256);
            vec![unwelcome(&site.daemon, &foreign.client)]
        },
        502,
    ),
    (
        "signs with a key of a foreign CA",
        |site| {
            let foreign = Site::new(Kind::P256);
            let xml = site
                .client
                .message(DAEMON, request(), None)
                .to_xml()
                .unwrap();
            let client = identity(foreign.dir.path(), "client");
            let daemon = site.certificate("daemon.pem");
            vec![refused(
                &site.daemon,
                &seal::seal_bytes(&client, &daemon, &xml).unwrap(),
            )]
        },
        503,
    ),
    (
        "shows a certificate that has expired",
        |site| {
            pki::issue_for(site.dir.path(), "late", Kind::P256, 0).unwrap();
            fs::write(site.path("subjects"), "user CN=late\n").unwrap();
            vec![unwelcome(&site.daemon, &endpoint(site.dir.path(), "late"))]
        },
        502,
    ),
    (
        "shows one that nobody has listed",
        |site| {
            pki::issue(site.dir.path(), "other", Kind::P256).unwrap();
            vec![unwelcome(&site.daemon, &endpoint(site.dir.path(), "other"))]
        },
        502,
    ),
    (
        "uses one that was revoked",
        |site| {
            let sealed = site.sealed();
            pki::revoke(site.dir.path(), &[site.path("client.pem")]).unwrap();
            vec![
                unwelcome(&site.daemon, &site.client),
                refused(&site.daemon, &sealed),
            ]
        },
        502,
    ),
    (
        "uses one that is no longer listed",
        |site| {
            let sealed = site.sealed();
            fs::write(site.path("subjects"), format!("daemon {DAEMON}\n")).unwrap();
            vec![refused(&site.daemon, &sealed)]
        },
        502,
    ),
    (
        "comes while the list is damaged",
        |site| {
            let sealed = site.sealed();
            fs::write(
                site.path("subjects"),
                format!("user {CLIENT}\nroot {DAEMON}\n"),
            )
            .unwrap();
            vec![refused(&site.daemon, &sealed)]
        },
        502,
    ),
];

#[test]
fn a_message_is_for_one_of_those_that_share_a_certificate() {
    let site = Site::new(Kind::P256);
    let [one, two] = [1, 2].map(|number| {
        let streams = site.path(&format!("{number}.streams"));
        let daemon =
            endpoint_with(site.dir.path(), "daemon", streams).of_member(Uuid::from_u128(number));
        introduce(&site.client, &daemon);
        daemon
    });
    let hello = Message::from_xml(&one.hello(CLIENT, None).unwrap()).unwrap();
    assert_eq!(hello.header.member, one.member());
    let to_one = |member| site.client.seal(DAEMON, member, request(), None).unwrap();
    let sealed = to_one(one.member());
    // A broker that hands it to both, and to one that knows of no others.
    for other in [&two, &site.daemon] {
        assert_eq!(refused(other, &sealed).unwrap(), 503);
    }
    assert_eq!(one.open(&sealed).unwrap().0.body, request());
    assert_eq!(refused(&one, &sealed).unwrap(), 503);
    assert_eq!(refused(&one, &to_one(None)).unwrap(), 503);
    // Each has seen a part only of what the client says, which is no gap to it; and the client takes what both say.
    for daemon in [&two, &one, &two] {
        daemon.open(&to_one(daemon.member())).unwrap();
        let answer = daemon.seal(CLIENT, None, Body::StatusList(vec![]), None);
        site.client.open(&answer.unwrap()).unwrap();
    }
}

#[test]
fn what_is_sealed_to_oneself_is_of_nobody_else() {
    let site = Site::new(Kind::P256);
    let offer = Body::Offer {
        task: Uuid::from_u128(7),
        owner: CLIENT.into(),
        request: "{}".into(),
    };
    let sealed = site.daemon.seal_own(offer.clone(), None).unwrap();
    let other = endpoint_with(site.dir.path(), "daemon", site.path("other"));
    for _ in 0..2 {
        assert_eq!(other.open_own(&sealed).unwrap().body, offer);
    }
    // What a user says to the daemon, what the daemon says to a user, what anybody can encrypt, and what was altered.
    let to_user = site.daemon.seal(CLIENT, None, offer.clone(), None).unwrap();
    let by_user = site.client.seal(DAEMON, None, offer, None).unwrap();
    let plain = site.encrypted(b"<x/>", Cipher::aes_256_gcm());
    let mut altered = sealed.clone();
    *altered.last_mut().unwrap() ^= 1;
    for wrong in [to_user, by_user, plain, altered] {
        assert!(other.open_own(&wrong).is_err());
    }
    // As a message of the daemon's it is none, even when it has met itself.
    let member =
        endpoint_with(site.dir.path(), "daemon", site.path("member")).of_member(Uuid::from_u128(1));
    member.meet(&site.daemon.hello("", None).unwrap()).unwrap();
    assert_eq!(refused(&member, &sealed).unwrap(), 503);
}

fn unwelcome(daemon: &Endpoint, other: &Endpoint) -> Result<u16, Box<Message>> {
    let hello = other.hello(DAEMON, None).unwrap();
    match daemon.meet(&hello) {
        Ok(_) => Err(Box::new(Message::from_xml(&hello).unwrap())),
        Err(error) => Ok(error.code()),
    }
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_hostile_broker_is_refused_and_logged() {
    for (name, act, code) in ACTS {
        let site = Site::new(Kind::P256);
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        let answers = tracing::subscriber::with_default(subscriber, || act(&site));
        assert!(!answers.is_empty());
        for answer in &answers {
            assert_eq!(answer.as_ref(), Ok(code), "a broker that {name}");
        }
        let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        println!(
            "a broker that {name}: {} x {code}: {}",
            answers.len(),
            log.lines().next().unwrap_or("")
        );
        // `open_at` is the only one without a log.
        if !name.contains("late") {
            let logged = log.lines().filter(|line| {
                line.contains(" refused: ") && line.contains(&format!("code={code}"))
            });
            assert_eq!(logged.count(), answers.len(), "{log}");
        }
    }
}

#[test]
fn whatever_bit_is_altered_nothing_else_is_read() {
    for kind in [Kind::P256, Kind::Rsa3072] {
        let site = Site::new(kind);
        let xml = site.client.message(DAEMON, request(), None);
        let client = identity(site.dir.path(), "client");
        let daemon = site.certificate("daemon.pem");
        let sealed = seal::seal_bytes(&client, &daemon, &xml.to_xml().unwrap()).unwrap();
        let mut read = 0;
        // RSA takes its time.
        let step = if kind == Kind::P256 { 1 } else { 5 };
        for n in (0..sealed.len()).step_by(step) {
            let mut altered = sealed.clone();
            altered[n] ^= 1 << (n % 8);
            match refused(&site.daemon, &altered) {
                Ok(code) => assert!(code == 502 || code == 503, "{code}"),
                // Around the text is what nobody reads, as the version.
                Err(message) => {
                    read += 1;
                    assert_eq!(*message, xml);
                }
            }
        }
        assert!(read <= 1, "the same message was read {read} times");
    }
}

#[test]
fn who_is_listed_again_is_believed_again() {
    let site = Site::new(Kind::P256);
    let list = site.read("subjects");
    let sealed = site.sealed();
    fs::write(site.path("subjects"), "").unwrap();
    assert_eq!(refused(&site.daemon, &sealed), Ok(502));
    fs::write(site.path("subjects"), &list).unwrap();
    site.daemon.open(&site.sealed()).unwrap();
}

/// Runs openssl; `None` where there is none.
fn openssl(dir: &Path, args: &str) -> Option<(bool, Vec<u8>, String)> {
    match Command::new("openssl")
        .args(args.split(' '))
        .current_dir(dir)
        .output()
    {
        Err(error) => {
            println!("skipped: openssl: {error}");
            None
        }
        Ok(output) => {
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            Some((output.status.success(), output.stdout, errors))
        }
    }
}

#[test]
fn openssl_opens_and_verifies_what_is_sealed() {
    for kind in [Kind::P256, Kind::Rsa3072] {
        let site = Site::new(kind);
        fs::write(site.path("sealed"), site.sealed()).unwrap();
        for args in [
            "cms -decrypt -binary -inform DER -in sealed -inkey daemon.key -recip daemon.pem -out signed",
            "cms -verify -binary -inform DER -in signed -CAfile ca.pem -out text",
        ] {
            let Some((good, _, errors)) = openssl(site.dir.path(), args) else {
                return;
            };
            assert!(good, "{args}: {errors}");
        }
        let message = Message::from_xml(&site.read("text")).unwrap();
        assert_eq!(message.body, request());
        assert_eq!(message.header.from, CLIENT);
    }
}

#[test]
fn what_openssl_seals_is_opened() {
    for kind in [Kind::P256, Kind::Rsa3072] {
        let site = Site::new(kind);
        for identifier in ["", " -keyid"] {
            let message = site.client.message(DAEMON, request(), None);
            fs::write(site.path("text"), message.to_xml().unwrap()).unwrap();
            let sign = format!(
                "cms -sign -nodetach -binary -outform DER -signer client.pem -inkey client.key -in text -out signed{identifier}"
            );
            let encrypt = format!(
                "cms -encrypt -binary -aes-256-gcm -outform DER -in signed -out sealed{identifier} -recip daemon.pem"
            );
            for args in [&sign, &encrypt] {
                let Some((good, _, errors)) = openssl(site.dir.path(), args) else {
                    return;
                };
                assert!(good, "{args}: {errors}");
            }
            let (opened, role) = site.daemon.open(&site.read("sealed")).unwrap();
            assert_eq!((opened, role), (message, Role::User));
        }
    }
}

#[test]
fn openssl_takes_the_ca_and_its_list() {
    use std::os::unix::fs::PermissionsExt;
    for kind in [Kind::P256, Kind::Rsa3072] {
        let site = Site::new(kind);
        for name in ["ca.key", "client.key"] {
            let mode = fs::metadata(site.path(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        let check =
            "verify -x509_strict -crl_check -purpose smimesign -CAfile ca.pem -CRLfile crl.pem";
        let verify = |name: &str| openssl(site.dir.path(), &format!("{check} {name}"));
        for name in ["client.pem", "daemon.pem"] {
            let Some((good, _, errors)) = verify(name) else {
                return;
            };
            assert!(good, "{errors}");
        }
        pki::revoke(site.dir.path(), &[site.path("client.pem")]).unwrap();
        pki::revoke(
            site.dir.path(),
            &[site.path("mallory.pem"), site.path("client.pem")],
        )
        .unwrap();
        for (name, expected) in [
            ("client.pem", false),
            ("mallory.pem", false),
            ("daemon.pem", true),
        ] {
            let (good, _, errors) = verify(name).unwrap();
            assert_eq!(good, expected, "{name}: {errors}");
        }
        let subject = "x509 -noout -subject -nameopt RFC2253 -in client.pem";
        let (_, text, _) = openssl(site.dir.path(), subject).unwrap();
        assert_eq!(
            String::from_utf8(text).unwrap().trim(),
            format!("subject={CLIENT}")
        );
    }
}

#[test]
fn the_ca_overwrites_nothing_and_knows_its_own() {
    let (site, foreign) = (Site::new(Kind::P256), Site::new(Kind::P256));
    let old = site.read("client.key");
    let code = |result: Result<pki::Issued, pki::Error>| result.unwrap_err().code();
    assert_eq!(
        code(pki::issue(site.dir.path(), "client", Kind::P256)),
        "exists"
    );
    assert_eq!(
        code(pki::init(site.dir.path(), "Test-CA", Kind::P256)),
        "exists"
    );
    assert_eq!(site.read("client.key"), old);
    for name in [
        "",
        "ca",
        "crl",
        "../up",
        ".hidden",
        "a b",
        "a/b",
        &"a".repeat(65),
    ] {
        assert_eq!(
            code(pki::issue(site.dir.path(), name, Kind::P256)),
            "bad-name",
            "{name}"
        );
    }
    let revoked = pki::revoke(site.dir.path(), &[foreign.path("client.pem")]);
    assert_eq!(revoked.unwrap_err().code(), "foreign-certificate");
}

#[test]
fn a_subject_is_text_as_openssl_has_it() {
    let mut name = openssl::x509::X509Name::builder().unwrap();
    for (key, value) in [("C", "DE"), ("O", "A, B + \"C\""), ("CN", "#1 ü\n")] {
        name.append_entry_by_text(key, value).unwrap();
    }
    let text = trust::subject(&name.build()).unwrap();
    assert_eq!(text, "CN=\\#1 \\C3\\BC\\0A,O=A\\, B \\+ \\\"C\\\",C=DE");
}
