//! A question that is open for a bounded time, the offers that answer it, and which of them comes first. Knows no clock and
//! does no I/O.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use uuid::Uuid;

/// How long offers are waited for, milliseconds.
pub const OFFERS_MS: u64 = 1000;
/// How much longer, once somebody offers to begin at once, milliseconds: others may have more room.
pub const LINGER_MS: u64 = 250;
/// Most offers to one question.
pub const MAX_OFFERS: usize = 1024;
/// Questions of others that are remembered as answered.
pub const MAX_ANSWERED: usize = 4096;

/// When a host could begin a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Begins {
    /// Not at all; why, for people.
    Never,
    /// When others have ended.
    Later,
    /// Now.
    AtOnce,
}

/// What a host offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bid {
    /// The address of its API: what names it.
    pub server: String,
    /// Its name, for people.
    pub host: String,
    /// When it could begin.
    pub begins: Begins,
    /// Tasks that wait there.
    pub waiting: u32,
    /// Thousandths of it that are in use.
    pub load_permille: u32,
    /// CPUs that are free.
    pub free_vcpus: u32,
    /// Memory that is free, bytes.
    pub free_memory_bytes: u64,
    /// Why never, for people; empty otherwise.
    pub why: String,
}

/// What became of an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// It takes part.
    New,
    /// That host has offered before.
    Duplicate,
    /// Nobody waits for it any more.
    Late,
    /// There are enough.
    TooMany,
}

/// What was said to a question.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Those that could, best first.
    pub places: Vec<Bid>,
    /// Those that could not.
    pub refusals: Vec<Bid>,
}

/// A question. Times are milliseconds of the caller's clock, which does not go back.
#[derive(Debug)]
pub struct Auction {
    id: Uuid,
    asked: usize,
    until_ms: u64,
    bids: BTreeMap<String, Bid>,
}

impl Auction {
    /// A question that so many hosts are asked now. When all have answered, nobody is waited for.
    pub fn new(id: Uuid, asked: usize, now_ms: u64) -> Auction {
        let wait_ms = if asked == 0 { 0 } else { OFFERS_MS };
        Auction {
            id,
            asked,
            until_ms: now_ms.saturating_add(wait_ms),
            bids: BTreeMap::new(),
        }
    }

    /// Takes an offer. A host's first one counts.
    pub fn offer(&mut self, bid: Bid, now_ms: u64) -> Heard {
        if now_ms >= self.until_ms {
            return Heard::Late;
        }
        if self.bids.contains_key(&bid.server) {
            return Heard::Duplicate;
        }
        if self.bids.len() >= MAX_OFFERS {
            return Heard::TooMany;
        }
        if bid.begins == Begins::AtOnce {
            self.until_ms = self.until_ms.min(now_ms.saturating_add(LINGER_MS));
        }
        self.bids.insert(bid.server.clone(), bid);
        if self.bids.len() >= self.asked {
            self.until_ms = now_ms;
        }
        Heard::New
    }

    /// Until when it is open.
    pub fn until_ms(&self) -> u64 {
        self.until_ms
    }

    /// Ends it. First who begins at once, then where fewest wait, then who is least loaded; among equals each question has
    /// an order of its own, so that not all go to the same host.
    pub fn end(self) -> Outcome {
        let id = self.id;
        let (mut places, refusals): (Vec<Bid>, Vec<Bid>) = self
            .bids
            .into_values()
            .partition(|bid| bid.begins != Begins::Never);
        places.sort_by_cached_key(|bid| rank(id, bid));
        Outcome { places, refusals }
    }
}

/// The less, the better.
fn rank(id: Uuid, bid: &Bid) -> (Reverse<Begins>, u32, u32, u64) {
    let mut lot = DefaultHasher::new();
    (id, &bid.server).hash(&mut lot);
    let waiting = match bid.begins {
        // It is none of its concern.
        Begins::AtOnce => 0,
        _ => bid.waiting,
    };
    (
        Reverse(bid.begins),
        waiting,
        bid.load_permille,
        lot.finish(),
    )
}

/// Questions of others that were answered.
#[derive(Debug, Default)]
pub struct Answered {
    known: HashSet<Uuid>,
    order: VecDeque<Uuid>,
}

