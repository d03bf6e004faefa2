//! The policy of a load balancer whose servers are all fronts too: who gets a request, when others are asked, which
//! answer counts, what a server does next.
//!
//! No I/O and no clock in here: the caller gives the time, as a [`Duration`] since any moment of its choice, and carries
//! out what it is told. So the simulator and the service run the same code.
//!
//! A [`Front`] takes requests from clients. It asks the `copies` least loaded servers; when none has answered for
//! `forward_after` it asks others. The first answer counts, the rest are dropped, and who was asked in vain is told to
//! stop. A [`Worker`] is a server's queue, and a [`Reporter`] says when its load is to be told to the fronts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::{self, Display, Formatter};
use std::time::Duration;

use thiserror::Error;

/// The most servers that a request is sent to at a time.
pub const MAX_COPIES: usize = 8;
/// The most servers a front keeps loads of, unless told otherwise.
pub const MAX_SERVERS: usize = 256;
/// The most requests a front has open at a time, unless told otherwise.
pub const MAX_OPEN_REQUESTS: usize = 4096;
/// The most requests that wait in a server, unless told otherwise.
pub const MAX_QUEUED_REQUESTS: usize = 1024;
/// How long a request is left to those asked before others are asked (the paper's 2.5 s).
pub const FORWARD_AFTER: Duration = Duration::from_millis(2500);
/// How long a request may take in all.
pub const GIVE_UP_AFTER: Duration = Duration::from_secs(30);
/// A load that was reported longer ago is not counted on: its server may be gone.
pub const REPORT_AGE: Duration = Duration::from_secs(2);
/// A load is reported at least this often.
pub const REPORT_EVERY: Duration = Duration::from_millis(500);
/// A load that changes is not reported sooner than this after the one before.
pub const REPORT_GAP: Duration = Duration::from_millis(10);

/// A server of the group, by a number that it drew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServerId(pub u64);

impl Display for ServerId {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A request, by the front that took it and its count there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId {
    /// Who took it from the client.
    pub front: ServerId,
    /// The first of a front is 0.
    pub number: u64,
}

/// Why a front or a server does not take a request.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// No load was reported lately.
    #[error("no server has reported its load in the last {} ms; start one, or see why its reports do not arrive", .0.as_millis())]
    NoServer(Duration),
    /// So many requests are open at the front.
    #[error("{0} requests wait for answers already; try again later, or allow more")]
    FrontFull(usize),
    /// So many requests wait in the server.
    #[error("{0} requests wait in this server already; try another")]
    WorkerFull(usize),
}

impl Error {
    /// Stable: `no-server`, `front-full`, `worker-full`.
    pub fn code(self) -> &'static str {
        match self {
            Error::NoServer(_) => "no-server",
            Error::FrontFull(_) => "front-full",
            Error::WorkerFull(_) => "worker-full",
        }
    }
}

/// Who is asked first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First {
    /// The server that the client came to; others only if it does not answer in time.
    Own,
    /// The least loaded.
    Least,
}

/// What a front does with requests.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Who is asked first.
    pub first: First,
    /// How many of the least loaded are asked at a time, if there are so many below `copy_load`: 1 to [`MAX_COPIES`], others count as the nearest.
    pub copies: usize,
    /// Copies beyond the first are sent only to servers with so many requests at most. Without such a limit
    /// (`u32::MAX`) the group breaks down long before it is at work all the time: docs/kecho-balance.md.
    pub copy_load: u32,
    /// See [`FORWARD_AFTER`].
    pub forward_after: Duration,
    /// See [`GIVE_UP_AFTER`].
    pub give_up_after: Duration,
    /// See [`REPORT_AGE`].
    pub report_age: Duration,
    /// See [`MAX_OPEN_REQUESTS`].
    pub max_open: usize,
    /// See [`MAX_SERVERS`].
    pub max_servers: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            first: First::Least,
            copies: 2,
            copy_load: 0,
            forward_after: FORWARD_AFTER,
            give_up_after: GIVE_UP_AFTER,
            report_age: REPORT_AGE,
            max_open: MAX_OPEN_REQUESTS,
            max_servers: MAX_SERVERS,
        }
    }
}

#[derive(Debug)]
struct Report {
    load: u32,
    at: Duration,
    /// Requests sent there since: the load will be that much more in the next report.
    sent: u32,
}

