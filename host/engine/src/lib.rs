//! What a task may do next, and which task may begin: pure functions.
//!
//! Nothing here reads a clock, waits or touches a file. `xbed`'s actor feeds [`Task::apply`] with
//! [`Input`]s, writes the new state to its journal, and only then carries out the [`Action`]s it
//! was given. A crash between any two of these is covered by [`Task::recover`].
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod calendar;
mod policy;
mod queue;
mod task;

pub use calendar::NEVER_MS;
pub use policy::{Capacity, Demand, Due, FULL_PERMILLE, Load, Policy, QueueError, Quota, Request};
pub use queue::Queue;
pub use task::{Action, DomainFate, Failure, Input, Outcome, Phase, Step, Task, TransitionError};
