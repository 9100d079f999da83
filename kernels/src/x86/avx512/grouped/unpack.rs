//! From codes to positive bytes: four columns of sixteen rows per vector, eight vectors per block.

use super::super::{Pair, load16, load32x2};
use super::grids;
use crate::grouped::IQ4NL as LEVELS;
use crate::x86::avx2::grouped::grid_block;
use crate::x86::e2m1_table;
use crate::x86::grouped::{E2M1, GRID_BIAS, IQ4NL, STRIP, block_len};
use sluice_weights::{Codes, Grouped, ROW_GROUP};
use std::arch::x86_64::*;

/// The bytes of a block.
type Bytes = [__m512i; 8];

/// What a byte is above the integer that the code stands for.
pub(super) const fn bias(codes: Codes) -> i32 {
    match codes {
        Codes::E2m1 => 12,
        Codes::Iq4nl => 127,
        Codes::Uint(_) | Codes::E4m3 => 0,
        _ => GRID_BIAS,
    }
}

/// Unpacks a strip of two row groups, or what there is of it.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn strip(ty: Grouped, w: &Pair<'_>, strip: usize, out: &mut [Bytes; STRIP]) {
    match ty.codes() {
        Codes::Uint(2) => blocks::<2>(w, strip, out),
        Codes::Uint(3) => blocks::<3>(w, strip, out),
        Codes::Uint(4) => blocks::<4>(w, strip, out),
        Codes::Uint(5) => blocks::<5>(w, strip, out),
        Codes::Uint(6) => blocks::<6>(w, strip, out),
        Codes::Uint(_) => blocks::<8>(w, strip, out),
        Codes::E2m1 => blocks::<E2M1>(w, strip, out),
        Codes::Iq4nl => blocks::<IQ4NL>(w, strip, out),
        codes => grid_blocks(codes, w, strip, out),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn blocks<const C: u8>(w: &Pair<'_>, strip: usize, out: &mut [Bytes; STRIP]) {
    let len = const { block_len(C) };
    let [a, b] = [&w[0].values[strip * STRIP * len..], &w[1].values[strip * STRIP * len..]];
    for ((a, b), out) in a.chunks_exact(len).zip(b.chunks_exact(len)).zip(out) {
        *out = block::<C>(a, b);
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn grid_blocks(codes: Codes, w: &Pair<'_>, strip: usize, out: &mut [Bytes; STRIP]) {
    if grids::strip(codes, w, strip, out) {
        return;
    }
    let len = ROW_GROUP * codes.block_len();
    let [a, b] = [&w[0].values[strip * STRIP * len..], &w[1].values[strip * STRIP * len..]];
    for ((a, b), out) in a.chunks_exact(len).zip(b.chunks_exact(len)).zip(out) {
        let [a, b] = [grid_block(codes, a), grid_block(codes, b)];
        for q in 0..8 {
            out[q] = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a[q]), b[q]);
        }
    }
}

/// Unpacks one block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn block<const C: u8>(a: &[u8], b: &[u8]) -> Bytes {
    let [a, b] = [&a[..const { block_len(C) }], &b[..const { block_len(C) }]];
    let mut bytes = [_mm512_setzero_si512(); 8];
    if matches!(C, E2M1 | IQ4NL) {
        let table = _mm512_broadcast_i32x4(load16(&const { table(C) }, 0));
        for q in 0..8 {
            bytes[q] = _mm512_shuffle_epi8(table, field::<4, 0>(a, b, 0, q));
        }
        return bytes;
    }
    for q in 0..8 {
        bytes[q] = match C {
            2 => field::<2, 0>(a, b, 0, q),
            3 => _mm512_or_si512(field::<2, 0>(a, b, 0, q), field::<1, 2>(a, b, 64, q)),
            4 => field::<4, 0>(a, b, 0, q),
            5 => _mm512_or_si512(field::<4, 0>(a, b, 0, q), field::<1, 4>(a, b, 128, q)),
            6 => _mm512_or_si512(field::<4, 0>(a, b, 0, q), field::<2, 4>(a, b, 128, q)),
            _ => load32x2(a, b, 32 * q),
        };
    }
    bytes
}

const fn table(codes: u8) -> [u8; 16] {
    if codes == E2M1 {
        return e2m1_table(bias(Codes::E2m1) as i8);
    }
    let mut table = [0; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = (LEVELS[i] as i32 + bias(Codes::Iq4nl)) as u8;
        i += 1;
    }
    table
}

/// Vector `q` of a plane of `WIDTH` bits that begins at `at`, moved to bit `TO` of each byte.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn field<const WIDTH: usize, const TO: usize>(a: &[u8], b: &[u8], at: usize, q: usize) -> __m512i {
    let vector = load32x2(a, b, at + 32 * (q % WIDTH));
    let mask = const { (((1 << WIDTH) - 1) << TO) as i8 };
    _mm512_and_si512(shift_right(vector, (q / WIDTH * WIDTH) as i32 - TO as i32), _mm512_set1_epi8(mask))
}

/// Shifts of 16 bits, to the left if `by` is negative; a constant once loops are unrolled.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn shift_right(v: __m512i, by: i32) -> __m512i {
    match by {
        -4 => _mm512_slli_epi16::<4>(v),
        -3 => _mm512_slli_epi16::<3>(v),
        -2 => _mm512_slli_epi16::<2>(v),
        -1 => _mm512_slli_epi16::<1>(v),
        1 => _mm512_srli_epi16::<1>(v),
        2 => _mm512_srli_epi16::<2>(v),
        3 => _mm512_srli_epi16::<3>(v),
        4 => _mm512_srli_epi16::<4>(v),
        5 => _mm512_srli_epi16::<5>(v),
        6 => _mm512_srli_epi16::<6>(v),
        7 => _mm512_srli_epi16::<7>(v),
        _ => v,
    }
}
