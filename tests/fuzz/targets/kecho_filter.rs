//! A stranger's filter and an event's bytes: the filter is refused with its place, or decides within its bounds, and the
//! same each time that it is compiled.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xbee_kecho::{EventRef, EventType, FieldKind, SinkFilter, State, Value};

fuzz_target!(|input: (&str, &[u8], &[u8], i64)| {
    let (source, attributes, payload, load) = input;
    let first = SinkFilter::compile(source);
    let (mut first, mut second) = match (first, SinkFilter::compile(source)) {
        (Ok(first), Ok(second)) => (first, second),
        (Err(error), again) => {
            assert_eq!(again.err(), Some(error));
            return;
        }
        _ => panic!("compiled once and refused once"),
    };
    let fields = [
        ("a", FieldKind::I16),
        ("b", FieldKind::F32),
        ("c", FieldKind::Text(4)),
    ];
    let kind = EventType::new("t", 1, fields).expect("a type");
    let mut payload = payload.to_vec();
    payload.resize(payload.len().max(kind.size()), 0);
    let mut bytes = vec![0; 8];
    bytes.extend(kind.id().to_le_bytes());
    bytes.extend((attributes.len() as u32).to_le_bytes());
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(attributes);
    bytes.extend(payload);
    let event = EventRef::parse(&bytes, &kind).expect("an event");
    let mut state = State::default();
    state.set("load", Value::Int(load)).expect("a state");
    for _ in 0..3 {
        let passes = first.passes(&event, &kind, &state);
        assert_eq!(second.passes(&event, &kind, &state), passes);
    }
    let counters = first.counters();
    assert!(counters.run == 3 && counters.passed + counters.failed <= 3);
});
