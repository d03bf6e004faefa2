//! The Python package stomp.py in STOMP 1.0, 1.1 and 1.2 against the broker.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::Command;

use common::Broker;

/// The release that is installed.
const PACKAGE: &str = "stomp.py==8.2.0";

/// A Python that has the package, in the directory that cargo gives tests.
fn python() -> Result<std::path::PathBuf, String> {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join(PACKAGE);
    let python = home.join("bin/python3");
    let run = |command: &mut Command| match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr)
            .trim()
            .replace('\n', " ")),
        Err(error) => Err(error.to_string()),
    };
    if run(Command::new(&python).args(["-c", "import stomp"])).is_err() {
        run(Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(&home))?;
        run(Command::new(&python).args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            PACKAGE,
        ]))?;
    }
    Ok(python)
}

#[test]
fn stomp_py_in_all_versions() {
    let python = match python() {
        Ok(python) => python,
        Err(why) => {
            println!("skipped: {PACKAGE} cannot be installed: {why}");
            return;
        }
    };
    let broker = Broker::start();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stomp_py.py");
    let output = Command::new("timeout")
        .arg("120")
        .arg(python)
        .arg(script)
        .arg(broker.address.port().to_string())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}", output.status);
    assert_eq!(said.lines().count(), 11);
}
