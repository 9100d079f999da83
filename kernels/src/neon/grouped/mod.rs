//! Codes of a few bits with scales per group of columns, in the order of the `grouped` module.
//!
//! The scales of 256 columns are decoded together, whatever their form; the products need to know only the codes, and the columns
//! that share a scale. A weight is `a·(integer + offset) + bias`, and integers are one byte each.

pub(super) mod i8mm;
mod integers;
mod scales;

use super::unblocked::e4m3_to_f16;
use super::{
    IntLanes, Lanes, add_columns, byte_columns, fold4, load, load_bytes, load_eight_bytes, load_words, put, widen_f16,
    zero,
};
use crate::activations::{Activations, QuantisedBlock};
use crate::matmul::{Tile, TileShape};
use crate::matrix::Group;
use crate::vector::{padded_rows, parts, quantised_rows};
use integers::integers;
use scales::BlockScales;
use sluice_weights::{Codes, Grouped};
use std::arch::aarch64::*;

// Codes as constant parameters, because enums cannot be constant parameters yet. Integers are named by their number of bits.
const E2M1: u8 = 16;
const E4M3: u8 = 17;
const IQ4NL: u8 = 18;
const IQ3S: u8 = 19;
const IQ3XXS: u8 = 20;
const IQ2S: u8 = 21;
const IQ2XS: u8 = 22;
const IQ2XXS: u8 = 23;
const IQ1S: u8 = 24;
const IQ1M: u8 = 25;

const fn codes(codes: u8) -> Codes {
    match codes {
        E2M1 => Codes::E2m1,
        E4M3 => Codes::E4m3,
        IQ4NL => Codes::Iq4nl,
        IQ3S => Codes::Iq3s,
        IQ3XXS => Codes::Iq3xxs,
        IQ2S => Codes::Iq2s,
        IQ2XS => Codes::Iq2xs,
        IQ2XXS => Codes::Iq2xxs,
        IQ1S => Codes::Iq1s,
        IQ1M => Codes::Iq1m,
        bits => Codes::Uint(bits),
    }
}

/// Bytes of 32 columns of a row group.
const fn block_bytes(of: u8) -> usize {
    8 * codes(of).block_len()
}

/// Whether integers have an offset.
const fn has_offset(of: u8) -> bool {
    of <= 8
}

/// Blocks of 32 columns whose scales are decoded together.
const TOGETHER: usize = 8;

#[target_feature(enable = "neon,dotprod")]
pub(super) fn tile(ty: Grouped, w: &Group<'_>, x: &Activations, shape: TileShape, g: usize, out: &mut Tile) {
    match ty.codes() {
        Codes::Uint(2) => of_codes::<2>(ty, w, x, shape, g, out),
        Codes::Uint(3) => of_codes::<3>(ty, w, x, shape, g, out),
        Codes::Uint(4) => of_codes::<4>(ty, w, x, shape, g, out),
        Codes::Uint(5) => of_codes::<5>(ty, w, x, shape, g, out),
        Codes::Uint(6) => of_codes::<6>(ty, w, x, shape, g, out),
        Codes::Uint(_) => of_codes::<8>(ty, w, x, shape, g, out),
        Codes::E2m1 => of_codes::<E2M1>(ty, w, x, shape, g, out),
        Codes::E4m3 => of_codes::<E4M3>(ty, w, x, shape, g, out),
        Codes::Iq4nl => of_codes::<IQ4NL>(ty, w, x, shape, g, out),
        Codes::Iq3s => of_codes::<IQ3S>(ty, w, x, shape, g, out),
        Codes::Iq3xxs => of_codes::<IQ3XXS>(ty, w, x, shape, g, out),
        Codes::Iq2s => of_codes::<IQ2S>(ty, w, x, shape, g, out),
        Codes::Iq2xs => of_codes::<IQ2XS>(ty, w, x, shape, g, out),
        Codes::Iq2xxs => of_codes::<IQ2XXS>(ty, w, x, shape, g, out),
        Codes::Iq1s => of_codes::<IQ1S>(ty, w, x, shape, g, out),
        Codes::Iq1m => of_codes::<IQ1M>(ty, w, x, shape, g, out),
    }
}

