//! The conversation with the agent of one domain, across lost connections and restarts of `xbed`.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;
use tracing::{debug, info, warn};
use uuid::Uuid;
use xbee_agent::protocol::{Exited, OutputStream, ResumePoint, Secret};
use xbee_agent::{Agent, Event, Resume};
use xbee_api::{PublishedPort, chain};
use xbee_engine::Failure;
use xbee_hypervisor::Error as HypervisorError;

use crate::fault;
use crate::host::Host;
use crate::logs::{LogError, LogWriter, Stream};
use crate::steps::{Identity, address};
use crate::task::TaskHandle;

/// How long a domain that runs may go without a connection to its agent.
pub const CONTACT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long to wait for room on the disk before output is written again.
const ROOM_RETRY: Duration = Duration::from_secs(1);
/// Connections through published ports at a time, for each port.
const MAX_CONNECTIONS: usize = 256;
/// Lines of the console that are quoted when a domain is lost.
const CONSOLE_LINES: usize = 24;
/// How much of the console is read for them, bytes.
const CONSOLE_TAIL_BYTES: u64 = 8192;
/// How much of a clean-up script's standard error is kept, bytes.
const SCRIPT_QUOTED_BYTES: usize = 2048;
/// Longest quoted line, characters.
const CONSOLE_LINE_CHARS: usize = 200;

/// What is known of the task in the guest.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// Nothing yet, or it runs.
    Open,
    /// It ran to its end.
    Exited(Exited),
    /// The agent could not run it, or the domain or its agent was lost.
    Failed(Failure),
}

/// What is known of a clean-up script in the guest.
#[derive(Debug, Clone, Default)]
pub struct ScriptRun {
    /// The first bytes of its standard error, of those that came since this process began.
    pub quoted: Vec<u8>,
    /// How it ended.
    pub end: Option<Result<Exited, Failure>>,
}

/// Clean-up scripts by their conversations.
pub type ScriptRuns = HashMap<Uuid, ScriptRun>;

/// The conversation of a task's clean-up script. The agent starts nothing twice in one conversation, so neither does
/// a script run twice that an `xbed` was killed over.
pub fn script_conversation(task: Uuid, index: usize) -> Uuid {
    // Random ids of tasks do not differ by as little.
    Uuid::from_u128(task.as_u128() ^ (index as u128 + 1))
}

/// Keeps the connection; ends with its last user.
#[derive(Debug)]
pub struct Session {
    progress: watch::Receiver<Progress>,
    /// Why there will be no connection any more.
    lost: watch::Receiver<Option<Failure>>,
    scripts: watch::Receiver<ScriptRuns>,
    // Dropping the set ends what runs in it.
    workers: Mutex<JoinSet<()>>,
}

impl Session {
    /// Begins to wait for the agent of the task's domain and publishes the task's ports. `boot`: how long it may take to boot, if it
    /// has not been heard of yet.
    pub async fn open(
        host: Arc<Host>,
        task: Arc<TaskHandle>,
        boot: Option<Duration>,
    ) -> Result<Session, Failure> {
        let log = LogWriter::open(&task.spool, task.lengths.clone()).map_err(log_failure)?;
        let mut workers = JoinSet::new();
        let mut ports = vec![];
        for port in task.publish() {
            let (listener, port) = bind(*port).await?;
            ports.push(port);
            workers.spawn(publish(listener, port, task.clone()));
        }
        task.ports.send_replace(ports);
        let address = address(&host.config, Identity::of_task(&task).number);
        task.address
            .send_replace(address.map(|address| address.to_string()));
        let (sender, progress) = watch::channel(Progress::Open);
        let clean_up = task.plan().scripts.iter().enumerate();
        let clean_up = clean_up.filter(|(_, script)| script.when.is_clean_up());
        let id = task.record.id;
        let known =
            clean_up.map(|(index, _)| (script_conversation(id, index), ScriptRun::default()));
        let (runs, scripts) = watch::channel(known.collect());
        let (loss, lost) = watch::channel(None);
        let tell = Tell {
            progress: sender,
            lost: loss,
            scripts: runs,
        };
        workers.spawn(keep(host, task, boot, log, tell));
        Ok(Session {
            progress,
            lost,
            scripts,
            workers: Mutex::new(workers),
        })
    }

