//! The tasks of one parameter sweep (GFD.149), seen as one.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use uuid::Uuid;
use xbee_api::{ArrayCounts, State, SubState, TaskEvent, TaskStatus, Transition};

use crate::store::{Entry, Owner};
use crate::view;

/// An array of tasks. It has no state of its own: it is what its tasks are.
#[derive(Debug)]
pub struct Array {
    /// Its id, by which all of them are meant.
    pub id: Uuid,
    /// Whose they are.
    pub owner: Owner,
    /// Number of its first task.
    pub number: i64,
    name: Option<String>,
    image: String,
    members: Mutex<BTreeMap<u32, Uuid>>,
    sum: watch::Sender<Sum>,
}

/// What the tasks are, in all.
#[derive(Debug, Clone, Default)]
pub struct Sum {
    counts: ArrayCounts,
    exit_code: Option<i32>,
    /// Why the first did not end well.
    reason: Option<(String, Option<String>)>,
    /// When the first was accepted, milliseconds since the Unix epoch.
    accepted_ms: Option<u64>,
    /// When the first no longer waited.
    begun_ms: Option<u64>,
    /// When the last one so far ended.
    ended_ms: u64,
}

impl Sum {
    fn count(&mut self, state: State) -> &mut u32 {
        match state {
            State::Pending => &mut self.counts.pending,
            State::Running => &mut self.counts.running,
            State::Finished => &mut self.counts.finished,
            State::Failed => &mut self.counts.failed,
            State::Terminated => &mut self.counts.terminated,
        }
    }

    fn state(&self) -> State {
        let counts = &self.counts;
        let ended = counts.finished + counts.failed + counts.terminated;
        if counts.pending + counts.running > 0 {
            return match counts.running + ended {
                0 => State::Pending,
                _ => State::Running,
            };
        }
        match (counts.failed, counts.terminated) {
            (0, 0) => State::Finished,
            (0, _) => State::Terminated,
            _ => State::Failed,
        }
    }

    /// Of the whole.
    fn times(&self) -> Vec<Transition> {
        let state = self.state();
        let ended = state.is_final().then_some((state, self.ended_ms));
        let accepted = self.accepted_ms.map(|at_ms| (State::Pending, at_ms));
        let begun = self.begun_ms.map(|at_ms| (State::Running, at_ms));
        let transition = |(state, at_ms)| Transition {
            state,
            substate: substate(state),
            at: view::rfc3339(at_ms),
            at_ms,
        };
        [accepted, begun, ended]
            .into_iter()
            .flatten()
            .map(transition)
            .collect()
    }

    fn reason(&self) -> (Option<String>, Option<String>) {
        let ArrayCounts {
            failed, terminated, ..
        } = self.counts;
        match &self.reason {
            Some((reason, code)) if failed + terminated > 0 => {
                let text = format!("{failed} failed, {terminated} terminated; the first: {reason}");
                (Some(text), code.clone())
            }
            _ => (None, None),
        }
    }
}

fn earlier(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    a.into_iter().chain(b).min()
}

fn substate(state: State) -> Option<SubState> {
    (state == State::Pending).then_some(SubState::Confirmed)
}

impl Array {
    /// One without tasks.
    pub fn new(id: Uuid, owner: Owner, number: i64, name: Option<String>, image: String) -> Array {
        Array {
            id,
            owner,
            number,
            name,
            image,
            members: Mutex::default(),
            sum: watch::Sender::new(Sum::default()),
        }
    }

    /// Takes a task with what has happened to it so far.
    pub fn add(&self, number: u32, id: Uuid, journal: &[Entry]) {
        self.lock().insert(number, id);
        let Some((first, last)) = journal.first().zip(journal.last()) else {
            return;
        };
        self.sum.send_modify(|sum| {
            *sum.count(view::bes(&first.state).0) += 1;
            let accepted_ms = sum.accepted_ms.unwrap_or(first.at_ms);
            sum.accepted_ms = Some(accepted_ms.min(first.at_ms));
            let begun = journal.iter().find(|entry| !entry.state.is_pending());
            sum.begun_ms = earlier(sum.begun_ms, begun.map(|entry| entry.at_ms));
        });
        self.changed(first, last);
    }

    /// One of its tasks has entered another state.
    pub fn changed(&self, before: &Entry, now: &Entry) {
        let (from, to) = (view::bes(&before.state).0, view::bes(&now.state).0);
        if from == to {
            return;
        }
        let (reason, code) = view::reason(&now.state);
        self.sum.send_modify(|sum| {
            *sum.count(from) -= 1;
            *sum.count(to) += 1;
            if to == State::Finished {
                sum.exit_code = sum.exit_code.max(now.state.exit_code);
            }
            if let Some(reason) = reason.filter(|_| to.is_final() && sum.reason.is_none()) {
                sum.reason = Some((reason, code));
            }
            sum.begun_ms = earlier(sum.begun_ms, Some(now.at_ms));
            if to.is_final() {
                sum.ended_ms = sum.ended_ms.max(now.at_ms);
            }
        });
    }

