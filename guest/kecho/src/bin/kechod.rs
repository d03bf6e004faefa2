//! `kechod registry`: tells which node is to be asked about which event channel.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use xbee_kecho::{Address, Error, Registry, RegistryConfig, TlsFiles};

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
    /// Where to listen: tcp:[IPV6]:PORT, unix:/PATH or vsock:CID:PORT; can be given several times.
    #[arg(long, default_value = "tcp:[::1]:7400")]
    listen: Vec<Address>,
    /// Certificates, in PEM, of the authority of those who connect from other machines.
    #[arg(long, requires = "certificate", requires = "key")]
    ca: Option<PathBuf>,
    /// The registry's own certificate, in PEM.
    #[arg(long, requires = "ca")]
    certificate: Option<PathBuf>,
    /// The certificate's key, in PEM.
    #[arg(long, requires = "ca")]
    key: Option<PathBuf>,
    /// Whether other machines may connect without TLS.
    #[arg(long)]
    plaintext: bool,
    /// Whether TCP within the machine needs TLS too, because other users of it are not to be trusted.
    #[arg(long)]
    strict: bool,
}

fn registry(arguments: RegistryArguments) -> Result<(), Error> {
    let tls = arguments.ca.zip(arguments.certificate).zip(arguments.key);
    let registry = Registry::start(&RegistryConfig {
        listen: arguments.listen,
        tls: tls.map(|((ca, certificate), key)| TlsFiles {
            ca,
            certificate,
            key,
        }),
        plaintext: arguments.plaintext,
        strict: arguments.strict,
    })?;
    for address in registry.addresses() {
        println!("listening at {address}");
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
            eprint!("kechod: {error}");
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                eprint!(": {cause}");
                source = cause.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}
