//! Attention of many queries as products of matrices, with the bits of the `scalar` module.
//!
//! Queries lie in *panels*: 16 of them side by side, so that a lane of a vector is a query. A number of a key is then the same for
//! all lanes, and a tile of several keys and all queries of a panel stays in registers. The product of a query with a key consists of 32 chains, the lanes
//! of `dot`: they are formed one after the other, and folded as soon as both halves of a fold are there. So nothing is ever folded
//! across a vector, however narrow keys are. Weights stay in that form, `[keys, queries]`, and values are added to tiles of several
//! queries and columns.

use crate::attention::{KEY_BLOCK, Part, QueryTile};
use crate::kv::KvRows;
use crate::math::exp;
use crate::scalar::{DOT_LANES, Running, WEIGHT_LANES, or_zero};

/// Queries of a panel.
pub(crate) const PANEL: usize = 16;

/// The lanes of `dot` in the order in which they are formed. Two neighbours are folded first, then two pairs of neighbours, and so on: as
/// folding in halves adds lane `i + 16` to lane `i`, then `i + 8`, a place is the lane with its bits reversed.
pub(crate) const LANE_ORDER: [usize; DOT_LANES] = {
    let mut order = [0; DOT_LANES];
    let mut place = 0;
    while place < DOT_LANES {
        order[place] = (place as u8).reverse_bits() as usize >> (8 - FOLDS);
        place += 1;
    }
    order
};
/// Longest queries of which a panel stays in the nearest cache beside a few keys.
pub(crate) const NEAR: usize = 256;

/// How often the lanes of `dot` are halved.
pub(crate) const FOLDS: usize = DOT_LANES.ilog2() as usize;

/// The products of a panel with a block, or its weights, by place.
pub(crate) type Weights = [[f32; PANEL]; KEY_BLOCK];

/// Adjacent queries of a panel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    /// The first one.
    pub(crate) first: usize,
    pub(crate) count: usize,
    /// The rows that any of them sees, and those that all see; the latter lie in the former even if there are none.
    pub(crate) any: Part,
    pub(crate) all: Part,
}

/// Buffers of a tile whose queries are in panels. All are reused.
#[derive(Debug, Default)]
pub(crate) struct Panels {
    /// `[panels, key, 16]`: for each lane of `dot`, in [`LANE_ORDER`], the numbers of that lane in ascending order.
    pub(crate) queries: Vec<[f32; PANEL]>,
    /// How many queries of the tile these are.
    filled: usize,
    /// `[panels, KEY_BLOCK, 16]`: products of the current block by place, which become weights.
    pub(crate) scores: Vec<Weights>,
    /// For each panel, the rows of the block that any of its queries sees.
    pub(crate) spans: Vec<Part>,
    /// Queries whose values are summed together.
    pub(crate) groups: Vec<Group>,
    /// Sums that wait for the other half of their fold, `[FOLDS + 1, keys, panels, 16]` of what is multiplied together.
    pub(crate) waiting: Vec<[f32; PANEL]>,
    /// Keys and values of a block as f32, if they are kept in a narrower type.
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
}

impl Panels {
    /// The queries will be others.
    pub(crate) fn forget(&mut self) {
        self.filled = 0;
    }

    /// Forms groups of at most `most` queries.
    pub(crate) fn group(&mut self, tile: &QueryTile, most: usize) {
        self.groups.clear();
        let mut first = 0;
        while first < tile.len() {
            let left = (PANEL - first % PANEL).min(tile.len() - first);
            let count = [most, 4, 2].into_iter().find(|&count| count <= left).unwrap_or(1);
            let parts = &tile.parts[first..first + count];
            let any = union(parts);
            let mut all = parts.iter().fold(any, |a, b| Part { from: a.from.max(b.from), to: a.to.min(b.to) });
            if all.is_empty() {
                all = Part { from: any.to, to: any.to };
            }
            self.groups.push(Group { first, count, any, all });
            first += count;
        }
    }

