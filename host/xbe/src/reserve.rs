//! `reserve`, `confirm`, `start`, `cancel`: commands on reservations.

use xbee_api::client::Client;
use xbee_api::{ConfirmRequest, ReserveRequest, TaskStatus, TicketRequest};

use crate::cli;
use crate::error::Error;
use crate::files::{self, Files};
use crate::run;
use crate::tasks::now_ms;
use crate::term::{self, Progress};
use crate::units::Moment;

/// `reserve`.
pub async fn reserve(client: &Client, args: &cli::Reserve) -> Result<u8, Error> {
    let from_ms = args.from.map(|from| match from {
        Moment::At(at_ms) => at_ms,
        Moment::In(seconds) => now_ms().saturating_add(seconds.saturating_mul(1000)),
    });
    let request = ReserveRequest {
        name: args.name.clone(),
        from_ms,
        duration_s: args.duration,
        cpus: args.cpus,
        memory_bytes: args.memory,
        disk_bytes: args.disk.unwrap_or(0),
    };
    let reserved = client.reserve(&request).await?;
    if args.json.json {
        term::json(&reserved)?;
        return Ok(0);
    }
    term::out(&reserved.ticket)?;
    if let Some(held) = &reserved.task.reservation {
        term::note(format_args!(
            "task {}, reserved from {} to {}",
            reserved.task.id, held.from, held.until
        ));
    }
    Ok(0)
}

/// `confirm`.
pub async fn confirm(client: &Client, args: &cli::Confirm) -> Result<u8, Error> {
    run::check_ports(client, &args.job)?;
    let mut request = run::request(&args.job)?;
    let files = Files::of(client, &request);
    let progress = Progress::new(!args.json.json);
    files.send(client, &mut request, &progress).await?;
    let request = ConfirmRequest {
        ticket: args.ticket.clone(),
        request,
        start: !args.no_start,
    };
    match client.confirm(&request).await {
        Ok(task) => tell(&task, &args.json),
        Err(error) => {
            files::take_back(client, &request.request.uploads).await;
            Err(error.into())
        }
    }
}

/// `start`.
pub async fn start(client: &Client, args: &cli::Ticket) -> Result<u8, Error> {
    tell(&client.start(&request(args)).await?, &args.json)
}

/// `cancel`.
pub async fn cancel(client: &Client, args: &cli::Ticket) -> Result<u8, Error> {
    tell(&client.cancel(&request(args)).await?, &args.json)
}

fn request(args: &cli::Ticket) -> TicketRequest {
    TicketRequest {
        ticket: args.ticket.clone(),
    }
}

fn tell(task: &TaskStatus, json: &cli::Json) -> Result<u8, Error> {
    if json.json {
        term::json(task)?;
    } else {
        term::out(task.id)?;
    }
    Ok(0)
}
