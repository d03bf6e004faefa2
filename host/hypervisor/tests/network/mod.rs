//! The network between guests of QEMU, by the switch or on a bridge: real guests, whose agent sets up what the host has chosen. What frames may
//! pass is tried frame by frame in the tests of `xbee-vswitch`.

mod bridge;

use std::io::Write;
use std::net::{Ipv6Addr, TcpListener};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::time::timeout;
use xbee_agent::protocol::{BootConfig, ExitStatus, GENERATION, Network, StartMode};
use xbee_agent::{Agent, Event, ExecSpec, Resume};
use xbee_hypervisor::qemu;
use xbee_hypervisor::{DomainSpec, Hypervisor, Interface};

use super::support::{Fixture, Guest, LIMIT, SECRET};

/// A guest with its agent and its address.
struct Host {
    spec: DomainSpec,
    agent: Agent,
    /// The agent's connection goes with its receiver.
    _events: tokio::sync::mpsc::Receiver<Event>,
}

impl Host {
    async fn boot(fixture: &Fixture, hypervisor: &dyn Hypervisor, number: u8, owner: &str) -> Host {
        Self::boot_with(fixture, hypervisor, number, owner, None).await
    }

    async fn boot_with(
        fixture: &Fixture,
        hypervisor: &dyn Hypervisor,
        number: u8,
        owner: &str,
        gateway: Option<Ipv6Addr>,
    ) -> Host {
        let mut spec = fixture.spec(Guest::Agent);
        spec.owner = owner.to_owned();
        spec.memory_bytes = 128 << 20;
        let interface = Interface {
            mac: [0x02, 0xbe, 0, 0, 0, number],
            address: format!("fd58:454e::{number:x}").parse().unwrap(),
            peers: true,
        };
        spec.interface = Some(interface);
        spec.boot_config = BootConfig {
            generation: GENERATION,
            domain: spec.id,
            hostname: format!("guest{number}"),
            secret: SECRET,
            transport: hypervisor.transport(),
            network: Some(Network {
                mac: interface.mac,
                address: interface.address,
                prefix_length: 64,
                gateway,
            }),
        }
        .encode();
        hypervisor.create(&spec).await.unwrap();
        hypervisor.start(spec.id).await.unwrap();
        let (agent, events) = connect(hypervisor, &spec).await;
        agent.start(StartMode::Agent).await.unwrap();
        Host {
            spec,
            agent,
            _events: events,
        }
    }

    fn address(&self) -> String {
        self.spec.interface.unwrap().address.to_string()
    }

    /// Runs a command of the shell; what it prints, and whether it succeeds.
    async fn sh(&self, script: &str) -> (String, bool) {
        let spec = ExecSpec {
            argv: ["/bin/sh", "-c", &format!("{{ {script}; }} 2>&1")]
                .map(str::to_owned)
                .into(),
            ..ExecSpec::default()
        };
        let mut process = self.agent.exec(spec).await.unwrap();
        let mut text = String::new();
        let mut stdout = process.stdout.take().unwrap();
        let read = timeout(LIMIT, stdout.read_to_string(&mut text)).await;
        read.expect("it does not end").unwrap();
        let status = process.wait().await.unwrap();
        (text, status == ExitStatus::Code(0))
    }

    /// Takes another's address (`::66`) and another's card (`05`), with which it is not to reach its peer; then its own
    /// again, `03`.
    async fn cannot_be_others(&self, peer: &Host) {
        let from = format!("ping6 -c 2 -W 2 -I fd58:454e::66 {}", peer.address());
        let (said, _) = self.sh("ip -6 addr add fd58:454e::66/64 dev eth0").await;
        let (answer, reached) = self.sh(&from).await;
        assert!(
            !reached && answer.contains("0 packets received"),
            "{said} {answer}"
        );
        self.sh("ip -6 addr del fd58:454e::66/64 dev eth0").await;
        let card = |mac| format!("ip link set eth0 address 02:be:00:00:00:{mac}");
        let (said, done) = self.sh(&card("05")).await;
        assert!(done, "{said}");
        assert!(!self.reaches(&peer.address()).await);
        self.sh(&card("03")).await;
        assert!(self.reaches(&peer.address()).await);
    }

