//! The vchan between domain 0 and a guest, on a real Xen. This program, linked statically, is both:
//! in domain 0 the tests, in the guest the first process, which does what the tests write to
//! xenstore. Needs root in domain 0, `xl`, `busybox`, and the kernel of `make images` in the directory
//! that `XBEE_IMAGES` names; without them it says so and is skipped.
//!
//! `cargo test -p xbee-link --test xen --target x86_64-unknown-linux-musl --no-run`

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use xbee_link::vchan::{RingSize, Vchan};
use xbee_link::xenstore::{Access, Xenstore};

/// What the guest is to do, and what it has done, below its own `data/`.
const ORDER: &str = "data/test/order";
const STATE: &str = "data/test/state";
const CHANNEL: &str = "data/test/channel";
/// Where domain 0 serves, for a guest.
const DOM0_CHANNEL: &str = "/local/domain/0/data/xbee-test";
const NAME: &str = "xbee-vchan";
const MODULES: [&str; 3] = ["xen-evtchn", "xen-gntalloc", "xen-gntdev"];
const LIMIT: Duration = Duration::from_secs(120);
const SEED: u64 = 42;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if std::process::id() == 1 {
        guest::first_process();
    } else if let [role, ring] = arguments.as_slice()
        && let Some(role) = role.strip_prefix("--guest-")
    {
        guest::echo(role, ring);
    } else {
        domain0(&arguments);
    }
}

/// A channel that waits.
struct Blocking(Vchan);

