mod svg;
fn main() {
    let chart = svg::Chart {
        title: "Submission <by> sinks".into(),
        x: svg::Axis::logarithmic("sinks"),
        y: svg::Axis::logarithmic("ns"),
        lines: vec![
            svg::Line::new(
                "kecho",
                [
                    (1., 200.),
                    (2., 230.),
                    (4., 300.),
                    (8., 400.),
                    (16., 800.),
                    (32., 1600.),
                    (64., 3000.),
                ],
            ),
            svg::Line {
                dashed: true,
                ..svg::Line::new("the paper", [(1., 20000.), (8., 60000.)])
            },
        ],
    };
    print!("{}", chart.svg());
}
