//! `run`: documents of command lines, and jobs on a server that speaks the API.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command};

use crate::harness::Session;
use crate::server::{RUNNING, SUBMITTED, Server};

fn kill(child: &Child, signal: &str) {
    let status = Command::new("kill")
        .args([signal, &child.id().to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn documents() {
    let mut session = Session::new();
    session.write("scene 1.pov", "");
    session.write("tool", "");
    let tool = session.path().join("tool");
    std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).unwrap();
    let scene = session.path().join("scene 1.pov");
    std::fs::set_permissions(&scene, std::fs::Permissions::from_mode(0o640)).unwrap();
    session.run(&["run", "--print-jsdl", "--", "true"]);
    session.run(&[
        "run",
        "--print-jsdl",
        "--name",
        "a <b> & \"c\"",
        "-I",
        "povray",
        "--cpus",
        "2",
        "--memory",
        "512M",
        "--time",
        "1h30m",
        "-w",
        "/work",
        "-e",
        "A=1=2",
        "-e",
        "EMPTY=",
        "-v",
        "scene 1.pov:/work/scene.pov",
        "-v",
        "tool:/bin/tool",
        "-v",
        "ftp://host:21/a:/b",
        "-o",
        "/work/out.png:out 100%.png",
        "-o",
        "/work/log:http://host:80/log",
        "--",
        "/bin/sh",
        "-c",
        "echo \"$A\" <&>  two  ",
        "",
    ]);
    session.run(&["run", "--print-jsdl", "-I", "./tool", "--", "true"]);
    session.run(&[
        "run",
        "--print-jsdl",
        "-I",
        "http://host/image",
        "--",
        "true",
    ]);
    session.expect("documents");
}

/// What `run` writes is what `check` accepts, whatever the words.
#[test]
fn documents_are_valid() {
    let session = Session::new();
    for word in [
        "", " ", "a  b", "\t", "\n", "]]>", "<&>\"'", "é 𝄞", "--", "-v", "\r",
    ] {
        let env = format!("A={word}");
        let args = ["run", "--print-jsdl", "-e", &env, "--", "echo", word];
        let output = session.command(&args).output().unwrap();
        assert!(output.status.success(), "{word:?}: {output:?}");
        let parsed = xbee_jsdl::parse(&output.stdout, &xbee_jsdl::Options::default());
        let job = parsed
            .unwrap_or_else(|error| panic!("{word:?}: {error:?}"))
            .job;
        let process = job.application.kind.process().unwrap();
        assert_eq!(process.arguments[0].value, word);
        assert_eq!(process.environment[0].value.value, word);
    }
}

#[test]
fn what_cannot_be_run() {
    let mut session = Session::new();
    std::fs::create_dir(session.path().join("dir")).unwrap();
    session.run(&["run", "-v", "missing:/a", "--", "true"]);
    session.run(&["run", "-v", "dir:/a", "--", "true"]);
    session.run(&["run", "-o", "/a:dir", "--", "true"]);
    session.run(&["run", "-o", "/a:missing/a", "--", "true"]);
    session.run(&["run", "-I", "./missing", "--", "true"]);
    session.run(&["run", "--", "a\u{1}b"]);
    session.expect("what_cannot_be_run");
}

#[test]
fn run() {
    let mut session = Session::new();
    let server = Server::start(&session.socket());
    session.run(&["run", "-p", "0:80", "--", "true"]);
    session.run(&["run", "-q", "--rm", "-p", "0:80", "--", "true"]);
    assert_eq!(server.seen().removed, [SUBMITTED.to_string()]);
    session.run(&["run", "--", "become-failed"]);
    session.expect("run");
}

#[test]
fn the_first_interrupt_terminates_the_task() {
    let session = Session::new();
    let server = Server::start(&session.socket());
    let mut xbe = session.spawn(&["run", "--rm", "--", "become-running"]);
    let mut line = String::new();
    let mut stdout = BufReader::new(xbe.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "more and more and more\n");
    kill(&xbe, "-INT");
    std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    let output = xbe.wait_with_output().unwrap();
    let id = RUNNING.to_string();
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        format!(
            "stderr of server\nline without end\n\
             xbe: terminating task {id}; Ctrl-C again leaves at once\n\
             xbe: the job was terminated: asked by its owner\n"
        )
    );
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(server.seen().terminated, std::slice::from_ref(&id));
    assert_eq!(server.seen().removed, [id]);
}

#[test]
fn the_second_interrupt_leaves_at_once() {
    let session = Session::new();
    let server = Server::start(&session.socket());
    server.seen().stubborn = true;
    let mut xbe = session.spawn(&["run", "--", "become-running"]);
    xbe.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    kill(&xbe, "-TERM");
    while server.seen().terminated.is_empty() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // The output still flows: the task goes on.
    xbe.stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut [0; 1000])
        .unwrap();
    kill(&xbe, "-INT");
    drop(xbe.stdout.take());
    assert_eq!(xbe.wait().unwrap().code(), Some(130));
}

#[test]
fn a_job_that_nobody_reads_is_terminated() {
    let session = Session::new();
    let server = Server::start(&session.socket());
    let mut xbe = session.spawn(&["run", "--", "become-running"]);
    xbe.stdout.take().unwrap().read_exact(&mut [0; 10]).unwrap();
    assert_eq!(xbe.wait().unwrap().code(), Some(141));
    assert_eq!(server.seen().terminated, [RUNNING.to_string()]);
}
