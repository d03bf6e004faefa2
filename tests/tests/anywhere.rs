//! Several `xbed` that tell each other what they could run, and jobs that may run on any of them.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use xbee_tests::site::{Site, free_port, plain_broker};
use xbee_tests::{PATIENCE, Ran, Xbed, program, run};

/// `kechod registry`.
struct Registry {
    process: Child,
    address: String,
    args: Vec<String>,
}

impl Registry {
    fn start(args: &[String]) -> Registry {
        Registry::at("tcp:[::1]:0", args)
    }

    fn at(address: &str, args: &[String]) -> Registry {
        let mut process = Command::new(program("kechod"))
            .args(["registry", "--listen", address])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut lines = BufReader::new(process.stdout.take().unwrap());
        lines.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening at ").unwrap();
        Registry {
            process,
            address: address.to_owned(),
            args: args.to_vec(),
        }
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn restart(&mut self) {
        *self = Registry::at(&self.address, &self.args);
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Hosts that share a registry, and jobs for them.
struct Hosts {
    registry: Registry,
    directory: tempfile::TempDir,
}

impl Hosts {
    fn new() -> Hosts {
        Hosts::with(Registry::start(&[]))
    }

    fn with(registry: Registry) -> Hosts {
        let directory = tempfile::tempdir().unwrap();
        Hosts {
            registry,
            directory,
        }
    }

    /// One on the channel.
    fn host(&self, lines: &[&str]) -> Xbed {
        self.host_with(lines, &[], &[])
    }

    fn host_with(&self, lines: &[&str], kecho: &[&str], environment: &[(&str, String)]) -> Xbed {
        let mut xbed = self.start("sim", lines, kecho, environment);
        assert!(xbed.came_up(), "{}", xbed.log());
        wait_until("it is on the channel", || is_on_the_channel(&xbed));
        xbed
    }

    fn start(
        &self,
        backend: &'static str,
        lines: &[&str],
        kecho: &[&str],
        environment: &[(&str, String)],
    ) -> Xbed {
        let registry = format!("registry = {:?}", self.registry.address);
        let config = [lines, &["[kecho]", &registry], kecho].concat();
        Xbed::start_with(backend, &config, environment)
    }

    /// A document, of options of `xbe run` and a command.
    fn job(&self, options: &[&str], command: &[&str]) -> String {
        let mut print = Command::new(program("xbe"));
        let print = print.args(["run", "--print-jsdl"]).args(options).arg("--");
        let text = run(print.args(command)).ok().stdout;
        let path = self.directory.path().join("job.xsdl");
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// A job that goes on.
    fn sleeper(&self) -> String {
        self.job(&[], &["/bin/sleep", "1000"])
    }

    /// Has a host keep a job of its own.
    fn occupy(&self, xbed: &Xbed) {
        let task = xbed.xbe(["submit", &self.sleeper()]).line();
        xbed.wait_for(&task, "Executing");
    }
}

fn channel(xbed: &Xbed) -> Value {
    xbed.xbe(["host", "--json"]).json()["channel"].clone()
}

fn is_on_the_channel(xbed: &Xbed) -> bool {
    channel(xbed)["away"].is_null()
}

#[track_caller]
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The address that others know a host by.
fn server(xbed: &Xbed) -> String {
    format!("unix://{}", xbed.socket().display())
}

fn anywhere(asked: &Xbed, job: &str) -> Ran {
    asked.xbe(["submit", "--anywhere", "--json", job])
}

/// The id of the job, and the server that has it; none for the one that was asked.
#[track_caller]
fn placed(asked: &Xbed, job: &str) -> (String, Option<String>) {
    let placed = anywhere(asked, job).json();
    let text = |value: &Value| value.as_str().map(str::to_owned);
    (text(&placed["id"]).unwrap(), text(&placed["server"]))
}

/// The ids of all tasks of a host.
fn tasks(xbed: &Xbed) -> Vec<String> {
    let all = xbed.xbe(["ps", "-a", "--json"]).json();
    let all = all.as_array().unwrap().iter();
    all.map(|task| task["id"].as_str().unwrap().to_owned())
        .collect()
}

/// What the error's line says.
#[track_caller]
fn refused(ran: &Ran) -> Value {
    assert_eq!(ran.code, 125, "{ran:?}");
    let line = ran.stderr.lines().find(|line| line.starts_with('{'));
    serde_json::from_str(line.unwrap_or_else(|| panic!("{ran:?}"))).unwrap()
}

/// What the API answers.
fn post(socket: &Path, path: &str, body: &Value) -> (u16, Value) {
    let mut stream = UnixStream::connect(socket).unwrap();
    let body = body.to_string();
    let length = body.len();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap())
}

#[test]
fn a_job_goes_to_the_host_with_the_most_room() {
    let hosts = Hosts::new();
    let own = hosts.host(&["domains = 0"]);
    let (one, two) = (hosts.host(&["domains = 4"]), hosts.host(&["domains = 4"]));
    let job = hosts.sleeper();
    hosts.occupy(&one);
    assert_eq!(placed(&own, &job).1, Some(server(&two)));
    hosts.occupy(&one);
    let (task, at) = placed(&own, &job);
    assert_eq!(at, Some(server(&two)));
    assert_eq!((tasks(&one).len(), tasks(&two).len()), (2, 2));
    // It is a task like any other there, and none here.
    two.wait_for(&task, "Executing");
    assert_eq!(tasks(&own).len(), 0);
    // Who could begin it does so, whatever the others have.
    assert_eq!(placed(&one, &job).1, None);

    let ran = own.xbe([
        "submit",
        "--anywhere",
        "--wait",
        &hosts.job(&[], &["false"]),
    ]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(
        ran.stderr
            .contains(&format!("xbe --server {}", server(&two))),
        "{ran:?}"
    );
}

#[test]
fn a_host_without_the_image_is_not_chosen() {
    let hosts = Hosts::new();
    let images = tempfile::tempdir().unwrap();
    let special = images.path().join("special");
    fs::create_dir(&special).unwrap();
    for file in ["kernel", "initramfs"] {
        fs::write(special.join(file), "x").unwrap();
    }
    let manifest = "kernel = \"kernel\"\ninitramfs = \"initramfs\"\n";
    fs::write(special.join("image.toml"), manifest).unwrap();
    let own = hosts.host(&[]);
    let _idle = hosts.host(&[]);
    let line = format!("images = {:?}", images.path());
    let has_it = hosts.host(&[&line]);
    hosts.occupy(&has_it);
    let job = hosts.job(&["-I", "special"], &["/bin/true"]);
    assert_eq!(placed(&own, &job).1, Some(server(&has_it)));
    drop(has_it);
    let error = refused(&anywhere(&own, &job));
    assert_eq!(error["code"], "no-offer", "{error}");
    let message = error["message"].as_str().unwrap();
    // This host and the other say why.
    assert_eq!(
        message.matches("no image \"special\"").count(),
        2,
        "{message}"
    );
}

#[test]
fn the_job_of_a_full_host_goes_elsewhere_and_waits_where_fewest_wait() {
    let hosts = Hosts::new();
    let own = hosts.host(&["domains = 1"]);
    let full = hosts.host(&["domains = 1"]);
    let free = hosts.host(&["domains = 1"]);
    hosts.occupy(&own);
    hosts.occupy(&full);
    let job = hosts.sleeper();
    let (task, at) = placed(&own, &job);
    assert_eq!(at, Some(server(&free)));
    free.wait_for(&task, "Executing");
    // All are full now: one that waits does so where it was asked for, the next where nobody waits.
    assert_eq!(placed(&own, &job).1, None);
    let first = placed(&own, &job).1.unwrap();
    let second = placed(&own, &job).1.unwrap();
    let mut waits = [first, second];
    waits.sort();
    let mut others = [server(&full), server(&free)];
    others.sort();
    assert_eq!(waits, others);
    for host in [&own, &full, &free] {
        assert_eq!(tasks(host).len(), 2);
    }
}

/// Another socket of an `xbed`, at which the first answer to a question for places comes after `before`.
fn behind(socket: &Path, xbed: &Xbed, before: impl FnOnce() + Send + 'static) {
    let (listener, to) = (UnixListener::bind(socket).unwrap(), xbed.socket());
    let before = Arc::new(Mutex::new(Some(before)));
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, mut server) = (client.unwrap(), UnixStream::connect(&to).unwrap());
            let (mut from_client, mut to_server) =
                (client.try_clone().unwrap(), server.try_clone().unwrap());
            let is_asked = Arc::new(AtomicBool::new(false));
            let asks = is_asked.clone();
            std::thread::spawn(move || {
                let mut bytes = [0; 1 << 16];
                while let Ok(count @ 1..) = from_client.read(&mut bytes) {
                    if bytes.starts_with(b"POST /v1/places") {
                        asks.store(true, Ordering::SeqCst);
                    }
                    to_server.write_all(&bytes[..count]).unwrap();
                }
            });
            let before = before.clone();
            std::thread::spawn(move || {
                let mut bytes = [0; 1 << 16];
                while let Ok(count @ 1..) = server.read(&mut bytes) {
                    if is_asked.load(Ordering::SeqCst)
                        && let Some(before) = before.lock().unwrap().take()
                    {
                        before();
                    }
                    client.write_all(&bytes[..count]).unwrap();
                }
            });
        }
    });
}

