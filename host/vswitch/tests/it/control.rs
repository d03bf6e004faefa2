//! The control socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use xbee_vswitch::control::LINE_MAX;

use crate::driver::Driver;
use crate::vm::{Switch, eventually, resources};

fn ask(stream: &UnixStream, line: &[u8]) -> String {
    let mut writer = stream;
    writer.write_all(line).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer.trim_end().into()
}

#[test]
fn answers_are_json_lines() {
    let switch = Switch::start();
    let stream = UnixStream::connect(switch.control()).unwrap();
    assert_eq!(
        ask(&stream, b"{\"op\":\"ping\"}\n"),
        format!(
            "{{\"ok\":true,\"version\":\"{}\"}}",
            env!("CARGO_PKG_VERSION")
        )
    );
    assert_eq!(
        ask(&stream, b"{\"op\":\"list\"}\n"),
        "{\"ok\":true,\"domains\":[]}"
    );
    assert_eq!(
        ask(&stream, b"{\"op\":\"remove\",\"cid\":9}\n"),
        "{\"ok\":false,\"code\":\"unknown-cid\",\"message\":\"no domain has CID 9\"}"
    );
    for bad in [
        &b"nonsense\n"[..],
        b"{\"op\":\"add\"}\n",
        b"\xff\n",
        b"{\"op\":\"fly\"}\n",
    ] {
        let answer = ask(&stream, bad);
        assert!(
            answer.starts_with("{\"ok\":false,\"code\":\"bad-request\","),
            "{answer}"
        );
    }
    // A line without end is not collected for ever.
    let answer = ask(&stream, &vec![b'x'; LINE_MAX + 1]);
    assert!(answer.contains("bad-request"), "{answer}");
    assert_eq!((&stream).read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn what_cannot_be_added_is_refused_by_name() {
    let mut switch = Switch::start();
    for cid in [0, 1, 2, u32::MAX] {
        assert_eq!(switch.add(cid, "a").unwrap_err().code(), "reserved-cid");
    }
    switch.add(3, "a").unwrap();
    let error = switch.add(3, "a").unwrap_err();
    assert_eq!(error.code(), "cid-in-use");
    assert_eq!(
        error.to_string(),
        "CID 3 is in use by another domain: remove that one first"
    );

    let mut spec = switch.spec(4, "a");
    spec.uds = switch.uds(3);
    assert_eq!(switch.add_spec(spec).unwrap_err().code(), "path-in-use");

    let mut spec = switch.spec(4, "a");
    spec.uds = switch.dir.path().join("x".repeat(100));
    assert_eq!(switch.add_spec(spec).unwrap_err().code(), "path-too-long");

    let spec = switch.spec(4, "a");
    std::fs::write(&spec.uds, "precious").unwrap();
    assert_eq!(
        switch.add_spec(spec.clone()).unwrap_err().code(),
        "not-a-socket"
    );
    assert_eq!(std::fs::read(&spec.uds).unwrap(), b"precious");
    assert!(!spec.vhost_socket.exists());

    let spec = switch.spec(5, "a");
    let _other = UnixListener::bind(&spec.uds).unwrap();
    assert_eq!(switch.add_spec(spec).unwrap_err().code(), "socket-in-use");

    let mut spec = switch.spec(6, "a");
    spec.uds = "/nonexistent/uds".into();
    assert_eq!(switch.add_spec(spec).unwrap_err().code(), "cannot-listen");
    assert_eq!(switch.list().len(), 1);
}

#[test]
fn sockets_are_private_and_go_to_the_given_uid() {
    let mut switch = Switch::start();
    let mut spec = switch.spec(3, "a");
    let root = rustix::process::geteuid().is_root();
    if root {
        spec.uid = Some(65534);
    } else {
        println!("skipped in part: only root can give a socket to another uid");
    }
    switch.add_spec(spec.clone()).unwrap();
    let own = rustix::process::geteuid().as_raw();
    for (path, uid) in [
        (&spec.vhost_socket, if root { 65534 } else { own }),
        (&spec.uds, own),
        (&switch.control(), own),
    ] {
        let meta = std::fs::metadata(path).unwrap();
        assert_eq!(meta.permissions().mode() & 0o7777, 0o600, "{path:?}");
        assert_eq!(meta.uid(), uid, "{path:?}");
    }
}

#[test]
fn a_second_switch_refuses_and_a_dead_one_is_succeeded() {
    let mut switch = Switch::start();
    switch.add(3, "a").unwrap();
    let second = Command::new(env!("CARGO_BIN_EXE_vswitch"))
        .arg("--control")
        .arg(switch.control())
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert_eq!(
        String::from_utf8(second.stderr).unwrap(),
        format!(
            "vswitch: another vswitch runs on {}: stop it first, or use another --control path\n",
            switch.control().display()
        )
    );
    assert!(second.stdout.is_empty());
    // The first one is none the worse.
    assert_eq!(switch.list().len(), 1);

    let pid = rustix::process::Pid::from_raw(switch.pid() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    eventually("the switch dies", || {
        UnixStream::connect(switch.control()).is_err()
    });
    assert!(switch.uds(3).exists(), "a dead switch leaves its sockets");
    switch.start_again();
    assert!(switch.list().is_empty());
    switch.add(3, "a").unwrap();
}

#[test]
fn stopping_removes_every_socket() {
    let mut switch = Switch::start();
    switch.add(3, "a").unwrap();
    switch.add(4, "a").unwrap();
    switch.stop();
    let mut left: Vec<_> = std::fs::read_dir(switch.dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["control.lock", "log"]);
}

#[test]
fn a_program_that_cannot_start_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let spawn = |program: &str, control: &Path| {
        runtime
            .block_on(xbee_vswitch::control::Client::spawn(
                Path::new(program),
                control,
                &dir.path().join("log"),
            ))
            .unwrap_err()
    };
    let error = spawn("/nonexistent/vswitch", &dir.path().join("control"));
    assert_eq!(error.code(), "vswitch-not-started");
    assert_eq!(error.to_string(), "cannot start /nonexistent/vswitch");
    // It starts, and cannot listen.
    let error = spawn(
        env!("CARGO_BIN_EXE_vswitch"),
        Path::new("/nonexistent/control"),
    );
    assert_eq!(error.code(), "vswitch-not-started");
    let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(
        log.contains("vswitch: cannot lock /nonexistent/control.lock"),
        "{log}"
    );
}

#[test]
fn domains_come_and_go_without_a_trace() {
    let mut switch = Switch::start();
    let cycle = |switch: &mut Switch, by_removal: bool| {
        switch.add(3, "a").unwrap();
        let mut driver = Driver::start(&switch.spec(3, "a"));
        // A connection in each state: not yet greeted, open, and one the guest opened.
        let _silent = UnixStream::connect(switch.uds(3)).unwrap();
        let _open = driver.accept_from_host(&switch.uds(3), 1000);
        let path = format!("{}_7", switch.uds(3).display());
        let listener = UnixListener::bind(&path).unwrap();
        driver.connect_to_host(7);
        let _accepted = listener.accept().unwrap();
        std::fs::remove_file(path).unwrap();
        if by_removal {
            switch.remove(3).unwrap();
        } else {
            drop(driver);
        }
    };
    cycle(&mut switch, true);
    cycle(&mut switch, false);
    eventually("the domain leaves", || switch.list().is_empty());
    let pid = switch.pid();
    // The helper's own look at the control socket is gone again.
    std::thread::sleep(Duration::from_millis(100));
    let before = resources(pid);
    for round in 0..50 {
        cycle(&mut switch, round % 2 == 0);
    }
    eventually("the domain leaves", || switch.list().is_empty());
    // Fewer, where something was still on its way out at the first look.
    eventually("threads and descriptors are what they were", || {
        let (threads, files) = resources(pid);
        threads <= before.0 && files <= before.1
    });
}

#[test]
fn many_domains_at_a_time() {
    let mut switch = Switch::start();
    for cid in 3..303 {
        switch.add(cid, "a").unwrap();
    }
    assert_eq!(switch.list().len(), 300);
    let pid = switch.pid();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let memory = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
    let (threads, files) = resources(pid);
    println!("300 domains: {memory}, {threads} threads, {files} descriptors");
}
