//! What only the QEMU back end promises.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use xbee_hypervisor::qemu::{QemuConfig, QemuHypervisor};
use xbee_hypervisor::{Disk, DiskFormat, Hypervisor, StopReason};

use tokio::time::{Instant, sleep};

use super::support::{Fixture, Guest, LIMIT, READY, qemu_pid};

/// Two sectors: the first makes it a disk, the second is what the guest looks for.
fn disk_with(text: &[u8; 16]) -> Vec<u8> {
    let mut disk = vec![0; 1 << 20];
    disk[510..512].copy_from_slice(b"\x55\xaa");
    disk[1008..1024].copy_from_slice(text);
    disk
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_are_written_through_an_overlay_and_stay_as_they_were() {
    let Some(fixture) = Fixture::qemu() else {
        return;
    };
    let hypervisor = fixture.open().await;
    // Where the domain's user cannot go, and files it cannot read.
    let closed = fixture.path("closed");
    std::fs::create_dir(&closed).unwrap();
    let (first, second) = (closed.join("first.img"), closed.join("second.img"));
    std::fs::write(&first, disk_with(b"content of first")).unwrap();
    std::fs::write(&second, disk_with(b"content of secnd")).unwrap();
    let mut spec = fixture.spec(Guest::Disks);
    let kernel = closed.join("kernel");
    std::fs::copy(spec.kernel.unwrap(), &kernel).unwrap();
    spec.kernel = Some(kernel.clone());
    for path in [&first, &second, &kernel] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).unwrap();
    }
    std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o700)).unwrap();
    let disk = |image: &std::path::Path, read_only| Disk {
        image: image.to_owned(),
        format: DiskFormat::Raw,
        read_only,
    };
    spec.disks = vec![disk(&first, false), disk(&second, true)];
    hypervisor.create(&spec).await.unwrap();
    let overlay_bytes = std::fs::metadata(spec.run_dir.join("disk0.qcow2"))
        .unwrap()
        .len();
    assert!(overlay_bytes < 512 << 10, "{overlay_bytes}");
    hypervisor.start(spec.id).await.unwrap();
    let console = fixture
        .wait_console(&*hypervisor, spec.id, "written by guest")
        .await;
    assert!(
        console.contains("vda: content of first size 2048"),
        "{console}"
    );
    assert!(
        console.contains("vdb: content of secnd read-only 1"),
        "{console}"
    );
    assert_eq!(
        super::end(&*hypervisor, spec.id).await,
        StopReason::GuestShutdown
    );
    assert!(
        std::fs::read(&first).unwrap() == disk_with(b"content of first"),
        "the image was written"
    );
    hypervisor.destroy(spec.id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_process_has_no_privileges() {
    let Some(fixture) = Fixture::qemu() else {
        return;
    };
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can give a domain a user of its own");
        return;
    }
    let hypervisor = fixture.open().await;
    let specs = [
        fixture.run(&*hypervisor, Guest::Idle).await,
        fixture.run(&*hypervisor, Guest::Idle).await,
    ];
    for spec in &specs {
        let pid = qemu_pid(spec.id).unwrap().as_raw_nonzero();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line[name.len()..]
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
        };
        let id = (200_000 + spec.cid).to_string();
        assert_eq!(field("Uid:"), [id.as_str(); 4].join(" "));
        assert_eq!(field("Gid:"), [id.as_str(); 4].join(" "));
        assert_eq!(field("Groups:"), "");
        assert_eq!(field("CapEff:"), "0000000000000000");
        assert_eq!(field("CapBnd:").len(), 16);
        assert_eq!(field("NoNewPrivs:"), "1");
        assert_eq!(field("Seccomp:"), "2");
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let limit = |name: &str| {
            limits
                .lines()
                .find(|line| line.starts_with(name))
                .unwrap()
                .to_owned()
        };
        assert!(limit("Max core file size").contains(" 0 "), "{limits}");
        assert!(limit("Max open files").contains(" 1024 "), "{limits}");
        // Nothing of the host manager's is open in it, and in its directory it may write nothing new.
        for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
            let target = std::fs::read_link(fd.unwrap().path()).unwrap();
            assert!(
                !target.ends_with("domain.json") && !target.ends_with("console.log"),
                "{}",
                target.display()
            );
        }
        let mode = std::fs::metadata(&spec.run_dir)
            .unwrap()
            .permissions()
            .mode()
            & 0o777;
        assert_eq!(mode, 0o710);
    }
    for spec in &specs {
        hypervisor.destroy(spec.id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_that_dies_leaves_nothing_unknown() {
    let Some(fixture) = Fixture::qemu() else {
        return;
    };
    let hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Idle).await;
    fixture.wait_console(&*hypervisor, spec.id, READY).await;
    drop(hypervisor);
    // A creation that was cut off before its end, and something that is nobody's.
    let cut_off = fixture.spec(Guest::Idle);
    std::fs::create_dir(&cut_off.run_dir).unwrap();
    std::fs::write(cut_off.run_dir.join("initramfs.cpio"), "half").unwrap();
    let other = fixture.path("domains/other");
    std::fs::create_dir(&other).unwrap();
    // As if the process had died before it noted anything but what the domain's itself wrote.
    let stat = spec.run_dir.join("qemu.stat");
    assert!(std::fs::read_to_string(&stat).unwrap().contains(") "));

    let hypervisor = fixture.open().await;
    assert!(!cut_off.run_dir.exists() && other.exists());
    assert_eq!(hypervisor.list().await.unwrap().len(), 1);
    hypervisor.create(&cut_off).await.unwrap();
    for id in [spec.id, cut_off.id] {
        hypervisor.destroy(id).await.unwrap();
        assert!(qemu_pid(id).is_none());
    }
    // Without domains, the switch goes with the manager.
    let control = fixture.path("domains/vswitch.sock");
    let connect = || std::os::unix::net::UnixStream::connect(&control);
    connect().unwrap();
    drop(hypervisor);
    let deadline = Instant::now() + LIMIT;
    while connect().is_ok() {
        assert!(Instant::now() < deadline, "the switch is still there");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_programs_are_named_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = QemuConfig::new(dir.path().join("domains"));
    config.program = Some("/nowhere/qemu-system-x86_64".into());
    let error = QemuHypervisor::new(config)
        .await
        .unwrap()
        .probe()
        .await
        .unwrap_err();
    assert_eq!(error.code(), "hypervisor-missing");
    assert_eq!(
        error.to_string(),
        "/nowhere/qemu-system-x86_64 not found: install it (Debian, Ubuntu: apt-get install qemu-system-x86)"
    );
}
