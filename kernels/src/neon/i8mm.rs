//! Several tokens of int8 with i8mm: `smmla` adds the products of eight columns of two rows with two tokens to four sums.
//!
//! Integers are put in pairs of rows once per block for all tokens of a tile. Scales are put in such pairs as well, so the sums of
//! a pair of rows and a pair of tokens stay side by side until the last block, and nothing is taken apart in between.

use super::blocked::{block_scales, factor, has_offset, integers, offsets, scales_per_block, times_row_scales};
use super::int8::smmla;
use super::{INT4, IntLanes, Lanes, MXFP4, Q2, Q3, Q4, Q8, grouped, load, load_words, put};
use crate::activations::{Activations, QuantisedBlock};
use crate::matmul::{Tile, TileShape};
use crate::matrix::{Group, Matrix, WeightType};
use crate::vector::{block_bytes, by_halves};
use std::arch::aarch64::*;

/// Tokens of a tile: what it costs to put a block in pairs is shared by all of them.
pub(super) const TOKENS: usize = 16;

/// One number for each of two rows and two tokens, rows first, for the four pairs of rows of a group.
pub(super) type Fours = [float32x4_t; 4];
/// As [`Fours`], integers.
type IntFours = [int32x4_t; 4];
/// The integers of a block by eight columns and by pair of rows.
pub(super) type Eights = [[int8x16_t; 4]; 4];
/// The int8 form of two tokens. An odd token is its own neighbour.
type TokenPair<'a> = [&'a [QuantisedBlock]; 2];

#[target_feature(enable = "neon,dotprod,i8mm")]
pub(super) fn tile(w: &Matrix<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
    for g in 0..shape.groups {
        let group = w.group(shape.group + g);
        match w.ty() {
            WeightType::Q8 => blocked::<Q8>(&group, x, shape, g, out),
            WeightType::Int4 => blocked::<INT4>(&group, x, shape, g, out),
            WeightType::Mxfp4 => blocked::<MXFP4>(&group, x, shape, g, out),
            WeightType::Q4 => blocked::<Q4>(&group, x, shape, g, out),
            WeightType::Q3 => blocked::<Q3>(&group, x, shape, g, out),
            WeightType::Q2 => blocked::<Q2>(&group, x, shape, g, out),
            WeightType::Grouped(ty) => grouped::i8mm::tile(ty, &group, x, shape, g, out),
            _ => unreachable!("unblocked types have no integers"),
        }
    }
}

/// The tokens of a tile in pairs.
pub(super) struct Tokens<'a> {
    pairs: [TokenPair<'a>; TOKENS / 2],
    len: usize,
}

impl<'a> Tokens<'a> {
    /// With the first `blocks` blocks of each token, as many as there are.
    pub(super) fn new(x: &'a Activations, shape: TileShape, blocks: usize) -> Self {
        let mut pairs: [TokenPair<'a>; TOKENS / 2] = [[&[]; 2]; TOKENS / 2];
        let len = shape.tokens.div_ceil(2);
        for (i, pair) in pairs[..len].iter_mut().enumerate() {
            let first = 2 * i;
            let second = (first + 1).min(shape.tokens - 1);
            *pair = [first, second].map(|t| &x.quantised_row(shape.token + t)[..blocks]);
        }
        Tokens { pairs, len }
    }

    pub(super) fn pairs(&self) -> &[TokenPair<'a>] {
        &self.pairs[..self.len]
    }
}

/// The sums of a tile by pair of tokens, for even and for odd blocks.
pub(super) struct Sums([[Fours; TOKENS / 2]; 2]);

impl Sums {
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn new() -> Self {
        Sums([[[vdupq_n_f32(0.0); 4]; TOKENS / 2]; 2])
    }

    /// Those of pair `i` for a block whose number is odd or even as `turn` is.
    #[inline(always)]
    pub(super) fn of(&mut self, turn: usize, i: usize) -> &mut Fours {
        &mut self.0[turn % 2][i]
    }

    /// The sums of both tokens of pair `i`.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn total(&self, i: usize) -> [Lanes; 2] {
        let [even, odd] = &self.0;
        let sum = each!(vdupq_n_f32(0.0); 4, p => vaddq_f32(even[i][p], odd[i][p]));
        [
            each!(sum[0]; 2, h => vuzp1q_f32(sum[2 * h], sum[2 * h + 1])),
            each!(sum[0]; 2, h => vuzp2q_f32(sum[2 * h], sum[2 * h + 1])),
        ]
    }
}

