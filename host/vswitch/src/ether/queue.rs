//! What waits for a guest that does not take its frames in time.

use std::collections::{BTreeMap, VecDeque};

/// Most bytes that wait for one card, frames' overheads included.
pub const MAX_BYTES: usize = 2 << 20;

/// What a frame takes beside its bytes, roughly: an empty one is not for nothing.
const FRAME_OVERHEAD_BYTES: usize = 64;

/// Frames by who sent them. Senders take turns; when there is no more room, the one of whom most bytes wait
/// loses its newest.
#[derive(Debug, Default)]
pub struct Queue {
    senders: BTreeMap<u64, Waiting>,
    bytes: usize,
    /// The sender of the frame that comes next has at least this number.
    next: u64,
    dropped: u64,
}

#[derive(Debug, Default)]
struct Waiting {
    frames: VecDeque<Box<[u8]>>,
    bytes: usize,
}

fn cost(frame: &[u8]) -> usize {
    frame.len() + FRAME_OVERHEAD_BYTES
}

impl Queue {
    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.senders.is_empty()
    }

    /// Frames that were lost for want of room.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Has a sender's frame wait.
    pub fn push(&mut self, sender: u64, frame: &[u8]) {
        let waiting = self.senders.entry(sender).or_default();
        waiting.frames.push_back(frame.into());
        waiting.bytes += cost(frame);
        self.bytes += cost(frame);
        while self.bytes > MAX_BYTES {
            let most = self.senders.iter().max_by_key(|(_, waiting)| waiting.bytes);
            let Some(sender) = most.map(|(sender, _)| *sender) else {
                return;
            };
            self.remove(sender, VecDeque::pop_back);
            self.dropped += 1;
        }
    }

    fn turn(&self) -> Option<u64> {
        let after = self.senders.range(self.next..).next();
        after
            .or(self.senders.iter().next())
            .map(|(sender, _)| *sender)
    }

    /// The frame whose turn it is.
    pub fn first(&self) -> Option<&[u8]> {
        let waiting = self.senders.get(&self.turn()?)?;
        waiting.frames.front().map(AsRef::as_ref)
    }

    /// Removes that frame.
    pub fn pop(&mut self) {
        if let Some(sender) = self.turn() {
            self.remove(sender, VecDeque::pop_front);
            self.next = sender.wrapping_add(1);
        }
    }

    /// Removes all that a sender has waiting.
    pub fn forget(&mut self, sender: u64) {
        if let Some(waiting) = self.senders.remove(&sender) {
            self.bytes -= waiting.bytes;
        }
    }

    fn remove(
        &mut self,
        sender: u64,
        take: impl FnOnce(&mut VecDeque<Box<[u8]>>) -> Option<Box<[u8]>>,
    ) {
        let Some(waiting) = self.senders.get_mut(&sender) else {
            return;
        };
        if let Some(frame) = take(&mut waiting.frames) {
            waiting.bytes -= cost(&frame);
            self.bytes -= cost(&frame);
        }
        if waiting.frames.is_empty() {
            self.senders.remove(&sender);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn senders_take_turns() {
        let mut queue = Queue::default();
        for frame in [b"a1", b"a2", b"a3"] {
            queue.push(1, frame);
        }
        queue.push(7, b"b1");
        let mut order = Vec::new();
        while let Some(frame) = queue.first() {
            order.push(String::from_utf8(frame.to_vec()).unwrap());
            queue.pop();
        }
        assert_eq!(order, ["a1", "b1", "a2", "a3"]);
        assert!(queue.is_empty());
    }

    #[test]
    fn who_floods_loses_and_nobody_else() {
        let mut queue = Queue::default();
        let frame = vec![0; 60_000];
        for _ in 0..1000 {
            queue.push(1, &frame);
        }
        for n in 0..10 {
            queue.push(2, &[n; 1500]);
        }
        queue.push(1, &frame);
        assert!(queue.bytes <= MAX_BYTES);
        let mut of_two = 0;
        let mut bytes = 0;
        while let Some(frame) = queue.first() {
            of_two += usize::from(frame.len() == 1500);
            bytes += frame.len();
            queue.pop();
        }
        assert_eq!(of_two, 10);
        assert!(bytes <= MAX_BYTES && bytes > MAX_BYTES / 2, "{bytes}");
        assert_eq!(queue.bytes, 0);
        assert_eq!(
            queue.dropped(),
            1001 + 10 - of_two as u64 - (bytes as u64 - 15_000) / 60_000
        );
    }

    #[test]
    fn empty_frames_are_bounded_too() {
        let mut queue = Queue::default();
        for _ in 0..1_000_000 {
            queue.push(3, &[]);
        }
        assert!(queue.senders[&3].frames.len() <= MAX_BYTES / FRAME_OVERHEAD_BYTES);
        queue.forget(3);
        assert!(queue.is_empty() && queue.bytes == 0);
    }
}
