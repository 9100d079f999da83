//! Attention of one head over keys and values that are expanded from latents, as products of matrices: for the many rows of a prompt.
//!
//! What is computed, operation by operation, with `fma` and `exp` as in the `scalar` module:
//!
//! - A key is `k[i] = Σ W[r][i]·c[r]` of a latent `c`, with the latent's rotated part behind it; a value is `v[i] = Σ V[i][r]·c[r]`. Each sum
//!   begins at +0 and is one chain of `fma` for `r` ascending.
//! - The keys that a query sees, all up to some position, are cut into blocks at multiples of [`EXPANDED_BLOCK`]. A query begins with
//!   `m = -∞`, `l = 0`, `o = 0`. With each block in ascending order: `s[j] = (Σ k[j][i]·q[i])·scale`, one chain of `fma` for `i` ascending, then
//!   one product; `m' = max(m, max s[j])`; `α = exp(m - m')`; `p[j] = exp(s[j] - m')`; `l' = l·α + p[0] + p[1] + …` from the left; `o' = o·α`,
//!   then `fma(p[j], v[j], o')` for `j` ascending.
//! - The result is `o / l + 0`. Where a maximum is `-∞`, 0 is subtracted instead of it.
//!
//! A query's result depends on nothing but the query and the latents that it sees. It may meet keys that it does not see, with the weight 0,
//! and that can change nothing but the sign of a zero in `o`, which the last addition removes; what is not finite among their values is
//! left out.

use crate::chains::Rows;
use crate::isa::Kernels;
use crate::math::exp;
use crate::scalar::or_zero;
use crate::update::{Stripes, WIDE};

/// Keys of a block: whole tiles of each instruction set. A part of the definition: another number gives other bits.
pub const EXPANDED_BLOCK: usize = 96;
/// Queries of a tile: the most for which a tile and a block stay in the second-level cache together; whole stripes and tiles.
pub const EXPANDED_TILE: usize = 96;

/// Numbers of a latent that a product takes at once, so that its operands stay in the nearest cache.
const DEPTH: usize = 256;

/// Where the pieces of a latent of `rank` numbers begin, and how long they are.
fn pieces(rank: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rank).step_by(DEPTH).map(move |first| (first, DEPTH.min(rank - first)))
}

/// Bytes that an [`Expander`], `blocks` blocks and a tile take, for latents of `rank` numbers with `rotated` more, keys of which `plain`
/// numbers are not rotated, and values of `value` numbers.
pub fn expansion_bytes(rank: usize, rotated: usize, plain: usize, value: usize, blocks: usize) -> u64 {
    let (wide_plain, wide_value) = (plain.next_multiple_of(WIDE), value.next_multiple_of(WIDE));
    let expander = rank * (wide_plain + wide_value) + EXPANDED_BLOCK * (rank + rotated);
    let each = EXPANDED_BLOCK * (key_stride(plain, rotated) + wide_value);
    let tile = EXPANDED_TILE * (2 * (plain + rotated) + EXPANDED_BLOCK + 4);
    4 * (expander + blocks * each + tile) as u64
}

/// Distance between keys: what is not rotated is written in whole stripes.
fn key_stride(plain: usize, rotated: usize) -> usize {
    (plain + rotated).max(plain.next_multiple_of(WIDE))
}

/// Expands latents to the keys and values of one head. All buffers are reused.
#[derive(Debug, Default)]
pub struct Expander {
    rank: usize,
    /// Numbers of a key without its rotated part, and of a value.
    plain: usize,
    value: usize,
    /// What keys are made with, `[rank, plain]`, and values, `[rank, value]`: in pieces of the rank.
    key_weights: Vec<Stripes<WIDE>>,
    value_weights: Vec<Stripes<WIDE>>,
    /// Latents of a block with their rotated parts, `[keys, rank + rotated]`.
    latents: Vec<f32>,
}

