//! Which task may begin.
//!
//! First come, first served, without overtaking: a large task is never starved by small ones.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// What a host has for domains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Virtual CPUs that may be given out at a time.
    pub vcpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
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
        most: u32,
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
    /// The queue is at its limit.
    #[error("the queue is full ({limit} tasks wait): try again later")]
    Full {
        /// The limit.
        limit: usize,
    },
}

/// Waiting and admitted tasks of a host, named by `K`.
#[derive(Debug)]
pub struct Queue<K> {
    capacity: Capacity,
    waiting: VecDeque<(K, Demand)>,
    admitted: HashMap<K, Demand>,
    used_vcpus: u32,
    used_memory_bytes: u64,
}

impl<K: Copy + Eq + Hash> Queue<K> {
    /// An empty queue.
    pub fn new(capacity: Capacity) -> Self {
        Queue {
            capacity,
            waiting: VecDeque::new(),
            admitted: HashMap::new(),
            used_vcpus: 0,
            used_memory_bytes: 0,
        }
    }

    /// Whether the host could ever run this.
    pub fn fits(&self, demand: Demand) -> Result<(), QueueError> {
        if demand.vcpus > self.capacity.vcpus {
            return Err(QueueError::TooManyCpus {
                wanted: demand.vcpus,
                most: self.capacity.vcpus,
            });
        }
        if demand.memory_bytes > self.capacity.memory_bytes {
            return Err(QueueError::TooMuchMemory {
                wanted: demand.memory_bytes,
                most: self.capacity.memory_bytes,
            });
        }
        Ok(())
    }

    /// Whether a task may be taken now.
    pub fn check(&self, demand: Demand) -> Result<(), QueueError> {
        self.fits(demand)?;
        if self.waiting.len() >= self.capacity.queue_length {
            return Err(QueueError::Full {
                limit: self.capacity.queue_length,
            });
        }
        Ok(())
    }

    /// Takes a task. One that was durably accepted before is taken even beyond the limit of the
    /// queue's length (after a restart), so this does not fail: ask [`Queue::check`] first.
    pub fn push(&mut self, key: K, demand: Demand) {
        self.waiting.push_back((key, demand));
    }

    /// Accounts for a task that already holds its capacity (after a restart).
    pub fn adopt(&mut self, key: K, demand: Demand) {
        if self.admitted.insert(key, demand).is_none() {
            self.used_vcpus += demand.vcpus;
            self.used_memory_bytes += demand.memory_bytes;
        }
    }

    /// Forgets a task, waiting or admitted; its capacity is free again.
    pub fn remove(&mut self, key: K) {
        if let Some(demand) = self.admitted.remove(&key) {
            self.used_vcpus -= demand.vcpus;
            self.used_memory_bytes -= demand.memory_bytes;
        } else {
            self.waiting.retain(|(waiting, _)| *waiting != key);
        }
    }

    /// Admits the next task if its turn has come and there is room.
    pub fn admit(&mut self) -> Option<K> {
        let (key, demand) = *self.waiting.front()?;
        let room = self.admitted.len() < self.capacity.domains as usize
            && self.used_vcpus.saturating_add(demand.vcpus) <= self.capacity.vcpus
            && self.used_memory_bytes.saturating_add(demand.memory_bytes)
                <= self.capacity.memory_bytes;
        if !room {
            return None;
        }
        self.waiting.pop_front();
        self.adopt(key, demand);
        Some(key)
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
        domains: 3,
        queue_length: 8,
    };

    fn demand(vcpus: u32, memory_bytes: u64) -> Demand {
        Demand {
            vcpus,
            memory_bytes,
        }
    }

    #[test]
    fn a_large_task_is_not_overtaken() {
        let mut queue = Queue::new(CAPACITY);
        queue.push(1, demand(3, 10));
        queue.push(2, demand(4, 10));
        queue.push(3, demand(1, 10));
        assert_eq!(queue.admit(), Some(1));
        assert_eq!(queue.admit(), None);
        queue.remove(1);
        assert_eq!(queue.admit(), Some(2));
        assert_eq!(queue.admit(), None);
        queue.remove(2);
        assert_eq!(queue.admit(), Some(3));
    }

    #[test]
    fn what_never_fits_is_refused_with_the_limit() {
        let queue = Queue::<u8>::new(CAPACITY);
        assert_eq!(
            queue.check(demand(5, 1)),
            Err(QueueError::TooManyCpus { wanted: 5, most: 4 })
        );
        assert_eq!(
            queue.check(demand(1, 1001)),
            Err(QueueError::TooMuchMemory {
                wanted: 1001,
                most: 1000
            })
        );
    }

    #[test]
    fn a_full_queue_says_so() {
        let mut queue = Queue::new(CAPACITY);
        for key in 0..8 {
            queue.check(demand(1, 1)).unwrap();
            queue.push(key, demand(1, 1));
        }
        assert_eq!(
            queue.check(demand(1, 1)),
            Err(QueueError::Full { limit: 8 })
        );
    }

    proptest! {
        /// Whatever comes and goes, the host is never overbooked and nobody is forgotten.
        #[test]
        fn never_overbooked_never_forgotten(
            jobs in proptest::collection::vec((1u32..=4, 1u64..=1000, any::<bool>()), 1..60)
        ) {
            let mut queue = Queue::new(CAPACITY);
            let mut running: Vec<usize> = vec![];
            let mut begun = vec![];
            for (key, (vcpus, memory, finish)) in jobs.iter().enumerate() {
                queue.push(key, demand(*vcpus, *memory));
                if *finish && !running.is_empty() {
                    queue.remove(running.remove(0));
                }
                while let Some(key) = queue.admit() {
                    running.push(key);
                    begun.push(key);
                }
                let cpus: u32 = running.iter().map(|k| jobs[*k].0).sum();
                let memory: u64 = running.iter().map(|k| jobs[*k].1).sum();
                prop_assert!(cpus <= 4 && memory <= 1000 && running.len() <= 3);
            }
            while !running.is_empty() {
                queue.remove(running.remove(0));
                while let Some(key) = queue.admit() {
                    running.push(key);
                    begun.push(key);
                }
            }
            prop_assert_eq!(begun, (0..jobs.len()).collect::<Vec<_>>());
        }
    }
}
