//! What filters say of events, and what is said of wrong ones.

use super::*;
use crate::event::Submission;
use crate::types::FieldKind;

/// The bytes of an event.
pub(super) fn encode(kind: &EventType, attributes: &[(&str, Value)], payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let event = Submission {
        kind,
        attributes,
        payload,
    };
    event.size().unwrap();
    event.encode(7, |piece| out.extend_from_slice(piece));
    out
}

fn load() -> EventType {
    let fields = [
        ("cpu", FieldKind::F64),
        ("requests", FieldKind::U32),
        ("host", FieldKind::Text(8)),
        ("raw", FieldKind::Bytes(2)),
        ("up-time", FieldKind::I64),
        ("event", FieldKind::Bool),
    ];
    EventType::new("load", 3, fields).unwrap()
}

/// What a filter decides on one event, and why it could not.
fn decide(source: &str) -> Result<bool, Failure> {
    let mut filter = SinkFilter::compile(source).unwrap_or_else(|e| panic!("{source}: {e}"));
    let kind = load();
    let payload = kind.payload(&[
        Value::Float(0.25),
        Value::Int(12),
        "h1".into(),
        Value::Bytes(vec![1, 2]),
        Value::Int(-5),
        Value::Bool(true),
    ]);
    let attributes = [
        ("node", Value::from("alpha")),
        ("n", Value::Int(3)),
        ("ok", Value::Bool(true)),
        ("raw", Value::Bytes(vec![1, 2])),
        ("content-type", Value::from("text/plain")),
    ];
    let bytes = encode(&kind, &attributes, &payload.unwrap());
    let event = EventRef::parse(&bytes, &kind).unwrap();
    let mut state = State::default();
    state.set("load", Value::Float(0.5)).unwrap();
    let passes = filter.passes(&event, &kind, &state);
    let counters = filter.counters();
    assert_eq!((counters.run, counters.passed), (1, passes.into()));
    match filter.last_failure() {
        Some(failure) => {
            assert_eq!((counters.failed, passes), (1, false));
            Err(failure)
        }
        None => Ok(passes),
    }
}

#[test]
fn what_passes() {
    for source in [
        "true",
        "cpu < 0.5",
        "cpu == 0.25 && requests == 12 && host == \"h1\"",
        "`up-time` == -5 && `event`",
        "@node == \"alpha\" && @n == 3 && @ok && raw == @raw",
        "starts_with(@`content-type`, \"text/\") && ends_with(host, \"1\") && contains(@node, \"ph\")",
        "len(host) == 2 && len(raw) == 2 && len(\"é\") == 2",
        "sink.load > cpu",
        "event.type == \"load\" && event.version == 3 && event.size == 31 && event.sequence == 7",
        "has(cpu) && has(@node) && has(sink.load) && !has(none) && !has(@none) && !has(sink.none)",
        "1 + 2 * 3 == 7 && (1 + 2) * 3 == 9 && 7 - 2 - 1 == 4 && 7 / 2 == 3 && -7 % 3 == -1",
        "7 / 2.0 == 3.5 && 5.5 % 2 == 1.5 && 1 == 1.0 && 2 < 2.5",
        "abs(-3) == 3 && min(1, 2.5) == 1 && max(1, 2.5) == 2.5 && -(-3) == abs(3)",
        "true || none && none",
        "!has(@none) || @none > 3",
        "\"a\" < \"b\" && \"a\" < \"aa\" && true != false",
        "9223372036854775807 + 1 == 9223372036854775807",
        "-9223372036854775808 - 1 == -9223372036854775808",
        "-9223372036854775808 / -1 == 9223372036854775807",
        "-9223372036854775808 % -1 == 0 && abs(-9223372036854775808) > 0",
        "1.0 / 0 > 1e308 && 0.0 / 0 != 0.0 / 0",
        "var t = \"\"; set(t, @node) && t == \"alpha\"",
        "var x = 1.0; set(x, 3) && x / 2 == 1.5",
    ] {
        assert_eq!(decide(source), Ok(true), "{source}");
    }
}

