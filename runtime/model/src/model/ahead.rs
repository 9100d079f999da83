//! Which experts the drive reads before a layer asks for them: those that its router will probably choose, or all of the next layer while a
//! long prompt is read.

use sluice_storage::pool::Pool;

use super::{Layer, LayerFfn, ModelError, Weights};
use crate::compute::Compute;
use crate::ffn::FfnScratch;
use crate::prefetch::{NextLayer, uses_all};
use crate::rows::Rows;

impl Layer {
    /// If the drive has nothing to do, starts to read experts that this layer will probably choose, by the residual `x` before its
    /// attention.
    pub(super) fn prefetch_own(
        &self,
        number: usize,
        compute: &Compute,
        weights: &mut Weights<'_>,
        (rows, x): (&Rows, &[f32]),
        ffn: &mut FfnScratch,
    ) -> Result<(), ModelError> {
        if !rows.generate() || !ffn.prefetches() {
            return Ok(());
        }
        let (rows, Weights { dense, experts, .. }) = (rows.len(), weights);
        let Some(part) = &self.ffn else { return Ok(()) };
        let (Some(routed), Some(norm)) = (part.ffn.routed(), part.ffn.router_norm().or(part.residual.norm())) else {
            return Ok(());
        };
        // A residual of several streams is joined with what attention adds.
        let several = x.len() != rows * norm.width();
        if several || !dense.is_here(part.router) || experts.has_all(number as u32) || experts.prefetching() > 0 {
            return Ok(());
        }
        let router = dense.dense(part.router)?;
        let layer = NextLayer { layer: number, routed, norm: Some(norm), factor: 0.0, extent: router.bytes() };
        ffn.prefetch_own(compute, &layer, (rows, x), experts);
        Ok(())
    }
}

/// The next layer after this number that has a feed-forward part, if it has experts: a prefetch asks its router.
fn next_routed(layers: &[Layer], number: usize) -> Option<(usize, &LayerFfn)> {
    let mut later = layers.iter().enumerate().skip(number + 1);
    let next = later.find_map(|(number, layer)| Some((number, layer.ffn.as_ref()?)));
    next.filter(|(_, part)| part.ffn.routed().is_some())
}

impl LayerFfn {
    /// What prefetches of this layer's experts need, if it has any.
    pub(super) fn to_prefetch<'a>(&'a self, layer: usize, factor: f32, extent: &'a [u8]) -> Option<NextLayer<'a>> {
        let norm = self.ffn.router_norm().or(self.residual.norm());
        Some(NextLayer { layer, routed: self.ffn.routed()?, norm, factor, extent })
    }
}

/// While a long prompt is read: starts to read the experts of this layer, or of the first one behind it that has any, and returns the layer
/// whose turn it is then.
pub(super) fn read_ahead(layers: &[Layer], number: usize, rows: &Rows, experts: &mut Pool) -> Option<u32> {
    layer_to_read(layers, number, rows).into_iter().for_each(|number| experts.read_ahead(number));
    layer_to_read(layers, number + 1, rows)
}

/// The first layer from this number on that has experts, if a pass with these rows uses nearly all of them.
fn layer_to_read(layers: &[Layer], number: usize, rows: &Rows) -> Option<u32> {
    let mut later = layers.iter().enumerate().skip(number);
    let (number, routed) = later.find_map(|(number, layer)| Some((number, layer.ffn.as_ref()?.ffn.routed()?)))?;
    uses_all(routed, rows).then_some(number as u32)
}

/// The next routed layer after this number, if its router is in memory and some of its experts are not: otherwise there is nothing to read
/// or to learn.
pub(super) fn next_to_read<'l>(
    layers: &'l [Layer],
    number: usize,
    weights: &Weights<'_>,
) -> Option<(usize, &'l LayerFfn)> {
    let wanted = |&(number, part): &(usize, &LayerFfn)| {
        weights.dense.is_here(part.router) && !weights.experts.has_all(number as u32)
    };
    next_routed(layers, number).filter(wanted)
}
