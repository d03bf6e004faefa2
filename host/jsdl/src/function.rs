//! The values that a parameter sweep assigns (GFD.149): lists and loops.

use crate::chars::trim;
use crate::diagnostic::{Diagnostic, Position, quoted};
use crate::document::Element;
use crate::limits::MAX_LOOP_DIGITS;
use crate::namespace::SWEEP_FUNCTIONS;
use crate::read::content;
use crate::write::escape;

/// What a loop that cannot be one is refused with.
const INVALID_LOOP: &str = "invalid-loop";

/// An ordered list of values, never empty.
#[derive(Debug)]
pub(crate) enum Function {
    Values(Vec<String>),
    Loop(Loop),
}

impl Function {
    /// Reads a function that has passed validation.
    pub(crate) fn read(element: &Element) -> Result<Function, Diagnostic> {
        if element.is(SWEEP_FUNCTIONS, "Values") {
            values(element).map(Function::Values)
        } else if element.is(SWEEP_FUNCTIONS, "LoopInteger")
            || element.is(SWEEP_FUNCTIONS, "LoopDouble")
        {
            Loop::read(element).map(Function::Loop)
        } else {
            Err(element.position.diagnostic(
                "unsupported-sweep",
                format!(
                    "the function {} is not supported, expected jsdl-sweepfunc:Values, \
                     jsdl-sweepfunc:LoopInteger or jsdl-sweepfunc:LoopDouble",
                    element.display()
                ),
            ))
        }
    }

    /// How many values there are.
    pub(crate) fn count(&self) -> u64 {
        match self {
            Function::Values(values) => values.len() as u64,
            Function::Loop(numbers) => numbers.count,
        }
    }

    /// The value at a place below [`Function::count`]; the first is 0.
    pub(crate) fn value(&self, at: u64) -> String {
        match self {
            Function::Values(values) => usize::try_from(at)
                .ok()
                .and_then(|at| values.get(at))
                .cloned()
                .unwrap_or_default(),
            Function::Loop(numbers) => numbers.value(at),
        }
    }

    /// No value has more bytes in a document.
    pub(crate) fn longest_bytes(&self) -> usize {
        match self {
            Function::Values(values) => values
                .iter()
                .map(|value| {
                    let mut escaped = String::new();
                    escape(&mut escaped, value, true);
                    escaped.len()
                })
                .max()
                .unwrap_or(0),
            // Sign and decimal point.
            Function::Loop(_) => 2 * MAX_LOOP_DIGITS + 2,
        }
    }
}

fn values(element: &Element) -> Result<Vec<String>, Diagnostic> {
    element
        .all(SWEEP_FUNCTIONS, "Value")
        .map(|value| match value.elements().next() {
            None => Ok(content(value)),
            Some(child) => Err(child.position.diagnostic(
                "unsupported-sweep",
                format!(
                    "element {} in a value is not supported, expected text only",
                    child.display()
                ),
            )),
        })
        .collect()
}

/// Numbers at equal distances.
#[derive(Debug)]
pub(crate) struct Loop {
    start: Decimal,
    /// Of the same scale as `start`.
    step_units: i128,
    count: u64,
    /// Of each number left out, the least first, how many are not left out before it.
    gaps: Vec<u64>,
}

impl Loop {
    fn read(element: &Element) -> Result<Loop, Diagnostic> {
        let at = element.position;
        let number = |name: &str| match element.attribute(name) {
            Some(attribute) => decimal(attribute.position, &attribute.value),
            None => Ok(Decimal { units: 1, scale: 0 }),
        };
        let (start, end, step) = (number("start")?, number("end")?, number("step")?);
        let invalid = |message: String| Err(at.diagnostic(INVALID_LOOP, message));
        if step.units == 0 {
            return invalid(format!(
                "the step of {} is 0, expected another number",
                element.display()
            ));
        }
        let scale = start.scale.max(end.scale).max(step.scale);
        let (from, to, by) = (start.units(scale), end.units(scale), step.units(scale));
        if (to - from).signum() == -by.signum() {
            return invalid(format!(
                "the step of {} leads from {} away from {}, expected one towards it",
                element.display(),
                start.text(),
                end.text()
            ));
        }
        let last = (to - from) / by;
        let mut excluded = Vec::new();
        for exception in element.all(SWEEP_FUNCTIONS, "Exception") {
            let value = match exception.attribute("value") {
                Some(value) => value.value.clone(),
                None => exception.text(),
            };
            let number = decimal(exception.position, &value)?;
            let scale = scale.max(number.scale);
            let distance = number.units(scale) - start.units(scale);
            let by = step.units(scale);
            if distance % by == 0 && (0..=last).contains(&(distance / by)) {
                excluded.push(distance / by);
            }
        }
        excluded.sort_unstable();
        excluded.dedup();
        let count = last + 1 - excluded.len() as i128;
        if count == 0 {
            return invalid(format!(
                "all numbers of {} are exceptions, expected one at least",
                element.display()
            ));
        }
        // A gap is not above the count.
        let too_many = |_| {
            at.diagnostic(
                "sweep-too-large",
                format!("{} has {count} values", element.display()),
            )
        };
        let gaps: Result<Vec<u64>, _> = excluded
            .into_iter()
            .zip(0..)
            .map(|(place, before)| u64::try_from(place - before))
            .collect();
        Ok(Loop {
            start: Decimal { units: from, scale },
            step_units: by,
            count: u64::try_from(count).map_err(too_many)?,
            gaps: gaps.map_err(too_many)?,
        })
    }

