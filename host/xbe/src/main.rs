//! `xbe`, the client of `xbed`: runs jobs in virtual machines, watches them, and gets into them.

#![cfg_attr(test, allow(clippy::unwrap_used))]
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod anywhere;
mod cache;
mod check;
mod cli;
mod doctor;
mod document;
mod error;
mod exec;
mod exit;
mod export;
mod files;
mod follow;
mod generate;
mod pki;
mod ports;
mod remote;
mod reserve;
mod run;
mod signals;
mod ssh;
mod tasks;
mod term;
mod units;

use std::cell::OnceCell;
use std::process::ExitCode;

use clap::Parser;
use serde_json::json;
use xbee_api::chain;
use xbee_api::client::Client;

use cli::{Cli, Command};
use error::Error;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.command.json();
    match start(&cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) if error.is_closed_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            if json {
                term::raw_note(json!({ "code": error.code(), "message": chain(&error) }));
            } else {
                term::note(term::clean(&chain(&error)));
            }
            ExitCode::from(exit::FAILED)
        }
    }
}

fn start(cli: &Cli) -> Result<u8, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::System {
            action: "start the runtime",
            source,
        })?;
    let result = runtime.block_on(command(cli));
    // A read of standard input may be under way for ever.
    runtime.shutdown_background();
    result
}

async fn command(cli: &Cli) -> Result<u8, Error> {
    let opened = OnceCell::new();
    let client = || match opened.get() {
        Some(client) => Ok(client),
        None => remote::client(cli).map(|client| opened.get_or_init(|| client)),
    };
    let result = perform(cli, client).await;
    if let Some(client) = opened.get() {
        client.close().await;
    }
    result
}

async fn perform<'a>(
    cli: &Cli,
    client: impl Fn() -> Result<&'a Client, Error>,
) -> Result<u8, Error> {
    match &cli.command {
        Command::Run(args) if args.print_jsdl => run::print_jsdl(args),
        Command::Run(args) => run::run(client()?, args).await,
        Command::Submit(args) if args.anywhere => anywhere::submit(cli, client()?, args).await,
        Command::Submit(args) => run::submit(client()?, args).await,
        Command::Reserve(args) => reserve::reserve(client()?, args).await,
        Command::Confirm(args) => reserve::confirm(client()?, args).await,
        Command::Start(args) => reserve::start(client()?, args).await,
        Command::Cancel(args) => reserve::cancel(client()?, args).await,
        Command::Status(args) => tasks::status(client()?, args).await,
        Command::Watch(args) => tasks::watch(client()?, args).await,
        Command::Logs(args) => tasks::logs(client()?, args).await,
        Command::Fetch(args) => files::fetch_command(client()?, args).await,
        Command::Terminate(args) => tasks::terminate(client()?, args).await,
        Command::Ps(args) => tasks::ps(client()?, args).await,
        Command::Rm(args) => tasks::rm(client()?, args).await,
        Command::Exec(args) => exec::exec(client()?, args).await,
        Command::Ssh(args) => {
            let client = client()?;
            ssh::ssh(client, args, &remote::environment(cli, client)?).await
        }
        Command::Check(args) if args.host => check::check(args, Some(client()?)).await,
        Command::Check(args) => check::check(args, None).await,
        Command::Export(args) => export::export(client()?, args).await,
        Command::Host(args) => tasks::host(client()?, args).await,
        Command::Cache(args) => cache::cache(client()?, args).await,
        Command::Pki(args) => pki::pki(args),
        Command::Doctor(args) => doctor::doctor(cli, args).await,
        Command::Completions { shell } => generate::completions(*shell),
        Command::Man { dir } => generate::man(dir),
        Command::Proxy { task, port } => exec::proxy(client()?, task, *port).await,
    }
}
