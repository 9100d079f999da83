//! Mamba-2, which replaces attention in most layers of Nemotron-H.
//!
//! Formulas are at [`MambaSpec`]. As in a gated delta net, its memory does not grow with the context, and a sequence's tokens are
//! processed one after the other, so a span gives the same bits as its tokens one at a time.

use sluice_format::MambaSpec;
use sluice_kernels::{Activations, exp, rms_norm, silu};

use super::ModelError;
use super::compute::{Compute, Step, sized, with_head_scratch};
use super::delta::softplus;
use super::recurrent::{Convolution, ConvolutionScratch, convolution_scratch_width};
use super::rows::Caches;
use super::weights::{ExtentTensors, MatrixRef, VectorRef};

/// Weights of one layer, as places in its extent.
#[derive(Debug)]
pub struct Mamba {
    spec: MambaSpec,
    /// The convolution of `x`, `b` and `c`, in this order.
    convolution: Convolution,
    dt: MatrixRef,
    a_log: VectorRef,
    dt_bias: VectorRef,
    d: VectorRef,
    z: MatrixRef,
    out_norm: VectorRef,
    o: MatrixRef,
}

/// f32 values per head: its state `[state_dim, head_dim]` and its last output.
fn head_len(spec: &MambaSpec) -> usize {
    (spec.state_dim + 1) * spec.head_dim
}

/// f32 values of scratch per token.
pub fn scratch_width(spec: &MambaSpec) -> usize {
    convolution_scratch_width(spec.conv_channels(), spec.conv_width) + 3 * spec.inner_width() + 2 * spec.heads
}

/// Buffers that the layers reuse from call to call.
#[derive(Debug)]
pub struct MambaScratch {
    activations: Activations,
    convolution: ConvolutionScratch,
    /// Steps, `[tokens, heads]`.
    steps: Vec<f32>,
    decays: Vec<f32>,
    /// `[tokens, heads, head_dim]`, like `out`.
    z: Vec<f32>,
    out: Vec<f32>,
    vector: Vec<f32>,
    d: Vec<f32>,
}

impl MambaScratch {
    /// Empty buffers; they grow to the size that the first call needs.
    pub fn new(compute: &Compute) -> Self {
        MambaScratch {
            activations: Activations::new(compute.precision),
            convolution: ConvolutionScratch::default(),
            steps: Vec::new(),
            decays: Vec::new(),
            z: Vec::new(),
            out: Vec::new(),
            vector: Vec::new(),
            d: Vec::new(),
        }
    }
}

impl Mamba {
    pub(super) fn new(spec: &MambaSpec, tensors: &ExtentTensors<'_>) -> Result<Self, ModelError> {
        Ok(Mamba {
            spec: spec.clone(),
            convolution: Convolution {
                width: spec.conv_width,
                projections: [tensors.matrix("x")?, tensors.matrix("b")?, tensors.matrix("c")?],
                taps: tensors.vector("conv")?,
                bias: spec.conv_bias.then(|| tensors.vector("conv_bias")).transpose()?,
            },
            dt: tensors.matrix("dt")?,
            a_log: tensors.vector("a_log")?,
            dt_bias: tensors.vector("dt_bias")?,
            d: tensors.vector("d")?,
            z: tensors.matrix("z")?,
            out_norm: tensors.vector("out_norm")?,
            o: tensors.matrix("o")?,
        })
    }

    /// Mixes the rows of a pass: reads `x` `[n, hidden]` (normalised), advances the states in `caches`, writes `out`
    /// `[n, hidden]`.
    pub fn forward(
        &self,
        step: Step<'_>,
        caches: &mut Caches<'_, '_>,
        x: &[f32],
        scratch: &mut MambaScratch,
        out: &mut [f32],
    ) {
        let (n, width) = (step.n(), self.spec.inner_width());
        scratch.activations.set(x, n, x.len() / n);
        self.convolution.apply(step, caches, &scratch.activations, &mut scratch.convolution);
        self.steps(step, scratch);
        step.multiply(&self.z, &scratch.activations, sized(&mut scratch.z, n * width));
        step.read(&self.d, &mut scratch.d);
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
        scratch.activations.set(&scratch.out[..n * width], n, width);
        step.multiply(&self.o, &scratch.activations, out);
    }

