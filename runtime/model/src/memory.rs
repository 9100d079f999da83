//! How the budget is spent. The plan is made when a model is opened; while it is open, the expert slots can shrink and grow back.

mod available;
mod passes;
mod pressure;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use sluice_format::{Codec, ExtentKind, ExtentRecord, ModelFile, ModelSpec};
use sluice_kernels::KvType;

use crate::cache::{Layout, PageLayout, PagePool};
use crate::ngrams::cached_sectors;
use crate::{Model, dense_extents, opened_extents};
use sluice_storage::pool::{LEAST_SLOTS, LayerSize, RING_SLOTS, SlotPlan};

use self::passes::LongPasses;
pub(crate) use self::passes::{LongPass, Reading};
pub use available::{GroupLimit, SystemMemory, available_memory, group_limits};
pub use pressure::{Pressure, PressureWatch, Sample, Wish};

/// Memory outside the budget: the program itself, its tokenizer and small buffers, in bytes.
pub const OVERHEAD: u64 = 64 << 20;
/// Scratch that counts as overhead; only what goes beyond it is charged to the budget.
const FREE_SCRATCH: u64 = 32 << 20;
/// Most rows that go through a layer together: beyond that, reading an expert costs little compared with multiplying.
const MAX_ROWS: usize = 8192;
/// Fewest rows that go through a layer together when memory is short.
const MIN_ROWS: usize = 16;
/// Part of the budget, and most bytes, for experts' outputs that wait to be summed. The 8 choices of 146 rows with a hidden size of
/// 7168 fit the latter.
const KEPT_OUTPUTS: (u64, u64) = (64, 32 << 20);
/// Most tokens of a sequence whose head inputs wait to be given to the prediction layer.
pub const WAITING_INPUTS: usize = 32;
/// How many times those of a sequence are there at most: of the last step, those that wait with them, and those that the layer meets.
const INPUT_COPIES: u64 = 3;
/// Slots of each size without which no layer can run.
pub(crate) const MIN_SLOTS: usize = LEAST_SLOTS;
/// Most staging slots: more than a drive needs to be kept busy.
const MAX_STAGING: usize = 18;
/// What is left to the system when no budget is given: this part of the available memory, but this many bytes at least, of
/// which no more than half, so that a small machine has a budget at all.
const HEADROOM: (u64, u64) = (10, 512 << 20);

/// How a budget is spent. All figures in bytes unless named otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The budget that the user asked for; `None`: as much as is useful and available.
    pub requested: Option<u64>,
    /// What the system allows: the least of available memory and control group limits.
    pub available: u64,
    /// The budget that the plan is made for; once the budget has changed, the bytes that are used.
    pub effective: u64,
    /// Dense parts that stay in memory.
    pub dense: u64,
    /// Dense parts that are read again for every token, because the budget does not hold them.
    pub dense_streamed: u64,
    /// The ring of slots that the streamed dense parts pass through.
    pub dense_ring: u64,
    /// For each dense extent, in the order of use, whether it stays.
    #[serde(skip)]
    pub pinned: Vec<bool>,
    /// Keys, values and states of all sequences.
    pub kv_cache: u64,
    /// Pages of each kind; they are a part of `kv_cache`.
    #[serde(skip)]
    pub pages: Vec<usize>,
    /// The same for sequences of the prediction layer; none unless it is opened.
    #[serde(skip)]
    pub prediction_pages: Vec<usize>,
    /// How those are stored.
    #[serde(serialize_with = "name_of_kv_type")]
    pub kv_type: KvType,
    /// Sequences that there is room for.
    pub sequences: usize,
    /// Tokens that each of them can hold.
    pub context: usize,
    /// Marks of each of them whose windows and recurrent states can be kept; a part of `kv_cache`.
    #[serde(skip)]
    pub marks: usize,
    /// Scratch and cached rows of embedding and tables, as far as they are charged.
    pub scratch: u64,
    /// Rows that go through a layer together; more while a long prompt is read, if that saves bytes.
    pub rows: usize,
    /// What longer passes take and save.
    #[serde(skip)]
    long_passes: LongPasses,
    /// Most bytes of experts' outputs that wait to be summed; a part of `scratch`.
    #[serde(skip)]
    pub kept_outputs: u64,
    /// Expert slots; fewer than at first once the budget has shrunk.
    pub slots: usize,
    /// Bytes of all expert slots.
    pub slot_bytes: u64,
    /// Expert slots of each size.
    #[serde(skip)]
    pub slot_plan: SlotPlan,
    /// The same at first: the most that there can be.
    #[serde(skip)]
    pub most_slots: SlotPlan,
    /// Bytes of the largest slot, which holds any expert; smaller experts have smaller slots where the budget holds enough of them.
    pub slot_len: u64,
    /// Experts of the whole model.
    pub experts: usize,
    /// Staging slots that compressed experts are read into, to be decompressed from there; none where none is compressed.
    #[serde(skip)]
    pub staging_slots: usize,
    /// Their bytes in all.
    pub staging: u64,
}

