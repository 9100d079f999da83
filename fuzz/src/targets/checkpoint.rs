//! Checkpoints to plan and to convert: configurations of every family and form that the converter knows, and safetensors
//! files without weights: holes, so that they take no space.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Map, Value, json};
use sluice_converter::{ConvertError, Options, Plan, convert_plan, plan};
use sluice_format::{ModelFile, WeightType};

use super::fixture;

/// A checkpoint in the fixtures.
pub(crate) struct Golden {
    pub(crate) name: &'static str,
    pub(crate) config: &'static [u8],
    /// Its first file, of which only the header is used.
    pub(crate) weights: &'static [u8],
}

macro_rules! goldens {
    ($($name:literal $file:literal),+ $(,)?) => {
        [$(Golden {
            name: $name,
            config: fixture!(concat!("golden/", $name, "/config.json")),
            weights: fixture!(concat!("golden/", $name, "/", $file)),
        }),+]
    };
}

/// Every family and form, whole checkpoints first.
pub(crate) static GOLDENS: [Golden; 26] = goldens![
    "llama" "model.safetensors",
    "deepseek_v2" "model.safetensors",
    "deepseek_v2_lite" "model.safetensors",
    "deepseek_v32" "model.safetensors",
    "glm4_moe" "model.safetensors",
    "glm4_moe_air" "model.safetensors",
    "glm4_moe_lite" "model.safetensors",
    "glm_moe_dsa" "model.safetensors",
    "gpt_oss" "model.safetensors",
    "gpt_oss_mxfp4" "model.safetensors",
    "minimax_m2" "model.safetensors",
    "mistral" "model.safetensors",
    "mixtral" "model.safetensors",
    "olmoe" "model.safetensors",
    "qwen2_moe" "model.safetensors",
    "qwen3" "model.safetensors",
    "qwen3_moe" "model.safetensors",
    "qwen3_moe_awq" "model.safetensors",
    "qwen3_moe_gptq" "model.safetensors",
    "qwen3_moe_mlx" "model.safetensors",
    "qwen3_moe_nvfp4" "model.safetensors",
    "qwen3_next" "model.safetensors",
    "deepseek_v3" "model-00001-of-00003.safetensors",
    "deepseek_v3_fp8" "model-00001-of-00002.safetensors",
    "kimi_k25_int4" "model-00001-of-00002.safetensors",
    "qwen3_5_moe" "model-00001-of-00002.safetensors",
];

/// The length field and the header of a sound safetensors file.
pub(crate) fn header_of(file: &[u8]) -> &[u8] {
    let len = file.first_chunk().map_or(0, |field| u64::from_le_bytes(*field));
    &file[..8 + len as usize]
}

/// A header, with its length field, of bf16 tensors with these names and shapes.
pub(crate) fn header_for(tensors: &[(String, Vec<usize>)]) -> Option<Vec<u8>> {
    let mut header = Map::new();
    let mut end = 0usize;
    for (name, shape) in tensors {
        let start = end;
        let bytes = shape.iter().try_fold(2usize, |n, &d| n.checked_mul(d))?;
        end = end.checked_add(bytes)?;
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = Value::Object(header).to_string().into_bytes();
    Some([&(header.len() as u64).to_le_bytes()[..], &header].concat())
}

/// Writes a file that begins with these bytes. If they are a header and nothing more, a hole follows that has the length
/// of the tensors.
pub(crate) fn write_sparse(path: &Path, start: &[u8]) {
    let file = File::create(path).expect("the folder can be written");
    file.write_all_at(start, 0).expect("the folder can be written");
    let Some((field, json)) = start.split_first_chunk::<8>() else { return };
    if u64::from_le_bytes(*field) != json.len() as u64 {
        return;
    }
    let Ok(Value::Object(header)) = serde_json::from_slice(json) else { return };
    let ends = header.values().filter_map(|tensor| tensor["data_offsets"][1].as_u64());
    let len = (start.len() as u64).saturating_add(ends.max().unwrap_or(0));
    // A filesystem has its limits, and a file at one is as good as a file beyond it.
    let _ = file.set_len(len);
}

/// Longest file that is converted.
const FILE_MAX: u64 = 2 << 20;

/// Plans the conversion of a checkpoint with every recipe, describes the plan, and carries out one that is small.
pub(crate) fn convert(checkpoint: &Path, destination: &Path, choice: u64) -> Result<(), ConvertError> {
    let types = ["keep", "q8", "q4", "q3", "q2", "fp8", "bf16", "f32"];
    let ty = |choice: u64| types[choice as usize % types.len()].parse().expect("a name of a type");
    let options =
        Options { expert_type: ty(choice), dense_type: ty(choice >> 8), overwrite: true, ..Default::default() };
    let plan = match plan(checkpoint, &options) {
        Ok(plan) => plan,
        Err(error) => {
            drop(error.to_string());
            return Err(error);
        }
    };
    describe(&plan);
    if plan.file_bytes() <= FILE_MAX && (choice >> 16).is_multiple_of(8) {
        let summary = convert_plan(&plan, destination, &()).inspect_err(|error| drop(error.to_string()))?;
        drop(format!("{summary:?}"));
        let file = ModelFile::open(destination).expect("what was converted opens");
        assert!(file.verify_all(&mut |_| ()).is_empty(), "what was converted is damaged");
        fs::remove_file(destination).expect("the folder can be written");
    }
    Ok(())
}

/// What `convert --dry-run` says of a plan.
fn describe(plan: &Plan) {
    drop((plan.spec().to_json(), plan.extent_bytes(), plan.file_bytes(), plan.source_bytes(), plan.sizes()));
    drop(format!("{:?} {:?} {:?} {:?}", plan.types(), plan.widened(), plan.left_out(), plan.notes()));
    let _ = WeightType::OWN.map(WeightType::name);
}
