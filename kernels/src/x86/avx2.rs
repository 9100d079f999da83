//! AVX2 with FMA and F16C: one row group, eight lanes. With AVX-VNNI, one instruction multiplies integers and adds the products.
//! That is the only difference, so it is a constant (`V`) of the functions that multiply.
//!
//! Each function follows the operation of the same name in the `scalar` module; lanes are rows.

mod attention;
mod chains;
mod codebook;
mod floats;
pub(super) mod grouped;
mod many;
mod panels;
mod update;
mod vnni;

use super::ahead::{Ahead, Stream, Streams, near};
use super::{AVX2_TOKENS, unit, words};
use super::{BF16, F16, F32, FP8, INT4, MXFP4, Q2, Q3, Q4, Q8};
use super::{
    bias, block_bytes, blocks_of, bytes, cut, e2m1_table, four_columns, in_fours, padded_rows, parts, quantised_rows,
    rows,
};
use crate::activations::{Activations, QuantisedBlock};
use crate::attention::{KeyBlock, QueryTile};
use crate::chains::Rows;
use crate::matmul::{Tile, TileShape};
use crate::matrix::{FP8_BLOCK, Group, Matrix, ROW_GROUP, WeightType};
use crate::scalar::{DOT_LANES, f32_at, fold_lanes};
use crate::update::{Stripes, TALL, UpdateTile, WIDE};
use std::arch::x86_64::*;

/// Proof that this CPU has AVX2, FMA and F16C, and AVX-VNNI if that is to be used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2 {
    vnni: bool,
}

impl Avx2 {
    pub(crate) fn new() -> Option<Self> {
        let has =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        has.then_some(Avx2 { vnni: false })
    }

    /// With AVX-VNNI, which some processors have without AVX-512.
    pub(crate) fn with_vnni() -> Option<Self> {
        Self::new().filter(|_| is_x86_feature_detected!("avxvnni")).map(|_| Avx2 { vnni: true })
    }

    /// `avx2`, or with AVX-VNNI `avxvnni`.
    pub(crate) fn name(self) -> &'static str {
        if self.vnni { "avxvnni" } else { "avx2" }
    }

    pub(crate) fn tile(self, w: &Matrix<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
        // SAFETY: the token proves the features that the function enables, and AVX-VNNI where that is used.
        unsafe { if self.vnni { tile::<true>(w, x, shape, out) } else { tile::<false>(w, x, shape, out) } }
    }

    pub(crate) fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        // SAFETY: as above.
        unsafe { dot(a, b) }
    }

    pub(crate) fn axpy(self, a: f32, x: &[f32], y: &mut [f32]) {
        // SAFETY: as above.
        unsafe { axpy(a, x, y) }
    }

    /// Runs `f`, compiled with these instructions if it is inlined.
    #[inline(always)]
    pub(crate) fn compiled<R>(self, f: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        // SAFETY: as above.
        unsafe { compiled(f) }
    }

    pub(crate) fn row_products(self, rows: Rows<'_>, columns: &Stripes<WIDE>, out: (&mut [f32], usize), go_on: bool) {
        // SAFETY: as above.
        unsafe { chains::row_products(rows, columns, out, go_on) }
    }

    pub(crate) fn add_weighted_rows(self, weights: Rows<'_>, rows: Rows<'_>, alpha: &[f32], out: (&mut [f32], usize)) {
        // SAFETY: as above.
        unsafe { chains::add_weighted_rows(weights, rows, alpha, out) }
    }

    pub(crate) fn update_tile(self, a: &[[f32; TALL]], b: &[[f32; WIDE]], tile: &mut UpdateTile) {
        // SAFETY: as above.
        unsafe { update::update_tile(a, b, tile) }
    }

    pub(crate) fn score(self, tile: &mut QueryTile, block: &KeyBlock<'_>) {
        // SAFETY: as above.
        unsafe { attention::score(tile, block) }
    }

    pub(crate) fn attend_block(self, tile: &mut QueryTile, block: &KeyBlock<'_>) {
        if tile.is_in_panels() {
            // SAFETY: as above.
            return unsafe { panels::attend_block(tile, block) };
        }
        // SAFETY: as above.
        unsafe { attention::attend_block(tile, block) }
    }
}

