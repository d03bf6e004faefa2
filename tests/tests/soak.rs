//! Many virtual machines, of which some are ended in all ways there are, while `xbed` is killed again and again;
//! afterwards everything is as it was.
//!
//! `XBEE_SOAK_VMS` says how many, `XBEE_SOAK_PARALLEL` how many at a time, `XBEE_SEED` the seed.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

use serde_json::Value;
use xbee_tests::{Ran, Random, Xbed, images, run};

/// Overwrites the agent's code in its own guest, which its kernel allows root to do.
const KILL_AGENT: &str = "a=$(grep -m1 r-xp /proc/1/maps); a=$((0x${a%%-*})); \
    dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$((a/4096)) count=64 conv=notrunc";
/// How long a machine may take before the test gives up: this finds hangs, and emulated ones on a busy host are slow.
const LIFE_LIMIT: Duration = Duration::from_secs(3600);
/// So long, and up to twice as long, each `xbed` lives.
const XBED_LIFE_MS: u64 = 20_000;
/// How long what is open for a moment more may be.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);

/// What is done to a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    Undisturbed,
    Terminated,
    AgentKilled,
    QemuKilled,
    QemuStopped,
}

impl Fate {
    fn random(random: &mut Random) -> Fate {
        match random.below(100) {
            0..60 => Fate::Undisturbed,
            60..75 => Fate::Terminated,
            75..83 => Fate::AgentKilled,
            83..93 => Fate::QemuKilled,
            // Each takes the time after which an agent is given up.
            _ => Fate::QemuStopped,
        }
    }
}

/// A job: lines, a pause after each, an exit code.
struct Job {
    lines: u64,
    exit_code: u64,
    fate: Fate,
    /// When its fate comes, after its submission.
    after: Duration,
}

impl Job {
    fn random(random: &mut Random, number: usize) -> Job {
        let fate = Fate::random(random);
        let each = [
            Fate::Terminated,
            Fate::AgentKilled,
            Fate::QemuKilled,
            Fate::QemuStopped,
        ];
        Job {
            lines: 1 + random.below(60),
            exit_code: random.below(4),
            // In the shortest run, too.
            fate: each.get(number).copied().unwrap_or(fate),
            after: Duration::from_millis(random.below(20_000)),
        }
    }

    /// Its fate comes as soon as it executes, which is not for long.
    fn meets_while_it_executes(&self) -> bool {
        matches!(self.fate, Fate::AgentKilled | Fate::QemuStopped)
    }

    fn script(&self) -> String {
        format!(
            "i=0; while [ $i -lt {} ]; do echo line $i; i=$((i+1)); sleep 0.05; done; exit {}",
            self.lines, self.exit_code
        )
    }
}

/// What the machines might leave.
#[derive(Debug, PartialEq, Eq)]
struct Counts {
    /// Processes by their programs.
    processes: BTreeMap<String, usize>,
    xbed_descriptors: usize,
    vswitch_descriptors: usize,
    /// Unix sockets below the data directory, those of connections included.
    sockets: usize,
    /// All in the data directory.
    files: Vec<PathBuf>,
    /// Tasks.
    rows: usize,
}

struct Soak {
    xbed: RwLock<Xbed>,
    /// How those of each fate ended; true: it met them.
    ends: Mutex<BTreeMap<(Fate, bool, String), usize>>,
}

fn is_over(status: &Value) -> bool {
    ["Finished", "Failed", "Terminated"]
        .iter()
        .any(|state| status["state"] == *state)
}

impl Soak {
    /// `xbe`, while no restart is under way.
    fn xbe(&self, args: &[&str]) -> Ran {
        self.xbed.read().unwrap().xbe(args)
    }

    fn log(&self) -> String {
        self.xbed.read().unwrap().log()
    }

    fn submit(&self, job: &Job, number: usize) -> String {
        let xbed = self.xbed.read().unwrap();
        let script = job.script();
        let args = ["run", "--print-jsdl", "--", "/bin/sh", "-c", &script];
        let text = xbed.xbe(args).ok().stdout;
        let path = xbed.document(&format!("{number}.xsdl"), &text);
        let task = xbed.xbe(["submit".as_ref(), path.as_os_str()]).line();
        fs::remove_file(path).unwrap();
        task
    }

