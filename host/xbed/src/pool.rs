//! A pool: several `xbed` with one certificate that share the tasks of one queue.
//!
//! A task that is submitted to any member is sealed and left at the broker ([`Pool::submit`]). A member that has room looks at one
//! task at a time ([`take`]): if it can begin at once, its capacity is held, and the message is exchanged for the same one in the
//! member's own queue. From there it becomes a task of this host ([`receive`]), once, however often it comes. What cannot begin
//! soon goes back to where it was, what can never begin here to the end of the queue, as long as another member could run it.

mod talk;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;
use xbee_api::{State, SubState, SubmitRequest, TaskStatus, Transition, chain};
use xbee_carry::pool::{Member, Offer};
use xbee_engine::{Failure, Outcome, Phase, QueueError, Task};
use xbee_envelope::seal;
use xbee_mq::client::{Client, ClientError, Received, Subscription};
use xbee_mq::session::AckMode;

use crate::cache::CacheError;
use crate::command::{Caller, CommandError, Commands};
use crate::fault;
use crate::host::Host;
use crate::message_queue::{self, Pause};
use crate::store::{Job, StoreError};
use crate::translate::PlanError;
use crate::view;
use talk::Talk;

/// How long a task is kept from others until it can begin here.
const HOLD: Duration = Duration::from_secs(2);
/// How long a task may wait in a pool before it has failed. Those that have been here are known for as long, so that nobody can
/// bring one back.
const MAX_AGE_MS: u64 = 30 * 24 * 3_600_000;
/// For how long it is remembered that a task was taken, milliseconds.
pub const KEYS_KNOWN_MS: u64 = 2 * MAX_AGE_MS;
/// For how long a task is passed on that no member who answers could run, milliseconds: one of them may be restarting.
const NOBODY_MS: u64 = 20_000;
/// Header of a task that nobody could run: since when, milliseconds since the Unix epoch.
const NOBODY_SINCE: &str = "xbee-nobody-since";
/// Pause before what cannot be written down is tried again.
const WRITE_AGAIN: Duration = Duration::from_secs(1);
/// Messages of the own queue that are fetched at a time.
const OWN_MESSAGES: usize = 16;

/// Why the pool does not take a task.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The broker is away.
    #[error(
        "this xbed has no connection to the pool's broker now, and no task was taken: try again in a moment"
    )]
    NotConnected,
    /// The broker did not answer.
    #[error(
        "the pool's broker did not say that it has task {task}: it may have it or not, so see whether `xbe status {task}` comes to know it before you submit it again"
    )]
    Unknown {
        /// The task to be.
        task: Uuid,
        /// Why.
        #[source]
        source: Box<ClientError>,
    },
    /// It does not fit into a message.
    #[error("the task cannot be sealed for the pool")]
    Seal(#[source] Box<seal::Error>),
    /// A request that is no JSON.
    #[error("the request cannot be written down")]
    Request(#[source] serde_json::Error),
    /// Many tasks at a time.
    #[error(
        "the document is a parameter sweep, and a pool or --anywhere takes one job at a time: submit its jobs one by one, or all to one host"
    )]
    Sweep,
    /// It is of a host.
    #[error("a reservation is of one host: name the queue of that host, not a pool's")]
    Reservation,
    /// It is of a host.
    #[error(
        "a file is sent to one host, and a task of a pool may run on any: take the file from a server, or name the queue of one host"
    )]
    Files,
    /// It is of a host.
    #[error("a pool finds a host by itself: submit without --anywhere, or name one host")]
    Anywhere,
}

impl PoolError {
    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            PoolError::NotConnected => "pool-not-connected",
            PoolError::Unknown { .. } => "pool-unknown",
            PoolError::Seal(_) | PoolError::Request(_) => "pool-message",
            PoolError::Sweep => "pool-sweep",
            PoolError::Reservation => "pool-reservation",
            PoolError::Files => "pool-files",
            PoolError::Anywhere => "pool-anywhere",
        }
    }
}

/// What a member makes of a task that waits.
enum Verdict {
    /// It can begin, and its capacity is held.
    Now,
    /// Not soon.
    Busy,
    /// Not here, ever.
    Never(CommandError),
    /// It has been here.
    Known,
}

/// Why a member looks at no more tasks for now.
enum Rest {
    /// It runs what it can.
    Full,
    /// What it saw is for others, or for later.
    NotNow,
}

