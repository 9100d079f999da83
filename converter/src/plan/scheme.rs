//! How `config.json` describes the quantisation of weights. Names, types and shapes of tensors show most of it, and take
//! precedence: entries that a tool left in `quantization_config`, in any spelling, do not matter if no tensor has what they
//! describe. Only what tensors cannot show is read here, if it is needed.

use serde_json::Value;

use crate::encoding::Columnar;
use crate::error::ConvertError;
use crate::family::config::Config;
use crate::fp8::SCALE_BLOCK;
use crate::source::{Checkpoint, Dtype};

/// Files that GPTQ's and AWQ's tools write beside `config.json`.
const COLUMNAR_FILES: [&str; 2] = ["quantize_config.json", "quant_config.json"];

/// What tensors cannot show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scheme {
    /// The meaning of `qweight` and `qzeros`; `None`: AWQ if the shapes are AWQ's, otherwise unknown.
    pub(crate) columnar: Option<Columnar>,
    /// Rows and columns that share a scale, if fp8 has scales by block.
    pub(crate) fp8_block: [usize; 2],
    /// Whether zero points are used, if they are not packed and could be leftovers.
    pub(crate) asymmetric: bool,
    /// Whether the columns of GPTQ's groups may be out of order, as after quantising by activation order.
    pub(crate) act_order: bool,
}

impl Default for Scheme {
    fn default() -> Self {
        Scheme { columnar: None, fp8_block: [SCALE_BLOCK; 2], asymmetric: false, act_order: true }
    }
}

/// If columns are out of order, a tensor must say in which order they are.
fn check_orders(section: &Config, checkpoint: &Checkpoint) -> Result<(), ConvertError> {
    let stems = checkpoint.tensors.iter().filter_map(|t| t.name.strip_suffix(".qweight"));
    match stems.map(|stem| format!("{stem}.g_idx")).find(|name| checkpoint.find(name).is_none()) {
        None => Ok(()),
        Some(name) => {
            let problem = format!(
                "is true, and there is no `{name}` to say which group a column is of: get the checkpoint again"
            );
            Err(section.refuse("desc_act", problem))
        }
    }
}

/// Reads `quantization_config` of the text model, or of the whole file.
pub(crate) fn read(text: &Config, whole: &Config, checkpoint: &Checkpoint) -> Result<Scheme, ConvertError> {
    let has = |end: &str| checkpoint.tensors.iter().any(|t| t.name.ends_with(end));
    // https://github.com/bitsandbytes-foundation/bitsandbytes: codes of four bits have a state beside them.
    if let Some(state) = checkpoint.tensors.iter().find(|t| t.name.contains(".quant_state.bitsandbytes__")) {
        let problem = format!("is of bitsandbytes, whose four-bit tensors are not supported: `{}`", state.name);
        return Err(whole.refuse("quantization_config", problem));
    }
    // MLX writes `quantization`, and the same as `quantization_config` without a method; its tensors show everything.
    if text.has("quantization") || whole.has("quantization") {
        return Ok(Scheme::default());
    }
    let place = if text.has("quantization_config") { text } else { whole };
    let section = place.object("quantization_config");
    let mut scheme = Scheme::default();
    if has(".qweight") {
        let sections = columnar_sections(section.clone(), checkpoint)?;
        scheme.columnar = columnar(&sections)?;
        // Only an explicit value decides: old tools do not write it, but do it.
        let said = sections.iter().find(|s| s.has("desc_act"));
        scheme.act_order = said.map_or(Ok(true), |s| s.bool_or("desc_act", true))?;
        if let Some(said) = said.filter(|_| scheme.act_order) {
            check_orders(said, checkpoint)?;
        }
    }
    let Some(section) = section else { return Ok(scheme) };
    if checkpoint.tensors.iter().any(|t| t.dtype == Dtype::F8E4M3) {
        scheme.fp8_block = fp8_block(&section)?.unwrap_or(scheme.fp8_block);
    }
    let packed = has(".weight_packed");
    scheme.asymmetric = compressed_tensors(&section, packed, has(".weight_zero_point"))?;
    Ok(scheme)
}

/// Rows and columns of an fp8 block, if the configuration gives them; otherwise there is one scale per 128×128.
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

/// The only missing information about the integers of compressed-tensors: whether any of them are asymmetric.
fn compressed_tensors(section: &Config, packed: bool, zero_points: bool) -> Result<bool, ConvertError> {
    if let Some(transforms) = section.object("transform_config").and_then(|t| t.object("config_groups"))
        && let Some(name) = transforms.names().next()
    {
        return Err(transforms.refuse(name, "rotates activations while the model runs, which is not supported"));
    }
    let Some(groups) = section.object("config_groups") else { return Ok(false) };
    let mut asymmetric = false;
    for name in groups.names() {
        let Some(weights) = groups.object(name).and_then(|group| group.object("weights")) else { continue };
        // If necessary zero points are missing, the file is broken; for other forms, the tensors show everything.
        if packed {
            if !zero_points {
                weights.require_bool("symmetric", true)?;
            }
            weights.require_str("type", &["int", "float"])?;
        }
        asymmetric |= weights.bool_or("symmetric", true).is_ok_and(|symmetric| !symmetric);
    }
    Ok(asymmetric)
}