/// The loads that servers have reported, no more than a fixed number.
#[derive(Debug)]
struct Loads {
    servers: BTreeMap<ServerId, Report>,
    max_age: Duration,
    max_servers: usize,
    copies: usize,
    copy_load: u32,
}

impl Loads {
    /// `false` where there is no room for one more server.
    fn report(&mut self, server: ServerId, load: u32, now: Duration) -> bool {
        if !self.servers.contains_key(&server) && self.servers.len() >= self.max_servers {
            let max_age = self.max_age;
            self.servers
                .retain(|_, report| now.saturating_sub(report.at) <= max_age);
            if self.servers.len() >= self.max_servers {
                return false;
            }
        }
        let report = Report {
            load,
            at: now,
            sent: 0,
        };
        self.servers.insert(server, report);
        true
    }

    /// The least loaded but for `except`, and takes note that each gets one more. Between equals `turn` decides, or all
    /// fronts would send to the same.
    fn least(&mut self, except: &[ServerId], turn: u64, now: Duration) -> Vec<ServerId> {
        let mut found: Vec<_> = (self.fresh(now))
            .filter(|(server, _)| !except.contains(server))
            .map(|(server, report)| {
                let load = report.load.saturating_add(report.sent);
                (load, mix(server.0 ^ mix(turn)), *server)
            })
            .collect();
        found.sort_unstable();
        let found = found.into_iter().take(self.copies).enumerate();
        let found = found.filter(|(copy, (load, ..))| *copy == 0 || *load <= self.copy_load);
        let to: Vec<ServerId> = found.map(|(_, (.., server))| server).collect();
        for server in &to {
            self.note(*server);
        }
        to
    }

    /// Those whose servers are thought to be there.
    fn fresh(&self, now: Duration) -> impl Iterator<Item = (&ServerId, &Report)> {
        let max_age = self.max_age;
        (self.servers.iter()).filter(move |(_, report)| now.saturating_sub(report.at) <= max_age)
    }

    fn note(&mut self, server: ServerId) {
        if let Some(report) = self.servers.get_mut(&server) {
            report.sent = report.sent.saturating_add(1);
        }
    }
}

/// Spreads the bits of a number (the last step of splitmix64).
fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[derive(Debug)]
struct Open {
    since: Duration,
    /// When something is done about it; in `Front::due` too.
    due: Duration,
    /// All who ever got it.
    asked: Vec<ServerId>,
    /// Those of them who have not refused it.
    hoped: usize,
}

/// What a front did so far, in requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Taken from clients.
    pub taken: u64,
    /// Answered, each by the first answer.
    pub answered: u64,
    /// Given up: no answer came.
    pub given_up: u64,
    /// Copies sent to servers.
    pub sent: u64,
    /// Of these, the ones sent because no answer had come.
    pub forwarded: u64,
    /// Copies that a server had no room for.
    pub refused: u64,
    /// Answers that came too late or that nobody was asked for: dropped.
    pub dropped: u64,
    /// Copies whose servers were told to stop.
    pub cancelled: u64,
}

/// What is to be done because of the time, or because a server refused a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Due {
    /// Send the request to these too.
    Forward {
        /// Of this front.
        number: u64,
        /// Who gets it; none had it.
        to: Vec<ServerId>,
    },
    /// Tell the client that nobody answered.
    GiveUp {
        /// Of this front.
        number: u64,
        /// Who is to stop.
        cancel: Vec<ServerId>,
    },
}

/// What becomes of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is the first: pass it on to the client.
    First {
        /// Who is to stop.
        cancel: Vec<ServerId>,
        /// From the request to now.
        took: Duration,
    },
    /// Not the first, or not asked for: drop it.
    Dropped,
}

/// Takes requests from clients, and sees to it that each is answered once.
#[derive(Debug)]
pub struct Front {
    own: ServerId,
    options: Options,
    loads: Loads,
    /// By number.
    open: BTreeMap<u64, Open>,
    /// When and which: as long as `open`.
    due: BTreeSet<(Duration, u64)>,
    counts: Counts,
}

