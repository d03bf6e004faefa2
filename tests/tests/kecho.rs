//! Event channels between real guests: `kecho` and `kechod`, static, in domains on QEMU.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

use xbee_tests::{PATIENCE, Xbed, images, program};

/// Events of one publisher.
const EVENTS: u64 = 2000;

/// A guest that holds the commands, and waits.
struct Guest<'a> {
    xbed: &'a Xbed,
    task: String,
    address: String,
    /// Its virtual machine's.
    pid: u32,
}

/// A command that goes on in a guest. It ends with the domain.
struct Running {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Running {
    fn line(&mut self) -> String {
        self.lines.next().expect("it has ended").unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl<'a> Guest<'a> {
    /// With a network.
    fn start(xbed: &'a Xbed, job: &str) -> Guest<'a> {
        let mut guest = Guest::start_without_network(xbed, job);
        let address = "ip -6 -o addr show dev eth0 | sed -n 's|.* inet6 \\(fd58[^/]*\\)/.*|\\1|p' | head -n 1";
        guest.address = guest.sh(address).trim().to_owned();
        guest
    }

    fn start_without_network(xbed: &'a Xbed, job: &str) -> Guest<'a> {
        let machines = || {
            let all = xbed.processes().into_iter();
            let machines = all.filter(|(_, line)| line.contains("qemu-system"));
            machines.map(|(pid, _)| pid).collect::<Vec<_>>()
        };
        let before = machines();
        let task = xbed.submit(job);
        xbed.wait_for(&task, "Executing");
        let pid = machines().into_iter().find(|pid| !before.contains(pid));
        let guest = Guest {
            xbed,
            task,
            address: String::new(),
            pid: pid.expect("its virtual machine"),
        };
        guest.wait_for_commands();
        guest
    }

    /// The job makes them executable.
    fn wait_for_commands(&self) {
        let begun = Instant::now();
        let there = "test -x /data/kechod && echo yes || echo no";
        while self.sh(there).trim() != "yes" {
            assert!(
                begun.elapsed() < PATIENCE,
                "the commands are not executable"
            );
        }
    }

    /// `kill -9` of its virtual machine.
    fn kill(&self) {
        kill(self.pid);
    }

    fn arguments(&self, script: &str) -> [String; 6] {
        ["exec", &self.task, "--", "/bin/sh", "-c", script].map(str::to_owned)
    }

    fn sh(&self, script: &str) -> String {
        self.xbed.xbe(self.arguments(script)).ok().stdout
    }

    fn run(&self, script: &str) -> Running {
        let mut command = self.xbed.xbe_command(self.arguments(script));
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Running { child, lines }
    }

    fn kecho(&self, registry: &str, rest: &str) -> String {
        format!("exec /data/kecho --plaintext --registry {registry} {rest}")
    }
}

/// Events from one guest to another, and what the source's node says of the way, until the source goes.
fn events_pass(
    from: &Guest<'_>,
    to: &Guest<'_>,
    registry: &str,
    channel: &str,
    way: &str,
) -> Running {
    let mut sink = to.run(&to.kecho(registry, &format!("sub --create {channel}")));
    let publish = from.kecho(
        registry,
        &format!("pub --create --wait 1 --timeout 120 {channel}"),
    );
    // Here, because the input does not end, neither does the source.
    let source = from.run(&format!("(seq 1 {EVENTS}; sleep 1000) | {publish}"));
    for n in 1..=EVENTS {
        assert_eq!(sink.line(), n.to_string(), "{channel}");
    }
    let status = to.sh(&to.kecho(registry, &format!("status {channel}")));
    assert!(
        status.contains(&format!("sinks      1 by {way}\n")),
        "{status}"
    );
    assert!(
        status.contains(&format!("submitted  {EVENTS}\n")),
        "{status}"
    );
    drop(sink);
    source
}

fn kill(pid: u32) {
    let mut kill = Command::new("kill");
    let status = kill.args(["-9", &pid.to_string()]).status();
    assert!(status.unwrap().success());
}

/// What guests run: the commands, static.
struct Job {
    place: PathBuf,
}

impl Job {
    /// Nothing, with a printed reason, where something is missing.
    fn find() -> Option<Job> {
        if !images().join("base/image.toml").exists() {
            println!("skipped: the image base is missing: run `make images`");
            return None;
        }
        let place = program("xbed");
        let place = place.ancestors().nth(2).unwrap();
        let place = place.join("x86_64-unknown-linux-musl/release");
        if !place.join("kecho").exists() || !place.join("kechod").exists() {
            println!(
                "skipped: kecho or kechod is missing in {} (cargo build -p xbee-kecho --bins --release \
                 --target x86_64-unknown-linux-musl)",
                place.display()
            );
            return None;
        }
        Some(Job { place })
    }

    fn document(&self, xbed: &Xbed) -> String {
        let volumes = ["kecho", "kechod"]
            .map(|name| format!("{}:/data/{name}", self.place.join(name).display()));
        let [kecho, kechod] = &volumes;
        let wait = "chmod 755 /data/kecho /data/kechod && exec sleep 1000";
        let job = [
            "run",
            "--print-jsdl",
            "-v",
            kecho,
            "-v",
            kechod,
            "--",
            "/bin/sh",
            "-c",
            wait,
        ];
        xbed.xbe(job).ok().stdout
    }
}

#[test]
fn events_pass_between_guests_over_vsock_and_over_tcp() {
    let Some(job) = Job::find() else { return };
    let xbed = Xbed::start(
        "qemu",
        &[
            "[qemu]",
            "prefix = \"fd58:454e::/64\"",
            "same-owner = \"connected\"",
        ],
    );
    let job = job.document(&xbed);
    let guests = [(); 3].map(|()| Guest::start(&xbed, &job));
    let [one, two, three] = &guests;
    let registry = format!("tcp:[{}]:7400", three.address);
    let registry = registry.as_str();
    let mut daemon = three.run("exec /data/kechod registry --plaintext --listen tcp:[::]:7400");
    assert_eq!(daemon.line(), "listening at tcp:[::]:7400");
    drop(events_pass(one, two, registry, "there", "vsock"));
    drop(events_pass(two, one, registry, "back", "vsock"));
    // Who finds no vsock takes TCP.
    for guest in [one, two] {
        guest.sh("rm /dev/vsock");
    }
    drop(events_pass(two, one, registry, "tcp-back", "tcp"));
    let source = events_pass(one, two, registry, "tcp-there", "tcp");
    // A channel with a member in each of three guests, one of which is killed: the contact.
    let contact = one.run(&one.kecho(registry, "sub --create last"));
    let begun = Instant::now();
    let status = |guest: &Guest<'_>| {
        guest.sh(&format!(
            "({}) 2>&1 || true",
            guest.kecho(registry, "status last")
        ))
    };
    let wait = |what: &str, yes: &dyn Fn(&str) -> bool| {
        loop {
            let status = status(three);
            if yes(&status) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{what}: {status}");
        }
    };
    let nodes = |status: &str| status.matches("\nnode ").count();
    wait("the contact is there", &|status| nodes(status) == 1);
    let mut sink = two.run(&two.kecho(registry, "sub last"));
    wait("a sink is there", &|status| nodes(status) == 2);
    let publish = three.kecho(registry, "pub --wait 2 --timeout 120 last");
    let input = "while ! test -e /tmp/go; do sleep 0.1; done; seq 1001 2000; sleep 1000";
    let publisher = three.run(&format!("(seq 1 1000; {input}) | {publish}"));
    for n in 1..=1000 {
        assert_eq!(sink.line(), n.to_string());
    }
    one.kill();
    three.sh("touch /tmp/go");
    for n in 1001..=2000 {
        assert_eq!(sink.line(), n.to_string());
    }
    let gone = |status: &str| {
        nodes(status) == 2 && !status.contains(&one.address) && status.contains("1 by ")
    };
    wait("the dead guest is gone", &gone);
    drop((publisher, sink, contact, source, daemon));
    for guest in [two, three] {
        xbed.xbe(["terminate", &guest.task]).ok();
    }
}

/// A user other than root.
const STRANGER: u32 = 61_234;
/// The registry on the host, for the host and for guests.
const AT_HOST: &str = "vsock:2:7400";
/// A large event, in bytes.
const LARGE: usize = 1 << 20;

/// Programs on the host, which reach guests by the socket for them.
struct Host {
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

/// Lets all users pass a directory.
fn open_to_all(directory: &Path) {
    let all = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(directory, all).unwrap();
}

impl Host {
    fn new() -> Host {
        let directory = tempfile::Builder::new().prefix("xbg").tempdir_in("/tmp");
        let directory = directory.unwrap();
        open_to_all(directory.path());
        Host {
            socket: directory.path().join("guests"),
            _directory: directory,
        }
    }

    fn command(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program(name));
        command.args(arguments);
        command.env("KECHO_GUESTS", &self.socket);
        command.env("KECHO_REGISTRY", AT_HOST);
        // Of another user, perhaps.
        command.env_remove("XDG_RUNTIME_DIR");
        command
    }

    fn start(&self, name: &str, arguments: &[&str]) -> Running {
        let mut command = self.command(name, arguments);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Running { child, lines }
    }

    fn registry(&self) -> Running {
        let mut registry = self.start("kechod", &["registry", "--listen", AT_HOST]);
        assert_eq!(registry.line(), format!("listening at {AT_HOST}"));
        registry
    }

    /// Has a source submit each line, and stay.
    fn publish(&self, arguments: &[&str], lines: &str) -> Running {
        let mut source = self.start("kecho", arguments);
        let input = source.child.stdin.as_mut().unwrap();
        input.write_all(lines.as_bytes()).unwrap();
        source
    }

    fn status(&self, channel: &str) -> String {
        let output = self.command("kecho", &["status", channel]).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    }

    fn wait(&self, channel: &str, what: &str, yes: impl Fn(&str) -> bool) -> String {
        let begun = Instant::now();
        loop {
            let status = self.status(channel);
            if yes(&status) {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "{what}: {status}");
        }
    }
}

fn nodes(status: &str) -> usize {
    status.matches("\nnode ").count()
}

fn numbers() -> String {
    (1..=EVENTS).map(|n| format!("{n}\n")).collect()
}

#[test]
fn programs_on_the_host_and_in_guests_share_channels_over_vsock() {
    let Some(job) = Job::find() else { return };
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        println!("skipped: only root can be two users");
        return;
    }
    let host = Host::new();
    let socket = format!("guests-socket = \"{}\"", host.socket.display());
    // No network: there is no other way than vsock.
    let mut xbed = Xbed::start("qemu", &["[qemu]", &socket]);
    let job = job.document(&xbed);
    // Before there is any guest.
    let registry = host.registry();
    let guests = [(); 2].map(|()| Guest::start_without_network(&xbed, &job));
    let [one, two] = &guests;

    // From guests to the host: each source's events in their order.
    let mut sink = host.start("kecho", &["sub", "--create", "up"]);
    let sources = [(one, "one"), (two, "two")].map(|(guest, name)| {
        let publish = guest.kecho(AT_HOST, "pub --create --wait 1 --timeout 120 up");
        let events = format!("seq 1 {EVENTS} | sed s/^/{name}-/");
        guest.run(&format!("({events}; sleep 1000) | {publish}"))
    });
    let mut next = [1, 1];
    for _ in 0..2 * EVENTS {
        let line = sink.line();
        let (name, n) = line.split_once('-').unwrap();
        let next = &mut next[usize::from(name == "two")];
        assert_eq!(n, next.to_string(), "{name}");
        *next += 1;
    }
    let status = host.status("up");
    assert_eq!(
        status.matches("sinks      1 by vsock\n").count(),
        2,
        "{status}"
    );

    // From the host to guests.
    let mut sinks = [one, two].map(|guest| guest.run(&guest.kecho(AT_HOST, "sub --create down")));
    let arguments = ["pub", "--create", "--wait", "2", "--timeout", "120", "down"];
    let source = host.publish(&arguments, &numbers());
    for sink in &mut sinks {
        for n in 1..=EVENTS {
            assert_eq!(sink.line(), n.to_string());
        }
    }
    let status = host.status("down");
    assert!(status.contains("sinks      2 by vsock\n"), "{status}");

    // Large ones, both ways.
    let sub = one.kecho(AT_HOST, "sub --create --count 1 large-down");
    let mut counted = one.run(&format!("{sub} | wc -c"));
    let arguments = ["pub", "--create", "--wait", "1", "large-down"];
    let large = "x".repeat(LARGE) + "\n";
    let large_source = host.publish(&arguments, &large);
    assert_eq!(counted.line().trim(), large.len().to_string());
    let mut sink = host.start("kecho", &["sub", "--create", "large-up"]);
    let publish = one.kecho(AT_HOST, "pub --create --whole --wait 1 large-up");
    one.sh(&format!(
        "head -c {LARGE} /dev/zero | tr '\\0' x | {publish}"
    ));
    assert_eq!(sink.line().len(), LARGE);
    drop((sources, large_source));

    // A guest is killed: it is noticed, and the others go on. So is a program of the host's.
    two.kill();
    host.wait("down", "the dead guest is gone", |status| {
        status.contains("sinks      1 by vsock\n")
    });
    drop((source, sinks));
    let held = one.run(&one.kecho(AT_HOST, "sub --create last"));
    let status = host.wait("last", "the guest is there", |status| nodes(status) == 1);
    let killed = host.start("kecho", &["sub", "last"]);
    host.wait("last", "a sink on the host", |status| nodes(status) == 2);
    drop(killed);
    host.wait("last", "the dead program is gone", |status| {
        nodes(status) == 1
    });

    // A guest's own programs reach a registry in it, and so does the host.
    let cid = status.split("vsock:").nth(1).unwrap();
    let cid = cid.split(':').next().unwrap();
    let in_guest = format!("vsock:{cid}:7500");
    let mut daemon = one.run(&format!("exec /data/kechod registry --listen {in_guest}"));
    assert_eq!(daemon.line(), format!("listening at {in_guest}"));
    let mut sink = one.run(&one.kecho(&in_guest, "sub --create own"));
    one.sh(&one.kecho(&in_guest, "pub --create --wait 1 own from-within"));
    assert_eq!(sink.line(), "from-within");
    let arguments = [
        "--registry",
        &in_guest,
        "pub",
        "--wait",
        "1",
        "own",
        "from-outside",
    ];
    xbee_tests::run(&mut host.command("kecho", &arguments)).ok();
    assert_eq!(sink.line(), "from-outside");

    // Another user's guest and programs have no part in this.
    strangers_are_kept_out(&xbed, &host, &job, &in_guest);

    // The registry and xbed are killed and come again; the switch, and what it serves, stays.
    let (task, pid) = (one.task.clone(), one.pid);
    drop((held, registry));
    xbed.kill_and_restart();
    let registry = host.registry();
    let one = Guest {
        xbed: &xbed,
        task,
        address: String::new(),
        pid,
    };
    // Its agent has to find the new one first.
    let begun = Instant::now();
    while xbed.xbe(one.arguments("true")).code != 0 {
        assert!(begun.elapsed() < PATIENCE, "{}", xbed.log());
    }
    let mut sink = one.run(&one.kecho(AT_HOST, "sub --create again"));
    let arguments = [
        "pub",
        "--create",
        "--wait",
        "1",
        "--timeout",
        "120",
        "again",
    ];
    let source = host.publish(&arguments, "on\n");
    assert_eq!(sink.line(), "on");
    drop((sink, source));

    // The switch is killed, and with it its guests' vsock. Who listens on the host does so at the next switch too, for new guests.
    let switch = xbed.processes().into_iter();
    let mut switch = switch.filter(|(_, line)| line.contains("vswitch"));
    kill(switch.next().expect("the switch").0);
    let three = Guest::start_without_network(&xbed, &job);
    let mut sink = three.run(&three.kecho(AT_HOST, "sub --create anew"));
    let arguments = ["pub", "--create", "--wait", "1", "--timeout", "120", "anew"];
    let source = host.publish(&arguments, "on\n");
    assert_eq!(sink.line(), "on");
    drop((sink, source, registry));
    for guest in [&one, &three] {
        xbed.xbe(["terminate", &guest.task]).ok();
    }
}

/// A guest of another user's reaches neither programs of root's on the host nor root's guests, and that user's programs on the host
/// reach none of root's guests.
fn strangers_are_kept_out(xbed: &Xbed, host: &Host, job: &str, in_guest: &str) {
    let socket = xbed.socket();
    open_to_all(socket.parent().unwrap());
    let document = xbed.document("stranger.xsdl", job);
    open_to_all(document.parent().unwrap());
    let as_stranger = |arguments: &[&str]| {
        let mut command = xbed.xbe_command(arguments);
        xbee_tests::run(command.uid(STRANGER).gid(STRANGER))
    };
    let task = as_stranger(&["submit", document.to_str().unwrap()]).line();
    let begun = Instant::now();
    let sh = |script: &str| as_stranger(&["exec", &task, "--", "/bin/sh", "-c", script]);
    while sh("test -x /data/kechod").code != 0 {
        assert!(begun.elapsed() < PATIENCE, "{:?}", sh("true"));
    }
    for registry in [AT_HOST, in_guest] {
        let ran = sh(&format!("exec /data/kecho --registry {registry} list"));
        assert_ne!(ran.code, 0, "{ran:?}");
        assert!(ran.stderr.contains(" reset"), "{ran:?}");
        let mut command = host.command("kecho", &["--registry", registry, "list"]);
        let ran = xbee_tests::run(command.uid(STRANGER).gid(STRANGER));
        assert_ne!(ran.code, 0, "{ran:?}");
        assert!(ran.stderr.contains("no guest of yours"), "{ran:?}");
    }
    // Its own programs reach it all the same.
    let mut registry = host.command("kechod", &["registry", "--listen", AT_HOST]);
    let registry = registry.uid(STRANGER).gid(STRANGER);
    let mut child = registry.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut registry = Running { child, lines };
    assert_eq!(registry.line(), format!("listening at {AT_HOST}"));
    let ran = sh(&format!("exec /data/kecho --registry {AT_HOST} list")).ok();
    assert_eq!(ran.stdout, "");
    as_stranger(&["terminate", &task]).ok();
}
