//! Rotary position embedding, in the spelling of both generations of configuration files.

use sluice_format::limits::MAX_LENGTH;
use sluice_format::{RopePairing, RopeScaling, RopeSpec};

use super::config::Config;
use crate::error::ConvertError;

/// Numbers of rotations within the original context, if the configuration has none: above the first, a frequency stays unchanged;
/// below the second, it is divided by the factor (arXiv:2309.00071, section 3.2).
const BETA_FAST: f64 = 32.0;
const BETA_SLOW: f64 = 1.0;

/// The kind of rotation that this program's own reader of GGUF files writes: a list `divisors`.
pub(crate) const DIVIDED: &str = "divided";

/// The rotation in a configuration.
pub(crate) struct Rope {
    /// The rotation.
    pub(crate) spec: RopeSpec,
    /// YaRN's magnitude factor from `mscale_all_dim`; latent attention scales its scores by its square. Otherwise 1.
    pub(crate) score_mscale: f64,
}

/// Rotated elements of a head of `head_dim` elements: the fraction `partial_rotary_factor`, rounded down.
pub(crate) fn width(config: &Config, head_dim: usize, default_factor: f64) -> Result<usize, ConvertError> {
    let outer = config.opt_f64("partial_rotary_factor")?.unwrap_or(default_factor);
    let (place, factor) = match config.section("rope_parameters")? {
        Some(section) => {
            let factor = section.opt_f64("partial_rotary_factor")?.unwrap_or(outer);
            (section, factor)
        }
        None => return checked_width(config, head_dim, outer),
    };
    checked_width(&place, head_dim, factor)
}

fn checked_width(config: &Config, head_dim: usize, factor: f64) -> Result<usize, ConvertError> {
    part(config, "partial_rotary_factor", head_dim, factor)
}

/// The fraction `factor` of `head_dim` elements, rounded down; `key` is its key.
pub(crate) fn part(config: &Config, key: &str, head_dim: usize, factor: f64) -> Result<usize, ConvertError> {
    if !(factor > 0.0 && factor <= 1.0) {
        return Err(config.refuse(key, format!("is {factor}, expected more than 0 and at most 1")));
    }
    let width = (head_dim as f64 * factor) as usize;
    if width == 0 || !width.is_multiple_of(2) {
        let problem = format!("is {factor}: {width} of the {head_dim} elements of a head, which do not make pairs");
        return Err(config.refuse(key, problem));
    }
    Ok(width)
}

/// Refuses an odd number of rotated elements under `key`, because they are rotated in pairs.
pub(crate) fn check_even(config: &Config, key: &str, width: usize) -> Result<(), ConvertError> {
    if width.is_multiple_of(2) {
        Ok(())
    } else {
        Err(config.refuse(key, format!("is {width}, expected an even number")))
    }
}

/// Reads the rotation of `dim` elements. Newer files have everything in `rope_parameters`, older ones `rope_theta` and
/// `rope_scaling`. If a file has both, they must agree. A `rope_theta` in a section takes precedence over one beside it.
pub(crate) fn read(
    config: &Config,
    dim: usize,
    pairing: RopePairing,
    default_theta: f64,
    max_positions: usize,
) -> Result<Rope, ConvertError> {
    let outer_theta = config.opt_f64("rope_theta")?.unwrap_or(default_theta);
    config.check_above("rope_theta", outer_theta, 1.0)?;
    let section = match (config.section("rope_parameters")?, config.section("rope_scaling")?) {
        (Some(section), Some(older)) => {
            // transformers uses the older one: it was added to a newer file on purpose.
            older.check_repeats(&section, "rope_parameters")?;
            Some(section)
        }
        (section, older) => section.or(older),
    };
    let Some(section) = section else {
        let spec = RopeSpec { pairing, theta: outer_theta, dim, scaling: RopeScaling::None };
        return Ok(Rope { spec, score_mscale: 1.0 });
    };
    for kind in ["full_attention", "sliding_attention"] {
        if section.section(kind)?.is_some() {
            return Err(
                section.refuse(kind, "gives a layer type its own rotation; only one for all layers is supported")
            );
        }
    }
    of_section(&section, dim, pairing, outer_theta, max_positions)
}

