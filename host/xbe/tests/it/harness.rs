//! Runs `xbe` and compares what it did with the expectation in `tests/expected`.
//!
//! `XBE_ACCEPT=1 cargo test` writes what it did as the new expectation; read the difference before
//! committing it.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

/// A directory to run `xbe` in, and what it did there.
pub struct Session {
    dir: TempDir,
    env: Vec<(String, String)>,
    transcript: String,
}

impl Session {
    /// One in which no `xbed` is running.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("xbe-test-")
            .tempdir()
            .unwrap();
        Session {
            dir,
            env: Vec::new(),
            transcript: String::new(),
        }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Where `xbe` looks for `xbed`.
    pub fn socket(&self) -> PathBuf {
        self.path().join("xbed.sock")
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path().join(name), text).unwrap();
    }

    pub fn env(&mut self, name: &str, value: &str) {
        self.env.push((name.to_owned(), value.to_owned()));
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xbe"));
        command
            .args(args)
            .current_dir(self.path())
            .env("XBE_SERVER", self.socket())
            .envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    pub fn spawn(&self, args: &[&str]) -> Child {
        self.command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Runs `xbe` without input and adds what it did to the transcript.
    pub fn run(&mut self, args: &[&str]) -> Output {
        self.run_with(args, b"")
    }

    /// Runs `xbe` and adds what it did to the transcript.
    pub fn run_with(&mut self, args: &[&str], input: &[u8]) -> Output {
        let mut child = self.spawn(args);
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_owned();
        // A command that does not read its input is no failure of the test.
        let writer = std::thread::spawn(move || stdin.write_all(&input).ok());
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        self.record(args, &output);
        output
    }

    fn record(&mut self, args: &[&str], output: &Output) {
        let words: Vec<String> = args
            .iter()
            .map(|arg| {
                if arg.contains([' ', '\n', '"']) {
                    format!("{arg:?}")
                } else {
                    (*arg).into()
                }
            })
            .collect();
        let code = output.status.code().unwrap();
        writeln!(
            self.transcript,
            "$ xbe {}\nexit code {code}",
            words.join(" ")
        )
        .unwrap();
        for (name, bytes) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
            if !bytes.is_empty() {
                let text = String::from_utf8_lossy(bytes);
                let dir = self.dir.path().to_str().unwrap();
                let text = text
                    .replace(dir, "[DIR]")
                    .replace(env!("CARGO_BIN_EXE_xbe"), "[XBE]");
                let end = if text.ends_with('\n') {
                    ""
                } else {
                    "[no line end]\n"
                };
                write!(self.transcript, "-- {name}\n{text}{end}").unwrap();
            }
        }
        self.transcript.push('\n');
    }

    /// Compares the transcript with `tests/expected/NAME.txt`.
    pub fn expect(&self, name: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/expected/{name}.txt"));
        if std::env::var_os("XBE_ACCEPT").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            return std::fs::write(path, &self.transcript).unwrap();
        }
        let expected = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            self.transcript == expected,
            "{} differs; XBE_ACCEPT=1 accepts the new text.\n--- expected\n{expected}\n--- new\n{}",
            path.display(),
            self.transcript
        );
    }
}
