//! Watches one process from its start to its end.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::config::QemuConfig;
use super::domain::Domain;
use super::process::{Exit, Process};
use super::qmp::{GuestStatus, Qmp};
use crate::domain::{DomainState, StopReason};
use crate::error::Error;
use crate::log;
use crate::pipe_log::PipeLog;
use crate::rundir::RunDir;

/// Most bytes kept of what QEMU prints.
const ERROR_LOG_MAX_BYTES: u64 = 64 << 10;

/// How much of the console's end is searched for a panic, in bytes.
const PANIC_SEARCH_BYTES: u64 = 16 << 10;

/// What is written by a domain and its process.
#[derive(Debug)]
pub(crate) struct Logs {
    console: PipeLog,
    errors: PipeLog,
}

impl Logs {
    pub(crate) fn open(dir: &RunDir, config: &QemuConfig) -> Result<Self, Error> {
        let open = |pipe: PathBuf, log: PathBuf, max_bytes| {
            PipeLog::open(&pipe, &log, max_bytes).map_err(Error::io("read from", pipe))
        };
        Ok(Self {
            console: open(
                dir.console_pipe(),
                dir.console_log(),
                config.console_max_bytes,
            )?,
            errors: open(dir.error_pipe(), dir.error_log(), ERROR_LOG_MAX_BYTES)?,
        })
    }

    pub(crate) fn drain(&mut self) {
        self.console.drain();
        self.errors.drain();
    }
}

/// Watches one process from its start to its end.
pub(crate) struct Supervisor {
    pub(crate) domain: Arc<Domain>,
    pub(crate) process: Arc<Process>,
    pub(crate) qmp: Qmp,
    pub(crate) status: watch::Receiver<GuestStatus>,
    pub(crate) logs: Logs,
    pub(crate) command_limit: Duration,
}

impl Supervisor {
    pub(crate) async fn run(mut self) {
        let (exit, ended) = self.watch().await;
        self.logs.drain();
        let reason = match ended {
            _ if self.domain.killed.load(Ordering::Acquire) => StopReason::Destroyed,
            // A kernel without the pvpanic driver only resets.
            Some(GuestStatus::Off | GuestStatus::Ended(StopReason::GuestReset))
                if self.console_shows_panic() =>
            {
                StopReason::GuestPanic
            }
            Some(GuestStatus::Off) => StopReason::GuestShutdown,
            Some(GuestStatus::Ended(reason)) => reason,
            Some(GuestStatus::Running | GuestStatus::Paused) | None => StopReason::Failed {
                detail: self.domain.explain(exit),
            },
        };
        if let Err(error) = self.domain.dir.set_stop_reason(&reason) {
            tracing::warn!(domain = %self.domain.spec.id, %error, "the end of a domain was not noted");
        }
        self.domain.life.set(DomainState::Stopped { reason });
    }

    /// Until the process is gone; with what its guest's end was, if that was seen.
    async fn watch(&mut self) -> (Exit, Option<GuestStatus>) {
        let mut ended: Option<GuestStatus> = None;
        // QEMU runs on after its guest's end until it is told to go, and for so long at most.
        let mut kill_at: Option<Instant> = None;
        let mut connected = true;
        let process = Arc::clone(&self.process);
        self.status.mark_changed();
        loop {
            tokio::select! {
                exit = process.exited() => {
                    return (exit.unwrap_or(Exit::Unknown), ended);
                }
                changed = self.status.changed(), if connected => {
                    if changed.is_err() {
                        // It does so when it ends. One that only closes its control connection is
                        // out of control.
                        connected = false;
                        kill_at.get_or_insert(Instant::now() + self.command_limit);
                        continue;
                    }
                    let status = self.status.borrow_and_update().clone();
                    match status {
                        GuestStatus::Running => self.domain.life.set(DomainState::Running),
                        GuestStatus::Paused => self.domain.life.set(DomainState::Paused),
                        GuestStatus::Off | GuestStatus::Ended(_) => {
                            ended = Some(status);
                            kill_at.get_or_insert(Instant::now() + self.command_limit);
                            if let Err(error) = self.qmp.execute("quit").await {
                                tracing::debug!(%error, "quit");
                            }
                        }
                    }
                }
                () = sleep_until(kill_at), if kill_at.is_some() => {
                    kill_at = None;
                    if let Err(error) = process.kill() {
                        tracing::error!(pid = process.pid(), %error, "cannot kill QEMU");
                    }
                }
                error = self.logs.console.run() => {
                    tracing::warn!(domain = %self.domain.spec.id, %error, "the console is lost");
                    // Nothing reads it any more, and `run` would fail again at once.
                    return self.watch_exit(ended).await;
                }
                error = self.logs.errors.run() => {
                    tracing::warn!(domain = %self.domain.spec.id, %error, "QEMU's messages are lost");
                    return self.watch_exit(ended).await;
                }
            }
        }
    }

    /// The rest of `watch` once a log's pipe has failed, which only a broken host brings about: the
    /// domain is ended, since nothing could be said of it.
    async fn watch_exit(&mut self, ended: Option<GuestStatus>) -> (Exit, Option<GuestStatus>) {
        if let Err(error) = self.process.kill() {
            tracing::error!(pid = self.process.pid(), %error, "cannot kill QEMU");
        }
        (self.process.exited().await.unwrap_or(Exit::Unknown), ended)
    }

    fn console_shows_panic(&self) -> bool {
        log::tail(&self.domain.dir.console_log(), PANIC_SEARCH_BYTES)
            .is_ok_and(|text| text.contains("Kernel panic - not syncing"))
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
