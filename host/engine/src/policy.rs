//! What a queue is told and what it says: a host's capacity, users' quotas, what tasks need, why one is refused.

use std::collections::HashMap;

use crate::calendar::Used;

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

/// A host of which nothing is free, in thousandths.
pub const FULL_PERMILLE: u32 = 1000;

/// How much of a host is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Virtual CPUs that could be given out.
    pub free_vcpus: u32,
    /// Memory that could be given out, bytes.
    pub free_memory_bytes: u64,
    /// Thousandths in use of what is scarcest: CPUs, memory or domains.
    pub permille: u32,
    /// Tasks that wait.
    pub waiting: usize,
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
    pub(crate) fn leaves(&self, used: &Used, demand: Demand) -> bool {
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
        "the reservation wants {wanted} bytes of disk, this host has {most} for its domains: ask for less with --disk"
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
