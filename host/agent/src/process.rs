//! Commands beside the task.

use std::sync::Arc;

use tokio::sync::oneshot;
use xbee_protocol::{Exec, ExitStatus, HostMessage, Request, StreamBody, TerminalSize, Variable};

use crate::Error;
use crate::client::Agent;
use crate::state::{Opens, Shared};
use crate::stream::{StreamReader, StreamWriter};

/// A command to be run beside the task.
#[derive(Debug, Clone, Default)]
pub struct ExecSpec {
    /// Command and arguments; a command without `/` is looked up along `PATH` in the guest.
    pub argv: Vec<String>,
    /// Environment.
    pub environment: Vec<(String, String)>,
    /// Working directory; the user's home without it.
    pub working_directory: Option<String>,
    /// User: name or number; root without it.
    pub user: Option<String>,
    /// Group: name or number; the user's own without it.
    pub group: Option<String>,
    /// Gives it a terminal: there is no separate standard error then.
    pub terminal: Option<TerminalSize>,
}

/// A command that runs in the guest. Dropped before its end, it is killed.
#[derive(Debug)]
pub struct Process {
    /// Process id in the guest.
    pub pid: i32,
    /// Standard input; drop it to end it.
    pub stdin: Option<StreamWriter>,
    /// Standard output, or the terminal.
    pub stdout: Option<StreamReader>,
    /// Standard error; `None` with a terminal.
    pub stderr: Option<StreamReader>,
    handle: ProcessHandle,
    exit: oneshot::Receiver<ExitStatus>,
}

/// What kills the command when it goes.
#[derive(Debug)]
struct ProcessHandle {
    agent: Agent,
    stream: u32,
}

impl Process {
    pub(crate) async fn start(agent: &Agent, spec: ExecSpec) -> Result<Self, Error> {
        let shared: &Arc<Shared> = agent.shared();
        let with_stderr = spec.terminal.is_none();
        let sent = shared.request(
            Opens::Exec {
                stderr: with_stderr,
            },
            |stream| {
                Request::Exec(Exec {
                    stream,
                    stderr_stream: with_stderr.then(|| stream + 1),
                    argv: spec.argv,
                    environment: variables(spec.environment),
                    working_directory: spec.working_directory,
                    user: spec.user,
                    group: spec.group,
                    terminal: spec.terminal,
                })
            },
        )?;
        let stream = sent.stream;
        // These clean up after themselves, whichever way this function is left.
        let stdin = StreamWriter::new(Arc::clone(shared), stream);
        let stdout = StreamReader::new(Arc::clone(shared), stream);
        let stderr = with_stderr.then(|| StreamReader::new(Arc::clone(shared), stream + 1));
        let handle = ProcessHandle {
            agent: agent.clone(),
            stream,
        };
        let exit = sent.exit.ok_or(Error::Closed)?;
        let pid = agent.process_reply(sent.reply).await?;
        Ok(Process {
            pid,
            stdin: Some(stdin),
            stdout: Some(stdout),
            stderr,
            handle,
            exit,
        })
    }

    /// Tells it the new size of its terminal.
    ///
    /// # Errors
    /// [`Error::Failed`] where it has none, and those of a lost connection.
    pub async fn resize(&self, size: TerminalSize) -> Result<(), Error> {
        let stream = self.handle.stream;
        self.handle
            .agent
            .simple("resize a terminal", Request::Resize { stream, size })
            .await
    }

    /// Sends a signal (number on Linux) to its process group.
    ///
    /// # Errors
    /// [`Error::Failed`] where it has ended, and those of a lost connection.
    pub async fn signal(&self, signal: i32) -> Result<(), Error> {
        let stream = self.handle.stream;
        self.handle
            .agent
            .simple(
                "signal a command",
                Request::SignalProcess { stream, signal },
            )
            .await
    }

    /// Waits for its end. Cancel-safe. Its output has to be read by someone, or dropped.
    ///
    /// # Errors
    /// Those of a lost connection.
    pub async fn wait(&mut self) -> Result<ExitStatus, Error> {
        (&mut self.exit)
            .await
            .map_err(|_| self.handle.agent.shared().lost())
    }
}

impl Drop for ProcessHandle {
    fn drop(&mut self) {
        let shared = self.agent.shared();
        if !shared.lock().runs(self.stream) {
            return;
        }
        let message = HostMessage::Stream {
            stream: self.stream,
            body: StreamBody::Reset,
        };
        if let Err(error) = shared.send(&message) {
            tracing::debug!(%error, "a command was not killed by its handle");
        }
    }
}

pub(crate) fn variables(pairs: Vec<(String, String)>) -> Vec<Variable> {
    pairs
        .into_iter()
        .map(|(name, value)| Variable { name, value })
        .collect()
}
