//! What event channels should reach, and what they do.

use crate::filters::{self, Filters};
use crate::numbers::short;
use crate::rounds::Outcome;
use crate::{fanout, latency};

/// The call's cost at most, in nanoseconds.
const CALL_NS: f64 = 500.0;

fn find<'a>(outcomes: &'a [Outcome], name: &str) -> Option<&'a Outcome> {
    outcomes
        .iter()
        .find(|outcome| outcome.system.name() == name)
}

/// A table of the aims, met or missed.
pub fn table(latencies: &[Outcome], rates: &[Outcome], filters: &Filters) -> String {
    let mut rows = Vec::new();
    let mut row = |what: &str, aim: &str, measured: Vec<f64>, met: &dyn Fn(f64) -> bool| {
        let verdict = if measured.iter().all(|value| met(*value)) {
            "met"
        } else {
            "missed"
        };
        let measured: Vec<String> = measured.into_iter().map(short).collect();
        let measured = measured.join(", ");
        rows.push(format!("| {what} | {aim} | {measured} | {verdict} |"));
    };
    for (ours, other, times) in [
        ("kecho, tcp", "raw TCP", 1.5),
        ("kecho, shared memory", "iceoryx2", 1.0),
        ("kecho, polling", "iceoryx2, polling", 1.0),
    ] {
        if let (Some(ours), Some(other)) = (find(latencies, ours), find(latencies, other)) {
            row(
                &format!(
                    "p50 of {}, times that of {}: idle 100 B, 1 KiB, busy 100 B, 1 KiB",
                    ours.system.name(),
                    other.system.name()
                ),
                &format!("at most {times}"),
                latency::against(ours, other),
                &|value| value <= times,
            );
        }
    }
    let rivals: Vec<&Outcome> = rates
        .iter()
        .filter(|outcome| {
            let name = outcome.system.name();
            name.starts_with("NATS") || name.starts_with("ZeroMQ")
        })
        .collect();
    for name in ["kecho, shared memory", "kecho, tcp"] {
        let Some(ours) = find(rates, name) else {
            continue;
        };
        row(
            &format!("the call, {name}, 1, 8 and 64 subscribers, p50, ns"),
            "under 500",
            fanout::calls(ours),
            &|value| value < CALL_NS,
        );
        let mut times = fanout::against(ours, &rivals);
        times.remove(0);
        row(
            &format!(
                "events a second, {name}, times the best of NATS and ZeroMQ, 8 and 64 subscribers"
            ),
            "at least 2",
            times,
            &|value| value >= 2.0,
        );
    }
    for (what, aim, costs) in filters.aims() {
        row(&what, &aim, costs, &|cost| cost < filters::AIM_NS);
    }
    format!(
        "### Aims\n\n| what | aim | measured | |\n|---|---|---|---|\n{}\n",
        rows.join("\n")
    )
}