#[test]
fn what_does_not_pass() {
    for source in [
        "false",
        "cpu > 0.5",
        "!@ok",
        "0.0 / 0 == 0.0 / 0",
        "0.0 / 0 < 1 || 0.0 / 0 >= 1",
        "false && none",
    ] {
        assert_eq!(decide(source), Ok(false), "{source}");
    }
    for (source, failure) in [
        ("none > 1", Failure::Missing),
        ("@none", Failure::Missing),
        ("sink.none == 1", Failure::Missing),
        ("cpu", Failure::Kind),
        ("cpu == \"x\"", Failure::Kind),
        ("@ok < @ok", Failure::Kind),
        ("@n && true", Failure::Kind),
        ("true && @n", Failure::Kind),
        ("!@n", Failure::Kind),
        ("-@node < 1", Failure::Kind),
        ("var x = 1; set(x, cpu)", Failure::Kind),
        ("1 / 0 == 1", Failure::Zero),
        ("requests % 0 == 1", Failure::Zero),
    ] {
        assert_eq!(decide(source), Err(failure), "{source}");
    }
}

#[test]
fn variables_last_from_event_to_event() {
    let kind = EventType::new("price", 1, [("price", FieldKind::F64)]).unwrap();
    let state = State::default();
    let run = |source: &str, prices: &[f64]| -> Vec<bool> {
        let mut filter = SinkFilter::compile(source).unwrap();
        let decide = |price: &f64| {
            let payload = kind.payload(&[Value::Float(*price)]).unwrap();
            let bytes = encode(&kind, &[], &payload);
            let event = EventRef::parse(&bytes, &kind).unwrap();
            filter.passes(&event, &kind, &state)
        };
        prices.iter().map(decide).collect()
    };
    let moved = "var last = 0.0; abs(price - last) > 0.5 && set(last, price)";
    let decided = run(moved, &[1.0, 1.2, 1.4, 1.6, 1.7, 0.0]);
    assert_eq!(decided, [true, false, false, true, false, true]);
    let third = "var n = 0; set(n, n + 1) && n % 3 == 0";
    assert_eq!(
        run(third, &[0.0; 7]),
        [false, false, true, false, false, true, false]
    );
    // What was set before a failure stays set.
    let fails = "var n = 0; set(n, n + 1) && (n > 2 || 1 / 0 == 1)";
    assert_eq!(run(fails, &[0.0; 4]), [false, false, true, true]);
}

#[test]
fn a_filter_is_for_all_types_however_many() {
    let mut filter = SinkFilter::compile("x == 7").unwrap();
    let state = State::default();
    for round in 0..2 {
        for n in 0..MAX_TYPES as u16 * 2 {
            let before = FieldKind::Bytes(n % 50);
            let kind = EventType::new("t", n, [("a", before), ("x", FieldKind::U8)]).unwrap();
            let mut payload = vec![0; kind.size()];
            payload[kind.size() - 1] = 7;
            let bytes = encode(&kind, &[], &payload);
            let event = EventRef::parse(&bytes, &kind).unwrap();
            assert!(filter.passes(&event, &kind, &state), "{round} {n}");
            assert!(filter.types.len() <= MAX_TYPES);
        }
    }
}

