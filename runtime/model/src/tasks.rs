//! Divides the attention of a pass into tasks of several rows and heads, which threads take, and each task into blocks of keys.

use std::ops::Range;

use sluice_kernels::{KEY_BLOCK, KeyBlock, KvBuffer, KvRows, QueryTile, ThreadPool, key_blocks};

use super::compute::Step;
use super::rows::SpanRows;

/// Spans with fewer rows are taken together: each has its own keys, but all meet the same weights.
const LONG_SPAN: usize = 4;

/// Fewest rows of a task that expands the keys of its head, where threads want more tasks: all of them are expanded for each task.
const EXPANDED_ROWS: usize = 512;

/// Rows and heads of a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The rows, perhaps of several spans.
    pub rows: Range<usize>,
    /// The heads, which share their keys.
    pub heads: Range<usize>,
    /// Whether latents are expanded to keys and values for them: then the rows are of one span, and there is one head.
    pub expanded: bool,
}

/// The heads of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub heads: usize,
    /// How many adjacent heads have the same keys.
    pub sharing: usize,
    /// Numbers of a head's result.
    pub width: usize,
}

/// Most rows and heads of a task.
#[derive(Clone, Copy, Debug)]
pub struct Most {
    pub rows: usize,
    pub heads: usize,
}

/// All tasks of a pass: together they have every row with every head once.
#[derive(Debug, Default)]
pub struct Tasks {
    tasks: Vec<Task>,
    /// Ends of the tasks' results, which have `width` numbers per row and head.
    ends: Vec<usize>,
    width: usize,
}

impl Tasks {
    /// Divides the heads and the rows of the pass. `most`: the most that a task takes of spans with that many rows; it takes fewer
    /// heads if there would be too few tasks for the threads. `in_order`: a task has all rows of its heads, however many.
    pub fn plan(&mut self, step: Step<'_>, shape: Heads, in_order: bool, most: impl Fn(usize) -> Most) {
        self.plan_with(step, shape, in_order, most, |_| 0);
    }

    /// As [`plan`](Self::plan). `expanded`: how many rows at the beginning of a span are attended to in the expanded form; none if
    /// tasks are in order.
    pub fn plan_with(
        &mut self,
        step: Step<'_>,
        shape: Heads,
        in_order: bool,
        most: impl Fn(usize) -> Most,
        expanded: impl Fn(&SpanRows) -> usize,
    ) {
        let Heads { heads, sharing, width } = shape;
        self.width = width;
        self.tasks.clear();
        let threads = step.compute.threads.threads();
        let enough = if threads == 1 { 1 } else { 2 * threads };
        let is_short = |span: &SpanRows| span.count < LONG_SPAN && expanded(span) == 0;
        let alike = |a: &SpanRows, b: &SpanRows| in_order || is_short(a) && is_short(b);
        for spans in step.rows.spans().chunk_by(alike) {
            let mut rows = spans[0].first..spans.last().map_or(0, |span| span.rows().end);
            let first = rows.start;
            rows.start += if in_order { 0 } else { expanded(&spans[0]) };
            self.plan_expanded(first..rows.start, heads, enough);
            if rows.is_empty() {
                continue;
            }
            let most = most(spans.iter().map(|span| span.count).max().unwrap_or(0));
            let portion = if in_order { rows.len() } else { most.rows.min(rows.len()) };
            let portions = rows.len().div_ceil(portion);
            let fits = |&n: &usize| sharing.is_multiple_of(n) && heads / n * portions >= enough;
            let together = (1..=most.heads.min(sharing)).rev().find(fits).unwrap_or(1);
            for head in (0..heads).step_by(together) {
                self.tasks.extend(rows.clone().step_by(portion).map(|first| Task {
                    rows: first..(first + portion).min(rows.end),
                    heads: head..head + together,
                    expanded: false,
                }));
            }
        }
        self.ends.clear();
        self.ends.extend(self.tasks.iter().scan(0, |end, task| {
            *end += task.rows.len() * task.heads.len() * width;
            Some(*end)
        }));
    }

