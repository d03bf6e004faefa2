//! From one process to another, with cores that sleep and with cores that do not.

use std::path::Path;

use crate::crew::{Crew, Stage};
use crate::numbers::short;
use crate::rounds::{Outcome, table, take_turns};
use crate::spinners::Spinners;
use crate::system::{Result, System};

/// Sizes of an event, in bytes.
const SIZES: [usize; 2] = [100, 1024];

/// Columns of an outcome: mode by mode, size by size, p50 and p99 in nanoseconds.
fn column(busy: bool, size: usize) -> usize {
    4 * usize::from(busy) + 2 * size
}

pub fn measure(systems: &[&'static dyn System], rounds: usize, directory: &Path) -> Vec<Outcome> {
    take_turns("latency", systems, rounds, directory, of_one)
}

fn of_one(stage: &Stage<'_>) -> Result<Vec<f64>> {
    let (ping, pong) = (stage.place()?.argument(), stage.place()?.argument());
    let mut crew = Crew::new(stage)?;
    if stage.system.is_of_one_process() {
        crew.add("both", &[&ping, &pong])?;
        crew.hear("subscribed", 1)?;
    } else {
        crew.add("ping", &[&ping, &pong])?;
        crew.add("pong", &[&ping, &pong])?;
        crew.hear("published", 2)?;
        crew.tell(0, "subscribe")?;
        crew.tell(1, "subscribe")?;
        crew.hear("subscribed", 2)?;
    }
    crew.hear("met", 1)?;
    let mut numbers = Vec::new();
    for busy in [false, true] {
        let _awake = if busy { Some(Spinners::start()?) } else { None };
        for size in SIZES {
            crew.tell(0, &format!("trips {size}"))?;
            numbers.extend(crew.result()?);
        }
    }
    Ok(numbers)
}

/// The ratios of p50 to that of another in the same round: idle and busy, each for both sizes.
pub fn against(ours: &Outcome, other: &Outcome) -> Vec<f64> {
    let columns = [false, true].map(|busy| [column(busy, 0), column(busy, 1)]);
    let columns = columns.into_iter().flatten();
    columns
        .map(|column| ours.ratio(column, |round| other.of_round(round, column)))
        .collect()
}

/// Both tables; ratios are to the first system.
pub fn report(outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    for busy in [false, true] {
        let first = if busy { "busy cores" } else { "idle cores" };
        let head = [
            first,
            "100 B, p50, µs",
            "p99, µs",
            "p50 to raw TCP",
            "1 KiB, p50, µs",
            "p99, µs",
            "p50 to raw TCP",
        ];
        text += &table(&head, outcomes, |outcome| {
            let mut cells = Vec::new();
            for size in 0..SIZES.len() {
                let column = column(busy, size);
                cells.push(short(outcome.median(column) / 1000.0));
                cells.push(short(outcome.median(column + 1) / 1000.0));
                let base = |round| outcomes.first()?.of_round(round, column);
                cells.push(format!("{:.2}", outcome.ratio(column, base)));
            }
            cells
        });
        text.push('\n');
    }
    text
}
