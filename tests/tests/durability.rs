//! What outlives `kill -9` of `xbed`: its debug build dies at a point that is asked for (see `fault` in `xbed`).
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use xbee_tests::{PATIENCE, Xbed, images, silent_server};

/// Lives at a time: they mostly wait for a disk.
const WORKERS: usize = 4;
const CONTENT: &str = "one\ntwo\nthree\n";
/// What is in a file that a result is added to.
const BEFORE: &str = "zero\n";

/// What happens to a job.
#[derive(Debug, Clone, PartialEq)]
enum Way {
    /// It runs to its end with this exit code.
    Ends(i64),
    /// Its result is added to a file.
    Appended,
    /// Its result may replace nothing.
    New,
    /// A file to stage in is missing.
    NotStagedIn,
    /// It is terminated in this state.
    Terminated(&'static str),
    /// It is forgotten after its end.
    Removed,
}

/// What was seen of a life before the end of `xbed`.
#[derive(Debug, Default)]
struct Seen {
    /// The client has the task's id.
    task: Option<String>,
    /// The client's last wish (terminate, forget) was answered.
    answered: bool,
    /// Points passed when it was sent.
    wished_after: usize,
}

fn points(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(Into::into).collect()
}

impl Way {
    fn submit(&self, xbed: &Xbed, address: &str) -> Option<String> {
        let dir = xbed.scratch();
        let (input, output) = (dir.join("in"), dir.join("out"));
        fs::write(&input, CONTENT).unwrap();
        let input = format!("{}:/data/in", input.display());
        let mut result = format!("/data/in:{}", output.display());
        let (mut missing, mut command) = (vec![], vec!["cat", "/data/in"]);
        let silent = format!("http://{address}/x");
        let gone = dir.join("gone");
        let of_gone = format!("{}:/data/missing", gone.display());
        match self {
            Way::Appended => fs::write(&output, BEFORE).unwrap(),
            Way::Ends(0) | Way::Removed | Way::New => {}
            Way::Ends(_) => command.push("/no/such/file"),
            Way::NotStagedIn => {
                fs::write(&gone, CONTENT).unwrap();
                missing = vec!["-v", &of_gone];
            }
            Way::Terminated("Executing") => command = vec!["sleep", "1000"],
            Way::Terminated("Stage-Out") => result = format!("/data/in:{silent}"),
            Way::Terminated(_) => {}
        }
        let slow = format!("{silent}:/data/x");
        if *self == Way::Terminated("Stage-In") {
            missing = vec!["-v", &slow];
        }
        let mut args = vec!["run", "--print-jsdl", "-v", &input, "-o", &result];
        args.extend(missing);
        args.push("--");
        args.extend(command);
        let mut document = xbed.xbe(args).ok().stdout;
        if *self == Way::NotStagedIn {
            fs::remove_file(&gone).unwrap();
        }
        // Of the last file, which is the result.
        let flag = document.rfind("overwrite</").unwrap();
        match self {
            Way::Appended => document.replace_range(flag..flag + 9, "append"),
            Way::New => document.replace_range(flag..flag + 9, "dontOverwrite"),
            _ => {}
        }
        let document = xbed.document("job.xsdl", &document);
        let submitted = xbed.xbe(["submit".as_ref(), document.as_os_str()]);
        (submitted.code == 0).then(|| submitted.stdout.trim().to_owned())
    }

    /// The life until its end or that of `xbed`.
    fn live(&self, xbed: &mut Xbed, address: &str, log: &Path) -> Seen {
        let mut seen = Seen::default();
        if !xbed.came_up() {
            return seen;
        }
        seen.task = self.submit(xbed, address);
        let Some(task) = seen.task.clone() else {
            wait_for_death(xbed);
            return seen;
        };
        let wish = match self {
            Way::Terminated(state) => {
                until(xbed, &task, Some(state));
                "terminate"
            }
            Way::Removed => {
                until(xbed, &task, None);
                "rm"
            }
            _ => "",
        };
        if !wish.is_empty() {
            seen.wished_after = points(log).len();
            seen.answered = xbed.xbe([wish, &task]).code == 0;
        }
        if *self != Way::Removed {
            until(xbed, &task, None);
        }
        seen
    }

