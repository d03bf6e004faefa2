//! `submit --anywhere`: a job goes to the host that can begin it soonest.
//!
//! The own `xbed` says which hosts there are, the best first. The job is submitted to them one after the other, by their own
//! API, until one has it: the next is asked only if it is certain that the one before has not got it.

use std::time::{Duration, Instant};

use serde::Serialize;
use uuid::Uuid;
use xbee_api::client::{self, Client};
use xbee_api::{Place, PlaceRequest, SubmitRequest, TaskStatus, chain};

use crate::cli::{self, Cli};
use crate::error::Error;
use crate::files::{self, Files};
use crate::ports::Ports;
use crate::remote;
use crate::run;
use crate::term::{self, Progress, note};

/// How often it is asked who can begin the job at once, where all that could have been filled up meanwhile.
const ROUNDS: usize = 3;
/// How long a host is asked that may have the job and does not say so.
const UNSURE: Duration = Duration::from_secs(30);
/// Time between two attempts.
const RETRY: Duration = Duration::from_millis(250);
/// Most hosts that are tried.
const MAX_HOSTS: usize = 64;

/// A job that a host has.
struct Placed {
    client: Client,
    task: TaskStatus,
    files: Files,
    ports: Ports,
}

/// What `--json` prints: a task, and where it is.
#[derive(Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    task: &'a TaskStatus,
    server: Option<&'a str>,
}

/// `submit --anywhere`.
///
/// # Errors
/// Nobody takes the job, or it is not known whether somebody has.
pub async fn submit(cli: &Cli, client: &Client, args: &cli::Submit) -> Result<u8, Error> {
    let request = run::request(&args.job)?;
    if !args.wait && !args.job.publish.is_empty() {
        return Err(Error::NobodyListens);
    }
    let progress = Progress::new(!args.json.json);
    let search = Search {
        cli,
        client,
        request,
        key: Uuid::new_v4(),
        progress,
    };
    let (place, placed) = search.place().await?;
    let server = place.server.as_deref();
    if args.json.json {
        let task = &placed.task;
        term::json(&Shown { task, server })?;
    } else {
        term::out(placed.task.id)?;
    }
    if let Some(server) = server {
        let host = term::clean(&place.host);
        let (server, id) = (term::clean(server), placed.task.id);
        note(format_args!(
            "on {host}: `xbe --server {server} status {id}`"
        ));
    }
    let Placed {
        client,
        task,
        files,
        ports,
    } = placed;
    let code = run::tell_and_wait(&client, task, files, ports, &search.progress, args.wait).await;
    client.close().await;
    code
}

/// A search for a host.
struct Search<'a> {
    cli: &'a Cli,
    client: &'a Client,
    request: SubmitRequest,
    key: Uuid,
    progress: Progress,
}

impl Search<'_> {
    async fn place(&self) -> Result<(Place, Placed), Error> {
        let mut asked = self.request.clone();
        Files::of(self.client, &asked).announce(&mut asked);
        if self.client.is_remote() {
            // They are listened on here.
            asked.publish.clear();
        }
        let mut refusals = vec![];
        let mut last = vec![];
        for _ in 0..ROUNDS {
            let answer = self.client.places(&asked).await?;
            if let Some(why) = &answer.note {
                note(format_args!("{}", term::clean(why)));
            }
            last = answer.places;
            last.truncate(MAX_HOSTS);
            let now: Vec<Place> = last.iter().filter(|place| place.at_once).cloned().collect();
            if now.is_empty() {
                break;
            }
            refusals.clear();
            for place in now {
                match self.try_at(&place, true).await? {
                    Ok(placed) => return Ok((place, placed)),
                    Err(why) => refusals.push(said(&place, &why)),
                }
            }
        }
        // It has to wait somewhere.
        for place in last {
            match self.try_at(&place, false).await? {
                Ok(placed) => return Ok((place, placed)),
                Err(why) => refusals.push(said(&place, &why)),
            }
        }
        Err(Error::NotPlaced { refusals })
    }

    /// The job there; or why that host has not got it.
    async fn try_at(&self, place: &Place, at_once: bool) -> Result<Result<Placed, Error>, Error> {
        let client = match &place.server {
            None => self.client.clone(),
            Some(server) => match remote::told(self.cli, self.client, server) {
                Ok(client) => client,
                Err(error) => return Ok(Err(error)),
            },
        };
        let mut request = self.request.clone();
        let ports = Ports::listen(&client, &mut request.publish).await?;
        let files = Files::of(&client, &request);
        match files.send(&client, &mut request, &self.progress).await {
            Ok(()) => {}
            Err(Error::Api(error)) => return Ok(Err(error.into())),
            Err(error) => return Err(error),
        }
        let request = PlaceRequest {
            key: self.key,
            at_once,
            request,
        };
        Ok(match self.ask(&client, place, request).await? {
            Ok(task) => Ok(Placed {
                client,
                task,
                files,
                ports,
            }),
            Err(error) => Err(error.into()),
        })
    }

    /// Asks a host to take the job until it is certain whether it has it.
    async fn ask(
        &self,
        client: &Client,
        place: &Place,
        mut request: PlaceRequest,
    ) -> Result<Result<TaskStatus, client::Error>, Error> {
        let mut unsure_since: Option<Instant> = None;
        loop {
            let error = match client.place(&request).await {
                Ok(task) => return Ok(Ok(task)),
                Err(error) => error,
            };
            let is_being_placed = error.code() == "placing";
            if unsure_since.is_none() && !is_being_placed && is_not_there(&error) {
                files::take_back(client, &request.request.uploads).await;
                return Ok(Err(error));
            }
            let since = *unsure_since.get_or_insert_with(Instant::now);
            let answers = matches!(error, client::Error::Refused { .. }) && !is_being_placed;
            if answers || since.elapsed() > UNSURE {
                return Err(Error::Unsure {
                    host: place.host.clone(),
                    server: place.server.clone(),
                    source: Box::new(error),
                });
            }
            // What may be there already is not to be refused for want of room.
            request.at_once = false;
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Whether a host that failed like this has certainly not got what it was asked to take.
fn is_not_there(error: &client::Error) -> bool {
    match error {
        // It failed while it wrote it down, perhaps; a full disk has nothing new on it.
        client::Error::Refused { status, .. } => *status < 500 || [503, 507].contains(status),
        error => error.is_unsent(),
    }
}

fn said(place: &Place, why: &Error) -> String {
    format!("{}: {}", place.host, chain(why))
}

#[cfg(test)]
mod tests {
    use xbee_api::ErrorBody;

    use super::*;

    #[test]
    fn the_next_host_is_asked_only_if_this_one_has_not_got_it() {
        let refused = |status, code: &str| client::Error::Refused {
            status,
            body: ErrorBody {
                code: code.into(),
                message: String::new(),
            },
        };
        for not_there in [
            refused(409, "not-at-once"),
            refused(404, "no-such-route"),
            refused(503, "queue-full"),
            refused(507, "disk-full"),
            client::Error::NotRunning {
                socket: "/s".into(),
                reason: "",
            },
        ] {
            assert!(is_not_there(&not_there), "{not_there:?}");
        }
        for unsure in [
            refused(500, "store"),
            refused(502, "x"),
            client::Error::Timeout,
        ] {
            assert!(!is_not_there(&unsure), "{unsure:?}");
        }
    }
}
