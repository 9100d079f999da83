//! Several tokens of int8 with i8mm.

use super::super::i8mm::{
    Fours, Sums, Tokens, all_sums, eights, half, half_sums, token_floats, token_integers, twice, twice_integers, whole,
};
use super::super::put;
use super::integers::integers;
use super::scales::BlockScales;
use super::{E2M1, IQ1M, IQ1S, IQ2S, IQ2XS, IQ2XXS, IQ3S, IQ3XXS, IQ4NL};
use super::{TOGETHER, block_bytes, has_offset, times_factors};
use crate::activations::{Activations, QuantisedBlock};
use crate::matmul::{Tile, TileShape};
use crate::matrix::Group;
use sluice_weights::{Codes, Grouped};
use std::arch::aarch64::*;

#[target_feature(enable = "neon,dotprod,i8mm")]
pub(in crate::neon) fn tile(ty: Grouped, w: &Group<'_>, x: &Activations, shape: TileShape, g: usize, out: &mut Tile) {
    match ty.codes() {
        Codes::Uint(2) => of_codes::<2>(ty, w, x, shape, g, out),
        Codes::Uint(3) => of_codes::<3>(ty, w, x, shape, g, out),
        Codes::Uint(4) => of_codes::<4>(ty, w, x, shape, g, out),
        Codes::Uint(5) => of_codes::<5>(ty, w, x, shape, g, out),
        Codes::Uint(6) => of_codes::<6>(ty, w, x, shape, g, out),
        Codes::Uint(_) => of_codes::<8>(ty, w, x, shape, g, out),
        Codes::E2m1 => of_codes::<E2M1>(ty, w, x, shape, g, out),
        Codes::Iq4nl => of_codes::<IQ4NL>(ty, w, x, shape, g, out),
        Codes::Iq3s => of_codes::<IQ3S>(ty, w, x, shape, g, out),
        Codes::Iq3xxs => of_codes::<IQ3XXS>(ty, w, x, shape, g, out),
        Codes::Iq2s => of_codes::<IQ2S>(ty, w, x, shape, g, out),
        Codes::Iq2xs => of_codes::<IQ2XS>(ty, w, x, shape, g, out),
        Codes::Iq2xxs => of_codes::<IQ2XXS>(ty, w, x, shape, g, out),
        Codes::Iq1s => of_codes::<IQ1S>(ty, w, x, shape, g, out),
        Codes::Iq1m => of_codes::<IQ1M>(ty, w, x, shape, g, out),
        Codes::E4m3 => unreachable!("e4m3 has no integers"),
    }
}

/// What multiplies the integers of a part of a block, and what is added, for both tokens of a pair.
#[derive(Clone, Copy)]
struct Part {
    a: Fours,
    offset: [int32x4_t; 4],
    bias: Option<Fours>,
}

#[target_feature(enable = "neon,dotprod,i8mm")]
fn of_codes<const C: u8>(ty: Grouped, w: &Group<'_>, x: &Activations, shape: TileShape, g: usize, out: &mut Tile) {
    let (n, parts) = (w.values.len() / const { block_bytes(C) }, 32 / ty.block());
    let tokens = Tokens::new(x, shape, n);
    let mut sums = Sums::new();
    let mut scales = BlockScales::new();
    for (b, values) in (0..n).zip(w.values.chunks_exact(const { block_bytes(C) })) {
        if b % TOGETHER == 0 {
            scales.decode(ty, w, b * 32, (n - b).min(TOGETHER) * parts);
        }
        let eights = eights(&integers::<C>(values));
        let first = part(&scales, b % TOGETHER * parts);
        let second = if parts == 2 { part(&scales, b % TOGETHER * parts + 1) } else { first };
        for (i, pair) in tokens.pairs().iter().enumerate() {
            let x = [&pair[0][b], &pair[1][b]];
            let products = if parts == 2 {
                let low = products::<C>(half(&eights, x, 0), &first, half_sums(x, 0), None);
                products::<C>(half(&eights, x, 1), &second, half_sums(x, 1), Some(low))
            } else {
                products::<C>(whole(&eights, x), &first, all_sums(x), None)
            };
            let s = sums.of(b, i);
            let x_scale = scale_of(x);
            for p in 0..4 {
                s[p] = vfmaq_f32(s[p], products[p], x_scale);
            }
        }
    }
    for i in 0..tokens.pairs().len() {
        let rows = sums.total(i);
        let rows = each!(rows[0]; 2, t => times_factors(ty, w, rows[t]));
        put(rows, &mut out[2 * i..shape.tokens], g);
    }
}

#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
fn part(scales: &BlockScales, number: usize) -> Part {
    let (a, offset, bias) = scales.of(number);
    Part { a: twice(a), offset: twice_integers(offset), bias: bias.map(|bias| twice(bias)) }
}

#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
fn scale_of(x: [&QuantisedBlock; 2]) -> float32x4_t {
    token_floats([x[0].scale, x[1].scale])
}

/// Adds a part, whose dot products of integers are `dots`, to the products `before` of the same 32 columns. `sums` are those of
/// the activations.
#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
fn products<const C: u8>(dots: [int32x4_t; 4], part: &Part, sums: [i32; 2], before: Option<Fours>) -> Fours {
    let mut products = [vdupq_n_f32(0.0); 4];
    for p in 0..4 {
        let dot =
            if const { has_offset(C) } { vmlaq_s32(dots[p], part.offset[p], token_integers(sums)) } else { dots[p] };
        let dot = vcvtq_f32_s32(dot);
        products[p] = match before {
            Some(before) => vfmaq_f32(before[p], dot, part.a[p]),
            None => vmulq_f32(dot, part.a[p]),
        };
        if let Some(bias) = part.bias {
            products[p] = vfmaq_f32(products[p], bias[p], token_floats(sums.map(|sum| sum as f32)));
        }
    }
    products
}
