//! The load balancer's policy: each request is answered once, and nothing grows without bound.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use xbee_kecho::balance::{
    Due, Error, First, Front, Options, REPORT_EVERY, REPORT_GAP, Reporter, RequestId, ServerId,
    Verdict, Worker,
};

const OWN: ServerId = ServerId(100);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn ids(ids: &[u64]) -> Vec<ServerId> {
    ids.iter().copied().map(ServerId).collect()
}

fn sorted(mut ids: Vec<ServerId>) -> Vec<ServerId> {
    ids.sort_unstable();
    ids
}

/// A front that knows servers 0, 1, ... with these loads.
fn front(options: Options, loads: &[u32]) -> Front {
    let mut front = Front::new(OWN, options);
    for (server, load) in loads.iter().enumerate() {
        assert!(front.report(ServerId(server as u64), *load, ms(0)));
    }
    front
}

fn copies(copies: usize) -> Options {
    Options {
        copies,
        copy_load: u32::MAX,
        ..Options::default()
    }
}

#[test]
fn the_least_loaded_get_it() {
    let mut front = front(copies(2), &[3, 0, 5, 1]);
    let (number, to) = front.request(ms(0)).unwrap();
    assert_eq!((number, to), (0, ids(&[1, 3])));
}

#[test]
fn what_was_sent_since_the_report_counts() {
    let mut front = front(copies(1), &[2, 0]);
    let sent: Vec<_> = (0..4)
        .map(|_| front.request(ms(0)).unwrap().1[0].0)
        .collect();
    assert_eq!(sent[..2], [1, 1]);
    // Both have two now.
    assert_ne!(sent[2], sent[3]);
    // The server has worked all off.
    front.report(ServerId(1), 0, ms(1));
    assert_eq!(front.request(ms(1)).unwrap().1, ids(&[1]));
}

#[test]
fn between_equals_all_get_their_share() {
    let mut first = BTreeSet::new();
    for own in 0..64 {
        let mut front = Front::new(ServerId(own), copies(1));
        for server in 0..4 {
            front.report(ServerId(server), 0, ms(0));
        }
        first.insert(front.request(ms(0)).unwrap().1[0]);
    }
    assert_eq!(first.len(), 4);
}

#[test]
fn further_copies_go_to_the_idle_only() {
    let options = Options {
        copies: 3,
        copy_load: 0,
        ..Options::default()
    };
    assert_eq!(
        front(options, &[1, 2, 3]).request(ms(0)).unwrap().1,
        ids(&[0])
    );
    let to = front(options, &[0, 2, 0]).request(ms(0)).unwrap().1;
    assert_eq!(sorted(to), ids(&[0, 2]));
}

#[test]
fn an_old_report_does_not_count() {
    let mut front = front(copies(1), &[0, 1]);
    front.report(ServerId(1), 1, ms(1500));
    assert_eq!((front.known(ms(2000)), front.known(ms(2001))), (2, 1));
    assert_eq!(front.request(ms(2000)).unwrap().1, ids(&[0]));
    assert_eq!(front.request(ms(2001)).unwrap().1, ids(&[1]));
    let error = front.request(ms(3501)).unwrap_err();
    assert_eq!(error, Error::NoServer(ms(2000)));
    assert_eq!(error.code(), "no-server");
    assert!(error.to_string().contains("2000 ms"), "{error}");
}

#[test]
fn a_full_table_of_loads_makes_room_for_the_living_only() {
    let options = Options {
        max_servers: 2,
        ..copies(3)
    };
    let mut front = front(options, &[0, 0]);
    assert!(!front.report(ServerId(2), 0, ms(2000)));
    assert!(front.report(ServerId(1), 0, ms(2000)));
    assert!(front.report(ServerId(2), 0, ms(2001)));
    assert_eq!(sorted(front.request(ms(2001)).unwrap().1), ids(&[1, 2]));
}

