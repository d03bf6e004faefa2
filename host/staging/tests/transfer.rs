//! Transfers that go well, from and to every scheme.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::{Arc, Mutex};

use common::http::{Request, Step, answer};
use common::{Bench, file_uri, ftp, http, noise, pack};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use xbee_staging::{Algorithm, Compression, Creation, Digest, Progress};

const SINGLE: [Compression; 4] = [
    Compression::Bzip2,
    Compression::Gzip,
    Compression::Xz,
    Compression::Zstd,
];

#[tokio::test]
async fn a_local_file_is_copied_with_its_holes() {
    let bench = Bench::new();
    let image = bench.path("image");
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(64 << 20).unwrap();
    let data = noise(10_000, 1);
    std::os::unix::fs::FileExt::write_all_at(&file, &data, 32 << 20).unwrap();
    let done = bench.fetch(&file_uri(&image)).await.unwrap();
    assert_eq!(done.bytes_read, 64 << 20);
    assert_eq!(done.bytes_written, 64 << 20);
    assert!(bench.out() == std::fs::read(&image).unwrap());
    let stored = std::fs::metadata(bench.path("out")).unwrap();
    assert!(stored.blocks() * 512 <= 64 << 10, "{}", stored.blocks());
    assert_eq!(stored.permissions().mode() & 0o777, 0o600);
    assert_eq!(bench.names(), ["image", "out"]);
}

#[tokio::test]
async fn every_format_decodes_many_streams_into_a_sparse_file() {
    for compression in SINGLE {
        let bench = Bench::new();
        let zeros = vec![0; 3 << 20];
        let head = noise(300_001, 2);
        let tail = noise(5, 3);
        let mut packed = pack(compression, &head);
        packed.extend(pack(compression, &zeros));
        packed.extend(pack(compression, &tail));
        let source = bench.write("packed", &packed);
        let done = bench
            .fetch_as(&file_uri(&source), None, Some(compression))
            .await
            .unwrap();
        let expected = [head, zeros, tail].concat();
        assert!(bench.out() == expected, "{compression:?}");
        assert_eq!(done.bytes_read, packed.len() as u64);
        assert_eq!(done.bytes_written, expected.len() as u64);
        let stored = std::fs::metadata(bench.path("out")).unwrap().blocks() * 512;
        assert!(stored <= 400_000, "{compression:?} stored {stored}");
        assert!(done.bytes_stored <= 400_000);
    }
}

#[tokio::test]
async fn holes_at_the_end_keep_the_length() {
    let bench = Bench::new();
    let data = [noise(4096, 4), vec![0; 4096 * 5 + 17]].concat();
    let source = bench.write("packed", &pack(Compression::Zstd, &data));
    bench
        .fetch_as(&file_uri(&source), None, Some(Compression::Zstd))
        .await
        .unwrap();
    assert!(bench.out() == data);
}

#[tokio::test]
async fn http_with_digest_progress_and_credentials() {
    let bench = Bench::new();
    let body = noise(700_000, 5);
    let packed = pack(Compression::Gzip, &body);
    let seen = Arc::new(Mutex::new(Vec::<Request>::new()));
    let (answer_with, log) = (packed.clone(), seen.clone());
    let server = http::serve(move |request| {
        log.lock().unwrap().push(request);
        answer(200, &[], &answer_with)
    })
    .await;
    let uri = format!("http://user:pass%40word@{server}/image?token=t");
    let mut request = bench.request(&uri);
    request.compression = Some(Compression::Gzip);
    let hex = blake3::hash(&packed).to_hex();
    request.hash = Some(Digest::from_hex(Algorithm::Blake3, &hex).unwrap());
    let (sender, progress) = watch::channel(Progress::default());
    bench
        .stager
        .fetch(request, sender, &CancellationToken::new())
        .await
        .unwrap();
    assert!(bench.out() == body);
    let total = packed.len() as u64;
    assert_eq!(
        *progress.borrow(),
        Progress {
            transferred_bytes: total,
            total_bytes: Some(total)
        }
    );
    let seen = seen.lock().unwrap();
    assert_eq!(seen[0].path, "/image?token=t");
    // "user:pass@word" in Base64.
    assert_eq!(
        seen[0].header("authorization"),
        Some("Basic dXNlcjpwYXNzQHdvcmQ=")
    );
}

#[tokio::test]
async fn http_redirects_are_followed_without_telling_where_from() {
    let bench = Bench::new();
    let seen = Arc::new(Mutex::new(Vec::<Request>::new()));
    let log = seen.clone();
    let server = http::serve(move |request| {
        let path = request.path.clone();
        log.lock().unwrap().push(request);
        match path.as_str() {
            "/first?token=t" => answer(302, &[("Location", "/second")], b""),
            _ => answer(200, &[], b"found"),
        }
    })
    .await;
    bench
        .fetch(&format!("http://{server}/first?token=t"))
        .await
        .unwrap();
    assert_eq!(bench.out(), b"found");
    assert_eq!(seen.lock().unwrap()[1].header("referer"), None);
}

#[tokio::test]
async fn http_chunked_has_no_total() {
    let bench = Bench::new();
    let server = http::serve(|_| {
        vec![Step::Send(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n".to_vec(),
        )]
    })
    .await;
    let (sender, progress) = watch::channel(Progress::default());
    let request = bench.request(&format!("http://{server}/"));
    bench
        .stager
        .fetch(request, sender, &CancellationToken::new())
        .await
        .unwrap();
    assert_eq!(bench.out(), b"abc");
    assert_eq!(progress.borrow().total_bytes, None);
}

