//! Random filters: the tree walked, naively, against the instructions.

use proptest::collection::vec;
use proptest::prelude::*;

use super::code::Instruction;
use super::tests::encode;
use super::tree::*;
use super::*;
use crate::types::FieldKind;

/// Walks a tree; `None` where it fails.
struct Walk<'a> {
    event: &'a EventRef<'a>,
    state: &'a State,
    variables: Vec<Value>,
}

fn float(value: &Value) -> Option<f64> {
    match value {
        Value::Int(v) => Some(*v as f64),
        Value::Float(v) => Some(*v),
        _ => None,
    }
}

fn boolean(value: Value) -> Option<bool> {
    match value {
        Value::Bool(v) => Some(v),
        _ => None,
    }
}

impl Walk<'_> {
    fn read(&self, read: &Read) -> Option<Value> {
        let kind = self.event.kind();
        match read {
            Read::Field(name) => self.event.field(name).map(|v| v.to_value()),
            Read::Attribute(name) => self.event.attribute(name).map(|v| v.to_value()),
            Read::State(name) => self.state.get(name).cloned(),
            Read::Event(Property::Type) => Some(kind.name().into()),
            Read::Event(Property::Version) => Some(Value::Int(kind.version().into())),
            Read::Event(Property::Size) => Some(Value::Int(self.event.payload().len() as i64)),
            Read::Event(Property::Sequence) => Some(Value::Int(self.event.sequence() as i64)),
        }
    }

    fn walk(&mut self, node: &Node) -> Option<Value> {
        Some(match &node.form {
            Form::Literal(value) => value.clone(),
            Form::Read(read) => self.read(read)?,
            Form::Variable(index) => self.variables[usize::from(*index)].clone(),
            Form::Has(read) => Value::Bool(self.read(read).is_some()),
            Form::Set(index, node) => {
                let value = self.walk(node)?;
                let variable = &mut self.variables[usize::from(*index)];
                *variable = match (&*variable, value) {
                    (Value::Float(_), Value::Int(v)) => Value::Float(v as f64),
                    (Value::Float(_), v @ Value::Float(_)) => v,
                    (Value::Int(_), v @ Value::Int(_)) => v,
                    (Value::Bool(_), v @ Value::Bool(_)) => v,
                    (Value::Text(_), v @ Value::Text(_)) => v,
                    _ => return None,
                };
                Value::Bool(true)
            }
            Form::Unary(Unary::Not, of) => Value::Bool(!boolean(self.walk(of)?)?),
            Form::Unary(Unary::Minus, of) => match self.walk(of)? {
                Value::Int(v) => Value::Int(v.saturating_neg()),
                Value::Float(v) => Value::Float(-v),
                _ => return None,
            },
            Form::Binary(Binary::And, left, right) => {
                Value::Bool(boolean(self.walk(left)?)? && boolean(self.walk(right)?)?)
            }
            Form::Binary(Binary::Or, left, right) => {
                Value::Bool(boolean(self.walk(left)?)? || boolean(self.walk(right)?)?)
            }
            Form::Binary(Binary::Compare(how), left, right) => {
                let (left, right) = (self.walk(left)?, self.walk(right)?);
                let order = match (&left, &right) {
                    (Value::Int(a), Value::Int(b)) => Some(a.cmp(b)),
                    (Value::Text(a), Value::Text(b)) => Some(a.cmp(b)),
                    (Value::Bool(_), Value::Bool(_)) | (Value::Bytes(_), Value::Bytes(_)) => {
                        return match how {
                            Compare::Equal => Some(Value::Bool(left == right)),
                            Compare::NotEqual => Some(Value::Bool(left != right)),
                            _ => None,
                        };
                    }
                    _ => float(&left)?.partial_cmp(&float(&right)?),
                };
                Value::Bool(match how {
                    Compare::Equal => order.is_some_and(|o| o.is_eq()),
                    Compare::NotEqual => order.is_none_or(|o| o.is_ne()),
                    Compare::Less => order.is_some_and(|o| o.is_lt()),
                    Compare::LessEqual => order.is_some_and(|o| o.is_le()),
                    Compare::Greater => order.is_some_and(|o| o.is_gt()),
                    Compare::GreaterEqual => order.is_some_and(|o| o.is_ge()),
                })
            }
            Form::Binary(Binary::Arithmetic(how), left, right) => {
                match (self.walk(left)?, self.walk(right)?) {
                    (Value::Int(a), Value::Int(b)) => {
                        let (a, b) = (i128::from(a), i128::from(b));
                        let exact = match how {
                            Arithmetic::Add => a + b,
                            Arithmetic::Subtract => a - b,
                            Arithmetic::Multiply => a * b,
                            Arithmetic::Divide => a.checked_div(b)?,
                            Arithmetic::Remainder => a.checked_rem(b)?,
                        };
                        Value::Int(exact.clamp(i64::MIN.into(), i64::MAX.into()) as i64)
                    }
                    (a, b) => {
                        let (a, b) = (float(&a)?, float(&b)?);
                        Value::Float(match how {
                            Arithmetic::Add => a + b,
                            Arithmetic::Subtract => a - b,
                            Arithmetic::Multiply => a * b,
                            Arithmetic::Divide => a / b,
                            Arithmetic::Remainder => a % b,
                        })
                    }
                }
            }
            Form::Call(function, arguments) => {
                let mut values = Vec::new();
                for argument in arguments {
                    values.push(self.walk(argument)?);
                }
                match (function, &values[..]) {
                    (Function::Abs, [Value::Int(v)]) => Value::Int(v.saturating_abs()),
                    (Function::Abs, [Value::Float(v)]) => Value::Float(v.abs()),
                    (Function::Min, [Value::Int(a), Value::Int(b)]) => Value::Int(*a.min(b)),
                    (Function::Max, [Value::Int(a), Value::Int(b)]) => Value::Int(*a.max(b)),
                    (Function::Min, [a, b]) => Value::Float(float(a)?.min(float(b)?)),
                    (Function::Max, [a, b]) => Value::Float(float(a)?.max(float(b)?)),
                    (Function::Len, [Value::Text(v)]) => Value::Int(v.len() as i64),
                    (Function::Len, [Value::Bytes(v)]) => Value::Int(v.len() as i64),
                    (Function::StartsWith, [Value::Text(a), Value::Text(b)]) => {
                        Value::Bool(a.starts_with(b.as_str()))
                    }
                    (Function::EndsWith, [Value::Text(a), Value::Text(b)]) => {
                        Value::Bool(a.ends_with(b.as_str()))
                    }
                    (Function::Contains, [Value::Text(a), Value::Text(b)]) => {
                        Value::Bool(a.contains(b.as_str()))
                    }
                    _ => return None,
                }
            }
        })
    }
}

