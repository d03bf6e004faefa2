//! Systems that take turns, and what became of each.

use std::path::Path;

use crate::crew::Stage;
use crate::numbers::{median, short};
use crate::role::text_of;
use crate::system::{Result, System};

/// What was measured of a system: per round a row of numbers, or why there is none.
pub struct Outcome {
    pub system: &'static dyn System,
    rounds: Vec<Result<Vec<f64>>>,
}

/// Lets each system measure once in every round. Each round begins with another system.
pub fn take_turns(
    what: &str,
    systems: &[&'static dyn System],
    rounds: usize,
    directory: &Path,
    measure: impl Fn(&Stage<'_>) -> Result<Vec<f64>>,
) -> Vec<Outcome> {
    let outcome = |system: &&'static dyn System| Outcome {
        system: *system,
        rounds: Vec::new(),
    };
    let mut outcomes: Vec<Outcome> = systems.iter().map(outcome).collect();
    for round in 0..rounds {
        for n in 0..outcomes.len() {
            let at = (n + round) % outcomes.len();
            let outcome = &mut outcomes[at];
            eprint!("{what}, round {}, {}:", round + 1, outcome.system.name());
            let directory = directory.join(format!("{}-{round}-{n}", what.replace(' ', "-")));
            let measured = Stage::new(outcome.system, &directory).and_then(|stage| measure(&stage));
            match &measured {
                Ok(numbers) => {
                    let numbers = numbers.iter().map(|number| short(*number));
                    eprintln!(" {}", numbers.collect::<Vec<_>>().join(" "));
                }
                Err(error) => eprintln!(" {}", text_of(error.as_ref())),
            }
            outcome.rounds.push(measured);
        }
    }
    outcomes
}

impl Outcome {
    /// The median of a column; not a number if there is none.
    pub fn median(&self, column: usize) -> f64 {
        let values = self.rounds.iter().flatten();
        let values: Vec<f64> = values.filter_map(|row| row.get(column).copied()).collect();
        median(&values)
    }

    /// A column of a round, if it was measured.
    pub fn of_round(&self, round: usize, column: usize) -> Option<f64> {
        let row = self.rounds.get(round)?.as_ref().ok()?;
        row.get(column).copied().filter(|value| value.is_finite())
    }

    /// The median of the ratios to what `other` says of each round.
    pub fn ratio(&self, column: usize, other: impl Fn(usize) -> Option<f64>) -> f64 {
        let ratios = (0..self.rounds.len())
            .filter_map(|round| Some(self.of_round(round, column)? / other(round)?));
        median(&ratios.collect::<Vec<_>>())
    }

    /// Why some rounds are missing, and how many.
    pub fn failures(&self) -> Option<String> {
        let failed: Vec<String> = self
            .rounds
            .iter()
            .filter_map(|round| Some(text_of(round.as_ref().err()?.as_ref())))
            .collect();
        let first = failed.first()?;
        Some(format!(
            "{} of {} rounds failed: {first}",
            failed.len(),
            self.rounds.len()
        ))
    }
}

/// A table of Markdown; a system of which nothing was measured says why.
pub fn table(
    head: &[&str],
    outcomes: &[Outcome],
    cells: impl Fn(&Outcome) -> Vec<String>,
) -> String {
    let mut text = format!("| {} |\n|{}\n", head.join(" | "), "---|".repeat(head.len()));
    for outcome in outcomes {
        let name = outcome.system.name();
        let measured = outcome.rounds.iter().any(|round| round.is_ok());
        match outcome.failures() {
            Some(why) if !measured => {
                let why = why.replace('|', "/");
                let rest = " |".repeat(head.len().saturating_sub(2));
                text += &format!("| {name} | {why} |{rest}\n");
            }
            why => {
                let cells = cells(outcome).join(" | ");
                text += &match why {
                    None => format!("| {name} | {cells} |\n"),
                    Some(why) => format!("| {name} ({}) | {cells} |\n", why.replace('|', "/")),
                };
            }
        }
    }
    text
}
