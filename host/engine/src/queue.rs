//! Which task may begin, and what may be promised.
//!
//! The order: reservations whose time has come; then by priority; then the user who had least of the host of late; then
//! who came first. What cannot begin yet is overtaken only by tasks that do not delay it: they fit beside it, or are
//! bounded in time and over before it could begin (EASY backfill, D. G. Feitelson and A. Mu'alem Weil, IPPS 1998). A
//! reservation is an entry in a [`Calendar`], which no task may run into.
//!
//! Time is the caller's, in milliseconds.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;

use crate::calendar::{Calendar, Claim, NEVER_MS, Used};

/// What a host has for domains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Virtual CPUs that may be given out at a time.
    pub vcpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Disk in bytes.
    pub disk_bytes: u64,
    /// Domains at a time.
    pub domains: u32,
    /// Tasks that may wait.
    pub queue_length: usize,
}

/// What a task needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Disk in bytes; 0: nothing is promised to it.
    pub disk_bytes: u64,
}

/// The most that one user may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// Virtual CPUs at a time.
    pub vcpus: u64,
    /// Memory at a time, bytes.
    pub memory_bytes: u64,
    /// Disk at a time, bytes.
    pub disk_bytes: u64,
    /// Tasks that run at a time.
    pub running: u64,
    /// Tasks that wait, and reservations.
    pub waiting: usize,
}

impl Quota {
    /// As much as there is.
    pub const UNLIMITED: Quota = Quota {
        vcpus: u64::MAX,
        memory_bytes: u64::MAX,
        disk_bytes: u64::MAX,
        running: u64::MAX,
        waiting: usize::MAX,
    };

    /// Whether a user who has so much may have this more.
    fn leaves(&self, used: &Used, demand: Demand) -> bool {
        used.domains < self.running
            && used.vcpus + u64::from(demand.vcpus) <= self.vcpus
            && used.memory_bytes.saturating_add(demand.memory_bytes) <= self.memory_bytes
            && used.disk_bytes.saturating_add(demand.disk_bytes) <= self.disk_bytes
    }
}

/// What is decided by the operator, not by who asks.
#[derive(Debug, Clone)]
pub struct Policy {
    /// What each user may have, unless named in `quotas`.
    pub quota: Quota,
    /// What these users may have, by user id.
    pub quotas: HashMap<u32, Quota>,
    /// After how long what a user had counts half, milliseconds.
    pub half_life_ms: u64,
    /// Reservations there may be at a time.
    pub reservations: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            quota: Quota::UNLIMITED,
            quotas: HashMap::new(),
            half_life_ms: 24 * 60 * 60 * 1000,
            reservations: 1000,
        }
    }
}

/// A task that wants to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What it needs.
    pub demand: Demand,
    /// Whose it is: a user id.
    pub owner: u32,
    /// Higher ones come first.
    pub priority: i8,
    /// How long it holds what it needs at most, milliseconds; [`NEVER_MS`]: nobody knows.
    pub longest_ms: u64,
    /// Not before this moment.
    pub not_before_ms: u64,
}

/// Why a task shall be ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Its reservation is over.
    ReservationOver,
    /// It has run longer than it said, and a reservation needs its place.
    InTheWay,
}

/// Why the queue does not take a task.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// More CPUs than the host ever has.
    #[error(
        "the job wants {wanted} CPUs, this host gives at most {most} to its domains: ask for fewer in TotalCPUCount"
    )]
    TooManyCpus {
        /// Asked for.
        wanted: u32,
        /// There are.
        most: u64,
    },
    /// More memory than the host ever has.
    #[error(
        "the job wants {wanted} bytes of memory, this host gives at most {most} to its domains: ask for less in TotalPhysicalMemory"
    )]
    TooMuchMemory {
        /// Asked for, bytes.
        wanted: u64,
        /// There are, bytes.
        most: u64,
    },
    /// More disk than the host ever has.
    #[error(
        "the job wants {wanted} bytes of disk, this host gives at most {most} to its domains: ask for less in TotalDiskSpace"
    )]
    TooMuchDisk {
        /// Asked for, bytes.
        wanted: u64,
        /// There are, bytes.
        most: u64,
    },
    /// More than the user may have.
    #[error("the job wants more {what} than you may have at a time on this host, which is {most}")]
    OverQuota {
        /// Of what.
        what: &'static str,
        /// The quota.
        most: u64,
    },
    /// The user has too many tasks that wait.
    #[error("{limit} of your tasks and reservations wait, and no more may: try again later")]
    TooManyWaiting {
        /// The quota.
        limit: usize,
    },
    /// The queue is at its limit.
    #[error("the queue is full ({limit} tasks wait): try again later")]
    Full {
        /// The limit.
        limit: usize,
    },
    /// There are too many reservations.
    #[error("this host holds {limit} reservations, and no more: try again later")]
    TooManyReservations {
        /// The limit.
        limit: usize,
    },
    /// The span of time makes no sense.
    #[error(
        "a reservation from {from_ms} to {until_ms} (milliseconds since 1970) is over or has no length: give a time to come"
    )]
    NoSpan {
        /// Asked for.
        from_ms: u64,
        /// Asked for.
        until_ms: u64,
    },
    /// Others have what is asked for.
    #[error("there is not so much free at that time{}", match .earliest_ms {
        Some(_) => ": ask for another",
        None => ", nor later, as far as this host knows: tasks that said no WallTimeLimit run on it",
    })]
    NoRoom {
        /// From when on there is, milliseconds.
        earliest_ms: Option<u64>,
    },
}

