//! A sequence: the tokens so far, and what the layers remember of them.
//!
//! Keys and values are rows by position: to forget the last tokens is to count fewer. A recurrent state has taken all tokens
//! in and cannot give one back; so marks keep copies of it, and a sequence goes back to a mark.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sluice_format::ModelSpec;
use sluice_kernels::KvType;

use super::cache::LayerCache;
use super::delta::StateAt;
use super::session::Binding;

/// A place in a sequence that one can go back to, as long as the sequence has not gone back beyond it. A fork has the marks of
/// the sequence that it was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mark {
    position: usize,
    id: u64,
}

impl Mark {
    /// Tokens before the mark.
    pub fn position(self) -> usize {
        self.position
    }

    fn new(position: usize) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Mark { position, id: NEXT.fetch_add(1, Ordering::Relaxed) }
    }
}

/// Why a sequence cannot be marked, or go where it is asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RewindError {
    /// The mark is another sequence's, the sequence has since gone back beyond it, or newer ones have taken its place.
    #[error("the sequence no longer has the mark at token {position}: set it again, or go to a position")]
    NoSuchMark {
        /// Where the mark was.
        position: usize,
    },
    /// There are not so many tokens.
    #[error("the sequence has {position} tokens and cannot go to token {wanted}")]
    Beyond {
        /// Tokens of the sequence.
        position: usize,
        /// Where it is to go.
        wanted: usize,
    },
    /// The memory plan has no room for copies of recurrent states.
    #[error(
        "a mark in this model takes {bytes} bytes, and the memory plan has room for none: open the model with room for marks"
    )]
    NoMarks {
        /// Bytes of a copy of all states.
        bytes: u64,
    },
}

/// A mark with the states of the layers that have one, in their order. Forks share them.
#[derive(Clone, Debug)]
struct Snapshot {
    mark: Mark,
    states: Arc<[StateAt]>,
}

/// What the layers remember of the tokens of one sequence.
#[derive(Debug)]
pub struct Sequence {
    layers: Vec<LayerCache>,
    tokens: Vec<u32>,
    capacity: usize,
    /// Those that still stand, in the order in which they were made.
    marks: Vec<Snapshot>,
    /// Most marks with states.
    most_marks: usize,
    /// Bytes of the states of a mark; none in models without recurrent layers.
    mark_bytes: u64,
    binding: Binding,
}

impl Sequence {
    /// An empty sequence with room for `capacity` tokens, of the model and with the type of keys and values that `binding`
    /// says. In a model with recurrent layers it keeps `marks` marks.
    pub fn new(spec: &ModelSpec, capacity: usize, binding: Binding, marks: usize) -> Self {
        let layers = spec.layers.iter().map(|l| LayerCache::new(&l.attention, capacity, binding.kv_type));
        Sequence {
            layers: layers.collect(),
            tokens: Vec::with_capacity(capacity),
            capacity,
            marks: Vec::new(),
            most_marks: marks,
            mark_bytes: Self::mark_memory(spec),
            binding,
        }
    }

    /// Bytes of a sequence with room for `capacity` tokens, without marks and its own list of the tokens.
    pub fn memory(spec: &ModelSpec, capacity: usize, ty: KvType) -> u64 {
        spec.layers.iter().map(|l| LayerCache::memory(&l.attention, capacity, ty)).fold(0, u64::saturating_add)
    }

    /// Bytes of a mark: a copy of every recurrent state, none in models that have none.
    pub fn mark_memory(spec: &ModelSpec) -> u64 {
        spec.layers.iter().map(|l| LayerCache::snapshot_memory(&l.attention)).fold(0, u64::saturating_add)
    }

