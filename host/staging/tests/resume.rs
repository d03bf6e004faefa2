//! Downloads whose connections break.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Mutex};

use common::http::{Request, Step};
use common::{Bench, http, noise, pack};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use xbee_staging::{Algorithm, Compression, Digest, Error, Limits, Progress};

/// An answer with `body` of which only the first `sent` bytes come before the connection closes.
fn cut(status: u16, headers: &str, body: &[u8], sent: usize) -> Vec<Step> {
    let head = format!(
        "HTTP/1.1 {status} x\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    );
    let sent = &body[..sent.min(body.len())];
    vec![Step::Send([head.as_bytes(), sent].concat())]
}

/// Where the range that a request asks for begins.
fn from(request: &Request) -> Option<usize> {
    let range = request.header("range")?;
    let from = range.strip_prefix("bytes=").unwrap().strip_suffix('-');
    Some(from.unwrap().parse().unwrap())
}

/// Answers with the range asked for, and closes each connection after `sent` bytes.
fn ranges(
    body: Vec<u8>,
    headers: &'static str,
    sent: usize,
) -> impl Fn(&Request) -> Vec<Step> + Send + Sync {
    move |request| match from(request) {
        None => cut(200, headers, &body, sent),
        Some(from) => {
            let last = body.len() - 1;
            let range = format!(
                "{headers}Content-Range: bytes {from}-{last}/{}\r\n",
                body.len()
            );
            cut(206, &range, &body[from..], sent)
        }
    }
}

/// Fetches from such a server; also returns the requests.
async fn fetch(
    bench: &Bench,
    answer: impl Fn(&Request) -> Vec<Step> + Send + Sync + 'static,
) -> (Result<Progress, Error>, Vec<Request>) {
    let seen = Arc::new(Mutex::new(Vec::<Request>::new()));
    let log = seen.clone();
    let server = http::serve(move |request| {
        let steps = answer(&request);
        log.lock().unwrap().push(request);
        steps
    })
    .await;
    let (sender, progress) = watch::channel(Progress::default());
    let request = bench.request(&format!("http://{server}/image"));
    let fetched = bench
        .stager
        .fetch(request, sender, &CancellationToken::new())
        .await;
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    (fetched.map(|_| *progress.borrow()), seen)
}

const TAG: &str = "ETag: \"v1\"\r\n";

#[tokio::test]
async fn goes_on_where_the_connection_broke() {
    let date =
        "Last-Modified: Mon, 02 Nov 2026 10:00:00 GMT\r\nDate: Mon, 02 Nov 2026 10:00:07 GMT\r\n";
    for (headers, validator) in [(TAG, "\"v1\""), (date, "Mon, 02 Nov 2026 10:00:00 GMT")] {
        let bench = Bench::new();
        let body = noise(700_000, 31);
        let (fetched, seen) = fetch(&bench, ranges(body.clone(), headers, 300_000)).await;
        assert_eq!(fetched.unwrap().transferred_bytes, 700_000);
        assert!(bench.out() == body);
        let asked: Vec<_> = seen.iter().map(from).collect();
        assert_eq!(asked, [None, Some(300_000), Some(600_000)]);
        assert_eq!(seen[0].header("if-range"), None);
        assert_eq!(seen[1].header("if-range"), Some(validator));
    }
}

#[tokio::test]
async fn the_digest_is_of_the_whole() {
    let data = noise(500_000, 32);
    let packed = pack(Compression::Gzip, &data);
    for (good, code) in [(true, "ok"), (false, "hash-mismatch")] {
        let bench = Bench::new();
        let right = ranges(packed.clone(), TAG, 200_000);
        let mut other = packed.clone();
        other[300_000] ^= 1;
        // The server says that it is the same.
        let wrong = ranges(other, TAG, 200_000);
        let server = http::serve(move |request| match from(&request) {
            Some(_) if !good => wrong(&request),
            _ => right(&request),
        })
        .await;
        let hash = Digest::from_hex(Algorithm::Blake3, &blake3::hash(&packed).to_hex());
        let uri = format!("http://{server}/");
        let fetched = bench
            .fetch_as(&uri, Some(hash.unwrap()), Some(Compression::Gzip))
            .await;
        assert_eq!(fetched.as_ref().map_or_else(Error::code, |_| "ok"), code);
        assert_eq!(bench.names().is_empty(), !good);
        assert!(!good || bench.out() == data);
    }
}

#[tokio::test]
async fn a_server_without_ranges_is_heard_again() {
    let bench = Bench::new();
    let body = noise(400_000, 33);
    let send = body.clone();
    let tries = Mutex::new(0);
    let (fetched, seen) = fetch(&bench, move |_| {
        let mut tries = tries.lock().unwrap();
        *tries += 1;
        cut(200, TAG, &send, [100_000, 50_000, 400_000][*tries - 1])
    })
    .await;
    assert_eq!(fetched.unwrap().transferred_bytes, 400_000);
    assert!(bench.out() == body);
    assert_eq!(seen.len(), 3);
}

#[tokio::test]
async fn another_file_is_not_appended() {
    let range = "ETag: \"v1\"\r\nContent-Range: bytes 99999-399999/400000\r\n";
    let other_tag = "ETag: \"v2\"\r\nContent-Range: bytes 100000-399999/400000\r\n";
    for (status, headers) in [
        (200, "ETag: \"v2\"\r\n"),
        (200, ""),
        (206, range),
        (206, other_tag),
        (206, TAG),
    ] {
        let bench = Bench::new();
        let body = noise(400_000, 34);
        let (fetched, seen) = fetch(&bench, move |request| match from(request) {
            None => cut(200, TAG, &body, 100_000),
            Some(_) if status == 206 => cut(206, headers, &body[100_000..], 400_000),
            Some(_) => cut(200, headers, &body, 400_000),
        })
        .await;
        let error = fetched.unwrap_err();
        assert_eq!(error.code(), "changed", "{headers:?}: {error}");
        assert_eq!(bench.names(), [""; 0]);
        assert_eq!(seen.len(), 2);
    }
}

#[tokio::test]
async fn what_cannot_be_recognised_is_not_resumed() {
    let same_second =
        "Last-Modified: Mon, 02 Nov 2026 10:00:00 GMT\r\nDate: Mon, 02 Nov 2026 10:00:00 GMT\r\n";
    for headers in ["", "ETag: W/\"v1\"\r\n", same_second] {
        let bench = Bench::new();
        let (fetched, seen) = fetch(&bench, ranges(noise(400_000, 35), headers, 100_000)).await;
        assert_eq!(fetched.unwrap_err().code(), "transfer", "{headers}");
        assert_eq!(seen.len(), 1);
        assert_eq!(bench.names(), [""; 0]);
    }
}

#[tokio::test]
async fn a_server_that_always_breaks_off_is_left() {
    let bench = Bench::with_limits(Limits {
        resumes: 3,
        ..Limits::default()
    });
    let (fetched, seen) = fetch(&bench, ranges(noise(400_000, 36), TAG, 10)).await;
    assert_eq!(fetched.unwrap_err().code(), "transfer");
    let asked: Vec<_> = seen.iter().map(from).collect();
    assert_eq!(asked, [None, Some(10), Some(20), Some(30)]);
    assert_eq!(bench.names(), [""; 0]);
}