#[target_feature(enable = "neon,dotprod")]
fn of_codes<const C: u8>(ty: Grouped, w: &Group<'_>, x: &Activations, shape: TileShape, g: usize, out: &mut Tile) {
    // The cost of unpacking a block is shared by as many tokens as leave their sums in registers.
    let (mut t, first) = (0, shape.token);
    if shape.int8 {
        while shape.tokens - t >= 4 {
            put(int8::<C, 4>(ty, w, quantised_rows(x, first + t)), &mut out[t..], g);
            t += 4;
        }
        while t < shape.tokens {
            put(int8::<C, 1>(ty, w, quantised_rows(x, first + t)), &mut out[t..], g);
            t += 1;
        }
        return;
    }
    while shape.tokens - t >= 2 {
        put(exact::<C, 2>(ty, w, padded_rows(x, first + t)), &mut out[t..], g);
        t += 2;
    }
    if t < shape.tokens {
        put(exact::<C, 1>(ty, w, padded_rows(x, first + t)), &mut out[t..], g);
    }
}

/// Halves of 32 columns that belong to one of `parts` parts with separate scales.
#[inline(always)]
fn halves(parts: usize, part: usize) -> std::ops::Range<usize> {
    if parts == 2 { part..part + 1 } else { 0..2 }
}

/// Products with int8 activations.
#[target_feature(enable = "neon,dotprod")]
fn int8<const C: u8, const T: usize>(ty: Grouped, w: &Group<'_>, x: [&[QuantisedBlock]; T]) -> [Lanes; T] {
    let mut s = [[zero(); 2]; T];
    let (n, parts) = (w.values.len() / const { block_bytes(C) }, 32 / ty.block());
    let x: [&[QuantisedBlock]; T] = each!(x[0]; T, t => &x[t][..n]);
    let mut scales = BlockScales::new();
    for (g, values) in w.values.chunks_exact(const { block_bytes(C) }).enumerate() {
        if g % TOGETHER == 0 {
            scales.decode(ty, w, g * 32, (n - g).min(TOGETHER) * parts);
        }
        let integers = integers::<C>(values);
        let x: [&QuantisedBlock; T] = each!(&x[0][0]; T, t => &x[t][g]);
        let mut products = [zero(); T];
        for part in 0..parts {
            let mut dots = [[vdupq_n_s32(0); 2]; T];
            for half in halves(parts, part) {
                for t in 0..T {
                    let words = load_words(&x[t].words.as_chunks::<4>().0[half]);
                    for h in 0..2 {
                        dots[t][h] = sdots(dots[t][h], &integers, 4 * half, h, words);
                    }
                }
            }
            add::<C, T>(&mut products, dots, &scales, (g % TOGETHER, part, parts), &x);
        }
        for t in 0..T {
            for h in 0..2 {
                s[t][0][h] = vfmaq_n_f32(s[t][0][h], products[t][h], x[t].scale);
            }
            // Even and odd blocks alternate; at the end, the order of their sums does not matter.
            s[t].swap(0, 1);
        }
    }
    each!(zero(); T, t => {
        let sum = each!(zero()[0]; 2, h => vaddq_f32(s[t][0][h], s[t][1][h]));
        times_factors(ty, w, sum)
    })
}

/// Adds the products of half a block, whose first vector of integers is number `q`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdots(sums: int32x4_t, integers: &[[int8x16_t; 2]; 8], q: usize, h: usize, words: int8x16_t) -> int32x4_t {
    use super::int8::sdot;
    let sums = sdot::<0>(sums, integers[q][h], words);
    let sums = sdot::<1>(sums, integers[q + 1][h], words);
    let sums = sdot::<2>(sums, integers[q + 2][h], words);
    sdot::<3>(sums, integers[q + 3][h], words)
}

