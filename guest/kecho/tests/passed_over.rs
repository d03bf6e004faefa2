//! Sinks that events are not for: they sleep on, hold nobody up, and miss nothing of what is for them.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use common::{LONG, Random, until};
use xbee_kecho::{
    Channel, ChannelOptions, Config, EventType, FieldKind, Node, Policy, Sink, SinkOptions, Source,
    Submission, Transports, TypeSelector,
};

/// A channel with the smallest log, its source, and the same channel in another node.
struct Place {
    source: Source,
    other: Channel,
    over_tcp: bool,
    _nodes: (tempfile::TempDir, Node, Node),
}

impl Place {
    fn new(same_process: bool, shared_memory: bool) -> Place {
        let directory = tempfile::tempdir().unwrap();
        let start = || {
            let transports = Transports {
                same_process,
                shared_memory,
                vsock: false,
                tcp: !same_process && !shared_memory,
            };
            Node::start(Config {
                directory: Some(directory.path().to_owned()),
                listen: vec!["tcp:[::1]:0".parse().unwrap()],
                transports,
                log_bytes: 64 << 10,
                ..Config::default()
            })
            .unwrap()
        };
        let (one, two) = (start(), start());
        let source = one.create("c", ChannelOptions::default()).unwrap();
        Place {
            source: source.source().unwrap(),
            other: two.open_at("c", one.address()).unwrap(),
            over_tcp: !same_process && !shared_memory,
            _nodes: (directory, one, two),
        }
    }

    fn everywhere() -> [Place; 3] {
        [(true, false), (false, true), (false, false)].map(|(p, m)| Place::new(p, m))
    }

    fn sink(&self, filter: &str, policy: Policy) -> Sink {
        let filter = (!filter.is_empty()).then(|| filter.to_owned());
        let options = SinkOptions {
            filter,
            policy: Some(policy),
            ..SinkOptions::default()
        };
        self.other.sink(options).unwrap()
    }

    /// Waits for nobody who would have to read, but over TCP for the thread that sends.
    fn submit(&self, kind: &EventType, n: u64) {
        let mut payload = [0; 200];
        payload[..8].copy_from_slice(&n.to_le_bytes());
        let event = Submission {
            kind,
            attributes: &[],
            payload: &payload,
        };
        if self.over_tcp {
            until("room", || self.source.try_submit(&event).is_ok());
        } else {
            self.source.try_submit(&event).unwrap();
        }
    }
}

fn counted() -> EventType {
    EventType::new("counted", 1, [("n", FieldKind::U64)]).unwrap()
}

fn n(event: &xbee_kecho::Event) -> u64 {
    u64::from_le_bytes(event.get().payload()[..8].try_into().unwrap())
}

#[test]
fn who_does_not_read_holds_up_only_what_is_for_it() {
    for place in Place::everywhere() {
        let unread = place.sink("n % 1000 == 999", Policy::Block);
        let leaving = place.sink("n == 5900", Policy::Disconnect);
        let typed = place.other.sink(SinkOptions {
            types: vec![TypeSelector {
                name: "rare".into(),
                version: None,
            }],
            ..SinkOptions::default()
        });
        let typed = typed.unwrap();
        // What nobody gets would not even be written.
        let all = place.sink("", Policy::DropOldest);
        for number in 0..999 {
            place.submit(&counted(), number);
        }
        // For the one that has its type and nothing else, far behind where its log ends.
        place.submit(&EventType::raw("rare").unwrap(), 7);
        place.submit(&counted(), 999);
        assert_eq!(n(&unread.receive_timeout(LONG).unwrap().unwrap()), 999);
        assert_eq!(n(&typed.receive_timeout(LONG).unwrap().unwrap()), 7);
        for number in 1000..6000 {
            if number % 1000 == 0 && number > 1000 {
                assert_eq!(
                    n(&unread.receive_timeout(LONG).unwrap().unwrap()),
                    number - 1
                );
            }
            place.submit(&counted(), number);
        }
        assert_eq!(n(&unread.receive_timeout(LONG).unwrap().unwrap()), 5999);
        assert_eq!(n(&leaving.receive_timeout(LONG).unwrap().unwrap()), 5900);
        for sink in [&unread, &typed, &leaving] {
            assert!(sink.poll().unwrap().is_none());
            assert_eq!(sink.counters().dropped, 0, "{:?}", sink.counters());
        }
        // One that is for a sink and stays unread is waited for.
        for number in 6000..7000 {
            place.submit(&counted(), number);
        }
        let submitter = submit_many(&place.source);
        until("somebody waits", || place.source.counters().waited > 0);
        assert_eq!(n(&unread.receive_timeout(LONG).unwrap().unwrap()), 6999);
        submitter.join().unwrap();
        drop(all);
    }
}

fn submit_many(source: &Source) -> thread::JoinHandle<()> {
    let source = source.clone();
    thread::spawn(move || {
        for _ in 0..1000 {
            let event = Submission {
                kind: &counted(),
                attributes: &[],
                payload: &[0; 200],
            };
            source.submit(&event).unwrap();
        }
    })
}

