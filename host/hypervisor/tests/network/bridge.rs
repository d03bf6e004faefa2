//! Guests of QEMU on a bridge of the host, kept apart by the rules of `xen-configs`: in a network namespace of its own.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use xbee_hypervisor::Interface;
use xbee_hypervisor::qemu::Bridge;

use super::super::support::Fixture;
use super::Host;

/// Says to a test that it is in its namespace.
const INSIDE: &str = "XBEE_TEST_NAMESPACE";
const BRIDGE: &str = "xenbr0";
/// Made by this process.
static NAMESPACES: AtomicUsize = AtomicUsize::new(0);

fn run(command: &str) -> String {
    let words: Vec<&str> = command.split(' ').collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// Goes with its namespace.
struct Namespace(String);

impl Drop for Namespace {
    fn drop(&mut self) {
        // What failed before is the reason to be told.
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// Whether this is the process in the namespace, with a bridge and its rules; another one runs the test there.
fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xen-configs/dom0/xenbee.nft");
        run(&format!("nft -f {}", rules.display()));
        run("ip link set lo up");
        run(&format!("ip link add {BRIDGE} type bridge"));
        run(&format!(
            "ip -6 addr add fd58:454e::1/64 dev {BRIDGE} nodad"
        ));
        run(&format!("ip link set {BRIDGE} up"));
        return true;
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: a network namespace of one's own needs root");
        return false;
    }
    let number = NAMESPACES.fetch_add(1, Ordering::Relaxed);
    let namespace = Namespace(format!("xbee-bridge-{}-{number}", std::process::id()));
    run(&format!("ip netns add {}", namespace.0));
    let status = Command::new("ip")
        .args(["netns", "exec", &namespace.0])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "yes")
        .status()
        .unwrap();
    assert!(status.success());
    false
}

/// Ports of guests that this namespace has.
fn ports() -> Vec<String> {
    let names = std::fs::read_dir("/sys/class/net").unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("vif")).collect()
}

fn is_in_the_rules(port: &str) -> bool {
    run("nft list table bridge xenbee").contains(&format!("\"{port}\""))
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_on_a_bridge_are_who_they_are_and_see_whom_they_may() {
    let Some(fixture) = Fixture::qemu() else {
        return;
    };
    if !inside("network::bridge::guests_on_a_bridge_are_who_they_are_and_see_whom_they_may") {
        return;
    }
    let open = || {
        fixture.open_bridge(Bridge {
            name: BRIDGE.to_owned(),
            firewall: true,
        })
    };
    let mut hypervisor = open().await;
    let (one, two, other) = tokio::join!(
        Host::boot(&fixture, &*hypervisor, 3, "one"),
        Host::boot(&fixture, &*hypervisor, 4, "one"),
        Host::boot(&fixture, &*hypervisor, 5, "two"),
    );
    assert!(one.reaches(&two.address()).await);
    assert!(two.reaches(&one.address()).await);
    assert!(one.reaches("fe80::be:ff:fe00:4%eth0").await);
    assert!(!one.reaches(&other.address()).await);
    assert!(!other.reaches(&one.address()).await);
    // Nor the host itself, which is on the bridge, and may reach them.
    assert!(!one.reaches("fd58:454e::1").await);
    run(&format!("ping -6 -c 1 -W 10 {}", two.address()));

    let (said, made) = one
        .sh("head -c 20000000 /dev/urandom >/file; setsid nc -ll -p 80 -e cat /file </dev/null >/dev/null & md5sum </file")
        .await;
    assert!(made, "{said}");
    let fetch = format!("nc {} 80 </dev/null | md5sum", one.address());
    assert_eq!(two.sh(&fetch).await.0, said);

    // Another's address, another's card; then as before.
    one.cannot_be_others(&two).await;

    // A second card, while it runs.
    let second = Interface {
        mac: [0x02, 0xbe, 0, 0, 0, 0x13],
        address: "fd58:454e::13".parse().unwrap(),
        peers: true,
    };
    hypervisor
        .attach_interface(one.spec.id, second)
        .await
        .unwrap();
    let (said, done) = one
        .sh("until [ -e /sys/class/net/eth1 ]; do sleep 0.1; done
             ip link set eth0 down; ip link set eth1 up; ip -6 addr add fd58:454e::13/64 dev eth1
             while ip -6 addr show eth1 | grep tentative; do sleep 0.1; done; ip -6 addr show eth1 | grep ::13/")
        .await;
    assert!(done, "{said}");
    assert!(two.reaches("fd58:454e::13").await);
    assert_eq!(ports().len(), 4);
    hypervisor
        .detach_interface(one.spec.id, second.mac)
        .await
        .unwrap();
    assert!(!is_in_the_rules("vif02be00000013"));

    // Without the manager, and with a new one.
    let (said, done) = one
        .sh("ip link set eth0 up; ip -6 addr add fd58:454e::3/64 dev eth0
             while ip -6 addr show eth0 | grep tentative; do sleep 0.1; done; ip -6 addr show eth0 | grep ::3/")
        .await;
    assert!(done, "{said}");
    let address = one.address();
    drop((one.agent, other.agent));
    drop(hypervisor);
    assert!(two.reaches(&address).await);
    hypervisor = open().await;
    hypervisor.destroy(one.spec.id).await.unwrap();
    assert!(!two.reaches(&address).await);
    for spec in [&two.spec, &other.spec] {
        hypervisor.destroy(spec.id).await.unwrap();
    }
    assert_eq!(ports(), [""; 0]);
    assert!(!is_in_the_rules("vif02be00000003") && !is_in_the_rules("vif02be00000004"));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_rules_no_guest_starts_on_a_bridge() {
    let Some(fixture) = Fixture::qemu() else {
        return;
    };
    if !inside("network::bridge::without_the_rules_no_guest_starts_on_a_bridge") {
        return;
    }
    run("nft delete table bridge xenbee");
    let hypervisor = fixture
        .open_bridge(Bridge {
            name: BRIDGE.to_owned(),
            firewall: true,
        })
        .await;
    let mut spec = fixture.spec(super::super::support::Guest::Agent);
    spec.interface = Some(Interface {
        mac: [0x02, 0xbe, 0, 0, 0, 3],
        address: "fd58:454e::3".parse().unwrap(),
        peers: true,
    });
    hypervisor.create(&spec).await.unwrap();
    let error = hypervisor.start(spec.id).await.unwrap_err();
    assert_eq!(error.code(), "firewall", "{error}");
    assert_eq!(ports(), [""; 0]);
    hypervisor.destroy(spec.id).await.unwrap();
}
