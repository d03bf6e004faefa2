//! The front door for users on other machines: connections and requests in sealed messages, through a message broker.
//! Certificates say who asks; each subject has a number of its own for ever, as the kernel's users have.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use xbee_api::{CacheRequest, ConfirmRequest, ReserveRequest, SubmitRequest, chain};
use xbee_carry::stream::Carried;
use xbee_carry::{Address, Answer, Options, Service};
use xbee_engine::QueueError;
use xbee_envelope::seal::Endpoint;
use xbee_envelope::{Body, CacheEntry, Fault, TaskState};

use crate::cache::{Asked, CacheError};
use crate::command::{Caller, CommandError, Commands};
use crate::host::Host;
use crate::pool::Pool;
use crate::store::{Owner, StoreError};

/// Shortest and longest wait before a broker is tried again.
const PAUSE: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A connection that has held so long was a good one: the next wait is short again.
const GOOD_AFTER: Duration = Duration::from_secs(30);
/// How long a message that wants a file in the cache waits for it before it is answered that it is being fetched.
const FETCH_WAIT: Duration = Duration::from_secs(20);

/// Pauses before a broker is tried again, each twice as long as the one before.
pub struct Pause(Duration);

impl Default for Pause {
    fn default() -> Pause {
        Pause(PAUSE)
    }
}

impl Pause {
    /// What comes next is the first one again.
    pub fn begin_anew(&mut self) {
        self.0 = PAUSE;
    }

    /// Waits, unless there is a reason not to.
    pub async fn rest(&mut self, unless: impl Future<Output = ()>) {
        tokio::select! {
            () = unless => {}
            () = tokio::time::sleep(self.0) => {}
        }
        self.0 = (self.0 * 2).min(PAUSE_MAX);
    }
}

/// Serves the queue until it is stopped; a broker that goes away is tried again without end.
pub fn serve(
    address: Address,
    options: Options,
    endpoint: Arc<Endpoint>,
    door: Door,
    stopped: CancellationToken,
) -> impl Future<Output = ()> {
    let door: Arc<dyn Service> = Arc::new(door);
    async move {
        let mut pause = Pause::default();
        while !stopped.is_cancelled() {
            let begun = Instant::now();
            let listening = || info!("listening on {address} as {}", endpoint.subject());
            let stop = stopped.cancelled();
            let serving = xbee_carry::serve(
                &address,
                &options,
                endpoint.clone(),
                door.clone(),
                listening,
                stop,
            );
            // A broker that is not there does not hold up the end either.
            let served = tokio::select! {
                served = serving => served,
                () = late(&stopped) => return,
            };
            if let Err(error) = served {
                warn!("not on the message queue {address}: {}", chain(&error));
            }
            if begun.elapsed() >= GOOD_AFTER {
                pause.begin_anew();
            }
            pause.rest(stopped.cancelled()).await;
        }
    }
}

/// Resolves when the end was to be over.
async fn late(stopped: &CancellationToken) {
    stopped.cancelled().await;
    tokio::time::sleep(Duration::from_secs(3)).await;
}

/// What answers those who are believed.
pub struct Door {
    commands: Commands,
    host: Arc<Host>,
}

impl Door {
    /// For this host, alone or as a member of a pool.
    pub fn new(host: Arc<Host>, pool: Option<Arc<Pool>>) -> Door {
        Door {
            commands: Commands::of_pool(host.clone(), pool),
            host,
        }
    }
}

/// Who a subject is here.
pub async fn caller(host: Arc<Host>, subject: String) -> Result<Caller, StoreError> {
    let owner = blocking(move || host.store.remote(&subject)).await?;
    Ok(Caller { owner })
}

/// Does what may wait for the disk.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}

impl Service for Door {
    fn connection(&self, subject: &str, stream: Carried) {
        let (host, commands) = (self.host.clone(), self.commands.clone());
        let subject = subject.to_owned();
        tokio::spawn(async move {
            let caller = match caller(host, subject.clone()).await {
                Ok(caller) => caller,
                Err(error) => return warn!(subject, error = chain(&error), "not served"),
            };
            let router = TowerToHyperService::new(crate::http::router(commands));
            let service = service_fn(move |mut request: Request<Incoming>| {
                request.extensions_mut().insert(caller);
                router.call(request)
            });
            let connection = http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            if let Err(error) = connection.await {
                tracing::debug!(subject, %error, "a connection was lost");
            }
        });
    }

    fn request(&self, subject: &str, body: Body) -> Answer {
        let (host, commands) = (self.host.clone(), self.commands.clone());
        let subject = subject.to_owned();
        Box::pin(async move {
            let caller = match caller(host, subject).await {
                Ok(caller) => caller,
                Err(error) => return fault(&error.into()),
            };
            match answer(&commands, caller, body).await {
                Ok(body) => body,
                Err(error) => fault(&error),
            }
        })
    }