#[test]
fn the_job_of_a_host_that_is_killed_after_its_offer_goes_to_the_next_best_once() {
    let hosts = Hosts::new();
    let own = hosts.host(&["domains = 0"]);
    let next = hosts.host(&["domains = 4"]);
    hosts.occupy(&next);
    let mut best = hosts.host(&["domains = 4"]);
    let (pid, socket) = (best.pid().to_string(), best.socket());
    let front = hosts.directory.path().join("front");
    behind(&front, &own, move || {
        run(Command::new("kill").args(["-9", &pid])).ok();
        wait_until("it has died", || UnixStream::connect(&socket).is_err());
    });
    let job = hosts.sleeper();
    let mut submit = own.xbe_command(["submit", "--anywhere", "--json", &job]);
    let placed = run(submit.env("XBE_SERVER", &front)).json();
    assert_eq!(placed["server"], server(&next));
    assert!(best.has_ended());
    best.restart(&[]);
    assert!(best.came_up(), "{}", best.log());
    assert_eq!(tasks(&best).len(), 0);
    assert!(
        tasks(&next)
            .iter()
            .any(|task| placed["id"] == task.as_str())
    );
}

#[test]
fn a_host_that_is_killed_while_it_takes_a_job_has_it_once_and_no_other_has_it() {
    for point in ["place", "accept", "accepted", "placed"] {
        let hosts = Hosts::new();
        let own = hosts.host(&["domains = 0"]);
        let next = hosts.host(&["domains = 4"]);
        hosts.occupy(&next);
        let die = [("XBED_DIE_AT", point.to_owned())];
        let mut best = hosts.host_with(&["domains = 4"], &[], &die);
        let job = hosts.sleeper();
        let mut submit = own.xbe_command(["submit", "--anywhere", "--json", &job]);
        let submit = submit.stdin(Stdio::null()).stdout(Stdio::piped());
        let submit = submit.spawn().unwrap();
        wait_until("it has died", || best.has_ended());
        best.restart(&[]);
        assert!(best.came_up(), "{point}: {}", best.log());
        let output = submit.wait_with_output().unwrap();
        assert!(output.status.success(), "{point}: {output:?}");
        let placed: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(placed["server"], server(&best), "{point}");
        assert_eq!(tasks(&best), [placed["id"].as_str().unwrap()], "{point}");
        assert_eq!(tasks(&next).len(), 1, "{point}");
    }
}

