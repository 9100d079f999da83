//! The feed-forward part of a layer: router, dense part, routed experts.

use std::time::Duration;

use sluice_format::{FfnSpec, ModelSpec};
use sluice_kernels::{Activations, Work, Works, sigmoid};

use super::ModelError;
use super::compute::{Compute, Step, sized};
use super::experts::{ExpertScratch, Routed};
use super::gated::{GatedFfn, GatedScratch};
use super::model::ModelOptions;
use super::norm::{Norm, NormScratch};
use super::outputs::Combining;
use super::prefetch::{NextLayer, Prefetcher};
use super::router::Choice;
use super::rows::Rows;
use super::tally::Tallied;
use super::thrift::{Preference, Preferred};
use super::weights::{ExtentTensors, MatrixRef};
use sluice_storage::pool::{LayerPass, Pool, Routing};

/// The feed-forward part of one layer.
#[derive(Debug)]
pub struct Ffn {
    dense: Option<GatedFfn>,
    dense_gate: Option<MatrixRef>,
    routed: Option<Routed>,
    latent: Option<Latent>,
    apart: Option<Apart>,
}

/// Projections into the space in which experts compute, and back, as places in the dense extent.
#[derive(Debug)]
struct Latent {
    down: MatrixRef,
    up: MatrixRef,
}

/// Norms of a layer whose experts are apart: those before experts and router, and those after the dense part and the experts.
#[derive(Debug)]
struct Apart {
    router: Norm,
    experts: Norm,
    dense_post: Norm,
    experts_post: Norm,
}

impl Apart {
    fn new(spec: &ModelSpec, router: &ExtentTensors<'_>) -> Result<Self, ModelError> {
        let norm = |name| Norm::rms(spec.norm_eps, router, name);
        Ok(Apart {
            router: norm("router_norm")?,
            experts: norm("expert_norm")?,
            dense_post: norm("dense_post_norm")?,
            experts_post: norm("expert_post_norm")?,
        })
    }
}

/// f32 values of scratch per row, for experts apart from the dense part.
pub(super) fn apart_width(spec: &FfnSpec, hidden: u64) -> u64 {
    // Inputs of router and experts, in f32 and in int8, the rows that are being normalised, and the experts' sum.
    if spec.moe.as_ref().is_some_and(|moe| moe.apart) { 6 * hidden } else { 0 }
}

/// Buffers for experts apart from the dense part.
#[derive(Debug)]
struct ApartScratch {
    norm: NormScratch,
    /// `[n, hidden]`.
    normed: Vec<f32>,
    router: Activations,
    experts: Activations,
    /// The experts' weighted sum, `[n, hidden]`.
    sum: Vec<f32>,
}

impl ApartScratch {
    fn new(compute: &Compute) -> Self {
        ApartScratch {
            norm: NormScratch::default(),
            normed: Vec::new(),
            router: Activations::new(compute.precision),
            experts: Activations::new(compute.precision),
            sum: Vec::new(),
        }
    }

    /// Sets the inputs of router and experts for the rows `x` of the residual.
    fn set(&mut self, apart: &Apart, extent: &[u8], x: &[f32]) {
        let (hidden, normed) = (apart.router.width(), sized(&mut self.normed, x.len()));
        for (norm, input) in [(&apart.router, &mut self.router), (&apart.experts, &mut self.experts)] {
            norm.apply(extent, x, &mut self.norm, normed);
            input.set(normed, x.len() / hidden, hidden);
        }
    }
}

/// Buffers that the feed-forward part reuses from call to call.
#[derive(Debug)]
pub struct FfnScratch {
    x: Activations,
    gated: GatedScratch,
    gate: Vec<f32>,
    latent: LatentScratch,
    experts: ExpertScratch,
    apart: ApartScratch,
    prefetcher: Prefetcher,
    /// How strongly experts in memory are preferred while tokens are generated.
    preference: Preference,
}

