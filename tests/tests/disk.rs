//! What outlives a power cut, and what a full disk does. Both need disks of their own, so root's rights.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use xbee_tests::{PATIENCE, Random, Xbed, images, run};

const CONTENT: &str = "what was staged in\n";
const FINAL: [&str; 3] = ["Finished", "Failed", "Terminated"];

/// A file system that is unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    /// Mounts; says why the test is skipped where that is not possible.
    fn new(what: &Path, at: &Path, options: &[&str]) -> Option<Mounted> {
        fs::create_dir_all(at).unwrap();
        let mut command = Command::new("mount");
        let ran = run(command.args(options).arg(what).arg(at));
        if ran.code != 0 {
            println!(
                "skipped: no file system can be mounted here: {}",
                ran.stderr.trim()
            );
            return None;
        }
        Some(Mounted(at.into()))
    }

    /// A disk in a file. The file holds what has been forced to the disk, or the kernel wrote by itself, which it
    /// puts off here for as long as it can: a copy is what a power cut leaves.
    fn disk(image: &Path, at: &Path) -> Option<Mounted> {
        Mounted::new(image, at, &["-o", "loop,commit=300"])
    }

    fn memory(at: &Path, size: &str) -> Option<Mounted> {
        let options = format!("size={size}");
        Mounted::new(Path::new("tmpfs"), at, &["-t", "tmpfs", "-o", &options])
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let begun = Instant::now();
        // A process that has just ended may still hold it.
        while run(Command::new("umount").arg(&self.0)).code != 0 {
            if begun.elapsed() > Duration::from_secs(10) {
                eprintln!("{} stays mounted", self.0.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn make_disk(image: &Path) -> bool {
    fs::File::create(image).unwrap().set_len(48 << 20).unwrap();
    let made = std::panic::catch_unwind(|| run(Command::new("mkfs.ext4").arg("-q").arg(image)));
    let made = made.is_ok_and(|ran| ran.code == 0);
    if !made {
        println!("skipped: mkfs.ext4 is missing or does not work");
    }
    made
}

fn tasks(xbed: &Xbed) -> BTreeMap<String, Value> {
    let list = xbed.xbe(["ps", "-a", "--json"]).json();
    let list = list.as_array().unwrap().iter();
    list.map(|task| (task["id"].as_str().unwrap().to_owned(), task.clone()))
        .collect()
}

fn is_final(task: &Value) -> bool {
    FINAL.iter().any(|state| task["state"] == *state)
}

/// Submits what `arguments` of `xbe run` mean.
fn submit(xbed: &Xbed, arguments: &[&str]) -> xbee_tests::Ran {
    let document = xbed
        .xbe(["run", "--print-jsdl"].iter().chain(arguments))
        .ok();
    static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let name = format!("{}.xsdl", NUMBER.fetch_add(1, Ordering::Relaxed));
    let path = xbed.document(&name, &document.stdout);
    let submitted = xbed.xbe(["submit".as_ref(), path.as_os_str()]);
    fs::remove_file(path).unwrap();
    submitted
}

/// What clients know at some time.
#[derive(Debug, Default, Clone)]
struct Known {
    /// Each accepted task with the file its result goes to, if it has one.
    accepted: BTreeMap<String, Option<PathBuf>>,
    /// Those seen in a final state.
    over: BTreeMap<String, String>,
}

#[test]
fn a_power_cut_under_load_loses_no_task_and_no_result() {
    const CUTS: usize = 8;
    let seed = xbee_tests::seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let work = tempfile::Builder::new()
        .prefix("xp")
        .tempdir_in("/tmp")
        .unwrap();
    let path = |name: &str| work.path().join(name);
    let input = path("in");
    fs::write(&input, CONTENT).unwrap();
    let (store, target) = (path("store.img"), path("target.img"));
    if !make_disk(&store) || !make_disk(&target) {
        return;
    }
    let known = Mutex::new(Known::default());
    let mut cuts = vec![];
    {
        let Some(_store) = Mounted::disk(&store, &path("s")) else {
            return;
        };
        let Some(_target) = Mounted::disk(&target, &path("t")) else {
            return;
        };
        let mut xbed = Xbed::start_on(&path("s/data"), "sim", &[], &[]);
        assert!(xbed.came_up(), "{}", xbed.log());
        let pid = xbed.pid().to_string();
        let stop = AtomicBool::new(false);
        let xbed = &xbed;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let result = path("t").join(number.to_string());
                    let stage_in = format!("{}:/data/in", input.display());
                    let stage_out = format!("/data/in:{}", result.display());
                    let (arguments, result) = match number % 3 {
                        0 => (vec!["--", "sleep", "0.2"], None),
                        _ => (
                            vec!["-v", &stage_in, "-o", &stage_out, "--", "cat", "/data/in"],
                            Some(result),
                        ),
                    };
                    let id = submit(xbed, &arguments).line();
                    known.lock().unwrap().accepted.insert(id, result);
                }
            });
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let over = tasks(xbed).into_iter().filter(|(_, task)| is_final(task));
                    let over =
                        over.map(|(id, task)| (id, task["state"].as_str().unwrap().to_owned()));
                    let over: Vec<_> = over.collect();
                    known.lock().unwrap().over.extend(over);
                    std::thread::sleep(Duration::from_millis(10));
                }
            });
            for cut in 0..CUTS {
                std::thread::sleep(Duration::from_millis(50 + random.below(300)));
                let known = known.lock().unwrap().clone();
                // Nothing may be written while it is copied, or the copy were of two times.
                run(Command::new("kill").args(["-STOP", &pid])).ok();
                let copies = [&store, &target].map(|disk| {
                    let copy = disk.with_extension(cut.to_string());
                    run(Command::new("cp")
                        .arg("--sparse=always")
                        .arg(disk)
                        .arg(&copy))
                    .ok();
                    copy
                });
                run(Command::new("kill").args(["-CONT", &pid])).ok();
                cuts.push((known, copies));
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
    let (mut accepted, mut over, mut lost) = (0, 0, 0);
    for (known, [store, target]) in &cuts {
        let _store = Mounted::disk(store, &path("s")).unwrap();
        let _target = Mounted::disk(target, &path("t")).unwrap();
        let booted = ("XBED_HOST_BOOT", "another".to_owned());
        let mut xbed = Xbed::start_on(&path("s/data"), "sim", &[], &[booted]);
        assert!(xbed.came_up(), "{}", xbed.log());
        let mut now = tasks(&xbed);
        for (id, state) in &known.over {
            assert_eq!(now[id]["state"], **state, "task {id} was over");
        }
        let begun = Instant::now();
        while !now.values().all(is_final) {
            assert!(begun.elapsed() < PATIENCE, "{now:#?}\n{}", xbed.log());
            std::thread::sleep(Duration::from_millis(20));
            now = tasks(&xbed);
        }
        for (id, result) in &known.accepted {
            let task = now.get(id).unwrap_or_else(|| panic!("task {id} is lost"));
            if task["reason_code"] == "domain-lost" {
                lost += 1;
                continue;
            }
            assert_eq!(task["state"], "Finished", "{task:#}");
            if let Some(result) = result {
                assert_eq!(xbed.xbe(["logs", id]).ok().stdout, CONTENT, "{task:#}");
                assert_eq!(fs::read_to_string(result).unwrap(), CONTENT, "{task:#}");
            }
        }
        accepted += known.accepted.len();
        over += known.over.len();
        xbed.assert_nothing_left();
    }
    println!(
        "{CUTS} power cuts, in sum {accepted} tasks accepted, {over} over, {lost} ran and were lost"
    );
    assert!(over > 0 && accepted > over, "the load was none");
}

