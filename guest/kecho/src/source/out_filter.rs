//! OUT-filters: a closure of the source's process that chooses among the sinks.

use super::attachment::Attachment;
use crate::event::EventRef;
use crate::filter::State;
use crate::value::Value;

/// A sink as an OUT-filter sees it. Who it is, it does not see.
#[derive(Debug)]
pub struct SinkView<'a> {
    state: &'a State,
}

impl SinkView<'_> {
    /// What the sink has reported of itself under a name.
    pub fn state(&self, name: &str) -> Option<&Value> {
        self.state.get(name)
    }
}

/// The sinks that are to get an event, for an OUT-filter to choose from.
#[derive(Debug)]
pub struct SinkSet<'a> {
    pub(super) sinks: &'a [Option<Attachment>],
    pub(super) mask: &'a mut [u64],
}

impl SinkSet<'_> {
    fn slots(&self) -> impl Iterator<Item = (usize, SinkView<'_>)> {
        let chosen = |slot: usize| self.mask[slot / 64] >> (slot % 64) & 1 == 1;
        let sinks = self
            .sinks
            .iter()
            .enumerate()
            .filter(move |(slot, _)| chosen(*slot));
        sinks.filter_map(|(slot, sink)| {
            Some((
                slot,
                SinkView {
                    state: &sink.as_ref()?.state,
                },
            ))
        })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.mask
            .iter()
            .map(|word| word.count_ones() as usize)
            .sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes out those for which `keep` says no.
    pub fn retain(&mut self, mut keep: impl FnMut(&SinkView<'_>) -> bool) {
        for (word, sinks) in self.mask.iter_mut().zip(self.sinks.chunks(64)) {
            let (mut left, mut kept) = (*word, *word);
            while left != 0 {
                let bit = left.trailing_zeros();
                left &= left - 1;
                let sink = sinks.get(bit as usize).and_then(Option::as_ref);
                let keeps = sink.is_some_and(|sink| keep(&SinkView { state: &sink.state }));
                kept ^= u64::from(!keeps) << bit;
            }
            *word = kept;
        }
    }

    /// Leaves the `n` for which `key` is smallest.
    pub fn keep_least(&mut self, n: usize, mut key: impl FnMut(&SinkView<'_>) -> f64) {
        let mut keys: Vec<(f64, usize)> = self
            .slots()
            .map(|(slot, sink)| (key(&sink), slot))
            .collect();
        keys.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (_, slot) in keys.into_iter().skip(n) {
            self.mask[slot / 64] &= !(1 << (slot % 64));
        }
    }
}

/// A filter in the source's process: takes sinks out of those that are to get an event.
pub type OutFilter = Box<dyn FnMut(&EventRef<'_>, &mut SinkSet<'_>) + Send>;