#[test]
fn the_first_answer_wins_and_the_others_stop() {
    let mut front = front(copies(3), &[0, 0, 0, 9]);
    let (number, to) = front.request(ms(10)).unwrap();
    assert_eq!(sorted(to), ids(&[0, 1, 2]));
    assert_eq!(front.open(), 1);
    let first = front.answer(number, ServerId(1), ms(50));
    let Verdict::First { cancel, took } = first else {
        panic!("{first:?}");
    };
    assert_eq!((sorted(cancel), took), (ids(&[0, 2]), ms(40)));
    assert_eq!(front.answer(number, ServerId(0), ms(51)), Verdict::Dropped);
    // What a filter sees of the third.
    assert!(!front.wants(number, ServerId(2)));
    let counts = front.counts();
    assert_eq!(
        (counts.answered, counts.dropped, counts.cancelled),
        (1, 2, 2)
    );
    assert_eq!((front.open(), front.next()), (0, None));
}

#[test]
fn an_answer_nobody_was_asked_for_is_dropped() {
    let mut front = front(copies(1), &[0, 1]);
    let (number, to) = front.request(ms(0)).unwrap();
    assert_eq!(to, ids(&[0]));
    assert_eq!(front.answer(number, ServerId(1), ms(1)), Verdict::Dropped);
    assert_eq!(
        front.answer(number + 1, ServerId(0), ms(1)),
        Verdict::Dropped
    );
    assert!(matches!(
        front.answer(number, ServerId(0), ms(1)),
        Verdict::First { .. }
    ));
}

#[test]
fn what_is_not_answered_goes_to_others() {
    let mut front = front(copies(1), &[0, 1, 2]);
    let (number, _) = front.request(ms(0)).unwrap();
    assert_eq!(front.next(), Some(ms(2500)));
    assert_eq!(front.tick(ms(2499)), []);
    for server in 1..3 {
        front.report(ServerId(server), 1, ms(2400));
    }
    let due = front.tick(ms(2500));
    let [Due::Forward { to, .. }] = &due[..] else {
        panic!("{due:?}");
    };
    let second = to[0];
    assert!(to.len() == 1 && second != ServerId(0), "{to:?}");
    // It is answered late, by the first.
    let first = front.answer(number, ServerId(0), ms(2600));
    let Verdict::First { cancel, took } = first else {
        panic!("{first:?}");
    };
    assert_eq!((cancel, took), (vec![second], ms(2600)));
    assert_eq!(front.counts().forwarded, 1);
}

#[test]
fn a_request_can_be_kept_where_it_came_to() {
    let options = Options {
        first: First::Own,
        ..copies(1)
    };
    let mut front = front(options, &[0]);
    let (number, to) = front.request(ms(0)).unwrap();
    assert_eq!(to, [OWN]);
    front.report(ServerId(0), 0, ms(2500));
    let forward = Due::Forward {
        number,
        to: ids(&[0]),
    };
    assert_eq!(front.tick(ms(2500)), [forward]);
}

#[test]
fn what_nobody_answers_is_given_up() {
    let mut front = front(copies(1), &[0]);
    let (number, _) = front.request(ms(0)).unwrap();
    let (now, due) = loop {
        let now = front.next().unwrap();
        let due = front.tick(now);
        if !due.is_empty() {
            break (now, due);
        }
    };
    let given_up = Due::GiveUp {
        number,
        cancel: ids(&[0]),
    };
    assert_eq!((now, due), (ms(30_000), vec![given_up]));
    assert_eq!(front.answer(number, ServerId(0), now), Verdict::Dropped);
    assert_eq!((front.open(), front.counts().given_up), (0, 1));
}

#[test]
fn what_a_server_refuses_goes_to_another_at_once() {
    let mut front = front(copies(2), &[0, 0, 5]);
    let (number, _) = front.request(ms(0)).unwrap();
    // The other has it still.
    assert_eq!(front.refused(number, ServerId(0), ms(1)), None);
    let forward = Due::Forward {
        number,
        to: ids(&[2]),
    };
    assert_eq!(front.refused(number, ServerId(1), ms(1)), Some(forward));
    let Some(Due::GiveUp { cancel, .. }) = front.refused(number, ServerId(2), ms(2)) else {
        panic!("nobody is left");
    };
    assert_eq!(sorted(cancel), ids(&[0, 1, 2]));
    assert_eq!(front.refused(number, ServerId(2), ms(2)), None);
}