impl Front {
    /// The front in the server `own`, which has no requests yet.
    pub fn new(own: ServerId, options: Options) -> Front {
        let options = Options {
            copies: options.copies.clamp(1, MAX_COPIES),
            ..options
        };
        Front {
            own,
            options,
            loads: Loads {
                servers: BTreeMap::new(),
                max_age: options.report_age,
                max_servers: options.max_servers,
                copies: options.copies,
                copy_load: options.copy_load,
            },
            open: BTreeMap::new(),
            due: BTreeSet::new(),
            counts: Counts::default(),
        }
    }

    /// A server's load: the requests in it. `false` if so many servers have reported lately that there is no room.
    pub fn report(&mut self, server: ServerId, load: u32, now: Duration) -> bool {
        self.loads.report(server, load, now)
    }

    /// Takes a request; it gets a number and goes to these servers.
    ///
    /// # Errors
    /// Too many are open, or no server is known to be there.
    pub fn request(&mut self, now: Duration) -> Result<(u64, Vec<ServerId>), Error> {
        if self.open.len() >= self.options.max_open {
            return Err(Error::FrontFull(self.open.len()));
        }
        let number = self.counts.taken;
        let turn = mix(self.own.0) ^ number;
        let to = match self.options.first {
            First::Own => {
                self.loads.note(self.own);
                vec![self.own]
            }
            First::Least => self.loads.least(&[], turn, now),
        };
        if to.is_empty() {
            return Err(Error::NoServer(self.options.report_age));
        }
        self.counts.taken += 1;
        self.counts.sent += to.len() as u64;
        let due = now + self.options.forward_after.min(self.options.give_up_after);
        self.due.insert((due, number));
        let open = Open {
            since: now,
            due,
            hoped: to.len(),
            asked: to.clone(),
        };
        self.open.insert(number, open);
        Ok((number, to))
    }

    /// Whether an answer of this server's is waited for; one that is not counts as dropped. For a filter that runs
    /// before the answer is looked at.
    pub fn wants(&mut self, number: u64, from: ServerId) -> bool {
        let wants = (self.open.get(&number)).is_some_and(|open| open.asked.contains(&from));
        self.counts.dropped += u64::from(!wants);
        wants
    }

    /// An answer came.
    pub fn answer(&mut self, number: u64, from: ServerId, now: Duration) -> Verdict {
        if !self.wants(number, from) {
            return Verdict::Dropped;
        }
        let Some(mut open) = self.close(number) else {
            return Verdict::Dropped;
        };
        open.asked.retain(|server| *server != from);
        self.counts.answered += 1;
        self.counts.cancelled += open.asked.len() as u64;
        Verdict::First {
            cancel: open.asked,
            took: now.saturating_sub(open.since),
        }
    }

    /// A server had no room for the request: others get it at once, unless somebody else still has it.
    pub fn refused(&mut self, number: u64, from: ServerId, now: Duration) -> Option<Due> {
        let open = self.open.get_mut(&number)?;
        if !open.asked.contains(&from) || open.hoped == 0 {
            return None;
        }
        self.counts.refused += 1;
        open.hoped -= 1;
        (open.hoped == 0).then(|| self.forward(number, now))?
    }

    /// When [`Front::tick`] has something to do.
    pub fn next(&self) -> Option<Duration> {
        self.due.first().map(|(due, _)| *due)
    }

    /// What is to be done by now.
    pub fn tick(&mut self, now: Duration) -> Vec<Due> {
        let mut done = vec![];
        while let Some(&(due, number)) = self.due.first()
            && due <= now
        {
            done.extend(self.forward(number, now));
        }
        done
    }

    /// What it did so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// How many servers may get a request.
    pub fn known(&self, now: Duration) -> usize {
        self.loads.fresh(now).count()
    }

    /// How many requests wait for an answer.
    pub fn open(&self) -> usize {
        self.open.len()
    }

