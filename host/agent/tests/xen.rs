//! The agent in a guest of a real Xen: over a vchan, over TCP where the guest has none, through
//! saving and restoring, and when Xen's tool stack switches the guest off. Needs root in domain 0,
//! `xl`, the bridge `xenbr0` and the images of `make images` in the directory that `XBEE_IMAGES`
//! names; without them it says so and is skipped. One at a time: `--test-threads=1`.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{SECRET, run, shell, task};
use rustix::event::{PollFd, PollFlags, poll};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use xbee_agent::protocol::{
    BOOT_CONFIG_PATH, BootConfig, ExitStatus, GENERATION, MountRoot, Network, StartMode, Transport,
    Uuid,
};
use xbee_agent::{Agent, Event, ExecSpec, Resume};
use xbee_link::vchan::Vchan;
use xbee_link::xenstore::Xenstore;

const LIMIT: Duration = Duration::from_secs(120);
const PATH: &str = "data/xbee/agent";
const PORT: u16 = 22594;
const MAC: [u8; 6] = [0x00, 0x16, 0x3e, 0x58, 0x45, 0x01];
/// In the network of the bridge.
const ADDRESS: &str = "fd58:454e::5845";

/// A guest. Destroyed on drop.
struct Guest {
    name: String,
    dir: TempDir,
    store: Xenstore,
    booted: Instant,
}