    /// Puts the queries of a tile into panels, unless they are there, and records what they see of a block.
    pub(crate) fn prepare(&mut self, tile: &QueryTile) {
        let (n, key) = (tile.len(), tile.key);
        self.spans.clear();
        self.spans.extend(tile.parts.chunks(PANEL).map(union));
        if self.scores.len() < self.spans.len() {
            self.scores.resize(self.spans.len(), [[0.0; PANEL]; KEY_BLOCK]);
        }
        if self.filled == n {
            return;
        }
        self.queries.clear();
        self.queries.resize(self.spans.len() * key, [0.0; PANEL]);
        for (panel, queries) in self.queries.chunks_exact_mut(key).zip(tile.queries.chunks(PANEL * key)) {
            fill(panel, queries, key);
        }
        self.filled = n;
    }
}

/// The rows from the first to the last that any query sees.
pub(crate) fn union(parts: &[Part]) -> Part {
    parts.iter().fold(Part { from: 0, to: 0 }, |all, part| all.or(*part))
}

/// Puts up to 16 queries of `key` numbers into a panel.
fn fill(panel: &mut [[f32; PANEL]], queries: &[f32], key: usize) {
    let chunks = key / DOT_LANES;
    let mut rows: [&[[f32; DOT_LANES]]; PANEL] = [&[]; PANEL];
    for (row, query) in rows.iter_mut().zip(queries.chunks_exact(key)) {
        *row = query.as_chunks().0;
    }
    let count = queries.len() / key;
    if count < PANEL {
        for (i, row) in rows[..count].iter().enumerate() {
            for (c, numbers) in row.iter().enumerate() {
                LANE_ORDER.iter().enumerate().for_each(|(n, &lane)| panel[n * chunks + c][i] = numbers[lane]);
            }
        }
        return;
    }
    // Of known length, numbers need no checks.
    for row in &mut rows {
        *row = &row[..chunks];
    }
    for c in 0..chunks {
        for (n, &lane) in LANE_ORDER.iter().enumerate() {
            let to = &mut panel[n * chunks + c];
            for i in 0..PANEL {
                to[i] = rows[i][c][lane % DOT_LANES];
            }
        }
    }
}

/// Rows of f32 numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plain<'a> {
    numbers: &'a [f32],
    stride: usize,
}

impl<'a> Plain<'a> {
    /// Rows of `width` numbers without gaps.
    pub(crate) fn new(numbers: &'a [f32], width: usize) -> Self {
        Plain { numbers, stride: width }
    }

    /// Rows of a cache, if that keeps them as f32.
    pub(crate) fn of(rows: &KvRows<'a>) -> Option<Self> {
        rows.all_plain().map(|(numbers, stride)| Plain { numbers, stride })
    }

    /// Numbers `at..at + len` of row `j`.
    #[inline(always)]
    pub(crate) fn part(&self, j: usize, at: usize, len: usize) -> &'a [f32] {
        &self.numbers[j * self.stride + at..][..len]
    }
}

impl QueryTile {
    /// Whether its queries are put into panels: if they fill them but for an eighth, and have such a length. Panels with many empty
    /// lanes take longer than query by query.
    pub(crate) fn is_in_panels(&self) -> bool {
        let n = self.len();
        let fills = n >= PANEL && 8 * (n.next_multiple_of(PANEL) - n) <= n;
        fills && self.key > 0 && self.key.is_multiple_of(DOT_LANES)
    }

    /// Turns the products in panels into weights, and updates maxima and sums, as [`weigh`](Self::weigh) does; the same code for
    /// all vectors.
    #[inline(always)]
    pub(crate) fn weigh_panels(&mut self, place: usize, panels: &mut Panels) {
        let Panels { scores, spans, .. } = panels;
        for (panel, (span, scores)) in spans.iter().zip(scores).enumerate().filter(|(_, (span, _))| !span.is_empty()) {
            let first = panel * PANEL;
            let queries = first..self.len().min(first + PANEL);
            let (parts, running) = (&self.parts[queries.clone()], &mut self.running[queries.clone()]);
            let (mut sees, mut before) = ([[0u32; PANEL]; 2], [[f32::NEG_INFINITY; PANEL], [0.0; PANEL]]);
            for (i, (part, running)) in parts.iter().zip(&*running).enumerate() {
                [sees[0][i], sees[1][i]] = [part.from, part.to].map(|row| (place + row) as u32);
                [before[0][i], before[1][i]] = [running.max, running.sum];
            }
            let scores = &mut scores[place + span.from..place + span.to];
            let max = mask(self.scale, (place + span.from) as u32, sees, scores);
            let sum = exponentiate(max, place + span.from, scores);
            let [max, sum, alpha, beta] = combine(before, [max, sum]);
            let queries = running.iter_mut().zip(&mut self.factors[queries]).zip(parts).enumerate();
            for (i, ((running, factors), _)) in queries.filter(|(_, (_, part))| !part.is_empty()) {
                *running = Running { max: max[i], sum: sum[i] };
                *factors = [alpha[i], beta[i]];
            }
        }
    }
}