/// What sequences a plan has to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Sequences at a time, at least 1.
    pub sequences: usize,
    /// Tokens that each of them can hold.
    pub context: usize,
    /// How their keys and values are kept.
    pub kv_type: KvType,
    /// Marks of each of them whose windows and recurrent states can be kept.
    pub marks: usize,
    /// Whether the prediction layer is opened too, with as many sequences.
    pub prediction: bool,
    /// Threads that read prompts in the expanded form of latent attention; 0: none does.
    pub expanding: usize,
}

impl Demand {
    /// One sequence.
    pub fn one(context: usize, kv_type: KvType) -> Self {
        Demand { sequences: 1, context, kv_type, marks: 0, prediction: false, expanding: 0 }
    }
}

/// The budget cannot hold what the model needs at least.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{}: this model needs at least {} ({} for dense parts, {} key-value cache for {}, {} scratch, {} for {MIN_SLOTS} experts). \
     A smaller weight type takes less, and so do fewer tokens of context",
    too_small(*.requested, *.available, *.effective, *.least),
    Bytes::at_least(*.least), Bytes(*.dense), Bytes(*.kv_cache), tokens(*.sequences, *.context), Bytes(*.scratch),
    Bytes(*.slots)
)]
pub struct BudgetError {
    /// What the user asked for.
    pub requested: Option<u64>,
    /// What the system allows.
    pub available: u64,
    /// The budget: of the two, what remains.
    pub effective: u64,
    /// The smallest budget that works.
    pub least: u64,
    /// Of which dense parts.
    pub dense: u64,
    /// Of which keys and values.
    pub kv_cache: u64,
    /// Sequences that have those.
    pub sequences: usize,
    /// Tokens in each.
    pub context: usize,
    /// Of which scratch.
    pub scratch: u64,
    /// Of which expert slots.
    pub slots: u64,
}

fn tokens(sequences: usize, context: usize) -> String {
    if sequences == 1 { format!("{context} tokens") } else { format!("{sequences} times {context} tokens") }
}

/// Which of what the user asked for and what the system allows makes the budget too small, and what raises it.
fn too_small(requested: Option<u64>, available: u64, effective: u64, least: u64) -> String {
    let enough = available.saturating_sub(OVERHEAD);
    // A larger budget than there is memory for helps nobody.
    let raise = requested == Some(effective) && least <= enough;
    let (available, effective) = (Bytes(available), Bytes(effective));
    match requested {
        Some(_) if raise => format!("the budget of {effective} is too small; raise --budget"),
        Some(_) => {
            format!("the {available} of memory that are available allow a budget of {effective}; free memory")
        }
        None if least <= enough => format!(
            "of the {available} of memory that are available {effective} are used, too little; free memory, or say with \
             --budget how much of it may be used"
        ),
        None => format!("only {available} of memory are available; free memory"),
    }
}