    fn value(&self, at: u64) -> String {
        let left_out = self.gaps.partition_point(|&gap| gap <= at);
        let place = i128::from(at) + left_out as i128;
        Decimal {
            units: self.start.units + place * self.step_units,
            scale: self.start.scale,
        }
        .text()
    }
}

fn decimal(at: Position, text: &str) -> Result<Decimal, Diagnostic> {
    Decimal::parse(text).ok_or_else(|| {
        at.diagnostic(
            INVALID_LOOP,
            format!(
                "{} is not a number to count with, expected one of at most {MAX_LOOP_DIGITS} \
                 digits before the decimal point, and as many behind it",
                quoted(trim(text))
            ),
        )
    })
}

/// An exact decimal number: `units` divided by 10 to the power of `scale`. The binary fractions that
/// `xsd:double` stands for would count 0, 0.1, 0.2, 0.30000000000000004.
///
/// Absolutely it is below 10 to the power of [`MAX_LOOP_DIGITS`], and `scale` is not above that, so
/// that sums of some never overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Decimal {
    units: i128,
    scale: u32,
}

impl Decimal {
    fn parse(text: &str) -> Option<Decimal> {
        let text = trim(text);
        let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, ""));
        let digits = mantissa.strip_prefix(['+', '-']).unwrap_or(mantissa);
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let digits = format!("{whole}{fraction}");
        if digits.is_empty() || !digits.bytes().all(|c| c.is_ascii_digit()) {
            return None;
        }
        let significant = digits.trim_start_matches('0').trim_end_matches('0');
        if significant.is_empty() {
            return Some(Decimal { units: 0, scale: 0 });
        }
        // A valid double may lack the digits of its exponent.
        let exponent: i64 = match exponent {
            "" | "+" | "-" => 0,
            exponent => exponent.parse().ok()?,
        };
        let zeroes = digits.len() - digits.trim_end_matches('0').len();
        // The power of ten of the last significant digit.
        let power = i64::try_from(zeroes)
            .ok()?
            .checked_sub(i64::try_from(fraction.len()).ok()?)?
            .checked_add(exponent)?;
        let most = i64::try_from(MAX_LOOP_DIGITS).ok()?;
        let places = i64::try_from(significant.len()).ok()?.checked_add(power)?;
        if places > most || power < -most {
            return None;
        }
        let units: i128 = significant.parse().ok()?;
        let units = if mantissa.starts_with('-') {
            -units
        } else {
            units
        };
        Some(match u32::try_from(power) {
            Ok(power) => Decimal {
                units: units * 10_i128.pow(power),
                scale: 0,
            },
            Err(_) => Decimal {
                units,
                scale: u32::try_from(-power).ok()?,
            },
        })
    }

    /// The units at a scale that is not below the own.
    fn units(self, scale: u32) -> i128 {
        self.units * 10_i128.pow(scale - self.scale)
    }

    fn text(self) -> String {
        let one = 10_u128.pow(self.scale);
        let magnitude = self.units.unsigned_abs();
        let sign = if self.units < 0 { "-" } else { "" };
        let (whole, fraction) = (magnitude / one, magnitude % one);
        if fraction == 0 {
            return format!("{sign}{whole}");
        }
        let width = self.scale as usize;
        let fraction = format!("{fraction:0width$}");
        format!("{sign}{whole}.{}", fraction.trim_end_matches('0'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree;
    use proptest::prelude::*;

    fn function(inside: &str) -> Result<Function, Diagnostic> {
        let tree = tree::build(
            &inside.replacen(' ', &format!(" xmlns='{SWEEP_FUNCTIONS}' "), 1),
            false,
        )
        .unwrap();
        Function::read(&tree.root)
    }

    #[track_caller]
    fn all(inside: &str) -> Vec<String> {
        let function = function(inside).unwrap();
        (0..function.count()).map(|at| function.value(at)).collect()
    }

    #[track_caller]
    fn code(inside: &str) -> &'static str {
        function(inside).unwrap_err().code
    }

    #[test]
    fn loops_count_exactly_and_stop_at_the_end() {
        assert_eq!(
            all("<LoopInteger start='-1' end='2'/>"),
            ["-1", "0", "1", "2"]
        );
        assert_eq!(
            all("<LoopInteger start='1' end='6' step='2'/>"),
            ["1", "3", "5"]
        );
        assert_eq!(
            all("<LoopInteger start='3' end='1' step='-1'/>"),
            ["3", "2", "1"]
        );
        assert_eq!(all("<LoopInteger start='7' end='7' step='-5'/>"), ["7"]);
        assert_eq!(
            all("<LoopDouble start='0' end='0.3' step='1E-1'/>"),
            ["0", "0.1", "0.2", "0.3"]
        );
        assert_eq!(
            all("<LoopDouble start='-1.5e1' end='10.' step='12.5'/>"),
            ["-15", "-2.5", "10"]
        );
    }

    #[test]
    fn exceptions_are_left_out() {
        assert_eq!(
            all(
                "<LoopInteger start='1' end='9' step='2'><Exception>1</Exception>\
                 <Exception value='7'/><Exception> 5 </Exception><Exception value='5'/>\
                 <Exception>4</Exception><Exception>11</Exception></LoopInteger>"
            ),
            ["3", "9"]
        );
        assert_eq!(
            all(
                "<LoopDouble start='0' end='1' step='0.5'><Exception>0.50</Exception>\
                 <Exception>0.25</Exception></LoopDouble>"
            ),
            ["0", "1"]
        );
    }

    #[test]
    fn values_are_in_order_and_without_the_layout_around_them() {
        assert_eq!(
            all(
                "<Values ><Value> a b\n</Value><Value/><Value xml:space='preserve'> c</Value></Values>"
            ),
            ["a b", "", " c"]
        );
        assert_eq!(
            code("<Values ><Value><x/></Value></Values>"),
            "unsupported-sweep"
        );
        assert_eq!(code("<Other />"), "unsupported-sweep");
    }

    #[test]
    fn loops_that_are_none_are_refused() {
        for inside in [
            "<LoopInteger start='1' end='2' step='0'/>",
            "<LoopInteger start='1' end='2' step='-1'/>",
            "<LoopInteger start='2' end='1'/>",
            "<LoopInteger start='1' end='2' step='1234567890123456789'/>",
            "<LoopInteger start='1' end='1'><Exception>1</Exception></LoopInteger>",
            "<LoopInteger start='1' end='3'><Exception/></LoopInteger>",
            "<LoopInteger start='1' end='3'><Exception>x</Exception></LoopInteger>",
            "<LoopDouble start='0' end='NaN' step='1'/>",
            "<LoopDouble start='-INF' end='1' step='1'/>",
            "<LoopDouble start='0' end='1' step='1e-19'/>",
            "<LoopDouble start='0' end='1e18' step='1'/>",
            "<LoopDouble start='0' end='1' step='1e99999999999999999999'/>",
        ] {
            assert_eq!(code(inside), INVALID_LOOP, "{inside}");
        }
        assert_eq!(
            code("<LoopDouble start='0' end='999999999999999999' step='1e-18'/>"),
            "sweep-too-large"
        );
    }

    #[test]
    fn a_huge_loop_is_counted_without_running_it() {
        let huge = function("<LoopInteger start='1' end='999999999999999999'/>").unwrap();
        assert_eq!(huge.count(), 999_999_999_999_999_999);
        assert_eq!(huge.value(huge.count() - 1), "999999999999999999");
    }

    proptest! {
        #[test]
        fn a_loop_is_that_of_a_program(
            start in -50_i64..50, end in -50_i64..50, step in -9_i64..9,
            exceptions in proptest::collection::vec(-60_i64..60, 0..20),
        ) {
            let out: String = exceptions.iter().map(|e| format!("<Exception>{e}</Exception>")).collect();
            let inside = format!("<LoopInteger start='{start}' end='{end}' step='{step}'>{out}</LoopInteger>");
            let mut expected = Vec::new();
            let mut at = start;
            while step != 0 && (if step > 0 { at <= end } else { at >= end }) {
                if !exceptions.contains(&at) {
                    expected.push(at.to_string());
                }
                at += step;
            }
            match function(&inside) {
                Ok(function) => {
                    let values: Vec<String> = (0..function.count()).map(|at| function.value(at)).collect();
                    prop_assert_eq!(values, expected);
                }
                Err(_) => prop_assert!(expected.is_empty()),
            }
        }

        #[test]
        fn a_number_is_read_as_it_is_written(units in -10_i128.pow(30)..10_i128.pow(30), scale in 13_u32..=18) {
            let number = Decimal { units, scale };
            let again = Decimal::parse(&number.text()).unwrap();
            prop_assert_eq!(again.units(18), number.units(18));
        }
    }
}
