//! An event's bytes and its type's: what is understood is written as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xbee_kecho::{EventRef, EventType, Submission};

fuzz_target!(|input: (&[u8], &[u8], &[u8])| {
    let (kind, attributes, payload) = input;
    let kind = EventType::decode(kind).unwrap_or_else(|_| EventType::raw("t").expect("a type"));
    assert_eq!(EventType::decode(&kind.encode()).ok().as_ref(), Some(&kind));
    let _ = EventRef::parse(payload, &kind);
    let mut bytes = vec![0; 8];
    bytes.extend(kind.id().to_le_bytes());
    bytes.extend((attributes.len() as u32).to_le_bytes());
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(attributes);
    bytes.extend(payload);
    let Ok(event) = EventRef::parse(&bytes, &kind) else {
        return;
    };
    for field in kind.fields() {
        let _ = event.field(&field.name);
    }
    let read: Vec<_> = event
        .attributes()
        .map(|(name, v)| (name, v.to_value()))
        .collect();
    let again = Submission {
        kind: &kind,
        attributes: &read,
        payload,
    };
    // Names and lengths are looked at only when an event is submitted.
    if again.size().is_err() {
        return;
    }
    let mut written = Vec::new();
    again.encode(event.sequence(), |piece| written.extend_from_slice(piece));
    let event = EventRef::parse(&written, &kind).expect("what was written");
    let all: Vec<_> = event
        .attributes()
        .map(|(name, v)| (name, v.to_value()))
        .collect();
    // As they are written: NaN is not itself.
    assert_eq!(format!("{all:?}"), format!("{read:?}"));
    assert_eq!(event.payload(), payload);
});
