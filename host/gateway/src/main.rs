//! `gateway PLAN`: serves one guest's way out over its standard input, a connection to `vswitch`, by a plan in JSON.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use xbee_gateway::Plan;
use xbee_gateway::confine::confine;
use xbee_gateway::gateway::Gateway;

const USAGE: &str = "usage: gateway PLAN\nIt is started by xbed.";

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let [plan] = args.as_slice() else {
        eprintln!("{USAGE}");
        return ExitCode::FAILURE;
    };
    match run(plan) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => {
            eprint!("gateway: {failed}");
            let mut cause = failed.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn run(plan: &OsString) -> Result<(), Box<dyn std::error::Error>> {
    let plan: Plan = serde_json::from_slice(plan.as_encoded_bytes())?;
    let uplink: OwnedFd = std::io::stdin().as_fd().try_clone_to_owned()?;
    let gateway = Gateway::new(plan.clone(), uplink)?;
    confine(&plan)?;
    // Whoever started this waits for the line: what the cage leaves is all that is left from here on.
    std::io::Write::write_all(&mut std::io::stdout(), b"ready\n")?;
    Ok(gateway.serve()?)
}
