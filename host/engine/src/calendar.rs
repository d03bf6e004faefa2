//! What is promised of a host's capacity, from when to when.
//!
//! A [`Claim`] is held by a task that runs, or by a reservation for one that will. The calendar answers whether there is
//! room in a span of time, and from when on there is.

use std::collections::HashMap;
use std::hash::Hash;

use crate::{Capacity, Demand};

/// A moment that does not come: the end of what has no end.
pub const NEVER_MS: u64 = u64::MAX;

/// Capacity held over a span of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// How much, in one domain.
    pub demand: Demand,
    /// From when, milliseconds of the caller's clock.
    pub from_ms: u64,
    /// Until when, which is not part of it; [`NEVER_MS`]: nobody knows.
    pub until_ms: u64,
}

/// What is held at some moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    /// Virtual CPUs.
    pub vcpus: u64,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Disk in bytes.
    pub disk_bytes: u64,
    /// Domains.
    pub domains: u64,
}

impl Used {
    /// With this more.
    pub fn add(&mut self, demand: Demand) {
        self.vcpus += u64::from(demand.vcpus);
        self.memory_bytes += demand.memory_bytes;
        self.disk_bytes += demand.disk_bytes;
        self.domains += 1;
    }

    /// With this less, which was in it.
    pub fn take(&mut self, demand: Demand) {
        self.vcpus -= u64::from(demand.vcpus);
        self.memory_bytes -= demand.memory_bytes;
        self.disk_bytes -= demand.disk_bytes;
        self.domains -= 1;
    }

    /// Whether there is room for this much more.
    pub fn leaves(&self, capacity: &Capacity, demand: Demand) -> bool {
        self.domains < u64::from(capacity.domains)
            && self.vcpus + u64::from(demand.vcpus) <= u64::from(capacity.vcpus)
            && self.memory_bytes.saturating_add(demand.memory_bytes) <= capacity.memory_bytes
            && self.disk_bytes.saturating_add(demand.disk_bytes) <= capacity.disk_bytes
    }
}

/// Claims, by name.
#[derive(Debug, Clone)]
pub struct Calendar<K> {
    claims: HashMap<K, Claim>,
}

impl<K> Default for Calendar<K> {
    fn default() -> Self {
        Calendar {
            claims: HashMap::new(),
        }
    }
}

impl<'a, K: Eq + Hash> FromIterator<(K, &'a Claim)> for Calendar<K> {
    fn from_iter<I: IntoIterator<Item = (K, &'a Claim)>>(claims: I) -> Self {
        let claims = claims.into_iter().map(|(key, claim)| (key, *claim));
        Calendar {
            claims: claims.collect(),
        }
    }
}

impl<K: Copy + Eq + Hash> Calendar<K> {
    /// Notes a claim; one of that name before is replaced.
    pub fn insert(&mut self, key: K, claim: Claim) {
        self.claims.insert(key, claim);
    }

    /// Forgets a claim.
    pub fn remove(&mut self, key: K) -> Option<Claim> {
        self.claims.remove(&key)
    }

    /// A claim by its name.
    pub fn get(&self, key: K) -> Option<&Claim> {
        self.claims.get(&key)
    }

    /// All claims.
    pub fn iter(&self) -> impl Iterator<Item = (K, &Claim)> {
        self.claims.iter().map(|(key, claim)| (*key, claim))
    }

    /// Whether there is room for this much all the time from `from_ms` to `until_ms`.
    pub fn has_room(
        &self,
        capacity: &Capacity,
        demand: Demand,
        from_ms: u64,
        until_ms: u64,
    ) -> bool {
        let length_ms = until_ms.saturating_sub(from_ms);
        self.earliest(capacity, demand, from_ms, length_ms) == Some(from_ms)
    }

