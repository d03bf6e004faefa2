//! `xbe submit --anywhere`, against servers that speak the API.

use std::path::PathBuf;
use std::process::Output;

use xbee_api::{Place, PlaceRequest, Places};

use crate::harness::Session;
use crate::server::{Reaction, SUBMITTED, Server};

/// The own server, and two others.
struct Hosts {
    session: Session,
    own: Server,
    others: [Server; 2],
}

impl Hosts {
    fn new() -> Hosts {
        let session = Session::new();
        session.write("job.xsdl", "<JobDefinition/>");
        let own = Server::start(&session.socket());
        let others = ["one", "two"].map(|name| Server::start(&session.path().join(name)));
        Hosts {
            session,
            own,
            others,
        }
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.session.path().join(name)
    }

    /// The own server offers these.
    fn offer(&self, places: &[(&str, bool)]) {
        let place = |(name, at_once): &(&str, bool)| Place {
            server: (*name != "own").then(|| format!("unix://{}", self.socket(name).display())),
            host: (*name).to_owned(),
            at_once: *at_once,
        };
        self.own.seen().places = Places {
            places: places.iter().map(place).collect(),
            asked: places.len(),
            note: None,
        };
    }

    fn submit(&self) -> Output {
        let args = ["submit", "--anywhere", "--json", "job.xsdl"];
        self.session.command(&args).output().unwrap()
    }

    /// How often each was asked to take the job: the own one first.
    fn asked(&self) -> [usize; 3] {
        let asked = |server: &Server| server.seen().placements.len();
        [
            asked(&self.own),
            asked(&self.others[0]),
            asked(&self.others[1]),
        ]
    }
}

fn json(text: &[u8]) -> serde_json::Value {
    let text = String::from_utf8_lossy(text);
    let line = text.lines().find(|line| line.starts_with('{'));
    serde_json::from_str(line.unwrap_or_else(|| panic!("{text}"))).unwrap()
}

#[test]
fn the_best_host_has_it_and_is_named() {
    let hosts = Hosts::new();
    hosts.offer(&[("one", true), ("two", true), ("own", false)]);
    let output = hosts.submit();
    assert_eq!(output.status.code(), Some(0));
    let placed = json(&output.stdout);
    assert_eq!(placed["id"], SUBMITTED.to_string());
    let server = format!("unix://{}", hosts.socket("one").display());
    assert_eq!(placed["server"], server);
    assert_eq!(hosts.asked(), [0, 1, 0]);
    assert!(hosts.others[0].seen().placements[0].at_once);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(
        told.contains(&format!("xbe --server {server} status {SUBMITTED}")),
        "{told}"
    );
    // Its own host need not be named.
    hosts.offer(&[("own", true)]);
    let placed = json(&hosts.submit().stdout);
    assert!(placed["server"].is_null());
    assert_eq!(hosts.asked(), [1, 1, 0]);
}

#[test]
fn one_that_has_filled_up_or_gone_is_passed_over() {
    let hosts = Hosts::new();
    hosts.offer(&[("gone", true), ("one", true), ("two", true)]);
    hosts.others[0].seen().reactions = [Reaction::Refuse(409, "not-at-once")].into();
    let placed = json(&hosts.submit().stdout);
    assert!(placed["server"].as_str().unwrap().ends_with("/two"));
    assert_eq!(hosts.asked(), [0, 1, 1]);
}

#[test]
fn where_nobody_begins_at_once_it_waits_at_the_best() {
    let hosts = Hosts::new();
    hosts.offer(&[("one", true), ("own", false), ("two", false)]);
    // Full when it is asked to begin at once, each time that others are looked for; then it may wait there.
    let full = Reaction::Refuse(409, "not-at-once");
    hosts.others[0].seen().reactions = [full, full, full, Reaction::Take].into();
    let placed = json(&hosts.submit().stdout);
    assert!(placed["server"].as_str().unwrap().ends_with("/one"));
    let seen = hosts.others[0].seen();
    let at_once: Vec<bool> = seen.placements.iter().map(|place| place.at_once).collect();
    assert_eq!(at_once, [true, true, true, false]);
    drop(seen);
    assert_eq!(hosts.asked(), [0, 4, 0]);
}

#[test]
fn a_host_that_may_have_it_is_asked_again_and_no_other() {
    let hosts = Hosts::new();
    hosts.offer(&[("one", true), ("two", true)]);
    hosts.others[0].seen().reactions = [Reaction::HangUp, Reaction::Take].into();
    let placed = json(&hosts.submit().stdout);
    assert!(placed["server"].as_str().unwrap().ends_with("/one"));
    let seen = hosts.others[0].seen();
    let key = |place: &PlaceRequest| (place.key, place.at_once);
    let keys: Vec<_> = seen.placements.iter().map(key).collect();
    assert_eq!(keys.len(), 2);
    assert_eq!(keys[0].0, keys[1].0);
    // If it has not got it, it may wait there: it goes nowhere else.
    assert_eq!((keys[0].1, keys[1].1), (true, false));
    drop(seen);

    // It says no, which does not mean that it did so before.
    let refuses = Reaction::Refuse(503, "full");
    hosts.others[0].seen().reactions = [Reaction::HangUp, refuses].into();
    let output = hosts.submit();
    assert_eq!(output.status.code(), Some(125));
    let error = json(&output.stderr);
    assert_eq!(error["code"], "placement-unsure", "{error}");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("ps -a"), "{message}");
    assert_eq!(hosts.asked(), [0, 4, 0]);
}

#[test]
fn where_nobody_takes_it_all_are_named() {
    let hosts = Hosts::new();
    hosts.offer(&[("one", false), ("gone", false)]);
    hosts.others[0].seen().reactions = [Reaction::Refuse(503, "queue-full")].into();
    let output = hosts.submit();
    assert_eq!(output.status.code(), Some(125));
    let error = json(&output.stderr);
    assert_eq!(error["code"], "not-placed");
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("one: not this one") && message.contains("gone: no xbed answers"),
        "{message}"
    );
}
