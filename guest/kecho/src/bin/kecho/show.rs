//! `kecho list` and `kecho status`.

use std::io::Write;
use std::process::ExitCode;

use xbee_kecho::{Node, SourceStatus};

use crate::Failure;

fn print(text: &str) -> Result<ExitCode, Failure> {
    let written = std::io::stdout().lock().write_all(text.as_bytes());
    written.map_err(|source| Failure::Stream {
        what: "write",
        source,
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The names of the channels, a line each.
pub fn list(node: &Node) -> Result<ExitCode, Failure> {
    let names = node.channels()?.into_iter();
    print(&names.map(|name| name + "\n").collect::<String>())
}

fn source(source: &SourceStatus) -> String {
    let ways = source.sinks.iter();
    let ways: Vec<String> = ways.map(|(way, n)| format!("{n} by {way}")).collect();
    let ways = match ways.is_empty() {
        true => "none".to_owned(),
        false => ways.join(", "),
    };
    let counters = &source.counters;
    format!(
        "  source {}\n    sinks      {ways}\n    submitted  {}\n    filtered   {}\n    dropped    {}\n    expelled   {}\n    waited     {}\n    behind     {} bytes\n",
        source.id,
        counters.submitted,
        counters.filtered,
        counters.dropped,
        counters.expelled,
        counters.waited,
        source.behind,
    )
}

/// Who is in a channel.
pub fn status(node: &Node, channel: &str) -> Result<ExitCode, Failure> {
    let status = node.status(channel)?;
    let mut out = format!("channel {channel}, epoch {}\n", status.epoch);
    for node in &status.nodes {
        let contact = match node.address.node == status.contact.node {
            true => ", the contact",
            false => "",
        };
        out += &format!("node {}{contact}\n", node.address);
        out += &format!("  sinks    {}\n", node.sinks);
        match &node.sources {
            Some(sources) => out.extend(sources.iter().map(source)),
            None => out += "  it does not answer\n",
        }
    }
    print(&out)
}