impl QueueError {
    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            QueueError::TooManyCpus { .. } => "too-many-cpus",
            QueueError::TooMuchMemory { .. } => "too-much-memory",
            QueueError::TooMuchDisk { .. } => "too-much-disk",
            QueueError::OverQuota { .. } | QueueError::TooManyWaiting { .. } => "over-quota",
            QueueError::Full { .. } => "queue-full",
            QueueError::TooManyReservations { .. } => "too-many-reservations",
            QueueError::NoSpan { .. } => "invalid-reservation",
            QueueError::NoRoom { .. } => "no-room",
        }
    }
}

/// Tasks looked at beyond the first that cannot begin.
const BACKFILL_DEPTH: usize = 64;

#[derive(Debug, Clone, Copy)]
struct Running {
    demand: Demand,
    owner: u32,
    admitted_ms: u64,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    request: Request,
    number: u64,
}

/// What a user has and had.
#[derive(Debug, Clone, Copy, Default)]
struct Share {
    running: Used,
    /// Sum of CPUs times moment of admission of what runs.
    begun: u128,
    /// Tasks that wait, and reservations.
    waiting: usize,
    /// CPU milliseconds of what has ended, halved with time.
    past: f64,
    past_at_ms: u64,
}

impl Share {
    fn usage(&self, now_ms: u64, half_life_ms: u64) -> f64 {
        let age = now_ms.saturating_sub(self.past_at_ms) as f64 / half_life_ms.max(1) as f64;
        let running = u128::from(now_ms) * u128::from(self.running.vcpus);
        self.past * (-age).exp2() + running.saturating_sub(self.begun) as f64
    }
}

/// Waiting and admitted tasks of a host, and its reservations, named by `K`.
#[derive(Debug)]
pub struct Queue<K> {
    capacity: Capacity,
    policy: Policy,
    /// What runs, as far as it is known for how long, and reservations.
    calendar: Calendar<K>,
    reservations: HashMap<K, u32>,
    running: HashMap<K, Running>,
    used: Used,
    waiting: HashMap<K, Waiting>,
    /// Of those that wait: by priority and user, in their order.
    lanes: BTreeMap<(Reverse<i8>, u32), BTreeMap<u64, K>>,
    /// Of those that wait: until when.
    delayed: BTreeMap<(u64, u64), K>,
    /// Of those that wait: those that have a reservation.
    reserved: BTreeMap<u64, K>,
    shares: HashMap<u32, Share>,
    next_number: u64,
}

impl<K: Copy + Eq + Hash> Queue<K> {
    /// An empty queue.
    pub fn new(capacity: Capacity, policy: Policy) -> Self {
        Queue {
            capacity,
            policy,
            calendar: Calendar::default(),
            reservations: HashMap::new(),
            running: HashMap::new(),
            used: Used::default(),
            waiting: HashMap::new(),
            lanes: BTreeMap::new(),
            delayed: BTreeMap::new(),
            reserved: BTreeMap::new(),
            shares: HashMap::new(),
            next_number: 0,
        }
    }

    /// Whether the host could ever run this.
    pub fn fits(&self, demand: Demand) -> Result<(), QueueError> {
        if demand.vcpus > self.capacity.vcpus {
            return Err(QueueError::TooManyCpus {
                wanted: demand.vcpus,
                most: self.capacity.vcpus.into(),
            });
        }
        if demand.memory_bytes > self.capacity.memory_bytes {
            return Err(QueueError::TooMuchMemory {
                wanted: demand.memory_bytes,
                most: self.capacity.memory_bytes,
            });
        }
        if demand.disk_bytes > self.capacity.disk_bytes {
            return Err(QueueError::TooMuchDisk {
                wanted: demand.disk_bytes,
                most: self.capacity.disk_bytes,
            });
        }
        Ok(())
    }

    fn quota(&self, owner: u32) -> &Quota {
        self.policy.quotas.get(&owner).unwrap_or(&self.policy.quota)
    }

