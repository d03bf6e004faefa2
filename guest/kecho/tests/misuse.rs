//! What an application may ask for that cannot be, or that is easily done wrong: it is told so, and nothing hangs.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use xbee_kecho::{
    Channel, ChannelOptions, Config, Error, EventType, Node, SinkOptions, Source, Submission,
    SubmitError, Value,
};

/// Finds hangs, not slowness.
const PATIENCE: Duration = Duration::from_secs(60);

fn config(directory: &tempfile::TempDir) -> Config {
    Config {
        directory: Some(directory.path().to_owned()),
        listen: vec!["tcp:[::1]:0".parse().unwrap()],
        ..Config::default()
    }
}

fn alone() -> (tempfile::TempDir, Node, Channel) {
    let directory = tempfile::tempdir().unwrap();
    let node = Node::start(config(&directory)).unwrap();
    let channel = node.create("c", ChannelOptions::default()).unwrap();
    (directory, node, channel)
}

fn submit(source: &Source, text: &str) -> Result<(), SubmitError> {
    source.submit(&Submission {
        kind: &EventType::raw("text").unwrap(),
        attributes: &[],
        payload: text.as_bytes(),
    })
}

#[test]
fn a_node_that_cannot_start_says_so_within_a_runtime_too() {
    let directory = tempfile::tempdir().unwrap();
    let first = Node::start(config(&directory)).unwrap();
    let taken = first.address().endpoints.last().unwrap().clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let second = runtime.block_on(async {
        Node::start(Config {
            listen: vec![taken.clone()],
            ..config(&directory)
        })
    });
    let error = second.unwrap_err();
    assert_eq!(error.to_string(), format!("cannot listen at {taken}"));
    let registry = runtime.block_on(async {
        xbee_kecho::Registry::start(&xbee_kecho::RegistryConfig {
            listen: vec![taken.clone()],
            ..Default::default()
        })
    });
    let error = registry.unwrap_err();
    assert_eq!(error.to_string(), format!("cannot listen at {taken}"));
}

#[test]
fn times_that_cannot_be_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let second = Duration::from_secs(1);
    for (heartbeat, dead_after) in [(Duration::ZERO, second), (second, second)] {
        let node = Node::start(Config {
            heartbeat,
            dead_after,
            ..config(&directory)
        });
        assert_eq!(node.unwrap_err().code(), "config");
    }
}

#[test]
fn a_filter_that_is_none_is_not_kept_for_later_sources() {
    let (_directory, _node, channel) = alone();
    let options = SinkOptions {
        filter: Some("event.size > 1".to_owned()),
        ..SinkOptions::default()
    };
    let sink = channel.sink(options).unwrap();
    // Nobody is there who could refuse it.
    let error = sink.set_filter(Some("event.size >")).unwrap_err();
    assert!(matches!(error, Error::Filter(_)), "{error}");
    // Who comes later gets the one before.
    let source = channel.source().unwrap();
    for text in ["a", "bb"] {
        submit(&source, text).unwrap();
    }
    let event = sink.receive_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(event.get().payload(), b"bb");
}

#[test]
fn a_state_beyond_its_bounds_is_refused_and_changes_nothing() {
    let (_directory, _node, channel) = alone();
    let sink = channel.sink(SinkOptions::default()).unwrap();
    for n in 0..32 {
        sink.set_state(&format!("s{n}"), Value::Int(n)).unwrap();
    }
    for (name, value, code) in [
        ("more", Value::Int(0), "state-full"),
        ("a b", Value::Int(0), "state-name"),
        ("s1", Value::Bytes(vec![0; 4097]), "state-too-large"),
    ] {
        assert_eq!(sink.set_state(name, value).unwrap_err().code(), code);
    }
    sink.set_state("s1", Value::Int(7)).unwrap();
    let source = channel.source().unwrap();
    sink.set_filter(Some("sink.s1 == 7 && sink.s31 == 31"))
        .unwrap();
    submit(&source, "x").unwrap();
    assert!(sink.receive_timeout(PATIENCE).unwrap().is_some());
    let state = vec![("a b".to_owned(), Value::Int(0))];
    let options = SinkOptions {
        state,
        ..SinkOptions::default()
    };
    assert_eq!(channel.sink(options).unwrap_err().code(), "state-name");
}

#[test]
fn a_sink_whose_filter_keeps_all_back_still_looks_at_the_clock_and_at_the_end() {
    let (_directory, _node, channel) = alone();
    let sink = channel.sink(SinkOptions::default()).unwrap();
    let source = channel.source().unwrap();
    sink.set_in_filter(Some(Box::new(|_| {
        thread::sleep(Duration::from_micros(200));
        false
    })));
    let enough = Arc::new(AtomicBool::new(false));
    let (of_thread, submitting) = (enough.clone(), source.clone());
    // Always more than the sink can look at.
    let flood = thread::spawn(move || {
        while !of_thread.load(Ordering::Relaxed) {
            match submit(&submitting, "never") {
                Ok(()) | Err(SubmitError::Closed) => {}
                Err(error) => panic!("{error}"),
            }
        }
    });
    // Without its clock it would not come back as long as events come.
    let late = sink.receive_timeout(Duration::from_millis(10)).unwrap();
    assert!(late.is_none());
    let callback = sink.on_event(|_| ()).unwrap();
    drop(callback);
    enough.store(true, Ordering::Relaxed);
    flood.join().unwrap();
}

#[test]
fn what_a_filter_lets_pass_is_found_behind_what_it_keeps_back() {
    let (_directory, _node, channel) = alone();
    let sink = channel.sink(SinkOptions::default()).unwrap();
    let source = channel.source().unwrap();
    sink.set_in_filter(Some(Box::new(|event| event.payload() == b"yes")));
    for _ in 0..1000 {
        submit(&source, "no").unwrap();
    }
    submit(&source, "yes").unwrap();
    assert!(sink.poll().unwrap().is_some());
    assert_eq!(sink.counters().filtered, 1000);
}

#[test]
fn an_out_filter_that_submits_to_its_own_source_is_told_so() {
    let (_directory, _node, channel) = alone();
    let source = channel.source().unwrap();
    let sink = channel.sink(SinkOptions::default()).unwrap();
    let (own, (said, heard)) = (source.clone(), std::sync::mpsc::channel());
    source.set_out_filter(Some(Box::new(move |_, _| {
        let error = submit(&own, "again").unwrap_err();
        said.send(error.to_string()).unwrap();
    })));
    submit(&source, "once").unwrap();
    let error = heard.recv_timeout(PATIENCE).unwrap();
    assert!(error.contains("OUT-filter"), "{error}");
    // The filter holds a source, and is held by it.
    source.set_out_filter(None);
    let event = sink.receive_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(event.get().payload(), b"once");
}