    /// What is known of the task, now and later.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// The agent of the task's domain, as soon as there is a connection to it.
    pub async fn agent(&self, task: &TaskHandle) -> Result<Agent, Failure> {
        let mut agent = task.agent.subscribe();
        let lost = self.lost();
        tokio::pin!(lost);
        loop {
            if let Some(agent) = agent.borrow_and_update().clone() {
                return Ok(agent);
            }
            tokio::select! {
                // The handle keeps the sender.
                _ = agent.changed() => {}
                failure = &mut lost => return Err(failure),
            }
        }
    }

    /// Waits until there will be no connection any more, whatever became of the task before.
    pub async fn lost(&self) -> Failure {
        let mut lost = self.lost.clone();
        match lost.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(failure)) => failure.clone(),
            _ => Failure {
                code: "internal".into(),
                reason: "the session ended without a word".into(),
            },
        }
    }

    /// What is known of the clean-up scripts, now and later.
    pub fn scripts(&self) -> watch::Receiver<ScriptRuns> {
        self.scripts.clone()
    }

    /// Ends the connection and gives the published ports back.
    pub async fn close(&self) {
        self.workers.lock().await.shutdown().await;
    }
}

/// Whom a session tells what it hears.
struct Tell {
    progress: watch::Sender<Progress>,
    lost: watch::Sender<Option<Failure>>,
    scripts: watch::Sender<ScriptRuns>,
}

impl Tell {
    /// Nothing more will be heard.
    fn lose(&self, task: &TaskHandle, code: &str, what: String) {
        let failure = with_console(&task.console_path(), code, what);
        // The end of a domain whose task has ended is no loss of it, but of what was still in there.
        self.progress.send_if_modified(|now| {
            let open = *now == Progress::Open;
            if open {
                warn!(task = %task.record.id, code, reason = failure.reason, "domain lost");
                *now = Progress::Failed(failure.clone());
            }
            open
        });
        self.lost.send_replace(Some(failure));
    }
}

async fn keep(
    host: Arc<Host>,
    task: Arc<TaskHandle>,
    mut boot: Option<Duration>,
    mut log: LogWriter,
    tell: Tell,
) {
    let secret = Secret(task.record.secret);
    let id = task.record.id;
    let lost = |code: &str, what: String| tell.lose(&task, code, what);
    loop {
        let limit = boot.unwrap_or(CONTACT_TIMEOUT);
        let contact = async {
            loop {
                let stream = host.hypervisor.channel(id).await?;
                let resume = Resume {
                    points: vec![ResumePoint {
                        conversation: id,
                        stdout_bytes: log.length(Stream::Stdout),
                        stderr_bytes: log.length(Stream::Stderr),
                    }],
                };
                match Agent::connect(stream, &secret, resume).await {
                    Ok(connected) => return Ok::<_, HypervisorError>(connected),
                    Err(error) => warn!(task = %id, error = chain(&error), "agent not accepted"),
                }
            }
        };
        let (agent, mut events) = match tokio::time::timeout(limit, contact).await {
            Ok(Ok(connected)) => connected,
            Ok(Err(HypervisorError::Gone { reason, .. })) => {
                lost("domain-lost", format!("the domain ended: {reason}"));
                return;
            }
            Ok(Err(error)) => {
                lost("domain-lost", chain(&error));
                return;
            }
            Err(_) if boot.is_some() => {
                // Of which `limit` may be what was left after a restart.
                let seconds = host.config.boot_timeout.as_secs();
                lost(
                    "agent-never-came",
                    format!(
                        "the domain was started but its agent did not report within {seconds} s: does the image's kernel boot, and does its initramfs hold the agent, or its init start it?"
                    ),
                );
                return;
            }
            Err(_) => {
                let seconds = limit.as_secs();
                lost(
                    "agent-silent",
                    format!("the agent in the domain has not been heard of for {seconds} s"),
                );
                return;
            }
        };
        boot = None;
        info!(task = %id, "agent connected");
        task.agent.send_replace(Some(agent.clone()));
        while let Some(event) = events.recv().await {
            let Some(event) = take_scripts(event, &agent, &tell.scripts) else {
                continue;
            };
            if let Err(failure) = take(event, &agent, &mut log, &tell.progress).await {
                tell.progress.send_replace(Progress::Failed(failure));
            }
        }
        task.agent.send_replace(None);
        info!(task = %id, "agent disconnected");
    }
}

