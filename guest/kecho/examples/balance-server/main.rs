//! Web servers that share their requests over event channels: `balance-server --registry ADDRESS --listen ADDRESS`.
//!
//! Each server takes requests from clients and works on those of all. A group has three channels: `GROUP.requests` for
//! requests and cancels, `GROUP.answers`, and `GROUP.load`, on which servers tell how many requests are in them. An OUT-filter
//! at the source of a request sends it to the servers that the policy has picked by their load, an IN-filter at the sink of
//! answers drops the second one, and a cancel stops the others. Nobody waits for a server that is slow or dead: the channels
//! drop what it does not read. `/counts` is what a server did; any other path is a request, which takes 38 ms or what it says
//! itself, as in `/page?ms=100`. `balance-server cid` prints a guest's context identifier.

mod http;
mod message;
mod service;

use std::collections::hash_map::RandomState;
use std::error::Error;
use std::hash::{BuildHasher, Hasher};
use std::net::TcpListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::spawn;
use std::time::Duration;

use xbee_kecho::balance::{Options, ServerId};
use xbee_kecho::{
    ChannelOptions, Config, EventRef, Node, Policy, Sink, SinkOptions, SinkSet, Source, Submission,
    Value,
};

use crate::message::{Message, Types, address, is_for};
use crate::service::{Outgoing, Reply, Service};

const USAGE: &str = "usage: balance-server --registry ADDRESS --listen ADDRESS:PORT [--group NAME] [--copies N] \
                     [--copy-load N] [--forward-ms MS] [--slow N] [--log-bytes N]\n       balance-server cid";
/// The state of a sink that says whose it is.
const SERVER: &str = "server";

struct Arguments {
    registry: String,
    listen: String,
    group: String,
    options: Options,
    /// A request takes so many times as long.
    slow: u32,
    /// Of a channel's log at each server.
    log_bytes: Option<usize>,
}

impl Arguments {
    fn read(mut words: impl Iterator<Item = String>) -> Result<Arguments, Box<dyn Error>> {
        let (mut registry, mut listen) = (None, None);
        let mut group = "web".to_owned();
        let mut options = Options::default();
        let (mut slow, mut log_bytes) = (1, None);
        while let Some(name) = words.next() {
            let value = words.next().ok_or(USAGE)?;
            match name.as_str() {
                "--registry" => registry = Some(value),
                "--listen" => listen = Some(value),
                "--group" => group = value,
                "--copies" => options.copies = value.parse()?,
                "--copy-load" => options.copy_load = value.parse()?,
                "--forward-ms" => options.forward_after = Duration::from_millis(value.parse()?),
                "--slow" => slow = value.parse()?,
                "--log-bytes" => log_bytes = Some(value.parse()?),
                _ => return Err(USAGE.into()),
            }
        }
        Ok(Arguments {
            registry: registry.ok_or(USAGE)?,
            listen: listen.ok_or(USAGE)?,
            group,
            options,
            slow,
            log_bytes,
        })
    }
}

/// A channel of the group, with what this server sends and gets on it.
struct Line {
    source: Source,
    sink: Sink,
}

impl Line {
    fn open(
        node: &Node,
        name: &str,
        own: ServerId,
        log_bytes: Option<usize>,
    ) -> Result<Line, Box<dyn Error>> {
        let options = ChannelOptions {
            policy: Policy::DropOldest,
            log_bytes,
            ..ChannelOptions::default()
        };
        let channel = node.open_or_create(name, options)?;
        let source = channel.source()?;
        // To those whom the event names, all if it names none.
        source.set_out_filter(Some(Box::new(
            |event: &EventRef<'_>, sinks: &mut SinkSet<'_>| {
                sinks.retain(|sink| match sink.state(SERVER) {
                    Some(Value::Int(server)) => is_for(event, ServerId(server.cast_unsigned())),
                    _ => false,
                });
            },
        )));
        let sink = channel.sink(SinkOptions {
            state: vec![(SERVER.to_owned(), Value::Int(own.0.cast_signed()))],
            ..SinkOptions::default()
        })?;
        Ok(Line { source, sink })
    }
}

