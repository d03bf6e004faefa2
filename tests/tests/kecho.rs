//! Event channels between real guests: `kecho` and `kechod`, static, in domains on QEMU.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Stdio};
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
    fn start(xbed: &'a Xbed, job: &str) -> Guest<'a> {
        let machines = || {
            let all = xbed.processes().into_iter();
            let machines = all.filter(|(_, line)| line.contains("qemu-system"));
            machines.map(|(pid, _)| pid).collect::<Vec<_>>()
        };
        let before = machines();
        let task = xbed.submit(job);
        xbed.wait_for(&task, "Executing");
        let pid = machines().into_iter().find(|pid| !before.contains(pid));
        let mut guest = Guest {
            xbed,
            task,
            address: String::new(),
            pid: pid.expect("its virtual machine"),
        };
        let address = "ip -6 -o addr show dev eth0 | sed -n 's|.* inet6 \\(fd58[^/]*\\)/.*|\\1|p' | head -n 1";
        guest.address = guest.sh(address).trim().to_owned();
        guest
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
        format!("exec /data/kecho --plaintext --registry tcp:[{registry}]:7400 {rest}")
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

#[test]
fn events_pass_between_guests_over_vsock_and_over_tcp() {
    if !images().join("base/image.toml").exists() {
        println!("skipped: the image base is missing: run `make images`");
        return;
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
        return;
    }
    let xbed = Xbed::start(
        "qemu",
        &[
            "[qemu]",
            "prefix = \"fd58:454e::/64\"",
            "same-owner = \"connected\"",
        ],
    );
    let volumes =
        ["kecho", "kechod"].map(|name| format!("{}:/data/{name}", place.join(name).display()));
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
    let job = xbed.xbe(job).ok().stdout;
    let guests = [(); 3].map(|()| Guest::start(&xbed, &job));
    let [one, two, three] = &guests;
    for guest in &guests {
        let begun = Instant::now();
        while guest
            .sh("test -x /data/kechod && echo yes || echo no")
            .trim()
            != "yes"
        {
            assert!(
                begun.elapsed() < PATIENCE,
                "the commands are not executable"
            );
        }
    }
    let registry = three.address.as_str();
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
    assert!(
        std::process::Command::new("kill")
            .args(["-9", &one.pid.to_string()])
            .status()
            .unwrap()
            .success()
    );
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
