//! Real guests for the tests: a switch process, QEMU by software emulation, and a static `/init`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use xbee_vswitch::control::{Client, ClientError};
use xbee_vswitch::ether::{CardSpec, UplinkSpec};
use xbee_vswitch::programs::ProgramsSpec;
use xbee_vswitch::switch::{DomainSpec, DomainStatus};

/// Modules the guest needs, in the order they are loaded.
const MODULES: [&str; 8] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
];

/// What a guest is booted from.
#[derive(Clone)]
pub struct Boot {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Boot {
    /// Builds the guest in `dir` from the kernel of `make images`. `None`, with a printed reason,
    /// where a part is missing.
    pub fn new(dir: &Path) -> Option<Self> {
        let images = std::env::var_os("XBEE_IMAGES").map_or_else(
            || {
                let home = std::env::var_os("HOME").unwrap_or_default();
                let cache = std::env::var_os("XDG_CACHE_HOME")
                    .map_or_else(|| PathBuf::from(home).join(".cache"), PathBuf::from);
                cache.join("xbee/images")
            },
            PathBuf::from,
        );
        let kernel = images.join("kernel/vmlinux");
        if !kernel.exists() {
            println!(
                "skipped: {} is not there; run `make images`",
                kernel.display()
            );
            return None;
        }
        if Command::new("qemu-system-x86_64")
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .is_err()
        {
            println!("skipped: qemu-system-x86_64 is not installed");
            return None;
        }
        let init = dir.join("init");
        let built = Command::new("rustc")
            .args(["--edition", "2024", "-O", "-C", "panic=abort"])
            .args(["-C", "strip=symbols"])
            .args(["--target", "x86_64-unknown-linux-musl", "-o"])
            .arg(&init)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/init.rs"))
            .status()
            .unwrap();
        assert!(built.success(), "the guest's init does not build");
        let mut cpio = Vec::new();
        entry(&mut cpio, "dev", 0o040_755, (0, 0), &[]);
        entry(&mut cpio, "dev/console", 0o020_600, (5, 1), &[]);
        entry(&mut cpio, "modules", 0o040_755, (0, 0), &[]);
        entry(
            &mut cpio,
            "init",
            0o100_755,
            (0, 0),
            &std::fs::read(&init).unwrap(),
        );
        let modules = images.join("kernel/lib/modules");
        if modules.exists() {
            for (i, name) in MODULES.iter().enumerate() {
                // A module may be built in.
                if let Some(module) = read_module(&modules, name) {
                    entry(
                        &mut cpio,
                        &format!("modules/{i}-{name}.ko"),
                        0o100_644,
                        (0, 0),
                        &module,
                    );
                }
            }
        }
        entry(&mut cpio, "TRAILER!!!", 0, (0, 0), &[]);
        let initramfs = dir.join("initramfs");
        std::fs::write(&initramfs, cpio).unwrap();
        Some(Self { kernel, initramfs })
    }
}

/// Appends a file to a cpio archive in the "newc" format.
fn entry(cpio: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
    let fields = [
        cpio.len() as u32, // inode: anything unique
        mode,
        0,
        0,
        1,
        0,
        content.len() as u32,
        0,
        0,
        device.0,
        device.1,
        name.len() as u32 + 1,
        0,
    ];
    cpio.extend_from_slice(b"070701");
    for field in fields {
        cpio.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    cpio.extend_from_slice(name.as_bytes());
    cpio.push(0);
    pad(cpio);
    cpio.extend_from_slice(content);
    pad(cpio);
}

fn pad(cpio: &mut Vec<u8>) {
    while !cpio.len().is_multiple_of(4) {
        cpio.push(0);
    }
}

fn read_module(dir: &Path, name: &str) -> Option<Vec<u8>> {
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_string_lossy().into_owned();
            let plain = file.replace('-', "_");
            if path.is_dir() && !path.is_symlink() {
                pending.push(path);
            } else if plain == format!("{name}.ko") {
                return Some(std::fs::read(path).unwrap());
            } else if plain == format!("{name}.ko.xz") {
                let out = Command::new("xz").arg("-dc").arg(path).output().unwrap();
                assert!(out.status.success());
                return Some(out.stdout);
            }
        }
    }
    None
}

/// A running `vswitch`.
pub struct Switch {
    runtime: tokio::runtime::Runtime,
    client: Option<Client>,
    pub dir: TempDir,
}

impl Switch {
    pub fn start() -> Self {
        let mut switch = Self {
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
            client: None,
            dir: tempfile::tempdir().unwrap(),
        };
        switch.start_again();
        switch
    }

    /// Starts a switch in the place of one that has died.
    pub fn start_again(&mut self) {
        let client = self
            .runtime
            .block_on(Client::spawn(
                Path::new(env!("CARGO_BIN_EXE_vswitch")),
                &self.control(),
                &self.dir.path().join("log"),
            ))
            .unwrap();
        self.client = Some(client);
    }

