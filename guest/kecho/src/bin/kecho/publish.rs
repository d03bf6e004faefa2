//! `kecho pub`.

use std::io::{BufRead, Read};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use xbee_kecho::{EventType, FieldKind, Node, Source, Submission, Value};

use crate::{Failure, NewChannel, open, seconds};

/// The longest event, in bytes.
const MAX_BYTES: usize = 1 << 20;

/// What to submit.
#[derive(Debug, Args)]
pub struct Publish {
    /// The channel.
    channel: String,
    /// Payloads, an event each; without any, and without fields, each line of the standard input is one.
    messages: Vec<String>,
    /// The whole standard input is one event.
    #[arg(long, conflicts_with = "messages")]
    whole: bool,
    /// The name of the events' type.
    #[arg(long = "type", value_name = "NAME", default_value = "text")]
    kind: String,
    /// The type's version.
    #[arg(long, default_value_t = 0)]
    version: u16,
    /// A field of the type at the payload's beginning, such as load:f64=0.5; can be given several times.
    /// Kinds: bool, i8 to i64, u8 to u64, f32, f64, text(BYTES).
    #[arg(long = "field", value_name = "NAME:KIND=VALUE", value_parser = field)]
    fields: Vec<(String, FieldKind, Value)>,
    /// An attribute of each event, such as host=a or build:text=007; can be given several times.
    /// Kinds: bool, i64, f64, text. Without one, what is true, false or a number is that, and everything else text.
    #[arg(long = "attribute", short, value_name = "NAME[:KIND]=VALUE", value_parser = attribute)]
    attributes: Vec<(String, Value)>,
    /// Waits until so many sinks are there.
    #[arg(long, value_name = "SINKS", default_value_t = 0)]
    wait: usize,
    /// How long to wait for them, in seconds.
    #[arg(long, value_parser = seconds, default_value = "30")]
    timeout: Duration,
    /// Creates the channel if there is none.
    #[arg(long)]
    create: bool,
    #[command(flatten)]
    new: NewChannel,
}

fn value(text: &str) -> Value {
    match (text, text.parse::<i64>(), text.parse::<f64>()) {
        ("true" | "false", ..) => Value::Bool(text == "true"),
        (_, Ok(number), _) => Value::Int(number),
        (_, _, Ok(number)) if text.starts_with(|c: char| c.is_ascii_digit() || c == '-') => {
            Value::Float(number)
        }
        _ => Value::Text(text.to_owned()),
    }
}

fn attribute(text: &str) -> Result<(String, Value), String> {
    let (name, text) = text
        .split_once('=')
        .ok_or("expected NAME=VALUE or NAME:KIND=VALUE")?;
    // No name has a colon.
    let Some((name, kind)) = name.split_once(':') else {
        return Ok((name.to_owned(), value(text)));
    };
    let value = match (kind, value(text)) {
        ("text", _) => Value::Text(text.to_owned()),
        ("bool", value @ Value::Bool(_)) | ("i64", value @ Value::Int(_)) => value,
        ("f64", Value::Int(number)) => Value::Float(number as f64),
        ("f64", value @ Value::Float(_)) => value,
        ("bool" | "i64" | "f64", _) => return Err(format!("'{text}' is no {kind}")),
        _ => {
            return Err(format!(
                "'{kind}' is no kind of attribute: expected bool, i64, f64 or text"
            ));
        }
    };
    Ok((name.to_owned(), value))
}

