//! A discrete-event simulation of servers that share their requests: `xbee_kecho::balance` decides, this carries out.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use xbee_kecho::balance::{
    Counts, Due, Front, Options, Reporter, RequestId, ServerId, Verdict, Worker,
};

/// What an event takes from one server to another.
const WIRE: Duration = Duration::from_millis(1);
/// The work of a request, as in the paper.
pub const WORK: Duration = Duration::from_millis(38);
/// The servers, as in the paper.
pub const SERVERS: usize = 8;
/// Requests arrive for so long; then the simulation goes on until all are answered.
pub const ARRIVALS: Duration = Duration::from_secs(60);
/// Never reached: without balancing, all the requests of a run may wait in one server.
const MAX_QUEUED: usize = 1_000_000;

/// Where clients' requests come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrivals {
    /// All to one server.
    One,
    /// As many to each server.
    Each,
}

/// How long a request is worked on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Always [`WORK`].
    Constant,
    /// Exponentially distributed, [`WORK`] on average; each copy of a request anew.
    Exponential,
}

/// A run.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// What fronts do.
    pub options: Options,
    /// Where requests come to.
    pub arrivals: Arrivals,
    /// Requests a second, of each server that they come to; Poisson.
    pub rate: u32,
    /// How long one takes.
    pub work: Work,
    /// The last server ends at this moment, and says nothing.
    pub crash: Option<Duration>,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Sorted response times.
    pub took: Vec<Duration>,
    /// Requests answered while they arrived.
    pub in_time: u64,
    /// All fronts' together.
    pub counts: Counts,
    /// Processor time of all servers.
    pub worked: Duration,
}

impl Outcome {
    /// Mean response time in ms.
    pub fn mean_ms(&self) -> f64 {
        let sum: Duration = self.took.iter().sum();
        sum.as_secs_f64() * 1e3 / self.took.len() as f64
    }

    /// The response time in ms that so many per cent of the requests do not exceed.
    pub fn percentile_ms(&self, percent: usize) -> f64 {
        let index = (self.took.len() * percent).div_ceil(100).saturating_sub(1);
        self.took[index].as_secs_f64() * 1e3
    }

    /// Answers a second while requests arrived.
    pub fn throughput(&self) -> f64 {
        self.in_time as f64 / ARRIVALS.as_secs_f64()
    }

    /// So many of a count come on 100 requests.
    pub fn per_100(&self, count: u64) -> f64 {
        count as f64 * 100.0 / self.counts.taken as f64
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A client's request.
    Arrive,
    /// A server gets a request.
    Request(RequestId),
    /// A front gets an answer.
    Answer { number: u64, from: ServerId },
    /// A front hears that a server is full.
    Refused { number: u64, from: ServerId },
    /// A server is told to stop.
    Cancel(RequestId),
    /// A front hears of a load.
    Report { from: ServerId, load: u32 },
    /// The work is done.
    Done(RequestId),
    /// A front has something to do.
    Tick,
    /// A server has its load to report.
    Beat,
}

struct Server {
    front: Front,
    worker: Worker,
    reporter: Reporter,
    /// What it works on, and since when.
    current: Option<(RequestId, Duration)>,
    tick: Option<Duration>,
    beat: Option<Duration>,
}

struct Simulation {
    setting: Setting,
    now: Duration,
    /// With a count, so that what is due at the same moment happens in the order of its planning.
    events: BinaryHeap<Reverse<(Duration, u64, usize, Event)>>,
    planned: u64,
    servers: Vec<Server>,
    chance: u64,
    outcome: Outcome,
}

/// Runs it. The same seed yields the same.
pub fn run(setting: Setting, seed: u64) -> Outcome {
    let servers = (0..SERVERS as u64).map(|id| Server {
        front: Front::new(ServerId(id), setting.options),
        worker: Worker::new(1, MAX_QUEUED),
        reporter: Reporter::default(),
        current: None,
        tick: None,
        beat: None,
    });
    let mut simulation = Simulation {
        setting,
        now: Duration::ZERO,
        events: BinaryHeap::new(),
        planned: 0,
        servers: servers.collect(),
        chance: seed,
        outcome: Outcome {
            took: vec![],
            in_time: 0,
            counts: Counts::default(),
            worked: Duration::ZERO,
        },
    };
    simulation.run();
    simulation.outcome
}

impl Simulation {
    fn run(&mut self) {
        let fronts = match self.setting.arrivals {
            Arrivals::One => 1,
            Arrivals::Each => SERVERS,
        };
        for server in 0..SERVERS {
            self.load_changed(server);
        }
        for server in 0..fronts {
            // Not before all know each other.
            self.plan(WIRE * 2, server, Event::Arrive);
        }
        while let Some(Reverse((at, _, server, event))) = self.events.pop() {
            self.now = at;
            if at > ARRIVALS && self.servers.iter().all(|server| server.front.open() == 0) {
                break;
            }
            if !self.is_dead(server) {
                self.happen(server, event);
            }
        }
        for server in &self.servers {
            let counts = server.front.counts();
            let sum = &mut self.outcome.counts;
            sum.taken += counts.taken;
            sum.answered += counts.answered;
            sum.given_up += counts.given_up;
            sum.sent += counts.sent;
            sum.forwarded += counts.forwarded;
            sum.refused += counts.refused;
            sum.dropped += counts.dropped;
            sum.cancelled += counts.cancelled;
        }
        self.outcome.took.sort_unstable();
    }

