//! Jobs that take all they can get: what bounds them, what is said of it, and what still works beside them.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::Stdio;
use std::time::Instant;

use serde_json::Value;
use xbee_tests::{Xbed, qemu};

/// A document of a shell script with so much memory and these limits.
fn limited(xbed: &Xbed, memory: &str, script: &str, limits: &[(&str, u64)]) -> String {
    let args = [
        "run",
        "--print-jsdl",
        "--memory",
        memory,
        "--",
        "/bin/sh",
        "-c",
        script,
    ];
    let document = xbed.xbe(args).ok().stdout;
    let elements: String = limits
        .iter()
        .map(|(name, value)| format!("<jsdl-posix:{name}>{value}</jsdl-posix:{name}>"))
        .collect();
    let end = "</jsdl-posix:POSIXApplication>";
    assert_eq!(document.matches(end).count(), 1, "{document}");
    document.replace(end, &format!("{elements}{end}"))
}

/// `make soak` asks for more than every test run can afford.
fn is_full() -> bool {
    std::env::var_os("XBEE_STRESS_FULL").is_some()
}

/// How the job ended, and what it had printed.
fn outcome(xbed: &Xbed, document: &str) -> (Value, String) {
    let task = xbed.submit(document);
    let begun = Instant::now();
    // Whichever end: both are what is waited for.
    let status = loop {
        let status = xbed.status(&task);
        if ["Finished", "Failed", "Terminated"]
            .iter()
            .any(|end| status["state"] == *end)
        {
            break status;
        }
        assert!(
            begun.elapsed() < xbee_tests::PATIENCE,
            "{status:#}\n{}",
            xbed.log()
        );
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    let logs = xbed.xbe(["logs", task.as_str()]);
    println!(
        "{:?}: {} {}",
        begun.elapsed(),
        status["state"],
        status["reason"]
    );
    (status, logs.stdout + &logs.stderr)
}

#[test]
fn limits_that_end_a_job_are_named() {
    let Some(xbed) = qemu() else { return };
    for (limit, value, script, code, said) in [
        (
            "CPUTimeLimit",
            1,
            "while :; do :; done",
            "cpu-time-limit",
            "CPUTimeLimit of 1 s",
        ),
        (
            "FileSizeLimit",
            65_536,
            "exec dd if=/dev/zero of=/tmp/file bs=1M count=1",
            "file-size-limit",
            "FileSizeLimit of 65536 bytes",
        ),
        (
            // Of all processes together: no one of them is near it.
            "MemoryLimit",
            33_554_432,
            "for i in 1 2 3 4 5 6; do dd if=/dev/zero of=/dev/null bs=12M count=100000 & done; wait",
            "memory-limit",
            "MemoryLimit of 33554432 bytes",
        ),
        (
            // Root's too, which has no such limit by itself.
            "ProcessCountLimit",
            10,
            "for i in $(seq 30); do sleep 1000 & done; wait",
            "process-count-limit",
            "ProcessCountLimit of 10",
        ),
        (
            "WallTimeLimit",
            2,
            "sleep 1000",
            "wall-time-limit",
            "WallTimeLimit of 2 s",
        ),
    ] {
        let (status, logs) = outcome(&xbed, &limited(&xbed, "192M", script, &[(limit, value)]));
        assert_eq!(status["state"], "Failed", "{limit}: {status:#}\n{logs}");
        assert_eq!(status["reason_code"], code, "{limit}: {status:#}\n{logs}");
        assert!(
            status["reason"].as_str().unwrap().contains(said),
            "{limit}: {status:#}"
        );
    }
    xbed.assert_nothing_left();
}

#[test]
fn limits_that_a_job_is_told_by_its_own_calls_hold() {
    let Some(xbed) = qemu() else { return };
    // What a program makes of a refusal is its own affair: here, to print the limit and go on.
    let script = "ulimit -n; ulimit -c; ulimit -s; ulimit -v; \
                  dd if=/dev/zero of=/dev/null bs=200M count=1 2>/dev/null || echo refused; \
                  i=3; while eval \"exec $i</dev/null\"; do i=$((i+1)); done 2>/dev/null; echo not reached";
    let limits = [
        ("CoreDumpLimit", 0),
        ("OpenDescriptorsLimit", 20),
        ("StackSizeLimit", 1 << 20),
        ("VirtualMemoryLimit", 100 << 20),
    ];
    let (status, logs) = outcome(&xbed, &limited(&xbed, "300M", script, &limits));
    assert_eq!(status["state"], "Finished", "{status:#}\n{logs}");
    let lines: Vec<_> = logs.lines().take(5).collect();
    assert_eq!(lines, ["20", "0", "1024", "102400", "refused"], "{logs}");
}

#[test]
fn a_job_that_takes_all_memory_is_ended_and_told_so() {
    let Some(xbed) = qemu() else { return };
    // The files of this image are in memory, too.
    for script in [
        "for i in 1 2 3 4 5 6 7 8; do dd if=/dev/zero of=/dev/null bs=40M count=100000 & done; wait; echo survived",
        "for i in 1 2 3 4; do mkdir /fill$i; mount -t tmpfs -o size=1g fill /fill$i; cat /dev/zero >/fill$i/file; done; echo survived",
    ] {
        let (status, logs) = outcome(&xbed, &limited(&xbed, "192M", script, &[]));
        assert_eq!(status["reason_code"], "memory-limit", "{status:#}\n{logs}");
        assert!(!logs.contains("survived"), "{logs}");
    }
    xbed.assert_nothing_left();
}

#[test]
fn a_fork_bomb_is_bounded_and_told_so() {
    let Some(xbed) = qemu() else { return };
    let script = "bomb() { bomb | bomb & bomb & }; bomb; sleep 1000";
    let (status, logs) = outcome(
        &xbed,
        &limited(&xbed, "192M", script, &[("WallTimeLimit", 20)]),
    );
    assert_eq!(status["state"], "Failed", "{status:#}");
    let code = status["reason_code"].as_str().unwrap();
    // Which of its bounds it meets first is chance.
    let bounds = ["wall-time-limit", "process-count-limit", "memory-limit"];
    assert!(bounds.contains(&code), "{status:#}\n{logs}");
    xbed.assert_nothing_left();
}

#[test]
fn orphans_are_reaped_however_many() {
    let Some(xbed) = qemu() else { return };
    let children = if is_full() { 10_000 } else { 200 };
    // First one that nobody reaps as long as its parent is there, so that `ps` is known to show it. Then each outlives its
    // parent and ends at once.
    let script = format!(
        "sh -c 'sleep 0.1 & exec sleep 3' & sleep 1; ps -o stat | grep -c Z; wait; \
         i=0; while [ $i -lt {children} ]; do (: &); i=$((i+1)); done; \
         n=0; while ps -o stat | grep -q Z && [ $n -lt 50 ]; do sleep 0.2; n=$((n+1)); done; \
         ps -o stat | grep -c Z; exit 7"
    );
    let (status, logs) = outcome(&xbed, &limited(&xbed, "192M", &script, &[]));
    assert_eq!(status["exit_code"], 7, "{status:#}\n{logs}");
    assert_eq!(logs, "1\n0\n");
}

#[test]
fn a_full_disk_hurts_only_who_filled_it() {
    let Some(xbed) = qemu() else { return };
    let script = "exec 2>&1; cat /dev/zero >/tmp/file; echo $?; echo more >/tmp/other; echo output goes on; exit 4";
    let (status, logs) = outcome(&xbed, &limited(&xbed, "192M", script, &[]));
    assert_eq!(status["exit_code"], 4, "{status:#}\n{logs}");
    assert!(
        logs.contains("\n1\n") && logs.ends_with("output goes on\n"),
        "{logs}"
    );
    assert!(logs.contains("No space left on device"), "{logs}");
}

#[test]
fn binary_output_is_exact() {
    let Some(xbed) = qemu() else { return };
    let content: Vec<u8> = (0..2_000_003u64)
        .map(|n| (n.wrapping_mul(n) >> 9) as u8)
        .chain(0..=255)
        .collect();
    let input = xbed.scratch().join("content");
    fs::write(&input, &content).unwrap();
    let volume = format!("{}:/data/content", input.display());
    let output = xbed
        .xbe_command(["run", "-v", volume.as_str(), "--", "/bin/sh", "-c"])
        .arg("cat /data/content; cat /data/content >&2")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success());
    assert!(output.stdout == content, "{} bytes", output.stdout.len());
}

