//! Pictures as SVG, without a dependency: line charts here; bars and the data flow in modules of their own.

pub(crate) mod bars;
pub(crate) mod flow;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::Path;

use crate::error::CliError;

/// Width and height of the picture, and the space around the axes: left, right, top, bottom. In pixels.
const SIZE: (f64, f64) = (860.0, 480.0);
const MARGIN: (f64, f64, f64, f64) = (70.0, 190.0, 46.0, 52.0);

/// Colours that colour-blind people can distinguish (Okabe and Ito).
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];

/// Height of one line of the legend.
const LEGEND_LINE: f64 = 18.0;

/// One line of a chart.
#[derive(Clone, Debug, Default)]
pub(crate) struct Series {
    /// Name in the legend.
    pub(crate) name: String,
    /// Values; those that are not finite are left out.
    pub(crate) points: Vec<(f64, f64)>,
    /// Lines of the same group have the same colour.
    pub(crate) group: usize,
    /// Distinguishes the lines of a group.
    pub(crate) dashed: bool,
}

/// A chart of lines over a common axis. The vertical axis begins at 0.
#[derive(Clone, Debug, Default)]
pub(crate) struct LineChart {
    pub(crate) title: String,
    pub(crate) x_label: String,
    pub(crate) y_label: String,
    /// The horizontal axis is logarithmic, to the base 2; its values are positive.
    pub(crate) log2: bool,
    pub(crate) series: Vec<Series>,
    /// A point to mark, with a label.
    pub(crate) mark: Option<(f64, f64, String)>,
}

/// Finds out, before minutes of measuring, that a chart of `input` could not be written to `file` afterwards. An existing file is
/// not changed until then.
pub(crate) fn check_target(file: Option<&Path>, input: &Path) -> Result<(), CliError> {
    let Some(file) = file else { return Ok(()) };
    CliError::refuse_output(file, &[input])?;
    if file.metadata().is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        // The reader of a pipe would see its end.
        return Ok(());
    }
    // Does not follow links, because the user wants to keep the target.
    let is_new = file.symlink_metadata().is_err();
    let opened = File::options().write(true).create(true).truncate(false).open(file);
    opened.and_then(|_| if is_new { fs::remove_file(file) } else { Ok(()) }).map_err(CliError::file(file, WRITE))
}

const WRITE: &str = "write the chart";

/// The position of values in the picture.
struct Scale {
    log2: bool,
    x: (f64, f64),
    y_max: f64,
}

impl Scale {
    fn of(chart: &LineChart) -> Scale {
        let values = || chart.points();
        let place = |x: f64| if chart.log2 { x.log2() } else { x };
        let low = values().map(|(x, _)| place(x)).fold(f64::INFINITY, f64::min);
        let high = values().map(|(x, _)| place(x)).fold(f64::NEG_INFINITY, f64::max);
        let x = match (low.is_finite() && high.is_finite(), low < high) {
            (true, true) => (low, high),
            (true, false) => (low - 1.0, low + 1.0),
            (false, _) => (0.0, 1.0),
        };
        let top = values().map(|(_, y)| y).fold(0.0, f64::max);
        Scale { log2: chart.log2, x, y_max: if top > 0.0 { top * 1.05 } else { 1.0 } }
    }

    fn x(&self, x: f64) -> f64 {
        let place = if self.log2 { x.log2() } else { x };
        let width = SIZE.0 - MARGIN.0 - MARGIN.1;
        MARGIN.0 + (place - self.x.0) / (self.x.1 - self.x.0) * width
    }

    fn y(&self, y: f64) -> f64 {
        let height = SIZE.1 - MARGIN.2 - MARGIN.3;
        MARGIN.2 + height * (1.0 - y / self.y_max)
    }
}

impl LineChart {
    pub(crate) fn write(&self, file: &Path) -> Result<(), CliError> {
        fs::write(file, self.to_svg()).map_err(CliError::file(file, WRITE))
    }

