//! Hosts and guests for the contract suite.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::{Instant, sleep};
use uuid::Uuid;
use xbee_hypervisor::qemu::{QemuConfig, QemuHypervisor};
use xbee_hypervisor::{DomainId, DomainSpec, DomainState, Hypervisor};

/// Printed by every guest when its own program runs.
pub const READY: &str = "xbee-test-ready";

/// Printed on the console as proof that the guest sees its boot configuration.
pub const BOOT_CONFIG: &[u8] = b"boot-config-of-the-test\n";

/// No guest here takes longer for anything, even with others compiling beside it.
pub const LIMIT: Duration = Duration::from_secs(90);

/// What a guest does once it is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// Nothing, and it does not hear the power button.
    Idle,
    /// Switches itself off when the power button is pressed.
    Button,
    /// Switches itself off.
    PowerOff,
    /// Resets.
    Reset,
    /// Its kernel panics.
    Panic,
    /// Prints without end.
    Flood,
    /// Reads and writes its disks.
    Disks,
}

impl Guest {
    fn arg(self) -> String {
        format!("xbee.test={self:?}").to_lowercase()
    }
}

const INIT: &str = r#"#!/bin/busybox sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "$module"; done </xbee/modules
for module in /test/*.ko; do insmod "$module"; done
exec </dev/console >/dev/console 2>&1
echo xbee-test-ready
cat /xbee/boot
for word in $(cat /proc/cmdline); do
    case $word in
    xbee.test=button) dd if=/dev/input/event0 bs=24 count=1 of=/dev/null; poweroff -f ;;
    xbee.test=poweroff) poweroff -f ;;
    xbee.test=reset) reboot -f ;;
    xbee.test=panic) echo c >/proc/sysrq-trigger ;;
    xbee.test=flood) yes "flood flood flood flood flood flood flood flood" ;;
    xbee.test=disks)
        echo "vda: $(head -c 1024 /dev/vda | tail -c 16) size $(cat /sys/block/vda/size)"
        echo "vdb: $(head -c 1024 /dev/vdb | tail -c 16) read-only $(cat /sys/block/vdb/ro)"
        printf 'written by guest' | dd of=/dev/vda bs=512 seek=1 conv=notrunc 2>/dev/null
        sync
        echo 3 >/proc/sys/vm/drop_caches
        echo "vda: $(head -c 528 /dev/vda | tail -c 16)"
        poweroff -f ;;
    esac
done
while true; do sleep 1000; done
"#;

static NEXT_CID: AtomicU32 = AtomicU32::new(3);

/// A back end with a place of its own.
pub struct Fixture {
    dir: TempDir,
    backend: Backend,
}

enum Backend {
    Qemu { kernel: PathBuf, initramfs: PathBuf },
}

impl Fixture {
    /// `None`, and a printed reason, where the images are missing.
    pub fn qemu() -> Option<Self> {
        let home = std::env::var_os("HOME")
            .map(PathBuf::from)
            .unwrap_or_default();
        let images = std::env::var_os("XBEE_IMAGES")
            .map_or_else(|| home.join(".cache/xbee/images"), PathBuf::from);
        let kernel = images.join("kernel/vmlinux");
        let base = images.join("base/initramfs.cpio");
        for path in [&kernel, &base] {
            if !path.exists() {
                println!("skipped: {} is missing (make images)", path.display());
                return None;
            }
        }
        let dir = tempfile::tempdir().unwrap();
        // Where the images are, only root may be able to look.
        let initramfs = dir.path().join("test.cpio");
        std::fs::write(
            &initramfs,
            initramfs_with_test(&base, &images.join("kernel")),
        )
        .unwrap();
        Some(Self {
            dir,
            backend: Backend::Qemu { kernel, initramfs },
        })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn domains_dir(&self) -> PathBuf {
        self.path("domains")
    }

    /// The back end; opened again, it must find what the one before left running.
    pub async fn open(&self) -> Box<dyn Hypervisor> {
        match &self.backend {
            Backend::Qemu { .. } => {
                let config = QemuConfig::new(self.domains_dir());
                Box::new(QemuHypervisor::new(config).await.unwrap())
            }
        }
    }

    /// A domain of its own identity.
    pub fn spec(&self, guest: Guest) -> DomainSpec {
        let id = Uuid::new_v4();
        let Backend::Qemu { kernel, initramfs } = &self.backend;
        DomainSpec {
            id,
            name: format!("test, {id}"),
            owner: "tester".to_owned(),
            vcpus: 1,
            memory_bytes: 192 << 20,
            kernel: kernel.clone(),
            initramfs: Some(initramfs.clone()),
            kernel_args: vec![guest.arg()],
            disks: Vec::new(),
            // Tests run in processes of their own, at the same time.
            cid: (std::process::id() % 50_000) * 16 + NEXT_CID.fetch_add(1, Ordering::Relaxed),
            boot_config: BOOT_CONFIG.to_vec(),
            run_dir: self.domains_dir().join(id.to_string()),
        }
    }

    /// Waits until the console shows `text`; fails when the domain ends without.
    pub async fn wait_console(
        &self,
        hypervisor: &dyn Hypervisor,
        id: DomainId,
        text: &str,
    ) -> String {
        let deadline = Instant::now() + LIMIT;
        let path = hypervisor.console(id).await.unwrap();
        loop {
            let ended = matches!(
                state(hypervisor, id).await,
                Some(DomainState::Stopped { .. })
            );
            let console = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
            if console.contains(text) {
                return console;
            }
            assert!(
                !ended && Instant::now() < deadline,
                "no {text:?} on the console:\n{console}"
            );
            sleep(Duration::from_millis(20)).await;
        }
    }
}

/// What `list` says of a domain.
pub async fn state(hypervisor: &dyn Hypervisor, id: DomainId) -> Option<DomainState> {
    let list = hypervisor.list().await.unwrap();
    list.into_iter()
        .find(|info| info.id == id)
        .map(|info| info.state)
}

fn initramfs_with_test(base: &Path, kernel: &Path) -> Vec<u8> {
    let mut archive = std::fs::read(base).unwrap();
    archive.resize(archive.len().next_multiple_of(4), 0);
    let mut writer = xbee_initramfs::Writer::new(archive);
    writer.file("init", 0o755, INIT.as_bytes()).unwrap();
    writer.dir("test", 0o755).unwrap();
    // What the power button needs.
    for (index, name) in ["button.ko", "evdev.ko"].iter().enumerate() {
        if let Some(module) = find(&kernel.join("lib/modules"), name) {
            writer
                .file(
                    &format!("test/{index}-{name}"),
                    0o644,
                    &std::fs::read(module).unwrap(),
                )
                .unwrap();
        }
    }
    writer.finish().unwrap()
}

fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    std::fs::read_dir(dir).ok()?.flatten().find_map(|entry| {
        if entry.file_name() == name {
            Some(entry.path())
        } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            find(&entry.path(), name)
        } else {
            None
        }
    })
}
