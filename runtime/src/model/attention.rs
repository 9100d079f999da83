//! The token mixer of a layer, whichever it is.

use sluice_format::AttentionSpec;
use sluice_kernels::KvType;

use super::ModelError;
use super::compute::{Compute, Step};
use super::delta::{self, Delta, DeltaScratch, DeltaState};
use super::gqa::{self, Gqa, GqaScratch, KeyValueCache};
use super::mla::{self, LatentCache, Mla, MlaScratch};
use super::rows::Caches;
use super::weights::ExtentTensors;

/// Why a cache is of the kind that its layer wants.
const OF_ITS_SPEC: &str = "a cache is made from the spec of its layer";

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

/// What one layer remembers of the tokens of one sequence.
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

    pub(super) fn latent(&self) -> &LatentCache {
        let LayerCache::Latent(cache) = self else { unreachable!("{OF_ITS_SPEC}") };
        cache
    }

    pub(super) fn latent_mut(&mut self) -> &mut LatentCache {
        let LayerCache::Latent(cache) = self else { unreachable!("{OF_ITS_SPEC}") };
        cache
    }

    pub(super) fn key_value(&self) -> &KeyValueCache {
        let LayerCache::KeyValue(cache) = self else { unreachable!("{OF_ITS_SPEC}") };
        cache
    }

    pub(super) fn key_value_mut(&mut self) -> &mut KeyValueCache {
        let LayerCache::KeyValue(cache) = self else { unreachable!("{OF_ITS_SPEC}") };
        cache
    }

    pub(super) fn state_mut(&mut self) -> &mut DeltaState {
        let LayerCache::State(state) = self else { unreachable!("{OF_ITS_SPEC}") };
        state
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

    /// Mixes the rows of a pass: reads `x` `[n, hidden]` (normalised), extends `caches`, writes `out` `[n, hidden]`.
    /// `step.extent`: the bytes of the layer's attention extent.
    pub fn forward(
        &self,
        step: Step<'_>,
        caches: &mut Caches<'_, '_>,
        x: &[f32],
        scratch: &mut AttentionScratch,
        out: &mut [f32],
    ) {
        match self {
            Attention::Mla(mla) => mla.forward(step, caches, x, &mut scratch.mla, out),
            Attention::Gqa(gqa) => gqa.forward(step, caches, x, &mut scratch.gqa, out),
            Attention::Delta(delta) => delta.forward(step, caches, x, &mut scratch.delta, out),
        }
    }
}
