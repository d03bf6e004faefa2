//! `cage PLAN PROGRAM [ARGUMENT...]`: gives up all that the plan (JSON) does not leave, and becomes the program.
//! `cage --check`: says as JSON what this host has for that.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use xbee_cage::{CHECK, Error, Plan, Report};

const USAGE: &str = "usage: cage PLAN PROGRAM [ARGUMENT...] | cage --check\nIt is started by xbed.";

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    match args.as_slice() {
        [check] if check == CHECK => {
            println!("{}", Report::of_this_host().json());
            ExitCode::SUCCESS
        }
        [plan, program, args @ ..] => {
            let failed = match serde_json::from_slice::<Plan>(plan.as_encoded_bytes()) {
                Ok(plan) => xbee_cage::enter(&plan, Path::new(program), args),
                Err(error) => Error::Plan(error),
            };
            eprint!("cage: {failed}");
            let mut cause = std::error::Error::source(&failed);
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::FAILURE
        }
    }
}
