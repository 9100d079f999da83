//! The indexer of DeepSeek's sparse attention: keys of `config.json`, and the tensors of a layer.

use sluice_format::limits::{MAX_LENGTH, MAX_WIDTH};
use sluice_format::{IndexerSpec, RopePairing};

use super::decoder::Decoder;
use super::view::View;
use crate::error::ConvertError;

/// Epsilon of the reference's layer norm of index keys.
const KEY_NORM_EPS: f32 = 1e-6;

/// Values for missing keys.
pub(crate) struct Defaults {
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) top_k: usize,
}

/// Reads an indexer that belongs to one layer.
pub(crate) fn read(
    decoder: &Decoder<'_>,
    defaults: &Defaults,
    pairing: RopePairing,
) -> Result<IndexerSpec, ConvertError> {
    let config = decoder.config;
    Ok(IndexerSpec {
        shared: false,
        index_heads: config.size_or("index_n_heads", defaults.heads, MAX_WIDTH)?,
        index_head_dim: config.size_or("index_head_dim", defaults.head_dim, MAX_WIDTH)?,
        index_top_k: config.size_or("index_topk", defaults.top_k, MAX_LENGTH)?,
        pairing,
        key_norm_eps: KEY_NORM_EPS,
    })
}

/// Where a tensor of the indexer comes from; `layer` completes names.
pub(crate) fn origin(layer: &dyn Fn(&str) -> String, name: &str, shape: [usize; 3]) -> View {
    let [_, rows, cols] = shape;
    let tensor = |rest: &str| layer(&format!("self_attn.indexer.{rest}"));
    match name {
        "index_q" => View::whole(tensor("wq_b.weight"), rows, cols),
        "index_k" => View::whole(tensor("wk.weight"), rows, cols),
        "index_k_norm" => View::vector(tensor("k_norm.weight"), cols),
        "index_k_norm_bias" => View::vector(tensor("k_norm.bias"), cols),
        "index_weights" => View::whole(tensor("weights_proj.weight"), rows, cols),
        other => unreachable!("an indexer has no `{other}`"),
    }
}
