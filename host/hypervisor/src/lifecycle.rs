//! What every domain has whatever runs it: a state that others wait for and are told of.

use tokio::sync::{broadcast, watch};

use crate::domain::{DomainEvent, DomainId, DomainState, StopReason};
use crate::error::Error;

/// A domain's state. The end is final, but for that of a saved one.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    id: DomainId,
    state: watch::Sender<DomainState>,
    events: broadcast::Sender<DomainEvent>,
}

impl Lifecycle {
    pub(crate) fn new(
        id: DomainId,
        state: DomainState,
        events: broadcast::Sender<DomainEvent>,
    ) -> Self {
        Self {
            id,
            state: watch::Sender::new(state),
            events,
        }
    }

    pub(crate) fn get(&self) -> DomainState {
        self.state.borrow().clone()
    }

    pub(crate) fn set(&self, state: DomainState) {
        let changed = self.state.send_if_modified(|current| {
            if *current == state || current.is_final() {
                return false;
            }
            current.clone_from(&state);
            true
        });
        if changed {
            tracing::info!(domain = %self.id, %state, "domain");
            // Nobody listening is fine.
            let _ = self.events.send(DomainEvent { id: self.id, state });
        }
    }

    /// Waits for the end. Cancel-safe.
    pub(crate) async fn stopped(&self) -> StopReason {
        let mut state = self.state.subscribe();
        let stopped = state
            .wait_for(|state| matches!(state, DomainState::Stopped { .. }))
            .await;
        match stopped.as_deref() {
            Ok(DomainState::Stopped { reason }) => reason.clone(),
            // Not reached: the sender lives as long as `self`.
            _ => StopReason::Destroyed,
        }
    }

    /// Waits until the state is another than `before`. Cancel-safe.
    #[cfg(feature = "xen")]
    pub(crate) async fn left(&self, before: &DomainState) {
        let mut state = self.state.subscribe();
        // The sender lives as long as `self`.
        let _ = state.wait_for(|state| state != before).await;
    }

    pub(crate) fn wrong(&self, operation: &'static str) -> Error {
        match self.get() {
            DomainState::Stopped { reason } => Error::Gone {
                id: self.id,
                reason,
            },
            state => Error::WrongState {
                id: self.id,
                operation,
                state,
            },
        }
    }
}
