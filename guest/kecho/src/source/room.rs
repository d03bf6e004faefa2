//! Room in a source's log: who is waited for, and who is not.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::attachment::Carrier;
use super::{Inner, Policy, SourceCore, SubmitError};
use crate::log::{ENDED_LEFT, ENDED_SLOW, Header, TAIL, WANTED};

/// How long the place of a sink is kept whose connection broke.
const LINGER: Duration = Duration::from_secs(5);
/// The sinks that were too slow and are remembered.
const EXPELLED: usize = 256;

impl SourceCore {
    /// Waits until so many bytes can be written at the head.
    pub(super) fn reserve<'a>(
        self: &'a Arc<Self>,
        mut inner: MutexGuard<'a, Inner>,
        bytes: usize,
        block: bool,
    ) -> Result<MutexGuard<'a, Inner>, SubmitError> {
        let capacity = self.ring.capacity() as u64;
        let mut waited = false;
        while inner.head + bytes as u64 > inner.limit {
            // A quarter of the log free, so that not each event read wakes this thread; what was written at the most.
            let wanted = (inner.head + bytes as u64 + capacity / 4).saturating_sub(capacity);
            let wanted = wanted.min(inner.head);
            inner.limit = self.policy_floor(&mut inner, wanted) + capacity;
            if inner.head + bytes as u64 <= inner.limit {
                break;
            }
            if self.expel_slow(&mut inner, bytes) {
                continue;
            }
            if !block {
                return Err(SubmitError::Full);
            }
            self.ring.cell(WANTED).store(wanted + 1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            inner.limit = self.policy_floor(&mut inner, wanted) + capacity;
            if inner.head + bytes as u64 <= inner.limit {
                break;
            }
            if !waited {
                inner.counters.waited += 1;
                waited = true;
            }
            inner.waiting += 1;
            // Whatever is in the log is to be sent: nobody else may do it while all wait here.
            let sockets = !inner.sockets.is_empty();
            drop(inner);
            if sockets {
                self.sender.enqueue(self);
            }
            let mut fds = [PollFd::new(&*self.space, PollFlags::IN)];
            // Not for ever: a sink that went without a word is noticed then.
            let limit = Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            let _ = poll(&mut fds, Some(&limit));
            self.space.clear();
            inner = self.lock();
            inner.waiting -= 1;
            if inner.closed {
                return Err(SubmitError::Closed);
            }
        }
        self.ring.cell(WANTED).store(0, Ordering::Relaxed);
        self.move_tail(&mut inner, bytes as u64);
        Ok(inner)
    }

    /// Moves the tail over what is about to be written over.
    fn move_tail(&self, inner: &mut Inner, bytes: u64) {
        let oldest = (inner.head + bytes).saturating_sub(self.ring.capacity() as u64);
        if inner.tail >= oldest {
            return;
        }
        while inner.tail < oldest {
            inner.tail += Header::read(self.ring.load(inner.tail)).stride() as u64;
        }
        // Who sees it sees as well whether it was ended before.
        self.ring.cell(TAIL).store(inner.tail, Ordering::Release);
        // Readers that see what is written next see the tail too.
        fence(Ordering::Release);
    }

    /// Up to where all have read that are waited for, what is not for them aside if that is before `wanted`. Takes out
    /// those that are not to be believed or were awaited long enough.
    fn policy_floor(&self, inner: &mut Inner, wanted: u64) -> u64 {
        let written = inner.written();
        let head = inner.head;
        let mut floor = head;
        let mut out = Vec::new();
        for (slot, sink) in inner.sinks.iter_mut().enumerate() {
            let Some(sink) = sink else { continue };
            let late =
                matches!(&sink.carrier, Carrier::Awaited { since, .. } if since.elapsed() > LINGER);
            match sink.position(head) {
                Some(_) if late => out.push((sink.sink, ENDED_LEFT)),
                Some(_) => {
                    sink.pass_over(&self.ring, slot, &written, wanted);
                    if sink.policy != Policy::DropOldest {
                        floor = floor.min(sink.floor);
                    }
                }
                // One that drops events may be where the tail was.
                None => out.push((sink.sink, ENDED_LEFT)),
            }
        }
        for (sink, why) in out {
            inner.remove(sink, why, &self.sender);
        }
        floor
    }

    /// Disconnects those that are slow and are to be. Whether there were any.
    fn expel_slow(&self, inner: &mut Inner, bytes: usize) -> bool {
        let oldest = (inner.head + bytes as u64).saturating_sub(self.ring.capacity() as u64);
        let head = inner.head;
        let mut slow = Vec::new();
        for sink in inner.sinks.iter_mut().flatten() {
            if sink.policy != Policy::Disconnect || sink.floor >= oldest {
                continue;
            }
            if let Carrier::Socket(socket) = &sink.carrier {
                // That the sending thread has not passed over what is not for it is not the sink's fault.
                socket.catch_up(self);
                sink.position(head);
            }
            if sink.floor < oldest {
                slow.push(sink.sink);
            }
        }
        for sink in &slow {
            inner.remove(*sink, ENDED_SLOW, &self.sender);
            inner.counters.expelled += 1;
            if inner.expelled.len() == EXPELLED {
                inner.expelled.pop_front();
            }
            inner.expelled.push_back(*sink);
        }
        !slow.is_empty()
    }
}
