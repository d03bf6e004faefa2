//! A network that is cut and heals, between namespaces: both sides go on for themselves, and then they are one again.
#![allow(clippy::unwrap_used)]

mod common;

use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use common::{Got, Peer, Process, until};

#[test]
fn process() {
    common::process();
}

/// Three namespaces: `a` and `b`, and `r` between them, which forwards and where the registry is.
struct Net {
    name: String,
}

/// How a side is cut off.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// The link has no carrier.
    Down,
    /// Packets get lost.
    Silent,
}

/// An address of the link layer that nobody has.
const NOBODY: &str = "02:00:00:00:00:99";

impl Net {
    /// `None`, with a printed reason, where namespaces cannot be made.
    fn new(test: &str) -> Option<Net> {
        let net = Net {
            name: format!("kecho-{test}-{}", std::process::id()),
        };
        for side in ["r", "a", "b"] {
            if !net.tries(&format!("netns add {}", net.namespace(side))) {
                println!(
                    "skipped: network namespaces cannot be made here: that takes root and ip(8)"
                );
                return None;
            }
        }
        for side in ["a", "b"] {
            let there = net.namespace(side);
            let link = format!(
                "-n {} link add to-{side} type veth peer name eth netns {there}",
                net.namespace("r")
            );
            if !net.tries(&link) {
                println!("skipped: there are no virtual Ethernet pairs here");
                return None;
            }
            net.ip("r", &format!("link set to-{side} up"));
            net.address(side);
            net.ip(side, "link set lo up");
            net.ip(side, "link set eth up");
            net.ip(
                side,
                &format!("addr add fd00:6b:{side}::2/64 dev eth nodad"),
            );
            net.ip(side, &format!("-6 route add default via fd00:6b:{side}::1"));
        }
        net.ip("r", "link set lo up");
        let forward = "echo 1 >/proc/sys/net/ipv6/conf/all/forwarding";
        let forward = format!("netns exec {} sh -c", net.namespace("r"))
            .split(' ')
            .map(str::to_owned)
            .chain([forward.to_owned()])
            .collect::<Vec<_>>();
        assert!(Command::new("ip").args(forward).status().unwrap().success());
        Some(net)
    }

    fn namespace(&self, side: &str) -> String {
        format!("{}-{side}", self.name)
    }

    fn tries(&self, arguments: &str) -> bool {
        let mut command = Command::new("ip");
        let command = command.args(arguments.split(' ')).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }

    fn ip(&self, side: &str, arguments: &str) {
        let arguments = format!("-n {} {arguments}", self.namespace(side));
        assert!(self.tries(&arguments), "ip {arguments}");
    }

    fn address(&self, side: &str) {
        self.ip(
            "r",
            &format!("addr replace fd00:6b:{side}::1/64 dev to-{side} nodad"),
        );
    }

    /// Cuts `b` off from all others.
    fn cut(&self, cut: Cut) {
        match cut {
            Cut::Down => self.ip("r", "link set to-b down"),
            Cut::Silent => {
                for (side, to, device) in [("r", "2", "to-b"), ("b", "1", "eth")] {
                    let neighbour = format!("fd00:6b:b::{to} lladdr {NOBODY} dev {device}");
                    self.ip(side, &format!("neigh replace {neighbour} nud permanent"));
                }
            }
        }
    }

    fn heal(&self, cut: Cut) {
        match cut {
            Cut::Down => {
                self.ip("r", "link set to-b up");
                self.address("b");
            }
            Cut::Silent => {
                self.ip("r", "neigh del fd00:6b:b::2 dev to-b");
                self.ip("b", "neigh del fd00:6b:b::1 dev eth");
            }
        }
    }

    /// Cuts `a` and `b` off from each other, or not any more; both reach `r` all the time.
    fn between(&self, cut: bool) {
        let change = if cut { "add" } else { "del" };
        for (from, to) in [("a", "b"), ("b", "a")] {
            let packets = format!("from fd00:6b:{from}::2 to fd00:6b:{to}::2 blackhole");
            self.ip("r", &format!("-6 rule {change} {packets}"));
        }
    }

    fn process(&self, side: &str, told: &str) -> Process {
        let namespace = self.namespace(side);
        Process::start(&["ip", "netns", "exec", &namespace], told)
    }

    fn registry(&self) -> Process {
        self.process("r", "registry tcp:[::]:7400")
    }

    /// Two nodes on each side, each with a source and a sink; the first on side `a` is the contact.
    fn members(&self, heartbeat: u64, dead: u64) -> Vec<Peer> {
        let mut members: Vec<Peer> = ["a", "a", "b", "b"]
            .iter()
            .map(|side| {
                let told = format!("{heartbeat} {dead} tcp:[fd00:6b:a::1]:7400 tcp");
                Peer::Process(self.process(side, &told))
            })
            .collect();
        for (tag, member) in members.iter_mut().enumerate() {
            member.ask(["create x 1048576", "open x"][usize::from(tag > 0)]);
            member.ask(&format!("source {tag}"));
            member.ask("sink");
        }
        members
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for side in ["r", "a", "b"] {
            // It may not be there.
            self.tries(&format!("netns del {}", self.namespace(side)));
        }
    }
}

fn see(members: &mut [Peer], count: u64) {
    for (tag, member) in members.iter_mut().enumerate() {
        let command = format!("sinks {tag}");
        until("all see whom they should", || {
            member.number(&command) == count
        });
    }
}

