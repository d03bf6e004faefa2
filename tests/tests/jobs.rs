//! Jobs in real virtual machines, through the programs a user has.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

use xbee_tests::{Xbed, qemu, root};

fn sh(script: &str) -> [&str; 5] {
    ["run", "--", "/bin/sh", "-c", script]
}

#[test]
fn the_hello_world_example_runs_in_a_machine_of_its_own() {
    let Some(xbed) = qemu() else { return };
    let example = root().join("examples/hello-world.xsdl");
    let submitted = xbed
        .xbe(["submit".as_ref(), "--wait".as_ref(), example.as_os_str()])
        .ok();
    let task = submitted.stdout.trim();
    assert_eq!(
        task.len(),
        36,
        "standard output is the id alone: {submitted:?}"
    );
    assert!(xbed.xbe(["logs", task]).ok().stdout.contains("Hello World"));
    let status = xbed.status(task);
    assert_eq!(status["state"], "Finished");
    assert_eq!(status["exit_code"], 0);
    let states: Vec<_> = status["times"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["substate"].as_str().or(t["state"].as_str()).unwrap())
        .collect();
    assert_eq!(
        states,
        [
            "Confirmed",
            "Stage-In",
            "Instance-Starting",
            "Executing",
            "Instance-Stopping",
            "Stage-Out",
            "Finished"
        ]
    );
    // Its kernel is not this machine's: it ran in a guest.
    let guest = xbed
        .xbe(["run", "--", "/bin/cat", "/proc/sys/kernel/random/boot_id"])
        .ok();
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(guest.stdout.len(), host.len());
    assert_ne!(guest.stdout, host);
    xbed.assert_nothing_left();
}

#[test]
fn exit_code_output_and_error_are_the_jobs() {
    let Some(xbed) = qemu() else { return };
    let ran = xbed.xbe(sh("echo out; echo err >&2; exit 7"));
    assert_eq!((ran.code, ran.stdout.as_str()), (7, "out\n"));
    assert!(ran.stderr.contains("err\n"), "{ran:?}");
    let killed = xbed.xbe(sh("kill -9 $$"));
    assert_eq!(killed.code, 128 + 9);
}

#[test]
fn a_command_that_is_not_there_is_named() {
    let Some(xbed) = qemu() else { return };
    let ran = xbed.xbe(["run", "--", "no-such-program", "x"]);
    assert_eq!(ran.code, 125);
    assert_eq!(
        ran.stderr,
        "xbe: the job failed: command \"no-such-program\" not found in the guest\n"
    );
    let tasks = xbed.xbe(["ps", "-a", "--json"]).json();
    assert_eq!(tasks[0]["state"], "Failed");
    assert_eq!(tasks[0]["reason_code"], "command-not-found");
}

#[test]
fn files_go_in_and_results_come_out() {
    let Some(xbed) = qemu() else { return };
    let dir = xbed.scratch();
    let (input, output) = (dir.join("in put.txt"), dir.join("result"));
    let content: Vec<u8> = (0..3_000_000u64).map(|n| ((n * n) >> 7) as u8).collect();
    fs::write(&input, &content).unwrap();
    let stage_in = format!("{}:/data/in put.txt", input.display());
    let stage_out = format!("/data/out:{}", output.display());
    let ran = xbed.xbe([
        "run",
        "-v",
        stage_in.as_str(),
        "-o",
        stage_out.as_str(),
        "--",
        "/bin/sh",
        "-c",
        "cat '/data/in put.txt' '/data/in put.txt' > /data/out; wc -c < /data/out",
    ]);
    assert_eq!(ran.ok().stdout.trim(), "6000000");
    assert_eq!(fs::read(&output).unwrap(), content.repeat(2));
    assert_eq!(fs::read(&input).unwrap(), content);
}

