//! How the parts of a layer see the residual, and how their outputs enter it. The residual is one stream, to which outputs are
//! added; or several streams that are mixed (formulas at [`StreamsSpec`]); or several that gates join (`gated_streams`).

use sluice_format::{ModelSpec, StreamsSpec};
use sluice_kernels::{Activations, Precision, ThreadPool, rms_norm, sigmoid, softmax};

use super::ModelError;
use super::compute::{Compute, sized, with_head_scratch};
use super::gated_streams::{self, GatedScratch, GatedStreams};
use super::norm::{Norm, NormScratch};
use super::weights::{ExtentTensors, MatrixRef, VectorRef};

/// Rows whose streams are normalised and multiplied together, which bounds the scratch, whatever the size of the pass.
const ROWS_TOGETHER: usize = 64;

/// The residual as one part of a layer, or the head, sees it.
#[derive(Debug)]
pub struct Residual {
    streams: Kind,
    /// The norm of the part's input; gated streams have only their inner norms.
    norm: Option<Norm>,
}

#[derive(Debug)]
enum Kind {
    /// One stream; outputs are multiplied by a factor and added.
    One(f32),
    /// Several streams.
    Streams(Streams),
    /// Several streams that gates join.
    Gated(GatedStreams),
}

/// Functions of all streams that determine a part's view of each stream, and how the streams change.
#[derive(Debug)]
pub struct Streams {
    spec: StreamsSpec,
    hidden: usize,
    norm_eps: f32,
    functions: MatrixRef,
    bias: VectorRef,
    scale: VectorRef,
}

/// Buffers for the residual.
#[derive(Debug)]
pub struct ResidualScratch {
    /// A part's view of several streams, `[rows, hidden]`.
    input: Vec<f32>,
    /// Outputs of the functions, turned into weights, `[rows, functions]`.
    weights: Vec<f32>,
    activations: Activations,
    normed: Vec<f32>,
    ones: Vec<f32>,
    bias: Vec<f32>,
    scale: Vec<f32>,
    norm: NormScratch,
    gated: GatedScratch,
}

impl ResidualScratch {
    /// Empty buffers; they grow to the size that the first call needs.
    pub fn new() -> Self {
        ResidualScratch {
            input: Vec::new(),
            weights: Vec::new(),
            activations: Activations::new(Precision::Exact),
            normed: Vec::new(),
            ones: Vec::new(),
            bias: Vec::new(),
            scale: Vec::new(),
            norm: NormScratch::default(),
            gated: GatedScratch::default(),
        }
    }
}

/// Bytes of scratch for passes of `rows` rows.
pub fn scratch_memory(spec: &ModelSpec, rows: usize) -> u64 {
    if let Some(gated) = &spec.gated_streams {
        return gated_streams::scratch_memory(gated, spec.hidden_size, rows);
    }
    let Some(streams) = &spec.streams else { return 0 };
    let width = spec.residual_width() as u64;
    let per_row = spec.hidden_size as u64 + streams.functions() as u64;
    // Normalised streams and their copy as activations, for some rows at a time.
    let together = 2 * width * ROWS_TOGETHER.min(rows) as u64 + width;
    4 * (per_row * rows as u64 + together)
}

impl Residual {
    /// The residual as the part whose extent has `tensors` sees it. `tensors` include the norm, whose weight and bias have these
    /// names.
    pub(super) fn new(
        spec: &ModelSpec,
        tensors: &ExtentTensors<'_>,
        [weight, bias]: [&'static str; 2],
    ) -> Result<Self, ModelError> {
        let streams = if let Some(gated) = &spec.gated_streams {
            Kind::Gated(GatedStreams::new(spec, gated, tensors)?)
        } else if let Some(streams) = &spec.streams {
            Kind::Streams(Streams {
                spec: streams.clone(),
                hidden: spec.hidden_size,
                norm_eps: spec.norm_eps,
                functions: tensors.matrix("streams")?,
                bias: tensors.vector("streams_bias")?,
                scale: tensors.vector("streams_scale")?,
            })
        } else {
            Kind::One(spec.factors.residual)
        };
        let norm = spec.gated_streams.is_none().then(|| Norm::before(spec, tensors, weight, bias)).transpose()?;
        Ok(Residual { streams, norm })
    }

    /// The part's view of the residual `x` `[n, width]`, normalised: writes `normed` `[n, hidden]`.
    pub fn read(&self, compute: &Compute, extent: &[u8], x: &[f32], scratch: &mut ResidualScratch, normed: &mut [f32]) {
        match &self.streams {
            Kind::Gated(streams) => return streams.read(compute, extent, x, &mut scratch.gated, normed),
            Kind::Streams(streams) => streams.read(compute, extent, x, scratch),
            Kind::One(_) => {}
        }
        let Some(norm) = &self.norm else { return };
        let mut buffers = std::mem::take(&mut scratch.norm);
        let input = self.joined(x, normed.len(), scratch).unwrap_or(x);
        norm.apply(extent, input, &mut buffers, normed);
        scratch.norm = buffers;
    }

    /// The `len` numbers of `x` that [`Residual::read`] has normalised; `None` if there are none, because the streams that it
    /// joined were normalised before.
    pub fn joined<'a>(&self, x: &'a [f32], len: usize, scratch: &'a ResidualScratch) -> Option<&'a [f32]> {
        match &self.streams {
            Kind::One(_) => Some(x),
            Kind::Streams(_) => Some(&scratch.input[..len]),
            Kind::Gated(_) => None,
        }
    }

    /// The norm of the part's input.
    pub fn norm(&self) -> Option<&Norm> {
        self.norm.as_ref()
    }

    /// Adds the part's output `[n, hidden]` to the residual, after [`Residual::read`] was called for the part.
    pub fn add(&self, threads: &ThreadPool, x: &mut [f32], output: &[f32], scratch: &ResidualScratch) {
        match &self.streams {
            // A factor of 1 changes no bit.
            Kind::One(factor) => x.iter_mut().zip(output).for_each(|(x, o)| *x += factor * o),
            Kind::Streams(streams) => streams.add(threads, x, output, &scratch.weights),
            Kind::Gated(streams) => streams.add(threads, x, output, &scratch.gated),
        }
    }
}

impl Streams {
    fn width(&self) -> usize {
        self.spec.count * self.hidden
    }

