//! A task as the outside sees it: BES states out of the engine's phases.

use time::OffsetDateTime;
use time::macros::format_description;
use xbee_api::{CacheEntry, State, SubState, TaskEvent, Transition};
use xbee_engine::{Outcome, Phase, Step, Task};

use crate::cache::Held;
use crate::store::Entry;

/// BES state and XenBEE's sub-state of a phase.
pub fn bes(task: &Task) -> (State, Option<SubState>) {
    match &task.phase {
        Phase::Reserved => (State::Pending, Some(SubState::Reserved)),
        Phase::Held | Phase::Queued => (State::Pending, Some(SubState::Confirmed)),
        Phase::Working { step }
        | Phase::Retrying { step, .. }
        | Phase::Cancelling { step, .. }
        | Phase::Releasing { step, .. } => (State::Running, Some(substate(*step))),
        Phase::Final { outcome } => match outcome {
            Outcome::Finished => (State::Finished, None),
            Outcome::Failed(_) => (State::Failed, None),
            Outcome::Terminated { .. } => (State::Terminated, None),
        },
    }
}

fn substate(step: Step) -> SubState {
    match step {
        Step::StageIn => SubState::StageIn,
        Step::Start => SubState::InstanceStarting,
        Step::Execute => SubState::Executing,
        Step::Stop => SubState::InstanceStopping,
        Step::StageOut => SubState::StageOut,
    }
}

/// Why a task ended as it did: the text for a user and the code for programs.
pub fn reason(task: &Task) -> (Option<String>, Option<String>) {
    match &task.phase {
        Phase::Final { outcome } => match outcome {
            Outcome::Finished => (None, None),
            Outcome::Failed(failure) => (Some(failure.reason.clone()), Some(failure.code.clone())),
            Outcome::Terminated { reason } => (Some(reason.clone()), Some("terminated".into())),
        },
        Phase::Retrying { failure, .. } => {
            (Some(failure.reason.clone()), Some(failure.code.clone()))
        }
        _ => (None, None),
    }
}

/// The journal as events: one for each change that BES knows.
pub fn events(journal: &[Entry]) -> Vec<TaskEvent> {
    let mut events: Vec<TaskEvent> = vec![];
    for entry in journal {
        let (state, substate) = bes(&entry.state);
        if let Some(last) = events.last()
            && (last.transition.state, last.transition.substate) == (state, substate)
        {
            continue;
        }
        events.push(TaskEvent {
            seq: events.len() as u64 + 1,
            transition: Transition {
                state,
                substate,
                at: rfc3339(entry.at_ms),
                at_ms: entry.at_ms,
            },
            exit_code: entry.state.exit_code,
            reason: reason(&entry.state).0,
        });
    }
    events
}

/// An entry of the cache; `in_use` says whether a task has its file.
pub fn cached(held: &Held, in_use: bool) -> CacheEntry {
    let entry = &held.entry;
    CacheEntry {
        id: entry.id,
        owner: entry.owner,
        uri: entry.uri.clone(),
        digest: entry.hash.clone(),
        compression: entry.compression.clone(),
        size_bytes: entry.size_bytes,
        allocated_bytes: entry.allocated_bytes,
        sha256: entry.sha256.clone(),
        fetched: rfc3339(entry.fetched_ms),
        fetched_ms: entry.fetched_ms,
        used: rfc3339(held.used_ms),
        used_ms: held.used_ms,
        etag: entry.etag.clone(),
        last_modified: entry.last_modified.clone(),
        in_use,
    }
}

/// RFC 3339 with milliseconds, UTC.
pub fn rfc3339(at_ms: u64) -> String {
    let form =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(at_ms) * 1_000_000)
        .ok()
        .and_then(|time| time.format(form).ok())
        .unwrap_or_default()
}

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis().try_into().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use xbee_engine::Input;

    #[test]
    fn each_bes_change_is_one_event_and_inner_phases_are_none() {
        let mut state = Task::default();
        let mut journal = vec![Entry {
            at_ms: 0,
            state: state.clone(),
        }];
        let mut inputs = vec![Input::Admitted];
        inputs.extend(Step::ALL.map(|step| Input::Done {
            step,
            exit_code: (step == Step::Execute).then_some(4),
        }));
        inputs.push(Input::Released);
        for (n, input) in inputs.into_iter().enumerate() {
            state.apply(input).unwrap();
            journal.push(Entry {
                at_ms: 1_000 * (n as u64 + 1),
                state: state.clone(),
            });
        }
        let events = events(&journal);
        let states: Vec<_> = events
            .iter()
            .map(|e| (e.transition.state, e.transition.substate))
            .collect();
        assert_eq!(
            states,
            [
                (State::Pending, Some(SubState::Confirmed)),
                (State::Running, Some(SubState::StageIn)),
                (State::Running, Some(SubState::InstanceStarting)),
                (State::Running, Some(SubState::Executing)),
                (State::Running, Some(SubState::InstanceStopping)),
                (State::Running, Some(SubState::StageOut)),
                (State::Finished, None),
            ]
        );
        assert_eq!(events[6].exit_code, Some(4));
        assert_eq!(events[1].transition.at, "1970-01-01T00:00:01.000Z");
        assert!(events.iter().zip(1..).all(|(e, n)| e.seq == n));
    }
}
