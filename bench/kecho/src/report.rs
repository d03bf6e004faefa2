//! The section Event channels of bench/results.md.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::role::text_of;
use crate::system::{Result, System};
use crate::{SYSTEMS, aims, fanout, latency};

/// How the scratch directory's name begins.
pub const SCRATCH: &str = "bench-kecho-";

/// The chart of events a second.
const RATES: &str = "kecho-rates.svg";

/// A directory that goes with its owner.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Result<Scratch> {
        let path = std::env::temp_dir().join(format!("{SCRATCH}{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
        let name = self.0.file_name().unwrap_or_default().to_string_lossy();
        let mine = format!("{name}-");
        for file in std::fs::read_dir("/dev/shm")
            .into_iter()
            .flatten()
            .flatten()
        {
            if file.file_name().to_string_lossy().starts_with(&mine) {
                let _ = std::fs::remove_file(file.path());
            }
        }
    }
}

/// Those that are named, or all.
fn chosen(names: &[&str]) -> Result<Vec<&'static dyn System>> {
    for name in names {
        if !SYSTEMS.iter().any(|system| system.name() == *name) {
            let all: Vec<&str> = SYSTEMS.iter().map(|system| system.name()).collect();
            return Err(format!("no system {name:?}; there are {}", all.join("; ")).into());
        }
    }
    let all = SYSTEMS.iter().copied();
    Ok(all
        .filter(|system| names.is_empty() || names.contains(&system.name()))
        .collect())
}

/// Prints the tables of latency alone.
pub fn latency_only(rounds: &str, names: &[&str]) -> Result<()> {
    let scratch = Scratch::new()?;
    let outcomes = latency::measure(&chosen(names)?, rounds.parse()?, &scratch.0);
    println!("{}", latency::report(&outcomes));
    Ok(())
}

/// Prints the tables of many subscribers alone.
pub fn fanout_only(rounds: &str, names: &[&str]) -> Result<()> {
    let systems = chosen(names)?;
    let systems: Vec<_> = systems.into_iter().filter(|s| !s.polls()).collect();
    let scratch = Scratch::new()?;
    let outcomes = fanout::measure(&systems, rounds.parse()?, &scratch.0);
    println!("{}", fanout::report(&outcomes));
    Ok(())
}

/// Prints the whole section, and writes its charts to `docs`.
pub fn all(rounds: &str, docs: &Path) -> Result<()> {
    let rounds = rounds.parse()?;
    let scratch = Scratch::new()?;
    let before = load()?;
    let latencies = latency::measure(SYSTEMS, rounds, &scratch.0);
    let many: Vec<_> = SYSTEMS.iter().copied().filter(|s| !s.polls()).collect();
    let rates = fanout::measure(&many, rounds, &scratch.0);
    let machine = said(
        "sed",
        &["-n", "s/^model name[[:space:]]*: //p;T;q", "/proc/cpuinfo"],
    )?;
    println!(
        "## Event channels\n\nBy `make bench-kecho`, {}, on {} × {machine}; load before and after: {before}, {}. Each publisher and each \
         subscriber is a process of its own, all on one machine; brokers and TCP on loopback. The systems take turns, medians of {rounds} \
         rounds; ratios are of the same round. It is the ratios that count: the machine may be noisy.\n",
        said("date", &["-u", "+%F"])?,
        std::thread::available_parallelism()?,
        load()?,
    );
    println!("### One event from process to process\n");
    println!(
        "Half of a round trip; the receiver sleeps, but where it says polling. Idle cores sleep too and have to be woken; busy cores \
         have something to do that gives way (a process of class SCHED_IDLE on each).\n"
    );
    println!("{}", latency::report(&latencies));
    println!("### One publisher, many subscribers\n");
    println!(
        "100 bytes. The call: means of bursts of 100 events, all of which arrive before the next. Events a second: all \
         events have reached all subscribers, in order. Where a system would drop events or a subscriber, the publisher is at most \
         16384 events ahead (4096 for Mosquitto).\n"
    );
    println!("{}", fanout::report(&rates));
    std::fs::write(docs.join(RATES), fanout::chart(&rates).svg())?;
    println!("![Events a second](../docs/{RATES})\n");
    println!("{}", aims::table(&latencies, &rates));
    println!("### Versions\n");
    println!("| system | version |\n|---|---|");
    for system in SYSTEMS {
        let version = system.version();
        let version = version.unwrap_or_else(|error| text_of(error.as_ref()));
        println!("| {} | {version} |", system.name());
    }
    Ok(())
}

fn load() -> Result<String> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    let words: Vec<&str> = text.split_whitespace().take(3).collect();
    Ok(words.join(" "))
}

fn said(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output()?;
    Ok(String::from_utf8(output.stdout)?.trim().into())
}
