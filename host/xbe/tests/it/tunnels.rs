//! `exec`, `ssh` and `proxy`: connections that leave HTTP.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::harness::Session;
use crate::server::Server;

fn session() -> (Session, Server) {
    let session = Session::new();
    let server = Server::start(&session.socket());
    (session, server)
}

#[test]
fn exec() {
    let (mut session, _server) = session();
    session.run_with(
        &["exec", "3333", "--", "cat", "a b", "é"],
        b"ignored without -i",
    );
    session.run_with(
        &["exec", "-i", "-e", "A=1=2", "3333", "--", "cat"],
        b"input\n",
    );
    session.run_with(&["exec", "-t", "3333", "--", "cat"], b"");
    session.run(&["exec", "3333", "--", "missing"]);
    session.run(&["exec", "3333", "--", "vanish"]);
    session.expect("exec");
}

#[test]
fn exec_passes_much_input() {
    let (session, _server) = session();
    let input: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_be_bytes).collect();
    let mut xbe = session.spawn(&["exec", "-i", "3333", "--", "cat"]);
    let mut stdin = xbe.stdin.take().unwrap();
    let written = input.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&written).unwrap());
    let output = xbe.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(
        output.stdout == input,
        "{} of {} bytes",
        output.stdout.len(),
        input.len()
    );
    assert_eq!(output.status.code(), Some(7));
}

#[test]
fn exec_passes_signals() {
    let (session, _server) = session();
    let mut xbe = session.spawn(&["exec", "3333", "--", "sleep"]);
    let mut line = String::new();
    BufReader::new(xbe.stderr.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.starts_with("argv"), "{line}");
    let kill = Command::new("kill")
        .args(["-TERM", &xbe.id().to_string()])
        .status()
        .unwrap();
    assert!(kill.success());
    assert_eq!(xbe.wait().unwrap().code(), Some(128 + 15));
}

#[test]
fn proxy() {
    let (session, server) = session();
    let mut xbe = session.spawn(&["proxy", "3333", "22"]);
    let mut stdin = xbe.stdin.take().unwrap();
    let mut stdout = xbe.stdout.take().unwrap();
    stdin.write_all(b"ping").unwrap();
    let mut answer = [0; 4];
    stdout.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"PING");
    // The end of input reaches the guest, and its end ends the proxy.
    drop(stdin);
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
    assert_eq!(xbe.wait().unwrap().code(), Some(0));
    assert_eq!(server.seen().forwarded, [22]);
}

/// Stands in for OpenSSH: shows its arguments and files, speaks to the proxy, ends with 42.
const SSH: &str = r#"#!/bin/sh
for arg; do
    case $arg in
    ProxyCommand=*) proxy=${arg#ProxyCommand=} ;;
    IdentityFile=*) key=$(eval echo "${arg#IdentityFile=}") ;;
    UserKnownHostsFile=*) known=$(eval echo "${arg#UserKnownHostsFile=}") ;;
    *) echo "$arg" ;;
    esac
done
stat -c '%a' "$(dirname "$key")" "$key"
cat "$key" "$known"
echo through the proxy | sh -c "exec $proxy"
dirname "$key" >directory
exit 42
"#;

#[test]
fn ssh() {
    let (mut session, _server) = session();
    std::fs::create_dir(session.path().join("bin")).unwrap();
    session.write("bin/ssh", SSH);
    let ssh = session.path().join("bin/ssh");
    std::fs::set_permissions(&ssh, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!(
        "{}/bin:{}",
        session.path().display(),
        std::env::var("PATH").unwrap()
    );
    session.env("PATH", &path);
    session.run(&["ssh", "3333", "--", "-v", "hostname", "-f"]);
    let directory = std::fs::read_to_string(session.path().join("directory")).unwrap();
    assert!(directory.contains("xbe-ssh-"), "{directory}");
    assert!(
        !std::path::Path::new(directory.trim()).exists(),
        "the key stays behind"
    );
    session.run(&["ssh", "1111"]);
    session.env("PATH", "/nonexistent");
    session.run(&["ssh", "3333"]);
    session.expect("ssh");
}
