//! From codes to integers: 32 columns of a row group as eight times two vectors, four columns of four rows each.

use super::super::{load_bytes, load_eight_bytes};
use super::{E2M1, IQ2S, IQ2XS, IQ2XXS, IQ3S, IQ3XXS, IQ4NL, codes};
use crate::grouped::{IQ4NL as LEVELS, grids};
use crate::vector::e2m1_table;
use std::arch::aarch64::*;

/// The integers of a block with codes of `C` bits: the codes as they are, less 128 if they have 8 bits.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn integers<const C: u8>(values: &[u8]) -> [[int8x16_t; 2]; 8] {
    match C {
        IQ3S | IQ3XXS => fours::<C>(values),
        ..=8 => bits::<C>(values),
        E2M1 | IQ4NL => {
            let table = if C == E2M1 { load_bytes(&const { e2m1_table(0) }, 0) } else { load_bytes(&LEVELS_BYTES, 0) };
            let nibbles = bits::<4>(values);
            each!([vdupq_n_s8(0); 2]; 8, q => each!(vdupq_n_s8(0); 2, h => {
                vreinterpretq_s8_u8(vqtbl1q_u8(table, vreinterpretq_u8_s8(nibbles[q][h])))
            }))
        }
        _ => eights::<C>(values),
    }
}

/// The levels as bytes.
const LEVELS_BYTES: [u8; 16] = {
    let (mut bytes, mut i) = ([0; 16], 0);
    while i < 16 {
        bytes[i] = LEVELS[i] as u8;
        i += 1;
    }
    bytes
};

/// Unsigned integers, assembled from planes of 4, 2 and 1 bits, or read from one of 8.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn bits<const C: u8>(values: &[u8]) -> [[int8x16_t; 2]; 8] {
    let mut integers = [[vdupq_n_s8(0); 2]; 8];
    for q in 0..8 {
        for h in 0..2 {
            if C == 8 {
                let code = load_bytes(values, 32 * q + 16 * h);
                integers[q][h] = vreinterpretq_s8_u8(veorq_u8(code, vdupq_n_u8(128)));
                continue;
            }
            let (mut code, mut shift, mut plane) = (vdupq_n_u8(0), 0, 0);
            for width in [4, 2, 1] {
                if C & width == 0 {
                    continue;
                }
                let vectors = usize::from(width);
                let byte = load_bytes(values, plane + q % vectors * 32 + 16 * h);
                // Negative shifts go right; all are constants once the loop is unrolled.
                let right = vshlq_u8(byte, vdupq_n_s8(-((q / vectors * vectors) as i8)));
                let part = vandq_u8(right, vdupq_n_u8((1 << width) - 1));
                code = vorrq_u8(code, vshlq_u8(part, vdupq_n_s8(shift)));
                shift += width as i8;
                plane += 32 * vectors;
            }
            integers[q][h] = vreinterpretq_s8_u8(code);
        }
    }
    integers
}

/// Points of four columns, with their signs.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn fours<const C: u8>(values: &[u8]) -> [[int8x16_t; 2]; 8] {
    let unpacked = grids::unpack(const { codes(C) }, values);
    let mut integers = [[vdupq_n_s8(0); 2]; 8];
    for q in 0..8 {
        let masks = sign_masks(&unpacked.signs[q / 2], q % 2);
        for h in 0..2 {
            let indices = &unpacked.indices[q][4 * h..4 * h + 4];
            let point = |r: usize| {
                let index = usize::from(indices[r]);
                // The remainder changes nothing, and saves the bounds check.
                if C == IQ3S { grids::IQ3S.words()[index % 512] } else { grids::IQ3XXS.words()[index % 256] }
            };
            let low = vcreate_u64(u64::from(point(0)) | u64::from(point(1)) << 32);
            let high = vcreate_u64(u64::from(point(2)) | u64::from(point(3)) << 32);
            integers[q][h] = negated(vreinterpretq_s8_u64(vcombine_u64(low, high)), masks[h]);
        }
    }
    integers
}

/// Points of eight columns, with their signs or the number that is added to them.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn eights<const C: u8>(values: &[u8]) -> [[int8x16_t; 2]; 8] {
    let unpacked = grids::unpack(const { codes(C) }, values);
    let mut integers = [[vdupq_n_s8(0); 2]; 8];
    for l in 0..4 {
        let mut vectors = [[vdupq_n_s8(0); 2]; 2];
        for h in 0..2 {
            let indices = &unpacked.indices[l][4 * h..4 * h + 4];
            let point = |r: usize| {
                let index = usize::from(indices[r]);
                vcreate_u64(match C {
                    IQ2S => grids::IQ2S.words()[index % 1024],
                    IQ2XS => grids::IQ2XS.words()[index % 512],
                    IQ2XXS => grids::IQ2XXS.words()[index % 256],
                    _ => grids::IQ1.words()[index % 2048],
                })
            };
            let first = vreinterpretq_u32_u64(vcombine_u64(point(0), point(1)));
            let second = vreinterpretq_u32_u64(vcombine_u64(point(2), point(3)));
            vectors[0][h] = vreinterpretq_s8_u32(vuzp1q_u32(first, second));
            vectors[1][h] = vreinterpretq_s8_u32(vuzp2q_u32(first, second));
        }
        for four in 0..2 {
            let masks = sign_masks(&unpacked.signs[l], four);
            for h in 0..2 {
                integers[2 * l + four][h] = if matches!(C, IQ2S | IQ2XS | IQ2XXS) {
                    negated(vectors[four][h], masks[h])
                } else {
                    let added = of_rows(&unpacked.signs[l]);
                    vaddq_s8(vectors[four][h], vreinterpretq_s8_u8(added[h]))
                };
            }
        }
    }
    integers
}

/// The byte of each row, four times.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn of_rows(rows: &[u8; 8]) -> [uint8x16_t; 2] {
    const PLACES: [u8; 32] = {
        let (mut places, mut i) = ([0; 32], 0);
        while i < 32 {
            places[i] = (i / 4) as u8;
            i += 1;
        }
        places
    };
    let rows = load_eight_bytes(rows, 0);
    let rows = vcombine_u8(rows, rows);
    each!(vdupq_n_u8(0); 2, h => vqtbl1q_u8(rows, load_bytes(&PLACES, 16 * h)))
}

/// All ones where one of the first four columns is negative, or of the second four.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sign_masks(signs: &[u8; 8], four: usize) -> [int8x16_t; 2] {
    let bits = vreinterpretq_u8_u32(vdupq_n_u32(if four == 0 { 0x0804_0201 } else { 0x8040_2010 }));
    let rows = of_rows(signs);
    each!(vdupq_n_s8(0); 2, h => vreinterpretq_s8_u8(vtstq_u8(rows[h], bits)))
}

/// Negates the numbers where the mask is set.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn negated(v: int8x16_t, mask: int8x16_t) -> int8x16_t {
    vsubq_s8(veorq_s8(v, mask), mask)
}
