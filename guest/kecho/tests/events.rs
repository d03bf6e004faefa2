//! Events between nodes, over each way that they can take.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use xbee_kecho::{
    Batch, ChannelOptions, Config, EventType, FieldKind, Node, Policy, SinkOptions, Source,
    Submission, SubmitError, Transports, TypeSelector, Value,
};

/// Finds hangs, not slowness.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Process,
    Memory,
    Tcp,
}

fn nodes(way: Way, log_bytes: usize) -> (tempfile::TempDir, Node, Node) {
    let directory = tempfile::tempdir().unwrap();
    let start = || {
        Node::start(Config {
            directory: Some(directory.path().to_owned()),
            listen: vec!["tcp:[::1]:0".parse().unwrap()],
            transports: Transports {
                same_process: way == Way::Process,
                shared_memory: way == Way::Memory,
                vsock: false,
                tcp: way == Way::Tcp,
            },
            log_bytes,
            ..Config::default()
        })
        .unwrap()
    };
    let (one, two) = (start(), start());
    (directory, one, two)
}

fn counted() -> EventType {
    EventType::new("counted", 1, [("n", FieldKind::U64)]).unwrap()
}

fn n(event: &xbee_kecho::Event) -> u64 {
    u64::from_le_bytes(event.get().payload()[..8].try_into().unwrap())
}

#[test]
fn all_events_come_in_their_order_on_every_way() {
    for way in [Way::Process, Way::Memory, Way::Tcp] {
        let (_directory, one, two) = nodes(way, 64 << 10);
        let channel = one.create("c", ChannelOptions::default()).unwrap();
        let source = channel.source().unwrap();
        let other = two.open_at("c", one.address()).unwrap();
        let sink = other.sink(SinkOptions::default()).unwrap();
        let kind = counted();
        let submitting = source.clone();
        let of_kind = kind.clone();
        let submitter = thread::spawn(move || {
            for n in 0..50_000u64 {
                let payload = n.to_le_bytes();
                let attributes = [("even", Value::Bool(n % 2 == 0))];
                let event = Submission {
                    kind: &of_kind,
                    attributes: &attributes,
                    payload: &payload,
                };
                submitting.submit(&event).unwrap();
            }
        });
        let mut batch = Batch::default();
        let mut next = 0u64;
        while next < 50_000 {
            sink.receive_batch(&mut batch, 1000).unwrap();
            for event in batch.iter() {
                assert_eq!(event.payload(), next.to_le_bytes(), "{way:?}");
                assert_eq!(event.kind(), &kind);
                next += 1;
            }
        }
        submitter.join().unwrap();
        assert_eq!(sink.poll().unwrap().map(|_| ()), None);
        let counters = sink.counters();
        assert_eq!((counters.received, counters.dropped), (50_000, 0));
    }
}

#[test]
fn an_event_of_a_megabyte_comes_whole() {
    for way in [Way::Process, Way::Memory, Way::Tcp] {
        let (_directory, one, two) = nodes(way, 4 << 20);
        let source = one
            .create("c", ChannelOptions::default())
            .unwrap()
            .source()
            .unwrap();
        let other = two.open_at("c", one.address()).unwrap();
        let sink = other.sink(SinkOptions::default()).unwrap();
        let kind = EventType::raw("bytes").unwrap();
        let payload: Vec<u8> = (0..1u32 << 20).map(|n| ((n * 7) >> 3) as u8).collect();
        for _ in 0..5 {
            let event = Submission {
                kind: &kind,
                attributes: &[],
                payload: &payload,
            };
            source.submit(&event).unwrap();
            let event = sink.receive_timeout(PATIENCE).unwrap().unwrap();
            assert!(event.get().payload() == payload, "{way:?}");
        }
    }
}