    /// Whether this user's tasks may be taken now, `count` of them.
    pub fn check(&self, owner: u32, demand: Demand, count: usize) -> Result<(), QueueError> {
        self.fits(demand)?;
        let quota = self.quota(owner);
        for (what, wanted, most) in [
            ("CPUs", demand.vcpus.into(), quota.vcpus),
            ("bytes of memory", demand.memory_bytes, quota.memory_bytes),
            ("bytes of disk", demand.disk_bytes, quota.disk_bytes),
            ("tasks", 1, quota.running),
        ] {
            if wanted > most {
                return Err(QueueError::OverQuota { what, most });
            }
        }
        let waiting = self.shares.get(&owner).map_or(0, |share| share.waiting);
        if waiting.saturating_add(count) > quota.waiting {
            return Err(QueueError::TooManyWaiting {
                limit: quota.waiting,
            });
        }
        if self.waiting.len().saturating_add(count) > self.capacity.queue_length {
            return Err(QueueError::Full {
                limit: self.capacity.queue_length,
            });
        }
        Ok(())
    }

    /// Holds so much for a task to come.
    pub fn reserve(
        &mut self,
        key: K,
        owner: u32,
        demand: Demand,
        span_ms: (u64, u64),
        now_ms: u64,
    ) -> Result<(), QueueError> {
        let (from_ms, until_ms) = span_ms;
        self.check(owner, demand, 1)?;
        if self.reservations.len() >= self.policy.reservations {
            return Err(QueueError::TooManyReservations {
                limit: self.policy.reservations,
            });
        }
        let from_ms = from_ms.max(now_ms);
        if until_ms <= from_ms || until_ms == NEVER_MS {
            return Err(QueueError::NoSpan { from_ms, until_ms });
        }
        let length_ms = until_ms - from_ms;
        let room = self
            .calendar
            .earliest(&self.capacity, demand, from_ms, length_ms);
        let owns = |key: &K| {
            self.reservations.get(key) == Some(&owner)
                || self
                    .running
                    .get(key)
                    .is_some_and(|task| task.owner == owner)
        };
        let own: Calendar<K> = self.calendar.iter().filter(|(key, _)| owns(key)).collect();
        let quota = self.quota(owner);
        let most = Capacity {
            vcpus: quota.vcpus.try_into().unwrap_or(u32::MAX),
            memory_bytes: quota.memory_bytes,
            disk_bytes: quota.disk_bytes,
            domains: quota.running.try_into().unwrap_or(u32::MAX),
            queue_length: 0,
        };
        let allowed = own.earliest(&most, demand, from_ms, length_ms);
        if room != Some(from_ms) || allowed != Some(from_ms) {
            return Err(QueueError::NoRoom {
                earliest_ms: room.zip(allowed).map(|(room, allowed)| room.max(allowed)),
            });
        }
        self.restore(key, owner, demand, (from_ms, until_ms));
        Ok(())
    }

    /// Takes a reservation that was made before a restart.
    pub fn restore(&mut self, key: K, owner: u32, demand: Demand, span_ms: (u64, u64)) {
        let claim = Claim {
            demand,
            from_ms: span_ms.0,
            until_ms: span_ms.1,
        };
        self.calendar.insert(key, claim);
        if self.reservations.insert(key, owner).is_none() {
            self.share(owner).waiting += 1;
        }
    }

    fn share(&mut self, owner: u32) -> &mut Share {
        self.shares.entry(owner).or_default()
    }

    /// Takes a task; one that has a reservation of the same name begins in its time. One that was durably accepted before
    /// is taken even beyond the limits (after a restart), so this does not fail: ask [`Queue::check`] first.
    pub fn push(&mut self, key: K, request: Request) {
        let number = self.next_number;
        self.next_number += 1;
        let waiting = Waiting { request, number };
        if self.waiting.insert(key, waiting).is_some() {
            return;
        }
        if self.reservations.contains_key(&key) {
            self.reserved.insert(number, key);
            return;
        }
        self.share(request.owner).waiting += 1;
        if request.not_before_ms > 0 {
            self.delayed.insert((request.not_before_ms, number), key);
        } else {
            self.queue(key, waiting);
        }
    }

    fn queue(&mut self, key: K, waiting: Waiting) {
        let lane = (Reverse(waiting.request.priority), waiting.request.owner);
        self.lanes
            .entry(lane)
            .or_default()
            .insert(waiting.number, key);
    }

    /// Accounts for a task that holds its capacity since `admitted_ms`.
    pub fn adopt(&mut self, key: K, request: Request, admitted_ms: u64) {
        let Request { demand, owner, .. } = request;
        let running = Running {
            demand,
            owner,
            admitted_ms,
        };
        if self.running.insert(key, running).is_some() {
            return;
        }
        self.used.add(demand);
        let share = self.share(owner);
        share.running.add(demand);
        share.begun += u128::from(admitted_ms) * u128::from(demand.vcpus);
        if !self.reservations.contains_key(&key) {
            let claim = Claim {
                demand,
                from_ms: admitted_ms,
                until_ms: admitted_ms.saturating_add(request.longest_ms),
            };
            self.calendar.insert(key, claim);
        }
    }

