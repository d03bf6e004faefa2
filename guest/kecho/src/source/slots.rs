//! Sets of a source's sinks, by their slots.

/// A bit for each slot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Slots(Vec<u64>);

impl Slots {
    /// Empties the set and makes it as long as this many slots need.
    pub fn reset(&mut self, slots: usize) {
        self.0.clear();
        self.0.resize(slots.div_ceil(64), 0);
    }

    pub fn insert(&mut self, slot: usize) {
        let word = slot / 64;
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (slot % 64);
    }

    pub fn remove(&mut self, slot: usize) {
        if let Some(word) = self.0.get_mut(slot / 64) {
            *word &= !(1 << (slot % 64));
        }
    }

    pub fn contains(&self, slot: usize) -> bool {
        let word = self.0.get(slot / 64);
        word.is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }

    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Adds those of another set.
    pub fn add(&mut self, other: &Slots) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (word, more) in self.0.iter_mut().zip(&other.0) {
            *word |= more;
        }
    }

    /// Whether all of another set are in this one.
    pub fn covers(&self, other: &Slots) -> bool {
        let words = self.0.iter().chain(std::iter::repeat(&0));
        other
            .0
            .iter()
            .zip(words)
            .all(|(all, here)| all & !here == 0)
    }

    /// As it lies in a frame's mask.
    pub fn words(&self) -> &[u64] {
        &self.0
    }

    /// The same, to take sinks out.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(slots: &[usize]) -> Slots {
        let mut set = Slots::default();
        slots.iter().for_each(|slot| set.insert(*slot));
        set
    }

    #[test]
    fn sets_of_different_lengths_are_compared_and_added() {
        let (short, long) = (of(&[1]), of(&[1, 130]));
        assert!(long.covers(&short) && !short.covers(&long));
        assert!(short.covers(&Slots::default()) && !Slots::default().covers(&short));
        let mut both = short.clone();
        both.add(&long);
        assert_eq!(
            (both.len(), both.contains(130), both.contains(64)),
            (2, true, false)
        );
        both.add(&of(&[3]));
        assert_eq!(both.len(), 3);
        // What was long may cover with its zeros what is short, and the other way round.
        both.reset(300);
        assert!(both.is_empty() && short.covers(&both) && !both.covers(&short));
    }
}
