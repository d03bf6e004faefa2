//! `xbe` and `xbed` that see nothing of each other but a message broker.
#![allow(clippy::unwrap_used)]

#[path = "queue/files.rs"]
mod files;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use xbee_tests::site::{
    Site, activemq, document, free_port, one_file, plain_broker, rabbitmq, wait_for_port,
};
use xbee_tests::{Xbed, program, run};

/// Nothing here takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// The embedded broker, with TLS.
struct Broker {
    process: Child,
    port: u16,
    config: PathBuf,
}

impl Broker {
    fn start(site: &Site) -> Broker {
        let (certificate, key) = (site.path("broker.pem"), site.path("broker.key"));
        let mut openssl = Command::new("openssl");
        openssl
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
            ])
            .args([
                "-nodes",
                "-subj",
                "/CN=localhost",
                "-addext",
                "subjectAltName=DNS:localhost",
            ])
            .args(["-addext", "extendedKeyUsage=serverAuth"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&certificate);
        run(&mut openssl).ok();
        let config = site.path("broker.toml");
        let text = format!("[tls]\ncertificate = {certificate:?}\nkey = {key:?}\n");
        fs::write(&config, text).unwrap();
        let port = free_port();
        let process = Broker::spawn(&config, port);
        Broker {
            process,
            port,
            config,
        }
    }

    fn spawn(config: &Path, port: u16) -> Child {
        let process = Command::new(program("xbed"))
            .args([
                "broker",
                "--listen",
                &format!("127.0.0.1:{port}"),
                "--config",
            ])
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for_port(port);
        process
    }

    fn uri(&self) -> String {
        format!("stomp+ssl://localhost:{}/jobs", self.port)
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn restart(&mut self) {
        self.process = Broker::spawn(&self.config, self.port);
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn xbed(site: &Site, uri: &str) -> Xbed {
    let config = site.config(uri);
    let config: Vec<&str> = config.iter().map(String::as_str).collect();
    Xbed::start("sim", &config)
}

/// What a session of some commands has to say, whatever the broker.
fn a_short_session(site: &Site, uri: &str) {
    let alice = |args: &[&str]| site.xbe("alice", uri, args.iter().copied());
    let ran = alice(&["run", "--", "/bin/echo", "hello"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "hello\n"), "{ran:?}");
    let fails = document(site, "fails.xsdl", &["/bin/sh", "-c", "exit 3"]);
    assert_eq!(alice(&["submit", "--wait", &fails]).code, 3);
    let sleeps = document(site, "sleeps.xsdl", &["/bin/sleep", "1000"]);
    let task = alice(&["submit", &sleeps]).line();
    let listed = alice(&["ps", "--json"]).json();
    assert_eq!(listed[0]["id"], task.as_str(), "{listed}");
    let mut follower = Follower::start(site.command("alice", uri, ["watch", &task]));
    assert!(follower.line().contains("Confirmed"));
    wait_for(|| alice(&["status", "--json", &task]).json()["substate"] == "Executing");

    // More than is ever on its way, both ways.
    let text = "0123456789abcde\n".repeat(64 << 10);
    let input = site.path("input");
    fs::write(&input, &text).unwrap();
    let mut exec = site.command("alice", uri, ["exec", "-i", &task, "--", "/bin/cat"]);
    let exec = exec
        .stdin(fs::File::open(&input).unwrap())
        .output()
        .unwrap();
    assert!(exec.status.success(), "{exec:?}");
    assert!(
        exec.stdout == text.as_bytes(),
        "{} bytes",
        exec.stdout.len()
    );

    alice(&["terminate", &task]).ok();
    assert_eq!(follower.end(), 125);
}

fn wait_for(mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < LIMIT, "nothing comes of it");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A command that prints something now and then.
struct Follower {
    process: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Follower {
    fn start(mut command: Command) -> Follower {
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = command.stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap());
        Follower { process, lines }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line
    }

    /// Its exit code, when it has ended by itself.
    fn end(&mut self) -> i32 {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(begun.elapsed() < LIMIT, "it does not end");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn errors(&mut self) -> String {
        let mut text = String::new();
        let mut errors = self.process.stderr.take().unwrap();
        errors.read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn what_the_socket_does_the_queue_does() {
    let site = Site::new(&["alice", "bob"]);
    let broker = Broker::start(&site);
    let uri = broker.uri();
    let xbed = xbed(&site, &uri);
    site.wait_for("alice", &uri, &xbed);
    a_short_session(&site, &uri);

    // Each user has what is theirs, and no more; root on the host has all.
    let of = |who: &str, args: &[&str]| site.xbe(who, &uri, args.iter().copied());
    assert_eq!(
        of("bob", &["ps", "-a", "--json"]).json(),
        serde_json::json!([])
    );
    let all = of("alice", &["ps", "-a", "--json"]).json();
    let task = all[0]["id"].as_str().unwrap();
    for command in ["status", "logs", "terminate", "rm"] {
        let ran = of("bob", &[command, "--json", task]);
        assert!(
            ran.code == 125 && ran.stderr.contains("task-not-found"),
            "{ran:?}"
        );
    }
    let owners = |list: &Value| {
        let list = list.as_array().unwrap();
        list.iter()
            .map(|task| task["owner"].as_u64().unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(owners(&all), [1 << 31; 3]);
    of("bob", &["run", "--", "/bin/true"]).ok();
    let local = xbed.xbe(["ps", "-a", "--json"]).json();
    assert_eq!(owners(&local), [1 << 31, 1 << 31, 1 << 31, (1 << 31) + 1]);

    let document = document(&site, "true.xsdl", &["/bin/true"]);
    let ran = of("alice", &["submit", "--priority", "1", &document]);
    assert!(
        ran.code == 125 && ran.stderr.contains("priority 1"),
        "{ran:?}"
    );
}

#[test]
fn who_is_not_believed_is_told_so_and_gets_nothing() {
    let site = Site::new(&["alice", "bob"]);
    let strangers = Site::new(&["alice"]);
    let broker = Broker::start(&site);
    let uri = broker.uri();
    let xbed = xbed(&site, &uri);
    site.wait_for("alice", &uri, &xbed);

    // Somebody else's alice.
    let mut stranger = strangers.command("alice", &uri, ["ps"]);
    stranger.env("XBE_BROKER_CA", site.path("broker.pem"));
    let ran = run(&mut stranger);
    assert_eq!(ran.code, 125);
    assert!(
        ran.stderr.contains("502 UNAUTHORIZED: not believed here"),
        "{ran:?}"
    );
    // A broker that cannot say who it is.
    let mut other = site.command("alice", &uri, ["ps"]);
    let ran = run(other.env_remove("XBE_BROKER_CA"));
    assert!(
        ran.code == 125 && ran.stderr.contains("certificate"),
        "{ran:?}"
    );
    // Nobody there, and somebody without a certificate.
    let ran = site.xbe("carol", &uri, ["ps"]);
    assert!(
        ran.code == 125 && ran.stderr.contains("carol.pem"),
        "{ran:?}"
    );

    // One who was believed, and is not any more, while connected.
    let sleeps = document(&site, "sleeps.xsdl", &["/bin/sleep", "1000"]);
    let task = site.xbe("bob", &uri, ["submit", &sleeps]).line();
    let mut follower = Follower::start(site.command("bob", &uri, ["logs", "-f", &task]));
    let mut watcher = Follower::start(site.command("bob", &uri, ["watch", &task]));
    watcher.line();
    let subjects = site.path("pki/subjects");
    let list = fs::read_to_string(&subjects).unwrap();
    assert!(list.contains("user CN=bob\n"), "{list}");
    fs::write(&subjects, list.replace("user CN=bob\n", "")).unwrap();
    for one in [&mut follower, &mut watcher] {
        assert_eq!(one.end(), 125);
        let errors = one.errors();
        assert!(errors.contains("502 UNAUTHORIZED"), "{errors}");
    }
    assert_eq!(site.xbe("bob", &uri, ["ps"]).code, 125);
    assert_eq!(site.xbe("alice", &uri, ["ps"]).code, 0);
    fs::write(&subjects, list).unwrap();
    // Revoked for good.
    site.xbe("bob", &uri, ["ps"]).ok();
    let certificate = site.path("pki/bob.pem");
    site.pki(["revoke", certificate.to_str().unwrap()]);
    let ran = site.xbe("bob", &uri, ["ps"]);
    assert!(
        ran.code == 125 && ran.stderr.contains("502 UNAUTHORIZED"),
        "{ran:?}"
    );
}

#[test]
fn a_broker_that_was_killed_comes_back_and_all_go_on() {
    let site = Site::new(&["alice"]);
    let mut broker = Broker::start(&site);
    let uri = broker.uri();
    let xbed = xbed(&site, &uri);
    site.wait_for("alice", &uri, &xbed);
    let sleeps = document(&site, "sleeps.xsdl", &["/bin/sleep", "1000"]);
    let task = site.xbe("alice", &uri, ["submit", &sleeps]).line();
    let logs = ["logs", "-f", "--console", &task];
    let mut follower = Follower::start(site.command("alice", &uri, logs));
    assert_ne!(follower.line(), "");
    let mut watcher = Follower::start(site.command("alice", &uri, ["watch", &task]));
    assert!(watcher.line().contains("Confirmed"));

    broker.kill();
    let ran = site.xbe("alice", &uri, ["ps"]);
    assert!(
        ran.code == 125 && ran.stderr.contains("cannot connect to the broker"),
        "{ran:?}"
    );
    broker.restart();
    site.wait_for("alice", &uri, &xbed);
    for one in [&mut follower, &mut watcher] {
        let ended = one.process.try_wait().unwrap();
        assert!(
            ended.is_none(),
            "{ended:?} {}\n{}",
            one.errors(),
            xbed.log()
        );
    }
    // By another way, so that those who wait hear of it by theirs alone.
    xbed.xbe(["terminate", &task]).ok();
    assert_eq!(follower.end(), 0);
    assert_eq!(watcher.end(), 125);

    // Its own connection has ended with it: nobody waits for a process in vain.
    let log = xbed.log();
    assert!(
        log.contains("the connection to the broker was lost"),
        "{log}"
    );
}

/// Somebody with OpenSSL and a socket, who knows the thesis and not this program.
struct Stranger<'a> {
    site: &'a Site,
    stream: BufReader<TcpStream>,
    stream_id: String,
    sequence: u32,
    /// Where the daemon wants what is sealed for it.
    daemon: String,
}

const ANSWERS: &str = "/queue/answers-of-alice";

fn uuid() -> String {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap();
    uuid.trim().to_owned()
}

impl<'a> Stranger<'a> {
    fn connect(site: &'a Site, port: u16) -> Stranger<'a> {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut stranger = Stranger {
            site,
            stream: BufReader::new(stream),
            stream_id: uuid(),
            sequence: 0,
            daemon: String::new(),
        };
        stranger.send("CONNECT\naccept-version:1.1\nhost:/\n\n\0".as_bytes());
        assert_eq!(stranger.frame().0[0], "CONNECTED");
        let subscribe = format!("SUBSCRIBE\nid:1\ndestination:{ANSWERS}\n\n\0");
        stranger.send(subscribe.as_bytes());
        let own = fs::read_to_string(site.path("pki/alice.pem")).unwrap();
        let hello = stranger.message(&format!("<xbe:Certificate>{own}</xbe:Certificate>"));
        stranger.post("/queue/jobs", hello.as_bytes());
        let (headers, body) = stranger.frame();
        let body = String::from_utf8(body).unwrap();
        let certificate = body.split("<xbe:Certificate>").nth(1).unwrap();
        let certificate = certificate.split("</").next().unwrap();
        fs::write(site.path("daemon.pem"), certificate).unwrap();
        let to = headers
            .iter()
            .find_map(|line| line.strip_prefix("reply-to:"));
        stranger.daemon = to.unwrap().to_owned();
        stranger
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).unwrap();
    }

    fn post(&mut self, destination: &str, body: &[u8]) {
        let length = body.len();
        let head = format!(
            "SEND\ndestination:{destination}\nreply-to:{ANSWERS}\ncontent-length:{length}\n\n"
        );
        self.send(&[head.as_bytes(), body, b"\0"].concat());
    }

    /// A frame's command and headers, and its body.
    fn frame(&mut self) -> (Vec<String>, Vec<u8>) {
        let (mut lines, mut length) = (vec![], None);
        loop {
            let mut line = String::new();
            assert_ne!(self.stream.read_line(&mut line).unwrap(), 0, "{lines:?}");
            let line = line.trim_end();
            if line.is_empty() && !lines.is_empty() {
                break;
            }
            if let Some(text) = line.strip_prefix("content-length:") {
                length = Some(text.parse().unwrap());
            }
            if !line.is_empty() {
                lines.push(line.to_owned());
            }
        }
        let mut body = vec![0; length.unwrap_or(0)];
        self.stream.read_exact(&mut body).unwrap();
        assert_eq!(self.stream.read_until(0, &mut vec![]).unwrap(), 1);
        (lines, body)
    }

    fn message(&mut self, body: &str) -> String {
        self.sequence += 1;
        let mut date = Command::new("date");
        let time = run(date.args(["-u", "+%Y-%m-%dT%H:%M:%S.%3NZ"])).line();
        let (id, stream, sequence) = (uuid(), &self.stream_id, self.sequence);
        format!(
            "<m:message xmlns:m='http://www.xenbee.net/schema/2008/02/xbe-msg' \
             xmlns:xbe='http://www.xenbee.net/schema/2008/02/xbe'>\
             <m:header><m:to>CN=host1</m:to><m:from>CN=alice</m:from>\
             <xbe:MessageID>{id}</xbe:MessageID><xbe:Time>{time}</xbe:Time>\
             <xbe:Stream>{stream}</xbe:Stream><xbe:Sequence>{sequence}</xbe:Sequence></m:header>\
             <m:body>{body}</m:body></m:message>"
        )
    }

    fn cms(&self, args: &str, input: &[u8]) -> Vec<u8> {
        fs::write(self.site.path("in"), input).unwrap();
        let mut openssl = Command::new("openssl");
        openssl.args(["cms", "-binary", "-in", "in", "-out", "out"]);
        let openssl = openssl
            .args(args.split(' '))
            .current_dir(self.site.path(""));
        run(openssl).ok();
        fs::read(self.site.path("out")).unwrap()
    }

    fn seal(&mut self, body: &str) -> Vec<u8> {
        let message = self.message(body);
        self.valid(message.as_bytes());
        let sign = "-sign -nodetach -outform DER -signer pki/alice.pem -inkey pki/alice.key";
        let signed = self.cms(sign, message.as_bytes());
        self.cms(
            "-encrypt -aes-256-gcm -outform DER -recip daemon.pem",
            &signed,
        )
    }

    /// What the daemon says to a request.
    fn ask(&mut self, body: &str) -> String {
        self.say(body);
        self.answer()
    }

    fn say(&mut self, body: &str) {
        let sealed = self.seal(body);
        let daemon = self.daemon.clone();
        self.post(&daemon, &sealed);
    }

    /// The next message of the daemon.
    fn answer(&mut self) -> String {
        let (_, answer) = self.frame();
        let decrypt = "-decrypt -inform DER -recip pki/alice.pem -inkey pki/alice.key";
        let signed = self.cms(decrypt, &answer);
        let message = self.cms("-verify -inform DER -CAfile pki/ca.pem", &signed);
        self.valid(&message);
        String::from_utf8(message).unwrap()
    }

    fn decode_base64(&self, text: &str) -> String {
        fs::write(self.site.path("base64"), text).unwrap();
        let mut base64 = Command::new("openssl");
        let base64 = base64
            .args(["base64", "-d", "-A", "-in"])
            .arg(self.site.path("base64"));
        run(base64).ok().stdout
    }

    /// The schema says so too, where there is something to read it.
    fn valid(&self, message: &[u8]) {
        let schema = xbee_tests::root().join("host/envelope/schema/xbe-messages.xsd");
        let path = self.site.path("message.xml");
        fs::write(&path, message).unwrap();
        let mut xmllint = Command::new("xmllint");
        let xmllint = xmllint.args(["--nonet", "--noout", "--schema"]).arg(schema);
        match xmllint.arg(path).output() {
            Ok(output) => assert!(output.status.success(), "{output:?}"),
            Err(error) => println!("skipped: xmllint: {error}"),
        }
    }
}

#[test]
fn what_is_lost_or_repeated_breaks_the_connection() {
    let site = Site::new(&["alice"]);
    let (_broker, port, uri) = plain_broker(&site);
    let xbed = xbed(&site, &uri);
    site.wait_for("alice", &uri, &xbed);
    let mut stranger = Stranger::connect(&site, port);
    let data = |connection: &str, offset: usize, text: &str| {
        fs::write(site.path("text"), text).unwrap();
        let mut base64 = Command::new("openssl");
        let base64 = base64.args(["base64", "-A", "-in"]).arg(site.path("text"));
        let bytes = run(base64).line();
        format!(
            "<xbe:Data><xbe:Connection>{connection}</xbe:Connection><xbe:Offset>{offset}</xbe:Offset>\
             <xbe:Bytes>{bytes}</xbe:Bytes></xbe:Data>"
        )
    };
    let connect = |connection: &str| {
        format!("<xbe:Connect><xbe:Connection>{connection}</xbe:Connection></xbe:Connect>")
    };
    let get = "GET /v1/tasks HTTP/1.1\r\nhost: x\r\n\r\n";
    let broken = "the broker has lost or repeated a message";
    // The same again, something that is missing, and one that was never opened.
    for (offset, reason) in [
        (0, broken),
        (get.len() + 1, broken),
        (0, "no such connection"),
    ] {
        let connection = uuid();
        if reason == broken {
            stranger.say(&connect(&connection));
            let answer = stranger.ask(&data(&connection, 0, get));
            let bytes = stranger.decode_base64(text_of(&answer, "Bytes"));
            assert!(bytes.starts_with("HTTP/1.1 200 OK"), "{bytes}");
        }
        let answer = stranger.ask(&data(&connection, offset, get));
        assert!(answer.contains("<xbe:Reset>"), "{answer}");
        assert!(text_of(&answer, "Reason").contains(reason), "{answer}");
    }
    site.xbe("alice", &uri, ["ps"]).ok();
}

fn text_of<'a>(xml: &'a str, name: &str) -> &'a str {
    let begin = xml
        .find(&format!("<xbe:{name}>"))
        .unwrap_or_else(|| panic!("{name}: {xml}"));
    let text = &xml[begin + name.len() + 6..];
    &text[..text.find('<').unwrap()]
}

#[test]
fn a_stranger_speaks_the_thesis() {
    let site = Site::new(&["alice"]);
    let (_broker, port, uri) = plain_broker(&site);
    let xbed = xbed(&site, &uri);
    site.wait_for("alice", &uri, &xbed);
    let mut stranger = Stranger::connect(&site, port);

    let reservation = "<xbe:ReservationRequest><xbe:DurationSeconds>600</xbe:DurationSeconds>\
        <xbe:CPUs>1</xbe:CPUs><xbe:MemoryBytes>536870912</xbe:MemoryBytes>\
        <xbe:DiskBytes>0</xbe:DiskBytes></xbe:ReservationRequest>";
    let answer = stranger.ask(reservation);
    let (ticket, task) = (
        text_of(&answer, "Ticket").to_owned(),
        text_of(&answer, "TaskID").to_owned(),
    );
    let status = format!("<xbe:StatusRequest><xbe:TaskID>{task}</xbe:TaskID></xbe:StatusRequest>");
    assert_eq!(text_of(&stranger.ask(&status), "State"), "Pending");
    // The same user by another way.
    let listed = site.xbe("alice", &uri, ["ps", "--json"]).json();
    assert_eq!(listed[0]["id"], task.as_str(), "{listed}");

    let job = document(&site, "sleeps.xsdl", &["/bin/sleep", "1000"]);
    let job = fs::read_to_string(job)
        .unwrap()
        .replace('&', "&amp;")
        .replace('<', "&lt;");
    let confirm = |job: &str| {
        format!(
            "<xbe:ConfirmReservation><xbe:Ticket>{ticket}</xbe:Ticket><xbe:Job>{job}</xbe:Job>\
             <xbe:Start>false</xbe:Start></xbe:ConfirmReservation>"
        )
    };
    // Who sends no files has none: those of the host are not for users on other machines.
    let mut print = Command::new(program("xbe"));
    let print = print.args(["run", "--print-jsdl", "-v", "/etc/passwd:/in", "--", "cat"]);
    let of_host = run(print).ok().stdout.replace('<', "&lt;");
    let answer = stranger.ask(&confirm(&of_host));
    assert_eq!(text_of(&answer, "Code"), "400");
    assert!(
        answer.contains("/etc/passwd is no file for this job"),
        "{answer}"
    );
    let confirm = confirm(&job);
    assert_eq!(text_of(&stranger.ask(&confirm), "Code"), "200");
    let start = |ticket: &str| {
        format!("<xbe:StartRequest><xbe:Ticket>{ticket}</xbe:Ticket></xbe:StartRequest>")
    };
    let answer = stranger.ask(&start("0123456789abcdef0123456789abcdef"));
    assert_eq!(text_of(&answer, "Code"), "501");
    assert_eq!(text_of(&stranger.ask(&start(&ticket)), "Code"), "200");
    wait_for(|| text_of(&stranger.ask(&status), "State") == "Running");
    let terminate =
        format!("<xbe:TerminateRequest><xbe:TaskID>{task}</xbe:TaskID></xbe:TerminateRequest>");
    assert_eq!(text_of(&stranger.ask(&terminate), "Code"), "200");
    wait_for(|| text_of(&stranger.ask("<xbe:StatusRequest/>"), "State") == "Cancelled");
    let answer = stranger.ask(&status.replace(&task, &uuid()));
    assert_eq!(text_of(&answer, "Code"), "404");
    // The cache: not of the host's files.
    assert!(
        !stranger
            .ask("<xbe:ListCache/>")
            .contains("<xbe:CacheEntry>")
    );
    let file = |uri: &str| format!("<xbe:CacheFile><xbe:URI>{uri}</xbe:URI></xbe:CacheFile>");
    assert_eq!(
        text_of(&stranger.ask(&file("file:///etc/hostname")), "Code"),
        "400"
    );
    let answer = stranger.ask(&file(&one_file("content")));
    assert_eq!(text_of(&answer, "SizeBytes"), "7");
    let entry = text_of(&answer, "Entry").to_owned();
    assert_eq!(text_of(&stranger.ask("<xbe:ListCache/>"), "Entry"), entry);
    let listed = site.xbe("alice", &uri, ["cache", "ls", "--json"]).json();
    assert_eq!(listed[0]["id"], entry.as_str(), "{listed}");
    let remove = format!("<xbe:CacheRemove><xbe:Entry>{entry}</xbe:Entry></xbe:CacheRemove>");
    assert_eq!(text_of(&stranger.ask(&remove), "Code"), "200");
    assert_eq!(text_of(&stranger.ask(&remove), "Code"), "404");

    // What a broker does: the same again, and something else.
    let sealed = stranger.seal(&status);
    let daemon = stranger.daemon.clone();
    let mut codes = vec![];
    for message in [
        &sealed[..],
        &sealed[..],
        &sealed[..sealed.len() - 9],
        b"hello",
    ] {
        stranger.post(&daemon, message);
        let (_, answer) = stranger.frame();
        // Who is refused so is nobody to whom something can be sealed.
        codes.push(match String::from_utf8(answer) {
            Ok(answer) if answer.starts_with("<?xml") => text_of(&answer, "Code").to_owned(),
            _ => "sealed".to_owned(),
        });
    }
    assert_eq!(codes, ["sealed", "503", "503", "503"]);
}

#[test]
fn the_same_through_rabbitmq() {
    let site = Site::new(&["alice"]);
    let Some((_broker, address)) = rabbitmq(&site) else {
        return;
    };
    through(&site, &address);
}

#[test]
fn the_same_through_activemq() {
    let site = Site::new(&["alice"]);
    let Some((_broker, address)) = activemq(&site) else {
        return;
    };
    through(&site, &address);
}

fn through(site: &Site, address: &str) {
    let uri = format!("{address}/jobs");
    let xbed = xbed(site, &uri);
    site.wait_for("alice", &uri, &xbed);
    a_short_session(site, &uri);
}