    /// Bytes of keys, values and states that are allocated, without those of marks.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|l| l.bytes() as u64).sum()
    }

    /// What its numbers depend on beside its tokens.
    pub fn binding(&self) -> Binding {
        self.binding
    }

    /// Tokens seen so far.
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens seen so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.go_to(0);
    }

    /// Marks where the sequence is. A mark costs nothing, except in models with recurrent layers: there it costs
    /// [`Sequence::mark_memory`] bytes, and the oldest mark goes when there are more than the sequence was made for.
    ///
    /// # Errors
    /// [`RewindError::NoMarks`] where it was made for none.
    pub fn mark(&mut self) -> Result<Mark, RewindError> {
        let position = self.position();
        if let Some(snapshot) = self.marks.iter().find(|s| s.mark.position == position) {
            return Ok(snapshot.mark);
        }
        let mut states = Vec::new();
        // At the beginning there is nothing to copy.
        if self.mark_bytes > 0 && position > 0 {
            if self.most_marks == 0 {
                return Err(RewindError::NoMarks { bytes: self.mark_bytes });
            }
            let with_states = |s: &Snapshot| !s.states.is_empty();
            if self.marks.iter().filter(|s| with_states(s)).count() >= self.most_marks {
                let oldest = self.marks.iter().position(with_states).expect("there is at least one");
                self.marks.remove(oldest);
            }
            let recurrent = self.layers.iter().filter_map(LayerCache::state);
            states.extend(recurrent.map(|state| state.at(position).expect("a step leaves a state").clone()));
        }
        let mark = Mark::new(position);
        self.marks.push(Snapshot { mark, states: states.into() });
        Ok(mark)
    }

    /// The marks that stand, oldest first.
    pub fn marks(&self) -> impl Iterator<Item = Mark> {
        self.marks.iter().map(|snapshot| snapshot.mark)
    }

    /// Gives up a mark and its memory, if it still stands.
    pub fn unmark(&mut self, mark: Mark) {
        self.marks.retain(|snapshot| snapshot.mark != mark);
    }

    /// Forgets the tokens behind a mark. The mark stays, later ones do not.
    ///
    /// # Errors
    /// [`RewindError::NoSuchMark`]; the sequence is then as it was.
    pub fn rewind(&mut self, mark: Mark) -> Result<(), RewindError> {
        if !self.marks().any(|own| own == mark) {
            return Err(RewindError::NoSuchMark { position: mark.position });
        }
        self.go_to(mark.position);
        Ok(())
    }

    /// Forgets the tokens from `position` on, or from the nearest earlier position that there is a way back to, and says which
    /// one it is. That is `position` itself as long as there is no recurrent layer and the sequence has not been restored;
    /// otherwise a mark, where the last step or the one before it ended, or the beginning.
    ///
    /// # Errors
    /// [`RewindError::Beyond`] if there are fewer tokens; the sequence is then as it was.
    pub fn rewind_to(&mut self, position: usize) -> Result<usize, RewindError> {
        let reached = self.reachable(position)?;
        self.go_to(reached);
        Ok(reached)
    }

    /// Where [`Sequence::rewind_to`] would go.
    ///
    /// # Errors
    /// As there.
    pub fn reachable(&self, position: usize) -> Result<usize, RewindError> {
        if position > self.position() {
            return Err(RewindError::Beyond { position: self.position(), wanted: position });
        }
        let reaches = |at: usize| {
            let copied = self.marks.iter().any(|s| s.mark.position == at);
            self.layers.iter().all(|layer| layer.reaches(at) || (copied && layer.state().is_some()))
        };
        let marked = self.marks.iter().map(|s| s.mark.position);
        let states = self.layers.iter().filter_map(LayerCache::state).take(1).flat_map(|state| state.positions());
        let candidates = marked.chain(states).chain([0, position]);
        Ok(candidates.filter(|&at| at <= position && reaches(at)).max().unwrap_or(0))
    }

    /// Goes back to where all layers can go.
    fn go_to(&mut self, position: usize) {
        if position < self.position() {
            let snapshot = self.marks.iter().find(|s| s.mark.position == position);
            let mut states = snapshot.iter().flat_map(|s| s.states.iter());
            for layer in &mut self.layers {
                let state = layer.state().is_some().then(|| states.next()).flatten();
                layer.rewind(position, state);
            }
        }
        self.tokens.truncate(position);
        self.marks.retain(|s| s.mark.position <= position);
    }

    /// A sequence of the same tokens that goes on by itself. What it takes is what this one takes, but only rows of tokens that
    /// were seen are copied; states of marks are shared.
    #[must_use]
    pub fn fork(&self) -> Self {
        let mut tokens = Vec::with_capacity(self.capacity);
        tokens.extend_from_slice(&self.tokens);
        Sequence {
            layers: self.layers.iter().map(|layer| layer.fork(self.position())).collect(),
            tokens,
            capacity: self.capacity,
            marks: self.marks.clone(),
            most_marks: self.most_marks,
            mark_bytes: self.mark_bytes,
            binding: self.binding,
        }
    }

    /// All layers have seen these tokens.
    pub(super) fn advance(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
    }

    pub(super) fn layers(&self) -> &[LayerCache] {
        &self.layers
    }

    pub(super) fn layers_mut(&mut self) -> &mut [LayerCache] {
        &mut self.layers
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
        Sequence {
            layers: Vec::new(),
            tokens: Vec::new(),
            capacity,
            marks: Vec::new(),
            most_marks: 0,
            mark_bytes: 0,
            binding: Binding::default(),
        }
    }
}
