//! Gated delta net, which replaces attention in three of four layers of Qwen3-Next, Qwen3.5 and Kimi Linear.
//!
//! Formulas are at [`DeltaSpec`]. Its memory is one matrix per value head and the last inputs of the convolution, whatever the
//! length of the context. A sequence's tokens are processed one after the other, so a span gives the same bits as its tokens one at
//! a time.

use sluice_format::DeltaSpec;
use sluice_kernels::{Activations, exp, rms_norm, sigmoid, silu};

use super::ModelError;
use super::compute::{Compute, Step, sized, with_head_scratch};
use super::projection::{self, Projection, ProjectionScratch};
use super::recurrent::{Convolution, ConvolutionScratch, convolution_scratch_width};
use super::rows::Caches;
use super::weights::{ExtentTensors, MatrixRef, VectorRef};

/// Added to the squared length of queries and keys before they are divided by it.
const LENGTH_EPS: f32 = 1e-6;

/// Weights of one layer, as places in its extent.
#[derive(Debug)]
pub struct Delta {
    spec: DeltaSpec,
    /// The convolution of queries, keys and values, in this order.
    convolution: Convolution,
    a: Projection,
    b: MatrixRef,
    z: Projection,
    o: MatrixRef,
    a_log: VectorRef,
    dt_bias: VectorRef,
    out_norm: VectorRef,
}

/// f32 values per value head.
fn head_len(spec: &DeltaSpec) -> usize {
    (spec.key_head_dim + 1) * spec.value_head_dim
}

/// f32 values of scratch per token.
pub fn scratch_width(spec: &DeltaSpec) -> usize {
    let value = spec.value_heads * spec.value_head_dim;
    let mixed = convolution_scratch_width(spec.conv_channels(), spec.conv_width);
    let low = [spec.decay_rank, spec.gate_rank].map(projection::scratch_width).into_iter().max().unwrap_or(0);
    mixed + 3 * value + spec.value_heads * (1 + spec.decays_per_head()) + low
}

/// Buffers that the layers reuse from call to call.
#[derive(Debug)]
pub struct DeltaScratch {
    activations: Activations,
    projection: ProjectionScratch,
    convolution: ConvolutionScratch,
    /// Decays, `[tokens, value_heads]` or `[tokens, value_heads, key_head_dim]`.
    a: Vec<f32>,
    b: Vec<f32>,
    z: Vec<f32>,
    /// `[tokens, value_heads, value_head_dim]`.
    out: Vec<f32>,
    a_log: Vec<f32>,
    dt_bias: Vec<f32>,
    norm: Vec<f32>,
}

impl DeltaScratch {
    /// Empty buffers; they grow to the size that the first call needs.
    pub fn new(compute: &Compute) -> Self {
        DeltaScratch {
            activations: Activations::new(compute.precision),
            projection: ProjectionScratch::new(compute),
            convolution: ConvolutionScratch::default(),
            a: Vec::new(),
            b: Vec::new(),
            z: Vec::new(),
            out: Vec::new(),
            a_log: Vec::new(),
            dt_bias: Vec::new(),
            norm: Vec::new(),
        }
    }
}

impl Delta {
    pub(super) fn new(spec: &DeltaSpec, tensors: &ExtentTensors<'_>) -> Result<Self, ModelError> {
        Ok(Delta {
            spec: spec.clone(),
            convolution: Convolution {
                width: spec.conv_width,
                projections: [tensors.matrix("q")?, tensors.matrix("k")?, tensors.matrix("v")?],
                taps: tensors.vector("conv")?,
                bias: None,
            },
            a: Projection::new(tensors, spec.decay_rank, "a", ["a_down", "a_up"])?,
            b: tensors.matrix("b")?,
            z: Projection::new(tensors, spec.gate_rank, "z", ["z_down", "z_up"])?,
            o: tensors.matrix("o")?,
            a_log: tensors.vector("a_log")?,
            dt_bias: tensors.vector("dt_bias")?,
            out_norm: tensors.vector("out_norm")?,
        })
    }