/// Descriptions of columnar formats, in the order of precedence: the configuration, then the file beside it, which tools wrote
/// before the configuration had such a section, and still write.
fn columnar_sections(section: Option<Config>, checkpoint: &Checkpoint) -> Result<Vec<Config>, ConvertError> {
    let mut sections: Vec<Config> = section.into_iter().collect();
    for name in COLUMNAR_FILES {
        if let Some(bytes) = checkpoint.side_file(name)? {
            sections.push(Config::parse(&checkpoint.source().text_path(name), &bytes)?);
        }
    }
    Ok(sections)
}

/// AWQ or GPTQ, according to the first of `sections` that says; the number of bits follows from the shapes.
fn columnar(sections: &[Config]) -> Result<Option<Columnar>, ConvertError> {
    let Some((section, method)) = sections.iter().find_map(|s| Some((s, method(s).transpose()?))) else {
        return Ok(None);
    };
    match method? {
        Method::Awq => {
            let version = lower(section, &["version"])?;
            match version.as_ref().map(|(_, value)| value.as_str()) {
                None | Some("gemm") => Ok(Some(Columnar::Awq)),
                Some(other) => Err(section.refuse("version", format!("is \"{other}\"; supported: gemm"))),
            }
        }
        Method::Gptq => gptq(sections).map(Some),
        Method::AutoRound => auto_round(section).map(Some),
    }
}

/// The tool family that wrote `qweight` and `qzeros`.
#[derive(Clone, Copy)]
enum Method {
    Awq,
    Gptq,
    AutoRound,
}

fn method(section: &Config) -> Result<Option<Method>, ConvertError> {
    // GPTQModel calls it `method`, and keeps the older name beside it; either may be missing.
    let named = lower(section, &["quant_method", "method"])?;
    let gptq_only = ["bits", "desc_act", "checkpoint_format"].iter().any(|key| section.has(key));
    Ok(match named.as_ref().map(|(_, name)| name.as_str()) {
        Some("awq") => Some(Method::Awq),
        Some("gptq") => Some(Method::Gptq),
        Some(name) if name.replace('_', "-").contains("auto-round") => Some(Method::AutoRound),
        _ if gptq_only => Some(Method::Gptq),
        _ => None,
    })
}

fn gptq(sections: &[Config]) -> Result<Columnar, ConvertError> {
    for section in sections {
        // GPTQModel's newer files have `format` instead.
        let Some((key, format)) = lower(section, &["checkpoint_format", "format"])? else { continue };
        return match format.as_str() {
            "gptq" => Ok(Columnar::Gptq { zero_offset: 1 }),
            "gptq_v2" => Ok(Columnar::Gptq { zero_offset: 0 }),
            other => Err(section.refuse(key, format!("is \"{other}\"; supported: gptq, gptq_v2"))),
        };
    }
    Ok(Columnar::Gptq { zero_offset: 1 })
}

/// AutoRound writes the format of GPTQ, that of AWQ, or one of its own, mostly if zero points are not all equal: GPTQ's with
/// unchanged zeros (<https://github.com/intel/auto-round>, `auto_round_extension`: the names of its modules for
/// `auto_round:auto_gptq` end in `_zp`, and the others subtract nothing).
fn auto_round(section: &Config) -> Result<Columnar, ConvertError> {
    Ok(match lower(section, &["packing_format"])? {
        Some((_, format)) if format.contains("awq") => Columnar::Awq,
        Some((_, format)) if format.contains("gptq") => Columnar::Gptq { zero_offset: 1 },
        Some((_, format)) if format.starts_with("auto_round") || format.starts_with("auto-round") => {
            Columnar::Gptq { zero_offset: 0 }
        }
        Some((key, other)) => {
            let problem = format!("is \"{other}\"; supported: auto_round, auto_round:auto_gptq, auto_round:auto_awq");
            return Err(section.refuse(key, problem));
        }
        None => Columnar::Gptq { zero_offset: 1 },
    })
}

/// The text under the first of `keys` that has one, in lower case, because tools differ in case.
fn lower<'k>(section: &Config, keys: &[&'k str]) -> Result<Option<(&'k str, String)>, ConvertError> {
    for &key in keys {
        if let Some(text) = section.opt_str(key)? {
            return Ok(Some((key, text.to_ascii_lowercase())));
        }
    }
    Ok(None)
}
