//! Which expert leaves when another one needs its slot. Pure: no file, no clock, no slot.

mod lru;

pub use lru::Lru;

/// An expert's number in the whole model: `layer × experts per layer + expert`.
pub type ExpertIndex = u32;

/// What the model is doing, as far as it matters to a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// One token, or one per sequence of a batch: what is used now is likely to be used soon.
    Decode,
    /// Many tokens at once: a sweep that says little about the next token.
    Prefill,
}

/// One pass over one layer, as a policy sees it begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassInfo {
    /// The layer.
    pub layer: u32,
    /// Passes over any layer before this one.
    pub number: u64,
    /// What the model is doing.
    pub phase: Phase,
}

/// Decides which expert is evicted. It is told everything that happens to experts:
///
/// 1. `begin_pass`, then `access` for every expert that the pass needs, resident or not;
/// 2. `insert` when an expert is given a slot (its read is only starting then);
/// 3. `victim` when a slot is needed and none is free, followed by `evict`;
/// 4. `evict` also when a read has failed.
///
/// No method allocates after construction.
pub trait EvictionPolicy: Send {
    /// Short name, for reports.
    fn name(&self) -> &'static str;

    /// A pass over a layer begins.
    fn begin_pass(&mut self, pass: PassInfo);

    /// The pass needs this expert.
    fn access(&mut self, expert: ExpertIndex);

    /// The expert got a slot. It had none.
    fn insert(&mut self, expert: ExpertIndex);

    /// The expert lost its slot. It had one.
    fn evict(&mut self, expert: ExpertIndex);

    /// The expert to be evicted, among those with a slot for which `evictable` is true (the
    /// others are in use). `None` only if there is none. Does not evict by itself.
    fn victim(&mut self, evictable: &dyn Fn(ExpertIndex) -> bool) -> Option<ExpertIndex>;
}
