//! Streams between guests, by the program `peer` of `guest/link/examples`: the same on every back end
//! whose guests are real.

use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
#[cfg(feature = "xen")]
use tokio::time::Instant;
use tokio::time::timeout;
use xbee_agent::protocol::StartMode;
use xbee_agent::{Agent, Event, ExecSpec, Process, StreamReader};
use xbee_hypervisor::{DomainSpec, Hypervisor};

use super::connect;
use super::support::{Fixture, Guest, LIMIT};

/// How the two transports say what one owner may know.
struct Words {
    nobody_listens: &'static str,
    no_such_guest: &'static str,
    /// In the midst of a stream, after one byte.
    guest_has_gone: &'static str,
}

const VSOCK: Words = Words {
    nobody_listens: "error ConnectionReset",
    no_such_guest: "error ConnectionReset",
    guest_has_gone: "end 1",
};
#[cfg(feature = "xen")]
const XEN: Words = Words {
    nobody_listens: "error ConnectionRefused",
    guest_has_gone: "end 1 ConnectionReset",
    ..VSOCK
};

mod qemu {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn guests_of_one_owner_reach_each_other() {
        let Some(fixture) = Fixture::qemu() else {
            return;
        };
        super::guests_of_one_owner_reach_each_other(&fixture, &VSOCK).await;
    }
}

#[cfg(feature = "xen")]
mod xen {
    use xbee_link::xenstore::Xenstore;

    use super::*;
    use crate::support::{xen_name, xl};

