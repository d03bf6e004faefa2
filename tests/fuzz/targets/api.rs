//! Bytes on the socket of the API: each is answered as HTTP or not at all, an error says in JSON what it is and is never the
//! host's own fault, and the host goes on to answer others.
#![no_main]
#![allow(clippy::unwrap_used, reason = "what cannot be set up shall end it")]

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

/// Longest wait for an answer to anything: one that follows a task does not end, and a body may be shorter than was said.
const PATIENCE: Duration = Duration::from_millis(30);
/// And to what must be answered; libFuzzer's own limit is longer.
const GREAT_PATIENCE: Duration = Duration::from_secs(8);
/// Longest answer that is read, in bytes.
const ANSWER_MAX: u64 = 1 << 20;
/// What everyone may ask.
const ASK: &[u8] = b"GET /v1/host HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";

struct Host {
    dir: TempDir,
    /// Stops the host when it is dropped.
    _runtime: Runtime,
}

static HOST: LazyLock<Host> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let runtime = Runtime::new().unwrap();
    // Rust's own start has the signal ignored, libFuzzer's has not, and it would end all when a client hangs up.
    let caught = runtime.block_on(async { signal(SignalKind::pipe()) });
    drop(caught.unwrap());
    let (data, socket) = (dir.path().join("data"), dir.path().join("s"));
    runtime.spawn(async move {
        let served = xbed::serve_simulated(&data, &socket).await;
        panic!("it ended: {served:?}");
    });
    let host = Host {
        dir,
        _runtime: runtime,
    };
    while UnixStream::connect(host.dir.path().join("s")).is_err() {
        std::thread::sleep(Duration::from_millis(5));
    }
    host
});

/// What comes back, as far as it comes in time.
fn answer(host: &Host, request: &[u8], patience: Duration) -> Vec<u8> {
    let mut stream = UnixStream::connect(host.dir.path().join("s")).unwrap();
    stream.set_read_timeout(Some(patience)).unwrap();
    // It may hang up at the first wrong byte.
    let _ = stream.write_all(request);
    let mut answer = vec![];
    match stream.take(ANSWER_MAX).read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) => assert!(
            matches!(
                error.kind(),
                ErrorKind::WouldBlock | ErrorKind::ConnectionReset
            ),
            "{error}"
        ),
    }
    answer
}

/// Status and body of the first answer; `None` if there is none.
fn first(answer: &[u8]) -> Option<(u16, &[u8])> {
    if answer.is_empty() {
        return None;
    }
    let status = answer
        .strip_prefix(b"HTTP/1.")
        .and_then(|rest| rest.get(2..5));
    let status = std::str::from_utf8(status.unwrap())
        .unwrap()
        .parse()
        .unwrap();
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n")?;
    Some((status, &answer[end + 4..]))
}

fuzz_target!(|request: &[u8]| {
    let host = &*HOST;
    // What follows ends a head that does not end, and the connection.
    let answered = answer(host, &[request, b"\r\n\r\n", ASK].concat(), PATIENCE);
    if let Some((status, body)) = first(&answered) {
        assert!(
            (100..500).contains(&status) || status == 503,
            "{status}: {:?}",
            String::from_utf8_lossy(body)
        );
        // Without a body is what the HTTP library refuses itself.
        if status >= 400 && !body.is_empty() {
            let mut values = serde_json::Deserializer::from_slice(body).into_iter();
            let said: serde_json::Value = values.next().unwrap().unwrap();
            assert!(
                said["code"].is_string() && said["message"].is_string(),
                "{said}"
            );
        }
    }
    let (status, body) = first(&answer(host, ASK, GREAT_PATIENCE))
        .map(|(s, b)| (s, b.to_vec()))
        .unwrap();
    assert_eq!(status, 200);
    let said: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(said["backend"], "sim");
});
