//! The rules of `xen-configs/dom0/xenbee.nft`, tried by trying: namespaces stand for guests.
#![allow(clippy::unwrap_used)]

use std::net::Ipv6Addr;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use xbee_tests::{root, run};

/// dom0 and two guests, each a network namespace of its own; removed at the end.
struct Bridge {
    mark: String,
}

static BRIDGES: AtomicU32 = AtomicU32::new(0);

impl Bridge {
    fn new() -> Bridge {
        let bridge = Bridge {
            mark: format!(
                "{}-{}",
                std::process::id(),
                BRIDGES.fetch_add(1, Ordering::Relaxed)
            ),
        };
        let dom0 = bridge.name(0);
        ip(&format!("netns add {dom0}"));
        for guest in 1..=2 {
            let name = bridge.name(guest);
            ip(&format!("netns add {name}"));
            ip(&format!(
                "-n {dom0} link add vif{guest}.0 type veth peer name eth0 \
                 address 02:be:00:00:00:0{guest} netns {name}"
            ));
        }
        ip(&format!("-n {dom0} link add xenbr0 type bridge"));
        ip(&format!("-n {dom0} link set xenbr0 up"));
        ip(&format!(
            "-n {dom0} -6 address add fd00:1::1/64 dev xenbr0 nodad"
        ));
        // A dom0 that routes: it must not carry from guest to guest what the bridge refuses.
        bridge.within(0, "sysctl -qw net.ipv6.conf.all.forwarding=1");
        for guest in 1..=2 {
            let name = bridge.name(guest);
            ip(&format!("-n {dom0} link set vif{guest}.0 master xenbr0 up"));
            ip(&format!("-n {name} link set eth0 up"));
            ip(&format!(
                "-n {name} -6 address add fd00:1::1{guest}/64 dev eth0 nodad"
            ));
        }
        bridge
    }

    fn name(&self, of: u32) -> String {
        format!("xbee{}-{of}", self.mark)
    }

    /// Runs a command in a namespace; true where it succeeds.
    fn tries(&self, of: u32, command: &str) -> bool {
        let mut ip = Command::new("ip");
        ip.args(["netns", "exec", &self.name(of)]);
        run(ip.args(command.split(' '))).code == 0
    }

    /// What a command in a namespace prints.
    #[track_caller]
    fn prints(&self, of: u32, command: &str) -> String {
        let mut ip = Command::new("ip");
        ip.args(["netns", "exec", &self.name(of)]);
        run(ip.args(command.split(' '))).ok().stdout
    }

    /// How often this one has been asked for an echo.
    #[track_caller]
    fn echoes(&self, of: u32) -> u32 {
        let counters = self.prints(of, "cat /proc/net/snmp6");
        let line = counters
            .lines()
            .find(|line| line.starts_with("Icmp6InEchos "));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
            .unwrap()
    }

    #[track_caller]
    fn within(&self, of: u32, command: &str) {
        assert!(self.tries(of, command), "{command}");
    }

    fn reaches(&self, from: u32, address: &str) -> bool {
        // Two tries: the first may go to finding the other's address.
        self.tries(from, &format!("ping -6 -q -c 2 -i 0.2 -W 1 {address}"))
    }

    /// A guest's place, as xbed tells it to the rules: its addresses are those that it has.
    fn pin(&self, guest: u32) {
        let show = ["-n", &self.name(guest), "-o", "link", "show", "eth0"];
        let link = run(Command::new("ip").args(show)).line();
        let mac = link.split(" link/ether ").nth(1).unwrap();
        let mac = mac.split(' ').next().unwrap();
        let bytes: Vec<u8> = mac
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).unwrap())
            .collect();
        let [a, b, c, d, e, f] = bytes[..] else {
            panic!("{mac}")
        };
        let local = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
        let port = format!("vif{guest}.0");
        self.add("macs", &format!("{port} . {mac}"));
        for address in [
            format!("fd00:1::1{guest}").parse().unwrap(),
            Ipv6Addr::from_bits(0xfe80 << 112 | u128::from(local)),
        ] {
            self.add("addresses", &format!("{port} . {address}"));
            self.add("targets", &format!("{port} . {:#x}", address.to_bits()));
        }
    }

    #[track_caller]
    fn add(&self, set: &str, element: &str) {
        let element = format!("nft add element bridge xenbee {set} {{ {element} }}");
        self.within(0, &element);
    }

    fn mac(&self, of: u32, mac: &str) {
        ip(&format!("-n {} link set eth0 address {mac}", self.name(of)));
    }

    /// Forgets what this one has learnt of others' addresses.
    fn forget(&self, of: u32, device: &str) {
        ip(&format!("-n {} neigh flush dev {device}", self.name(of)));
    }

    /// Links and addresses take their time.
    fn comes_to_reach(&self, from: u32, address: &str) -> bool {
        (0..50).any(|_| self.reaches(from, address))
    }

    fn wait_until_up(&self) {
        assert!(
            self.comes_to_reach(1, "fd00:1::12"),
            "without rules the guests reach each other"
        );
    }

    /// Through dom0's router rather than over the bridge.
    fn route_through_dom0(&self, verb: &str) {
        for (guest, other) in [(1, 2), (2, 1)] {
            let name = self.name(guest);
            ip(&format!(
                "-n {name} -6 route {verb} fd00:1::1{other}/128 via fd00:1::1"
            ));
        }
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        for of in 0..3 {
            // A failed test may have made only some.
            let _ = Command::new("ip")
                .args(["netns", "del", &self.name(of)])
                .output();
        }
    }
}