impl Expander {
    /// Latents of `rank` numbers will become keys by `weights`, `[rank, plain]`.
    ///
    /// # Panics
    /// If they are not a whole number for each number of a latent.
    pub fn set_keys(&mut self, rank: usize, weights: &[f32]) {
        assert!(rank > 0 && weights.len().is_multiple_of(rank), "{} weights for latents of {rank}", weights.len());
        (self.rank, self.plain) = (rank, weights.len() / rank);
        let plain = self.plain;
        self.key_weights.resize_with(pieces(rank).count(), Stripes::default);
        for (stripes, (first, depth)) in self.key_weights.iter_mut().zip(pieces(rank)) {
            stripes.set(depth, plain, |r| &weights[(first + r) * plain..][..plain]);
        }
    }

    /// Latents of `rank` numbers will become values by `weights`, `[value, rank]`.
    ///
    /// # Panics
    /// As [`set_keys`](Self::set_keys).
    pub fn set_values(&mut self, rank: usize, weights: &[f32]) {
        assert!(rank > 0 && weights.len().is_multiple_of(rank), "{} weights for latents of {rank}", weights.len());
        (self.rank, self.value) = (rank, weights.len() / rank);
        self.value_weights.resize_with(pieces(rank).count(), Stripes::default);
        for (stripes, (first, depth)) in self.value_weights.iter_mut().zip(pieces(rank)) {
            stripes.set_transposed(depth, self.value, |i| &weights[i * rank + first..][..depth]);
        }
    }

    /// Makes the keys and values of the `len` positions from `start` on, on the calling thread. `read` writes the latent of one of them,
    /// numbered from 0, with its rotated part of `rotated` numbers.
    ///
    /// # Panics
    /// If `start` is not where a block begins, or there are more positions than a block has.
    pub fn expand(
        &mut self,
        kernels: &Kernels,
        (start, len): (usize, usize),
        rotated: usize,
        mut read: impl FnMut(usize, &mut [f32]),
        block: &mut ExpandedKeys,
    ) {
        assert!(start.is_multiple_of(EXPANDED_BLOCK) && len <= EXPANDED_BLOCK, "{len} positions from {start} on");
        let Expander { rank, plain, value, key_weights, value_weights, latents } = self;
        let (rank, plain, value) = (*rank, *plain, *value);
        let width = rank + rotated;
        latents.resize(len * width, 0.0);
        latents.chunks_exact_mut(width).enumerate().for_each(|(i, latent)| read(i, latent));
        let product = |weights: &[Stripes<WIDE>], out: &mut Vec<f32>, stride: usize| {
            out.resize(len * stride, 0.0);
            for (weights, (first, _)) in weights.iter().zip(pieces(rank)) {
                let latents = Rows { numbers: &latents[first.min(latents.len())..], stride: width, count: len };
                kernels.row_products(latents, weights, (&mut out[..], stride), first > 0);
            }
        };
        let ExpandedKeys { keys, values, .. } = block;
        let (key, wide) = (key_stride(plain, rotated), value.next_multiple_of(WIDE));
        product(key_weights, keys, key);
        product(value_weights, values, wide);
        for (key, latent) in keys.chunks_exact_mut(key).zip(latents.chunks_exact(width)) {
            key[plain..][..rotated].copy_from_slice(&latent[rank..]);
        }
        // What is not finite times zero is NaN, and so is every sum with it.
        let zero = kernels.compiled(|| sum_of_zeros(values));
        (block.start, block.len, block.value) = (start, len, value);
        (block.key, block.finite) = (plain + rotated, zero == 0.0);
    }
}

/// The sum of all numbers times zero.
#[inline(always)]
fn sum_of_zeros(numbers: &[f32]) -> f32 {
    let mut sums = [0.0; WIDE];
    for numbers in numbers.as_chunks::<WIDE>().0 {
        for i in 0..WIDE {
            sums[i] += numbers[i] * 0.0;
        }
    }
    sums.iter().sum()
}