#[test]
fn a_full_disk_is_said_and_everything_goes_on_when_there_is_room() {
    let work = tempfile::Builder::new()
        .prefix("xf")
        .tempdir_in("/tmp")
        .unwrap();
    let Some(_disk) = Mounted::memory(&work.path().join("d"), "3m") else {
        return;
    };
    let filler = work.path().join("d/filler");
    let mut xbed = Xbed::start_on(&work.path().join("d/data"), "sim", &[], &[]);
    assert!(xbed.came_up(), "{}", xbed.log());
    let runs = submit(&xbed, &["--", "sleep", "2"]).line();
    xbed.wait_for(&runs, "Executing");
    // All there is, to the last page: the journal has room of its own until it has been used up.
    fill(&filler);
    let mut accepted = vec![runs.clone()];
    let refused = loop {
        let submitted = submit(&xbed, &["--", "sleep", "0.5"]);
        if submitted.code != 0 {
            break submitted;
        }
        accepted.push(submitted.line());
        fill(&filler);
    };
    let store = xbed.data().join("tasks.sqlite");
    let expected = format!(
        "xbe: the task could not be written down: the disk of the task store {} is full: make room there; accepted tasks wait for it and lose nothing",
        store.display()
    );
    // SQLite's own words follow.
    assert!(refused.stderr.starts_with(&expected), "{refused:?}");
    let log = |xbed: &Xbed| xbed.log().contains("journal entry not written");
    let begun = Instant::now();
    while !log(&xbed) {
        assert!(
            begun.elapsed() < PATIENCE,
            "the disk is not full: {}",
            xbed.log()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    fs::remove_file(&filler).unwrap();
    for task in &accepted {
        xbed.wait_for(task, "Finished");
    }
    assert_eq!(
        tasks(&xbed).len(),
        accepted.len(),
        "a refused task is there"
    );
    xbed.assert_nothing_left();
}

/// Takes all room there is.
fn fill(path: &Path) {
    use std::io::Write;
    let mut file = fs::File::options()
        .create(true)
        .append(true)
        .open(path)
        .unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
}

#[test]
fn output_waits_for_room_on_a_full_disk() {
    if !images().join("base/image.toml").exists() {
        println!("skipped: the image base is missing: run `make images`");
        return;
    }
    let work = tempfile::Builder::new()
        .prefix("xf")
        .tempdir_in("/tmp")
        .unwrap();
    let Some(_disk) = Mounted::memory(&work.path().join("d"), "64m") else {
        return;
    };
    let filler = work.path().join("d/filler");
    let mut xbed = Xbed::start_on(&work.path().join("d/data"), "qemu", &[], &[]);
    assert!(xbed.came_up(), "{}", xbed.log());
    let script = "echo begun; while [ ! -e /tmp/go ]; do sleep 0.1; done; seq 1 20000";
    let task = submit(&xbed, &["--", "/bin/sh", "-c", script]).line();
    xbed.wait_for_output(&task, "begun\n");
    fill(&filler);
    xbed.xbe(["exec", &task, "--", "/bin/touch", "/tmp/go"])
        .ok();
    let begun = Instant::now();
    while !xbed.log().contains("output not kept; trying again") {
        assert!(begun.elapsed() < PATIENCE, "{}", xbed.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    // Come back on a full disk, too.
    xbed.kill_and_restart();
    fs::remove_file(&filler).unwrap();
    xbed.wait_for(&task, "Finished");
    let lines: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    let output = xbed.xbe(["logs", &task]).ok().stdout;
    assert!(
        output == format!("begun\n{lines}"),
        "the output is not the job's"
    );
    xbed.assert_nothing_left();
}

#[test]
fn files_that_a_power_cut_brought_back_to_a_final_task_are_removed() {
    let mut xbed = xbee_tests::sim();
    let text = xbed.xbe(["run", "--print-jsdl", "--", "true"]).ok().stdout;
    let task = xbed.submit(&text);
    xbed.wait_for(&task, "Finished");
    xbed.kill();
    // Their removal was not forced to the disk, the task's end was.
    let spool = xbed.data().join("tasks").join(&task);
    fs::create_dir_all(spool.join("boot")).unwrap();
    fs::write(spool.join("boot/kernel"), "kernel").unwrap();
    fs::write(spool.join("boot.json"), "{}").unwrap();
    xbed.restart(&[]);
    assert!(xbed.came_up(), "xbed ended: {}", xbed.log());
    for name in ["boot", "boot.json"] {
        assert!(!spool.join(name).exists(), "{name} is left");
    }
    assert_eq!(xbed.status(&task)["state"], "Finished");
}
