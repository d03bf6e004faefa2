//! Members in processes of their own that come, publish, go, are killed and stand still, and a registry that is killed,
//! all at random: those that stay get what others submit, in order, each once. `KECHO_CHAOS_SECONDS` for longer than usual.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::process::Command;
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use common::{LONG, Peer, Process, Random};

#[test]
fn process() {
    common::process();
}

/// How long, in seconds, if nothing else is said.
const SECONDS: u64 = 6;
/// The most members at a time.
const MOST: usize = 5;
/// The longest that a member stands still, in milliseconds: less than it takes until the others miss it.
const STILL: u64 = 3000;

struct Member {
    id: u64,
    peer: Peer,
    /// Of its source.
    tag: Option<u64>,
    /// Has it go on.
    still: Option<JoinHandle<()>>,
}

/// A source that was not killed.
#[derive(Default)]
struct Published {
    /// How many events it has submitted, if it has left.
    total: Option<u64>,
    /// By member, what comes to it at the latest as the first.
    bounds: BTreeMap<u64, u64>,
}

struct Chaos {
    random: Random,
    address: String,
    /// A way that all have.
    way: &'static str,
    registry: Option<Process>,
    members: Vec<Member>,
    next: u64,
    published: BTreeMap<u64, Published>,
}

impl Chaos {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn registry(&mut self) {
        if let Some(registry) = self.registry.take() {
            registry.kill();
        }
        let told = format!("registry {}", self.address);
        self.registry = Some(Process::start(&[], &told));
    }

    fn comes(&mut self) {
        let ways = [self.way, "all"][self.random.below(2) as usize];
        let told = format!("500 6000 {} {ways}", self.address);
        let mut peer = Peer::Process(Process::start(&[], &told));
        peer.ask("enter chaos");
        peer.ask("sink");
        let id = self.number();
        self.members.push(Member {
            id,
            peer,
            tag: None,
            still: None,
        });
    }

    fn any(&mut self) -> usize {
        self.random.below(self.members.len() as u64) as usize
    }

    fn publishes(&mut self, at: usize) {
        let tag = self.number();
        let member = &mut self.members[at];
        member.peer.ask(&format!("source {tag}"));
        member.peer.ask(&format!("endless {tag}"));
        member.tag = Some(tag);
        self.published.insert(tag, Published::default());
    }

    /// Its source leaves.
    fn ends(&mut self, at: usize) {
        let member = &mut self.members[at];
        if let Some(tag) = member.tag.take() {
            member.peer.ask(&format!("stop {tag}"));
            let total = member.peer.number(&format!("total {tag}"));
            member.peer.ask(&format!("unsource {tag}"));
            self.published.get_mut(&tag).unwrap().total = Some(total);
        }
    }

    /// All go on that stand still.
    fn go_on(&mut self) {
        for still in self.members.iter_mut().filter_map(|m| m.still.take()) {
            still.join().unwrap();
        }
    }

    fn stands_still(&mut self, at: usize) {
        let time = Duration::from_millis(self.random.below(STILL));
        let member = &mut self.members[at];
        let Peer::Process(process) = &member.peer else {
            return;
        };
        if let Some(still) = member.still.take() {
            still.join().unwrap();
        }
        let id = process.id().to_string();
        let signal = |name: &str, id: &str| {
            // It may have been killed meanwhile.
            Command::new("kill").args([name, id]).output().unwrap()
        };
        assert!(signal("-STOP", &id).status.success());
        member.still = Some(spawn(move || {
            sleep(time);
            signal("-CONT", &id);
        }));
    }

    fn goes(&mut self, at: usize) {
        // What it has submitted is sent for some seconds only to those who do not read.
        self.go_on();
        self.ends(at);
        self.members.remove(at).peer.quit();
    }

    fn is_killed(&mut self, at: usize) {
        let Member {
            peer, tag, still, ..
        } = self.members.remove(at);
        if let Peer::Process(process) = peer {
            process.kill();
        }
        if let Some(still) = still {
            still.join().unwrap();
        }
        if let Some(tag) = tag {
            self.published.remove(&tag);
        }
    }

