//! `kecho sub`.

use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Args;
use serde_json::{Map, Value as Json, json};
use xbee_kecho::value::ValueRef;
use xbee_kecho::{Batch, Error, EventRef, Node, SinkOptions, TypeSelector};

use crate::{Failure, NewChannel, SlowSink, complain, open, seconds, signal};

/// The most events that are printed before the output is flushed.
const BATCH: usize = 1024;

/// What to print.
#[derive(Debug, Args)]
pub struct Subscribe {
    /// The channel.
    channel: String,
    /// A type of events to take, NAME or NAME:VERSION; can be given several times. Without any: all.
    #[arg(long = "type", value_name = "NAME[:VERSION]", value_parser = selector)]
    types: Vec<TypeSelector>,
    /// A filter to place at the sources, such as 'load < 0.5 && @host == "a"'.
    #[arg(long, value_name = "EXPRESSION")]
    filter: Option<String>,
    /// Prints each event as a line of JSON, with all that is in it.
    #[arg(long)]
    json: bool,
    /// Ends after so many events.
    #[arg(long, value_name = "EVENTS")]
    count: Option<u64>,
    /// Ends when no event has come for so many seconds.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
    /// What happens when this sink does not keep up, if not what the channel says.
    #[arg(long, value_enum)]
    slow: Option<SlowSink>,
    /// Creates the channel if there is none.
    #[arg(long)]
    create: bool,
    #[command(flatten)]
    new: NewChannel,
}

fn selector(text: &str) -> Result<TypeSelector, String> {
    let (name, version) = match text.split_once(':') {
        Some((name, version)) => (
            name,
            Some(
                version
                    .parse()
                    .map_err(|_| "expected NAME or NAME:VERSION, a version from 0 to 65535")?,
            ),
        ),
        None => (text, None),
    };
    Ok(TypeSelector {
        name: name.to_owned(),
        version,
    })
}

fn bytes(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn value(value: ValueRef<'_>) -> Json {
    match value {
        ValueRef::Bool(v) => v.into(),
        ValueRef::Int(v) => v.into(),
        ValueRef::Float(v) => v.into(),
        ValueRef::Text(v) => v.into(),
        ValueRef::Bytes(v) => json!({ "hex": bytes(v) }),
    }
}

fn json(event: &EventRef<'_>) -> Json {
    let kind = event.kind();
    let mut attributes = Map::new();
    for (name, found) in event.attributes() {
        // As filters see it: the first of a name.
        attributes.entry(name).or_insert_with(|| value(found));
    }
    let fields = kind.fields().iter();
    let fields = fields.map(|f| {
        let found = event.field(&f.name).map_or(Json::Null, value);
        (f.name.clone(), found)
    });
    let rest = &event.payload()[kind.size()..];
    let payload = match std::str::from_utf8(rest) {
        Ok(text) => text.into(),
        Err(_) => json!({ "hex": bytes(rest) }),
    };
    json!({
        "type": kind.name(),
        "version": kind.version(),
        "sequence": event.sequence(),
        "attributes": attributes,
        "fields": fields.collect::<Map<_, _>>(),
        "payload": payload,
    })
}

impl Subscribe {
    fn print(&self, event: &EventRef<'_>, out: &mut impl Write) -> std::io::Result<()> {
        match self.json {
            true => writeln!(out, "{}", json(event)),
            false => {
                out.write_all(&event.payload()[event.kind().size()..])?;
                out.write_all(b"\n")
            }
        }
    }

    /// Prints what comes.
    pub fn run(&self, node: &Node) -> Result<ExitCode, Failure> {
        let channel = open(node, &self.channel, self.create, &self.new)?;
        let sink = channel.sink(SinkOptions {
            types: self.types.clone(),
            filter: self.filter.clone(),
            policy: self.slow.map(Into::into),
            ..SinkOptions::default()
        })?;
        // Leaving the channel wakes the sink, with nothing lost that had come.
        let (channel, signalled) = (Mutex::new(Some(channel)), Arc::new(AtomicBool::new(false)));
        let asked = signalled.clone();
        let code = std::thread::spawn(move || {
            let code = signal::wait();
            asked.store(true, Ordering::SeqCst);
            let mut channel = channel.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(channel) = channel.take() {
                channel.leave();
            }
            code
        });
        let failed = |source| Failure::Stream {
            what: "write",
            source,
        };
        let mut out = std::io::BufWriter::new(std::io::stdout().lock());
        let mut batch = Batch::default();
        let mut got = 0;
        let ended = loop {
            let left = self.count.map_or(u64::MAX, |count| count - got);
            if left == 0 {
                break None;
            }
            let most = BATCH.min(usize::try_from(left).unwrap_or(BATCH));
            match sink.receive_batch_timeout(&mut batch, most, self.timeout) {
                Ok(()) => {}
                Err(error) => break Some(error),
            }
            if let (true, Some(limit)) = (batch.is_empty(), self.timeout) {
                return Err(Failure::Silence(limit.as_secs_f64()));
            }
            for event in batch.iter() {
                self.print(&event, &mut out).map_err(failed)?;
                got += 1;
            }
            out.flush().map_err(failed)?;
        };
        let dropped = sink.counters().dropped;
        if dropped > 0 {
            eprintln!("kecho: {dropped} events were dropped: this sink was too slow");
        }
        match ended {
            None => Ok(ExitCode::SUCCESS),
            Some(Error::Destroyed(_)) if signalled.load(Ordering::SeqCst) => {
                code.join().unwrap_or(Ok(ExitCode::FAILURE))
            }
            Some(error @ Error::Destroyed(_)) => match self.count {
                Some(wanted) => Err(Failure::Ended { got, wanted }),
                None => {
                    complain("kecho", &error);
                    Ok(ExitCode::SUCCESS)
                }
            },
            Some(error) => Err(error.into()),
        }
    }
}
