//! FTP servers that refuse, stall, break off, or are old.

#![allow(clippy::unwrap_used)]

mod common;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Bench, ftp};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use xbee_staging::{Creation, Identity, Limits, Progress, PutRequest};

/// How the scripted server differs from a good one.
#[derive(Clone, Default)]
struct Script {
    /// Answers to commands, by the command's first word.
    replies: Vec<(&'static str, &'static str)>,
    /// What RETR sends.
    data: Vec<u8>,
    /// The reply after the transfer.
    end: &'static str,
    /// Bytes after which RETR breaks off, and the control connection with it.
    cut: Option<usize>,
}

/// A server for what a real one does not do. Returns its address and the commands it gets.
async fn scripted(script: Script) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let commands = Arc::new(Mutex::new(Vec::new()));
    let log = commands.clone();
    tokio::spawn(async move {
        loop {
            let (control, _) = listener.accept().await.unwrap();
            converse(control, &script, &log).await;
        }
    });
    (address, commands)
}

async fn converse(control: TcpStream, script: &Script, log: &Mutex<Vec<String>>) {
    let mut control = BufReader::new(control);
    let mut offset = 0;
    let data = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = data.local_addr().unwrap().port();
    let _ = control.write_all(b"220 hello\r\n").await;
    let mut line = String::new();
    while matches!(control.read_line(&mut line).await, Ok(n) if n > 0) {
        let command = std::mem::take(&mut line).trim_end().to_owned();
        let word = command.split(' ').next().unwrap_or_default().to_owned();
        if let Some(rest) = command.strip_prefix("REST ") {
            offset = rest.parse().unwrap();
        }
        log.lock().unwrap().push(command);
        let scripted = script.replies.iter().find(|(name, _)| *name == word);
        let reply = match (scripted, word.as_str()) {
            (Some((_, reply)), _) => (*reply).to_owned(),
            (None, "USER") => "331 password".to_owned(),
            (None, "PASS") => "230 welcome".to_owned(),
            (None, "TYPE") => "200 binary".to_owned(),
            (None, "EPSV") => format!("229 Entering Extended Passive Mode (|||{port}|)"),
            // Another host's address, which the client must not follow.
            (None, "PASV") => format!("227 ok (192,0,2,1,{},{})", port >> 8, port & 255),
            (None, "RETR" | "STOR") => "150 here it is".to_owned(),
            (None, "DELE") => "250 gone".to_owned(),
            (None, _) => "502 no".to_owned(),
        };
        let opened = reply.starts_with("150");
        let _ = control.write_all(format!("{reply}\r\n").as_bytes()).await;
        if opened {
            let (mut stream, _) = data.accept().await.unwrap();
            if word == "RETR" {
                let data = &script.data[offset..];
                let sent = script.cut.unwrap_or(data.len()).min(data.len());
                let _ = stream.write_all(&data[..sent]).await;
                if sent < data.len() {
                    return;
                }
            } else {
                let mut received = Vec::new();
                let _ = stream.read_to_end(&mut received).await;
            }
            drop(stream);
            let end = format!("{}\r\n", script.end);
            let _ = control.write_all(end.as_bytes()).await;
        }
    }
}

#[tokio::test]
async fn goes_on_where_the_connection_broke() {
    let modified = ("MDTM", "213 20261102100000");
    for (replies, code) in [
        (
            vec![("SIZE", "213 700000"), modified, ("REST", "350 go on")],
            "ok",
        ),
        (
            vec![
                ("EPSV", "500 what?"),
                ("SIZE", "213 700000"),
                modified,
                ("REST", "350 go on"),
            ],
            "ok",
        ),
        (
            vec![("SIZE", "213 700000"), modified, ("REST", "502 no")],
            "ftp",
        ),
        // It cannot be told whether it is the same file.
        (vec![("SIZE", "213 700000")], "transfer"),
        (vec![modified], "transfer"),
    ] {
        let bench = Bench::new();
        let data = common::noise(700_000, 41);
        let (server, commands) = scripted(Script {
            replies,
            data: data.clone(),
            end: "226 done",
            cut: Some(300_000),
        })
        .await;
        let fetched = bench.fetch(&format!("ftp://{server}/a")).await;
        let got = fetched.as_ref().map_or_else(|error| error.code(), |_| "ok");
        assert_eq!(got, code, "{fetched:?}");
        assert!(code != "ok" || bench.out() == data);
        assert_eq!(bench.names().is_empty(), code != "ok");
        let commands = commands.lock().unwrap();
        let asked = |word: &str| commands.iter().filter(|c| c.starts_with(word)).count();
        let expected = match code {
            "ok" => (3, 2),
            // Once more with PASV.
            "ftp" => (1, 2),
            _ => (1, 0),
        };
        assert_eq!((asked("RETR"), asked("REST")), expected);
    }
}

