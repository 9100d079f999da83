//! Tables of n-grams while a model runs: damage is found and named, however little of the table is in memory, and conversions that
//! measure find the rows that they need.

use std::fs;
use std::path::Path;

use sluice_format::{ExtentKind, ModelFile};
use sluice_model::{Engine, EngineOptions, RuntimeError};
use sluice_tests::{Converted, Golden};

const FAMILY: &str = "qwen4_exp";

/// Logits of the prompt, `step` tokens at a time.
fn logits(path: &Path, step: usize) -> Result<Vec<f32>, RuntimeError> {
    let options = EngineOptions { threads: Some(2), forget: true, ..EngineOptions::default() };
    let mut engine = Engine::open(path, &options)?;
    let (mut sequence, mut all) = (engine.new_sequence(), Vec::new());
    for tokens in Golden::load(FAMILY).ids("input_ids").chunks(step) {
        engine.forward_all(&mut sequence, tokens, &mut |_, row| all.extend_from_slice(row))?;
    }
    Ok(all)
}

#[test]
fn a_damaged_row_ends_the_step_that_needs_it_and_no_other() {
    let model = Converted::new(&format!("golden/{FAMILY}"), None);
    let sound = logits(&model.path, 7).unwrap();
    let bytes = fs::read(&model.path).unwrap();
    let file = ModelFile::open(&model.path).unwrap();
    let parts: Vec<_> = file.extents().iter().filter(|e| e.kind == ExtentKind::Table).collect();
    assert_eq!(parts.len(), 24);
    let damaged = model.path.with_extension("damaged");
    let mut found = 0;
    for part in &parts {
        let mut copy = bytes.clone();
        copy[part.offset as usize + 100] ^= 4;
        fs::write(&damaged, &copy).unwrap();
        match logits(&damaged, 7) {
            Ok(same) => assert!(same == sound, "{} changed the logits", part.name()),
            Err(error) => {
                let (name, text) = (format!("layer {} table {}", part.layer, part.index), error.to_string());
                assert!(text.contains(&name) && text.contains("damaged"), "{name}: {text}");
                found += 1;
            }
        }
        let mut extent = Vec::new();
        let verified = ModelFile::open(&damaged).unwrap().read_extent(part, &mut extent);
        assert!(verified.is_err(), "{} verifies", part.name());
    }
    // 80 tokens use rows of nearly every part.
    assert!(found > 20, "{found} of {} parts", parts.len());
}

#[test]
fn an_engine_that_rested_reads_the_rows_again() {
    let model = Converted::new(&format!("golden/{FAMILY}"), None);
    let tokens = Golden::load(FAMILY).ids("input_ids");
    let options = EngineOptions { threads: Some(2), forget: true, ..EngineOptions::default() };
    let mut engine = Engine::open(&model.path, &options).unwrap();
    let mut run = |rest: bool| {
        let (mut sequence, mut all) = (engine.new_sequence(), Vec::new());
        for tokens in tokens.chunks(20) {
            if rest {
                engine.release_idle();
            }
            engine.forward_all(&mut sequence, tokens, &mut |_, row| all.extend_from_slice(row)).unwrap();
        }
        all
    };
    let busy = run(false);
    assert!(run(true) == busy, "resting changes bits");
}
