//! What the events of all systems carry: a number, whether the publisher wants to hear of it, and padding.

use crate::system::Result;

/// Bytes of the number and the mark.
pub const HEAD_BYTES: usize = 9;
/// The number of events that are sent until a subscriber is there.
pub const HELLO: u64 = u64::MAX;
/// The number of the event after which a subscriber ends.
pub const END: u64 = u64::MAX - 1;

/// Writes the head of an event.
pub fn mark(event: &mut [u8], number: u64, answer: bool) {
    event[..8].copy_from_slice(&number.to_le_bytes());
    event[8] = answer.into();
}

/// The number of an event, and whether the publisher wants to hear of it.
pub fn head(event: &[u8]) -> Result<(u64, bool)> {
    match event.first_chunk::<HEAD_BYTES>() {
        Some([number @ .., answer]) => Ok((u64::from_le_bytes(*number), *answer != 0)),
        None => Err(format!("an event of {} bytes", event.len()).into()),
    }
}