    /// A recovery, until the job's end or that of `xbed`.
    fn go_on(&self, xbed: &mut Xbed, seen: &mut Seen) {
        let Some(task) = seen.task.clone() else {
            return;
        };
        if matches!(self, Way::Terminated(_)) && !seen.answered {
            seen.answered = xbed.xbe(["terminate", &task]).code == 0;
        }
        until(xbed, &task, None);
    }

    /// What must hold after `xbed` has died and come back, once or more often. `lives`: the points of each life.
    fn check(&self, xbed: &mut Xbed, seen: &Seen, lives: &[Vec<String>]) {
        let tasks = xbed.xbe(["ps", "-a", "--json"]).json();
        let tasks: Vec<&str> = tasks
            .as_array()
            .unwrap()
            .iter()
            .map(|task| task["id"].as_str().unwrap())
            .collect();
        let before = lives.concat();
        let wished = *self == Way::Removed && before.iter().any(|point| point == "forget");
        match &seen.task {
            Some(task) if wished => assert!(tasks.is_empty() || tasks == [task]),
            Some(task) => assert_eq!(tasks, [task], "a task that a client knows of is lost"),
            None => assert!(tasks.len() <= 1),
        }
        if wished && seen.answered {
            assert_eq!(tasks.len(), 0, "a task is there that was forgotten");
        }
        for task in tasks {
            if matches!(self, Way::Terminated(_)) && !seen.answered {
                // Nobody was told that it would end.
                xbed.xbe(["terminate", task]).ok();
            }
            let status = until(xbed, task, None);
            self.check_end(xbed, &status, seen, lives);
            let again = points_of(&before, "execute");
            assert!(again <= 1, "executed {again} times");
        }
        for file in fs::read_dir(xbed.scratch()).unwrap().flatten() {
            let name = file.file_name().into_string().unwrap();
            assert!(!name.starts_with(".xbee-stage"), "{name} is left");
        }
        xbed.assert_nothing_left();
    }

