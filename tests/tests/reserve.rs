//! Reservations, and the order in which tasks begin: through the command line, on the simulator.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use xbee_tests::{Ran, Xbed, run, sim};

/// A document that runs this.
fn document(xbed: &Xbed, argv: &[&str]) -> PathBuf {
    let print = ["run", "--print-jsdl", "--memory", "64M", "--"];
    let text = xbed.xbe(print.iter().chain(argv)).ok().stdout;
    xbed.document(&format!("{}.xsdl", argv.join("_")), &text)
}

fn reserve(xbed: &Xbed, args: &[&str]) -> Ran {
    let words = ["reserve", "--json", "--memory", "64M"];
    xbed.xbe(words.iter().chain(args))
}

/// Ticket and id of the task.
fn reserved(xbed: &Xbed, args: &[&str]) -> (String, String) {
    let made = reserve(xbed, args).json();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    (text(&made["ticket"]), text(&made["task"]["id"]))
}

fn confirm(xbed: &Xbed, ticket: &str, document: &PathBuf, more: &[&str]) -> Ran {
    let mut command = xbed.xbe_command(["confirm", "--json", ticket]);
    run(command.arg(document).args(more))
}

fn states(status: &Value) -> Vec<String> {
    let word = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let times = status["times"].as_array().unwrap();
    times
        .iter()
        .map(|time| format!("{}/{}", word(&time["state"]), word(&time["substate"])))
        .collect()
}

/// Says no with this code.
#[track_caller]
fn refused(ran: &Ran, code: &str) -> String {
    assert_ne!(ran.code, 0, "{ran:?}");
    let error: Value = serde_json::from_str(&ran.stderr).unwrap_or_else(|e| panic!("{e}: {ran:?}"));
    assert_eq!(error["code"], code, "{ran:?}");
    error["message"].as_str().unwrap().to_owned()
}

#[test]
fn a_ticket_leads_from_reserved_to_finished() {
    let mut xbed = sim();
    let (ticket, task) = reserved(&xbed, &["--for", "1h", "--cpus", "2", "--name", "mine"]);
    let status = xbed.status(&task);
    assert_eq!(status["substate"], "Reserved", "{status:#}");
    assert_eq!(status["name"], "mine");
    assert_eq!(status["reservation"]["cpus"], 2);
    assert!(!xbed.log().contains(&ticket), "the ticket is in the log");

    let job = document(&xbed, &["echo", "hi"]);
    xbed.kill_and_restart();
    let confirmed = confirm(&xbed, &ticket, &job, &["--no-start"]).json();
    assert_eq!(confirmed["id"], task.as_str());
    assert_eq!(confirmed["substate"], "Confirmed", "{confirmed:#}");
    let again = confirm(&xbed, &ticket, &job, &[]);
    refused(&again, "already-confirmed");

    xbed.kill_and_restart();
    assert_eq!(xbed.status(&task)["state"], "Pending");
    xbed.xbe(["start", &ticket]).ok();
    let status = xbed.wait_for(&task, "Finished");
    assert_eq!(
        states(&status)[..3],
        ["Pending/Reserved", "Pending/Confirmed", "Running/Stage-In"]
    );
    assert_eq!(xbed.xbe(["logs", &task]).ok().stdout, "hi\n");
    // What it was for is over.
    let over = xbed.xbe(["start", "--json", &ticket]);
    let message = refused(&over, "ticket-invalid");
    assert!(message.starts_with("501 TICKET_INVALID"), "{message}");
}

#[test]
fn confirm_alone_starts_it() {
    let xbed = sim();
    let (ticket, task) = reserved(&xbed, &["--for", "1h"]);
    confirm(&xbed, &ticket, &document(&xbed, &["true"]), &[]).ok();
    xbed.wait_for(&task, "Finished");
}

