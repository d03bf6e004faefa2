//! `kechod registry`: tells which node is to be asked about which event channel.

use std::io::Write;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use xbee_kecho::{Address, Error, Registry, RegistryConfig};

#[path = "kecho/security.rs"]
mod security;

use security::{Security, complain};

/// Services of event channels.
#[derive(Debug, Parser)]
#[command(name = "kechod", version)]
struct Arguments {
    #[command(subcommand)]
    service: Service,
}

#[derive(Debug, Subcommand)]
enum Service {
    /// Keeps which node is to be asked about which channel, in memory: after a restart the nodes register again.
    Registry(RegistryArguments),
}

#[derive(Debug, Args)]
struct RegistryArguments {
    /// Where to listen: tcp:[IPV6]:PORT, unix:/PATH or vsock:CID:PORT (the host's CID is 2); can be given several times.
    #[arg(long, default_value = "tcp:[::1]:7400")]
    listen: Vec<Address>,
    #[command(flatten)]
    security: Security,
}

fn registry(arguments: RegistryArguments) -> Result<(), Error> {
    let registry = Registry::start(&RegistryConfig {
        listen: arguments.listen,
        tls: arguments.security.tls(),
        plaintext: arguments.security.plaintext,
        strict: arguments.security.strict,
        guests: arguments.security.guests,
    })?;
    for address in registry.addresses() {
        // Nobody need read it for the registry to run.
        if let Err(error) = writeln!(std::io::stdout(), "listening at {address}") {
            complain("kechod", &error);
        }
    }
    loop {
        std::thread::park();
    }
}

fn main() -> ExitCode {
    let Service::Registry(arguments) = Arguments::parse().service;
    match registry(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain("kechod", &error);
            ExitCode::FAILURE
        }
    }
}
