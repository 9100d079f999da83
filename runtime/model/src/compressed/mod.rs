//! Attention over a sliding window and compressed entries (formulas at [`CompressedSpec`]).
//!
//! All heads share one key per token, which is also its value. A query first meets the keys of its window, block by block at
//! absolute positions. Then it meets entries: either all complete entries, in blocks by their own numbers, or those that an indexer
//! has chosen, in blocks by their place in the list. Both take part in one softmax.

mod compressor;
mod output;

use std::ops::Range;

use sluice_format::{CompressedSpec, CompressionSpec};
use sluice_kernels::{Activations, rms_norm};

use self::compressor::{Compressor, CompressorScratch, Purpose};
use self::output::{Output, OutputScratch};
use super::ModelError;
use super::compute::{Compute, HeadScratch, Step, sized, with_head_scratch};
use super::indexer::Chooser;
use super::rope::{Rope, RopeAngles};
use super::rows::{Caches, Row};
use super::tasks::{self, Heads, Most, Task, Tasks};
use super::weights::{ExtentTensors, MatrixRef, VectorRef};

/// Stores of such a layer: keys of the window, then, if the layer compresses, the contributions of tokens to entries, and the
/// entries.
pub const WINDOW: usize = 0;
pub const RAW: usize = 1;
pub const ENTRIES: usize = 2;

/// Queries (heads times rows) that meet the same keys together: with a block of keys they fit in the second-level cache.
const QUERIES_TOGETHER: usize = 32;
/// Most heads of a task.
const HEADS_TOGETHER: usize = 16;

/// Weights of one layer's attention, as places in its extent.
#[derive(Debug)]
pub struct Compressed {
    spec: CompressedSpec,
    rope: Rope,
    q_a: MatrixRef,
    q_a_norm: VectorRef,
    q_b: MatrixRef,
    kv: MatrixRef,
    kv_norm: VectorRef,
    sinks: Option<VectorRef>,
    entries: Option<Entries>,
    output: Output,
}

/// The compressor, and the indexer that chooses among its entries.
#[derive(Debug)]
struct Entries {
    ratio: usize,
    compressor: Compressor,
    indexer: Option<EntryIndexer>,
}

#[derive(Debug)]
struct EntryIndexer {
    heads: usize,
    width: usize,
    top_k: usize,
    compressor: Compressor,
    q: MatrixRef,
    weights: MatrixRef,
}

/// Buffers that such layers reuse from call to call.
#[derive(Debug)]
pub struct CompressedScratch {
    activations: Activations,
    norm: Vec<f32>,
    /// The query's latent, raw and normalised, `[2, rows, q_lora_rank]`.
    latent: Vec<f32>,
    key: Vec<f32>,
    /// `[rows, heads, head_dim]`.
    query: Vec<f32>,
    ones: Vec<f32>,
    sinks: Vec<f32>,
    angles: RopeAngles,
    compressor: CompressorScratch,
    index_query: Vec<f32>,
    index_weights: Vec<f32>,
    /// Entries that a row attends to, ascending; empty if it attends to all.
    chosen: Vec<Vec<u32>>,
    by_task: Vec<f32>,
    tasks: Tasks,
    output: OutputScratch,
}

impl CompressedScratch {
    /// Empty buffers; they grow to the size that the first call needs.
    pub fn new(compute: &Compute) -> Self {
        CompressedScratch {
            activations: Activations::new(compute.precision),
            norm: Vec::new(),
            latent: Vec::new(),
            key: Vec::new(),
            query: Vec::new(),
            ones: Vec::new(),
            sinks: Vec::new(),
            angles: RopeAngles::default(),
            compressor: CompressorScratch::default(),
            index_query: Vec::new(),
            index_weights: Vec::new(),
            chosen: Vec::new(),
            by_task: Vec::new(),
            tasks: Tasks::default(),
            output: OutputScratch::default(),
        }
    }
}

/// The data that all tasks of a pass read.
#[derive(Clone, Copy)]
struct Queries<'a, 's> {
    step: Step<'a>,
    caches: &'a Caches<'a, 's>,
    /// `[rows, heads, head_dim]`, rotated.
    query: &'a [f32],
    /// One per head.
    sinks: Option<&'a [f32]>,
    chosen: &'a [Vec<u32>],
}

