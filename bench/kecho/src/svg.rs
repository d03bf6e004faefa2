//! Line charts as SVG, without a library: axes, ticks, legend.

use std::fmt::Write as _;

/// Size of a chart without its legend, in pixels.
const WIDTH: f64 = 720.0;
/// Size of a chart, in pixels.
const HEIGHT: f64 = 440.0;
/// Room for the numbers and names of the axes, in pixels.
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 55.0;
/// Height of a line of the legend, in pixels.
const LINE: f64 = 18.0;
/// Ticks that an axis has at about.
const TICKS: f64 = 6.0;
/// Distinguishable for the colour-blind, and in grey.
const COLOURS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999",
];

/// A chart with one x axis and one y axis; the y axis begins at 0 unless it is logarithmic.
#[derive(Debug, Clone, Default)]
pub struct Chart {
    /// Above the chart.
    pub title: String,
    /// Name and unit of the x axis.
    pub x: Axis,
    /// Name and unit of the y axis.
    pub y: Axis,
    /// The lines, in the order of the legend.
    pub lines: Vec<Line>,
}

/// An axis.
#[derive(Debug, Clone, Default)]
pub struct Axis {
    /// Name and unit.
    pub name: String,
    /// Logarithmic: values that are not positive are left out.
    pub logarithmic: bool,
}

/// A line of a chart.
#[derive(Debug, Clone, Default)]
pub struct Line {
    /// In the legend.
    pub name: String,
    /// In the order of x.
    pub points: Vec<(f64, f64)>,
    /// Dashed, as what is only quoted is.
    pub dashed: bool,
}

impl Axis {
    /// An axis of which equal distances are equal ratios.
    pub fn logarithmic(name: &str) -> Axis {
        Axis {
            name: name.into(),
            logarithmic: true,
        }
    }
}

impl Line {
    /// A full line.
    pub fn new(name: &str, points: impl IntoIterator<Item = (f64, f64)>) -> Line {
        Line {
            name: name.into(),
            points: points.into_iter().collect(),
            dashed: false,
        }
    }
}

impl Chart {
    /// The chart as the text of an SVG file.
    pub fn svg(&self) -> String {
        let shown = |(x, y): &(f64, f64)| {
            (x.is_finite() && y.is_finite())
                && !(self.x.logarithmic && *x <= 0.0)
                && !(self.y.logarithmic && *y <= 0.0)
        };
        let points = || {
            self.lines
                .iter()
                .flat_map(|line| line.points.iter().copied().filter(shown))
        };
        let x = Scale::new(&self.x, points().map(|p| p.0), LEFT, WIDTH - RIGHT, false);
        let y = Scale::new(&self.y, points().map(|p| p.1), HEIGHT - BOTTOM, TOP, true);

        let widest = self.lines.iter().map(|line| line.name.chars().count());
        let width = 50.0 + 7.2 * widest.max().unwrap_or(0) as f64;
        let whole = WIDTH + width + RIGHT;

        let mut out = String::new();
        let mut put = |text: std::fmt::Arguments<'_>| {
            // A String takes all.
            let _ = out.write_fmt(text);
            out.push('\n');
        };
        put(format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {whole:.0} {HEIGHT}\" width=\"{whole:.0}\" height=\"{HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\">"
        ));
        put(format_args!(
            "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>"
        ));
        put(format_args!(
            "<text x=\"{}\" y=\"24\" text-anchor=\"middle\" font-size=\"15\" font-weight=\"bold\">{}</text>",
            WIDTH / 2.0,
            escaped(&self.title)
        ));
        for at in &x.ticks {
            let pixel = x.pixel(*at);
            put(format_args!(
                "<line x1=\"{pixel:.1}\" x2=\"{pixel:.1}\" y1=\"{TOP}\" y2=\"{}\" stroke=\"#e0e0e0\"/>",
                HEIGHT - BOTTOM
            ));
            put(format_args!(
                "<text x=\"{pixel:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                HEIGHT - BOTTOM + 18.0,
                number(*at)
            ));
        }
        for at in &y.ticks {
            let pixel = y.pixel(*at);
            put(format_args!(
                "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{pixel:.1}\" y2=\"{pixel:.1}\" stroke=\"#e0e0e0\"/>",
                WIDTH - RIGHT
            ));
            put(format_args!(
                "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 7.0,
                pixel + 4.5,
                number(*at)
            ));
        }
        put(format_args!(
            "<path d=\"M{LEFT} {TOP}V{}H{}\" fill=\"none\" stroke=\"black\"/>",
            HEIGHT - BOTTOM,
            WIDTH - RIGHT
        ));
        put(format_args!(
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            f64::midpoint(LEFT, WIDTH - RIGHT),
            HEIGHT - 14.0,
            escaped(&self.x.name)
        ));
        let middle = f64::midpoint(TOP, HEIGHT - BOTTOM);
        put(format_args!(
            "<text x=\"18\" y=\"{middle}\" text-anchor=\"middle\" transform=\"rotate(-90 18 {middle})\">{}</text>",
            escaped(&self.y.name)
        ));

        for (n, (line, colour)) in self.lines.iter().zip(COLOURS.iter().cycle()).enumerate() {
            // With more lines than colours, the others are dashed.
            let dash = if line.dashed || n >= COLOURS.len() {
                " stroke-dasharray=\"7 5\""
            } else {
                ""
            };
            let mut path = String::new();
            for (px, py) in line.points.iter().filter(|p| shown(p)) {
                let step = if path.is_empty() { 'M' } else { 'L' };
                let _ = write!(path, "{step}{:.1} {:.1}", x.pixel(*px), y.pixel(*py));
            }
            put(format_args!(
                "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>"
            ));
            for (px, py) in line.points.iter().filter(|p| shown(p)) {
                put(format_args!(
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>",
                    x.pixel(*px),
                    y.pixel(*py)
                ));
            }
        }

        // Beside the chart: within it there is no place that no line needs.
        let (left, top) = (WIDTH, TOP);
        let height = LINE * self.lines.len() as f64 + 8.0;
        put(format_args!(
            "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"white\" stroke=\"#c0c0c0\"/>"
        ));
        for (n, (line, colour)) in self.lines.iter().zip(COLOURS.iter().cycle()).enumerate() {
            let dash = if line.dashed || n >= COLOURS.len() {
                " stroke-dasharray=\"7 5\""
            } else {
                ""
            };
            let y = top + LINE * n as f64 + 13.0;
            put(format_args!(
                "<path d=\"M{:.1} {y:.1}h26\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>",
                left + 8.0
            ));
            put(format_args!(
                "<text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                left + 41.0,
                y + 4.5,
                escaped(&line.name)
            ));
        }
        put(format_args!("</svg>"));
        out
    }
}

