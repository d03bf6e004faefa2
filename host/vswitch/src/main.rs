//! `vswitch --control PATH`: serves the vsock devices and network cards of all domains of a host.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use xbee_vswitch::control::Server;

/// Connects QEMU guests' vsock devices with unix sockets of the host and with each other, and their networks
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Unix socket on which domains are added and removed
    #[arg(long, value_name = "PATH")]
    control: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = EnvFilter::try_from_env("VSWITCH_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    raise_open_files();
    let result = Server::bind(&args.control).and_then(|server| {
        // Whoever started this waits for the line; it may also be nobody.
        let _ = std::io::Write::write_all(&mut std::io::stdout(), b"ready\n");
        server.serve()
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vswitch: {e}");
            let mut cause = std::error::Error::source(&e);
            while let Some(e) = cause {
                eprintln!("  because: {e}");
                cause = e.source();
            }
            ExitCode::FAILURE
        }
    }
}

/// A domain takes about a dozen descriptors and one a connection; the usual soft limit is 1024.
fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(e) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(error = %e, "cannot raise the limit of open files");
    }
}
