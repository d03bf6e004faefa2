//! The runs, and the tables and plots made of them.

use std::fmt::Write;
use std::time::Duration;

use xbee_kecho::balance::{First, Options};

use crate::sim::{Arrivals, Outcome, Setting, Work, run};
use crate::svg::{Chart, Scale};

const SEED: u64 = 1;
/// Longer than any run: never.
const NEVER: Duration = Duration::from_secs(100_000);
/// In the paper's range.
pub const RATES: [u32; 7] = [20, 25, 30, 35, 40, 45, 50];
/// Of each server: 26.3 a second keep it at work all the time.
pub const RATES_OF_EACH: [u32; 5] = [4, 8, 12, 16, 20];
/// In the middle of [`RATES`].
const RATE: u32 = 35;
/// When a server ends.
const CRASH: Duration = Duration::from_secs(30);

/// What fronts do, by the name that it has in tables and plots.
pub type Policy = (&'static str, Options);

fn policy(first: First, copies: usize, copy_load: u32, forward_after: Duration) -> Options {
    Options {
        first,
        copies,
        copy_load,
        forward_after,
        give_up_after: NEVER,
        max_open: usize::MAX,
        ..Options::default()
    }
}

fn alone() -> Policy {
    ("not balanced", policy(First::Own, 1, 0, NEVER))
}

fn late() -> Policy {
    let options = policy(First::Own, 1, 0, Options::default().forward_after);
    ("forwarded after 2.5 s", options)
}

fn least(name: &'static str, copies: usize, copy_load: u32) -> Policy {
    let after = Options::default().forward_after;
    (name, policy(First::Least, copies, copy_load, after))
}

/// All runs of a policy, in the order of the rates.
pub type Runs = Vec<(Policy, Vec<Outcome>)>;

/// All that is shown.
pub struct Figures {
    /// All requests come to one server; by [`RATES`].
    pub one: Runs,
    /// As many come to each; by [`RATES_OF_EACH`].
    pub each: Runs,
    /// All come to one, [`RATE`], and what a request takes differs.
    pub varied: Runs,
    /// The same with constant work, and a server ends.
    pub crash: Runs,
}

impl Figures {
    /// Runs the simulations.
    pub fn new() -> Figures {
        let one = [
            alone(),
            late(),
            least("1 least loaded", 1, 0),
            least("2 least loaded", 2, u32::MAX),
        ];
        let each = [
            alone(),
            least("1 least loaded", 1, 0),
            least("2 least loaded", 2, u32::MAX),
            least("2, the second if idle", 2, 0),
        ];
        let few = [
            least("1 least loaded", 1, 0),
            least("2 least loaded", 2, u32::MAX),
            least("2, the second if idle", 2, 0),
        ];
        let (constant, varied) = (Work::Constant, Work::Exponential);
        Figures {
            one: runs(&one, &RATES, Arrivals::One, constant, None),
            each: runs(&each, &RATES_OF_EACH, Arrivals::Each, constant, None),
            varied: runs(&few, &[RATE], Arrivals::One, varied, None),
            crash: runs(&few, &[RATE], Arrivals::One, constant, Some(CRASH)),
        }
    }

    /// By name, as the page has them between marks.
    pub fn tables(&self) -> [(&'static str, String); 6] {
        let mean = |run: &Outcome| number(run.mean_ms());
        let throughput = |run: &Outcome| number(run.throughput());
        [
            ("response", by_rate(&self.one, &RATES, mean)),
            ("throughput", by_rate(&self.one, &RATES, throughput)),
            ("each", by_rate(&self.each, &RATES_OF_EACH, mean)),
            (
                "cost",
                costs(self.one.iter().map(|(policy, runs)| (policy, &runs[3]))),
            ),
            (
                "varied",
                costs(self.varied.iter().map(|(policy, runs)| (policy, &runs[0]))),
            ),
            (
                "crash",
                costs(self.crash.iter().map(|(policy, runs)| (policy, &runs[0]))),
            ),
        ]
    }

    /// By file name.
    pub fn plots(&self) -> [(&'static str, String); 3] {
        let to_one = "requests/s, all to one of 8 servers";
        [
            Chart {
                title: "Response time, 38 ms a request",
                x: to_one,
                y: "mean response time, ms",
                scale: Scale::Powers(1, 5),
                lines: lines(&self.one, &RATES, Outcome::mean_ms),
            }
            .named("kecho-balance-response.svg"),
            Chart {
                title: "Throughput, 38 ms a request",
                x: to_one,
                y: "answers/s",
                scale: Scale::Linear(60.0),
                lines: lines(&self.one, &RATES, Outcome::throughput),
            }
            .named("kecho-balance-throughput.svg"),
            Chart {
                title: "Response time when all servers get requests",
                x: "requests/s to each of 8 servers",
                y: "mean response time, ms",
                scale: Scale::Powers(1, 5),
                lines: lines(&self.each, &RATES_OF_EACH, Outcome::mean_ms),
            }
            .named("kecho-balance-each.svg"),
        ]
    }

    /// The page with these tables instead of those it has.
    pub fn put_into(&self, page: &str) -> Result<String, String> {
        let mut page = page.to_owned();
        for (name, table) in self.tables() {
            let (begin, end) = (format!("<!-- table {name} -->\n"), "<!-- end -->");
            let at = page
                .find(&begin)
                .ok_or_else(|| format!("no line {begin:?}"))?
                + begin.len();
            let length = page[at..]
                .find(end)
                .ok_or_else(|| format!("no {end:?} after {begin:?}"))?;
            page.replace_range(at..at + length, &table);
        }
        Ok(page)
    }
}

impl Chart {
    fn named(self, name: &'static str) -> (&'static str, String) {
        (name, self.svg())
    }
}

fn runs(
    policies: &[Policy],
    rates: &[u32],
    arrivals: Arrivals,
    work: Work,
    crash: Option<Duration>,
) -> Runs {
    let runs = policies.iter().map(|(name, options)| {
        let of_rate = |rate: &u32| Setting {
            options: *options,
            arrivals,
            rate: *rate,
            work,
            crash,
        };
        let runs = rates.iter().map(|rate| run(of_rate(rate), SEED)).collect();
        ((*name, *options), runs)
    });
    runs.collect()
}

fn lines(runs: &Runs, rates: &[u32], value: fn(&Outcome) -> f64) -> Vec<crate::svg::Line> {
    let lines = runs.iter().map(|((name, _), runs)| {
        let points = rates.iter().zip(runs);
        (
            *name,
            points
                .map(|(rate, run)| (f64::from(*rate), value(run)))
                .collect(),
        )
    });
    lines.collect()
}

/// As precise as one wants to read it.
fn number(value: f64) -> String {
    match value < 1000.0 {
        true => format!("{value:.1}"),
        false => format!("{value:.0}"),
    }
}

fn by_rate(runs: &Runs, rates: &[u32], cell: impl Fn(&Outcome) -> String) -> String {
    let mut head = String::from("| requests/s |");
    let mut rule = String::from("| ---: |");
    for rate in rates {
        head += &format!(" {rate} |");
        rule += " ---: |";
    }
    let mut table = format!("{head}\n{rule}\n");
    for ((name, _), runs) in runs {
        table += &format!("| {name} |");
        for run in runs {
            table += &format!(" {} |", cell(run));
        }
        table.push('\n');
    }
    table
}

fn costs<'a>(runs: impl Iterator<Item = (&'a Policy, &'a Outcome)>) -> String {
    let mut table = String::from(
        "| | mean ms | p99 ms | longest ms | of 100 requests: forwarded | second answers dropped | \
         copies cancelled | work ms a request |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for ((name, _), run) in runs {
        let counts = run.counts;
        writeln!(
            table,
            "| {name} | {} | {} | {} | {} | {} | {} | {} |",
            number(run.mean_ms()),
            number(run.percentile_ms(99)),
            number(run.percentile_ms(100)),
            number(run.per_100(counts.forwarded)),
            number(run.per_100(counts.dropped)),
            number(run.per_100(counts.cancelled)),
            number(run.worked.as_secs_f64() * 1e3 / counts.taken as f64),
        )
        .expect("a String takes all");
    }
    table
}
