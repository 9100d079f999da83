//! Code that layers with recurrent states share: the state of a sequence, and the convolution of their inputs.

use sluice_format::{DeltaSpec, MambaSpec};
use sluice_kernels::{Activations, silu};

use super::compute::{Step, sized};
use super::rows::{Caches, SpanRows};
use super::weights::{MatrixRef, VectorRef};

/// Numbers of the state of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateShape {
    /// Inputs of the convolution before a position, `[conv_width - 1, channels]`.
    inputs: usize,
    heads: usize,
    /// For each head: the numbers of its state with its last output, and of the state alone.
    head: (usize, usize),
}

impl StateShape {
    /// The state of a gated delta net: per value head `[key_head_dim, value_head_dim]`.
    pub fn of_delta(spec: &DeltaSpec) -> Self {
        let inputs = (spec.conv_width - 1) * spec.conv_channels();
        Self::new(inputs, spec.value_heads, [spec.key_head_dim, spec.value_head_dim])
    }

    /// The state of Mamba-2: per head `[state_dim, head_dim]`.
    pub fn of_mamba(spec: &MambaSpec) -> Self {
        let inputs = (spec.conv_width - 1) * spec.conv_channels();
        Self::new(inputs, spec.heads, [spec.state_dim, spec.head_dim])
    }

    /// The state of a convolution alone, with this many numbers before a position.
    pub fn of_inputs(inputs: usize) -> Self {
        StateShape { inputs, heads: 0, head: (1, 1) }
    }

    fn new(inputs: usize, heads: usize, [rows, width]: [usize; 2]) -> Self {
        StateShape { inputs, heads, head: ((rows + 1) * width, rows * width) }
    }

    /// Numbers in memory.
    pub fn numbers(self) -> usize {
        self.inputs + self.heads * self.head.0
    }

    /// Numbers that later tokens depend on: all except the heads' last outputs.
    pub fn kept(self) -> usize {
        self.inputs + self.heads * self.head.1
    }
}

/// What one layer remembers of one sequence after some token.
#[derive(Clone, Copy, Debug)]
pub struct State<'a> {
    shape: StateShape,
    /// Inputs of the convolution before the next token, `[conv_width - 1, channels]`, oldest first.
    inputs: &'a [f32],
    /// Per head its state and its last output.
    pub(super) heads: &'a [f32],
}

/// The same, to write it.
#[derive(Debug)]
pub struct StateMut<'a> {
    shape: StateShape,
    inputs: &'a mut [f32],
    pub(super) heads: &'a mut [f32],
}

impl<'a> State<'a> {
    /// The state in `numbers`.
    pub fn new(shape: StateShape, numbers: &'a [f32]) -> Self {
        let (inputs, heads) = numbers.split_at(shape.inputs);
        State { shape, inputs, heads }
    }

    /// Inputs of the convolution before the next token, oldest first.
    pub fn inputs(self) -> &'a [f32] {
        self.inputs
    }

    /// Writes it, little-endian, without the heads' last outputs, which are never read again.
    pub fn to_bytes(self, out: &mut [u8]) {
        let StateShape { head, .. } = self.shape;
        let heads = self.heads.chunks_exact(head.0).flat_map(|numbers| &numbers[..head.1]);
        let numbers = self.inputs.iter().chain(heads);
        out.as_chunks_mut::<4>().0.iter_mut().zip(numbers).for_each(|(out, v)| *out = v.to_le_bytes());
    }
}

impl<'a> StateMut<'a> {
    /// The state in `numbers`.
    pub fn new(shape: StateShape, numbers: &'a mut [f32]) -> Self {
        let (inputs, heads) = numbers.split_at_mut(shape.inputs);
        StateMut { shape, inputs, heads }
    }

    /// Inputs of the convolution before the next token, oldest first.
    pub fn inputs(self) -> &'a mut [f32] {
        self.inputs
    }

    /// Restores what [`State::to_bytes`] wrote.
    pub fn put_bytes(self, bytes: &[u8]) {
        let StateShape { head, .. } = self.shape;
        let heads = self.heads.chunks_exact_mut(head.0).flat_map(|numbers| &mut numbers[..head.1]);
        let numbers = self.inputs.iter_mut().chain(heads);
        numbers.zip(bytes.as_chunks::<4>().0).for_each(|(v, bytes)| *v = f32::from_le_bytes(*bytes));
    }
}

