//! The tasks of one parameter sweep (GFD.149), seen as one.

use std::collections::BTreeMap;

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
    members: watch::Sender<Members>,
}

/// Its tasks by their numbers.
pub type Members = BTreeMap<u32, Member>;

/// One of its tasks, as far as the whole depends on it.
#[derive(Debug, Clone)]
pub struct Member {
    id: Uuid,
    state: State,
    exit_code: Option<i32>,
    /// Why it did not end well: the text and its code.
    reason: Option<(String, Option<String>)>,
    /// Milliseconds since the Unix epoch, as the two below.
    accepted_ms: u64,
    begun_ms: Option<u64>,
    ended_ms: Option<u64>,
}

impl Member {
    fn new(id: Uuid, first: &Entry) -> Member {
        let mut member = Member {
            id,
            state: State::Pending,
            exit_code: None,
            reason: None,
            accepted_ms: first.at_ms,
            begun_ms: None,
            ended_ms: None,
        };
        member.enter(first);
        member
    }

    fn enter(&mut self, entry: &Entry) {
        self.state = view::bes(&entry.state).0;
        if !entry.state.is_pending() {
            self.begun_ms.get_or_insert(entry.at_ms);
        }
        if self.state.is_final() {
            self.ended_ms.get_or_insert(entry.at_ms);
            self.exit_code = entry
                .state
                .exit_code
                .filter(|_| self.state == State::Finished);
            let (reason, code) = view::reason(&entry.state);
            self.reason = reason.map(|reason| (reason, code));
        }
    }
}

fn counts(members: &Members) -> ArrayCounts {
    let mut counts = ArrayCounts::default();
    for member in members.values() {
        *match member.state {
            State::Pending => &mut counts.pending,
            State::Running => &mut counts.running,
            State::Finished => &mut counts.finished,
            State::Failed => &mut counts.failed,
            State::Terminated => &mut counts.terminated,
        } += 1;
    }
    counts
}

fn state(counts: &ArrayCounts) -> State {
    if counts.pending + counts.running > 0 {
        return match counts.running + counts.ended() {
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

/// When the whole entered its states.
fn times(members: &Members, state: State) -> Vec<Transition> {
    let accepted = members.values().map(|member| member.accepted_ms).min();
    let begun = members.values().filter_map(|member| member.begun_ms).min();
    let ended = members.values().filter_map(|member| member.ended_ms).max();
    [
        accepted.map(|at_ms| (State::Pending, at_ms)),
        begun.map(|at_ms| (State::Running, at_ms)),
        ended
            .filter(|_| state.is_final())
            .map(|at_ms| (state, at_ms)),
    ]
    .into_iter()
    .flatten()
    .map(|(state, at_ms)| Transition {
        state,
        substate: substate(state),
        at: view::rfc3339(at_ms),
        at_ms,
    })
    .collect()
}

/// Why not all ended well, in the words of the first that did not.
fn reason(members: &Members, counts: &ArrayCounts) -> (Option<String>, Option<String>) {
    let not_well = members.values().filter(|member| member.reason.is_some());
    let first = not_well.min_by_key(|member| member.ended_ms);
    let Some((reason, code)) = first.and_then(|member| member.reason.clone()) else {
        return (None, None);
    };
    let ArrayCounts {
        failed, terminated, ..
    } = counts;
    let text = format!("{failed} failed, {terminated} terminated; the first: {reason}");
    (Some(text), code)
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
            members: watch::Sender::new(Members::new()),
        }
    }

    /// Takes a task with what has happened to it so far.
    pub fn add(&self, number: u32, id: Uuid, journal: &[Entry]) {
        let Some((first, later)) = journal.split_first() else {
            return;
        };
        let mut member = Member::new(id, first);
        later.iter().for_each(|entry| member.enter(entry));
        self.members.send_modify(|members| {
            members.insert(number, member);
        });
    }

    /// One of its tasks has entered another state.
    pub fn changed(&self, number: u32, entry: &Entry) {
        self.members.send_if_modified(|members| {
            let Some(member) = members.get_mut(&number) else {
                return false;
            };
            let before = member.state;
            member.enter(entry);
            member.state != before
        });
    }

    /// One of its tasks is forgotten. Says whether any is left.
    pub fn forget(&self, number: u32) -> bool {
        self.members
            .send_if_modified(|members| members.remove(&number).is_some());
        !self.members.borrow().is_empty()
    }

    /// Its tasks, by their numbers.
    pub fn members(&self) -> Vec<Uuid> {
        let members = self.members.borrow();
        members.values().map(|member| member.id).collect()
    }

    /// The task with this number.
    pub fn member(&self, number: u32) -> Option<Uuid> {
        self.members.borrow().get(&number).map(|member| member.id)
    }

    /// All of its tasks are over.
    pub fn is_final(&self) -> bool {
        state(&counts(&self.members.borrow())).is_final()
    }

    /// Wakes when one of its tasks enters another state.
    pub fn watch(&self) -> watch::Receiver<Members> {
        self.members.subscribe()
    }

    /// All of it as the API shows a task.
    pub fn status(&self) -> TaskStatus {
        let members = self.members.borrow();
        let counts = counts(&members);
        let state = state(&counts);
        let (reason, reason_code) = reason(&members, &counts);
        let exit_code = members.values().filter_map(|member| member.exit_code).max();
        TaskStatus {
            id: self.id,
            name: self.name.clone(),
            owner: self.owner.uid,
            state,
            substate: substate(state),
            exit_code: exit_code.filter(|_| state.is_final()),
            reason,
            reason_code,
            times: times(&members, state),
            progress: None,
            image: self.image.clone(),
            address: None,
            reservation: None,
            array: Some(counts),
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
            for entry in &journal[1..] {
                array.changed(index as u32 + 1, entry);
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
    fn what_is_forgotten_counts_no_more_and_the_first_is_the_earliest() {
        let owner = Owner { uid: 1, gid: 1 };
        let array = Array::new(Uuid::new_v4(), owner, 1, None, "base".into());
        let ended = |reason: &str, at_ms| {
            let mut journal = journal(vec![Input::Terminate {
                reason: reason.into(),
            }]);
            journal[1].at_ms = at_ms;
            journal
        };
        let journals = [ended("late", 50), ended("early", 20), finished(3)];
        let id = Uuid::new_v4();
        for (number, journal) in (1..).zip(&journals) {
            array.add(number, id, &journal[..1]);
        }
        // In the order of time.
        for number in [3, 2, 1] {
            for entry in &journals[number as usize - 1][1..] {
                array.changed(number, entry);
            }
        }
        let again = |numbers: &[u32]| {
            let again = Array::new(array.id, owner, 1, None, "base".into());
            for number in numbers {
                again.add(*number, id, &journals[*number as usize - 1]);
            }
            again.status()
        };
        let reason = array.status().reason.unwrap();
        assert_eq!(reason, "0 failed, 2 terminated; the first: early");
        assert_eq!(again(&[1, 2, 3]), array.status());
        array.forget(2);
        let reason = array.status().reason.unwrap();
        assert_eq!(reason, "0 failed, 1 terminated; the first: late");
        assert_eq!(again(&[1, 3]), array.status());
        array.forget(1);
        assert_eq!(array.status().state, State::Finished);
        assert_eq!(again(&[3]), array.status());
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