/// This host as a member of a pool.
pub struct Pool {
    host: Arc<Host>,
    commands: Commands,
    member: Member,
    /// The connection over which tasks are offered and members asked, while there is one.
    talk: watch::Sender<Option<Arc<Talk>>>,
}

impl Pool {
    /// Nothing is connected yet.
    pub fn new(host: Arc<Host>, member: Member) -> Arc<Pool> {
        Arc::new(Pool {
            commands: Commands::new(host.clone()),
            host,
            member,
            talk: watch::Sender::new(None),
        })
    }

    /// Takes tasks until it is stopped; a broker that goes away is tried again without end.
    pub async fn run(self: Arc<Pool>, stopped: CancellationToken) {
        tokio::select! {
            () = stopped.cancelled() => {}
            () = self.keep_receiving() => {}
            () = self.keep_taking() => {}
        }
        self.host.give_places();
    }

    async fn keep_receiving(self: &Arc<Self>) {
        let mut pause = Pause::default();
        loop {
            if let Err(error) = self.receive(&mut pause).await {
                warn!("not in the pool: {}", chain(&error));
            }
            self.talk.send_replace(None);
            // What was taken for them comes again, if it was taken.
            self.host.give_places();
            pause.rest(std::future::pending()).await;
        }
    }

    async fn keep_taking(&self) {
        let mut pause = Pause::default();
        let mut talk = self.talk.subscribe();
        loop {
            // What was taken before comes first; and the others must be there to be asked. The sender lives as long as this.
            let _ = talk.wait_for(Option::is_some).await;
            let mut freed = self.host.freed.subscribe();
            let freed = async {
                // The sender lives as long as the host.
                let _ = freed.changed().await;
            };
            if !self.host.has_room() {
                freed.await;
                continue;
            }
            match self.take(&mut pause).await {
                Ok(Rest::Full) => continue,
                Ok(Rest::NotNow) => {}
                Err(error) => warn!("no task of the pool was taken: {}", chain(&error)),
            }
            pause.rest(freed).await;
        }
    }

    /// Leaves a task at the broker for whoever can begin it. When this returns, it is durable there.
    pub async fn submit(
        &self,
        caller: Caller,
        request: SubmitRequest,
    ) -> Result<TaskStatus, CommandError> {
        let talk = self.talk.borrow().clone().ok_or(PoolError::NotConnected)?;
        let task = Uuid::new_v4();
        let offer = self.seal(task, caller, &request).await?;
        let (name, image) = match self.judge(caller, request).await {
            Ok(job) => (job.plan.name.clone(), job.plan.boot.label()),
            Err(error) => {
                let may_be = is_of_this_host(&error);
                if !may_be || !talk.anybody(&self.member, &offer).await {
                    return Err(error);
                }
                (None, String::new())
            }
        };
        fault::point("pool offer");
        let headers = self.member.persistent();
        let sent = talk.mq.send(&self.member.tasks(), &headers, offer).await;
        sent.map_err(|source| PoolError::Unknown {
            task,
            source: Box::new(source),
        })?;
        fault::point("pool offered");
        let at_ms = view::now_ms();
        Ok(TaskStatus {
            id: task,
            name,
            owner: caller.owner.uid,
            state: State::Pending,
            substate: Some(SubState::Confirmed),
            exit_code: None,
            reason: None,
            reason_code: None,
            times: vec![Transition {
                state: State::Pending,
                substate: Some(SubState::Confirmed),
                at: view::rfc3339(at_ms),
                at_ms,
            }],
            progress: None,
            image,
            address: None,
            reservation: None,
            array: None,
            member: None,
            ports: vec![],
        })
    }

    /// Whether another member could run what this host cannot.
    pub async fn is_for_another(
        &self,
        caller: Caller,
        request: &SubmitRequest,
        error: &CommandError,
    ) -> bool {
        let talk = self.talk.borrow().clone();
        let (true, Some(talk)) = (is_of_this_host(error), talk) else {
            return false;
        };
        match self.seal(Uuid::new_v4(), caller, request).await {
            Ok(offer) => talk.anybody(&self.member, &offer).await,
            Err(error) => {
                warn!("no other member was asked: {}", chain(&error));
                false
            }
        }
    }