#[track_caller]
fn ip(args: &str) {
    run(Command::new("ip").args(args.split(' '))).ok();
}

#[test]
fn guests_on_the_bridge_reach_only_whom_they_may() {
    if run(Command::new("id").arg("-u")).line() != "0" {
        println!("skipped: network namespaces of one's own need root");
        return;
    }
    let bridge = Bridge::new();
    bridge.wait_until_up();
    assert!(bridge.comes_to_reach(1, "fd00:1::1"));
    bridge.route_through_dom0("add");
    assert!(bridge.comes_to_reach(1, "fd00:1::12"), "dom0 routes");
    bridge.route_through_dom0("del");

    let rules = root().join("xen-configs/dom0/xenbee.nft");
    bridge.within(0, &format!("nft -f {}", rules.display()));
    assert!(!bridge.reaches(0, "fd00:1::11"), "dom0 to an unknown guest");
    bridge.pin(1);
    bridge.pin(2);
    assert!(!bridge.reaches(1, "fd00:1::12"), "guest to guest");
    assert!(!bridge.reaches(1, "fd00:1::1"), "guest to dom0");
    assert!(bridge.comes_to_reach(0, "fd00:1::11"), "dom0 to guest");
    bridge.route_through_dom0("add");
    assert!(!bridge.reaches(1, "fd00:1::12"), "guest to guest by dom0");
    bridge.route_through_dom0("del");

    bridge.add("pairs", "vif1.0 . vif2.0 , vif2.0 . vif1.0");
    assert!(bridge.comes_to_reach(1, "fd00:1::12"), "a pair");
    assert!(!bridge.reaches(1, "fd00:1::1"), "a pair's guest to dom0");
    // Read again, as at the next boot of dom0: once more nobody may.
    bridge.within(0, &format!("nft -f {}", rules.display()));
    bridge.pin(1);
    bridge.pin(2);
    assert!(!bridge.reaches(1, "fd00:1::12"), "without the pair");
}

#[test]
fn a_guest_sends_only_as_who_it_is() {
    if run(Command::new("id").arg("-u")).line() != "0" {
        println!("skipped: network namespaces of one's own need root");
        return;
    }
    let bridge = Bridge::new();
    bridge.wait_until_up();
    let rules = root().join("xen-configs/dom0/xenbee.nft");
    bridge.within(0, &format!("nft -f {}", rules.display()));
    bridge.pin(1);
    bridge.pin(2);
    bridge.add("pairs", "vif1.0 . vif2.0 , vif2.0 . vif1.0");
    assert!(bridge.comes_to_reach(1, "fd00:1::12"), "a pair");
    // Its link-local address is among those that it may have.
    assert!(bridge.comes_to_reach(1, "fe80::be:ff:fe00:2%eth0"));

    let guest = bridge.name(1);
    let from = |address: &str| {
        bridge.tries(
            1,
            &format!("ping -6 -q -c 2 -i 0.2 -W 1 -I {address} fd00:1::12"),
        )
    };
    let echoes = bridge.echoes(2);
    assert!(from("fd00:1::11"));
    assert_eq!(bridge.echoes(2), echoes + 2, "what is counted below");
    ip(&format!(
        "-n {guest} -6 address add fd00:1::66/64 dev eth0 nodad"
    ));
    // Not only that no answer comes back: nothing arrives.
    let echoes = bridge.echoes(2);
    assert!(!from("fd00:1::66"), "an address that is not its own");
    assert_eq!(bridge.echoes(2), echoes, "an address that is not its own");
    ip(&format!("-n {guest} -6 address del fd00:1::66/64 dev eth0"));

    // It speaks for another, from its own address: so do those that a kernel is told to stand in for.
    bridge.within(1, "sysctl -qw net.ipv6.conf.all.forwarding=1");
    bridge.within(1, "sysctl -qw net.ipv6.conf.eth0.proxy_ndp=1");
    ip(&format!(
        "-n {guest} -6 neigh add proxy fd00:1::67 dev eth0"
    ));
    let believed = || {
        bridge.reaches(0, "fd00:1::67");
        let neighbours = bridge.prints(0, "ip -6 neigh show fd00:1::67 dev xenbr0");
        neighbours.contains("02:be:00:00:00:01")
    };
    assert!(!believed(), "a claim");
    bridge.within(0, "nft flush chain bridge xenbee source");
    assert!((0..20).any(|_| believed()), "without the rules it is one");
    bridge.within(0, &format!("nft -f {}", rules.display()));
    bridge.pin(1);
    bridge.pin(2);
    bridge.add("pairs", "vif1.0 . vif2.0 , vif2.0 . vif1.0");

    bridge.mac(1, "02:be:00:00:00:66");
    bridge.forget(1, "eth0");
    bridge.forget(2, "eth0");
    assert!(!bridge.reaches(1, "fd00:1::12"), "another card");
    bridge.mac(1, "02:be:00:00:00:01");
    bridge.forget(1, "eth0");
    assert!(bridge.comes_to_reach(1, "fd00:1::12"), "its own again");

    // Internet Protocol version 4 is nobody's.
    for of in 1..=2 {
        ip(&format!(
            "-n {} address add 10.9.9.{of}/24 dev eth0",
            bridge.name(of)
        ));
    }
    assert!(!bridge.tries(1, "ping -4 -q -c 2 -i 0.2 -W 1 10.9.9.2"));
}
