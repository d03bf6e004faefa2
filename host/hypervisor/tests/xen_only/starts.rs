//! Many domains, started at once.

use std::collections::HashSet;
use std::time::Instant;

use xbee_hypervisor::{DomainSpec, DomainState, Error, Interface};

use super::super::support::{Fixture, Guest, READY, state, xen_name, xl};

fn on_the_bridge(fixture: &Fixture, number: u16) -> DomainSpec {
    let mut spec = fixture.spec(Guest::Idle);
    let [high, low] = number.to_be_bytes();
    spec.memory_bytes = 96 << 20;
    spec.interface = Some(Interface {
        mac: [0x02, 0xbe, 0, 0, high, low],
        address: format!("fd58:454e::{number:x}").parse().unwrap(),
        peers: true,
    });
    spec
}

/// Elements of a set of the firewall's.
fn elements(set: &str) -> String {
    let output = std::process::Command::new("nft")
        .args(["list", "set", "bridge", "xenbee", set])
        .output()
        .unwrap();
    assert!(output.status.success(), "nft list set bridge xenbee {set}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_start_at_once_each_with_its_own_place() {
    let Some(fixture) = Fixture::xen() else {
        return;
    };
    let hypervisor = fixture.open().await;
    let hypervisor = &*hypervisor;
    let specs: Vec<_> = (0..8)
        .map(|index| on_the_bridge(&fixture, 0x100 + index))
        .collect();
    let began = Instant::now();
    super::super::join_all(specs.iter().map(|spec| async {
        hypervisor.create(spec).await.unwrap();
        hypervisor.start(spec.id).await.unwrap();
    }))
    .await;
    let started = began.elapsed();
    for spec in &specs {
        fixture.wait_console(hypervisor, spec.id, READY).await;
    }
    println!(
        "8 domains: started after {started:.1?}, all up after {:.1?}",
        began.elapsed()
    );
    let (macs, addresses, pairs) = (elements("macs"), elements("addresses"), elements("pairs"));
    let mut ports = HashSet::new();
    for spec in &specs {
        let domid = xl(&["domid", &xen_name(spec.id)]).unwrap();
        let port = format!("\"vif{}.0\"", domid.trim());
        let interface = spec.interface.unwrap();
        let mac = interface.mac.map(|byte| format!("{byte:02x}")).join(":");
        assert!(macs.contains(&format!("{port} . {mac}")), "{port}: {macs}");
        let address = format!("{port} . {}", interface.address);
        assert!(addresses.contains(&address), "{address}: {addresses}");
        // What Xen has given it.
        let given = xl(&["network-list", &xen_name(spec.id)]).unwrap();
        assert!(given.contains(&mac), "{mac}: {given}");
        ports.insert(port);
    }
    assert_eq!(ports.len(), specs.len());
    assert_eq!(
        pairs.matches("\" . \"").count(),
        8 * 7,
        "all of one owner: {pairs}"
    );
    for spec in &specs {
        hypervisor.destroy(spec.id).await.unwrap();
    }
    for set in ["macs", "addresses", "targets", "pairs"] {
        let left = elements(set);
        assert!(!ports.iter().any(|port| left.contains(port)), "{left}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_start_at_once_do_not_both_get_the_last_memory() {
    let Some(fixture) = Fixture::xen() else {
        return;
    };
    let hypervisor = fixture.open().await;
    let hypervisor = &*hypervisor;
    let free_bytes = hypervisor.probe().await.unwrap().memory_bytes;
    // Each finds room, both do not.
    let specs: Vec<_> = (0..2)
        .map(|_| {
            let mut spec = fixture.spec(Guest::Idle);
            spec.memory_bytes = free_bytes / 10 * 6;
            spec
        })
        .collect();
    for spec in &specs {
        hypervisor.create(spec).await.unwrap();
    }
    let (one, other) = tokio::join!(hypervisor.start(specs[0].id), hypervisor.start(specs[1].id));
    let refused = match (one, other) {
        (Ok(()), Err(error)) => (error, &specs[1]),
        (Err(error), Ok(())) => (error, &specs[0]),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused.0.code(), "no-memory-now", "{}", refused.0);
    // And it can still be started when there is room.
    assert_eq!(
        state(hypervisor, refused.1.id).await,
        Some(DomainState::Created)
    );
    for spec in &specs {
        hypervisor.destroy(spec.id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_collide_are_refused_before_anything_is_made() {
    let Some(fixture) = Fixture::xen() else {
        return;
    };
    let hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Idle).await;
    // Another identity with the same beginning, which is all that the name shows.
    let mut other = fixture.spec(Guest::Idle);
    let id = spec.id.as_u128() ^ 1;
    other
        .run_dir
        .set_file_name(uuid::Uuid::from_u128(id).to_string());
    other.id = uuid::Uuid::from_u128(id);
    let error = hypervisor.create(&other).await.unwrap_err();
    assert_eq!(error.code(), "name-taken", "{error}");
    assert!(error.to_string().contains(&xen_name(spec.id)), "{error}");
    // One that this process does not know of.
    let stranger = fixture.spec(Guest::Idle);
    hypervisor.create(&stranger).await.unwrap();
    xl(&["rename", &xen_name(spec.id), &xen_name(stranger.id)]).unwrap();
    let started = hypervisor.start(stranger.id).await;
    assert!(
        matches!(started, Err(Error::NameTaken { .. })),
        "{started:?}"
    );
    assert_eq!(
        state(&*hypervisor, stranger.id).await,
        Some(DomainState::Created)
    );
    for spec in [spec, stranger] {
        hypervisor.destroy(spec.id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_rules_no_domain_gets_a_network() {
    let Some(fixture) = Fixture::xen() else {
        return;
    };
    let nft = |args: &[&str]| {
        let done = std::process::Command::new("nft").args(args).status();
        assert!(done.unwrap().success(), "nft {args:?}");
    };
    let hypervisor = fixture.open().await;
    let spec = on_the_bridge(&fixture, 0x120);
    hypervisor.create(&spec).await.unwrap();
    nft(&["delete", "table", "bridge", "xenbee"]);
    let error = hypervisor.start(spec.id).await.unwrap_err();
    let there = xl(&["domid", &xen_name(spec.id)]);
    nft(&["-f", "/etc/nftables.d/xenbee.nft"]);
    assert_eq!(error.code(), "firewall");
    assert!(
        error.to_string().contains("xen-configs/dom0/install"),
        "{error}"
    );
    assert_eq!(there, None);
    // When they are there it starts, and another process that takes it up tells it to them again.
    hypervisor.start(spec.id).await.unwrap();
    drop(hypervisor);
    nft(&["-f", "/etc/nftables.d/xenbee.nft"]);
    assert!(!elements("macs").contains("02:be:00:00:01:20"));
    let hypervisor = fixture.open().await;
    assert!(elements("macs").contains("02:be:00:00:01:20"));
    hypervisor.destroy(spec.id).await.unwrap();
    assert!(!elements("macs").contains("02:be:00:00:01:20"));
}