    /// One of its tasks is forgotten.
    pub fn forget(&self, id: Uuid) {
        self.lock().retain(|_, member| *member != id);
    }

    /// Its tasks, by their numbers.
    pub fn members(&self) -> Vec<Uuid> {
        self.lock().values().copied().collect()
    }

    /// The task with this number.
    pub fn member(&self, number: u32) -> Option<Uuid> {
        self.lock().get(&number).copied()
    }

    /// All of its tasks are over.
    pub fn is_final(&self) -> bool {
        self.sum.borrow().state().is_final()
    }

    /// Wakes when one of its tasks enters another state.
    pub fn watch(&self) -> watch::Receiver<Sum> {
        self.sum.subscribe()
    }

    /// All of it as the API shows a task.
    pub fn status(&self) -> TaskStatus {
        let sum = self.sum.borrow().clone();
        let state = sum.state();
        let (reason, reason_code) = sum.reason();
        TaskStatus {
            id: self.id,
            name: self.name.clone(),
            owner: self.owner.uid,
            state,
            substate: substate(state),
            exit_code: sum.exit_code.filter(|_| state.is_final()),
            reason,
            reason_code,
            times: sum.times(),
            progress: None,
            image: self.image.clone(),
            address: None,
            reservation: None,
            array: Some(sum.counts),
            member: None,
            ports: vec![],
        }
    }

    /// Its changes of state.
    pub fn events(&self) -> Vec<TaskEvent> {
        let status = self.status();
        let last = status.times.len();
        let event = |(transition, seq): (Transition, usize)| TaskEvent {
            seq: seq as u64,
            transition,
            exit_code: status.exit_code.filter(|_| seq == last),
            reason: status.reason.clone().filter(|_| seq == last),
        };
        status
            .times
            .clone()
            .into_iter()
            .zip(1..)
            .map(event)
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Uuid>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xbee_engine::{Input, Step, Task};

    fn journal(inputs: Vec<Input>) -> Vec<Entry> {
        let mut state = Task::default();
        let mut journal = vec![Entry {
            at_ms: 0,
            state: state.clone(),
        }];
        for (input, at_ms) in inputs.into_iter().zip(1..) {
            state.apply(input).unwrap();
            let state = state.clone();
            journal.push(Entry { at_ms, state });
        }
        journal
    }

    fn finished(exit_code: i32) -> Vec<Entry> {
        let mut inputs = vec![Input::Admitted];
        inputs.extend(Step::ALL.map(|step| Input::Done {
            step,
            exit_code: (step == Step::Execute).then_some(exit_code),
        }));
        inputs.push(Input::Released);
        journal(inputs)
    }

    #[test]
    fn an_array_is_what_its_tasks_are() {
        let owner = Owner { uid: 1, gid: 1 };
        let array = Array::new(Uuid::new_v4(), owner, 1, None, "base".into());
        let journals = [finished(0), finished(4), finished(1)];
        let ids = [(); 3].map(|()| Uuid::new_v4());
        for (number, (id, journal)) in (1..).zip(ids.iter().zip(&journals)) {
            array.add(number, *id, &journal[..1]);
        }
        assert_eq!(array.status().state, State::Pending);
        assert_eq!(array.member(2), Some(ids[1]));
        for (index, journal) in journals.iter().enumerate() {
            for pair in journal.windows(2) {
                array.changed(&pair[0], &pair[1]);
            }
            assert_eq!(array.is_final(), index == 2);
        }
        let status = array.status();
        assert_eq!((status.state, status.exit_code), (State::Finished, Some(4)));
        assert_eq!(status.array.unwrap().finished, 3);
        let states: Vec<_> = array.events().iter().map(|e| e.transition.state).collect();
        assert_eq!(states, [State::Pending, State::Running, State::Finished]);
        // After a restart it is the same.
        let again = Array::new(array.id, owner, 1, None, "base".into());
        for (number, (id, journal)) in (1..).zip(ids.iter().zip(&journals)) {
            again.add(number, *id, journal);
        }
        assert_eq!(again.status(), array.status());
    }

    #[test]
    fn one_that_was_ended_is_named() {
        let owner = Owner { uid: 1, gid: 1 };
        let array = Array::new(Uuid::new_v4(), owner, 1, None, "base".into());
        let reason = "because".to_owned();
        array.add(1, Uuid::new_v4(), &finished(0));
        let ended = journal(vec![Input::Terminate { reason }]);
        array.add(2, Uuid::new_v4(), &ended);
        let status = array.status();
        assert_eq!(status.state, State::Terminated);
        let reason = status.reason.unwrap();
        assert_eq!(reason, "0 failed, 1 terminated; the first: because");
    }
}
