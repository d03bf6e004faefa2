//! The life of one task.
//!
//! ```text
//! Reserved -> Held -> Queued -> Stage-In -> Instance-Starting -> Executing -> Instance-Stopping -> Stage-Out
//!     |        |       |  ^        |               |                |                |               |
//!     |        |       |  +- Retrying -+-----------+                |                |               |
//!     +--------+-------+-----------+------- failure or terminate ---+----------------+---------------+
//!                                                       |                                            |
//!                                                       v                                            v
//!                                                   Releasing ---------------------------------> Final(...)
//! ```
//!
//! A task begins as `Reserved` (capacity is held, what to run is not known yet) or as `Queued`. Every way to the end
//! leads through `Releasing`, in which the domain and the spool are given back: a task in a final state holds nothing.
//! What failed before anything was executed may be `Retrying`: all is given back, and it waits again.

use serde::{Deserialize, Serialize};

/// A piece of work of a task. Each can be performed again after a crash, and all that it made is
/// taken back by the release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Fetch the image and the files to the spool.
    StageIn,
    /// Make the domain, boot it, put the files into it.
    Start,
    /// Run the task and wait for its end.
    Execute,
    /// Take the results out of the domain and shut it down.
    Stop,
    /// Send the results to where the job wants them.
    StageOut,
}

impl Step {
    /// All steps in their order.
    pub const ALL: [Step; 5] = [
        Step::StageIn,
        Step::Start,
        Step::Execute,
        Step::Stop,
        Step::StageOut,
    ];

    fn next(self) -> Option<Step> {
        match self {
            Step::StageIn => Some(Step::Start),
            Step::Start => Some(Step::Execute),
            Step::Execute => Some(Step::Stop),
            Step::Stop => Some(Step::StageOut),
            Step::StageOut => None,
        }
    }
}

/// Why a task failed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Failure {
    /// Stable code for programs, kebab-case.
    pub code: String,
    /// For the user: what, where, what was expected, what to do.
    pub reason: String,
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum Outcome {
    /// It ran to its end and its results are where they should be.
    Finished,
    /// It could not.
    Failed(Failure),
    /// Someone asked for its end.
    Terminated {
        /// Who or what asked.
        reason: String,
    },
}

/// Where a task is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "phase")]
pub enum Phase {
    /// Capacity is held for it; it has no document yet.
    Reserved,
    /// It has a document, and waits to be told to start.
    Held,
    /// Waiting for capacity.
    Queued,
    /// A step is under way.
    Working {
        /// Which.
        step: Step,
    },
    /// A step was told to stop; what follows is decided.
    Cancelling {
        /// Which step.
        step: Step,
        /// What the task will be.
        outcome: Outcome,
    },
    /// Domain and spool are being given back, to begin anew.
    Retrying {
        /// The step that failed.
        step: Step,
        /// Why.
        failure: Failure,
    },
    /// Domain and spool are being given back.
    Releasing {
        /// The step that came last.
        step: Step,
        /// What the task will be.
        outcome: Outcome,
    },
    /// Over.
    Final {
        /// How it ended.
        outcome: Outcome,
    },
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Input {
    /// There is a document now.
    Confirmed {
        /// It may start.
        start: bool,
    },
    /// It may start.
    Started,
    /// The queue gives the task its capacity.
    Admitted,
    /// The step under way did what it should. `exit_code` is given by [`Step::Execute`].
    Done {
        /// Which.
        step: Step,
        /// Exit code of the task in the guest.
        exit_code: Option<i32>,
    },
    /// The step under way failed, or was cancelled.
    Failed {
        /// Which.
        step: Step,
        /// Why.
        failure: Failure,
        /// When to try again, milliseconds of the caller's clock, if it shall be. Nothing that may have executed is.
        retry_at_ms: Option<u64>,
    },
    /// Someone wants the end of it.
    Terminate {
        /// Who or what.
        reason: String,
    },
    /// Domain and spool are given back.
    Released,
}

/// What the actor has to do, after it wrote the new state down.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Begin this step.
    Perform(Step),
    /// Tell this step to stop; its end is reported as `Done` or `Failed` all the same.
    Cancel(Step),
    /// Destroy the domain if there is one, remove the spool's temporary files, give back the
    /// capacity; then report `Released`.
    Release,
}

