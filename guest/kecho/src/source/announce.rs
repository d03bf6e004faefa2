//! The types of a source's events, and whom their descriptors were sent.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard};

use super::slots::Slots;
use super::{Inner, MAX_TYPES, SourceCore, SubmitError};
use crate::log::{HEADER_BYTES, Header, Kind};
use crate::types::EventType;

/// A type whose descriptor is in the log.
#[derive(Debug)]
struct Announced {
    kind: Arc<EventType>,
    /// Where the last time.
    at: u64,
    /// The sinks that have it.
    told: Slots,
}

/// The types of a source.
#[derive(Debug, Default)]
pub(super) struct Types {
    all: Vec<Announced>,
    /// By id, where in `all`.
    places: HashMap<u64, usize>,
    /// The one looked for last.
    last: usize,
}

impl Types {
    fn find(&mut self, id: u64) -> Option<&mut Announced> {
        if self.all.get(self.last).map(|known| known.kind.id()) != Some(id) {
            self.last = *self.places.get(&id)?;
        }
        self.all.get_mut(self.last)
    }

    /// All of them, for a sink that has them from now on.
    pub fn tell(&mut self, slot: usize) -> Vec<Arc<EventType>> {
        let each = self.all.iter_mut();
        each.map(|known| {
            known.told.insert(slot);
            known.kind.clone()
        })
        .collect()
    }
}

impl SourceCore {
    /// Puts a type's descriptor into the log, where one of those that an event goes to has not got it. Those to
    /// which none goes are not given it either: it would have to be read. Where sinks lose what is old it is
    /// repeated so often that they soon find it after what they have lost.
    pub(super) fn announce<'a>(
        self: &'a Arc<Self>,
        mut inner: MutexGuard<'a, Inner>,
        kind: &EventType,
        mask: Option<&Slots>,
        block: bool,
    ) -> Result<MutexGuard<'a, Inner>, SubmitError> {
        if !self.needs_announcing(&mut inner, kind, mask) {
            return Ok(inner);
        }
        if inner.types.all.len() >= MAX_TYPES && inner.types.find(kind.id()).is_none() {
            return Err(SubmitError::Types);
        }
        let body = kind.encode();
        let words = mask.map_or(0, |_| inner.sinks.len().div_ceil(64));
        let header = Header::word(body.len(), words, Kind::Type);
        let decisions = inner.decisions;
        let mut inner = self.reserve(inner, Header::read(header).stride(), block)?;
        // While this one waited another may have done it, or others have become those that it is for.
        if inner.decisions != decisions || !self.needs_announcing(&mut inner, kind, mask) {
            return Ok(inner);
        }
        let mut told = mask.unwrap_or(&inner.present).clone();
        if mask.is_some() {
            told.add(&inner.lossy);
        }
        let at = inner.head;
        self.ring.store(at, header);
        let mut pen = self.ring.pen(at + HEADER_BYTES as u64);
        pen.put(&body);
        let mut end = pen.finish();
        for word in told.words().iter().chain(&[0; 16]).take(words) {
            self.ring.store(end, *word);
            end += 8;
        }
        self.publish(&mut inner, end);
        match mask {
            None => inner.common = end,
            // Who may lose it is told again, and need not wake for it.
            Some(mask) => inner.mark(mask, end),
        }
        match inner.types.find(kind.id()) {
            Some(known) => {
                known.at = at;
                known.told.add(&told);
            }
            None => {
                let place = inner.types.all.len();
                inner.types.places.insert(kind.id(), place);
                let kind = Arc::new(kind.clone());
                inner.types.all.push(Announced { kind, at, told });
            }
        }
        Ok(inner)
    }

    fn needs_announcing(&self, inner: &mut Inner, kind: &EventType, mask: Option<&Slots>) -> bool {
        let seldom = self.ring.capacity() as u64 / 4;
        let (head, loses) = (inner.head, !inner.lossy.is_empty());
        let Inner { types, present, .. } = inner;
        types.find(kind.id()).is_none_or(|known| {
            loses && head - known.at > seldom || !known.told.covers(mask.unwrap_or(present))
        })
    }
}
