//! Fetches that can be used again: what the server says of the version, and whether it still has it.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Mutex};

use common::http::{Request, answer};
use common::{Bench, file_uri, http, noise, pack};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use xbee_staging::{
    Algorithm, Compression, Destination, Digest, Error, FetchRequest, Fetched, Identity, Limits,
    Progress, Stager, Validators,
};

const TAG: &str = "\"v1\"";
const MODIFIED: &str = "Mon, 02 Nov 2026 10:00:00 GMT";

async fn keep(
    bench: &Bench,
    uri: &str,
    compression: Option<Compression>,
    known: Validators,
) -> Result<Option<Fetched>, Error> {
    let request = FetchRequest {
        uri: uri.parse().unwrap(),
        hash: None,
        compression,
        destination: Destination::File(bench.path("out")),
        identity: Identity::current(),
    };
    let (progress, _) = watch::channel(Progress::default());
    Stager::new(Limits::default())
        .fetch_to_keep(request, known, progress, &CancellationToken::new())
        .await
}

#[tokio::test]
async fn a_version_that_the_server_still_has_is_not_sent_again() {
    let bench = Bench::new();
    let data = noise(300_000, 40);
    let packed = pack(Compression::Gzip, &data);
    let seen = Arc::<Mutex<Vec<Request>>>::default();
    let (log, send) = (seen.clone(), packed.clone());
    let server = http::serve(move |request| {
        let is_known = request.header("if-none-match") == Some(TAG);
        log.lock().unwrap().push(request);
        match is_known {
            true => answer(304, &[("ETag", TAG)], b""),
            false => {
                let later = "Mon, 02 Nov 2026 10:00:01 GMT";
                let headers = [("ETag", TAG), ("Last-Modified", MODIFIED), ("Date", later)];
                answer(200, &headers, &send)
            }
        }
    })
    .await;
    let uri = format!("http://{server}/image.gz");
    let gzip = Some(Compression::Gzip);
    let first = keep(&bench, &uri, gzip, Validators::default()).await;
    let first = first.unwrap().unwrap();
    assert!(bench.out() == data);
    assert_eq!(
        first.validators,
        Validators {
            etag: Some(TAG.into()),
            last_modified: Some(MODIFIED.into()),
        }
    );
    // Of the bytes as transferred.
    let digest = Digest::from_hex(Algorithm::Sha256, &sha256(&packed)).unwrap();
    assert_eq!(first.sha256, Some(digest));
    std::fs::remove_file(bench.path("out")).unwrap();
    let again = keep(&bench, &uri, gzip, first.validators).await.unwrap();
    assert_eq!(again, None);
    assert_eq!(bench.names(), [""; 0]);
    let other = Validators {
        etag: Some("\"v0\"".into()),
        last_modified: None,
    };
    assert!(keep(&bench, &uri, gzip, other).await.unwrap().is_some());
    assert!(bench.out() == data);
    let seen = seen.lock().unwrap();
    let since: Vec<_> = seen.iter().map(|r| r.header("if-modified-since")).collect();
    assert_eq!(since, [None, Some(MODIFIED), None]);
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    let digest = sha2::Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn a_weak_date_is_not_kept_and_an_answer_that_was_not_asked_for_is_an_error() {
    let bench = Bench::new();
    let server = http::serve(|_| {
        let same = [("Last-Modified", MODIFIED), ("Date", MODIFIED)];
        answer(200, &same, b"text")
    })
    .await;
    let uri = format!("http://{server}/");
    let kept = keep(&bench, &uri, None, Validators::default()).await;
    assert!(kept.unwrap().unwrap().validators.is_empty());
    let server = http::serve(|_| answer(304, &[], b"")).await;
    let uri = format!("http://{server}/");
    let refused = keep(&bench, &uri, None, Validators::default()).await;
    assert_eq!(refused.unwrap_err().code(), "redirect");
}

#[tokio::test]
async fn a_local_file_has_a_digest_and_no_validators() {
    let bench = Bench::new();
    let data = noise(10_000, 41);
    let source = bench.write("source", &data);
    let kept = keep(&bench, &file_uri(&source), None, Validators::default()).await;
    let kept = kept.unwrap().unwrap();
    assert_eq!(kept.sha256.unwrap().to_hex(), sha256(&data));
    assert!(kept.validators.is_empty());
    assert!(bench.out() == data);
}
