//! GLM-5 to 5.3: latent attention with an indexer that some layers share.

use sluice_format::{AttentionSpec, IndexerSpec, LayerSpec, MlaSpec, ModelSpec, RopePairing};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::{Family, indexer, mla, moe};
use crate::error::ConvertError;

/// The family.
pub(crate) struct GlmMoeDsa;

const DEFAULTS: Defaults = Defaults {
    vocab: 154_880,
    hidden: 6144,
    intermediate: 12_288,
    layers: 78,
    heads: 64,
    kv_heads: Some(64),
    max_positions: 202_752,
    norm_eps: 1e-5,
    theta: 1e4,
};

const LATENT: mla::Defaults =
    mla::Defaults { q_lora_rank: 2048, qk_nope_head_dim: 192, v_head_dim: 256, ..mla::Defaults::DEEPSEEK };

const INDEXER: indexer::Defaults = indexer::Defaults { heads: 32, head_dim: 128, top_k: 2048 };

const EXPERTS: moe::Defaults =
    moe::Defaults { experts: 256, top_k: 8, width: 2048, shared: 1, groups: 1, groups_kept: 1, scale: 2.5 };

impl Family for GlmMoeDsa {
    fn model_types(&self) -> &'static [&'static str] {
        &["glm_moe_dsa"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let half = !config.bool_or("indexer_rope_interleave", true)?;
        let pairing = if half { RopePairing::Half } else { RopePairing::Interleaved };
        let indexer = indexer::read(&decoder, &INDEXER, pairing)?;
        let latent = mla::read(&decoder, &LATENT)?;
        let sparse = moe::deepseek_v3(&decoder, &EXPERTS)?;
        let is_sparse = moe::after_dense(&decoder, 3)?;
        let mut model = decoder.uniform(AttentionSpec::Mla(latent.clone()), &sparse, &is_sparse)?;
        for (layer, full) in model.layers.iter_mut().zip(full_layers(&decoder)?) {
            let indexer = Some(IndexerSpec { shared: !full, ..indexer.clone() });
            layer.attention = AttentionSpec::Mla(MlaSpec { indexer, ..latent.clone() });
        }
        Ok(model)
    }

    fn prediction(&self, decoder: &ModelSpec) -> Option<LayerSpec> {
        let mut layer = decoder.layers.last()?.clone();
        if let AttentionSpec::Mla(mla) = &mut layer.attention {
            // It gets other states than the layers before it, and therefore chooses itself.
            mla.indexer.iter_mut().for_each(|indexer| indexer.shared = false);
        }
        Some(layer)
    }
}

/// Which layers have an indexer of their own: as a list says, or a pattern of letters, or every `index_topk_freq`-th; all of them
/// if there is no such key.
fn full_layers(decoder: &Decoder<'_>) -> Result<Vec<bool>, ConvertError> {
    let config = decoder.config;
    if let Some(list) = decoder.layer_list("indexer_types", ["full", "shared"])? {
        return Ok(list);
    }
    if let Some(pattern) = config.opt_str("index_topk_pattern")? {
        let known = pattern.len() == decoder.layers && pattern.bytes().all(|b| matches!(b, b'F' | b'S'));
        if !known {
            let problem = format!("is {pattern:?}, expected one F or S for each of {} layers", decoder.layers);
            return Err(config.refuse("index_topk_pattern", problem));
        }
        return Ok(pattern.bytes().map(|b| b == b'F').collect());
    }
    let every = config.opt_usize_or("index_topk_freq", None)?.unwrap_or(1);
    if every == 0 {
        return Err(config.refuse("index_topk_freq", "is 0, expected 1 or more"));
    }
    let offset = config.opt_usize_or("index_skip_topk_offset", None)?.unwrap_or(2);
    Ok((0..decoder.layers).map(|layer| (layer + 1).saturating_sub(offset) % every == 0).collect())
}