    /// Each head with these rows of one span, divided only if there would be fewer tasks than are `enough`.
    fn plan_expanded(&mut self, rows: Range<usize>, heads: usize, enough: usize) {
        if rows.is_empty() {
            return;
        }
        let portions = enough.div_ceil(heads).min(rows.len().div_ceil(EXPANDED_ROWS));
        let portion = rows.len().div_ceil(portions);
        for head in 0..heads {
            self.tasks.extend(rows.clone().step_by(portion).map(|first| Task {
                rows: first..(first + portion).min(rows.end),
                heads: head..head + 1,
                expanded: true,
            }));
        }
    }

    /// Runs `f` for each task and its part of `out`, `[rows, heads, width]` of the task.
    pub fn run(&self, threads: &ThreadPool, out: &mut [f32], f: &(dyn Fn(&Task, &mut [f32]) + Sync)) {
        threads.for_each_part(out, &self.ends, &|i, part| f(&self.tasks[i], part));
    }

    /// Copies the results of the tasks into the order of rows, each with its `heads`.
    pub fn by_row(&self, by_task: &[f32], heads: usize, by_row: &mut [f32]) {
        let mut left = by_task;
        for task in &self.tasks {
            for row in task.rows.clone() {
                let (values, rest) = left.split_at(task.heads.len() * self.width);
                by_row[(row * heads + task.heads.start) * self.width..][..values.len()].copy_from_slice(values);
                left = rest;
            }
        }
    }
}

/// The queries of `tile` meet all keys that they see, block by block, and are finished; `rows` gives the keys and values at
/// positions of one block. False if the step was cancelled; the results are then unfinished.
pub fn attend<'a>(
    step: Step<'_>,
    tile: &mut QueryTile,
    rows: impl Fn(Range<usize>) -> (KvRows<'a>, KvRows<'a>),
) -> bool {
    let met = meet(step, tile, rows);
    if met {
        tile.finish();
    }
    met
}

/// Like [`attend`], for queries that will meet other keys afterwards.
pub fn meet<'a>(step: Step<'_>, tile: &mut QueryTile, rows: impl Fn(Range<usize>) -> (KvRows<'a>, KvRows<'a>)) -> bool {
    let mut blocks = key_blocks(tile.positions()).map(|positions| (positions.clone(), rows(positions))).peekable();
    while let Some((positions, (keys, values))) = blocks.next() {
        if step.is_cancelled() {
            return false;
        }
        let next = blocks.peek().map(|&(_, (keys, _))| keys);
        step.compute.kernels.attend_block(tile, &KeyBlock::new(positions, keys, values).before(next));
    }
    true
}

/// The queries of `tile` meet the keys that were chosen, which are also their values: these are gathered in `buffer`, and cut into
/// blocks by their place in the list. `row` gives the row at one position. False if the step was cancelled meanwhile.
pub fn meet_chosen<'a>(
    step: Step<'_>,
    tile: &mut QueryTile,
    buffer: &mut Option<KvBuffer>,
    chosen: &[u32],
    row: impl Fn(usize) -> KvRows<'a>,
) -> bool {
    for places in key_blocks(tile.positions()) {
        if step.is_cancelled() {
            return false;
        }
        for (to, &position) in chosen[places.clone()].iter().enumerate() {
            let row = row(position as usize);
            let buffer = match buffer {
                Some(buffer) if buffer.is_like(&row) => buffer,
                _ => buffer.insert(KvBuffer::new(row.ty(), KEY_BLOCK, row.width())),
            };
            buffer.copy_row(to, &row, 0);
        }
        let rows = buffer.as_ref().map(|buffer| buffer.rows(0..places.len())).expect("a block has keys");
        step.compute.kernels.attend_block(tile, &KeyBlock::new(places, rows, rows));
    }
    true
}

