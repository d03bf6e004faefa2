//! From one process to many: what publishing costs, and how many events a second reach all.

use std::path::Path;

use crate::crew::{Crew, Stage};
use crate::numbers::short;
use crate::rounds::{Outcome, table, take_turns};
use crate::svg::{Axis, Chart, Line};
use crate::system::{Result, System};

/// Subscribers, each a process.
pub const SUBSCRIBERS: [usize; 3] = [1, 8, 64];
/// Columns for one number of subscribers: the call's p50 and p99 in nanoseconds, and events a second.
const COLUMNS: usize = 3;

pub fn measure(systems: &[&'static dyn System], rounds: usize, directory: &Path) -> Vec<Outcome> {
    take_turns("fanout", systems, rounds, directory, |stage| {
        let mut numbers = Vec::new();
        for subscribers in SUBSCRIBERS {
            match of_one(stage, subscribers) {
                Ok(of_these) => numbers.extend(of_these),
                Err(error) => return Err(format!("{subscribers} subscribers: {error}").into()),
            }
        }
        Ok(numbers)
    })
}

fn of_one(stage: &Stage<'_>, subscribers: usize) -> Result<Vec<f64>> {
    let (mut crew, mut numbers) = submit(stage, subscribers)?;
    crew.tell(0, "flood")?;
    numbers.extend(crew.result()?);
    Ok(numbers)
}

/// The call's p50 and p99 in nanoseconds, and who has measured it.
pub fn submit(stage: &Stage<'_>, subscribers: usize) -> Result<(Crew, Vec<f64>)> {
    let place = stage.place()?.argument();
    let mut crew = Crew::new(stage)?;
    crew.add("publish", &[&place, &subscribers.to_string()])?;
    crew.hear("published", 1)?;
    for index in 0..subscribers {
        crew.add("subscribe", &[&place, &index.to_string()])?;
    }
    // Some subscriptions last until the publisher takes them.
    crew.tell(0, "meet")?;
    crew.hear("subscribed", subscribers)?;
    crew.hear("met", 1)?;
    crew.tell(0, "submit")?;
    let numbers = crew.result()?;
    Ok((crew, numbers))
}

/// The tables of the call's cost and of the rate.
pub fn report(outcomes: &[Outcome]) -> String {
    let head = [
        "nanoseconds a call",
        "1 subscriber, p50",
        "p99",
        "8, p50",
        "p99",
        "64, p50",
        "p99",
    ];
    let mut text = table(&head, outcomes, |outcome| {
        let columns = (0..SUBSCRIBERS.len()).flat_map(|n| [COLUMNS * n, COLUMNS * n + 1]);
        columns
            .map(|column| short(outcome.median(column)))
            .collect()
    });
    text.push('\n');
    let head = ["thousand events a second to all", "1 subscriber", "8", "64"];
    text += &table(&head, outcomes, |outcome| {
        let columns = (0..SUBSCRIBERS.len()).map(|n| COLUMNS * n + 2);
        columns
            .map(|column| short(outcome.median(column) / 1000.0))
            .collect()
    });
    text
}

/// Events a second by the number of subscribers.
pub fn chart(outcomes: &[Outcome]) -> Chart {
    let line = |outcome: &Outcome| {
        let points = SUBSCRIBERS.iter().enumerate();
        let points = points.map(|(n, count)| (*count as f64, outcome.median(COLUMNS * n + 2)));
        Line::new(outcome.system.name(), points)
    };
    Chart {
        title: "Events a second that reach all subscribers, 100 bytes".into(),
        x: Axis::logarithmic("subscribers, each a process"),
        y: Axis::logarithmic("events a second"),
        lines: outcomes.iter().map(line).collect(),
    }
}

/// The median of the call for each number of subscribers, in nanoseconds.
pub fn calls(outcome: &Outcome) -> Vec<f64> {
    let columns = (0..SUBSCRIBERS.len()).map(|n| COLUMNS * n);
    columns.map(|column| outcome.median(column)).collect()
}

/// How many times the events of the best of `rivals` in the same round `ours` delivers, for each number of subscribers.
pub fn against(ours: &Outcome, rivals: &[&Outcome]) -> Vec<f64> {
    let columns = (0..SUBSCRIBERS.len()).map(|n| COLUMNS * n + 2);
    columns
        .map(|column| {
            ours.ratio(column, |round| {
                rivals
                    .iter()
                    .filter_map(|rival| rival.of_round(round, column))
                    .reduce(f64::max)
            })
        })
        .collect()
}
