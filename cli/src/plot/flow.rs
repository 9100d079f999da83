//! The picture of the data flow, drawn from one description.

use std::fmt::Write as _;

use super::{escape, head};

/// Pixels: size of a box, distance between boxes, and the margin.
const BOX: (f64, f64) = (158.0, 58.0);
const PITCH: (f64, f64) = (204.0, 138.0);
const MARGIN: (f64, f64) = (28.0, 62.0);
/// Distance between two arrows in opposite directions between the same boxes.
const APART: f64 = 26.0;
/// Distance from the middle of its boxes at which an arrow to another column ends.
const SLANT: f64 = 56.0;
/// Distance below its boxes of an arrow that leads back.
const BELOW: f64 = 34.0;

/// The kind of a box, which decides its colour.
#[derive(Clone, Copy)]
enum Kind {
    OnDrive,
    InMemory,
    Work,
    Text,
}

impl Kind {
    const ALL: [(Kind, &str); 4] = [
        (Kind::OnDrive, "on the drive"),
        (Kind::InMemory, "in memory, within the budget"),
        (Kind::Work, "work"),
        (Kind::Text, "text and tokens"),
    ];

    fn colour(self) -> &'static str {
        match self {
            Kind::OnDrive => "#fbe3c4",
            Kind::InMemory => "#d5e8f6",
            Kind::Work => "#e3f1df",
            Kind::Text => "#f2f2f2",
        }
    }
}

/// A box: its name, its description, and its column and row.
struct Node {
    name: &'static str,
    about: &'static str,
    kind: Kind,
    place: (f64, f64),
}

/// The course of an arrow between two boxes.
#[derive(Clone, Copy)]
enum Way {
    /// From border to border.
    Straight,
    /// Straight, this many pixels beside the middle.
    Beside(f64),
    /// Around, below all boxes.
    Below,
}

struct Arrow {
    from: &'static str,
    to: &'static str,
    /// What moves along it.
    what: &'static str,
    way: Way,
}

const fn node(name: &'static str, about: &'static str, kind: Kind, place: (f64, f64)) -> Node {
    Node { name, about, kind, place }
}

const fn arrow(from: &'static str, to: &'static str, what: &'static str, way: Way) -> Arrow {
    Arrow { from, to, what, way }
}

/// The description: boxes by column and row, in the terms of docs/ARCHITECTURE.md.
const NODES: &[Node] = &[
    node("checkpoint", "safetensors, GGUF, hub", Kind::OnDrive, (0.0, 0.0)),
    node("converter", "types, layout, checksums", Kind::Work, (1.0, 0.0)),
    node("model file", "one extent per expert", Kind::OnDrive, (2.0, 0.0)),
    node("dense part", "what every token needs", Kind::InMemory, (1.0, 1.0)),
    node("slots", "the experts worth keeping", Kind::InMemory, (2.0, 1.0)),
    node("pages", "keys, values, states", Kind::InMemory, (3.0, 1.0)),
    node("sessions", "saved sequences", Kind::OnDrive, (4.0, 1.0)),
    node("prompt", "chat template, tokenizer", Kind::Text, (0.0, 2.0)),
    node("tokens", "a row each", Kind::Text, (1.0, 2.0)),
    node("layers", "attention, router, experts", Kind::Work, (2.0, 2.0)),
    node("logits", "one for each word", Kind::Work, (3.0, 2.0)),
    node("sampler", "temperature, grammar", Kind::Work, (4.0, 2.0)),
    node("text", "terminal, HTTP, library", Kind::Text, (5.0, 2.0)),
];

const ARROWS: &[Arrow] = &[
    arrow("checkpoint", "converter", "once", Way::Straight),
    arrow("converter", "model file", "", Way::Straight),
    arrow("model file", "dense part", "at open", Way::Straight),
    arrow("model file", "slots", "missing experts: direct I/O, checked", Way::Straight),
    arrow("dense part", "layers", "", Way::Straight),
    arrow("slots", "layers", "weights", Way::Beside(-APART)),
    arrow("layers", "slots", "asks for", Way::Beside(APART)),
    arrow("layers", "pages", "", Way::Straight),
    arrow("pages", "sessions", "", Way::Straight),
    arrow("prompt", "tokens", "", Way::Straight),
    arrow("tokens", "layers", "", Way::Straight),
    arrow("layers", "logits", "", Way::Straight),
    arrow("logits", "sampler", "", Way::Straight),
    arrow("sampler", "text", "", Way::Straight),
    arrow("sampler", "tokens", "the next token", Way::Below),
];

/// The data flow as an SVG document.
pub(crate) fn data_flow() -> String {
    let last = |of: fn(&Node) -> f64| NODES.iter().map(of).fold(0.0, f64::max);
    let width = 2.0 * MARGIN.0 + last(|node| node.place.0) * PITCH.0 + BOX.0;
    let height = MARGIN.1 + last(|node| node.place.1) * PITCH.1 + BOX.1 + BELOW + 24.0;
    let mut out = head(width, height);
    out += "<defs><marker id=\"end\" viewBox=\"0 0 10 10\" refX=\"9\" refY=\"5\" markerWidth=\"7\" markerHeight=\"7\" \
            orient=\"auto\"><path d=\"M0 0L10 5L0 10z\" fill=\"#333\"/></marker></defs>\n";
    legend(&mut out);
    ARROWS.iter().for_each(|arrow| draw_arrow(&mut out, arrow));
    NODES.iter().for_each(|node| draw_node(&mut out, node));
    out + "</svg>\n"
}

