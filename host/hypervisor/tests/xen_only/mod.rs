//! What only the Xen back end promises.

mod ends;
mod starts;
mod tcp;

use std::process::Command;
use std::time::Duration;

use xbee_hypervisor::{Disk, DiskFormat, DomainState, Interface, StopReason};

use super::support::{Fixture, Guest, READY, state, xen_name, xl};

/// Two sectors: the first makes it a disk, the second is what the guest looks for.
fn disk_with(text: &[u8; 16]) -> Vec<u8> {
    let mut disk = vec![0; 1 << 20];
    disk[510..512].copy_from_slice(b"\x55\xaa");
    disk[1008..1024].copy_from_slice(text);
    disk
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_are_written_through_an_overlay_and_stay_as_they_were() {
    let Some(fixture) = Fixture::xen() else {
        return;
    };
    let hypervisor = fixture.open().await;
    let (first, second) = (fixture.path("first.img"), fixture.path("second.img"));
    std::fs::write(&first, disk_with(b"content of first")).unwrap();
    std::fs::write(&second, disk_with(b"content of secnd")).unwrap();
    let mut spec = fixture.spec(Guest::Disks);
    let disk = |image: &std::path::Path, read_only| Disk {
        image: image.to_owned(),
        format: DiskFormat::Raw,
        read_only,
    };
    spec.disks = vec![disk(&first, false), disk(&second, true)];
    let error = hypervisor.create(&spec).await.unwrap_err();
    assert_eq!(error.code(), "domain-invalid");
    assert!(error.to_string().contains("read-only"), "{error}");
    spec.disks[1].read_only = false;
    hypervisor.create(&spec).await.unwrap();
    hypervisor.start(spec.id).await.unwrap();
    let console = fixture
        .wait_console(&*hypervisor, spec.id, "written by guest")
        .await;
    assert!(
        console.contains("vda: content of first size 2048"),
        "{console}"
    );
    assert!(
        console.contains("vdb: content of secnd read-only 0"),
        "{console}"
    );
    assert_eq!(
        super::end(&*hypervisor, spec.id).await,
        StopReason::GuestShutdown
    );
    // And what the guest wrote is what it read again.
    assert!(console.contains("vda: written by guest"), "{console}");
    assert!(
        std::fs::read(&first).unwrap() == disk_with(b"content of first"),
        "the image was written"
    );
    hypervisor.destroy(spec.id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interface_is_on_the_bridge() {
    let Some(fixture) = Fixture::xen() else {
        return;
    };
    let hypervisor = fixture.open().await;
    let mut spec = fixture.spec(Guest::Idle);
    spec.interface = Some(Interface {
        mac: [0x02, 0xbe, 0, 0, 0, 3],
        address: "fd58:454e::3".parse().unwrap(),
        peers: false,
    });
    hypervisor.create(&spec).await.unwrap();
    hypervisor.start(spec.id).await.unwrap();
    let domid = xl(&["domid", &xen_name(spec.id)]).unwrap();
    let port = format!("/sys/class/net/xenbr0/brif/vif{}.0", domid.trim());
    assert!(std::path::Path::new(&port).exists(), "{port}");
    hypervisor.destroy(spec.id).await.unwrap();
    assert!(!std::path::Path::new(&port).exists(), "{port}");
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_is_not_there_is_refused_before_anything_is_made() {
    let Some(fixture) = Fixture::xen() else {
        return;
    };
    let hypervisor = fixture.open().await;
    let free_bytes = hypervisor.probe().await.unwrap().memory_bytes;
    let mut spec = fixture.spec(Guest::Idle);
    // The host has it, but not free.
    spec.memory_bytes = free_bytes + (64 << 20);
    hypervisor.create(&spec).await.unwrap();
    let error = hypervisor.start(spec.id).await.unwrap_err();
    assert_eq!(error.code(), "no-memory-now");
    assert_eq!(
        state(&*hypervisor, spec.id).await,
        Some(DomainState::Created)
    );
    assert_eq!(fixture.process_exists(spec.id), Some(false));
    hypervisor.destroy(spec.id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn domains_outlive_libvirts_daemon() {
    let Some(fixture) = Fixture::xen() else {
        return;
    };
    let daemon = std::fs::read_to_string("/run/libvirtd.pid").expect("libvirtd's pid file");
    let hypervisor = fixture.open().await;
    let idle = fixture.run(&*hypervisor, Guest::Idle).await;
    let crashing = fixture.run(&*hypervisor, Guest::Idle).await;
    fixture.wait_console(&*hypervisor, crashing.id, READY).await;
    let ended = Command::new("kill").arg(daemon.trim()).status().unwrap();
    assert!(ended.success());
    // Meanwhile one of them goes, which nobody sees.
    fixture.crash(crashing.id);
    while std::path::Path::new(&format!("/proc/{}", daemon.trim())).exists() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let started = Command::new("libvirtd").arg("-d").status().unwrap();
    assert!(started.success());
    assert!(matches!(
        super::end(&*hypervisor, crashing.id).await,
        StopReason::Failed { .. }
    ));
    // The other is as it was, and what happens to it is seen.
    assert_eq!(
        state(&*hypervisor, idle.id).await,
        Some(DomainState::Running)
    );
    hypervisor.pause(idle.id).await.unwrap();
    hypervisor.resume(idle.id).await.unwrap();
    fixture.crash(idle.id);
    assert!(matches!(
        super::end(&*hypervisor, idle.id).await,
        StopReason::Failed { .. }
    ));
    for spec in [idle, crashing] {
        hypervisor.destroy(spec.id).await.unwrap();
        super::assert_gone(&fixture, &*hypervisor, spec.id).await;
    }
}
