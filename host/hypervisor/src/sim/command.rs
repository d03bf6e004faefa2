//! The few commands that a simulated guest has, exactly as far as they go.

use std::time::Duration;

use xbee_protocol::{ExitStatus, Failure, Variable, code};

use super::failure;
use super::files::{Files, normal};

/// What `PATH` holds in a guest unless the task says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a command does.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
    pub(super) status: ExitStatus,
    pub(super) duration: Duration,
    /// It reads all of its input first.
    pub(super) reads: bool,
}

/// Runs `argv`. `stdin` is all of its input; files are those of the guest.
pub(super) fn run(
    files: &Files,
    argv: &[String],
    environment: &[Variable],
    directory: &str,
    stdin: &[u8],
) -> Result<Run, Failure> {
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let Some((name, arguments)) = argv.split_first() else {
        return Err(failure(code::BAD_REQUEST, "no command"));
    };
    let mut run = Run {
        stdout: Vec::new(),
        stderr: Vec::new(),
        status: ExitStatus::Code(0),
        duration: Duration::ZERO,
        reads: false,
    };
    match (program(name), arguments) {
        ("true", _) => {}
        ("false", _) => run.status = ExitStatus::Code(1),
        ("echo", words) => run.stdout = (words.join(" ") + "\n").into_bytes(),
        ("env", []) => {
            for Variable { name, value } in environment_of(environment) {
                run.stdout
                    .extend_from_slice(format!("{name}={value}\n").as_bytes());
            }
        }
        ("cat", []) => {
            run.reads = true;
            run.stdout = stdin.to_vec();
        }
        ("cat", paths) => {
            for path in paths {
                match files.get(&absolute(directory, path)) {
                    Ok(file) => run.stdout.extend_from_slice(&file.content),
                    Err(_) => {
                        let text = format!("cat: {path}: No such file or directory\n");
                        run.stderr.extend_from_slice(text.as_bytes());
                        run.status = ExitStatus::Code(1);
                    }
                }
            }
        }
        ("sleep", [seconds]) => match seconds.parse().map(Duration::try_from_secs_f64) {
            Ok(Ok(duration)) => run.duration = duration,
            _ => {
                run.stderr = format!("sleep: invalid time interval '{seconds}'\n").into_bytes();
                run.status = ExitStatus::Code(1);
            }
        },
        ("sh", ["-c", script]) => match script
            .trim()
            .strip_prefix("exit")
            .map(str::trim)
            .map(str::parse::<u64>)
        {
            // The kernel keeps eight bits of it.
            Some(Ok(status)) => run.status = ExitStatus::Code(status as u8),
            _ => return Err(not_simulated(name)),
        },
        _ if name.contains('/') && files.get(&absolute(directory, name)).is_ok() => {
            return Err(not_simulated(name));
        }
        _ => {
            return Err(failure(
                code::COMMAND_NOT_FOUND,
                format!("command {name:?} not found in the guest"),
            ));
        }
    }
    Ok(run)
}

/// A command's name without the directories of `PATH`.
fn program(name: &str) -> &str {
    match name.rsplit_once('/') {
        Some((directory, program)) if PATH.split(':').any(|known| known == directory) => program,
        _ => name,
    }
}

fn not_simulated(name: &str) -> Failure {
    failure(
        code::COMMAND_NOT_EXECUTABLE,
        format!("cannot execute {name:?} in the guest: the simulator does not run programs"),
    )
}

/// The environment that a process of root's gets.
fn environment_of(given: &[Variable]) -> Vec<Variable> {
    let defaults = [
        ("PATH", PATH),
        ("HOME", "/root"),
        ("USER", "root"),
        ("LOGNAME", "root"),
        ("SHELL", "/bin/sh"),
    ];
    let missing = defaults
        .iter()
        .filter(|(name, _)| given.iter().all(|variable| variable.name != *name));
    let missing = missing.map(|(name, value)| Variable {
        name: (*name).to_owned(),
        value: (*value).to_owned(),
    });
    missing.chain(given.iter().cloned()).collect()
}

/// A path as a process in `directory` means it.
pub(super) fn absolute(directory: &str, path: &str) -> String {
    match path.starts_with('/') {
        true => normal(path),
        false => normal(&format!("{directory}/{path}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn try_run(argv: &[&str]) -> Result<Run, Failure> {
        let argv: Vec<String> = argv.iter().map(|arg| (*arg).to_owned()).collect();
        let variable = Variable {
            name: "HOME".to_owned(),
            value: "/home".to_owned(),
        };
        run(&Files::new(0), &argv, &[variable], "/", b"input")
    }

    #[test]
    fn what_there_is() {
        for (argv, stdout, stderr, status) in [
            (&["/bin/echo", "a", "b"] as &[_], "a b\n", "", 0),
            (&["true"], "", "", 0),
            (&["/usr/bin/false"], "", "", 1),
            (&["sh", "-c", "exit 259"], "", "", 3),
            (&["cat"], "input", "", 0),
            (&["cat", "x"], "", "cat: x: No such file or directory\n", 1),
            (
                &["sleep", "-1"],
                "",
                "sleep: invalid time interval '-1'\n",
                1,
            ),
        ] {
            let run = try_run(argv).unwrap();
            assert_eq!(
                (run.stdout.as_slice(), run.stderr.as_slice(), run.status),
                (
                    stdout.as_bytes(),
                    stderr.as_bytes(),
                    ExitStatus::Code(status)
                ),
                "{argv:?}"
            );
        }
        let environment = String::from_utf8(try_run(&["env"]).unwrap().stdout).unwrap();
        assert!(
            environment.contains("USER=root\n") && environment.ends_with("HOME=/home\n"),
            "{environment}"
        );
        assert!(!environment.contains("HOME=/root"));
        assert_eq!(
            try_run(&["sleep", "1.5"]).unwrap().duration,
            Duration::from_millis(1_500)
        );
    }

    #[test]
    fn what_there_is_not() {
        for (argv, code) in [
            (&["nosuch"] as &[_], code::COMMAND_NOT_FOUND),
            (&["/opt/true"], code::COMMAND_NOT_FOUND),
            (&["sh", "-c", "ls"], code::COMMAND_NOT_EXECUTABLE),
            (&[], code::BAD_REQUEST),
        ] {
            assert_eq!(try_run(argv).unwrap_err().code, code, "{argv:?}");
        }
        assert_eq!(
            try_run(&["nosuch"]).unwrap_err().message,
            "command \"nosuch\" not found in the guest"
        );
    }
}
