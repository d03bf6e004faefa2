//! Hosts and guests for the contract suite.

mod boot_image;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};
use uuid::Uuid;
use xbee_agent::protocol::{
    AGENT_VSOCK_PORT, BootConfig, Execute, GENERATION, Limits, Secret, Transport,
};
use xbee_hypervisor::qemu::{Bridge, GuestsSocket, Outbound, QemuConfig, QemuHypervisor};
use xbee_hypervisor::sim::{SimConfig, SimEvent, SimHost, SimHypervisor};
#[cfg(feature = "xen")]
use xbee_hypervisor::xen::{XenConfig, XenHypervisor};
use xbee_hypervisor::{Disk, DiskFormat, DomainId, DomainSpec, DomainState, Hypervisor};

/// Printed by every guest when its own program runs.
pub const READY: &str = "guest: up";

/// The secret of every guest's boot.
pub const SECRET: Secret = Secret([5; 32]);

/// No guest here takes longer for anything, even with others compiling beside it.
pub const LIMIT: Duration = Duration::from_secs(240);

/// But one that firmware boots: it reads the disk word by word, which takes minutes in a Xen in QEMU.
pub const FIRMWARE_LIMIT: Duration = Duration::from_secs(900);

/// Bound of the console logs here.
pub const CONSOLE_MAX_BYTES: u64 = 256 << 10;

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
    /// As the three before, a while after it is up: only Xen's tests need them apart.
    #[cfg_attr(not(feature = "xen"), expect(dead_code))]
    LatePowerOff,
    #[cfg_attr(not(feature = "xen"), expect(dead_code))]
    LateReset,
    #[cfg_attr(not(feature = "xen"), expect(dead_code))]
    LatePanic,
    /// Prints without end.
    Flood,
    /// Prints now and then what it has.
    Count,
    /// Reads and writes its disks.
    Disks,
    /// Runs the agent.
    Agent,
    /// Runs the agent as a service: it finds the boot's configuration itself.
    Service,
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
echo guest: up
[ -s /xbee/boot ] || echo no boot configuration
for word in $(cat /proc/cmdline); do
    case $word in
    xbee.test=button)
        # Xen asks the kernel, which runs this. It is a link to busybox, whose init this is not.
        rm -f /sbin/poweroff
        printf '#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n' >/sbin/poweroff
        rm -f /sbin/reboot
        printf '#!/bin/busybox sh\nexec /bin/busybox reboot -f\n' >/sbin/reboot
        chmod 755 /sbin/poweroff /sbin/reboot
        [ -e /dev/input/event0 ] || continue
        dd if=/dev/input/event0 bs=24 count=1 of=/dev/null; poweroff -f ;;
    xbee.test=poweroff) poweroff -f ;;
    xbee.test=reset) reboot -f ;;
    xbee.test=panic) echo c >/proc/sysrq-trigger ;;
    xbee.test=count)
        n=0 taken=
        while true; do
            n=$((n + 1))
            disks=
            for disk in /sys/block/*vd?; do
                [ -e $disk/ro ] && disks="$disks ${disk##*/}=$(cat $disk/ro)"
            done
            memory=$(grep MemTotal /proc/meminfo | tr -dc 0-9)
            echo "count $n: memory $memory cpus $(nproc) interfaces $(ls /sys/class/net | wc -l) disks$disks"
            # New ones are there to be taken, once: those that are to go are off before they are gone.
            seen=
            for cpu in /sys/devices/system/cpu/cpu[1-9]*/online; do
                [ -e $cpu ] || continue
                seen="$seen $cpu"
                case "$taken " in *" $cpu "*) ;; *) echo 1 >$cpu ;; esac
            done
            taken=$seen
            sleep 0.3
        done ;;
    xbee.test=service) /xbee/xbeinstd --service & ;;
    xbee.test=latepoweroff) sleep 3; poweroff -f ;;
    xbee.test=latereset) sleep 3; reboot -f ;;
    xbee.test=latepanic) sleep 3; echo c >/proc/sysrq-trigger ;;
    xbee.test=flood) yes "flood flood flood flood flood flood flood flood" ;;
    xbee.test=disks)
        vda=vda vdb=vdb
        # They come after their driver, one by one.
        [ "$(cat /sys/hypervisor/type)" = xen ] && vda=xvda vdb=xvdb
        for disk in $vda $vdb; do until [ -b /dev/$disk ]; do sleep 0.1; done; done
        echo "vda: $(head -c 1024 /dev/$vda | tail -c 16) size $(cat /sys/block/$vda/size)"
        echo "vdb: $(head -c 1024 /dev/$vdb | tail -c 16) read-only $(cat /sys/block/$vdb/ro)"
        printf 'written by guest' | dd of=/dev/$vda bs=512 seek=1 conv=notrunc 2>/dev/null
        sync
        echo 3 >/proc/sys/vm/drop_caches
        echo "vda: $(head -c 528 /dev/$vda | tail -c 16)"
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
    Qemu {
        kernel: PathBuf,
        base: PathBuf,
        initramfs: PathBuf,
        vswitch: PathBuf,
    },
    Sim(Arc<SimHost>),
    #[cfg(feature = "xen")]
    Xen {
        kernel: PathBuf,
        base: PathBuf,
        initramfs: PathBuf,
    },
}