#[cfg(test)]
mod tests {
    use sluice_kernels::{Kernels, Precision};

    use super::*;
    use crate::compute::Compute;
    use crate::rows::{Cursor, Phase, Rows, Span, Want};
    use crate::sequence::Sequence;

    /// Plans for spans with these numbers of rows.
    fn for_plans(mut check: impl FnMut(&Tasks, usize, Heads, Most, bool)) {
        let tokens = [0; 70];
        for counts in [&[1][..], &[1; 9], &[2, 3, 1, 70, 1, 1], &[64, 5], &[3, 4]] {
            let mut sequences: Vec<Sequence> = counts.iter().map(|_| Sequence::without_layers(70)).collect();
            let span =
                |(sequence, &n)| Span { sequence, tokens: &tokens[..n], phase: Phase::Prompt, logits: Want::Last };
            let spans: Vec<Span<'_>> = sequences.iter_mut().zip(counts).map(span).collect();
            let mut rows = Rows::default();
            assert!(rows.take(&spans, &mut Cursor::default(), 1000));
            for threads in [1, 2, 5] {
                let (kernels, threads) = (Kernels::scalar(), ThreadPool::new(threads).into());
                let compute = Compute::new(kernels, threads, Precision::Exact);
                let step = Step { compute: &compute, rows: &rows, extent: &[] };
                for (heads, sharing) in [(8, 8), (8, 2), (6, 3), (4, 1)] {
                    for (in_order, most) in [(false, Most { rows: 7, heads: 4 }), (true, Most { rows: 7, heads: 8 })] {
                        let (shape, mut tasks) = (Heads { heads, sharing, width: 2 }, Tasks::default());
                        for expanded in [0, 1, 3, 70] {
                            let expanded = if in_order { 0 } else { expanded };
                            tasks.plan_with(step, shape, in_order, |_| most, |span| span.count.min(expanded));
                            check(&tasks, rows.len(), shape, most, in_order);
                            let in_form = |task: &&Task| task.expanded;
                            let pairs =
                                tasks.tasks.iter().filter(in_form).map(|task| task.rows.len() * task.heads.len());
                            let want: usize = counts.iter().map(|&n| n.min(expanded)).sum();
                            assert_eq!(pairs.sum::<usize>(), want * heads, "{tasks:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_row_meets_every_head_once_and_results_come_back_in_order() {
        for_plans(|tasks, n, Heads { heads, width, .. }, _, _| {
            let (mut by_task, mut by_row) = (vec![f32::NAN; n * heads * width], vec![f32::NAN; n * heads * width]);
            tasks.run(&ThreadPool::new(2), &mut by_task, &|task, out| {
                let pairs = task.rows.clone().flat_map(|row| task.heads.clone().map(move |head| row * heads + head));
                out.chunks_exact_mut(width).zip(pairs).for_each(|(out, pair)| out.fill(pair as f32));
            });
            tasks.by_row(&by_task, heads, &mut by_row);
            assert!(by_row.chunks_exact(width).enumerate().all(|(pair, v)| v == [pair as f32; 2]), "{tasks:?}");
        });
    }

    #[test]
    fn tasks_are_no_larger_than_they_may_be_and_their_heads_share_keys() {
        for_plans(|tasks, n, Heads { sharing, .. }, most, in_order| {
            for Task { rows, heads, expanded } in &tasks.tasks {
                if *expanded {
                    assert_eq!(heads.len(), 1, "{tasks:?}");
                    continue;
                }
                assert_eq!(heads.start / sharing, (heads.end - 1) / sharing, "{tasks:?}");
                assert!(heads.len() <= most.heads, "{tasks:?}");
                assert!(if in_order { *rows == (0..n) } else { rows.len() <= most.rows }, "{tasks:?}");
            }
        });
    }
}
