//! What filters cost who submits: eight sinks, of which none to all get an event. Figure 7 of the paper on KECho.

use std::time::Instant;

use xbee_kecho::{
    ChannelOptions, Config, EventType, FieldKind, Node, Policy, Sink, SinkOptions, Source,
    Submission, Value,
};

use crate::numbers::{median, short};
use crate::svg::{Axis, Chart, Line};
use crate::system::Result;

/// Sinks of the channel.
const SINKS: usize = 8;
/// Events of a burst, and bursts in a row of one kind.
const BURST: usize = 100;
const BURSTS: usize = 100;
/// What a filter may cost at most, in nanoseconds.
pub const AIM_NS: f64 = 100.0;
/// The filter's cost in the paper, in nanoseconds.
const PAPER_NS: f64 = 1000.0;

/// Who decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decider {
    Nobody,
    /// A closure of the source's process.
    OutFilter,
    /// The filter of each sink, at the source.
    SinkFilters,
}

/// One of whom decides, and for how many sinks.
struct Kind {
    decider: Decider,
    passing: usize,
    /// Nanoseconds a call, one for each round.
    times: Vec<f64>,
}

/// What was measured.
pub struct Filters(Vec<Kind>);

/// A channel whose sinks read nothing, so that no waking is in the figures.
struct Place {
    source: Source,
    sinks: Vec<Sink>,
    kind: EventType,
    _node: Node,
}

impl Place {
    fn new(directory: &std::path::Path) -> Result<Place> {
        let node = Node::start(Config {
            directory: Some(directory.join("filters")),
            ..Config::default()
        })?;
        let options = ChannelOptions {
            policy: Policy::DropOldest,
            ..ChannelOptions::default()
        };
        let channel = node.create("filters", options)?;
        let source = channel.source()?;
        let sink = |number: usize| {
            channel.sink(SinkOptions {
                state: vec![("number".to_owned(), Value::Int(number as i64))],
                ..SinkOptions::default()
            })
        };
        Ok(Place {
            sinks: (0..SINKS)
                .map(sink)
                .collect::<std::result::Result<_, _>>()?,
            source,
            kind: EventType::new("load", 1, [("passing", FieldKind::I64)])?,
            _node: node,
        })
    }

    fn decide(&self, decider: Decider) -> Result<()> {
        let filter = (decider == Decider::SinkFilters).then_some("sink.number < passing");
        for sink in &self.sinks {
            sink.set_filter(filter)?;
        }
        self.source.set_out_filter(match decider {
            Decider::OutFilter => Some(Box::new(|event, sinks| {
                let passing = event.field("passing").map(|value| value.to_value());
                sinks.retain(|sink| match (sink.state("number"), &passing) {
                    (Some(Value::Int(number)), Some(Value::Int(passing))) => number < passing,
                    _ => false,
                });
            })),
            Decider::Nobody | Decider::SinkFilters => None,
        });
        Ok(())
    }

    /// Nanoseconds a call: the median of bursts.
    fn time(&self, passing: usize) -> Result<f64> {
        let mut payload = self.kind.payload(&[Value::Int(passing as i64)])?;
        payload.resize(100, 0);
        let event = Submission {
            kind: &self.kind,
            attributes: &[],
            payload: &payload,
        };
        let mut times = Vec::with_capacity(BURSTS);
        for _ in 0..BURSTS {
            let begin = Instant::now();
            for _ in 0..BURST {
                self.source.submit(&event)?;
            }
            times.push(begin.elapsed().as_nanos() as f64 / BURST as f64);
        }
        Ok(median(&times))
    }
}

/// Lets all kinds take turns.
pub fn measure(rounds: usize, directory: &std::path::Path) -> Result<Filters> {
    let place = Place::new(directory)?;
    let mut kinds = vec![Kind {
        decider: Decider::Nobody,
        passing: SINKS,
        times: Vec::new(),
    }];
    for decider in [Decider::OutFilter, Decider::SinkFilters] {
        kinds.extend((0..=SINKS).map(|passing| Kind {
            decider,
            passing,
            times: Vec::new(),
        }));
    }
    // Of the log each page is there when it was written once: that is no filter's cost.
    for _ in 0..8 {
        place.time(SINKS)?;
    }
    for _ in 0..rounds {
        for kind in &mut kinds {
            place.decide(kind.decider)?;
            kind.times.push(place.time(kind.passing)?);
        }
    }
    Ok(Filters(kinds))
}

impl Filters {
    fn find(&self, decider: Decider, passing: usize) -> &[f64] {
        let found = self
            .0
            .iter()
            .find(|kind| (kind.decider, kind.passing) == (decider, passing));
        found.map_or(&[], |kind| &kind.times)
    }

    /// What deciding costs more than no filter at all, of the same round.
    fn cost(&self, decider: Decider, passing: usize) -> f64 {
        let without = self.find(Decider::Nobody, SINKS);
        let with = self.find(decider, passing).iter();
        let costs: Vec<f64> = with.zip(without).map(|(with, none)| with - none).collect();
        median(&costs)
    }

    /// The table.
    pub fn report(&self) -> String {
        let mut text = format!(
            "| 8 sinks, ns a call | all pass | one passes | none passes |\n|---|---|---|---|\n| no filter | {} | | |\n",
            short(median(self.find(Decider::Nobody, SINKS)))
        );
        let passing = [SINKS, 1, 0];
        for (decider, name) in [
            (Decider::OutFilter, "an OUT-filter (closure)"),
            (Decider::SinkFilters, "a filter of each sink, at the source"),
        ] {
            let cells = passing.map(|n| {
                let time = median(self.find(decider, n));
                format!("{} ({:+.0})", short(time), self.cost(decider, n))
            });
            text += &format!("| {name} | {} |\n", cells.join(" | "));
        }
        text
    }

    /// Rows of the table of aims.
    pub fn aims(&self) -> Vec<(String, String, Vec<f64>)> {
        let each = |decider, by: f64| [SINKS, 1, 0].map(|n| self.cost(decider, n) / by).to_vec();
        let rows = [
            ("an OUT-filter, for 8 sinks", each(Decider::OutFilter, 1.0)),
            (
                "a filter at the source, each of 8",
                each(Decider::SinkFilters, SINKS as f64),
            ),
        ];
        let rows = rows.into_iter().map(|(what, costs)| {
            let what = format!("cost an event of {what}: all, one, none pass, ns");
            (what, format!("under {AIM_NS} (paper: {PAPER_NS})"), costs)
        });
        rows.collect()
    }

    /// Nanoseconds a call by how many sinks pass.
    pub fn chart(&self) -> Chart {
        let line = |name: &str, decider| {
            let points = (0..=SINKS).map(|n| (n as f64, median(self.find(decider, n))));
            Line::new(name, points)
        };
        let without = median(self.find(Decider::Nobody, SINKS));
        Chart {
            title: "Submitting to 8 sinks through filters".into(),
            x: Axis {
                name: "sinks that get the event".into(),
                ..Axis::default()
            },
            y: Axis {
                name: "nanoseconds a call".into(),
                ..Axis::default()
            },
            lines: vec![
                line("OUT-filter (closure)", Decider::OutFilter),
                line("filter of each sink, at the source", Decider::SinkFilters),
                Line {
                    dashed: true,
                    ..Line::new("no filter", [(0.0, without), (SINKS as f64, without)])
                },
            ],
        }
    }
}
