//! Several residual streams that gates join (formulas at [`GatedStreamsSpec`]).

use sluice_format::{GatedStreamsSpec, ModelSpec};
use sluice_kernels::{Activations, Precision, ThreadPool, rms_norm, sigmoid, silu};

use super::ModelError;
use super::compute::{Compute, sized};
use super::weights::{ExtentTensors, MatrixRef, VectorRef};

/// Rows whose streams are normalised and multiplied together, which bounds the scratch, whatever the size of the pass.
const ROWS_TOGETHER: usize = 64;

/// The streams as one part of a layer, or the head, sees them.
#[derive(Debug)]
pub struct GatedStreams {
    count: usize,
    hidden: usize,
    norm_eps: f32,
    norm: VectorRef,
    down: MatrixRef,
    up: MatrixRef,
    /// How a part's output enters each stream; `None` after the last layer.
    inject: Option<MatrixRef>,
}

/// Buffers for gated streams.
#[derive(Debug)]
pub struct GatedScratch {
    /// All streams of [`ROWS_TOGETHER`] rows, normalised, `[rows, width]`.
    normed: Vec<f32>,
    activations: Activations,
    /// `[rows, rank]`.
    low: Vec<f32>,
    /// `[rows, width]`.
    gates: Vec<f32>,
    /// The factors of a part's output for each stream, for all rows, `[rows, count]`.
    inject: Vec<f32>,
    norm: Vec<f32>,
}

impl Default for GatedScratch {
    fn default() -> Self {
        GatedScratch {
            normed: Vec::new(),
            activations: Activations::new(Precision::Exact),
            low: Vec::new(),
            gates: Vec::new(),
            inject: Vec::new(),
            norm: Vec::new(),
        }
    }
}

/// Bytes of scratch for passes of `rows` rows.
pub fn scratch_memory(spec: &GatedStreamsSpec, hidden: usize, rows: usize) -> u64 {
    let width = (spec.count * hidden) as u64;
    // Streams, their copy as activations, gates, and a norm.
    let together = (3 * width + 2 * spec.rank as u64) * ROWS_TOGETHER.min(rows) as u64 + width;
    4 * (spec.count as u64 * rows as u64 + together)
}

impl GatedStreams {
    pub(super) fn new(
        spec: &ModelSpec,
        streams: &GatedStreamsSpec,
        tensors: &ExtentTensors<'_>,
    ) -> Result<Self, ModelError> {
        let inject = tensors.has("streams_inject").then(|| tensors.matrix("streams_inject")).transpose()?;
        Ok(GatedStreams {
            count: streams.count,
            hidden: spec.hidden_size,
            norm_eps: spec.norm_eps,
            norm: tensors.vector("streams_norm")?,
            down: tensors.matrix("streams_down")?,
            up: tensors.matrix("streams_up")?,
            inject,
        })
    }

    /// The part's view of the streams `x` `[n, count, hidden]`: writes `out` `[n, hidden]`, and keeps how its output enters them.
    pub fn read(&self, compute: &Compute, extent: &[u8], x: &[f32], scratch: &mut GatedScratch, out: &mut [f32]) {
        let (count, hidden) = (self.count, self.hidden);
        let width = count * hidden;
        let GatedScratch { normed, activations, low, gates, inject, norm } = scratch;
        self.norm.read(extent, norm);
        let norm = &*norm;
        let inject = sized(inject, x.len() / hidden);
        let together = x.chunks(ROWS_TOGETHER * width).zip(out.chunks_mut(ROWS_TOGETHER * hidden));
        for ((x, out), inject) in together.zip(inject.chunks_mut(ROWS_TOGETHER * count)) {
            let rows = x.len() / width;
            let normed = sized(normed, x.len());
            compute.threads.for_each_piece(normed, hidden, &|i, normed| {
                rms_norm(&x[i * hidden..][..hidden], &norm[i % count * hidden..][..hidden], self.norm_eps, normed);
            });
            // The inputs of these matrices are not observed, because the matrices are never rounded.
            let product = |matrix: &MatrixRef, activations: &Activations, out: &mut [f32]| {
                compute.kernels.matmul(&compute.threads, matrix.view(extent), activations, out);
            };
            activations.set(normed, rows, width);
            let share = 1.0 / count as f32;
            if let Some(matrix) = &self.inject {
                product(matrix, activations, inject);
                inject.iter_mut().for_each(|v| *v = 2.0 * sigmoid(*v * share));
            }
            let low = sized(low, rows * self.down.rows());
            product(&self.down, activations, low);
            low.iter_mut().for_each(|v| *v = silu(*v * share));
            activations.set(low, rows, self.down.rows());
            let gates = sized(gates, x.len());
            product(&self.up, activations, gates);
            let (normed, gates) = (&*normed, &*gates);
            compute.threads.for_each_piece(out, hidden, &|row, out| {
                out.fill(0.0);
                let of_row = row * width..(row + 1) * width;
                let streams = normed[of_row.clone()].chunks_exact(hidden).zip(gates[of_row].chunks_exact(hidden));
                for (stream, gates) in streams {
                    out.iter_mut().zip(stream.iter().zip(gates)).for_each(|(o, (s, g))| *o += sigmoid(*g) * s);
                }
                out.iter_mut().for_each(|o| *o *= share);
            });
        }
    }

    /// Adds the part's output `[n, hidden]` to the streams.
    pub fn add(&self, threads: &ThreadPool, x: &mut [f32], output: &[f32], scratch: &GatedScratch) {
        let (count, hidden) = (self.count, self.hidden);
        threads.for_each_piece(x, hidden, &|i, stream| {
            let (output, factor) = (&output[i / count * hidden..][..hidden], scratch.inject[i]);
            stream.iter_mut().zip(output).for_each(|(s, o)| *s += factor * o);
        });
    }
}
