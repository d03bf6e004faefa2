//! The host: its tasks, its capacity, and what they share.

mod place;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tracing::{info, warn};
use uuid::Uuid;
use xbee_api::{ArrayMember, HostInfo, chain};
use xbee_engine::{
    Demand, DomainFate, Due, NEVER_MS, Phase, Queue, QueueError, Request, Step, Task,
};
use xbee_hypervisor::{HostCapabilities, Hypervisor};
use xbee_staging::Stager;

use crate::anywhere::Anywhere;
use crate::array::Array;
use crate::cache::{self, Cache, CacheError};
use crate::command::{CommandError, Placing};
use crate::config::{Backend, Config};
use crate::fault;
use crate::images::ImageStore;
use crate::plan::Plan;
use crate::steps;
use crate::store::{Entry, Job, Owner, Reservation, Store, StoreError, StoredTask, TaskRecord};
use crate::task::{self, Begin, TaskHandle};
use crate::translate::Swept;
use crate::uploads::Uploads;
use crate::view;

/// Longest time in which nobody looks at the clock.
const CLOCK_CHECK: Duration = Duration::from_secs(60);
/// Shortest.
const CLOCK_TICK: Duration = Duration::from_millis(1);

/// Everything that tasks share.
pub struct Host {
    /// Configuration.
    pub config: Config,
    /// Durable state.
    pub store: Store,
    /// Images.
    pub images: ImageStore,
    /// What runs domains.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// What moves files.
    pub stager: Stager,
    /// Files that were fetched and are kept.
    pub cache: Cache,
    /// Files that were sent for jobs.
    pub uploads: Uploads,
    capabilities: HostCapabilities,
    queue: Mutex<Queue<Uuid>>,
    /// Told when the queue has changed.
    queue_changed: Notify,
    /// Changes whenever something may begin that could not before.
    pub freed: watch::Sender<()>,
    /// Tasks to come that have their capacity already.
    places: Mutex<HashSet<Uuid>>,
    /// Jobs that are being placed here.
    pub placing: Placing,
    /// This host among others.
    anywhere: OnceLock<Arc<Anywhere>>,
    /// Ordered by id, so that prefixes are ranges.
    tasks: RwLock<BTreeMap<Uuid, Arc<TaskHandle>>>,
    arrays: RwLock<BTreeMap<Uuid, Arc<Array>>>,
}