    /// A task for the pool.
    async fn seal(
        &self,
        task: Uuid,
        caller: Caller,
        request: &SubmitRequest,
    ) -> Result<Vec<u8>, CommandError> {
        let host = self.host.clone();
        let owner = message_queue::blocking(move || host.store.subject(caller.owner)).await?;
        // Who asks through the pool's queue has a certificate.
        let owner = owner.ok_or_else(|| CommandError::NotFound(caller.owner.uid.to_string()))?;
        let text = serde_json::to_string(request).map_err(PoolError::Request)?;
        let offer = self.member.offer(task, owner, text).await;
        Ok(offer.map_err(|error| PoolError::Seal(Box::new(error)))?)
    }

    /// What a request means here, if this host could ever run it.
    async fn judge(&self, caller: Caller, request: SubmitRequest) -> Result<Job, CommandError> {
        let job = self.commands.plan_one(caller, request).await?;
        self.host.could(caller.owner, job.plan.demand())?;
        Ok(job)
    }

    /// The same for a task that waits.
    async fn judge_offer(
        &self,
        offer: &Offer,
    ) -> Result<(Caller, Result<Job, CommandError>), StoreError> {
        let caller = message_queue::caller(self.host.clone(), offer.owner.clone()).await?;
        let job = match serde_json::from_str(&offer.request) {
            _ if offer.at_ms < view::now_ms().saturating_sub(MAX_AGE_MS) => {
                Err(CommandError::PoolAge)
            }
            Ok(request) => self.judge(caller, request).await,
            Err(error) => Err(PoolError::Request(error).into()),
        };
        Ok((caller, job))
    }

    /// Whether this host could ever run a task.
    async fn could(&self, offer: &Offer) -> bool {
        if self.host.config.domains == 0 {
            return false;
        }
        let judged = self.judge_offer(offer).await;
        judged.is_ok_and(|(_, job)| job.is_ok())
    }

    /// Looks at tasks that wait, one at a time, as long as there is room.
    async fn take(&self, pause: &mut Pause) -> Result<Rest, ClientError> {
        // Closed, it gives back what was not taken: every broker understands that.
        let mq = self.member.connect(1).await?;
        let tasks = self.member.tasks();
        let mut tasks = mq.subscribe(&tasks, AckMode::ClientIndividual).await?;
        loop {
            let message = self.next_while_room(&mut tasks).await;
            let Some(message) = message? else {
                return Ok(Rest::Full);
            };
            let offer = match self.member.open_offer(message.body.clone()).await {
                Ok(offer) => offer,
                Err(error) => {
                    warn!("a message of the pool is put aside: {}", chain(&error));
                    self.pass(&mq, &message, &self.member.refused(), None)
                        .await?;
                    continue;
                }
            };
            match self.weigh(&offer).await {
                Ok(Verdict::Now) => {
                    fault::point("pool take");
                    if let Err(error) = self.pass(&mq, &message, &self.member.own(), None).await {
                        self.host.give_place(offer.task);
                        return Err(error);
                    }
                    fault::point("pool taken");
                    pause.begin_anew();
                }
                Ok(Verdict::Known) => self.pass(&mq, &message, &self.member.own(), None).await?,
                Ok(Verdict::Busy) => return Ok(Rest::NotNow),
                Ok(Verdict::Never(error)) => {
                    self.pass_on(&mq, &message, &offer, &error).await?;
                    return Ok(Rest::NotNow);
                }
                Err(error) => {
                    warn!(task = %offer.task, "not taken from the pool: {}", chain(&error));
                    return Ok(Rest::NotNow);
                }
            }
        }
    }

    /// The next task; none if there is no room any more.
    async fn next_while_room(
        &self,
        tasks: &mut Subscription,
    ) -> Result<Option<Received>, ClientError> {
        let mut freed = self.host.freed.subscribe();
        loop {
            if !self.host.has_room() {
                return Ok(None);
            }
            tokio::select! {
                message = tasks.next() => return message.ok_or(ClientError::Closed).map(Some),
                _ = freed.changed() => {}
            }
        }
    }

    /// Whether a task can begin; if only a little is missing, it is waited for.
    async fn weigh(&self, offer: &Offer) -> Result<Verdict, StoreError> {
        if self.host.task(offer.task).is_some() {
            return Ok(Verdict::Known);
        }
        let (caller, job) = self.judge_offer(offer).await?;
        let job = match job {
            Ok(job) => job,
            Err(error) => return Ok(Verdict::Never(error)),
        };
        let mut freed = self.host.freed.subscribe();
        let wait = async {
            while !self.host.take_place(offer.task, caller.owner, &job) {
                // The sender lives as long as the host.
                let _ = freed.changed().await;
            }
        };
        Ok(match tokio::time::timeout(HOLD, wait).await {
            Ok(()) => Verdict::Now,
            Err(_) => Verdict::Busy,
        })
    }

