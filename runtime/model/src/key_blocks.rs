//! Block-sparse attention: which blocks of keys each row attends to, and how a tile of queries meets them.
//!
//! Formulas are at [`KeyBlocksSpec`] and [`BlockScore`]; `key_means` has the code for blocks with one key. While there are no more
//! blocks than a token may attend to, it attends to all of them, and only the index keys are computed.

use sluice_format::{BlockScore, GqaSpec, KeyBlocksSpec};
use sluice_kernels::{Activations, KEY_BLOCK, KeyBlock, KvBuffer, KvRows, key_blocks, rms_norm};

use super::ModelError;
use super::cache::{KeyValueCache, PAGE_TOKENS};
use super::compute::{HeadScratch, Step, sized, with_head_scratch};
use super::key_means::{self, MeansScratch};
use super::rope::{Rope, RopeAngles};
use super::rows::Caches;
use super::weights::{ExtentTensors, MatrixRef, VectorRef};

/// Weights for choosing blocks in one layer, as places in its extent.
#[derive(Debug)]
pub struct KeyBlocks {
    pub(super) spec: KeyBlocksSpec,
    /// Query heads that use one choice.
    following: usize,
    pub(super) rope: Option<Rope>,
    q: MatrixRef,
    pub(super) k: MatrixRef,
    q_norm: VectorRef,
    pub(super) k_norm: VectorRef,
}

/// What the rows of the current pass attend to, and buffers.
#[derive(Debug, Default)]
pub struct KeyBlocksScratch {
    pub(super) query: Vec<f32>,
    pub(super) key: Vec<f32>,
    pub(super) norm: Vec<f32>,
    /// Ascending numbers of blocks for each row and choice; empty if the row attends to all.
    pub(super) chosen: Vec<Vec<u32>>,
    pub(super) means: MeansScratch,
}

/// The blocks that a row attends to with the heads that use one choice.
#[derive(Clone, Copy, Debug)]
pub struct ChosenBlocks<'a> {
    blocks: &'a [u32],
    block_len: usize,
    /// Keys in all of these blocks that the row sees.
    keys: usize,
}

/// f32 values of scratch per token.
pub fn scratch_width(spec: &KeyBlocksSpec) -> usize {
    // A list of blocks takes six more, and may have room for twice as many as it holds; one of them may be incomplete.
    let lists = spec.choices() * (2 * (spec.top_blocks + 1) + 6);
    spec.index_heads * (spec.index_head_dim + 1) + lists + spec.index_head_dim + key_means::scratch_width(spec)
}

impl ChosenBlocks<'_> {
    /// Keys that the row sees.
    pub fn keys(self) -> usize {
        self.keys
    }

    /// The position of the key at a place in the list of all keys of the blocks.
    fn position(self, place: usize) -> usize {
        self.blocks[place / self.block_len] as usize * self.block_len + place % self.block_len
    }

    /// How many keys follow each other in one page, from a place on.
    fn run(self, place: usize) -> usize {
        let in_page = PAGE_TOKENS - self.position(place) % PAGE_TOKENS;
        (self.block_len - place % self.block_len).min(in_page)
    }
}

impl KeyBlocks {
    /// `spec`: that of the layer's attention.
    pub(super) fn new(spec: &GqaSpec, blocks: &KeyBlocksSpec, tensors: &ExtentTensors<'_>) -> Result<Self, ModelError> {
        Ok(KeyBlocks {
            following: spec.heads / blocks.choices(),
            rope: spec.rope.as_ref().map(Rope::new),
            q: tensors.matrix("index_q")?,
            k: tensors.matrix("index_k")?,
            q_norm: tensors.vector("index_q_norm")?,
            k_norm: tensors.vector("index_k_norm")?,
            spec: blocks.clone(),
        })
    }

