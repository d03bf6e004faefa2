//! `xbed broker`: the message broker alone, without tasks and domains.

use std::io::Read as _;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use xbee_mq::access::{PasswordHash, PasswordHashError};
use xbee_mq::config::{Config, ConfigError, DEFAULT_LISTEN};
use xbee_mq::server::{Server, ServerError};

/// Bytes of a password at most.
const PASSWORD_BYTES: u64 = 1024;

/// Command line of `xbed broker`.
#[derive(Debug, Args)]
pub struct BrokerOptions {
    /// Address and port to listen on; other machines can only be served with users configured
    #[arg(long, value_name = "ADDRESS:PORT", default_value = DEFAULT_LISTEN)]
    listen: SocketAddr,
    /// Directory of persistent messages; without it all messages are in memory only
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Configuration file (TOML) with users, limits and TLS (docs/broker.md)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Read a password from standard input, print its hash for the configuration file, and end
    #[arg(long)]
    hash_password: bool,
}

/// Why the broker ends.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("the password cannot be read")]
    Read(#[source] std::io::Error),
    #[error("the password cannot be hashed")]
    Hash(#[from] PasswordHashError),
}

/// Runs it until a signal ends it.
pub fn run(options: BrokerOptions) -> Result<(), BrokerError> {
    if options.hash_password {
        return hash_password();
    }
    let mut config = Config::new(options.listen);
    config.data = options.data;
    if let Some(path) = &options.config {
        config = config.read(path)?;
    }
    Server::open(config)?.run(stop_signal())?;
    Ok(())
}

async fn stop_signal() {
    let wait = |kind| async move {
        match signal(kind) {
            Ok(mut signals) => {
                signals.recv().await;
            }
            // Then the signal ends the process at once, and loses nothing that has a receipt.
            Err(error) => {
                tracing::warn!(%error, "signals cannot be received");
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        () = wait(SignalKind::terminate()) => {}
        () = wait(SignalKind::interrupt()) => {}
    }
}

fn hash_password() -> Result<(), BrokerError> {
    let mut password = String::new();
    std::io::stdin()
        .take(PASSWORD_BYTES)
        .read_to_string(&mut password)
        .map_err(BrokerError::Read)?;
    let password = password.trim_end_matches(['\r', '\n']);
    println!("{}", PasswordHash::new(password)?);
    Ok(())
}