    /// Asks others, or gives up; `None` where those asked are waited for a while longer. Afterwards it is due later,
    /// or closed.
    fn forward(&mut self, number: u64, now: Duration) -> Option<Due> {
        let open = self.open.get_mut(&number)?;
        let end = open.since + self.options.give_up_after;
        let turn = mix(self.own.0) ^ number;
        let to = match now >= end {
            true => vec![],
            false => self.loads.least(&open.asked, turn, now),
        };
        if now >= end || to.is_empty() && open.hoped == 0 {
            let open = self.close(number)?;
            self.counts.given_up += 1;
            self.counts.cancelled += open.asked.len() as u64;
            let cancel = open.asked;
            return Some(Due::GiveUp { number, cancel });
        }
        self.due.remove(&(open.due, number));
        // Never now: the caller asks until nothing is due.
        let step = self.options.forward_after.max(Duration::from_millis(1));
        open.due = (now + step).min(end);
        self.due.insert((open.due, number));
        if to.is_empty() {
            return None;
        }
        open.hoped += to.len();
        open.asked.extend_from_slice(&to);
        self.counts.sent += to.len() as u64;
        self.counts.forwarded += to.len() as u64;
        Some(Due::Forward { number, to })
    }

    fn close(&mut self, number: u64) -> Option<Open> {
        let open = self.open.remove(&number)?;
        self.due.remove(&(open.due, number));
        Some(open)
    }
}

/// A server's requests: those that wait, and those that it works on.
#[derive(Debug)]
pub struct Worker {
    /// In the order of their coming.
    waiting: BTreeMap<u64, RequestId>,
    /// Where in `waiting` each is.
    places: HashMap<RequestId, u64>,
    offered: u64,
    /// With whether the answer is still wanted.
    running: Vec<(RequestId, bool)>,
    at_once: usize,
    max_waiting: usize,
}

impl Worker {
    /// Works on `at_once` requests at a time, and lets `max_waiting` wait.
    pub fn new(at_once: usize, max_waiting: usize) -> Worker {
        Worker {
            waiting: BTreeMap::new(),
            places: HashMap::new(),
            offered: 0,
            running: vec![],
            at_once: at_once.max(1),
            max_waiting,
        }
    }

    /// Queues a request; one that is here already stays as it is.
    ///
    /// # Errors
    /// Too many wait.
    pub fn offer(&mut self, request: RequestId) -> Result<(), Error> {
        let running = self.running.iter().any(|(one, _)| *one == request);
        if running || self.places.contains_key(&request) {
            return Ok(());
        }
        if self.waiting.len() >= self.max_waiting {
            return Err(Error::WorkerFull(self.waiting.len()));
        }
        self.waiting.insert(self.offered, request);
        self.places.insert(request, self.offered);
        self.offered += 1;
        Ok(())
    }

    /// The next to work on, if there is one and a hand is free.
    pub fn start(&mut self) -> Option<RequestId> {
        if self.running.len() >= self.at_once {
            return None;
        }
        let (_, request) = self.waiting.pop_first()?;
        self.places.remove(&request);
        self.running.push((request, true));
        Some(request)
    }

    /// The front does not want an answer any more. `true` where this server had it.
    pub fn cancel(&mut self, request: RequestId) -> bool {
        let place = self.places.remove(&request);
        let mut stopped = place.is_some_and(|place| self.waiting.remove(&place).is_some());
        for (one, wanted) in &mut self.running {
            if *one == request {
                stopped |= *wanted;
                *wanted = false;
            }
        }
        stopped
    }

    /// Whether to go on with a request. `false` after it was cancelled.
    pub fn is_wanted(&self, request: RequestId) -> bool {
        self.running.contains(&(request, true))
    }

    /// The work is done or was left. `true` where the answer is to be sent.
    pub fn finish(&mut self, request: RequestId) -> bool {
        let wanted = self.is_wanted(request);
        self.running.retain(|(one, _)| *one != request);
        wanted
    }

    /// How many requests are in it.
    pub fn load(&self) -> u32 {
        u32::try_from(self.waiting.len() + self.running.len()).unwrap_or(u32::MAX)
    }
}

/// Says when a load is to be reported: soon after it changes, and every now and then.
#[derive(Debug, Default)]
pub struct Reporter {
    last: Option<(u32, Duration)>,
}

impl Reporter {
    /// When this load is to be reported; now or before means now.
    pub fn next(&self, load: u32) -> Duration {
        match self.last {
            None => Duration::ZERO,
            Some((last, at)) if last == load => at + REPORT_EVERY,
            Some((_, at)) => at + REPORT_GAP,
        }
    }

    /// It was.
    pub fn reported(&mut self, load: u32, now: Duration) {
        self.last = Some((load, now));
    }
}