#[tokio::test]
async fn a_real_server_refuses() {
    let bench = Bench::new();
    let site = tempfile::tempdir().unwrap();
    let server = ftp::serve(site.path()).await;
    let error = bench
        .fetch(&format!("ftp://{server}/nothing"))
        .await
        .unwrap_err();
    assert_eq!(error.code(), "not-found", "{error}");
    let error = bench
        .fetch(&format!("ftp://user:hunter2@{server}/a"))
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("ftp://***@{server}/a: access denied (FTP login failed with 530)")
    );
    let source = bench.write("source", b"x");
    let error = bench
        .put(
            &source,
            &format!("ftp://{server}/no/such/dir"),
            Creation::Overwrite,
        )
        .await
        .unwrap_err();
    assert!(
        ["access-denied", "ftp"].contains(&error.code()),
        "{error:?}"
    );
    assert_eq!(bench.names(), ["source"]);
}

#[tokio::test]
async fn a_server_without_epsv_and_size() {
    let bench = Bench::new();
    let (server, commands) = scripted(Script {
        replies: vec![("EPSV", "500 what?")],
        data: b"old but good".to_vec(),
        end: "226 done",
        ..Script::default()
    })
    .await;
    bench.fetch(&format!("ftp://{server}/a")).await.unwrap();
    assert_eq!(bench.out(), b"old but good");
    assert_eq!(
        *commands.lock().unwrap(),
        [
            "USER anonymous",
            "PASS anonymous@",
            "TYPE I",
            "SIZE a",
            "EPSV",
            "PASV",
            "RETR a",
            "QUIT"
        ]
    );
}

#[tokio::test]
async fn a_broken_transfer_is_no_file() {
    let broken = [
        // The data ends as if complete, but the server says that it was not.
        ("426 connection lost", "213 3", "ftp"),
        // All seems well, but it is less than announced.
        ("226 done", "213 4", "transfer"),
        // A reply that is none.
        ("what?", "213 3", "transfer"),
    ];
    for (end, size, code) in broken {
        let bench = Bench::new();
        let (server, _) = scripted(Script {
            replies: vec![("SIZE", size)],
            data: b"abc".to_vec(),
            end,
            ..Script::default()
        })
        .await;
        let error = bench.fetch(&format!("ftp://{server}/a")).await.unwrap_err();
        assert_eq!(error.code(), code, "{error:?}");
        assert_eq!(bench.names(), [""; 0]);
    }
}

#[tokio::test]
async fn a_server_that_repeats_the_password() {
    let bench = Bench::new();
    let (server, _) = scripted(Script {
        replies: vec![("PASS", "530 hunter2 is wrong")],
        ..Script::default()
    })
    .await;
    let error = bench
        .fetch(&format!("ftp://bob:hunter2@{server}/a"))
        .await
        .unwrap_err();
    assert!(!format!("{error} {error:?}").contains("hunter2"));
}

/// Keeps what the libraries log.
struct Log(Mutex<String>);

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let line = format!("{} {}\n", record.target(), record.args());
        self.0.lock().unwrap().push_str(&line);
    }

    fn flush(&self) {}
}