    /// Counts what a user had before a restart: so many CPUs times milliseconds until that moment.
    pub fn account(&mut self, owner: u32, cpu_ms: f64, until_ms: u64) {
        let half_life_ms = self.policy.half_life_ms;
        let share = self.share(owner);
        let now_ms = until_ms.max(share.past_at_ms);
        let halved = |amount: f64, at_ms: u64| {
            amount * (-((now_ms - at_ms) as f64) / half_life_ms.max(1) as f64).exp2()
        };
        share.past = halved(share.past, share.past_at_ms) + halved(cpu_ms, until_ms);
        share.past_at_ms = now_ms;
    }

    /// An admitted task waits again; its reservation stays, if it has one.
    pub fn requeue(&mut self, key: K, request: Request, now_ms: u64) {
        self.give_back(key, now_ms);
        if !self.reservations.contains_key(&key) {
            self.calendar.remove(key);
        }
        self.push(key, request);
    }

    fn give_back(&mut self, key: K, now_ms: u64) {
        let Some(task) = self.running.remove(&key) else {
            return;
        };
        self.used.take(task.demand);
        let share = self.share(task.owner);
        share.running.take(task.demand);
        share.begun -= u128::from(task.admitted_ms) * u128::from(task.demand.vcpus);
        let held_ms = now_ms.saturating_sub(task.admitted_ms) as f64;
        self.account(task.owner, held_ms * f64::from(task.demand.vcpus), now_ms);
    }

    /// Forgets a task, waiting or admitted, and its reservation; its capacity is free again.
    pub fn remove(&mut self, key: K, now_ms: u64) {
        self.calendar.remove(key);
        if let Some(owner) = self.reservations.remove(&key) {
            self.share(owner).waiting -= 1;
            if let Some(waiting) = self.waiting.remove(&key) {
                self.reserved.remove(&waiting.number);
            }
        } else if let Some(waiting) = self.waiting.remove(&key) {
            self.unqueue(&waiting);
        }
        self.give_back(key, now_ms);
    }

    fn unqueue(&mut self, waiting: &Waiting) {
        let Request {
            owner,
            priority,
            not_before_ms,
            ..
        } = waiting.request;
        self.share(owner).waiting -= 1;
        self.delayed.remove(&(not_before_ms, waiting.number));
        let lane = (Reverse(priority), owner);
        if let Some(tasks) = self.lanes.get_mut(&lane) {
            tasks.remove(&waiting.number);
            if tasks.is_empty() {
                self.lanes.remove(&lane);
            }
        }
    }

    /// Admits the next task if its turn has come and there is room.
    pub fn admit(&mut self, now_ms: u64) -> Option<K> {
        while let Some((&(at_ms, number), &key)) = self.delayed.first_key_value()
            && at_ms <= now_ms
        {
            self.delayed.remove(&(at_ms, number));
            if let Some(waiting) = self.waiting.get(&key).copied() {
                self.queue(key, waiting);
            }
        }
        let key = self
            .next_reserved(now_ms)
            .or_else(|| self.next_queued(now_ms))?;
        let waiting = self.waiting.remove(&key)?;
        if self.reservations.contains_key(&key) {
            self.reserved.remove(&waiting.number);
        } else {
            self.unqueue(&waiting);
        }
        self.adopt(key, waiting.request, now_ms);
        Some(key)
    }

    fn next_reserved(&self, now_ms: u64) -> Option<K> {
        let fits = |key: &&K| {
            self.calendar.get(**key).is_some_and(|claim| {
                claim.from_ms <= now_ms
                    && now_ms < claim.until_ms
                    && self.used.leaves(&self.capacity, claim.demand)
            })
        };
        self.reserved.values().find(fits).copied()
    }

    fn next_queued(&mut self, now_ms: u64) -> Option<K> {
        let mut first_blocked = None;
        let mut found = None;
        for key in self.ranked(now_ms) {
            let Some(Waiting { request, .. }) = self.waiting.get(&key).copied() else {
                continue;
            };
            let demand = request.demand;
            let until_ms = now_ms.saturating_add(request.longest_ms);
            if self.used.leaves(&self.capacity, demand)
                && self
                    .calendar
                    .has_room(&self.capacity, demand, now_ms, until_ms)
            {
                found = Some(key);
                break;
            }
            if first_blocked.is_some() {
                continue;
            }
            let from_ms =
                self.calendar
                    .earliest(&self.capacity, demand, now_ms, request.longest_ms);
            // Where nobody knows when it can begin, whatever overtakes it might delay it.
            let Some(from_ms) = from_ms.filter(|from_ms| *from_ms > now_ms) else {
                break;
            };
            first_blocked = Some(key);
            let claim = Claim {
                demand,
                from_ms,
                until_ms: from_ms.saturating_add(request.longest_ms),
            };
            self.calendar.insert(key, claim);
        }
        if let Some(key) = first_blocked {
            self.calendar.remove(key);
        }
        found
    }