#[target_feature(enable = "neon,dotprod,i8mm")]
fn blocked<const TY: u8>(w: &Group<'_>, x: &Activations, shape: TileShape, g: usize, out: &mut Tile) {
    let n = w.values.len() / const { block_bytes(TY) };
    let tokens = Tokens::new(x, shape, n);
    let mut sums = Sums::new();
    for (b, values) in (0..n).zip(w.values.chunks_exact(const { block_bytes(TY) })) {
        let mut vectors = [[vdupq_n_s8(0); 2]; 8];
        for q in 0..8 {
            vectors[q] = integers::<TY>(values, q / 4, q % 4);
        }
        let eights = eights(&vectors);
        for part in 0..const { scales_per_block(TY) } {
            let number = b * const { scales_per_block(TY) } + part;
            let scale = twice(block_scales::<TY>(w.scales, number));
            let offset = twice_integers(offsets::<TY>(w.scales, number));
            for (i, pair) in tokens.pairs().iter().enumerate() {
                let x = [&pair[0][b], &pair[1][b]];
                let mut dots = if const { by_halves(TY) } { half(&eights, x, part) } else { whole(&eights, x) };
                if const { has_offset(TY) } {
                    let sums = token_integers(if const { by_halves(TY) } { half_sums(x, part) } else { all_sums(x) });
                    dots = each!(dots[0]; 4, p => vmlaq_s32(dots[p], offset[p], sums));
                }
                let x_scale = token_floats([0, 1].map(|t| x[t].scale * const { factor(TY) }));
                let s = sums.of(number, i);
                for p in 0..4 {
                    s[p] = vfmaq_f32(s[p], vcvtq_f32_s32(dots[p]), vmulq_f32(scale[p], x_scale));
                }
            }
        }
    }
    for i in 0..tokens.pairs().len() {
        let rows = sums.total(i);
        let rows = each!(rows[0]; 2, t => times_row_scales::<TY>(rows[t], w.scales));
        put(rows, &mut out[2 * i..shape.tokens], g);
    }
}

/// Puts vectors of four columns of four rows in pairs of rows.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn eights(vectors: &[[int8x16_t; 2]; 8]) -> Eights {
    let mut eights = [[vdupq_n_s8(0); 4]; 4];
    for e in 0..4 {
        for h in 0..2 {
            let [low, high] = [vectors[2 * e][h], vectors[2 * e + 1][h]];
            let [low, high] = [vreinterpretq_s32_s8(low), vreinterpretq_s32_s8(high)];
            eights[e][2 * h] = vreinterpretq_s8_s32(vzip1q_s32(low, high));
            eights[e][2 * h + 1] = vreinterpretq_s8_s32(vzip2q_s32(low, high));
        }
    }
    eights
}

/// The number of each row for both tokens.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn twice(rows: Lanes) -> Fours {
    let [low, high] = rows;
    [vzip1q_f32(low, low), vzip2q_f32(low, low), vzip1q_f32(high, high), vzip2q_f32(high, high)]
}

/// As [`twice`], integers.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn twice_integers(rows: IntLanes) -> IntFours {
    let [low, high] = rows;
    [vzip1q_s32(low, low), vzip2q_s32(low, low), vzip1q_s32(high, high), vzip2q_s32(high, high)]
}

/// The number of each token for both rows.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn token_floats([a, b]: [f32; 2]) -> float32x4_t {
    load(&[a, b, a, b])
}

/// As [`token_floats`], integers.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn token_integers([a, b]: [i32; 2]) -> int32x4_t {
    vreinterpretq_s32_s8(load_words(&[a, b, a, b]))
}

/// The sums of the values of both tokens.
#[inline(always)]
pub(super) fn all_sums(x: [&QuantisedBlock; 2]) -> [i32; 2] {
    [x[0].sum, x[1].sum]
}

/// As [`all_sums`], over the first or the second half of the columns.
#[inline(always)]
pub(super) fn half_sums(x: [&QuantisedBlock; 2], half: usize) -> [i32; 2] {
    let [a, b] = [x[0].halves, x[1].halves];
    if half == 0 { [a.first(), b.first()] } else { [a.second(), b.second()] }
}

/// The dot products of 32 columns.
#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
pub(super) fn whole(w: &Eights, x: [&QuantisedBlock; 2]) -> IntFours {
    add_half(half(w, x, 0), w, x, 1)
}

/// The dot products of the first or the second half of 32 columns.
#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
pub(super) fn half(w: &Eights, x: [&QuantisedBlock; 2], half: usize) -> IntFours {
    add_half([vdupq_n_s32(0); 4], w, x, half)
}

#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
fn add_half(mut dots: IntFours, w: &Eights, x: [&QuantisedBlock; 2], half: usize) -> IntFours {
    let words = [load_words(&x[0].words.as_chunks::<4>().0[half]), load_words(&x[1].words.as_chunks::<4>().0[half])];
    let [a, b] = [vreinterpretq_s64_s8(words[0]), vreinterpretq_s64_s8(words[1])];
    let columns = [vreinterpretq_s8_s64(vzip1q_s64(a, b)), vreinterpretq_s8_s64(vzip2q_s64(a, b))];
    for e in 0..2 {
        for p in 0..4 {
            dots[p] = smmla(dots[p], w[2 * half + e][p], columns[e]);
        }
    }
    dots
}