    /// What is to become of a task that this host can never run.
    async fn pass_on(
        &self,
        mq: &Client,
        message: &Received,
        offer: &Offer,
        error: &CommandError,
    ) -> Result<(), ClientError> {
        let talk = self.talk.borrow().clone();
        let Some(talk) = talk else {
            return Err(ClientError::Closed);
        };
        let tasks = self.member.tasks();
        if is_of_this_host(error) {
            if talk.anybody(&self.member, &message.body).await {
                return self.pass(mq, message, &tasks, None).await;
            }
            let now_ms = view::now_ms();
            let since = message.headers.get(NOBODY_SINCE);
            let since_ms = since.and_then(|since| since.parse().ok()).unwrap_or(now_ms);
            if now_ms.saturating_sub(since_ms) < NOBODY_MS {
                return self.pass(mq, message, &tasks, Some(since_ms)).await;
            }
        }
        info!(task = %offer.task, "taken from the pool to fail: {}", chain(error));
        self.pass(mq, message, &self.member.own(), None).await
    }

    /// Puts a message into another queue, or at the end of its own.
    async fn pass(
        &self,
        mq: &Client,
        message: &Received,
        to: &str,
        nobody_since: Option<u64>,
    ) -> Result<(), ClientError> {
        fault::point("pool pass");
        let mut headers = self.member.persistent();
        if let Some(since_ms) = nobody_since {
            headers = headers.with(NOBODY_SINCE, &since_ms.to_string());
        }
        mq.exchange(message, to, &headers, message.body.clone())
            .await?;
        fault::point("pool passed");
        Ok(())
    }

    /// Makes the messages of the own queue tasks of this host.
    async fn receive(self: &Arc<Self>, pause: &mut Pause) -> Result<(), ClientError> {
        let mq = self.member.connect(OWN_MESSAGES).await?;
        let mut own = mq
            .subscribe(&self.member.own(), AckMode::ClientIndividual)
            .await?;
        let talk = Talk::begin(self.clone(), mq.clone()).await?;
        self.talk.send_replace(Some(talk));
        pause.begin_anew();
        info!("a member of the pool {}", self.member.tasks());
        while let Some(message) = own.next().await {
            self.accept(&message.body).await;
            fault::point("pool acknowledge");
            mq.ack(&message).await?;
            fault::point("pool acknowledged");
        }
        Err(ClientError::Closed)
    }

    /// Makes a message a task. Does not return before that is durable.
    async fn accept(&self, message: &[u8]) {
        let offer = match self.member.open_offer(message.to_vec()).await {
            Ok(offer) => offer,
            Err(error) => {
                // Nobody but members writes here, and they look at it before.
                return warn!("a message of the own queue is no task: {}", chain(&error));
            }
        };
        while let Err(error) = self.try_accept(&offer).await {
            warn!(task = %offer.task, "not taken up yet: {}", chain(&error));
            tokio::time::sleep(WRITE_AGAIN).await;
        }
    }

    async fn try_accept(&self, offer: &Offer) -> Result<(), CommandError> {
        let (caller, job) = self.judge_offer(offer).await?;
        let (job, state) = match job {
            Ok(job) => (Some(job), Task::default()),
            Err(error) => {
                let failure = Failure {
                    code: error.code().to_owned(),
                    reason: chain(&error),
                };
                let outcome = Outcome::Failed(failure);
                let state = Task {
                    phase: Phase::Final { outcome },
                    ..Task::default()
                };
                (None, state)
            }
        };
        let forget_ms = view::now_ms().saturating_sub(KEYS_KNOWN_MS);
        let times = (offer.at_ms, forget_ms);
        let accepted = self
            .host
            .accept_offered((offer.task, caller.owner), job, state, times);
        // One that was here before is acknowledged as well.
        accepted.await.map(drop)
    }
}

/// Whether another host may see that otherwise.
pub fn is_of_this_host(error: &CommandError) -> bool {
    matches!(
        error,
        CommandError::Plan(PlanError::Image(_) | PlanError::Mismatch { .. })
            | CommandError::Cache(CacheError::NotFound(_))
            | CommandError::Retries { .. }
            | CommandError::Queue(
                QueueError::TooManyCpus { .. }
                    | QueueError::TooMuchMemory { .. }
                    | QueueError::TooMuchDisk { .. }
                    | QueueError::OverQuota { .. }
            )
    )
}