#[tokio::test]
async fn http_put() {
    let bench = Bench::new();
    let body = noise(600_000, 6);
    let source = bench.write("result", &body);
    let seen = Arc::new(Mutex::new(Vec::<Request>::new()));
    let log = seen.clone();
    let server = http::serve(move |request| {
        let exists = request.path == "/exists" && request.header("if-none-match") == Some("*");
        log.lock().unwrap().push(request);
        answer(if exists { 412 } else { 201 }, &[], b"")
    })
    .await;
    let sent = bench
        .put(&source, &format!("http://{server}/r"), Creation::Overwrite)
        .await
        .unwrap();
    assert_eq!(sent, 600_000);
    {
        let seen = seen.lock().unwrap();
        assert_eq!(seen[0].method, "PUT");
        assert!(seen[0].body == body);
        assert_eq!(seen[0].header("if-none-match"), None);
    }
    let uri = format!("http://{server}/exists");
    let error = bench
        .put(&source, &uri, Creation::DontOverwrite)
        .await
        .unwrap_err();
    assert_eq!(error.code(), "exists");
    let error = bench
        .put(&source, &uri, Creation::Append)
        .await
        .unwrap_err();
    assert_eq!(error.code(), "unsupported");
    let empty = bench.write("empty", b"");
    assert_eq!(
        bench
            .put(&empty, &format!("http://{server}/r"), Creation::Overwrite)
            .await
            .unwrap(),
        0
    );
}

#[tokio::test]
async fn https_with_a_private_ca() {
    let certified = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key.unwrap())
        .unwrap();
    let server = http::serve_tls(config, |_| answer(200, &[], b"secret")).await;
    let uri = format!("https://{server}/a");

    let mut bench = Bench::new();
    let error = bench.fetch(&uri).await.unwrap_err();
    assert_eq!(error.code(), "connect", "{error:?}");
    assert_eq!(bench.names(), [""; 0]);

    let ca_file = bench.write("ca.pem", certified.cert.pem().as_bytes());
    bench.stager = xbee_staging::Stager::new(Default::default()).with_ca_file(&ca_file);
    bench.fetch(&uri).await.unwrap();
    assert_eq!(bench.out(), b"secret");

    let empty = bench.write("empty.pem", b"");
    bench.stager = xbee_staging::Stager::new(Default::default()).with_ca_file(&empty);
    let error = bench.fetch(&uri).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{uri}: cannot read the CA file {}", empty.display())
    );
}

#[tokio::test]
async fn ftp_down_and_up() {
    let bench = Bench::new();
    let site = tempfile::tempdir().unwrap();
    std::fs::create_dir(site.path().join("in")).unwrap();
    let body = noise(900_000, 7);
    std::fs::write(site.path().join("in/a b"), &body).unwrap();
    let server = ftp::serve(site.path()).await;

    let (sender, progress) = watch::channel(Progress::default());
    let request = bench.request(&format!("ftp://{server}/in/a%20b"));
    bench
        .stager
        .fetch(request, sender, &CancellationToken::new())
        .await
        .unwrap();
    assert!(bench.out() == body);
    assert_eq!(progress.borrow().total_bytes, Some(900_000));
    bench
        .fetch(&format!("ftp://user:pass%40word@{server}/in/a%20b;type=i"))
        .await
        .unwrap();

    let source = bench.write("result", &body);
    let uri = format!("ftp://{server}/in/new");
    let sent = bench
        .put(&source, &uri, Creation::DontOverwrite)
        .await
        .unwrap();
    assert_eq!(sent, 900_000);
    assert!(std::fs::read(site.path().join("in/new")).unwrap() == body);
    let error = bench
        .put(&source, &uri, Creation::DontOverwrite)
        .await
        .unwrap_err();
    assert_eq!(error.code(), "exists");
    let more = bench.write("more", b"more");
    bench.put(&more, &uri, Creation::Append).await.unwrap();
    assert_eq!(
        std::fs::metadata(site.path().join("in/new")).unwrap().len(),
        900_004
    );
    bench.put(&more, &uri, Creation::Overwrite).await.unwrap();
    assert_eq!(std::fs::read(site.path().join("in/new")).unwrap(), b"more");
}

#[tokio::test]
async fn file_put() {
    let bench = Bench::new();
    let source = bench.write("result", b"one");
    let target = bench.path("target");
    let uri = file_uri(&target);
    bench
        .put(&source, &uri, Creation::DontOverwrite)
        .await
        .unwrap();
    assert_eq!(std::fs::read(&target).unwrap(), b"one");
    let error = bench
        .put(&source, &uri, Creation::DontOverwrite)
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{uri}: exists already and may not be overwritten")
    );
    bench.put(&source, &uri, Creation::Append).await.unwrap();
    assert_eq!(std::fs::read(&target).unwrap(), b"oneone");
    std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o640)).unwrap();
    let link = bench.path("link");
    std::os::unix::fs::symlink("target", &link).unwrap();
    bench
        .put(&source, &file_uri(&link), Creation::Overwrite)
        .await
        .unwrap();
    assert_eq!(std::fs::read(&target).unwrap(), b"one");
    assert_eq!(
        std::fs::metadata(&target).unwrap().permissions().mode() & 0o777,
        0o640
    );
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(bench.names(), ["link", "result", "target"]);
}