/// Inputs and outputs of experts that are not as wide as the layer.
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
    /// Empty buffers; they grow to the size that the first call needs.
    pub fn new(compute: &Compute, options: ModelOptions) -> Self {
        FfnScratch {
            x: Activations::new(compute.precision),
            gated: GatedScratch::new(compute),
            gate: Vec::new(),
            latent: LatentScratch::new(compute),
            experts: ExpertScratch::new(compute, options.most_kept),
            apart: ApartScratch::new(compute),
            prefetcher: Prefetcher::new(options.prefetch, compute),
            preference: options.thrift.preference,
        }
    }

    /// Frees all buffers; what prefetches have learned stays.
    pub fn give_back(&mut self, compute: &Compute) {
        let FfnScratch { x, gated, gate, latent, experts, apart, prefetcher, preference: _ } = self;
        *latent = LatentScratch::new(compute);
        *x = Activations::new(compute.precision);
        *gated = GatedScratch::new(compute);
        *gate = Vec::new();
        *experts = experts.anew(compute);
        *apart = ApartScratch::new(compute);
        prefetcher.give_back(compute);
    }

    /// Changes how many bytes of experts' outputs may wait to be summed, from the next pass on.
    pub(super) fn keep_at_most(&mut self, bytes: u64) {
        self.experts.keep_at_most(bytes);
    }

    /// Whether the next layer's experts will be prefetched.
    pub(super) fn prefetches(&self) -> bool {
        self.prefetcher.enabled()
    }

    /// Starts to read experts that the router of `layer` will probably choose, by the `state` of so many rows before its attention.
    pub(super) fn prefetch_own(
        &mut self,
        compute: &Compute,
        layer: &NextLayer<'_>,
        (rows, state): (usize, &[f32]),
        pool: &mut Pool,
    ) {
        self.prefetcher.prefetch_own(compute, layer, (rows, state), pool);
    }

    /// How many choices differed from the routers' own.
    pub(super) fn replaced(&self) -> u64 {
        self.experts.replaced()
    }

    /// The choices of the last call, `[rows, top_k]`, experts ascending.
    pub fn choices(&self) -> &[Choice] {
        self.experts.choices()
    }
}

/// The data with which the feed-forward part of one layer computes.
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
    /// This part's view of the residual, `[n, hidden]`.
    pub residual: &'a [f32],
    /// The next layer, for prefetching its experts.
    pub ahead: Option<NextLayer<'a>>,
    /// The layer whose experts are read after this one's, all of them.
    pub then_read: Option<u32>,
}

impl FfnStep<'_> {
    /// The step for parts whose weights are in the router extent.
    fn router(&self) -> Step<'_> {
        Step { compute: self.compute, rows: self.rows, extent: self.router }
    }
}

impl Ffn {
    pub(super) fn new(
        model: &ModelSpec,
        spec: &FfnSpec,
        router: &ExtentTensors<'_>,
        dense: &ExtentTensors<'_>,
        expert: &ExtentTensors<'_>,
    ) -> Result<Self, ModelError> {
        let is_apart = spec.moe.as_ref().is_some_and(|moe| moe.apart);
        let apart = is_apart.then(|| Apart::new(model, router)).transpose()?;
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
        Ok(Ffn { dense: network, dense_gate, routed, latent, apart })
    }

    /// The routed experts, if the layer has any.
    pub(super) fn routed(&self) -> Option<&Routed> {
        self.routed.as_ref()
    }

    /// The norm before the router, if it has one that the dense part does not share.
    pub(super) fn router_norm(&self) -> Option<&Norm> {
        self.apart.as_ref().map(|apart| &apart.router)
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
        let FfnScratch { x: activations, gated, gate, latent, experts, apart: own, prefetcher, preference } = scratch;
        activations.set(x, n, hidden);
        experts.begin();
        if let Some(apart) = &self.apart {
            own.set(apart, step.router, step.residual);
        }
        let begun = self.begins_together(step, pool);
        if begun {
            self.begin_together(step, activations, (gated, gate), experts);
        }
        let mut pass = match &self.routed {
            None => None,
            Some(routed) => {
                let in_memory = |expert| pool.has(step.layer as u32, expert);
                let preferred = Preferred { part: preference.part(), in_memory: &in_memory };
                let preferred = Some(&preferred).filter(|_| !preference.is_none() && step.rows.generate());
                let input = if self.apart.is_some() { &own.router } else { &*activations };
                routed.route(step.router(), (input, begun), preferred, experts)?;
                let routing = Routing {
                    tokens: n,
                    prefill: !step.rows.generate(),
                    in_order: experts.combine(routed, n, routed.spec().input_width(hidden)) == Combining::InOrder,
                    choices: experts.choices(),
                };
                Some(pool.begin_layer(step.layer as u32, experts.distinct(), &routing)?)
            }
        };
        if let (Some(pass), Some(next)) = (&mut pass, step.then_read) {
            pass.then_read(next);
        }
        // The reads are under way; meanwhile, compute what every token needs.
        match (&self.dense, step.dense) {
            (Some(dense), Some(bytes)) if begun => {
                dense.finish(step.compute, bytes, gated, out);
                self.gate_dense(gate, out);
            }
            (Some(dense), Some(bytes)) => {
                dense.forward(step.compute, Tallied::not(bytes), 0, activations, gated, out);
                if let Some(matrix) = &self.dense_gate {
                    step.compute.multiply(matrix, bytes, activations, sized(gate, n));
                }
                self.gate_dense(gate, out);
            }
            _ => out.fill(0.0),
        }
        let (Some(routed), Some(pass)) = (&self.routed, &mut pass) else { return Ok(Duration::ZERO) };
        prefetcher.judge(step.layer, experts.distinct());
        if let Some(next) = &step.ahead {
            prefetcher.prefetch(step.compute, next, (step.rows.ids(), step.residual), out, pass);
        }
        let begun = Experts { routed, step, pass, scratch: experts };
        match (&self.latent, &self.apart, step.dense) {
            (Some(of_layer), _, Some(extent)) => begun.in_latents(of_layer, extent, activations, latent, out),
            (_, Some(apart), _) => begun.apart(apart, own, out),
            _ => begun.routed.run(step.router(), begun.pass, activations, begun.scratch, out),
        }
    }