/// The rotation that a section describes. `outer_theta`: the base if the section has none.
pub(crate) fn of_section(
    section: &Config,
    dim: usize,
    pairing: RopePairing,
    outer_theta: f64,
    max_positions: usize,
) -> Result<Rope, ConvertError> {
    let theta = section.opt_f64("rope_theta")?.unwrap_or(outer_theta);
    section.check_above("rope_theta", theta, 1.0)?;
    // `type` is the older name of `rope_type`.
    let (key, kind) = match section.opt_str("rope_type")? {
        Some(kind) => ("rope_type", kind),
        None => ("type", section.opt_str("type")?.unwrap_or("default")),
    };
    let (scaling, score_mscale) = match kind {
        "default" => (RopeScaling::None, 1.0),
        "dynamic" if section.has("alpha") => {
            let spec = RopeSpec { pairing, theta: stretched(section, theta, dim)?, dim, scaling: RopeScaling::None };
            return Ok(Rope { spec, score_mscale: 1.0 });
        }
        "linear" => (linear(section)?, 1.0),
        "yarn" => yarn(section, max_positions)?,
        "llama3" => (llama3(section, max_positions)?, 1.0),
        "longrope" | "su" => (longrope(section, dim, max_positions)?, 1.0),
        // Only from GGUF files, which do not say how their divisors were computed.
        DIVIDED => (RopeScaling::Divided { divisors: divisors(section, "divisors", dim)?, attention_factor: 1.0 }, 1.0),
        other => {
            let problem = format!("is \"{other}\"; supported: default, linear, yarn, llama3, longrope");
            return Err(section.refuse(key, problem));
        }
    };
    Ok(Rope { spec: RopeSpec { pairing, theta, dim, scaling }, score_mscale })
}

fn linear(section: &Config) -> Result<RopeScaling, ConvertError> {
    let factor = section.opt_f64("factor")?.ok_or_else(|| section.refuse("factor", "is missing"))?;
    Ok(RopeScaling::Linear { factor: section.check_above("factor", factor, 0.0)? })
}

/// LongRoPE (arXiv:2402.13753), which has divisors for the context of the training and others for a longer one. Keys in a cache
/// cannot be rotated again when a sequence grows beyond the first, so the configured context decides, as in vLLM: if
/// `max_position_embeddings` is not longer than the original context, the short divisors are used.
fn longrope(section: &Config, dim: usize, max_positions: usize) -> Result<RopeScaling, ConvertError> {
    let original = "original_max_position_embeddings";
    let trained =
        section.opt_size_or(original, None, MAX_LENGTH)?.ok_or_else(|| section.refuse(original, "is missing"))?;
    let extended = max_positions > trained;
    let [list, factor] = if extended { ["long_factor", "long_mscale"] } else { ["short_factor", "short_mscale"] };
    let usual = match extended {
        true => (1.0 + (max_positions as f64 / trained as f64).ln() / (trained as f64).ln()).sqrt(),
        false => 1.0,
    };
    let explicit = section.opt_f64(factor)?.or(section.opt_f64("attention_factor")?);
    let attention_factor = section.check_above(factor, explicit.unwrap_or(usual), 0.0)?;
    Ok(RopeScaling::Divided { divisors: divisors(section, list, dim)?, attention_factor })
}

/// A list with one divisor for each pair of rotated elements.
fn divisors(section: &Config, key: &str, dim: usize) -> Result<Vec<f32>, ConvertError> {
    let list = section.opt_list(key)?.unwrap_or_default();
    if list.len() != dim / 2 {
        let problem = format!("has {} numbers for {dim} rotated elements, expected one for each two", list.len());
        return Err(section.refuse(key, problem));
    }
    let number = |value: &serde_json::Value| {
        let number = value.as_f64().map(|n| n as f32).filter(|n| n.is_normal() && *n > 0.0);
        number.ok_or_else(|| section.refuse(key, format!("holds {value}, expected positive numbers")))
    };
    list.iter().map(number).collect()
}

