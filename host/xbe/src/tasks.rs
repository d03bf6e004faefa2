//! `status`, `watch`, `logs`, `terminate`, `ps`, `rm`, `host`: commands on tasks that exist.

use std::time::{SystemTime, UNIX_EPOCH};

use indicatif::HumanBytes;
use serde_json::json;
use xbee_api::client::{Client, Log};
use xbee_api::{ChannelState, PublishedPort, State, TaskEvent, TaskStatus};

use crate::cli;
use crate::error::Error;
use crate::exit;
use crate::follow;
use crate::term::{self, Progress};

/// Characters of an id that tell tasks apart for a reader.
const SHORT_ID_CHARS: usize = 8;
/// Longest line that `logs --json` keeps in one piece.
const MAX_LINE_BYTES: usize = 1024 * 1024;

/// `status`.
pub async fn status(client: &Client, args: &cli::Status) -> Result<u8, Error> {
    let task = client.status(&args.task.task).await?;
    if args.xml {
        term::out(xbee_envelope::activity_status(&task).trim_end())?;
        return Ok(0);
    }
    if args.task.json.json {
        term::json(&task)?;
        return Ok(0);
    }
    term::out(format_args!("task       {}", task.id))?;
    if let Some(name) = &task.name {
        term::out(format_args!("name       {}", term::clean_line(name)))?;
    }
    term::out(format_args!(
        "state      {}",
        term::state(&task, term::colours())
    ))?;
    if let Some(counts) = &task.array {
        term::out(format_args!(
            "array      {} tasks: {} wait, {} run, {} finished, {} failed, {} terminated",
            counts.total(),
            counts.pending,
            counts.running,
            counts.finished,
            counts.failed,
            counts.terminated
        ))?;
    }
    if let Some(member) = &task.member {
        let assigned = term::clean_line(&member.assigned);
        term::out(format_args!(
            "array      {}, number {}: {assigned}",
            member.array, member.number
        ))?;
    }
    if let Some(code) = task.exit_code {
        term::out(format_args!("exit code  {code}"))?;
    }
    if let Some(reason) = &task.reason {
        let reason = term::clean(reason).replace('\n', "\n           ");
        term::out(format_args!("reason     {reason}"))?;
    }
    if let Some(held) = &task.reservation {
        term::out(format_args!(
            "reserved   {} to {}: {} CPUs, {} of memory",
            held.from,
            held.until,
            held.cpus,
            HumanBytes(held.memory_bytes)
        ))?;
    }
    if !task.image.is_empty() {
        term::out(format_args!("image      {}", term::clean_line(&task.image)))?;
    }
    if let Some(address) = &task.address {
        term::out(format_args!("address    {}", term::clean_line(address)))?;
    }
    for port in &task.ports {
        term::out(format_args!("port       {}", published(port)))?;
    }
    term::out("")?;
    times(&task)
}

/// The table of the time spent in each state.
fn times(task: &TaskStatus) -> Result<u8, Error> {
    let now_ms = now_ms();
    let mut rows = vec![["STATE", "SINCE", "TIME"].map(str::to_owned).to_vec()];
    let mut spans = Vec::new();
    for (index, transition) in task.times.iter().enumerate() {
        let end_ms = match task.times.get(index + 1) {
            Some(next) => Some(next.at_ms),
            None if transition.state.is_final() => None,
            None => Some(now_ms),
        };
        let state = term::state_name(transition.state, transition.substate);
        let span = end_ms.map(|end_ms| term::span(end_ms.saturating_sub(transition.at_ms)));
        rows.push(vec![state, transition.at.clone()]);
        spans.push(span.unwrap_or_default());
    }
    if let (Some(first), Some(last)) = (task.times.first(), task.times.last()) {
        let end_ms = if last.state.is_final() {
            last.at_ms
        } else {
            now_ms
        };
        rows.push(vec!["total".to_owned(), String::new()]);
        spans.push(term::span(end_ms.saturating_sub(first.at_ms)));
    }
    let width = spans.iter().map(String::len).max().unwrap_or(0);
    for (row, span) in rows.iter_mut().skip(1).zip(spans) {
        row.push(format!("{span:>width$}"));
    }
    term::table(&rows)?;
    Ok(0)
}

/// `watch`.
pub async fn watch(client: &Client, args: &cli::Task) -> Result<u8, Error> {
    let progress = Progress::new(!args.json.json);
    let task = follow::states(client, &args.task, &progress, |event| {
        if args.json.json {
            term::json(event)
        } else {
            term::out(event_line(event))
        }
    })
    .await?;
    Ok(exit::of_job(&task))
}

fn event_line(event: &TaskEvent) -> String {
    let transition = &event.transition;
    let mut line = format!(
        "{}  {}",
        transition.at,
        term::state_name(transition.state, transition.substate)
    );
    if let (State::Finished, Some(code)) = (transition.state, event.exit_code) {
        line.push_str(&format!(", exit code {code}"));
    }
    if let Some(reason) = &event.reason {
        line.push_str(&format!(": {}", term::clean_line(reason)));
    }
    line
}

