//! Which expert leaves the pool when another one needs its slot.
//!
//! A policy is a pure function of what it is told: it uses no clock, no file and no randomness. The pool tells it what
//! happens and asks it for a victim; the replayer (`trace::replay`) does exactly the same with recorded routing, which is
//! how policies are compared and tuned. Each has a file of its own:
//!
//! | policy | evicts |
//! |---|---|
//! | [`Lru`] | the key that was used longest ago |
//! | [`Lfu`] | the key that was used least often |
//! | [`NextUse`] (default) | the key whose next use is expected latest |
//! | [`Belady`] | the key whose next use *is* latest: the optimum, for replays |
//!
//! # What the pool says, and when
//! For every pass of tokens through a layer with routed experts, in this order:
//! 1. [`Policy::begin_pass`]: the layer and what the router chose for every token.
//! 2. For every chosen expert that is resident: [`Policy::hit`], [`Policy::pin`].
//! 3. For every other one, when no slot is free: [`Policy::victim`], [`Policy::evict`] with the answer; then
//!    [`Policy::insert`], [`Policy::pin`].
//! 4. For every chosen expert when it has been computed: [`Policy::unpin`].
//!
//! Steps 2 to 4 happen once per expert, however many tokens chose it. Prefetched experts also come in by step 3, outside
//! the pass that will use them, and are pinned as long as they must not leave. Pins do not nest here: the pool counts
//! them, and reports only the first pin and the last unpin.

mod belady;
mod lfu;
mod lru;
mod next_use;
mod tournament;

use std::fmt;
use std::str::FromStr;

pub use self::belady::Belady;
pub use self::lfu::Lfu;
pub use self::lru::Lru;
pub use self::next_use::NextUse;

/// How many experts there are: the keys are `0..layers × experts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Layers with routed experts; layers without are not counted.
    pub layers: u32,
    /// Experts per layer.
    pub experts: u32,
}

impl Shape {
    /// Number of keys.
    pub fn keys(self) -> usize {
        self.layers as usize * self.experts as usize
    }

    /// The key of an expert.
    ///
    /// # Panics
    /// When there is no such expert.
    pub fn key(self, layer: u32, expert: u32) -> Key {
        assert!(layer < self.layers && expert < self.experts, "no expert {expert} of layer {layer} in {self:?}");
        Key(layer * self.experts + expert)
    }

    /// The layer and the expert of a key.
    pub fn expert(self, key: Key) -> (u32, u32) {
        (key.0 / self.experts, key.0 % self.experts)
    }
}

/// One expert of one layer as a dense index: layer × experts per layer + expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub u32);

impl Key {
    /// The index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// An expert that the router chose for a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The expert.
    pub expert: u32,
    /// Its router weight; NaN if it is not known.
    pub weight: f32,
}

/// One pass of one or more tokens through the routed experts of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// The layer, counting only layers with routed experts.
    pub layer: u32,
    /// Tokens that go through together, at least 1.
    pub tokens: u32,
    /// Whether these tokens are part of a prompt.
    pub prefill: bool,
    /// What the router chose: the same number of experts for each token, token by token.
    pub choices: &'a [Choice],
}

/// Decides who leaves; see the [module](self) for the order of calls. Every call costs O(log keys) or less, except
/// [`Policy::begin_pass`], which may touch every expert *of its layer* once (as the router has just done) and a bounded
/// history, and [`Policy::victim_in`], which may look at every layer if slots have several sizes; none depends on the
/// number of slots. Nothing is allocated by any of them but [`Policy::classify`] and [`Policy::export`].
///
/// # Panics
/// Implementations may panic when a key is out of range. Calls out of order (an insert of a resident key, a pin of an
/// absent one) are the caller's mistake and give useless victims, never unsound ones: a victim is always a key that the
/// policy was told is resident and not pinned.
pub trait Policy: fmt::Debug + Send {
    /// Which policy this is.
    fn kind(&self) -> PolicyKind;