#[test]
fn hosts_join_and_leave_while_others_run() {
    let mut hosts = Hosts::new();
    let own = hosts.host(&["domains = 0"]);
    let job = hosts.sleeper();
    let error = refused(&anywhere(&own, &job));
    assert_eq!(error["code"], "no-offer", "{error}");
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("it runs no domains") && message.contains("0 answered"),
        "{message}"
    );

    let mut one = hosts.host(&[]);
    assert_eq!(placed(&own, &job).1, Some(server(&one)));
    let mut two = hosts.host(&[]);
    assert_eq!(placed(&own, &job).1, Some(server(&two)));
    // One is shut down, and leaves by itself.
    let pid = one.pid().to_string();
    run(Command::new("kill").arg(pid)).ok();
    wait_until("it has ended", || one.has_ended());
    assert!(one.log().contains("stopped;"), "{}", one.log());
    assert_eq!(placed(&own, &job).1, Some(server(&two)));
    two.kill();
    let error = refused(&anywhere(&own, &job));
    assert_eq!(error["code"], "no-offer", "{error}");

    // Without the registry those that are on the channel go on, and one that comes starts all the same.
    one.restart(&[]);
    assert!(one.came_up(), "{}", one.log());
    wait_until("it is back", || is_on_the_channel(&one));
    hosts.registry.kill();
    assert_eq!(placed(&own, &job).1, Some(server(&one)));
    two.restart(&[]);
    assert!(two.came_up(), "{}", two.log());
    two.xbe(["run", "--", "/bin/true"]).ok();
    wait_until("it says why it is alone", || {
        channel(&two)["away"]
            .as_str()
            .is_some_and(|away| away.contains("does not answer"))
    });
    let told = two.xbe(["host"]).ok().stdout;
    assert!(told.contains("not on the channel xbee.hosts"), "{told}");
    // What it can begin itself it does, alone or not; what it cannot it cannot ask for.
    assert_eq!(placed(&two, &job).1, None);
    let large = hosts.job(&["--cpus", "1024"], &["/bin/true"]);
    let error = refused(&anywhere(&two, &large));
    assert_eq!(error["code"], "anywhere-away", "{error}");
    hosts.registry.restart();
    wait_until("it joins", || is_on_the_channel(&two));
    hosts.occupy(&one);
    hosts.occupy(&one);
    assert_eq!(placed(&own, &job).1, Some(server(&two)));
}

