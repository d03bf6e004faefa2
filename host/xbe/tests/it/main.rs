//! Tests of `xbe` as its users see it: standard output, standard error, exit code.

#![allow(clippy::unwrap_used)]

mod anywhere;
mod check;
mod cli;
mod export;
mod harness;
mod run;
mod server;
mod tasks;
mod terminal;
mod tunnels;
