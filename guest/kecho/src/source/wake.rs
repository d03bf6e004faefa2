//! Who tells sinks that there is something, and which of them: the submitting thread, or in a burst the sending one.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use super::slots::Slots;
use super::{Flush, Gone, Inner, SourceCore};
use crate::log::SLEEPING;
use crate::memory::{Bell, Page};
use crate::socket::SocketSink;

/// Who submits again sooner after the last time submits many: a thread of the library sends them.
const BURST: Duration = Duration::from_micros(2);
/// How many submissions of a burst do not look at the time.
const UNLOOKED: u32 = 15;
/// The most sinks that a submitting thread serves itself.
const INLINE_SINKS: usize = 4;
/// The most sinks in memory that a submission looks at to find out whether there is anybody to wake.
const LOOKED_AT: usize = 16;

/// A sink in memory, as far as it is to be woken.
#[derive(Debug, Clone)]
pub(super) struct Sleeper {
    pub slot: usize,
    pub page: Arc<Page>,
    pub bell: Arc<Bell>,
}

impl Sleeper {
    fn sleeps(&self) -> bool {
        self.page.cell(SLEEPING).load(Ordering::Relaxed) == 1
    }
}

/// Wakes those of these slots that sleep. Whether there were any.
fn wake_all(sleepers: &[Sleeper], due: &Slots) -> bool {
    let mut any = false;
    for sink in sleepers.iter().filter(|sink| due.contains(sink.slot)) {
        if sink.sleeps() && sink.page.cell(SLEEPING).swap(0, Ordering::Relaxed) == 1 {
            sink.bell.ring();
            any = true;
        }
    }
    any
}

impl Inner {
    /// Whether a sink in memory sleeps that has something to read.
    fn keeps_waiting(&self) -> bool {
        let mut due = self.sleepers.iter();
        due.any(|sink| self.due.contains(sink.slot) && sink.sleeps())
    }
}

impl SourceCore {
    /// Tells all sinks that there is something; the sockets that this thread is to serve.
    pub(super) fn wake(self: &Arc<Self>, inner: &mut Inner) -> Option<Arc<Vec<Arc<SocketSink>>>> {
        // Between what was just published and whether somebody sleeps: see `Sink::sleep`.
        fence(Ordering::SeqCst);
        if inner.sockets.is_empty() && inner.sleepers.len() <= LOOKED_AT && !inner.keeps_waiting() {
            inner.due.reset(0);
            return None;
        }
        let few = inner.sockets.len() + inner.sleepers.len() <= INLINE_SINKS;
        let inline = match self.flush {
            Flush::Inline => true,
            Flush::Background => false,
            Flush::Auto => few && !self.is_burst(inner),
        };
        if !inline || self.dirty.load(Ordering::Relaxed) {
            self.sender.enqueue(self);
            return None;
        }
        if wake_all(&inner.sleepers, &inner.due) {
            // The time that it took is not the submitter's.
            inner.last = Instant::now();
        }
        inner.due.reset(0);
        (!inner.sockets.is_empty()).then(|| inner.sockets.clone())
    }

    /// Whether events are submitted so quickly that it is better to leave them to the sending thread.
    fn is_burst(&self, inner: &mut Inner) -> bool {
        // Looking at the clock is a good part of what a submission costs.
        if inner.bursting && inner.unlooked < UNLOOKED && self.sender.is_awake() {
            inner.unlooked += 1;
            return true;
        }
        let now = Instant::now();
        let since = now.duration_since(inner.last) / (inner.unlooked + 1);
        (inner.last, inner.unlooked) = (now, 0);
        inner.bursting = since <= BURST;
        inner.bursting
    }

    /// Wakes the sinks in memory that sleep and have something to read; those over sockets are to be served.
    /// What is in `due` is lost.
    pub(crate) fn wake_sleepers(&self, due: &mut Slots) -> Arc<Vec<Arc<SocketSink>>> {
        due.reset(0);
        let (sleepers, sockets) = {
            let mut inner = self.lock();
            std::mem::swap(&mut inner.due, due);
            (inner.sleepers.clone(), inner.sockets.clone())
        };
        wake_all(&sleepers, due);
        sockets
    }

    pub(super) fn send_now(self: &Arc<Self>, sockets: &[Arc<SocketSink>]) {
        for socket in sockets {
            match socket.try_flush(self) {
                // Somebody else is at it, or it takes no more now: the sender goes on.
                None => self.sender.enqueue(self),
                Some(Ok(())) => {}
                Some(Err(_)) => self.detach(socket.id, Gone::Broken),
            }
        }
    }
}
