//! The token mixer of a layer, of whichever kind.

use sluice_format::AttentionSpec;

use super::ModelError;
use super::compressed::{self, Compressed, CompressedScratch};
use super::compute::{Compute, Step};
use super::delta::{self, Delta, DeltaScratch};
use super::gqa::{self, Gqa, GqaScratch};
use super::mamba::{self, Mamba, MambaScratch};
use super::mla::{self, Mla, MlaScratch};
use super::rows::Caches;
use super::weights::ExtentTensors;

/// The token mixer of one layer.
#[derive(Debug)]
pub enum Attention {
    /// Multi-head latent attention.
    Mla(Box<Mla>),
    /// Grouped-query attention.
    Gqa(Box<Gqa>),
    /// Gated delta net.
    Delta(Box<Delta>),
    /// Mamba-2.
    Mamba(Box<Mamba>),
    /// A window and compressed entries.
    Compressed(Box<Compressed>),
}

/// Buffers that attention reuses from call to call.
#[derive(Debug)]
pub struct AttentionScratch {
    mla: MlaScratch,
    gqa: GqaScratch,
    delta: DeltaScratch,
    mamba: MambaScratch,
    compressed: CompressedScratch,
}

impl AttentionScratch {
    /// Empty buffers; they grow to the size that the first call needs.
    pub fn new(compute: &Compute) -> Self {
        AttentionScratch {
            mla: MlaScratch::new(compute),
            gqa: GqaScratch::new(compute),
            delta: DeltaScratch::new(compute),
            mamba: MambaScratch::new(compute),
            compressed: CompressedScratch::new(compute),
        }
    }
}

/// f32 values of scratch per token.
pub fn scratch_width(spec: &AttentionSpec) -> usize {
    match spec {
        AttentionSpec::Mla(m) => mla::scratch_width(m),
        AttentionSpec::Gqa(g) => gqa::scratch_width(g),
        AttentionSpec::Delta(d) => delta::scratch_width(d),
        AttentionSpec::Mamba(m) => mamba::scratch_width(m),
        AttentionSpec::Compressed(c) => compressed::scratch_width(c),
    }
}

/// Bytes that a thread needs to expand latents for passes of so many rows; 0 where there are none.
pub fn expansion_memory(spec: &AttentionSpec, rows: usize) -> u64 {
    match spec {
        AttentionSpec::Mla(m) => mla::expansion_memory(m, rows),
        _ => 0,
    }
}

impl Attention {
    pub(super) fn new(spec: &AttentionSpec, tensors: &ExtentTensors<'_>) -> Result<Self, ModelError> {
        Ok(match spec {
            AttentionSpec::Mla(m) => Attention::Mla(Box::new(Mla::new(m, tensors)?)),
            AttentionSpec::Gqa(g) => Attention::Gqa(Box::new(Gqa::new(g, tensors)?)),
            AttentionSpec::Delta(d) => Attention::Delta(Box::new(Delta::new(d, tensors)?)),
            AttentionSpec::Mamba(m) => Attention::Mamba(Box::new(Mamba::new(m, tensors)?)),
            AttentionSpec::Compressed(c) => Attention::Compressed(Box::new(Compressed::new(c, tensors)?)),
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
            Attention::Mamba(mamba) => mamba.forward(step, caches, x, &mut scratch.mamba, out),
            Attention::Compressed(compressed) => compressed.forward(step, caches, x, &mut scratch.compressed, out),
        }
    }
}
