//! A server of the group: takes requests from clients, works on those of all, and tells the others what they have to know.
//! How that gets there is not known here.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use xbee_kecho::balance::{
    self, Counts, Due, Front, MAX_QUEUED_REQUESTS, Options, Reporter, RequestId, ServerId, Verdict,
    Worker,
};

use crate::message::Message;

/// What a request takes unless its path says `ms=...`, as in the paper.
const WORK: Duration = Duration::from_millis(38);
/// The most that a path may ask for.
const MAX_WORK_MS: u64 = 10_000;

/// A message, and who gets it: all for a load.
pub type Outgoing = (Vec<ServerId>, Message);

/// What a client gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// A server's answer.
    Answer(String),
    /// Nobody answered.
    GivenUp,
}

/// One server.
pub struct Service {
    own: ServerId,
    begun: Instant,
    /// A request takes so many times as long as it says.
    slow: u32,
    state: Mutex<State>,
    /// Something in the state.
    changed: Condvar,
    send: Box<dyn Fn(Outgoing) + Send + Sync>,
}

struct State {
    front: Front,
    worker: Worker,
    reporter: Reporter,
    /// Clients of this front and what they ask for; as many as it has open requests.
    clients: HashMap<u64, (SyncSender<Reply>, String)>,
    /// Paths of requests that wait in the worker.
    paths: HashMap<RequestId, String>,
    /// Requests worked on to the end, with an answer.
    worked: u64,
    /// Requests that a cancel stopped.
    stopped: u64,
}

