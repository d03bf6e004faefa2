//! Users and daemons with certificates, and a message broker for them.

use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{PATIENCE, Ran, Xbed, program, run};

/// A port of the loopback on which nobody listens.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// An authority with a daemon and some users, in a directory of its own.
#[derive(Debug)]
pub struct Site {
    directory: tempfile::TempDir,
}

impl Site {
    /// With a daemon `host1` and these users.
    pub fn new(users: &[&str]) -> Site {
        let directory = tempfile::Builder::new().prefix("xq").tempdir().unwrap();
        let site = Site { directory };
        site.pki(["init", "Test-CA"]);
        site.pki(["issue", "--daemon", "host1"]);
        for user in users {
            site.pki(["issue", user]);
        }
        site
    }

    /// A file of its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `xbe pki`.
    pub fn pki<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Ran {
        let mut command = Command::new(program("xbe"));
        command
            .args(["pki", "--dir"])
            .arg(self.path("pki"))
            .args(args);
        run(&mut command).ok()
    }

    /// Who somebody is, as `--identity` has it.
    pub fn identity(&self, name: &str) -> PathBuf {
        self.path("pki").join(name)
    }

    /// What `xbed` has in its configuration.
    pub fn config(&self, uri: &str) -> Vec<String> {
        self.table("message-queue", "host1", uri)
    }

    /// The same for a table and a daemon of this name.
    pub fn table(&self, name: &str, daemon: &str, uri: &str) -> Vec<String> {
        let identity = self.identity(daemon);
        let mut lines = vec![
            format!("[{name}]"),
            format!("uri = {uri:?}"),
            format!("identity = {identity:?}"),
        ];
        if uri.starts_with("stomp+ssl:") {
            lines.push(format!("broker-ca = {:?}", self.path("broker.pem")));
        }
        lines
    }

