//! Commands on tasks, against a server that speaks the API.

use std::io::Read;
use std::process::{Command, Stdio};

use crate::harness::Session;
use crate::server::Server;

fn session() -> (Session, Server) {
    let session = Session::new();
    let server = Server::start(&session.socket());
    (session, server)
}

#[test]
fn lists_and_statuses() {
    let (mut session, _server) = session();
    session.run(&["host"]);
    session.run(&["host", "--json"]);
    let output = session.run(&["status", "1111"]);
    assert!(
        !String::from_utf8(output.stdout).unwrap().contains('\x1b'),
        "no colours in a pipe"
    );
    session.run(&["status", "1111", "--json"]);
    session.run(&["status", "2222"]);
    session.run(&["status", "9999"]);
    session.run(&["status", "9999", "--json"]);
    session.expect("lists_and_statuses");
}

#[test]
fn ps() {
    let (session, _server) = session();
    let lines = |args: &[&str]| -> Vec<String> {
        let output = session.command(args).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect()
    };
    let running = lines(&["ps"]);
    assert_eq!(running.len(), 2, "{running:?}");
    assert!(
        running[1].starts_with("33333333  server  Running: Executing"),
        "{running:?}"
    );
    let all = lines(&["ps", "-a"]);
    assert_eq!(all.len(), 4, "{all:?}");
    assert!(
        all[1].ends_with("image:base  127.0.0.1:8080 -> 80"),
        "{all:?}"
    );
    let json = lines(&["ps", "-a", "--json"]).join("\n");
    let tasks: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
    let states: Vec<_> = tasks.iter().map(|task| &task["state"]).collect();
    assert_eq!(states, ["Finished", "Failed", "Running"]);
}

#[test]
fn watch() {
    let (mut session, server) = session();
    session.run(&["watch", "1111"]);
    session.run(&["watch", "2222"]);
    session.run(&["watch", "4444"]);
    assert_eq!(
        server.seen().events_from,
        [1, 1, 1, 4],
        "a broken stream goes on where it broke"
    );
    session.run(&["watch", "--json", "2222"]);
    session.expect("watch");
}

#[test]
fn logs() {
    let (mut session, _server) = session();
    session.run(&["logs", "1111"]);
    session.run(&["logs", "-f", "1111"]);
    session.run(&["logs", "--stderr", "1111"]);
    session.run(&["logs", "--console", "1111", "--json"]);
    session.run(&["logs", "9999"]);
    session.expect("logs");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let (session, _server) = session();
    let mut xbe = session.spawn(&["logs", "-f", "3333"]);
    let mut beginning = [0; 10];
    xbe.stdout
        .take()
        .unwrap()
        .read_exact(&mut beginning)
        .unwrap();
    let output = xbe.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert_eq!(output.status.code(), Some(0));

    let mut xbe = session.spawn(&["--help"]);
    drop(xbe.stdout.take());
    let output = xbe.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

#[test]
fn terminate_and_rm() {
    let (mut session, server) = session();
    session.run(&["rm", "3333"]);
    session.run(&["terminate", "3333"]);
    session.run(&["watch", "3333"]);
    session.run(&["rm", "3333", "1111"]);
    session.run(&["rm", "--json", "2222"]);
    session.run(&["terminate", "9999"]);
    assert_eq!(server.seen().terminated.len(), 1);
    assert_eq!(server.seen().removed.len(), 3);
    session.expect("terminate_and_rm");
}

#[test]
fn submit() {
    let (mut session, server) = session();
    session.write("job.jsdl", "<JobDefinition/>");
    session.write("empty.jsdl", "");
    session.run(&["submit", "job.jsdl"]);
    session.run(&[
        "submit",
        "job.jsdl",
        "--wait",
        "-p",
        "0:80",
        "-p",
        "50000:22",
        "--lenient",
    ]);
    session.run_with(
        &["submit", "--json", "-"],
        b"<JobDefinition>stdin</JobDefinition>",
    );
    session.run(&["submit", "empty.jsdl"]);
    let submitted = &server.seen().submitted;
    assert_eq!(submitted[0].jsdl, "<JobDefinition/>");
    assert!(!submitted[0].lenient && submitted[1].lenient);
    assert_eq!(submitted[1].publish.len(), 2);
    assert_eq!(submitted[2].jsdl, "<JobDefinition>stdin</JobDefinition>");
    session.expect("submit");
}

#[test]
fn endless_documents_are_not_read_to_their_end() {
    let (session, _server) = session();
    let output = session
        .command(&["submit", "/dev/zero"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
}

#[test]
fn completions_are_valid_bash() {
    let session = Session::new();
    let script = session
        .command(&["completions", "bash"])
        .output()
        .unwrap()
        .stdout;
    session.write("completions.bash", &String::from_utf8(script).unwrap());
    let status = Command::new("bash")
        .arg("-n")
        .arg(session.path().join("completions.bash"))
        .status();
    assert!(status.unwrap().success());
}