fn yarn(section: &Config, max_positions: usize) -> Result<(RopeScaling, f64), ConvertError> {
    let positive = |key: &str, value: f64| section.check_above(key, value, 0.0);
    let original = section.opt_size_or("original_max_position_embeddings", None, MAX_LENGTH)?;
    // Without a factor, the given context is the extended one.
    let factor = match (section.opt_f64("factor")?, original) {
        (Some(factor), _) => factor,
        (None, Some(original)) => max_positions as f64 / original as f64,
        (None, None) => return Err(section.refuse("factor", "is missing")),
    };
    positive("factor", factor)?;
    let set = |v: Option<f64>| v.filter(|&v| v != 0.0);
    let mscale = set(section.opt_f64("mscale")?);
    let mscale_all_dim = set(section.opt_f64("mscale_all_dim")?);
    let attention_factor = match (section.opt_f64("attention_factor")?, mscale, mscale_all_dim) {
        (Some(explicit), _, _) => explicit,
        (None, Some(m), Some(all)) => magnitude(factor, m) / magnitude(factor, all),
        (None, _, _) => magnitude(factor, 1.0),
    };
    let scaling = RopeScaling::Yarn {
        factor,
        original_max_positions: original.unwrap_or(max_positions),
        beta_fast: positive("beta_fast", set(section.opt_f64("beta_fast")?).unwrap_or(BETA_FAST))?,
        beta_slow: positive("beta_slow", set(section.opt_f64("beta_slow")?).unwrap_or(BETA_SLOW))?,
        truncate: section.bool_or("truncate", true)?,
        attention_factor: positive("attention_factor", attention_factor)?,
    };
    Ok((scaling, mscale_all_dim.map_or(1.0, |m| magnitude(factor, m))))
}

/// YaRN with only its extension factor given.
pub(crate) fn untruncated_yarn(factor: f64, original_max_positions: usize) -> RopeScaling {
    RopeScaling::Yarn {
        factor,
        original_max_positions,
        beta_fast: BETA_FAST,
        beta_slow: BETA_SLOW,
        truncate: false,
        attention_factor: magnitude(factor, 1.0),
    }
}

/// Hunyuan's scaling, which a fixed `alpha` makes independent of the context: `theta · alpha^(dim / (dim − 2))`.
fn stretched(section: &Config, theta: f64, dim: usize) -> Result<f64, ConvertError> {
    let alpha = section.check_above("alpha", section.f64_or("alpha", 1.0)?, 0.0)?;
    if dim <= 2 {
        return Err(section.refuse("alpha", format!("stretches nothing where {dim} elements turn")));
    }
    section.check_above("alpha", theta * alpha.powf(dim as f64 / (dim as f64 - 2.0)), 1.0)
}

fn llama3(section: &Config, max_positions: usize) -> Result<RopeScaling, ConvertError> {
    let number = |key: &str, least: f64| {
        let value = section.opt_f64(key)?.ok_or_else(|| section.refuse(key, "is missing"))?;
        section.check_above(key, value, least)
    };
    let original = section.opt_size_or("original_max_position_embeddings", None, MAX_LENGTH)?;
    let low_freq_factor = number("low_freq_factor", 0.0)?;
    // If both are the same, as in Llama 4 Scout, there is nothing between them.
    let high_freq_factor = number("high_freq_factor", 0.0)?;
    if high_freq_factor < low_freq_factor {
        let problem = format!("is {high_freq_factor}, expected {low_freq_factor} or more, as `low_freq_factor` is");
        return Err(section.refuse("high_freq_factor", problem));
    }
    Ok(RopeScaling::Llama3 {
        factor: number("factor", 0.0)?,
        original_max_positions: original.unwrap_or(max_positions),
        low_freq_factor,
        high_freq_factor,
    })
}

/// YaRN's growth of the attention logits with the extension factor (arXiv:2309.00071, section 3.4).
fn magnitude(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