    /// Those that wait and whose users may have them now, the first ones in their order.
    fn ranked(&self, now_ms: u64) -> Vec<K> {
        let mut ranked = vec![];
        let priorities: BTreeSet<Reverse<i8>> = self.lanes.keys().map(|(p, _)| *p).collect();
        for priority in priorities {
            let mut users: Vec<_> = self
                .lanes
                .range((priority, 0)..=(priority, u32::MAX))
                .map(|((_, owner), tasks)| {
                    let share = self.shares.get(owner).copied().unwrap_or_default();
                    let usage = share.usage(now_ms, self.policy.half_life_ms);
                    let first = tasks.first_key_value().map_or(0, |(number, _)| *number);
                    (usage, first, *owner, share, tasks)
                })
                .collect();
            users.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            for (_, _, owner, share, tasks) in users {
                let quota = self.quota(owner);
                for key in tasks.values().take(BACKFILL_DEPTH) {
                    let demand = self.waiting.get(key).map(|waiting| waiting.request.demand);
                    if demand.is_some_and(|demand| quota.leaves(&share.running, demand)) {
                        ranked.push(*key);
                    }
                    if ranked.len() == BACKFILL_DEPTH {
                        return ranked;
                    }
                }
            }
        }
        ranked
    }

    /// Tasks that shall end now, and why. They stay until they are removed.
    pub fn due(&self, now_ms: u64) -> Vec<(K, Due)> {
        let mut due = vec![];
        let over = |key: &K| {
            self.calendar
                .get(*key)
                .is_some_and(|claim| claim.until_ms <= now_ms)
        };
        let blocked = self.reserved.values().find_map(|key| {
            let claim = self.calendar.get(*key)?;
            let now = claim.from_ms <= now_ms && now_ms < claim.until_ms;
            (now && !self.used.leaves(&self.capacity, claim.demand)).then_some(claim.demand)
        });
        for key in self.reservations.keys().filter(|key| over(key)) {
            due.push((*key, Due::ReservationOver));
        }
        let Some(wanted) = blocked else { return due };
        let mut overrun: Vec<(K, Claim)> = self
            .calendar
            .iter()
            .filter(|(key, _)| self.running.contains_key(key) && over(key))
            .map(|(key, claim)| (key, *claim))
            .collect();
        overrun.sort_by_key(|(_, claim)| claim.until_ms);
        let mut used = self.used;
        for (key, claim) in overrun {
            if used.leaves(&self.capacity, wanted) {
                break;
            }
            used.take(claim.demand);
            if !self.reservations.contains_key(&key) {
                due.push((key, Due::InTheWay));
            }
        }
        due
    }

    /// When time alone may change what [`Queue::admit`] and [`Queue::due`] say.
    pub fn wake_ms(&self, now_ms: u64) -> Option<u64> {
        // The end of what runs is told by itself, unless a reservation waits for it.
        let claims = (!self.reservations.is_empty())
            .then(|| self.calendar.iter())
            .into_iter()
            .flatten()
            .flat_map(|(_, claim)| [claim.from_ms, claim.until_ms]);
        let delayed = self.delayed.keys().map(|(at_ms, _)| *at_ms).take(1);
        claims
            .chain(delayed)
            .filter(|at_ms| *at_ms > now_ms && *at_ms != NEVER_MS)
            .min()
    }

    /// Whether a reservation is large enough for this; `None`: there is none.
    pub fn covers(&self, key: K, demand: Demand) -> Option<bool> {
        self.reservations.get(&key)?;
        let held = self.calendar.get(key)?.demand;
        Some(
            demand.vcpus <= held.vcpus
                && demand.memory_bytes <= held.memory_bytes
                && demand.disk_bytes <= held.disk_bytes,
        )
    }

    /// Whether this has a reservation, and from when to when.
    pub fn reservation(&self, key: K) -> Option<(u64, u64)> {
        self.reservations.get(&key)?;
        let claim = self.calendar.get(key)?;
        Some((claim.from_ms, claim.until_ms))
    }