    fn check_end(&self, xbed: &Xbed, status: &Value, seen: &Seen, lives: &[Vec<String>]) {
        let state = status["state"].as_str().unwrap();
        let output = xbed.xbe(["logs", status["id"].as_str().unwrap()]).ok();
        let code = status["reason_code"].as_str().unwrap_or_default();
        match self {
            Way::NotStagedIn => assert_eq!((state, code), ("Failed", "not-found")),
            Way::Terminated(_) if seen.answered => assert_eq!(state, "Terminated"),
            // Simulated domains end with their xbed.
            Way::Terminated(_) => assert!(state == "Terminated" || code == "domain-lost"),
            Way::Ends(_) | Way::Appended | Way::New | Way::Removed if lost_its_domain(lives) => {
                assert_eq!((state, code), ("Failed", "domain-lost"));
                assert!(CONTENT.starts_with(&output.stdout), "{output:?}");
            }
            Way::Ends(_) | Way::Appended | Way::New | Way::Removed => {
                let exit_code = if let Way::Ends(code) = self { *code } else { 0 };
                let before = if *self == Way::Appended { BEFORE } else { "" };
                assert_eq!(state, "Finished", "{status:#}");
                assert_eq!(status["exit_code"], exit_code);
                assert_eq!(output.stdout, CONTENT);
                let result = fs::read_to_string(xbed.scratch().join("out")).unwrap();
                assert_eq!(result, format!("{before}{CONTENT}"));
            }
        }
    }
}

fn points_of(points: &[String], name: &str) -> usize {
    points.iter().filter(|point| *point == name).count()
}

/// Whether a life ended while all that the task had was in its domain.
fn lost_its_domain(lives: &[Vec<String>]) -> bool {
    // Entries in the journal of a task that ran to its end: Stage-In, Instance-Starting, Executing,
    // Instance-Stopping, Stage-Out, release, final state.
    let mut entries = 0;
    let mut has_results = false;
    for life in lives {
        if entries == 3 || (entries == 4 && !has_results) {
            return true;
        }
        entries += points_of(life, "journaled");
        has_results |= points_of(life, "results taken") > 0;
    }
    entries == 3 || (entries == 4 && !has_results)
}

fn wait_for_death(xbed: &mut Xbed) {
    let begun = Instant::now();
    while !xbed.has_ended() {
        assert!(begun.elapsed() < PATIENCE, "xbed lives on\n{}", xbed.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for a state, a final one, or the end of `xbed`; the last status.
fn until(xbed: &mut Xbed, task: &str, state: Option<&str>) -> Value {
    let begun = Instant::now();
    loop {
        if state.is_none() {
            xbed.wait_for_end(task);
        }
        let ran = xbed.xbe(["status", "--json", task]);
        let status: Value = serde_json::from_str(&ran.stdout).unwrap_or_default();
        let now = status["state"].as_str().unwrap_or_default();
        let over =
            ["Finished", "Failed", "Terminated"].contains(&now) || ran.stderr.contains("no task");
        if over || state.is_some_and(|state| status["substate"] == state) || xbed.has_ended() {
            return status;
        }
        assert!(begun.elapsed() < PATIENCE, "{status:#}\n{}", xbed.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One run of a way, killed at the points of the first life and of the recovery that are asked for.
struct Run {
    seen: Seen,
    /// Points of the first life, and of the last.
    points: [usize; 2],
}

fn run(way: &Way, address: &str, first: Option<usize>, second: Option<usize>) -> Run {
    let work = tempfile::tempdir().unwrap();
    let log = |life: usize| work.path().join(life.to_string());
    let environment = |life: usize, die_at: Option<usize>| {
        let mut environment = vec![("XBED_POINTS", log(life).display().to_string())];
        environment.extend(die_at.map(|n| ("XBED_DIE_AT", n.to_string())));
        environment
    };
    let mut xbed = Xbed::start_with("sim", &[], &environment(0, first));
    let mut seen = way.live(&mut xbed, address, &log(0));
    let mut lives = vec![];
    if first.is_some() {
        xbed.kill();
        lives.push(points(&log(0)));
        if second.is_some() {
            xbed.restart(&environment(1, second));
            if xbed.came_up() {
                way.go_on(&mut xbed, &mut seen);
            }
            xbed.kill();
            lives.push(points(&log(1)));
        }
        xbed.restart(&environment(lives.len(), None));
        assert!(xbed.came_up(), "{}", xbed.log());
        way.check(&mut xbed, &seen, &lives);
    }
    Run {
        seen,
        points: [0, lives.len()].map(|life| points(&log(life)).len()),
    }
}

/// Lives this way with a kill at each point from the wish on, and with a further one in the recovery.
fn killed_at_each_point(way: &Way) {
    let (_server, address) = silent_server();
    let Run { seen, points, .. } = run(way, &address, None, None);
    let (begin, all) = (seen.wished_after + 1, points[0]);
    let every = std::env::var_os("XBEE_EVERY_POINT").is_some();
    let (next, runs) = (AtomicUsize::new(begin), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let first = next.fetch_add(1, Ordering::Relaxed);
                    if first > all {
                        return;
                    }
                    let [_, recovery] = run(way, &address, Some(first), None).points;
                    runs.fetch_add(1, Ordering::Relaxed);
                    if recovery == 0 {
                        // Nothing was accepted, or nothing was left to do.
                        continue;
                    }
                    // All of them are thousands; each is met after some first kill.
                    let seconds = match every {
                        true => 1..=recovery,
                        false => first % recovery + 1..=first % recovery + 1,
                    };
                    runs.fetch_add(seconds.clone().count(), Ordering::Relaxed);
                    for second in seconds {
                        run(way, &address, Some(first), Some(second));
                    }
                }
            });
        }
    });
    let runs = runs.into_inner();
    println!("{way:?}: killed at points {begin} to {all}, {runs} runs");
}

#[test]
fn a_task_that_succeeds_is_killed_at_each_point() {
    killed_at_each_point(&Way::Ends(0));
}

#[test]
fn a_task_with_another_exit_code_is_killed_at_each_point() {
    killed_at_each_point(&Way::Ends(1));
}

#[test]
fn a_result_that_is_appended_is_killed_at_each_point() {
    killed_at_each_point(&Way::Appended);
}

#[test]
fn a_result_that_replaces_nothing_is_killed_at_each_point() {
    killed_at_each_point(&Way::New);
}

#[test]
fn a_task_that_cannot_be_staged_in_is_killed_at_each_point() {
    killed_at_each_point(&Way::NotStagedIn);
}

#[test]
fn a_task_terminated_in_each_state_is_killed_at_each_point() {
    for state in ["Stage-In", "Executing", "Stage-Out"] {
        killed_at_each_point(&Way::Terminated(state));
    }
}

#[test]
fn a_task_that_is_forgotten_is_killed_at_each_point() {
    killed_at_each_point(&Way::Removed);
}

/// A point of each state of a task, on the way that a domain of QEMU's takes.
const STATES: [&str; 14] = [
    "accepted",
    "fetch",
    "created",
    "started",
    "agent came",
    "execute",
    "executing",
    "logged",
    "exited",
    "results taken",
    "destroyed",
    "sent",
    "release domain",
    "temporary removed",
];

#[test]
fn a_virtual_machine_outlives_its_xbed_in_each_state_and_its_output_has_no_gap() {
    if !images().join("base/image.toml").exists() {
        println!("skipped: the image base is missing: run `make images`");
        return;
    }
    let script = "echo to the console > /dev/console; cat /data/in; i=0; while [ $i -lt 60 ]; do echo line $i; i=$((i+1)); sleep 0.02; done; echo x >> /data/ran; cat /data/ran; exit 3";
    let lines: String = (0..60).map(|n| format!("line {n}\n")).collect();
    let expected = format!("{CONTENT}{lines}x\n");
    let next = AtomicUsize::new(0);
    let live = |state: &str| {
        let mut xbed = Xbed::start_with("qemu", &[], &[("XBED_DIE_AT", state.into())]);
        assert!(xbed.came_up(), "{}", xbed.log());
        let dir = xbed.scratch();
        fs::write(dir.join("in"), CONTENT).unwrap();
        let input = format!("{}:/data/in", dir.join("in").display());
        let output = format!("/data/ran:{}", dir.join("out").display());
        let args = ["run", "--print-jsdl", "-v", &input, "-o", &output];
        let document = xbed.xbe(args.into_iter().chain(["--", "/bin/sh", "-c", script]));
        let document = xbed.document("job.xsdl", &document.ok().stdout);
        xbed.xbe(["submit".as_ref(), document.as_os_str()]);
        wait_for_death(&mut xbed);
        xbed.restart(&[]);
        assert!(xbed.came_up(), "{}", xbed.log());
        let tasks = xbed.xbe(["ps", "-a", "--json"]).json();
        assert_eq!(tasks.as_array().unwrap().len(), 1, "{state}: {tasks}");
        let task = tasks[0]["id"].as_str().unwrap();
        let status = until(&mut xbed, task, None);
        assert_eq!(status["state"], "Finished", "{state}: {status:#}");
        assert_eq!(status["exit_code"], 3, "{state}");
        assert_eq!(xbed.xbe(["logs", task]).ok().stdout, expected, "{state}");
        assert_eq!(
            fs::read_to_string(dir.join("out")).unwrap(),
            "x\n",
            "{state}"
        );
        let console = xbed.xbe(["logs", "--console", task]).ok().stdout;
        assert!(console.contains("to the console"), "{state}: {console:?}");
        xbed.assert_nothing_left();
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(state) = STATES.get(next.fetch_add(1, Ordering::Relaxed)) {
                    live(state);
                }
            });
        }
    });
}

