//! How `config.json` says that weights are quantised. Tensors say most of it themselves, by their names, types and shapes,
//! and are believed: whatever a tool has left in `quantization_config`, in whatever spelling, refuses nothing that tensors
//! do not have. What they cannot say is read here, where they need it.

use serde_json::Value;

use crate::encoding::Columnar;
use crate::error::ConvertError;
use crate::family::config::Config;
use crate::fp8::SCALE_BLOCK;
use crate::source::{Checkpoint, Dtype};

/// What GPTQ's and AWQ's tools write beside `config.json`.
const COLUMNAR_FILES: [&str; 2] = ["quantize_config.json", "quant_config.json"];

/// What tensors cannot say themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scheme {
    /// The meaning of `qweight` and `qzeros`; `None`: that of AWQ if their shapes are, and nobody's else.
    pub(crate) columnar: Option<Columnar>,
    /// Rows and columns that share a scale where fp8 has scales by block.
    pub(crate) fp8_block: [usize; 2],
    /// Whether zero points count, where they are not packed and could just as well be left over.
    pub(crate) asymmetric: bool,
    /// Whether GPTQ's groups may be in disorder, as quantising by activation order leaves them.
    pub(crate) act_order: bool,
}

impl Default for Scheme {
    fn default() -> Self {
        Scheme { columnar: None, fp8_block: [SCALE_BLOCK; 2], asymmetric: false, act_order: true }
    }
}

/// Where columns are in disorder, something must say in which.
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
    let section = place.object("quantization_config");
    let mut scheme = Scheme::default();
    if has(".qweight") {
        let sections = columnar_sections(section.clone(), checkpoint)?;
        scheme.columnar = columnar(&sections)?;
        // Only what is said counts: old tools do not say it and do it.
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

/// What the integers of compressed-tensors need said: whether any of them are asymmetric.
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
        // What has no zero points where they are needed is broken; of other forms, the tensors say all.
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

/// Where columnar formats are described, in the order of trust: the configuration, and the file that tools wrote beside it
/// before it had such a section, and still write.
fn columnar_sections(section: Option<Config>, checkpoint: &Checkpoint) -> Result<Vec<Config>, ConvertError> {
    let mut sections: Vec<Config> = section.into_iter().collect();
    for name in COLUMNAR_FILES {
        if let Some(bytes) = checkpoint.side_file(name)? {
            sections.push(Config::parse(&checkpoint.source().text_path(name), &bytes)?);
        }
    }
    Ok(sections)
}

/// AWQ or GPTQ, as the first of `sections` that tells says; the number of bits is in the shapes.
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

/// Who made `qweight` and `qzeros`.
#[derive(Clone, Copy)]
enum Method {
    Awq,
    Gptq,
    AutoRound,
}

fn method(section: &Config) -> Result<Option<Method>, ConvertError> {
    // GPTQModel calls it `method` and keeps the older name beside it; either may be what is left.
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
        // GPTQModel's newer files say `format`.
        let Some((key, format)) = lower(section, &["checkpoint_format", "format"])? else { continue };
        return match format.as_str() {
            "gptq" => Ok(Columnar::Gptq { zero_offset: 1 }),
            "gptq_v2" => Ok(Columnar::Gptq { zero_offset: 0 }),
            other => Err(section.refuse(key, format!("is \"{other}\"; supported: gptq, gptq_v2"))),
        };
    }
    Ok(Columnar::Gptq { zero_offset: 1 })
}

/// AutoRound writes the format of GPTQ, the format of AWQ, or, above all where zero points are not all alike, one of its own:
/// that of GPTQ with the zeros as they are (<https://github.com/intel/auto-round>, `auto_round_extension`: its modules for
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

/// The text under the first of `keys` that has one, in lower case: tools differ there.
fn lower<'k>(section: &Config, keys: &[&'k str]) -> Result<Option<(&'k str, String)>, ConvertError> {
    for &key in keys {
        if let Some(text) = section.opt_str(key)? {
            return Ok(Some((key, text.to_ascii_lowercase())));
        }
    }
    Ok(None)
}
