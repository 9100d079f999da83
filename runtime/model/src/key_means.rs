//! Block-sparse attention whose blocks have one key each: the mean of the keys of its tokens (formula at
//! [`BlockScore::MeanKey`](sluice_format::BlockScore)).
//!
//! A token's contribution to its block's key is kept until the block is complete. So a block that is completed one token at a time
//! has the same key as one that is completed within a prompt.

use sluice_format::{BlockScore, KeyBlocksSpec};
use sluice_kernels::{Activations, rms_norm};

use super::compute::{Step, sized, with_head_scratch};
use super::indexer::Chooser;
use super::key_blocks::{KeyBlocks, KeyBlocksScratch};
use super::rope::RopeAngles;
use super::rows::{Caches, Row};

/// Stores of such a layer after its keys and values: keys of tokens whose block may be incomplete, and keys of blocks.
pub const RAW: usize = 1;
pub const BLOCK_KEYS: usize = 2;

/// Buffers for the keys of blocks.
#[derive(Debug, Default)]
pub struct MeansScratch {
    /// Number of the span in the step, and number of the block, for each block that the pass completes.
    completed: Vec<(usize, usize)>,
    /// `[completed, index_head_dim]`.
    keys: Vec<f32>,
    angles: RopeAngles,
    /// Weights of the index heads, all 1.
    weights: Vec<f32>,
}

/// f32 values of scratch per token.
pub fn scratch_width(spec: &KeyBlocksSpec) -> usize {
    match spec.score {
        BlockScore::LargestKey => 0,
        // A block's key and its angles, and the numbers that identify it.
        BlockScore::MeanKey => (2 * spec.index_head_dim + 4).div_ceil(spec.block_len),
    }
}

impl KeyBlocks {
    /// Keeps the keys of the rows `x`, and adds those of the blocks that they complete to `caches`.
    pub(super) fn extend_means(
        &self,
        step: Step<'_>,
        caches: &mut Caches<'_, '_>,
        x: &Activations,
        scratch: &mut KeyBlocksScratch,
    ) {
        let KeyBlocksSpec { index_head_dim: width, block_len, index_norm_eps: eps, .. } = self.spec;
        let KeyBlocksScratch { key, norm, means: MeansScratch { completed, keys, angles, .. }, .. } = scratch;
        let key = sized(key, step.n() * width);
        step.multiply(&self.k, x, key);
        step.read(&self.k_norm, norm);
        completed.clear();
        for span in step.rows.spans() {
            let mut cache = caches.store_mut(span.span, RAW).raw_mut();
            for (t, row) in span.rows().enumerate() {
                cache.row_mut(span.start + t).copy_from_slice(&key[row * width..][..width]);
            }
            let blocks = span.start / block_len..(span.start + span.count) / block_len;
            completed.extend(blocks.map(|block| (span.span, block)));
        }
        if let Some(rope) = &self.rope {
            rope.angles(completed.iter().map(|(_, block)| block * block_len), angles);
        }
        let keys = sized(keys, completed.len() * width);
        {
            let (caches, completed, norm, angles) = (&*caches, &*completed, &*norm, &*angles);
            step.compute.threads.for_each_piece(keys, width, &|i, out| {
                let (span, block) = completed[i];
                let raw = caches.store(span, RAW).raw();
                with_head_scratch(|scratch| {
                    let mean = sized(&mut scratch.input, width);
                    mean.fill(0.0);
                    for position in block * block_len..(block + 1) * block_len {
                        mean.iter_mut().zip(raw.row(position)).for_each(|(m, v)| *m += v);
                    }
                    mean.iter_mut().for_each(|m| *m /= block_len as f32);
                    rms_norm(mean, norm, eps, out);
                });
                self.rotate(out, angles, i);
            });
        }
        for (&(span, block), row) in completed.iter().zip(keys.chunks_exact(width)) {
            caches.store_mut(span, BLOCK_KEYS).block_key_mut(block).copy_from_slice(row);
        }
    }

    /// Chooses for each row, after [`KeyBlocks::extend_means`] has seen the rows with the same `x`. `angles`: those of their
    /// positions.
    pub(super) fn choose_by_means(
        &self,
        step: Step<'_>,
        caches: &Caches<'_, '_>,
        x: &Activations,
        angles: &RopeAngles,
        scratch: &mut KeyBlocksScratch,
    ) {
        let KeyBlocksSpec { index_heads: heads, index_head_dim: width, block_len, top_blocks: top_k, .. } = self.spec;
        let complete = |position: usize| (position + 1) / block_len;
        if step.rows.positions().all(|position| complete(position) <= top_k) {
            return;
        }
        self.queries(step, x, angles, scratch);
        let KeyBlocksScratch { query, chosen, means: MeansScratch { weights, .. }, .. } = scratch;
        let n = step.n();
        let weights = sized(weights, n * heads);
        weights.fill(1.0);
        let chooser = Chooser { heads, width, top_k, query: &query[..n * heads * width], weights };
        let keys = |row: Row| (complete(row.position), caches.store(row.span, BLOCK_KEYS).block_keys());
        chooser.choose(step, keys, &mut chosen[..n]);
        for (chosen, position) in chosen.iter_mut().zip(step.rows.positions()).filter(|(chosen, _)| !chosen.is_empty())
        {
            // Keys after the last complete block are always seen.
            if !(position + 1).is_multiple_of(block_len) {
                chosen.push(complete(position) as u32);
            }
        }
    }
}
