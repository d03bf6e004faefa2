//! What the paper on KECho measured in its Table 1 and Figure 6: making channels, entering them, submitting to many, polling.

use std::path::Path;
use std::time::Instant;

use xbee_kecho::{
    ChannelOptions, Config, EventType, Node, Registry, RegistryConfig, SinkOptions, Submission,
    Transports,
};

use crate::fanout;
use crate::kecho::Kecho;
use crate::numbers::{quantile, short};
use crate::rounds::{Outcome, take_turns};
use crate::svg::{Axis, Chart, Line};
use crate::system::{Result, System};

/// Channels that are made one after the other in each round.
const CHANNELS: usize = 100;
/// Polls a round.
const POLLS: usize = 10_000;
/// Sinks that a source submits to, each a process.
const SINKS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
/// What is timed, in the order of the columns.
const STEPS: [&str; 8] = [
    "create a channel",
    "open it in another node",
    "become a source of it",
    "become a sink of it: events flow",
    "destroy it",
    "poll, nothing there",
    "poll, an event of 100 B there",
    "submit an event of 100 B, nobody there",
];

/// Times in nanoseconds, by way and step.
pub struct Table([(&'static str, [Vec<f64>; STEPS.len()]); 2]);

fn nanoseconds<T>(what: impl FnOnce() -> T) -> (T, f64) {
    let begin = Instant::now();
    let done = what();
    (done, begin.elapsed().as_nanos() as f64)
}

fn steps(directory: &Path, tcp: bool, times: &mut [Vec<f64>; STEPS.len()]) -> Result<()> {
    let registry = Registry::start(&RegistryConfig {
        listen: vec!["tcp:[::ffff:127.0.0.1]:0".parse()?],
        ..RegistryConfig::default()
    })?;
    let config = Config {
        registry: Some(registry.addresses()[0].clone()),
        directory: Some(directory.to_owned()),
        transports: Transports {
            same_process: false,
            shared_memory: !tcp,
            vsock: false,
            tcp,
        },
        ..Config::default()
    };
    let [one, two] = [Node::start(config.clone())?, Node::start(config)?];
    let kind = EventType::raw("bench")?;
    let event = Submission {
        kind: &kind,
        attributes: &[],
        payload: &[0; 100],
    };
    for n in 0..CHANNELS {
        let name = format!("channel-{n}");
        let mut step = times.iter_mut();
        let mut note = |time| {
            if let Some(times) = step.next() {
                times.push(time);
            }
        };
        let (channel, time) = nanoseconds(|| one.create(&name, ChannelOptions::default()));
        let channel = channel?;
        note(time);
        let (other, time) = nanoseconds(|| two.open(&name));
        let other = other?;
        note(time);
        let (source, time) = nanoseconds(|| channel.source());
        let source = source?;
        note(time);
        let (_, alone) = nanoseconds(|| (0..100).try_for_each(|_| source.submit(&event)));
        let (sink, time) = nanoseconds(|| other.sink(SinkOptions::default()));
        let sink = sink?;
        note(time);
        let mut nothing = 0.0;
        let mut something = 0.0;
        let polls = POLLS / CHANNELS;
        for _ in 0..polls {
            let (polled, time) = nanoseconds(|| sink.poll());
            if polled?.is_some() {
                return Err("an event that nobody has submitted".into());
            }
            nothing += time;
        }
        for _ in 0..polls {
            source.submit(&event)?;
        }
        let mut found = 0;
        while found < polls {
            let (polled, time) = nanoseconds(|| sink.poll());
            if polled?.is_some() {
                something += time;
                found += 1;
            }
        }
        let (destroyed, time) = nanoseconds(|| channel.destroy());
        destroyed?;
        note(time);
        note(nothing / polls as f64);
        note(something / polls as f64);
        note(alone / 100.0);
    }
    Ok(())
}

/// Both ways in turns.
pub fn table(rounds: usize, directory: &Path) -> Result<Table> {
    let empty = || [(); STEPS.len()].map(|()| Vec::new());
    let mut table = Table([("shared memory", empty()), ("tcp", empty())]);
    for round in 0..rounds {
        for (n, (_, times)) in table.0.iter_mut().enumerate() {
            steps(&directory.join(format!("steps-{round}-{n}")), n == 1, times)?;
        }
    }
    Ok(table)
}

impl Table {
    /// As Markdown.
    pub fn report(&self) -> String {
        let mut text =
            "| µs | shared memory, p50 | p99 | tcp, p50 | p99 |\n|---|---|---|---|---|\n"
                .to_owned();
        for (step, name) in STEPS.iter().enumerate() {
            let cells = self.0.each_ref().map(|(_, times)| {
                let mut sorted = times[step].clone();
                sorted.sort_by(f64::total_cmp);
                let [p50, p99] = [0.5, 0.99].map(|part| short(quantile(&sorted, part) / 1000.0));
                format!("{p50} | {p99}")
            });
            text += &format!("| {name} | {} |\n", cells.join(" | "));
        }
        text
    }
}

/// The call by the number of sinks.
pub fn submissions(rounds: usize, directory: &Path) -> Vec<Outcome> {
    let systems: [&'static dyn System; 2] = [&Kecho::Shared, &Kecho::Tcp];
    take_turns("submit", &systems, rounds, directory, |stage| {
        let mut numbers = Vec::new();
        for sinks in SINKS {
            let (_crew, times) = fanout::submit(stage, sinks)?;
            numbers.extend(times.first());
        }
        Ok(numbers)
    })
}

/// The table of [`submissions`].
pub fn submissions_report(outcomes: &[Outcome]) -> String {
    let sinks = SINKS.map(|sinks| sinks.to_string()).join(" | ");
    let rule = "---|".repeat(SINKS.len());
    let mut text = format!("| ns a call, sinks: | {sinks} |\n|---|{rule}\n");
    for outcome in outcomes {
        let cells = (0..SINKS.len()).map(|column| short(outcome.median(column)));
        let cells: Vec<String> = cells.collect();
        text += &format!("| {} | {} |\n", outcome.system.name(), cells.join(" | "));
    }
    text
}

/// The chart of [`submissions`].
pub fn chart(outcomes: &[Outcome]) -> Chart {
    let line = |outcome: &Outcome| {
        let points = SINKS.iter().enumerate();
        let points = points.map(|(n, sinks)| (*sinks as f64, outcome.median(n)));
        Line::new(outcome.system.name(), points)
    };
    Chart {
        title: "Submitting an event of 100 bytes".into(),
        x: Axis::logarithmic("sinks, each a process"),
        y: Axis {
            name: "nanoseconds a call".into(),
            ..Axis::default()
        },
        lines: outcomes.iter().map(line).collect(),
    }
}