/// Why a host does not come up.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A directory cannot be made or read.
    #[error("cannot use the data directory {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The hypervisor.
    #[error(transparent)]
    Hypervisor(#[from] xbee_hypervisor::Error),
    /// The cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

impl Host {
    /// Opens the data directory and looks at the hypervisor.
    pub async fn open(
        config: Config,
        hypervisor: Arc<dyn Hypervisor>,
        stager: Stager,
    ) -> Result<Arc<Host>, HostError> {
        let tasks = config.data.join("tasks");
        // Spools hold keys and users' files.
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&tasks);
        made.map_err(|source| HostError::Directory {
            path: tasks.clone(),
            source,
        })?;
        // Or a power cut could take the directories with what is in them.
        for path in tasks.ancestors().skip(1).take(2) {
            let synced = std::fs::File::open(path).and_then(|directory| directory.sync_all());
            synced.map_err(|source| HostError::Directory {
                path: path.into(),
                source,
            })?;
        }
        let uploads = Uploads::open(&config.data).map_err(|source| HostError::Directory {
            path: config.data.join("uploads"),
            source,
        })?;
        let store = Store::open(&config.data.join("tasks.sqlite"))?;
        let cache = Cache::open(config.data.join("cache"), config.cache, &store)?;
        let capabilities = hypervisor.probe().await?;
        let capacity = config.capacity(
            capabilities.cpus,
            capabilities.memory_bytes,
            free_bytes(&config.data)?,
        );
        let images = ImageStore::new(config.images.clone());
        let images = match config.backend {
            Backend::Sim => images.with_simulated_base(),
            Backend::Qemu | Backend::Xen => images,
        };
        Ok(Arc::new(Host {
            images,
            queue: Mutex::new(Queue::new(capacity, config.policy.clone())),
            queue_changed: Notify::new(),
            freed: watch::Sender::default(),
            places: Mutex::default(),
            placing: Placing::default(),
            anywhere: OnceLock::new(),
            tasks: RwLock::default(),
            arrays: RwLock::default(),
            config,
            store,
            hypervisor,
            stager,
            cache,
            uploads,
            capabilities,
        }))
    }

    /// Takes up the tasks of an earlier run: re-adopts domains that live, ends those that belong
    /// to nobody, and goes on where the journal stops.
    pub async fn recover(self: &Arc<Self>) -> Result<(), HostError> {
        let alive: HashSet<Uuid> = self.hypervisor.list().await?.iter().map(|d| d.id).collect();
        let mut wanted = HashSet::new();
        for stored in self.store.load()? {
            let id = stored.record.id;
            let mut state: Task = stored
                .journal
                .last()
                .map(|entry| entry.state.clone())
                .unwrap_or_default();
            self.account(&stored);
            let handle = self.hold(stored);
            if state.is_final() {
                if steps::has_temporary(&handle.spool) {
                    steps::remove_temporary(&handle.spool).await;
                }
                continue;
            }
            wanted.insert(id);
            // A domain whose results have all been taken out is not missed.
            let fate = if alive.contains(&id) || steps::has_results(&handle.spool) {
                DomainFate::Alive
            } else {
                DomainFate::Gone
            };
            if alive.contains(&id) {
                match self.hypervisor.console(id).await {
                    Ok(path) => drop(handle.console.send_replace(Some(path))),
                    Err(error) => warn!(task = %id, error = chain(&error), "no console"),
                }
            }
            let before = state.clone();
            let actions = state.recover(fate);
            let entry = (state != before).then(|| Entry {
                at_ms: view::now_ms(),
                state: state.clone(),
            });
            self.take_up(&handle, &state);
            info!(task = %id, ?fate, state = ?view::bes(&state), "taken up again");
            let begin = Begin { entry, actions };
            tokio::spawn(task::run(self.clone(), handle, begin));
            fault::point("taken up");
        }
        for id in alive.difference(&wanted) {
            warn!(domain = %id, "domain of no task: destroyed");
            fault::point("destroy unwanted");
            self.hypervisor.destroy(*id).await?;
        }
        self.remove_forgotten();
        let used_up = self.uploads_of(|task| task.is_final());
        self.uploads.settle(&self.uploads_in_use(), &used_up);
        self.schedule();
        tokio::spawn(keep_time(self.clone()));
        Ok(())
    }

    /// Gives a task of an earlier run its place in the queue.
    fn take_up(&self, task: &TaskHandle, state: &Task) {
        let (id, owner) = (task.record.id, task.record.owner.uid);
        let mut queue = self.lock_queue();
        if let Some(held) = &task.record.reservation {
            queue.restore(id, owner, held.demand(), (held.from_ms, held.until_ms));
        }
        let Some(request) = self.request(task) else {
            return;
        };
        match state.phase {
            Phase::Reserved | Phase::Held => {}
            Phase::Queued => queue.push(id, request),
            _ => {
                let admitted_ms = admitted_ms(&task.watch().borrow());
                queue.adopt(id, request, admitted_ms.unwrap_or_else(view::now_ms));
            }
        }
    }

    /// Counts what the owner of a task has had.
    fn account(&self, stored: &StoredTask) {
        let Some(job) = &stored.record.job else {
            return;
        };
        let journal = &stored.journal;
        let is_final = journal.last().is_some_and(|entry| entry.state.is_final());
        if let (true, Some(admitted_ms), Some(last)) =
            (is_final, admitted_ms(journal), journal.last())
        {
            let held_ms = last.at_ms.saturating_sub(admitted_ms) as f64;
            let owner = stored.record.owner.uid;
            self.lock_queue()
                .account(owner, held_ms * f64::from(job.plan.vcpus), last.at_ms);
        }
    }

    /// A task as the queue knows it, once it is known what it is to do.
    fn request(&self, task: &TaskHandle) -> Option<Request> {
        let job = task.job()?;
        let longest_ms = self.longest_ms(&job.plan);
        Some(Request {
            demand: task.demand()?,
            owner: task.record.owner.uid,
            priority: job.request.priority,
            longest_ms: longest_ms.unwrap_or(NEVER_MS),
            not_before_ms: task.state().not_before_ms,
        })
    }

    /// How long a job holds its capacity at most, if that is bounded, milliseconds.
    fn longest_ms(&self, plan: &Plan) -> Option<u64> {
        let allowance = self.config.staging_allowance.as_millis();
        let run_ms = plan.longest_run_ms()?;
        run_ms.checked_add(allowance.try_into().ok()?)
    }

    /// Puts a task that may start into the queue; one that had its turn gives its place back.
    pub fn enqueue(&self, task: &TaskHandle) {
        if let Some(request) = self.request(task) {
            self.lock_queue()
                .requeue(task.record.id, request, view::now_ms());
        }
        self.schedule();
    }

    /// Makes a request a task. Durable on return.
    pub async fn accept(
        self: &Arc<Self>,
        owner: Owner,
        job: Job,
    ) -> Result<Arc<TaskHandle>, CommandError> {
        self.lock_queue().check(owner.uid, job.plan.demand(), 1)?;
        let record = TaskRecord {
            id: Uuid::new_v4(),
            owner,
            secret: random(),
            member: None,
            reservation: None,
            job: Some(job),
        };
        let handle = self.insert_one(record, Task::default()).await?;
        self.enqueue(&handle);
        Ok(handle)
    }

    /// Makes the jobs of a sweep tasks, all or none. Durable on return.
    pub async fn accept_array(
        self: &Arc<Self>,
        owner: Owner,
        jobs: Vec<Swept>,
    ) -> Result<Arc<Array>, CommandError> {
        let count = jobs.len();
        {
            let queue = self.lock_queue();
            for swept in &jobs {
                queue.check(owner.uid, swept.job.plan.demand(), count)?;
            }
        }
        let id = Uuid::new_v4();
        let record = |(swept, number): (Swept, u32)| TaskRecord {
            id: Uuid::new_v4(),
            owner,
            secret: random(),
            member: Some(ArrayMember {
                array: id,
                number,
                assigned: swept.assigned,
            }),
            reservation: None,
            job: Some(swept.job),
        };
        let records = jobs.into_iter().zip(1..).map(record).collect();
        let handles = self.insert(records, Task::default()).await?;
        {
            let mut queue = self.lock_queue();
            let now_ms = view::now_ms();
            for handle in &handles {
                if let Some(request) = self.request(handle) {
                    queue.requeue(handle.record.id, request, now_ms);
                }
            }
        }
        self.schedule();
        self.array(id)
            .ok_or_else(|| CommandError::NotFound(id.to_string()))
    }

    /// Holds a stored task, and its array.
    fn hold(&self, stored: StoredTask) -> Arc<TaskHandle> {
        let record = &stored.record;
        let (id, spool) = (record.id, self.spool(record.id));
        let array = record.member.as_ref().map(|member| {
            let plan = record.job.as_ref().map(|job| &job.plan);
            let new = || {
                Arc::new(Array::new(
                    member.array,
                    record.owner,
                    stored.number,
                    plan.and_then(|plan| plan.name.clone()),
                    plan.map(|plan| plan.boot.label()).unwrap_or_default(),
                ))
            };
            let mut arrays = self.arrays.write().unwrap_or_else(PoisonError::into_inner);
            arrays.entry(member.array).or_insert_with(new).clone()
        });
        let handle = Arc::new(TaskHandle::new(stored, spool, array));
        self.write_tasks().insert(id, handle.clone());
        handle
    }

    /// An array by its id.
    pub fn array(&self, id: Uuid) -> Option<Arc<Array>> {
        let arrays = self.arrays.read().unwrap_or_else(PoisonError::into_inner);
        arrays.get(&id).cloned()
    }

    /// All arrays.
    pub fn arrays(&self) -> Vec<Arc<Array>> {
        let arrays = self.arrays.read().unwrap_or_else(PoisonError::into_inner);
        arrays.values().cloned().collect()
    }

    /// Holds capacity for a task to come. Durable on return.
    pub async fn reserve(
        self: &Arc<Self>,
        owner: Owner,
        mut held: Reservation,
    ) -> Result<Arc<TaskHandle>, CommandError> {
        let id = Uuid::new_v4();
        let now_ms = view::now_ms();
        held.from_ms = held.from_ms.max(now_ms);
        let span_ms = (held.from_ms, held.until_ms);
        // Held before it is written down: two who ask at a time do not get the same.
        self.lock_queue()
            .reserve(id, owner.uid, held.demand(), span_ms, now_ms)?;
        let record = TaskRecord {
            id,
            owner,
            secret: random(),
            member: None,
            reservation: Some(held),
            job: None,
        };
        let reserved = self.insert_one(record, Task::reserved()).await;
        if reserved.is_err() {
            self.lock_queue().remove(id, now_ms);
        }
        self.schedule();
        reserved
    }

    /// Whether a reserved task may do this.
    pub fn covers(&self, task: &TaskHandle, demand: Demand) -> bool {
        self.lock_queue().covers(task.record.id, demand) == Some(true)
    }

    async fn insert_one(
        self: &Arc<Self>,
        record: TaskRecord,
        state: Task,
    ) -> Result<Arc<TaskHandle>, CommandError> {
        let id = record.id;
        let mut handles = self.insert(vec![record], state).await?;
        handles
            .pop()
            .ok_or_else(|| CommandError::NotFound(id.to_string()))
    }

    async fn insert(
        self: &Arc<Self>,
        records: Vec<TaskRecord>,
        state: Task,
    ) -> Result<Vec<Arc<TaskHandle>>, CommandError> {
        let entry = Entry {
            at_ms: view::now_ms(),
            state,
        };
        let (host, first) = (self.clone(), entry.clone());
        let inserted = tokio::task::spawn_blocking(move || {
            let numbers = host.store.insert(&records, &first)?;
            Ok::<_, StoreError>(numbers.into_iter().zip(records))
        });
        let inserted = inserted
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        let hold = |(number, record)| {
            self.hold(StoredTask {
                number,
                record,
                journal: vec![entry.clone()],
            })
        };
        // All are known before the first may end, and with it what it shares with others.
        let handles: Vec<_> = inserted.map(hold).collect();
        for handle in &handles {
            tokio::spawn(task::run(self.clone(), handle.clone(), Begin::default()));
        }
        Ok(handles)
    }

    /// A task is final: its capacity is free.
    pub fn done(self: &Arc<Self>, task: &TaskHandle) {
        self.lock_queue().remove(task.record.id, view::now_ms());
        // Of one that never began, nothing was released. It is not waited for: a large file takes time.
        drop(self.release_uploads(task));
        self.schedule();
    }

    /// Cache entries that tasks name which are not over, each with one of them.
    pub fn cached_names(&self) -> HashMap<Uuid, Uuid> {
        let mut names = HashMap::new();
        for task in self.tasks().iter().filter(|task| !task.is_final()) {
            let sources = task.job().into_iter().flat_map(|job| job.plan.sources());
            let named = sources.filter_map(|source| cache::named(&source.uri));
            names.extend(named.map(|id| (id, task.record.id)));
        }
        names
    }

    /// Removes what was sent for a task, and for no other that needs it.
    pub fn release_uploads(self: &Arc<Self>, task: &TaskHandle) -> Option<JoinHandle<()>> {
        let sent = task.job().map(|job| job.plan.uploads().collect());
        self.remove_uploads(sent.unwrap_or_default())
    }

    /// What tasks take of what was sent.
    fn uploads_of(&self, which: impl Fn(&TaskHandle) -> bool) -> HashSet<Uuid> {
        let tasks = self.read_tasks();
        let tasks = tasks.values().filter(|task| which(task));
        let jobs = tasks.filter_map(|task| task.job());
        jobs.flat_map(|job| job.plan.uploads()).collect()
    }

    fn uploads_in_use(&self) -> HashSet<Uuid> {
        self.uploads_of(|task| {
            let phase = task.state().phase;
            !matches!(phase, Phase::Final { .. } | Phase::Releasing { .. })
        })
    }

    /// Removes those of these uploads that no task needs.
    fn remove_uploads(self: &Arc<Self>, mut ids: Vec<Uuid>) -> Option<JoinHandle<()>> {
        if ids.is_empty() {
            return None;
        }
        let in_use = self.uploads_in_use();
        ids.retain(|id| !in_use.contains(id));
        let host = self.clone();
        let remove = move || host.uploads.remove(&ids);
        Some(tokio::task::spawn_blocking(remove))
    }

    /// Forgets a final task and its files.
    pub async fn forget(&self, task: &TaskHandle) -> Result<(), StoreError> {
        self.store.remove(task.record.id)?;
        self.write_tasks().remove(&task.record.id);
        if let Some((array, number)) = task.array()
            && !array.forget(number)
        {
            let mut arrays = self.arrays.write().unwrap_or_else(PoisonError::into_inner);
            arrays.remove(&array.id);
        }
        fault::point("remove spool");
        if let Err(error) = tokio::fs::remove_dir_all(&task.spool).await
            && error.kind() != std::io::ErrorKind::NotFound
        {
            warn!(task = %task.record.id, %error, "spool not removed");
        }
        fault::point("spool removed");
        Ok(())
    }

    /// Removes spools of tasks that are no more: to forget one was cut off after its entry was removed.
    fn remove_forgotten(&self) {
        let entries = std::fs::read_dir(self.config.data.join("tasks"));
        for entry in entries.into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(id) = name.to_str().and_then(|name| name.parse::<Uuid>().ok()) else {
                continue;
            };
            if self.task(id).is_some() {
                continue;
            }
            fault::point("remove forgotten");
            match std::fs::remove_dir_all(entry.path()) {
                Ok(()) => info!(task = %id, "spool of no task: removed"),
                Err(error) => warn!(task = %id, %error, "spool not removed"),
            }
        }
    }

    fn schedule(&self) {
        self.admit();
        self.freed.send_replace(());
        self.queue_changed.notify_one();
    }

    fn admit(&self) {
        loop {
            let now_ms = view::now_ms();
            let Some(id) = self.lock_queue().admit(now_ms) else {
                break;
            };
            match self.task(id) {
                Some(task) => task.admit(),
                None if self.has_place(id) => {}
                None => self.lock_queue().remove(id, now_ms),
            }
        }
    }

    /// Ends what has to end by now, and begins what may; says when to look again.
    fn look_at_the_clock(&self) -> Option<u64> {
        self.admit();
        let now_ms = view::now_ms();
        let due = self.lock_queue().due(now_ms);
        for (id, why) in due {
            if let Some(task) = self.task(id) {
                task.terminate(match why {
                    Due::ReservationOver => "its reservation is over",
                    Due::InTheWay => {
                        "it ran longer than its WallTimeLimit and what this host allows for staging, and its place is reserved"
                    }
                });
            }
        }
        self.lock_queue().wake_ms(now_ms)
    }

    /// This host among others, if it is.
    pub fn anywhere(&self) -> Option<&Arc<Anywhere>> {
        self.anywhere.get()
    }

    /// From now on this host is among others; once.
    pub fn join(&self, anywhere: Arc<Anywhere>) {
        // A second one would change nothing, and nobody makes one.
        let _ = self.anywhere.set(anywhere);
    }

    /// Whether the host could ever run this.
    pub fn fits(&self, demand: Demand) -> Result<(), QueueError> {
        self.lock_queue().fits(demand)
    }

    /// What the host is.
    pub fn info(&self) -> HostInfo {
        HostInfo {
            version: env!("CARGO_PKG_VERSION").into(),
            backend: self.capabilities.backend.clone(),
            hypervisor: self.capabilities.version.clone(),
            accelerator: self.capabilities.accelerator.clone(),
            cpus: self.capabilities.cpus,
            memory_bytes: self.capabilities.memory_bytes,
            images: self.images.names(),
            channel: self.anywhere().map(|anywhere| anywhere.state()),
        }
    }

    /// A task by its id.
    pub fn task(&self, id: Uuid) -> Option<Arc<TaskHandle>> {
        self.read_tasks().get(&id).cloned()
    }

    /// Tasks whose id begins like this.
    pub fn tasks_with_prefix(&self, prefix: &str) -> Vec<Arc<TaskHandle>> {
        self.read_tasks()
            .iter()
            .filter(|(id, _)| id.to_string().starts_with(prefix))
            .map(|(_, task)| task.clone())
            .collect()
    }

    /// All tasks.
    pub fn tasks(&self) -> Vec<Arc<TaskHandle>> {
        self.read_tasks().values().cloned().collect()
    }

    fn spool(&self, id: Uuid) -> PathBuf {
        self.config.data.join("tasks").join(id.to_string())
    }

    /// Directory of a domain.
    pub fn run_dir(&self, id: Uuid) -> PathBuf {
        self.config.domains().join(id.to_string())
    }

    fn lock_queue(&self) -> MutexGuard<'_, Queue<Uuid>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_tasks(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<Uuid, Arc<TaskHandle>>> {
        self.tasks.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_tasks(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<Uuid, Arc<TaskHandle>>> {
        self.tasks.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that are free where this directory is.
fn free_bytes(path: &std::path::Path) -> Result<u64, HostError> {
    let stat = rustix::fs::statvfs(path).map_err(|error| HostError::Directory {
        path: path.into(),
        source: error.into(),
    })?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// When a task was given its capacity the last time.
fn admitted_ms(journal: &[Entry]) -> Option<u64> {
    let first = Phase::Working {
        step: Step::StageIn,
    };
    let mut entries = journal.iter().rev();
    let admitted = entries.find(|entry| entry.state.phase == first)?;
    Some(admitted.at_ms)
}

/// Looks at the clock whenever a reservation begins or ends, or a failed task may be tried again.
async fn keep_time(host: Arc<Host>) {
    loop {
        let wake_ms = host.look_at_the_clock();
        // Not waited for, as it may take time.
        drop(host.remove_uploads(host.uploads.old(view::now_ms())));
        let wait = wake_ms.map(|at_ms| Duration::from_millis(at_ms.saturating_sub(view::now_ms())));
        // Clocks are set: it is not slept through.
        let wait = wait.unwrap_or(CLOCK_CHECK).clamp(CLOCK_TICK, CLOCK_CHECK);
        tokio::select! {
            () = host.queue_changed.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    fill_random(&mut bytes);
    bytes
}

/// Random bytes of the kernel.
pub fn fill_random(bytes: &mut [u8]) {
    let mut filled = 0;
    while filled < bytes.len() {
        // Fails only with EINTR once the kernel's generator is up, and waits until it is.
        if let Ok(n) =
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
        {
            filled += n;
        }
    }
}

/// What went wrong while something was torn down: said, not fatal.
pub fn log_teardown(what: &str, error: &dyn std::error::Error) {
    warn!(error = chain(error), "{what}");
}