/// Takes what is told of a clean-up script; gives back what is told of others.
fn take_scripts(event: Event, agent: &Agent, scripts: &watch::Sender<ScriptRuns>) -> Option<Event> {
    let of = match &event {
        Event::Output { conversation, .. }
        | Event::Exited { conversation, .. }
        | Event::Failed { conversation, .. } => *conversation,
        Event::Lost(_) => return Some(event),
    };
    if !scripts.borrow().contains_key(&of) {
        return Some(event);
    }
    scripts.send_modify(|scripts| {
        let run = scripts.entry(of).or_default();
        match event {
            Event::Output {
                stream,
                offset,
                data,
                ..
            } => {
                if stream == OutputStream::Stderr {
                    let room = SCRIPT_QUOTED_BYTES - run.quoted.len().min(SCRIPT_QUOTED_BYTES);
                    run.quoted.extend_from_slice(&data[..data.len().min(room)]);
                }
                // A lost connection is reported by its own event.
                let _ = agent.ack_output(of, stream, offset + data.len() as u64);
            }
            Event::Exited { exited, .. } => run.end = Some(Ok(exited)),
            Event::Failed { failure, .. } => {
                run.end = Some(Err(Failure {
                    code: failure.code,
                    reason: failure.message,
                }));
            }
            Event::Lost(_) => {}
        }
    });
    None
}

async fn take(
    event: Event,
    agent: &Agent,
    log: &mut LogWriter,
    progress: &watch::Sender<Progress>,
) -> Result<(), Failure> {
    match event {
        Event::Output {
            conversation,
            stream,
            offset,
            data,
        } => {
            let to = match stream {
                OutputStream::Stdout => Stream::Stdout,
                OutputStream::Stderr => Stream::Stderr,
            };
            // On a full disk the task waits, once its agent holds as much as it may.
            let mut told = false;
            let held = loop {
                match log.append(to, offset, &data) {
                    Ok(held) => break held,
                    Err(error) if error.is_full() => {
                        if !std::mem::replace(&mut told, true) {
                            warn!(task = %conversation, error = chain(&error), "output not kept; trying again");
                        }
                        tokio::time::sleep(ROOM_RETRY).await;
                    }
                    Err(error) => return Err(log_failure(error)),
                }
            };
            // A lost connection is reported by its own event, and the bytes are asked for again.
            let _ = agent.ack_output(conversation, stream, held);
        }
        Event::Exited { exited, .. } => {
            log.sync().await.map_err(log_failure)?;
            fault::point("exited");
            progress.send_replace(Progress::Exited(exited));
        }
        Event::Failed { failure, .. } => {
            progress.send_replace(Progress::Failed(Failure {
                code: failure.code,
                reason: failure.message,
            }));
        }
        Event::Lost(error) => debug!(error = chain(&error), "connection to the agent ended"),
    }
    Ok(())
}

fn log_failure(error: LogError) -> Failure {
    let code = match error {
        LogError::Limit => "output-limit",
        LogError::Gap { .. } | LogError::Io { .. } => "output-lost",
    };
    Failure {
        code: code.into(),
        reason: chain(&error),
    }
}

/// A failure with the console's last lines, which often say why.
pub fn with_console(console: &Path, code: &str, mut reason: String) -> Failure {
    let lines = console_tail(console);
    if lines.is_empty() {
        reason.push_str("; its console is empty");
    } else {
        reason.push_str("; the last lines of its console:\n");
        reason.push_str(&lines.join("\n"));
    }
    Failure {
        code: code.into(),
        reason,
    }
}

/// The last lines of a console. The guest wrote them: control characters are taken out.
fn console_tail(path: &Path) -> Vec<String> {
    use std::io::{Read, Seek, SeekFrom};
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(CONSOLE_TAIL_BYTES)))?;
        let mut bytes = vec![];
        file.take(CONSOLE_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let mut lines: Vec<String> = text
        .lines()
        .map(|line| {
            line.chars()
                .filter(|c| !c.is_control())
                .take(CONSOLE_LINE_CHARS)
                .collect::<String>()
        })
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines.split_off(lines.len().saturating_sub(CONSOLE_LINES))
}

