//! Streams between guests, from a command line: what the tests run in guests.
//!
//! `cid`: prints this guest's context identifier.
//! `echo PORT`: sends back what comes, on any number of streams, until it is killed.
//! `send CID PORT BYTES STREAMS`: has so many bytes echoed on so many streams at once.
//! `ping CID PORT TIMES`: has a byte echoed, again and again.
//! `hold CID PORT`: waits for the other end to end the stream.
//! `deaf PORT`: listens and accepts nothing until it is killed.
//! `flood SECONDS`: on Xen, writes nonsense where others are dialled, as fast as it can.
//!
//! An error is a line `error KIND`, and no failure of this program.

use std::error::Error;
use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use xbee_link::Link;
use xbee_link::peer::{self, PeerListener, local_cid};
use xbee_link::rendezvous::{ACCEPT, ANSWER, DIAL, LISTEN, ROOT, STREAM};
use xbee_link::xenstore::{self, Xenstore};

/// Nothing here takes longer.
const LIMIT: Duration = Duration::from_secs(120);
const CHUNK_BYTES: usize = 64 << 10;

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match *words.as_slice() {
        ["cid"] => local_cid().map(|cid| println!("{cid}")),
        ["echo", port] => echo(port.parse()?),
        ["deaf", port] => deaf(port.parse()?),
        ["flood", seconds] => flood(Duration::from_secs(seconds.parse()?))?,
        ["send", cid, port, bytes, streams] => {
            send(peer(cid, port)?, bytes.parse()?, streams.parse()?)
        }
        ["ping", cid, port, times] => ping(peer(cid, port)?, times.parse()?),
        ["hold", cid, port] => hold(peer(cid, port)?),
        _ => return Err("unknown command".into()),
    };
    if let Err(error) = result {
        println!("error {:?}", error.kind());
    }
    Ok(())
}

/// A port of a guest's.
type Peer = (u32, u32);

fn peer(cid: &str, port: &str) -> Result<Peer, Box<dyn Error>> {
    Ok((cid.parse()?, port.parse()?))
}

/// Waits until one of them has something to do.
fn wait(links: &[(&Link, bool)], listener: Option<&PeerListener>) -> io::Result<()> {
    let mut fds = Vec::new();
    let mut ready = false;
    for (link, wants_to_write) in links {
        match link.interest(*wants_to_write) {
            Some(flags) => fds.push(PollFd::new(*link, flags)),
            None => ready = true,
        }
    }
    if let Some(listener) = listener {
        fds.push(PollFd::new(listener, listener.interest()));
    }
    let limit = Timespec {
        tv_sec: if ready { 0 } else { LIMIT.as_secs() as i64 },
        tv_nsec: 0,
    };
    if poll(&mut fds, Some(&limit))? == 0 && !ready && listener.is_none() {
        return Err(ErrorKind::TimedOut.into());
    }
    Ok(())
}

/// `None` where it has to be waited for.
fn now<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

fn dial(peer: Peer) -> io::Result<Link> {
    let mut link = peer::dial(peer.0, peer.1)?;
    // A socket is writable when its connection is made.
    while !connected(&mut link)? {
        wait(&[(&link, true)], None)?;
    }
    Ok(link)
}

fn connected(link: &mut Link) -> io::Result<bool> {
    if let Some(flags) = link.interest(true)
        && flags.contains(PollFlags::OUT)
    {
        let limit = Timespec {
            tv_sec: LIMIT.as_secs() as i64,
            tv_nsec: 0,
        };
        poll(&mut [PollFd::new(&*link, PollFlags::OUT)], Some(&limit))?;
    }
    link.connected()
}

/// A stream whose bytes go back.
struct Echo {
    link: Link,
    kept: Vec<u8>,
    bytes: u64,
}

