//! Thousands of tasks on the simulator with every fault that it knows, from one seed. What must always be true is
//! looked at after each change of a task's state.
//!
//! `XBEE_SOAK_TASKS` says how many, `XBEE_SEED` the seed.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clap::Parser;
use tokio::task::JoinSet;
use xbee_api::{State, SubmitRequest};
use xbee_engine::{Phase, Step, Task};
use xbee_hypervisor::Hypervisor;
use xbee_hypervisor::sim::{SimConfig, SimEvent, SimHost, SimHypervisor};
use xbee_staging::{Limits, Stager};

use crate::command::{Caller, Commands};
use crate::config::{Config, Options};
use crate::host::Host;
use crate::logs::Stream;
use crate::store::{Entry, Owner};
use crate::task::TaskHandle;

/// Domains at a time.
const DOMAINS: usize = 16;
/// Tasks at a time, waiting ones included.
const TASKS_AT_A_TIME: usize = 48;

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

fn setting(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|e| panic!("{name}: {e}")))
}

struct Soak {
    host: Arc<Host>,
    sim: Arc<SimHost>,
    hypervisor: Arc<dyn Hypervisor>,
    /// How often each end was seen.
    ends: Mutex<HashMap<String, u64>>,
    checks: std::sync::atomic::AtomicU64,
}

/// A job and what it does when nothing goes wrong.
struct Job {
    argv: Vec<String>,
    output: String,
    exit_code: i32,
}

impl Job {
    fn random(random: &mut Random, number: u64) -> Job {
        let (argv, output, exit_code): (&[&str], _, _) = match random.below(4) {
            0 => (&["sleep", "0.01"], "", 0),
            1 => (&["sleep", "20"], "", 0),
            2 => (&["sh", "-c", "exit 3"], "", 3),
            _ => (&["echo", "task"], "task", 0),
        };
        let mut argv: Vec<String> = argv.iter().map(|&word| word.into()).collect();
        let mut output = output.to_owned();
        if !output.is_empty() {
            argv.push(number.to_string());
            output = format!("{output} {number}\n");
        }
        Job {
            argv,
            output,
            exit_code,
        }
    }

    fn document(&self, input: &Path) -> String {
        let [first, rest @ ..] = &self.argv[..] else {
            unreachable!("a job has a command")
        };
        let arguments: String = rest
            .iter()
            .map(|word| format!("<posix:Argument>{word}</posix:Argument>"))
            .collect();
        format!(
            r#"<jsdl:JobDefinition xmlns:jsdl="http://schemas.ggf.org/jsdl/2005/11/jsdl" xmlns:posix="http://schemas.ggf.org/jsdl/2005/11/jsdl-posix">
<jsdl:JobDescription><jsdl:Application><posix:POSIXApplication><posix:Executable>{first}</posix:Executable>{arguments}</posix:POSIXApplication></jsdl:Application>
<jsdl:DataStaging><jsdl:FileName>in</jsdl:FileName><jsdl:CreationFlag>overwrite</jsdl:CreationFlag><jsdl:Source><jsdl:URI>file://{}</jsdl:URI></jsdl:Source></jsdl:DataStaging>
</jsdl:JobDescription></jsdl:JobDefinition>"#,
            input.display()
        )
    }
}

/// How far it has come: the try, and the place in it.
fn place(entry: &Entry) -> (u32, usize) {
    let of = |step: Step| Step::ALL.iter().position(|s| *s == step).unwrap();
    let place = match &entry.state.phase {
        Phase::Retrying { .. } => 0,
        Phase::Reserved => 1,
        Phase::Held => 2,
        Phase::Queued => 3,
        Phase::Working { step } => 4 + of(*step),
        Phase::Cancelling { .. } => 9,
        Phase::Releasing { .. } => 10,
        Phase::Final { .. } => 11,
    };
    (entry.state.retries, place)
}

fn holds_something(state: &Task) -> bool {
    !state.is_pending() && !state.is_final()
}

impl Soak {
    /// What is true at any time, of all tasks; and what is true of the one that changed.
    async fn check(&self, task: &TaskHandle) {
        self.checks
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        // Domains first: a task that has one by now had its capacity before.
        let domains = self.hypervisor.list().await.unwrap();
        let holding = self.host.tasks();
        let holding: Vec<_> = holding
            .iter()
            .filter(|t| holds_something(&t.state()))
            .collect();
        assert!(
            holding.len() <= DOMAINS,
            "{} tasks at a time",
            holding.len()
        );
        for domain in domains {
            let owner = self.host.task(domain.id);
            if owner.is_some_and(|owner| holds_something(&owner.state())) {
                continue;
            }
            // It may have been destroyed since.
            let now = self.hypervisor.list().await.unwrap();
            assert!(
                now.iter().all(|now| now.id != domain.id),
                "domain {} of no task that may have one",
                domain.id
            );
        }
        let journal = task.watch().borrow().clone();
        for pair in journal.windows(2) {
            assert!(
                place(&pair[0]) < place(&pair[1]),
                "{:?} came after {:?}",
                pair[1].state,
                pair[0].state
            );
        }
    }

