//! A sequence: the tokens so far, and what the layers remember of them.

use sluice_format::ModelSpec;
use sluice_kernels::KvType;

use super::attention::LayerCache;

/// What the layers remember of the tokens of one sequence.
#[derive(Clone, Debug)]
pub struct Sequence {
    layers: Vec<LayerCache>,
    position: usize,
    capacity: usize,
}

impl Sequence {
    /// An empty sequence with room for `capacity` tokens, whose keys and values are of type `ty`.
    pub fn new(spec: &ModelSpec, capacity: usize, ty: KvType) -> Self {
        let layers = spec.layers.iter().map(|l| LayerCache::new(&l.attention, capacity, ty));
        Sequence { layers: layers.collect(), position: 0, capacity }
    }

    /// Bytes of a sequence with room for `capacity` tokens.
    pub fn memory(spec: &ModelSpec, capacity: usize, ty: KvType) -> u64 {
        spec.layers.iter().map(|l| LayerCache::memory(&l.attention, capacity, ty)).fold(0, u64::saturating_add)
    }

    /// Bytes of keys, values and states that are allocated.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|l| l.bytes() as u64).sum()
    }

    /// Tokens seen so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.position = 0;
    }

    /// All layers have seen `count` more tokens.
    pub(super) fn advance(&mut self, count: usize) {
        self.position += count;
    }

    pub(super) fn layer(&self, index: usize) -> &LayerCache {
        &self.layers[index]
    }

    pub(super) fn layer_mut(&mut self, index: usize) -> &mut LayerCache {
        &mut self.layers[index]
    }

    /// A sequence that counts tokens and remembers nothing.
    #[cfg(test)]
    pub(super) fn without_layers(capacity: usize) -> Self {
        Sequence { layers: Vec::new(), position: 0, capacity }
    }
}