fn number() -> impl Strategy<Value = Value> {
    prop_oneof![
        (-3i64..4).prop_map(Value::Int),
        prop_oneof![Just(i64::MIN), Just(i64::MAX)].prop_map(Value::Int),
        (-3i64..4).prop_map(|v| Value::Float(v as f64 / 2.0)),
        any::<f64>()
            .prop_filter("a literal", |v| v.is_finite())
            .prop_map(Value::Float),
    ]
}

fn word() -> impl Strategy<Value = String> {
    prop_oneof![Just(String::new()), "[ab]{1,3}", "[a\"\\\\\n\té]{1,2}"]
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<bool>().prop_map(Value::Bool),
        number(),
        word().prop_map(Value::Text),
    ]
}

/// Names of fields, attributes and states; the last is nowhere, others are not plain.
const NAMES: [&str; 7] = ["b", "i", "f", "t", "r-w", "event", "none"];

fn read() -> impl Strategy<Value = Read> {
    let name = || (0..NAMES.len()).prop_map(|n| NAMES[n].to_owned());
    prop_oneof![
        name().prop_map(Read::Field),
        name().prop_map(Read::Attribute),
        name().prop_map(Read::State),
    ]
}

fn boxed(form: impl Strategy<Value = Form> + 'static) -> BoxedStrategy<Node> {
    form.prop_map(|form| Node { at: 0, form }).boxed()
}