fn main() -> ExitCode {
    let Err(error) = run() else {
        return ExitCode::SUCCESS;
    };
    eprint!("balance-server: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        eprint!(": {cause}");
        source = cause.source();
    }
    eprintln!();
    ExitCode::FAILURE
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args().skip(1).peekable();
    if words.peek().is_some_and(|word| word == "cid") {
        println!("{}", xbee_link::peer::local_cid()?);
        return Ok(());
    }
    let arguments = Arguments::read(words)?;
    // Before anybody is told of this server.
    let listener = TcpListener::bind(&arguments.listen)
        .map_err(|error| format!("cannot listen on {}: {error}", arguments.listen))?;
    let own = ServerId(RandomState::new().build_hasher().finish());
    let node = Node::start(Config {
        registry: Some(arguments.registry.parse()?),
        ..Config::default()
    })?;
    let types = Arc::new(Types::new()?);
    let open = |what: &str| {
        let name = format!("{}.{what}", arguments.group);
        Line::open(&node, &name, own, arguments.log_bytes)
    };
    let (requests, answers, load) = (open("requests")?, open("answers")?, open("load")?);

    let sources = (requests.source, answers.source, load.source);
    let send = {
        let types = types.clone();
        move |(to, message): Outgoing| {
            let source = match &message {
                Message::Request(..) | Message::Cancel(_) => &sources.0,
                Message::Answer(..) | Message::Refused(..) => &sources.1,
                Message::Load(..) => &sources.2,
            };
            let named = [(message::TO, address(&to))];
            let attributes = if to.is_empty() { &[] } else { &named[..] };
            let sent = types.encode(&message).map_err(Box::<dyn Error>::from);
            let sent = sent.and_then(|(kind, payload)| {
                Ok(source.submit(&Submission {
                    kind,
                    attributes,
                    payload: &payload,
                })?)
            });
            // Whoever misses it is asked again or given up in time.
            if let Err(error) = sent {
                eprintln!("balance-server: {message:?} was not sent: {error}");
            }
        }
    };
    let service = Arc::new(Service::new(own, arguments.options, arguments.slow, send));

    let (filter, kinds) = (service.clone(), types.clone());
    answers
        .sink
        .set_in_filter(Some(Box::new(move |event: &EventRef<'_>| {
            match kinds.decode(event) {
                Some(Message::Answer(request, from, _)) => filter.wants(request, from),
                _ => true,
            }
        })));
    let sinks = [requests.sink, answers.sink, load.sink].map(Arc::new);
    for sink in &sinks {
        let (sink, service, types) = (sink.clone(), service.clone(), types.clone());
        spawn(move || {
            loop {
                match sink.receive() {
                    Ok(event) => {
                        if let Some(message) = types.decode(&event.get()) {
                            service.receive(message);
                        }
                    }
                    Err(error) => {
                        // Without its channels a server is none.
                        eprintln!("balance-server: {error}");
                        std::process::exit(1);
                    }
                }
            }
        });
    }
    let (time, work) = (service.clone(), service.clone());
    spawn(move || time.keep_time());
    spawn(move || work.work());
    println!("listening at {}", listener.local_addr()?);
    http::serve(&listener, move |path| match path {
        "/counts" => (200, service.counts() + &counts(&sinks)),
        _ => respond(&service, path),
    });
    Ok(())
}

/// What sinks held back, and what they did not get because they did not read it in time.
fn counts(sinks: &[Arc<Sink>]) -> String {
    let counters = || sinks.iter().map(|sink| sink.counters());
    let filtered: u64 = counters().map(|counters| counters.filtered).sum();
    let lost: u64 = counters().map(|counters| counters.dropped).sum();
    format!("filtered {filtered}\nlost {lost}\n")
}

