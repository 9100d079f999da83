//! Types by pattern: what a recipe says is what the file has, and the file says so.

use std::path::Path;

use crate::common::{Synthetic, content, options};
use sluice_converter::{Recipe, convert, plan};
use sluice_format::{ExtentKind, ModelFile, PROVENANCE_BLOB, WeightType};

const RECIPE: &str = "\
# Layer 1 matters most.
layers.{1-1}.expert.down   q8
layers.*.attention.*       keep
*.expert.*                 bf16
head                       q8
layers.{7-9}.*             q4   # there are no such layers
";

#[test]
fn the_first_pattern_that_matches_decides() {
    let (src, dst) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    Synthetic::default().write(src.path(), 2);
    let mut options = options("f32", "f32");
    let without = plan(src.path(), &options).unwrap();
    options.recipe = Some(Recipe::parse(Path::new("a.recipe"), RECIPE).unwrap());
    let file = dst.path().join("m");
    let summary = convert(src.path(), &file, &options, &()).unwrap();
    assert!(summary.file_bytes < without.file_bytes());
    assert!(summary.notes.iter().any(|n| n.contains("line 6: `layers.{7-9}.* q4`")), "{:?}", summary.notes);
    for ((kind, layer, _, name), (ty, _)) in content(&file) {
        let expected = match (kind, layer, name.as_str()) {
            (ExtentKind::Expert, 1, "down") => Some(WeightType::Q8),
            (ExtentKind::Expert, ..) => Some(WeightType::Bf16),
            (ExtentKind::Head, ..) => Some(WeightType::Q8),
            (ExtentKind::Attention, _, "o") => Some(WeightType::Bf16),
            (ExtentKind::Dense | ExtentKind::Embedding, ..) => Some(WeightType::F32),
            _ => None,
        };
        assert!(expected.is_none_or(|expected| ty == expected), "{kind} {layer} {name}: {ty}");
    }
    let model = ModelFile::open(&file).unwrap();
    let provenance = String::from_utf8(model.metadata().get(PROVENANCE_BLOB).unwrap().to_vec()).unwrap();
    assert!(provenance.contains("layers.{1-1}.expert.down q8"), "{provenance}");
}

/// A line that does nothing is most likely a slip: it says what became of it.
#[test]
fn lines_that_change_nothing_are_named_with_the_reason() {
    let src = tempfile::tempdir().unwrap();
    Synthetic::default().write(src.path(), 2);
    let notes = |recipe: &str| {
        let recipe = Recipe::parse(Path::new("a.recipe"), recipe).unwrap();
        let plan = plan(src.path(), &sluice_converter::Options { recipe: Some(recipe), ..options("q8", "keep") });
        plan.unwrap().notes().iter().filter(|n| n.starts_with("a.recipe")).cloned().collect::<Vec<_>>()
    };
    let said = notes("*.expert.gate_up q4\nlayers.1.expert.* q4\nlayers.1.expert.gate_up q8\nlayers.99.* q4\n");
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].contains("match no tensor") && said[0].contains("line 4: `layers.99.* q4`"), "{said:?}");
    assert!(said[1].contains("lines above") && said[1].ends_with("line 3: `layers.1.expert.gate_up q8`"), "{said:?}");
    // What is never changed, and what is so anyway; the line for layer 1 keeps it from the one below.
    let said = notes("*.router q4\nembedding q4\nlayers.1.expert.* q8\n*.expert.* q4\n*_norm q8\nhead bf16\n");
    let [said] = &said[..] else { panic!("{said:?}") };
    for line in ["line 1: `*.router q4`", "line 2: `embedding q4`", "line 5: `*_norm q8`", "line 6: `head bf16`"] {
        assert!(said.contains("change nothing") && said.contains(line), "{said}");
    }
    assert!(!said.contains("line 3") && !said.contains("line 4"), "{said}");
}
