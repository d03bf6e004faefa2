//! The end-to-end harness: an `xbed` of its own for each test, driven through `xbe` as a user would.
//!
//! ```no_run
//! let Some(xbed) = xbee_tests::qemu() else { return };
//! let ran = xbed.xbe(["run", "--", "/bin/echo", "hi"]);
//! assert_eq!(ran.stdout, "hi\n");
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "in a test, a panic is the report"
)]

pub mod site;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long `xbed` may take to answer after its start.
const START_LIMIT: Duration = Duration::from_secs(180);
/// How long anything else may take before a test gives up. Guests are emulated and the machine may
/// be loaded: this finds hangs, not slowness.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// What a final task's spool may hold.
const KEPT: [&str; 7] = [
    "results",
    "stdout",
    "stderr",
    "console",
    "ssh_user",
    "ssh_user_key",
    "ssh_host_key",
];

/// A running `xbed` with its own data directory. Ended, with all its domains, when dropped.
pub struct Xbed {
    process: Child,
    backend: &'static str,
    directory: TempDir,
    data: PathBuf,
}

/// What a command printed and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// Exit code; -1 for a signal.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ran {
    /// The same, if it succeeded.
    #[track_caller]
    pub fn ok(self) -> Ran {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(self) -> Value {
        let ran = self.ok();
        serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {ran:?}"))
    }

    /// Standard output without the line's end.
    #[track_caller]
    pub fn line(self) -> String {
        self.ok().stdout.trim_end().to_owned()
    }
}

/// An `xbed` that runs real virtual machines; `None`, with a printed reason, where images or QEMU
/// are missing.
pub fn qemu() -> Option<Xbed> {
    let base = images().join("base/image.toml");
    if !base.exists() {
        println!("skipped: {} is missing: run `make images`", base.display());
        return None;
    }
    Some(Xbed::start("qemu", &[]))
}

/// An `xbed` on the simulator.
pub fn sim() -> Xbed {
    Xbed::start("sim", &[])
}

/// The directory of images.
pub fn images() -> PathBuf {
    if let Some(images) = std::env::var_os("XBEE_IMAGES") {
        return images.into();
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    cache
        .unwrap_or_else(|| Path::new(&std::env::var_os("HOME").expect("HOME")).join(".cache"))
        .join("xbee/images")
}

/// Whether an image was built; says so if not.
pub fn has_image(name: &str) -> bool {
    let there = images().join(name).join("image.toml").exists();
    if !there {
        println!("skipped: the image {name} is missing: run `make images`");
    }
    there
}

/// A program of this workspace, beside the test that runs.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("path of the test");
    let path = test
        .ancestors()
        .map(|directory| directory.join(name))
        .find(|path| path.is_file());
    path.unwrap_or_else(|| panic!("{name} is not built: run `cargo build --workspace --bins`"))
}

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ has a parent")
        .into()
}

/// Runs a command to its end, or kills it when patience is at an end.
pub fn run(command: &mut Command) -> Ran {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stdout = drain(child.stdout.take().expect("piped"));
    let stderr = drain(child.stderr.take().expect("piped"));
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("wait") {
            break Some(status);
        }
        if begun.elapsed() > PATIENCE {
            child.kill().expect("kill");
            child.wait().expect("wait");
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let text = |thread: std::thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&thread.join().expect("reader")).into_owned()
    };
    let ran = Ran {
        code: status.and_then(|status| status.code()).unwrap_or(-1),
        stdout: text(stdout),
        stderr: text(stderr),
    };
    assert!(status.is_some(), "{command:?} hung: {ran:?}");
    ran
}

fn drain(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = vec![];
        from.read_to_end(&mut bytes).expect("read");
        bytes
    })
}

impl Xbed {
    /// Starts one with further lines in its configuration file.
    pub fn start(backend: &'static str, config: &[&str]) -> Xbed {
        let directory = directory();
        let data = directory.path().join("data");
        let mut xbed = Xbed::start_in(directory, data, backend, config, &[]);
        assert!(xbed.came_up(), "xbed ended: {}", xbed.log());
        xbed
    }

    /// Starts one that lets a test kill it: `environment` is for its debug build's points of failure (see
    /// `fault` in `xbed`). It may have ended when this returns.
    pub fn start_with(
        backend: &'static str,
        config: &[&str],
        environment: &[(&str, String)],
    ) -> Xbed {
        let directory = directory();
        let data = directory.path().join("data");
        Xbed::start_in(directory, data, backend, config, environment)
    }

    /// Starts one on a data directory that is there already, or on a disk of its own.
    pub fn start_on(
        data: &Path,
        backend: &'static str,
        config: &[&str],
        environment: &[(&str, String)],
    ) -> Xbed {
        Xbed::start_in(directory(), data.into(), backend, config, environment)
    }

