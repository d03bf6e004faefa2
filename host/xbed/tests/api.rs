//! What the API answers to what is no request of it.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Status and body of the answer to a request without a body.
fn ask(socket: &Path, request: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let head = format!("{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

#[test]
fn every_refusal_is_an_error_body() {
    let dir = tempfile::tempdir().unwrap();
    let (data, socket) = (dir.path().join("data"), dir.path().join("s"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let served = socket.clone();
    runtime.spawn(async move {
        xbed::serve_simulated(&data, &served).await.unwrap();
    });
    while UnixStream::connect(&socket).is_err() {
        std::thread::sleep(Duration::from_millis(5));
    }
    for (request, status, code, told) in [
        ("GET /v2", 404, "no-such-route", "GET /v2"),
        ("PUT /v1/tasks", 405, "no-such-route", "PUT /v1/tasks"),
        ("GET /v1/tasks?all=perhaps", 400, "invalid-request", "query"),
        ("GET /v1/tasks/%ff", 400, "invalid-request", "UTF-8"),
        (
            "GET /v1/tasks/0000/export?form=odd",
            400,
            "invalid-request",
            "xl",
        ),
        (
            "GET /v1/tasks/0000/events?from=-1",
            400,
            "invalid-request",
            "from",
        ),
        ("POST /v1/tasks", 415, "invalid-request", "Content-Type"),
        ("GET /v1/tasks/0000", 404, "task-not-found", "0000"),
        ("GET /v1/tasks/0000/results", 404, "task-not-found", "0000"),
        (
            "GET /v1/tasks/0000/results/x",
            400,
            "invalid-request",
            "parse",
        ),
        ("DELETE /v1/uploads/1", 400, "invalid-request", "UUID"),
        (
            "DELETE /v1/uploads/67e55044-10b1-426f-9247-bb680e5fe0c8",
            404,
            "upload-unknown",
            "67e55044",
        ),
        // With a header of its own; what follows is one more.
        (
            "POST /v1/uploads HTTP/1.1\r\ncontent-length: 99999999999999\r\nx:",
            413,
            "upload-too-large",
            "bytes",
        ),
    ] {
        let (answered, body) = ask(&socket, request);
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(
            (answered, body["code"].as_str().unwrap()),
            (status, code),
            "{request}"
        );
        let message = body["message"].as_str().unwrap();
        assert!(message.contains(told), "{request}: {message}");
    }
}