impl Guest {
    /// With further files in its initial RAM file system; `None` where it cannot be tested here.
    fn boot(name: &str, disk: Option<&str>, files: &[(&str, &[u8])]) -> Option<Guest> {
        let capabilities = fs::read_to_string("/proc/xen/capabilities").unwrap_or_default();
        if !capabilities.contains("control_d") {
            println!("skipped: not domain 0 of a Xen");
            return None;
        }
        let images = PathBuf::from(std::env::var_os("XBEE_IMAGES").unwrap_or_default());
        let base = images.join("base/initramfs.cpio");
        if !base.exists() {
            println!("skipped: no {} (XBEE_IMAGES)", base.display());
            return None;
        }
        let config = BootConfig {
            generation: GENERATION,
            domain: Uuid::from_u128(42),
            hostname: "guest-1".into(),
            secret: SECRET,
            transport: Transport::Xen {
                path: PATH.into(),
                port: PORT,
            },
            network: Some(Network {
                mac: MAC,
                address: ADDRESS.parse().unwrap(),
                prefix_length: 64,
                gateway: Some(ADDRESS.replace("5845", "1").parse().unwrap()),
            }),
        };
        let mut archive = xbee_initramfs::Writer::new(Vec::new());
        let boot = BOOT_CONFIG_PATH.trim_start_matches('/');
        archive.file(boot, 0o600, &config.encode()).unwrap();
        // The agent under test, in place of the image's.
        if let Some(agent) = std::env::var_os("XBEINSTD") {
            let agent = fs::read(agent).unwrap();
            archive.file("xbee/xbeinstd", 0o755, &agent).unwrap();
        }
        for (path, content) in files {
            archive.file(path, 0o644, content).unwrap();
        }
        let mut initramfs = fs::read(base).unwrap();
        initramfs.extend(archive.finish().unwrap());
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("initramfs"), initramfs).unwrap();
        let disk = disk.map_or(String::new(), |disk| {
            format!("disk=['format=raw,vdev=xvda,access=rw,target={disk}']\n")
        });
        let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
        let text = format!(
            "name='{name}'\ntype='pvh'\nkernel='{}'\nramdisk='{}'\nmemory=192\nvcpus=1\n\
             extra='console=hvc0 quiet panic=-1'\non_crash='destroy'\non_poweroff='destroy'\n\
             vif=['mac={mac},bridge=xenbr0']\n{disk}",
            images.join("kernel/vmlinux").display(),
            dir.path().join("initramfs").display(),
        );
        fs::write(dir.path().join("xl.cfg"), text).unwrap();
        let guest = Guest {
            name: name.into(),
            store: Xenstore::open().unwrap(),
            booted: Instant::now(),
            dir,
        };
        guest.xl(&["create", "-q", &guest.file("xl.cfg")]).unwrap();
        guest.admit(&mac);
        Some(guest)
    }

    /// Tells the firewall who it is, as `xbed` does with what it starts.
    fn admit(&self, mac: &str) {
        let port = format!("vif{}.0", self.id());
        let address: Ipv6Addr = ADDRESS.parse().unwrap();
        for (set, element) in [
            ("macs", mac.to_owned()),
            ("addresses", address.to_string()),
            ("targets", format!("{:#034x}", u128::from(address))),
        ] {
            let element = format!("{{ {port} . {element} }}");
            let added = Command::new("nft")
                .args(["add", "element", "bridge", "xenbee", set, &element])
                .status()
                .unwrap();
            assert!(added.success(), "{set}: {element}");
        }
    }

    fn file(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn xl(&self, arguments: &[&str]) -> Result<String, String> {
        let out = Command::new("xl").args(arguments).output().unwrap();
        match out.status.success() {
            true => Ok(String::from_utf8(out.stdout).unwrap()),
            false => Err(String::from_utf8_lossy(&out.stderr).into_owned()),
        }
    }

    fn id(&self) -> u16 {
        let id = self.xl(&["domid", &self.name]).unwrap();
        id.trim().parse().unwrap()
    }

    fn console(&self) -> String {
        let path = format!("/var/log/xen/console/guest-{}.log", self.name);
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }

    async fn connect(&mut self) -> (Agent, mpsc::Receiver<Event>) {
        let id = self.id();
        let path = format!("/local/domain/{id}/{PATH}");
        let deadline = Instant::now() + LIMIT;
        let agent = loop {
            assert!(Instant::now() < deadline, "no agent:\n{}", self.console());
            let Some(vchan) = Vchan::connect(&mut self.store, id, &path).unwrap() else {
                sleep(Duration::from_millis(20)).await;
                continue;
            };
            let (ours, theirs) = UnixStream::pair().unwrap();
            std::thread::spawn(move || carry(vchan, theirs));
            ours.set_nonblocking(true).unwrap();
            let stream = tokio::net::UnixStream::from_std(ours).unwrap();
            match Agent::connect(stream, &SECRET, Resume::default()).await {
                Ok(agent) => break agent,
                // The channel of the connection before, which the agent is about to close.
                Err(xbee_agent::Error::Closed) => {}
                Err(error) => panic!("{error:?}:\n{}", self.console()),
            }
        };
        println!("  agent there {:.1} s after its start", self.seconds());
        agent
    }

    fn seconds(&self) -> f64 {
        self.booted.elapsed().as_secs_f64()
    }

    /// Waits until the domain is no more.
    async fn gone(&self) {
        let started = Instant::now();
        while self.xl(&["domid", &self.name]).is_ok() {
            assert!(
                started.elapsed() < LIMIT,
                "it stays on:\n{}",
                self.console()
            );
            sleep(Duration::from_millis(200)).await;
        }
        println!("  gone after {:.1} s", started.elapsed().as_secs_f64());
        let console = self.console();
        assert!(!console.contains("panic:"), "{console}");
        assert!(!console.contains("BUG"), "{console}");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have gone by itself.
        let _gone = self.xl(&["destroy", &self.name]);
    }
}