/// What became of a task's domain while nobody looked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DomainFate {
    /// It runs.
    Alive,
    /// There is none.
    Gone,
}

/// The durable part of a task's state.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Task {
    /// Where it is.
    pub phase: Phase,
    /// Exit code, once the task in the guest ended.
    pub exit_code: Option<i32>,
    /// How often it was tried again.
    #[serde(default)]
    pub retries: u32,
    /// It does not begin before, milliseconds of the caller's clock.
    #[serde(default)]
    pub not_before_ms: u64,
}

/// An input that makes no sense in the phase: a bug of the caller, never of a user.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{input:?} cannot happen in {phase:?}")]
pub struct TransitionError {
    phase: Box<Phase>,
    input: Box<Input>,
}

impl Default for Task {
    fn default() -> Self {
        Task {
            phase: Phase::Queued,
            exit_code: None,
            retries: 0,
            not_before_ms: 0,
        }
    }
}

impl Task {
    /// A task that capacity is held for.
    pub fn reserved() -> Task {
        Task {
            phase: Phase::Reserved,
            ..Task::default()
        }
    }

    /// Nothing was begun for it: there is nothing to give back but what is held for it in the queue.
    pub fn is_pending(&self) -> bool {
        matches!(self.phase, Phase::Reserved | Phase::Held | Phase::Queued)
    }

    /// The task is over and holds nothing.
    pub fn is_final(&self) -> bool {
        matches!(self.phase, Phase::Final { .. })
    }

    /// Takes an input; changes nothing when the input is refused.
    ///
    /// A terminate request is welcome in every phase: it is the one input that comes from outside,
    /// at any time. Where the end is near anyway it has no effect.
    pub fn apply(&mut self, input: Input) -> Result<Vec<Action>, TransitionError> {
        let (phase, actions) = match (&self.phase, &input) {
            (Phase::Reserved, Input::Confirmed { start: false }) => (Phase::Held, vec![]),
            (Phase::Reserved, Input::Confirmed { start: true }) | (Phase::Held, Input::Started) => {
                (Phase::Queued, vec![])
            }
            (Phase::Queued, Input::Admitted) => (
                Phase::Working {
                    step: Step::StageIn,
                },
                vec![Action::Perform(Step::StageIn)],
            ),
            // Nothing was begun, so there is nothing to give back.
            (Phase::Reserved | Phase::Held | Phase::Queued, Input::Terminate { reason }) => (
                Phase::Final {
                    outcome: Outcome::Terminated {
                        reason: reason.clone(),
                    },
                },
                vec![],
            ),

            (Phase::Working { step }, Input::Done { step: done, .. }) if step == done => {
                match step.next() {
                    Some(next) => (Phase::Working { step: next }, vec![Action::Perform(next)]),
                    None => releasing(*step, Outcome::Finished),
                }
            }
            (
                Phase::Working { step },
                Input::Failed {
                    step: at,
                    failure,
                    retry_at_ms,
                },
            ) if step == at => match retry_at_ms {
                Some(_) if matches!(step, Step::StageIn | Step::Start) => (
                    Phase::Retrying {
                        step: *step,
                        failure: failure.clone(),
                    },
                    vec![Action::Release],
                ),
                _ => releasing(*step, Outcome::Failed(failure.clone())),
            },
            (Phase::Working { step }, Input::Terminate { reason }) => (
                Phase::Cancelling {
                    step: *step,
                    outcome: Outcome::Terminated {
                        reason: reason.clone(),
                    },
                },
                vec![Action::Cancel(*step)],
            ),

            // However the cancelled step ended, the user's wish stands.
            (
                Phase::Cancelling { step, outcome },
                Input::Done { step: at, .. } | Input::Failed { step: at, .. },
            ) if step == at => releasing(*step, outcome.clone()),

            (Phase::Retrying { .. }, Input::Released) => (Phase::Queued, vec![]),
            // The release is under way, and its end is reported.
            (Phase::Retrying { step, .. }, Input::Terminate { reason }) => (
                Phase::Releasing {
                    step: *step,
                    outcome: Outcome::Terminated {
                        reason: reason.clone(),
                    },
                },
                vec![],
            ),

            (Phase::Releasing { outcome, .. }, Input::Released) => (
                Phase::Final {
                    outcome: outcome.clone(),
                },
                vec![],
            ),

            // Already on the way to the end, or there.
            (
                Phase::Cancelling { .. } | Phase::Releasing { .. } | Phase::Final { .. },
                Input::Terminate { .. },
            ) => return Ok(vec![]),

            (phase, _) => {
                return Err(TransitionError {
                    phase: Box::new(phase.clone()),
                    input: Box::new(input),
                });
            }
        };
        match input {
            Input::Done {
                step: Step::Execute,
                exit_code,
            } => self.exit_code = exit_code,
            Input::Failed {
                retry_at_ms: Some(at_ms),
                ..
            } if matches!(phase, Phase::Retrying { .. }) => {
                self.retries += 1;
                self.not_before_ms = at_ms;
            }
            _ => {}
        }
        self.phase = phase;
        Ok(actions)
    }

