//! What a cache with a given policy and size would have hit.

use serde::Serialize;
use sluice_format::limits::MAX_EXTENTS;

use super::{Phase, Trace};
use sluice_storage::pool::policy::{Belady, Choice, Key, Pass, Policy, PolicyKind, Shape};

/// A trace made ready for replays: the passes through its routed layers, in the order of computation.
///
/// The rules: the whole trace, the cache empty at the start; every line of a trace is one token that goes through all
/// layers; layers without routing in any token are left out; a layer's experts are needed together, are all brought in, and
/// none of them leaves before the layer is done.
#[derive(Clone, Debug)]
pub struct Replay {
    shape: Shape,
    passes: Vec<Record>,
    choices: Vec<Choice>,
    /// The experts of `choices`.
    experts: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Record {
    layer: u32,
    prefill: bool,
    start: usize,
    end: usize,
}

/// Why a trace cannot be replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError {
    /// No layer of the trace routes to any expert.
    #[error("the trace has no routing: every list is empty")]
    Empty,
    /// The number of experts per layer does not fit the ids.
    #[error(
        "{said} experts per layer were given, the trace needs {needed}, and at most {} are possible",
        super::MAX_EXPERTS
    )]
    Experts {
        /// The number from the option or the header.
        said: u32,
        /// The largest id + 1.
        needed: u32,
    },
    /// More experts in all than any model file holds: memory goes with their number, however short the trace.
    #[error("{layers} layers of {experts} experts are more than the {MAX_EXTENTS} that a model can have")]
    Shape {
        /// Layers with routing.
        layers: usize,
        /// Experts per layer.
        experts: u32,
    },
}

/// What one replay found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ReplayResult {
    /// The policy.
    pub policy: PolicyKind,
    /// Slots of the cache.
    pub slots: usize,
    /// Experts used: tokens × layers × top-k.
    pub accesses: u64,
    /// Experts used that were in the cache when their layer began.
    pub hits: u64,
    /// Experts that had to leave.
    pub evictions: u64,
}

impl ReplayResult {
    /// Hits per access, 0 to 1.
    pub fn hit_rate(&self) -> f64 {
        if self.accesses == 0 { 0.0 } else { self.hits as f64 / self.accesses as f64 }
    }

    /// Experts that had to be read.
    pub fn misses(&self) -> u64 {
        self.accesses - self.hits
    }
}

/// One row of the report of `sluice trace replay`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Name of the trace.
    pub trace: String,
    /// The policy.
    pub policy: PolicyKind,
    /// Whether it is the one that `run` uses unless told otherwise.
    pub default: bool,
    /// Part of all experts that the cache holds, 0 to 1.
    pub cache: f64,
    /// The same as slots.
    pub slots: usize,
    /// Hits per access, 0 to 1.
    pub hit_rate: f64,
    /// The same for the optimum.
    pub optimal: f64,
}

impl Replay {
    /// Prepares a trace; `experts` per layer if not as the trace says.
    ///
    /// # Errors
    /// [`ReplayError`] when there is nothing to replay.
    pub fn new(trace: &Trace, experts: Option<u32>) -> Result<Replay, ReplayError> {
        let (layers, experts) = trace.routing(experts)?;
        let shape = Shape { layers: layers.len() as u32, experts };
        let mut replay = Replay { shape, passes: Vec::new(), choices: Vec::new(), experts: Vec::new() };
        for token in trace.tokens() {
            for (layer, &l) in layers.iter().enumerate() {
                let choices = trace.choices(token, l);
                // A model may skip its last layers for all tokens of a prompt but the last one.
                if choices.is_empty() {
                    continue;
                }
                let start = replay.choices.len();
                replay.choices.extend_from_slice(choices);
                replay.experts.extend(choices.iter().map(|c| c.expert));
                let prefill = token.phase == Some(Phase::Prefill);
                replay.passes.push(Record { layer: layer as u32, prefill, start, end: replay.choices.len() });
            }
        }
        Ok(replay)
    }

    /// Layers with routing, and experts per layer.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Slots of a cache that holds this part of all experts: ⌊fraction × layers × experts⌋.
    pub fn slots(&self, fraction: f64) -> usize {
        // 0.07 × 100 is 7.000000000000001 and 0.29 × 100 is 28.999999999999996: a fraction means its decimal digits.
        (fraction * self.shape.keys() as f64 + 1e-9).floor().max(0.0) as usize
    }

