//! The runtime of a node's or a registry's own thread.

use std::io;

use tokio::runtime::{Builder, Runtime};

/// It can be dropped within another runtime, as where a node cannot start that a task has wanted to start.
#[derive(Debug)]
pub(crate) struct OwnRuntime(Option<Runtime>);

impl OwnRuntime {
    /// Makes one, which the thread drives that blocks on it.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn create() -> io::Result<OwnRuntime> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        Ok(OwnRuntime(Some(runtime)))
    }
}

impl std::ops::Deref for OwnRuntime {
    type Target = Runtime;

    fn deref(&self) -> &Runtime {
        match &self.0 {
            Some(runtime) => runtime,
            None => unreachable!("it is taken by `drop` only"),
        }
    }
}

impl Drop for OwnRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            // Nothing here blocks, so nothing is cut short by not waiting.
            runtime.shutdown_background();
        }
    }
}