fn respond(service: &Service, path: &str) -> http::Response {
    match service.ask(path) {
        Ok(Reply::Answer(body)) => (200, body),
        Ok(Reply::GivenUp) => (504, "no server has answered in time; ask again\n".into()),
        Err(error) => (503, format!("{error}\n")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::{Read, Write};
    use std::net::{Shutdown, SocketAddr, TcpStream};
    use std::sync::OnceLock;
    use std::sync::mpsc::{Sender, channel};
    use std::thread::sleep;

    use xbee_kecho::balance::{FORWARD_AFTER, RequestId};

    use super::*;

    /// Servers 0, 1, ... of which a message gets to another through a queue, in order; `silent` does nothing.
    fn group(servers: u64, options: Options, silent: Option<u64>) -> Vec<Arc<Service>> {
        let queues: Arc<OnceLock<Vec<Sender<Message>>>> = Arc::default();
        let mut senders = vec![];
        let mut services = vec![];
        for own in 0..servers {
            let queues = queues.clone();
            let send = move |(to, message): Outgoing| {
                for (server, queue) in queues.get().unwrap().iter().enumerate() {
                    let load = matches!(message, Message::Load(..));
                    if load || to.contains(&ServerId(server as u64)) {
                        queue.send(message.clone()).unwrap();
                    }
                }
            };
            let service = Arc::new(Service::new(ServerId(own), options, 1, send));
            let (sender, receiver) = channel();
            senders.push(sender);
            let other = service.clone();
            spawn(move || {
                for message in receiver {
                    if let Message::Answer(request, from, _) = &message
                        && !other.wants(*request, *from)
                    {
                        continue;
                    }
                    other.receive(message);
                }
            });
            services.push(service);
        }
        queues.set(senders).unwrap();
        for (own, service) in services.iter().enumerate() {
            let [one, two] = [service.clone(), service.clone()];
            if silent == Some(own as u64) {
                // It is thought to have nothing to do.
                service.receive(Message::Load(ServerId(own as u64), 0));
                continue;
            }
            spawn(move || one.keep_time());
            spawn(move || two.work());
        }
        for (_, service) in services
            .iter()
            .enumerate()
            .filter(|(own, _)| silent != Some(*own as u64))
        {
            while count(service, "known") < servers {
                sleep(Duration::from_millis(1));
            }
        }
        services
    }

    fn count(service: &Service, name: &str) -> u64 {
        let counts = service.counts();
        let line = counts.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().parse().unwrap()
    }

    fn sum(services: &[Arc<Service>], name: &str) -> u64 {
        services.iter().map(|service| count(service, name)).sum()
    }

    #[test]
    fn all_servers_answer_what_comes_to_one() {
        let options = Options {
            copies: 2,
            copy_load: u32::MAX,
            ..Options::default()
        };
        let services = group(4, options, None);
        let clients: Vec<_> = (0..8)
            .map(|client| {
                let front = services[0].clone();
                spawn(move || {
                    for number in 0..5 {
                        let path = format!("/{client}/{number}?ms=10");
                        let Ok(Reply::Answer(body)) = front.ask(&path) else {
                            panic!("{path} is not answered");
                        };
                        assert!(body.starts_with(&format!("path={path}\n")), "{body}");
                    }
                })
            })
            .collect();
        for client in clients {
            client.join().unwrap();
        }
        assert_eq!(count(&services[0], "taken"), 40);
        assert_eq!(count(&services[0], "answered"), 40);
        // The last second copies end when they end.
        while sum(&services, "worked") + sum(&services, "stopped") < 80 {
            sleep(Duration::from_millis(1));
        }
        assert_eq!(sum(&services, "worked") + sum(&services, "stopped"), 80);
        assert!(services.iter().all(|server| count(server, "worked") > 0));
        assert!(count(&services[0], "dropped") <= sum(&services, "worked") - 40);
        assert_eq!(count(&services[0], "cancelled"), 40);
    }

    #[test]
    fn what_a_silent_server_has_is_answered_by_another() {
        let forward_after = Duration::from_millis(100);
        assert!(forward_after < FORWARD_AFTER);
        let options = Options {
            copies: 1,
            forward_after,
            ..Options::default()
        };
        let services = group(2, options, Some(1));
        let mut forwarded = 0;
        while forwarded == 0 {
            services[0].receive(Message::Load(ServerId(1), 0));
            let reply = services[0].ask("/page?ms=0").unwrap();
            assert_eq!(
                reply,
                Reply::Answer(format!("path=/page?ms=0\nserver={}\n", ServerId(0)))
            );
            forwarded = count(&services[0], "forwarded");
        }
    }

    #[test]
    fn what_is_cancelled_stops_at_once() {
        let services = group(1, Options::default(), None);
        let front = ServerId(7);
        let [long, next] = [0, 1].map(|number| RequestId { front, number });
        services[0].receive(Message::Request(long, "/long?ms=10000".into()));
        services[0].receive(Message::Request(next, "/next?ms=0".into()));
        services[0].receive(Message::Cancel(long));
        // It would be there in ten seconds only; a hang is what this finds.
        while count(&services[0], "worked") == 0 {
            sleep(Duration::from_millis(1));
        }
        assert_eq!(count(&services[0], "stopped"), 1);
    }

    fn http(address: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        response
    }

    #[test]
    fn bad_requests_get_a_reason() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        spawn(move || http::serve(&listener, |path| (200, format!("you want {path}\n"))));
        let good = http(address, b"GET /page HTTP/1.1\r\nhost: x\r\n\r\n");
        assert!(good.starts_with("HTTP/1.1 200 OK\r\n"), "{good}");
        assert!(
            good.ends_with("content-length: 15\r\nconnection: close\r\n\r\nyou want /page\n"),
            "{good}"
        );
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(2000));
        let headers = format!("GET / HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(2 << 10));
        let body = format!("POST / HTTP/1.1\r\n\r\n{}", "x".repeat(60 << 10));
        for (request, status) in [
            (&b"POST / HTTP/1.1\r\n\r\n"[..], 405),
            (b"GET / SPDY\r\n\r\n", 400),
            (b"\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\n", 400),
            (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
            (long.as_bytes(), 414),
            (headers.as_bytes(), 400),
            (body.as_bytes(), 405),
        ] {
            let response = http(address, request);
            let begin = format!("HTTP/1.1 {status} ");
            assert!(response.starts_with(&begin), "{status}: {response}");
        }
    }
}