#[test]
fn a_clock_that_jumps_moves_no_limit() {
    let Some(xbed) = qemu() else { return };
    let script = "date -s @1000000000; sleep 1; date -s @4000000000; sleep 1; exit 5";
    let (status, logs) = outcome(
        &xbed,
        &limited(&xbed, "192M", script, &[("WallTimeLimit", 100)]),
    );
    assert_eq!(status["exit_code"], 5, "{status:#}\n{logs}");
    // One that stands still, as far as somebody can have it so.
    let script = "while :; do date -s @1000000000 >/dev/null; done";
    let (status, logs) = outcome(
        &xbed,
        &limited(&xbed, "192M", script, &[("WallTimeLimit", 3)]),
    );
    assert_eq!(
        status["reason_code"], "wall-time-limit",
        "{status:#}\n{logs}"
    );
}

#[test]
fn a_flood_of_output_is_counted_and_complete() {
    let Some(xbed) = qemu() else { return };
    let mib = if is_full() { 1024 } else { 32 };
    let script = format!("dd if=/dev/zero bs=1M count={mib} | tr '\\0' x; exit 6");
    let task = xbed.submit(&limited(&xbed, "192M", &script, &[]));
    let begun = Instant::now();
    let status = xbed.wait_for(&task, "Finished");
    println!("{mib} MiB in {:?}", begun.elapsed());
    assert_eq!(status["exit_code"], 6, "{status:#}");
    let logs = xbed
        .xbe_command(["logs", task.as_str()])
        .output()
        .unwrap()
        .stdout;
    assert_eq!(logs.len(), mib << 20);
    assert!(logs.iter().all(|byte| *byte == b'x'));
}