    fn knows(&self, task: &str) -> bool {
        let host = Owner { uid: 0, gid: 0 };
        is_found(&self.commands, Caller { owner: host }, task)
    }

    fn has(&self, subject: &str, task: &str) -> Pin<Box<dyn Future<Output = bool> + Send>> {
        let (host, commands) = (self.host.clone(), self.commands.clone());
        let (subject, task) = (subject.to_owned(), task.to_owned());
        Box::pin(async move {
            let caller = caller(host, subject).await;
            caller.is_ok_and(|caller| is_found(&commands, caller, &task))
        })
    }
}

/// Whether the caller may know of such a task, or of several.
fn is_found(commands: &Commands, caller: Caller, task: &str) -> bool {
    !matches!(commands.find(caller, task), Err(CommandError::NotFound(_)))
}

/// Carries out a request that is one message.
async fn answer(commands: &Commands, caller: Caller, body: Body) -> Result<Body, CommandError> {
    let done = |what: &str| Body::Error {
        fault: Fault::Ok,
        text: what.to_owned(),
    };
    Ok(match body {
        Body::ReservationRequest {
            name,
            from,
            duration_s,
            cpus,
            memory_bytes,
            disk_bytes,
        } => {
            let request = ReserveRequest {
                name,
                from_ms: from.map(|from| from.get()),
                duration_s,
                cpus,
                memory_bytes,
                disk_bytes,
            };
            let reserved = commands.reserve(caller, request).await?;
            Body::ReservationResponse {
                ticket: reserved.ticket,
                task: reserved.task.id,
            }
        }
        Body::ConfirmReservation { ticket, job, start } => {
            let request = SubmitRequest {
                jsdl: job,
                ..SubmitRequest::default()
            };
            let confirm = ConfirmRequest {
                ticket,
                start,
                request,
            };
            commands.confirm(caller, confirm).await?;
            done("confirmed")
        }
        Body::StartRequest { ticket } => {
            commands.start(caller, &ticket).await?;
            done("started")
        }
        Body::StatusRequest { task: None } => {
            let list = commands.list(caller, true);
            Body::StatusList(list.iter().map(TaskState::from).collect())
        }
        Body::StatusRequest { task: Some(id) } => {
            let status = commands.find(caller, &id.to_string())?.status();
            Body::StatusList(vec![TaskState::from(&status)])
        }
        Body::TerminateRequest { task, .. } => {
            let found = commands.find(caller, &task.to_string())?;
            commands.terminate(&found).await?;
            done("terminating")
        }
        Body::CacheFile { uri, digest } => {
            let asked = commands.cache(caller, CacheRequest { uri, digest }).await?;
            match tokio::time::timeout(FETCH_WAIT, commands.settle(&asked)).await {
                Ok(entry) => Body::CacheEntries(vec![cache_entry(&entry?)]),
                Err(_) => {
                    // One goes on to wait, however often it is asked for.
                    if matches!(&asked, Asked::Coming(waiter) if waiter.is_first()) {
                        let commands = commands.clone();
                        tokio::spawn(async move {
                            if let Err(error) = commands.settle(&asked).await {
                                warn!(error = chain(&error), "not fetched into the cache");
                            }
                        });
                    }
                    Body::Error {
                        fault: Fault::Pending,
                        text: "it is being fetched: ask again".to_owned(),
                    }
                }
            }
        }
        Body::CacheRemove { entry } => {
            commands.uncache(caller, &entry).await?;
            done("removed")
        }
        Body::ListCache => {
            Body::CacheEntries(commands.cached(caller).iter().map(cache_entry).collect())
        }
        _ => Body::Error {
            fault: Fault::BadRequest,
            text: "this message is no request".to_owned(),
        },
    })
}

fn cache_entry(entry: &xbee_api::CacheEntry) -> CacheEntry {
    CacheEntry {
        entry: entry.id.to_string(),
        uri: entry.uri.clone(),
        size_bytes: entry.size_bytes,
    }
}

/// Why not, in the words of messages.
fn fault(error: &CommandError) -> Body {
    let fault = match error {
        CommandError::NotFound(_) | CommandError::Cache(CacheError::NotFound(_)) => Fault::NotFound,
        CommandError::Cache(CacheError::Busy(_)) => Fault::Busy,
        CommandError::Cache(CacheError::Store(_) | CacheError::File { .. }) => Fault::Internal,
        CommandError::TicketInvalid => Fault::TicketInvalid,
        CommandError::RoomLater { .. }
        | CommandError::Queue(
            QueueError::NoRoom { .. } | QueueError::Full { .. } | QueueError::TooManyWaiting { .. },
        ) => Fault::Busy,
        CommandError::Store(_) | CommandError::NotWritten(_) => Fault::Internal,
        _ => Fault::BadRequest,
    };
    Body::Error {
        fault,
        text: chain(error).chars().filter(|c| !c.is_control()).collect(),
    }
}