#[test]
fn what_does_not_fit_is_refused() {
    let xbed = Xbed::start("sim", &["vcpus = 2"]);
    let (ticket, _) = reserved(&xbed, &["--for", "1h"]);
    let text = xbed
        .xbe(["run", "--print-jsdl", "--cpus", "2", "--", "true"])
        .ok()
        .stdout;
    let large = xbed.document("large.xsdl", &text);
    refused(&confirm(&xbed, &ticket, &large, &[]), "not-covered");
    let both = reserve(&xbed, &["--for", "1h", "--cpus", "2"]);
    let message = refused(&both, "no-room");
    assert!(message.contains("there is not so much free"), "{message}");
    let three = reserve(&xbed, &["--for", "1h", "--cpus", "3"]);
    refused(&three, "no-capacity");
    let past = reserve(&xbed, &["--for", "1h", "--from", "2001-01-01T00:00:00Z"]);
    refused(&past, "invalid-reservation");
    let unknown = confirm(&xbed, "0123456789abcdef0123456789abcdef", &large, &[]);
    refused(&unknown, "ticket-invalid");
    // Beside the one that is.
    reserved(&xbed, &["--for", "1h", "--cpus", "1"]);
    reserved(&xbed, &["--for", "1h", "--cpus", "2", "--from", "+61m"]);
}

#[test]
fn a_reservation_ends_and_with_it_its_task() {
    let mut xbed = sim();
    let (_, unused) = reserved(&xbed, &["--for", "2s"]);
    xbed.kill_and_restart();
    let (ticket, used) = reserved(&xbed, &["--for", "3s"]);
    let job = document(&xbed, &["sleep", "1000"]);
    confirm(&xbed, &ticket, &job, &[]).ok();
    for task in [&unused, &used] {
        let status = xbed.wait_for(task, "Terminated");
        assert_eq!(status["reason"], "its reservation is over", "{status:#}");
    }
    let (ticket, task) = reserved(&xbed, &["--for", "1h"]);
    xbed.xbe(["cancel", &ticket]).ok();
    let status = xbed.wait_for(&task, "Terminated");
    assert_eq!(status["reason"], "its reservation was cancelled");
}

#[test]
fn nobody_runs_into_a_reservation() {
    let xbed = Xbed::start("sim", &["vcpus = 1"]);
    let (ticket, task) = reserved(&xbed, &["--for", "1h", "--from", "+4s"]);
    let job = document(&xbed, &["echo", "early"]);
    confirm(&xbed, &ticket, &job, &[]).ok();
    // Nobody knows how long it would run.
    let job = document(&xbed, &["echo", "late"]);
    let other = xbed.xbe(["submit", job.to_str().unwrap()]).line();
    let first = xbed.wait_for(&task, "Finished");
    let began = |status: &Value| {
        let times = status["times"].as_array().unwrap();
        let stage_in = times.iter().find(|time| time["substate"] == "Stage-In");
        stage_in.unwrap()["at_ms"].as_u64().unwrap()
    };
    assert!(began(&first) >= first["reservation"]["from_ms"].as_u64().unwrap());
    // The task is over, and so is what was held for it.
    let second = xbed.wait_for(&other, "Finished");
    assert!(began(&second) > began(&first), "{second:#}");
}

#[test]
fn priority_and_quota_decide_who_begins() {
    let config = ["domains = 1", "[quota]", "waiting = 3"];
    let xbed = Xbed::start("sim", &config);
    let long = document(&xbed, &["sleep", "1000"]);
    let short = document(&xbed, &["true"]);
    let submit = |job: &PathBuf, priority: &str| {
        let mut command = xbed.xbe_command(["submit", "--json", "--priority", priority]);
        run(command.arg(job))
    };
    let id = |ran: Ran| ran.json()["id"].as_str().unwrap().to_owned();
    let running = id(submit(&long, "0"));
    xbed.wait_for(&running, "Executing");
    let tasks = ["-1", "0", "1"].map(|priority| id(submit(&short, priority)));
    refused(&submit(&short, "0"), "over-quota");
    xbed.xbe(["terminate", &running]).ok();
    let began = tasks.map(|task| {
        let status = xbed.wait_for(&task, "Finished");
        status["times"][1]["at_ms"].as_u64().unwrap()
    });
    assert!(began[2] < began[1] && began[1] < began[0], "{began:?}");
}