    /// What row `t` of the pass attends to with query head `head`; `None`: all.
    pub fn chosen<'a>(
        &self,
        step: Step<'_>,
        t: usize,
        head: usize,
        scratch: &'a KeyBlocksScratch,
    ) -> Option<ChosenBlocks<'a>> {
        let blocks = scratch.chosen.get(t * self.spec.choices() + head / self.following)?;
        let last = *blocks.last()? as usize;
        let (block_len, seen) = (self.spec.block_len, step.rows.get(t).position + 1);
        // Only the last block can have keys that the row does not see.
        let unseen = ((last + 1) * block_len).saturating_sub(seen);
        Some(ChosenBlocks { blocks, block_len, keys: blocks.len() * block_len - unseen })
    }

    /// Adds the index keys of the rows to `caches`. `x`: their normalised inputs; `angles`: those of their positions, if the layer
    /// rotates.
    pub fn extend(
        &self,
        step: Step<'_>,
        caches: &mut Caches<'_, '_>,
        x: &Activations,
        angles: &RopeAngles,
        scratch: &mut KeyBlocksScratch,
    ) {
        if self.spec.score == BlockScore::MeanKey {
            return self.extend_means(step, caches, x, scratch);
        }
        let width = self.spec.index_head_dim;
        let KeyBlocksScratch { key, norm, .. } = scratch;
        let key = sized(key, step.n() * width);
        step.multiply(&self.k, x, key);
        step.read(&self.k_norm, norm);
        for span in step.rows.spans() {
            let mut cache = caches.of_mut(span.span).key_value_mut();
            for (i, row) in span.rows().enumerate() {
                let place = cache.index_key_mut(span.start + i);
                rms_norm(&key[row * width..][..width], norm, self.spec.index_norm_eps, place);
                self.rotate(place, angles, row);
            }
        }
    }

    /// Chooses for each row, after [`KeyBlocks::extend`] has seen the rows with the same `x` and `angles`.
    pub fn choose(
        &self,
        step: Step<'_>,
        caches: &Caches<'_, '_>,
        x: &Activations,
        angles: &RopeAngles,
        scratch: &mut KeyBlocksScratch,
    ) {
        let (s, n) = (&self.spec, step.n());
        let choices = s.choices();
        if scratch.chosen.len() < n * choices {
            scratch.chosen.resize_with(n * choices, Vec::new);
        }
        scratch.chosen.iter_mut().for_each(Vec::clear);
        if s.score == BlockScore::MeanKey {
            return self.choose_by_means(step, caches, x, angles, scratch);
        }
        if step.rows.positions().all(|position| position / s.block_len < s.top_blocks) {
            return;
        }
        self.queries(step, x, angles, scratch);
        let (heads, width) = (s.index_heads, s.index_head_dim);
        let KeyBlocksScratch { query, chosen, .. } = scratch;
        let query = &query[..n * heads * width];
        step.compute.threads.for_each_piece(&mut chosen[..n * heads], 1, &|i, chosen| {
            let (t, query) = (i / heads, &query[i * width..][..width]);
            if step.rows.get(t).position / s.block_len >= s.top_blocks && !step.is_cancelled() {
                with_head_scratch(|scratch| self.choose_for(step, caches, (t, query), scratch, &mut chosen[0]));
            }
        });
    }

    /// Leaves the queries for the scores in `scratch.query`, `[rows, index_heads, index_head_dim]`.
    pub(super) fn queries(&self, step: Step<'_>, x: &Activations, angles: &RopeAngles, scratch: &mut KeyBlocksScratch) {
        let KeyBlocksSpec { index_heads: heads, index_head_dim: width, index_norm_eps: eps, .. } = self.spec;
        let KeyBlocksScratch { query, key, norm, .. } = scratch;
        let query = sized(query, step.n() * heads * width);
        step.multiply(&self.q, x, query);
        step.read(&self.q_norm, norm);
        let raw = sized(key, width);
        for (i, head) in query.chunks_exact_mut(width).enumerate() {
            raw.copy_from_slice(head);
            rms_norm(raw, norm, eps, head);
            self.rotate(head, angles, i / heads);
        }
    }

    /// Chooses for one row, with the query of one index head.
    fn choose_for(
        &self,
        step: Step<'_>,
        caches: &Caches<'_, '_>,
        (t, query): (usize, &[f32]),
        scratch: &mut HeadScratch,
        chosen: &mut Vec<u32>,
    ) {
        let (s, row) = (&self.spec, step.rows.get(t));
        let (seen, own) = (row.position + 1, row.position / s.block_len);
        let score = |block: usize, score: f32| if block + s.local_blocks > own { f32::INFINITY } else { score };
        let index = caches.of(row.span).key_value().index();
        let HeadScratch { tile, best, .. } = scratch;
        best.begin(s.top_blocks);
        tile.begin(query.len(), 0, 1.0);
        tile.add(0..seen, None).copy_from_slice(query);
        let (mut block, mut largest) = (0, f32::NEG_INFINITY);
        for positions in key_blocks(0..seen) {
            if step.is_cancelled() {
                return;
            }
            let keys = KvRows::plain(index.keys(positions.clone()), query.len());
            let products = step.compute.kernels.score_block(tile, &KeyBlock::new(positions.clone(), keys, keys));
            for (position, product) in positions.zip(&products[0]) {
                if position / s.block_len != block {
                    best.offer(block as u32, score(block, largest));
                    (block, largest) = (position / s.block_len, f32::NEG_INFINITY);
                }
                largest = largest.max(*product);
            }
        }
        best.offer(block as u32, score(block, largest));
        best.finish(chosen);
    }

    pub(super) fn rotate(&self, x: &mut [f32], angles: &RopeAngles, row: usize) {
        if let Some(rope) = &self.rope {
            rope.rotate(x, angles, row);
        }
    }
}