impl MemoryPlan {
    /// Plans the memory of an opened model and its sequences.
    ///
    /// # Errors
    /// [`BudgetError`] when the least plan does not fit.
    pub fn new(file: &ModelFile, requested: Option<u64>, demand: Demand) -> Result<Self, BudgetError> {
        Self::of_extents(file.spec(), file.extents(), requested, demand, available_memory())
    }

    /// Plans for a file of these extents on a machine with `available` bytes: the file need not exist.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`].
    pub fn of_extents(
        spec: &ModelSpec,
        extents: &[ExtentRecord],
        requested: Option<u64>,
        demand: Demand,
        available: u64,
    ) -> Result<Self, BudgetError> {
        let need = Need::of(spec, extents, demand);
        let most_for_rows = need.for_rows(need.most_rows(), KEPT_OUTPUTS.1);
        let everything = most_for_rows.saturating_add(need.dense_total() + need.all_slots());
        let effective = effective_budget(requested, everything, available);

        let least = need.least();
        let Least { scratch: least_scratch, dense: least_dense, .. } = least;
        if effective < least.bytes() {
            return Err(least.refuses(requested, available, effective, demand));
        }

        let (staging_slots, staging) = need.staging(effective - least.bytes());
        let (least, least_slots) = (least.bytes() - need.staging(0).1, least.slots - need.staging(0).1);
        let budget = effective - staging;
        let (rows, kept_outputs) = need.rows(budget, budget - least + least_scratch);
        let (kv_cache, scratch) = (need.kv_cache(rows), need.scratch(rows, kept_outputs));
        // A dense byte is needed by every token, an expert's by few: dense parts come first, but two layers' worth of
        // experts must be able to be in flight.
        let left = budget - kv_cache - scratch;
        let wanted_slots = (2 * need.top_k).max(MIN_SLOTS).min(need.experts) as u64 * need.slot_len;
        let dense = need.pin(left - least_slots.max(wanted_slots.min(left - least_dense)));
        let slots = need.slots(left - dense.bytes());
        Ok(MemoryPlan {
            requested,
            available,
            effective,
            dense: dense.stays,
            dense_streamed: dense.streamed,
            dense_ring: dense.ring,
            pinned: dense.pinned,
            kv_cache,
            pages: need.counts(&need.layout, demand.marks, rows),
            prediction_pages: need.prediction_counts(rows),
            kv_type: demand.kv_type,
            sequences: demand.sequences,
            context: demand.context,
            marks: demand.marks,
            scratch,
            rows,
            long_passes: LongPasses::new(&need, (rows, kept_outputs)),
            kept_outputs,
            slots: slots.slots(),
            slot_bytes: slots.bytes(),
            slot_plan: slots.clone(),
            most_slots: slots,
            slot_len: need.slot_len,
            experts: need.experts,
            staging_slots,
            staging,
        })
    }

    /// Makes the page pool that was planned. `spec`: of the model that it was planned for.
    pub(crate) fn page_pool(&self, spec: &ModelSpec) -> Arc<PagePool> {
        PagePool::new(Layout::new(spec, self.kv_type), &self.pages)
    }

    /// The same for sequences of the prediction layer, if it was planned for.
    pub(crate) fn prediction_pool(&self, spec: &ModelSpec) -> Option<Arc<PagePool>> {
        let model = spec.prediction_model().filter(|_| !self.prediction_pages.is_empty())?;
        Some(PagePool::new(Layout::new(&model, self.kv_type), &self.prediction_pages))
    }

    /// Bytes of available memory that slots leave alone while they are filled for the first time.
    pub(crate) fn left_alone(&self) -> u64 {
        match self.requested {
            None => headroom(self.available),
            // Much of the overhead has been taken by then.
            Some(_) => OVERHEAD / 2,
        }
    }

    /// Whether all dense parts and all experts stay in memory.
    pub fn holds_all(&self) -> bool {
        self.slots == self.experts && self.dense_streamed == 0
    }

