//! The feed-forward part of a layer: router, dense part, routed experts.

use std::time::{Duration, Instant};

use sluice_format::{ActivationSpec, FfnSpec, MoeSpec};
use sluice_kernels::{Activation, Activations};

use super::ModelError;
use super::compute::{Compute, sized};
use super::router::{Choice, RouterScratch, route};
use super::weights::{ExtentTensors, MatrixRef, VectorRef};
use crate::pool::{LayerPass, Pool};

/// A gated feed-forward network inside an extent: the dense part or one expert.
#[derive(Clone, Copy, Debug)]
pub struct GatedFfn {
    gate_up: MatrixRef,
    down: MatrixRef,
    width: usize,
    activation: Activation,
}

impl GatedFfn {
    pub(super) fn new(width: usize, spec: ActivationSpec, tensors: &ExtentTensors<'_>) -> Result<Self, ModelError> {
        let activation = match spec {
            ActivationSpec::Silu => Activation::Silu,
        };
        Ok(GatedFfn { gate_up: tensors.matrix("gate_up")?, down: tensors.matrix("down")?, width, activation })
    }

    /// `out` `[n, hidden]` = down · act(gate · x, up · x).
    fn forward(&self, compute: &Compute, extent: &[u8], x: &Activations, s: &mut GatedScratch, out: &mut [f32]) {
        let (kernels, threads) = (&compute.kernels, &compute.threads);
        let n = x.n();
        let h = sized(&mut s.hidden, n * self.width);
        kernels.gate_up(threads, self.gate_up.view(extent), self.width, self.activation, x, h);
        s.activations.set(h, n, self.width);
        kernels.matmul(threads, self.down.view(extent), &s.activations, out);
    }
}

#[derive(Debug)]
struct GatedScratch {
    hidden: Vec<f32>,
    activations: Activations,
}

/// Router matrix and its bias, as places in the router extent.
#[derive(Debug)]
pub struct Router {
    matrix: MatrixRef,
    bias: Option<VectorRef>,
}

/// The feed-forward part of one layer.
#[derive(Debug)]
pub struct Ffn {
    dense: Option<GatedFfn>,
    routed: Option<Routed>,
}

#[derive(Debug)]
struct Routed {
    spec: MoeSpec,
    router: Router,
    expert: GatedFfn,
}

/// One use of an expert: which token, and which of its choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Assignment {
    expert: u32,
    token: u32,
    choice: u32,
}

/// Buffers that the feed-forward part reuses from call to call.
#[derive(Debug)]
pub struct FfnScratch {
    x: Activations,
    gathered: Activations,
    gated: GatedScratch,
    logits: Vec<f32>,
    bias: Vec<f32>,
    router: RouterScratch,
    choices: Vec<Choice>,
    assignments: Vec<Assignment>,
    experts: Vec<u32>,
    tokens: Vec<u32>,
    /// One expert's output, `[its tokens, hidden]`.
    output: Vec<f32>,
    /// Every expert's output, `[tokens, top_k, hidden]`: summed at the end in a fixed order, whatever the order of arrival.
    outputs: Vec<f32>,
}

impl FfnScratch {
    /// Empty buffers; they grow to what the first call needs.
    pub fn new(compute: &Compute) -> Self {
        let activations = || Activations::new(compute.precision);
        FfnScratch {
            x: activations(),
            gathered: activations(),
            gated: GatedScratch { hidden: Vec::new(), activations: activations() },
            logits: Vec::new(),
            bias: Vec::new(),
            router: RouterScratch::default(),
            choices: Vec::new(),
            assignments: Vec::new(),
            experts: Vec::new(),
            tokens: Vec::new(),
            output: Vec::new(),
            outputs: Vec::new(),
        }
    }

    /// The choices of the last call, `[tokens, top_k]`, experts ascending.
    pub fn choices(&self) -> &[Choice] {
        &self.choices
    }
}

/// The dense parts of a layer in memory.
#[derive(Clone, Copy)]
pub struct FfnExtents<'a> {
    /// Bytes of the router extent.
    pub router: &'a [u8],
    /// Bytes of the dense extent, if the layer has one.
    pub dense: Option<&'a [u8]>,
}

impl Ffn {
    pub(super) fn new(
        spec: &FfnSpec,
        router: &ExtentTensors<'_>,
        dense: &ExtentTensors<'_>,
        expert: &ExtentTensors<'_>,
    ) -> Result<Self, ModelError> {
        let routed = match &spec.moe {
            None => None,
            Some(moe) => Some(Routed {
                spec: moe.clone(),
                router: Router {
                    matrix: router.matrix("router")?,
                    bias: moe.router.choice_bias.then(|| router.vector("router_bias")).transpose()?,
                },
                expert: GatedFfn::new(moe.width, spec.activation, expert)?,
            }),
        };
        let dense = match spec.dense_width {
            0 => None,
            width => Some(GatedFfn::new(width, spec.activation, dense)?),
        };
        Ok(Ffn { dense, routed })
    }