    /// What to do with a task found in the journal after `xbed` was started again.
    ///
    /// A task that may have begun to execute is never executed anew: with its domain alive the
    /// step is taken up again (the agent knows the conversation), without it the task failed.
    pub fn recover(&mut self, domain: DomainFate) -> Vec<Action> {
        let lost = |what: &str| Failure {
            code: "domain-lost".into(),
            reason: format!(
                "the domain was gone when xbed came back after an interruption, {what}; submit the job again"
            ),
        };
        let (phase, actions) = match (&self.phase, domain) {
            (Phase::Reserved | Phase::Held | Phase::Queued | Phase::Final { .. }, _) => {
                return vec![];
            }
            (
                Phase::Working {
                    step: Step::Execute,
                },
                DomainFate::Gone,
            ) => releasing(
                Step::Execute,
                Outcome::Failed(lost("and the task may have run in part")),
            ),
            (Phase::Working { step: Step::Stop }, DomainFate::Gone) => releasing(
                Step::Stop,
                Outcome::Failed(lost(
                    "after the task had ended but before its results were taken out",
                )),
            ),
            (Phase::Working { step }, _) => (self.phase.clone(), vec![Action::Perform(*step)]),
            (Phase::Cancelling { step, outcome }, _) => releasing(*step, outcome.clone()),
            (Phase::Releasing { .. } | Phase::Retrying { .. }, _) => {
                (self.phase.clone(), vec![Action::Release])
            }
        };
        self.phase = phase;
        actions
    }
}

