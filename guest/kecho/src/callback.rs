//! Events given to a function, in a thread of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::error::Error;
use crate::event::EventRef;
use crate::sink::{Batch, Sink, SinkCore};

/// The most events that are taken from the sources at once.
const BATCH: usize = 64;

/// A thread that gives a sink's events to a function. It ends, and the sink leaves its channel, when
/// this is dropped.
#[derive(Debug)]
pub struct Callback {
    core: Arc<SinkCore>,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<Error>>,
}

impl Sink {
    /// Calls `function` for each event from now on, in a thread of the sink's own. Events that come
    /// meanwhile wait: a slow function is a slow sink. So one that submits to its own channel must not wait for room
    /// that only it could make: [`crate::Source::try_submit`].
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn on_event(
        self,
        mut function: impl FnMut(EventRef<'_>) + Send + 'static,
    ) -> Result<Callback, Error> {
        let (core, stopped) = (self.core().clone(), Arc::new(AtomicBool::new(false)));
        let stop = stopped.clone();
        let thread = std::thread::Builder::new().name("kecho-callback".to_owned());
        let thread = thread.spawn(move || {
            let mut batch = Batch::default();
            loop {
                if let Err(error) = self.receive_batch(&mut batch, BATCH) {
                    return error;
                }
                for event in batch.iter() {
                    if stop.load(Ordering::Relaxed) {
                        return Error::Shutdown;
                    }
                    function(event);
                }
            }
        });
        Ok(Callback {
            core,
            stopped,
            thread: Some(thread.map_err(Error::system("start a callback's thread"))?),
        })
    }
}

impl Callback {
    /// Waits until the sink's events are over, and says why they are.
    ///
    /// # Panics
    /// As the function did.
    pub fn wait(mut self) -> Error {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(error)) => error,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Error::Shutdown,
        }
    }
}

impl Drop for Callback {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.core.end();
        // A function may drop its own callback.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("a callback's function has panicked");
        }
    }
}