    pub fn stop(&mut self) {
        let client = self.client.take().unwrap();
        self.runtime.block_on(client.stop()).unwrap();
        eventually("the switch ends", || !self.control().exists());
    }

    pub fn control(&self) -> PathBuf {
        self.dir.path().join("control")
    }

    pub fn uds(&self, cid: u32) -> PathBuf {
        self.dir.path().join(format!("{cid}.uds"))
    }

    pub fn spec(&self, cid: u32, owner: &str) -> DomainSpec {
        DomainSpec {
            cid,
            vhost_socket: self.dir.path().join(format!("{cid}.vhost")),
            uds: self.uds(cid),
            owner: owner.into(),
            uid: None,
        }
    }

    pub fn add(&mut self, cid: u32, owner: &str) -> Result<(), ClientError> {
        self.add_spec(self.spec(cid, owner))
    }

    pub fn add_spec(&mut self, spec: DomainSpec) -> Result<(), ClientError> {
        let client = self.client.as_mut().unwrap();
        self.runtime.block_on(client.add(spec))
    }

    pub fn remove(&mut self, cid: u32) -> Result<(), ClientError> {
        let client = self.client.as_mut().unwrap();
        self.runtime.block_on(client.remove(cid))
    }

    pub fn attach(&mut self, card: CardSpec) -> Result<(), ClientError> {
        let client = self.client.as_mut().unwrap();
        self.runtime.block_on(client.attach_interface(card))
    }

    pub fn attach_uplink(&mut self, uplink: UplinkSpec) -> Result<(), ClientError> {
        let client = self.client.as_mut().unwrap();
        self.runtime.block_on(client.attach_uplink(uplink))
    }

    pub fn detach(&mut self, cid: u32, mac: [u8; 6]) -> Result<(), ClientError> {
        let client = self.client.as_mut().unwrap();
        self.runtime.block_on(client.detach_interface(cid, mac))
    }

    /// Serves host programs at a new socket in the switch's directory, which it opens to all users.
    pub fn serve_programs(&mut self) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let everybody = |path: &Path, mode| {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(path, mode).unwrap();
        };
        everybody(self.dir.path(), 0o755);
        let path = self.dir.path().join("programs");
        // One of before.
        let _ = std::fs::remove_file(&path);
        let socket = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
        rustix::net::bind(&socket, &address).unwrap();
        everybody(&path, 0o666);
        let spec = ProgramsSpec {
            users_end: 1 << 31,
            unknown_user: 65534,
            reserved_ports: vec![22594],
        };
        let client = self.client.as_mut().unwrap();
        self.runtime
            .block_on(client.serve_programs(spec, socket.as_fd()))
            .unwrap();
        path
    }

    pub fn end_programs(&mut self) {
        let client = self.client.as_mut().unwrap();
        self.runtime.block_on(client.end_programs()).unwrap();
    }

    pub fn list(&mut self) -> Vec<DomainStatus> {
        let client = self.client.as_mut().unwrap();
        self.runtime.block_on(client.list()).unwrap()
    }

    /// The switch's process, by what holds the lock of its control socket.
    pub fn pid(&self) -> u32 {
        let stream = UnixStream::connect(self.control()).unwrap();
        rustix::net::sockopt::socket_peercred(&stream)
            .unwrap()
            .pid
            .as_raw_nonzero()
            .get() as u32
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// Adds a domain and boots its guest.
    pub fn boot(&mut self, boot: &Boot, cid: u32, owner: &str) -> Guest {
        self.add(cid, owner).unwrap();
        Guest::start(boot, &self.spec(cid, owner))
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- vswitch's log:\n{}", self.log());
        }
        if let Some(client) = self.client.take() {
            let pid = self.pid();
            let stopped = self.runtime.block_on(client.stop());
            if !std::thread::panicking() {
                stopped.unwrap();
                // At once: the process must end even if its directory is gone before it does.
                std::fs::remove_dir_all(self.dir.path()).unwrap();
                eventually("the switch's process ends", || {
                    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
                    stat.map_or(true, |s| s.contains(") Z "))
                });
            }
        }
    }
}

/// A running guest.
pub struct Guest {
    pub qemu: Child,
    pub uds: PathBuf,
    is_ready: std::sync::Mutex<std::sync::mpsc::Receiver<()>>,
}

