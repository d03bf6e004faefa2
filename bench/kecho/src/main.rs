//! `make bench-kecho`: event channels against NATS, Redis, Mosquitto, ZeroMQ, zenoh and iceoryx2.
//!
//! `bench-kecho all ROUNDS DOCS` prints the section Event channels of bench/results.md and writes its charts to DOCS. Each publisher and each subscriber is a process
//! of its own: this program with a role as its argument. The systems take turns in every round; what counts are the
//! ratios of one round.

mod aims;
mod crew;
mod event;
mod fanout;
mod filters;
mod iceoryx;
mod kecho;
mod latency;
mod mosquitto;
mod nats;
mod nats_async;
mod numbers;
mod paper;
mod redis;
mod redis_rs;
mod report;
mod role;
mod rounds;
mod spinners;
mod stream;
mod svg;
mod system;
mod tcp;
mod zenoh;
mod zeromq;

use std::process::ExitCode;

use system::System;

/// All, in the order of the tables; the first is what the others are compared with.
const SYSTEMS: &[&dyn System] = &[
    &tcp::Tcp,
    &nats::Nats,
    &nats_async::NatsAsync,
    &redis::Redis,
    &redis_rs::RedisRs,
    &mosquitto::Mosquitto,
    &zeromq::ZeroMq::Tcp,
    &zeromq::ZeroMq::Ipc,
    &zenoh::Zenoh,
    &iceoryx::Iceoryx::Events,
    &iceoryx::Iceoryx::Polling,
    &kecho::Kecho::Tcp,
    &kecho::Kecho::Shared,
    &kecho::Kecho::Polling,
    &kecho::Kecho::Process,
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments.as_slice() {
        ["registry", port] => kecho::serve(port),
        ["spin"] => spinners::spin(),
        ["all", rounds, docs] => report::all(rounds, docs.as_ref()),
        ["latency", rounds, names @ ..] => report::latency_only(rounds, names),
        ["fanout", rounds, names @ ..] => report::fanout_only(rounds, names),
        ["paper", rounds] => report::paper_only(rounds),
        [role, name, rest @ ..] => match SYSTEMS.iter().find(|system| system.name() == *name) {
            Some(system) => role::run(role, *system, rest),
            None => Err(format!("no system {name}").into()),
        },
        _ => {
            eprintln!(
                "usage: bench-kecho all ROUNDS DOCS | bench-kecho latency ROUNDS [SYSTEM...] | bench-kecho fanout ROUNDS [SYSTEM...] | bench-kecho paper ROUNDS"
            );
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-kecho: {}", role::text_of(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