/// f32 values of scratch per token.
pub fn scratch_width(spec: &CompressedSpec) -> usize {
    let heads = spec.heads() * spec.head_dim;
    // Angles of queries, and the angles that undo them.
    let own = 2 * heads + 3 * spec.q_lora_rank + 2 * spec.head_dim + 2 * spec.rope.dim + output::scratch_width(spec);
    own + spec.compression.as_ref().map_or(0, |compression| {
        let indexer = compression.indexer.as_ref().map_or(0, |indexer| {
            let query = indexer.index_heads * (indexer.index_head_dim + 1);
            query + indexer.index_top_k + compressor::scratch_width(compression, indexer.index_head_dim)
        });
        compressor::scratch_width(compression, spec.head_dim) + indexer
    })
}

/// Numbers that a layer keeps for each token until no entry needs them: those of attention, then those of the indexer.
pub fn raw_width(head_dim: usize, compression: &CompressionSpec) -> usize {
    let index = compression.indexer.as_ref().map_or(0, |indexer| indexer.index_head_dim);
    compressor::raw_width(compression, head_dim) + compressor::raw_width(compression, index)
}

impl Entries {
    fn new(
        spec: &CompressedSpec,
        compression: &CompressionSpec,
        tensors: &ExtentTensors<'_>,
    ) -> Result<Self, ModelError> {
        let of = |purpose, width, first| Compressor::new(compression, purpose, (width, spec.norm_eps), first, tensors);
        let indexer = compression.indexer.as_ref().map(|indexer| {
            Ok::<_, ModelError>(EntryIndexer {
                heads: indexer.index_heads,
                width: indexer.index_head_dim,
                top_k: indexer.index_top_k,
                compressor: of(
                    Purpose::Index,
                    indexer.index_head_dim,
                    compressor::raw_width(compression, spec.head_dim),
                )?,
                q: tensors.matrix("index_q")?,
                weights: tensors.matrix("index_weights")?,
            })
        });
        Ok(Entries {
            ratio: compression.ratio,
            compressor: of(Purpose::Attention, spec.head_dim, 0)?,
            indexer: indexer.transpose()?,
        })
    }

    /// Number of entries that are complete once the token at `position` has been computed.
    fn seen(&self, position: usize) -> usize {
        (position + 1) / self.ratio
    }
}

impl Compressed {
    pub(super) fn new(spec: &CompressedSpec, tensors: &ExtentTensors<'_>) -> Result<Self, ModelError> {
        let entries = spec.compression.as_ref().map(|compression| Entries::new(spec, compression, tensors));
        Ok(Compressed {
            rope: Rope::new(&spec.rope),
            q_a: tensors.matrix("q_a")?,
            q_a_norm: tensors.vector("q_a_norm")?,
            q_b: tensors.matrix("q_b")?,
            kv: tensors.matrix("kv")?,
            kv_norm: tensors.vector("kv_norm")?,
            sinks: spec.sinks.then(|| tensors.vector("sinks")).transpose()?,
            entries: entries.transpose()?,
            output: Output::new(spec, tensors)?,
            spec: spec.clone(),
        })
    }

    /// Attention of the rows of a pass: reads `x` `[n, hidden]` (normalised), extends `caches`, writes `out` `[n, hidden]`.
    pub fn forward(
        &self,
        step: Step<'_>,
        caches: &mut Caches<'_, '_>,
        x: &[f32],
        scratch: &mut CompressedScratch,
        out: &mut [f32],
    ) {
        let n = step.n();
        scratch.activations.set(x, n, x.len() / n);
        self.rope.angles(step.rows.positions(), &mut scratch.angles);
        self.extend(step, caches, scratch);
        if step.is_cancelled() {
            return;
        }
        self.project_query(step, scratch);
        self.choose(step, caches, scratch);
        if step.is_cancelled() {
            return;
        }
        self.attend(step, caches, scratch);
        if step.is_cancelled() {
            return;
        }
        let CompressedScratch { activations, by_task, tasks, angles, output, .. } = scratch;
        self.output.gather((by_task, tasks), n, output);
        self.output.rotate_back(step, &self.rope, angles, output);
        self.output.project(step, activations, output, out);
    }