    #[tokio::test(flavor = "multi_thread")]
    async fn guests_of_one_owner_reach_each_other() {
        let Some(fixture) = Fixture::xen() else {
            return;
        };
        super::guests_of_one_owner_reach_each_other(&fixture, &XEN).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn streams_outlive_the_manager_and_a_guest_that_floods_xenstore() {
        let Some(fixture) = Fixture::xen() else {
            return;
        };
        let Some(initramfs) = initramfs(&fixture) else {
            return;
        };
        let mut hypervisor = fixture.open().await;
        let boot = |owner| Peer::boot(&fixture, &*hypervisor, &initramfs, owner);
        let (one, two, other) = (boot("alice").await, boot("alice").await, boot("bob").await);
        let mut echo = two.listen(5000).await;
        let mut flood = other.run("flood 10").await;
        assert_eq!(flood.line().await, "flooding");
        for _ in 0..3 {
            let said = one.say(&format!("ping {} 5000 50", two.cid())).await;
            println!("beside a flood: {said}");
            assert!(said.starts_with("round trip"), "{said}");
            assert_eq!(echo.line().await, format!("from {}", one.cid()));
            assert_eq!(echo.line().await, "end 50");
        }
        println!("{}", flood.line().await);

        // As many as may wait at a listener, and one more.
        let mut deaf = two.run("deaf 5002").await;
        assert_eq!(deaf.line().await, "listening");
        let refused = one.say(&format!("send {} 5002 1 17", two.cid())).await;
        assert_eq!(refused, "error ConnectionRefused");
        let said = one.say(&format!("ping {} 5000 1", two.cid())).await;
        assert!(said.starts_with("round trip"), "{said}");

        // What agents run ends with the manager's connection to them, if it has not left them.
        two.leave("echo 5001").await;
        (fixture.wait_console(&*hypervisor, two.spec.id, "listening")).await;
        one.leave(&format!("hold {} 5001", two.cid())).await;
        fixture
            .wait_console(&*hypervisor, one.spec.id, "open")
            .await;
        drop(hypervisor);
        hypervisor = fixture.open().await;
        assert!(xl(&["destroy", &xen_name(two.spec.id)]).is_some());
        (fixture.wait_console(&*hypervisor, one.spec.id, XEN.guest_has_gone)).await;
        for peer in [one, two, other] {
            hypervisor.destroy(peer.spec.id).await.unwrap();
        }
    }

    /// Its kernel fails later, where a process has kept its channel open.
    #[tokio::test(flavor = "multi_thread")]
    async fn streams_are_closed_before_their_guest_is_saved() {
        let Some(fixture) = Fixture::xen() else {
            return;
        };
        let Some(initramfs) = initramfs(&fixture) else {
            return;
        };
        let hypervisor = fixture.open().await;
        let boot = || Peer::boot(&fixture, &*hypervisor, &initramfs, "alice");
        let (one, two) = (boot().await, boot().await);
        // As the client of a channel and as its server.
        one.leave("echo 5001").await;
        fixture
            .wait_console(&*hypervisor, one.spec.id, "listening")
            .await;
        let _echo = two.listen(5000).await;
        let mut held = two.hold(&one, 5001).await;
        one.leave(&format!("hold {} 5000", two.cid())).await;
        fixture
            .wait_console(&*hypervisor, one.spec.id, "open")
            .await;

        let name = xen_name(one.spec.id);
        let image = fixture.path("saved").display().to_string();
        assert!(xl(&["save", &name, &image]).is_some());
        assert_eq!(held.line().await, "end 1");
        assert!(xl(&["restore", &image]).is_some());
        // Its processes end, and with them whatever they have open.
        let path = format!("/var/log/xen/console/guest-{name}.log");
        let console = || {
            let log = std::fs::read(&path).unwrap_or_default();
            String::from_utf8_lossy(&log).into_owned()
        };
        let deadline = Instant::now() + LIMIT;
        while !console().contains("end 1 ConnectionReset") {
            assert!(Instant::now() < deadline, "{}", console());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // It listens again, under its new number.
        let domain = xl(&["domid", &name]).unwrap();
        let node = format!("/local/domain/{}/data/xbee/peer/listen/5001", domain.trim());
        let mut store = Xenstore::open().unwrap();
        while store.read(&node).unwrap().is_none() {
            assert!(Instant::now() < deadline, "no {node}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // Two seconds of its own clock, with a kernel that would have failed by then.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let console = console();
        for trouble in ["BUG", "WARNING", "Oops"] {
            assert!(!console.contains(trouble), "{console}");
        }
        xl(&["destroy", &name]);
        for peer in [one, two] {
            hypervisor.destroy(peer.spec.id).await.unwrap();
        }
    }

    /// They have watches in xenstore, and a kernel that takes those back while it suspends never comes to
    /// the end of either.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_guest_is_saved_whose_programs_end_with_the_connection() {
        const PROGRAMS: u32 = 6;
        let Some(fixture) = Fixture::xen() else {
            return;
        };
        let Some(initramfs) = initramfs(&fixture) else {
            return;
        };
        let hypervisor = fixture.open().await;
        let mut peer = Peer::boot(&fixture, &*hypervisor, &initramfs, "alice").await;
        let file = fixture.path("save");
        for _ in 0..3 {
            let mut programs = Vec::new();
            for number in 0..PROGRAMS {
                programs.push(peer.listen(5000 + number).await);
            }
            hypervisor.save(peer.spec.id, &file).await.unwrap();
            hypervisor.restore(peer.spec.id, &file).await.unwrap();
            peer.connect(&*hypervisor).await;
            // Their ports are free again.
            drop(programs);
        }
        hypervisor.destroy(peer.spec.id).await.unwrap();
    }
}

/// The program for guests; `None`, and a printed reason, where it has not been built.
fn program() -> Option<PathBuf> {
    const PLACE: &str = "x86_64-unknown-linux-musl/release/examples/peer";
    let this = std::env::current_exe().unwrap();
    // Beside this one where a suite was put together, else where cargo puts it.
    let places = [
        this.with_file_name("peer"),
        this.ancestors().nth(3).unwrap().join(PLACE),
    ];
    let found = places.iter().find(|path| path.exists()).cloned();
    if found.is_none() {
        println!(
            "skipped: {} is missing (cargo build -p xbee-link --example peer --release \
             --target x86_64-unknown-linux-musl)",
            places[1].display()
        );
    }
    found
}

/// A guest with its agent.
struct Peer {
    spec: DomainSpec,
    agent: Agent,
    /// The agent's connection goes with its receiver.
    _events: tokio::sync::mpsc::Receiver<Event>,
}

/// A program that runs in a guest; killed when dropped.
struct Running {
    _process: Process,
    lines: Lines<BufReader<StreamReader>>,
}

impl Running {
    async fn line(&mut self) -> String {
        let line = timeout(LIMIT, self.lines.next_line()).await;
        line.expect("it says nothing").unwrap().unwrap_or_default()
    }
}

impl Peer {
    async fn boot(
        fixture: &Fixture,
        hypervisor: &dyn Hypervisor,
        initramfs: &std::path::Path,
        owner: &str,
    ) -> Peer {
        let mut spec = fixture.spec(Guest::Agent);
        spec.owner = owner.to_owned();
        spec.initramfs = Some(initramfs.to_owned());
        spec.memory_bytes = 128 << 20;
        hypervisor.create(&spec).await.unwrap();
        hypervisor.start(spec.id).await.unwrap();
        let (agent, events) = connect(hypervisor, spec.id).await;
        agent.start(StartMode::Agent).await.unwrap();
        Peer {
            spec,
            agent,
            _events: events,
        }
    }

    /// To the same agent again.
    #[cfg(feature = "xen")]
    async fn connect(&mut self, hypervisor: &dyn Hypervisor) {
        (self.agent, self._events) = connect(hypervisor, self.spec.id).await;
    }

    fn cid(&self) -> u32 {
        self.spec.cid
    }

    async fn run(&self, command: &str) -> Running {
        let argv = std::iter::once("/bin/peer").chain(command.split(' '));
        let spec = ExecSpec {
            argv: argv.map(str::to_owned).collect(),
            ..ExecSpec::default()
        };
        let mut process = self.agent.exec(spec).await.unwrap();
        let stdout = process.stdout.take().unwrap();
        Running {
            _process: process,
            lines: BufReader::new(stdout).lines(),
        }
    }

    /// Starts what goes on by itself, and prints to the console.
    #[cfg(feature = "xen")]
    async fn leave(&self, command: &str) {
        let script = format!("setsid /bin/peer {command} </dev/null >/dev/console 2>&1 &");
        let spec = ExecSpec {
            argv: ["/bin/sh", "-c", &script].map(str::to_owned).into(),
            ..ExecSpec::default()
        };
        let mut process = self.agent.exec(spec).await.unwrap();
        process.wait().await.unwrap();
    }

    /// A command's first line.
    async fn say(&self, command: &str) -> String {
        self.run(command).await.line().await
    }

    async fn listen(&self, port: u32) -> Running {
        let mut listener = self.run(&format!("echo {port}")).await;
        assert_eq!(listener.line().await, "listening");
        listener
    }

    async fn hold(&self, to: &Peer, port: u32) -> Running {
        let mut held = self.run(&format!("hold {} {port}", to.cid())).await;
        assert_eq!(held.line().await, "open");
        held
    }
}

/// The initial RAM file system with the program.
fn initramfs(fixture: &Fixture) -> Option<PathBuf> {
    let program = program()?;
    let base = fixture.spec(Guest::Agent).initramfs.unwrap();
    let mut archive = std::fs::read(base).unwrap();
    archive.resize(archive.len().next_multiple_of(4), 0);
    let mut writer = xbee_initramfs::Writer::new(archive);
    let content = std::fs::read(program).unwrap();
    writer.file("bin/peer", 0o755, &content).unwrap();
    let path = fixture.path("peer.cpio");
    std::fs::write(&path, writer.finish().unwrap()).unwrap();
    Some(path)
}

async fn guests_of_one_owner_reach_each_other(fixture: &Fixture, words: &Words) {
    let Some(initramfs) = initramfs(fixture) else {
        return;
    };
    let hypervisor = fixture.open().await;
    let boot = |owner| Peer::boot(fixture, &*hypervisor, &initramfs, owner);
    let (one, two) = (boot("alice").await, boot("alice").await);
    for peer in [&one, &two] {
        assert_eq!(peer.say("cid").await, peer.cid().to_string());
    }

    let mut echo = two.listen(5000).await;
    let to_two = |port| format!("{} {port}", two.cid());
    for (bytes, streams) in [(1, 1), (1 << 20, 1), (100_000, 16), (16 << 20, 1)] {
        let said = one
            .say(&format!("send {} {bytes} {streams}", to_two(5000)))
            .await;
        println!("{bytes} bytes on {streams} streams: {said}");
        assert!(said.starts_with("exact, "), "{said}");
        for _ in 0..streams {
            assert_eq!(echo.line().await, format!("from {}", one.cid()));
        }
        for _ in 0..streams {
            assert_eq!(echo.line().await, format!("end {bytes}"));
        }
    }
    println!("{}", one.say(&format!("ping {} 200", to_two(5000))).await);
    assert_eq!(echo.line().await, format!("from {}", one.cid()));
    assert_eq!(echo.line().await, "end 200");

    // A guest reaches itself, by its own identifier.
    let said = two.say(&format!("ping {} 200", to_two(5000))).await;
    assert!(said.starts_with("round trip"), "{said}");
    assert_eq!(echo.line().await, format!("from {}", two.cid()));
    assert_eq!(echo.line().await, "end 200");
    let refused = two.say(&format!("ping {} 1", to_two(5001))).await;
    assert_eq!(refused, "error ConnectionRefused");

    // A port has one listener, and is free when that has ended, however it did.
    assert_eq!(two.say("echo 5000").await, "error AddrInUse");
    let mut held = one.hold(&two, 5000).await;
    drop(echo);
    let end = held.line().await;
    assert!(end.starts_with("end 1"), "{end}");
    let refused = one.say(&format!("ping {} 1", to_two(5001))).await;
    assert_eq!(refused, words.nobody_listens);
    let mut echo = two.listen(5000).await;

    // Who is not there, and who is another's.
    let other = boot("bob").await;
    let unknown = one.say("ping 4294967000 5000 1").await;
    assert_eq!(unknown, words.no_such_guest);
    assert_eq!(
        other.say(&format!("ping {} 1", to_two(5000))).await,
        unknown
    );
    let mut others = other.listen(5000).await;
    let said = one
        .say(&format!("ping {} 1", format_args!("{} 5000", other.cid())))
        .await;
    assert_eq!(said, unknown);
    let nothing = timeout(Duration::from_millis(200), others.lines.next_line()).await;
    assert!(nothing.is_err(), "{nothing:?}");

    // A dialler that is killed.
    let held = one.hold(&two, 5000).await;
    assert_eq!(echo.line().await, format!("from {}", one.cid()));
    drop(held);
    let end = echo.line().await;
    assert!(end.starts_with("end 1"), "{end}");

    // A guest that is destroyed, as the one that was dialled and as the one that did.
    let mut held = one.hold(&two, 5000).await;
    hypervisor.destroy(two.spec.id).await.unwrap();
    assert_eq!(held.line().await, words.guest_has_gone);
    let unknown = one.say(&format!("ping {} 1", to_two(5000))).await;
    assert_eq!(unknown, words.no_such_guest);
    let three = boot("alice").await;
    let mut echo = one.listen(5000).await;
    let _held = three.hold(&one, 5000).await;
    assert_eq!(echo.line().await, format!("from {}", three.cid()));
    hypervisor.destroy(three.spec.id).await.unwrap();
    assert_eq!(echo.line().await, words.guest_has_gone);
}