#[test]
fn who_drops_the_oldest_does_not_count_what_was_not_for_it() {
    let [process, memory, _] = Place::everywhere();
    for place in [process, memory] {
        let sink = place.sink("n >= 5000", Policy::DropOldest);
        // It has lost the first descriptor of the type with the first event.
        let late = place.sink("n == 0 || n >= 4990", Policy::DropOldest);
        let _all = place.sink("", Policy::DropOldest);
        for number in 0..5003 {
            place.submit(&counted(), number);
        }
        for number in 5000..5003 {
            assert_eq!(n(&sink.receive_timeout(LONG).unwrap().unwrap()), number);
        }
        assert_eq!(sink.counters().dropped, 0);
        assert_eq!(n(&late.receive_timeout(LONG).unwrap().unwrap()), 4990);
        // What is for it and was not read is.
        for number in 5003..9000 {
            place.submit(&counted(), number);
        }
        let first = n(&sink.receive_timeout(LONG).unwrap().unwrap());
        assert!(first > 5003);
        assert_eq!(sink.counters().dropped, first - 5003);
    }
}

/// How often a thread of this process has gone to sleep.
fn sleeps(thread: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("voluntary_ctxt_switches"));
    line.unwrap()
        .split_whitespace()
        .last()
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
fn who_an_event_is_not_for_sleeps_on() {
    let [process, memory, _] = Place::everywhere();
    for place in [process, memory] {
        let sink = place.sink("n == 1 || n >= 4000", Policy::Block);
        let _all = place.sink("", Policy::DropOldest);
        let (sender, came) = channel();
        let reader = thread::spawn(move || {
            sender
                .send(u64::from(
                    rustix::thread::gettid().as_raw_nonzero().get() as u32
                ))
                .unwrap();
            while let Ok(event) = sink.receive() {
                sender.send(n(&event)).unwrap();
                if n(&event) == 4000 {
                    return sink.counters();
                }
            }
            panic!("not all came")
        });
        let thread = came.recv_timeout(LONG).unwrap() as u32;
        place.submit(&counted(), 1);
        assert_eq!(came.recv_timeout(LONG).unwrap(), 1);
        let mut before = 0;
        until("the sink sleeps", || {
            let now = sleeps(thread);
            thread::sleep(Duration::from_millis(20));
            before = sleeps(thread);
            before == now
        });
        // Bursts, which a thread of the library looks after, and single ones.
        for number in 2..4000 {
            place.submit(&counted(), number);
            if number % 100 == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        }
        assert_eq!(sleeps(thread), before);
        place.submit(&counted(), 4000);
        assert_eq!(came.recv_timeout(LONG).unwrap(), 4000);
        let counters = reader.join().unwrap();
        assert_eq!((counters.received, counters.dropped), (2, 0));
    }
}

#[test]
fn each_gets_what_is_for_it_however_it_reads() {
    let mut random = Random::seeded();
    for place in [Place::new(true, false), Place::new(false, true)] {
        let filters = [
            "n % 7 == 0",
            "n % 500 == 3",
            "n % 2 == 0",
            "n / 2000 % 2 == 1",
            "",
        ];
        let readers = filters.map(|filter| {
            let sink = place.sink(filter, Policy::Block);
            let mut pauses = Random::new(random.below(u64::MAX));
            let count = (0..20_000).filter(|n| passes(filter, *n)).count();
            thread::spawn(move || {
                let mut got = Vec::new();
                while got.len() < count {
                    let Some(event) = sink.receive_timeout(LONG).unwrap() else {
                        panic!("{filter}: nothing after {:?}", got.last())
                    };
                    got.push(n(&event));
                    if pauses.below(400) == 0 {
                        thread::sleep(Duration::from_micros(pauses.below(3000)));
                    }
                }
                assert!(sink.poll().unwrap().is_none());
                assert_eq!(sink.counters().dropped, 0);
                got
            })
        });
        let kinds =
            ["a", "b", "c"].map(|name| EventType::new(name, 1, [("n", FieldKind::U64)]).unwrap());
        let submitters: Vec<_> = (0..2u64)
            .map(|which| {
                let (source, kinds) = (place.source.clone(), kinds.clone());
                thread::spawn(move || {
                    for number in (0..20_000u64).filter(|n| n % 2 == which) {
                        let event = Submission {
                            kind: &kinds[(number / 300 % 3) as usize],
                            attributes: &[],
                            payload: &number.to_le_bytes(),
                        };
                        source.submit(&event).unwrap();
                    }
                })
            })
            .collect();
        for submitter in submitters {
            submitter.join().unwrap();
        }
        for (reader, filter) in readers.into_iter().zip(filters) {
            let got = reader.join().unwrap();
            for which in [0, 1] {
                let of_one: Vec<u64> = got.iter().copied().filter(|n| n % 2 == which).collect();
                let wanted: Vec<u64> = (0..20_000)
                    .filter(|n| n % 2 == which && passes(filter, *n))
                    .collect();
                assert!(
                    of_one == wanted,
                    "{filter}: {} of {}",
                    of_one.len(),
                    wanted.len()
                );
            }
        }
    }
}

fn passes(filter: &str, n: u64) -> bool {
    match filter {
        "n % 7 == 0" => n.is_multiple_of(7),
        "n % 500 == 3" => n % 500 == 3,
        "n % 2 == 0" => n.is_multiple_of(2),
        "n / 2000 % 2 == 1" => n / 2000 % 2 == 1,
        _ => true,
    }
}