#[test]
fn work_and_lengths_have_bounds() {
    let kind = EventType::new("t", 1, [("long", FieldKind::Text(5000))]).unwrap();
    let state = State::default();
    let attribute = [("a", Value::Text("x".repeat(4096)))];
    let decide = |source: &str, payload: &[u8]| {
        let mut filter = SinkFilter::compile(source).unwrap();
        let bytes = encode(&kind, &attribute, payload);
        let event = EventRef::parse(&bytes, &kind).unwrap();
        let passes = filter.passes(&event, &kind, &state);
        filter.last_failure().map_or(Ok(passes), Err)
    };
    let none = [0; 5000];
    assert_eq!(decide("contains(@a, \"xxx\")", &none), Ok(true));
    let twice = "contains(@a, \"xxx\") && contains(@a, \"y\")";
    assert_eq!(decide(twice, &none), Err(Failure::Work));
    assert_eq!(
        decide("var t = \"\"; set(t, @a)", &none),
        Err(Failure::Long)
    );
    assert_eq!(decide("len(long) == 0", &none), Ok(true));
    assert_eq!(decide("has(long)", &[b'x'; 5000]), Err(Failure::Long));
    assert_eq!(
        decide("has(long)", &[0xff; 4000].repeat(2)),
        Err(Failure::Long)
    );
    // As if it were not there.
    let mut broken = none;
    broken[0] = 0xff;
    assert_eq!(decide("has(long)", &broken), Ok(false));
    assert_eq!(decide("long == \"\"", &broken), Err(Failure::Missing));
    // Bit by bit.
    let remainders = ["1e308 % 1e-308 < 1"; 9].join(" && ");
    assert_eq!(decide(&remainders, &none), Err(Failure::Work));
    assert_eq!(decide("1e308 % 1e-308 < 1", &none), Ok(true));
}