/// What the processor says about itself.
pub(super) fn cpuid(leaf: u32, sub: u32) -> CpuidResult {
    #[allow(unused_unsafe, reason = "the function is safe in newer compilers than the oldest supported")]
    // SAFETY: every x86-64 processor has the instruction.
    unsafe {
        __cpuid_count(leaf, sub)
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn tile<const V: bool>(w: &Matrix<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
    if let WeightType::Grouped(ty) = w.ty() {
        return grouped::tile(ty, w, x, shape, out);
    }
    if shape.int8 && shape.tokens > 1 {
        return match w.ty() {
            WeightType::Q8 if V => many::<Q8, V, 8>(w, x, shape, out),
            WeightType::Q8 => many::<Q8, false, 16>(w, x, shape, out),
            WeightType::Int4 => many::<INT4, V, 8>(w, x, shape, out),
            WeightType::Mxfp4 => many::<MXFP4, V, 8>(w, x, shape, out),
            WeightType::Q4 => many::<Q4, V, 8>(w, x, shape, out),
            WeightType::Q3 => many::<Q3, V, 8>(w, x, shape, out),
            WeightType::Q2 => many::<Q2, V, 8>(w, x, shape, out),
            _ => unreachable!("unblocked types have no integers"),
        };
    }
    if !shape.int8 && shape.tokens >= floats::LEAST && w.ty().is_blocked() {
        return of_floats(w, x, shape, out);
    }
    for g in 0..shape.groups {
        let group = w.group(shape.group + g);
        match (w.ty(), shape.int8) {
            (WeightType::F32, _) => unblocked::<F32>(&group, x, shape, g, out),
            (WeightType::F16, _) => unblocked::<F16>(&group, x, shape, g, out),
            (WeightType::Bf16, _) => unblocked::<BF16>(&group, x, shape, g, out),
            (WeightType::Fp8, _) => unblocked::<FP8>(&group, x, shape, g, out),
            (WeightType::Q4, _) => codebook::tile::<Q4, V>(&group, x, shape, g, out),
            (WeightType::Q3, _) => codebook::tile::<Q3, V>(&group, x, shape, g, out),
            (WeightType::Q2, _) => codebook::tile::<Q2, V>(&group, x, shape, g, out),
            (WeightType::Q8, false) => blocked_f32::<Q8>(&group, x, shape, g, out),
            (WeightType::Int4, false) => blocked_f32::<INT4>(&group, x, shape, g, out),
            (WeightType::Mxfp4, false) => blocked_f32::<MXFP4>(&group, x, shape, g, out),
            (WeightType::Q8, true) => blocked_int8::<Q8, V>(&group, x, shape, g, out),
            (WeightType::Int4, true) => blocked_int8::<INT4, V>(&group, x, shape, g, out),
            (WeightType::Mxfp4, true) => blocked_int8::<MXFP4, V>(&group, x, shape, g, out),
            (WeightType::Grouped(_), _) => unreachable!("they have kernels of their own"),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn many<const TY: u8, const V: bool, const VECTORS: usize>(
    w: &Matrix<'_>,
    x: &Activations,
    shape: TileShape,
    out: &mut Tile,
) {
    let first = w.group(shape.group);
    match (shape.groups, shape.tokens <= many::SMALL_TILE) {
        (2, true) => many::tile::<TY, 2, V, 8, { many::SMALL_TILE }>(&[first, w.group(shape.group + 1)], x, shape, out),
        (2, false) => many::tile::<TY, 2, V, VECTORS, AVX2_TOKENS>(&[first, w.group(shape.group + 1)], x, shape, out),
        (_, true) => many::tile::<TY, 1, V, 8, { many::SMALL_TILE }>(&[first], x, shape, out),
        (_, false) => many::tile::<TY, 1, V, VECTORS, AVX2_TOKENS>(&[first], x, shape, out),
    }
}

/// Several tokens of f32, of a type whose integers have scales by the block.
#[target_feature(enable = "avx2,fma,f16c")]
fn of_floats(w: &Matrix<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
    for g in 0..shape.groups {
        let group = &w.group(shape.group + g);
        match w.ty() {
            WeightType::Q8 => floats::tile::<Q8>(group, x, shape, g, out),
            WeightType::Int4 => floats::tile::<INT4>(group, x, shape, g, out),
            WeightType::Mxfp4 => floats::tile::<MXFP4>(group, x, shape, g, out),
            WeightType::Q4 => floats::tile::<Q4>(group, x, shape, g, out),
            WeightType::Q3 => floats::tile::<Q3>(group, x, shape, g, out),
            WeightType::Q2 => floats::tile::<Q2>(group, x, shape, g, out),
            _ => unreachable!("others have no such blocks"),
        }
    }
}

// As many tokens per pass as leave the accumulators in the 16 registers.

#[target_feature(enable = "avx2,fma,f16c")]
fn unblocked<const TY: u8>(w: &Group<'_>, x: &Activations, shape: TileShape, g: usize, out: &mut Tile) {
    let mut t = 0;
    while shape.tokens - t >= 2 {
        put(unblocked_tokens::<TY, 2>(w, rows(x, shape.token + t)), &mut out[t..], g);
        t += 2;
    }
    if t < shape.tokens {
        put(unblocked_tokens::<TY, 1>(w, rows(x, shape.token + t)), &mut out[t..], g);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn blocked_f32<const TY: u8>(w: &Group<'_>, x: &Activations, shape: TileShape, g: usize, out: &mut Tile) {
    let mut t = 0;
    while shape.tokens - t >= 2 {
        put(blocks_f32::<TY, 2>(w, padded_rows(x, shape.token + t)), &mut out[t..], g);
        t += 2;
    }
    if t < shape.tokens {
        put(blocks_f32::<TY, 1>(w, padded_rows(x, shape.token + t)), &mut out[t..], g);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn blocked_int8<const TY: u8, const V: bool>(
    w: &Group<'_>,
    x: &Activations,
    shape: TileShape,
    g: usize,
    out: &mut Tile,
) {
    put(blocks_int8::<TY, 1, V>(w, quantised_rows(x, shape.token)), out, g);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn put<const T: usize>(rows: [__m256; T], out: &mut [[f32; 2 * ROW_GROUP]], g: usize) {
    for (out, rows) in out.iter_mut().zip(rows) {
        store(out[g * ROW_GROUP..].first_chunk_mut().expect("two groups per tile"), rows);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unblocked_tokens<const TY: u8, const T: usize>(w: &Group<'_>, x: [&[f32]; T]) -> [__m256; T] {
    if TY != FP8 {
        return columns::<TY, T>(w.values, x);
    }
    let mut total = [_mm256_setzero_ps(); T];
    let mut ahead = Stream::whole(&[*w]);
    for (c, values) in w.values.chunks(FP8_BLOCK * ROW_GROUP).enumerate() {
        ahead.bytes(values.len());
        let (first, len) = (c * FP8_BLOCK, values.len() / ROW_GROUP);
        let sum = columns::<TY, T>(values, parts(&x, first, len));
        let scale = _mm256_set1_ps(256.0 * f32_at(w.scales, c));
        for t in 0..T {
            total[t] = _mm256_fmadd_ps(sum[t], scale, total[t]);
        }
    }
    total
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn columns<const TY: u8, const T: usize>(values: &[u8], x: [&[f32]; T]) -> [__m256; T] {
    if TY == FP8 && !has_nan(values) { sums::<TY, T, false>(values, x) } else { sums::<TY, T, true>(values, x) }
}

/// Whether there is a NaN among e4m3 codes. One look at many codes is cheaper than one at each.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn has_nan(codes: &[u8]) -> bool {
    let magnitude = _mm256_set1_epi8(0x7f);
    let mut largest = _mm256_setzero_si256();
    let (lines, rest) = codes.as_chunks::<64>();
    for line in lines {
        for half in 0..2 {
            largest = _mm256_max_epu8(largest, _mm256_and_si256(load32(line, 32 * half), magnitude));
        }
    }
    _mm256_movemask_epi8(_mm256_cmpeq_epi8(largest, magnitude)) != 0 || rest.iter().any(|code| code & 0x7f == 0x7f)
}

/// [`columns`]; of `fp8`, `NAN` says whether there may be one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sums<const TY: u8, const T: usize, const NAN: bool>(values: &[u8], x: [&[f32]; T]) -> [__m256; T] {
    let step = const { four_columns(TY) };
    let cols = x[0].len();
    let quads = in_fours(&x, cols);
    let mut s = [[_mm256_setzero_ps(); 4]; T];
    let streams = Streams::new();
    for (i, w) in values.chunks_exact(step).take(cols / 4).enumerate() {
        if const { TY != FP8 } {
            streams.ask(w);
        }
        let w = four::<TY, NAN>(w);
        for t in 0..T {
            for j in 0..4 {
                s[t][j] = _mm256_fmadd_ps(w[j], _mm256_set1_ps(quads[t][i][j]), s[t][j]);
            }
        }
    }
    let rest = cols % 4;
    if rest > 0 {
        let mut last = [0u8; 128];
        last[..rest * step / 4].copy_from_slice(&values[cols / 4 * step..][..rest * step / 4]);
        let w = four::<TY, NAN>(&last[..step]);
        // Constant indices keep the sums in registers; columns that are not there must not be added, not even as zero.
        for j in 0..3 {
            if j < rest {
                for t in 0..T {
                    s[t][j] = _mm256_fmadd_ps(w[j], _mm256_set1_ps(x[t][cols - rest + j]), s[t][j]);
                }
            }
        }
    }
    each!(_mm256_setzero_ps(); T, t => fold4(s[t]))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fold4(s: [__m256; 4]) -> __m256 {
    _mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3]))
}

/// Four columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn four<const TY: u8, const NAN: bool>(w: &[u8]) -> [__m256; 4] {
    match TY {
        F32 => each!(_mm256_setzero_ps(); 4, j => _mm256_castsi256_ps(load32(w, 32 * j))),
        F16 => each!(_mm256_setzero_ps(); 4, j => _mm256_cvtph_ps(load16(w, 16 * j))),
        BF16 => each!(_mm256_setzero_ps(); 4, j => _mm256_castsi256_ps(widen_bf16(load16(w, 16 * j)))),
        _ => {
            let (low, high) = (e4m3_to_f16::<NAN>(load16(w, 0)), e4m3_to_f16::<NAN>(load16(w, 16)));
            [
                _mm256_cvtph_ps(_mm256_castsi256_si128(low)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(low)),
                _mm256_cvtph_ps(_mm256_castsi256_si128(high)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(high)),
            ]
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen_bf16(bits: __m128i) -> __m256i {
    _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits))
}

/// The binary16 bits of 16 codes, each worth 1/256 of the code. Without `NAN`, none of them may be one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn e4m3_to_f16<const NAN: bool>(codes: __m128i) -> __m256i {
    // The sign is extended so that it lands in bit 15; the copy of it in bit 14 is masked out.
    let moved = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(codes));
    let bits = _mm256_and_si256(moved, _mm256_set1_epi16(0xbf80_u16 as i16));
    if !NAN {
        return bits;
    }
    let magnitude = _mm256_set1_epi16(0x3f80);
    // All ones is a NaN of binary16 too.
    let nan = _mm256_cmpeq_epi16(_mm256_and_si256(bits, magnitude), magnitude);
    _mm256_or_si256(bits, nan)
}

/// The scales of block `g`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn block_scales<const TY: u8>(scales: &[u8], g: usize) -> __m256 {
    match TY {
        Q8 => _mm256_cvtph_ps(load16(scales, g * 16)),
        INT4 => _mm256_castsi256_ps(widen_bf16(load16(scales, g * 16))),
        _ => {
            let e = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(*bytes(scales, g * 8))));
            // Codes 0 and 255 are a subnormal and NaN: the exponent alone would say 0 and infinity.
            let odd = _mm256_or_si256(
                _mm256_cmpeq_epi32(e, _mm256_setzero_si256()),
                _mm256_cmpeq_epi32(e, _mm256_set1_epi32(255)),
            );
            let fraction = _mm256_and_si256(odd, _mm256_set1_epi32(0x0040_0000));
            _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32::<23>(e), fraction))
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles(w: __m256i) -> (__m256i, __m256i) {
    let mask = _mm256_set1_epi8(15);
    (_mm256_and_si256(w, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(w), mask))
}

/// Signed integers of columns `4q..4q + 4` of a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn block_integers<const TY: u8>(w: &[u8], q: usize) -> __m256i {
    if TY == Q8 {
        return load32(w, 32 * q);
    }
    let (low, high) = nibbles(load32(w, 32 * (q % 4)));
    let codes = if q < 4 { low } else { high };
    if TY == INT4 {
        return _mm256_sub_epi8(codes, _mm256_set1_epi8(8));
    }
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load16(&const { e2m1_table(0) }, 0)), codes)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn blocks_f32<const TY: u8, const T: usize>(w: &Group<'_>, x: [&[f32]; T]) -> [__m256; T] {
    let mut total = [_mm256_setzero_ps(); T];
    near(w.scales);
    for (g, values) in w.values.chunks_exact(const { block_bytes(TY) }).enumerate() {
        near(values);
        let x = parts(&x, g * 32, 32);
        let mut s = [[_mm256_setzero_ps(); 4]; T];
        for q in 0..8 {
            let v = block_integers::<TY>(values, q);
            let w = [
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(v))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<16>(v))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<8>(v))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(v)),
            ];
            for t in 0..T {
                for i in 0..4 {
                    s[t][i] = _mm256_fmadd_ps(w[i], _mm256_set1_ps(x[t][4 * q + i]), s[t][i]);
                }
            }
        }
        let scale = block_scales::<TY>(w.scales, g);
        for t in 0..T {
            let sum = _mm256_mul_ps(fold4(s[t]), _mm256_set1_ps(const { unit(TY) }));
            total[t] = _mm256_fmadd_ps(sum, scale, total[t]);
        }
    }
    total
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn blocks_int8<const TY: u8, const T: usize, const V: bool>(w: &Group<'_>, x: [&[QuantisedBlock]; T]) -> [__m256; T] {
    // The sums of even and odd blocks alternate; at the end, their order does not matter.
    let mut s = [_mm256_setzero_ps(); T];
    let mut other = s;
    let blocks = w.values.len() / const { block_bytes(TY) };
    let x = cut(&x, blocks);
    let streams = Streams::new();
    let ahead = if TY == Q8 {
        streams.ask(w.scales);
        None
    } else {
        Some(Ahead::new::<1, T>(&[*w]))
    };
    for (g, (values, scales)) in (0..blocks).zip(blocks_of::<TY>(w)) {
        match &ahead {
            Some(ahead) => ahead.block::<TY, 1, T>(g),
            None => streams.ask(values),
        }
        let dots = match (V, TY) {
            (true, _) => vnni::dots::<TY, T>(values, &x, g),
            (false, Q8) => dots_q8(values, &x, g),
            (false, _) => dots_nibbles::<TY, T>(values, &x, g),
        };
        let scale = block_scales::<TY>(scales, 0);
        for t in 0..T {
            let scale = _mm256_mul_ps(scale, _mm256_set1_ps(x[t][g].scale * const { unit(TY) }));
            let next = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t]), scale, s[t]);
            (s[t], other[t]) = (other[t], next);
        }
    }
    each!(_mm256_setzero_ps(); T, t => _mm256_add_ps(s[t], other[t]))
}

