//! A second, naive reader and writer of safetensors, only for tests: it shares no code with the converter.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

/// One tensor in memory.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

pub type Tensors = BTreeMap<String, Tensor>;

pub fn e4m3(code: u8) -> f32 {
    let (e, m) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = if e == 0 { m / 8.0 * 2f32.powi(-6) } else { (1.0 + m / 8.0) * 2f32.powi(e - 7) };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

impl Tensor {
    pub fn bf16(shape: &[usize], values: impl IntoIterator<Item = f32>) -> Self {
        let bytes = values.into_iter().flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect();
        Tensor { dtype: "BF16".into(), shape: shape.to_vec(), bytes }
    }

    pub fn f16(shape: &[usize], values: impl IntoIterator<Item = f32>) -> Self {
        let bytes = values.into_iter().flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect();
        Tensor { dtype: "F16".into(), shape: shape.to_vec(), bytes }
    }

    pub fn f32(shape: &[usize], values: impl IntoIterator<Item = f32>) -> Self {
        let bytes = values.into_iter().flat_map(f32::to_le_bytes).collect();
        Tensor { dtype: "F32".into(), shape: shape.to_vec(), bytes }
    }

    /// The numbers as stored, without block scales.
    pub fn values(&self) -> Vec<f32> {
        let b = &self.bytes;
        match self.dtype.as_str() {
            "F32" => b.chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect(),
            "BF16" => b.chunks(2).map(|c| half::bf16::from_le_bytes(c.try_into().unwrap()).to_f32()).collect(),
            "F16" => b.chunks(2).map(|c| half::f16::from_le_bytes(c.try_into().unwrap()).to_f32()).collect(),
            "F8_E4M3" => b.iter().map(|&c| e4m3(c)).collect(),
            other => panic!("{other}"),
        }
    }
}

/// The numbers that a tensor represents, with block scales applied.
pub fn values(tensors: &Tensors, name: &str) -> Vec<f32> {
    let t = tensors.get(name).unwrap_or_else(|| panic!("no {name}"));
    let mut values = t.values();
    if let Some(scales) = tensors.get(&format!("{name}_scale_inv")) {
        let (cols, s) = (t.shape[1], scales.values());
        for (i, v) in values.iter_mut().enumerate() {
            *v *= s[i / cols / 128 * scales.shape[1] + i % cols / 128];
        }
    }
    values
}

pub fn read_file(path: &Path, out: &mut Tensors) {
    let bytes = std::fs::read(path).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    for (name, v) in header {
        if name == "__metadata__" {
            continue;
        }
        let at = |i: usize| v["data_offsets"][i].as_u64().unwrap() as usize + 8 + n;
        let shape = v["shape"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap() as usize).collect();
        let dtype = v["dtype"].as_str().unwrap().to_owned();
        out.insert(name, Tensor { dtype, shape, bytes: bytes[at(0)..at(1)].to_vec() });
    }
}

/// Every tensor in all safetensors files of a folder.
pub fn read_dir(dir: &Path) -> Tensors {
    let mut out = Tensors::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            read_file(&path, &mut out);
        }
    }
    out
}

/// A file's bytes.
pub fn encode<'a>(tensors: impl Iterator<Item = (&'a String, &'a Tensor)>) -> Vec<u8> {
    let mut header = Map::new();
    let mut data: Vec<u8> = Vec::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    for (name, t) in tensors {
        let start = data.len();
        data.extend(&t.bytes);
        header.insert(name.clone(), json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [start, data.len()]}));
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header);
    out.extend(data);
    out
}

/// Writes a checkpoint: one file, or shards with an index. Consecutive tensors go to different shards.
pub fn write_dir(dir: &Path, config: &Value, tensors: &Tensors, shards: usize) {
    std::fs::write(dir.join("config.json"), serde_json::to_vec_pretty(config).unwrap()).unwrap();
    if shards == 1 {
        std::fs::write(dir.join("model.safetensors"), encode(tensors.iter())).unwrap();
        return;
    }
    let mut map = Map::new();
    for shard in 0..shards {
        let file = format!("model-{:05}-of-{shards:06}.safetensors", shard + 1);
        let part = || tensors.iter().enumerate().filter(|(i, _)| i % shards == shard).map(|(_, t)| t);
        map.extend(part().map(|(name, _)| (name.clone(), json!(file))));
        std::fs::write(dir.join(&file), encode(part())).unwrap();
    }
    let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
    std::fs::write(dir.join("model.safetensors.index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
}