    /// Number of tasks that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CAPACITY: Capacity = Capacity {
        vcpus: 4,
        memory_bytes: 1000,
        disk_bytes: 1000,
        domains: 3,
        queue_length: 8,
    };

    const NONE: [usize; 0] = [];

    fn demand(vcpus: u32, memory_bytes: u64) -> Demand {
        Demand {
            vcpus,
            memory_bytes,
            disk_bytes: 0,
        }
    }

    /// Of this user, with so many CPUs, for so long at most.
    fn request(owner: u32, vcpus: u32, longest_ms: u64) -> Request {
        Request {
            demand: demand(vcpus, 10),
            owner,
            priority: 0,
            longest_ms,
            not_before_ms: 0,
        }
    }

    fn queue() -> Queue<usize> {
        Queue::new(CAPACITY, Policy::default())
    }

    /// All that begin now.
    fn admitted(queue: &mut Queue<usize>, now_ms: u64) -> Vec<usize> {
        std::iter::from_fn(|| queue.admit(now_ms)).collect()
    }

    #[test]
    fn a_large_task_is_not_overtaken() {
        let mut queue = queue();
        queue.push(1, request(1, 3, NEVER_MS));
        queue.push(2, request(1, 4, NEVER_MS));
        queue.push(3, request(1, 1, NEVER_MS));
        assert_eq!(admitted(&mut queue, 0), [1]);
        queue.remove(1, 1);
        assert_eq!(admitted(&mut queue, 1), [2]);
        queue.remove(2, 2);
        assert_eq!(admitted(&mut queue, 2), [3]);
    }

    #[test]
    fn a_task_is_overtaken_by_those_that_do_not_delay_it() {
        let mut queue = queue();
        queue.push(1, request(1, 3, 100));
        queue.push(2, request(1, 4, 100));
        // Too long; short enough; nobody knows.
        queue.push(3, request(1, 1, 101));
        queue.push(4, request(1, 1, 100));
        queue.push(5, request(1, 1, NEVER_MS));
        assert_eq!(admitted(&mut queue, 0), [1, 4]);
        queue.remove(4, 50);
        assert_eq!(admitted(&mut queue, 50), NONE);
        queue.remove(1, 100);
        assert_eq!(admitted(&mut queue, 100), [2]);
    }

    #[test]
    fn priority_comes_before_age() {
        let mut queue = queue();
        let urgent = Request {
            priority: 5,
            ..request(1, 4, NEVER_MS)
        };
        queue.push(1, request(1, 4, NEVER_MS));
        queue.push(2, urgent);
        assert_eq!(admitted(&mut queue, 0), [2]);
    }

    #[test]
    fn who_had_less_comes_first_and_what_was_is_forgotten() {
        let mut queue = Queue::new(
            CAPACITY,
            Policy {
                half_life_ms: 1000,
                ..Policy::default()
            },
        );
        for key in 0..4 {
            queue.push(key, request(1, 4, NEVER_MS));
        }
        queue.push(4, request(2, 4, NEVER_MS));
        assert_eq!(admitted(&mut queue, 0), [0]);
        queue.remove(0, 100);
        // The first user has had something of the host.
        assert_eq!(admitted(&mut queue, 100), [4]);
        queue.remove(4, 1100);
        // The second had more, and later.
        queue.push(5, request(2, 4, NEVER_MS));
        assert_eq!(admitted(&mut queue, 1100), [1]);
        queue.remove(1, 1200);
        assert_eq!(admitted(&mut queue, 1_000_000), [2], "by age again");
    }

    #[test]
    fn a_quota_holds_a_user_back_and_nobody_else() {
        let quota = Quota {
            vcpus: 2,
            waiting: 3,
            ..Quota::UNLIMITED
        };
        let mut queue = Queue::new(
            CAPACITY,
            Policy {
                quotas: HashMap::from([(1, quota)]),
                ..Policy::default()
            },
        );
        assert_eq!(
            queue.check(1, demand(3, 1), 1),
            Err(QueueError::OverQuota {
                what: "CPUs",
                most: 2
            })
        );
        queue.check(1, demand(1, 1), 3).unwrap();
        assert_eq!(
            queue.check(1, demand(1, 1), 4),
            Err(QueueError::TooManyWaiting { limit: 3 })
        );
        for key in 0..3 {
            queue.push(key, request(1, 1, NEVER_MS));
        }
        queue.push(3, request(2, 1, NEVER_MS));
        let mut begun = admitted(&mut queue, 0);
        begun.sort_unstable();
        assert_eq!(begun, [0, 1, 3]);
        queue.remove(0, 1);
        assert_eq!(admitted(&mut queue, 1), [2]);
    }

    #[test]
    fn one_that_failed_waits_its_time() {
        let mut queue = queue();
        let again = Request {
            not_before_ms: 500,
            ..request(1, 1, NEVER_MS)
        };
        queue.push(1, again);
        assert_eq!(admitted(&mut queue, 499), NONE);
        assert_eq!(queue.wake_ms(499), Some(500));
        assert_eq!(admitted(&mut queue, 500), [1]);
    }

    #[test]
    fn what_is_tried_again_gives_its_place_back_and_keeps_its_reservation() {
        let mut queue = queue();
        let again = Request {
            not_before_ms: 500,
            ..request(1, 4, NEVER_MS)
        };
        queue.push(1, request(1, 4, NEVER_MS));
        queue.push(2, request(2, 4, NEVER_MS));
        assert_eq!(admitted(&mut queue, 0), [1]);
        queue.requeue(1, again, 10);
        assert_eq!(admitted(&mut queue, 10), [2]);
        queue.remove(2, 20);
        assert_eq!(admitted(&mut queue, 500), [1]);
        queue.remove(1, 600);

        queue.reserve(3, 1, demand(4, 10), (600, 900), 600).unwrap();
        queue.push(3, again);
        assert_eq!(admitted(&mut queue, 600), [3]);
        queue.requeue(3, again, 700);
        assert_eq!(queue.reservation(3), Some((600, 900)));
        assert_eq!(admitted(&mut queue, 700), [3]);
    }

    #[test]
    fn what_never_fits_is_refused_with_the_limit() {
        let queue = queue();
        assert_eq!(
            queue.check(1, demand(5, 1), 1),
            Err(QueueError::TooManyCpus { wanted: 5, most: 4 })
        );
        assert_eq!(
            queue.check(1, demand(1, 1001), 1),
            Err(QueueError::TooMuchMemory {
                wanted: 1001,
                most: 1000
            })
        );
        let disk = Demand {
            disk_bytes: 2000,
            ..demand(1, 1)
        };
        assert_eq!(
            queue.check(1, disk, 1),
            Err(QueueError::TooMuchDisk {
                wanted: 2000,
                most: 1000
            })
        );
    }

    #[test]
    fn a_full_queue_says_so() {
        let mut queue = queue();
        for key in 0..8 {
            queue.check(1, demand(1, 1), 1).unwrap();
            queue.push(key, request(1, 4, NEVER_MS));
        }
        assert_eq!(
            queue.check(1, demand(1, 1), 1),
            Err(QueueError::Full { limit: 8 })
        );
    }

    #[test]
    fn a_reservation_keeps_others_out_until_it_is_over() {
        let mut queue = queue();
        queue.reserve(9, 1, demand(4, 10), (1000, 2000), 0).unwrap();
        queue.push(1, request(2, 1, NEVER_MS));
        queue.push(2, request(2, 1, 1000));
        queue.push(3, request(2, 1, 1001));
        // The first would run into it, so would the third.
        assert_eq!(admitted(&mut queue, 0), [2]);
        assert_eq!(queue.wake_ms(0), Some(1000));
        queue.push(9, request(1, 4, NEVER_MS));
        assert_eq!(admitted(&mut queue, 999), NONE);
        // What runs too long makes room.
        assert_eq!(admitted(&mut queue, 1000), NONE);
        assert_eq!(queue.due(1000), [(2, Due::InTheWay)]);
        queue.remove(2, 1001);
        assert_eq!(admitted(&mut queue, 1001), [9]);
        assert_eq!(queue.due(1999), &[]);
        assert_eq!(queue.due(2000), [(9, Due::ReservationOver)]);
        assert_eq!(admitted(&mut queue, 2000), NONE, "it still holds its place");
        queue.remove(9, 2001);
        assert_eq!(admitted(&mut queue, 2001), [1, 3]);
    }

    #[test]
    fn what_is_taken_is_not_reserved_again() {
        let mut queue = queue();
        queue.push(1, request(2, 2, 500));
        assert_eq!(admitted(&mut queue, 0), [1]);
        let three = demand(3, 10);
        assert_eq!(
            queue.reserve(9, 1, three, (100, 200), 0),
            Err(QueueError::NoRoom {
                earliest_ms: Some(500)
            })
        );
        queue.reserve(9, 1, three, (500, 600), 0).unwrap();
        assert_eq!(
            queue.reserve(8, 1, three, (0, 600), 0),
            Err(QueueError::NoRoom {
                earliest_ms: Some(600)
            })
        );
        queue.push(2, request(2, 2, NEVER_MS));
        assert_eq!(admitted(&mut queue, 0), NONE);
        queue.remove(9, 1);
        assert_eq!(admitted(&mut queue, 1), [2]);
        assert_eq!(
            queue.reserve(9, 1, three, (1000, 2000), 1),
            Err(QueueError::NoRoom { earliest_ms: None })
        );
    }

    #[test]
    fn a_reservation_must_make_sense() {
        let mut queue = queue();
        let one = demand(1, 1);
        for (span, now) in [((5, 5), 0), ((9, 5), 0), ((1, 5), 5), ((0, NEVER_MS), 0)] {
            let refused = queue.reserve(1, 1, one, span, now).unwrap_err();
            assert_eq!(refused.code(), "invalid-reservation");
        }
        queue.reserve(1, 1, one, (0, 10), 0).unwrap();
        assert_eq!(queue.covers(1, one), Some(true));
        assert_eq!(queue.covers(1, demand(2, 1)), Some(false));
        assert_eq!(queue.covers(2, one), None);
    }

    /// What is done to a queue in the properties below.
    #[derive(Debug, Clone)]
    enum Do {
        Submit(Request),
        Reserve(u32, Demand, u64, u64),
        /// The holder of a reservation wants to begin.
        Start(usize),
        End(usize),
        Wait(u64),
    }

    fn doing() -> impl Strategy<Value = Do> {
        let amount = || (1u32..=4, 1u64..=1000).prop_map(|(cpus, memory)| demand(cpus, memory));
        let length = || prop_oneof![1u64..300, Just(NEVER_MS)];
        prop_oneof![
            3 => (amount(), 1u32..4, -2i8..3, length(), 0u64..50).prop_map(
                |(demand, owner, priority, longest_ms, delay)| Do::Submit(Request {
                    demand, owner, priority, longest_ms,
                    not_before_ms: delay.saturating_sub(40),
                })
            ),
            2 => (1u32..4, amount(), 0u64..200, 1u64..200)
                .prop_map(|(owner, demand, from, length)| Do::Reserve(owner, demand, from, length)),
            2 => (0usize..100).prop_map(Do::Start),
            2 => (0usize..100).prop_map(Do::End),
            3 => (1u64..120).prop_map(Do::Wait),
        ]
    }

    proptest! {
        /// Whatever comes and goes: the host is never overbooked, a reservation is there when its time comes (once what
        /// overran is ended, as the queue says), and nobody is forgotten.
        #[test]
        fn never_overbooked_never_forgotten(doings in proptest::collection::vec(doing(), 1..80)) {
            let mut queue = queue();
            queue.capacity.queue_length = 1000;
            let mut now_ms = 0;
            let mut next = 0;
            let mut wants: HashMap<usize, Request> = HashMap::new();
            let mut reserved: BTreeMap<usize, (u32, Demand, u64, u64, bool)> = BTreeMap::new();
            let mut running: Vec<usize> = vec![];
            let mut waiting: BTreeSet<usize> = BTreeSet::new();
            // A long time in which everything ends.
            let end = doings.len() + 2000;
            for step in 0..end {
                let doing = doings.get(step).cloned();
                let ending = doing.is_none();
                match doing.unwrap_or(if step % 2 == 0 { Do::End(0) } else { Do::Wait(50) }) {
                    Do::Submit(request) => {
                        let request = Request {
                            not_before_ms: match request.not_before_ms { 0 => 0, delay => now_ms + delay },
                            ..request
                        };
                        wants.insert(next, request);
                        waiting.insert(next);
                        queue.push(next, request);
                        next += 1;
                    }
                    Do::Reserve(owner, demand, from, length) => {
                        let span = (now_ms + from, now_ms + from + length);
                        match queue.reserve(next, owner, demand, span, now_ms) {
                            Ok(()) => {
                                reserved.insert(next, (owner, demand, span.0, span.1, false));
                                next += 1;
                            }
                            Err(QueueError::NoRoom { earliest_ms: Some(at) }) => {
                                prop_assert!(at > now_ms + from);
                            }
                            Err(QueueError::NoRoom { earliest_ms: None }) => {}
                            Err(other) => prop_assert!(false, "{}", other),
                        }
                    }
                    Do::Start(n) if !reserved.is_empty() => {
                        let key = *reserved.keys().nth(n % reserved.len()).unwrap();
                        let (owner, demand, .., started) = reserved.get_mut(&key).unwrap();
                        if !*started {
                            *started = true;
                            let request = Request { demand: *demand, owner: *owner, priority: 0, longest_ms: NEVER_MS, not_before_ms: 0 };
                            wants.insert(key, request);
                            waiting.insert(key);
                            queue.push(key, request);
                        }
                    }
                    Do::End(n) if !running.is_empty() => {
                        let key = running.remove(n % running.len());
                        reserved.remove(&key);
                        queue.remove(key, now_ms);
                    }
                    Do::Start(_) | Do::End(_) => {}
                    Do::Wait(ms) => now_ms += ms,
                }
                // As a host does: what is due ends, what may begin begins.
                loop {
                    while let Some(key) = queue.admit(now_ms) {
                        prop_assert!(waiting.remove(&key), "{} did not wait", key);
                        if let Some((_, _, from, until, _)) = reserved.get(&key) {
                            prop_assert!(*from <= now_ms && now_ms < *until);
                        }
                        running.push(key);
                    }
                    let due = queue.due(now_ms);
                    if due.is_empty() {
                        break;
                    }
                    for (key, _) in due {
                        running.retain(|running| *running != key);
                        waiting.remove(&key);
                        reserved.remove(&key);
                        queue.remove(key, now_ms);
                    }
                }
                let cpus: u32 = running.iter().map(|key| wants[key].demand.vcpus).sum();
                let memory: u64 = running.iter().map(|key| wants[key].demand.memory_bytes).sum();
                prop_assert!(cpus <= 4 && memory <= 1000 && running.len() <= 3);
                for (key, (_, _, from, until, started)) in &reserved {
                    let now = *from <= now_ms && now_ms < *until;
                    prop_assert!(!(now && *started && waiting.contains(key)), "{} waits in its time", key);
                }
                if ending && waiting.is_empty() && running.is_empty() && reserved.is_empty() {
                    prop_assert_eq!(queue.waiting(), 0);
                    prop_assert!(queue.used == Used::default() && queue.calendar.iter().next().is_none());
                    prop_assert!(queue.shares.values().all(|share| share.waiting == 0 && share.begun == 0));
                    return Ok(());
                }
            }
            prop_assert!(false, "left: {:?} wait, {:?} run, {:?}", waiting, running, reserved);
        }
    }
}
