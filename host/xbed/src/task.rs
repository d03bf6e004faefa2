//! One actor a task. It alone changes the task's state, writes each change down before it acts on
//! it, and runs one step at a time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use std::sync::OnceLock;

use tokio::sync::{OnceCell, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use xbee_agent::Agent;
use xbee_api::{Progress, PublishedPort, ReservationStatus, TaskEvent, TaskStatus, chain};
use xbee_engine::{Action, Demand, Failure, Input, Phase, Step, Task};

use crate::array::Array;
use crate::host::Host;
use crate::plan::Plan;
use crate::retry;
use crate::session::Session;
use crate::steps;
use crate::store::{Entry, Job, Reservation, StoreError, StoredTask, TaskRecord};
use crate::view;

/// How long to wait before a failed write to the store is tried again.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// What others want of a task. Bounded by its shape: asking twice is asking once.
#[derive(Debug, Default, Clone)]
struct Wishes {
    /// What to do, and whether to start.
    confirmed: Option<(Arc<Job>, bool)>,
    started: bool,
    admitted: bool,
    terminate: Option<String>,
}

/// A task, for everybody else. All of it can be looked at and waited for at any time.
pub struct TaskHandle {
    /// Its number, which is never used twice.
    pub number: i64,
    /// What was accepted. What it is to do, the task itself knows.
    pub record: TaskRecord,
    job: OnceLock<Arc<Job>>,
    array: Option<Arc<Array>>,
    /// Directory of its files on the host.
    pub spool: PathBuf,
    /// What its spool keeps of results, bytes, once that is known.
    kept_bytes: OnceLock<u64>,
    wishes: watch::Sender<Wishes>,
    journal: watch::Sender<Vec<Entry>>,
    /// Lengths of standard output and error.
    pub(crate) lengths: watch::Sender<[u64; 2]>,
    pub(crate) progress: watch::Sender<Option<Progress>>,
    pub(crate) ports: watch::Sender<Vec<PublishedPort>>,
    pub(crate) agent: watch::Sender<Option<Agent>>,
    pub(crate) console: watch::Sender<Option<PathBuf>>,
    /// IPv6 address of its domain.
    pub(crate) address: watch::Sender<Option<String>>,
}

impl TaskHandle {
    /// A handle of a stored task. Its actor is started apart, with [`run`].
    pub fn new(mut stored: StoredTask, spool: PathBuf, array: Option<Arc<Array>>) -> TaskHandle {
        if let (Some(array), Some(member)) = (&array, &stored.record.member) {
            array.add(member.number, stored.record.id, &stored.journal);
        }
        let job = OnceLock::new();
        if let Some(known) = stored.record.job.take() {
            let _ = job.set(Arc::new(known));
        }
        TaskHandle {
            ports: watch::Sender::new(publish(&job).to_vec()),
            job,
            array,
            number: stored.number,
            kept_bytes: OnceLock::new(),
            lengths: watch::Sender::new([0, 0]),
            progress: watch::Sender::new(None),
            agent: watch::Sender::new(None),
            console: watch::Sender::new(None),
            address: watch::Sender::new(None),
            wishes: watch::Sender::new(Wishes::default()),
            journal: watch::Sender::new(stored.journal),
            record: stored.record,
            spool,
        }
    }

    /// The array it is of, and its number there.
    pub fn array(&self) -> Option<(&Arc<Array>, u32)> {
        let member = self.record.member.as_ref()?;
        Some((self.array.as_ref()?, member.number))
    }

    /// What it is to do, once that is known.
    pub fn job(&self) -> Option<&Arc<Job>> {
        self.job.get()
    }

    /// What it means on this host. Nothing is begun for a task that has none.
    pub fn plan(&self) -> &Plan {
        match self.job.get() {
            Some(job) => &job.plan,
            None => unreachable!("task {} was begun without a document", self.record.id),
        }
    }

    /// What is kept of its results, bytes; of a task that is over.
    pub fn kept_bytes(&self) -> u64 {
        match self.job() {
            Some(job) if self.is_final() => {
                let bytes = || steps::result_bytes(&self.spool, &job.plan);
                *self.kept_bytes.get_or_init(bytes)
            }
            _ => 0,
        }
    }

    /// Guest's ports to be published.
    pub fn publish(&self) -> &[PublishedPort] {
        publish(&self.job)
    }

    /// What it needs of the host.
    pub fn demand(&self) -> Option<Demand> {
        let reserved = self.record.reservation.as_ref();
        reserved
            .map(Reservation::demand)
            .or_else(|| Some(self.job()?.plan.demand()))
    }

    /// The engine's state.
    pub fn state(&self) -> Task {
        self.journal
            .borrow()
            .last()
            .map(|entry| entry.state.clone())
            .unwrap_or_default()
    }

    /// Nothing more happens to it.
    pub fn is_final(&self) -> bool {
        self.journal
            .borrow()
            .last()
            .is_some_and(|entry| entry.state.is_final())
    }

    /// Entries so far.
    fn journal_len(&self) -> usize {
        self.journal.borrow().len()
    }

    /// Takes an entry that has been written down.
    fn push(&self, entry: Entry) {
        if let Some((array, number)) = self.array() {
            array.changed(number, &entry);
        }
        self.journal.send_modify(|journal| journal.push(entry));
    }

    /// Tells it what to do. Of two who do so, one is heard: see [`TaskHandle::job`] afterwards.
    pub fn confirm(&self, job: Arc<Job>, start: bool) {
        self.wishes.send_modify(|wishes| {
            wishes.confirmed.get_or_insert((job, start));
        });
    }

    /// Lets it start.
    pub fn start(&self) {
        self.wishes.send_modify(|wishes| wishes.started = true);
    }

    /// Waits until it has left this phase, durably.
    pub async fn left(&self, phase: Phase) {
        let mut journal = self.watch();
        let has_left = |journal: &Vec<Entry>| {
            journal
                .last()
                .is_some_and(|entry| entry.state.phase != phase)
        };
        // The handle keeps the sender.
        let _ = journal.wait_for(has_left).await;
    }

    /// Gives it its capacity.
    pub fn admit(&self) {
        self.wishes.send_modify(|wishes| wishes.admitted = true);
    }

    /// Waits until a wish for its end is written down, or its end is decided without.
    pub async fn ending(&self) {
        let mut journal = self.watch();
        let decided = |journal: &Vec<Entry>| {
            journal.last().is_some_and(|entry| {
                let phase = &entry.state.phase;
                !entry.state.is_pending()
                    && !matches!(phase, Phase::Working { .. } | Phase::Retrying { .. })
            })
        };
        // The handle keeps the sender.
        let _ = journal.wait_for(decided).await;
    }

    /// Wants its end.
    pub fn terminate(&self, reason: &str) {
        self.wishes.send_modify(|wishes| {
            wishes.terminate.get_or_insert_with(|| reason.into());
        });
    }

    /// Wakes at each change of state.
    pub fn watch(&self) -> watch::Receiver<Vec<Entry>> {
        self.journal.subscribe()
    }

    /// Wakes when output arrives.
    pub fn log_lengths(&self) -> watch::Receiver<[u64; 2]> {
        self.lengths.subscribe()
    }

    /// The agent of its domain while there is a connection.
    pub fn agent(&self) -> Option<Agent> {
        self.agent.borrow().clone()
    }

    /// Where the console is: the hypervisor's log while the domain lives, else the kept end of it.
    pub fn console_path(&self) -> PathBuf {
        self.console
            .borrow()
            .clone()
            .filter(|path| path.exists())
            .unwrap_or_else(|| kept_console(&self.spool))
    }

    /// All state changes so far.
    pub fn events(&self) -> Vec<TaskEvent> {
        view::events(&self.journal.borrow())
    }

    /// The task as the API shows it.
    pub fn status(&self) -> TaskStatus {
        let state = self.state();
        let (bes, substate) = view::bes(&state);
        let (reason, reason_code) = view::reason(&state);
        let events = self.events();
        TaskStatus {
            id: self.record.id,
            name: match self.job() {
                Some(job) => job.plan.name.clone(),
                None => self
                    .record
                    .reservation
                    .as_ref()
                    .and_then(|r| r.name.clone()),
            },
            owner: self.record.owner.uid,
            state: bes,
            substate,
            exit_code: state.exit_code,
            reason,
            reason_code,
            times: events.into_iter().map(|event| event.transition).collect(),
            progress: self.progress.borrow().clone(),
            image: self
                .job()
                .map(|job| job.plan.boot.label())
                .unwrap_or_default(),
            address: self.address.borrow().clone(),
            reservation: self
                .record
                .reservation
                .as_ref()
                .map(|held| ReservationStatus {
                    from: view::rfc3339(held.from_ms),
                    until: view::rfc3339(held.until_ms),
                    from_ms: held.from_ms,
                    until_ms: held.until_ms,
                    cpus: held.vcpus,
                    memory_bytes: held.memory_bytes,
                    disk_bytes: held.disk_bytes,
                }),
            array: None,
            member: self.record.member.clone(),
            ports: self.ports.borrow().clone(),
        }
    }
}

fn publish(job: &OnceLock<Arc<Job>>) -> &[PublishedPort] {
    job.get().map_or(&[], |job| &job.request.publish)
}

/// Where the end of the console is kept after the domain is gone.
pub fn kept_console(spool: &Path) -> PathBuf {
    spool.join("console")
}

/// What a step works with.
#[derive(Clone)]
pub struct StepContext {
    /// The host.
    pub host: Arc<Host>,
    /// The task.
    pub task: Arc<TaskHandle>,
    /// The conversation with the domain's agent, once the domain has been started.
    pub session: Arc<OnceCell<Session>>,
    /// The step shall end.
    pub cancel: CancellationToken,
}

/// What an actor begins with.
#[derive(Debug, Default)]
pub struct Begin {
    /// A state to enter first.
    pub entry: Option<Entry>,
    /// What is to be done then.
    pub actions: Vec<Action>,
}

/// The actor: lives until the task is final.
pub async fn run(host: Arc<Host>, task: Arc<TaskHandle>, begin: Begin) {
    let mut actor = Actor {
        wishes: task.wishes.subscribe(),
        session: Arc::default(),
        work: None,
        cancel: CancellationToken::new(),
        terminating: false,
        confirming: None,
        host,
        task,
    };
    if let Some(entry) = begin.entry {
        actor.enter(entry).await;
    }
    actor.carry_out(begin.actions);
    while !actor.task.is_final() {
        let input = actor.next_input().await;
        actor.take(input).await;
    }
    actor.host.done(&actor.task);
}

struct Actor {
    host: Arc<Host>,
    task: Arc<TaskHandle>,
    wishes: watch::Receiver<Wishes>,
    session: Arc<OnceCell<Session>>,
    work: Option<(Step, JoinHandle<Input>)>,
    cancel: CancellationToken,
    terminating: bool,
    /// What it is to do, until that is written down.
    confirming: Option<Arc<Job>>,
}

impl Actor {
    async fn next_input(&mut self) -> Input {
        loop {
            let wishes = self.wishes.borrow_and_update().clone();
            if let Some(reason) = wishes.terminate.filter(|_| !self.terminating) {
                self.terminating = true;
                return Input::Terminate { reason };
            }
            match (self.task.state().phase, wishes.confirmed) {
                (Phase::Reserved, Some((job, start))) => {
                    self.confirming = Some(job);
                    return Input::Confirmed { start };
                }
                (Phase::Held, _) if wishes.started => return Input::Started,
                (Phase::Queued, _) if wishes.admitted => return Input::Admitted,
                _ => {}
            }
            let Some((step, work)) = &mut self.work else {
                // The handle keeps the sender: this waits for a wish, and never fails.
                let _ = self.wishes.changed().await;
                continue;
            };
            let step = *step;
            tokio::select! {
                _ = self.wishes.changed() => {}
                ended = work => {
                    self.work = None;
                    return ended.unwrap_or_else(|panic| {
                        error!(task = %self.task.record.id, ?step, %panic, "step broke");
                        let failure = Failure {
                            code: "internal".into(),
                            reason: format!("xbed broke while working on this task: {panic}"),
                        };
                        Input::Failed { step, failure, retry_at_ms: None }
                    });
                }
            }
        }
    }

    /// The new state is on the disk before anything is done about it.
    async fn take(&mut self, input: Input) {
        let before = self.task.state();
        let mut state = before.clone();
        let actions = match state.apply(input) {
            Ok(actions) => actions,
            Err(error) => {
                error!(task = %self.task.record.id, %error, "input refused");
                return;
            }
        };
        if state != before {
            let queued = state.phase == Phase::Queued;
            let entry = Entry {
                at_ms: view::now_ms(),
                state,
            };
            self.enter(entry).await;
            if queued {
                // Of an earlier try.
                self.task
                    .wishes
                    .send_modify(|wishes| wishes.admitted = false);
                self.session = Arc::default();
                self.host.enqueue(&self.task);
            }
        }
        self.carry_out(actions);
    }

    async fn enter(&mut self, entry: Entry) {
        self.write(&entry).await;
        info!(task = %self.task.record.id, state = ?view::bes(&entry.state), "state");
        self.task.progress.send_replace(None);
        if let Some(job) = self.confirming.take() {
            self.task.ports.send_replace(job.request.publish.clone());
            // Only once: in the phase before there is none.
            let _ = self.task.job.set(job);
        }
        self.task.push(entry);
    }

    fn append(
        host: &Host,
        number: i64,
        seq: usize,
        entry: &Entry,
        record: Option<&TaskRecord>,
    ) -> Result<(), StoreError> {
        match record {
            Some(record) => host.store.confirm(number, record, seq, entry),
            None => host.store.append(number, seq, entry),
        }
    }

    /// A full disk stops the task where it is until there is room; it loses nothing.
    async fn write(&self, entry: &Entry) {
        let seq = self.task.journal_len();
        loop {
            let (host, entry, number) = (self.host.clone(), entry.clone(), self.task.number);
            let record = self.confirming.as_ref().map(|job| TaskRecord {
                job: Some(Job::clone(job)),
                ..self.task.record.clone()
            });
            let written = tokio::task::spawn_blocking(move || {
                Self::append(&host, number, seq, &entry, record.as_ref())
            });
            let written = written.await;
            match written {
                Ok(Ok(())) => return,
                Ok(Err(error)) => {
                    warn!(task = %self.task.record.id, error = chain(&error), "journal entry not written; trying again");
                }
                Err(panic) => error!(task = %self.task.record.id, %panic, "store broke"),
            }
            tokio::time::sleep(STORE_RETRY).await;
        }
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Perform(step) => self.begin(step),
                Action::Cancel(_) => self.cancel.cancel(),
                Action::Release => self.release(),
            }
        }
    }

    fn context(&mut self) -> StepContext {
        self.cancel = CancellationToken::new();
        StepContext {
            host: self.host.clone(),
            task: self.task.clone(),
            session: self.session.clone(),
            cancel: self.cancel.clone(),
        }
    }

    fn begin(&mut self, step: Step) {
        let context = self.context();
        let work = async move {
            match steps::perform(step, &context).await {
                Ok(exit_code) => Input::Done { step, exit_code },
                Err(failure) => {
                    let retry_at_ms = retry::at_ms(&context, &failure);
                    Input::Failed {
                        step,
                        failure,
                        retry_at_ms,
                    }
                }
            }
        };
        self.work = Some((step, tokio::spawn(work)));
    }

    fn release(&mut self) {
        let context = self.context();
        let work = async move {
            steps::release(&context).await;
            Input::Released
        };
        // A release has no step of its own; the name is only for the log.
        self.work = Some((Step::Stop, tokio::spawn(work)));
    }
}