    /// An `xbe` command of somebody.
    pub fn command<'a>(
        &self,
        who: &str,
        uri: &str,
        args: impl IntoIterator<Item = &'a str>,
    ) -> Command {
        let mut command = Command::new(program("xbe"));
        command
            .args(args)
            .env("XBE_SERVER", uri)
            .env("XBE_IDENTITY", self.identity(who))
            .env("XBE_BROKER_CA", self.path("broker.pem"))
            .env("NO_COLOR", "1");
        if !uri.starts_with("stomp+ssl:") {
            command.env_remove("XBE_BROKER_CA");
        }
        command
    }

    /// Runs it.
    pub fn xbe<'a>(&self, who: &str, uri: &str, args: impl IntoIterator<Item = &'a str>) -> Ran {
        run(&mut self.command(who, uri, args))
    }

    /// Waits until somebody is answered through the queue.
    #[track_caller]
    pub fn wait_for(&self, who: &str, uri: &str, xbed: &Xbed) {
        let begun = Instant::now();
        loop {
            let ran = self.xbe(who, uri, ["host"]);
            if ran.code == 0 {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{ran:?}\n{}", xbed.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Waits until somebody listens there.
pub fn wait_for_port(port: u16) {
    let begun = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(begun.elapsed() < PATIENCE, "nobody listens on port {port}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A document, as `xbe run` would submit it.
pub fn document(site: &Site, name: &str, command: &[&str]) -> String {
    let mut print = Command::new(program("xbe"));
    print.args(["run", "--print-jsdl", "--"]).args(command);
    let path = site.path(name);
    fs::write(&path, run(&mut print).ok().stdout).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The embedded broker without TLS, its port, and its address.
pub fn plain_broker(site: &Site) -> (Process, u16, String) {
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let mut command = Command::new(program("xbed"));
    let command = command.args(["broker", "--listen", &listen]);
    let broker = Process::start(command, port, &site.path("broker"));
    (broker, port, format!("stomp://{listen}/jobs"))
}

/// A broker in processes of its own group.
#[derive(Debug)]
pub struct Process {
    process: Child,
    /// Ends what it leaves behind.
    pub after: Option<Command>,
}

impl Process {
    /// Starts one, and waits until it listens.
    pub fn start(command: &mut Command, port: u16, directory: &Path) -> Process {
        fs::create_dir_all(directory).unwrap();
        let log = fs::File::create(directory.join("log")).unwrap();
        let command = command.process_group(0).stdin(Stdio::null());
        let command = command.stdout(log.try_clone().unwrap()).stderr(log);
        let process = Process {
            process: command.spawn().unwrap(),
            after: None,
        };
        wait_for_port(port);
        process
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let group = format!("-{}", self.process.id());
        let kill = |signal| {
            // Nothing, if all have ended.
            let kill = Command::new("kill")
                .args([signal, "--", &group])
                .stderr(Stdio::null())
                .status();
            assert!(kill.is_ok());
        };
        kill("-TERM");
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(20)
            && matches!(self.process.try_wait(), Ok(None))
        {
            std::thread::sleep(Duration::from_millis(20));
        }
        kill("-KILL");
        let _ = self.process.wait();
        if let Some(after) = &mut self.after {
            let _ = after.stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
    }
}

fn is_there(path: &str) -> bool {
    let there = Path::new(path).exists();
    if !there {
        println!("skipped: {path} is missing: ci/install mq");
    }
    there
}

/// RabbitMQ, and its address without a queue; `None`, with a printed reason, if it is missing.
pub fn rabbitmq(site: &Site) -> Option<(Process, String)> {
    const SERVER: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";
    if !is_there(SERVER) {
        return None;
    }
    let directory = site.path("rabbit");
    fs::create_dir(&directory).unwrap();
    let port = free_port();
    let (amqp, distribution, mapper) = (free_port(), free_port(), free_port());
    let config =
        format!("listeners.tcp.1 = 127.0.0.1:{amqp}\nstomp.listeners.tcp.1 = 127.0.0.1:{port}\n");
    fs::write(directory.join("rabbitmq.conf"), config).unwrap();
    fs::write(directory.join("plugins"), "[rabbitmq_stomp].\n").unwrap();
    let mut command = Command::new(SERVER);
    command
        .env("HOME", &directory)
        .env("RABBITMQ_NODENAME", format!("test{port}@localhost"))
        .env("RABBITMQ_MNESIA_BASE", directory.join("mnesia"))
        .env("RABBITMQ_LOG_BASE", directory.join("logs"))
        .env("RABBITMQ_PID_FILE", directory.join("pid"))
        .env("RABBITMQ_CONFIG_FILE", directory.join("rabbitmq.conf"))
        .env("RABBITMQ_ENABLED_PLUGINS_FILE", directory.join("plugins"))
        .env("RABBITMQ_DIST_PORT", distribution.to_string())
        .env(
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
            "-kernel inet_dist_use_interface {127,0,0,1}",
        )
        .env("ERL_EPMD_ADDRESS", "127.0.0.1")
        .env("ERL_EPMD_PORT", mapper.to_string());
    let mut broker = Process::start(&mut command, port, &directory);
    let mut end = Command::new("epmd");
    end.args(["-port", &mapper.to_string(), "-kill"]);
    broker.after = Some(end);
    Some((broker, format!("stomp://guest:guest@127.0.0.1:{port}")))
}

/// The same of ActiveMQ.
pub fn activemq(site: &Site) -> Option<(Process, String)> {
    const JAR: &str = "/usr/share/activemq/bin/activemq.jar";
    if !is_there(JAR) || !is_there("/usr/bin/java") {
        return None;
    }
    let directory = site.path("active");
    fs::create_dir(&directory).unwrap();
    let (port, data) = (free_port(), directory.display());
    let config = format!(
        r#"<beans xmlns="http://www.springframework.org/schema/beans" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
  xsi:schemaLocation="http://www.springframework.org/schema/beans http://www.springframework.org/schema/beans/spring-beans.xsd http://activemq.apache.org/schema/core http://activemq.apache.org/schema/core/activemq-core.xsd">
  <broker xmlns="http://activemq.apache.org/schema/core" brokerName="test" dataDirectory="{data}" persistent="false" useJmx="false" schedulerSupport="false">
    <transportConnectors><transportConnector name="stomp" uri="stomp+nio://127.0.0.1:{port}"/></transportConnectors>
  </broker>
</beans>
"#
    );
    let path = directory.join("activemq.xml");
    fs::write(&path, config).unwrap();
    let mut command = Command::new("java");
    command
        .args([
            "-Xms64M",
            "-Xmx512M",
            "-Djava.util.logging.config.file=/dev/null",
        ])
        .arg(format!("-Dactivemq.data={data}"))
        .args([
            "-Dactivemq.home=/usr/share/activemq",
            "-Dactivemq.base=/usr/share/activemq",
        ])
        .arg(format!("-Djava.io.tmpdir={data}"))
        .args(["-jar", JAR, "start"])
        .arg(format!("xbean:file:{}", path.display()));
    let broker = Process::start(&mut command, port, &directory);
    Some((broker, format!("stomp://127.0.0.1:{port}")))
}

/// The URI of a file on a server that sends it once.
pub fn one_file(content: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("http://{}/file", listener.local_addr().unwrap());
    let length = content.len();
    let answer = format!("HTTP/1.1 200 x\r\nContent-Length: {length}\r\n\r\n{content}");
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = BufReader::new(stream.try_clone().unwrap()).lines();
        while head.next().is_some_and(|line| !line.unwrap().is_empty()) {}
        stream.write_all(answer.as_bytes()).unwrap();
    });
    uri
}