fn releasing(step: Step, outcome: Outcome) -> (Phase, Vec<Action>) {
    (Phase::Releasing { step, outcome }, vec![Action::Release])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{HashMap, HashSet, VecDeque};

    fn failure() -> Failure {
        Failure {
            code: "test".into(),
            reason: "because".into(),
        }
    }

    fn every_input() -> Vec<Input> {
        let mut inputs = vec![
            Input::Confirmed { start: false },
            Input::Confirmed { start: true },
            Input::Started,
            Input::Admitted,
            Input::Released,
            Input::Terminate {
                reason: "user".into(),
            },
        ];
        for step in Step::ALL {
            inputs.push(Input::Done {
                step,
                exit_code: (step == Step::Execute).then_some(3),
            });
            for retry_at_ms in [None, Some(5)] {
                inputs.push(Input::Failed {
                    step,
                    failure: failure(),
                    retry_at_ms,
                });
            }
        }
        inputs
    }

    /// All states that can be reached, with the edges between them; restarts of `xbed` included.
    fn reachable() -> HashMap<Task, Vec<(Task, Vec<Action>)>> {
        let mut seen: HashMap<Task, Vec<(Task, Vec<Action>)>> = HashMap::new();
        let mut todo = VecDeque::from([Task::default(), Task::reserved()]);
        while let Some(task) = todo.pop_front() {
            // Further tries are as the first.
            if seen.contains_key(&task) || task.retries > 2 {
                continue;
            }
            let mut edges = vec![];
            for input in every_input() {
                let mut next = task.clone();
                match next.apply(input) {
                    Ok(actions) => edges.push((next, actions)),
                    Err(_) => assert_eq!(next, task, "a refused input changed the state"),
                }
            }
            for fate in [DomainFate::Alive, DomainFate::Gone] {
                let mut next = task.clone();
                let actions = next.recover(fate);
                edges.push((next, actions));
            }
            todo.extend(edges.iter().map(|(next, _)| next.clone()));
            seen.insert(task, edges);
        }
        seen
    }

    #[test]
    fn the_good_path_visits_every_step_once() {
        let mut task = Task::default();
        let mut performed = vec![];
        let mut actions = task.apply(Input::Admitted).unwrap();
        while let Some(Action::Perform(step)) = actions.first().cloned() {
            performed.push(step);
            let exit_code = (step == Step::Execute).then_some(7);
            actions = task.apply(Input::Done { step, exit_code }).unwrap();
        }
        assert_eq!(performed, Step::ALL);
        assert_eq!(actions, [Action::Release]);
        task.apply(Input::Released).unwrap();
        assert_eq!(
            task.phase,
            Phase::Final {
                outcome: Outcome::Finished
            }
        );
        assert_eq!(task.exit_code, Some(7));
    }

    #[test]
    fn terminate_is_taken_in_every_state_and_nothing_refuses_it() {
        for task in reachable().into_keys() {
            let mut next = task.clone();
            next.apply(Input::Terminate {
                reason: "user".into(),
            })
            .unwrap();
            if task.is_final() {
                assert_eq!(next, task, "a final state changed");
            }
        }
    }

    #[test]
    fn final_states_are_entered_only_with_everything_released() {
        for (task, edges) in reachable() {
            for (next, _) in edges {
                if next.is_final() && !task.is_final() {
                    assert!(
                        matches!(task.phase, Phase::Releasing { .. }) || task.is_pending(),
                        "{task:?} -> {next:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn final_states_never_change_and_ask_for_nothing() {
        for (task, edges) in reachable() {
            if task.is_final() {
                for (next, actions) in edges {
                    assert_eq!(next, task);
                    assert!(actions.is_empty());
                }
            }
        }
    }

    #[test]
    fn the_end_can_be_reached_from_every_state() {
        let graph = reachable();
        let mut good: HashSet<&Task> = graph.keys().filter(|t| t.is_final()).collect();
        loop {
            let before = good.len();
            for (task, edges) in &graph {
                if edges.iter().any(|(next, _)| good.contains(next)) {
                    good.insert(task);
                }
            }
            if good.len() == before {
                break;
            }
        }
        assert_eq!(good.len(), graph.len());
    }

    #[test]
    fn after_execution_may_have_begun_a_lost_domain_is_never_executed_again() {
        for task in reachable().into_keys() {
            if matches!(
                task.phase,
                Phase::Working {
                    step: Step::Execute | Step::Stop
                }
            ) {
                let mut next = task.clone();
                assert_eq!(next.recover(DomainFate::Gone), [Action::Release]);
                assert!(matches!(
                    next.phase,
                    Phase::Releasing {
                        outcome: Outcome::Failed(_),
                        ..
                    }
                ));
            }
        }
    }

    #[test]
    fn recovery_repeats_what_was_under_way_and_is_itself_repeatable() {
        for task in reachable().into_keys() {
            for fate in [DomainFate::Alive, DomainFate::Gone] {
                let mut once = task.clone();
                let first = once.recover(fate);
                let mut twice = once.clone();
                assert_eq!(twice.recover(fate), first);
                assert_eq!(once, twice);
                let idle = task.is_pending() || task.is_final();
                assert_eq!(first.is_empty(), idle, "{task:?}");
            }
        }
    }

    #[test]
    fn only_what_has_executed_nothing_is_tried_again() {
        for (task, edges) in reachable() {
            for (next, actions) in edges {
                if next.retries == task.retries {
                    continue;
                }
                let step = match task.phase {
                    Phase::Working { step } => step,
                    phase => panic!("tried again out of {phase:?}"),
                };
                assert!(matches!(step, Step::StageIn | Step::Start), "{step:?}");
                assert_eq!(actions, [Action::Release]);
                assert_eq!(next.not_before_ms, 5);
                let mut again = next.clone();
                assert_eq!(again.apply(Input::Released).unwrap(), []);
                assert_eq!(again.phase, Phase::Queued);
            }
        }
    }

    #[test]
    fn a_journal_of_before_is_read() {
        let text = r#"{"phase":{"phase":"queued"},"exit_code":null}"#;
        assert_eq!(serde_json::from_str::<Task>(text).unwrap(), Task::default());
    }

    #[test]
    fn the_journal_form_is_read_back_the_same() {
        for task in reachable().into_keys() {
            let text = serde_json::to_string(&task).unwrap();
            assert_eq!(serde_json::from_str::<Task>(&text).unwrap(), task, "{text}");
        }
    }
}
