//! Redoes the paper's figures on load balancing: `balance-sim DOCS` runs the simulations and writes the tables into
//! DOCS/kecho-balance.md and the plots beside it. `make kecho-figures` calls it.

mod figures;
mod sim;
mod svg;

use std::error::Error;
use std::path::Path;

use figures::Figures;

fn main() -> Result<(), Box<dyn Error>> {
    let docs = std::env::args_os()
        .nth(1)
        .ok_or("usage: balance-sim DOCS")?;
    let docs = Path::new(&docs);
    let figures = Figures::new();
    let page = docs.join("kecho-balance.md");
    let text =
        std::fs::read_to_string(&page).map_err(|error| format!("{}: {error}", page.display()))?;
    std::fs::write(&page, figures.put_into(&text)?)?;
    for (name, svg) in figures.plots() {
        std::fs::write(docs.join(name), svg)?;
    }
    for (_, table) in figures.tables() {
        println!("{table}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::figures::{RATES, Runs};
    use crate::sim::{ARRIVALS, Arrivals, Outcome, SERVERS, Setting, WORK, Work, run};
    use xbee_kecho::balance::Options;

    fn of<'a>(runs: &'a Runs, policy: &str) -> &'a [Outcome] {
        let ((_, _), runs) = (runs.iter())
            .find(|((name, _), _)| *name == policy)
            .unwrap();
        runs
    }

    /// What the figures say, whatever the numbers are.
    #[test]
    fn the_shape_is_as_described_and_the_page_has_these_numbers() {
        let figures = Figures::new();
        let saturation = 1.0 / WORK.as_secs_f64();
        let alone = of(&figures.one, "not balanced");
        let late = of(&figures.one, "forwarded after 2.5 s");
        let least = of(&figures.one, "1 least loaded");
        for (index, rate) in RATES.into_iter().enumerate() {
            let offered = alone[index].counts.taken as f64 / ARRIVALS.as_secs_f64();
            // The least loaded of eight is idle, and its answer needs no more than the way there and back.
            assert!(least[index].mean_ms() < 41.0, "{rate}");
            if f64::from(rate) < saturation {
                assert!(
                    late[index].counts.forwarded == 0 && alone[index].throughput() > offered - 1.0
                );
                continue;
            }
            // One server does what it can; what waits grows as long as requests come.
            assert!(
                (alone[index].throughput() - saturation).abs() < 0.1,
                "{rate}"
            );
            assert!(
                alone[index].mean_ms() > 2.0 * late[index].mean_ms(),
                "{rate}"
            );
            assert!(
                alone[index].mean_ms() > alone[index - 1].mean_ms() + 4000.0,
                "{rate}"
            );
            // The others do the rest, but each waits for its 2.5 s.
            assert!((2200.0..2540.0).contains(&late[index].mean_ms()), "{rate}");
            assert!(late[index].throughput() > offered - 3.0, "{rate}");
            assert!(least[index].throughput() > f64::from(rate), "{rate}");
        }
        for runs in [&figures.one, &figures.each, &figures.varied, &figures.crash] {
            for outcome in runs.iter().flat_map(|(_, runs)| runs) {
                let counts = outcome.counts;
                assert_eq!(counts.taken, counts.answered);
                assert_eq!(outcome.took.len() as u64, counts.taken);
                assert_eq!(counts.sent, counts.taken + counts.cancelled);
                assert!(counts.dropped <= counts.cancelled);
            }
        }
        // Second copies are worth it where work differs or servers end, and too much where all are busy.
        let mean = |runs, policy| of(runs, policy).last().unwrap().mean_ms();
        let longest = |policy| of(&figures.crash, policy)[0].percentile_ms(100);
        assert!(
            mean(&figures.varied, "2 least loaded") < 0.6 * mean(&figures.varied, "1 least loaded")
        );
        assert!(longest("1 least loaded") > 2500.0 && longest("2, the second if idle") < 100.0);
        assert!(mean(&figures.each, "2 least loaded") > 1000.0);
        assert!(mean(&figures.each, "2, the second if idle") < mean(&figures.each, "not balanced"));

        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
        let page = std::fs::read_to_string(docs.join("kecho-balance.md")).unwrap();
        let stale = "run `make kecho-figures`";
        assert_eq!(figures.put_into(&page).unwrap(), page, "{stale}");
        for (name, svg) in figures.plots() {
            assert_eq!(
                std::fs::read_to_string(docs.join(name)).unwrap(),
                svg,
                "{name}: {stale}"
            );
        }
    }

    #[test]
    fn a_seed_repeats_a_run() {
        let setting = Setting {
            options: Options::default(),
            arrivals: Arrivals::Each,
            rate: 5,
            work: Work::Exponential,
            crash: None,
        };
        let outcome = run(setting, 7);
        assert_eq!(run(setting, 7), outcome);
        assert_ne!(run(setting, 8), outcome);
        let expected = ARRIVALS.as_secs() as usize * 5 * SERVERS;
        assert!(outcome.took.len().abs_diff(expected) < expected / 10);
    }
}