    /// Mixes the rows of a pass: reads `x` `[n, hidden]` (normalised), advances the states in `caches`, writes `out`
    /// `[n, hidden]`.
    pub fn forward(
        &self,
        step: Step<'_>,
        caches: &mut Caches<'_, '_>,
        x: &[f32],
        scratch: &mut DeltaScratch,
        out: &mut [f32],
    ) {
        let n = step.n();
        scratch.activations.set(x, n, x.len() / n);
        self.convolution.apply(step, caches, &scratch.activations, &mut scratch.convolution);
        self.project(step, scratch);
        self.normalise_keys(n, scratch);
        self.gates(step, scratch);
        for span in step.rows.spans() {
            let (from, to) = caches.of_mut(span.span).state_mut();
            for row in span.rows() {
                if step.is_cancelled() {
                    return;
                }
                let from = (row == span.first).then_some(from.heads);
                self.recur(step.compute, row, from, to.heads, scratch);
            }
        }
        self.gate_output(step, scratch);
        let width = self.spec.value_heads * self.spec.value_head_dim;
        scratch.activations.set(&scratch.out[..n * width], n, width);
        step.multiply(&self.o, &scratch.activations, out);
    }

    /// Leaves the projections for decay, writing strength and output gate in the scratch.
    fn project(&self, step: Step<'_>, scratch: &mut DeltaScratch) {
        let (s, n) = (&self.spec, step.n());
        let DeltaScratch { activations, projection, a, b, z, .. } = scratch;
        self.a.apply(step, activations, projection, sized(a, n * s.value_heads * s.decays_per_head()));
        step.multiply(&self.b, activations, sized(b, n * s.value_heads));
        let width = s.value_heads * s.value_head_dim;
        self.z.apply(step, activations, projection, sized(z, n * width));
    }

    /// Scales queries and keys to length 1, and queries also by the scale of the scores.
    fn normalise_keys(&self, n: usize, scratch: &mut DeltaScratch) {
        let s = &self.spec;
        let scale = (s.key_head_dim as f32).powf(-0.5);
        for row in scratch.convolution.mixed[..n * s.conv_channels()].chunks_exact_mut(s.conv_channels()) {
            let heads = row[..2 * s.key_heads * s.key_head_dim].chunks_exact_mut(s.key_head_dim);
            for (h, head) in heads.enumerate() {
                let length = (head.iter().map(|v| v * v).sum::<f32>() + LENGTH_EPS).sqrt();
                let factor = if h < s.key_heads { scale / length } else { 1.0 / length };
                head.iter_mut().for_each(|v| *v *= factor);
            }
        }
    }

    /// Turns the projections into decays, in `a`, and writing strengths, in `b`.
    fn gates(&self, step: Step<'_>, scratch: &mut DeltaScratch) {
        let (heads, each, n) = (self.spec.value_heads, self.spec.decays_per_head(), step.n());
        let DeltaScratch { a, b, a_log, dt_bias, .. } = scratch;
        step.read(&self.a_log, a_log);
        step.read(&self.dt_bias, dt_bias);
        for row in a[..n * heads * each].chunks_exact_mut(heads * each) {
            for (i, (a, bias)) in row.iter_mut().zip(&*dt_bias).enumerate() {
                let rate = exp(a_log[i / each]);
                *a = exp(match self.spec.least_log_decay {
                    None => -rate * softplus(*a + bias),
                    Some(least) => least * sigmoid(rate * (*a + bias)),
                });
            }
        }
        b[..n * heads].iter_mut().for_each(|b| *b = sigmoid(*b));
    }