fn legend(out: &mut String) {
    let mut x = MARGIN.0;
    for (kind, name) in Kind::ALL {
        let colour = kind.colour();
        let _ = writeln!(
            out,
            "<rect x=\"{x:.0}\" y=\"20\" width=\"14\" height=\"14\" fill=\"{colour}\" stroke=\"#777\"/>\
             <text x=\"{:.0}\" y=\"32\">{name}</text>",
            x + 21.0
        );
        x += 46.0 + 6.6 * name.len() as f64;
    }
}

/// The middle of a box.
fn middle(node: &Node) -> (f64, f64) {
    let (column, row) = node.place;
    (MARGIN.0 + column * PITCH.0 + BOX.0 / 2.0, MARGIN.1 + row * PITCH.1 + BOX.1 / 2.0)
}

fn draw_node(out: &mut String, node: &Node) {
    let (x, y) = middle(node);
    let colour = node.kind.colour();
    let _ = writeln!(
        out,
        "<rect x=\"{:.0}\" y=\"{:.0}\" width=\"{}\" height=\"{}\" rx=\"6\" fill=\"{colour}\" stroke=\"#777\"/>\n\
         <text x=\"{x:.0}\" y=\"{:.0}\" text-anchor=\"middle\" font-size=\"14\" font-weight=\"bold\">{}</text>\n\
         <text x=\"{x:.0}\" y=\"{:.0}\" text-anchor=\"middle\" font-size=\"11.5\">{}</text>",
        x - BOX.0 / 2.0,
        y - BOX.1 / 2.0,
        BOX.0,
        BOX.1,
        y - 4.0,
        escape(node.name),
        y + 15.0,
        escape(node.about)
    );
}

fn draw_arrow(out: &mut String, arrow: &Arrow) {
    let find = |name: &str| NODES.iter().find(|node| node.name == name);
    let (Some(from), Some(to)) = (find(arrow.from), find(arrow.to)) else { return };
    let ((x0, y0), (x1, y1)) = (middle(from), middle(to));
    let (half_width, half_height) = (BOX.0 / 2.0, BOX.1 / 2.0);
    let (path, label, anchor) = match arrow.way {
        Way::Below => {
            let low = y0.max(y1) + half_height + BELOW;
            let path = format!("M{x0:.0} {:.0}V{low:.0}H{x1:.0}V{:.0}", y0 + half_height, y1 + half_height);
            (path, (f64::midpoint(x0, x1), low - 6.0), "middle")
        }
        Way::Straight | Way::Beside(_) if from.place.1 == to.place.1 => {
            let side = half_width * (x1 - x0).signum();
            let path = format!("M{:.0} {y0:.0}H{:.0}", x0 + side, x1 - side);
            (path, (f64::midpoint(x0, x1), y0 - 7.0), "middle")
        }
        Way::Straight | Way::Beside(_) => {
            let aside = if let Way::Beside(aside) = arrow.way { aside } else { 0.0 };
            let side = half_height * (y1 - y0).signum();
            // Between columns, it leaves and arrives beside the middle, which other arrows use.
            let slant = if x0 == x1 { 0.0 } else { SLANT * (x1 - x0).signum() };
            let (x0, x1) = (x0 + aside + slant, x1 + aside - slant);
            let path = format!("M{x0:.0} {:.0}L{x1:.0} {:.0}", y0 + side, y1 - side);
            let (gap, anchor) = if aside < 0.0 || x1 < x0 { (-8.0, "end") } else { (8.0, "start") };
            (path, (f64::midpoint(x0, x1) + gap, f64::midpoint(y0, y1) + 4.0), anchor)
        }
    };
    let _ = writeln!(
        out,
        "<path d=\"{path}\" fill=\"none\" stroke=\"#333\" stroke-width=\"1.4\" marker-end=\"url(#end)\"/>"
    );
    if !arrow.what.is_empty() {
        let ((x, y), what) = (label, escape(arrow.what));
        let _ =
            writeln!(out, "<text x=\"{x:.0}\" y=\"{y:.0}\" text-anchor=\"{anchor}\" font-size=\"11.5\">{what}</text>");
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::assert_well_formed;
    use super::*;
    use std::path::Path;

    #[test]
    fn every_arrow_leads_from_box_to_box() {
        for arrow in ARROWS {
            for end in [arrow.from, arrow.to] {
                assert_eq!(NODES.iter().filter(|node| node.name == end).count(), 1, "{end}");
            }
        }
        let svg = data_flow();
        assert_well_formed(&svg);
        assert_eq!(svg.matches("marker-end").count(), ARROWS.len());
    }

    #[test]
    fn the_picture_in_the_documents_is_this_one() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/pictures/data-flow.svg");
        let kept = std::fs::read_to_string(file).unwrap();
        assert!(kept == data_flow(), "make it again: sluice picture data-flow > docs/pictures/data-flow.svg");
    }
}