#[test]
fn what_is_staged_in_ends_with_its_domain_and_its_source_and_target_stay() {
    let Some(xbed) = qemu() else { return };
    let dir = xbed.scratch();
    let (input, output) = (dir.join("input"), dir.join("copy"));
    fs::write(&input, "kept").unwrap();
    let stage_in = format!("{}:/data/in", input.display());
    let text = xbed.xbe([
        "run",
        "--print-jsdl",
        "-v",
        &stage_in,
        "--",
        "/bin/cat",
        "/data/in",
    ]);
    let text = text.ok().stdout;
    for delete in ["true", "false"] {
        // The order of its elements is the schema's.
        let wanted =
            format!("<jsdl:DeleteOnTermination>{delete}</jsdl:DeleteOnTermination><jsdl:Source>");
        let target = format!(
            "</jsdl:Source><jsdl:Target><jsdl:URI>file://{}</jsdl:URI></jsdl:Target>",
            output.display()
        );
        let text = text
            .replace("<jsdl:Source>", &wanted)
            .replace("</jsdl:Source>", &target);
        let path = xbed.document("job.xsdl", &text);
        xbed.xbe(["submit".as_ref(), "--wait".as_ref(), path.as_os_str()])
            .ok();
        for kept in [&input, &output] {
            assert_eq!(fs::read_to_string(kept).unwrap(), "kept", "{delete}");
        }
        fs::remove_file(&output).unwrap();
        xbed.assert_nothing_left();
    }
}

#[test]
fn output_is_seen_while_the_job_runs() {
    let Some(xbed) = qemu() else { return };
    let mut run = xbed
        .xbe_command(sh(
            "echo first; while [ ! -e /tmp/go ]; do sleep 0.1; done; echo second",
        ))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(run.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "first");
    // It still runs, and waits for us: the first line was not kept back.
    let task = only_task(&xbed);
    xbed.xbe(["exec", task.as_str(), "--", "/bin/touch", "/tmp/go"])
        .ok();
    assert_eq!(lines.next().unwrap().unwrap(), "second");
    assert!(run.wait().unwrap().success());
}

fn only_task(xbed: &Xbed) -> String {
    let tasks = xbed.xbe(["ps", "--json"]).json();
    assert_eq!(tasks.as_array().unwrap().len(), 1, "{tasks}");
    tasks[0]["id"].as_str().unwrap().to_owned()
}

/// A document of a shell script that runs until it is told to go on.
fn document(xbed: &Xbed, script: &str) -> String {
    let args = ["run", "--print-jsdl", "--", "/bin/sh", "-c", script];
    xbed.xbe(args).ok().stdout
}

#[test]
fn domains_that_start_together_share_nothing() {
    let Some(xbed) = qemu() else { return };
    let text = document(
        &xbed,
        "hostname; cat /proc/sys/kernel/random/boot_id; sleep 600",
    );
    let tasks: Vec<String> = (0..5).map(|_| xbed.submit(&text)).collect();
    let mut seen = vec![];
    for task in &tasks {
        xbed.wait_for(task, "Executing");
        let hostname = xbed.xbe(["exec", task, "--", "hostname"]).line();
        assert_eq!(hostname, format!("xbee-{}", &task[..8]));
        seen.push(
            xbed.xbe(["exec", task, "--", "cat", "/proc/sys/kernel/random/boot_id"])
                .line(),
        );
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), tasks.len(), "each has its own kernel");
    for task in &tasks {
        xbed.xbe(["terminate", task]).ok();
    }
    for task in &tasks {
        xbed.wait_for(task, "Terminated");
    }
    xbed.assert_nothing_left();
}

