//! How `config.json` says that weights are quantised. Tensors say most of it themselves, by their names, types and shapes,
//! and are believed: whatever a tool has left in `quantization_config`, in whatever spelling, refuses nothing that tensors
//! do not have. What they cannot say is read here, where they need it.

use serde_json::Value;

use super::resolve::SCALE_BLOCK;
use crate::error::ConvertError;
use crate::family::config::Config;
use crate::source::{Checkpoint, Dtype};

/// What tensors cannot say themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scheme {
    /// The meaning of `qweight` and `qzeros`; `None`: that of AWQ if their shapes are, and nobody's else.
    pub(crate) columnar: Option<Columnar>,
    /// Rows and columns that share a scale where fp8 has scales by block.
    pub(crate) fp8_block: [usize; 2],
}

impl Default for Scheme {
    fn default() -> Self {
        Scheme { columnar: None, fp8_block: [SCALE_BLOCK; 2] }
    }
}

/// Formats that hold input features as rows and output features as columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Columnar {
    /// AWQ: eight outputs in a word, in an order of their own.
    Awq,
    /// GPTQ: several inputs in a word. The stored zero plus this is the zero: version 1 stores one less.
    Gptq { zero_offset: u8 },
}

/// Reads `quantization_config` of the text model, or of the whole.
pub(crate) fn read(text: &Config, whole: &Config, checkpoint: &Checkpoint) -> Result<Scheme, ConvertError> {
    let has = |end: &str| checkpoint.tensors.iter().any(|t| t.name.ends_with(end));
    // https://github.com/bitsandbytes-foundation/bitsandbytes: codes of four bits have a state beside them.
    if let Some(state) = checkpoint.tensors.iter().find(|t| t.name.contains(".quant_state.bitsandbytes__")) {
        let problem = format!("is of bitsandbytes, whose four-bit tensors are not supported: `{}`", state.name);
        return Err(whole.refuse("quantization_config", problem));
    }
    // MLX writes `quantization` and the same again as `quantization_config` without a method: its tensors say everything.
    if text.has("quantization") || whole.has("quantization") {
        return Ok(Scheme::default());
    }
    let place = if text.has("quantization_config") { text } else { whole };
    let Some(section) = place.object("quantization_config") else { return Ok(Scheme::default()) };
    let mut scheme = Scheme::default();
    if has(".qweight") {
        scheme.columnar = columnar(&section)?;
    }
    if checkpoint.tensors.iter().any(|t| t.dtype == Dtype::F8E4M3) {
        scheme.fp8_block = fp8_block(&section)?.unwrap_or(scheme.fp8_block);
    }
    compressed_tensors(&section, has(".weight_packed"), has(".weight_zero_point"))?;
    Ok(scheme)
}

/// Rows and columns of an fp8 block, where the configuration gives them: one scale per 128×128 elsewhere.
fn fp8_block(section: &Config) -> Result<Option<[usize; 2]>, ConvertError> {
    let Some(block) = section.opt_list("weight_block_size")? else { return Ok(None) };
    let sizes: Vec<u64> = block.iter().filter_map(Value::as_u64).filter(|n| *n > 0).collect();
    match sizes[..] {
        [rows, cols] if block.len() == 2 => Ok(Some([rows, cols].map(|n| usize::try_from(n).unwrap_or(usize::MAX)))),
        _ => {
            let found = Value::from(block.to_vec());
            Err(section
                .refuse("weight_block_size", format!("is {found}, expected two whole numbers such as [128,128]")))
        }
    }
}

/// What the integers of compressed-tensors need said.
fn compressed_tensors(section: &Config, packed: bool, zero_points: bool) -> Result<(), ConvertError> {
    if let Some(transforms) = section.object("transform_config").and_then(|t| t.object("config_groups"))
        && let Some(name) = transforms.names().next()
    {
        return Err(transforms.refuse(name, "rotates activations while the model runs, which is not supported"));
    }
    let Some(groups) = section.object("config_groups").filter(|_| packed) else { return Ok(()) };
    for name in groups.names() {
        let Some(weights) = groups.object(name).and_then(|group| group.object("weights")) else { continue };
        // With zero points, those decide.
        if !zero_points {
            weights.require_bool("symmetric", true)?;
        }
        weights.require_str("type", &["int", "float"])?;
    }
    Ok(())
}

/// AWQ or GPTQ, as the configuration says; the number of bits is in the shapes.
fn columnar(section: &Config) -> Result<Option<Columnar>, ConvertError> {
    let method = section.opt_str("quant_method")?.map(str::to_ascii_lowercase);
    let gptq_only = ["bits", "desc_act", "checkpoint_format"].iter().any(|key| section.has(key));
    match method.as_deref() {
        Some("awq") => {
            let version = section.opt_str("version")?.map(str::to_ascii_lowercase);
            match version.as_deref() {
                None | Some("gemm") => Ok(Some(Columnar::Awq)),
                Some(other) => Err(section.refuse("version", format!("is \"{other}\"; supported: gemm"))),
            }
        }
        Some("gptq") => gptq(section).map(Some),
        _ if gptq_only => gptq(section).map(Some),
        _ => Ok(None),
    }
}

fn gptq(section: &Config) -> Result<Columnar, ConvertError> {
    let format = section.opt_str("checkpoint_format")?.map(str::to_ascii_lowercase);
    match format.as_deref() {
        None | Some("gptq") => Ok(Columnar::Gptq { zero_offset: 1 }),
        Some("gptq_v2") => Ok(Columnar::Gptq { zero_offset: 0 }),
        Some(other) => Err(section.refuse("checkpoint_format", format!("is \"{other}\"; supported: gptq, gptq_v2"))),
    }
}