/// Causal convolution of each channel separately, then SiLU. Its channels are those of three projections, one after the other.
#[derive(Debug)]
pub struct Convolution {
    /// Tokens that it sees, including the current one.
    pub width: usize,
    /// The projections that give its inputs.
    pub projections: [MatrixRef; 3],
    /// `[channels, width]`, oldest first.
    pub taps: VectorRef,
    /// One per channel.
    pub bias: Option<VectorRef>,
}

/// Buffers that convolutions reuse from call to call.
#[derive(Debug, Default)]
pub struct ConvolutionScratch {
    /// The result of one projection, `[tokens, width]`.
    part: Vec<f32>,
    /// Inputs, span by span, including those before its first token: `[conv_width - 1 + count, channels]`.
    inputs: Vec<f32>,
    /// Outputs, `[tokens, channels]`.
    pub mixed: Vec<f32>,
    taps: Vec<f32>,
    bias: Vec<f32>,
}

/// f32 values of scratch per token, besides those of one projection: inputs of a span of one row, and their results.
pub fn convolution_scratch_width(channels: usize, conv_width: usize) -> usize {
    (conv_width + 2) * channels
}

impl Convolution {
    /// Numbers of one token.
    pub fn channels(&self) -> usize {
        self.projections.iter().map(MatrixRef::rows).sum()
    }

    /// Leaves the outputs for the rows of a pass in `scratch.mixed` and the last inputs in `caches`. `x`: the layer's input.
    pub fn apply(
        &self,
        step: Step<'_>,
        caches: &mut Caches<'_, '_>,
        x: &Activations,
        scratch: &mut ConvolutionScratch,
    ) {
        self.project(step, x, scratch);
        step.read(&self.taps, &mut scratch.taps);
        match &self.bias {
            Some(bias) => step.read(bias, &mut scratch.bias),
            None => sized(&mut scratch.bias, self.channels()).fill(0.0),
        }
        for (i, span) in step.rows.spans().iter().enumerate() {
            let (from, to) = caches.of_mut(span.span).state_mut();
            self.convolve(step, (i, *span), from, to, scratch);
        }
    }

    /// Leaves the new inputs in the scratch.
    fn project(&self, step: Step<'_>, x: &Activations, scratch: &mut ConvolutionScratch) {
        let (n, channels, before) = (step.n(), self.channels(), self.width - 1);
        let ConvolutionScratch { part, inputs, .. } = scratch;
        let spans = step.rows.spans();
        let inputs = sized(inputs, (before * spans.len() + n) * channels);
        let mut first = 0;
        for matrix in &self.projections {
            let width = matrix.rows();
            let part = sized(part, n * width);
            step.multiply(matrix, x, part);
            for (i, span) in spans.iter().enumerate() {
                let inputs = inputs[(before * (i + 1) + span.first) * channels..].chunks_exact_mut(channels);
                let part = part[span.first * width..].chunks_exact(width);
                for (row, part) in inputs.zip(part).take(span.count) {
                    row[first..first + width].copy_from_slice(part);
                }
            }
            first += width;
        }
    }

    /// Convolves one span. `index`: its number among the pass's spans.
    fn convolve(
        &self,
        step: Step<'_>,
        (index, span): (usize, SpanRows),
        from: State<'_>,
        to: StateMut<'_>,
        scratch: &mut ConvolutionScratch,
    ) {
        let (channels, width) = (self.channels(), self.width);
        let ConvolutionScratch { inputs, mixed, taps, bias, .. } = scratch;
        let before = width - 1;
        let inputs = &mut inputs[(before * index + span.first) * channels..][..(before + span.count) * channels];
        inputs[..from.inputs.len()].copy_from_slice(from.inputs);
        let mixed = &mut sized(mixed, step.n() * channels)[span.first * channels..][..span.count * channels];
        for (t, out) in mixed.chunks_exact_mut(channels).enumerate() {
            let seen = &inputs[t * channels..][..width * channels];
            for (c, out) in out.iter_mut().enumerate() {
                let taps = &taps[c * width..][..width];
                let sum = taps.iter().enumerate().fold(0.0, |sum, (i, tap)| sum + tap * seen[i * channels + c]);
                *out = silu(sum + bias[c]);
            }
        }
        to.inputs.copy_from_slice(&inputs[span.count * channels..]);
    }
}
