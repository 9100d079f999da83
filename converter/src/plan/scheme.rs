//! How `config.json` says that weights are quantised. Tensors say most of it themselves, by their names, types and shapes,
//! and are believed; what they cannot say is read here, and what this program cannot read is refused by name.

use serde_json::Value;

use crate::error::ConvertError;
use crate::family::config::Config;

/// What tensors cannot say themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scheme {
    /// The meaning of `qweight` and `qzeros`.
    pub(crate) columnar: Option<Columnar>,
}

/// Formats that hold input features as rows and output features as columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Columnar {
    /// AWQ: eight outputs in a word, in an order of their own.
    Awq,
    /// GPTQ: eight inputs in a word. The stored zero plus this is the zero: version 1 stores one less.
    Gptq { zero_offset: u8 },
}

/// Values of `quant_method`.
const METHODS: [&str; 6] = ["fp8", "compressed-tensors", "mxfp4", "modelopt", "awq", "gptq"];
/// Values of `format` of compressed-tensors.
const COMPRESSED: [&str; 6] =
    ["pack-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision", "dense"];

/// Reads `quantization_config` of the text model, or of the whole.
pub(crate) fn read(text: &Config, whole: &Config) -> Result<Scheme, ConvertError> {
    // MLX writes `quantization` and the same again as `quantization_config` without a method: its tensors say everything.
    if text.section("quantization")?.is_some() || whole.section("quantization")?.is_some() {
        return Ok(Scheme::default());
    }
    let section = match text.section("quantization_config")? {
        Some(section) => Some(section),
        None => whole.section("quantization_config")?,
    };
    let Some(section) = section else { return Ok(Scheme::default()) };
    section.require_str("quant_method", &METHODS)?;
    let method = section
        .opt_str("quant_method")?
        .ok_or_else(|| section.refuse("quant_method", format!("is missing; supported: {}", METHODS.join(", "))))?;
    match method {
        "fp8" => fp8(&section)?,
        "compressed-tensors" => compressed_tensors(&section)?,
        "modelopt" => section.require_str("quant_algo", &["NVFP4", "FP8"])?,
        "awq" | "gptq" => return four_bits(&section, method).map(|c| Scheme { columnar: Some(c) }),
        _ => {}
    }
    Ok(Scheme::default())
}

fn fp8(section: &Config) -> Result<(), ConvertError> {
    section.require_str("fmt", &["e4m3", "float8_e4m3fn"])?;
    match section.opt_list("weight_block_size")? {
        Some(block) if block != [Value::from(128), Value::from(128)] => {
            let found = Value::from(block.to_vec());
            Err(section.refuse("weight_block_size", format!("is {found}; only [128,128] is supported")))
        }
        _ => Ok(()),
    }
}

fn compressed_tensors(section: &Config) -> Result<(), ConvertError> {
    section.require_str("format", &COMPRESSED)?;
    let Some(groups) = section.section("config_groups")? else { return Ok(()) };
    for name in groups.names() {
        let Some(weights) = groups.section(name)?.map(|g| g.section("weights")).transpose()?.flatten() else {
            continue;
        };
        weights.require_bool("symmetric", true)?;
        weights.require_str("type", &["int", "float"])?;
    }
    Ok(())
}

fn four_bits(section: &Config, method: &str) -> Result<Columnar, ConvertError> {
    if section.usize_or("bits", 4)? != 4 {
        return Err(
            section.refuse("bits", format!("is {}; {method} is supported with 4", section.usize_or("bits", 4)?))
        );
    }
    if method == "awq" {
        section.require_str("version", &["gemm"])?;
        return Ok(Columnar::Awq);
    }
    section.require_str("checkpoint_format", &["gptq", "gptq_v2"])?;
    let second = section.opt_str("checkpoint_format")? == Some("gptq_v2");
    Ok(Columnar::Gptq { zero_offset: u8::from(!second) })
}
