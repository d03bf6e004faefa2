//! What goes wrong on the way: servers that fail, lie, stall or talk too much; wrong data; cancellation.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::http::{Step, answer};
use common::{Bench, file_uri, http, noise, pack};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use xbee_staging::{
    Algorithm, Compression, Creation, Destination, Digest, Error, Identity, Limits, Progress,
    PutRequest,
};

const SINGLE: [Compression; 4] = [
    Compression::Bzip2,
    Compression::Gzip,
    Compression::Xz,
    Compression::Zstd,
];

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    text
}

/// Fetches from a server with this behaviour; nothing may be left of it.
async fn fails(
    limits: Limits,
    path: &str,
    handler: impl Fn(http::Request) -> Vec<Step> + Send + Sync + 'static,
) -> Error {
    let bench = Bench::with_limits(limits);
    let server = http::serve(handler).await;
    let error = bench
        .fetch(&format!("http://user:hunter2@{server}{path}"))
        .await
        .unwrap_err();
    assert_eq!(bench.names(), [""; 0], "{error}");
    let everything = format!("{} {error:?}", chain(&error));
    assert!(!everything.contains("hunter2"), "{everything}");
    assert!(error.to_string().starts_with("http://***@127.0.0.1:"));
    error
}

#[tokio::test]
async fn http_status_codes() {
    for (status, code, text) in [
        (404, "not-found", "not found (HTTP status 404)"),
        (410, "not-found", "not found (HTTP status 410)"),
        (401, "access-denied", "access denied (HTTP status 401)"),
        (403, "access-denied", "access denied (HTTP status 403)"),
        (500, "http-status", "the server answered HTTP status 500"),
        (503, "http-status", "the server answered HTTP status 503"),
    ] {
        let error = fails(Limits::default(), "/a?hunter2", move |_| {
            answer(status, &[], b"some page")
        })
        .await;
        assert_eq!(error.code(), code);
        assert!(
            error.to_string().ends_with(&format!("/a?***: {text}")),
            "{error}"
        );
    }
}

#[tokio::test]
async fn redirects_that_are_not_followed() {
    let looping = |request: http::Request| answer(302, &[("Location", &request.path)], b"");
    let error = fails(Limits::default(), "/a", looping).await;
    assert!(
        error
            .to_string()
            .ends_with("redirect refused: more than 5 redirects"),
        "{error}"
    );
    for target in [
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "ftp://127.0.0.1/x?hunter2",
        "gopher://x:hunter2@127.0.0.1/",
    ] {
        let error = fails(Limits::default(), "/a", move |_| {
            answer(302, &[("Location", target)], b"")
        })
        .await;
        assert_eq!(error.code(), "redirect", "{error}");
    }
    let error = fails(Limits::default(), "/a", |_| answer(304, &[], b"")).await;
    assert_eq!(error.code(), "redirect", "{error}");
}

#[tokio::test]
async fn a_truncated_body_is_no_file() {
    let error = fails(Limits::default(), "/a?hunter2", |_| {
        vec![Step::Send(
            b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc".to_vec(),
        )]
    })
    .await;
    assert_eq!(error.code(), "transfer", "{}", chain(&error));
    let error = fails(Limits::default(), "/a?hunter2", |_| {
        vec![Step::Send(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n".to_vec(),
        )]
    })
    .await;
    assert_eq!(error.code(), "transfer", "{}", chain(&error));
    let error = fails(Limits::default(), "/a?hunter2", |_| {
        vec![Step::Send(b"SSH-2.0-OpenSSH\r\n".to_vec())]
    })
    .await;
    assert_eq!(error.code(), "transfer", "{}", chain(&error));
}

