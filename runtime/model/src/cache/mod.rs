//! What layers remember of a sequence, and how it is stored: attention asks for rows by position and knows no more.

mod index;
mod key_value;
mod latent;

use std::ops::Range;

use sluice_format::AttentionSpec;
use sluice_kernels::KvType;

pub use self::key_value::KeyValueCache;
pub use self::latent::{LatentCache, latent_width};
use super::delta::{self, DeltaState, StateAt};

/// Why a cache is of the kind that its layer wants.
const OF_ITS_SPEC: &str = "a cache is made from the spec of its layer";

/// What one layer remembers of the tokens of one sequence.
#[derive(Debug)]
pub enum LayerCache {
    /// Latents and rotated keys.
    Latent(LatentCache),
    /// Keys and values.
    KeyValue(KeyValueCache),
    /// A recurrent state.
    State(DeltaState),
}

impl LayerCache {
    /// An empty cache for `max_tokens` positions, with keys and values of type `ty`. A recurrent state is always f32: it
    /// does not grow with the context, and its errors would add up.
    pub fn new(spec: &AttentionSpec, max_tokens: usize, ty: KvType) -> Self {
        match spec {
            AttentionSpec::Mla(m) => LayerCache::Latent(LatentCache::new(m, max_tokens, ty)),
            AttentionSpec::Gqa(g) => LayerCache::KeyValue(KeyValueCache::new(g, max_tokens, ty)),
            AttentionSpec::Delta(d) => LayerCache::State(DeltaState::new(d)),
        }
    }

    pub fn latent(&self) -> &LatentCache {
        let LayerCache::Latent(cache) = self else { unreachable!("{OF_ITS_SPEC}") };
        cache
    }

    pub fn latent_mut(&mut self) -> &mut LatentCache {
        let LayerCache::Latent(cache) = self else { unreachable!("{OF_ITS_SPEC}") };
        cache
    }

    pub fn key_value(&self) -> &KeyValueCache {
        let LayerCache::KeyValue(cache) = self else { unreachable!("{OF_ITS_SPEC}") };
        cache
    }

    pub fn key_value_mut(&mut self) -> &mut KeyValueCache {
        let LayerCache::KeyValue(cache) = self else { unreachable!("{OF_ITS_SPEC}") };
        cache
    }

    pub fn state_mut(&mut self) -> &mut DeltaState {
        let LayerCache::State(state) = self else { unreachable!("{OF_ITS_SPEC}") };
        state
    }

    /// Bytes that are allocated.
    pub fn bytes(&self) -> usize {
        match self {
            LayerCache::Latent(cache) => cache.bytes(),
            LayerCache::KeyValue(cache) => cache.bytes(),
            LayerCache::State(state) => state.bytes(),
        }
    }

    /// Bytes of a cache for `max_tokens` positions.
    pub fn memory(spec: &AttentionSpec, max_tokens: usize, ty: KvType) -> u64 {
        let per_token = match spec {
            AttentionSpec::Mla(m) => latent::bytes_per_token(m, ty),
            AttentionSpec::Gqa(g) => key_value::bytes_per_token(g, ty),
            AttentionSpec::Delta(d) => return delta::state_memory(d),
        };
        (per_token as u64).saturating_mul(max_tokens as u64)
    }

    /// Bytes of the copy that a mark keeps: of a recurrent state. Keys and values need none.
    pub fn snapshot_memory(spec: &AttentionSpec) -> u64 {
        match spec {
            AttentionSpec::Delta(d) => delta::snapshot_memory(d),
            AttentionSpec::Mla(_) | AttentionSpec::Gqa(_) => 0,
        }
    }

    /// A copy of what is remembered of the first `position` tokens.
    pub fn fork(&self, position: usize) -> Self {
        match self {
            LayerCache::Latent(cache) => LayerCache::Latent(cache.fork(position)),
            LayerCache::KeyValue(cache) => LayerCache::KeyValue(cache.fork(position)),
            LayerCache::State(state) => LayerCache::State(state.fork(position)),
        }
    }

    /// The recurrent state, in layers that have one.
    pub fn state(&self) -> Option<&DeltaState> {
        match self {
            LayerCache::State(state) => Some(state),
            LayerCache::Latent(_) | LayerCache::KeyValue(_) => None,
        }
    }

    /// Whether what is remembered of the first `position` tokens is still there.
    pub fn reaches(&self, position: usize) -> bool {
        match self {
            LayerCache::Latent(_) => true,
            LayerCache::KeyValue(cache) => cache.reaches(position),
            LayerCache::State(state) => position == 0 || state.at(position).is_some(),
        }
    }

    /// Forgets the tokens from `position` on. `snapshot`: the state there, where [`LayerCache::reaches`] says that it is gone.
    pub fn rewind(&mut self, position: usize, snapshot: Option<&StateAt>) {
        match self {
            LayerCache::Latent(_) => {}
            LayerCache::KeyValue(cache) => cache.rewind(position),
            LayerCache::State(state) => state.rewind(position, snapshot),
        }
    }

    /// Records that a saved sequence of `position` tokens has of this layer: the positions of rows that later tokens can see, or
    /// the one state.
    pub fn records(&self, position: usize) -> Range<usize> {
        match self {
            LayerCache::Latent(_) => 0..position,
            LayerCache::KeyValue(cache) => cache.seen_from(position),
            LayerCache::State(_) => position.saturating_sub(1)..position,
        }
    }

    /// Bytes of each record.
    pub fn record_len(&self) -> usize {
        match self {
            LayerCache::Latent(cache) => cache.row_len(),
            LayerCache::KeyValue(cache) => cache.row_len(),
            LayerCache::State(state) => state.state_len(),
        }
    }

    /// Writes a record. That of a state is the one behind its token.
    pub fn record_to_bytes(&self, record: usize, out: &mut [u8]) {
        match self {
            LayerCache::Latent(cache) => cache.row_to_bytes(record, out),
            LayerCache::KeyValue(cache) => cache.row_to_bytes(record, out),
            LayerCache::State(state) => state.state_to_bytes(record + 1, out),
        }
    }

    /// Puts a record back; that of the earliest position first.
    pub fn record_from_bytes(&mut self, record: usize, bytes: &[u8]) {
        match self {
            LayerCache::Latent(cache) => cache.row_from_bytes(record, bytes),
            LayerCache::KeyValue(cache) => cache.row_from_bytes(record, bytes),
            LayerCache::State(state) => state.state_from_bytes(record + 1, bytes),
        }
    }

    /// A restored sequence has no rows before `position`.
    pub fn begin_at(&mut self, position: usize) {
        if let LayerCache::KeyValue(cache) = self {
            cache.begin_at(position);
        }
    }
}
