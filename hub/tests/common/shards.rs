//! Checkpoints of one file, distributed over several as they are published.

#![allow(dead_code, reason = "not every test does everything")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

type Files = BTreeMap<String, Vec<u8>>;

/// The files of a checkpoint's folder that belong to it, its weights in `count` files.
pub fn of_folder(folder: &Path, count: usize) -> Files {
    let mut files = Files::new();
    for path in fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file()) {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let is_other = ["expected.json", "golden.json"].contains(&name.as_str());
        // What is in several files already stays so.
        let is_shard = name.ends_with(".safetensors") && name.contains("-of-");
        if is_shard || (name.ends_with(".json") && !is_other) {
            files.insert(name, fs::read(path).unwrap());
        } else if name == "model.safetensors" {
            split(&fs::read(path).unwrap(), count, &mut files);
        }
    }
    files
}

/// Distributes the tensors of a safetensors file over several, in their order.
fn split(bytes: &[u8], shards: usize, files: &mut Files) {
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let data = &bytes[8 + len..];
    let offsets = |v: &serde_json::Value| [0, 1].map(|i| v["data_offsets"][i].as_u64().unwrap() as usize);
    let mut tensors: Vec<(&String, &serde_json::Value)> = header.iter().filter(|(n, _)| *n != "__metadata__").collect();
    // Layers one after the other, as they are published.
    tensors.sort_by_key(|(name, _)| {
        let layer = name.split("layers.").nth(1).and_then(|rest| rest.split('.').next()?.parse().ok());
        (layer.unwrap_or(if name.contains("embed") { 0 } else { 999 }), (*name).clone())
    });
    let share = data.len().div_ceil(shards);
    let mut places = serde_json::Map::new();
    let mut shard = 0;
    let mut parts: Vec<(serde_json::Map<String, serde_json::Value>, Vec<u8>)> = vec![Default::default(); shards];
    for (name, value) in tensors {
        if parts[shard].1.len() >= share && shard + 1 < shards {
            shard += 1;
        }
        let [first, end] = offsets(value);
        let (header, body) = &mut parts[shard];
        let mut value = value.clone();
        value["data_offsets"] = serde_json::json!([body.len(), body.len() + end - first]);
        body.extend(&data[first..end]);
        header.insert(name.clone(), value);
        places.insert(name.clone(), format!("model-{:05}-of-{shards:05}.safetensors", shard + 1).into());
    }
    for (i, (header, body)) in parts.into_iter().enumerate() {
        let header = serde_json::to_vec(&header).unwrap();
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_slice(), &body].concat();
        files.insert(format!("model-{:05}-of-{shards:05}.safetensors", i + 1), bytes);
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": places });
    files.insert("model.safetensors.index.json".into(), serde_json::to_vec(&index).unwrap());
}