impl Service {
    /// A server that takes `slow` times as long as others and sends by `send`, which may wait.
    pub fn new(
        own: ServerId,
        options: Options,
        slow: u32,
        send: impl Fn(Outgoing) + Send + Sync + 'static,
    ) -> Service {
        let state = State {
            front: Front::new(own, options),
            worker: Worker::new(1, MAX_QUEUED_REQUESTS),
            reporter: Reporter::default(),
            clients: HashMap::new(),
            paths: HashMap::new(),
            worked: 0,
            stopped: 0,
        };
        Service {
            own,
            begun: Instant::now(),
            slow,
            state: Mutex::new(state),
            changed: Condvar::new(),
            send: Box::new(send),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What is in it is whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Has a client's request answered, by whoever does it first.
    ///
    /// # Errors
    /// The front takes no more, or knows of no server.
    pub fn ask(&self, path: &str) -> Result<Reply, balance::Error> {
        let (sender, receiver) = sync_channel(1);
        let (id, to) = {
            let mut state = self.lock();
            let (number, to) = state.front.request(self.now())?;
            state.clients.insert(number, (sender, path.to_owned()));
            let front = self.own;
            (RequestId { front, number }, to)
        };
        // It may be due before all that was.
        self.changed.notify_all();
        (self.send)((to, Message::Request(id, path.to_owned())));
        // No sender is dropped without a word, as long as the service is there.
        Ok(receiver.recv().unwrap_or(Reply::GivenUp))
    }

    /// Whether somebody waits for this answer; for a filter. One that nobody waits for counts as dropped.
    pub fn wants(&self, request: RequestId, from: ServerId) -> bool {
        request.front == self.own && self.lock().front.wants(request.number, from)
    }

    /// A message came.
    pub fn receive(&self, message: Message) {
        let now = self.now();
        let mut state = self.lock();
        let mut out = vec![];
        match message {
            Message::Request(request, path) => match state.worker.offer(request) {
                Ok(()) => {
                    state.paths.insert(request, path);
                }
                Err(_) => out.push((vec![request.front], Message::Refused(request, self.own))),
            },
            Message::Cancel(request) => {
                state.stopped += u64::from(state.worker.cancel(request));
                state.paths.remove(&request);
            }
            Message::Answer(request, from, body) => {
                if request.front == self.own
                    && let Verdict::First { cancel, .. } =
                        state.front.answer(request.number, from, now)
                {
                    state.reply(request.number, Reply::Answer(body));
                    out.push((cancel, Message::Cancel(request)));
                }
            }
            Message::Refused(request, from) => {
                if request.front == self.own {
                    let due = state.front.refused(request.number, from, now);
                    out.extend(due.map(|due| self.due(&mut state, due)));
                }
            }
            Message::Load(from, load) => {
                state.front.report(from, load, now);
            }
        }
        out.extend(self.report(&mut state));
        self.send_all(state, out);
    }

    /// Works on requests, for ever.
    pub fn work(&self) {
        let mut state = self.lock();
        loop {
            let Some(request) = state.worker.start() else {
                state = self.wait(state, None);
                continue;
            };
            let path = state.paths.remove(&request).unwrap_or_default();
            let done = self.now() + work_of(&path) * self.slow;
            while state.worker.is_wanted(request) && self.now() < done {
                state = self.wait(state, Some(done));
            }
            let mut out = vec![];
            if state.worker.finish(request) {
                state.worked += 1;
                let body = format!("path={path}\nserver={}\n", self.own);
                let answer = Message::Answer(request, self.own, body);
                out.push((vec![request.front], answer));
            }
            out.extend(self.report(&mut state));
            self.send_all(state, out);
            state = self.lock();
        }
    }

    /// Forwards, gives up, and reports the load, for ever.
    pub fn keep_time(&self) {
        loop {
            let mut state = self.lock();
            let now = self.now();
            let due = state.front.tick(now);
            let mut out: Vec<_> = (due.into_iter())
                .map(|due| self.due(&mut state, due))
                .collect();
            out.extend(self.report(&mut state));
            if out.is_empty() {
                let report = state.reporter.next(state.worker.load());
                let next = state.front.next().map_or(report, |next| next.min(report));
                drop(self.wait(state, Some(next)));
            } else {
                self.send_all(state, out);
            }
        }
    }

    /// What it did, a line each.
    pub fn counts(&self) -> String {
        let state = self.lock();
        let Counts {
            taken,
            answered,
            given_up,
            sent,
            forwarded,
            refused,
            dropped,
            cancelled,
        } = state.front.counts();
        let mut text = format!("server {}\n", self.own);
        for (name, count) in [
            ("taken", taken),
            ("answered", answered),
            ("given-up", given_up),
            ("sent", sent),
            ("forwarded", forwarded),
            ("refused", refused),
            ("dropped", dropped),
            ("cancelled", cancelled),
            ("worked", state.worked),
            ("stopped", state.stopped),
            ("load", state.worker.load().into()),
            ("known", state.front.known(self.now()) as u64),
        ] {
            writeln!(text, "{name} {count}").unwrap_or_default();
        }
        text
    }

    fn due(&self, state: &mut State, due: Due) -> Outgoing {
        let front = self.own;
        match due {
            Due::Forward { number, to } => {
                let path = state.clients.get(&number).map(|(_, path)| path.clone());
                let path = path.unwrap_or_default();
                (to, Message::Request(RequestId { front, number }, path))
            }
            Due::GiveUp { number, cancel } => {
                state.reply(number, Reply::GivenUp);
                (cancel, Message::Cancel(RequestId { front, number }))
            }
        }
    }

    /// The load, if it is to be told; the front here hears of it anyway.
    fn report(&self, state: &mut State) -> Option<Outgoing> {
        let now = self.now();
        let load = state.worker.load();
        state.front.report(self.own, load, now);
        if state.reporter.next(load) > now {
            return None;
        }
        state.reporter.reported(load, now);
        Some((vec![], Message::Load(self.own, load)))
    }

    /// Not under the lock: it may take time, and come back here.
    fn send_all(&self, state: MutexGuard<'_, State>, out: Vec<Outgoing>) {
        drop(state);
        self.changed.notify_all();
        for (to, message) in out {
            if !to.is_empty() || matches!(message, Message::Load(..)) {
                (self.send)((to, message));
            }
        }
    }

    fn wait<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        until: Option<Duration>,
    ) -> MutexGuard<'a, State> {
        match until {
            None => (self.changed.wait(state)).unwrap_or_else(PoisonError::into_inner),
            Some(until) => {
                let time = until.saturating_sub(self.now());
                let waited = self.changed.wait_timeout(state, time);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }
}

impl State {
    fn reply(&mut self, number: u64, reply: Reply) {
        if let Some((client, _)) = self.clients.remove(&number) {
            // It has room for one, and a client that went away does not want it.
            let _ = client.try_send(reply);
        }
    }
}

/// `/page?ms=100` takes 100 ms.
fn work_of(path: &str) -> Duration {
    let ms = path.rsplit_once("?ms=").and_then(|(_, ms)| ms.parse().ok());
    ms.map_or(WORK, |ms: u64| Duration::from_millis(ms.min(MAX_WORK_MS)))
}
