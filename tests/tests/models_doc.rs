//! `docs/MODELS.md` agrees with what the program computes.

use std::fs;
use std::path::Path;

use sluice_tests::models_table::renewed;

#[test]
fn the_tables_of_models_are_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/MODELS.md");
    let doc = fs::read_to_string(&path).unwrap();
    let renewed = renewed(&doc).unwrap();
    let differs = doc.lines().zip(renewed.lines()).find(|(old, new)| old != new);
    let command = "`cargo run --release -p sluice-tests --example models-table` makes them anew";
    assert!(doc == renewed, "docs/MODELS.md is stale, first where it says\n{differs:?}\n{command}");
}