/// The tile meets the keys and values of the chosen blocks in the order of their positions, cut into blocks of [`KEY_BLOCK`] by
/// their place in the list. False if the step was cancelled meanwhile.
pub fn attend(
    step: Step<'_>,
    cache: KeyValueCache<'_>,
    kv_head: usize,
    chosen: ChosenBlocks<'_>,
    scratch: &mut HeadScratch,
) -> bool {
    let HeadScratch { tile, chosen: gathered_keys, chosen_values: gathered_values, .. } = scratch;
    for places in key_blocks(tile.positions()) {
        if step.is_cancelled() {
            return false;
        }
        let first = chosen.position(places.start);
        if chosen.run(places.start) >= places.len() {
            let (keys, values) = cache.rows(kv_head, first..first + places.len());
            step.compute.kernels.attend_block(tile, &KeyBlock::new(places, keys, values));
            continue;
        }
        let mut place = places.start;
        while place < places.end {
            let (first, count) = (chosen.position(place), chosen.run(place).min(places.end - place));
            let (keys, values) = cache.rows(kv_head, first..first + count);
            for (buffer, rows) in [(&mut *gathered_keys, keys), (&mut *gathered_values, values)] {
                let buffer = fitting(buffer, &rows);
                (0..count).for_each(|i| buffer.copy_row(place - places.start + i, &rows, i));
            }
            place += count;
        }
        let gathered = gathered_keys.as_ref().zip(gathered_values.as_ref()).expect("a block has keys");
        let (keys, values) = (gathered.0.rows(0..places.len()), gathered.1.rows(0..places.len()));
        step.compute.kernels.attend_block(tile, &KeyBlock::new(places.clone(), keys, values));
    }
    tile.finish();
    true
}

/// A buffer for the rows of one block, of the same type and width as `rows`.
fn fitting<'a>(buffer: &'a mut Option<KvBuffer>, rows: &KvRows<'_>) -> &'a mut KvBuffer {
    if !buffer.as_ref().is_some_and(|buffer| buffer.is_like(rows)) {
        *buffer = None;
    }
    buffer.get_or_insert_with(|| KvBuffer::new(rows.ty(), KEY_BLOCK, rows.width()))
}