    /// Pid of a task's QEMU, if it has one now.
    fn machine(&self, task: &str) -> Option<u32> {
        let processes = self.xbed.read().unwrap().processes();
        let of_task = |pid: u32| {
            let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
            cwd.ends_with(task)
        };
        let machine = processes
            .iter()
            .find(|(pid, line)| line.contains("qemu-system") && of_task(*pid));
        machine.map(|(pid, _)| *pid)
    }

    fn signal(&self, task: &str, signal: &str) -> bool {
        let Some(pid) = self.machine(task) else {
            return false;
        };
        // It may have ended just now; its pid is given to nobody else so soon.
        run(Command::new("kill").args([signal, &pid.to_string()])).code == 0
    }

    /// Does what is to be done; false if it is too late or too early.
    fn disturb(&self, job: &Job, task: &str, status: &Value) -> bool {
        match job.fate {
            Fate::Undisturbed => false,
            Fate::Terminated => self.xbe(&["terminate", task]).code == 0,
            Fate::AgentKilled => {
                if status["substate"] != "Executing" {
                    return false;
                }
                let args = ["exec", task, "--", "/bin/sh", "-c", KILL_AGENT];
                // Its end is told by nobody, and may not be waited for by a restart.
                let mut command = self.xbed.read().unwrap().xbe_command(args);
                run(&mut command);
                true
            }
            Fate::QemuKilled => self.signal(task, "-9"),
            // One that boots would be waited for very long here.
            Fate::QemuStopped => status["substate"] == "Executing" && self.signal(task, "-STOP"),
        }
    }

    fn live(&self, job: &Job, number: usize) {
        let task = self.submit(job, number);
        let begun = Instant::now();
        let mut disturbed = false;
        let status = loop {
            let status = self.xbe(&["status", "--json", &task]).json();
            if is_over(&status) {
                break status;
            }
            if !disturbed && (job.meets_while_it_executes() || begun.elapsed() >= job.after) {
                disturbed = self.disturb(job, &task, &status);
            }
            assert!(
                begun.elapsed() < LIFE_LIMIT,
                "{:?}: {status:#}\n{}",
                job.fate,
                self.log()
            );
            std::thread::sleep(Duration::from_millis(700));
        };
        let output = self.xbe(&["logs", &task]).ok().stdout;
        let expected: String = (0..job.lines).map(|n| format!("line {n}\n")).collect();
        let code = status["reason_code"].as_str().unwrap_or_default();
        let state = status["state"].as_str().unwrap();
        let said = || format!("{:?}: {status:#}\n{}", job.fate, self.log());
        if state == "Finished" {
            assert!(output == expected, "{output:?}\n{}", said());
            assert_eq!(status["exit_code"], job.exit_code, "{}", said());
        } else {
            assert!(disturbed, "nothing was done to it: {}", said());
            assert!(expected.starts_with(&output), "{output:?}\n{}", said());
            let expected = match job.fate {
                Fate::Terminated => "Terminated",
                _ => "Failed",
            };
            assert_eq!(state, expected, "{}", said());
        }
        let end = format!("{state} {code}").trim_end().to_owned();
        let mut ends = self.ends.lock().unwrap();
        *ends.entry((job.fate, disturbed, end)).or_default() += 1;
        let ended: usize = ends.values().sum();
        if ended.is_multiple_of(25) {
            println!("{ended} ended");
        }
    }

    fn counts(&self) -> Counts {
        let xbed = self.xbed.read().unwrap();
        let descriptors = |pid: u32| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        let mut processes = BTreeMap::new();
        let mut vswitch = None;
        for (pid, _) in xbed.processes() {
            // It may have ended.
            let Ok(name) = fs::read_to_string(format!("/proc/{pid}/comm")) else {
                continue;
            };
            if name.trim_end() == "vswitch" {
                vswitch = Some(pid);
            }
            *processes.entry(name.trim_end().to_owned()).or_default() += 1;
        }
        let data = xbed.data();
        let unix = fs::read_to_string("/proc/net/unix").unwrap();
        let mut files = vec![];
        walk(&data, &mut files);
        let tasks = xbed.xbe(["ps", "-a", "--json"]).json();
        Counts {
            processes,
            xbed_descriptors: descriptors(xbed.pid()),
            vswitch_descriptors: descriptors(vswitch.unwrap()),
            sockets: unix.matches(data.to_str().unwrap()).count(),
            files,
            rows: tasks.as_array().unwrap().len(),
        }
    }

