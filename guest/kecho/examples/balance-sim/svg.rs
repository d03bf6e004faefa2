//! Line charts as SVG, the same bytes for the same numbers.

use std::fmt::Write;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
/// Of the plot: the rest is for numbers and names.
const LEFT: f64 = 80.0;
const RIGHT: f64 = 500.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 360.0;
/// Of marks along the axis of numbers that are not logarithmic.
const STEPS: u32 = 5;
/// Told apart by those who see colours differently too (Okabe and Ito).
const COLOURS: [&str; 6] = [
    "#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00",
];

/// A line: its name and its points, from left to right.
pub type Line = (&'static str, Vec<(f64, f64)>);

/// The scale upwards.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scale {
    /// From nothing to this.
    Linear(f64),
    /// Between these powers of ten.
    Powers(i32, i32),
}

/// A chart.
pub struct Chart {
    /// Above it.
    pub title: &'static str,
    /// To the right.
    pub x: &'static str,
    /// Upwards.
    pub y: &'static str,
    /// Upwards.
    pub scale: Scale,
    /// No more than there are colours.
    pub lines: Vec<Line>,
}

impl Chart {
    /// As a document.
    pub fn svg(&self) -> String {
        let mut svg = String::new();
        self.write(&mut svg).expect("a String takes all");
        svg
    }

    fn write(&self, svg: &mut String) -> std::fmt::Result {
        writeln!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
             <text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{}</text>",
            self.title
        )?;
        let xs: Vec<f64> = self.lines[0].1.iter().map(|(x, _)| *x).collect();
        let (first, last) = (xs[0], xs[xs.len() - 1]);
        let across = |x: f64| LEFT + (x - first) / (last - first) * (RIGHT - LEFT);
        let marks: Vec<f64> = match self.scale {
            Scale::Linear(top) => (0..=STEPS)
                .map(|step| top / f64::from(STEPS) * f64::from(step))
                .collect(),
            Scale::Powers(low, high) => (low..=high).map(|power| 10_f64.powi(power)).collect(),
        };
        for mark in marks {
            let y = self.up(mark);
            writeln!(
                svg,
                "<path d=\"M{LEFT} {y:.1}H{RIGHT}\" stroke=\"#ddd\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{mark}</text>",
                LEFT - 6.0,
                y + 4.0
            )?;
        }
        for x in xs {
            writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{x}</text>",
                across(x),
                BOTTOM + 18.0
            )?;
        }
        let middle = f64::midpoint(LEFT, RIGHT);
        writeln!(
            svg,
            "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n\
             <text transform=\"translate(20 {}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            BOTTOM + 42.0,
            self.x,
            f64::midpoint(TOP, BOTTOM),
            self.y
        )?;
        for (index, ((name, points), colour)) in self.lines.iter().zip(COLOURS).enumerate() {
            let mut path = String::new();
            for (at, (x, y)) in points.iter().enumerate() {
                let pen = if at == 0 { 'M' } else { 'L' };
                write!(path, "{pen}{:.1} {:.1}", across(*x), self.up(*y))?;
            }
            let y = TOP + 10.0 + 22.0 * index as f64;
            writeln!(
                svg,
                "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n\
                 <path d=\"M{} {y}h24\" stroke=\"{colour}\" stroke-width=\"2\"/>\
                 <text x=\"{}\" y=\"{}\">{name}</text>",
                RIGHT + 14.0,
                RIGHT + 44.0,
                y + 4.0
            )?;
        }
        writeln!(svg, "</svg>")
    }

    /// What is out of the scale is drawn on its edge.
    fn up(&self, y: f64) -> f64 {
        let part = match self.scale {
            Scale::Linear(top) => y / top,
            Scale::Powers(low, high) => (y.log10() - f64::from(low)) / f64::from(high - low),
        };
        BOTTOM - part.clamp(0.0, 1.0) * (BOTTOM - TOP)
    }
}