#[tokio::test]
async fn too_much_is_refused_early_or_when_it_comes() {
    let limits = Limits {
        transferred_bytes: 1 << 20,
        ..Limits::default()
    };
    let announced = fails(limits.clone(), "/a", |_| {
        vec![Step::Send(
            b"HTTP/1.1 200 OK\r\nContent-Length: 1048577\r\n\r\n".to_vec(),
        )]
    });
    let endless = fails(limits, "/a", |_| {
        vec![
            Step::Send(b"HTTP/1.1 200 OK\r\n\r\n".to_vec()),
            Step::Forever(vec![b'x'; 65536]),
        ]
    });
    for error in [announced.await, endless.await] {
        assert!(
            error
                .to_string()
                .ends_with("too large: more than 1048576 bytes to transfer"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn silence_and_slowness_have_limits() {
    let limits = Limits {
        idle: Duration::from_millis(200),
        ..Limits::default()
    };
    let error = fails(limits.clone(), "/a", |_| {
        vec![Step::Pause(Duration::from_secs(30))]
    })
    .await;
    assert!(
        error
            .to_string()
            .ends_with("timed out: waiting for the server took longer than 0.2 s"),
        "{error}"
    );
    let error = fails(limits, "/a", |_| {
        vec![
            Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc".to_vec()),
            Step::Pause(Duration::from_secs(30)),
        ]
    })
    .await;
    assert_eq!(error.code(), "timeout");
    // A byte at a time is never silent; the time for the whole ends it.
    let limits = Limits {
        total: Duration::from_millis(400),
        ..Limits::default()
    };
    let error = fails(limits, "/a", |_| {
        let mut steps = vec![Step::Send(b"HTTP/1.1 200 OK\r\n\r\n".to_vec())];
        for _ in 0..1000 {
            steps.push(Step::Pause(Duration::from_millis(50)));
            steps.push(Step::Send(b"x".to_vec()));
        }
        steps
    })
    .await;
    assert!(
        error
            .to_string()
            .ends_with("timed out: the whole transfer took longer than 0.4 s"),
        "{error}"
    );
}

#[tokio::test]
async fn nobody_listens() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let bench = Bench::new();
    let source = bench.write("source", b"x");
    for scheme in ["http", "https", "ftp"] {
        let uri = format!("{scheme}://{address}/a");
        let error = bench.fetch(&uri).await.unwrap_err();
        assert_eq!(error.to_string(), format!("{uri}: cannot connect"));
        assert!(chain(&error).contains("refused"), "{}", chain(&error));
        let error = bench
            .put(&source, &uri, Creation::Overwrite)
            .await
            .unwrap_err();
        assert_eq!(error.code(), "connect");
    }
}

#[tokio::test]
async fn wrong_digest_leaves_nothing() {
    for compression in [None, Some(Compression::Gzip)] {
        let bench = Bench::new();
        // As gzip, this is damaged too; that it is the wrong data matters more.
        let source = bench.write("source", b"abc");
        let zeros = "0".repeat(64);
        let expected = Digest::from_hex(Algorithm::Sha256, &zeros).unwrap();
        let error = bench
            .fetch_as(&file_uri(&source), Some(expected), compression)
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "{}: wrong sha256 digest: expected {zeros}, got \
                 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
                file_uri(&source)
            )
        );
        assert_eq!(bench.names(), ["source"]);
    }
}

#[tokio::test]
async fn a_failed_fetch_leaves_the_old_file() {
    let bench = Bench::new();
    bench.write("out", b"old");
    let source = bench.write("source", b"no gzip");
    let uri = file_uri(&source);
    let error = bench
        .fetch_as(&uri, None, Some(Compression::Gzip))
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{uri}: corrupt or truncated gzip data")
    );
    assert_eq!(bench.out(), b"old");
    assert_eq!(bench.names(), ["out", "source"]);
}

#[tokio::test]
async fn damaged_compression_is_refused_with_the_right_digest_too() {
    for compression in SINGLE {
        let packed = pack(compression, &noise(200_000, 8));
        let mut flipped = packed.clone();
        flipped[100_000] ^= 1;
        let trailing = [&packed[..], b"garbage"].concat();
        for bad in [&packed[..packed.len() - 1], &flipped, b"", &trailing] {
            let bench = Bench::new();
            let source = bench.write("source", bad);
            let hash = Digest::from_hex(Algorithm::Blake3, &blake3::hash(bad).to_hex()).unwrap();
            let error = bench
                .fetch_as(&file_uri(&source), Some(hash), Some(compression))
                .await
                .unwrap_err();
            assert_eq!(error.code(), "corrupt-archive", "{compression:?}: {error}");
            assert_eq!(bench.names(), ["source"]);
        }
    }
}

#[tokio::test]
async fn verify_reads_everything_and_writes_nothing() {
    let bench = Bench::new();
    let packed = pack(Compression::Xz, &noise(100_000, 10));
    let source = bench.write("source", &packed);
    let mut request = bench.request(&file_uri(&source));
    request.destination = Destination::Verify;
    request.compression = Some(Compression::Xz);
    request.hash =
        Some(Digest::from_hex(Algorithm::Blake3, &blake3::hash(&packed).to_hex()).unwrap());
    let done = bench.run(request.clone()).await.unwrap();
    assert_eq!(done.bytes_written, 100_000);
    assert_eq!(bench.names(), ["source"]);
    bench.write("source", b"other");
    assert_eq!(
        bench.run(request).await.unwrap_err().code(),
        "hash-mismatch"
    );
}