#[test]
fn what_may_pass_is_tried_again() {
    let xbed = Xbed::start("sim", &["[queue]", "retry-delay-s = 1"]);
    // A port where nobody listens.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let text = xbed
        .xbe([
            "run",
            "--print-jsdl",
            "-v",
            &format!("http://{address}/in:/in"),
            "--",
            "true",
        ])
        .ok()
        .stdout;
    let job = xbed.document("in.xsdl", &text);
    let submit = |retries: &str| {
        let mut command = xbed.xbe_command(["submit", "--retries", retries]);
        run(command.arg(&job)).line()
    };
    let failed = xbed.wait_for(&submit("1"), "Failed");
    assert_eq!(failed["reason_code"], "connect", "{failed:#}");
    let tries = |status: &Value| {
        let states = states(status);
        states.iter().filter(|s| *s == "Running/Stage-In").count()
    };
    assert_eq!(tries(&failed), 2, "{failed:#}");

    let task = submit("8");
    let begun = Instant::now();
    while tries(&xbed.status(&task)) < 2 {
        assert!(begun.elapsed() < xbee_tests::PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
    let listener = TcpListener::bind(address).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]).unwrap();
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";
            stream.write_all(answer).unwrap();
        }
    });
    let finished = xbed.wait_for(&task, "Finished");
    assert!(tries(&finished) >= 3, "{finished:#}");
    let refusal = xbed.xbe(["submit", "--json", "--retries", "11", job.to_str().unwrap()]);
    refused(&refusal, "too-many-retries");
}

#[test]
fn the_status_is_valid_xml_of_bes() {
    let Some(corpus) = std::env::var_os("XBEE_CORPUS") else {
        println!("skipped: XBEE_CORPUS, which has the schema, is not set");
        return;
    };
    let version = Command::new("xmllint").arg("--version").output();
    if version.is_err() {
        println!("skipped: xmllint is not installed");
        return;
    }
    let schemas = PathBuf::from(corpus).join("xsd");
    let xbed = sim();
    let (_, reserved) = reserved(&xbed, &["--for", "1h"]);
    let finished = xbed.xbe(["run", "--", "sh", "-c", "exit 3"]);
    assert_eq!(finished.code, 3);
    let tasks = xbed.xbe(["ps", "-a", "--json"]).ok().stdout;
    let tasks: Value = serde_json::from_str(&tasks).unwrap();
    // What the schema imports from elsewhere.
    let soap = xbed.document(
        "soap.xsd",
        r#"<schema xmlns="http://www.w3.org/2001/XMLSchema" targetNamespace="http://schemas.xmlsoap.org/soap/envelope/">
           <complexType name="Fault"><sequence><any minOccurs="0"/></sequence></complexType></schema>"#,
    );
    let addressing = schemas.join("ws-addr.xsd");
    let catalog = xbed.document(
        "catalog.xml",
        &format!(
            r#"<catalog xmlns="urn:oasis:names:tc:entity:xmlns:xml:catalog">
               <uri name="http://schemas.xmlsoap.org/soap/envelope/" uri="file://{}"/>
               <system systemId="http://schemas.xmlsoap.org/soap/envelope/" uri="file://{0}"/>
               <uri name="http://www.w3.org/2002/ws/addr/ns/ws-addr" uri="file://{}"/>
               <system systemId="http://www.w3.org/2002/ws/addr/ns/ws-addr" uri="file://{1}"/></catalog>"#,
            soap.display(),
            addressing.display()
        ),
    );
    let validate = |text: &str| {
        let mut child = Command::new("xmllint")
            .args(["--noout", "--nonet", "--schema"])
            .arg(schemas.join("bes-factory.xsd"))
            .arg("-")
            .env("XML_CATALOG_FILES", &catalog)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(text.as_bytes()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let tasks = tasks.as_array().unwrap();
    assert_eq!(tasks.len(), 2);
    for task in tasks {
        let id = task["id"].as_str().unwrap();
        let text = xbed.xbe(["status", "--xml", id]).ok().stdout;
        let (valid, said) = validate(&text);
        assert!(valid, "{said}\n{text}");
        let state = if id == reserved {
            r#"state="Pending">"#
        } else {
            r#"state="Finished">"#
        };
        assert!(text.contains(state), "{text}");
        let (valid, said) = validate(&text.replace(state, r#"state="Else">"#));
        assert!(!valid && said.contains("attribute 'state'"), "{said}");
    }
    fs::remove_file(soap).unwrap();
}
