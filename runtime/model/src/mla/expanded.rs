//! The expanded form of latent attention, for the rows of prompts.
//!
//! A task has many rows and one head. Latents are expanded to keys and values of that head, a few blocks at a time, and all rows of the
//! task meet these before the next ones are expanded. So expanding costs little where there are many rows, and its memory does not grow
//! with the context. What a row meets, and in which order, follows from its position alone (`sluice_kernels` says how).

use std::ops::Range;

use sluice_format::MlaSpec;
use sluice_kernels::{
    EXPANDED_BLOCK, EXPANDED_TILE, ExpandedKeys, ExpandedTile, Expander, Gathered, expansion_bytes, unpack_into,
};

use super::{Mla, Queries};
use crate::cache::LatentCache;
use crate::compute::sized;
use crate::tasks::Task;
use crate::weights::MatrixRef;

/// Blocks that are expanded before rows meet them: queries are put in order once for all of them.
const BLOCKS: usize = 4;

/// What one thread needs for the expanded form.
#[derive(Debug, Default)]
pub struct Expansion {
    expander: Expander,
    blocks: Vec<ExpandedKeys>,
    tile: ExpandedTile,
    /// What the rows of the task have gathered.
    max: Vec<f32>,
    sum: Vec<f32>,
    /// A head's weights, as stored and with their columns in the order of the inputs.
    stored: Vec<f32>,
    weights: Vec<f32>,
}

/// Most bytes of an [`Expansion`] for passes of so many rows.
pub fn expansion_memory(spec: &MlaSpec, rows: usize) -> u64 {
    let MlaSpec { kv_lora_rank: rank, qk_nope_head_dim: plain, v_head_dim: value, .. } = *spec;
    let weights = 2 * rank * plain.max(value);
    expansion_bytes(rank, spec.qk_rope_head_dim, plain, value, BLOCKS) + 4 * (weights + 2 * rows) as u64
}

impl Mla {
    /// `out` `[rows, v_head_dim]`: the values that the rows of a task, which are of one span and one head, attend to. Unfinished once
    /// nobody wants them.
    pub(super) fn attend_expanded(
        &self,
        queries: Queries<'_, '_>,
        task: &Task,
        scratch: &mut Expansion,
        out: &mut [f32],
    ) {
        let (step, n) = (queries.step, task.rows.len());
        let span = step.rows.get(task.rows.start).span;
        let cache = queries.caches.of(span).latent();
        let first = step.rows.get(task.rows.start).position;
        self.set_weights(queries, task.heads.start, scratch);
        for (numbers, begin) in [(&mut scratch.max, f32::NEG_INFINITY), (&mut scratch.sum, 0.0)] {
            numbers.clear();
            numbers.resize(n, begin);
        }
        out.fill(0.0);
        let width = self.spec.v_head_dim;
        for start in (0..first + n).step_by(BLOCKS * EXPANDED_BLOCK) {
            let end = (first + n).min(start + BLOCKS * EXPANDED_BLOCK);
            self.expand_keys(queries, cache, start..end, scratch);
            for tile in (0..n).step_by(EXPANDED_TILE) {
                if step.is_cancelled() {
                    return;
                }
                let rows = tile..(tile + EXPANDED_TILE).min(n);
                let sees = first + rows.end;
                if sees <= start {
                    continue;
                }
                self.set_queries(queries, task, rows.clone(), &mut scratch.tile);
                let Expansion { blocks, tile, max, sum, .. } = scratch;
                for block in blocks.iter().take_while(|block| block.start() < sees) {
                    let (max, sum) = (&mut max[rows.clone()], &mut sum[rows.clone()]);
                    let out = &mut out[rows.start * width..rows.end * width];
                    step.compute.kernels.attend_expanded(tile, block, Gathered { max, sum, out });
                }
            }
        }
        Gathered { max: &mut scratch.max, sum: &mut scratch.sum, out }.finish();
    }

    /// The expander has the weights of a head.
    fn set_weights(&self, Queries { step, .. }: Queries<'_, '_>, head: usize, scratch: &mut Expansion) {
        let Expansion { expander, stored, weights, .. } = scratch;
        let rank = self.spec.kv_lora_rank;
        expander.set_keys(rank, read_matrix(&self.k_b, step.extent, head, stored, weights));
        expander.set_values(rank, read_matrix(&self.v_b, step.extent, head, stored, weights));
    }

    /// `scratch.blocks` are those of the keys at `positions`.
    fn expand_keys(
        &self,
        Queries { step, .. }: Queries<'_, '_>,
        cache: LatentCache<'_>,
        positions: Range<usize>,
        scratch: &mut Expansion,
    ) {
        let Expansion { expander, blocks, .. } = scratch;
        blocks.resize_with(positions.len().div_ceil(EXPANDED_BLOCK), ExpandedKeys::default);
        for (block, start) in blocks.iter_mut().zip(positions.clone().step_by(EXPANDED_BLOCK)) {
            let end = (start + EXPANDED_BLOCK).min(positions.end);
            let read = |i: usize, row: &mut [f32]| cache.rows(start + i..start + i + 1).read(0, row);
            let rotated = self.spec.qk_rope_head_dim;
            expander.expand(&step.compute.kernels, (start, end - start), rotated, read, block);
        }
    }

    /// The tile has the rotated queries of some rows of a task, numbered from its first.
    fn set_queries(
        &self,
        Queries { step, query, angles, .. }: Queries<'_, '_>,
        task: &Task,
        rows: Range<usize>,
        tile: &mut ExpandedTile,
    ) {
        let s = &self.spec;
        let (nope, width) = (s.qk_nope_head_dim, s.qk_nope_head_dim + s.qk_rope_head_dim);
        let first = task.rows.start + rows.start;
        let sees = rows.map(|row| step.rows.get(task.rows.start + row).position + 1);
        tile.set(width, s.softmax_scale, sees, |i, full| {
            full.copy_from_slice(&query[((first + i) * s.heads + task.heads.start) * width..][..width]);
            self.rotate(&mut full[nope..], angles, first + i);
        });
    }
}

/// A matrix of a batch, row-major, with its columns in the order of the inputs; what a damaged order leaves out is NaN.
fn read_matrix<'a>(
    matrix: &MatrixRef,
    extent: &[u8],
    number: usize,
    stored: &'a mut Vec<f32>,
    ordered: &'a mut Vec<f32>,
) -> &'a [f32] {
    let view = matrix.view_of_batch(extent, number);
    let (cols, len) = (view.cols(), view.rows() * view.cols());
    let stored = sized(stored, len);
    unpack_into(view, stored);
    let Some(order) = matrix.order(extent) else { return stored };
    let ordered = sized(ordered, len);
    ordered.fill(f32::NAN);
    for (stored, ordered) in stored.chunks_exact(cols).zip(ordered.chunks_exact_mut(cols)) {
        for (&number, column) in stored.iter().zip(order.as_chunks::<2>().0) {
            if let Some(place) = ordered.get_mut(usize::from(u16::from_le_bytes(*column))) {
                *place = number;
            }
        }
    }
    ordered
}
