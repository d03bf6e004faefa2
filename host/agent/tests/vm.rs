//! The agent in real guests: PID 1, module loading, mounting, handing over to an init, switching
//! off. Needs QEMU and the images of `make images`; without them it says so and is skipped.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use common::{SECRET, gone_text, run, shell, workspace_binary};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::timeout;
use xbee_agent::protocol::{
    AGENT_VSOCK_PORT, BOOT_CONFIG_PATH, BootConfig, EndCause, ExitStatus, GENERATION, MountRoot,
    Phase, StartMode, Transport, Uuid, code,
};
use xbee_agent::{Agent, Event, ExecSpec, FileMeta, Resume};
use xbee_vswitch::control::Client;
use xbee_vswitch::switch::DomainSpec;

const LIMIT: Duration = Duration::from_secs(120);

/// Where the images are, or why the test is skipped.
fn images() -> Option<PathBuf> {
    let cache = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    let images = std::env::var_os("XBEE_IMAGES")
        .map(PathBuf::from)
        .or_else(|| {
            let cache = std::env::var_os("XDG_CACHE_HOME")
                .map(PathBuf::from)
                .or_else(cache)?;
            Some(cache.join("xbee/images"))
        })?;
    for image in [
        "kernel/vmlinux",
        "base/initramfs.cpio",
        "povray/root.img",
        "server/root.img",
    ] {
        if !images.join(image).exists() {
            println!(
                "skipped: {} is not there; run `make images`",
                images.join(image).display()
            );
            return None;
        }
    }
    Some(images)
}

/// A guest and the switch that it talks through.
struct Vm {
    dir: TempDir,
    qemu: Child,
    listener: UnixListener,
    booted: Instant,
}

impl Vm {
    async fn boot(images: &Path, disk: Option<&str>) -> Vm {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let program = match std::env::var_os("XBEE_VSWITCH") {
            Some(path) => path.into(),
            None => workspace_binary(&["--workspace", "--bins"], "debug/vswitch"),
        };
        let mut switch = Client::spawn(&program, &at("control"), &at("switch.log"))
            .await
            .unwrap();
        let listener = UnixListener::bind(at(&format!("uds_{AGENT_VSOCK_PORT}"))).unwrap();
        let domain = DomainSpec {
            cid: 7,
            vhost_socket: at("vhost"),
            uds: at("uds"),
            owner: String::new(),
            uid: None,
        };
        switch.add(domain).await.unwrap();

        let config = BootConfig {
            generation: GENERATION,
            domain: Uuid::from_u128(42),
            hostname: "guest-1".into(),
            secret: SECRET,
            transport: Transport::Vsock {
                port: AGENT_VSOCK_PORT,
            },
            network: None,
        };
        // The agent under test, in place of the image's.
        let mut archive = xbee_initramfs::Writer::new(Vec::new());
        let agent = std::fs::read(common::binary()).unwrap();
        archive.file("xbee/xbeinstd", 0o755, &agent).unwrap();
        archive
            .file(
                BOOT_CONFIG_PATH.trim_start_matches('/'),
                0o600,
                &config.encode(),
            )
            .unwrap();
        let mut initramfs = std::fs::read(images.join("base/initramfs.cpio")).unwrap();
        initramfs.extend(archive.finish().unwrap());
        std::fs::write(at("initramfs"), initramfs).unwrap();

        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-M",
            "q35,memory-backend=mem",
            "-m",
            "256",
            "-cpu",
            "max,-cx16",
        ])
        .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on"])
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .args([
            "-append",
            "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check random.trust_cpu=1",
        ])
        .args(["-device", "vhost-user-vsock-pci,chardev=vs"])
        .arg("-serial")
        .arg(format!("file:{}", at("console").display()))
        .arg("-kernel")
        .arg(images.join("kernel/vmlinux"))
        .arg("-initrd")
        .arg(at("initramfs"))
        .arg("-chardev")
        .arg(format!("socket,id=vs,path={}", at("vhost").display()));
        if let Some(disk) = disk {
            let disk = images.join(disk);
            qemu.arg("-drive")
                .arg(format!(
                    "file={},format=raw,if=none,id=disk,snapshot=on",
                    disk.display()
                ))
                .args(["-device", "virtio-blk-pci,drive=disk"]);
        }
        let qemu = qemu
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Vm {
            dir,
            qemu,
            listener,
            booted: Instant::now(),
        }
    }

    fn console(&self) -> String {
        let bytes = std::fs::read(self.dir.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    async fn connect(&self, resume: Resume) -> (Agent, mpsc::Receiver<Event>) {
        let accepted = timeout(LIMIT, self.listener.accept()).await;
        let Ok(stream) = accepted else {
            panic!("the agent does not come:\n{}", self.console())
        };
        Agent::connect(stream.unwrap().0, &SECRET, resume)
            .await
            .unwrap()
    }

    /// Switches the guest off through its agent.
    async fn shut_down(&mut self, agent: Agent, grace: Duration) {
        let started = Instant::now();
        agent.shutdown(grace).await.unwrap();
        let ended = timeout(LIMIT, self.qemu.wait()).await;
        let Ok(status) = ended else {
            panic!("it stays on:\n{}", self.console())
        };
        assert!(status.unwrap().success());
        println!(
            "switched off after {:?}\n{}",
            started.elapsed(),
            self.console()
        );
        assert!(!self.console().contains("panic"), "{}", self.console());
    }
}

impl Drop for Vm {
    /// The switch outlives who started it: it is stopped when a test fails, too.
    fn drop(&mut self) {
        let stopped =
            UnixStream::connect(self.dir.path().join("control")).and_then(|mut control| {
                control.set_read_timeout(Some(LIMIT))?;
                control.write_all(b"{\"op\":\"stop\"}\n")?;
                // It takes the answer's being read for the request's being meant.
                control.read(&mut [0; 64])
            });
        if let Err(error) = stopped {
            println!("the switch is left behind: {error}");
        }
    }
}

async fn exec(agent: &Agent, script: &str) -> String {
    let argv = ["/bin/sh", "-c", script].map(String::from).into();
    let mut process = agent
        .exec(ExecSpec {
            argv,
            ..ExecSpec::default()
        })
        .await
        .unwrap();
    let mut text = String::new();
    let mut stdout = process.stdout.take().unwrap();
    timeout(LIMIT, stdout.read_to_string(&mut text))
        .await
        .unwrap()
        .unwrap();
    let mut errors = String::new();
    process
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut errors)
        .await
        .unwrap();
    let status = process.wait().await.unwrap();
    assert_eq!(
        (status, errors.as_str()),
        (ExitStatus::Code(0), ""),
        "{script}: {text}"
    );
    text
}