    /// Whether the router and the first half of the dense part are one job: all experts of the layer are in memory, and one row meets
    /// matrices that take it as it is.
    fn begins_together(&self, step: &FfnStep<'_>, pool: &Pool) -> bool {
        let as_it_is = |dense: &GatedFfn| dense.takes_inputs_as_they_are();
        let ordered = self.dense_gate.as_ref().is_some_and(MatrixRef::is_ordered)
            || self.routed.as_ref().is_some_and(Routed::router_is_ordered);
        step.rows.len() == 1
            && self.routed.is_some()
            && step.dense.is_some()
            && step.compute.observer.is_none()
            && self.apart.is_none()
            && !ordered
            && self.dense.as_ref().is_some_and(as_it_is)
            && pool.has_all(step.layer as u32)
    }

    /// Computes the router's product with the one row `x` and the first half of the dense part as one job. If nothing has to be read,
    /// no read has to wait for the dense part then.
    fn begin_together(
        &self,
        step: &FfnStep<'_>,
        x: &Activations,
        (gated, gate): (&mut GatedScratch, &mut Vec<f32>),
        experts: &mut ExpertScratch,
    ) {
        let mut works = Works::new();
        works.extend(self.routed.as_ref().map(|routed| routed.router_work(step.router, x, experts)));
        if let (Some(dense), Some(bytes)) = (&self.dense, step.dense) {
            dense.begin_works(bytes, x, gated, &mut |work| works.push(work));
            let gate = self.dense_gate.as_ref().map(|matrix| (matrix, sized(gate, 1)));
            works.extend(gate.map(|(matrix, gate)| Work::matmul(matrix.view(bytes), x, gate)));
        }
        step.compute.kernels.products(&step.compute.threads, &works);
    }

    /// Multiplies the dense part's output `[n, hidden]` by the sigmoid of its gate, `[n]` or longer, if it has one (Qwen's shared
    /// expert).
    fn gate_dense(&self, gate: &[f32], out: &mut [f32]) {
        let Some(matrix) = &self.dense_gate else { return };
        for (row, gate) in out.chunks_exact_mut(matrix.cols()).zip(gate) {
            let gate = sigmoid(*gate);
            row.iter_mut().for_each(|o| *o *= gate);
        }
    }
}

/// The routed experts of a layer whose input is not that of the dense part.
struct Experts<'a, 's, 'p> {
    routed: &'a Routed,
    step: &'a FfnStep<'a>,
    pass: &'a mut LayerPass<'p>,
    scratch: &'s mut ExpertScratch,
}

impl Experts<'_, '_, '_> {
    /// Experts that compute in a space of their own: their weighted sum is projected back and added to `out` `[n, hidden]`. `x`:
    /// the rows as the dense part sees them.
    fn in_latents(
        self,
        of_layer: &Latent,
        extent: &[u8],
        x: &Activations,
        scratch: &mut LatentScratch,
        out: &mut [f32],
    ) -> Result<Duration, ModelError> {
        let (compute, n, width) = (self.step.compute, x.n(), of_layer.down.rows());
        let LatentScratch { product, input, output } = scratch;
        let product = sized(product, n * width);
        compute.multiply(&of_layer.down, extent, x, product);
        input.set(product, n, width);
        compute.observe_experts_input(of_layer.down.place().layer, input);
        product.fill(0.0);
        let time = self.routed.run(self.step.router(), self.pass, input, self.scratch, product)?;
        input.set(product, n, width);
        let output = sized(output, out.len());
        compute.multiply(&of_layer.up, extent, input, output);
        out.iter_mut().zip(output).for_each(|(o, v)| *o += *v);
        Ok(time)
    }

    /// Experts apart from the dense part: their output and that of the dense part, `out` `[n, hidden]`, are normalised before they
    /// are added.
    fn apart(self, apart: &Apart, scratch: &mut ApartScratch, out: &mut [f32]) -> Result<Duration, ModelError> {
        let (step, len) = (self.step, out.len());
        let ApartScratch { norm, normed, experts: x, sum, .. } = scratch;
        let (normed, sum) = (sized(normed, len), sized(sum, len));
        step.compute.observe_experts_input(step.layer as u32, x);
        sum.fill(0.0);
        let time = self.routed.run(step.router(), self.pass, x, self.scratch, sum)?;
        apart.dense_post.apply_in_place(step.router, out, norm, normed);
        apart.experts_post.apply(step.router, sum, norm, normed);
        out.iter_mut().zip(&*normed).for_each(|(out, n)| *out += n);
        Ok(time)
    }
}