#[tokio::test]
async fn only_regular_files() {
    let bench = Bench::new();
    let fifo = bench.path("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(bench.path("socket")).unwrap();
    let source = bench.write("source", b"x");
    for (path, what) in [
        (bench.dir.path().to_path_buf(), "a directory"),
        (fifo, "a named pipe"),
        (bench.path("socket"), "a socket"),
        ("/dev/null".into(), "a character device"),
    ] {
        let uri = file_uri(&path);
        let expected = format!("{uri}: is {what}, not a regular file");
        let error = bench.fetch(&uri).await.unwrap_err();
        assert_eq!(error.to_string(), expected);
        let error = bench
            .put(&source, &uri, Creation::Overwrite)
            .await
            .unwrap_err();
        assert_eq!(error.to_string(), expected);
        let uri = file_uri(&bench.path("target"));
        let error = bench
            .put(&path, &uri, Creation::Overwrite)
            .await
            .unwrap_err();
        assert_eq!(error.code(), "not-regular-file");
    }
    std::os::unix::fs::symlink("source", bench.path("link")).unwrap();
    let uri = file_uri(&bench.path("target"));
    let error = bench
        .put(&bench.path("link"), &uri, Creation::Overwrite)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("a symbolic link"), "{error}");
    bench.fetch(&file_uri(&bench.path("link"))).await.unwrap();
}

#[tokio::test]
async fn missing_files() {
    let bench = Bench::new();
    let uri = file_uri(&bench.path("nothing"));
    let error = bench.fetch(&uri).await.unwrap_err();
    assert_eq!(error.to_string(), format!("{uri}: not found"));
    let error = bench
        .put(&bench.path("nothing"), &uri, Creation::Overwrite)
        .await
        .unwrap_err();
    assert_eq!(error.code(), "local-io", "{error}");
    let source = bench.write("source", b"x");
    let uri = file_uri(&bench.path("no/dir"));
    let error = bench
        .put(&source, &uri, Creation::Overwrite)
        .await
        .unwrap_err();
    assert_eq!(error.code(), "not-found", "{error}");
    let mut request = bench.request(&file_uri(&source));
    request.destination = Destination::File(bench.path("no/dir"));
    assert_eq!(bench.run(request).await.unwrap_err().code(), "local-io");
}

/// Starts `transfer`, cancels it once bytes have moved, and returns its error; it must come at once.
async fn cancelled<T: std::fmt::Debug + Send + 'static>(
    transfer: impl Future<Output = Result<T, Error>> + Send + 'static,
    mut progress: watch::Receiver<Progress>,
    cancel: CancellationToken,
) -> Duration {
    let transfer = tokio::spawn(transfer);
    progress
        .wait_for(|progress| progress.transferred_bytes > 0)
        .await
        .unwrap();
    let asked = Instant::now();
    cancel.cancel();
    let error = transfer.await.unwrap().unwrap_err();
    assert_eq!(error.code(), "cancelled");
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    took
}

#[tokio::test]
async fn cancel_while_the_server_stalls() {
    let bench = std::sync::Arc::new(Bench::new());
    let server = http::serve(|_| {
        vec![
            Step::Send(b"HTTP/1.1 200 OK\r\n\r\nabc".to_vec()),
            Step::Pause(Duration::from_secs(60)),
        ]
    })
    .await;
    let (sender, progress) = watch::channel(Progress::default());
    let cancel = CancellationToken::new();
    let (b, c) = (bench.clone(), cancel.clone());
    let request = bench.request(&format!("http://{server}/"));
    let transfer = async move { b.stager.fetch(request, sender, &c).await };
    cancelled(transfer, progress, cancel).await;
    assert_eq!(bench.names(), [""; 0]);
}

#[tokio::test]
async fn cancel_while_decoding() {
    for compression in SINGLE {
        let bench = std::sync::Arc::new(Bench::new());
        // 40 GiB of zeros in a few megabytes: the source ends long before the decoder.
        let one = pack(compression, &vec![0; 64 << 20]);
        let source = bench.write("source", &one.repeat(640));
        let (sender, progress) = watch::channel(Progress::default());
        let cancel = CancellationToken::new();
        let (b, c) = (bench.clone(), cancel.clone());
        let mut request = bench.request(&file_uri(&source));
        request.compression = Some(compression);
        let transfer = async move { b.stager.fetch(request, sender, &c).await };
        let took = cancelled(transfer, progress, cancel).await;
        println!("cancelled while decoding {compression:?} in {took:?}");
        assert_eq!(bench.names(), ["source"]);
    }
}