/// Keys and values of one head at the positions of one block.
#[derive(Debug, Default)]
pub struct ExpandedKeys {
    start: usize,
    len: usize,
    /// Numbers of a key, and of a value.
    key: usize,
    value: usize,
    /// Whether all values are finite.
    finite: bool,
    /// `[len, key]` and `[len, value]`, with space behind each row that makes it whole stripes.
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl ExpandedKeys {
    /// The first position.
    pub fn start(&self) -> usize {
        self.start
    }

    /// The first `count` keys, and their values.
    fn rows(&self, count: usize) -> [Rows<'_>; 2] {
        let stride = |numbers: &[f32]| numbers.len() / self.len.max(1);
        [&self.keys, &self.values].map(|numbers| Rows { numbers, stride: stride(numbers), count })
    }
}

/// Queries of one head that meet the same keys together.
#[derive(Debug, Default)]
pub struct ExpandedTile {
    scale: f32,
    /// How many keys each query sees, from the first on.
    sees: Vec<usize>,
    /// `[n, key]`, and the same in stripes.
    numbers: Vec<f32>,
    queries: Stripes<WIDE>,
    /// Scores and then weights of a block, `[keys, n]`, in whole stripes of queries.
    scores: Vec<f32>,
    /// Of the current block, how many keys each query sees.
    seen: Vec<u32>,
    /// What each query multiplies by which it has gathered before.
    alpha: Vec<f32>,
}

impl ExpandedTile {
    /// Takes queries of `key` numbers, each of which sees so many keys; `write` writes them, numbered from 0. Scores are multiplied by
    /// `scale`.
    pub fn set(
        &mut self,
        key: usize,
        scale: f32,
        sees: impl Iterator<Item = usize>,
        mut write: impl FnMut(usize, &mut [f32]),
    ) {
        let ExpandedTile { numbers, queries, .. } = self;
        self.scale = scale;
        self.sees.clear();
        self.sees.extend(sees);
        let n = self.sees.len();
        numbers.resize(n * key, 0.0);
        numbers.chunks_exact_mut(key).enumerate().for_each(|(i, query)| write(i, query));
        queries.set_transposed(key, n, |i| &numbers[i * key..][..key]);
    }
}

/// What the queries of a tile have gathered from the blocks before: `m`, `l` and `o` of the definition.
#[derive(Debug)]
pub struct Gathered<'a> {
    /// The largest score, at first minus infinity.
    pub max: &'a mut [f32],
    /// The sum of the weights, at first 0.
    pub sum: &'a mut [f32],
    /// The weighted sum of the values, `[n, value]`, at first 0.
    pub out: &'a mut [f32],
}

impl Gathered<'_> {
    /// Divides, once all blocks have been met: `out` then has the results.
    pub fn finish(self) {
        let width = self.out.len() / self.sum.len().max(1);
        for (out, sum) in self.out.chunks_exact_mut(width.max(1)).zip(self.sum) {
            out.iter_mut().for_each(|o| *o = *o / *sum + 0.0);
        }
    }
}

