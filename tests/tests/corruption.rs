//! No bit flip anywhere in the file changes a token: the file is refused, or the damage is found and named.

use std::fs;

use sluice_format::{ModelFile, WeightType};
use sluice_model::{Engine, EngineOptions, RuntimeError};
use sluice_tests::{Converted, argmax};

/// A small generator with a fixed seed: a failure must be reproducible.
struct Xorshift(u64);

impl Xorshift {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn generate(path: &std::path::Path) -> Result<Vec<u32>, RuntimeError> {
    let mut engine = Engine::open(path, &EngineOptions { threads: Some(1), ..EngineOptions::default() })?;
    let mut sequence = engine.new_sequence();
    let mut logits = Vec::new();
    let mut ids = vec![838, 29, 202];
    engine.forward(&mut sequence, &ids, &mut logits)?;
    for _ in 0..6 {
        ids.push(argmax(&logits));
        engine.decode(&mut sequence, ids[ids.len() - 1], &mut logits)?;
    }
    Ok(ids)
}

#[test]
fn two_hundred_random_bytes() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let sound = generate(&model.path).unwrap();
    let bytes = fs::read(&model.path).unwrap();
    let mut random = Xorshift(0x9e37_79b9_7f4a_7c15);
    let damaged = model.path.with_extension("damaged");
    for _ in 0..200 {
        let at = random.below(bytes.len() as u64) as usize;
        let mask = 1 + random.below(255) as u8;
        let mut copy = bytes.clone();
        copy[at] ^= mask;
        fs::write(&damaged, &copy).unwrap();

        // Verification finds the flip, when the file is opened or in an extent.
        let found = match ModelFile::open(&damaged) {
            Err(_) => true,
            Ok(file) => {
                let mut buffer = Vec::new();
                file.extents().iter().any(|e| file.read_extent(e, &mut buffer).is_err())
            }
        };
        assert!(found, "byte {at} ^ {mask:#x} is not found");
        // Generation ends with an error, or did not touch the damage and gives the usual text.
        if let Ok(ids) = generate(&damaged) {
            assert_eq!(ids, sound, "byte {at} ^ {mask:#x} changed the text");
        }
    }
}
