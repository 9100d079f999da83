//! Rotary position embedding in GGUF: keys, and for Llama 3 a tensor of factors.

use serde_json::{Value as Json, json};

use super::keys::Keys;
use super::metadata::Problem;
use crate::family::DIVIDED_ROPE as DIVIDED;

/// The default, as in llama.cpp.
const THETA: f64 = 10_000.0;
/// Wavelengths, in original contexts, between which Llama 3 blends: the values of all published models.
const LLAMA3_LOW: f64 = 1.0;
const LLAMA3_HIGH: f64 = 4.0;
/// The relative difference between a factor and the result of the parameters that counts as rounding.
const LLAMA3_TOLERANCE: f64 = 1e-4;
/// A factor this near to one counts as one.
const NEAR: f64 = 1e-5;

/// The inputs for the configuration's `rope_parameters`.
pub(super) struct Rope {
    /// Rotated elements of a head.
    pub(super) dim: u64,
    /// Width of a head.
    pub(super) head_dim: u64,
    /// Whether `mscale_all_dim` gives YaRN's `mscale`, as in DeepSeek's models.
    pub(super) mscale: bool,
    /// Whether YaRN rounds the borders of its ramp: gpt-oss does not, but files do not say so.
    pub(super) truncate: bool,
}

/// Reads the rotation as llama.cpp does, where scaling without a type is linear. `factors` are the contents of `rope_freqs.weight`,
/// which divide the frequencies.
pub(super) fn read(keys: &Keys<'_>, rope: &Rope, factors: Option<&[f32]>) -> Result<Json, Problem> {
    let theta = keys.float("rope.freq_base")?.unwrap_or(THETA);
    let mut out = json!({ "rope_theta": theta, "rope_type": "default" });
    if rope.dim != rope.head_dim {
        out["partial_rotary_factor"] = partial(keys, rope)?.into();
    }
    let kind = keys.metadata.text(&keys.key("rope.scaling.type"))?.unwrap_or("linear");
    let factor = keys.float("rope.scaling.factor")?;
    match (kind, factors) {
        ("none" | "linear", _) => {
            // `scale_linear` is the older name of the factor; 0 means none.
            let linear = factor.or(keys.float("rope.scale_linear")?);
            let linear = linear.filter(|&f| kind == "linear" && f != 0.0 && f != 1.0);
            if let Some(factors) = factors {
                let all: Vec<f32> = factors.iter().map(|f| f * linear.unwrap_or(1.0) as f32).collect();
                by_factors(&mut out, theta, &all)?;
            } else if let Some(factor) = linear {
                out["rope_type"] = "linear".into();
                out["factor"] = factor.into();
            }
        }
        ("yarn", None) => yarn(keys, rope, factor, &mut out)?,
        (other, _) => {
            let of_factors = if factors.is_some() { " with `rope_freqs.weight`" } else { "" };
            let problem =
                format!("is \"{other}\"{of_factors}; supported: none, linear, yarn, and factors of frequencies");
            return Err(keys.refuse("rope.scaling.type", problem));
        }
    }
    Ok(out)
}

/// What the factors of `rope_freqs.weight` mean: Llama 3's parameters if they match, otherwise the factors themselves.
fn by_factors(out: &mut Json, theta: f64, factors: &[f32]) -> Result<(), Problem> {
    if let Some(bad) = factors.iter().find(|f| !(f.is_normal() && **f > 0.0)) {
        return Err(Problem::new("rope_freqs.weight", format!("holds {bad}, expected positive numbers")));
    }
    if !llama3(out, theta, factors) {
        out["rope_type"] = DIVIDED.into();
        out["divisors"] = factors.into();
    }
    Ok(())
}

/// The rotated fraction of a head, chosen so that multiplying and rounding down give the same number of elements.
fn partial(keys: &Keys<'_>, rope: &Rope) -> Result<f64, Problem> {
    let (dim, head_dim) = (rope.dim as f64, rope.head_dim as f64);
    if rope.dim == 0 || rope.dim > rope.head_dim {
        let problem = format!("is {}, and a head has {} elements", rope.dim, rope.head_dim);
        return Err(keys.refuse("rope.dimension_count", problem));
    }
    let plain = dim / head_dim;
    Ok(if (plain * head_dim).floor() == dim { plain } else { (dim + 0.5) / head_dim })
}

fn yarn(keys: &Keys<'_>, rope: &Rope, factor: Option<f64>, out: &mut Json) -> Result<(), Problem> {
    let factor = factor.ok_or_else(|| keys.refuse("rope.scaling.factor", "is missing"))?;
    out["rope_type"] = "yarn".into();
    out["factor"] = factor.into();
    if let Some(original) = keys.uint("rope.scaling.original_context_length")? {
        out["original_max_position_embeddings"] = original.into();
    }
    for (end, key) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
        if let Some(beta) = keys.float(&format!("rope.scaling.{end}"))? {
            out[key] = beta.into();
        }
    }
    const EXTENSION: &str = "rope.scaling.yarn_ext_factor";
    if let Some(other) = keys.float(EXTENSION)?.filter(|&f| f != 1.0) {
        return Err(keys.refuse(EXTENSION, format!("is {other}; only 1 is supported")));
    }
    if let Some(attention) = keys.float("rope.scaling.yarn_attn_factor")? {
        out["attention_factor"] = attention.into();
    }
    if !rope.truncate {
        out["truncate"] = false.into();
    }
    // llama.cpp's converter writes a tenth of `mscale_all_dim` for DeepSeek's models, which all have the same value for
    // `mscale`.
    match keys.float("rope.scaling.yarn_log_multiplier")?.filter(|&m| m != 0.0) {
        Some(tenth) if rope.mscale => {
            let mscale = (tenth * 10.0 * 1e6).round() / 1e6;
            out["mscale"] = mscale.into();
            out["mscale_all_dim"] = mscale.into();
        }
        // Mistral's: the factor of the attention is that of 1 divided by that of this value.
        Some(mscale) => {
            let magnitude = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
            out["attention_factor"] = (magnitude(1.0) / magnitude(mscale)).into();
        }
        None => {}
    }
    Ok(())
}