/// Variables are 0: bool, 1: int, 2: float, 3: text.
fn numeric(depth: u32) -> BoxedStrategy<Node> {
    let leaf = boxed(prop_oneof![
        number().prop_map(Form::Literal),
        read().prop_map(Form::Read),
        (1..3u8).prop_map(Form::Variable),
        (1..4usize).prop_map(|n| Form::Read(Read::Event(Property::ALL[n].0))),
    ]);
    if depth == 0 {
        return leaf;
    }
    let inner = numeric(depth - 1);
    let pair = (inner.clone(), inner.clone());
    let call = (0..3usize, pair.clone()).prop_map(|(n, (a, b))| match n {
        0 => Form::Call(Function::Abs, vec![a]),
        1 => Form::Call(Function::Min, vec![a, b]),
        _ => Form::Call(Function::Max, vec![a, b]),
    });
    let minus = inner.prop_map(|of| Form::Unary(Unary::Minus, Box::new(of)));
    let binary = (8..13usize, pair)
        .prop_map(|(n, (a, b))| Form::Binary(Binary::ALL[n].0, Box::new(a), Box::new(b)));
    let len = textual().prop_map(|of| Form::Call(Function::Len, vec![of]));
    prop_oneof![2 => leaf, 3 => boxed(binary), 1 => boxed(call), 1 => boxed(minus), 1 => boxed(len)]
        .boxed()
}

fn textual() -> BoxedStrategy<Node> {
    boxed(prop_oneof![
        word().prop_map(|text| Form::Literal(Value::Text(text))),
        read().prop_map(Form::Read),
        Just(Form::Variable(3)),
        Just(Form::Read(Read::Event(Property::Type))),
    ])
}

fn logical(depth: u32) -> BoxedStrategy<Node> {
    let pair = (numeric(2), numeric(2));
    let compare = |n: usize, a, b| Form::Binary(Binary::ALL[n].0, Box::new(a), Box::new(b));
    let leaf = prop_oneof![
        4 => boxed((2..8usize, pair).prop_map(move |(n, (a, b))| compare(n, a, b))),
        2 => boxed((2..8usize, textual(), textual()).prop_map(move |(n, a, b)| compare(n, a, b))),
        2 => boxed((3..6usize, textual(), textual())
            .prop_map(|(n, a, b)| Form::Call(Function::ALL[n].0, vec![a, b]))),
        1 => boxed(any::<bool>().prop_map(|v| Form::Literal(Value::Bool(v)))),
        1 => boxed(read().prop_map(Form::Has)),
        1 => boxed(read().prop_map(Form::Read)),
        1 => boxed(Just(Form::Variable(0))),
        1 => boxed((1..3u8, numeric(1)).prop_map(|(n, of)| Form::Set(n, Box::new(of)))),
        1 => boxed(textual().prop_map(|of| Form::Set(3, Box::new(of)))),
    ]
    .boxed();
    if depth == 0 {
        return leaf;
    }
    let inner = logical(depth - 1);
    let pair = (inner.clone(), inner.clone());
    prop_oneof![
        2 => leaf,
        4 => boxed((0..4usize, pair).prop_map(move |(n, (a, b))| compare(n, a, b))),
        1 => boxed(inner.clone().prop_map(|of| Form::Unary(Unary::Not, Box::new(of)))),
        1 => boxed(inner.prop_map(|of| Form::Set(0, Box::new(of)))),
    ]
    .boxed()
}

fn tree() -> impl Strategy<Value = Tree> {
    let first = (any::<bool>(), -2i64..3, -2i64..3, word());
    (first, logical(3)).prop_map(|((b, i, f, t), root)| Tree {
        variables: vec![
            ("vb".into(), Value::Bool(b)),
            ("vi".into(), Value::Int(i)),
            ("vf".into(), Value::Float(f as f64)),
            // One that a field is called, too.
            ("t".into(), Value::Text(t)),
        ],
        root,
    })
}

/// Attributes or states of the names, or none.
fn named() -> impl Strategy<Value = Vec<Option<Value>>> {
    vec(proptest::option::of(value()), NAMES.len() - 1)
}

