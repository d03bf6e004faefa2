//! Runs the real agent, the static binary of the guests, beside the test over a unix socket.

#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::timeout;
use xbee_agent::protocol::{
    BootConfig, Execute, Exited, Failure, GENERATION, Limits, Secret, Transport, Uuid,
};
use xbee_agent::{Agent, Event, Resume};

pub const LIMIT: Duration = Duration::from_secs(60);
pub const SECRET: Secret = Secret([7; 32]);

/// Path of the agent's binary. `XBEINSTD` names another one.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("XBEINSTD") {
        return path.into();
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../images/agent");
    let built = std::process::Command::new(script).output().unwrap();
    let errors = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "images/agent fails: {errors}");
    String::from_utf8(built.stdout).unwrap().trim().into()
}

/// Builds a program of the workspace; `path` is where it is in the target directory.
pub fn workspace_binary(arguments: &[&str], path: &str) -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let built = std::process::Command::new(env!("CARGO"))
        .args(["build", "--quiet"])
        .args(arguments)
        .current_dir(&workspace)
        .status()
        .unwrap();
    assert!(built.success(), "cargo build {arguments:?} fails");
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or(workspace.join("target"), PathBuf::from);
    target.join(path)
}

/// An agent's process and the socket that it dials.
pub struct Guest {
    pub dir: TempDir,
    pub listener: UnixListener,
    pub child: Child,
}

impl Guest {
    /// With the machine's own root.
    pub fn start() -> Guest {
        Guest::start_in(None)
    }

    /// With another root for files and commands.
    pub fn start_in(root: Option<&Path>) -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("host.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let boot = dir.path().join("boot");
        let config = BootConfig {
            generation: GENERATION,
            domain: Uuid::from_u128(42),
            hostname: "test".into(),
            secret: SECRET,
            transport: Transport::Vsock { port: 1 },
            network: None,
        };
        std::fs::write(&boot, config.encode()).unwrap();
        let mut command = Command::new(binary());
        command.arg("--no-mount").arg("--boot-config").arg(boot);
        command
            .arg("--connect")
            .arg(format!("unix:{}", socket.display()));
        if let Some(root) = root {
            command.arg("--root").arg(root);
        }
        let child = command
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Guest {
            dir,
            listener,
            child,
        }
    }

    pub async fn accept(&self) -> UnixStream {
        timeout(LIMIT, self.listener.accept())
            .await
            .unwrap()
            .unwrap()
            .0
    }

    pub async fn connect(&self) -> (Agent, mpsc::Receiver<Event>) {
        self.resume(Resume::default()).await
    }

    pub async fn resume(&self, resume: Resume) -> (Agent, mpsc::Receiver<Event>) {
        Agent::connect(self.accept().await, &SECRET, resume)
            .await
            .unwrap()
    }
}

pub fn task(argv: &[&str]) -> Execute {
    Execute {
        conversation: uuid::Uuid::new_v4(),
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        environment: vec![],
        working_directory: None,
        stdin: None,
        stdout: None,
        stderr: None,
        user: None,
        group: None,
        umask: None,
        limits: Limits::default(),
    }
}

pub fn shell(script: &str) -> Execute {
    task(&["/bin/sh", "-c", script])
}

/// What a task has written, and how it ended.
#[derive(Debug)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub end: Result<Exited, Failure>,
}

impl Outcome {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

/// Takes and acknowledges everything up to a task's end.
pub async fn finish(agent: &Agent, events: &mut mpsc::Receiver<Event>) -> Outcome {
    let mut outputs = [Vec::new(), Vec::new()];
    loop {
        let end = match timeout(LIMIT, events.recv()).await.unwrap().unwrap() {
            Event::Output {
                conversation,
                stream,
                offset,
                data,
            } => {
                let output = &mut outputs[stream as usize];
                assert_eq!(offset, output.len() as u64);
                output.extend_from_slice(&data);
                agent
                    .ack_output(conversation, stream, output.len() as u64)
                    .unwrap();
                continue;
            }
            Event::Exited { exited, .. } => Ok(exited),
            Event::Failed { failure, .. } => Err(failure),
            Event::Lost(error) => panic!("lost: {error:?}"),
        };
        let [stdout, stderr] = outputs;
        return Outcome {
            stdout,
            stderr,
            end,
        };
    }
}

pub async fn run(agent: &Agent, events: &mut mpsc::Receiver<Event>, task: Execute) -> Outcome {
    assert!(!agent.execute(task).await.unwrap(), "known already");
    finish(agent, events).await
}

/// Waits for a process to be gone.
pub async fn gone(pid: i32) {
    for _ in 0..600 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("process {pid} is still there");
}

/// Asserts that no line of a list of processes has a word.
pub fn gone_text(processes: &str, word: &str) {
    assert!(
        !processes.lines().any(|line| line.contains(word)),
        "{processes}"
    );
}