/// `logs`.
pub async fn logs(client: &Client, args: &cli::Logs) -> Result<u8, Error> {
    let log = match (args.stderr, args.console) {
        (true, _) => Log::Stderr,
        (_, true) => Log::Console,
        _ => Log::Stdout,
    };
    let task = &args.task.task;
    if !args.task.json.json {
        let mut stdout = tokio::io::stdout();
        follow::log(client, task, log, args.follow, async |data| {
            follow::copy(&mut stdout, data).await
        })
        .await?;
        return Ok(0);
    }
    let line = |line: &[u8]| {
        let text = String::from_utf8_lossy(line);
        term::json(&json!({ "stream": log.name(), "line": text }))
    };
    let mut rest = Vec::new();
    follow::log(client, task, log, args.follow, async |data| {
        rest.extend_from_slice(data);
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            line(&rest[..end])?;
            rest.drain(..=end);
        }
        // A line without an end is printed in pieces.
        if rest.len() > MAX_LINE_BYTES {
            line(&rest)?;
            rest.clear();
        }
        Ok(())
    })
    .await?;
    if !rest.is_empty() {
        line(&rest)?;
    }
    Ok(0)
}

/// `terminate`.
pub async fn terminate(client: &Client, args: &cli::Tasks) -> Result<u8, Error> {
    for task in &args.tasks {
        let task = client.terminate(task).await?;
        if args.json.json {
            term::json(&task)?
        } else {
            term::out(task.id)?
        }
    }
    Ok(0)
}

/// `rm`.
pub async fn rm(client: &Client, args: &cli::Tasks) -> Result<u8, Error> {
    for task in &args.tasks {
        client.remove(task).await?;
        if args.json.json {
            term::json(&json!({ "removed": task }))?
        } else {
            term::out(task)?
        }
    }
    Ok(0)
}

/// `ps`.
pub async fn ps(client: &Client, args: &cli::Ps) -> Result<u8, Error> {
    let tasks = match &args.array {
        Some(array) => client.list_array(array, args.all).await?,
        None => client.list(args.all).await?,
    };
    if args.json.json {
        term::json(&tasks)?;
        return Ok(0);
    }
    let now_ms = now_ms();
    let header = ["TASK", "NAME", "STATE", "EXIT", "AGE", "IMAGE", "PORTS"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for task in &tasks {
        let id = short_id(task);
        let age = task
            .times
            .first()
            .map(|first| term::age(now_ms.saturating_sub(first.at_ms)));
        let ports: Vec<String> = task.ports.iter().map(published).collect();
        rows.push(vec![
            id,
            task.name
                .as_deref()
                .map(term::clean_line)
                .unwrap_or_default(),
            state(task),
            task.exit_code
                .map(|code| code.to_string())
                .unwrap_or_default(),
            age.unwrap_or_default(),
            term::clean_line(&task.image),
            ports.join(", "),
        ]);
    }
    term::table(&rows)?;
    Ok(0)
}

/// The beginning of its id, or of its array's with its number.
fn short_id(task: &TaskStatus) -> String {
    let mut id = match &task.member {
        Some(member) => member.array.to_string(),
        None => task.id.to_string(),
    };
    id.truncate(SHORT_ID_CHARS);
    match &task.member {
        Some(member) => format!("{id}.{}", member.number),
        None => id,
    }
}

fn state(task: &TaskStatus) -> String {
    let state = term::state_name(task.state, task.substate);
    match &task.array {
        Some(counts) => format!("{state}, {} of {} ended", counts.ended(), counts.total()),
        None => state,
    }
}

/// `host`.
pub async fn host(client: &Client, args: &cli::Host) -> Result<u8, Error> {
    let host = client.host().await?;
    if args.json.json {
        term::json(&host)?;
        return Ok(0);
    }
    let mut rows = vec![
        ("xbed", host.version),
        ("backend", host.backend),
        ("hypervisor", host.hypervisor),
        ("accelerator", host.accelerator),
        ("cpus", host.cpus.to_string()),
        ("memory", HumanBytes(host.memory_bytes).to_string()),
        ("images", host.images.join(", ")),
    ];
    if let Some(ChannelState {
        channel,
        registry,
        away,
    }) = host.channel
    {
        let standing = match away {
            None => format!("on the channel {channel} of {registry}"),
            Some(why) => format!("not on the channel {channel}: {why}"),
        };
        rows.push(("other hosts", term::clean_line(&standing)));
    }
    let rows: Vec<_> = rows
        .into_iter()
        .map(|(name, value)| vec![name.to_owned(), value])
        .collect();
    term::table(&rows)?;
    Ok(0)
}

/// A published port as a user connects to it.
pub fn published(port: &PublishedPort) -> String {
    format!("127.0.0.1:{} -> {}", port.host, port.guest)
}

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
