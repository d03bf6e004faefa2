//! `kecho`: event channels from the command line.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use xbee_kecho::{Address, Channel, ChannelOptions, Config, Error, Node, Policy};

mod publish;
mod security;
mod show;
mod signal;
mod subscribe;

use security::{Security, complain};

/// Events between guests and hosts: publish, subscribe, see who is there.
#[derive(Debug, Parser)]
#[command(name = "kecho", version)]
struct Arguments {
    /// The registry that knows the channels.
    #[arg(
        long,
        global = true,
        env = "KECHO_REGISTRY",
        default_value = "tcp:[::1]:7400"
    )]
    registry: Address,
    /// Where else to listen: tcp:[IPV6]:PORT or vsock:CID:PORT; can be given several times.
    #[arg(long, global = true)]
    listen: Vec<Address>,
    #[command(flatten)]
    security: Security,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Creates a channel, and keeps it until a signal comes: it is there as long as anybody is in it.
    Create {
        /// Its name.
        channel: String,
        #[command(flatten)]
        options: NewChannel,
    },
    /// Destroys a channel for all who are in it.
    Destroy {
        /// Its name.
        channel: String,
    },
    /// Submits events: each message, or each line of the standard input.
    Pub(publish::Publish),
    /// Prints the payloads of a channel's events, a line each.
    Sub(subscribe::Subscribe),
    /// Lists the channels.
    List,
    /// Tells who is in a channel and how its events fare.
    Status {
        /// Its name.
        channel: String,
    },
}

/// A channel that may have to be created.
#[derive(Debug, Args)]
struct NewChannel {
    /// What happens to a sink that does not keep up and has no policy of its own.
    #[arg(long, value_enum, default_value = "block")]
    policy: SlowSink,
    /// How much a source holds for sinks that are behind, in bytes.
    #[arg(long, value_name = "BYTES")]
    log_bytes: Option<usize>,
}

impl NewChannel {
    fn options(&self) -> ChannelOptions {
        ChannelOptions {
            policy: self.policy.into(),
            log_bytes: self.log_bytes,
            ..ChannelOptions::default()
        }
    }
}

/// A policy for slow sinks.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum SlowSink {
    /// Who submits waits for it.
    Block,
    /// It loses the oldest events.
    DropOldest,
    /// It is disconnected.
    Disconnect,
}

impl From<SlowSink> for Policy {
    fn from(policy: SlowSink) -> Policy {
        match policy {
            SlowSink::Block => Policy::Block,
            SlowSink::DropOldest => Policy::DropOldest,
            SlowSink::Disconnect => Policy::Disconnect,
        }
    }
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// Something about a channel.
    #[error(transparent)]
    Channel(#[from] Error),
    /// An event that was not submitted.
    #[error("line {line}: not submitted")]
    Submit {
        /// Which one, counted from 1.
        line: u64,
        /// Why.
        #[source]
        source: xbee_kecho::SubmitError,
    },
    /// A type of events that is none.
    #[error(transparent)]
    Type(#[from] xbee_kecho::TypeError),
    /// The standard input or output.
    #[error("cannot {what}")]
    Stream {
        /// What.
        what: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A line of the input that is too long.
    #[error(
        "line {line} is longer than {limit} bytes: split it, or give the whole input with --whole"
    )]
    Line {
        /// Which one, counted from 1.
        line: u64,
        /// How long it may be.
        limit: usize,
    },
    /// An input that is too long for one event.
    #[error("the input is longer than {0} bytes: split it; nothing was submitted")]
    Whole(usize),
    /// Not as many sinks as asked for.
    #[error("{there} sinks are there after {seconds} s, not {wanted}: nothing was submitted")]
    Sinks {
        /// How many are there.
        there: usize,
        /// How many there should be.
        wanted: usize,
        /// How long was waited.
        seconds: f64,
    },
    /// The channel's end came before the events that were asked for.
    #[error("the channel has ended after {got} of {wanted} events")]
    Ended {
        /// How many came.
        got: u64,
        /// How many were asked for.
        wanted: u64,
    },
    /// No event came in time.
    #[error("no event in {0} s")]
    Silence(f64),
}

fn open(node: &Node, channel: &str, create: bool, new: &NewChannel) -> Result<Channel, Error> {
    match create {
        true => node.open_or_create(channel, new.options()),
        false => node.open(channel),
    }
}

/// How long something is waited for that is given in seconds.
fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>().map(Duration::try_from_secs_f64) {
        Ok(Ok(time)) => Ok(time),
        _ => Err("expected a number of seconds".to_owned()),
    }
}

fn run(arguments: Arguments) -> Result<ExitCode, Failure> {
    let node = Node::start(Config {
        registry: Some(arguments.registry),
        listen: arguments.listen,
        tls: arguments.security.tls(),
        plaintext: arguments.security.plaintext,
        strict: arguments.security.strict,
        guests: arguments.security.guests,
        ..Config::default()
    })?;
    let done = command(&node, arguments.command);
    // Whatever came of it, the others are told that this node goes.
    node.shutdown();
    done
}

fn command(node: &Node, command: Command) -> Result<ExitCode, Failure> {
    let done = match command {
        Command::Create { channel, options } => {
            let channel = node.create(&channel, options.options())?;
            eprintln!("kecho: the channel '{}' is there", channel.name());
            let code = signal::wait()?;
            channel.leave();
            code
        }
        Command::Destroy { channel } => {
            node.open(&channel)?.destroy()?;
            ExitCode::SUCCESS
        }
        Command::Pub(command) => command.run(node)?,
        Command::Sub(command) => command.run(node)?,
        Command::List => show::list(node)?,
        Command::Status { channel } => show::status(node, &channel)?,
    };
    Ok(done)
}

fn main() -> ExitCode {
    run(Arguments::parse()).unwrap_or_else(|failure| {
        complain("kecho", &failure);
        ExitCode::FAILURE
    })
}