#[test]
fn hosts_whose_channel_is_destroyed_make_another() {
    let hosts = Hosts::new();
    let (own, one) = (hosts.host(&["domains = 0"]), hosts.host(&[]));
    let job = hosts.sleeper();
    let joined = |xbed: &Xbed| {
        let log = xbed.log();
        log.matches("on the channel xbee.hosts with").count()
            - log.matches("not on the channel xbee.hosts with").count()
    };
    for round in 1..=3 {
        wait_until("both are on the channel", || {
            [&own, &one].iter().all(|xbed| joined(xbed) == round)
        });
        assert_eq!(placed(&own, &job).1, Some(server(&one)));
        let mut destroy = Command::new(program("kecho"));
        let registry = ["--registry", &hosts.registry.address];
        run(destroy.args(registry).args(["destroy", "xbee.hosts"])).ok();
    }
}

#[test]
fn what_is_asked_or_offered_twice_is_one_task() {
    let hosts = Hosts::new();
    let own = hosts.host(&["domains = 0"]);
    let one = hosts.host(&[]);
    // It says that it is the other one, so that this one offers twice.
    let address = format!("address = {:?}", server(&one));
    let double = hosts.host_with(&[], &[&address], &[]);
    let jsdl = fs::read_to_string(hosts.sleeper()).unwrap();
    let (status, places) = post(&own.socket(), "/v1/places", &json!({ "jsdl": jsdl }));
    assert_eq!(status, 200, "{places}");
    let listed: Vec<_> = places["places"].as_array().unwrap().iter().collect();
    assert_eq!(listed.len(), 1, "{places}");
    assert_eq!(listed[0]["server"], server(&one));
    placed(&own, &hosts.sleeper());
    assert_eq!((tasks(&one).len(), tasks(&double).len()), (1, 0));

    let place = json!({
        "key": "6d8ee3c6-8c0e-4ef9-9d93-2d4f3f4f0c11",
        "at_once": false,
        "request": { "jsdl": jsdl },
    });
    let ids: Vec<String> = std::thread::scope(|scope| {
        let (socket, place) = (one.socket(), &place);
        let ask = |socket: PathBuf| loop {
            let (status, answer) = post(&socket, "/v1/placements", place);
            match status {
                201 => break answer["id"].as_str().unwrap().to_owned(),
                // Another one is at it.
                _ => assert_eq!((status, &answer["code"]), (409, &json!("placing"))),
            }
        };
        let all: Vec<_> = (0..8).map(|_| socket.clone()).collect();
        let all: Vec<_> = all
            .into_iter()
            .map(|socket| scope.spawn(move || ask(socket)))
            .collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert_eq!(tasks(&one).len(), 2);
    // For ever, and over a restart.
    let mut one = one;
    one.kill_and_restart();
    let (status, answer) = post(&one.socket(), "/v1/placements", &place);
    assert_eq!(
        (status, answer["id"].as_str()),
        (201, Some(ids[0].as_str()))
    );
    assert_eq!(tasks(&one).len(), 2);
}

#[test]
fn the_own_xbed_is_restarted_and_the_job_goes_on() {
    let hosts = Hosts::new();
    let mut own = hosts.host(&["domains = 0"]);
    let other = hosts.host(&[]);
    let job = hosts.job(&[], &["/bin/sleep", "3"]);
    let mut submit = own.xbe_command(["submit", "--anywhere", "--wait", &job]);
    let submit = submit.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    wait_until("it is there", || tasks(&other).len() == 1);
    own.kill();
    assert_eq!(submit.unwrap().wait().unwrap().code(), Some(0));
    own.restart(&[]);
    assert!(own.came_up(), "{}", own.log());
    wait_until("it is back", || is_on_the_channel(&own));
    assert_eq!(placed(&own, &hosts.sleeper()).1, Some(server(&other)));
    assert_eq!(tasks(&other).len(), 2);
}

/// Options of the registry, with a certificate of a site.
fn registry_of(site: &Site) -> Vec<String> {
    site.pki(["issue", "--daemon", "registry"]);
    let path = |name: &str| site.path("pki").join(name).display().to_string();
    [
        "--ca",
        "ca.pem",
        "--certificate",
        "registry.pem",
        "--key",
        "registry.key",
        "--crl",
        "crl.pem",
    ]
    .iter()
    .map(|word| match word.starts_with("--") {
        true => (*word).to_owned(),
        false => path(word),
    })
    .chain(["--strict".to_owned()])
    .collect()
}

#[test]
fn with_tls_only_daemons_of_the_same_authority_are_on_the_channel() {
    let (site, elsewhere) = (Site::new(&["alice"]), Site::new(&[]));
    site.pki(["issue", "--daemon", "host2"]);
    let hosts = Hosts::with(Registry::start(&registry_of(&site)));
    let identity = |path: PathBuf| format!("identity = {path:?}");
    let one = identity(site.identity("host2"));
    let port = free_port();
    let listen = format!("listen = \"tcp:[::1]:{port}\"");
    let one = hosts.host_with(&["domains = 4"], &[&one, &listen], &[]);
    TcpStream::connect(("::1", port)).unwrap();
    // The shortest way is closed, so that those who come later come by TCP.
    for socket in fs::read_dir(one.data().join("kecho")).unwrap() {
        fs::remove_file(socket.unwrap().path()).unwrap();
    }
    let own = identity(site.identity("host1"));
    let own = hosts.host_with(&["domains = 0"], &[&own], &[]);
    hosts.occupy(&one);
    // All of these have more room. Of another authority; a user; nobody.
    let foreign = identity(elsewhere.identity("host1"));
    let alice = identity(site.identity("alice"));
    let strangers: Vec<Xbed> = [&[foreign.as_str()][..], &[&alice], &[]]
        .iter()
        .map(|kecho| {
            let mut xbed = hosts.start("sim", &["domains = 4"], kecho, &[]);
            assert!(xbed.came_up(), "{}", xbed.log());
            xbed
        })
        .collect();
    for stranger in &strangers {
        wait_until("it is refused", || {
            channel(stranger)["away"]
                .as_str()
                .is_some_and(|away| away.contains("does not answer"))
        });
        println!("{}", channel(stranger)["away"]);
    }
    let (task, at) = placed(&own, &hosts.sleeper());
    assert_eq!(at, Some(server(&one)));
    assert!(tasks(&one).contains(&task));
    for stranger in &strangers {
        assert_eq!(tasks(stranger).len(), 0);
        assert!(!is_on_the_channel(stranger));
    }

    // It is said before, too.
    let doctor = |identity: PathBuf| {
        let mut doctor = Command::new(program("xbe"));
        let doctor = doctor.arg("--identity").arg(identity);
        let args = ["doctor", "--json", "--registry", &hosts.registry.address];
        let said = run(doctor.args(args)).stdout;
        let line = said.lines().find(|line| line.contains("\"registry\""));
        serde_json::from_str::<Value>(line.unwrap()).unwrap()
    };
    let well = doctor(site.identity("host1"));
    assert_eq!(well["health"], "ok", "{well}");
    assert!(
        well["found"].as_str().unwrap().contains("knows 1 channel"),
        "{well}"
    );
    assert_eq!(doctor(site.identity("alice"))["health"], "warning");

    // The certificate of the host that had the job is revoked: the others look into the same list.
    let certificate = site.path("pki/host2.pem");
    site.pki(["revoke", certificate.to_str().unwrap()]);
    assert_eq!(doctor(site.identity("host2"))["health"], "warning");
    // They look every two seconds.
    std::thread::sleep(Duration::from_secs(4));
    let before = tasks(&one).len();
    let refused = own.xbe(["submit", "--anywhere", &hosts.sleeper()]);
    assert_ne!(refused.code, 0, "{refused:?}");
    assert_eq!(tasks(&one).len(), before);
    assert!(is_on_the_channel(&own));

    // Who has no certificate at all does not start.
    let mut none = hosts.start("sim", &[], &["identity = \"/nowhere/x\""], &[]);
    wait_until("it has ended", || none.has_ended());
    assert!(none.log().contains("[kecho]"), "{}", none.log());
}

#[test]
fn through_a_broker_the_user_is_the_same_on_each_host() {
    let site = Site::new(&["alice"]);
    site.pki(["issue", "--daemon", "host2"]);
    let (_broker, port, _) = plain_broker(&site);
    let uri = |queue: &str| format!("stomp://127.0.0.1:{port}/{queue}");
    let hosts = Hosts::new();
    let host = |name: &str, domains: &str| {
        let queue = site.table("message-queue", name, &uri(name));
        let queue: Vec<&str> = queue.iter().map(String::as_str).collect();
        let lines = [&[domains], &queue[..]].concat();
        let xbed = hosts.host(&lines);
        site.wait_for("alice", &uri(name), &xbed);
        xbed
    };
    let own = host("host1", "domains = 0");
    let other = host("host2", "domains = 2");
    // Reached from its own machine only, which the user is not on.
    let _local = hosts.host(&["domains = 8"]);
    let (from, to) = (site.path("input"), site.path("output"));
    fs::write(&from, "there and back").unwrap();
    let (from, target) = (
        format!("{}:/in", from.display()),
        format!("/in:{}", to.display()),
    );
    let job = hosts.job(&["-v", &from, "-o", &target], &["/bin/true"]);
    let args = ["submit", "--anywhere", "--wait", "--json", &job];
    let ran = site.xbe("alice", &uri("host1"), args).ok();
    assert!(ran.stdout.contains(&uri("host2")), "{ran:?}");
    assert_eq!(fs::read_to_string(to).unwrap(), "there and back");
    assert_eq!((tasks(&own).len(), tasks(&other).len()), (0, 1));
    let listed = site.xbe("alice", &uri("host2"), ["ps", "-a", "--json"]);
    assert_eq!(listed.json().as_array().unwrap().len(), 1);
    // Nobody who can be reached could.
    let large = hosts.job(&["--cpus", "1024"], &["/bin/true"]);
    let args = ["submit", "--anywhere", "--json", &large];
    let error = refused(&site.xbe("alice", &uri("host1"), args));
    assert_eq!(error["code"], "no-offer", "{error}");
}

#[test]
fn virtual_machines_of_another_host() {
    if !xbee_tests::has_image("base") {
        return;
    }
    let hosts = Hosts::new();
    let host = |line: &str| {
        let mut xbed = hosts.start("qemu", &[line], &[], &[]);
        assert!(xbed.came_up(), "{}", xbed.log());
        wait_until("it is on the channel", || is_on_the_channel(&xbed));
        xbed
    };
    let (own, other) = (host("domains = 0"), host("domains = 1"));
    let result = hosts.directory.path().join("result");
    let target = format!("/out:{}", result.display());
    let command = [
        "/bin/sh",
        "-c",
        "echo to a file > /out; echo to output; exit 3",
    ];
    let job = hosts.job(&["-o", &target], &command);
    let ran = own.xbe(["submit", "--anywhere", "--wait", "--json", &job]);
    assert_eq!(ran.code, 3, "{ran:?}");
    let placed: Value = serde_json::from_str(ran.stdout.lines().next().unwrap()).unwrap();
    assert_eq!(placed["server"], server(&other));
    let mut logs = Command::new(program("xbe"));
    let id = placed["id"].as_str().unwrap();
    let logs = run(logs.args(["--server", &server(&other), "logs", id]));
    assert_eq!(logs.ok().stdout, "to output\n");
    assert_eq!(fs::read_to_string(result).unwrap(), "to a file\n");
    assert_eq!((tasks(&own).len(), tasks(&other).len()), (0, 1));
    other.assert_nothing_left();
}
