//! Following a task: its states and its logs, past a restart of `xbed`.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::MissedTickBehavior;
use xbee_api::client::{self, Client, Log};
use xbee_api::{FollowQuery, SubState, TaskEvent, TaskStatus};

use crate::error::Error;
use crate::term::{Progress, note};

/// How long `xbed` may be away, once it has answered, before a stream is given up.
const AWAY: Duration = Duration::from_secs(30);
/// Time between two attempts.
const RETRY: Duration = Duration::from_millis(250);
/// How often a terminal is told of a transfer's progress.
const REFRESH: Duration = Duration::from_millis(250);

/// Bears with an `xbed` that is restarting.
#[derive(Default)]
pub struct Patience {
    has_answered: bool,
    away_since: Option<Instant>,
}

impl Patience {
    /// Waits before the next attempt, or gives the error back.
    pub async fn bear<T>(&mut self, result: Result<T, client::Error>) -> Result<Option<T>, Error> {
        match result {
            Ok(value) => {
                self.has_answered = true;
                self.away_since = None;
                Ok(Some(value))
            }
            Err(error) => {
                let away = self.away_since.get_or_insert_with(Instant::now).elapsed();
                if !error.is_transient() || !self.has_answered || away > AWAY {
                    return Err(error.into());
                }
                tokio::time::sleep(RETRY).await;
                Ok(None)
            }
        }
    }

    /// Repeats a request until it has an answer.
    pub async fn ask<T, F: Future<Output = Result<T, client::Error>>>(
        &mut self,
        request: impl Fn() -> F,
    ) -> Result<T, Error> {
        loop {
            if let Some(value) = self.bear(request().await).await? {
                return Ok(value);
            }
        }
    }
}

/// Waits until a task that was just submitted is where it can be asked for: at once, but in a pool not before one of its hosts
/// has taken it.
///
/// # Errors
/// Those of the server.
pub async fn taken(client: &Client, task: &str) -> Result<(), Error> {
    let mut is_told = false;
    // It has answered that it has the task.
    let mut patience = Patience {
        has_answered: true,
        ..Patience::default()
    };
    loop {
        match client.status(task).await {
            // Said by nobody who would know: it is not taken yet.
            Err(error) if error.is_transient() && error.code() == "task-not-found" => {
                if !is_told {
                    note(format_args!("task {task} waits for a host of the pool"));
                }
                is_told = true;
                patience.away_since = None;
            }
            answer => {
                if patience.bear(answer).await?.is_some() {
                    return Ok(());
                }
            }
        }
    }
}

/// Calls `on_event` with each state until the task is final; returns its last status.
///
/// # Errors
/// Those of the server, and those of `on_event`.
pub async fn states(
    client: &Client,
    task: &str,
    progress: &Progress,
    mut on_event: impl FnMut(&TaskEvent) -> Result<(), Error>,
) -> Result<TaskStatus, Error> {
    let mut patience = Patience::default();
    let mut from = 1;
    let mut refresh = tokio::time::interval(REFRESH);
    refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut executing = false;
    loop {
        let began = from;
        let mut ended = false;
        let query = FollowQuery { follow: true, from };
        let mut events = patience.ask(|| client.events(task, query)).await?;
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                _ = refresh.tick(), if progress.is_visible() && !executing => {
                    if let Ok(status) = client.status(task).await {
                        progress.show(&status);
                    }
                    continue;
                }
            };
            // A broken stream is asked for again from where it broke.
            let Some(Some(event)) = patience.bear(event).await? else {
                break;
            };
            from = event.seq.saturating_add(1);
            executing = event.transition.substate == Some(SubState::Executing);
            ended = event.transition.state.is_final();
            progress.clear();
            on_event(&event)?;
        }
        let status = patience.ask(|| client.status(task)).await?;
        // A server that stops may end the stream before the last event: ask once more.
        if status.state.is_final() && (ended || from == began) {
            progress.clear();
            return Ok(status);
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Gives a log to `sink` piece by piece until its end, or until the task is final if `follow`.
///
/// # Errors
/// Those of the server, and those of `sink`.
pub async fn log(
    client: &Client,
    task: &str,
    log: Log,
    follow: bool,
    mut sink: impl AsyncFnMut(&[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut patience = Patience::default();
    let mut from = 0;
    loop {
        let query = FollowQuery { follow, from };
        let mut bytes = patience.ask(|| client.logs(task, log, query)).await?;
        let began = from;
        let complete = loop {
            match patience.bear(bytes.next().await).await? {
                Some(Some(data)) => {
                    from += data.len() as u64;
                    sink(&data).await?;
                }
                Some(None) => break true,
                None => break false,
            }
        };
        if complete && !follow {
            return Ok(());
        }
        // A server that stops may end the stream as if it were complete: ask once more.
        if complete && from == began && patience.ask(|| client.status(task)).await?.state.is_final()
        {
            return Ok(());
        }
        if from == began {
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Writes to own output at once.
///
/// # Errors
/// [`Error::Output`].
pub async fn copy<W: AsyncWrite + Unpin>(output: &mut W, data: &[u8]) -> Result<(), Error> {
    output.write_all(data).await.map_err(Error::Output)?;
    output.flush().await.map_err(Error::Output)
}
