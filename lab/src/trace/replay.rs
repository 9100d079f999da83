//! The hits of a cache with a given policy and size.

use serde::Serialize;
use sluice_format::limits::MAX_EXTENTS;

use super::{Phase, Trace};
use sluice_storage::pool::policy::{Belady, Choice, Key, Pass, Policy, PolicyKind, Shape};
use sluice_storage::pool::{LayerSize, SlotPlan};

/// A trace prepared for replays: the passes through its routed layers, in the order of computation.
///
/// The rules: the whole trace is replayed, with an empty cache at the start; every line of a trace is one token that goes through
/// all layers; layers without routing in any token are left out; a layer's experts are needed together and are all read, and none
/// of them leaves before the layer is done.
#[derive(Clone, Debug)]
pub struct Replay {
    shape: Shape,
    passes: Vec<Record>,
    choices: Vec<Choice>,
    /// The experts of `choices`.
    experts: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    pub(super) layer: u32,
    prefill: bool,
    pub(super) start: usize,
    pub(super) end: usize,
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
    /// There are more experts in total than any model file holds: memory depends on their number, however short the trace.
    #[error("{layers} layers of {experts} experts are more than the {MAX_EXTENTS} that a model can have")]
    Shape {
        /// Layers with routing.
        layers: usize,
        /// Experts per layer.
        experts: u32,
    },
}

/// The result of one replay.
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
    /// Experts that were evicted.
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
    /// Whether `run` uses it by default.
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
    /// Prepares a trace; `experts` per layer if they differ from the trace's number.
    ///
    /// # Errors
    /// [`ReplayError`] if there is nothing to replay.
    pub fn new(trace: &Trace, experts: Option<u32>) -> Result<Replay, ReplayError> {
        let (layers, experts) = trace.routing(experts)?;
        let shape = Shape { layers: layers.len() as u32, experts };
        let mut replay = Replay { shape, passes: Vec::new(), choices: Vec::new(), experts: Vec::new() };
        for token in trace.tokens() {
            for (layer, &l) in layers.iter().enumerate() {
                let choices = trace.choices(token, l);
                // A model may skip its last layers for all tokens of a prompt except the last.
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
        // 0.07 × 100 is 7.000000000000001 and 0.29 × 100 is 28.999999999999996, but a fraction means its decimal digits.
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

    /// Replays the trace with a policy that may have learned something before. It must have no resident experts.
    ///
    /// If the slots do not hold all experts of a pass, those that have been computed make room for the next ones.
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
        let classes = vec![0; self.shape.layers as usize];
        result.evictions = self.go_through(policy, &[slots], &classes, |pass, missed| {
            let used = pass.end - pass.start;
            result.accesses += used as u64;
            result.hits += (used - missed) as u64;
            watch(pass, missed);
        });
        result
    }

    /// The bytes that need not be read, as a part of the bytes of all experts used, where experts of different layers have different sizes:
    /// `sizes` has the bytes of an expert of every layer with routing. The cache has slots as a pool of `bytes` bytes has them.
    ///
    /// # Panics
    /// If there is not a size for each layer with routing, or `policy` is [`PolicyKind::Belady`], which would have to plan across sizes.
    pub fn run_sized(&self, policy: PolicyKind, sizes: &[u64], bytes: u64) -> f64 {
        assert_eq!(sizes.len(), self.shape.layers as usize, "a size for each layer");
        let layer = |(layer, &len): (u32, &u64)| {
            let choices = self.passes.iter().filter(|pass| pass.layer == layer).map(|pass| pass.end - pass.start);
            LayerSize { len, experts: self.shape.experts as usize, top_k: choices.max().unwrap_or(0) }
        };
        let plan = SlotPlan::new((0..).zip(sizes).map(layer), bytes);
        let class = |len: &u64| plan.classes().partition_point(|class| class.len < *len) as u8;
        let classes: Vec<u8> = sizes.iter().map(class).collect();
        let mut policy = policy.build(self.shape).expect("a policy that does not know the future");
        policy.classify(&classes);
        let (mut used, mut found) = (0, 0);
        self.go_through(policy.as_mut(), &plan.counts(), &classes, |pass, missed| {
            let (len, experts) = (sizes[pass.layer as usize], pass.end - pass.start);
            used += len * experts as u64;
            found += len * (experts - missed) as u64;
        });
        if used == 0 { 0.0 } else { found as f64 / used as f64 }
    }

    /// Replays the trace with `slots` slots of each size class; `classes` has the class of every layer. Tells `watch` each pass, and how
    /// many of its experts were not in the cache. Returns how many had to leave.
    pub(super) fn go_through(
        &self,
        policy: &mut dyn Policy,
        slots: &[usize],
        classes: &[u8],
        mut watch: impl FnMut(&Record, usize),
    ) -> u64 {
        let mut evictions = 0;
        let mut resident = vec![false; self.shape.keys()];
        let mut free = slots.to_vec();
        let (mut pinned, mut missing) = (Vec::<Key>::new(), Vec::<Key>::new());
        for pass in &self.passes {
            let choices = &self.choices[pass.start..pass.end];
            policy.begin_pass(&Pass { layer: pass.layer, tokens: 1, prefill: pass.prefill, choices });
            let class = classes[pass.layer as usize];
            let (slots, free) = (slots[usize::from(class)], &mut free[usize::from(class)]);
            for choice in choices {
                let key = self.shape.key(pass.layer, choice.expert);
                if resident[key.index()] {
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
                if *free > 0 {
                    *free -= 1;
                } else {
                    let victim = policy.victim_in(class).or_else(|| {
                        pinned.drain(..).for_each(|done| policy.unpin(done));
                        policy.victim_in(class)
                    });
                    let victim = victim.expect("some key is resident and none is pinned");
                    assert!(std::mem::take(&mut resident[victim.index()]), "{victim:?} is not resident");
                    policy.evict(victim);
                    evictions += 1;
                }
                resident[key.index()] = true;
                policy.insert(key);
                policy.pin(key);
                pinned.push(key);
            }
            pinned.drain(..).for_each(|key| policy.unpin(key));
        }
        evictions
    }

    /// A report: every policy in `policies` at every cache size, each a part of all experts, with the optimum beside it.
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