impl Guest {
    /// Boots a guest whose vsock device is served at the sockets of `spec`.
    pub fn start(boot: &Boot, spec: &DomainSpec) -> Self {
        let qemu = std::env::var_os("XBEE_QEMU").unwrap_or("qemu-system-x86_64".into());
        let mut qemu = Command::new(qemu)
            .args(["-M", "q35,memory-backend=mem", "-m", "256"])
            // QEMU 7.2.22 emulates cmpxchg16b with wrong flags: 6.12 kernels crash at random.
            .args(["-cpu", "max,-cx16"])
            .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on"])
            .args(["-nodefaults", "-display", "none", "-action", "panic=none"])
            .args(["-serial", "stdio"])
            .arg("-kernel")
            .arg(&boot.kernel)
            .arg("-initrd")
            .arg(&boot.initramfs)
            .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"])
            .arg("-chardev")
            .arg(format!("socket,id=vs,path={}", spec.vhost_socket.display()))
            .args(["-device", "vhost-user-vsock-pci,chardev=vs"])
            .arg("-qmp")
            .arg(format!(
                "unix:{}.qmp,server=on,wait=off",
                spec.uds.display()
            ))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let console = BufReader::new(qemu.stdout.take().unwrap());
        let (ready, is_ready) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in console.lines().map_while(Result::ok) {
                println!("guest: {line}");
                if line.contains("guest ready") {
                    // The test may have ended, and a guest that reboots says it twice.
                    let _ = ready.send(());
                }
            }
        });
        let guest = Self {
            qemu,
            uds: spec.uds.clone(),
            is_ready: is_ready.into(),
        };
        guest.wait_ready();
        guest
    }

    /// Waits until the guest's init listens.
    pub fn wait_ready(&self) {
        self.is_ready
            .lock()
            .unwrap()
            .recv_timeout(Duration::from_secs(120))
            .expect("the guest did not come up");
    }

    /// Has QEMU do something (QEMU Machine Protocol).
    pub fn qmp(&self, command: &str) {
        let path = format!("{}.qmp", self.uds.display());
        let stream = UnixStream::connect(path).unwrap();
        let mut answers = BufReader::new(&stream).lines();
        let mut say = |command: &str| {
            writeln!(&stream, "{{\"execute\":\"{command}\"}}").unwrap();
            loop {
                let answer = answers.next().unwrap().unwrap();
                assert!(!answer.contains("\"error\""), "{answer}");
                if answer.contains("\"return\"") {
                    return;
                }
            }
        };
        say("qmp_capabilities");
        say(command);
    }

    /// Connects to a port of the guest; `None` where it refuses.
    pub fn connect(&self, port: u32) -> Option<UnixStream> {
        let mut stream = UnixStream::connect(&self.uds).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        stream
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        let answer = read_line(&mut stream);
        if answer.is_empty() {
            return None;
        }
        assert!(answer.starts_with("OK "), "{answer}");
        Some(stream)
    }

    /// Gives the guest a command.
    pub fn command(&self, command: &str) -> UnixStream {
        let mut stream = self.connect(1000).expect("the guest refused");
        writeln!(stream, "{command}").unwrap();
        stream
    }

    /// Listens where the guest's connections to the host's `port` come.
    pub fn listen(&self, port: u32) -> UnixListener {
        let path = format!("{}_{port}", self.uds.display());
        UnixListener::bind(path).unwrap()
    }

    /// Kills QEMU as a crash would.
    pub fn kill(&mut self) {
        self.qemu.kill().unwrap();
        self.qemu.wait().unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Fails where the test killed it already.
        let _ = self.qemu.kill();
        self.qemu.wait().unwrap();
    }
}

pub fn read_line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

pub fn read_all(stream: &mut UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// The byte stream both sides know; the guest has the same.
pub struct Pattern(pub u64);

impl Pattern {
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for b in bytes {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            *b = (self.0 >> 24) as u8;
        }
    }

    /// Writes `len` bytes and ends the direction.
    pub fn send(self, stream: &UnixStream, len: u64) {
        self.send_in(stream, len, 1 << 20);
    }

    /// The same in writes of `chunk` bytes.
    pub fn send_in(mut self, mut stream: &UnixStream, len: u64, chunk: usize) {
        let mut buffer = vec![0; chunk];
        let mut left = len;
        while left > 0 {
            let n = left.min(buffer.len() as u64) as usize;
            self.fill(&mut buffer[..n]);
            stream.write_all(&buffer[..n]).unwrap();
            left -= n as u64;
        }
        stream.shutdown(std::net::Shutdown::Write).unwrap();
    }

    /// Reads to the end; exactly `len` bytes of the pattern must come.
    pub fn expect(mut self, stream: &UnixStream, len: u64) {
        let mut stream = stream;
        let mut buffer = vec![0; 1 << 20];
        let mut expected = vec![0; 1 << 20];
        let mut at = 0;
        loop {
            let n = stream.read(&mut buffer).unwrap();
            if n == 0 {
                break;
            }
            self.fill(&mut expected[..n]);
            assert!(
                buffer[..n] == expected[..n],
                "bytes differ in the {n} from {at}"
            );
            at += n as u64;
        }
        assert_eq!(at, len);
    }
}

/// Waits for what must come true soon.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < until, "not within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Counts a process's threads and open files.
pub fn resources(pid: u32) -> (usize, usize) {
    let count = |what| {
        std::fs::read_dir(format!("/proc/{pid}/{what}"))
            .unwrap()
            .count()
    };
    (count("task"), count("fd"))
}
