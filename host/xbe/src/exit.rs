//! The exit codes of `xbe`, in one place: the help prints [`TABLE`].

use xbee_api::{State, TaskStatus};

/// `check`: a document is invalid. `doctor`: something is missing.
pub const INVALID: u8 = 1;
/// `check --host`: valid, but the host does not take it.
pub const NOT_ACCEPTED: u8 = 3;
/// `xbe` or `xbed` failed, or the job has no exit code of its own.
pub const FAILED: u8 = 125;
/// `run` or `exec` was left with Ctrl-C.
pub const INTERRUPTED: u8 = 130;
/// `run` was left on SIGTERM.
pub const KILLED: u8 = 143;
/// Nobody reads the job's output any more.
pub const BROKEN_PIPE: u8 = 141;

/// What the help says.
pub const TABLE: &str = "\
Exit codes:
  0    done
  N    run, submit --wait, watch, exec, ssh: the exit code of the job or command
       (128 + N if signal N ended it)
  1    check: a document is invalid; doctor: something is missing
  2    the command line is wrong
  3    check --host: the documents are valid, but the host does not take them
  125  xbe or xbed failed, or the job failed or was terminated before it had an exit code
  130  run, exec: left with Ctrl-C (143: by SIGTERM)
  141  run: nobody reads the output any more";

/// The exit code that tells how a job ended.
pub fn of_job(task: &TaskStatus) -> u8 {
    match (task.state, task.exit_code) {
        (State::Finished, Some(code)) => of_command(code),
        _ => FAILED,
    }
}

/// The exit code of a command in a guest; one that no process can have is a failure.
pub fn of_command(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(FAILED)
}