#[test]
fn a_front_takes_no_more_than_it_may() {
    let options = Options {
        max_open: 2,
        ..copies(1)
    };
    let mut front = front(options, &[0]);
    let (number, _) = front.request(ms(0)).unwrap();
    front.request(ms(0)).unwrap();
    assert_eq!(front.request(ms(0)), Err(Error::FrontFull(2)));
    front.answer(number, ServerId(0), ms(1));
    front.request(ms(1)).unwrap();
}

#[test]
fn a_server_works_in_order_and_stops_what_is_cancelled() {
    let request = |number| RequestId { front: OWN, number };
    let mut worker = Worker::new(1, 3);
    for number in 0..3 {
        worker.offer(request(number)).unwrap();
        worker.offer(request(number)).unwrap();
    }
    assert_eq!(worker.offer(request(3)), Err(Error::WorkerFull(3)));
    assert_eq!(worker.start(), Some(request(0)));
    assert_eq!((worker.start(), worker.load()), (None, 3));
    // One that waits, the one in work, one that it has not.
    assert!(worker.cancel(request(1)) && worker.is_wanted(request(0)));
    assert!(worker.cancel(request(0)) && !worker.is_wanted(request(0)));
    assert!(!worker.cancel(request(0)) && !worker.cancel(request(9)));
    assert!(!worker.finish(request(0)));
    assert_eq!(worker.start(), Some(request(2)));
    assert!(worker.finish(request(2)));
    assert_eq!((worker.start(), worker.load()), (None, 0));
}

#[test]
fn a_load_is_reported_when_it_changes_but_not_too_often() {
    let mut reporter = Reporter::default();
    assert_eq!(reporter.next(0), ms(0));
    reporter.reported(0, ms(7));
    assert_eq!(reporter.next(0), ms(7) + REPORT_EVERY);
    assert_eq!(reporter.next(1), ms(7) + REPORT_GAP);
}