/// What an event has of the names.
fn present(values: &[Option<Value>]) -> Vec<(&'static str, Value)> {
    let all = NAMES.iter().zip(values);
    all.filter_map(|(name, v)| Some((*name, v.clone()?)))
        .collect()
}

fn kind() -> EventType {
    let fields = [
        ("b", FieldKind::Bool),
        ("i", FieldKind::I64),
        ("f", FieldKind::F32),
        ("t", FieldKind::Text(4)),
        ("r-w", FieldKind::Bytes(2)),
        ("event", FieldKind::U16),
    ];
    EventType::new("ab", 1, fields).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn instructions_do_what_the_tree_says(
        tree in tree(),
        events in vec((named(), vec(prop_oneof![Just(0u8), Just(b'a'), any::<u8>()], 21..24)), 1..4),
        states in named(),
    ) {
        let source = tree.to_string();
        prop_assume!(source.len() <= MAX_SOURCE_BYTES);
        let parsed = match parser::parse(&source) {
            Ok(parsed) => parsed,
            // Too much of what is bounded is all that can be wrong.
            Err(error) => {
                prop_assert_eq!(error.code(), "filter-too-large", "{}: {}", source, error);
                return Ok(());
            }
        };
        prop_assert_eq!(&parsed, &tree, "{}", source);
        let mut filter = match SinkFilter::compile(&source) {
            Ok(filter) => filter,
            Err(error) => {
                let known = ["filter-too-large", "filter-kind"].contains(&error.code());
                prop_assert!(known, "{}: {}", source, error);
                return Ok(());
            }
        };
        for (n, instruction) in filter.code.instructions.iter().enumerate() {
            if let Instruction::And(there) | Instruction::Or(there) = instruction {
                let there = usize::from(*there);
                prop_assert!(there > n && there <= filter.code.instructions.len());
            }
        }
        let mut state = State::default();
        for (name, value) in present(&states) {
            state.set(name, value).unwrap();
        }
        let kind = kind();
        let mut variables: Vec<Value> = tree.variables.iter().map(|v| v.1.clone()).collect();
        for (attributes, payload) in &events {
            let bytes = encode(&kind, &present(attributes), payload);
            let event = EventRef::parse(&bytes, &kind).unwrap();
            let mut walk = Walk { event: &event, state: &state, variables };
            let expected = walk.walk(&tree.root).and_then(boolean);
            variables = walk.variables;
            let failed = filter.counters.failed;
            let passes = filter.passes(&event, &kind, &state);
            let decided = (filter.counters.failed == failed).then_some(passes);
            if decided.is_none() && filter.failure == Some(Failure::Work) {
                return Ok(());
            }
            prop_assert_eq!(decided, expected, "{}", source);
            // As they are written: NaN is not itself.
            prop_assert_eq!(format!("{:?}", filter.variables), format!("{variables:?}"));
        }
    }

    #[test]
    fn no_source_is_too_strange(words in vec(prop_oneof![
        "[a-z@`\"'(){}=<>!&|;,.0-9 \\\\é-]{1,4}",
        proptest::sample::select(vec![
            "var x = 1;", "x", "cpu", "@a", "sink.", "event.", "size", "has(", "set(x,", "min(", "len(",
            "contains(", ")", ")", "&&", "||", "==", "<", "+", "-", "*", "/", "%", "!", "1", "0.5", "\"a\"",
            "true", ",", "(",
        ]).prop_map(str::to_owned),
    ], 0..60), bytes: Vec<u8>) {
        let source = words.join(" ");
        match SinkFilter::compile(&source) {
            Err(error) => prop_assert!(error.line == 1 && error.column <= source.len() + 1),
            Ok(mut filter) => {
                let written = parser::parse(&source).unwrap();
                prop_assert_eq!(&parser::parse(&written.to_string()).unwrap(), &written);
                let kind = EventType::raw("t").unwrap();
                let bytes = encode(&kind, &[], &bytes);
                let event = EventRef::parse(&bytes, &kind).unwrap();
                filter.passes(&event, &kind, &State::default());
            }
        }
    }
}