    /// The chart as an SVG document.
    pub(crate) fn to_svg(&self) -> String {
        let scale = Scale::of(self);
        let (width, height) = SIZE;
        let mut out = head(width, height);
        let _ = writeln!(out, "<text x=\"{}\" y=\"24\" font-size=\"15\">{}</text>", MARGIN.0, escape(&self.title));
        self.axes(&mut out, &scale);
        for (at, series) in self.series.iter().enumerate() {
            line(&mut out, &scale, series, MARGIN.2 + 6.0 + at as f64 * LEGEND_LINE);
        }
        if let Some((x, y, words)) = self.mark.as_ref().filter(|(x, y, _)| self.is_drawable(*x, *y)) {
            let (x, y) = (scale.x(*x), scale.y(*y));
            let _ = writeln!(
                out,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"8\" fill=\"none\" stroke=\"black\" stroke-width=\"2\"/>\n\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-weight=\"bold\">{}</text>",
                y + 24.0,
                escape(words)
            );
        }
        out + "</svg>\n"
    }

    fn is_drawable(&self, x: f64, y: f64) -> bool {
        x.is_finite() && y.is_finite() && (!self.log2 || x > 0.0)
    }

    /// All points that can be drawn.
    fn points(&self) -> impl Iterator<Item = (f64, f64)> {
        self.series.iter().flat_map(|s| s.points.iter().copied()).filter(|&(x, y)| self.is_drawable(x, y))
    }

    fn axes(&self, out: &mut String, scale: &Scale) {
        let (left, right) = (MARGIN.0, SIZE.0 - MARGIN.1);
        let (top, bottom) = (MARGIN.2, SIZE.1 - MARGIN.3);
        for value in steps(scale.y_max) {
            let y = scale.y(value);
            let _ = writeln!(
                out,
                "<path d=\"M{left} {y:.1}H{right}\" stroke=\"#ddd\"/><text x=\"{}\" y=\"{:.1}\" \
                 text-anchor=\"end\">{}</text>",
                left - 6.0,
                y + 4.0,
                number(value)
            );
        }
        let mut ticks: Vec<f64> = self.points().map(|p| p.0).collect();
        ticks.sort_by(f64::total_cmp);
        ticks.dedup();
        let every = ticks.len().div_ceil(12).max(1);
        for value in ticks.into_iter().step_by(every) {
            let x = scale.x(value);
            let _ = writeln!(
                out,
                "<path d=\"M{x:.1} {bottom}v5\" stroke=\"black\"/><text x=\"{x:.1}\" y=\"{}\" \
                 text-anchor=\"middle\">{}</text>",
                bottom + 19.0,
                number(value)
            );
        }
        let _ = writeln!(
            out,
            "<path d=\"M{left} {top}V{bottom}H{right}\" fill=\"none\" stroke=\"black\"/>\n\
             <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n\
             <text transform=\"translate(18 {})rotate(-90)\" text-anchor=\"middle\">{}</text>",
            f64::midpoint(left, right),
            bottom + 40.0,
            escape(&self.x_label),
            f64::midpoint(top, bottom),
            escape(&self.y_label)
        );
    }
}

/// One line, its points, and its entry in the legend at height `legend`.
fn line(out: &mut String, scale: &Scale, series: &Series, legend: f64) {
    let colour = COLOURS[series.group % COLOURS.len()];
    let dash = if series.dashed { " stroke-dasharray=\"6 4\"" } else { "" };
    let drawable = series.points.iter().filter(|(x, y)| x.is_finite() && y.is_finite() && (!scale.log2 || *x > 0.0));
    let places: Vec<_> = drawable.map(|&(x, y)| (scale.x(x), scale.y(y))).collect();
    let path: Vec<_> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ = writeln!(
        out,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>",
        path.join(" ")
    );
    for (x, y) in places {
        let _ = writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>");
    }
    let x = SIZE.0 - MARGIN.1 + 14.0;
    let _ = writeln!(
        out,
        "<path d=\"M{x} {legend}h26\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/><text x=\"{}\" y=\"{}\">{}</text>",
        x + 32.0,
        legend + 4.0,
        escape(&series.name)
    );
}