#[tokio::test]
async fn no_password_is_logged() {
    static LOG: Log = Log(Mutex::new(String::new()));
    log::set_logger(&LOG).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
    let bench = Bench::new();
    let (server, commands) = scripted(Script {
        end: "226 done",
        ..Script::default()
    })
    .await;
    bench
        .fetch(&format!("ftp://bob:hunter2@{server}/a"))
        .await
        .unwrap();
    assert!(
        commands
            .lock()
            .unwrap()
            .contains(&"PASS hunter2".to_owned())
    );
    let logged = LOG.0.lock().unwrap();
    assert!(!logged.contains("hunter2"), "{logged}");
}

#[tokio::test]
async fn commands_cannot_be_smuggled() {
    let bench = Bench::new();
    let (server, commands) = scripted(Script::default()).await;
    for uri in [
        format!("ftp://{server}/a%0D%0ADELE%20b"),
        format!("ftp://a%0D%0ADELE%20b@{server}/a"),
    ] {
        assert_eq!(bench.fetch(&uri).await.unwrap_err().code(), "invalid-uri");
    }
    assert!(commands.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_silent_server() {
    let bench = Bench::with_limits(Limits {
        idle: Duration::from_millis(200),
        ..Limits::default()
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("ftp://{}/a", listener.local_addr().unwrap());
    let error = bench.fetch(&uri).await.unwrap_err();
    assert_eq!(error.code(), "timeout");
    let source = bench.write("source", b"x");
    let error = bench
        .put(&source, &uri, Creation::Overwrite)
        .await
        .unwrap_err();
    assert_eq!(error.code(), "timeout");
}

#[tokio::test]
async fn a_cancelled_upload_is_removed_from_the_server() {
    let bench = Bench::new();
    let site = tempfile::tempdir().unwrap();
    let server = ftp::serve(site.path()).await;
    let source = bench.path("source");
    // A hole: as long as it takes, but no space.
    std::fs::File::create(&source)
        .unwrap()
        .set_len(20 << 30)
        .unwrap();
    let (sender, mut progress) = watch::channel(Progress::default());
    let cancel = CancellationToken::new();
    let token = cancel.clone();
    let request = PutRequest {
        uri: format!("ftp://{server}/half").parse().unwrap(),
        source,
        creation: Creation::Overwrite,
        identity: Identity::current(),
        repeatable: None,
    };
    let put = tokio::spawn(async move { bench.stager.put(request, sender, &token).await });
    progress
        .wait_for(|progress| progress.transferred_bytes > 16 << 20)
        .await
        .unwrap();
    assert!(site.path().join("half").exists());
    cancel.cancel();
    let asked = std::time::Instant::now();
    assert_eq!(put.await.unwrap().unwrap_err().code(), "cancelled");
    assert!(asked.elapsed() < Duration::from_secs(1));
    assert!(!site.path().join("half").exists());
}

#[tokio::test]
async fn a_file_that_may_not_be_replaced_is_not_removed() {
    let bench = Bench::new();
    let source = bench.write("source", b"x");
    let (server, commands) = scripted(Script {
        replies: vec![("STOR", "550 Permission denied.")],
        ..Script::default()
    })
    .await;
    let error = bench
        .put(&source, &format!("ftp://{server}/a"), Creation::Overwrite)
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("ftp://{server}/a: access denied (550 Permission denied.)")
    );
    let commands = commands.lock().unwrap();
    assert!(commands.contains(&"STOR a".to_owned()));
    assert!(!commands.iter().any(|c| c.starts_with("DELE")));
}

#[tokio::test]
async fn a_half_file_is_removed_from_the_server() {
    let bench = Bench::new();
    let source = bench.write("source", b"x");
    let (server, commands) = scripted(Script {
        end: "452 no space",
        ..Script::default()
    })
    .await;
    let error = bench
        .put(&source, &format!("ftp://{server}/a"), Creation::Overwrite)
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("ftp://{server}/a: the FTP server answered: 452 no space")
    );
    assert_eq!(
        commands.lock().unwrap().last().map(String::as_str),
        Some("DELE a")
    );
}