impl Answered {
    /// Whether this one is new; it is not, from now on.
    pub fn is_new(&mut self, id: Uuid) -> bool {
        if !self.known.insert(id) {
            return false;
        }
        self.order.push_back(id);
        if self.order.len() > MAX_ANSWERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// More hosts than answer.
    const MANY: usize = 1 << 20;

    fn bid(server: &str, begins: Begins, load_permille: u32) -> Bid {
        Bid {
            server: server.into(),
            host: server.into(),
            begins,
            waiting: 0,
            load_permille,
            free_vcpus: 1,
            free_memory_bytes: 1,
            why: String::new(),
        }
    }

    fn servers(outcome: &Outcome) -> Vec<&str> {
        let places = outcome.places.iter();
        places.map(|bid| bid.server.as_str()).collect()
    }

    #[test]
    fn who_begins_at_once_comes_first_then_who_has_most_room() {
        let mut auction = Auction::new(Uuid::from_u128(1), MANY, 0);
        let waits = |server: &str, waiting, load_permille| Bid {
            waiting,
            ..bid(server, Begins::Later, load_permille)
        };
        for bid in [
            waits("long queue", 9, 100),
            bid("never", Begins::Never, 0),
            waits("short queue", 2, 1000),
            bid("busy", Begins::AtOnce, 700),
            bid("idle", Begins::AtOnce, 10),
        ] {
            assert_eq!(auction.offer(bid, 5), Heard::New);
        }
        let outcome = auction.end();
        assert_eq!(
            servers(&outcome),
            ["idle", "busy", "short queue", "long queue"]
        );
        assert_eq!(outcome.refusals[0].server, "never");
    }

    #[test]
    fn equals_take_turns() {
        let first = |id| {
            let mut auction = Auction::new(Uuid::from_u128(id), MANY, 0);
            for server in ["a", "b", "c"] {
                auction.offer(bid(server, Begins::AtOnce, 5), 0);
            }
            auction.end().places[0].server.clone()
        };
        let firsts: HashSet<String> = (0..64).map(first).collect();
        assert_eq!(firsts.len(), 3);
    }

    #[test]
    fn offers_are_waited_for_and_not_for_ever() {
        let mut auction = Auction::new(Uuid::nil(), MANY, 50);
        assert_eq!(auction.until_ms(), 50 + OFFERS_MS);
        auction.offer(bid("later", Begins::Later, 0), 60);
        assert_eq!(auction.until_ms(), 50 + OFFERS_MS);
        // Others have a little while to offer more.
        auction.offer(bid("now", Begins::AtOnce, 500), 70);
        assert_eq!(auction.until_ms(), 70 + LINGER_MS);
        let better = bid("better", Begins::AtOnce, 0);
        assert_eq!(auction.offer(better, 70 + LINGER_MS - 1), Heard::New);
        let late = bid("late", Begins::AtOnce, 0);
        assert_eq!(auction.offer(late, 70 + LINGER_MS), Heard::Late);
        assert_eq!(servers(&auction.end()), ["better", "now", "later"]);
    }

    #[test]
    fn when_all_have_answered_nobody_is_waited_for() {
        assert_eq!(Auction::new(Uuid::nil(), 0, 50).until_ms(), 50);
        let mut auction = Auction::new(Uuid::nil(), 2, 50);
        auction.offer(bid("a", Begins::Never, 0), 60);
        auction.offer(bid("a", Begins::Never, 0), 61);
        assert_eq!(auction.until_ms(), 50 + OFFERS_MS);
        auction.offer(bid("b", Begins::Later, 0), 70);
        assert_eq!(auction.until_ms(), 70);
        assert_eq!(auction.end().places.len(), 1);
    }

    #[test]
    fn there_is_a_most_of_offers() {
        let mut auction = Auction::new(Uuid::nil(), MANY, 0);
        for server in 0..MAX_OFFERS {
            let heard = auction.offer(bid(&server.to_string(), Begins::Later, 0), 0);
            assert_eq!(heard, Heard::New);
        }
        let more = auction.offer(bid("more", Begins::AtOnce, 0), 0);
        assert_eq!(more, Heard::TooMany);
        assert_eq!(auction.end().places.len(), MAX_OFFERS);
    }

    #[test]
    fn a_question_is_answered_once() {
        let mut answered = Answered::default();
        assert!(answered.is_new(Uuid::nil()));
        assert!(!answered.is_new(Uuid::nil()));
        for id in 1..=MAX_ANSWERED as u128 {
            assert!(answered.is_new(Uuid::from_u128(id)));
        }
        // What is older than all these comes no more.
        assert_eq!(answered.known.len(), MAX_ANSWERED);
        assert!(!answered.known.contains(&Uuid::nil()));
    }

    fn any_bid() -> impl Strategy<Value = Bid> {
        let begins = prop_oneof![
            Just(Begins::Never),
            Just(Begins::Later),
            Just(Begins::AtOnce)
        ];
        ("[a-e]", begins, 0..3_u32, 0..3_u32).prop_map(|(server, begins, waiting, load)| Bid {
            waiting,
            ..bid(&server, begins, load)
        })
    }

    proptest! {
        #[test]
        fn each_host_is_there_once_and_none_that_is_better_comes_after(
            id: u128,
            asked in 0..8_usize,
            offers in vec((any_bid(), 0..2 * OFFERS_MS), 0..40),
        ) {
            let id = Uuid::from_u128(id);
            let mut auction = Auction::new(id, asked, 0);
            let mut now_ms = 0;
            let mut first: BTreeMap<String, Bid> = BTreeMap::new();
            for (bid, at_ms) in offers {
                now_ms = at_ms.max(now_ms);
                let was_open = now_ms < auction.until_ms();
                let heard = auction.offer(bid.clone(), now_ms);
                prop_assert_eq!(was_open, heard != Heard::Late);
                prop_assert_eq!(heard == Heard::New, was_open && !first.contains_key(&bid.server));
                if heard == Heard::New {
                    first.insert(bid.server.clone(), bid);
                }
            }
            prop_assert!(auction.until_ms() <= OFFERS_MS);
            let outcome = auction.end();
            let all: Vec<&Bid> = outcome.places.iter().chain(&outcome.refusals).collect();
            prop_assert_eq!(all.len(), first.len());
            prop_assert!(all.iter().all(|bid| first.get(&bid.server) == Some(*bid)));
            prop_assert!(outcome.refusals.iter().all(|bid| bid.begins == Begins::Never));
            for pair in outcome.places.windows(2) {
                let [better, worse] = pair else { unreachable!() };
                prop_assert!(better.begins >= worse.begins && worse.begins != Begins::Never);
                if better.begins == worse.begins {
                    let of = |bid: &Bid| match bid.begins {
                        Begins::AtOnce => (0, bid.load_permille),
                        _ => (bid.waiting, bid.load_permille),
                    };
                    prop_assert!(of(better) <= of(worse));
                }
            }
        }
    }
}
