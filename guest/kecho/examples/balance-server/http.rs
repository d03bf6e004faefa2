//! As much of a web server as clients of the group need: GET, one request a connection.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// The most connections at a time; more are told to come later.
const MAX_CONNECTIONS: usize = 256;
/// The longest request, its headers among it.
const MAX_HEAD_BYTES: u64 = 8 << 10;
/// What is read of a request that is not served.
const MAX_LEFT_BYTES: u64 = 64 << 10;
/// The longest path.
const MAX_PATH_BYTES: usize = 1 << 10;
/// How long a client may take to ask, or to take what it gets.
const PATIENCE: Duration = Duration::from_secs(10);
/// Before the next is accepted after a failure, which most often is for want of descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A status and a text.
pub type Response = (u16, String);

/// Serves clients, for ever.
pub fn serve(listener: &TcpListener, answer: impl Fn(&str) -> Response + Send + Sync + 'static) {
    let answer = Arc::new(answer);
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                eprintln!("balance-server: no connection could be accepted: {error}");
                std::thread::sleep(ACCEPT_RETRY);
                continue;
            }
        };
        let Some(place) = Place::take(&open) else {
            let full = (503, "too many connections; come later\n".into());
            report(respond(&stream, &full));
            continue;
        };
        let answer = answer.clone();
        std::thread::spawn(move || {
            report(converse(&stream, &*answer));
            drop(place);
        });
    }
}

fn report(done: io::Result<()>) {
    if let Err(error) = done {
        eprintln!("balance-server: a client was lost: {error}");
    }
}

/// One of the connections at a time.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(open: &Arc<AtomicUsize>) -> Option<Place> {
        // Given back when dropped, here too.
        let place = Place(open.clone());
        (open.fetch_add(1, Ordering::Relaxed) < MAX_CONNECTIONS).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn converse(stream: &TcpStream, answer: &dyn Fn(&str) -> Response) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    match path(stream)? {
        Ok(path) => respond(stream, &answer(&path)),
        Err(response) => {
            respond(stream, &response)?;
            // Unread bytes would take the response from the client.
            stream.shutdown(Shutdown::Write)?;
            io::copy(&mut stream.take(MAX_LEFT_BYTES), &mut io::sink())?;
            Ok(())
        }
    }
}

/// What the client asks for, or what is wrong with that.
fn path(stream: &TcpStream) -> io::Result<Result<String, Response>> {
    let mut head = BufReader::new(stream.take(MAX_HEAD_BYTES));
    let mut first = String::new();
    let mut line = String::new();
    loop {
        line.clear();
        match head.read_line(&mut line) {
            Ok(_) if !line.ends_with('\n') => {
                return Ok(Err((
                    400,
                    "a request ends with an empty line, within 8 KiB\n".into(),
                )));
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                return Ok(Err((400, "a request is text\n".into())));
            }
            Err(error) => return Err(error),
        }
        if line.trim_end().is_empty() {
            break;
        }
        if first.is_empty() {
            first.clone_from(&line);
        }
    }
    let words: Vec<_> = first.split_whitespace().collect();
    Ok(match words[..] {
        ["GET", path, "HTTP/1.1" | "HTTP/1.0"] if path.len() <= MAX_PATH_BYTES => {
            Ok(path.to_owned())
        }
        ["GET", _, "HTTP/1.1" | "HTTP/1.0"] => Err((414, "paths have 1 KiB at most\n".into())),
        [_, _, "HTTP/1.1" | "HTTP/1.0"] => Err((405, "only GET is served\n".into())),
        _ => Err((400, "not a request of HTTP/1.1\n".into())),
    })
}

fn respond(mut stream: &TcpStream, (status, text): &Response) -> io::Result<()> {
    let reason = match status {
        200 => "OK",
        400 => "Bad Request",
        405 => "Method Not Allowed",
        414 => "URI Too Long",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "",
    };
    let length = text.len();
    let response = format!(
        "HTTP/1.1 {status} {reason}\r\ncontent-type: text/plain\r\ncontent-length: {length}\r\n\
         connection: close\r\n\r\n{text}"
    );
    stream.write_all(response.as_bytes())
}