#[test]
fn what_is_wrong_is_said_with_its_place_and_remedy() {
    let deep = "(".repeat(40);
    let many = vec!["true"; 200].join(" && ");
    let names = (0..33).map(|n| format!("f{n}")).collect::<Vec<_>>();
    let names = names.join(" && ");
    let variables = (0..17)
        .map(|n| format!("var v{n} = 0;"))
        .collect::<String>();
    let stack = format!("{}1{}", "1 == 1 + 1 * (".repeat(15), ")".repeat(15));
    let stack = stack.replace("1 == 1 + 1 * (", "1 + 1 * (1 - 1 * (");
    let stack = format!("{stack}{} == 1", ")".repeat(15));
    let long = format!("var t = \"{}\"; true", "x".repeat(257));
    for (source, code, text) in [
        (
            "",
            "filter-syntax",
            "line 1, column 1: expected a value: a number, a text, a field, @attribute, found the end",
        ),
        (
            "cpu <",
            "filter-syntax",
            "line 1, column 6: expected a value: a number, a text, a field, @attribute, found the end",
        ),
        (
            "true\n  true",
            "filter-syntax",
            "line 2, column 3: expected an operator or the end, found 'true'",
        ),
        (
            "\"é\" == é",
            "filter-token",
            "line 1, column 8: 'é' has no meaning in a filter; texts are in double quotes, attributes after '@'",
        ),
        (
            "@a == 'x'",
            "filter-token",
            "line 1, column 7: texts are in double quotes, not in single ones: \"text\"",
        ),
        (
            "@a == \"x",
            "filter-token",
            "line 1, column 7: what begins with \" here does not end; close it with \"",
        ),
        (
            "`a",
            "filter-token",
            "line 1, column 1: what begins with ` here does not end; close it with `",
        ),
        (
            "`a b`",
            "filter-token",
            "line 1, column 1: `a b` is not a name: 1 to 64 ASCII letters, digits, '_', '-' or '.', and a letter or '_' first",
        ),
        (
            "\"\\x\" == @a",
            "filter-token",
            "line 1, column 2: '\\x' is no escape in a text: \\\" \\\\ \\n \\t are; for a backslash write two of them",
        ),
        (
            "1 < 9223372036854775808",
            "filter-token",
            "line 1, column 5: 9223372036854775808 is too large: whole numbers are within 64 bits with sign, floats within about 1.8e308",
        ),
        (
            "1 < 1e999",
            "filter-token",
            "line 1, column 5: 1e999 is too large: whole numbers are within 64 bits with sign, floats within about 1.8e308",
        ),
        (
            "a = 1",
            "filter-syntax",
            "line 1, column 3: '=' is for the first value of a variable only; compare with '==', store with set()",
        ),
        (
            "a & b",
            "filter-syntax",
            "line 1, column 3: '&' is no operator; write '&&'",
        ),
        (
            "a and b",
            "filter-syntax",
            "line 1, column 3: 'and' is no operator here; write &&",
        ),
        (
            "not a",
            "filter-syntax",
            "line 1, column 1: 'not' is no operator here; write !",
        ),
        (
            "1 < a < 2",
            "filter-syntax",
            "line 1, column 7: comparisons cannot be chained; write a < b && b < c",
        ),
        (
            "var event = 1; true",
            "filter-name",
            "line 1, column 5: 'event' has a meaning of its own; give the variable another name",
        ),
        (
            "var a = 1; var a = 2; true",
            "filter-name",
            "line 1, column 16: the variable 'a' is there twice; give one another name",
        ),
        (
            "var a = b; true",
            "filter-syntax",
            "line 1, column 9: expected a number, a text, true or false, found 'b'",
        ),
        (
            "set(a, 1)",
            "filter-name",
            "line 1, column 5: there is no variable 'a' to set; begin the filter with: var a = 0;",
        ),
        (
            "foo(1)",
            "filter-name",
            "line 1, column 1: there is no function 'foo'; there are abs, min, max, starts_with, ends_with, contains, len, has, set",
        ),
        (
            "event.node == 1",
            "filter-name",
            "line 1, column 7: an event has no 'node'; it has event.type, event.version, event.size and event.sequence; attributes are @node",
        ),
        (
            "min(1) == 1",
            "filter-arguments",
            "line 1, column 1: min takes two values and has 1: min(number, number)",
        ),
        (
            "has(1)",
            "filter-arguments",
            "line 1, column 5: has() asks for a field, an attribute or a state: has(cpu), has(@node), has(sink.load)",
        ),
        (
            "1 + 2",
            "filter-kind",
            "line 1, column 3: a filter takes true or false, and this is a whole number",
        ),
        (
            "cpu < 1 && len(@a)",
            "filter-kind",
            "line 1, column 12: '&&' takes true or false, and this is a whole number",
        ),
        (
            "1 + \"a\" == 2",
            "filter-kind",
            "line 1, column 5: '+' takes a number, and this is a text",
        ),
        (
            "contains(@a, 1)",
            "filter-kind",
            "line 1, column 14: contains() takes a text, and this is a whole number",
        ),
        (
            "1 == \"a\"",
            "filter-kind",
            "line 1, column 3: '==' cannot compare a whole number and a text; both have to be numbers, texts, or true or false",
        ),
        (
            "true < @x",
            "filter-kind",
            "line 1, column 6: '<' cannot compare true or false and any value; both have to be numbers or texts",
        ),
        (
            "var n = 0; set(n, 0.5)",
            "filter-kind",
            "line 1, column 19: the variable 'n' holds a whole number, as its first value, and this is a float",
        ),
        (
            &deep,
            "filter-too-large",
            "line 1, column 33: nested too deeply: at most 32; take parentheses or calls out",
        ),
        (
            &many,
            "filter-too-large",
            "line 1, column 1022: more than 256 values and operators; make the filter shorter",
        ),
        (
            &names,
            "filter-too-large",
            "line 1, column 215: more than 32 different fields, attributes and states; use fewer",
        ),
        (
            &variables,
            "filter-too-large",
            "line 1, column 187: more than 16 variables; use fewer",
        ),
        (
            &stack,
            "filter-too-large",
            "line 1, column 145: more than 32 values wait for their operators; put the nested part of an operator first",
        ),
        (
            &long,
            "filter-too-large",
            "line 1, column 9: a text of 257 bytes; a variable holds at most 256",
        ),
        (
            &" ".repeat(4097),
            "filter-too-large",
            "line 1, column 1: a source of 4097 bytes: at most 4096; make it shorter",
        ),
    ] {
        let error = SinkFilter::compile(source).expect_err(source);
        assert_eq!(
            (error.code(), error.to_string()),
            (code, format!("filter, {text}")),
            "{source}"
        );
    }
}

#[test]
fn the_examples_of_the_reference_are_filters() {
    let reference = include_str!("../../../../docs/kecho-filters.md");
    let mut examples = 0;
    for block in reference.split("```kecho\n").skip(1) {
        for line in block.split("```").next().unwrap().lines() {
            SinkFilter::compile(line).unwrap_or_else(|e| panic!("{line}: {e}"));
            examples += 1;
        }
    }
    assert!(examples >= 8, "{examples}");
}