    fn is_dead(&self, server: usize) -> bool {
        server == SERVERS - 1 && self.setting.crash.is_some_and(|crash| self.now >= crash)
    }

    fn plan(&mut self, after: Duration, server: usize, event: Event) {
        self.planned += 1;
        let at = self.now + after;
        self.events.push(Reverse((at, self.planned, server, event)));
    }

    /// To another server, or within one.
    fn send(&mut self, from: usize, to: ServerId, event: Event) {
        let to = to.0 as usize;
        let after = if from == to { Duration::ZERO } else { WIRE };
        self.plan(after, to, event);
    }

    fn happen(&mut self, at: usize, event: Event) {
        let now = self.now;
        let own = ServerId(at as u64);
        let server = &mut self.servers[at];
        match event {
            Event::Arrive => {
                let next = self.exponential(Duration::from_secs(1) / self.setting.rate);
                if now + next < ARRIVALS {
                    self.plan(next, at, Event::Arrive);
                }
                let request = self.servers[at].front.request(now);
                let (number, to) = request.expect("the servers have reported and may hold all");
                self.send_request(at, number, &to);
            }
            Event::Request(request) => match server.worker.offer(request) {
                Ok(()) => self.work(at),
                Err(_) => {
                    let number = request.number;
                    self.send(at, request.front, Event::Refused { number, from: own });
                }
            },
            Event::Answer { number, from } => match server.front.answer(number, from, now) {
                Verdict::First { cancel, took } => {
                    self.outcome.took.push(took);
                    self.outcome.in_time += u64::from(now <= ARRIVALS);
                    self.send_cancel(at, number, &cancel);
                }
                Verdict::Dropped => {}
            },
            Event::Refused { number, from } => {
                let due = server.front.refused(number, from, now);
                self.due(at, due);
            }
            Event::Cancel(request) => {
                server.worker.cancel(request);
                if let Some((current, since)) = server.current
                    && current == request
                {
                    self.stop(at, request, since);
                }
                self.work(at);
            }
            Event::Report { from, load } => {
                server.front.report(from, load, now);
            }
            Event::Done(request) => {
                // It may have been stopped before.
                if let Some((current, since)) = server.current
                    && current == request
                    && self.stop(at, request, since)
                {
                    let number = request.number;
                    self.send(at, request.front, Event::Answer { number, from: own });
                }
                self.work(at);
            }
            Event::Tick => {
                server.tick = None;
                let due = server.front.tick(now);
                self.due(at, due);
            }
            Event::Beat => {
                server.beat = None;
                self.load_changed(at);
            }
        }
        self.plan_tick(at);
    }

    fn send_request(&mut self, at: usize, number: u64, to: &[ServerId]) {
        let front = ServerId(at as u64);
        for server in to {
            self.send(at, *server, Event::Request(RequestId { front, number }));
        }
    }

    fn send_cancel(&mut self, at: usize, number: u64, to: &[ServerId]) {
        let front = ServerId(at as u64);
        for server in to {
            self.send(at, *server, Event::Cancel(RequestId { front, number }));
        }
    }

    fn due(&mut self, at: usize, due: impl IntoIterator<Item = Due>) {
        for due in due {
            match due {
                Due::Forward { number, to } => self.send_request(at, number, &to),
                Due::GiveUp { number, cancel } => self.send_cancel(at, number, &cancel),
            }
        }
    }

    fn plan_tick(&mut self, at: usize) {
        let server = &mut self.servers[at];
        if let Some(next) = server.front.next()
            && server.tick.is_none_or(|tick| next < tick)
        {
            server.tick = Some(next);
            self.plan(next.saturating_sub(self.now), at, Event::Tick);
        }
    }

    /// Begins the next request if the server is free.
    fn work(&mut self, at: usize) {
        if let Some(request) = self.servers[at].worker.start() {
            let takes = match self.setting.work {
                Work::Constant => WORK,
                Work::Exponential => self.exponential(WORK),
            };
            self.servers[at].current = Some((request, self.now));
            self.plan(takes, at, Event::Done(request));
        }
        self.load_changed(at);
    }

    /// Ends the work on a request; whether an answer is wanted.
    fn stop(&mut self, at: usize, request: RequestId, since: Duration) -> bool {
        let server = &mut self.servers[at];
        server.current = None;
        self.outcome.worked += self.now - since;
        server.worker.finish(request)
    }

    /// Reports the load, or plans to.
    fn load_changed(&mut self, at: usize) {
        let now = self.now;
        let from = ServerId(at as u64);
        let server = &mut self.servers[at];
        let load = server.worker.load();
        server.front.report(from, load, now);
        if server.reporter.next(load) <= now {
            server.reporter.reported(load, now);
            for to in (0..SERVERS).filter(|to| *to != at) {
                self.send(at, ServerId(to as u64), Event::Report { from, load });
            }
        }
        let server = &mut self.servers[at];
        let next = server.reporter.next(load);
        if server.beat.is_none_or(|beat| next < beat) {
            server.beat = Some(next);
            self.plan(next.saturating_sub(now), at, Event::Beat);
        }
    }

    fn exponential(&mut self, mean: Duration) -> Duration {
        let uniform = (self.random() >> 11) as f64 / (1_u64 << 53) as f64;
        // In whole microseconds, so that the last bit of a logarithm does not matter.
        let micros = -(1.0 - uniform).ln() * mean.as_micros() as f64;
        Duration::from_micros(micros as u64)
    }

    /// Splitmix64.
    fn random(&mut self) -> u64 {
        self.chance = self.chance.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.chance;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