    /// Bytes that will be allocated.
    pub fn used(&self) -> u64 {
        self.dense + self.dense_ring + self.kv_cache + self.scratch + self.staging + self.slot_bytes
    }
}

fn name_of_kv_type<S: serde::Serializer>(ty: &KvType, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(ty.name())
}

/// What a model asks of memory.
struct Need<'a> {
    spec: &'a ModelSpec,
    demand: Demand,
    /// The dense extents in the order of use: bytes in memory, and of compressed ones, in the file.
    dense: Vec<(ExtentKind, u64, u64)>,
    layout: Layout,
    /// The prediction layer as a model of its own, if it is opened.
    prediction: Option<(ModelSpec, Layout)>,
    /// Cached parts of the embedding, and of tables.
    looked_up: u64,
    experts: usize,
    /// The layers with experts.
    layers: Vec<LayerSize>,
    /// Bytes of the largest expert.
    slot_len: u64,
    /// Stored bytes of the longest compressed expert; 0 if there is none.
    staging_len: u64,
    /// Most experts that a token uses in one layer.
    top_k: usize,
}

/// Which dense extents stay in memory.
struct Pinning {
    pinned: Vec<bool>,
    stays: u64,
    streamed: u64,
    ring: u64,
}

impl Pinning {
    /// Bytes of memory.
    fn bytes(&self) -> u64 {
        self.stays + self.ring
    }
}

/// The layers with experts among these extents.
fn layer_sizes(spec: &ModelSpec, extents: &[ExtentRecord]) -> Vec<LayerSize> {
    let mut sizes = BTreeMap::<u32, LayerSize>::new();
    for extent in extents.iter().filter(|e| e.kind == ExtentKind::Expert) {
        let size = sizes.entry(extent.layer).or_insert(LayerSize { len: 0, experts: 0, top_k: 0 });
        size.len = size.len.max(extent.padded_len);
        size.experts += 1;
    }
    for (layer, size) in &mut sizes {
        let moe = spec.all_layers().nth(*layer as usize).and_then(|layer| layer.ffn.moe.as_ref());
        size.top_k = moe.map_or(0, |moe| moe.top_k);
    }
    sizes.into_values().collect()
}

/// Everything at its least, in bytes.
struct Least {
    kv_cache: u64,
    scratch: u64,
    dense: u64,
    /// Expert slots, and those of staging.
    slots: u64,
}

impl Least {
    fn bytes(&self) -> u64 {
        self.kv_cache.saturating_add(self.scratch).saturating_add(self.dense + self.slots)
    }

    /// The error that says so.
    fn refuses(&self, requested: Option<u64>, available: u64, effective: u64, demand: Demand) -> BudgetError {
        BudgetError {
            requested,
            available,
            effective,
            least: self.bytes(),
            dense: self.dense,
            kv_cache: self.kv_cache,
            sequences: demand.sequences,
            context: demand.context,
            scratch: self.scratch,
            slots: self.slots,
        }
    }
}

