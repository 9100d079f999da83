//! Where the time of a token goes, as bars that consist of parts.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::{COLOURS, WRITE, escape, head, number};
use crate::error::CliError;

/// Pixels: width of the picture, left end and length of the longest bar, height of a bar, and from one bar to the next.
const WIDTH: f64 = 860.0;
const LEFT: f64 = 24.0;
const LENGTH: f64 = WIDTH - 2.0 * LEFT;
const BAR: f64 = 34.0;
const PITCH: f64 = 96.0;
/// Where the first bar begins, below the title.
const TOP: f64 = 72.0;
/// Parts narrower than this have no room for a number.
const LABELLED: f64 = 52.0;

/// Bars of parts, all to the same scale.
#[derive(Clone, Debug, Default)]
pub(crate) struct BarChart {
    pub(crate) title: String,
    /// Unit of the numbers.
    pub(crate) unit: &'static str,
    /// Names of the parts, the same for all bars.
    pub(crate) parts: Vec<&'static str>,
    pub(crate) bars: Vec<Bar>,
}

/// One bar.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bar {
    /// Its name, above it.
    pub(crate) name: String,
    /// A remark below it.
    pub(crate) remark: String,
    /// A value for each part; values that are not positive are invisible.
    pub(crate) values: Vec<f64>,
}

impl BarChart {
    pub(crate) fn write(&self, file: &Path) -> Result<(), CliError> {
        fs::write(file, self.to_svg()).map_err(CliError::file(file, WRITE))
    }

    /// The chart as an SVG document.
    pub(crate) fn to_svg(&self) -> String {
        let height = TOP + self.bars.len() as f64 * PITCH + 12.0;
        let mut out = head(WIDTH, height);
        let _ = writeln!(out, "<text x=\"{LEFT}\" y=\"26\" font-size=\"15\">{}</text>", escape(&self.title));
        self.legend(&mut out);
        let longest = self.bars.iter().map(Bar::total).fold(0.0, f64::max);
        for (at, bar) in self.bars.iter().enumerate() {
            let scale = if longest > 0.0 { LENGTH / longest } else { 0.0 };
            self.bar(&mut out, bar, scale, TOP + at as f64 * PITCH);
        }
        out + "</svg>\n"
    }

    fn legend(&self, out: &mut String) {
        let mut x = LEFT;
        for (at, part) in self.parts.iter().enumerate() {
            let colour = COLOURS[at % COLOURS.len()];
            let _ = writeln!(
                out,
                "<rect x=\"{x}\" y=\"42\" width=\"12\" height=\"12\" fill=\"{colour}\"/><text x=\"{}\" y=\"52\">{}</text>",
                x + 18.0,
                escape(part)
            );
            x += 42.0 + 6.4 * part.chars().count() as f64;
        }
    }

    fn bar(&self, out: &mut String, bar: &Bar, scale: f64, top: f64) {
        let total = number(round(bar.total()));
        let _ = writeln!(
            out,
            "<text x=\"{LEFT}\" y=\"{:.1}\" font-weight=\"bold\">{}: {total} {}</text>",
            top + 14.0,
            escape(&bar.name),
            self.unit
        );
        let mut x = LEFT;
        for (at, value) in bar.values().enumerate() {
            let width = value * scale;
            let colour = COLOURS[at % COLOURS.len()];
            let _ = writeln!(
                out,
                "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>",
                top + 22.0
            );
            if width >= LABELLED {
                let _ = writeln!(
                    out,
                    "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"white\">{}</text>",
                    x + width / 2.0,
                    top + 22.0 + BAR / 2.0 + 4.0,
                    number(round(value))
                );
            }
            x += width;
        }
        let _ = writeln!(
            out,
            "<text x=\"{LEFT}\" y=\"{:.1}\" fill=\"#555\">{}</text>",
            top + 22.0 + BAR + 17.0,
            escape(&bar.remark)
        );
    }
}

impl Bar {
    fn values(&self) -> impl Iterator<Item = f64> {
        self.values.iter().map(|value| if value.is_finite() { value.max(0.0) } else { 0.0 })
    }

    fn total(&self) -> f64 {
        self.values().sum()
    }
}

/// Rounds to three significant digits.
fn round(value: f64) -> f64 {
    let digits = if value > 0.0 { (2.0 - value.log10().floor()).clamp(0.0, 3.0) } else { 0.0 };
    let power = 10f64.powf(digits);
    (value * power).round() / power
}

#[cfg(test)]
mod tests {
    use super::super::tests::assert_well_formed;
    use super::*;

    #[test]
    fn bars_are_as_long_as_what_they_mean() {
        let bar = |values: &[f64]| Bar { name: "a <token>".into(), remark: "b & c".into(), values: values.to_vec() };
        let chart = BarChart {
            title: "time".into(),
            unit: "ms",
            parts: vec!["drive", "experts"],
            bars: vec![bar(&[30.0, 10.0]), bar(&[f64::NAN, 20.0])],
        };
        let svg = chart.to_svg();
        assert_well_formed(&svg);
        assert!(svg.contains("a &lt;token&gt;: 40 ms") && svg.contains("a &lt;token&gt;: 20 ms"), "{svg}");
        let width = |part: f64| format!("width=\"{:.1}\"", LENGTH * part);
        for part in [0.75, 0.25, 0.5] {
            assert!(svg.contains(&width(part)), "{part}: {svg}");
        }
    }

    #[test]
    fn nothing_at_all_is_well_formed() {
        assert_well_formed(&BarChart::default().to_svg());
        assert_well_formed(&BarChart { bars: vec![Bar::default()], ..BarChart::default() }.to_svg());
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!([12.345, 1.2345, 123.4, 0.012_34, 0.0].map(round), [12.3, 1.23, 123.0, 0.012, 0.0]);
    }
}