impl Echo {
    /// How it ended, if it has.
    fn go_on(&mut self, buffer: &mut [u8]) -> Option<io::Result<()>> {
        loop {
            if self.kept.is_empty() {
                match now(self.link.read(buffer)) {
                    Ok(None) => return None,
                    Ok(Some(0)) => return Some(Ok(())),
                    Ok(Some(length)) => self.kept.extend_from_slice(&buffer[..length]),
                    Err(error) => return Some(Err(error)),
                }
            }
            match now(self.link.write(&self.kept)) {
                Ok(None) => return None,
                Ok(Some(length)) => {
                    self.bytes += length as u64;
                    self.kept.drain(..length);
                }
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

fn echo(port: u32) -> io::Result<()> {
    let mut listener = PeerListener::bind(port)?;
    println!("listening");
    let mut streams: Vec<Echo> = Vec::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        while let Some((link, from)) = listener.accept()? {
            println!("from {}", from.cid);
            streams.push(Echo {
                link,
                kept: Vec::new(),
                bytes: 0,
            });
        }
        streams.retain_mut(|stream| match stream.go_on(&mut buffer) {
            None => true,
            Some(Ok(())) => {
                println!("end {}", stream.bytes);
                false
            }
            Some(Err(error)) => {
                println!("end {} {:?}", stream.bytes, error.kind());
                false
            }
        });
        let links: Vec<_> = (streams.iter())
            .map(|stream| (&stream.link, !stream.kept.is_empty()))
            .collect();
        wait(&links, Some(&listener))?;
    }
}

fn deaf(port: u32) -> io::Result<()> {
    let _listener = PeerListener::bind(port)?;
    println!("listening");
    loop {
        std::thread::park();
    }
}

fn flood(time: Duration) -> Result<io::Result<()>, xenstore::Error> {
    let mut store = Xenstore::open()?;
    println!("flooding");
    let begun = Instant::now();
    let long = "x".repeat(2000);
    let mut written = 0_u32;
    while begun.elapsed() < time {
        for directory in [DIAL, ACCEPT, STREAM, ANSWER, LISTEN] {
            for name in [
                &*format!("{}", written % 100),
                "07",
                "x",
                "1-1",
                "7/1-1/deep",
            ] {
                for value in ["", "1", "1 1", "102 4294967296", "open 0", &long] {
                    // The store has limits of its own.
                    match store.write(&format!("{directory}/{name}"), value) {
                        Ok(()) => written += 1,
                        Err(xenstore::Error::Refused { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        store.remove(&format!("{ROOT}/dial"))?;
    }
    println!("wrote {written}");
    Ok(Ok(()))
}

fn pattern(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

struct Exchange {
    link: Link,
    pattern: Vec<u8>,
    sent: usize,
    received: Vec<u8>,
}

impl Exchange {
    fn is_done(&self) -> bool {
        self.received.len() == self.pattern.len()
    }

    fn go_on(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        loop {
            let mut moved = false;
            if self.sent < self.pattern.len()
                && let Some(length) = now(self.link.write(&self.pattern[self.sent..]))?
            {
                self.sent += length;
                moved = true;
            }
            if !self.is_done()
                && let Some(length) = now(self.link.read(buffer))?
            {
                if length == 0 {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                self.received.extend_from_slice(&buffer[..length]);
                moved = true;
            }
            if !moved {
                return Ok(());
            }
        }
    }
}

fn send(peer: Peer, bytes: usize, streams: u64) -> io::Result<()> {
    let begun = Instant::now();
    let mut links = Vec::new();
    for _ in 0..streams {
        links.push(peer::dial(peer.0, peer.1)?);
    }
    for link in &mut links {
        while !connected(link)? {
            wait(&[(&*link, true)], None)?;
        }
    }
    let connected = begun.elapsed();
    let mut exchanges: Vec<_> = links
        .into_iter()
        .zip(1..)
        .map(|(link, seed)| Exchange {
            link,
            pattern: pattern(bytes, seed),
            sent: 0,
            received: Vec::new(),
        })
        .collect();
    let mut buffer = vec![0; CHUNK_BYTES];
    let begun = Instant::now();
    while !exchanges.iter().all(Exchange::is_done) {
        for exchange in &mut exchanges {
            exchange.go_on(&mut buffer)?;
        }
        let waiting: Vec<_> = (exchanges.iter())
            .filter(|exchange| !exchange.is_done())
            .map(|exchange| (&exchange.link, exchange.sent < bytes))
            .collect();
        if !waiting.is_empty() {
            wait(&waiting, None)?;
        }
    }
    let took = begun.elapsed();
    let exact = exchanges
        .iter()
        .all(|exchange| exchange.received == exchange.pattern);
    println!(
        "{} connected in {:.1} ms, {:.1} MB/s each way",
        if exact { "exact," } else { "DIFFERENT," },
        connected.as_secs_f64() * 1e3,
        bytes as f64 * streams as f64 / 1e6 / took.as_secs_f64()
    );
    Ok(())
}

fn ping(peer: Peer, times: u32) -> io::Result<()> {
    let mut link = dial(peer)?;
    let begun = Instant::now();
    for number in 0..times {
        let byte = [number as u8];
        while now(link.write(&byte))?.is_none() {
            wait(&[(&link, true)], None)?;
        }
        let mut back = [0];
        loop {
            match now(link.read(&mut back))? {
                None => wait(&[(&link, false)], None)?,
                Some(1) if back == byte => break,
                _ => return Err(ErrorKind::InvalidData.into()),
            }
        }
    }
    let each = begun.elapsed() / times.max(1);
    println!("round trip {:.2} ms", each.as_secs_f64() * 1e3);
    Ok(())
}

fn hold(peer: Peer) -> io::Result<()> {
    let mut link = dial(peer)?;
    link.write(b"x")?;
    let mut buffer = [0; 16];
    let mut total = 0;
    loop {
        match now(link.read(&mut buffer)) {
            Ok(None) => wait(&[(&link, false)], None)?,
            Ok(Some(0)) => break println!("end {total}"),
            Ok(Some(length)) => {
                total += length;
                println!("open");
            }
            Err(error) => break println!("end {total} {:?}", error.kind()),
        }
    }
    Ok(())
}
