//! Chance that can be repeated.

use std::ops::RangeInclusive;

/// The generator SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
/// OOPSLA 2014).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// Chance that depends on `seed` and `stream` only.
    pub(crate) fn new(seed: u64, stream: u128) -> Self {
        let mut random = Self(seed);
        for half in [stream as u64, (stream >> 64) as u64] {
            random.0 ^= half;
            random.next();
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// True with this probability.
    pub(crate) fn happens(&mut self, probability: f64) -> bool {
        // 53 bits are what a double holds.
        ((self.next() >> 11) as f64) < probability * (1u64 << 53) as f64
    }

    /// A number of the range, each about as likely as the others.
    pub(crate) fn within(&mut self, range: &RangeInclusive<u64>) -> u64 {
        match range.end().saturating_sub(*range.start()).checked_add(1) {
            Some(count) => range.start() + self.next() % count,
            None => self.next(),
        }
    }

    /// Bytes, for nonces.
    pub(crate) fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.next() as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeatable_and_different_by_seed_and_stream() {
        let draw = |seed, stream| {
            let mut random = Random::new(seed, stream);
            [random.next(), random.next()]
        };
        assert_eq!(draw(1, 2), draw(1, 2));
        assert_ne!(draw(1, 2), draw(1, 3));
        assert_ne!(draw(1, 2), draw(2, 2));
        assert_ne!(draw(1, 1 << 64), draw(1, 1));
        let mut random = Random::new(7, 7);
        let hits = (0..10_000).filter(|_| random.happens(0.25)).count();
        assert!((2_300..2_700).contains(&hits), "{hits}");
        assert!(!random.happens(0.0) && random.happens(1.0));
        assert!((0..1_000).all(|_| (3..=5).contains(&random.within(&(3..=5)))));
        random.within(&(0..=u64::MAX));
    }
}
