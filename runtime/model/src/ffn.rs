//! The feed-forward part of a layer: router, dense part, routed experts.

use std::time::Duration;

use sluice_format::FfnSpec;
use sluice_kernels::{Activations, sigmoid};

use super::ModelError;
use super::compute::{Compute, Step, sized};
use super::experts::{ExpertScratch, Routed};
use super::gated::{GatedFfn, GatedScratch};
use super::outputs::Combining;
use super::prefetch::{NextLayer, Prefetcher};
use super::router::Choice;
use super::rows::Rows;
use super::tally::Tallied;
use super::weights::{ExtentTensors, MatrixRef};
use sluice_storage::pool::{Pool, Routing};

/// The feed-forward part of one layer.
#[derive(Debug)]
pub struct Ffn {
    dense: Option<GatedFfn>,
    dense_gate: Option<MatrixRef>,
    routed: Option<Routed>,
    latent: Option<Latent>,
}

/// Projections into the space that experts compute in, and back, as places in the dense extent.
#[derive(Debug)]
struct Latent {
    down: MatrixRef,
    up: MatrixRef,
}

/// Buffers that the feed-forward part reuses from call to call.
#[derive(Debug)]
pub struct FfnScratch {
    x: Activations,
    gated: GatedScratch,
    gate: Vec<f32>,
    latent: LatentScratch,
    experts: ExpertScratch,
    prefetcher: Prefetcher,
}

/// What experts read and write, where that is not as wide as the layer.
#[derive(Debug)]
struct LatentScratch {
    /// `[n, latent]`.
    product: Vec<f32>,
    input: Activations,
    /// `[n, hidden]`.
    output: Vec<f32>,
}

impl LatentScratch {
    fn new(compute: &Compute) -> Self {
        LatentScratch { product: Vec::new(), input: Activations::new(compute.precision), output: Vec::new() }
    }
}

impl FfnScratch {
    /// Empty buffers; they grow to what the first call needs. `most_kept`: bytes of experts' outputs that may wait to be summed.
    pub fn new(compute: &Compute, prefetch: bool, most_kept: u64) -> Self {
        FfnScratch {
            x: Activations::new(compute.precision),
            gated: GatedScratch::new(compute),
            gate: Vec::new(),
            latent: LatentScratch::new(compute),
            experts: ExpertScratch::new(compute, most_kept),
            prefetcher: Prefetcher::new(prefetch, compute),
        }
    }

    /// Gives all buffers back; what prefetches have taught stays.
    pub fn give_back(&mut self, compute: &Compute) {
        let FfnScratch { x, gated, gate, latent, experts, prefetcher } = self;
        *latent = LatentScratch::new(compute);
        *x = Activations::new(compute.precision);
        *gated = GatedScratch::new(compute);
        *gate = Vec::new();
        *experts = ExpertScratch::new(compute, experts.most_kept());
        prefetcher.give_back(compute);
    }

    /// Whether the next layer's experts are to be prefetched.
    pub(super) fn prefetches(&self) -> bool {
        self.prefetcher.enabled()
    }

    /// The choices of the last call, `[rows, top_k]`, experts ascending.
    pub fn choices(&self) -> &[Choice] {
        self.experts.choices()
    }
}

/// What the feed-forward part of one layer computes with.
pub struct FfnStep<'a> {
    /// Kernels, threads, precision.
    pub compute: &'a Compute,
    /// The rows of the pass.
    pub rows: &'a Rows,
    /// Number of the layer.
    pub layer: usize,
    /// Bytes of the router extent.
    pub router: &'a [u8],
    /// Bytes of the dense extent, if the layer has one.
    pub dense: Option<&'a [u8]>,
    /// What this part sees of the residual `[n, hidden]` and the next layer, to read ahead for it.
    pub ahead: Option<(&'a [f32], NextLayer<'a>)>,
}

impl FfnStep<'_> {
    /// For what is computed with the router extent.
    fn router(&self) -> Step<'_> {
        Step { compute: self.compute, rows: self.rows, extent: self.router }
    }
}