async fn bind(port: PublishedPort) -> Result<(TcpListener, PublishedPort), Failure> {
    let bound = TcpListener::bind(("127.0.0.1", port.host)).await;
    let bound = bound.and_then(|listener| {
        let host = listener.local_addr()?.port();
        Ok((listener, PublishedPort { host, ..port }))
    });
    bound.map_err(|error| Failure {
        code: "port-unavailable".into(),
        reason: format!(
            "cannot publish the domain's port {} on 127.0.0.1:{}: {error}; choose another with -p",
            port.guest, port.host
        ),
    })
}

/// Carries connections to a port of the host into the domain.
async fn publish(listener: TcpListener, port: PublishedPort, task: Arc<TaskHandle>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        if connections.len() >= MAX_CONNECTIONS {
            connections.join_next().await;
        }
        match listener.accept().await {
            Ok((client, _)) => {
                connections.spawn(forward(client, port.guest, task.clone()));
            }
            Err(error) => {
                warn!(task = %task.record.id, %error, "published port cannot accept");
                // Most often no descriptors are left: it goes on when some are free again.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn forward(mut client: TcpStream, port: u16, task: Arc<TaskHandle>) {
    let Some(agent) = task.agent() else {
        return;
    };
    match agent.forward(port).await {
        Ok(mut guest) => {
            // Either side may vanish at any time: the end of a copy is not an error.
            let _ = tokio::io::copy_bidirectional(&mut client, &mut guest).await;
        }
        Err(error) => debug!(task = %task.record.id, port, error = chain(&error), "not forwarded"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Owner, StoredTask, TaskRecord};

    #[tokio::test]
    async fn a_domain_that_is_lost_after_its_task_has_ended_is_said_to_be() {
        let spool = tempfile::tempdir().unwrap();
        let record = TaskRecord {
            id: Uuid::new_v4(),
            owner: Owner { uid: 0, gid: 0 },
            secret: [0; 32],
            member: None,
            reservation: None,
            job: None,
        };
        let stored = StoredTask {
            number: 1,
            record,
            journal: vec![],
        };
        let task = TaskHandle::new(stored, spool.path().into(), None);
        let exited = Progress::Exited(Exited {
            status: xbee_agent::protocol::ExitStatus::Code(0),
            cause: None,
            stdout_bytes: 0,
            stderr_bytes: 0,
            wall_clock_ms: 0,
            cpu_ms: 0,
            max_resident_kib: 0,
        });
        let (progress, seen) = watch::channel(exited.clone());
        let (loss, lost) = watch::channel(None);
        let (scripts, runs) = watch::channel(ScriptRuns::new());
        let tell = Tell {
            progress,
            lost: loss,
            scripts,
        };
        let session = Session {
            progress: seen,
            lost,
            scripts: runs,
            workers: Mutex::default(),
        };
        tell.lose(&task, "domain-lost", "the domain ended".into());
        drop(tell);
        assert_eq!(*session.progress().borrow(), exited);
        let failure = session.agent(&task).await.unwrap_err();
        assert_eq!(failure.code, "domain-lost", "{failure:?}");
    }

    #[test]
    fn the_console_is_quoted_without_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let mut text = String::from("long ago\n");
        for n in 2..=CONSOLE_LINES {
            text.push_str(&format!("line {n}\x1b[31m\r\n\n"));
        }
        std::fs::write(&path, text).unwrap();
        let failure = with_console(&path, "x", "gone".into());
        let text = failure.reason;
        assert!(
            text.starts_with("gone; the last lines of its console:\nlong ago\nline 2[31m\n"),
            "{text}"
        );
        std::fs::write(&path, text + "\nmore\nand more\n").unwrap();
        let failure = with_console(&path, "x", "gone".into());
        assert!(
            !failure.reason.contains("long ago"),
            "too many lines: {}",
            failure.reason
        );
        assert!(failure.reason.ends_with("\nmore\nand more"));
        let failure = with_console(&dir.path().join("none"), "x", "gone".into());
        assert_eq!(failure.reason, "gone; its console is empty");
    }
}
