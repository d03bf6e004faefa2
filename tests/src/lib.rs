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

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long `xbed` may take to answer after its start.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long anything else may take before a test gives up. Guests are emulated and the machine may
/// be loaded: this finds hangs, not slowness.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// A running `xbed` with its own data directory. Ended, with all its domains, when dropped.
pub struct Xbed {
    process: Child,
    backend: &'static str,
    directory: TempDir,
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
        // Short: the path of a unix socket has at most 107 bytes.
        let directory = tempfile::Builder::new()
            .prefix("xb")
            .tempdir_in("/tmp")
            .unwrap();
        fs::write(directory.path().join("xbed.toml"), config.join("\n")).unwrap();
        let process = spawn(backend, directory.path());
        let xbed = Xbed {
            process,
            backend,
            directory,
        };
        xbed.wait_until_up();
        xbed
    }

    fn wait_until_up(&self) {
        let begun = Instant::now();
        while self.xbe(["host"]).code != 0 {
            assert!(
                begun.elapsed() < START_LIMIT,
                "xbed does not come up: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its data directory.
    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
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
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.process = spawn(self.backend, self.directory.path());
        self.wait_until_up();
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
            let ours = line.contains(&mark) || cwd.to_string_lossy().starts_with(&mark);
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
    }
}

fn spawn(backend: &str, directory: &Path) -> Child {
    let log = File::options()
        .create(true)
        .append(true)
        .open(directory.join("log"))
        .unwrap();
    Command::new(program("xbed"))
        .arg("--config")
        .arg(directory.join("xbed.toml"))
        .arg("--data")
        .arg(directory.join("data"))
        .arg("--socket")
        .arg(directory.join("s"))
        .args(["--backend", backend])
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
        // The pid is our own child's, which is waited for below: it cannot be another's.
        let _ = Command::new("kill")
            .arg(self.process.id().to_string())
            .status();
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
