//! What filters cost: nanoseconds an event, the best of five rounds.

use std::hint::black_box;
use std::time::Instant;

use xbee_kecho::{EventRef, EventType, FieldKind, SinkFilter, State, Submission, Value};

type Error = Box<dyn std::error::Error>;

/// What it is, the filter, and the event's attributes.
type Case<'a> = (&'a str, String, &'a [(&'a str, Value)]);

fn main() -> Result<(), Error> {
    let fields = [("cpu", FieldKind::F64), ("requests", FieldKind::U32)];
    let kind = EventType::new("load", 1, fields)?;
    let payload = kind.payload(&[Value::Float(0.25), Value::Int(120)])?;
    let typical = [("node", Value::from("alpha")), ("n", Value::Int(3))];
    let many: Vec<String> = (0..63).map(|n| format!("attribute{n}")).collect();
    let mut hostile: Vec<_> = many.iter().map(|n| (n.as_str(), Value::Int(1))).collect();
    hostile.push(("long", Value::Text("ab".repeat(2048))));
    let fields = |n| vec!["cpu<1"; n].join("&&");
    let cases: Vec<Case<'_>> = vec![
        ("constant", "true".into(), &typical),
        ("one field", "cpu < 0.5".into(), &typical),
        (
            "two fields and an attribute",
            "cpu < 0.5 && requests > 100 && @n == 3".into(),
            &typical,
        ),
        ("attribute's text", "@node == \"alpha\"".into(), &typical),
        (
            "stateful",
            "var last = 0.0; abs(cpu - last) > 0.5 && set(last, cpu)".into(),
            &typical,
        ),
        ("256 instructions: fields", fields(64), &typical),
        (
            "attributes that are not there, until the bound",
            vec!["!has(@none)"; 85].join("&&"),
            &hostile,
        ),
        (
            "remainders, bit by bit, until the bound",
            vec!["1e308%1e-308<1"; 42].join("&&"),
            &typical,
        ),
        (
            "a text that is searched, until the bound",
            vec!["!contains(@long,\"abababababababababababac\")"; 42].join("&&"),
            &hostile,
        ),
    ];
    for (name, source, attributes) in cases {
        let mut filter = SinkFilter::compile(&source)?;
        let event = Submission {
            kind: &kind,
            attributes,
            payload: &payload,
        };
        event.size()?;
        let mut bytes = Vec::new();
        event.encode(1, |piece| bytes.extend_from_slice(piece));
        let event = EventRef::parse(&bytes, &kind)?;
        let state = State::default();
        let rounds = 50_000u32;
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            let begin = Instant::now();
            for _ in 0..rounds {
                black_box(filter.passes(black_box(&event), &kind, &state));
            }
            best = best.min(begin.elapsed().as_nanos() as f64 / f64::from(rounds));
        }
        let failed = filter.counters().failed > 0;
        println!(
            "{best:9.1} ns  {name}{}",
            if failed { " (fails)" } else { "" }
        );
    }
    Ok(())
}