/// The `high` of Llama 3's formula, if it differs from that of all Llama models. It follows from two blended factors, because `s`
/// is linear in the inverse wavelength, and the line goes through `−1/(high − 1)`.
fn fitted_high(blended: &[(f64, f64)], smooth: impl Fn(f64) -> f64) -> Option<f64> {
    let [(first, first_factor), .., (last, last_factor)] = *blended else { return None };
    let (first_s, last_s) = (smooth(first_factor), smooth(last_factor));
    let slope = (last_s - first_s) / (1.0 / last - 1.0 / first);
    let high = 1.0 - 1.0 / (first_s - slope / first);
    (high.is_finite() && high > LLAMA3_LOW).then_some((high * 1e3).round() / 1e3)
}

/// Finds the parameters of Llama 3 that give these factors: 1 for short wavelengths, the whole factor for long ones, and between
/// them `1/((1 − s)/factor + s)` with `s = (L/wavelength − low)/(high − low)`. Only the ratios of `L`, `low` and `high` matter.
/// `false`: there are none.
fn llama3(out: &mut Json, theta: f64, factors: &[f32]) -> bool {
    let factor = factors.iter().fold(1.0f32, |a, &b| a.max(b));
    if factors.iter().any(|f| *f < 1.0 - NEAR as f32) {
        return false;
    }
    let factor = f64::from(factor);
    if factor <= 1.0 + NEAR {
        return true;
    }
    let pairs = factors.len() as f64;
    let wavelength = |i: usize| std::f64::consts::TAU * theta.powf(i as f64 / pairs);
    let all = || factors.iter().enumerate().map(|(i, &f)| (wavelength(i), f64::from(f)));
    let blended = |(_, f): &(f64, f64)| *f > 1.0 + NEAR && *f < factor * (1.0 - NEAR);
    // `s` from its factor, and from that `L`, because low is 1 and high is 4 in all published models.
    let smooth = |f: f64| (1.0 / f - 1.0 / factor) / (1.0 - 1.0 / factor);
    let blended: Vec<(f64, f64)> = all().filter(blended).collect();
    let candidates = [Some(LLAMA3_HIGH), fitted_high(&blended, smooth)];
    candidates.into_iter().flatten().any(|high| llama3_of(out, &all().collect::<Vec<_>>(), &blended, factor, high))
}

/// The same with a given `high`. `all` are wavelengths with their factors, `blended` those with factors other than 1 and `factor`.
fn llama3_of(out: &mut Json, all: &[(f64, f64)], blended: &[(f64, f64)], factor: f64, high: f64) -> bool {
    let all = || all.iter().copied();
    let smooth = |f: f64| (1.0 / f - 1.0 / factor) / (1.0 - 1.0 / factor);
    let length = |(wave, f): (f64, f64)| (smooth(f) * (high - LLAMA3_LOW) + LLAMA3_LOW) * wave;
    let lengths: Vec<f64> = blended.iter().copied().map(length).collect();
    let original = if lengths.is_empty() {
        // Nothing is blended: any length between the longest kept wavelength and the shortest changed one works.
        let kept = all().filter(|(_, f)| *f <= 1.0 + NEAR).map(|(wave, _)| wave * high).fold(1.0, f64::max);
        let divided = all().filter(|(_, f)| *f > 1.0 + NEAR).map(|(wave, _)| wave * LLAMA3_LOW);
        (kept * divided.fold(f64::INFINITY, f64::min)).sqrt()
    } else {
        lengths.iter().sum::<f64>() / lengths.len() as f64
    };
    let original = original.round().max(1.0);
    let factor = (factor * 1e4).round() / 1e4;
    let expected = |wave: f64| {
        let s = (original / wave - LLAMA3_LOW) / (high - LLAMA3_LOW);
        if wave > original / LLAMA3_LOW {
            factor
        } else if wave < original / high {
            1.0
        } else {
            1.0 / ((1.0 - s) / factor + s)
        }
    };
    if all().any(|(wave, f)| (expected(wave) / f - 1.0).abs() > LLAMA3_TOLERANCE) {
        return false;
    }
    out["rope_type"] = "llama3".into();
    out["factor"] = factor.into();
    out["low_freq_factor"] = LLAMA3_LOW.into();
    out["high_freq_factor"] = high.into();
    out["original_max_position_embeddings"] = (original as u64).into();
    true
}