    /// Waits until each source has all sinks, and notes what each of them has from then on.
    fn settle(&mut self) {
        let all = self.members.len() as u64;
        let ids: Vec<u64> = self.members.iter().map(|member| member.id).collect();
        let mut wrong = None;
        for member in &mut self.members {
            let Some(tag) = member.tag else { continue };
            let command = format!("sinks {tag}");
            let deadline = Instant::now() + LONG;
            let mut there = member.peer.number(&command);
            while there != all && Instant::now() < deadline {
                sleep(Duration::from_millis(20));
                there = member.peer.number(&command);
            }
            if there != all {
                wrong = Some(format!("member {}: {there} of {all} sinks", member.id));
                break;
            }
            let total = member.peer.number(&format!("total {tag}"));
            let bounds = &mut self.published.get_mut(&tag).unwrap().bounds;
            for id in &ids {
                bounds.entry(*id).or_insert(total);
            }
        }
        if let Some(wrong) = wrong {
            for member in &mut self.members {
                println!(
                    "member {}: {:#?}",
                    member.id,
                    member.peer.ask("status chaos")
                );
            }
            panic!("{wrong}");
        }
    }

    fn something_happens(&mut self) {
        let at = self.any();
        let many = self.members.len() > 2;
        match self.random.below(12) {
            0 | 1 if self.members.len() < MOST => self.comes(),
            2 | 3 if self.members[at].tag.is_none() => self.publishes(at),
            4 => {
                let count = self.random.below(3000);
                let member = &mut self.members[at];
                if let Some(tag) = member.tag {
                    for command in ["stop", "burst", "endless"] {
                        let count = if command == "burst" { count } else { 0 };
                        member.peer.ask(&format!("{command} {tag} {count}"));
                    }
                }
            }
            5 => self.ends(at),
            6 if many => self.goes(at),
            7 if many => self.is_killed(at),
            8 => self.registry(),
            9 | 10 => self.stands_still(at),
            _ => self.settle(),
        }
    }

    /// Whether each member has all of each source that it was attached to.
    fn check(&mut self) {
        self.go_on();
        self.settle();
        for at in 0..self.members.len() {
            self.ends(at);
        }
        let deadline = Instant::now() + LONG;
        for member in &mut self.members {
            loop {
                let book = member.peer.report();
                assert!(book.wrong.is_empty(), "{}: {:?}", member.id, book.wrong);
                assert_eq!(book.dropped, 0, "member {}", member.id);
                let missing = self.published.iter().find(|(tag, published)| {
                    let Some(bound) = published.bounds.get(&member.id) else {
                        return false;
                    };
                    let got = book.got.get(tag);
                    let all = |(first, next): &(u64, u64)| {
                        first <= bound && Some(*next) == published.total
                    };
                    // Of one that has submitted nothing since, nothing comes.
                    published.total != Some(*bound) && !got.is_some_and(all)
                });
                let Some((tag, published)) = missing else {
                    break;
                };
                let id = member.id;
                assert!(
                    Instant::now() < deadline,
                    "member {id}, source {tag}: {:?}, of {:?} from {:?} on",
                    book.got.get(tag),
                    published.total,
                    published.bounds.get(&id)
                );
                sleep(Duration::from_millis(50));
            }
        }
    }
}

#[test]
fn those_that_stay_get_all_whatever_happens_to_the_others() {
    let mut random = Random::seeded();
    let way = ["tcp", "memory"][random.below(2) as usize];
    let seconds = std::env::var("KECHO_CHAOS_SECONDS");
    let seconds = seconds.map_or(SECONDS, |seconds| seconds.parse().unwrap());
    let free = std::net::TcpListener::bind("[::1]:0").unwrap();
    let address = format!("tcp:{}", free.local_addr().unwrap());
    drop(free);
    let mut chaos = Chaos {
        random,
        address,
        way,
        registry: None,
        members: Vec::new(),
        next: 0,
        published: BTreeMap::new(),
    };
    chaos.registry();
    chaos.comes();
    chaos.comes();
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut count = 0;
    while Instant::now() < end {
        chaos.something_happens();
        count += 1;
    }
    println!("{count} things have happened");
    chaos.check();
}
