//! `config.json`: a checkpoint is made that has the tensors which the configuration asks for; it is planned, and converted
//! if it is small. `sluice plan` does its arithmetic on the configuration alone.

use std::fs;
use std::path::Path;

use sluice_converter::fuzzing::tensors_of;
use sluice_converter::synth::{Geometry, Layout, WeightTypes};
use sluice_format::{PAGE_SIZES, WeightType};
use sluice_lab::estimate::{Machine, Needs, Speed};
use sluice_model::KvType;

use super::checkpoint::{GOLDENS, convert, header_for, header_of, write_sparse};
use super::{Seeds, choice};

/// Most tensors of a checkpoint that is made for a configuration.
const TENSORS_MAX: usize = 1000;

pub(crate) fn run(input: &[u8], folder: &Path) {
    let checkpoint = folder.join("checkpoint");
    fs::create_dir_all(&checkpoint).expect("the folder can be written");
    let config = checkpoint.join("config.json");
    fs::write(&config, input).expect("the folder can be written");
    // The tensors of another configuration where there are none, or too many, of this one.
    let header = tensors_of(input, TENSORS_MAX).and_then(|tensors| header_for(&tensors));
    let header = header.unwrap_or_else(|| header_of(GOLDENS[0].weights).to_vec());
    write_sparse(&checkpoint.join("model.safetensors"), &header);
    let _ = convert(&checkpoint, &folder.join("model.sluice"), choice(input));
    estimate(config.to_str().expect("temporary folders have plain names"), choice(input));
}

/// What `sluice plan` computes.
fn estimate(config: &str, choice: u64) {
    let geometry = match Geometry::load(config, None) {
        Ok(geometry) => geometry,
        Err(error) => return drop(error.to_string()),
    };
    let _ = Geometry::load(config, Some(1 + choice as usize % 4)).map_err(|error| error.to_string());
    let spec = geometry.spec();
    let types = WeightTypes { experts: geometry.usual_expert_type(), dense: WeightType::Q8 };
    let layout = match Layout::new(spec, types, PAGE_SIZES[0]) {
        Ok(layout) => layout,
        Err(error) => return drop(error.to_string()),
    };
    let _ = layout.file_bytes(spec.to_json().len() + geometry.config().len());
    for context in [1, 4096, spec.max_positions] {
        let kv_type = KvType::ALL[choice as usize % KvType::ALL.len()];
        let needs = Needs::of(spec, layout.extents(), context, kv_type);
        serde_json::to_vec(&needs).expect("figures are JSON");
        for ram in [1 << 30, 64 << 30, u64::MAX / 2] {
            let machine = Machine { ram, ssd: 3_000_000_000, ssd_latency: 80e-6, memory_bandwidth: 50_000_000_000 };
            match Speed::of(spec, layout.extents(), machine, context, kv_type) {
                Ok(speed) => drop(serde_json::to_vec(&speed).expect("figures are JSON")),
                Err(error) => drop(error.to_string()),
            }
        }
    }
}

pub(crate) fn seeds(_folder: &Path) -> Seeds {
    GOLDENS.iter().map(|golden| (golden.name.to_owned(), golden.config.to_vec())).collect()
}