/// `|w| · (x with the sign of w)`: `vpmaddubsw` takes one unsigned operand. Its pair sums stay within
/// 2·128·127 = 32512, so nothing saturates.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dots_q8<const T: usize>(values: &[u8], x: &[&[QuantisedBlock]; T], g: usize) -> [__m256i; T] {
    let words = words(x, g);
    let ones = _mm256_set1_epi16(1);
    let mut dots = [_mm256_setzero_si256(); T];
    for q in 0..8 {
        let w = load32(values, 32 * q);
        let magnitude = _mm256_abs_epi8(w);
        for t in 0..T {
            let x = _mm256_sign_epi8(_mm256_set1_epi32(words[t][q]), w);
            let pairs = _mm256_maddubs_epi16(magnitude, x);
            dots[t] = _mm256_add_epi32(dots[t], _mm256_madd_epi16(pairs, ones));
        }
    }
    dots
}

/// Integers made unsigned by their bias, which is taken out again through the sum of `x`. In 16 bits, int4 may add eight pair sums
/// of at most 2·15·127, mxfp4 four of at most 2·24·127: both below 2^15.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dots_nibbles<const TY: u8, const T: usize>(values: &[u8], x: &[&[QuantisedBlock]; T], g: usize) -> [__m256i; T] {
    let words = words(x, g);
    let ones = _mm256_set1_epi16(1);
    let table = _mm256_broadcastsi128_si256(load16(&const { e2m1_table(bias(MXFP4) as i8) }, 0));
    let mut lows = [_mm256_setzero_si256(); T];
    let mut highs = [_mm256_setzero_si256(); T];
    for q in 0..4 {
        let (mut low, mut high) = nibbles(load32(values, 32 * q));
        if TY == MXFP4 {
            (low, high) = (_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high));
        }
        for t in 0..T {
            let pairs_low = _mm256_maddubs_epi16(low, _mm256_set1_epi32(words[t][q]));
            let pairs_high = _mm256_maddubs_epi16(high, _mm256_set1_epi32(words[t][q + 4]));
            lows[t] = _mm256_add_epi16(lows[t], pairs_low);
            highs[t] = _mm256_add_epi16(highs[t], pairs_high);
        }
    }
    let mut dots = [_mm256_setzero_si256(); T];
    for t in 0..T {
        let dot = if TY == INT4 {
            _mm256_madd_epi16(_mm256_add_epi16(lows[t], highs[t]), ones)
        } else {
            _mm256_add_epi32(_mm256_madd_epi16(lows[t], ones), _mm256_madd_epi16(highs[t], ones))
        };
        dots[t] = _mm256_sub_epi32(dot, _mm256_set1_epi32(const { bias(TY) } * x[t][g].sum));
    }
    dots
}

