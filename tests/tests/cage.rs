//! The cage on another kernel than the host's: its own tests, in a guest with control groups of version 2 alone.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;

use xbee_tests::{has_image, program, qemu};

/// Of those that cargo has built of a test, the last.
fn test_program(name: &str) -> PathBuf {
    let built = program("xbed").with_file_name("deps");
    let programs = fs::read_dir(&built).unwrap().map(|entry| entry.unwrap());
    let ours = programs.filter(|entry| {
        let file = entry.file_name().into_string().unwrap();
        file.strip_prefix(name)
            .and_then(|rest| rest.strip_prefix('-'))
            .is_some_and(|hash| hash.chars().all(|c| c.is_ascii_hexdigit()))
    });
    ours.max_by_key(|entry| entry.metadata().unwrap().modified().unwrap())
        .unwrap_or_else(|| panic!("no program of the test {name} in {built:?}"))
        .path()
}

#[test]
fn groups_of_version_2_limit_memory_and_threads() {
    if !has_image("povray") {
        return;
    }
    let Some(xbed) = qemu() else { return };
    let files = [
        ("limits", test_program("limits")),
        ("cage", program("cage")),
        ("hungry", program("examples/hungry")),
    ];
    // As a service of systemd's with `DelegateSubgroup=xbed` is.
    let script = "set -e; cd /opt; chmod 755 limits cage hungry; groups=/sys/fs/cgroup; uname -r; \
        echo 0 >$groups/cgroup.procs; echo +memory +pids +cpu >$groups/cgroup.subtree_control; \
        mkdir -p $groups/service/xbed; echo 0 >$groups/service/xbed/cgroup.procs; \
        exec ./limits --nocapture --test-threads 1";
    let mut run = xbed.xbe_command(["run", "--image", "povray", "--memory", "512M"]);
    for (name, from) in files {
        run.arg("--volume")
            .arg(format!("{}:/opt/{name}", from.display()));
    }
    let ran = xbee_tests::run(run.args(["--", "/bin/sh", "-c", script]));
    let said = &ran.stdout;
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(said.contains("control groups of version 2\n"), "{said}");
    assert!(said.contains("2 passed; 0 failed"), "{said}");
    assert!(!said.contains("skipped"), "{said}");
}