fn burst(members: &mut [Peer], count: u64) {
    for (tag, member) in members.iter_mut().enumerate() {
        member.ask(&format!("burst {tag} {count}"));
    }
}

/// All have so many events of these.
fn expect(members: &mut [Peer], from: std::ops::Range<u64>, count: u64) {
    let expected: Got = from.map(|tag| (tag, (0, count))).collect();
    for (n, member) in members.iter_mut().enumerate() {
        member.expect(&format!("member {n}"), &expected);
    }
}

fn two_sides_become_one(name: &str, cut: Cut) {
    let Some(net) = Net::new(name) else { return };
    let registry = net.registry();
    let mut members = net.members(100, 500);
    see(&mut members, 4);
    burst(&mut members, 100);
    expect(&mut members, 0..4, 100);
    net.cut(cut);
    see(&mut members, 2);
    burst(&mut members, 50);
    expect(&mut members[..2], 0..2, 150);
    expect(&mut members[2..], 2..4, 150);
    // A new source takes a contact, which `b` has for itself then.
    for (tag, side) in [(11, 0..2), (13, 2..4)] {
        let member = &mut members[side.end - 1];
        member.ask(&format!("source {tag}"));
        member.ask(&format!("burst {tag} 20"));
        expect(&mut members[side], tag..tag + 1, 20);
    }
    net.heal(cut);
    see(&mut members, 4);
    burst(&mut members, 10);
    // What the other side submitted meanwhile comes too, as its logs still have it: all is there, and nothing twice.
    expect(&mut members, 0..4, 160);
    for (tag, side) in [(11, 0..2), (13, 2..4)] {
        let member = &mut members[side.end - 1];
        let command = format!("sinks {tag}");
        until("all have the new source", || member.number(&command) == 4);
        member.ask(&format!("burst {tag} 5"));
        for (n, member) in members.iter_mut().enumerate() {
            // Who was not there when it came has it from now on.
            let first = if side.contains(&n) { 0 } else { 20 };
            member.expect(&format!("member {n}"), &Got::from([(tag, (first, 25))]));
        }
    }
    drop((members, registry));
}

#[test]
fn a_link_goes_down_and_comes_back() {
    two_sides_become_one("down", Cut::Down);
}

#[test]
fn packets_get_lost_for_longer_than_a_node_is_waited_for() {
    two_sides_become_one("silent", Cut::Silent);
}

#[test]
fn packets_that_get_lost_for_a_while_lose_no_event() {
    let Some(net) = Net::new("short") else { return };
    let registry = net.registry();
    let mut members = net.members(500, 6000);
    see(&mut members, 4);
    for (tag, member) in members.iter_mut().enumerate() {
        member.ask(&format!("endless {tag}"));
    }
    for _ in 0..3 {
        net.cut(Cut::Silent);
        sleep(Duration::from_secs(1));
        net.heal(Cut::Silent);
        sleep(Duration::from_secs(1));
    }
    let mut expected = Got::new();
    for (tag, member) in members.iter_mut().enumerate() {
        member.ask(&format!("stop {tag}"));
        expected.insert(tag as u64, (0, member.number(&format!("total {tag}"))));
    }
    println!("{expected:?}");
    for (n, member) in members.iter_mut().enumerate() {
        member.expect(&format!("member {n}"), &expected);
    }
    see(&mut members, 4);
    drop((members, registry));
}

#[test]
fn a_source_goes_on_that_is_cut_off_from_a_sink_while_both_reach_the_contact() {
    let Some(net) = Net::new("between") else {
        return;
    };
    let registry = net.registry();
    let told = "100 500 tcp:[fd00:6b:a::1]:7400 tcp";
    let mut members: Vec<Peer> = ["r", "a", "b"]
        .iter()
        .map(|side| Peer::Process(net.process(side, told)))
        .collect();
    for (n, member) in members.iter_mut().enumerate() {
        member.ask(["create x 1048576", "open x"][usize::from(n > 0)]);
        member.ask(["sink", "source 1", "sink"][n]);
    }
    let [contact, source, sink] = &mut members[..] else {
        panic!("three members")
    };
    let attached = |source: &mut Peer, count: u64| {
        until("so many sinks are attached", || {
            source.number("sinks 1") == count
        });
    };
    attached(source, 2);
    // What is in the log when it comes back is not lost.
    net.between(true);
    source.ask("burst 1 500");
    sleep(Duration::from_secs(2));
    net.between(false);
    let all = |count| Got::from([(1, (0, count))]);
    sink.expect("the sink", &all(500));
    attached(source, 2);
    // More than the log holds: the source waits, and then goes on.
    net.between(true);
    source.ask("burst 1 60000");
    contact.expect("the contact", &all(60_500));
    attached(source, 1);
    net.between(false);
    attached(source, 2);
    source.ask("burst 1 10");
    contact.expect("the contact", &all(60_510));
    until("the sink has what came last", || {
        sink.report().got.get(&1) == Some(&(0, 60_510))
    });
    until("the sink says what it has lost", || {
        sink.report().dropped > 0
    });
    let common::Book { wrong, dropped, .. } = sink.report();
    let numbers: Vec<u64> = wrong[0].split(' ').filter_map(|n| n.parse().ok()).collect();
    assert_eq!(
        (wrong.len(), numbers[0] - numbers[1]),
        (1, dropped),
        "{wrong:?}"
    );
    drop((members, registry));
}