    /// Leaves the part's view in `scratch.input`.
    fn read(&self, compute: &Compute, extent: &[u8], x: &[f32], scratch: &mut ResidualScratch) {
        let (width, hidden, functions) = (self.width(), self.hidden, self.functions.rows());
        let n = x.len() / width;
        let ResidualScratch { input, weights, activations, normed, ones, bias, scale, .. } = scratch;
        self.bias.read(extent, bias);
        self.scale.read(extent, scale);
        if ones.len() != width {
            *ones = vec![1.0; width];
        }
        let weights = sized(weights, n * functions);
        for (x, weights) in x.chunks(ROWS_TOGETHER * width).zip(weights.chunks_mut(ROWS_TOGETHER * functions)) {
            let normed = sized(normed, x.len());
            compute.threads.for_each_piece(normed, width, &|row, normed| {
                rms_norm(&x[row * width..][..width], ones, self.norm_eps, normed);
            });
            activations.set(normed, x.len() / width, width);
            // The inputs of this matrix are not observed, because it is never rounded.
            compute.kernels.matmul(&compute.threads, self.functions.view(extent), activations, weights);
        }
        weights.chunks_exact_mut(functions).for_each(|row| self.weigh(row, bias, scale));
        let weights = &*weights;
        let input = sized(input, n * hidden);
        compute.threads.for_each_piece(input, hidden, &|row, input| {
            input.fill(0.0);
            let streams = x[row * width..][..width].chunks_exact(hidden);
            for (stream, pre) in streams.zip(&weights[row * functions..]) {
                input.iter_mut().zip(stream).for_each(|(i, s)| *i += pre * s);
            }
        });
    }

    /// Turns the outputs of the functions into weights: `pre`, and, before a part of a layer, also `post` and `mix` after it.
    fn weigh(&self, row: &mut [f32], bias: &[f32], scale: &[f32]) {
        let (count, eps) = (self.spec.count, self.spec.eps);
        // The first scale belongs to `pre`, the second to `post`, the third to the square after them.
        row.iter_mut().enumerate().for_each(|(i, v)| *v = *v * scale[(i / count).min(scale.len() - 1)] + bias[i]);
        let (pre, rest) = row.split_at_mut(count);
        pre.iter_mut().for_each(|v| *v = sigmoid(*v) + eps);
        let Some((post, mix)) = rest.split_at_mut_checked(count) else { return };
        post.iter_mut().for_each(|v| *v = 2.0 * sigmoid(*v));
        for row in mix.chunks_exact_mut(count) {
            softmax(row);
            row.iter_mut().for_each(|v| *v += eps);
        }
        divide_columns(mix, count, eps);
        for _ in 1..self.spec.iterations {
            for row in mix.chunks_exact_mut(count) {
                let sum = row.iter().sum::<f32>() + eps;
                row.iter_mut().for_each(|v| *v /= sum);
            }
            divide_columns(mix, count, eps);
        }
    }

    fn add(&self, threads: &ThreadPool, x: &mut [f32], output: &[f32], weights: &[f32]) {
        let (count, hidden, functions) = (self.spec.count, self.hidden, self.functions.rows());
        threads.for_each_piece(x, self.width(), &|row, streams| {
            let weights = &weights[row * functions + count..][..functions - count];
            let (post, mix) = weights.split_at(count);
            let output = &output[row * hidden..][..hidden];
            with_head_scratch(|scratch| {
                let before = sized(&mut scratch.input, streams.len());
                before.copy_from_slice(streams);
                for (i, stream) in streams.chunks_exact_mut(hidden).enumerate() {
                    stream.iter_mut().zip(output).for_each(|(s, o)| *s = post[i] * o);
                    for (j, before) in before.chunks_exact(hidden).enumerate() {
                        let part = mix[j * count + i];
                        stream.iter_mut().zip(before).for_each(|(s, b)| *s += part * b);
                    }
                }
            });
        });
    }
}

fn divide_columns(mix: &mut [f32], count: usize, eps: f32) {
    for column in 0..count {
        let sum = mix[column..].iter().step_by(count).sum::<f32>() + eps;
        mix[column..].iter_mut().step_by(count).for_each(|v| *v /= sum);
    }
}