/// What may happen to a front.
#[derive(Debug, Clone)]
enum Step {
    Request,
    /// The n-th of all copies that were ever sent is answered, or refused.
    Answer(prop::sample::Index),
    Refuse(prop::sample::Index),
    /// An answer to anything, from anyone.
    Nonsense(u64, u64),
    Report(u64, u32),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Request),
        4 => any::<prop::sample::Index>().prop_map(Step::Answer),
        1 => any::<prop::sample::Index>().prop_map(Step::Refuse),
        1 => (0..50_u64, 0..20_u64).prop_map(|(number, from)| Step::Nonsense(number, from)),
        4 => (0..12_u64, 0..4_u32).prop_map(|(server, load)| Step::Report(server, load)),
        3 => (0..3000_u64).prop_map(Step::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn each_request_ends_once(
        steps in prop::collection::vec(step(), 0..300),
        copies in 1..4_usize,
        copy_load in prop_oneof![Just(0), Just(u32::MAX)],
    ) {
        let options = Options {
            copies,
            copy_load,
            max_open: 10,
            max_servers: 8,
            ..Options::default()
        };
        let mut front = Front::new(OWN, options);
        let mut now = ms(0);
        // Who has it, by request; and when it was taken, until it ended.
        let mut asked: BTreeMap<u64, BTreeSet<ServerId>> = BTreeMap::new();
        let mut open: BTreeMap<u64, Duration> = BTreeMap::new();
        let mut copies_sent = vec![];
        let mut loads: BTreeMap<ServerId, Duration> = BTreeMap::new();
        let mut ended = 0;
        let mut drops = 0;
        for step in steps {
            let mut due = vec![];
            let mut sent = None;
            match step {
                Step::Request => match front.request(now) {
                    Ok((number, to)) => {
                        prop_assert!(asked.insert(number, BTreeSet::new()).is_none());
                        open.insert(number, now);
                        sent = Some((number, to));
                    }
                    Err(Error::FrontFull(10)) => prop_assert_eq!(open.len(), 10),
                    Err(Error::NoServer(_)) => {
                        prop_assert!(loads.values().all(|at| now - *at > options.report_age));
                    }
                    Err(error) => prop_assert!(false, "{error}"),
                },
                Step::Answer(index) if !copies_sent.is_empty() => {
                    let (number, from) = *index.get(&copies_sent);
                    match front.answer(number, from, now) {
                        Verdict::First { cancel, took } => {
                            prop_assert_eq!(open.remove(&number), Some(now - took));
                            let mut all: BTreeSet<_> = cancel.iter().copied().collect();
                            prop_assert!(all.len() == cancel.len() && all.insert(from));
                            prop_assert_eq!(&all, &asked[&number]);
                            ended += 1;
                        }
                        Verdict::Dropped => {
                            prop_assert!(!open.contains_key(&number));
                            drops += 1;
                        }
                    }
                }
                Step::Nonsense(number, from) => {
                    let from = ServerId(from);
                    let asked = asked.get(&number).is_some_and(|asked| asked.contains(&from));
                    if !(asked && open.contains_key(&number)) {
                        prop_assert_eq!(front.answer(number, from, now), Verdict::Dropped);
                        drops += 1;
                    }
                }
                Step::Refuse(index) if !copies_sent.is_empty() => {
                    let (number, from) = *index.get(&copies_sent);
                    due.extend(front.refused(number, from, now));
                }
                Step::Report(server, load) => {
                    let server = ServerId(server);
                    if front.report(server, load, now) {
                        loads.insert(server, now);
                    } else {
                        prop_assert!(!loads.contains_key(&server) || loads.len() >= 8);
                    }
                }
                Step::Wait(time) => {
                    now += ms(time);
                    due = front.tick(now);
                    prop_assert!(front.next().is_none_or(|next| next > now));
                }
                Step::Answer(_) | Step::Refuse(_) => {}
            }
            let mut forwards: Vec<_> = sent.into_iter().collect();
            for due in due {
                match due {
                    Due::Forward { number, to } => forwards.push((number, to)),
                    Due::GiveUp { number, cancel } => {
                        prop_assert!(open.remove(&number).is_some());
                        prop_assert_eq!(&cancel.into_iter().collect::<BTreeSet<_>>(), &asked[&number]);
                        ended += 1;
                    }
                }
            }
            for (number, to) in forwards {
                prop_assert!(open.contains_key(&number));
                prop_assert!(!to.is_empty() && to.len() <= copies);
                for server in to {
                    // Known lately, and never asked twice.
                    prop_assert!(now - loads[&server] <= options.report_age);
                    prop_assert!(asked.get_mut(&number).unwrap().insert(server));
                    copies_sent.push((number, server));
                }
            }
            prop_assert_eq!(front.open(), open.len());
            prop_assert!(open.len() <= 10);
            // Something is planned for each that is open, and no later than its end.
            prop_assert_eq!(front.next().is_some(), !open.is_empty());
        }
        // In the end, all end, in time.
        while let Some(next) = front.next() {
            now = now.max(next);
            for due in front.tick(now) {
                if let Due::GiveUp { number, .. } = due {
                    let since = open.remove(&number);
                    prop_assert!(since.is_some_and(|since| now <= since + options.give_up_after));
                    ended += 1;
                }
            }
        }
        prop_assert!(open.is_empty());
        let counts = front.counts();
        prop_assert_eq!(counts.taken, ended as u64);
        prop_assert_eq!(counts.taken, counts.answered + counts.given_up);
        prop_assert_eq!(counts.dropped, drops);
        prop_assert_eq!(front.open(), 0);
    }
}
