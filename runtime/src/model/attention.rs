//! The token mixer of a layer, whichever it is.

use sluice_format::AttentionSpec;
use sluice_kernels::KvType;

use super::ModelError;
use super::compute::Compute;
use super::delta::{self, Delta, DeltaScratch, DeltaState};
use super::gqa::{self, Gqa, GqaScratch, KeyValueCache};
use super::mla::{self, LatentCache, Mla, MlaScratch};
use super::weights::ExtentTensors;

/// The token mixer of one layer.
#[derive(Debug)]
pub enum Attention {
    /// Multi-head latent attention.
    Mla(Box<Mla>),
    /// Grouped-query attention.
    Gqa(Gqa),
    /// Gated delta net.
    Delta(Delta),
}

/// What one layer remembers of the tokens of one session.
#[derive(Clone, Debug)]
pub enum LayerCache {
    /// Latents and rotated keys.
    Latent(LatentCache),
    /// Keys and values.
    KeyValue(KeyValueCache),
    /// A recurrent state.
    State(DeltaState),
}

/// Buffers that attention reuses from call to call.
#[derive(Debug)]
pub struct AttentionScratch {
    mla: MlaScratch,
    gqa: GqaScratch,
    delta: DeltaScratch,
}

impl AttentionScratch {
    /// Empty buffers; they grow to what the first call needs.
    pub fn new(compute: &Compute) -> Self {
        AttentionScratch {
            mla: MlaScratch::new(compute),
            gqa: GqaScratch::new(compute),
            delta: DeltaScratch::new(compute),
        }
    }
}

impl LayerCache {
    /// An empty cache for `max_tokens` positions, with keys and values of type `ty`. A recurrent state is always f32: it
    /// does not grow with the context, and its errors would add up.
    pub fn new(spec: &AttentionSpec, max_tokens: usize, ty: KvType) -> Self {
        match spec {
            AttentionSpec::Mla(m) => LayerCache::Latent(LatentCache::new(m, max_tokens, ty)),
            AttentionSpec::Gqa(g) => LayerCache::KeyValue(KeyValueCache::new(g, max_tokens, ty)),
            AttentionSpec::Delta(d) => LayerCache::State(DeltaState::new(d)),
        }
    }

    /// Bytes that are allocated.
    pub fn bytes(&self) -> usize {
        match self {
            LayerCache::Latent(cache) => cache.bytes(),
            LayerCache::KeyValue(cache) => cache.bytes(),
            LayerCache::State(state) => state.bytes(),
        }
    }

    /// Bytes of a cache for `max_tokens` positions.
    pub fn memory(spec: &AttentionSpec, max_tokens: usize, ty: KvType) -> u64 {
        let per_token = match spec {
            AttentionSpec::Mla(m) => mla::cache_bytes(m, ty),
            AttentionSpec::Gqa(g) => gqa::cache_bytes(g, ty),
            AttentionSpec::Delta(d) => return delta::state_memory(d),
        };
        (per_token as u64).saturating_mul(max_tokens as u64)
    }
}

/// f32 values of scratch per token.
pub fn scratch_width(spec: &AttentionSpec) -> usize {
    match spec {
        AttentionSpec::Mla(m) => mla::scratch_width(m),
        AttentionSpec::Gqa(g) => gqa::scratch_width(g),
        AttentionSpec::Delta(d) => delta::scratch_width(d),
    }
}

impl Attention {
    pub(super) fn new(spec: &AttentionSpec, tensors: &ExtentTensors<'_>) -> Result<Self, ModelError> {
        Ok(match spec {
            AttentionSpec::Mla(m) => Attention::Mla(Box::new(Mla::new(m, tensors)?)),
            AttentionSpec::Gqa(g) => Attention::Gqa(Gqa::new(g, tensors)?),
            AttentionSpec::Delta(d) => Attention::Delta(Delta::new(d, tensors)?),
        })
    }

    /// Mixes `n` tokens at positions `start..start + n`: reads `x` `[n, hidden]` (normalised), extends `cache`, writes
    /// `out` `[n, hidden]`. `extent`: the bytes of the layer's attention extent.
    #[expect(
        clippy::too_many_arguments,
        reason = "inputs, state, scratch and output of one step; a struct would only rename them"
    )]
    pub fn forward(
        &self,
        compute: &Compute,
        extent: &[u8],
        cache: &mut LayerCache,
        start: usize,
        n: usize,
        x: &[f32],
        scratch: &mut AttentionScratch,
        out: &mut [f32],
    ) {
        match (self, cache) {
            (Attention::Mla(mla), LayerCache::Latent(cache)) => {
                mla.forward(compute, extent, cache, start, n, x, &mut scratch.mla, out);
            }
            (Attention::Gqa(gqa), LayerCache::KeyValue(cache)) => {
                gqa.forward(compute, extent, cache, start, n, x, &mut scratch.gqa, out);
            }
            (Attention::Delta(delta), LayerCache::State(state)) => {
                delta.forward(compute, extent, state, start, n, x, &mut scratch.delta, out);
            }
            _ => unreachable!("a cache is made from the spec of its layer"),
        }
    }
}