    async fn reaches(&self, address: &str) -> bool {
        let (text, reached) = self.sh(&format!("ping6 -c 2 -W 2 {address}")).await;
        println!("{}: {text}", self.address());
        reached
    }
}

async fn connect(
    hypervisor: &dyn Hypervisor,
    spec: &DomainSpec,
) -> (Agent, tokio::sync::mpsc::Receiver<Event>) {
    let stream = timeout(LIMIT, hypervisor.channel(spec.id)).await;
    let stream = stream.expect("no agent").unwrap();
    Agent::connect(stream, &SECRET, Resume::default())
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_of_one_owner_have_a_network_and_cannot_be_others() {
    let Some(fixture) = Fixture::qemu() else {
        return;
    };
    let mut hypervisor = fixture.open().await;
    let (one, two, other) = tokio::join!(
        Host::boot(&fixture, &*hypervisor, 3, "one"),
        Host::boot(&fixture, &*hypervisor, 4, "one"),
        Host::boot(&fixture, &*hypervisor, 5, "two"),
    );
    assert!(one.reaches(&two.address()).await);
    assert!(two.reaches(&one.address()).await);
    let local = "fe80::be:ff:fe00:4%eth0";
    assert!(one.reaches(local).await);
    assert!(!one.reaches(&other.address()).await);
    assert!(!other.reaches(&one.address()).await);
    let (seen, _) = one
        .sh("cat /sys/class/net/eth0/mtu; ip -6 addr show eth0")
        .await;
    assert!(seen.starts_with("65535\n"), "{seen}");
    // By router advertisement, for guests that nobody gave another.
    let made = seen
        .lines()
        .find(|line| line.contains("fd58:454e::be:ff:fe00:3/64"));
    assert!(made.is_some_and(|line| line.contains("dynamic")), "{seen}");

    // TCP, both ways, bit-exact.
    for host in [&one, &two] {
        let (said, made) = host
            .sh("head -c 20000000 /dev/urandom >/file; setsid nc -ll -p 80 -e cat /file </dev/null >/dev/null & md5sum </file")
            .await;
        assert!(made, "{said}");
        let client = if std::ptr::eq(host, &one) { &two } else { &one };
        let begun = Instant::now();
        let fetch = format!("nc {} 80 </dev/null | md5sum", host.address());
        assert_eq!(client.sh(&fetch).await.0, said);
        println!("20 MB by TCP in {:?}", begun.elapsed());
    }
    let fetch = format!("nc -w 3 {} 80 </dev/null", one.address());
    assert!(!other.sh(&fetch).await.1);

    // Another's address, another's card; then as before.
    one.cannot_be_others(&two).await;

    // Without the manager, and with a new one.
    drop((one.agent, other.agent));
    drop(hypervisor);
    assert!(
        two.reaches(&one.spec.interface.unwrap().address.to_string())
            .await
    );
    hypervisor = fixture.open().await;
    hypervisor.destroy(one.spec.id).await.unwrap();
    assert!(
        !two.reaches(&one.spec.interface.unwrap().address.to_string())
            .await
    );
    for spec in [two.spec, other.spec] {
        hypervisor.destroy(spec.id).await.unwrap();
    }
}

/// What the kernel says of a process.
fn status(pid: i32, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_switch_is_in_a_cage() {
    let Some(fixture) = Fixture::qemu() else {
        return;
    };
    let hypervisor = fixture.open().await;
    let guest = Host::boot(&fixture, &*hypervisor, 3, "one").await;
    let control = fixture.path("domains/vswitch.sock");
    let stream = std::os::unix::net::UnixStream::connect(control).unwrap();
    let peer = rustix::net::sockopt::socket_peercred(&stream).unwrap();
    let pid = peer.pid.as_raw_nonzero().get();
    assert_eq!(status(pid, "Name:"), "vswitch");
    assert_eq!(status(pid, "Seccomp:"), "2");
    assert_eq!(status(pid, "NoNewPrivs:"), "1");
    assert_eq!(status(pid, "CapEff:"), "0000000000000000");
    if rustix::process::geteuid().is_root() {
        let root = format!("/proc/{pid}/root");
        assert!(!std::path::Path::new(&format!("{root}/etc/passwd")).exists());
        assert!(
            std::path::Path::new(&format!("{root}{}", fixture.path("domains").display())).exists()
        );
        let network = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        assert_ne!(network(&pid.to_string()), network("self"));
    }
    hypervisor.destroy(guest.spec.id).await.unwrap();
}

/// Processes of this name that this one has started.
fn children(name: &str) -> usize {
    let own = std::process::id().to_string();
    let stats = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        // It may end meanwhile.
        std::fs::read_to_string(entry.unwrap().path().join("stat")).ok()
    });
    stats
        .filter(|stat| {
            let (begin, end) = (stat.find('(').unwrap(), stat.rfind(')').unwrap());
            stat[begin + 1..end] == *name && stat[end + 2..].split(' ').nth(1) == Some(&*own)
        })
        .count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_reaches_what_the_rules_name_and_nothing_else() {
    let Some(fixture) = Fixture::qemu() else {
        return;
    };
    let [listed, other] = [(); 2].map(|()| TcpListener::bind("[::1]:0").unwrap());
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let (listed_port, other_port) = (port(&listed), port(&other));
    other.set_nonblocking(true).unwrap();
    let content: Vec<u8> = (0..20_000_000u32)
        .map(|n| ((n >> 8) ^ (n * 31)) as u8)
        .collect();
    let file = fixture.path("content");
    std::fs::write(&file, &content).unwrap();
    let sum = std::process::Command::new("md5sum")
        .stdin(std::fs::File::open(file).unwrap())
        .output()
        .unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    std::thread::spawn(move || {
        for stream in listed.incoming() {
            // A guest that is ended closes the connection.
            let _ = stream.unwrap().write_all(&content);
        }
    });

    let rules = format!("[\"[::1]:{listed_port}\", \"2001:db8::/32:*\", \"::/0:{other_port}\"]");
    let outbound = serde_json::from_str(&rules).unwrap();
    let hypervisor = fixture.open_outbound(outbound).await;
    let guest = Host::boot_with(&fixture, &*hypervisor, 3, "one", Some(qemu::router())).await;
    let (routes, _) = guest.sh("ip -6 route").await;
    println!("{routes}");
    let begun = Instant::now();
    let fetch = format!("nc fd58:454e::1 {listed_port} </dev/null | md5sum");
    assert_eq!(guest.sh(&fetch).await.0, sum);
    println!("20 MB from the host in {:?}", begun.elapsed());

    // Neither what no rule names, nor by any other name; the answer comes at once.
    let begun = Instant::now();
    for address in ["fd58:454e::1", "64:ff9b::127.0.0.2"] {
        let (said, reached) = guest
            .sh(&format!("nc -w 30 {address} {other_port} </dev/null"))
            .await;
        assert!(!reached, "{address}: {said}");
        println!("{address}: {said}");
    }
    println!("refused twice in {:?}", begun.elapsed());
    let came = other.accept().unwrap_err();
    assert_eq!(came.kind(), std::io::ErrorKind::WouldBlock);

    // It serves without the manager, and ends with the guest.
    assert_eq!(children("gateway"), 1);
    drop(hypervisor);
    assert_eq!(guest.sh(&fetch).await.0, sum);
    let hypervisor = fixture.open().await;
    hypervisor.destroy(guest.spec.id).await.unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while children("gateway") > 0 {
        assert!(Instant::now() < until, "the gateway is still there");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