#[tokio::test]
async fn without_a_disk_the_agent_is_all_there_is() {
    let Some(images) = images() else { return };
    let mut vm = Vm::boot(&images, None).await;
    let (agent, mut events) = vm.connect(Resume::default()).await;
    println!(
        "agent there after {:?}: {:?}",
        vm.booted.elapsed(),
        agent.hello()
    );
    assert_eq!(agent.hello().phase, Phase::Initramfs);
    assert_eq!(agent.start(StartMode::Auto).await.unwrap().init, None);
    let began = Instant::now();
    let outcome = run(
        &agent,
        &mut events,
        shell("echo $$ $(hostname); ls /xbee; exit 3"),
    )
    .await;
    println!("task done in {:?}", began.elapsed());
    assert!(outcome.text().contains(" guest-1\n"), "{outcome:?}");
    assert!(
        !outcome.text().contains("boot"),
        "the secret is still there: {outcome:?}"
    );
    assert_eq!(outcome.end.unwrap().status, ExitStatus::Code(3));
    assert!(
        exec(&agent, "ip addr show lo 2>&1 || ifconfig lo")
            .await
            .contains("127.0.0.1")
    );
    // Its name has the mark that keeps it from being killed early at shutdown.
    assert_eq!(
        exec(&agent, "tr '\\0' ' ' < /proc/1/cmdline").await,
        "@init "
    );

    // All of the tree, through a control group: the last one has even lost its mark.
    let task = shell(
        "sleep 1001 & (setsid env -i /bin/sh -c 'trap \"\" TERM; sleep 1002; sleep 1003' &) ; \
         cat /proc/self/cgroup; echo ready; wait",
    );
    let conversation = task.conversation;
    agent.execute(task).await.unwrap();
    let mut text = String::new();
    while !text.contains("ready") {
        match timeout(LIMIT, events.recv()).await.unwrap().unwrap() {
            Event::Output { data, .. } => text.push_str(std::str::from_utf8(&data).unwrap()),
            other => panic!("{other:?}"),
        }
    }
    assert!(text.contains(&format!("0::/xbee-{conversation}")), "{text}");
    agent
        .terminate_task(conversation, Duration::from_millis(500))
        .await
        .unwrap();
    match timeout(LIMIT, events.recv()).await.unwrap().unwrap() {
        Event::Exited { exited, .. } => assert_eq!(exited.cause, Some(EndCause::Terminated)),
        other => panic!("{other:?}"),
    }
    gone_text(&exec(&agent, "ps").await, "sleep");
    assert_eq!(
        exec(&agent, "ls -d /sys/fs/cgroup/xbee-* 2>/dev/null | wc -l")
            .await
            .trim(),
        "0"
    );

    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000);
    agent.time_sync(then).await.unwrap();
    assert!(exec(&agent, "date +%s").await.starts_with("20000000"));
    agent.reseed().await.unwrap();
    let stats = agent.stats().await.unwrap();
    println!("{stats:?}");
    assert!(stats.agent_resident_kib < 4096, "{stats:?}");
    let error = agent.mount_root(MountRoot::default()).await.unwrap_err();
    assert_eq!(error.code(), code::WRONG_STATE);
    vm.shut_down(agent, Duration::from_secs(5)).await;
}

