//! Many channels of a node, and many members of a channel, each a source and a sink.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Instant;

use common::{Got, LONG, Peer, config, registry, submit, until};
use xbee_kecho::{ChannelOptions, Node, SinkOptions};

#[test]
fn process() {
    common::process();
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn thousand_channels(ways: &str) {
    const CHANNELS: usize = 1000;
    let registry = registry();
    let start = || Node::start(config(&registry.addresses()[0], ways)).unwrap();
    let [a, b] = [start(), start()];
    let options = ChannelOptions {
        log_bytes: Some(64 << 10),
        ..ChannelOptions::default()
    };
    let before = descriptors();
    let mut begun = Instant::now();
    let mut ends = Vec::new();
    let names: Vec<String> = (0..CHANNELS).map(|n| format!("channel-{n:04}")).collect();
    for (n, name) in names.iter().enumerate() {
        let here = a.create(name, options.clone()).unwrap();
        let source = here.source().unwrap();
        let there = b.open(name).unwrap();
        let sink = there.sink(SinkOptions::default()).unwrap();
        ends.push((here, source, there, sink));
        if (n + 1) % (CHANNELS / 4) == 0 {
            println!(
                "{ways}: {} channels: the last {} in {:?}",
                n + 1,
                CHANNELS / 4,
                begun.elapsed()
            );
            begun = Instant::now();
        }
    }
    let used = descriptors() - before;
    println!(
        "{ways}: {} descriptors a channel, of both nodes",
        used as f64 / CHANNELS as f64
    );
    // Otherwise a thousand do not fit where 16,384 descriptors are allowed.
    assert!(used < 10 * CHANNELS, "{used}");
    assert_eq!(b.channels().unwrap(), names);
    for (n, (_, source, _, _)) in ends.iter().enumerate() {
        submit(source, n as u64, 0);
    }
    for (n, (_, _, _, sink)) in ends.iter().enumerate() {
        let event = sink.receive_timeout(LONG).unwrap().expect("no event came");
        assert_eq!(event.get().payload()[..8], (n as u64).to_le_bytes());
    }
    begun = Instant::now();
    drop(ends);
    until("the registry has forgotten them", || {
        b.channels().unwrap().is_empty()
    });
    println!("{ways}: all left in {:?}", begun.elapsed());
    until("the descriptors are closed", || descriptors() <= before + 8);
}

#[test]
fn a_thousand_channels_through_shared_memory() {
    thousand_channels("memory");
}

#[test]
fn a_thousand_channels_over_tcp() {
    thousand_channels("tcp");
}

#[test]
fn sixty_four_members_and_more_get_every_event_of_each() {
    const EVENTS: u64 = 50;
    let registry = registry();
    let before = descriptors();
    let mut begun = Instant::now();
    let here = (0..64).map(|_| Peer::here(&registry, "all"));
    let others = (0..8).map(|_| Peer::process(&registry, "all"));
    let mut all: Vec<Peer> = here.chain(others).collect();
    println!("{} nodes started in {:?}", all.len(), begun.elapsed());
    begun = Instant::now();
    for (tag, peer) in all.iter_mut().enumerate() {
        peer.ask(["create x 65536", "open x"][usize::from(tag > 0)]);
        peer.ask(&format!("source {tag}"));
        peer.ask("sink");
        if (tag + 1) % 8 == 0 {
            println!("{} members: the last 8 in {:?}", tag + 1, begun.elapsed());
            begun = Instant::now();
        }
    }
    println!("{} descriptors here", descriptors() - before);
    println!(
        "{} descriptors in another process",
        all[70].number("descriptors")
    );
    for (tag, peer) in all.iter_mut().enumerate() {
        assert_eq!(peer.number(&format!("sinks {tag}")), 72);
        peer.ask(&format!("burst {tag} {EVENTS}"));
    }
    let expected: Got = (0..72).map(|tag| (tag, (0, EVENTS))).collect();
    for (n, peer) in all.iter_mut().enumerate() {
        peer.expect(&format!("member {n}"), &expected);
    }
    println!("{} events in {:?}", EVENTS * 72 * 72, begun.elapsed());
    begun = Instant::now();
    all.into_iter().for_each(Peer::quit);
    println!("all left in {:?}", begun.elapsed());
}