    /// Removes all tasks, of which none is under way.
    fn forget_all(&self) {
        let tasks = self.xbe(&["ps", "-a", "--json"]).json();
        for task in tasks.as_array().unwrap() {
            self.xbe(&["rm", task["id"].as_str().unwrap()]).ok();
        }
    }

    /// The counts, when two looks in a row see the same.
    fn settled_counts(&self) -> Counts {
        let begun = Instant::now();
        let mut last = self.counts();
        loop {
            std::thread::sleep(Duration::from_secs(2));
            let now = self.counts();
            if now == last || begun.elapsed() > SETTLE_LIMIT {
                return now;
            }
            last = now;
        }
    }
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = fs::read_dir(directory).unwrap().flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::path);
    for entry in entries {
        found.push(entry.path());
        if entry.file_type().unwrap().is_dir() {
            walk(&entry.path(), found);
        }
    }
}

fn setting(name: &str, default: usize) -> usize {
    match std::env::var(name) {
        Ok(value) => value
            .parse()
            .unwrap_or_else(|error| panic!("{name}: {error}")),
        Err(_) => default,
    }
}

#[test]
fn machines_that_end_in_every_way_leave_nothing() {
    if !images().join("base/image.toml").exists() {
        println!("skipped: the image base is missing: run `make images`");
        return;
    }
    let count = setting("XBEE_SOAK_VMS", 40);
    let parallel = setting("XBEE_SOAK_PARALLEL", 4);
    let seed = xbee_tests::seed();
    println!("seed {seed}, {count} machines, {parallel} at a time");
    let mut random = Random::new(seed);
    let jobs: Vec<Job> = (0..count).map(|n| Job::random(&mut random, n)).collect();
    let config = [
        format!("domains = {parallel}"),
        "boot-timeout-s = 600".to_owned(),
    ];
    let soak = Soak {
        xbed: RwLock::new(Xbed::start("qemu", &config.each_ref().map(String::as_str))),
        ends: Mutex::default(),
    };
    let one = Job {
        lines: 1,
        exit_code: 0,
        fate: Fate::Undisturbed,
        after: Duration::ZERO,
    };
    // What the first machine brings along stays: the switch, connections to it. An xbed that started the switch itself has
    // one descriptor more than those after it.
    soak.live(&one, count);
    soak.xbed.write().unwrap().kill_and_restart();
    soak.live(&one, count);
    soak.ends.lock().unwrap().clear();
    soak.forget_all();
    let before = soak.settled_counts();
    let begun = Instant::now();
    let (next, restarts) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let working = AtomicUsize::new(parallel);
    let failed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..parallel {
            scope.spawn(|| {
                let work = || {
                    while !failed.load(Ordering::Relaxed)
                        && let number = next.fetch_add(1, Ordering::Relaxed)
                        && let Some(job) = jobs.get(number)
                    {
                        soak.live(job, number);
                    }
                };
                let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
                working.fetch_sub(1, Ordering::Relaxed);
                if let Err(panic) = worked {
                    failed.store(true, Ordering::Relaxed);
                    std::panic::resume_unwind(panic);
                }
            });
        }
        // Not near the end: what one xbed keeps by mistake shall be seen in it.
        let goes_on = || {
            working.load(Ordering::Relaxed) > 0
                && !failed.load(Ordering::Relaxed)
                && next.load(Ordering::Relaxed) < count * 3 / 4
        };
        while goes_on() {
            let life = Duration::from_millis(XBED_LIFE_MS + random.below(XBED_LIFE_MS));
            let begun = Instant::now();
            while begun.elapsed() < life && goes_on() {
                std::thread::sleep(Duration::from_millis(100));
            }
            if goes_on() {
                soak.xbed.write().unwrap().kill_and_restart();
                restarts.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let ends = soak.ends.lock().unwrap().clone();
    let (took, restarts) = (begun.elapsed().as_secs(), restarts.into_inner());
    println!("{took} s, {restarts} restarts of xbed");
    for ((fate, met, end), count) in &ends {
        let met = if *met { "" } else { " (not met)" };
        println!("{fate:?}{met}: {count} {end}");
    }
    assert_eq!(ends.values().sum::<usize>(), count);
    soak.xbed.read().unwrap().assert_nothing_left();
    soak.forget_all();
    let after = soak.settled_counts();
    assert_eq!(after, before, "{}", soak.log());
    // And so it is in the data base, not only in memory.
    soak.xbed.write().unwrap().kill_and_restart();
    assert_eq!(soak.counts().rows, before.rows);
    println!("before and after: {after:?}");
}
