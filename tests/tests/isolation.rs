//! The rules of `xen-configs/dom0/xenbee.nft`, tried by trying: namespaces stand for guests.
#![allow(clippy::unwrap_used)]

use std::process::Command;

use xbee_tests::{root, run};

/// dom0 and two guests, each a network namespace of its own; removed at the end.
struct Bridge {
    mark: u32,
}

impl Bridge {
    fn new() -> Bridge {
        let bridge = Bridge {
            mark: std::process::id(),
        };
        let dom0 = bridge.name(0);
        ip(&format!("netns add {dom0}"));
        for guest in 1..=2 {
            let name = bridge.name(guest);
            ip(&format!("netns add {name}"));
            ip(&format!(
                "-n {dom0} link add vif{guest}.0 type veth peer name eth0 netns {name}"
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

    #[track_caller]
    fn within(&self, of: u32, command: &str) {
        assert!(self.tries(of, command), "{command}");
    }

    fn reaches(&self, from: u32, address: &str) -> bool {
        // Two tries: the first may go to finding the other's address.
        self.tries(from, &format!("ping -6 -q -c 2 -i 0.2 -W 1 {address}"))
    }

    /// For what must come: on a busy machine a few answers come too late.
    fn gets_through(&self, from: u32, address: &str) -> bool {
        (0..50).any(|_| self.reaches(from, address))
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
    assert!(bridge.gets_through(1, "fd00:1::12"), "without rules");
    assert!(bridge.gets_through(1, "fd00:1::1"), "without rules");
    bridge.route_through_dom0("add");
    assert!(bridge.gets_through(1, "fd00:1::12"), "dom0 routes");
    bridge.route_through_dom0("del");

    let rules = root().join("xen-configs/dom0/xenbee.nft");
    bridge.within(0, &format!("nft -f {}", rules.display()));
    assert!(!bridge.reaches(1, "fd00:1::12"), "guest to guest");
    assert!(!bridge.reaches(1, "fd00:1::1"), "guest to dom0");
    assert!(bridge.gets_through(0, "fd00:1::11"), "dom0 to guest");
    bridge.route_through_dom0("add");
    assert!(!bridge.reaches(1, "fd00:1::12"), "guest to guest by dom0");
    bridge.route_through_dom0("del");

    let pair = "vif1.0 . vif2.0 , vif2.0 . vif1.0";
    bridge.within(
        0,
        &format!("nft add element bridge xenbee pairs {{ {pair} }}"),
    );
    assert!(bridge.gets_through(1, "fd00:1::12"), "a pair");
    assert!(!bridge.reaches(1, "fd00:1::1"), "a pair's guest to dom0");
    // Read again, as at the next boot of dom0: once more nobody may.
    bridge.within(0, &format!("nft -f {}", rules.display()));
    assert!(!bridge.reaches(1, "fd00:1::12"), "without the pair");
}
