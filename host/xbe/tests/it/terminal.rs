//! What is different on a terminal, which script(1) lends.

use std::process::{Command, Stdio};

use crate::harness::Session;
use crate::server::Server;

/// What the terminal got, and the exit code.
fn on_terminal(session: &Session, args: &[&str], env: &[(&str, &str)]) -> (String, i32) {
    let words = [env!("CARGO_BIN_EXE_xbe")]
        .into_iter()
        .chain(args.iter().copied());
    let line: Vec<String> = words.map(|word| format!("'{word}'")).collect();
    let mut command = Command::new("timeout");
    command
        .args(["30", "script", "-qec", &line.join(" "), "/dev/null"])
        .current_dir(session.path())
        .env("XBE_SERVER", session.socket())
        .env("TERM", "xterm")
        .env_remove("NO_COLOR")
        .envs(env.iter().copied())
        .stdin(Stdio::null());
    let output = command.output().unwrap();
    (
        String::from_utf8(output.stdout).unwrap(),
        output.status.code().unwrap(),
    )
}

#[test]
fn colours() {
    let session = Session::new();
    let _server = Server::start(&session.socket());
    let (text, _) = on_terminal(&session, &["status", "1111"], &[]);
    assert!(text.contains("\x1b[32mFinished\x1b[0m"), "{text:?}");
    let (text, _) = on_terminal(&session, &["status", "2222"], &[]);
    assert!(text.contains("\x1b[31mFailed\x1b[0m"), "{text:?}");
    let (text, _) = on_terminal(&session, &["status", "1111"], &[("NO_COLOR", "1")]);
    assert!(
        text.contains("Finished") && !text.contains('\x1b'),
        "{text:?}"
    );
    let (text, _) = on_terminal(&session, &["--help"], &[]);
    assert!(text.contains("\x1b["), "{text:?}");
    let (text, _) = on_terminal(&session, &["--help"], &[("NO_COLOR", "1")]);
    assert!(!text.contains('\x1b'), "{text:?}");
}

#[test]
fn progress() {
    let session = Session::new();
    let _server = Server::start(&session.socket());
    let (text, code) = on_terminal(&session, &["watch", "5555"], &[]);
    assert_eq!(code, 0, "{text:?}");
    assert!(text.contains("ftp://host/\\u{1b}[2Jdata"), "{text:?}");
    assert!(
        !text.contains("\x1b[2J"),
        "a URI cannot clear the screen: {text:?}"
    );
    for part in ["/4.00 MiB", " MiB/", "Finished, exit code 0"] {
        assert!(text.contains(part), "{part} in {text:?}");
    }
}

#[test]
fn the_terminal_is_the_jobs_while_it_executes() {
    let session = Session::new();
    let _server = Server::start(&session.socket());
    let (text, code) = on_terminal(&session, &["run", "--", "true"], &[]);
    assert_eq!(code, 3, "{text:?}");
    // Both outputs share the terminal, in whichever order; nothing is drawn in between.
    let begin = text.find("stdout of it").expect(&text);
    let end = text.rfind("line without end").expect(&text);
    assert!(begin < end, "{text:?}");
    assert!(!text[begin..end].contains('\x1b'), "{text:?}");
}

#[test]
fn exec_knows_the_window() {
    let session = Session::new();
    let _server = Server::start(&session.socket());
    let sized = "stty rows 33 cols 99; exec \"$0\" exec -t 3333 -- true";
    let output = Command::new("script")
        .args([
            "-qec",
            &format!("sh -c '{sized}' {}", env!("CARGO_BIN_EXE_xbe")),
            "/dev/null",
        ])
        .env("XBE_SERVER", session.socket())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("tty Some(WindowSize { rows: 33, cols: 99 })"),
        "{text:?}"
    );
    assert_eq!(output.status.code(), Some(7));
}