/// Scales the scores of a panel at places from `first` on, makes those that a query does not see minus infinity, and returns the largest.
#[inline(always)]
fn mask(scale: f32, first: u32, [from, to]: [[u32; PANEL]; 2], scores: &mut [[f32; PANEL]]) -> [f32; PANEL] {
    let mut max = [f32::NEG_INFINITY; PANEL];
    for (j, scores) in (first..).zip(scores) {
        for i in 0..PANEL {
            let score = scores[i] * scale;
            let score = if from[i] <= j && j < to[i] { score } else { f32::NEG_INFINITY };
            scores[i] = score;
            max[i] = if score > max[i] { score } else { max[i] };
        }
    }
    max
}

/// Turns the scores of a panel at places from `first` on into weights, and returns their sums.
#[inline(always)]
fn exponentiate(max: [f32; PANEL], first: usize, scores: &mut [[f32; PANEL]]) -> [f32; PANEL] {
    let mut zero = max;
    for i in 0..PANEL {
        zero[i] = or_zero(max[i]);
    }
    // Other places would add zeros.
    let mut lanes = [[0.0; PANEL]; WEIGHT_LANES];
    for (j, scores) in (first..).zip(scores) {
        let lane = &mut lanes[j % WEIGHT_LANES];
        for i in 0..PANEL {
            scores[i] = exp(scores[i] - zero[i]);
            lane[i] += scores[i];
        }
    }
    let mut half = WEIGHT_LANES / 2;
    while half > 0 {
        let (low, high) = lanes.split_at_mut(half);
        for (low, high) in low.iter_mut().zip(high) {
            for i in 0..PANEL {
                low[i] += high[i];
            }
        }
        half /= 2;
    }
    lanes[0]
}

/// [`Running::combine`] for the queries of a panel: what they have after a block, and their `α` and `β`.
#[inline(always)]
fn combine([max, sum]: [[f32; PANEL]; 2], [block_max, block_sum]: [[f32; PANEL]; 2]) -> [[f32; PANEL]; 4] {
    let (mut after, mut zero) = (max, max);
    for i in 0..PANEL {
        after[i] = if block_max[i] > max[i] { block_max[i] } else { max[i] };
        zero[i] = or_zero(after[i]);
    }
    let (mut alpha, mut beta, mut sums) = (max, block_max, sum);
    for i in 0..PANEL {
        alpha[i] = exp(alpha[i] - zero[i]);
    }
    for i in 0..PANEL {
        beta[i] = exp(beta[i] - zero[i]);
    }
    for i in 0..PANEL {
        sums[i] = sums[i].mul_add(alpha[i], block_sum[i] * beta[i]);
    }
    [after, sums, alpha, beta]
}