/// Between a channel and a socket, until one of them closes.
fn carry(mut vchan: Vchan, mut socket: UnixStream) {
    socket.set_nonblocking(true).unwrap();
    let mut buffer = vec![0; 64 * 1024];
    let (mut to_guest, mut to_host) = (Vec::new(), Vec::new());
    loop {
        vchan.acknowledge().unwrap();
        let mut moved = false;
        if to_guest.is_empty() {
            match socket.read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => to_guest.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
        match vchan.write(&to_guest) {
            Ok(length) => {
                moved |= length > 0;
                to_guest.drain(..length);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
        if to_host.is_empty() {
            match vchan.read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => to_host.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
        match socket.write(&to_host) {
            Ok(length) => {
                moved |= length > 0;
                to_host.drain(..length);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
        if !moved {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, to_guest.is_empty());
            flags.set(PollFlags::OUT, !to_host.is_empty());
            let mut fds = [
                PollFd::new(&vchan, PollFlags::IN),
                PollFd::new(&socket, flags),
            ];
            poll(&mut fds, None).unwrap();
        }
    }
}

async fn exec(agent: &Agent, script: &str) -> String {
    let argv = ["/bin/sh", "-c", script].map(String::from).into();
    let spec = ExecSpec {
        argv,
        ..ExecSpec::default()
    };
    let mut process = agent.exec(spec).await.unwrap();
    let mut text = String::new();
    let mut stdout = process.stdout.take().unwrap();
    timeout(LIMIT, stdout.read_to_string(&mut text))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(process.wait().await.unwrap(), ExitStatus::Code(0), "{text}");
    text
}

#[tokio::test]
async fn a_task_runs_and_a_fresh_connection_works_each_time() {
    let Some(mut guest) = Guest::boot("xbee-task", None, &[]) else {
        return;
    };
    let (agent, mut events) = guest.connect().await;
    assert_eq!(agent.start(StartMode::Auto).await.unwrap().init, None);
    let outcome = run(&agent, &mut events, task(&["/bin/echo", "over", "Xen"])).await;
    assert_eq!(outcome.text(), "over Xen\n");
    // More than the rings hold, each way.
    let outcome = run(
        &agent,
        &mut events,
        shell("dd if=/dev/zero bs=1024 count=2048 2>/dev/null"),
    )
    .await;
    assert_eq!(outcome.stdout.len(), 2 << 20);
    assert!(outcome.stdout.iter().all(|byte| *byte == 0));

    let modules = exec(&agent, "lsmod").await;
    assert!(!modules.contains("virtio"), "{modules}");
    drop((agent, events));
    for number in 0..5 {
        let (agent, _events) = guest.connect().await;
        assert_eq!(
            exec(&agent, &format!("echo {number}")).await,
            format!("{number}\n")
        );
        drop(agent);
    }
    let (agent, _events) = guest.connect().await;
    agent.shutdown(Duration::from_secs(2)).await.unwrap();
    guest.gone().await;
}

#[tokio::test]
async fn the_interface_has_its_address_at_once() {
    let Some(mut guest) = Guest::boot("xbee-net", None, &[]) else {
        return;
    };
    let (agent, _events) = guest.connect().await;
    let mut interfaces = String::new();
    let wanted = format!("{:032x}", u128::from(ADDRESS.parse::<Ipv6Addr>().unwrap()));
    let deadline = Instant::now() + LIMIT;
    while !interfaces.contains(&wanted) {
        assert!(
            Instant::now() < deadline,
            "{interfaces}\n{}",
            guest.console()
        );
        interfaces = exec(&agent, "cat /proc/net/if_inet6").await;
    }
    // The kernel reaches others and is reached: nobody listens, and it says so.
    let address = SocketAddrV6::new(ADDRESS.parse().unwrap(), 9, 0, 0);
    let refused = loop {
        match std::net::TcpStream::connect_timeout(&address.into(), Duration::from_secs(1)) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => break true,
            _ if Instant::now() > deadline => break false,
            _ => {}
        }
    };
    assert!(refused, "{}", exec(&agent, "ip -6 addr; ip -6 route").await);
    let line = interfaces.lines().find(|line| line.contains(&wanted));
    let fields: Vec<&str> = line.unwrap().split_whitespace().collect();
    // Prefix of 64 bits; permanent, and not tentative.
    assert_eq!((fields[2], fields[4]), ("40", "80"), "{interfaces}");
    let routes = exec(&agent, "ip -6 route").await;
    assert!(routes.contains("default via fd58:454e::1"), "{routes}");
}

#[tokio::test]
async fn the_tool_stack_switches_off_what_the_agent_runs() {
    let Some(mut guest) = Guest::boot("xbee-off", None, &[]) else {
        return;
    };
    let (agent, mut events) = guest.connect().await;
    let script = "trap 'echo asked to end >/dev/console; exit' TERM; echo ready; \
                  while :; do sleep 0.1; done";
    agent.execute(shell(script)).await.unwrap();
    let event = timeout(LIMIT, events.recv()).await.unwrap().unwrap();
    assert!(matches!(event, Event::Output { .. }), "{event:?}");
    guest.xl(&["shutdown", &guest.name]).unwrap();
    guest.gone().await;
    let console = guest.console();
    assert!(console.contains("asked to end"), "{console}");
}

#[tokio::test]
async fn a_guest_is_saved_with_a_channel_open_and_restored() {
    let Some(mut guest) = Guest::boot("xbee-save", None, &[]) else {
        return;
    };
    for time in 1..=3 {
        let (agent, mut events) = guest.connect().await;
        exec(&agent, &format!("echo {time} >/tmp/time")).await;
        let before = guest.id();
        let image = guest.file("saved");
        guest.xl(&["save", &guest.name, &image]).unwrap();
        // The agent closes the channel, if its kernel lets it hear in time; if not, silence tells.
        let lost = timeout(LIMIT, events.recv()).await;
        assert!(matches!(lost, Ok(Some(Event::Lost(_)))), "{lost:?}");
        println!("  {lost:?}");
        guest.xl(&["restore", &image]).unwrap();
        let restored = Instant::now();
        assert_ne!(guest.id(), before);
        let (agent, _events) = guest.connect().await;
        println!(
            "  back {:.1} s after the restore",
            restored.elapsed().as_secs_f64()
        );
        assert_eq!(exec(&agent, "cat /tmp/time").await, format!("{time}\n"));
        let messages = exec(&agent, "dmesg").await;
        for trouble in ["BUG", "WARNING", "Oops"] {
            assert!(!messages.contains(trouble), "{messages}");
        }
        drop(agent);
    }
}

#[tokio::test]
async fn without_channels_it_listens_for_tcp() {
    // All that the image loads but what grants memory.
    let images = PathBuf::from(std::env::var_os("XBEE_IMAGES").unwrap_or_default());
    let version = fs::read_to_string(images.join("kernel/version")).unwrap_or_default();
    let modules = format!(
        "/lib/modules/{}/kernel/drivers/net/xen-netfront.ko\n",
        version.trim()
    );
    let files = [("xbee/modules", modules.as_bytes())];
    let Some(mut guest) = Guest::boot("xbee-tcp", None, &files) else {
        return;
    };
    let node = format!("/local/domain/{}/{PATH}/ipv6", guest.id());
    for time in 0..2 {
        let deadline = Instant::now() + LIMIT;
        let stream = loop {
            assert!(Instant::now() < deadline, "no port:\n{}", guest.console());
            sleep(Duration::from_millis(50)).await;
            let Some(port) = guest.store.read(&node).unwrap() else {
                continue;
            };
            let address = format!("[{ADDRESS}]:{port}");
            if let Ok(stream) = tokio::net::TcpStream::connect(address).await {
                break stream;
            }
        };
        let connected = Agent::connect(stream, &SECRET, Resume::default()).await;
        let (agent, _events) = connected.unwrap();
        let text = exec(&agent, &format!("echo {time}")).await;
        assert_eq!(text, format!("{time}\n"));
    }
}

#[tokio::test]
async fn beside_an_init_the_agent_goes_on_and_the_init_switches_off() {
    if !PathBuf::from("/bin/busybox").exists() {
        println!("skipped: no busybox for a root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("root.img").display().to_string();
    let script = format!(
        "cd {}; mkdir -p root/bin root/sbin root/etc root/dev root/proc root/sys root/run root/tmp; \
         cp /bin/busybox root/bin; for a in sh cat sleep echo; do ln -s busybox root/bin/$a; done; \
         for a in init poweroff; do ln -s ../bin/busybox root/sbin/$a; done; \
         echo '::sysinit:/bin/echo init is here' >root/etc/inittab; \
         mke2fs -q -t ext4 -d root -r 1 -N 0 {disk} 32M",
        dir.path().display()
    );
    let made = Command::new("sh").args(["-euc", &script]).status().unwrap();
    assert!(made.success());
    let Some(mut guest) = Guest::boot("xbee-init", Some(&disk), &[]) else {
        return;
    };
    let (agent, _events) = guest.connect().await;
    let error = agent.mount_root(MountRoot::default()).await;
    if let Err(error) = error {
        panic!("{error:?}\n{}", guest.console());
    }
    let started = agent.start(StartMode::Init).await.unwrap();
    assert_eq!(started.init.as_deref(), Some("/sbin/init"));
    assert_eq!(exec(&agent, "echo on").await, "on\n");
    drop(agent);
    let (agent, _events) = guest.connect().await;
    assert_eq!(exec(&agent, "cat /proc/1/comm").await, "init\n");
    assert_eq!(
        exec(&agent, "cat /proc/sys/kernel/poweroff_cmd").await,
        "/sbin/poweroff\n"
    );
    guest.xl(&["shutdown", &guest.name]).unwrap();
    guest.gone().await;
}