    fn start_in(
        directory: TempDir,
        data: PathBuf,
        backend: &'static str,
        config: &[&str],
        environment: &[(&str, String)],
    ) -> Xbed {
        fs::write(directory.path().join("xbed.toml"), config.join("\n")).unwrap();
        Xbed {
            process: spawn(backend, directory.path(), &data, environment),
            backend,
            directory,
            data,
        }
    }

    /// Waits until it answers; false if it ended before.
    pub fn came_up(&mut self) -> bool {
        let begun = Instant::now();
        let socket = self.directory.path().join("s");
        // A socket may be there of one that was killed. To connect costs less than a client that cannot.
        while UnixStream::connect(&socket).is_err() || self.xbe(["host"]).code != 0 {
            if self.has_ended() {
                return false;
            }
            assert!(
                begun.elapsed() < START_LIMIT,
                "xbed does not come up: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Waits until the task has ended, or `xbed` has.
    pub fn wait_for_end(&mut self, task: &str) {
        let mut watch = self.xbe_command(["watch", task]);
        let watch = watch.stdin(Stdio::null()).stdout(Stdio::null());
        let mut watch = watch.stderr(Stdio::null()).spawn().unwrap();
        let begun = Instant::now();
        while watch.try_wait().unwrap().is_none() && !self.has_ended() {
            if begun.elapsed() > PATIENCE {
                // Or it would outlive the test.
                let _ = watch.kill();
                panic!("task {task} does not end\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // It may have ended by itself.
        let _ = watch.kill();
        watch.wait().unwrap();
    }

    /// Its process is no more.
    pub fn has_ended(&mut self) -> bool {
        self.process.try_wait().unwrap().is_some()
    }

    /// Its data directory.
    pub fn data(&self) -> PathBuf {
        self.data.clone()
    }

    /// The socket of its API.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    /// A directory for the test's own files.
    pub fn scratch(&self) -> PathBuf {
        let path = self.directory.path().join("scratch");
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What it wrote to its log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// `kill -9`, then a new one on the same data.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        self.restart(&[]);
        assert!(self.came_up(), "xbed ended: {}", self.log());
    }

    /// `kill -9`, if it has not ended.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// A new one on the same data, after the end of the one before. It may have ended when this returns.
    pub fn restart(&mut self, environment: &[(&str, String)]) {
        self.process = spawn(self.backend, self.directory.path(), &self.data, environment);
    }

    /// An `xbe` command that talks to this `xbed`.
    pub fn xbe_command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(program("xbe"));
        command
            .args(args)
            .env("XBE_SERVER", self.directory.path().join("s"))
            .env("NO_COLOR", "1");
        command
    }

    /// Runs `xbe` to its end.
    #[track_caller]
    pub fn xbe<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Ran {
        run(&mut self.xbe_command(args))
    }

    /// Writes a document to the scratch directory.
    pub fn document(&self, name: &str, text: &str) -> PathBuf {
        let path = self.scratch().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// Submits a document; returns the task's id.
    #[track_caller]
    pub fn submit(&self, text: &str) -> String {
        let path = self.document("job.xsdl", text);
        self.xbe([OsStr::new("submit"), path.as_os_str()]).line()
    }

    /// `xbe status --json`.
    #[track_caller]
    pub fn status(&self, task: &str) -> Value {
        self.xbe(["status", "--json", task]).json()
    }

    /// Waits until the task is in a state or sub-state, or in a final state.
    #[track_caller]
    pub fn wait_for(&self, task: &str, state: &str) -> Value {
        let begun = Instant::now();
        loop {
            let status = self.status(task);
            if status["state"] == state || status["substate"] == state {
                return status;
            }
            let over = ["Finished", "Failed", "Terminated"]
                .iter()
                .any(|end| status["state"] == *end);
            assert!(
                !over && begun.elapsed() < PATIENCE,
                "waited for {state}: {status:#}\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the job's standard output as `xbed` holds it begins with `text`.
    ///
    /// Executing is reported when the agent took the order, so output may come later.
    #[track_caller]
    pub fn wait_for_output(&self, task: &str, text: &str) {
        let begun = Instant::now();
        loop {
            let logs = self.xbe(["logs", task]).ok().stdout;
            if logs.starts_with(text) {
                return;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "waited for the output {text:?}, there is {logs:?}\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Pids of all processes that were started for this `xbed`'s data directory.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let mark = self.directory.path().to_string_lossy().into_owned();
        let data = self.data.to_string_lossy().into_owned();
        let mut found = vec![];
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            // QEMU is given its files as descriptors; its working directory is the domain's.
            let cwd = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
            let ours = [&mark, &data]
                .iter()
                .any(|mark| line.contains(*mark) || cwd.to_string_lossy().starts_with(*mark));
            if ours && pid != std::process::id() {
                found.push((pid, line));
            }
        }
        found
    }

    /// Nothing is left of any task but its entry and its logs.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let qemus: Vec<_> = self
            .processes()
            .into_iter()
            .filter(|(_, line)| line.contains("qemu-system"))
            .collect();
        assert!(qemus.is_empty(), "{qemus:?}");
        let run = self.data().join("run");
        let left: Vec<_> = fs::read_dir(&run).into_iter().flatten().flatten().collect();
        let domains = left.iter().filter(|entry| entry.path().is_dir());
        assert_eq!(domains.count(), 0, "{left:?}");
        let tasks = self.xbe(["ps", "-a", "--json"]).json();
        let mut known = vec![];
        for task in tasks.as_array().unwrap() {
            let id = task["id"].as_str().unwrap().to_owned();
            if task["array"].is_object() {
                let members = self.xbe(["ps", "-a", "--json", "--array", &id]).json();
                let members = members.as_array().unwrap().iter();
                known.extend(members.map(|task| task["id"].as_str().unwrap().to_owned()));
            }
            known.push(id);
        }
        let uploads = self.data().join("uploads");
        let uploads: Vec<_> = fs::read_dir(uploads).unwrap().flatten().collect();
        assert!(uploads.is_empty(), "{uploads:?}");
        for spool in fs::read_dir(self.data().join("tasks")).unwrap().flatten() {
            let name = spool.file_name().into_string().unwrap();
            assert!(known.contains(&name), "spool of no task: {name}");
            for file in fs::read_dir(spool.path()).unwrap().flatten() {
                let file = file.file_name().into_string().unwrap();
                assert!(KEPT.contains(&file.as_str()), "{name}/{file} is left");
            }
        }
    }
}

/// Chance that can be repeated: SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
/// OOPSLA 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// All chance comes from `seed`.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// The seed of a test with chance: `XBEE_SEED`, or another each time, which the test prints.
pub fn seed() -> u64 {
    match std::env::var("XBEE_SEED") {
        Ok(seed) => seed.parse().expect("XBEE_SEED is a number"),
        Err(_) => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            u64::from(now.expect("after 1970").subsec_nanos())
        }
    }
}

/// A server that accepts and then says nothing, and its address: a transfer from or to it does not end.
pub fn silent_server() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let accepting = listener.try_clone().unwrap();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = accepting.accept() {
            // The request is read, so that the client waits for an answer and not for room.
            std::thread::spawn(move || {
                let mut sink = [0; 4096];
                while stream.read(&mut sink).is_ok_and(|n| n > 0) {}
                // Held open: the client waits until it is told to stop.
                std::thread::park();
                drop(stream);
            });
        }
    });
    (listener, address)
}

fn directory() -> TempDir {
    // Short: the path of a unix socket has at most 107 bytes.
    let directory = tempfile::Builder::new().prefix("xb").tempdir_in("/tmp");
    directory.unwrap()
}

fn spawn(backend: &str, directory: &Path, data: &Path, environment: &[(&str, String)]) -> Child {
    let log = File::options()
        .create(true)
        .append(true)
        .open(directory.join("log"))
        .unwrap();
    Command::new(program("xbed"))
        .arg("--config")
        .arg(directory.join("xbed.toml"))
        .arg("--data")
        .arg(data)
        .arg("--socket")
        .arg(directory.join("s"))
        .args(["--backend", backend])
        .envs(environment.iter().cloned())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

impl Drop for Xbed {
    fn drop(&mut self) {
        // Ask the tasks to end first: domains outlive their xbed on purpose.
        if let Ok(Value::Array(tasks)) =
            serde_json::from_str::<Value>(&self.xbe(["ps", "--json"]).stdout)
        {
            for task in tasks.iter().filter_map(|task| task["id"].as_str()) {
                self.xbe(["terminate", task]);
            }
            let begun = Instant::now();
            while self.xbe(["ps", "--json"]).stdout.contains("\"id\"")
                && begun.elapsed() < Duration::from_secs(30)
            {
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        // The pid is our own child's, which has not been waited for: it cannot be another's.
        if !self.has_ended() {
            let _ = Command::new("kill")
                .arg(self.process.id().to_string())
                .status();
        }
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(10) {
            if !matches!(self.process.try_wait(), Ok(None)) && self.processes().is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        let left = self.processes();
        for (pid, _) in &left {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        if std::thread::panicking() {
            eprintln!("--- xbed's log:\n{}", self.log());
        } else {
            assert!(
                left.is_empty(),
                "left behind by xbed: {left:?}\n{}",
                self.log()
            );
        }
    }
}