impl Ffn {
    pub(super) fn new(
        spec: &FfnSpec,
        router: &ExtentTensors<'_>,
        dense: &ExtentTensors<'_>,
        expert: &ExtentTensors<'_>,
    ) -> Result<Self, ModelError> {
        let routed = spec.moe.as_ref().map(|moe| Routed::new(moe, spec.activation, router, expert)).transpose()?;
        let dense_gate = spec.dense_gate.then(|| dense.matrix("dense_gate")).transpose()?;
        let latent = match spec.moe.as_ref().and_then(|moe| moe.latent) {
            None => None,
            Some(_) => Some(Latent { down: dense.matrix("latent_down")?, up: dense.matrix("latent_up")? }),
        };
        let network = match spec.dense_width {
            0 => None,
            width => Some(GatedFfn::new(width, spec.dense_activation(), false, dense)?),
        };
        Ok(Ffn { dense: network, dense_gate, routed, latent })
    }

    /// The routed experts, if the layer has any.
    pub(super) fn routed(&self) -> Option<&Routed> {
        self.routed.as_ref()
    }

    /// The feed-forward part of the rows of a pass: reads `x` `[n, hidden]` (normalised), writes `out` `[n, hidden]`.
    /// Returns the time spent in routed experts, without waiting for them.
    ///
    /// # Errors
    /// [`ModelError::Pool`] when an expert cannot be read or is damaged.
    pub fn forward(
        &self,
        step: &FfnStep<'_>,
        pool: &mut Pool,
        x: &[f32],
        scratch: &mut FfnScratch,
        out: &mut [f32],
    ) -> Result<Duration, ModelError> {
        let n = step.rows.len();
        let hidden = x.len() / n;
        let FfnScratch { x: activations, gated, gate, latent, experts, prefetcher } = scratch;
        activations.set(x, n, hidden);
        experts.begin();
        let mut pass = match &self.routed {
            None => None,
            Some(routed) => {
                routed.route(step.router(), activations, experts)?;
                let routing = Routing {
                    tokens: n,
                    prefill: !step.rows.generate(),
                    in_order: experts.combine(routed, n, routed.spec().input_width(hidden)) == Combining::InOrder,
                    choices: experts.choices(),
                };
                Some(pool.begin_layer(step.layer as u32, experts.distinct(), &routing)?)
            }
        };
        // The reads are under way: what every token needs is computed meanwhile.
        match (&self.dense, step.dense) {
            (Some(dense), Some(bytes)) => {
                dense.forward(step.compute, Tallied::not(bytes), 0, activations, gated, out);
                self.gate_dense(step.compute, bytes, activations, gate, out);
            }
            _ => out.fill(0.0),
        }
        let (Some(routed), Some(pass)) = (&self.routed, &mut pass) else { return Ok(Duration::ZERO) };
        prefetcher.judge(step.layer, experts.distinct());
        if let Some((residual, next)) = &step.ahead {
            prefetcher.prefetch(step.compute, next, (step.rows.ids(), residual), out, pass);
        }
        match (&self.latent, step.dense) {
            (Some(of_layer), Some(extent)) => {
                let compute = step.compute;
                let LatentScratch { product, input, output } = latent;
                let width = of_layer.down.rows();
                let product = sized(product, n * width);
                compute.multiply(&of_layer.down, extent, activations, product);
                input.set(product, n, width);
                compute.observe_experts_input(of_layer.down.place().layer, input);
                product.fill(0.0);
                let time = routed.run(step.router(), pass, input, experts, product)?;
                input.set(product, n, width);
                let output = sized(output, n * hidden);
                compute.multiply(&of_layer.up, extent, input, output);
                out.iter_mut().zip(output).for_each(|(o, v)| *o += *v);
                Ok(time)
            }
            _ => routed.run(step.router(), pass, activations, experts, out),
        }
    }

    /// Multiplies the dense part's output by the sigmoid of its gate (Qwen's shared expert).
    fn gate_dense(&self, compute: &Compute, extent: &[u8], x: &Activations, gate: &mut Vec<f32>, out: &mut [f32]) {
        let Some(matrix) = &self.dense_gate else { return };
        let gate = sized(gate, x.n());
        compute.multiply(matrix, extent, x, gate);
        for (row, gate) in out.chunks_exact_mut(out.len() / x.n()).zip(gate) {
            let gate = sigmoid(*gate);
            row.iter_mut().for_each(|o| *o *= gate);
        }
    }
}
