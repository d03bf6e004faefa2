//! `xbed`, XenBEE's host manager.
//!
//! [`command`] is what can be asked; [`http`] and [`message_queue`] are front doors to it. [`host`] holds the tasks;
//! each has an actor ([`task`]) that drives the engine's state machine through [`steps`].
//!
//! It is a library only for the program and for `tests/fuzz`, which asks the API anything.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod anywhere;
mod array;
mod backend;
mod broker;
mod cache;
mod command;
mod config;
mod exec;
mod export;
mod fault;
mod host;
mod http;
mod images;
mod logs;
mod message_queue;
mod plan;
mod pool;
mod reach;
mod retry;
mod session;
#[cfg(test)]
mod soak;
mod ssh;
mod steps;
mod store;
mod task;
mod translate;
mod uploads;
mod view;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::info;
use tracing_subscriber::EnvFilter;
use xbee_api::chain;
use xbee_carry::pool::Member;

use crate::command::Commands;
use crate::config::{Command, Config, Options};
use crate::host::{Host, HostError};
use crate::message_queue::Door;
use crate::pool::Pool;

/// File in the data directory: how far the streams of messages of the host's own queue have come.
const STREAMS: &str = "message-streams";
/// The same of the pool's.
const POOL_STREAMS: &str = "pool-streams";

/// Why `xbed` ends.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    /// The message broker.
    #[error(transparent)]
    Broker(#[from] broker::BrokerError),
    /// The hypervisor, or the data directory.
    #[error(transparent)]
    Backend(#[from] backend::BackendError),
    /// What was stored.
    #[error(transparent)]
    Host(#[from] host::HostError),
    /// The socket.
    #[error(transparent)]
    Listen(#[from] http::ListenError),
    /// The own identity there.
    #[error("there is no message queue for this xbed")]
    MessageQueue(#[source] xbee_carry::identity::Error),
    /// The same for a pool.
    #[error("there is no pool for this xbed")]
    Pool(#[source] xbee_carry::identity::Error),
    /// The channel of hosts.
    #[error("there is no channel of hosts for this xbed")]
    Kecho(#[source] anywhere::StartError),
    /// The socket, later.
    #[error("the API's socket failed")]
    Serve(#[source] std::io::Error),
    /// Signals.
    #[error("signals cannot be received")]
    Signal(#[source] std::io::Error),
    /// The runtime.
    #[error("the runtime cannot be started")]
    Runtime(#[source] std::io::Error),
}

/// The program.
pub fn main() -> ExitCode {
    let mut options = Options::parse();
    let filter = EnvFilter::try_from_env("XBED_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::env::var_os("NO_COLOR").is_none() && is_terminal())
        .init();
    let result = match options.command.take() {
        // It has a thread of its own and needs no further ones.
        Some(Command::Broker(options)) => broker::run(options).map_err(Fatal::from),
        None => tokio::runtime::Runtime::new()
            .map_err(Fatal::Runtime)
            .and_then(|runtime| runtime.block_on(run(options))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not through the log: a filter must not hide why nothing runs.
            eprintln!("xbed: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn is_terminal() -> bool {
    std::io::IsTerminal::is_terminal(&std::io::stderr())
}

/// Serves the API of a simulated host on `socket` until the future is dropped. No task ever begins there, and there is no
/// cache: files that a document names are neither read nor written.
///
/// # Errors
/// What keeps an `xbed` from starting.
pub async fn serve_simulated(data: &Path, socket: &Path) -> Result<(), Fatal> {
    let options = Options::parse_from([
        "xbed".as_ref(),
        "--backend".as_ref(),
        "sim".as_ref(),
        "--data".as_ref(),
        data.as_os_str(),
        "--socket".as_ref(),
        socket.as_os_str(),
    ]);
    let mut config = Config::load(options)?;
    config.domains = 0;
    config.cache.max_bytes = 0;
    let listener = http::listen(&config.socket)?;
    let hypervisor = backend::open(&config).await?;
    let stager = backend::stager(&config);
    let host = Host::open(config, hypervisor, stager).await?;
    http::serve(listener, Commands::new(host), std::future::pending())
        .await
        .map_err(Fatal::Serve)
}

async fn run(options: Options) -> Result<(), Fatal> {
    fault::arm();
    let config = Config::load(options)?;
    let _lock = backend::lock(&config)?;
    let listener = http::listen(&config.socket)?;
    let hypervisor = backend::open(&config).await?;
    let stager = backend::stager(&config);
    let socket = config.socket.clone();
    let (message_queue, pool) = (config.message_queue.clone(), config.pool.clone());
    let kecho = config.kecho.clone();
    let host = Host::open(config, hypervisor, stager).await?;
    host.recover().await?;
    let about = host.info();
    info!(
        version = about.version,
        backend = about.backend,
        hypervisor = about.hypervisor,
        accelerator = about.accelerator,
        data = %host.config.data.display(),
        "ready on {}",
        socket.display()
    );
    let mut terminate = signal(SignalKind::terminate()).map_err(Fatal::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Fatal::Signal)?;
    let stopped = CancellationToken::new();
    let doors = TaskTracker::new();
    let serve = |address, options, endpoint, door| {
        let serving = message_queue::serve(address, options, endpoint, door, stopped.clone());
        doors.spawn(serving);
    };
    if let Some(queue) = message_queue {
        let streams = host.config.data.join(STREAMS);
        let endpoint = queue.identity.open(Some(streams));
        let endpoint = Arc::new(endpoint.map_err(Fatal::MessageQueue)?);
        let door = Door::new(host.clone(), None);
        serve(queue.address, queue.options, endpoint, door);
    }
    if let Some(queue) = pool {
        let streams = host.config.data.join(POOL_STREAMS);
        let member = host.store.pool_member().map_err(HostError::from)?;
        let endpoint = queue.identity.open(Some(streams)).map_err(Fatal::Pool)?;
        let endpoint = Arc::new(endpoint.of_member(member));
        let (address, options) = (queue.address, queue.options);
        let member = Member::new(address.clone(), options.clone(), endpoint.clone(), member);
        let pool = Pool::new(host.clone(), member);
        let door = Door::new(host.clone(), Some(pool.clone()));
        doors.spawn(pool.run(stopped.clone()));
        serve(address, options, endpoint, door);
    }
    if let Some(kecho) = kecho {
        let part = anywhere::start(&host, kecho).map_err(Fatal::Kecho)?;
        doors.spawn(part.run(stopped.clone()));
    }
    doors.close();
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    http::serve(listener, Commands::new(host.clone()), stop)
        .await
        .map_err(Fatal::Serve)?;
    stopped.cancel();
    // They have a limit of their own.
    doors.wait().await;
    // Domains go on: the next xbed takes them up again.
    info!("stopped; running domains go on");
    if let Err(error) = std::fs::remove_file(&socket) {
        host::log_teardown("socket not removed", &error);
    }
    Ok(())
}
