//! Types by pattern: what a recipe says is what the file has, and the file says so.

mod common;

use std::path::Path;

use common::{Synthetic, content, options};
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
