//! What an id means: a task, or an array of them, asked alike.

use std::sync::Arc;

use tokio::sync::watch;
use uuid::Uuid;
use xbee_api::{TaskEvent, TaskStatus};

use crate::array::{Array, Members};
use crate::store::{Entry, Owner};
use crate::task::TaskHandle;

/// What an id means.
#[derive(Clone)]
pub enum Found {
    /// A task.
    Task(Arc<TaskHandle>),
    /// An array of tasks.
    Array(Arc<Array>),
}

impl Found {
    pub(super) fn id(&self) -> Uuid {
        match self {
            Found::Task(task) => task.record.id,
            Found::Array(array) => array.id,
        }
    }

    pub(super) fn owner(&self) -> Owner {
        match self {
            Found::Task(task) => task.record.owner,
            Found::Array(array) => array.owner,
        }
    }

    /// Nothing more happens to it.
    pub fn is_final(&self) -> bool {
        match self {
            Found::Task(task) => task.is_final(),
            Found::Array(array) => array.is_final(),
        }
    }

    /// It as the API shows it.
    pub fn status(&self) -> TaskStatus {
        match self {
            Found::Task(task) => task.status(),
            Found::Array(array) => array.status(),
        }
    }

    /// State changes from event `from` on (1 is the first).
    pub fn events(&self, from: u64) -> Vec<TaskEvent> {
        let mut events = match self {
            Found::Task(task) => task.events(),
            Found::Array(array) => array.events(),
        };
        events.retain(|event| event.seq >= from);
        events
    }

    /// Wakes at each change of state.
    pub fn watch(&self) -> Changes {
        match self {
            Found::Task(task) => Changes::Task(task.watch()),
            Found::Array(array) => Changes::Array(array.watch()),
        }
    }
}

/// Changes of a task or an array.
pub enum Changes {
    /// Of a task.
    Task(watch::Receiver<Vec<Entry>>),
    /// Of an array.
    Array(watch::Receiver<Members>),
}

impl Changes {
    /// Waits for the next one that was not seen; none comes if it is forgotten.
    pub async fn next(&mut self) -> Result<(), watch::error::RecvError> {
        match self {
            Changes::Task(changes) => changes.changed().await,
            Changes::Array(changes) => changes.changed().await,
        }
    }

    /// All that there are were seen.
    pub fn seen(&mut self) {
        match self {
            Changes::Task(changes) => drop(changes.borrow_and_update()),
            Changes::Array(changes) => drop(changes.borrow_and_update()),
        }
    }
}