impl Need<'_> {
    /// Everything at its least: no dense part stays unless all of them take less than the ring would.
    fn least(&self) -> Least {
        let rows = self.fewest_rows();
        Least {
            kv_cache: self.kv_cache(rows),
            scratch: self.scratch(rows, self.fewest_kept()),
            dense: self.pin(0).bytes(),
            slots: MIN_SLOTS.min(self.experts) as u64 * self.slot_len + self.staging(0).1,
        }
    }

    fn of<'a>(spec: &'a ModelSpec, extents: &[ExtentRecord], demand: Demand) -> Need<'a> {
        let extents = &opened_extents(spec, extents, demand.prediction)[..];
        let experts = extents.iter().filter(|e| e.kind == ExtentKind::Expert);
        let (count, slot_len) = experts.clone().fold((0, 0), |(n, len), e| (n + 1, e.padded_len.max(len)));
        let packed = experts.filter(|e| e.codec != Codec::Raw).map(|e| e.stored_len);
        let prediction = spec.prediction_model().filter(|_| demand.prediction);
        let layers = layer_sizes(spec, extents);
        let top_k = layers.iter().map(|layer| layer.top_k).max();
        let with_layout = |model: ModelSpec| {
            let layout = Layout::new(&model, demand.kv_type);
            (model, layout)
        };
        Need {
            spec,
            demand,
            dense: dense_extents(extents)
                .iter()
                .map(|e| (e.kind, e.padded_len, if e.codec == Codec::Raw { 0 } else { e.stored_len }))
                .collect(),
            layout: Layout::new(spec, demand.kv_type),
            prediction: prediction.map(with_layout),
            looked_up: Model::embedding_memory(extents) + cached_sectors(spec).1,
            experts: count,
            layers,
            slot_len,
            staging_len: packed.max().unwrap_or(0),
            top_k: top_k.unwrap_or(0),
        }
    }

    /// What takes steps: the decoder, and the prediction layer if it is opened.
    fn models(&self) -> impl Iterator<Item = &ModelSpec> {
        std::iter::once(self.spec).chain(self.prediction.iter().map(|(model, _)| model))
    }

    fn dense_total(&self) -> u64 {
        self.dense.iter().map(|d| d.1).sum()
    }

    /// Bytes of slots and staging slots for everything.
    fn all_slots(&self) -> u64 {
        self.slots(u64::MAX).bytes().saturating_add(self.staging(u64::MAX).1)
    }

    /// Expert slots in this many bytes.
    fn slots(&self, bytes: u64) -> SlotPlan {
        SlotPlan::new(self.layers.iter().copied(), bytes)
    }

    /// Staging slots for compressed experts, and their bytes, where the budget has `spare` bytes beyond the least: as many as are read
    /// at a time for one layer and prefetched for the next, as far as an eighth of that holds them, but two at least.
    fn staging(&self, spare: u64) -> (usize, u64) {
        if self.staging_len == 0 {
            return (0, 0);
        }
        let most = (2 * self.top_k + MIN_SLOTS).min(MAX_STAGING).min(self.experts).max(MIN_SLOTS) as u64;
        let slots = (MIN_SLOTS as u64).saturating_add(spare / 8 / self.staging_len).min(most);
        (slots as usize, slots * self.staging_len)
    }

    /// What the sequences of the decoder are made of, and those of the prediction layer, which keep no marks.
    fn layouts(&self) -> impl Iterator<Item = (&Layout, usize)> {
        let prediction = self.prediction.iter().map(|(_, layout)| (layout, 0));
        std::iter::once((&self.layout, self.demand.marks)).chain(prediction)
    }

    /// Of each kind of page how many there are where `rows` rows go through a layer together: layers with a window keep that and the
    /// rows.
    fn most_pages<'a>(
        &self,
        layout: &'a Layout,
        marks: usize,
        rows: usize,
    ) -> impl Iterator<Item = (u64, &'a PageLayout)> {
        let Demand { sequences, context, .. } = self.demand;
        layout.pages().iter().map(move |page| (page.kind().most(sequences, context, marks, rows), page))
    }

    fn counts(&self, layout: &Layout, marks: usize, rows: usize) -> Vec<usize> {
        self.most_pages(layout, marks, rows).map(|(count, _)| count as usize).collect()
    }

    /// The same of the prediction layer; none unless it is opened.
    fn prediction_counts(&self, rows: usize) -> Vec<usize> {
        self.prediction.as_ref().map_or_else(Vec::new, |(_, layout)| self.counts(layout, 0, rows))
    }

    /// The sum of `bytes` over all pages.
    fn of_pages(&self, rows: usize, bytes: impl Fn(&PageLayout) -> u64) -> u64 {
        let pages = self.layouts().flat_map(|(layout, marks)| self.most_pages(layout, marks, rows));
        pages.map(|(count, page)| count.saturating_mul(bytes(page))).fold(0, u64::saturating_add)
    }

    /// Bytes of the pages.
    fn kv_cache(&self, rows: usize) -> u64 {
        self.of_pages(rows, PageLayout::bytes)
    }

    /// Bytes of the lists of pages and tokens.
    fn lists(&self, rows: usize) -> u64 {
        let Demand { sequences, context, .. } = self.demand;
        let tokens = (context as u64).saturating_mul(4).saturating_mul(sequences as u64);
        // Where phases are told apart, they are kept beside the tokens.
        let tokens = tokens.saturating_mul(if self.demand.expanding > 0 { 2 } else { 1 });
        let tokens = tokens.saturating_mul(self.layouts().count() as u64);
        tokens.saturating_add(self.of_pages(rows, PageLayout::overhead))
    }

    /// Bytes that depend on how many rows go through a layer together.
    fn for_rows(&self, rows: usize, kept: u64) -> u64 {
        self.kv_cache(rows).saturating_add(self.scratch(rows, kept))
    }

    fn most_rows(&self) -> usize {
        MAX_ROWS.min(self.demand.context.saturating_mul(self.demand.sequences))
    }

    /// One for every sequence: they decode together.
    fn fewest_rows(&self) -> usize {
        MIN_ROWS.max(self.demand.sequences).min(self.most_rows())
    }

    /// Outputs of one row's experts: fewer must not be kept, so that decoding never waits for a particular expert.
    fn fewest_kept(&self) -> u64 {
        self.models().map(|model| Model::output_memory(model, 1)).max().unwrap_or(0)
    }

    /// How many rows go through a layer together, and how many bytes of their outputs are kept, where the budget has `spare`
    /// bytes for slots and scratch: many rows read each expert once for a long prompt, slots save reads while decoding. Scratch
    /// gets an eighth, or what all dense parts and experts leave.
    fn rows(&self, budget: u64, spare: u64) -> (usize, u64) {
        let least = (self.fewest_rows(), self.fewest_kept());
        let kept = (budget / KEPT_OUTPUTS.0).min(KEPT_OUTPUTS.1).max(least.1);
        let fewer = |&rows: &usize| (rows > least.0).then_some((rows / 2).max(least.0));
        let mut choices = std::iter::successors(Some(self.most_rows()), fewer).map(|rows| (rows, kept));
        // Rows also take pages of layers with a window, more than the least that was charged before.
        let charged = self.kv_cache(least.0);
        let left = budget.saturating_sub(self.dense_total().saturating_add(self.slots(u64::MAX).bytes()));
        let fits = |&(rows, kept): &(usize, u64)| {
            let bytes = self.for_rows(rows, kept);
            bytes - charged <= spare / 8 || bytes <= left
        };
        choices.find(fits).unwrap_or(least)
    }

    /// Bytes of the head inputs of all sequences that wait for the prediction layer, if it is opened.
    fn waiting_inputs(&self) -> u64 {
        let bytes = |(model, _): &(ModelSpec, Layout)| 4 * INPUT_COPIES * (WAITING_INPUTS * model.hidden_size) as u64;
        self.prediction.as_ref().map_or(0, bytes).saturating_mul(self.demand.sequences as u64)
    }

    fn scratch(&self, rows: usize, kept: u64) -> u64 {
        let passes = self.models().map(|model| Model::scratch_memory(model, rows, self.slot_len, kept));
        let prediction = self.prediction.as_ref().map_or(0, |(model, _)| Model::projection_memory(model));
        let prediction = prediction.saturating_add(self.waiting_inputs());
        let expansion = self.models().map(|model| Model::expansion_memory(model, rows)).max().unwrap_or(0);
        let expansion = expansion.saturating_mul(self.demand.expanding as u64);
        let scratch = passes.max().unwrap_or(0) + self.looked_up + expansion;
        scratch.saturating_add(prediction).saturating_add(self.lists(rows)).saturating_sub(FREE_SCRATCH)
    }

    /// Pins as many bytes of dense extents as `budget` holds beside the ring for the others. Routers stay first, because
    /// they also predict; then the largest, because the largest streamed extent sets the size of the ring's slots.
    fn pin(&self, budget: u64) -> Pinning {
        let total = self.dense_total();
        let ring_for = |(len, staged): (u64, u64)| (len + staged) * RING_SLOTS as u64;
        let mut order: Vec<usize> = (0..self.dense.len()).collect();
        order.sort_by_key(|&i| (self.dense[i].0 != ExtentKind::Router, std::cmp::Reverse(self.dense[i].1)));
        let mut pinned = vec![false; self.dense.len()];
        let mut stays = 0;
        let largest = |pinned: &[bool]| {
            let streamed = self.dense.iter().zip(pinned).filter(|(_, pinned)| !**pinned);
            streamed.fold((0, 0), |(len, staged), (d, _)| (d.1.max(len), d.2.max(staged)))
        };
        let least_ring = ring_for(largest(&pinned));
        if total <= budget.max(least_ring) {
            return Pinning { pinned: vec![true; self.dense.len()], stays: total, streamed: 0, ring: 0 };
        }
        for i in order {
            pinned[i] = true;
            let len = self.dense[i].1;
            if stays + len + ring_for(largest(&pinned)) <= budget {
                stays += len;
            } else {
                pinned[i] = false;
            }
        }
        let ring = ring_for(largest(&pinned));
        let streamed = self.dense.iter().zip(&pinned).filter(|(_, pinned)| !**pinned);
        let streamed = streamed.map(|(d, _)| if d.2 > 0 { d.2 } else { d.1 }).sum();
        Pinning { pinned, stays, streamed, ring }
    }
}