impl Fixture {
    pub fn sim() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = SimConfig::new(dir.path().join("domains"));
        config.check_images = true;
        config.console_max_bytes = CONSOLE_MAX_BYTES;
        // The simulator looks at the files, but runs nothing of them.
        std::fs::write(dir.path().join("kernel"), bzimage_header()).unwrap();
        std::fs::write(dir.path().join("initramfs"), "").unwrap();
        Self {
            dir,
            backend: Backend::Sim(SimHost::new(config)),
        }
    }

    /// `None`, and a printed reason, where this is no control domain or the images are missing.
    #[cfg(feature = "xen")]
    pub fn xen() -> Option<Self> {
        let capabilities = std::fs::read_to_string("/proc/xen/capabilities").unwrap_or_default();
        if !capabilities.contains("control_d") {
            println!("skipped: this is not dom0 of a Xen host (make xen-test)");
            return None;
        }
        let images = images()?;
        let dir = tempfile::tempdir().unwrap();
        let initramfs = dir.path().join("test.cpio");
        std::fs::write(
            &initramfs,
            initramfs_with_test(&images.base, &images.directory),
        )
        .unwrap();
        Some(Self {
            dir,
            backend: Backend::Xen {
                kernel: images.kernel,
                base: images.base,
                initramfs,
            },
        })
    }

    /// `None`, and a printed reason, where the images are missing.
    pub fn qemu() -> Option<Self> {
        let Images {
            directory,
            kernel,
            base,
        } = images()?;
        // Cargo puts the programs of the workspace above the tests.
        let vswitch = std::env::current_exe()
            .unwrap()
            .parent()
            .unwrap()
            .with_file_name("vswitch");
        for name in ["vswitch", "cage", "gateway"] {
            let program = vswitch.with_file_name(name);
            if !program.exists() {
                println!(
                    "skipped: {} is missing (cargo build -p xbee-vswitch -p xbee-cage -p xbee-gateway)",
                    program.display()
                );
                return None;
            }
        }
        let dir = tempfile::tempdir().unwrap();
        // Where the images are, only root may be able to look.
        let initramfs = dir.path().join("test.cpio");
        std::fs::write(&initramfs, initramfs_with_test(&base, &directory)).unwrap();
        Some(Self {
            dir,
            backend: Backend::Qemu {
                kernel,
                base,
                initramfs,
                vswitch,
            },
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
        self.open_with(None).await
    }

    /// With another program as QEMU and, since that is another back end, another place: `others`.
    pub async fn open_with(&self, qemu: Option<&Path>) -> Box<dyn Hypervisor> {
        match &self.backend {
            Backend::Sim(host) => Box::new(SimHypervisor::new(Arc::clone(host))),
            Backend::Qemu { .. } => {
                let mut config = self.qemu_config(match qemu {
                    None => self.domains_dir(),
                    Some(_) => self.path("others"),
                });
                config.program = qemu.map(Path::to_owned);
                Box::new(QemuHypervisor::new(config).await.unwrap())
            }
            #[cfg(feature = "xen")]
            Backend::Xen { .. } => {
                let mut config = XenConfig::new(self.domains_dir());
                config.console_max_bytes = CONSOLE_MAX_BYTES;
                Box::new(XenHypervisor::new(config).await.unwrap())
            }
        }
    }

    /// Of QEMU: guests may reach so much.
    pub async fn open_outbound(&self, outbound: Outbound) -> Box<dyn Hypervisor> {
        let mut config = self.qemu_config(self.domains_dir());
        config.outbound = outbound;
        Box::new(QemuHypervisor::new(config).await.unwrap())
    }

    /// Of QEMU: guests are on a bridge.
    pub async fn open_bridge(&self, bridge: Bridge) -> Box<dyn Hypervisor> {
        let mut config = self.qemu_config(self.domains_dir());
        config.bridge = Some(bridge);
        Box::new(QemuHypervisor::new(config).await.unwrap())
    }

    /// Of QEMU: programs of the host come to a socket.
    pub async fn open_guests_socket(
        &self,
        path: Option<&Path>,
    ) -> Result<Box<dyn Hypervisor>, xbee_hypervisor::Error> {
        let mut config = self.qemu_config(self.domains_dir());
        config.guests_socket = path.map(|path| GuestsSocket {
            path: path.to_owned(),
            users_end: 1 << 31,
        });
        Ok(Box::new(QemuHypervisor::new(config).await?))
    }

    fn qemu_config(&self, domains_dir: PathBuf) -> QemuConfig {
        let Backend::Qemu { vswitch, .. } = &self.backend else {
            panic!("not a host with QEMU");
        };
        let mut config = QemuConfig::new(domains_dir);
        config.console_max_bytes = CONSOLE_MAX_BYTES;
        config.vswitch_program = Some(vswitch.clone());
        config.cage_program = Some(vswitch.with_file_name("cage"));
        config.gateway_program = Some(vswitch.with_file_name("gateway"));
        config
    }

    fn transport(&self) -> Transport {
        match &self.backend {
            Backend::Qemu { .. } | Backend::Sim(_) => Transport::Vsock {
                port: AGENT_VSOCK_PORT,
            },
            #[cfg(feature = "xen")]
            Backend::Xen { .. } => Transport::Xen {
                path: "data/xbee/agent".to_owned(),
                port: 22594,
            },
        }
    }

    /// As many domains as this back end's guests let run at once. On Xen, where each takes long in an
    /// emulator, `xen_only::starts` starts eight.
    pub fn domains_max(&self) -> usize {
        match &self.backend {
            Backend::Sim(_) => 8,
            Backend::Qemu { .. } => 4,
            #[cfg(feature = "xen")]
            Backend::Xen { .. } => 2,
        }
    }

    /// Whether this is one of the things that this back end cannot do: it answers
    /// `Error::Unsupported`. Prints why the caller's test does no more.
    pub fn cannot(&self, operation: &str) -> bool {
        let cannot: &[&str] = match &self.backend {
            Backend::Sim(_) => &[],
            Backend::Qemu { .. } => &[
                "save",
                // With TCG, that is.
                "take processors from",
            ],
            #[cfg(feature = "xen")]
            Backend::Xen { .. } => &[],
        };
        let cannot = cannot.contains(&operation);
        if cannot {
            println!("this back end does not {operation} a domain, and says so");
        }
        cannot
    }

    /// The state of a domain once whatever was under way with it has come to its end: a command that
    /// changes nothing waits for that.
    #[cfg(feature = "xen")]
    pub async fn settled(&self, hypervisor: &dyn Hypervisor, id: DomainId) -> DomainState {
        loop {
            let before = state(hypervisor, id).await.unwrap();
            let resumed = hypervisor.resume(id).await.is_ok();
            sleep(Duration::from_millis(300)).await;
            let after = state(hypervisor, id).await.unwrap();
            if before == after && resumed == (after == DomainState::Running) {
                return after;
            }
        }
    }

    /// What is said of a domain after [`Fixture::crash`].
    pub fn crash_detail(&self) -> &'static str {
        match &self.backend {
            Backend::Qemu { .. } | Backend::Sim(_) => "QEMU ended (signal 9)",
            #[cfg(feature = "xen")]
            Backend::Xen { .. } => "it was destroyed, and not by the host manager",
        }
    }

    /// A domain of its own identity.
    pub fn spec(&self, guest: Guest) -> DomainSpec {
        let id = Uuid::new_v4();
        let (kernel, initramfs) = match &self.backend {
            Backend::Qemu { kernel, base, .. } if guest == Guest::Agent => {
                (kernel.clone(), base.clone())
            }
            Backend::Qemu {
                kernel, initramfs, ..
            } => (kernel.clone(), initramfs.clone()),
            #[cfg(feature = "xen")]
            Backend::Xen {
                kernel,
                base,
                initramfs,
            } => {
                let initramfs = if guest == Guest::Agent {
                    base
                } else {
                    initramfs
                };
                (kernel.clone(), initramfs.clone())
            }
            Backend::Sim(_) => (self.path("kernel"), self.path("initramfs")),
        };
        DomainSpec {
            id,
            name: format!("test, {id}"),
            owner: "tester".to_owned(),
            vcpus: 1,
            vcpus_max: None,
            memory_bytes: 192 << 20,
            memory_max_bytes: None,
            kernel: Some(kernel),
            initramfs: Some(initramfs),
            // A self-test of the kernel's that nothing here is about, as in images/base.
            kernel_args: vec![
                "initcall_blacklist=crypto_kdf108_init".to_owned(),
                guest.arg(),
            ],
            disks: Vec::new(),
            // Tests run in processes of their own, at the same time.
            cid: (std::process::id() % 50_000) * 16 + NEXT_CID.fetch_add(1, Ordering::Relaxed),
            interface: None,
            boot_config: BootConfig {
                generation: GENERATION,
                domain: id,
                hostname: "guest".to_owned(),
                secret: SECRET,
                transport: self.transport(),
                network: None,
            }
            .encode(),
            run_dir: self.domains_dir().join(id.to_string()),
        }
    }

    /// A domain whose image has a boot loader and a kernel of its own. `None`, and a printed reason,
    /// where no such image can be made.
    pub fn self_booting(&self, guest: Guest) -> Option<DomainSpec> {
        let spec = self.spec(guest);
        let image = self.path("own-boot-loader.img");
        match &self.backend {
            // The simulator looks whether there is something to boot.
            Backend::Sim(_) => std::fs::write(&image, boot_sector()).unwrap(),
            _ => {
                let vmlinuz = spec.kernel.as_ref()?.with_file_name("vmlinuz");
                let initramfs = spec.initramfs.as_ref()?;
                boot_image::make(&image, &vmlinuz, initramfs, &guest.arg())?;
            }
        }
        Some(DomainSpec {
            kernel: None,
            initramfs: None,
            kernel_args: Vec::new(),
            disks: vec![Disk {
                image,
                format: DiskFormat::Raw,
                read_only: false,
            }],
            ..spec
        })
    }

    /// Creates and starts a domain.
    pub async fn run(&self, hypervisor: &dyn Hypervisor, guest: Guest) -> DomainSpec {
        let spec = self.spec(guest);
        hypervisor.create(&spec).await.unwrap();
        self.start(hypervisor, &spec, guest).await;
        spec
    }

    /// Starts a domain whose guest is to do this.
    pub async fn start(&self, hypervisor: &dyn Hypervisor, spec: &DomainSpec, guest: Guest) {
        hypervisor.start(spec.id).await.unwrap();
        self.act(spec, guest);
    }

    /// Waits until a guest that counts sees what it should, where there is a guest that sees.
    pub async fn inside(
        &self,
        hypervisor: &dyn Hypervisor,
        id: DomainId,
        is_so: impl Fn(&str) -> bool,
    ) {
        if matches!(self.backend, Backend::Sim(_)) {
            return;
        }
        let deadline = Instant::now() + LIMIT;
        loop {
            let console = self.wait_console(hypervisor, id, "count 1:").await;
            // The last line may be half a line.
            let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let now = whole.lines().rev().find(|line| line.starts_with("count "));
            if now.is_some_and(&is_so) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "not seen by the guest:\n{console}"
            );
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// A real guest acts by itself; a simulated one must be told.
    fn act(&self, spec: &DomainSpec, guest: Guest) {
        if let Backend::Sim(host) = &self.backend {
            let event = match guest {
                Guest::Button | Guest::Disks | Guest::Agent | Guest::Service => return,
                Guest::Idle => SimEvent::IgnorePowerButton,
                Guest::PowerOff | Guest::LatePowerOff => SimEvent::PowerOff,
                Guest::Reset | Guest::LateReset => SimEvent::Reset,
                Guest::Panic | Guest::LatePanic => SimEvent::Panic,
                Guest::Flood => SimEvent::FloodConsole,
                Guest::Count => SimEvent::Count,
            };
            host.inject(spec.id, event).unwrap();
        }
    }

    /// Whether a process runs in or for this domain, for back ends that have processes.
    pub fn process_exists(&self, id: DomainId) -> Option<bool> {
        match &self.backend {
            Backend::Sim(_) => None,
            Backend::Qemu { .. } => Some(qemu_pid(id).is_some()),
            #[cfg(feature = "xen")]
            Backend::Xen { .. } => Some(xl(&["domid", &xen_name(id)]).is_some()),
        }
    }

    /// Ends the hypervisor under a running domain.
    pub fn crash(&self, id: DomainId) {
        match &self.backend {
            Backend::Sim(host) => host
                .inject(
                    id,
                    SimEvent::Crash {
                        detail: "QEMU ended (signal 9)".to_owned(),
                    },
                )
                .unwrap(),
            Backend::Qemu { .. } => kill_process(qemu_pid(id).unwrap(), Signal::KILL).unwrap(),
            #[cfg(feature = "xen")]
            Backend::Xen { .. } => {
                xl(&["destroy", &xen_name(id)]).expect("xl destroy");
            }
        }
    }

    /// Waits until a guest has switched itself off while nobody was connected to its hypervisor.
    pub async fn wait_until_switched_off(&self, id: DomainId) {
        match &self.backend {
            Backend::Sim(_) => sleep(Duration::from_millis(100)).await,
            #[cfg(feature = "xen")]
            Backend::Xen { .. } => {
                // The column of states of `xl list`, which has an s when it has been shut down.
                let has_shut_down = || {
                    let list = xl(&["list", &xen_name(id)]).unwrap();
                    let line = list.lines().nth(1).unwrap();
                    line.split_whitespace().nth(4).unwrap().contains('s')
                };
                let deadline = Instant::now() + LIMIT;
                while !has_shut_down() {
                    sleep(Duration::from_millis(300)).await;
                    assert!(Instant::now() < deadline);
                }
            }
            // It stays, halted. Its processor time no longer grows.
            Backend::Qemu { .. } => {
                let deadline = Instant::now() + LIMIT;
                let cpu = || {
                    let pid = qemu_pid(id).unwrap().as_raw_nonzero();
                    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
                    let fields: Vec<_> = stat
                        .rsplit_once(')')
                        .unwrap()
                        .1
                        .split_whitespace()
                        .collect();
                    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
                };
                let mut before = cpu();
                loop {
                    sleep(Duration::from_secs(1)).await;
                    let now = cpu();
                    if now.abs_diff(before) <= 1 && now > 50 {
                        return;
                    }
                    before = now;
                    assert!(Instant::now() < deadline);
                }
            }
        }
    }

    /// Waits until the console shows `text`; fails when the domain ends without.
    pub async fn wait_console(
        &self,
        hypervisor: &dyn Hypervisor,
        id: DomainId,
        text: &str,
    ) -> String {
        self.wait_console_for(LIMIT, hypervisor, id, text).await
    }

    /// As [`Fixture::wait_console`], for so long.
    pub async fn wait_console_for(
        &self,
        limit: Duration,
        hypervisor: &dyn Hypervisor,
        id: DomainId,
        text: &str,
    ) -> String {
        let deadline = Instant::now() + limit;
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

impl Drop for Fixture {
    /// A failed test leaves no process.
    fn drop(&mut self) {
        let Ok(domains) = std::fs::read_dir(self.domains_dir()) else {
            return;
        };
        for domain in domains.flatten() {
            let id = domain
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            #[cfg(feature = "xen")]
            if let (Backend::Xen { .. }, Some(id)) = (&self.backend, id) {
                // It may be gone.
                let _ = xl(&["destroy", &xen_name(id)]);
            }
            if let Some(pid) = id.and_then(qemu_pid) {
                // It may have ended just now.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        // A switch without domains, which a test that passed has left none of.
        if let Ok(mut switch) = UnixStream::connect(self.path("domains/vswitch.sock")) {
            let stopped = switch.write_all(b"{\"op\":\"stop\"}\n");
            let _ = stopped.and_then(|()| switch.read_exact(&mut [0]));
        }
    }
}

/// A task that says hello.
pub fn echo(conversation: Uuid) -> Execute {
    Execute {
        conversation,
        argv: vec!["echo".to_owned(), "hello".to_owned()],
        environment: Vec::new(),
        working_directory: None,
        stdin: None,
        stdout: None,
        stderr: None,
        user: None,
        group: None,
        umask: None,
        limits: Limits::default(),
    }
}

/// The process whose command line names the domain.
pub fn qemu_pid(id: DomainId) -> Option<Pid> {
    let id = id.to_string();
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .find_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let command = std::fs::read(entry.path().join("cmdline")).ok()?;
            let mut args = command.split(|byte| *byte == 0);
            let ours = args.any(|arg| arg == b"-uuid") && args.next() == Some(id.as_bytes());
            ours.then(|| Pid::from_raw(pid)).flatten()
        })
}

/// What Xen calls the domain.
#[cfg(feature = "xen")]
pub fn xen_name(id: DomainId) -> String {
    format!("xbee-{}", &id.simple().to_string()[..8])
}

/// What Xen's own tool says; `None`: it fails.
#[cfg(feature = "xen")]
pub fn xl(args: &[&str]) -> Option<String> {
    let output = std::process::Command::new("xl")
        .args(args)
        .output()
        .unwrap();
    if !output.status.success() {
        println!("xl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        return None;
    }
    Some(String::from_utf8(output.stdout).unwrap())
}

/// The boot sector of a Linux kernel, as far as it is looked at.
fn bzimage_header() -> Vec<u8> {
    let mut header = vec![0; 1024];
    header[0x1fe..0x200].copy_from_slice(b"\x55\xaa");
    header[0x202..0x206].copy_from_slice(b"HdrS");
    header
}

/// A disk with a boot loader, as far as it is looked at.
fn boot_sector() -> Vec<u8> {
    let mut disk = vec![0; 1 << 20];
    disk[510..512].copy_from_slice(b"\x55\xaa");
    disk
}

/// What `list` says of a domain.
pub async fn state(hypervisor: &dyn Hypervisor, id: DomainId) -> Option<DomainState> {
    let list = hypervisor.list().await.unwrap();
    list.into_iter()
        .find(|info| info.id == id)
        .map(|info| info.state)
}

struct Images {
    /// Of the kernel.
    directory: PathBuf,
    kernel: PathBuf,
    base: PathBuf,
}

/// The images; `None`, and a printed reason, where they are missing.
fn images() -> Option<Images> {
    let home = std::env::var_os("HOME")
        .map(PathBuf::from)
        .unwrap_or_default();
    let images = std::env::var_os("XBEE_IMAGES")
        .map_or_else(|| home.join(".cache/xbee/images"), PathBuf::from);
    let directory = images.join("kernel");
    let kernel = directory.join("vmlinux");
    let base = images.join("base/initramfs.cpio");
    for path in [&kernel, &base] {
        if !path.exists() {
            println!("skipped: {} is missing (make images)", path.display());
            return None;
        }
    }
    Some(Images {
        directory,
        kernel,
        base,
    })
}

fn initramfs_with_test(base: &Path, kernel: &Path) -> Vec<u8> {
    let mut archive = std::fs::read(base).unwrap();
    archive.resize(archive.len().next_multiple_of(4), 0);
    let mut writer = xbee_initramfs::Writer::new(archive);
    writer.file("init", 0o755, INIT.as_bytes()).unwrap();
    writer.dir("test", 0o755).unwrap();
    // What the power button needs, and what gives memory back.
    let modules = ["button.ko", "evdev.ko", "virtio_balloon.ko"];
    for (index, name) in modules.iter().enumerate() {
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