    /// Replays the trace with one of the policies.
    pub fn run(&self, policy: PolicyKind, slots: usize) -> ReplayResult {
        match policy.build(self.shape) {
            Some(mut policy) => self.run_with(policy.as_mut(), slots),
            None => self.run_with(&mut self.optimum(), slots),
        }
    }

    /// The optimal policy for this trace.
    pub fn optimum(&self) -> Belady {
        Belady::new(self.shape, self.passes.iter().map(|p| (p.layer, &self.experts[p.start..p.end])))
    }

    /// Replays the trace with a policy that may have learnt something before. Nothing may be resident in it.
    ///
    /// Where the slots do not hold all experts of a pass, those that have been computed make room for the next ones.
    pub fn run_with(&self, policy: &mut dyn Policy, slots: usize) -> ReplayResult {
        self.run_watched(policy, slots, &mut |_, _| ())
    }

    /// How many experts the generated tokens of the trace would miss with the default policy, layer by layer: `[tokens, layers]` of a model with
    /// so many `layers`, of which those numbered `routed` have experts. `None` if the trace is of another number of such layers, or has no
    /// generated token.
    pub fn misses_of_tokens(&self, slots: usize, routed: &[usize], layers: usize) -> Option<Vec<usize>> {
        if routed.len() != self.shape.layers as usize {
            return None;
        }
        let mut policy = PolicyKind::default().build(self.shape)?;
        let mut misses = Vec::new();
        self.run_watched(policy.as_mut(), slots, &mut |pass, missed| {
            if pass.prefill {
                return;
            }
            if pass.layer == 0 {
                misses.resize(misses.len() + layers, 0);
            }
            if let Some(token) = misses.len().checked_sub(layers) {
                misses[token + routed[pass.layer as usize]] = missed;
            }
        });
        (!misses.is_empty()).then_some(misses)
    }

    /// As [`run_with`](Self::run_with); `watch` hears how many experts each pass missed.
    fn run_watched(
        &self,
        policy: &mut dyn Policy,
        slots: usize,
        watch: &mut dyn FnMut(&Record, usize),
    ) -> ReplayResult {
        let mut result = ReplayResult { policy: policy.kind(), slots, accesses: 0, hits: 0, evictions: 0 };
        let mut resident = vec![false; self.shape.keys()];
        let mut free = slots;
        let (mut pinned, mut missing) = (Vec::<Key>::new(), Vec::<Key>::new());
        for pass in &self.passes {
            let choices = &self.choices[pass.start..pass.end];
            policy.begin_pass(&Pass { layer: pass.layer, tokens: 1, prefill: pass.prefill, choices });
            result.accesses += choices.len() as u64;
            for choice in choices {
                let key = self.shape.key(pass.layer, choice.expert);
                if resident[key.index()] {
                    result.hits += 1;
                    policy.hit(key);
                    policy.pin(key);
                    pinned.push(key);
                } else {
                    missing.push(key);
                }
            }
            watch(pass, missing.len());
            for key in missing.drain(..) {
                if slots == 0 {
                    continue;
                }
                if free > 0 {
                    free -= 1;
                } else {
                    let victim = policy.victim().or_else(|| {
                        pinned.drain(..).for_each(|done| policy.unpin(done));
                        policy.victim()
                    });
                    let victim = victim.expect("some key is resident and none is pinned");
                    assert!(std::mem::take(&mut resident[victim.index()]), "{victim:?} is not resident");
                    policy.evict(victim);
                    result.evictions += 1;
                }
                resident[key.index()] = true;
                policy.insert(key);
                policy.pin(key);
                pinned.push(key);
            }
            pinned.drain(..).for_each(|key| policy.unpin(key));
        }
        result
    }

    /// A report: every policy of `policies` at every cache size, a part of all experts each, and the optimum beside it.
    pub fn report(&self, trace: &str, policies: &[PolicyKind], caches: &[f64]) -> Vec<Row> {
        let mut rows = Vec::with_capacity(policies.len() * caches.len());
        for &cache in caches {
            let slots = self.slots(cache);
            let optimal = self.run(PolicyKind::Belady, slots).hit_rate();
            for &policy in policies {
                let hit_rate = if policy == PolicyKind::Belady { optimal } else { self.run(policy, slots).hit_rate() };
                let default = policy == PolicyKind::default();
                rows.push(Row { trace: trace.to_owned(), policy, default, cache, slots, hit_rate, optimal });
            }
        }
        rows
    }
}