/// Where a value is on the picture.
struct Scale {
    logarithmic: bool,
    from: f64,
    to: f64,
    first: f64,
    last: f64,
    ticks: Vec<f64>,
}

impl Scale {
    fn new(
        axis: &Axis,
        values: impl Iterator<Item = f64>,
        first: f64,
        last: f64,
        from_zero: bool,
    ) -> Scale {
        let (mut from, mut to) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
            (l.min(v), h.max(v))
        });
        if from > to {
            (from, to) = (1.0, 10.0);
        }
        let logarithmic = axis.logarithmic;
        let ticks = if logarithmic {
            let decades = to.log10().ceil() - from.log10().floor();
            let ticks = logarithmic_ticks(from, to, decades <= 3.0);
            if ticks.len() > 1 && from_zero {
                (from, to) = (ticks[0], ticks[ticks.len() - 1]);
            }
            if from == to {
                (from, to) = (from / 2.0, to * 2.0);
            }
            ticks
        } else {
            if from_zero {
                (from, to) = (from.min(0.0), to * 1.05);
            }
            if from == to {
                (from, to) = (from - 1.0, to + 1.0);
            }
            linear_ticks(from, to)
        };
        let ticks = ticks
            .into_iter()
            .filter(|at| (from..=to).contains(at))
            .collect();
        Scale {
            logarithmic,
            from,
            to,
            first,
            last,
            ticks,
        }
    }

    fn pixel(&self, value: f64) -> f64 {
        let part = if self.logarithmic {
            (value / self.from).ln() / (self.to / self.from).ln()
        } else {
            (value - self.from) / (self.to - self.from)
        };
        self.first + part * (self.last - self.first)
    }
}

/// Multiples of 1, 2 or 5 times a power of ten.
fn linear_ticks(from: f64, to: f64) -> Vec<f64> {
    let rough = (to - from) / TICKS;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= rough)
        .unwrap_or(10.0 * power);
    let first = (from / step).ceil() as i64;
    let last = (to / step).floor() as i64;
    (first..=last).map(|n| n as f64 * step).collect()
}

/// Powers of ten around the values, and twice and five times them if they are `dense`.
fn logarithmic_ticks(from: f64, to: f64, dense: bool) -> Vec<f64> {
    let factors: &[f64] = if dense { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let mut all = Vec::new();
    for power in from.log10().floor() as i32..=to.log10().ceil() as i32 {
        all.extend(factors.iter().map(|factor| factor * 10f64.powi(power)));
    }
    let below = all.iter().rposition(|at| *at <= from * (1.0 + 1e-9));
    let above = all.iter().position(|at| *at >= to * (1.0 - 1e-9));
    let range = below.unwrap_or(0)..above.map_or(all.len(), |n| n + 1);
    all.get(range).unwrap_or_default().to_vec()
}

/// As short as it can be said: `0.05`, `20`, `20k`, `3M`.
fn number(value: f64) -> String {
    let (value, unit) = match value.abs() {
        size if size >= 1e6 => (value / 1e6, "M"),
        size if size >= 1e4 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    format!("{text}{unit}")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        assert_eq!(linear_ticks(0.0, 9.0), [0.0, 2.0, 4.0, 6.0, 8.0]);
        assert_eq!(
            logarithmic_ticks(1.0, 64.0, true),
            [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]
        );
        assert_eq!(
            logarithmic_ticks(3.0, 40_000.0, false),
            [1.0, 10.0, 100.0, 1000.0, 10_000.0, 100_000.0]
        );
    }

    #[test]
    fn numbers_are_short() {
        let all = [0.0, 0.05, 20.0, 1000.0, 20_000.0, 3e6].map(number);
        assert_eq!(all, ["0", "0.05", "20", "1000", "20k", "3M"]);
    }

    #[test]
    fn a_chart_has_every_line_and_escapes_names() {
        let chart = Chart {
            title: "a < b".into(),
            x: Axis::logarithmic("sinks"),
            y: Axis {
                name: "µs".into(),
                logarithmic: false,
            },
            lines: vec![
                Line::new("one", [(1.0, 2.0), (8.0, 3.0), (64.0, f64::NAN)]),
                Line::new("two", []),
            ],
        };
        let svg = chart.svg();
        assert!(svg.contains("a &lt; b") && !svg.contains("NaN"), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 2);
        assert_eq!(
            svg.matches("<text x=").count(),
            svg.matches("</text>").count()
        );
        assert!(svg.contains(">one</text>") && svg.contains(">two</text>"));
    }
}
