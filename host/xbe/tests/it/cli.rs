//! The command line itself, without a server.

use crate::harness::Session;

#[test]
fn help() {
    let mut session = Session::new();
    session.run(&["--help"]);
    session.run(&["--version"]);
    for command in [
        "run",
        "submit",
        "status",
        "watch",
        "logs",
        "terminate",
        "ps",
        "rm",
        "exec",
        "ssh",
        "check",
        "export",
        "host",
        "completions",
        "man",
    ] {
        session.run(&[command, "--help"]);
    }
    for command in ["add", "ls", "rm"] {
        session.run(&["cache", command, "--help"]);
    }
    session.expect("help");
}

#[test]
fn wrong_usage() {
    let mut session = Session::new();
    for args in [
        &[][..],
        &["status"],
        &["run"],
        &["run", "-v", "nowhere", "--", "true"],
        &["run", "-o", "relative:file", "--", "true"],
        &["run", "-p", "80", "--", "true"],
        &["run", "-e", "NAME", "--", "true"],
        &["run", "--memory", "lots", "--", "true"],
        &["run", "--time", "0", "--", "true"],
        &["run", "--cpus", "0", "--", "true"],
        &["logs", "--stderr", "--console", "1111"],
        &["export", "1111"],
        &["export", "--xl", "--libvirt", "1111"],
    ] {
        session.run(args);
    }
    session.expect("wrong_usage");
}

#[test]
fn no_server() {
    let mut session = Session::new();
    session.run(&["ps"]);
    session.run(&["ps", "--json"]);
    session.run(&["run", "--", "true"]);
    // A socket that nobody listens on any more.
    drop(std::os::unix::net::UnixListener::bind(session.socket()).unwrap());
    session.run(&["watch", "1111"]);
    session.run(&["--server", "unix:///nowhere/xbed.sock", "host"]);
    session.run(&["--server", "http://localhost:80", "ps"]);
    session.run(&["--server", "unix://relative", "ps"]);
    session.run(&["status", "../../host"]);
    session.run(&["submit", "missing.jsdl"]);
    session.run(&["submit", "."]);
    std::fs::write(session.path().join("latin.jsdl"), b"<a>\xe9</a>").unwrap();
    session.run(&["submit", "latin.jsdl"]);
    session.expect("no_server");
}

#[test]
fn pki() {
    let mut session = Session::new();
    session.run(&["pki", "issue", "alice"]);
    session.run(&["pki", "init", "site"]);
    session.run(&["pki", "init", "site"]);
    session.run(&["pki", "issue", "--daemon", "host1"]);
    session.run(&["pki", "issue", "alice"]);
    session.run(&["pki", "issue", "alice"]);
    session.run(&["pki", "issue", "../alice"]);
    session.run(&["pki", "revoke", "pki/alice.pem"]);
    let subjects = std::fs::read_to_string(session.path().join("pki/subjects")).unwrap();
    assert_eq!(subjects, "daemon CN=host1\nuser CN=alice\n");
    // A name whose certificate was taken away by hand keeps its line, and its role.
    for end in ["pem", "key"] {
        std::fs::remove_file(session.path().join(format!("pki/alice.{end}"))).unwrap();
    }
    session.run(&["pki", "issue", "--daemon", "alice"]);
    // What a queue needs is looked for before anybody is asked.
    session.run(&["--server", "stomp://localhost:1/a/b", "ps"]);
    session.run(&[
        "--server",
        "stomp://localhost:1/a",
        "--identity",
        "pki/bob",
        "ps",
    ]);
    session.run(&[
        "--server",
        "stomp://localhost:1/a",
        "--identity",
        "pki/host1",
        "ps",
    ]);
    session.expect("pki");
}

#[test]
fn the_default_socket_is_the_users_own() {
    let session = Session::new();
    let socket = xbee_api::default_socket();
    if socket.exists() {
        eprintln!("skipped: {} exists", socket.display());
        return;
    }
    let output = session
        .command(&["ps"])
        .env_remove("XBE_SERVER")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains(&format!("no xbed answers at {} (", socket.display())),
        "{text}"
    );
}

#[test]
fn generated_files() {
    let mut session = Session::new();
    for shell in ["bash", "zsh", "fish"] {
        let output = session.run(&["completions", shell]);
        assert!(
            String::from_utf8(output.stdout)
                .unwrap()
                .contains("print-jsdl"),
            "{shell}"
        );
    }
    assert!(session.run(&["man", "man"]).status.success());
    let page = std::fs::read_to_string(session.path().join("man/xbe-run.1")).unwrap();
    assert!(page.contains("print\\-jsdl"), "{page}");
    assert!(session.path().join("man/xbe.1").exists());
    assert!(
        !session.path().join("man/xbe-proxy.1").exists(),
        "hidden commands have no page"
    );
    session.write("file", "");
    let output = session.run(&["man", "file/man"]);
    assert_eq!(output.status.code(), Some(125));
}