    /// The feed-forward part of `n` tokens: reads `x` `[n, hidden]` (normalised), writes `out` `[n, hidden]`.
    /// Returns the time spent in routed experts, without waiting for them.
    ///
    /// # Errors
    /// [`ModelError::Pool`] when an expert cannot be read or is damaged.
    #[expect(clippy::too_many_arguments, reason = "inputs, state, scratch and output of one step; a struct would only rename them")]
    pub fn forward(
        &self,
        compute: &Compute,
        extents: FfnExtents<'_>,
        pool: &mut Pool,
        layer: usize,
        n: usize,
        x: &[f32],
        scratch: &mut FfnScratch,
        out: &mut [f32],
    ) -> Result<Duration, ModelError> {
        let hidden = x.len() / n;
        scratch.x.set(x, n, hidden);
        scratch.choices.clear();
        let mut pass = match &self.routed {
            None => None,
            Some(routed) => {
                routed.route(compute, extents.router, n, scratch);
                Some(pool.begin_layer(layer as u32, &scratch.experts, crate::pool::Phase::of_tokens(n))?)
            }
        };
        // The reads are under way: what every token needs is computed meanwhile.
        match (&self.dense, extents.dense) {
            (Some(dense), Some(bytes)) => dense.forward(compute, bytes, &scratch.x, &mut scratch.gated, out),
            _ => out.fill(0.0),
        }
        let (Some(routed), Some(pass)) = (&self.routed, &mut pass) else { return Ok(Duration::ZERO) };
        let time = routed.run(compute, pass, n, hidden, scratch)?;
        routed.sum(compute, n, hidden, scratch, out);
        Ok(time)
    }
}

impl Routed {
    /// Fills `choices`, `assignments` (by expert, then token) and `experts` (distinct, ascending).
    fn route(&self, compute: &Compute, extent: &[u8], n: usize, s: &mut FfnScratch) {
        let logits = sized(&mut s.logits, n * self.spec.experts);
        compute.kernels.matmul(&compute.threads, self.router.matrix.view(extent), &s.x, logits);
        if let Some(bias) = &self.router.bias {
            bias.read(extent, &mut s.bias);
        }
        let bias = self.router.bias.map(|_| s.bias.as_slice());
        for logits in logits.chunks_exact(self.spec.experts) {
            route(&self.spec, logits, bias, &mut s.router, &mut s.choices);
        }
        s.assignments.clear();
        s.assignments.extend(s.choices.iter().enumerate().map(|(i, c)| Assignment {
            expert: c.expert,
            token: (i / self.spec.top_k) as u32,
            choice: i as u32,
        }));
        s.assignments.sort_unstable();
        s.experts.clear();
        s.experts.extend(s.assignments.iter().map(|a| a.expert));
        s.experts.dedup();
    }

    /// Computes the experts as the pool hands them out, each into its own rows of `outputs`.
    fn run(
        &self,
        compute: &Compute,
        pass: &mut LayerPass<'_>,
        n: usize,
        hidden: usize,
        s: &mut FfnScratch,
    ) -> Result<Duration, ModelError> {
        let mut time = Duration::ZERO;
        let outputs = sized(&mut s.outputs, n * self.spec.top_k * hidden);
        while let Some(expert) = pass.next()? {
            let started = Instant::now();
            let first = s.assignments.partition_point(|a| a.expert < expert.expert());
            let last = s.assignments.partition_point(|a| a.expert <= expert.expert());
            let uses = &s.assignments[first..last];
            s.tokens.clear();
            s.tokens.extend(uses.iter().map(|a| a.token));
            s.gathered.gather(&s.x, &s.tokens);
            let output = sized(&mut s.output, uses.len() * hidden);
            self.expert.forward(compute, expert.bytes(), &s.gathered, &mut s.gated, output);
            for (a, row) in uses.iter().zip(output.chunks_exact(hidden)) {
                outputs[a.choice as usize * hidden..][..hidden].copy_from_slice(row);
            }
            time += started.elapsed();
        }
        Ok(time)
    }

    /// Adds the weighted outputs in ascending order of expert, then the dense part that `out` already holds.
    fn sum(&self, compute: &Compute, n: usize, hidden: usize, s: &FfnScratch, out: &mut [f32]) {
        let top_k = self.spec.top_k;
        compute.threads.for_each_chunk(&mut out[..n * hidden], hidden, &|t, out| {
            let choices = &s.choices[t * top_k..][..top_k];
            let rows = &s.outputs[t * top_k * hidden..][..top_k * hidden];
            for (i, out) in out.iter_mut().enumerate() {
                let routed = choices.iter().enumerate().fold(0.0, |sum, (j, c)| sum + c.weight * rows[j * hidden + i]);
                *out += routed;
            }
        });
    }
}