#[test]
fn a_filter_at_the_source_is_placed_replaced_and_removed() {
    for way in [Way::Process, Way::Memory, Way::Tcp] {
        let (_directory, one, two) = nodes(way, 1 << 20);
        let source = one
            .create("c", ChannelOptions::default())
            .unwrap()
            .source()
            .unwrap();
        let other = two.open_at("c", one.address()).unwrap();
        let options = SinkOptions {
            filter: Some("n % 10 == 3".into()),
            ..SinkOptions::default()
        };
        let sink = other.sink(options).unwrap();
        let all = other.sink(SinkOptions::default()).unwrap();
        let kind = counted();
        let submit = |range: std::ops::Range<u64>| {
            for n in range {
                let payload = n.to_le_bytes();
                source
                    .submit(&Submission {
                        kind: &kind,
                        attributes: &[],
                        payload: &payload,
                    })
                    .unwrap();
            }
        };
        let take = |count: usize| -> Vec<u64> {
            (0..count)
                .map(|_| n(&sink.receive_timeout(PATIENCE).unwrap().unwrap()))
                .collect()
        };
        submit(0..30);
        assert_eq!(take(3), [3, 13, 23], "{way:?}");
        sink.set_filter(Some("n >= 35")).unwrap();
        submit(30..37);
        assert_eq!(take(2), [35, 36], "{way:?}");
        sink.set_filter(None).unwrap();
        submit(37..40);
        assert_eq!(take(3), [37, 38, 39], "{way:?}");
        assert!(sink.poll().unwrap().is_none());
        for expected in 0..40 {
            assert_eq!(
                n(&all.receive_timeout(PATIENCE).unwrap().unwrap()),
                expected
            );
        }
        let error = other.sink(SinkOptions {
            filter: Some("n >".into()),
            ..SinkOptions::default()
        });
        let error = error.unwrap_err();
        assert_eq!(error.code(), "filter-syntax", "{error}");
        assert_eq!(source.counters().filtered, 27 + 5);
    }
}

#[test]
fn filters_in_the_process_see_state_and_choose() {
    let (_directory, one, two) = nodes(Way::Memory, 1 << 20);
    let source = one
        .create("c", ChannelOptions::default())
        .unwrap()
        .source()
        .unwrap();
    let other = two.open_at("c", one.address()).unwrap();
    let sinks = [0.9, 0.1, 0.5].map(|load| {
        let state = vec![("load".to_owned(), Value::Float(load))];
        other
            .sink(SinkOptions {
                state,
                ..SinkOptions::default()
            })
            .unwrap()
    });
    source.set_out_filter(Some(Box::new(|_, sinks| {
        sinks.keep_least(1, |sink| match sink.state("load") {
            Some(Value::Float(load)) => *load,
            _ => f64::INFINITY,
        });
    })));
    sinks[2].set_in_filter(Some(Box::new(|event| event.payload()[0] != 2)));
    let kind = EventType::raw("t").unwrap();
    let submit = |n: u8| {
        source
            .submit(&Submission {
                kind: &kind,
                attributes: &[],
                payload: &[n],
            })
            .unwrap();
    };
    submit(1);
    assert_eq!(
        sinks[1]
            .receive_timeout(PATIENCE)
            .unwrap()
            .unwrap()
            .get()
            .payload(),
        [1]
    );
    sinks[1].set_state("load", Value::Float(0.7)).unwrap();
    submit(2);
    submit(3);
    assert_eq!(
        sinks[2]
            .receive_timeout(PATIENCE)
            .unwrap()
            .unwrap()
            .get()
            .payload(),
        [3]
    );
    assert_eq!(sinks[2].counters().filtered, 1);
    for sink in &sinks {
        assert!(sink.poll().unwrap().is_none());
    }
}

#[test]
fn a_slow_sink_gets_what_its_policy_says() {
    for way in [Way::Process, Way::Memory, Way::Tcp] {
        let (_directory, one, two) = nodes(way, 64 << 10);
        let source = one
            .create("c", ChannelOptions::default())
            .unwrap()
            .source()
            .unwrap();
        let other = two.open_at("c", one.address()).unwrap();
        let with = |policy| {
            other.sink(SinkOptions {
                policy: Some(policy),
                ..SinkOptions::default()
            })
        };
        let kind = EventType::raw("t").unwrap();
        let submit = |n: u64, source: &xbee_kecho::Source, block| {
            let mut payload = vec![0; 1000];
            payload[..8].copy_from_slice(&n.to_le_bytes());
            let event = Submission {
                kind: &kind,
                attributes: &[],
                payload: &payload,
            };
            if block {
                source.submit(&event)
            } else {
                source.try_submit(&event)
            }
        };

        let dropping = with(Policy::DropOldest).unwrap();
        // More than the log and all buffers of the system's take.
        for n in 0..20_000 {
            submit(n, &source, true).unwrap();
        }
        let mut seen = Vec::new();
        while seen.last() != Some(&19_999) {
            seen.push(n(&dropping.receive_timeout(PATIENCE).unwrap().unwrap()));
        }
        assert!(seen.is_sorted(), "{way:?}");
        let counters = dropping.counters();
        assert!(counters.dropped > 0, "{way:?}: {counters:?}");
        assert_eq!(
            counters.received + counters.dropped,
            20_000,
            "{way:?}: {counters:?}"
        );
        drop(dropping);

        let leaving = with(Policy::Disconnect).unwrap();
        for n in 0..20_000 {
            submit(n, &source, true).unwrap();
        }
        assert_eq!(source.counters().expelled, 1, "{way:?}");
        let error = loop {
            match leaving.receive_timeout(PATIENCE) {
                Ok(Some(_)) => {}
                Ok(None) => panic!("{way:?}: not told"),
                Err(error) => break error,
            }
        };
        assert_eq!(error.code(), "too-slow");
        drop(leaving);

        let blocking = with(Policy::Block).unwrap();
        let full = (0..20_000).find_map(|n| submit(n, &source, false).err());
        assert!(matches!(full, Some(SubmitError::Full)), "{way:?}: {full:?}");
        assert_eq!(full.map(|error| error.code()), Some("log-full"));
        let waiting = source.clone();
        thread::scope(|scope| {
            let submitter = scope.spawn(|| submit(u64::MAX, &waiting, true).unwrap());
            let mut last = 0;
            while last != u64::MAX {
                last = n(&blocking.receive_timeout(PATIENCE).unwrap().unwrap());
            }
            submitter.join().unwrap();
        });
        assert_eq!(blocking.counters().dropped, 0);
    }
}