/// The kernel `attend_block` for queries in panels, for one instruction set.
///
/// It is a macro for the same reason as `attention` in `x86/`. The module that uses it provides `WIDTH` (numbers of a vector), `KEYS`
/// and `TOGETHER` (keys and panels whose sums stay in the registers), `HALF` (half as many keys), `QUERIES` and `VECTORS` (queries,
/// and vectors of their columns, for which the same is true), `load` and `store` of a vector, `ask` for numbers that will be needed
/// soon, and `widen`, which turns the beginning of a row into f32 numbers.
macro_rules! panels {
    ($features:tt, $vector:ty, zero: $zero:ident, add: $add:ident, fmadd: $fmadd:ident, mul: $mul:ident, splat: $splat:ident) => {
        /// Vectors of a panel.
        const ACROSS: usize = PANEL / WIDTH;

        /// What `P` panels and `T` keys add up in one lane of `dot`.
        type Sums<const T: usize, const P: usize> = [[[$vector; ACROSS]; P]; T];

        #[target_feature(enable = $features)]
        pub(super) fn attend_block(tile: &mut QueryTile, block: &KeyBlock<'_>) {
            let mut panels = std::mem::take(&mut tile.panels);
            panels.prepare(tile);
            let (rows, place) = (block.len(), block.place(0));
            let mut buffers = [&mut panels.keys, &mut panels.values].map(std::mem::take);
            let [key_buffer, value_buffer] = &mut buffers;
            let keys = plain_rows(&block.keys, rows, tile.key, key_buffer);
            let same = tile.value <= tile.key && block.keys.begin_with(&block.values);
            let values = if same { keys } else { plain_rows(&block.values, rows, tile.value, value_buffer) };
            score(tile, place, keys, &mut panels);
            panels.group(tile, QUERIES);
            tile.weigh_panels(place, &mut panels);
            add_values(tile, place, values, &panels);
            [panels.keys, panels.values] = buffers;
            tile.panels = panels;
        }

        /// The first `n` of `rows`, each `width` long: where they are, or widened in `buffer`.
        #[target_feature(enable = $features)]
        fn plain_rows<'a>(rows: &KvRows<'a>, n: usize, width: usize, buffer: &'a mut Vec<f32>) -> Plain<'a> {
            if let Some(plain) = Plain::of(rows) {
                return plain;
            }
            buffer.resize((n * width).max(buffer.len()), 0.0);
            for (j, row) in buffer.chunks_exact_mut(width.max(1)).take(n).enumerate() {
                widen(rows, j, row);
            }
            Plain::new(buffer, width)
        }

        /// Stores in `panels.scores` the products of all queries with the rows that they see, and of some with additional rows.
        #[target_feature(enable = $features)]
        fn score(tile: &QueryTile, place: usize, keys: Plain<'_>, panels: &mut Panels) {
            panels.waiting.resize((FOLDS + 1) * KEYS * TOGETHER, [0.0; PANEL]);
            let all = union(&panels.spans);
            let mut row = all.from;
            // A panel of short queries stays in the nearest cache. Then two lanes are formed together, for half as many keys: their sums
            // are folded without having waited.
            let near = tile.key <= NEAR;
            while row < all.to {
                row += match all.to - row {
                    left if near && left >= HALF && left != 4 => score_keys::<HALF, 2>(tile, place, keys, row, panels),
                    left if near && left >= 2 => score_keys::<2, 2>(tile, place, keys, row, panels),
                    left if !near && left >= KEYS => score_keys::<KEYS, 1>(tile, place, keys, row, panels),
                    left if !near && left >= 4 => score_keys::<4, 1>(tile, place, keys, row, panels),
                    _ => score_keys::<1, 2>(tile, place, keys, row, panels),
                };
            }
        }

        /// The products of `T` keys from `row` on with all panels that see one of them, `L` lanes at a time. Returns `T`.
        #[target_feature(enable = $features)]
        fn score_keys<const T: usize, const L: usize>(
            tile: &QueryTile,
            place: usize,
            keys: Plain<'_>,
            row: usize,
            panels: &mut Panels,
        ) -> usize {
            let Panels { queries, scores, spans, waiting, .. } = panels;
            let keys = each!(&[][..]; T, t => keys.part(row + t, 0, tile.key).as_chunks::<DOT_LANES>().0);
            let mut panel = 0;
            while panel < spans.len() {
                let together = TOGETHER.min(spans.len() - panel);
                let seen = spans[panel..panel + together].iter().any(|span| span.from < row + T && row < span.to);
                let queries = &queries[panel * tile.key..][..together * tile.key];
                let out = &mut scores[panel..panel + together];
                if seen && together == TOGETHER {
                    products::<T, TOGETHER, L>(queries, keys, waiting, out, place + row);
                } else if seen {
                    products::<T, 1, L>(queries, keys, waiting, out, place + row);
                }
                panel += together;
            }
            T
        }

        /// The products of `T` keys with the queries of `P` adjacent panels, `L` lanes at a time, for the places from `place` on.
        #[target_feature(enable = $features)]
        fn products<const T: usize, const P: usize, const L: usize>(
            queries: &[[f32; PANEL]],
            keys: [&[[f32; DOT_LANES]]; T],
            waiting: &mut [[f32; PANEL]],
            out: &mut [Weights],
            place: usize,
        ) {
            let chunks = keys[0].len();
            let keys = each!(&[][..]; T, t => &keys[t][..chunks]);
            let panels = each!(&[][..]; P, p => &queries[p * chunks * DOT_LANES..][..chunks * DOT_LANES]);
            for (n, lanes) in LANE_ORDER.as_chunks::<L>().0.iter().enumerate() {
                let mut sums = sum_lanes::<T, P, L>(&panels, &keys, n * L, lanes);
                let mut level = 0;
                while n >> level & 1 == 1 {
                    let others = &waiting[level * T * P..][..T * P];
                    for t in 0..T {
                        for p in 0..P {
                            for v in 0..ACROSS {
                                let other = load(&others[t * P + p].as_chunks::<WIDTH>().0[v]);
                                sums[t][p][v] = $add(other, sums[t][p][v]);
                            }
                        }
                    }
                    level += 1;
                }
                let place = &mut waiting[level * T * P..][..T * P];
                for t in 0..T {
                    for p in 0..P {
                        for v in 0..ACROSS {
                            store(&mut place[t * P + p].as_chunks_mut::<WIDTH>().0[v], sums[t][p][v]);
                        }
                    }
                }
            }
            let last = (DOT_LANES / L).ilog2() as usize;
            for (p, out) in out.iter_mut().enumerate() {
                for (t, out) in out[place..][..T].iter_mut().enumerate() {
                    *out = waiting[(last * T + t) * P + p];
                }
            }
        }

        /// The sums of `L` lanes of `dot`, of which the first is at place `n` of their order, folded to one.
        #[inline]
        #[target_feature(enable = $features)]
        fn sum_lanes<const T: usize, const P: usize, const L: usize>(
            panels: &[&[[f32; PANEL]]; P],
            keys: &[&[[f32; DOT_LANES]]; T],
            n: usize,
            lanes: &[usize; L],
        ) -> Sums<T, P> {
            let chunks = keys[0].len();
            let keys = each!(&[][..]; T, t => &keys[t][..chunks]);
            let mut sums = [[[[$zero(); ACROSS]; P]; T]; L];
            let lanes = each!(0; L, l => lanes[l] % DOT_LANES);
            let panels = each!([&[][..]; P]; L, l => each!(&[][..]; P, p => &panels[p][(n + l) * chunks..][..chunks]));
            for c in 0..chunks {
                for l in 0..L {
                    let mut query = [[$zero(); ACROSS]; P];
                    for p in 0..P {
                        for v in 0..ACROSS {
                            query[p][v] = load(&panels[l][p][c].as_chunks::<WIDTH>().0[v]);
                        }
                        if L == 1 {
                            ask(&panels[l][p][c]);
                        }
                    }
                    for t in 0..T {
                        let key = $splat(keys[t][c][lanes[l]]);
                        for p in 0..P {
                            for v in 0..ACROSS {
                                sums[l][t][p][v] = $fmadd(query[p][v], key, sums[l][t][p][v]);
                            }
                        }
                    }
                }
            }
            if L == 2 {
                for t in 0..T {
                    for p in 0..P {
                        for v in 0..ACROSS {
                            sums[0][t][p][v] = $add(sums[0][t][p][v], sums[1][t][p][v]);
                        }
                    }
                }
            }
            sums[0]
        }

        /// Adds the weighted values of a block to `tile.out`.
        #[target_feature(enable = $features)]
        fn add_values(tile: &mut QueryTile, place: usize, values: Plain<'_>, panels: &Panels) {
            let mut at = 0;
            while tile.value - at >= VECTORS * WIDTH {
                add_columns::<VECTORS>(tile, place, values, panels, at);
                at += VECTORS * WIDTH;
            }
            while tile.value - at >= WIDTH {
                add_columns::<1>(tile, place, values, panels, at);
                at += WIDTH;
            }
            if at < tile.value {
                for i in 0..tile.len() {
                    odd_columns(tile, place, values, &panels.scores[i / PANEL], i, at);
                }
            }
        }

        /// The columns from column `at` on, fewer than a vector has, of query `i`.
        #[target_feature(enable = $features)]
        fn odd_columns(
            tile: &mut QueryTile,
            place: usize,
            values: Plain<'_>,
            weights: &Weights,
            i: usize,
            at: usize,
        ) {
            if tile.parts[i].is_empty() {
                return;
            }
            let [alpha, beta] = tile.factors[i];
            for column in at..tile.value {
                let mut sum = 0.0;
                for row in tile.parts[i].rows() {
                    sum = weights[place + row][i % PANEL].mul_add(values.part(row, column, 1)[0], sum);
                }
                let out = &mut tile.out[i * tile.value + column];
                *out = out.mul_add(alpha, sum * beta);
            }
        }

        /// `N` vectors of columns, from column `at` on, of all queries.
        #[target_feature(enable = $features)]
        fn add_columns<const N: usize>(
            tile: &mut QueryTile,
            place: usize,
            values: Plain<'_>,
            panels: &Panels,
            at: usize,
        ) {
            for group in &panels.groups {
                let weights = &panels.scores[group.first / PANEL][place..];
                match group.count {
                    QUERIES => weighted::<QUERIES, N>(tile, group, weights, values, at),
                    4 => weighted::<4, N>(tile, group, weights, values, at),
                    2 => weighted::<2, N>(tile, group, weights, values, at),
                    _ => weighted::<1, N>(tile, group, weights, values, at),
                }
            }
        }

        /// Adds those of `rows` that a query sees to its sums. It is not inlined, so that the sums of other rows stay in registers.
        #[inline(never)]
        #[target_feature(enable = $features)]
        fn add_seen<const Q: usize, const N: usize>(
            mut sums: [[$vector; N]; Q],
            rows: std::ops::Range<usize>,
            parts: &[Part],
            (weights, in_panel): (&[[f32; PANEL]], usize),
            values: Plain<'_>,
            at: usize,
        ) -> [[$vector; N]; Q] {
            for j in rows {
                let row = values.part(j, at, N * WIDTH).as_chunks::<WIDTH>().0;
                for q in (0..Q).filter(|&q| parts[q].rows().contains(&j)) {
                    let weight = $splat(weights[j][in_panel + q]);
                    for v in 0..N {
                        sums[q][v] = $fmadd(weight, load(&row[v]), sums[q][v]);
                    }
                }
            }
            sums
        }

        /// `N` vectors of columns, from column `at` on, of the `Q` queries of a group. `weights` begin with those of the first row.
        #[target_feature(enable = $features)]
        fn weighted<const Q: usize, const N: usize>(
            tile: &mut QueryTile,
            group: &Group,
            weights: &[[f32; PANEL]],
            values: Plain<'_>,
            at: usize,
        ) {
            let Group { first, any, all, .. } = *group;
            let in_panel = first % PANEL;
            let mut sums = [[$zero(); N]; Q];
            // Not every query sees the rows before and behind those that all see.
            if any.from < all.from {
                sums = add_seen(sums, any.from..all.from, &tile.parts[first..], (weights, in_panel), values, at);
            }
            for j in all.rows() {
                let weights = &weights[j][in_panel..][..Q];
                let row = values.part(j, at, N * WIDTH).as_chunks::<WIDTH>().0;
                let row = each!($zero(); N, v => load(&row[v]));
                for q in 0..Q {
                    let weight = $splat(weights[q]);
                    for v in 0..N {
                        sums[q][v] = $fmadd(weight, row[v], sums[q][v]);
                    }
                }
            }
            if all.to < any.to {
                sums = add_seen(sums, all.to..any.to, &tile.parts[first..], (weights, in_panel), values, at);
            }
            for q in (0..Q).filter(|q| !tile.parts[first + q].is_empty()) {
                let [alpha, beta] = tile.factors[first + q];
                let (alpha, beta) = ($splat(alpha), $splat(beta));
                let out = &mut tile.out[(first + q) * tile.value + at..][..N * WIDTH].as_chunks_mut::<WIDTH>().0[..N];
                for v in 0..N {
                    let sum = $fmadd(load(&out[v]), alpha, $mul(sums[q][v], beta));
                    store(&mut out[v], sum);
                }
            }
        }
    };
}