#[test]
fn terminate_ends_the_whole_tree_with_the_machine() {
    let Some(xbed) = qemu() else { return };
    let task = xbed.submit(&document(&xbed, "setsid sleep 1000 & sleep 1000"));
    xbed.wait_for(&task, "Executing");
    let machines = || {
        let all = xbed.processes();
        all.iter()
            .filter(|(_, line)| line.contains("qemu-system"))
            .count()
    };
    assert_eq!(machines(), 1);
    xbed.xbe(["terminate", task.as_str()]).ok();
    let status = xbed.wait_for(&task, "Terminated");
    assert_eq!(machines(), 0);
    assert_eq!(status["reason"], "terminated on request");
    xbed.assert_nothing_left();
    xbed.xbe(["rm", task.as_str()]).ok();
    let gone = xbed.xbe(["status", task.as_str()]);
    assert_eq!(gone.code, 125);
    assert!(gone.stderr.contains(&format!("no task {task}")), "{gone:?}");
}

#[test]
fn a_killed_xbed_comes_back_and_the_output_has_no_gap() {
    let Some(mut xbed) = qemu() else { return };
    let script = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); sleep 0.02; done; exit 3";
    let task = xbed.submit(&document(&xbed, script));
    xbed.wait_for(&task, "Executing");
    xbed.kill_and_restart();
    let status = xbed.wait_for(&task, "Finished");
    assert_eq!(status["exit_code"], 3);
    let expected: String = (0..400).map(|n| format!("line {n}\n")).collect();
    assert_eq!(xbed.xbe(["logs", task.as_str()]).ok().stdout, expected);
    let executed = status["times"].as_array().unwrap().iter();
    assert_eq!(executed.filter(|t| t["substate"] == "Executing").count(), 1);
    xbed.assert_nothing_left();
}

#[test]
fn memory_and_cpus_are_those_of_the_document() {
    let Some(xbed) = qemu() else { return };
    let args = [
        "run", "--cpus", "2", "--memory", "300M", "--", "/bin/sh", "-c",
    ];
    let script = "nproc; grep MemTotal /proc/meminfo";
    let ran = xbed.xbe(args.into_iter().chain([script])).ok();
    let mut words = ran.stdout.split_whitespace();
    assert_eq!(words.next(), Some("2"));
    let kib: u64 = words.nth(1).unwrap().parse().unwrap();
    // The kernel keeps some for itself.
    assert!((220 * 1024..300 * 1024).contains(&kib), "{kib} KiB");
}

#[test]
fn a_wall_clock_limit_ends_the_job_and_is_named() {
    let Some(xbed) = qemu() else { return };
    let ran = xbed.xbe(["run", "--time", "1s", "--", "/bin/sleep", "1000"]);
    assert_eq!(ran.code, 125);
    assert!(ran.stderr.contains("WallTimeLimit of 1 s"), "{ran:?}");
}

#[test]
fn a_command_beside_the_job_has_its_own_streams_and_exit_code() {
    let Some(xbed) = qemu() else { return };
    let task = xbed.submit(&document(&xbed, "sleep 600"));
    xbed.wait_for(&task, "Executing");
    let mut count = xbed
        .xbe_command(["exec", "-i", task.as_str(), "--", "wc", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = count.stdin.take().unwrap();
    // More than all queues on the way hold: a command that is slow to read loses nothing.
    std::io::Write::write_all(&mut stdin, &vec![b'x'; 3_000_000]).unwrap();
    drop(stdin);
    let output = count.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "3000000");
    let ran = xbed.xbe([
        "exec",
        task.as_str(),
        "--",
        "sh",
        "-c",
        "echo e >&2; exit 5",
    ]);
    assert_eq!(
        (ran.code, ran.stdout.as_str(), ran.stderr.as_str()),
        (5, "", "e\n")
    );
    let ran = xbed.xbe(["exec", task.as_str(), "--", "no-such-program"]);
    assert_eq!(ran.code, 125);
    assert!(ran.stderr.contains("no-such-program"), "{ran:?}");
    // The image has no SSH server: that is said, and what to do.
    let ran = xbed.xbe(["ssh", task.as_str(), "--", "true"]);
    assert_ne!(ran.code, 0);
}