#[test]
fn what_was_submitted_before_the_source_left_comes() {
    for way in [Way::Process, Way::Memory, Way::Tcp] {
        let (_directory, one, two) = nodes(way, 4 << 20);
        let channel = two.create("c", ChannelOptions::default()).unwrap();
        let sink = channel.sink(SinkOptions::default()).unwrap();
        let other = one.open_at("c", two.address()).unwrap();
        let source = other.source().unwrap();
        let kind = EventType::raw("bytes").unwrap();
        let payload = [7; 1000];
        for _ in 0..3000 {
            let event = Submission {
                kind: &kind,
                attributes: &[],
                payload: &payload,
            };
            source.submit(&event).unwrap();
        }
        drop((source, other));
        let ending = thread::spawn(move || one.shutdown());
        for n in 0..3000 {
            let event = sink.receive_timeout(PATIENCE).unwrap();
            let event = event.unwrap_or_else(|| panic!("{way:?}: {n} events came"));
            assert_eq!(event.get().sequence(), n);
        }
        assert_eq!(sink.poll().unwrap().map(|_| ()), None);
        ending.join().unwrap();
    }
}

#[test]
fn who_comes_while_a_submission_waits_gets_only_what_it_takes() {
    for way in [Way::Process, Way::Memory, Way::Tcp] {
        let (_directory, one, two) = nodes(way, 64 << 10);
        let channel = one.create("c", ChannelOptions::default()).unwrap();
        let source = channel.source().unwrap();
        let other = two.open_at("c", one.address()).unwrap();
        let slow = other.sink(SinkOptions::default()).unwrap();
        let submitter = submit_kilobytes(&source, "a", 200);
        while source.counters().waited == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        let choosy = other
            .sink(SinkOptions {
                types: vec![TypeSelector {
                    name: "b".to_owned(),
                    version: None,
                }],
                ..SinkOptions::default()
            })
            .unwrap();
        let (sender, came) = std::sync::mpsc::channel();
        let _callback = choosy.on_event(move |event| {
            sender.send(event.kind().name().to_owned()).unwrap();
        });
        for n in 0..200 {
            let event = slow.receive_timeout(PATIENCE).unwrap().unwrap();
            assert_eq!(event.get().sequence(), n, "{way:?}");
        }
        submitter.join().unwrap();
        submit_kilobytes(&source, "b", 1).join().unwrap();
        assert_eq!(came.recv_timeout(PATIENCE).unwrap(), "b", "{way:?}");
    }
}

fn submit_kilobytes(source: &Source, name: &str, count: usize) -> thread::JoinHandle<()> {
    let (source, kind) = (source.clone(), EventType::raw(name).unwrap());
    thread::spawn(move || {
        for _ in 0..count {
            let event = Submission {
                kind: &kind,
                attributes: &[],
                payload: &[0; 1000],
            };
            source.submit(&event).unwrap();
        }
    })
}

