//! What only the Xen back end promises.

mod ends;
mod paravirtual;
mod starts;
mod tcp;

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use xbee_hypervisor::xen::{XenConfig, XenHypervisor};
use xbee_hypervisor::{Disk, DiskFormat, DomainState, Hypervisor, Interface, StopReason};

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
        console.contains("vdb: content of secnd read-only 1"),
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

    // A start that was cut off before its interface was on the bridge: what comes after puts it there.
    let vif = port.rsplit('/').next().unwrap();
    let off = Command::new("ip")
        .args(["link", "set", "dev", vif, "nomaster"])
        .status();
    assert!(off.unwrap().success());
    assert!(!std::path::Path::new(&port).exists(), "{port}");
    drop(hypervisor);
    let hypervisor = fixture.open().await;
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

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_loses_nothing() {
    let Some(fixture) = Fixture::xen() else {
        return;
    };
    let hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Count).await;
    fixture.wait_console(&*hypervisor, spec.id, READY).await;
    // Too small from the beginning, and full all of a sudden.
    for (size, sudden) in [("64M", false), ("320M", true)] {
        let (small, image) = (fixture.path("small"), fixture.path("small.img"));
        std::fs::create_dir_all(&small).unwrap();
        let run = |program: &str, args: &[&std::ffi::OsStr]| {
            let status = Command::new(program).args(args).status().unwrap();
            assert!(status.success(), "{program} {args:?}");
        };
        let make = ["-q", "-F", "-t", "ext4"].map(std::ffi::OsStr::new);
        run(
            "mke2fs",
            &[&make[..], &[image.as_ref(), size.as_ref()]].concat(),
        );
        let mount = [
            "-o".as_ref(),
            "loop".as_ref(),
            image.as_ref(),
            small.as_ref(),
        ];
        run("mount", &mount);
        let partial = small.join("save.partial");
        let filler = sudden.then(|| {
            let small = small.clone();
            std::thread::spawn(move || {
                // Once libvirt has begun to write.
                let begun = || {
                    let len = partial.metadata().map_or(0, |found| found.len());
                    (1..128 << 20).contains(&len)
                };
                while !begun() {
                    std::thread::sleep(Duration::from_millis(5));
                }
                let mut filler = std::fs::File::create(small.join("filler")).unwrap();
                while filler.write_all(&[7; 1 << 20]).is_ok() {}
            })
        });
        let error = hypervisor
            .save(spec.id, &small.join("save"))
            .await
            .unwrap_err();
        assert_eq!(error.code(), "not-saved", "{error}");
        println!("{error:?}");
        if let Some(filler) = filler {
            filler.join().unwrap();
        }
        assert!(!small.join("save").exists() && !small.join("save.partial").exists());
        run("umount", &[small.as_ref()]);
        assert_eq!(
            state(&*hypervisor, spec.id).await,
            Some(DomainState::Running)
        );
        super::goes_on(&fixture, &*hypervisor, &spec).await;
    }
    // And with room it can be saved.
    let file = fixture.path("save");
    hypervisor.save(spec.id, &file).await.unwrap();
    hypervisor.restore(spec.id, &file).await.unwrap();
    super::goes_on(&fixture, &*hypervisor, &spec).await;
    hypervisor.destroy(spec.id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_nobody_would_serve_is_refused() {
    let Some(fixture) = Fixture::xen() else {
        return;
    };
    let hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Count).await;
    let image = fixture.path("image");
    std::fs::write(&image, disk_with(b"content of image")).unwrap();
    let mut disk = Disk {
        image,
        format: DiskFormat::Raw,
        read_only: false,
    };
    // Its domain was started without a disk.
    let error = hypervisor.attach_disk(spec.id, &disk).await.unwrap_err();
    assert_eq!(error.code(), "unsupported", "{error}");
    // That one needs no QEMU.
    disk.read_only = true;
    assert_eq!(hypervisor.attach_disk(spec.id, &disk).await.unwrap(), 0);
    fixture
        .inside(&*hypervisor, spec.id, |now| now.contains("vda=1"))
        .await;
    hypervisor.destroy(spec.id).await.unwrap();
}

/// What the manager of the test below is to do: operation, directory of domains, domain, file.
const ORDER: &str = "XBEE_TEST_ORDER";

/// No test of its own: a manager that is about to die.
#[tokio::test(flavor = "multi_thread")]
async fn a_manager_does_as_ordered() {
    let Ok(order) = std::env::var(ORDER) else {
        return;
    };
    let [operation, domains, id, file] = order.split('|').collect::<Vec<_>>()[..] else {
        panic!("{order}");
    };
    let hypervisor = XenHypervisor::new(XenConfig::new(domains.into()))
        .await
        .unwrap();
    let (id, file) = (id.parse().unwrap(), PathBuf::from(file));
    println!("begins");
    match operation {
        "save" => hypervisor.save(id, &file).await.unwrap(),
        _ => hypervisor.restore(id, &file).await.unwrap(),
    }
    println!("done");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_or_restore_that_is_cut_off_is_completed_or_undone() {
    let Some(fixture) = Fixture::xen() else {
        return;
    };
    let hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Count).await;
    fixture.wait_console(&*hypervisor, spec.id, READY).await;
    drop(hypervisor);
    let saved = DomainState::Stopped {
        reason: StopReason::Saved,
    };
    let file = fixture.path("save");
    for delay_ms in [50, 1_500, 5_000] {
        for operation in ["save", "restore"] {
            let order = format!(
                "{operation}|{}|{}|{}",
                fixture.path("domains").display(),
                spec.id,
                file.display()
            );
            let mut manager = Command::new(std::env::current_exe().unwrap())
                .args([
                    "xen_only::a_manager_does_as_ordered",
                    "--exact",
                    "--nocapture",
                ])
                .env(ORDER, order)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let said = BufReader::new(manager.stdout.take().unwrap());
            let begins = said
                .lines()
                .map(Result::unwrap)
                .any(|line| line.contains("begins"));
            assert!(begins, "no manager");
            tokio::time::sleep(Duration::from_millis(delay_ms)).await;
            manager.kill().unwrap();
            manager.wait().unwrap();

            let hypervisor = fixture.open().await;
            let found = fixture.settled(&*hypervisor, spec.id).await;
            println!("{operation}, {delay_ms} ms: {found}");
            assert!(!fixture.path("save.partial").exists());
            match operation {
                "save" if found != saved => {
                    assert_eq!(found, DomainState::Running);
                    assert!(!file.exists());
                    super::goes_on(&fixture, &*hypervisor, &spec).await;
                    hypervisor.save(spec.id, &file).await.unwrap();
                }
                "restore" => {
                    if found == saved {
                        hypervisor.restore(spec.id, &file).await.unwrap();
                    }
                    super::goes_on(&fixture, &*hypervisor, &spec).await;
                    assert!(!file.exists());
                }
                _ => {}
            }
        }
    }
    let hypervisor = fixture.open().await;
    hypervisor.destroy(spec.id).await.unwrap();
    super::assert_gone(&fixture, &*hypervisor, spec.id).await;
}