    /// The first moment, not before `from_ms`, from which there is room for this much for so long ([`NEVER_MS`]: for
    /// ever); none if that never comes.
    pub fn earliest(
        &self,
        capacity: &Capacity,
        demand: Demand,
        from_ms: u64,
        length_ms: u64,
    ) -> Option<u64> {
        let mut used = Used::default();
        // (when, it begins, how much): at one moment ends come before beginnings.
        let mut changes = vec![];
        for claim in self.claims.values() {
            if claim.until_ms <= from_ms || claim.until_ms <= claim.from_ms {
                continue;
            }
            if claim.from_ms <= from_ms {
                used.add(claim.demand);
            } else {
                changes.push((claim.from_ms, true, claim.demand));
            }
            if claim.until_ms != NEVER_MS {
                changes.push((claim.until_ms, false, claim.demand));
            }
        }
        changes.sort_unstable_by_key(|(at_ms, begins, _)| (*at_ms, *begins));
        let mut since_ms = used.leaves(capacity, demand).then_some(from_ms);
        let mut changes = changes.into_iter().peekable();
        while let Some((at_ms, begins, changed)) = changes.next() {
            if let Some(since_ms) = since_ms
                && at_ms >= since_ms.saturating_add(length_ms)
                && length_ms != NEVER_MS
            {
                return Some(since_ms);
            }
            if begins {
                used.add(changed);
            } else {
                used.take(changed);
            }
            if changes.peek().is_some_and(|(next, ..)| *next == at_ms) {
                continue;
            }
            since_ms = match used.leaves(capacity, demand) {
                true => since_ms.or(Some(at_ms)),
                false => None,
            };
        }
        since_ms
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the hosts of tests have.
    pub(crate) const CAPACITY: Capacity = Capacity {
        vcpus: 4,
        memory_bytes: 1000,
        disk_bytes: 1000,
        domains: 3,
        queue_length: 8,
    };

    fn demand(vcpus: u32) -> Demand {
        Demand {
            vcpus,
            memory_bytes: 10,
            disk_bytes: 0,
        }
    }

    fn claim(vcpus: u32, from_ms: u64, until_ms: u64) -> Claim {
        Claim {
            demand: demand(vcpus),
            from_ms,
            until_ms,
        }
    }

    #[test]
    fn a_gap_is_found_if_it_is_long_enough() {
        let mut calendar = Calendar::default();
        calendar.insert(1, claim(3, 0, 100));
        calendar.insert(2, claim(3, 150, 300));
        let at = |vcpus, from, length| calendar.earliest(&CAPACITY, demand(vcpus), from, length);
        assert_eq!(at(1, 0, 1000), Some(0));
        assert_eq!(at(2, 0, 50), Some(100));
        assert_eq!(at(2, 0, 51), Some(300));
        assert_eq!(at(2, 110, 40), Some(110));
        assert_eq!(at(4, 0, NEVER_MS), Some(300));
        assert_eq!(at(5, 0, 1), None);
    }

    #[test]
    fn what_has_no_end_is_never_waited_for() {
        let mut calendar = Calendar::default();
        calendar.insert(1, claim(3, 0, NEVER_MS));
        assert_eq!(calendar.earliest(&CAPACITY, demand(2), 0, 1), None);
        assert!(calendar.has_room(&CAPACITY, demand(1), 0, NEVER_MS));
    }

    #[test]
    fn one_may_begin_when_another_ends() {
        let mut calendar = Calendar::default();
        calendar.insert(1, claim(4, 0, 100));
        calendar.insert(2, claim(4, 100, 200));
        assert!(!calendar.has_room(&CAPACITY, demand(1), 50, 250));
        assert!(calendar.has_room(&CAPACITY, demand(1), 200, 250));
    }

    proptest! {
        /// What is found fits at each moment, and nothing earlier would.
        #[test]
        fn the_earliest_fits_and_is_the_earliest(
            claims in proptest::collection::vec((1u32..=4, 0u64..40, 1u64..20, any::<bool>()), 0..12),
            vcpus in 1u32..=4, from in 0u64..50, length in 1u64..20,
        ) {
            let mut calendar = Calendar::default();
            for (key, (vcpus, from, length, ends)) in claims.iter().enumerate() {
                calendar.insert(key, claim(*vcpus, *from, if *ends { from + length } else { NEVER_MS }));
            }
            let fits = |begin: u64| (begin..begin + length).all(|at| {
                let mut used = Used::default();
                for (_, claim) in calendar.iter() {
                    if claim.from_ms <= at && at < claim.until_ms {
                        used.add(claim.demand);
                    }
                }
                used.leaves(&CAPACITY, demand(vcpus))
            });
            // All changes lie before this.
            let slow = (from..120).find(|begin| fits(*begin));
            prop_assert_eq!(calendar.earliest(&CAPACITY, demand(vcpus), from, length), slow);
        }
    }
}