impl Blocking {
    fn wait(&self) -> io::Result<()> {
        let limit = Timespec {
            tv_sec: LIMIT.as_secs() as i64,
            tv_nsec: 0,
        };
        if poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&limit))? == 0 {
            return Err(ErrorKind::TimedOut.into());
        }
        self.0.acknowledge()
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait()?,
                result => return result,
            }
        }
    }

    fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.0.write(bytes) {
                Ok(length) => bytes = &bytes[length..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait()?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes and reads at once, as much of both as there is.
    fn exchange(&mut self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut received = vec![0; bytes.len()];
        let (mut sent, mut got) = (0, 0);
        while got < bytes.len() {
            let mut blocked = true;
            if sent < bytes.len() {
                match self.0.write(&bytes[sent..]) {
                    Ok(length) => (sent, blocked) = (sent + length, false),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            match self.0.read(&mut received[got..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(length) => (got, blocked) = (got + length, false),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if blocked {
                self.wait()?;
            }
        }
        Ok(received)
    }
}

/// Waits until a node's value is as wanted.
fn await_value(store: &mut Xenstore, path: &str, wanted: impl Fn(&str) -> bool) -> String {
    store.watch(path, path).unwrap();
    let deadline = Instant::now() + LIMIT;
    let value = loop {
        let value = store.read(path).unwrap().unwrap_or_default();
        if wanted(&value) {
            break value;
        }
        // What came with the reply the descriptor does not tell of.
        if store.next_event().unwrap().is_some() {
            continue;
        }
        let rest = deadline.saturating_duration_since(Instant::now());
        assert!(!rest.is_zero(), "{path} is still {value:?}");
        let limit = Timespec {
            tv_sec: rest.as_secs() as i64,
            tv_nsec: rest.subsec_nanos().into(),
        };
        poll(&mut [PollFd::new(&*store, PollFlags::IN)], Some(&limit)).unwrap();
    };
    store.unwatch(path, path).unwrap();
    value
}

fn bytes(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

fn ring(name: &str) -> RingSize {
    match name {
        "4k" => RingSize::Kib4,
        "1m" => RingSize::Mib1,
        _ => RingSize::Kib64,
    }
}

fn connect(store: &mut Xenstore, peer: u16, path: &str) -> Blocking {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(channel) = Vchan::connect(store, peer, path).unwrap() {
            return Blocking(channel);
        }
        assert!(Instant::now() < deadline, "nobody serves at {path}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The guest: init, and a process for each channel.
mod guest {
    use super::*;

    /// Loads what is needed and obeys: `ID serve RING`, `ID connect RING`, `ID kill`.
    pub(super) fn first_process() -> ! {
        for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
            fs::create_dir_all(target).unwrap();
            let flags = rustix::mount::MountFlags::empty();
            let _there_already = rustix::mount::mount(kind, target, kind, flags, c"");
        }
        for module in MODULES {
            let file = fs::File::open(format!("/{module}.ko")).unwrap();
            rustix::system::finit_module(&file, c"", 0).unwrap();
        }
        let mut store = Xenstore::open().unwrap();
        store.write(STATE, "ready").unwrap();
        let mut child: Option<Child> = None;
        let mut last = String::new();
        loop {
            let known = last.clone();
            last = await_value(&mut store, ORDER, |order| {
                !order.is_empty() && order != known
            });
            let mut words = last.split(' ');
            let (id, what) = (words.next().unwrap(), words.next().unwrap());
            if let Some(mut child) = child.take() {
                // What has ended already need not be killed.
                let _killed = child.kill();
                child.wait().unwrap();
            }
            if what != "kill" {
                let mut command = Command::new("/proc/self/exe");
                command.args([&format!("--guest-{what}"), words.next().unwrap()]);
                child = Some(command.spawn().unwrap());
            }
            store.write(STATE, &format!("{id} done")).unwrap();
        }
    }

    /// Sends back what comes until the peer closes.
    pub(super) fn echo(role: &str, size: &str) {
        let mut store = Xenstore::open().unwrap();
        let mut channel = if role == "serve" {
            Blocking(Vchan::serve(&mut store, 0, CHANNEL, ring(size)).unwrap())
        } else {
            connect(&mut store, 0, DOM0_CHANNEL)
        };
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let length = channel.read(&mut buffer).unwrap();
            if length == 0 {
                return;
            }
            if let Err(error) = channel.write_all(&buffer[..length]) {
                assert_eq!(error.kind(), ErrorKind::BrokenPipe);
                return;
            }
        }
    }
}

/// The guest as domain 0 sees it. Destroyed on drop.
struct Guest {
    store: Xenstore,
    id: u16,
    orders: u32,
    _dir: tempfile::TempDir,
}

impl Guest {
    fn start(kernel: &Path) -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        fs::copy("/proc/self/exe", root.join("init")).unwrap();
        let version = fs::read_to_string(kernel.join("version")).unwrap();
        for module in MODULES {
            let from = format!(
                "lib/modules/{}/kernel/drivers/xen/{module}.ko",
                version.trim()
            );
            fs::copy(kernel.join(from), root.join(format!("{module}.ko"))).unwrap();
        }
        let archive = dir.path().join("initramfs");
        shell(&format!(
            "cd {} && find . | busybox cpio -o -H newc >{}",
            root.display(),
            archive.display()
        ));
        let config = dir.path().join("xl.cfg");
        let text = format!(
            "name='{NAME}'\ntype='pvh'\nkernel='{}'\nramdisk='{}'\nmemory=128\nvcpus=1\n\
             extra='console=hvc0 quiet panic=-1'\non_crash='destroy'\non_poweroff='destroy'\n",
            kernel.join("vmlinux").display(),
            archive.display()
        );
        fs::write(&config, text).unwrap();
        shell(&format!("xl create -q {}", config.display()));
        let id = shell(&format!("xl domid {NAME}"));
        let mut guest = Guest {
            store: Xenstore::open().unwrap(),
            id: id.trim().parse().unwrap(),
            orders: 0,
            _dir: dir,
        };
        let state = guest.path(STATE);
        await_value(&mut guest.store, &state, |state| state == "ready");
        guest
    }

    fn path(&self, path: &str) -> String {
        format!("/local/domain/{}/{path}", self.id)
    }

    fn order(&mut self, what: &str) {
        self.orders += 1;
        let (path, order) = (self.path(ORDER), format!("{} {what}", self.orders));
        let state = self.path(STATE);
        self.store.write(&path, &order).unwrap();
        // It asks for what its own domain may read only.
        let permissions = (self.id, Access::None);
        self.store.set_permissions(&path, permissions, &[]).unwrap();
        let done = format!("{} done", self.orders);
        await_value(&mut self.store, &state, |state| state == done);
    }

    /// A channel that the guest serves.
    fn served(&mut self, ring: &str) -> Blocking {
        self.order(&format!("serve {ring}"));
        let path = self.path(CHANNEL);
        connect(&mut self.store, self.id, &path)
    }

    /// A channel that domain 0 serves, with the guest connected.
    fn serve(&mut self, size: &str) -> Blocking {
        let served = Vchan::serve(&mut self.store, self.id, DOM0_CHANNEL, ring(size)).unwrap();
        assert!(served.is_awaited());
        self.order(&format!("connect {size}"));
        let served = Blocking(served);
        while !served.0.is_connected() {
            served.wait().unwrap();
        }
        served
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        shell(&format!("xl destroy {NAME}"));
    }
}

fn shell(script: &str) -> String {
    let out = Command::new("sh").args(["-euc", script]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{script}: {}: {said}", out.status);
    String::from_utf8(out.stdout).unwrap()
}

type Case = (&'static str, fn(&mut Guest));

const CASES: [Case; 8] = [
    ("every_size_is_echoed", every_size_is_echoed),
    ("sixteen_mebibytes_both_ways", sixteen_mebibytes_both_ways),
    ("round_trips", round_trips),
    ("a_killed_server_is_noticed", a_killed_server_is_noticed),
    ("a_killed_client_is_noticed", a_killed_client_is_noticed),
    (
        "closing_is_noticed_and_withdrawn",
        closing_is_noticed_and_withdrawn,
    ),
    ("twenty_times_anew", twenty_times_anew),
    ("one_client_at_a_time", one_client_at_a_time),
];

fn domain0(arguments: &[String]) {
    let filter = arguments.iter().find(|argument| !argument.starts_with('-'));
    let capabilities = fs::read_to_string("/proc/xen/capabilities").unwrap_or_default();
    let images = PathBuf::from(std::env::var_os("XBEE_IMAGES").unwrap_or_default());
    let kernel = images.join("kernel");
    if !capabilities.contains("control_d") {
        println!("skipped: not domain 0 of a Xen");
        return;
    }
    if !kernel.join("vmlinux").exists() {
        println!("skipped: {} has no vmlinux (XBEE_IMAGES)", kernel.display());
        return;
    }
    let mut guest = Guest::start(&kernel);
    let mut passed = 0;
    for (name, case) in CASES {
        if filter.is_some_and(|filter| !name.contains(filter.as_str())) {
            continue;
        }
        let started = Instant::now();
        case(&mut guest);
        println!(
            "test {name} ... ok ({:.1} s)",
            started.elapsed().as_secs_f64()
        );
        passed += 1;
    }
    drop(guest);
    println!("\ntest result: ok. {passed} passed; 0 failed; 0 ignored");
}

fn every_size_is_echoed(guest: &mut Guest) {
    for size in ["4k", "64k", "1m"] {
        for served_by_guest in [true, false] {
            let mut channel = if served_by_guest {
                guest.served(size)
            } else {
                guest.serve(size)
            };
            for length in [1, 64, 4095, 4096, 65_537, 1 << 20] {
                let sent = bytes(length, SEED + length as u64);
                let received = channel.exchange(&sent).unwrap();
                assert!(received == sent, "{length} bytes with rings of {size}");
            }
        }
    }
}

fn sixteen_mebibytes_both_ways(guest: &mut Guest) {
    let sent = bytes(16 << 20, SEED);
    for size in ["64k", "1m"] {
        let mut channel = guest.served(size);
        let started = Instant::now();
        let received = channel.exchange(&sent).unwrap();
        let seconds = started.elapsed().as_secs_f64();
        assert!(received == sent, "rings of {size}");
        println!(
            "  rings of {size}: {:.0} MB/s both ways at once",
            sent.len() as f64 / 1e6 / seconds
        );
    }
}

fn round_trips(guest: &mut Guest) {
    let mut channel = guest.served("64k");
    for length in [64, 4096] {
        let sent = bytes(length, SEED);
        let started = Instant::now();
        for _ in 0..200 {
            assert!(channel.exchange(&sent).unwrap() == sent);
        }
        println!(
            "  {length} bytes: {:.2} ms",
            started.elapsed().as_secs_f64() * 1000.0 / 200.0
        );
    }
}

fn a_killed_server_is_noticed(guest: &mut Guest) {
    let mut channel = guest.served("64k");
    channel.exchange(&bytes(64, SEED)).unwrap();
    guest.order("kill");
    assert_eq!(channel.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(
        channel.0.write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    // What it leaves behind serves nobody.
    let path = guest.path(CHANNEL);
    assert!(
        guest
            .store
            .read(&format!("{path}/ring-ref"))
            .unwrap()
            .is_some()
    );
    drop(channel);
    assert!(
        Vchan::connect(&mut guest.store, guest.id, &path)
            .unwrap()
            .is_none()
    );
}

fn a_killed_client_is_noticed(guest: &mut Guest) {
    let mut channel = guest.serve("64k");
    channel.exchange(&bytes(64, SEED)).unwrap();
    guest.order("kill");
    assert_eq!(channel.read(&mut [0; 8]).unwrap(), 0);
    channel.0.close(&mut guest.store).unwrap();
    assert_eq!(guest.store.list(DOM0_CHANNEL).unwrap(), None);
}

fn closing_is_noticed_and_withdrawn(guest: &mut Guest) {
    // The guest's process ends when this end closes, and then the channel is gone.
    drop(guest.served("64k"));
    let path = guest.path(CHANNEL);
    let deadline = Instant::now() + LIMIT;
    while Vchan::connect(&mut guest.store, guest.id, &path)
        .unwrap()
        .is_some()
    {
        assert!(Instant::now() < deadline, "the server goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
    let channel = guest.serve("64k");
    channel.0.close(&mut guest.store).unwrap();
    assert_eq!(guest.store.list(DOM0_CHANNEL).unwrap(), None);
}

fn twenty_times_anew(guest: &mut Guest) {
    let started = Instant::now();
    for number in 0..20 {
        let sent = bytes(100_000, SEED + number);
        let mut channel = if number % 2 == 0 {
            guest.served("64k")
        } else {
            guest.serve("64k")
        };
        // Half of it is not read: the next channel must not show it.
        channel.write_all(&sent[..50_000]).unwrap();
        drop(channel);
        let mut channel = guest.served("64k");
        assert!(channel.exchange(&sent).unwrap() == sent, "time {number}");
    }
    println!(
        "  {:.0} ms each",
        started.elapsed().as_secs_f64() * 1000.0 / 40.0
    );
}

fn one_client_at_a_time(guest: &mut Guest) {
    let mut channel = guest.served("64k");
    let path = guest.path(CHANNEL);
    assert!(
        Vchan::connect(&mut guest.store, guest.id, &path)
            .unwrap()
            .is_none()
    );
    let sent = bytes(1000, SEED);
    assert!(channel.exchange(&sent).unwrap() == sent);
}