    /// Adds keys and entries of the rows to `caches`. Leaves the weights of the indexer's heads in the scratch, because they are
    /// computed from the same input.
    fn extend(&self, step: Step<'_>, caches: &mut Caches<'_, '_>, scratch: &mut CompressedScratch) {
        let CompressedScratch { activations, norm, key, latent, angles, compressor, index_weights, .. } = scratch;
        let width = self.spec.head_dim;
        let key = sized(key, step.n() * width);
        step.multiply(&self.kv, activations, key);
        step.read(&self.kv_norm, norm);
        let normed = sized(latent, width);
        for span in step.rows.spans() {
            let mut cache = caches.store_mut(span.span, WINDOW).latent_mut();
            for (t, row) in span.rows().enumerate() {
                rms_norm(&key[row * width..][..width], norm, self.spec.norm_eps, normed);
                self.rope.rotate_end(normed, angles, row);
                cache.set(span.start + t, normed);
            }
        }
        let Some(entries) = &self.entries else { return };
        entries.compressor.extend(step, &self.rope, caches, activations, compressor);
        if let Some(indexer) = &entries.indexer {
            indexer.compressor.extend(step, &self.rope, caches, activations, compressor);
            step.multiply(&indexer.weights, activations, sized(index_weights, step.n() * indexer.heads));
        }
    }

    /// Leaves the queries in `scratch.query`, and their normalised latents in `scratch.activations`.
    fn project_query(&self, step: Step<'_>, scratch: &mut CompressedScratch) {
        let CompressedScratch { activations, norm, latent, query, ones, angles, .. } = scratch;
        let (s, n) = (&self.spec, step.n());
        let rank = s.q_lora_rank;
        let (raw, normed) = sized(latent, 2 * n * rank).split_at_mut(n * rank);
        step.multiply(&self.q_a, activations, raw);
        step.read(&self.q_a_norm, norm);
        for (raw, normed) in raw.chunks_exact(rank).zip(normed.chunks_exact_mut(rank)) {
            rms_norm(raw, norm, s.norm_eps, normed);
        }
        activations.set(normed, n, rank);
        let width = s.heads() * s.head_dim;
        let query = sized(query, n * width);
        step.multiply(&self.q_b, activations, query);
        ones.resize(s.head_dim, 1.0);
        let (ones, angles) = (&*ones, &*angles);
        step.compute.threads.for_each_piece(query, width, &|row, query| {
            with_head_scratch(|scratch| {
                let copy = sized(&mut scratch.input, s.head_dim);
                for head in query.chunks_exact_mut(s.head_dim) {
                    copy.copy_from_slice(head);
                    rms_norm(copy, ones, s.norm_eps, head);
                    self.rope.rotate_end(head, angles, row);
                }
            });
        });
    }

    /// Leaves the entries that each row attends to in `scratch.chosen`. The activations that were multiplied last must be the
    /// latents of queries.
    fn choose(&self, step: Step<'_>, caches: &Caches<'_, '_>, scratch: &mut CompressedScratch) {
        let CompressedScratch { activations, index_query, index_weights, angles, chosen, .. } = scratch;
        let n = step.n();
        if chosen.len() < n {
            chosen.resize_with(n, Vec::new);
        }
        chosen.iter_mut().for_each(Vec::clear);
        let Some(entries) = &self.entries else { return };
        let Some(indexer) = &entries.indexer else { return };
        if step.rows.positions().all(|position| entries.seen(position) <= indexer.top_k) {
            return;
        }
        let EntryIndexer { heads, width, top_k, .. } = *indexer;
        let query = sized(index_query, n * heads * width);
        step.multiply(&indexer.q, activations, query);
        for (i, head) in query.chunks_exact_mut(width).enumerate() {
            self.rope.rotate_end(head, angles, i / heads);
        }
        let chooser = Chooser { heads, width, top_k, query, weights: index_weights };
        let keys = |row: Row| (entries.seen(row.position), caches.store(row.span, ENTRIES).latent().index());
        chooser.choose(step, keys, &mut chosen[..n]);
    }