impl Kernels {
    /// The queries of `tile` meet the keys and values of one block, on the calling thread. Blocks come in ascending order, and all that
    /// a query sees have to come; those that no query sees can be left out.
    ///
    /// # Panics
    /// If `gathered` does not fit the tile and the values.
    pub fn attend_expanded(&self, tile: &mut ExpandedTile, block: &ExpandedKeys, gathered: Gathered<'_>) {
        let ExpandedTile { scale, sees, queries, scores, seen, alpha, .. } = tile;
        let (n, value) = (sees.len(), block.value);
        let Gathered { max, sum, out } = gathered;
        assert!(max.len() == n && sum.len() == n && out.len() == n * value, "one place for each of {n} queries");
        seen.clear();
        seen.extend(sees.iter().map(|sees| sees.saturating_sub(block.start).min(block.len) as u32));
        // Keys that nobody sees change nothing.
        let len = seen.iter().max().map_or(0, |&seen| seen as usize);
        if len == 0 {
            return;
        }
        let ([keys, values], stride) = (block.rows(len), n.next_multiple_of(WIDE));
        scores.resize((len * stride).max(scores.len()), 0.0);
        let scores = &mut scores[..len * stride];
        self.row_products(keys, queries, (&mut *scores, stride), false);
        alpha.resize(n, 0.0);
        self.compiled(|| weigh(*scale, seen, (&mut *scores, stride), (&mut *max, &mut *sum, &mut alpha[..])));
        let weights = Rows { numbers: scores, stride, count: len };
        if block.finite || seen.iter().all(|&seen| seen as usize == len) {
            self.add_weighted_rows(weights, values, alpha, (out, value));
            return;
        }
        // Zero times infinity would not be zero.
        for (i, (out, &seen)) in out.chunks_exact_mut(value).zip(&*seen).enumerate() {
            out.iter_mut().for_each(|o| *o *= alpha[i]);
            for j in 0..seen as usize {
                let weight = weights.part(j, i, 1)[0];
                out.iter_mut().zip(values.part(j, 0, value)).for_each(|(o, &value)| *o = weight.mul_add(value, *o));
            }
        }
    }
}

/// Turns products `[keys, n]`, which are `stride` apart and in whole stripes, into weights, and takes maxima and sums in; `alpha` gets what
/// each query has to multiply by which it has gathered before.
#[inline(always)]
fn weigh(
    scale: f32,
    seen: &[u32],
    (scores, stride): (&mut [f32], usize),
    (max, sum, alpha): (&mut [f32], &mut [f32], &mut [f32]),
) {
    for first in (0..seen.len()).step_by(WIDE) {
        let queries = first..(first + WIDE).min(seen.len());
        // Queries that are not there see nothing.
        let (mut sees, mut m, mut l) = ([0; WIDE], [f32::NEG_INFINITY; WIDE], [0.0; WIDE]);
        sees[..queries.len()].copy_from_slice(&seen[queries.clone()]);
        m[..queries.len()].copy_from_slice(&max[queries.clone()]);
        l[..queries.len()].copy_from_slice(&sum[queries.clone()]);
        let factors = weigh_stripe(scale, &sees, (&mut scores[first..], stride), &mut m, &mut l);
        alpha[queries.clone()].copy_from_slice(&factors[..queries.len()]);
        max[queries.clone()].copy_from_slice(&m[..queries.len()]);
        sum[queries.clone()].copy_from_slice(&l[..queries.len()]);
    }
}

/// [`weigh`] for the queries of one stripe; returns their `alpha`.
#[inline(always)]
fn weigh_stripe(
    scale: f32,
    sees: &[u32; WIDE],
    (scores, stride): (&mut [f32], usize),
    max: &mut [f32; WIDE],
    sum: &mut [f32; WIDE],
) -> [f32; WIDE] {
    let (mut m, mut l, mut alpha) = (*max, *sum, *max);
    for (j, scores) in scores.chunks_mut(stride).enumerate() {
        let (j, scores) = (j as u32, &mut scores[..WIDE]);
        for i in 0..WIDE {
            let score = scores[i] * scale;
            let score = if j < sees[i] { score } else { f32::NEG_INFINITY };
            scores[i] = score;
            m[i] = if score > m[i] { score } else { m[i] };
        }
    }
    let mut zero = m;
    for i in 0..WIDE {
        zero[i] = or_zero(m[i]);
        alpha[i] = exp(alpha[i] - zero[i]);
        l[i] *= alpha[i];
    }
    for scores in scores.chunks_mut(stride) {
        let scores = &mut scores[..WIDE];
        for i in 0..WIDE {
            scores[i] = exp(scores[i] - zero[i]);
            l[i] += scores[i];
        }
    }
    (*max, *sum) = (m, l);
    alpha
}
