use super::*;
use crate::calendar::tests::CAPACITY;
use proptest::prelude::*;

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
fn the_load_is_that_of_what_is_scarcest() {
    let mut queue = queue();
    let idle = queue.load();
    assert_eq!((idle.permille, idle.waiting), (0, 0));
    assert_eq!(idle.free_vcpus, CAPACITY.vcpus);
    assert_eq!(idle.free_memory_bytes, CAPACITY.memory_bytes);
    queue.push(1, request(1, 1, NEVER_MS));
    queue.push(2, request(1, 4, NEVER_MS));
    assert_eq!(admitted(&mut queue, 0), [1]);
    let load = queue.load();
    let used = [
        1000 / CAPACITY.vcpus,
        1000 / CAPACITY.domains,
        (10_000 / CAPACITY.memory_bytes) as u32,
    ];
    assert_eq!(Some(load.permille), used.into_iter().max());
    assert_eq!(load.free_vcpus, CAPACITY.vcpus - 1);
    assert_eq!(load.free_memory_bytes, CAPACITY.memory_bytes - 10);
    assert_eq!(load.waiting, 1);
    let none = Capacity {
        domains: 0,
        ..CAPACITY
    };
    let full = Queue::<usize>::new(none, Policy::default()).load();
    assert_eq!(full.permille, FULL_PERMILLE);
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
