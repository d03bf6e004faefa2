//! What a control group lets a caged program have, by the version of control groups that the host has.
//! `tests/tests/cage.rs` runs this in a guest whose kernel has another one.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::process::{Command, Output};

use xbee_cage::cgroup::{self, Limits, Place};
use xbee_cage::{Parts, Plan};

const MIB: u64 = 1 << 20;
const LIMITS: Limits = Limits {
    memory_bytes: 32 * MIB,
    pids: 12,
    cpus: 1,
};

fn built(name: &str) -> PathBuf {
    // Cargo puts programs above the tests; where they were brought, they are beside it.
    let test = std::env::current_exe().unwrap();
    let beside = test.with_file_name(PathBuf::from(name).file_name().unwrap());
    match beside.exists() {
        true => beside,
        false => test.parent().unwrap().parent().unwrap().join(name),
    }
}

/// A group that goes with its test.
struct Group(Vec<PathBuf>);

impl Drop for Group {
    fn drop(&mut self) {
        cgroup::remove(&self.0).unwrap();
    }
}

fn place() -> Option<Place> {
    let place = Place::find().unwrap();
    let lacking = place.lacking();
    if !lacking.is_empty() {
        println!("skipped: this process may make no control groups with {lacking:?}");
        return None;
    }
    println!("control groups of {}", place.version());
    Some(place)
}

fn group(place: &Place, name: &str) -> Group {
    let name = format!("xbee-test-{}-{name}", std::process::id());
    place.make(&name, LIMITS).unwrap();
    Group(place.group(&name))
}

fn hungry(group: &Group, what: &str, many: u64) -> Output {
    let plan = Plan {
        parts: Parts::default(),
        cgroups: group.0.clone(),
        open_files_max: 256,
        ..Plan::default()
    };
    let dir = tempfile::tempdir().unwrap();
    Command::new(built("cage"))
        .arg(serde_json::to_string(&plan).unwrap())
        .arg(built("examples/hungry"))
        .args([what, &many.to_string()])
        .current_dir(dir.path())
        .output()
        .unwrap()
}

#[test]
fn one_that_takes_more_memory_than_its_group_has_is_ended_and_counted() {
    let Some(place) = place() else { return };
    let group = group(&place, "memory");
    let modest = hungry(&group, "memory", 8 * MIB);
    assert_eq!(modest.stdout, b"8388608\n", "{modest:?}");
    assert_eq!(cgroup::out_of_memory(&group.0), 0);
    let greedy = hungry(&group, "memory", 96 * MIB);
    assert_eq!(greedy.status.code(), None, "{greedy:?}");
    assert_eq!(cgroup::out_of_memory(&group.0), 1);
}

#[test]
fn one_has_no_more_threads_than_its_group() {
    let Some(place) = place() else { return };
    let group = group(&place, "threads");
    let greedy = hungry(&group, "threads", 100);
    // Its first thread is one of them.
    assert_eq!(greedy.stdout, b"11\n", "{greedy:?}");
}