#[tokio::test]
async fn an_image_without_an_init_is_the_root_of_tasks() {
    let Some(images) = images() else { return };
    let mut vm = Vm::boot(&images, Some("povray/root.img")).await;
    let (agent, mut events) = vm.connect(Resume::default()).await;
    println!("agent there after {:?}", vm.booted.elapsed());
    let root = agent.mount_root(MountRoot::default()).await.unwrap();
    println!("mounted after {:?}: {root:?}", vm.booted.elapsed());
    assert_eq!(
        (root.fs_type.as_str(), root.init.as_deref()),
        ("ext4", None)
    );
    assert_eq!(
        agent.mount_root(MountRoot::default()).await.unwrap(),
        root,
        "a repetition"
    );
    let meta = FileMeta {
        path: "/work/in".into(),
        mode: 0o644,
        ..FileMeta::default()
    };
    agent.put_file(meta, &b"staged\n"[..]).await.unwrap();
    assert_eq!(
        agent.start(StartMode::Init).await.unwrap_err().code(),
        code::NO_INIT
    );
    assert_eq!(agent.start(StartMode::Auto).await.unwrap().init, None);
    let mut task = shell("cat; grep ' / ' /proc/mounts; ls /dev/null; tty; df -m /tmp | tail -1");
    task.stdin = Some("in".into());
    task.stdout = Some("out".into());
    task.working_directory = Some("/work".into());
    let outcome = run(&agent, &mut events, task).await;
    println!("{}", outcome.text());
    assert!(outcome.text().starts_with("staged\n"), "{outcome:?}");
    assert!(outcome.text().contains("/dev/vda / ext4"), "{outcome:?}");
    let mut back = Vec::new();
    agent
        .get_file("/work/out", &mut back, 1 << 20)
        .await
        .unwrap();
    assert_eq!(back, outcome.stdout);
    // Another connection finds everything as it was.
    drop((agent, events));
    let (agent, _events) = vm.connect(Resume::default()).await;
    assert_eq!(agent.hello().phase, Phase::Started);
    assert_eq!(agent.mount_root(MountRoot::default()).await.unwrap(), root);
    assert!(agent.forward(1).await.is_err());
    vm.shut_down(agent, Duration::from_secs(5)).await;
}

#[tokio::test]
async fn an_image_with_an_init_boots_it_with_the_agent_beside() {
    let Some(images) = images() else { return };
    let mut vm = Vm::boot(&images, Some("server/root.img")).await;
    let (agent, mut events) = vm.connect(Resume::default()).await;
    let root = agent.mount_root(MountRoot::default()).await.unwrap();
    println!("mounted after {:?}: {root:?}", vm.booted.elapsed());
    assert_eq!(root.os_id.as_deref(), Some("debian"));
    let meta = FileMeta {
        path: "/srv/staged".into(),
        mode: 0o644,
        ..FileMeta::default()
    };
    agent
        .put_file(meta, &b"before the services\n"[..])
        .await
        .unwrap();
    let started = agent.start(StartMode::Auto).await.unwrap();
    assert_eq!(started.init, root.init);
    assert!(started.init.is_some());
    // The same connection goes on: it survived the hand-over.
    assert_eq!(
        exec(&agent, "cat /srv/staged").await,
        "before the services\n"
    );
    assert!(
        exec(&agent, "readlink /proc/1/exe")
            .await
            .ends_with("/systemd\n")
    );
    // The bus is not there at once.
    let script = "until systemctl is-system-running --wait 2>/dev/null | grep -x -e running -e degraded; \
                  do sleep 0.2; done; systemctl --failed --no-legend";
    let outcome = run(&agent, &mut events, shell(script)).await;
    println!("system after {:?}: {}", vm.booted.elapsed(), outcome.text());
    assert_eq!(outcome.text(), "running\n");
    let mut tunnel = agent.forward(22).await.unwrap();
    let mut banner = [0; 4];
    timeout(LIMIT, tunnel.read_exact(&mut banner))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&banner, b"SSH-");
    drop(tunnel);
    println!("{:?}", agent.stats().await.unwrap());
    vm.shut_down(agent, Duration::from_secs(90)).await;
}
