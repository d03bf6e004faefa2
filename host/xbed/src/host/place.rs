//! Places for tasks that are not here yet: capacity that is held while a pool is asked for the task, so that what is taken
//! can begin at once.

use std::collections::HashSet;
use std::sync::{Arc, MutexGuard, PoisonError};

use uuid::Uuid;
use xbee_engine::{Demand, Load, NEVER_MS, QueueError, Request, Task};

use super::{Host, random};
use crate::anywhere::{AnywhereError, Begins};
use crate::command::CommandError;
use crate::fault;
use crate::pool::KEYS_KNOWN_MS;
use crate::store::{Entry, Job, Owner, StoreError, StoredTask, TaskRecord};
use crate::task::{self, Begin, TaskHandle};
use crate::view;

/// The least that a task needs.
const LEAST: Demand = Demand {
    vcpus: 1,
    memory_bytes: 1,
    disk_bytes: 0,
};

impl Host {
    /// Whether anything at all could begin.
    pub fn has_room(&self) -> bool {
        self.lock_queue().has_room(LEAST)
    }

    /// Whether this user could ever have this run here, though not now.
    pub fn could(&self, owner: Owner, demand: Demand) -> Result<(), QueueError> {
        match self.lock_queue().check(owner.uid, demand, 1) {
            Err(QueueError::TooManyWaiting { .. } | QueueError::Full { .. }) => Ok(()),
            checked => checked,
        }
    }

    /// When something of this size could begin here, and how much of the host is in use.
    ///
    /// # Errors
    /// It never could.
    pub fn standing(&self, demand: Demand) -> Result<(Begins, Load), QueueError> {
        let queue = self.lock_queue();
        queue.fits(demand)?;
        let load = queue.load();
        let begins = match (self.config.domains, load.waiting) {
            (0, _) => Begins::Never,
            (_, 0) if queue.has_room(demand) => Begins::AtOnce,
            _ => Begins::Later,
        };
        Ok((begins, load))
    }

    /// Takes a job that the client placed here, under an id that is made of its key: once, however often it is asked for.
    /// Durable on return.
    pub async fn place(
        self: &Arc<Self>,
        (id, owner): (Uuid, Owner),
        job: Job,
        at_once: bool,
    ) -> Result<(), CommandError> {
        self.lock_queue().check(owner.uid, job.plan.demand(), 1)?;
        if at_once && !self.take_place(id, owner, &job) {
            return Err(AnywhereError::NotAtOnce.into());
        }
        let now_ms = view::now_ms();
        let times = (now_ms, now_ms.saturating_sub(KEYS_KNOWN_MS));
        fault::point("place");
        let accepted = self.accept_offered((id, owner), Some(job), Task::default(), times);
        let accepted = accepted.await;
        fault::point("placed");
        if accepted.is_err() {
            self.give_place(id);
        }
        match accepted? {
            true => Ok(()),
            false => Err(AnywhereError::Gone(id).into()),
        }
    }

    /// Holds the capacity of a task to come, if it could begin now: by its turn among those that wait here, too.
    pub fn take_place(&self, id: Uuid, owner: Owner, job: &Job) -> bool {
        let request = Request {
            demand: job.plan.demand(),
            owner: owner.uid,
            priority: job.request.priority,
            longest_ms: self.longest_ms(&job.plan).unwrap_or(NEVER_MS),
            not_before_ms: 0,
        };
        // First, or it would be taken for one that was forgotten.
        if self.task(id).is_some() || !self.lock_places().insert(id) {
            return false;
        }
        if self
            .lock_queue()
            .check(owner.uid, request.demand, 1)
            .is_ok()
        {
            self.lock_queue().push(id, request);
            self.admit();
        }
        let mut queue = self.lock_queue();
        if queue.is_running(id) {
            return true;
        }
        queue.remove(id, view::now_ms());
        drop(queue);
        self.lock_places().remove(&id);
        false
    }

    /// Gives a place back.
    pub fn give_place(&self, id: Uuid) {
        if self.lock_places().remove(&id) {
            self.lock_queue().remove(id, view::now_ms());
            self.schedule();
        }
    }

    /// Gives all places back.
    pub fn give_places(&self) {
        let all: Vec<Uuid> = self.lock_places().iter().copied().collect();
        all.into_iter().for_each(|id| self.give_place(id));
    }

    pub(super) fn has_place(&self, id: Uuid) -> bool {
        self.lock_places().contains(&id)
    }

    fn lock_places(&self) -> MutexGuard<'_, HashSet<Uuid>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes what was offered a task, once; without a job it is in this state and that is all. It begins at once where it
    /// has its place, else it waits for its turn. Durable on return; false if it has been here.
    pub async fn accept_offered(
        self: &Arc<Self>,
        (id, owner): (Uuid, Owner),
        job: Option<Job>,
        state: Task,
        (offered_ms, forget_ms): (u64, u64),
    ) -> Result<bool, CommandError> {
        let record = TaskRecord {
            id,
            owner,
            secret: random(),
            member: None,
            reservation: None,
            job,
        };
        let entry = Entry {
            at_ms: view::now_ms(),
            state,
        };
        let (host, first) = (self.clone(), entry.clone());
        let inserted = tokio::task::spawn_blocking(move || {
            let number = host
                .store
                .insert_offered(&record, &first, offered_ms, forget_ms)?;
            Ok::<_, StoreError>(number.map(|number| (number, record)))
        });
        let inserted = inserted
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        let Some((number, record)) = inserted else {
            // It has been here. A place that was taken for it is nobody's.
            self.give_place(id);
            return Ok(false);
        };
        let handle: Arc<TaskHandle> = self.hold(StoredTask {
            number,
            record,
            journal: vec![entry],
        });
        tokio::spawn(task::run(self.clone(), handle.clone(), Begin::default()));
        // From here on the place is the task's.
        match self.lock_places().remove(&id) {
            true => handle.admit(),
            false => self.enqueue(&handle),
        }
        Ok(true)
    }
}
