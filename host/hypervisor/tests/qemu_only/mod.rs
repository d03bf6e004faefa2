//! What only the QEMU back end promises.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::SocketAddr;
use std::time::Duration;

use xbee_hypervisor::qemu::{QemuConfig, QemuHypervisor};
use xbee_hypervisor::{Disk, DiskFormat, DomainState, Hypervisor, StopReason};

use tokio::time::{Instant, sleep};

use super::support::{Fixture, Guest, LIMIT, READY, qemu_pid};

mod guests_socket;

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
        assert_eq!(field("CapBnd:"), "0000000000000000");
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
        // Nothing of the host is left to it but what it needs.
        for space in ["mnt", "net", "pid", "ipc", "uts", "cgroup"] {
            let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{space}")).unwrap();
            assert_ne!(of(&pid.to_string()), of("self"), "{space}");
        }
        let root = std::fs::read_dir(format!("/proc/{pid}/root/")).unwrap();
        let mut names: Vec<_> = root.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        let run_dir = spec.run_dir.components().nth(1).unwrap().as_os_str();
        assert!(
            names
                .iter()
                .all(|name| ["dev", "etc", "lib", "lib64", "proc", "usr"]
                    .contains(&name.to_str().unwrap())
                    || name == run_dir),
            "{names:?}"
        );
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

/// A QEMU that was taken over finds all doors shut, beside a domain of somebody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_was_taken_over_gets_nowhere() {
    let Some(fixture) = Fixture::qemu() else {
        return;
    };
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can give a domain a user of its own");
        return;
    }
    let Some(program) = taken_over() else { return };
    let hypervisor = fixture.open().await;
    let victim = fixture.run(&*hypervisor, Guest::Idle).await;
    // What xbed has beside it, open to everybody but for the cage.
    let (database, api) = (fixture.path("xbed.db"), fixture.path("s"));
    std::fs::write(&database, "").unwrap();
    let _api = std::os::unix::net::UnixListener::bind(&api).unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let name = format!("xbee-contract-{}", victim.id);
    let address = SocketAddr::from_abstract_name(&name);
    let _abstract = std::os::unix::net::UnixListener::bind_addr(&address.unwrap()).unwrap();
    let everybody = PermissionsExt::from_mode(0o777);
    for path in [&fixture.path(""), &database, &api] {
        std::fs::set_permissions(path, Clone::clone(&everybody)).unwrap();
    }
    let most_mib: u64 = 192 + 512;
    let words = [
        ("other", victim.run_dir.display().to_string()),
        (
            "victim",
            qemu_pid(victim.id).unwrap().as_raw_nonzero().to_string(),
        ),
        ("manager", std::process::id().to_string()),
        ("database", database.display().to_string()),
        ("api", api.display().to_string()),
        (
            "switch",
            fixture.path("domains/vswitch.sock").display().to_string(),
        ),
        ("tcp", tcp.local_addr().unwrap().port().to_string()),
        ("abstract", name),
        ("memory", ((most_mib + 100) << 20).to_string()),
    ];
    let words: Vec<_> = words
        .map(|(name, value)| format!("door.{name}={value}"))
        .into();
    let open = |said: &str| -> Vec<String> {
        let doors = said
            .lines()
            .filter_map(|line| line.strip_prefix("door ")?.strip_suffix(": open"));
        doors.map(str::to_owned).collect()
    };

    // The same program outside: were all its doors shut, they would be painted on the wall.
    let outside = std::process::Command::new(&program)
        .args(&words)
        .current_dir(fixture.path(""))
        .output()
        .unwrap();
    let outside = open(&String::from_utf8_lossy(&outside.stderr));
    assert!(
        outside.len() > 35 && outside.contains(&"memory".to_owned()),
        "{outside:?}"
    );

    let other = fixture.open_with(Some(&program)).await;
    let mut spec = fixture.spec(Guest::Idle);
    spec.run_dir = fixture.path("others").join(spec.id.to_string());
    spec.kernel_args = words;
    other.create(&spec).await.unwrap();
    let error = other.start(spec.id).await.unwrap_err().to_string();
    let said = std::fs::read_to_string(spec.run_dir.join("qemu.log")).unwrap();
    println!("{said}");
    assert_eq!(open(&said), [""; 0]);
    let doors = said
        .lines()
        .filter(|line| line.starts_with("door "))
        .count();
    assert!(doors > 45, "{doors}");
    let groups: Vec<std::path::PathBuf> =
        serde_json::from_slice(&std::fs::read(spec.run_dir.join("qemu.cgroups")).unwrap()).unwrap();
    if groups
        .iter()
        .any(|group| group.join("memory.oom_control").exists() || group.join("memory.max").exists())
    {
        // That took more than its share was its end.
        assert!(
            error.ends_with(&format!("it used up its memory, {most_mib} MiB")),
            "{error}"
        );
        assert!(!said.contains("all doors tried"), "{said}");
    } else {
        println!("skipped: this host has no control group for memory");
    }
    other.destroy(spec.id).await.unwrap();
    assert!(groups.iter().all(|group| !group.exists()), "{groups:?}");
    // Of which the other domain noticed nothing.
    assert_eq!(
        super::state(&*hypervisor, victim.id).await,
        Some(DomainState::Running)
    );
    hypervisor.destroy(victim.id).await.unwrap();
}

/// The program that plays it; `None`, and a printed reason, where it is not built.
fn taken_over() -> Option<std::path::PathBuf> {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().unwrap().with_file_name("examples/taken_over");
    if !program.exists() {
        println!(
            "skipped: {} is missing (cargo build -p xbee-cage --examples)",
            program.display()
        );
        return None;
    }
    Some(program)
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
