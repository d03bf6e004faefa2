//! Sources, sinks, nodes and processes come and go at random while events flow: those that stay get all, once, in order.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Got, Peer, Random, registry, until};
use xbee_kecho::Registry;

#[test]
fn process() {
    common::process();
}

/// How many come and go, in each of two threads.
const VISITS: u64 = 20;
/// The most events of one that comes and goes, at once.
const BURST: u64 = 400;

/// Where members may be, and over which ways they are reached.
struct Storm<'a> {
    registry: &'a Registry,
    places: &'a [(bool, &'a str)],
    /// Tags of sources.
    tags: AtomicU64,
    /// Visits so far.
    visits: AtomicU64,
    /// How many events each source has submitted that did not die.
    totals: Mutex<BTreeMap<u64, u64>>,
}

impl Storm<'_> {
    fn peer(&self, random: &mut Random) -> Peer {
        let (process, ways) = self.places[random.below(self.places.len() as u64) as usize];
        let mut peer = match process {
            true => Peer::process(self.registry, ways),
            false => Peer::here(self.registry, ways),
        };
        peer.ask("open storm");
        peer
    }

    fn source(&self, peer: &mut Peer) -> u64 {
        let tag = self.tags.fetch_add(1, Ordering::Relaxed);
        peer.ask(&format!("source {tag}"));
        tag
    }

    fn burst(&self, peer: &mut Peer, tag: u64, random: &mut Random) {
        let count = random.below(BURST);
        peer.ask(&format!("burst {tag} {count}"));
        *self.totals.lock().unwrap().entry(tag).or_default() += count;
    }

    /// Somebody comes, does something, and goes.
    fn visit(&self, random: &mut Random) {
        let mut peer = self.peer(random);
        let sinks_first = random.chance();
        if sinks_first {
            peer.ask("sink");
        }
        let tag = random.chance().then(|| self.source(&mut peer));
        if !sinks_first && (tag.is_none() || random.chance()) {
            peer.ask("sink");
        }
        if let Some(tag) = tag {
            for _ in 0..=random.below(2) {
                self.burst(&mut peer, tag, random);
            }
        }
        match random.below(4) {
            0 => drop(tag.map(|tag| peer.ask(&format!("unsource {tag}")))),
            1 => drop(peer.ask("leave")),
            2 => {
                if let Peer::Process(process) = peer {
                    if let Some(tag) = tag {
                        self.totals.lock().unwrap().remove(&tag);
                        process.tell(&format!("burst {tag} {BURST}"));
                    }
                    return process.kill();
                }
            }
            _ => {}
        }
        peer.quit();
    }

    /// Comes and goes, beside a node that stays and whose sources and sinks come and go.
    fn rage(&self, mut random: Random) {
        let mut stays = self.peer(&mut random);
        let mut is_sink = false;
        for _ in 0..VISITS {
            if random.chance() {
                self.visit(&mut random);
            } else if random.below(3) == 0 {
                stays.ask(["sink", "unsink"][usize::from(is_sink)]);
                is_sink = !is_sink;
            } else {
                let tag = self.source(&mut stays);
                self.burst(&mut stays, tag, &mut random);
                stays.ask(&format!("unsource {tag}"));
            }
            self.visits.fetch_add(1, Ordering::Relaxed);
        }
        // Killed, it could not send what it has just submitted.
        stays.quit();
    }
}

fn storm(places: &[(bool, &str)], log_bytes: usize) {
    let mut random = Random::seeded();
    let registry = registry();
    let storm = Storm {
        registry: &registry,
        places,
        tags: AtomicU64::new(0),
        visits: AtomicU64::new(0),
        totals: Mutex::default(),
    };
    let (process, ways) = places[places.len() - 1];
    let start = || match process {
        true => Peer::process(&registry, ways),
        false => Peer::here(&registry, ways),
    };
    let mut contact = start();
    contact.ask(&format!("create storm {log_bytes}"));
    let mut heir = start();
    heir.ask("open storm");
    let mut stay: Vec<Peer> = (0..4).map(|_| storm.peer(&mut random)).collect();
    stay.iter_mut().for_each(|peer| drop(peer.ask("sink")));
    let mut publish: Vec<Peer> = (0..3).map(|_| storm.peer(&mut random)).collect();
    let endless: Vec<u64> = publish.iter_mut().map(|p| storm.source(p)).collect();
    for (peer, tag) in publish.iter_mut().zip(&endless) {
        peer.ask(&format!("endless {tag}"));
    }
    let mut late = BTreeMap::new();
    std::thread::scope(|scope| {
        let rages = [0; 2].map(|_| {
            let random = Random::new(random.below(u64::MAX));
            scope.spawn(|| storm.rage(random))
        });
        let ended = || rages.iter().all(|rage| rage.is_finished());
        let reached = |visits| storm.visits.load(Ordering::Relaxed) >= visits || ended();
        for (visits, dies) in [(VISITS / 2, contact), (VISITS, heir)] {
            until("the storm goes on", || reached(visits));
            match dies {
                Peer::Process(process) => process.kill(),
                here @ Peer::Here(_) => here.quit(),
            }
        }
        // One that comes in the middle has all from then on.
        let mut peer = storm.peer(&mut random);
        peer.ask("sink");
        for (publisher, tag) in publish.iter_mut().zip(&endless) {
            late.insert(*tag, publisher.number(&format!("total {tag}")));
        }
        stay.push(peer);
    });
    for (peer, tag) in publish.iter_mut().zip(&endless) {
        peer.ask(&format!("stop {tag}"));
        let total = peer.number(&format!("total {tag}"));
        storm.totals.lock().unwrap().insert(*tag, total);
    }
    let totals = storm.totals.lock().unwrap().clone();
    println!(
        "{} events of {} sources",
        totals.values().sum::<u64>(),
        totals.len()
    );
    let mut newest = stay.pop().unwrap();
    let all: Got = totals
        .iter()
        .filter(|(_, total)| **total > 0)
        .map(|(tag, total)| (*tag, (0, *total)))
        .collect();
    for (n, peer) in stay.iter_mut().enumerate() {
        peer.expect(&format!("sink {n}"), &all);
    }
    until("the newest sink has the last event", || {
        let book = newest.report();
        assert_eq!(book.wrong, Vec::<String>::new());
        endless.iter().all(|tag| {
            let (first, next) = book.got.get(tag).copied().unwrap_or((0, 0));
            assert!(
                first <= late[tag],
                "{first} of {tag}: it was there at {}",
                late[tag]
            );
            next == totals[tag]
        })
    });
}

#[test]
fn a_storm_within_a_process() {
    storm(&[(false, "process")], 1 << 20);
}

#[test]
fn a_storm_through_shared_memory() {
    storm(&[(false, "memory"), (true, "memory")], 1 << 20);
}

#[test]
fn a_storm_over_tcp() {
    storm(&[(false, "tcp"), (true, "tcp")], 1 << 20);
}

#[test]
fn a_storm_over_all_ways_with_small_logs() {
    let places = [(false, "all"), (true, "all"), (false, "tcp"), (true, "tcp")];
    storm(&places, 64 << 10);
}
