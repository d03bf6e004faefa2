//! The section Event channels of bench/results.md.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::role::text_of;
use crate::system::{Result, System};
use crate::{SYSTEMS, aims, fanout, filters, latency, paper};

/// How the scratch directory's name begins.
pub const SCRATCH: &str = "bench-kecho-";

/// The chart of events a second.
const RATES: &str = "kecho-rates.svg";
/// The chart of submissions by the number of sinks.
const SUBMISSIONS: &str = "kecho-submit.svg";
/// The chart of filters.
const FILTERS: &str = "kecho-filter.svg";

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

/// Those of which many processes can be subscribers.
fn of_many(systems: impl IntoIterator<Item = &'static dyn System>) -> Vec<&'static dyn System> {
    let systems = systems.into_iter();
    systems
        .filter(|system| !system.polls() && !system.is_of_one_process())
        .collect()
}

/// Prints the paper's tables alone.
pub fn paper_only(rounds: &str) -> Result<()> {
    let rounds = rounds.parse()?;
    let scratch = Scratch::new()?;
    println!("{}", paper::table(rounds, &scratch.0)?.report());
    println!("{}", filters::measure(rounds, &scratch.0)?.report());
    let submissions = paper::submissions(rounds, &scratch.0);
    println!("{}", paper::submissions_report(&submissions));
    Ok(())
}

/// Prints the tables of many subscribers alone.
pub fn fanout_only(rounds: &str, names: &[&str]) -> Result<()> {
    let systems = of_many(chosen(names)?);
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
    let many = of_many(SYSTEMS.iter().copied());
    let rates = fanout::measure(&many, rounds, &scratch.0);
    let filters = filters::measure(rounds, &scratch.0)?;
    let table = paper::table(rounds, &scratch.0)?;
    let submissions = paper::submissions(rounds, &scratch.0);
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
    println!("### The measurements of the paper on KECho\n");
    println!(
        "What its Table 1 and its Figures 6 and 7 are said to show, measured here. The paper's own numbers are not beside them: its text \
         is not to be had freely, and of its figures only the 1 µs for a filter is known. Nodes of one process each with its own way to \
         the other; the registry behind TCP.\n"
    );
    println!("{}", table.report());
    println!("Submitting, by the number of sinks, each a process:\n");
    println!("{}", paper::submissions_report(&submissions));
    let chart = paper::chart(&submissions).svg();
    std::fs::write(docs.join(SUBMISSIONS), chart)?;
    println!("![Submitting](../docs/{SUBMISSIONS})\n");
    println!(
        "Filters: 8 sinks whose policy is to drop the oldest and that read nothing; in brackets what deciding costs beyond no filter \
         in the same round. Where few pass it is less, since what goes to nobody is not written.\n"
    );
    println!("{}", filters.report());
    std::fs::write(docs.join(FILTERS), filters.chart().svg())?;
    println!("![Filters](../docs/{FILTERS})\n");
    println!("{}", aims::table(&latencies, &rates, &filters));
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