/// Adds a part, whose dot products of integers are `dots`, to the products of the same 32 columns.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add<const C: u8, const T: usize>(
    products: &mut [Lanes; T],
    dots: [IntLanes; T],
    scales: &BlockScales,
    (g, part, parts): (usize, usize, usize),
    x: &[&QuantisedBlock; T],
) {
    let (a, offset, bias) = scales.of(g * parts + part);
    for t in 0..T {
        let sum = match (parts, part) {
            (1, _) => x[t].sum,
            (_, 0) => x[t].halves.first(),
            _ => x[t].halves.second(),
        };
        for h in 0..2 {
            let dot = if const { has_offset(C) } { vmlaq_n_s32(dots[t][h], offset[h], sum) } else { dots[t][h] };
            let dot = vcvtq_f32_s32(dot);
            let product = if part == 0 { vmulq_f32(dot, a[h]) } else { vfmaq_f32(products[t][h], dot, a[h]) };
            products[t][h] = match bias {
                Some(bias) => vfmaq_n_f32(product, bias[h], sum as f32),
                None => product,
            };
        }
    }
}

/// Products with f32 activations.
#[target_feature(enable = "neon,dotprod")]
fn exact<const C: u8, const T: usize>(ty: Grouped, w: &Group<'_>, x: [&[f32]; T]) -> [Lanes; T] {
    let mut total = [zero(); T];
    let (n, parts_of) = (w.values.len() / const { block_bytes(C) }, 32 / ty.block());
    let mut scales = BlockScales::new();
    for (g, values) in w.values.chunks_exact(const { block_bytes(C) }).enumerate() {
        if g % TOGETHER == 0 {
            scales.decode(ty, w, g * 32, (n - g).min(TOGETHER) * parts_of);
        }
        let x = parts(&x, g * 32, 32);
        let integers = if C == E4M3 { [[vdupq_n_s8(0); 2]; 8] } else { integers::<C>(values) };
        for part in 0..parts_of {
            let (a, offset, bias) = scales.of(g % TOGETHER * parts_of + part);
            let mut s = [[zero(); 4]; T];
            let mut sums = [vdupq_n_f32(0.0); T];
            for half in halves(parts_of, part) {
                for q in 4 * half..4 * half + 4 {
                    let columns = columns::<C>(values, &integers, q, offset);
                    for t in 0..T {
                        let four = load(x[t][4 * q..].first_chunk().expect("rows are padded"));
                        add_columns(&mut s[t], &columns, four);
                        sums[t] = vaddq_f32(sums[t], four);
                    }
                }
            }
            for t in 0..T {
                let sum = fold4(&s[t]);
                for h in 0..2 {
                    total[t][h] = vfmaq_f32(total[t][h], sum[h], a[h]);
                    if let Some(bias) = bias {
                        let pairs = vpadd_f32(vget_low_f32(sums[t]), vget_high_f32(sums[t]));
                        total[t][h] = vfmaq_n_f32(total[t][h], bias[h], vpadds_f32(pairs));
                    }
                }
            }
        }
    }
    each!(zero(); T, t => times_factors(ty, w, total[t]))
}

/// Columns `4q..4q + 4` of a block as numbers, offset included.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn columns<const C: u8>(values: &[u8], integers: &[[int8x16_t; 2]; 8], q: usize, offset: IntLanes) -> [Lanes; 4] {
    if C == E4M3 {
        let mut columns = [zero(); 4];
        for i in 0..4 {
            let codes = load_eight_bytes(values, 32 * q + 8 * i);
            columns[i] = widen_f16(e4m3_to_f16(vreinterpret_s8_u8(codes)));
        }
        return columns;
    }
    byte_columns(integers[q], if const { has_offset(C) } { Some(offset) } else { None })
}

/// Multiplies by the factors of the rows, for types that have them.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn times_factors(ty: Grouped, w: &Group<'_>, rows: Lanes) -> Lanes {
    if !ty.has_row_factor() {
        return rows;
    }
    each!(rows[0]; 2, h => vmulq_f32(rows[h], vreinterpretq_f32_u8(load_bytes(w.scales, 16 * h))))
}