/// Pid of the one virtual machine.
fn machine(xbed: &Xbed) -> u32 {
    let processes = xbed.processes();
    let machines: Vec<_> = processes
        .iter()
        .filter(|(_, line)| line.contains("qemu-system"))
        .collect();
    let [(pid, _)] = machines[..] else {
        panic!("not one machine: {processes:?}\n{}", xbed.log());
    };
    *pid
}

#[test]
fn a_virtual_machine_that_boots_is_taken_up_by_the_next_xbed() {
    if !images().join("base/image.toml").exists() {
        println!("skipped: the image base is missing: run `make images`");
        return;
    }
    let mut xbed = Xbed::start_with("qemu", &[], &[("XBED_DIE_AT", "started".into())]);
    assert!(xbed.came_up(), "{}", xbed.log());
    let script = "echo x >> /ran; cat /ran";
    let args = ["run", "--print-jsdl", "--", "/bin/sh", "-c", script];
    let document = xbed.xbe(args).ok().stdout;
    let document = xbed.document("job.xsdl", &document);
    xbed.xbe(["submit".as_ref(), document.as_os_str()]);
    wait_for_death(&mut xbed);
    let first = machine(&xbed);
    for _ in 0..2 {
        xbed.restart(&[("XBED_DIE_AT", "boots already".into())]);
        wait_for_death(&mut xbed);
    }
    // The agent has come, and nothing has been asked of it.
    xbed.restart(&[("XBED_DIE_AT", "agent came".into())]);
    wait_for_death(&mut xbed);
    // All has been asked of it, and nobody will know.
    xbed.restart(&[("XBED_DIE_AT", "furnished".into())]);
    wait_for_death(&mut xbed);
    assert_eq!(machine(&xbed), first, "{}", xbed.log());
    xbed.restart(&[("XBED_DIE_AT", "executing".into())]);
    wait_for_death(&mut xbed);
    assert_ne!(machine(&xbed), first, "{}", xbed.log());
    xbed.restart(&[]);
    assert!(xbed.came_up(), "{}", xbed.log());
    let tasks = xbed.xbe(["ps", "-a", "--json"]).json();
    let task = tasks[0]["id"].as_str().unwrap();
    let status = until(&mut xbed, task, None);
    assert_eq!(status["state"], "Finished", "{status:#}\n{}", xbed.log());
    assert_eq!(xbed.xbe(["logs", task]).ok().stdout, "x\n");
    xbed.assert_nothing_left();
}

