//! Signals that ask the program to end, so that it can take its leave.

use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};

use crate::Failure;

/// Waits for SIGINT or SIGTERM; the exit code that a shell gives to who ends by it.
pub fn wait() -> Result<ExitCode, Failure> {
    let failed = |source| Failure::Stream {
        what: "wait for signals",
        source,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(failed)?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let kind = tokio::select! {
            _ = interrupt.recv() => SignalKind::interrupt(),
            _ = terminate.recv() => SignalKind::terminate(),
        };
        Ok(ExitCode::from(128 + kind.as_raw_value() as u8))
    })
}