#[tokio::test]
async fn cancel_while_unpacking() {
    let bench = std::sync::Arc::new(Bench::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_path("d").unwrap();
    header.set_mode(0o755);
    header.set_size(0);
    for set in [
        tar::Header::set_uid,
        tar::Header::set_gid,
        tar::Header::set_mtime,
    ] {
        set(&mut header, 0);
    }
    header.set_cksum();
    let source = bench.write("source", &header.as_bytes().repeat(400_000));
    let (sender, progress) = watch::channel(Progress::default());
    let cancel = CancellationToken::new();
    let (b, c) = (bench.clone(), cancel.clone());
    let mut request = bench.request(&file_uri(&source));
    request.compression = Some(Compression::Tar);
    request.destination = Destination::Unpack(bench.path("tree"));
    let transfer = async move { b.stager.fetch(request, sender, &c).await };
    let took = cancelled(transfer, progress, cancel).await;
    println!("cancelled while unpacking in {took:?}");
    assert_eq!(bench.names(), ["source"]);
}

#[tokio::test]
async fn dropping_the_future_cancels() {
    let bench = Bench::new();
    let one = pack(Compression::Zstd, &vec![0; 64 << 20]);
    let source = bench.write("source", &one.repeat(640));
    let (sender, _progress) = watch::channel(Progress::default());
    let mut request = bench.request(&file_uri(&source));
    request.compression = Some(Compression::Zstd);
    let never = CancellationToken::new();
    let fetch = bench.stager.fetch(request, sender, &never);
    let timed = tokio::time::timeout(Duration::from_millis(200), fetch).await;
    assert!(timed.is_err());
    let deadline = Instant::now() + Duration::from_secs(1);
    while bench.names() != ["source"] {
        assert!(Instant::now() < deadline, "{:?}", bench.names());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn cancel_an_upload_that_nobody_reads() {
    let bench = std::sync::Arc::new(Bench::new());
    let source = bench.write("source", &vec![1; 32 << 20]);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = listener.local_addr().unwrap();
    let (sender, progress) = watch::channel(Progress::default());
    let cancel = CancellationToken::new();
    let (b, c) = (bench.clone(), cancel.clone());
    let request = PutRequest {
        uri: format!("http://{server}/").parse().unwrap(),
        source,
        creation: Creation::Overwrite,
        identity: Identity::current(),
        repeatable: None,
    };
    let transfer = async move { b.stager.put(request, sender, &c).await };
    cancelled(transfer, progress, cancel).await;
}

#[tokio::test]
async fn put_failures() {
    let bench = Bench::new();
    let source = bench.write("source", b"result");
    let server = http::serve(|request| match request.path.as_str() {
        "/moved" => answer(303, &[("Location", "/elsewhere")], b""),
        "/elsewhere" => answer(200, &[], b""),
        _ => answer(500, &[], b""),
    })
    .await;
    for (path, code) in [("/moved", "redirect"), ("/broken", "http-status")] {
        let error = bench
            .put(
                &source,
                &format!("http://{server}{path}"),
                Creation::Overwrite,
            )
            .await
            .unwrap_err();
        assert_eq!(error.code(), code, "{error}");
    }
}

#[tokio::test]
async fn a_server_may_answer_before_it_has_read_everything() {
    let bench = Bench::new();
    let source = bench.write("source", &vec![1; 64 << 20]);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("http://{}/", listener.local_addr().unwrap());
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = [0; 4];
        stream.read_exact(&mut head).await.unwrap();
        stream
            .write_all(b"HTTP/1.1 403 no\r\nContent-Length: 0\r\n\r\n")
            .await
            .unwrap();
        // Neither reads on nor hangs up.
        stream
    };
    let put = bench.put(&source, &uri, Creation::Overwrite);
    let both = async { tokio::join!(server, put) };
    let (_open, sent) = tokio::time::timeout(Duration::from_secs(10), both)
        .await
        .unwrap();
    assert_eq!(sent.unwrap_err().code(), "access-denied");
}

#[tokio::test]
async fn what_is_too_large_is_told_at_once_though_the_server_stalls() {
    let bench = Bench::with_limits(Limits {
        unpacked_bytes: 1 << 20,
        ..Limits::default()
    });
    let bomb = pack(Compression::Gzip, &vec![0; 4 << 20]);
    let server = http::serve(move |_| {
        vec![
            Step::Send(b"HTTP/1.1 200 OK\r\n\r\n".to_vec()),
            Step::Send(bomb.clone()),
            Step::Pause(Duration::from_secs(60)),
        ]
    })
    .await;
    let zeros = Digest::from_hex(Algorithm::Md5, &"0".repeat(32)).unwrap();
    let uri = format!("http://{server}/");
    let fetch = bench.fetch_as(&uri, Some(zeros), Some(Compression::Gzip));
    let fetched = tokio::time::timeout(Duration::from_secs(10), fetch)
        .await
        .unwrap();
    assert_eq!(fetched.unwrap_err().code(), "size-limit");
}