#[target_feature(enable = "avx2,fma,f16c")]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_vectors, a_rest) = a.as_chunks::<DOT_LANES>();
    let (b_vectors, b_rest) = b.as_chunks::<DOT_LANES>();
    let mut s = [_mm256_setzero_ps(); 4];
    for (a, b) in a_vectors.iter().zip(b_vectors) {
        let (a, b) = (a.as_chunks::<8>().0, b.as_chunks::<8>().0);
        for j in 0..4 {
            s[j] = _mm256_fmadd_ps(load(&a[j]), load(&b[j]), s[j]);
        }
    }
    let mut lanes = [0.0; DOT_LANES];
    for (lanes, s) in lanes.as_chunks_mut::<8>().0.iter_mut().zip(s) {
        store(lanes, s);
    }
    for (lane, (&a, &b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane = a.mul_add(b, *lane);
    }
    fold_lanes(lanes)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    let (x_vectors, x_rest) = x.as_chunks::<8>();
    let (y_vectors, y_rest) = y.as_chunks_mut::<8>();
    let a8 = _mm256_set1_ps(a);
    for (y, x) in y_vectors.iter_mut().zip(x_vectors) {
        store(y, _mm256_fmadd_ps(a8, load(x), load(y)));
    }
    for (y, &x) in y_rest.iter_mut().zip(x_rest) {
        *y = a.mul_add(x, *y);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load32(from: &[u8], at: usize) -> __m256i {
    // SAFETY: the reference covers the 32 bytes; the load has no alignment.
    unsafe { _mm256_loadu_si256(bytes::<32>(from, at).as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load16(from: &[u8], at: usize) -> __m128i {
    // SAFETY: the reference covers the 16 bytes; the load has no alignment.
    unsafe { _mm_loadu_si128(bytes::<16>(from, at).as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(from: &[f32; 8]) -> __m256 {
    // SAFETY: the reference covers the 8 numbers; the load has no alignment.
    unsafe { _mm256_loadu_ps(from.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(to: &mut [f32; 8], v: __m256) {
    // SAFETY: the reference covers the 8 numbers; the store has no alignment.
    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), v) }
}
