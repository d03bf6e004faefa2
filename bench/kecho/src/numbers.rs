//! Medians and how numbers are printed.

/// Of sorted values; not a number if there is none.
pub fn quantile(sorted: &[f64], part: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    let at = (last as f64 * part).round() as usize;
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

/// Of values in any order; not a number if there is none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, 0.5)
}

/// With three digits that count.
pub fn short(value: f64) -> String {
    match value {
        value if !value.is_finite() => "-".into(),
        value if value < 0.0995 => format!("{value:.3}"),
        value if value < 9.95 => format!("{value:.2}"),
        value if value < 99.5 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_values() {
        let sorted = [1.0, 2.0, 3.0, 4.0, 50.0];
        assert_eq!(
            (quantile(&sorted, 0.5), quantile(&sorted, 0.99)),
            (3.0, 50.0)
        );
        assert!(quantile(&[], 0.5).is_nan());
        assert_eq!(median(&[9.0, 1.0, 5.0]), 5.0);
    }

    #[test]
    fn three_digits_count() {
        let all = [0.0234, 0.5, 2.345, 41.26, 622.4, f64::NAN].map(short);
        assert_eq!(all, ["0.023", "0.50", "2.35", "41.3", "622", "-"]);
    }
}
