//! The host: its tasks, its capacity, and what they share.

use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use tracing::{info, warn};
use uuid::Uuid;
use xbee_api::{HostInfo, SubmitRequest, chain};
use xbee_engine::{Demand, DomainFate, Queue, QueueError, Task};
use xbee_hypervisor::{HostCapabilities, Hypervisor};
use xbee_staging::Stager;

use crate::command::CommandError;
use crate::config::{Backend, Config};
use crate::fault;
use crate::images::ImageStore;
use crate::plan::Plan;
use crate::steps;
use crate::store::{Entry, Owner, Store, StoreError, StoredTask, TaskRecord};
use crate::task::{self, Begin, TaskHandle};
use crate::view;

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
    capabilities: HostCapabilities,
    queue: Mutex<Queue<Uuid>>,
    /// Ordered by id, so that prefixes are ranges.
    tasks: RwLock<BTreeMap<Uuid, Arc<TaskHandle>>>,
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
        let store = Store::open(&config.data.join("tasks.sqlite"))?;
        let capabilities = hypervisor.probe().await?;
        let capacity = config.capacity(capabilities.cpus, capabilities.memory_bytes);
        let images = ImageStore::new(config.images.clone());
        let images = match config.backend {
            Backend::Sim => images.with_simulated_base(),
            Backend::Qemu | Backend::Xen => images,
        };
        Ok(Arc::new(Host {
            images,
            queue: Mutex::new(Queue::new(capacity)),
            tasks: RwLock::default(),
            config,
            store,
            hypervisor,
            stager,
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
            let demand = stored.record.plan.demand();
            let handle = Arc::new(TaskHandle::new(stored, self.spool(id)));
            self.write_tasks().insert(id, handle.clone());
            if state.is_final() {
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
            if handle.is_queued() {
                self.lock_queue().push(id, demand);
            } else {
                self.lock_queue().adopt(id, demand);
            }
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
        self.schedule();
        Ok(())
    }

    /// Makes a request a task. Durable on return.
    pub async fn accept(
        self: &Arc<Self>,
        owner: Owner,
        request: SubmitRequest,
        plan: Plan,
    ) -> Result<Arc<TaskHandle>, CommandError> {
        let demand = plan.demand();
        self.lock_queue().check(demand)?;
        let mut secret = [0; 32];
        fill_random(&mut secret);
        let record = TaskRecord {
            id: Uuid::new_v4(),
            owner,
            request,
            plan,
            secret,
        };
        let entry = Entry {
            at_ms: view::now_ms(),
            state: Task::default(),
        };
        let (host, stored) = (self.clone(), (record.clone(), entry.clone()));
        let number = tokio::task::spawn_blocking(move || host.store.insert(&stored.0, &stored.1))
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        let id = record.id;
        let stored = StoredTask {
            number,
            record,
            journal: vec![entry],
        };
        let handle = Arc::new(TaskHandle::new(stored, self.spool(id)));
        self.write_tasks().insert(id, handle.clone());
        self.lock_queue().push(id, demand);
        tokio::spawn(task::run(self.clone(), handle.clone(), Begin::default()));
        self.schedule();
        Ok(handle)
    }

    /// A task is final: its capacity is free.
    pub fn done(&self, task: &TaskHandle) {
        self.lock_queue().remove(task.record.id);
        self.schedule();
    }

    /// Forgets a final task and its files.
    pub async fn forget(&self, task: &TaskHandle) -> Result<(), StoreError> {
        self.store.remove(task.record.id)?;
        self.write_tasks().remove(&task.record.id);
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
        loop {
            let Some(id) = self.lock_queue().admit() else {
                return;
            };
            match self.task(id) {
                Some(task) => task.admit(),
                None => self.lock_queue().remove(id),
            }
        }
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
