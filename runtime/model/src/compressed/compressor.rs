//! Entries that each represent several tokens (formula at [`CompressionSpec`]).
//!
//! A token's contribution to entries is kept until no entry needs it any more. So an entry that is completed one token at a time
//! has the same bits as one that is completed within a prompt.

use std::ops::Range;

use sluice_format::CompressionSpec;
use sluice_kernels::{Activations, exp, rms_norm};

use super::{ENTRIES, RAW};
use crate::ModelError;
use crate::compute::{Step, sized, with_head_scratch};
use crate::rope::{Rope, RopeAngles};
use crate::rows::Caches;
use crate::weights::{ExtentTensors, MatrixRef, VectorRef};

/// The use of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Keys of attention, and values.
    Attention,
    /// Keys of the indexer.
    Index,
}

/// Names of the tensors of one kind of entries.
struct Names {
    kv: &'static str,
    gate: &'static str,
    bias: &'static str,
    norm: &'static str,
}

/// Makes entries of one width.
#[derive(Debug)]
pub struct Compressor {
    purpose: Purpose,
    /// Numbers of an entry.
    width: usize,
    ratio: usize,
    spans: usize,
    norm_eps: f32,
    kv: MatrixRef,
    gate: MatrixRef,
    bias: VectorRef,
    norm: VectorRef,
    /// First of a token's kept numbers that belong to this compressor: `spans` keys, then as many gates.
    first: usize,
}

/// Buffers that compressors reuse from call to call.
#[derive(Debug, Default)]
pub struct CompressorScratch {
    /// `[rows, spans · width]`.
    projected: Vec<f32>,
    bias: Vec<f32>,
    norm: Vec<f32>,
    /// Number of the span in the step, and number of the entry, for each entry that the pass completes.
    completed: Vec<(usize, usize)>,
    /// `[completed, width]`.
    entries: Vec<f32>,
    angles: RopeAngles,
}

/// f32 values of scratch per token, for a compressor of entries of `width` numbers.
pub fn scratch_width(compression: &CompressionSpec, width: usize) -> usize {
    compression.spans * width + width.div_ceil(compression.ratio)
}

/// Numbers that a compressor of entries of `width` numbers keeps for each token.
pub fn raw_width(compression: &CompressionSpec, width: usize) -> usize {
    2 * compression.spans * width
}

impl Compressor {
    /// `first`: the first of a token's kept numbers that belong to this compressor.
    pub(super) fn new(
        spec: &CompressionSpec,
        purpose: Purpose,
        (width, norm_eps): (usize, f32),
        first: usize,
        tensors: &ExtentTensors<'_>,
    ) -> Result<Self, ModelError> {
        let names = match purpose {
            Purpose::Attention => Names { kv: "entry_kv", gate: "entry_gate", bias: "entry_bias", norm: "entry_norm" },
            Purpose::Index => Names {
                kv: "index_entry_kv",
                gate: "index_entry_gate",
                bias: "index_entry_bias",
                norm: "index_entry_norm",
            },
        };
        Ok(Compressor {
            purpose,
            width,
            ratio: spec.ratio,
            spans: spec.spans,
            norm_eps,
            kv: tensors.matrix(names.kv)?,
            gate: tensors.matrix(names.gate)?,
            bias: tensors.vector(names.bias)?,
            norm: tensors.vector(names.norm)?,
            first,
        })
    }

    /// Keeps the contributions of the rows `x`, and adds the entries that they complete to `caches`.
    pub fn extend(
        &self,
        step: Step<'_>,
        rope: &Rope,
        caches: &mut Caches<'_, '_>,
        x: &Activations,
        scratch: &mut CompressorScratch,
    ) {
        self.keep(step, caches, x, scratch);
        let CompressorScratch { norm, completed, entries, angles, .. } = scratch;
        completed.clear();
        for span in step.rows.spans() {
            let entries = span.start / self.ratio..(span.start + span.count) / self.ratio;
            completed.extend(entries.map(|entry| (span.span, entry)));
        }
        step.read(&self.norm, norm);
        rope.angles(completed.iter().map(|(_, entry)| entry * self.ratio), angles);
        let entries = sized(entries, completed.len() * self.width);
        {
            let (caches, completed, norm, angles) = (&*caches, &*completed, &*norm, &*angles);
            step.compute.threads.for_each_piece(entries, self.width, &|i, out| {
                self.compress(caches, completed[i], norm, out);
                rope.rotate_end(out, angles, i);
            });
        }
        for (&(span, entry), row) in completed.iter().zip(entries.chunks_exact(self.width)) {
            let mut cache = caches.store_mut(span, ENTRIES).latent_mut();
            match self.purpose {
                Purpose::Attention => cache.set(entry, row),
                Purpose::Index => cache.index_key_mut(entry).copy_from_slice(row),
            }
        }
    }

    /// Keeps the keys and the gates of the rows; the gates include their bias.
    fn keep(&self, step: Step<'_>, caches: &mut Caches<'_, '_>, x: &Activations, scratch: &mut CompressorScratch) {
        let CompressorScratch { projected, bias, .. } = scratch;
        let keys = self.spans * self.width;
        step.read(&self.bias, bias);
        for (matrix, first) in [(&self.kv, self.first), (&self.gate, self.first + keys)] {
            let projected = sized(projected, step.n() * keys);
            step.multiply(matrix, x, projected);
            for span in step.rows.spans() {
                let mut cache = caches.store_mut(span.span, RAW).raw_mut();
                for (t, row) in span.rows().enumerate() {
                    let position = span.start + t;
                    let kept = &mut cache.row_mut(position)[first..][..keys];
                    kept.copy_from_slice(&projected[row * keys..][..keys]);
                    if first != self.first {
                        let bias = &bias[position % self.ratio * keys..][..keys];
                        kept.iter_mut().zip(bias).for_each(|(gate, bias)| *gate += bias);
                    }
                }
            }
        }
    }

    /// Entry `entry` of a span's sequence, normalised but not rotated.
    fn compress(&self, caches: &Caches<'_, '_>, (span, entry): (usize, usize), norm: &[f32], out: &mut [f32]) {
        let raw = caches.store(span, RAW).raw();
        let keys = self.spans * self.width;
        // Key and gate of each token, oldest first. There is nothing before the first token.
        let tokens = (0..self.spans).flat_map(|s| {
            let span = (entry + s + 1).checked_sub(self.spans);
            let positions: Range<usize> = span.map_or(0..0, |span| span * self.ratio..(span + 1) * self.ratio);
            positions.map(move |position| {
                let numbers = &raw.row(position)[self.first..];
                (&numbers[s * self.width..][..self.width], &numbers[keys + s * self.width..][..self.width])
            })
        });
        with_head_scratch(|scratch| {
            let (max, sum) = sized(&mut scratch.input, 2 * self.width).split_at_mut(self.width);
            max.fill(f32::NEG_INFINITY);
            for (_, gate) in tokens.clone() {
                max.iter_mut().zip(gate).for_each(|(m, &g)| *m = if g > *m { g } else { *m });
            }
            sum.fill(0.0);
            let total = sized(&mut scratch.product, self.width);
            total.fill(0.0);
            for (kv, gate) in tokens {
                for (((total, sum), max), (kv, gate)) in
                    total.iter_mut().zip(&mut *sum).zip(&*max).zip(kv.iter().zip(gate))
                {
                    let weight = exp(gate - max);
                    *sum += weight;
                    *total += weight * kv;
                }
            }
            total.iter_mut().zip(&*sum).for_each(|(total, sum)| *total /= sum);
            rms_norm(total, norm, self.norm_eps, out);
        });
    }
}
