//! `kecho` and `kechod` as users run them.

#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Output, Stdio};

use serde_json::json;
use xbee_kecho::{Registry, RegistryConfig};

struct Place {
    registry: Registry,
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        Place {
            registry: Registry::start(&RegistryConfig {
                listen: vec!["tcp:[::1]:0".parse().unwrap()],
                ..RegistryConfig::default()
            })
            .unwrap(),
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kecho"));
        command
            .args(arguments)
            .env("KECHO_REGISTRY", self.registry.addresses()[0].to_string())
            .env("XDG_RUNTIME_DIR", self.directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn well(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// A channel that somebody keeps.
    fn keeper(&self, channel: &str) -> Running {
        let mut keeper = self.command(&["create", channel]).spawn().unwrap();
        let mut said = String::new();
        let stderr = keeper.stderr.as_mut().unwrap();
        BufReader::new(stderr).read_line(&mut said).unwrap();
        assert_eq!(said, format!("kecho: the channel '{channel}' is there\n"));
        Running(keeper)
    }

    fn start(&self, arguments: &[&str]) -> Running {
        Running(self.command(arguments).spawn().unwrap())
    }
}

/// A process that is ended with the test.
struct Running(Child);

impl Running {
    fn signal(&self, signal: &str) {
        let pid = self.0.id().to_string();
        let sent = Command::new("kill").args([signal, &pid]).status().unwrap();
        assert!(sent.success());
    }

    fn ends(mut self) -> (Option<i32>, String, String) {
        let (mut out, mut err) = (String::new(), String::new());
        use std::io::Read;
        let stdout = self.0.stdout.as_mut().unwrap();
        stdout.read_to_string(&mut out).unwrap();
        let stderr = self.0.stderr.as_mut().unwrap();
        stderr.read_to_string(&mut err).unwrap();
        (self.0.wait().unwrap().code(), out, err)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn lines_go_in_and_come_out() {
    let place = Place::new();
    let sub = place.start(&["sub", "news", "--create", "--count", "20000"]);
    let publish = ["pub", "news", "--create", "--wait", "1"];
    let mut publish = place.command(&publish);
    let mut publish = publish.stdin(Stdio::piped()).spawn().unwrap();
    let lines: String = (0..20_000).map(|n| format!("event {n}\n")).collect();
    let mut input = publish.stdin.take().unwrap();
    input.write_all(lines.as_bytes()).unwrap();
    drop(input);
    assert!(publish.wait().unwrap().success());
    let (code, out, err) = sub.ends();
    assert_eq!(err, "");
    assert_eq!(code, Some(0));
    assert!(out == lines, "{} bytes of {}", out.len(), lines.len());
}

#[test]
fn json_tells_all_of_an_event_and_filters_choose() {
    let place = Place::new();
    let _keeper = place.keeper("load");
    let filter = "load < 0.5 && @host == \"a\"";
    let sub = ["sub", "load", "--json", "--count", "1", "--filter", filter];
    let sub = place.start(&sub);
    let publish = |host: &str, load: &str| {
        let (host, load) = (format!("host={host}"), format!("load:f64={load}"));
        let arguments = ["--type", "load", "--version", "2", "--wait", "1"];
        let mut all = vec!["pub", "load", "--field", &load, "--attribute", &host];
        // The first of a name counts.
        all.extend(["--attribute", "host=other"]);
        all.extend(["-a", "n=007", "-a", "build:text=007", "-a", "load:f64=1"]);
        all.extend(arguments);
        all.push("and more");
        place.well(&all);
    };
    publish("a", "0.75");
    publish("b", "0.25");
    publish("a", "0.25");
    let (code, out, _) = sub.ends();
    assert_eq!(code, Some(0));
    let event: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        event,
        json!({
            "type": "load", "version": 2, "sequence": 0,
            "attributes": { "host": "a", "n": 7, "build": "007", "load": 1.0 }, "fields": { "load": 0.25 }, "payload": "and more",
        })
    );
}

#[test]
fn an_attribute_is_of_its_kind() {
    let place = Place::new();
    for (attribute, why) in [
        ("n:i64=x", "'x' is no i64"),
        (
            "n:u8=1",
            "'u8' is no kind of attribute: expected bool, i64, f64 or text",
        ),
        ("n", "expected NAME=VALUE or NAME:KIND=VALUE"),
    ] {
        let (code, _, err) = place.start(&["pub", "x", "-a", attribute, "y"]).ends();
        assert_eq!(code, Some(2));
        assert!(err.contains(why), "{err}");
    }
}

#[test]
fn list_and_status_tell_what_is_there() {
    let place = Place::new();
    assert_eq!(place.well(&["list"]), "");
    let keeper = place.keeper("b");
    let _other = place.keeper("a");
    assert_eq!(place.well(&["list"]), "a\nb\n");
    let sub = place.start(&["sub", "b"]);
    let mut publish = place.command(&["pub", "b", "--wait", "1"]);
    let mut publish = publish.stdin(Stdio::piped()).spawn().unwrap();
    let mut input = publish.stdin.take().unwrap();
    input.write_all(b"one\ntwo\n").unwrap();
    let mut sub = sub;
    let mut lines = BufReader::new(sub.0.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "one");
    assert_eq!(lines.next().unwrap().unwrap(), "two");
    let status = place.well(&["status", "b"]);
    assert_eq!(status.matches("\nnode ").count(), 3, "{status}");
    assert_eq!(status.matches(", the contact\n").count(), 1, "{status}");
    assert_eq!(status.matches("\n  source ").count(), 1, "{status}");
    for line in [
        "sinks      1 by shared memory",
        "submitted  2",
        "dropped    0",
    ] {
        assert!(status.contains(&format!("\n    {line}\n")), "{status}");
    }
    keeper.signal("-TERM");
    assert_eq!(keeper.ends().0, Some(143));
    input.write_all(b"three\n").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "three");
    place.well(&["destroy", "b"]);
    assert!(lines.next().is_none());
    assert_eq!(sub.0.wait().unwrap().code(), Some(0));
    assert_eq!(place.well(&["list"]), "a\n");
    drop(input);
    publish.wait().unwrap();
}

#[test]
fn what_cannot_be_is_said() {
    let place = Place::new();
    let refused = |arguments: &[&str], text: &str| {
        let output = place.run(arguments);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{arguments:?}");
        assert!(error.contains(text), "{arguments:?}: {error}");
    };
    refused(&["sub", "none"], "there is no channel 'none'");
    refused(&["status", "none"], "there is no channel 'none'");
    refused(&["pub", "a b", "x"], "'a b' cannot be a channel's name");
    let _keeper = place.keeper("x");
    refused(&["create", "x"], "there is a channel 'x' already");
    refused(
        &["sub", "x", "--filter", "load <"],
        "filter, line 1, column 7: expected a value",
    );
    refused(&["sub", "x", "--timeout", "0.1"], "no event in 0.1 s");
    let sinks = ["pub", "x", "y", "--wait", "1", "--timeout", "0.1"];
    refused(&sinks, "0 sinks are there");
    refused(
        &["pub", "x", "--field", "a:f128=1"],
        "f32, f64 or text(BYTES)",
    );
    refused(
        &["sub", "x", "--type", "a:b"],
        "expected NAME or NAME:VERSION",
    );
    refused(&["pub", "x", "--field", "a:u8=300"], "cannot hold 300");
    let nowhere = ["--registry", "tcp:[::1]:1", "list"];
    refused(&nowhere, "the registry at tcp:[::1]:1 does not answer");
    // All have taken their leave but the keeper.
    let sockets = std::fs::read_dir(place.directory.path()).unwrap();
    let sockets = sockets.flat_map(|of_user| std::fs::read_dir(of_user.unwrap().path()).unwrap());
    assert_eq!(sockets.count(), 1);
}

#[test]
fn a_line_that_is_too_long_is_refused_and_those_before_it_are_sent() {
    let place = Place::new();
    let sub = place.start(&["sub", "x", "--create", "--count", "1"]);
    let publish = ["pub", "x", "--create", "--wait", "1"];
    let mut publish = place.command(&publish);
    let mut publish = publish.stdin(Stdio::piped()).spawn().unwrap();
    let mut input = publish.stdin.take().unwrap();
    let long = format!("first\n{}\n", "x".repeat((1 << 20) + 1));
    // It may have ended before it has read all.
    let _ = input.write_all(long.as_bytes());
    drop(input);
    let output = publish.wait_with_output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains("line 2 is longer than 1048576 bytes"),
        "{error}"
    );
    assert_eq!(sub.ends().1, "first\n");
}

#[test]
fn commands_that_end_together_leave_the_name_free() {
    let place = Place::new();
    for round in 0..12 {
        let keeper = place.keeper("short");
        let sub = place.start(&["sub", "short", "--count", "1"]);
        let well = place.well(&["pub", "short", "--wait", "1", "-a", "n=1", "seen"]);
        assert_eq!(well, "");
        // It ends by itself, and the keeper at about the same time.
        std::thread::sleep(std::time::Duration::from_micros(round * 300));
        keeper.signal("-TERM");
        assert_eq!(sub.ends().1, "seen\n");
        keeper.ends();
    }
}

#[test]
fn an_input_that_is_too_long_for_one_event_is_refused_and_not_cut() {
    let place = Place::new();
    let _keeper = place.keeper("x");
    let mut publish = place.command(&["pub", "x", "--whole"]);
    let publish = publish.stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut publish = publish.spawn().unwrap();
    let mut input = publish.stdin.take().unwrap();
    // It may have ended before it has read all.
    let _ = input.write_all(&vec![b'x'; (1 << 20) + 1]);
    drop(input);
    let output = publish.wait_with_output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains("the input is longer than 1048576 bytes"),
        "{error}"
    );
    assert!(!output.status.success());
}
