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
use crate::policy::{
    Capacity, Demand, Due, FULL_PERMILLE, Load, Policy, QueueError, Quota, Request,
};

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

    /// Whether this has been admitted and has its capacity.
    pub fn is_running(&self, key: K) -> bool {
        self.running.contains_key(&key)
    }

    /// Whether something that needs this could begin, as far as capacity goes.
    pub fn has_room(&self, demand: Demand) -> bool {
        self.used.leaves(&self.capacity, demand)
    }

    /// How much of the host is in use.
    pub fn load(&self) -> Load {
        let (used, all) = (&self.used, &self.capacity);
        let permille = |used: u64, all: u64| match all {
            0 => FULL_PERMILLE,
            all => {
                let share = u128::from(used) * u128::from(FULL_PERMILLE) / u128::from(all);
                u32::try_from(share)
                    .unwrap_or(FULL_PERMILLE)
                    .min(FULL_PERMILLE)
            }
        };
        let shares = [
            permille(used.vcpus, all.vcpus.into()),
            permille(used.memory_bytes, all.memory_bytes),
            permille(used.domains, all.domains.into()),
        ];
        Load {
            free_vcpus: all
                .vcpus
                .saturating_sub(u32::try_from(used.vcpus).unwrap_or(u32::MAX)),
            free_memory_bytes: all.memory_bytes.saturating_sub(used.memory_bytes),
            permille: shares.into_iter().max().unwrap_or(FULL_PERMILLE),
            waiting: self.waiting.len(),
        }
    }

    /// Number of tasks that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

#[cfg(test)]
mod tests;
