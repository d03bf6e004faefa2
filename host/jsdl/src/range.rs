//! Range values: which numbers a resource requirement admits (GFD.56, section 5.2).

/// A bound of a range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// The number itself.
    pub value: f64,
    /// Whether the number itself is outside.
    pub exclusive: bool,
}

impl Bound {
    fn admits_below(self, number: f64) -> bool {
        number < self.value || (number == self.value && !self.exclusive)
    }

    fn admits_above(self, number: f64) -> bool {
        number > self.value || (number == self.value && !self.exclusive)
    }
}

/// One exact number, give or take `epsilon`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exact {
    /// The number asked for.
    pub value: f64,
    /// How far off a number may be; 0 if the document says nothing.
    pub epsilon: f64,
}

/// A range with both ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Range {
    /// The lower end.
    pub lower: Bound,
    /// The upper end.
    pub upper: Bound,
}

/// A set of numbers: the union of all its parts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RangeValue {
    /// Everything up to a bound.
    pub upper_bounded: Option<Bound>,
    /// Everything from a bound on.
    pub lower_bounded: Option<Bound>,
    /// Single numbers.
    pub exact: Vec<Exact>,
    /// Ranges with both ends.
    pub ranges: Vec<Range>,
}

impl RangeValue {
    /// The set of one number.
    #[must_use]
    pub fn exactly(value: f64) -> Self {
        RangeValue {
            exact: vec![Exact {
                value,
                epsilon: 0.0,
            }],
            ..RangeValue::default()
        }
    }

    /// Whether the number is in the set. NaN never is, and a set without parts admits nothing.
    #[must_use]
    pub fn contains(&self, number: f64) -> bool {
        self.upper_bounded
            .is_some_and(|bound| bound.admits_below(number))
            || self
                .lower_bounded
                .is_some_and(|bound| bound.admits_above(number))
            || self
                .exact
                .iter()
                .any(|exact| number == exact.value || (number - exact.value).abs() <= exact.epsilon)
            || self
                .ranges
                .iter()
                .any(|range| range.lower.admits_above(number) && range.upper.admits_below(number))
    }

    /// The whole number to allot: `preferred` if it is in the set, else the smallest whole number
    /// in it that is not below 0; nothing if there is none.
    ///
    /// A requirement with an upper bound only thus gets what is usual, or less where that is too
    /// much, rather than nothing at all.
    #[must_use]
    pub fn choose(&self, preferred: u64) -> Option<u64> {
        if self.contains(preferred as f64) {
            return Some(preferred);
        }
        let above = self
            .lower_bounded
            .into_iter()
            .chain(self.ranges.iter().map(|range| range.lower))
            .map(first_above)
            .chain(self.exact.iter().flat_map(|exact| {
                [
                    exact.value,
                    (exact.value - exact.epsilon.max(0.0)).max(0.0).ceil(),
                ]
            }))
            .filter(|&number| self.is_whole(number))
            .min_by(f64::total_cmp);
        // All below a bound that itself is below what is usual: the most of it.
        let below = self
            .upper_bounded
            .map(last_below)
            .filter(|&number| self.is_whole(number));
        above.or(below).map(|number| number as u64)
    }

    fn is_whole(&self, number: f64) -> bool {
        number >= 0.0 && number <= u64::MAX as f64 && number.fract() == 0.0 && self.contains(number)
    }
}

fn first_above(bound: Bound) -> f64 {
    let value = bound.value.max(0.0);
    let whole = value.ceil();
    if bound.exclusive && whole == bound.value {
        whole + 1.0
    } else {
        whole
    }
}

fn last_below(bound: Bound) -> f64 {
    let whole = bound.value.floor();
    if bound.exclusive && whole == bound.value {
        whole - 1.0
    } else {
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inclusive(value: f64) -> Bound {
        Bound {
            value,
            exclusive: false,
        }
    }

    fn at_least(value: f64) -> RangeValue {
        RangeValue {
            lower_bounded: Some(inclusive(value)),
            ..RangeValue::default()
        }
    }

    fn below(value: f64, exclusive: bool) -> RangeValue {
        RangeValue {
            upper_bounded: Some(Bound { value, exclusive }),
            ..RangeValue::default()
        }
    }

    fn between(lower: Bound, upper: Bound) -> RangeValue {
        RangeValue {
            ranges: vec![Range { lower, upper }],
            ..RangeValue::default()
        }
    }

    #[test]
    fn contains_follows_the_standard() {
        let exclusive = |value| Bound {
            value,
            exclusive: true,
        };
        let near = RangeValue {
            exact: vec![Exact {
                value: 5.0,
                epsilon: 0.5,
            }],
            ..RangeValue::default()
        };
        let cases = [
            (RangeValue::default(), 0.0, false),
            (RangeValue::exactly(5.0), 5.0, true),
            (RangeValue::exactly(5.0), 5.1, false),
            (near.clone(), 5.5, true),
            (near.clone(), 4.5, true),
            (near, 5.6, false),
            (below(10.0, false), 10.0, true),
            (below(10.0, true), 10.0, false),
            (below(10.0, true), -1e300, true),
            (at_least(3.0), 3.0, true),
            (at_least(3.0), 2.9, false),
            (at_least(f64::NEG_INFINITY), f64::NAN, false),
            (RangeValue::exactly(f64::INFINITY), f64::INFINITY, true),
            (between(exclusive(1.0), inclusive(2.0)), 1.0, false),
            (between(exclusive(1.0), inclusive(2.0)), 2.0, true),
            (between(inclusive(1.0), exclusive(2.0)), 1.0, true),
            (between(inclusive(1.0), exclusive(2.0)), 2.0, false),
            (between(inclusive(2.0), inclusive(1.0)), 1.5, false),
        ];
        for (range, number, expected) in cases {
            assert_eq!(range.contains(number), expected, "{number} in {range:?}");
        }
    }

    #[test]
    fn parts_are_a_union() {
        let range = RangeValue {
            upper_bounded: Some(inclusive(1.0)),
            lower_bounded: Some(inclusive(10.0)),
            exact: vec![Exact {
                value: 5.0,
                epsilon: 0.0,
            }],
            ranges: vec![],
        };
        let members: Vec<u8> = (0..12).filter(|&n| range.contains(f64::from(n))).collect();
        assert_eq!(members, [0, 1, 5, 10, 11]);
    }

    #[test]
    fn choose_prefers_the_usual_and_takes_the_smallest_otherwise() {
        let exclusive = |value| Bound {
            value,
            exclusive: true,
        };
        let cases = [
            (RangeValue::exactly(268_435_456.0), 64, Some(268_435_456)),
            (at_least(100.0), 64, Some(100)),
            (at_least(100.0), 128, Some(128)),
            (at_least(0.5), 0, Some(1)),
            (below(32.0, false), 64, Some(32)),
            (below(32.0, true), 64, Some(31)),
            (below(128.0, false), 64, Some(64)),
            (below(-1.0, false), 64, None),
            (between(exclusive(2.0), inclusive(4.0)), 1, Some(3)),
            (between(exclusive(2.0), exclusive(3.0)), 1, None),
            (RangeValue::exactly(1.5), 1, None),
            (RangeValue::exactly(f64::INFINITY), 1, None),
            (at_least(f64::NAN), 1, None),
            (RangeValue::default(), 1, None),
        ];
        for (range, preferred, expected) in cases {
            assert_eq!(
                range.choose(preferred),
                expected,
                "{preferred} for {range:?}"
            );
        }
    }
}
