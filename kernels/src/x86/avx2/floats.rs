//! Several tokens of f32 times one row group of blocked integers: a block becomes floats once for all tokens of a tile, and each vector of
//! them meets three tokens. With fewer tokens that would cost more than it saves.

use super::codebook;
use super::{block_integers, block_scales, fold4, load, load16, put, store};
use crate::activations::Activations;
use crate::matmul::{Tile, TileShape};
use crate::matrix::{BLOCK, Group, ROW_GROUP};
use crate::quant::UNIT;
use crate::x86::ahead::near;
use crate::x86::{AVX2_TOKENS, block_bytes, by_halves, has_codebook, levels, offset_base, scales_from, unit};
use std::arch::x86_64::*;

/// Fewest tokens for which it pays.
pub(super) const LEAST: usize = 3;

/// Tokens that a vector of weights meets: their four sums each, a vector and a number fit the 16 registers.
const PASS: usize = 3;

/// The columns of a block.
type Floats = [[f32; ROW_GROUP]; BLOCK];

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn tile<const TY: u8>(w: &Group<'_>, x: &Activations, shape: TileShape, g: usize, out: &mut Tile) {
    let mut rows: [&[[f32; BLOCK]]; AVX2_TOKENS] = [&[]; AVX2_TOKENS];
    for (t, row) in rows[..shape.tokens].iter_mut().enumerate() {
        *row = x.padded_row(shape.token + t).as_chunks().0;
    }
    let (full, rest) = rows[..shape.tokens].as_chunks::<PASS>();
    let mut floats: Floats = [[0.0; ROW_GROUP]; BLOCK];
    let mut totals = [[_mm256_setzero_ps(); PASS]; AVX2_TOKENS.div_ceil(PASS)];
    near(w.scales);
    for (b, values) in w.values.chunks_exact(const { block_bytes(TY) }).enumerate() {
        near(values);
        let scales = unpack::<TY>(w, values, b, &mut floats);
        for (x, totals) in full.iter().zip(&mut totals) {
            add::<TY, PASS>(&floats, scales, &each!(&x[0][b]; PASS, t => &x[t][b]), totals);
        }
        match *rest {
            [x, y] => {
                let both = totals[full.len()].first_chunk_mut().expect(PASS_FITS);
                add::<TY, 2>(&floats, scales, &[&x[b], &y[b]], both);
            }
            [x] => {
                let one = totals[full.len()].first_chunk_mut().expect(PASS_FITS);
                add::<TY, 1>(&floats, scales, &[&x[b]], one);
            }
            _ => {}
        }
    }
    for (out, total) in out[..shape.tokens].iter_mut().zip(totals.as_flattened()) {
        let row =
            if const { has_codebook(TY) } { _mm256_mul_ps(*total, codebook::row_scales(w.scales)) } else { *total };
        put([row], std::slice::from_mut(out), g);
    }
}

const PASS_FITS: &str = "a pass is not shorter than what is left";

/// Makes floats of block `b`, without its scales, and returns these: of all columns, or of each half.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack<const TY: u8>(w: &Group<'_>, values: &[u8], b: usize, floats: &mut Floats) -> [__m256; 2] {
    if const { has_codebook(TY) } {
        return unpack_levels::<TY>(w, values, b, floats);
    }
    for q in 0..8 {
        put_columns(floats, q, apart(block_integers::<TY>(values, q)));
    }
    [block_scales::<TY>(w.scales, b); 2]
}

/// The same where bytes are looked up and an offset is added to them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack_levels<const TY: u8>(w: &Group<'_>, values: &[u8], b: usize, floats: &mut Floats) -> [__m256; 2] {
    let table = _mm256_broadcastsi128_si256(load16(&const { table(TY) }, 0));
    let nibbles = codebook::nibbles::<TY>(values);
    let mut scales = [_mm256_setzero_ps(); 2];
    for half in 0..2 {
        let block = if const { by_halves(TY) } { 2 * b + half } else { b };
        let codes = const { scales_from(TY) } + ROW_GROUP * block;
        let (scale, offset) = codebook::scale_and_offset::<TY>(w.scales, codes);
        let offset = _mm256_sub_epi32(offset, _mm256_set1_epi32(const { base(TY) }));
        scales[half] = scale;
        for v in 0..4 {
            // The offset is added in 32 bits, after the four columns have been taken apart.
            let columns = apart(codebook::level::<TY>(table, &nibbles, half, v));
            let columns = each!(offset; 4, i => _mm256_add_epi32(columns[i], offset));
            put_columns(floats, 4 * half + v, columns);
        }
    }
    scales
}

/// The levels of a type with a codebook. The others never need any, but the compiler asks.
const fn table(ty: u8) -> [u8; 16] {
    if has_codebook(ty) { levels(ty, 0) } else { [0; 16] }
}

/// The same for the number that is subtracted from offsets.
const fn base(ty: u8) -> i32 {
    if has_codebook(ty) { offset_base(ty) } else { 0 }
}

/// Four columns of signed bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn apart(v: __m256i) -> [__m256i; 4] {
    [
        _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(v)),
        _mm256_srai_epi32::<24>(_mm256_slli_epi32::<16>(v)),
        _mm256_srai_epi32::<24>(_mm256_slli_epi32::<8>(v)),
        _mm256_srai_epi32::<24>(v),
    ]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn put_columns(floats: &mut Floats, q: usize, columns: [__m256i; 4]) {
    for (to, column) in floats[4 * q..].iter_mut().zip(columns) {
        store(to, _mm256_cvtepi32_ps(column));
    }
}

/// Adds the products of a block with `T` tokens to their totals, in the order of the specification.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add<const TY: u8, const T: usize>(
    floats: &Floats,
    scales: [__m256; 2],
    x: &[&[f32; BLOCK]; T],
    totals: &mut [__m256; T],
) {
    let unit = _mm256_set1_ps(const { if has_codebook(TY) { UNIT } else { unit(TY) } });
    let halves = const { if by_halves(TY) { 2 } else { 1 } };
    for half in 0..halves {
        let mut s = [[_mm256_setzero_ps(); 4]; T];
        for q in (8 / halves) * half..(8 / halves) * (half + 1) {
            for i in 0..4 {
                let column = load(&floats[4 * q + i]);
                for t in 0..T {
                    s[t][i] = _mm256_fmadd_ps(column, _mm256_set1_ps(x[t][4 * q + i]), s[t][i]);
                }
            }
        }
        for t in 0..T {
            let sum = _mm256_mul_ps(fold4(s[t]), unit);
            totals[t] = _mm256_fmadd_ps(sum, scales[half], totals[t]);
        }
    }
}