/// A number of bytes for people: `3.2 GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl Bytes {
    /// At least so many, rounded up to what is shown: the text, taken as a number, is enough.
    #[must_use]
    pub fn at_least(bytes: u64) -> Bytes {
        let Some((unit, _)) = Bytes(bytes).unit() else { return Bytes(bytes) };
        let tenths = (u128::from(bytes) * 10).div_ceil(u128::from(unit));
        Bytes((tenths * u128::from(unit)).div_ceil(10).try_into().unwrap_or(u64::MAX))
    }

    /// The largest unit that there is one of, and its name; none for a few bytes.
    fn unit(self) -> Option<(u64, &'static str)> {
        let units = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        units.into_iter().find(|(unit, _)| self.0 >= *unit)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.unit() {
            None => write!(f, "{} B", self.0),
            Some((unit, name)) => write!(f, "{:.1} {name}", self.0 as f64 / unit as f64),
        }
    }
}

/// What of a budget can be used, of one that was asked for or of one for `everything`.
fn effective_budget(requested: Option<u64>, everything: u64, available: u64) -> u64 {
    // A user who states a budget knows what else the machine does, but not that the program itself takes memory too.
    match requested {
        None => everything.min(available.saturating_sub(headroom(available))),
        Some(requested) => requested.min(available.saturating_sub(OVERHEAD.min(available / 2))),
    }
}

/// What is left to the system of so much available memory when no budget is given.
fn headroom(available: u64) -> u64 {
    (available / HEADROOM.0).max(HEADROOM.1.min(available / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_is_rounded_up() {
        let shown = |bytes| Bytes::at_least(bytes).to_string();
        assert_eq!([0, 1023, 1024, 1025].map(shown), ["0 B", "1023 B", "1.0 KiB", "1.1 KiB"]);
        assert_eq!([1_048_576, 1_064_960, (1 << 30) - 1].map(shown), ["1.0 MiB", "1.1 MiB", "1.0 GiB"]);
        for bytes in [1_048_577, 85_630_976, 757_703_680, u64::MAX] {
            assert!(Bytes::at_least(bytes).0 >= bytes);
        }
    }

    #[test]
    fn bytes_read_well() {
        let shown: Vec<_> = [0, 1023, 1024, 1536, 5 << 30].into_iter().map(|b| Bytes(b).to_string()).collect();
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 GiB"]);
    }
}