    /// Leaves the heads' outputs in `scratch.by_task`, divided as in `scratch.tasks`.
    fn attend(&self, step: Step<'_>, caches: &Caches<'_, '_>, scratch: &mut CompressedScratch) {
        let s = &self.spec;
        let CompressedScratch { query, by_task, tasks, sinks, chosen, .. } = scratch;
        if let Some(sink) = &self.sinks {
            step.read(sink, sinks);
        }
        let heads = s.heads();
        let chooses = chosen.iter().any(|chosen| !chosen.is_empty());
        let shape = Heads { heads, sharing: heads, width: s.head_dim };
        tasks.plan(step, shape, false, |rows| {
            // A row with its own choice of entries shares keys only among its heads; other rows meet theirs together.
            let heads =
                if chooses { HEADS_TOGETHER } else { (QUERIES_TOGETHER / rows.max(1)).clamp(1, HEADS_TOGETHER) };
            Most { rows: (QUERIES_TOGETHER / heads).max(1), heads }
        });
        let sinks = self.sinks.as_ref().map(|_| &sinks[..]);
        let queries = Queries { step, caches, query, sinks, chosen };
        tasks.run(&step.compute.threads, sized(by_task, step.n() * heads * s.head_dim), &|task, out| {
            with_head_scratch(|scratch| {
                let mut left = out;
                for (span, rows) in step.rows.parts(task.rows.clone()) {
                    let mut row = rows.start;
                    while row < rows.end {
                        let end = alike(chosen, row..rows.end);
                        let part = Task { rows: row..end, heads: task.heads.clone(), expanded: false };
                        let (out, rest) = left.split_at_mut(part.rows.len() * part.heads.len() * s.head_dim);
                        if !self.attend_rows(queries, span, &part, scratch) {
                            return;
                        }
                        out.copy_from_slice(scratch.tile.results());
                        (left, row) = (rest, end);
                    }
                }
            });
        });
    }

    /// Rows of one span: either all of them attend to all entries, or there is only one row. Leaves their results in the tile.
    /// False if the step was cancelled meanwhile.
    fn attend_rows(&self, queries: Queries<'_, '_>, span: usize, task: &Task, scratch: &mut HeadScratch) -> bool {
        let (s, Queries { step, caches, query, sinks, chosen }) = (&self.spec, queries);
        let HeadScratch { tile, chosen: buffer, .. } = scratch;
        tile.begin(s.head_dim, s.head_dim, s.softmax_scale);
        for row in task.rows.clone() {
            let end = step.rows.get(row).position + 1;
            for head in task.heads.clone() {
                let query = &query[(row * s.heads() + head) * s.head_dim..][..s.head_dim];
                let seen = end.saturating_sub(s.window)..end;
                tile.add(seen, sinks.map(|sinks| sinks[head])).copy_from_slice(query);
            }
        }
        let window = caches.store(span, WINDOW).latent();
        let both = |rows| (rows, rows);
        if !tasks::meet(step, tile, |positions| both(window.rows(positions))) {
            return false;
        }
        if let Some(entries) = &self.entries {
            let (chosen, first, heads) = (&chosen[task.rows.start], task.rows.start, task.heads.len());
            let cache = caches.store(span, ENTRIES).latent();
            let met = if chosen.is_empty() {
                tile.go_on(|i| 0..entries.seen(step.rows.get(first + i / heads).position));
                tasks::meet(step, tile, |numbers| both(cache.rows(numbers)))
            } else {
                tile.go_on(|_| 0..chosen.len());
                tasks::meet_chosen(step, tile, buffer, chosen, |entry| cache.rows(entry..entry + 1))
            };
            if !met {
                return false;
            }
        }
        tile.finish();
        true
    }
}

/// The end of the first rows of `rows` that meet their keys together: one row that has chosen entries, or all rows before the next
/// such row.
fn alike(chosen: &[Vec<u32>], rows: Range<usize>) -> usize {
    if !chosen[rows.start].is_empty() {
        return rows.start + 1;
    }
    (rows.start + 1..rows.end).find(|&row| !chosen[row].is_empty()).unwrap_or(rows.end)
}
