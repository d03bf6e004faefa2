//! Members that leave at the same moment: whoever is the last, the name is free then.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Barrier;
use std::time::Duration;

use common::{Random, config, registry};
use xbee_kecho::{Channel, ChannelOptions, Node, Registry, SinkOptions};

/// How often everybody leaves.
const ROUNDS: u64 = 40;

fn node(registry: &Registry, ways: &str) -> Node {
    Node::start(config(&registry.addresses()[0], ways)).unwrap()
}

/// The moments at which so many leave, in microseconds after each other at most.
fn moments(random: &mut Random, count: usize) -> Vec<Duration> {
    let spread = [1, 300, 3000][random.below(3) as usize];
    let moment = |_| Duration::from_micros(random.below(spread));
    (0..count).map(moment).collect()
}

/// All do this at their moments, each in a thread.
fn at_once<T: Send>(all: Vec<T>, moments: &[Duration], act: impl Fn(T) + Sync) {
    let start = Barrier::new(all.len());
    std::thread::scope(|scope| {
        for (one, moment) in all.into_iter().zip(moments) {
            let (start, act) = (&start, &act);
            scope.spawn(move || {
                start.wait();
                std::thread::sleep(*moment);
                act(one);
            });
        }
    });
}

/// Members of a new channel, the first of which has made it, with something to do in it.
fn members(nodes: &[Node]) -> Vec<Channel> {
    let first = nodes[0].create("x", ChannelOptions::default());
    let first = first.unwrap_or_else(|error| panic!("the name is not free: {error}"));
    let rest = nodes[1..].iter().map(|node| node.open("x").unwrap());
    std::iter::once(first).chain(rest).collect()
}

/// Nodes that are shut down.
fn nodes_end(ways: &str, most: u64) {
    let mut random = Random::seeded();
    let registry = registry();
    for _ in 0..ROUNDS {
        let count = 2 + random.below(most - 1) as usize;
        let nodes: Vec<Node> = (0..count).map(|_| node(&registry, ways)).collect();
        let ports: Vec<_> = members(&nodes)
            .into_iter()
            .map(|channel| {
                let source = random.chance().then(|| channel.source().unwrap());
                let sink = channel.sink(SinkOptions::default());
                (source, random.chance().then_some(sink.unwrap()), channel)
            })
            .collect();
        let moments = moments(&mut random, count);
        at_once(
            nodes.into_iter().zip(ports).collect(),
            &moments,
            |(node, ports)| {
                drop(ports);
                node.shutdown();
            },
        );
    }
}

#[test]
fn two_nodes_that_end_leave_the_name_free() {
    nodes_end("memory", 2);
}

#[test]
fn some_nodes_that_end_leave_the_name_free() {
    nodes_end("tcp", 6);
}

#[test]
fn nodes_that_leave_and_stay_can_make_the_channel_anew() {
    let mut random = Random::seeded();
    let registry = registry();
    let nodes: Vec<Node> = (0..5).map(|_| node(&registry, "tcp")).collect();
    for _ in 0..ROUNDS {
        let count = 2 + random.below(4) as usize;
        let channels = members(&nodes[..count]);
        let moments = moments(&mut random, count);
        at_once(channels, &moments, Channel::leave);
    }
}

#[test]
fn many_who_leave_at_once_leave_the_name_free() {
    let registry = registry();
    let nodes: Vec<Node> = (0..48).map(|_| node(&registry, "tcp")).collect();
    for _ in 0..2 {
        let channels = members(&nodes);
        at_once(channels, &[Duration::ZERO; 48], Channel::leave);
    }
    drop(members(&nodes[..1]));
    at_once(nodes, &[Duration::ZERO; 48], Node::shutdown);
    drop(members(&[node(&registry, "tcp")]));
}

#[test]
fn a_channel_that_there_is_cannot_be_made_anew() {
    let registry = registry();
    let nodes: Vec<Node> = (0..2).map(|_| node(&registry, "tcp")).collect();
    let _channel = nodes[0].create("x", ChannelOptions::default()).unwrap();
    for node in &nodes {
        let error = node.create("x", ChannelOptions::default()).unwrap_err();
        assert_eq!(error.code(), "channel-exists");
    }
}