fn field(text: &str) -> Result<(String, FieldKind, Value), String> {
    let parts = text.split_once(':');
    let parts = parts.and_then(|(name, rest)| Some((name, rest.split_once('=')?)));
    let (name, (kind, text)) = parts.ok_or("expected NAME:KIND=VALUE")?;
    let length = kind.strip_prefix("text(").and_then(|k| k.strip_suffix(')'));
    let kind = match (kind, length.map(str::parse)) {
        (_, Some(Ok(bytes))) => FieldKind::Text(bytes),
        ("bool", _) => FieldKind::Bool,
        ("i8", _) => FieldKind::I8,
        ("i16", _) => FieldKind::I16,
        ("i32", _) => FieldKind::I32,
        ("i64", _) => FieldKind::I64,
        ("u8", _) => FieldKind::U8,
        ("u16", _) => FieldKind::U16,
        ("u32", _) => FieldKind::U32,
        ("u64", _) => FieldKind::U64,
        ("f32", _) => FieldKind::F32,
        ("f64", _) => FieldKind::F64,
        _ => {
            return Err(format!(
                "'{kind}' is no kind of field: expected bool, i8 to i64, u8 to u64, f32, f64 or text(BYTES)"
            ));
        }
    };
    let value = match (kind, value(text)) {
        (FieldKind::Text(_), _) => Value::Text(text.to_owned()),
        (FieldKind::F32 | FieldKind::F64, Value::Int(number)) => Value::Float(number as f64),
        (_, value) => value,
    };
    Ok((name.to_owned(), kind, value))
}

/// A line without its end; `None` at the end of the input.
fn line(input: &mut impl BufRead, number: u64, out: &mut Vec<u8>) -> Result<Option<()>, Failure> {
    let failed = |source| Failure::Stream {
        what: "read the standard input",
        source,
    };
    let read = Read::take(input, MAX_BYTES as u64 + 1).read_until(b'\n', out);
    match read.map_err(failed)? {
        0 => return Ok(None),
        _ if out.ends_with(b"\n") => drop(out.pop()),
        _ => {}
    }
    if out.len() > MAX_BYTES {
        return Err(Failure::Line {
            line: number,
            limit: MAX_BYTES,
        });
    }
    Ok(Some(()))
}

impl Publish {
    /// Submits.
    pub fn run(&self, node: &Node) -> Result<ExitCode, Failure> {
        let fields = self.fields.iter();
        let layout = fields.clone().map(|(name, kind, _)| (name.clone(), *kind));
        let kind = EventType::new(self.kind.clone(), self.version, layout)?;
        let values: Vec<Value> = fields.map(|(_, _, value)| value.clone()).collect();
        let fixed = kind.payload(&values)?;
        let channel = open(node, &self.channel, self.create, &self.new)?;
        let source = channel.source()?;
        if self.wait > 0 && !source.wait_for_sinks(self.wait, self.timeout) {
            return Err(Failure::Sinks {
                there: source.sinks(),
                wanted: self.wait,
                seconds: self.timeout.as_secs_f64(),
            });
        }
        let attributes = self.attributes.iter();
        let attributes: Vec<(&str, Value)> =
            attributes.map(|(n, v)| (n.as_str(), v.clone())).collect();
        let mut submitted = 0;
        let mut payload = fixed.clone();
        let mut submit = |source: &Source, payload: &[u8]| {
            submitted += 1;
            let event = Submission {
                kind: &kind,
                attributes: &attributes,
                payload,
            };
            let done = source.submit(&event);
            done.map_err(|source| Failure::Submit {
                line: submitted,
                source,
            })
        };
        let mut input = std::io::stdin().lock();
        if self.whole {
            let limit = MAX_BYTES as u64 + 1;
            let read = Read::take(&mut input, limit).read_to_end(&mut payload);
            let read = read.map_err(|source| Failure::Stream {
                what: "read the standard input",
                source,
            })?;
            if read > MAX_BYTES {
                return Err(Failure::Whole(MAX_BYTES));
            }
            submit(&source, &payload)?;
        } else if self.messages.is_empty() && self.fields.is_empty() {
            let mut number = 1;
            while line(&mut input, number, &mut payload)?.is_some() {
                submit(&source, &payload)?;
                payload.clear();
                number += 1;
            }
        } else if self.messages.is_empty() {
            submit(&source, &payload)?;
        }
        for message in &self.messages {
            payload.truncate(fixed.len());
            payload.extend_from_slice(message.as_bytes());
            submit(&source, &payload)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