/// The beginning of every picture, in pixels; `</svg>` ends it.
fn head(width: f64, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} \
         {height}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" \
         fill=\"white\"/>\n"
    )
}

/// Round values from 0 up to at most `max`: about five.
fn steps(max: f64) -> Vec<f64> {
    let rough = max / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough).unwrap_or(power * 10.0);
    (0..).map(|i| f64::from(i) * step).take_while(|v| *v <= max && v.is_finite()).take(20).collect()
}

/// A number without meaningless digits.
fn number(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Text that is safe between tags.
fn escape(text: &str) -> String {
    let clean = text.chars().filter(|c| !c.is_control());
    clean.fold(String::new(), |mut out, c| {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            c => out.push(c),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every tag is closed, in order; attributes are quoted; nothing but known entities.
    pub(crate) fn assert_well_formed(svg: &str) {
        let mut open = Vec::new();
        let mut rest = svg;
        while let Some(at) = rest.find('<') {
            let text = &rest[..at];
            assert!(!text.contains('>'), "{text}");
            for entity in text.split('&').skip(1) {
                assert!(["amp;", "lt;", "gt;"].iter().any(|known| entity.starts_with(known)), "{entity}");
            }
            let end = at + rest[at..].find('>').expect("a tag ends");
            let tag = &rest[at + 1..end];
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            let name = tag.trim_matches('/').split(' ').next().expect("a name");
            if tag.starts_with('/') {
                assert_eq!(open.pop().as_deref(), Some(name));
            } else if !tag.ends_with('/') {
                open.push(name.to_owned());
            }
            rest = &rest[end + 1..];
        }
        assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest}");
        for nonsense in ["NaN", "inf"] {
            assert!(!svg.contains(nonsense), "{nonsense}");
        }
    }

    #[test]
    fn charts_are_well_formed() {
        let chart = LineChart {
            title: "a <b> & \"c\"\u{7}".into(),
            x_label: "reads in flight".into(),
            y_label: "GB/s".into(),
            log2: true,
            series: vec![
                Series { name: "1 MiB".into(), points: vec![(1.0, 0.5), (4.0, 1.5), (64.0, 2.0)], ..Series::default() },
                Series { name: "<&>".into(), points: vec![(1.0, f64::NAN)], group: 9, dashed: true },
            ],
            mark: Some((4.0, 1.5, "knee".into())),
        };
        let svg = chart.to_svg();
        assert_well_formed(&svg);
        assert!(svg.contains("knee") && svg.contains("a &lt;b&gt; &amp; \"c\"<") && svg.contains(">64</text>"));
        assert_eq!(svg.matches("<polyline").count(), 2);
    }

    #[test]
    fn charts_of_nothing_are_well_formed() {
        assert_well_formed(&LineChart::default().to_svg());
        let one = |point| Series { points: vec![point], ..Series::default() };
        for series in [one((3.0, 0.0)), one((0.0, 5.0)), one((f64::INFINITY, 1.0))] {
            for log2 in [false, true] {
                let mark = Some((f64::NAN, 1.0, "?".into()));
                assert_well_formed(
                    &LineChart { log2, series: vec![series.clone()], mark, ..LineChart::default() }.to_svg(),
                );
            }
        }
    }

    #[test]
    fn axes_have_round_numbers() {
        assert_eq!(steps(2.1), [0.0, 0.5, 1.0, 1.5, 2.0]);
        assert_eq!(steps(10.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!([number(0.5), number(20.0), number(1.234_56)], ["0.5", "20", "1.235"]);
    }
}