    /// Leaves the sizes of the steps and the decays in the scratch.
    fn steps(&self, step: Step<'_>, scratch: &mut MambaScratch) {
        let (heads, n) = (self.spec.heads, step.n());
        let MambaScratch { activations, steps, decays, vector, .. } = scratch;
        let (steps, decays) = (sized(steps, n * heads), sized(decays, n * heads));
        step.multiply(&self.dt, activations, steps);
        step.read(&self.dt_bias, vector);
        for row in steps.chunks_exact_mut(heads) {
            row.iter_mut().zip(&*vector).for_each(|(size, bias)| *size = softplus(*size + bias));
        }
        step.read(&self.a_log, vector);
        for (decays, steps) in decays.chunks_exact_mut(heads).zip(steps.chunks_exact(heads)) {
            let rates = steps.iter().zip(&*vector);
            decays.iter_mut().zip(rates).for_each(|(decay, (size, a_log))| *decay = exp(-exp(*a_log) * size));
        }
    }

    /// Row `t`: reads the state `from`, or the state in place if there is none, and leaves the new state with its output. One task
    /// per head.
    fn recur(&self, compute: &Compute, t: usize, from: Option<&[f32]>, to: &mut [f32], scratch: &mut MambaScratch) {
        let s = &self.spec;
        let (rows, width, len) = (s.state_dim, s.head_dim, head_len(s));
        let MambaScratch { convolution, steps, decays, out, d, .. } = scratch;
        let (steps, decays) = (&steps[t * s.heads..], &decays[t * s.heads..]);
        let mixed = &convolution.mixed[t * s.conv_channels()..][..s.conv_channels()];
        let (x, rest) = mixed.split_at(s.inner_width());
        let (b, c) = rest.split_at(s.groups * rows);
        compute.threads.for_each_piece(to, len, &|h, head| {
            let (b, c) = (&b[s.group(h) * rows..][..rows], &c[s.group(h) * rows..][..rows]);
            let x = &x[h * width..][..width];
            if let Some(from) = from {
                head.copy_from_slice(&from[h * len..][..len]);
            }
            let (state, out) = head.split_at_mut(rows * width);
            with_head_scratch(|scratch| {
                let input = sized(&mut scratch.input, width);
                input.iter_mut().zip(x).for_each(|(input, x)| *input = steps[h] * x);
                out.iter_mut().zip(x).for_each(|(out, x)| *out = d[h] * x);
                for ((row, b), c) in state.chunks_exact_mut(width).zip(b).zip(c) {
                    row.iter_mut().for_each(|v| *v *= decays[h]);
                    compute.kernels.axpy(*b, input, row);
                    compute.kernels.axpy(*c, row, out);
                }
            });
        });
        let out = &mut sized(out, (t + 1) * s.inner_width())[t * s.inner_width()..];
        for (out, head) in out.chunks_exact_mut(width).zip(to.chunks_exact(len)) {
            out.copy_from_slice(&head[rows * width..]);
        }
    }

    /// Applies the gate, then the norm of each group.
    fn gate_output(&self, step: Step<'_>, scratch: &mut MambaScratch) {
        let (inner, width) = (self.spec.inner_width(), self.spec.inner_width() / self.spec.groups);
        let MambaScratch { out, z, vector, .. } = scratch;
        step.read(&self.out_norm, vector);
        let len = step.n() * inner;
        with_head_scratch(|scratch| {
            let groups = out[..len].chunks_exact_mut(width).zip(z.chunks_exact(width));
            for ((out, z), norm) in groups.zip(vector.chunks_exact(width).cycle()) {
                let gated = sized(&mut scratch.input, width);
                gated.iter_mut().zip(out.iter().zip(z)).for_each(|(gated, (o, z))| *gated = *o * silu(*z));
                rms_norm(gated, norm, self.spec.norm_eps, out);
            }
        });
    }
}