    /// Row `t`: reads the state `from`, or the state in place if there is none, and leaves the new state with its output. One task
    /// per head.
    fn recur(&self, compute: &Compute, t: usize, from: Option<&[f32]>, to: &mut [f32], scratch: &mut DeltaScratch) {
        let s = &self.spec;
        let (dk, dv, len, each) = (s.key_head_dim, s.value_head_dim, head_len(s), s.decays_per_head());
        let DeltaScratch { convolution, a, b, out, .. } = scratch;
        let (a, b) = (&a[t * s.value_heads * each..], &b[t * s.value_heads..]);
        let mixed = &convolution.mixed[t * s.conv_channels()..][..s.conv_channels()];
        let (queries, rest) = mixed.split_at(s.key_heads * dk);
        let (keys, values) = rest.split_at(s.key_heads * dk);
        compute.threads.for_each_piece(to, len, &|h, head| {
            let key_head = s.key_head(h);
            let (q, k) = (&queries[key_head * dk..][..dk], &keys[key_head * dk..][..dk]);
            if let Some(from) = from {
                head.copy_from_slice(&from[h * len..][..len]);
            }
            let (state, out) = head.split_at_mut(dk * dv);
            with_head_scratch(|scratch| {
                let change = sized(&mut scratch.input, dv);
                change.fill(0.0);
                // One decay for the whole state, or one for each of its rows.
                let decays = a[h * each..][..each].iter().cycle();
                for ((row, k), decay) in state.chunks_exact_mut(dv).zip(k).zip(decays) {
                    row.iter_mut().for_each(|v| *v *= decay);
                    compute.kernels.axpy(*k, row, change);
                }
                let wanted = &values[h * dv..][..dv];
                change.iter_mut().zip(wanted).for_each(|(c, v)| *c = (v - *c) * b[h]);
                out.fill(0.0);
                for ((row, k), q) in state.chunks_exact_mut(dv).zip(k).zip(q) {
                    compute.kernels.axpy(*k, change, row);
                    compute.kernels.axpy(*q, row, out);
                }
            });
        });
        let width = s.value_heads * dv;
        let out = &mut sized(out, (t + 1) * width)[t * width..];
        for (out, head) in out.chunks_exact_mut(dv).zip(to.chunks_exact(len)) {
            out.copy_from_slice(&head[dk * dv..]);
        }
    }

    /// Norm of each head's output, then the gate.
    fn gate_output(&self, step: Step<'_>, scratch: &mut DeltaScratch) {
        let width = self.spec.value_head_dim;
        let gate: fn(f32) -> f32 = if self.spec.gate_sigmoid { sigmoid } else { silu };
        let DeltaScratch { out, z, norm, .. } = scratch;
        step.read(&self.out_norm, norm);
        let len = step.n() * self.spec.value_heads * width;
        with_head_scratch(|scratch| {
            for (out, z) in out[..len].chunks_exact_mut(width).zip(z.chunks_exact(width)) {
                let copy = sized(&mut scratch.input, width);
                copy.copy_from_slice(out);
                rms_norm(copy, norm, self.spec.norm_eps, out);
                out.iter_mut().zip(z).for_each(|(o, z)| *o *= gate(*z));
            }
        });
    }
}

/// `ln(1 + exp(x))` in plain arithmetic, so that it gives the same bits on every platform.
///
/// `ln(1 + u) = 2 artanh(u / (2 + u))` with `u = exp(-|x|)`: the argument is at most 1/3, where eight terms of the series are
/// accurate to f32 precision.
pub(super) fn softplus(x: f32) -> f32 {
    let u = exp(-x.abs());
    let z = u / (2.0 + u);
    let series = (0..8).rev().fold(0.0, |sum, i| sum * (z * z) + 1.0 / (2 * i + 1) as f32);
    x.max(0.0) + 2.0 * z * series
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn softplus_is_what_its_formula_says() {
        for i in -400..=400 {
            let x = i as f32 * 0.1;
            let want = f64::from(x).exp().ln_1p();
            let error = (f64::from(softplus(x)) - want).abs();
            assert!(error <= 1e-6 * want, "{x}: {} instead of {want}", softplus(x));
        }
    }
}