#[test]
fn a_clean_up_script_runs_once_though_its_xbed_is_killed() {
    if !images().join("base/image.toml").exists() {
        println!("skipped: the image base is missing: run `make images`");
        return;
    }
    for point in ["script runs", "script ran", "results taken"] {
        let mut xbed = Xbed::start_with("qemu", &[], &[("XBED_DIE_AT", point.into())]);
        assert!(xbed.came_up(), "{}", xbed.log());
        let dir = xbed.scratch();
        let script = dir.join("cleanup");
        fs::write(&script, "#!/bin/sh\necho x >> /data/ran\nsleep 1\n").unwrap();
        let resources = format!(
            "<jsdl:Resources><xsdl:InstanceDefinition><xsdl:InstanceDescription>
            <xsdl:Package><xsdl:Location><xsdl:URI>image:base</xsdl:URI></xsdl:Location></xsdl:Package>
            <xsdl:Control><xsdl:Script target=\"cleanup\"><xsdl:Location><xsdl:URI>file://{}</xsdl:URI></xsdl:Location></xsdl:Script></xsdl:Control>
            </xsdl:InstanceDescription></xsdl:InstanceDefinition></jsdl:Resources>",
            script.display()
        );
        let document = format!(
            r#"<jsdl:JobDefinition xmlns:jsdl="http://schemas.ggf.org/jsdl/2005/11/jsdl"
xmlns:posix="http://schemas.ggf.org/jsdl/2005/11/jsdl-posix" xmlns:xsdl="http://www.example.com/schemas/xbe/2007/01/xsdl"><jsdl:JobDescription>
<jsdl:Application><posix:POSIXApplication><posix:Executable>/bin/mkdir</posix:Executable><posix:Argument>-p</posix:Argument><posix:Argument>/data</posix:Argument></posix:POSIXApplication></jsdl:Application>
{resources}<jsdl:DataStaging><jsdl:FileName>/data/ran</jsdl:FileName><jsdl:CreationFlag>overwrite</jsdl:CreationFlag>
<jsdl:Target><jsdl:URI>file://{}</jsdl:URI></jsdl:Target></jsdl:DataStaging></jsdl:JobDescription></jsdl:JobDefinition>"#,
            dir.join("out").display()
        );
        let task = xbed.submit(&document);
        wait_for_death(&mut xbed);
        xbed.restart(&[]);
        assert!(xbed.came_up(), "{}", xbed.log());
        let status = until(&mut xbed, &task, None);
        assert_eq!(status["state"], "Finished", "{point}: {status:#}");
        let ran = fs::read_to_string(dir.join("out")).unwrap();
        assert_eq!(ran, "x\n", "{point}");
        xbed.assert_nothing_left();
    }
}
