//! A sink over TCP whose connections are cut, at any byte, goes on where it was; what it could not get is counted.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::net::{Ipv6Addr, Shutdown, SocketAddrV6, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::{LONG, Random, until};
use rustix::net::sockopt::set_socket_linger;
use xbee_kecho::{
    Address, Channel, ChannelOptions, Config, Error, Event, EventType, Node, NodeAddress, Policy,
    Sink, SinkOptions, Source, Submission, Transports, TypeSelector,
};

/// The smallest log.
const LOG_BYTES: usize = 64 << 10;

/// Between a node and those that dial it. What the node says of its own address is said of this one's instead.
struct Proxy {
    door: SocketAddrV6,
    line: Arc<Line>,
}

struct Line {
    open: AtomicBool,
    /// A connection is cut at the latest after so many bytes to who has dialled; 0: never.
    longest: AtomicU64,
    cuts: AtomicU64,
    random: Mutex<Random>,
    live: Mutex<Vec<TcpStream>>,
    /// What is said, and what instead: of the same length.
    said: Mutex<Vec<(Vec<u8>, Vec<u8>)>>,
}

impl Proxy {
    fn start(of: &Node, random: Random) -> Proxy {
        let Some(Address::Tcp(real)) = of.address().endpoints.last().cloned() else {
            panic!("{:?}", of.address())
        };
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let line = Arc::new(Line {
            open: AtomicBool::new(true),
            longest: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
            random: Mutex::new(random),
            live: Mutex::default(),
            said: Mutex::default(),
        });
        line.say(real.port(), port);
        let accepting = line.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let line = accepting.clone();
                if line.open.load(Ordering::SeqCst) {
                    thread::spawn(move || line.carry(stream.unwrap(), real));
                }
            }
        });
        Proxy {
            door: SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0),
            line,
        }
    }

    fn address(&self) -> NodeAddress {
        NodeAddress::at(Address::Tcp(self.door))
    }

    fn close(&self) {
        self.line.open.store(false, Ordering::SeqCst);
        let live = std::mem::take(&mut *self.line.live.lock().unwrap());
        for stream in live {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn open(&self) {
        self.line.open.store(true, Ordering::SeqCst);
    }
}

impl Line {
    fn say(&self, port: u16, instead: u16) {
        let text = |port: u16| format!("[::1]:{port}").into_bytes();
        assert_eq!(text(port).len(), text(instead).len());
        self.said.lock().unwrap().push((text(port), text(instead)));
    }

    fn carry(&self, mut client: TcpStream, real: SocketAddrV6) {
        // At the test's end nobody is there any more.
        let Ok(mut server) = TcpStream::connect(real) else {
            return;
        };
        let halves = [client.try_clone().unwrap(), server.try_clone().unwrap()];
        self.live.lock().unwrap().extend(halves);
        let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        thread::spawn(move || {
            // It ends when either does.
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
        });
        let longest = self.longest.load(Ordering::SeqCst);
        let (mut left, reset) = {
            let mut random = self.random.lock().unwrap();
            (random.below(longest.max(1)), random.chance())
        };
        let mut buffer = [0; 32 << 10];
        while let Ok(count @ 1..) = server.read(&mut buffer) {
            let bytes = &mut buffer[..count];
            for (said, instead) in &*self.said.lock().unwrap() {
                for at in 0..bytes.len().saturating_sub(said.len() - 1) {
                    if bytes[at..].starts_with(said) {
                        bytes[at..at + said.len()].copy_from_slice(instead);
                    }
                }
            }
            let cut = longest > 0 && count as u64 > left;
            let sent = if cut { left as usize } else { count };
            if client.write_all(&bytes[..sent]).is_err() {
                break;
            }
            left = left.saturating_sub(sent as u64);
            if cut {
                self.cuts.fetch_add(1, Ordering::SeqCst);
                if reset {
                    set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
                    set_socket_linger(&server, Some(Duration::ZERO)).unwrap();
                }
                break;
            }
        }
        let _ = client.shutdown(Shutdown::Both);
        let _ = server.shutdown(Shutdown::Both);
    }
}

fn node(directory: &tempfile::TempDir) -> Node {
    Node::start(Config {
        directory: Some(directory.path().to_owned()),
        listen: vec!["tcp:[::1]:0".parse().unwrap()],
        transports: Transports {
            same_process: false,
            shared_memory: false,
            vsock: false,
            tcp: true,
        },
        ..Config::default()
    })
    .unwrap()
}

/// A contact that is always there, a source, and who reaches it through a proxy only.
struct Stage {
    _directory: tempfile::TempDir,
    near: Channel,
    source: Source,
    proxy: Proxy,
    far: Channel,
}

impl Stage {
    fn new(policy: Policy, log_bytes: usize, random: &mut Random) -> Stage {
        let directory = tempfile::tempdir().unwrap();
        let [contact, source, sink] = [0; 3].map(|_| node(&directory));
        let options = ChannelOptions {
            policy,
            log_bytes: Some(log_bytes),
            ..ChannelOptions::default()
        };
        let near = contact.create("x", options).unwrap();
        let proxy = Proxy::start(&source, Random::new(random.below(u64::MAX)));
        let desk = Proxy::start(&contact, random.clone());
        let said = proxy.line.said.lock().unwrap().clone();
        desk.line.said.lock().unwrap().extend(said);
        let source = source.open_at("x", contact.address()).unwrap();
        let source = source.source().unwrap();
        let far = sink.open_at("x", &desk.address()).unwrap();
        Stage {
            _directory: directory,
            near,
            source,
            proxy,
            far,
        }
    }
}

fn submit(source: &Source, n: u64) {
    let kind = EventType::raw(["even", "odd"][(n % 2) as usize]).unwrap();
    let mut payload = [0; 400];
    payload[..8].copy_from_slice(&n.to_le_bytes());
    let event = Submission {
        kind: &kind,
        attributes: &[],
        payload: &payload[..8 + (n * 7 % 390) as usize],
    };
    source.submit(&event).unwrap();
}

fn n(event: &Event) -> u64 {
    u64::from_le_bytes(event.get().payload()[..8].try_into().unwrap())
}

fn next(sink: &Sink) -> u64 {
    n(&sink.receive_timeout(LONG).unwrap().expect("no event came"))
}

#[test]
fn cuts_lose_nothing_and_double_nothing() {
    const EVENTS: u64 = 20_000;
    let mut random = Random::seeded();
    let stage = Stage::new(Policy::Block, 256 << 10, &mut random);
    // Who goes at once leaves a place at the source that who comes again must not take.
    let first = stage.near.sink(SinkOptions::default()).unwrap();
    let all = stage.far.sink(SinkOptions::default()).unwrap();
    let odd = TypeSelector {
        name: "odd".to_owned(),
        version: None,
    };
    let odd = SinkOptions {
        types: vec![odd],
        ..SinkOptions::default()
    };
    let odd = stage.far.sink(odd).unwrap();
    drop(first);
    until("the first sink is gone", || stage.source.sinks() == 2);
    let line = stage.proxy.line.clone();
    line.longest.store(60_000, Ordering::SeqCst);
    // Those from before have no such limit.
    stage.proxy.close();
    stage.proxy.open();
    let reader = |sink: Sink, first: u64, step: u64, mut random: Random| {
        thread::spawn(move || {
            for expected in (first..EVENTS).step_by(step as usize) {
                assert_eq!(next(&sink), expected);
                if random.below(500) == 0 {
                    thread::sleep(Duration::from_millis(random.below(20)));
                }
            }
            (sink.counters(), sink)
        })
    };
    let readers = [
        reader(all, 0, 1, random.clone()),
        reader(odd, 1, 2, random.clone()),
    ];
    for n in 0..EVENTS {
        submit(&stage.source, n);
    }
    for (reader, received) in readers.into_iter().zip([EVENTS, EVENTS / 2]) {
        let (counters, sink) = reader.join().unwrap();
        assert_eq!((counters.received, counters.dropped), (received, 0));
        assert!(sink.poll().unwrap().is_none());
    }
    let cuts = line.cuts.load(Ordering::SeqCst);
    println!("{cuts} cuts");
    assert!(cuts > 30, "{cuts}");
}

#[test]
fn who_was_cut_off_before_the_first_event_gets_it() {
    let stage = Stage::new(Policy::Block, LOG_BYTES, &mut Random::seeded());
    let sink = stage.far.sink(SinkOptions::default()).unwrap();
    stage.proxy.close();
    let there = || stage.source.sinks() == 1;
    until("the cut is noticed", || {
        assert!(sink.poll().unwrap().is_none());
        !there()
    });
    for n in 0..10 {
        submit(&stage.source, n);
    }
    stage.proxy.open();
    for n in 0..10 {
        assert_eq!(next(&sink), n);
    }
}

#[test]
fn what_is_lost_while_cut_off_for_long_is_counted_or_told() {
    // Several times what the log holds.
    const EVENTS: u64 = 2_000;
    for policy in [Policy::Block, Policy::DropOldest, Policy::Disconnect] {
        let stage = Stage::new(policy, LOG_BYTES, &mut Random::seeded());
        let sink = stage.far.sink(SinkOptions::default()).unwrap();
        for n in 0..100 {
            submit(&stage.source, n);
            assert_eq!(next(&sink), n);
        }
        stage.proxy.close();
        until("the cut is noticed", || {
            assert!(sink.poll().unwrap().is_none());
            stage.source.sinks() == 0
        });
        // It is waited for only for so long.
        for n in 100..EVENTS {
            submit(&stage.source, n);
        }
        stage.proxy.open();
        if policy == Policy::Disconnect {
            let end = sink.receive_timeout(LONG).map(|event| event.map(|e| n(&e)));
            assert!(matches!(end, Err(Error::Slow)), "{end:?}");
            continue;
        }
        until("it is back", || stage.source.sinks() == 1);
        submit(&stage.source, EVENTS);
        let mut last = 99;
        while last < EVENTS {
            let n = next(&sink);
            assert!(n > last, "{policy:?}: {n} after {last}");
            last = n;
        }
        let counters = sink.counters();
        println!("{policy:?}: {counters:?}");
        assert_eq!(
            counters.received + counters.dropped,
            EVENTS + 1,
            "{policy:?}"
        );
        assert!(counters.dropped > 0, "{policy:?}");
        assert!(
            counters.received > 150,
            "{policy:?}: what is in the log still comes"
        );
    }
}