    /// Tokens enter a layer and the router has chosen.
    fn begin_pass(&mut self, pass: &Pass<'_>);

    /// A chosen expert is resident.
    fn hit(&mut self, key: Key);

    /// A key becomes resident, not pinned.
    fn insert(&mut self, key: Key);

    /// A key is no longer resident (the victim, or one that could not be read).
    fn evict(&mut self, key: Key);

    /// A resident key must stay.
    fn pin(&mut self, key: Key);

    /// A pinned key may go again.
    fn unpin(&mut self, key: Key);

    /// Says which layers share slots of one size: `classes` has the size class of each layer, counted from 0. Call it before anything is
    /// resident; without it, all layers are in class 0.
    fn classify(&mut self, classes: &[u8]);

    /// The resident key of a size class to evict next; `None` when all are pinned. Does not evict it.
    ///
    /// Experts of different sizes are worth a comparison too, but the size then cancels out: what an expert saves is the probability
    /// of its use times the bytes that need not be read, and what it costs is these bytes of memory.
    fn victim_in(&mut self, class: u8) -> Option<Key>;

    /// The same where all slots have one size.
    fn victim(&mut self) -> Option<Key> {
        self.victim_in(0)
    }

    /// How late a key is expected to be used, resident or not: what has more is evicted before what has less. `None` if nothing is known
    /// that would speak for the key, or the policy knows nothing of keys that are not resident.
    fn lateness(&self, _key: Key) -> Option<u64> {
        None
    }

    /// What the policy wants to remember until the next start, as bytes; empty if nothing.
    fn export(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes over the bytes that [`Policy::export`] of a policy of the same kind and shape gave. This does not change
    /// which experts are resident.
    ///
    /// # Errors
    /// [`ImportError`] when the bytes are not such an export; then nothing has changed.
    fn import(&mut self, bytes: &[u8]) -> Result<(), ImportError> {
        if bytes.is_empty() { Ok(()) } else { Err(ImportError::Policy) }
    }
}

/// Why remembered counts cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// Written by another policy, another version of it, or not by a policy at all.
    #[error("the counts were not written by this version of this policy")]
    Policy,
    /// Written for another number of layers or experts.
    #[error("the counts are for {layers} layers of {experts} experts, the model is of another shape")]
    Shape {
        /// Layers of the counts.
        layers: u32,
        /// Experts per layer of the counts.
        experts: u32,
    },
    /// Too short, too long, or with numbers that no count can have.
    #[error("the counts are damaged")]
    Damaged,
}

/// The policies that can be chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyKind {
    /// Least recently used.
    Lru,
    /// Least frequently used.
    Lfu,
    /// Latest expected next use.
    #[default]
    NextUse,
    /// The optimum. Only replays can have it, since only they know the future.
    Belady,
}

impl PolicyKind {
    /// The policies that work without knowing the future.
    pub const ONLINE: [PolicyKind; 3] = [PolicyKind::Lru, PolicyKind::Lfu, PolicyKind::NextUse];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            PolicyKind::Lru => "lru",
            PolicyKind::Lfu => "lfu",
            PolicyKind::NextUse => "next-use",
            PolicyKind::Belady => "belady",
        }
    }

    /// The policy for a model of this shape; `None` for [`PolicyKind::Belady`], see [`Belady::new`].
    pub fn build(self, shape: Shape) -> Option<Box<dyn Policy>> {
        match self {
            PolicyKind::Lru => Some(Box::new(Lru::new(shape))),
            PolicyKind::Lfu => Some(Box::new(Lfu::new(shape))),
            PolicyKind::NextUse => Some(Box::new(NextUse::new(shape))),
            PolicyKind::Belady => None,
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No policy has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no policy `{0}`: choose lru, lfu, next-use or belady")]
pub struct UnknownPolicy(pub String);

impl FromStr for PolicyKind {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        let all = [PolicyKind::Lru, PolicyKind::Lfu, PolicyKind::NextUse, PolicyKind::Belady];
        all.into_iter().find(|kind| kind.name() == name).ok_or_else(|| UnknownPolicy(name.to_owned()))
    }
}

#[cfg(test)]
mod tests;