    /// Watches a task to its end, and after that looks for what it should have left and should not.
    async fn follow(self: Arc<Self>, task: Arc<TaskHandle>, job: Job, disturbed: bool) {
        let mut journal = task.watch();
        loop {
            self.check(&task).await;
            if task.is_final() {
                break;
            }
            journal.changed().await.unwrap();
        }
        let id = task.record.id;
        let status = task.status();
        let output = std::fs::read_to_string(Stream::Stdout.path(&task.spool)).unwrap_or_default();
        if status.state == State::Finished {
            assert_eq!(status.exit_code, Some(job.exit_code), "{id}");
            assert_eq!(output, job.output, "{id}");
        } else {
            assert!(job.output.starts_with(&output), "{id}: {output:?}");
        }
        if status.state == State::Terminated {
            assert!(disturbed, "{id}: nobody asked for its end");
        }
        assert!(!self.host.run_dir(id).exists(), "{id}: a directory is left");
        for name in ["in", "out", "boot", "scripts", "boot.json"] {
            assert!(!task.spool.join(name).exists(), "{id}: {name} is left");
        }
        let end = status
            .reason_code
            .unwrap_or_else(|| format!("{:?}", status.state));
        assert_ne!(end, "internal", "{id}: {:?}", status.reason);
        *self.ends.lock().unwrap().entry(end).or_default() += 1;
        self.host.forget(&task).await.unwrap();
        assert!(!task.spool.exists(), "{id}: its spool is left");
    }

    /// Something that goes wrong, sooner or later.
    async fn disturb(self: Arc<Self>, task: Arc<TaskHandle>, what: u64, after: Duration) {
        tokio::time::sleep(after).await;
        let event = match what {
            0 => return task.terminate("the soak"),
            1 => SimEvent::PowerOff,
            2 => SimEvent::Reset,
            3 => SimEvent::Panic,
            4 => SimEvent::Crash {
                detail: "the soak".into(),
            },
            5 => SimEvent::FloodConsole,
            6 => SimEvent::IgnorePowerButton,
            7 => SimEvent::DropConnection,
            _ => SimEvent::SilenceAgent,
        };
        // It may not have begun, or be over.
        let _ = self.sim.inject(task.record.id, event);
    }
}

/// A directory in memory where there is one: a disk would be all that is measured.
fn work() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    tempfile::Builder::new()
        .prefix("xs")
        .tempdir_in(memory)
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn nothing_is_lost_or_left_whatever_goes_wrong() {
    let count = setting("XBEE_SOAK_TASKS").unwrap_or(2_000);
    let seed = setting("XBEE_SEED").unwrap_or(20_070_101);
    println!("seed {seed}, {count} tasks");
    let work = work();
    let input = work.path().join("in");
    std::fs::write(&input, "input").unwrap();
    let file = work.path().join("xbed.toml");
    std::fs::write(
        &file,
        format!("domains = {DOMAINS}\n[queue]\nretry-delay-s = 0\n"),
    )
    .unwrap();
    let data = work.path().join("data");
    let words = [
        "xbed",
        "--backend",
        "sim",
        "--config",
        file.to_str().unwrap(),
        "--data",
    ];
    let options = Options::parse_from(words.iter().chain([&data.to_str().unwrap()]));
    let config = Config::load(options).unwrap();
    let sim = SimHost::new(SimConfig {
        seed,
        boot_ms: 5..=2_000,
        shutdown_ms: 1..=500,
        refused_create: 0.03,
        refused_start: 0.03,
        lost_agent: 0.02,
        crash: 0.05,
        crash_ms: 0..=10_000,
        console_flood: 0.01,
        console_max_bytes: 64 << 10,
        ..SimConfig::new(config.domains())
    });
    let hypervisor: Arc<dyn Hypervisor> = Arc::new(SimHypervisor::new(sim.clone()));
    let host = Host::open(config, hypervisor.clone(), Stager::new(Limits::default())).await;
    let host = host.unwrap();
    host.recover().await.unwrap();
    let commands = Commands::new(host.clone());
    let soak = Arc::new(Soak {
        host,
        sim,
        hypervisor,
        ends: Mutex::default(),
        checks: std::sync::atomic::AtomicU64::new(0),
    });
    let caller = Caller {
        owner: Owner {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        },
    };
    let mut random = Random(seed);
    let (mut followed, mut disturbances) = (JoinSet::new(), JoinSet::new());
    for number in 0..count {
        while followed.len() >= TASKS_AT_A_TIME {
            followed.join_next().await.unwrap().unwrap();
            while disturbances.try_join_next().is_some() {}
        }
        let job = Job::random(&mut random, number);
        let request = SubmitRequest {
            jsdl: job.document(&input),
            retries: Some(random.below(3) as u32),
            ..SubmitRequest::default()
        };
        let status = commands.submit(caller, request).await.unwrap();
        let task = soak.host.task(status.id).unwrap();
        let disturbed = random.one_in(3);
        if disturbed {
            let after = Duration::from_millis(random.below(12_000));
            let what = random.below(9);
            disturbances.spawn(soak.clone().disturb(task.clone(), what, after));
        }
        followed.spawn(soak.clone().follow(task, job, disturbed));
    }
    while let Some(ended) = followed.join_next().await {
        ended.unwrap();
    }
    assert_eq!(soak.host.tasks().len(), 0);
    assert_eq!(soak.hypervisor.list().await.unwrap().len(), 0);
    assert_eq!(soak.host.store.load().unwrap().len(), 0);
    for directory in ["tasks", "run"] {
        let left = std::fs::read_dir(data.join(directory))
            .into_iter()
            .flatten();
        assert_eq!(left.count(), 0, "{directory}");
    }
    let mut ends: Vec<_> = soak.ends.lock().unwrap().clone().into_iter().collect();
    ends.sort();
    println!(
        "{} checks; ends: {ends:?}",
        soak.checks.load(std::sync::atomic::Ordering::Relaxed)
    );
    let finished = ends.iter().find(|(end, _)| end == "Finished");
    assert!(
        finished.is_some_and(|(_, n)| *n > count / 4),
        "most went wrong"
    );
}