#[test]
fn who_reads_what_a_filter_leaves_holds_nobody_up() {
    for way in [Way::Process, Way::Memory, Way::Tcp] {
        for (filter, passing) in [("false", 0), ("event.sequence < 3", 3)] {
            let (_directory, one, two) = nodes(way, 64 << 10);
            let channel = one.create("c", ChannelOptions::default()).unwrap();
            let source = channel.source().unwrap();
            let other = two.open_at("c", one.address()).unwrap();
            let sink = other
                .sink(SinkOptions {
                    filter: Some(filter.to_owned()),
                    ..SinkOptions::default()
                })
                .unwrap();
            let (sender, came) = std::sync::mpsc::channel();
            let _callback = sink.on_event(move |event| sender.send(event.sequence()).unwrap());
            // What nobody gets would not even be written.
            let other = other.sink(SinkOptions::default()).unwrap();
            let _other = other.on_event(|_| {});
            let submitter = submit_kilobytes(&source, "a", 1000);
            let deadline = std::time::Instant::now() + PATIENCE;
            while !submitter.is_finished() {
                let counters = source.counters();
                let now = std::time::Instant::now();
                assert!(now < deadline, "{way:?}, {filter}: {counters:?}");
                thread::sleep(Duration::from_millis(1));
            }
            for n in 0..passing {
                assert_eq!(came.recv_timeout(PATIENCE).unwrap(), n, "{way:?}");
            }
            assert!(came.try_recv().is_err());
        }
    }
}

#[test]
fn a_function_is_called_for_each_event_until_its_callback_is_dropped() {
    for way in [Way::Process, Way::Memory, Way::Tcp] {
        let (_directory, one, two) = nodes(way, 64 << 10);
        let channel = one.create("c", ChannelOptions::default()).unwrap();
        let source = channel.source().unwrap();
        let other = two.open_at("c", one.address()).unwrap();
        let kind = counted();
        let submit = |n: u64| {
            let event = Submission {
                kind: &kind,
                attributes: &[],
                payload: &n.to_le_bytes(),
            };
            source.submit(&event).unwrap();
        };
        let (sender, came) = std::sync::mpsc::channel();
        let sink = other.sink(SinkOptions::default()).unwrap();
        let called = sender.clone();
        let callback = sink
            .on_event(move |event| called.send(event.sequence()).unwrap())
            .unwrap();
        (0..5000).for_each(submit);
        for n in 0..5000 {
            assert_eq!(came.recv_timeout(PATIENCE).unwrap(), n, "{way:?}");
        }
        drop(callback);
        let second = other.sink(SinkOptions::default()).unwrap();
        let callback = second
            .on_event(move |event| sender.send(event.sequence()).unwrap())
            .unwrap();
        submit(5000);
        assert_eq!(came.recv_timeout(PATIENCE).unwrap(), 5000, "{way:?}");
        channel.destroy().unwrap();
        assert_eq!(callback.wait().code(), "channel-destroyed", "{way:?}");
        assert!(came.try_recv().is_err());
    }
}

#[test]
fn a_sink_that_waits_is_asked_and_given_filters_meanwhile() {
    let (_directory, one, two) = nodes(Way::Memory, 64 << 10);
    let source = one
        .create("c", ChannelOptions::default())
        .unwrap()
        .source()
        .unwrap();
    let other = two.open_at("c", one.address()).unwrap();
    let sink = Arc::new(other.sink(SinkOptions::default()).unwrap());
    let (sender, received) = channel();
    let waiting = sink.clone();
    thread::spawn(move || {
        while let Ok(event) = waiting.receive() {
            sender.send(n(&event)).unwrap();
        }
    });
    let kind = counted();
    let (done, finished) = channel();
    thread::spawn(move || {
        let submit = |n: u64| {
            let payload = n.to_le_bytes();
            let event = Submission {
                kind: &kind,
                attributes: &[],
                payload: &payload,
            };
            source.submit(&event).unwrap();
        };
        for n in (0..300).step_by(3) {
            submit(n);
            assert_eq!(received.recv().unwrap(), n);
            sink.set_in_filter(Some(Box::new(move |event| {
                event.payload() != (n + 1).to_le_bytes()
            })));
            submit(n + 1);
            submit(n + 2);
            assert_eq!(received.recv().unwrap(), n + 2);
            // It begins to wait when it has.
            while (sink.counters().received, sink.counters().filtered)
                != (2 * (n / 3 + 1), n / 3 + 1)
            {
                thread::yield_now();
            }
        }
        assert_eq!(sink.counters().sources, 1);
        done.send(()).unwrap();
    });
    finished.recv_timeout(PATIENCE).unwrap();
}
