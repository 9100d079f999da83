//! AVX-512 with VNNI: two row groups, sixteen lanes, the second group in the upper half.
//!
//! Lanes are rows, as with AVX2, so each sum is formed in the same order. A group without a partner is left to the AVX2 kernels,
//! and so are blocked types with f32 activations.

mod attention;
mod chains;
mod codebook;
mod grouped;
mod panels;
mod update;

use super::ahead::{Ahead, Lines, Stream, near};
use super::avx2::Avx2;
use super::{BF16, F16, F32, FP8, INT4, MXFP4, Q2, Q3, Q4, Q8};
use super::{
    bias, block_bytes, blocks_of, bytes, cut, e2m1_table, four_columns, in_fours, parts, quantised_rows, rows,
};
use super::{unit, words};
use crate::activations::{Activations, QuantisedBlock};
use crate::attention::{KeyBlock, QueryTile};
use crate::chains::Rows;
use crate::matmul::{Tile, TileShape};
use crate::matrix::{FP8_BLOCK, Group, Matrix, ROW_GROUP, WeightType};
use crate::scalar::{DOT_LANES, f32_at, fold_lanes};
use crate::update::{Stripes, TALL, UpdateTile, WIDE};
use std::arch::x86_64::*;

/// Proof that this CPU has AVX-512 F, BW, DQ, VL and VNNI besides what [`Avx2`] proves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512 {
    avx2: Avx2,
}

impl Avx512 {
    pub(crate) fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        Avx2::new().filter(|_| has).map(|avx2| Avx512 { avx2 })
    }

    pub(crate) fn tile(self, w: &Matrix<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
        if shape.groups != 2 || (w.ty().is_blocked() && !shape.int8) {
            return self.avx2.tile(w, x, shape, out);
        }
        // SAFETY: the token proves the features that the function enables.
        unsafe { tile(w, x, shape, out) }
    }

    pub(crate) fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        // SAFETY: as above.
        unsafe { dot(a, b) }
    }

    pub(crate) fn axpy(self, a: f32, x: &[f32], y: &mut [f32]) {
        // SAFETY: as above.
        unsafe { axpy(a, x, y) }
    }

    /// Like [`Avx2::compiled`].
    #[inline(always)]
    pub(crate) fn compiled<R>(self, f: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
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

/// Two adjacent row groups.
type Pair<'a> = [Group<'a>; 2];

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tile(w: &Matrix<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
    let pair = [w.group(shape.group), w.group(shape.group + 1)];
    match w.ty() {
        WeightType::Q4 => codebook::tile::<Q4>(&pair, x, shape, out),
        WeightType::Q3 => codebook::tile::<Q3>(&pair, x, shape, out),
        WeightType::Q2 => codebook::tile::<Q2>(&pair, x, shape, out),
        WeightType::F32 => unblocked::<F32>(&pair, x, shape, out),
        WeightType::F16 => unblocked::<F16>(&pair, x, shape, out),
        WeightType::Bf16 => unblocked::<BF16>(&pair, x, shape, out),
        WeightType::Fp8 => unblocked::<FP8>(&pair, x, shape, out),
        WeightType::Q8 => blocked_int8::<Q8>(&pair, x, shape, out),
        WeightType::Int4 => blocked_int8::<INT4>(&pair, x, shape, out),
        WeightType::Mxfp4 => blocked_int8::<MXFP4>(&pair, x, shape, out),
        WeightType::Grouped(ty) => grouped::tile(ty, &pair, x, shape, out),
    }
}

// As many tokens per pass as leave the accumulators in the 32 registers.

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn unblocked<const TY: u8>(w: &Pair<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
    let mut t = 0;
    while shape.tokens - t >= 4 {
        put(unblocked_tokens::<TY, 4>(w, rows(x, shape.token + t)), &mut out[t..]);
        t += 4;
    }
    if shape.tokens - t >= 2 {
        put(unblocked_tokens::<TY, 2>(w, rows(x, shape.token + t)), &mut out[t..]);
        t += 2;
    }
    if t < shape.tokens {
        put(unblocked_tokens::<TY, 1>(w, rows(x, shape.token + t)), &mut out[t..]);
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn blocked_int8<const TY: u8>(w: &Pair<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
    let mut t = 0;
    if shape.tokens >= 8 {
        put(blocks_int8::<TY, 8>(w, quantised_rows(x, shape.token)), out);
        t = 8;
    }
    if shape.tokens - t >= 4 {
        put(blocks_int8::<TY, 4>(w, quantised_rows(x, shape.token + t)), &mut out[t..]);
        t += 4;
    }
    if shape.tokens - t >= 2 {
        put(blocks_int8::<TY, 2>(w, quantised_rows(x, shape.token + t)), &mut out[t..]);
        t += 2;
    }
    if t < shape.tokens {
        put(blocks_int8::<TY, 1>(w, quantised_rows(x, shape.token + t)), &mut out[t..]);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn put<const T: usize>(rows: [__m512; T], out: &mut [[f32; 2 * ROW_GROUP]]) {
    for (out, rows) in out.iter_mut().zip(rows) {
        store(out, rows);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn unblocked_tokens<const TY: u8, const T: usize>(w: &Pair<'_>, x: [&[f32]; T]) -> [__m512; T] {
    if TY != FP8 {
        return sums::<TY, T, true>(w[0].values, w[1].values, x, None);
    }
    let mut total = [_mm512_setzero_ps(); T];
    let block = FP8_BLOCK * ROW_GROUP;
    let mut ahead = Stream::whole(w);
    for (c, (a, b)) in w[0].values.chunks(block).zip(w[1].values.chunks(block)).enumerate() {
        let (first, len) = (c * FP8_BLOCK, a.len() / ROW_GROUP);
        let sum = e4m3_columns::<T>(a, b, parts(&x, first, len), ahead.lines(2 * a.len()));
        let scale_a = _mm512_set1_ps(256.0 * f32_at(w[0].scales, c));
        let scale = _mm512_mask_mov_ps(scale_a, 0xff00, _mm512_set1_ps(256.0 * f32_at(w[1].scales, c)));
        for t in 0..T {
            total[t] = _mm512_fmadd_ps(sum[t], scale, total[t]);
        }
    }
    total
}

/// Columns of `fp8`; `ahead` is asked for, a line for each four.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn e4m3_columns<const T: usize>(a: &[u8], b: &[u8], x: [&[f32]; T], ahead: Lines) -> [__m512; T] {
    if has_nan(a) || has_nan(b) {
        return sums::<FP8, T, true>(a, b, x, Some(ahead));
    }
    sums::<FP8, T, false>(a, b, x, Some(ahead))
}

/// Whether there is a NaN among e4m3 codes. One look at many codes is cheaper than one at each.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn has_nan(codes: &[u8]) -> bool {
    let magnitude = _mm512_set1_epi8(0x7f);
    let mut largest = _mm512_setzero_si512();
    let (lines, rest) = codes.as_chunks::<64>();
    for line in lines {
        largest = _mm512_max_epu8(largest, _mm512_and_si512(load64(line), magnitude));
    }
    _mm512_cmpeq_epi8_mask(largest, magnitude) != 0 || rest.iter().any(|code| code & 0x7f == 0x7f)
}

/// Columns of an unblocked type. Of `fp8`, `NAN` says whether there may be one, and the lines to ask for come along.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn sums<const TY: u8, const T: usize, const NAN: bool>(
    a: &[u8],
    b: &[u8],
    x: [&[f32]; T],
    ahead: Option<Lines>,
) -> [__m512; T] {
    let step = const { four_columns(TY) };
    let cols = x[0].len();
    let quads = in_fours(&x, cols);
    let mut s = [[_mm512_setzero_ps(); 4]; T];
    for (i, (a, b)) in a.chunks_exact(step).zip(b.chunks_exact(step)).take(cols / 4).enumerate() {
        match ahead {
            Some(ahead) => ahead.ask(i),
            None => {
                near(a);
                near(b);
            }
        }
        let w = four::<TY, NAN>(a, b);
        for t in 0..T {
            for j in 0..4 {
                s[t][j] = _mm512_fmadd_ps(w[j], _mm512_set1_ps(quads[t][i][j]), s[t][j]);
            }
        }
    }
    let rest = cols % 4;
    if rest > 0 {
        let (at, len) = (cols / 4 * step, rest * step / 4);
        let mut last = [[0u8; 128]; 2];
        last[0][..len].copy_from_slice(&a[at..at + len]);
        last[1][..len].copy_from_slice(&b[at..at + len]);
        let w = four::<TY, NAN>(&last[0][..step], &last[1][..step]);
        // Constant indices keep the sums in registers; columns that are not there must not be added, not even as zero.
        for j in 0..3 {
            if j < rest {
                for t in 0..T {
                    s[t][j] = _mm512_fmadd_ps(w[j], _mm512_set1_ps(x[t][cols - rest + j]), s[t][j]);
                }
            }
        }
    }
    each!(_mm512_setzero_ps(); T, t => _mm512_add_ps(_mm512_add_ps(s[t][0], s[t][1]), _mm512_add_ps(s[t][2], s[t][3])))
}

/// Four columns of both groups.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn four<const TY: u8, const NAN: bool>(a: &[u8], b: &[u8]) -> [__m512; 4] {
    match TY {
        F32 => each!(_mm512_setzero_ps(); 4, j => _mm512_castsi512_ps(load32x2(a, b, 32 * j))),
        F16 => each!(_mm512_setzero_ps(); 4, j => _mm512_cvtph_ps(load16x2(a, b, 16 * j))),
        BF16 => each!(_mm512_setzero_ps(); 4, j => _mm512_castsi512_ps(widen_bf16(load16x2(a, b, 16 * j)))),
        _ => {
            let (a, b) = (load32(a, 0), load32(b, 0));
            // Eight bytes of a, eight of b: columns 0 and 2, then 1 and 3.
            let even = e4m3_to_f16::<NAN>(_mm256_unpacklo_epi64(a, b));
            let odd = e4m3_to_f16::<NAN>(_mm256_unpackhi_epi64(a, b));
            [
                _mm512_cvtph_ps(_mm512_castsi512_si256(even)),
                _mm512_cvtph_ps(_mm512_castsi512_si256(odd)),
                _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(even)),
                _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(odd)),
            ]
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn widen_bf16(bits: __m256i) -> __m512i {
    _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))
}

/// The binary16 bits of 32 codes, each worth 1/256 of the code. Without `NAN`, none of them may be one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn e4m3_to_f16<const NAN: bool>(codes: __m256i) -> __m512i {
    // The sign is extended so that it lands in bit 15; the copy of it in bit 14 is masked out.
    let moved = _mm512_slli_epi16::<7>(_mm512_cvtepi8_epi16(codes));
    let bits = _mm512_and_si512(moved, _mm512_set1_epi16(0xbf80_u16 as i16));
    if !NAN {
        return bits;
    }
    let magnitude = _mm512_set1_epi16(0x3f80);
    let nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(bits, magnitude), magnitude);
    _mm512_mask_mov_epi16(bits, nan, _mm512_set1_epi16(0x7e00))
}

/// The scales of a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn block_scales<const TY: u8>(a: &[u8], b: &[u8]) -> __m512 {
    match TY {
        Q8 => _mm512_cvtph_ps(load16x2(a, b, 0)),
        INT4 => _mm512_castsi512_ps(widen_bf16(load16x2(a, b, 0))),
        _ => {
            let e8 = load8x2(a, b, 0);
            let e = _mm512_cvtepu8_epi32(e8);
            // Codes 0 and 255 are a subnormal and NaN: the exponent alone would say 0 and infinity.
            let odd = _mm_cmplt_epu8_mask(_mm_add_epi8(e8, _mm_set1_epi8(1)), _mm_set1_epi8(2));
            let bits = _mm512_slli_epi32::<23>(e);
            _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, odd, bits, _mm512_set1_epi32(0x0040_0000)))
        }
    }
}

/// Adds the products of columns `4q..4q + 4` of a block, whose integers are unsigned here.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn multiply<const T: usize>(dots: &mut [__m512i; T], unsigned: __m512i, words: &[&[i32; 8]; T], q: usize) {
    for t in 0..T {
        dots[t] = _mm512_dpbusd_epi32(dots[t], unsigned, _mm512_set1_epi32(words[t][q]));
    }
}

/// Adds a block, multiplied by its scales and those of block `g` of `x` times `unit`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn add<const T: usize>(
    dots: &[__m512i; T],
    scale: __m512,
    x: &[&[QuantisedBlock]; T],
    g: usize,
    unit: f32,
    s: &[__m512; T],
) -> [__m512; T] {
    let mut next = *s;
    for t in 0..T {
        let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x[t][g].scale * unit));
        next[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t]), scale, s[t]);
    }
    next
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn blocks_int8<const TY: u8, const T: usize>(w: &Pair<'_>, x: [&[QuantisedBlock]; T]) -> [__m512; T] {
    let blocks = w[0].values.len() / const { block_bytes(TY) };
    let x = cut(&x, blocks);
    // The sums of even and odd blocks alternate; at the end, their order does not matter.
    let mut s = [_mm512_setzero_ps(); T];
    let mut other = s;
    let ahead = Ahead::new::<2, T>(w);
    let pairs = blocks_of::<TY>(&w[0]).zip(blocks_of::<TY>(&w[1]));
    for (g, ((a, a_scales), (b, b_scales))) in (0..blocks).zip(pairs) {
        ahead.block::<TY, 2, T>(g);
        let words = words(&x, g);
        // Integers are made unsigned by their bias, which the sum of x removes again.
        let mut dots = each!(_mm512_setzero_si512(); T, t => _mm512_set1_epi32(const { -bias(TY) } * x[t][g].sum));
        for q in 0..8 {
            multiply(&mut dots, block_integers::<TY>(a, b, q), &words, q);
        }
        let next = add(&dots, block_scales::<TY>(a_scales, b_scales), &x, g, const { unit(TY) }, &s);
        (s, other) = (other, next);
    }
    each!(_mm512_setzero_ps(); T, t => _mm512_add_ps(s[t], other[t]))
}

/// Integers plus their bias, columns `4q..4q + 4` of a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn block_integers<const TY: u8>(a: &[u8], b: &[u8], q: usize) -> __m512i {
    if TY == Q8 {
        return _mm512_xor_si512(load32x2(a, b, 32 * q), _mm512_set1_epi8(-128));
    }
    let packed = load32x2(a, b, 32 * (q % 4));
    let shifted = if q < 4 { packed } else { _mm512_srli_epi16::<4>(packed) };
    let codes = _mm512_and_si512(shifted, _mm512_set1_epi8(15));
    if TY == INT4 {
        return codes;
    }
    _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load16(&const { e2m1_table(bias(MXFP4) as i8) }, 0)), codes)
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_vectors, a_rest) = a.as_chunks::<DOT_LANES>();
    let (b_vectors, b_rest) = b.as_chunks::<DOT_LANES>();
    let mut s = [_mm512_setzero_ps(); 2];
    for (a, b) in a_vectors.iter().zip(b_vectors) {
        let (a, b) = (a.as_chunks::<16>().0, b.as_chunks::<16>().0);
        for j in 0..2 {
            s[j] = _mm512_fmadd_ps(load(&a[j]), load(&b[j]), s[j]);
        }
    }
    let mut lanes = [0.0; DOT_LANES];
    for (lanes, s) in lanes.as_chunks_mut::<16>().0.iter_mut().zip(s) {
        store(lanes, s);
    }
    for (lane, (&a, &b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane = a.mul_add(b, *lane);
    }
    fold_lanes(lanes)
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    let (x_vectors, x_rest) = x.as_chunks::<16>();
    let (y_vectors, y_rest) = y.as_chunks_mut::<16>();
    let a16 = _mm512_set1_ps(a);
    for (y, x) in y_vectors.iter_mut().zip(x_vectors) {
        store(y, _mm512_fmadd_ps(a16, load(x), load(y)));
    }
    for (y, &x) in y_rest.iter_mut().zip(x_rest) {
        *y = a.mul_add(x, *y);
    }
}

#[inline]
#[target_feature(enable = "avx2,avx512f")]
fn load32x2(a: &[u8], b: &[u8], at: usize) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(load32(a, at)), load32(b, at))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load16x2(a: &[u8], b: &[u8], at: usize) -> __m256i {
    _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(load16(a, at)), load16(b, at))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load8x2(a: &[u8], b: &[u8], at: usize) -> __m128i {
    _mm_set_epi64x(i64::from_le_bytes(*bytes(b, at)), i64::from_le_bytes(*bytes(a, at)))
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
#[target_feature(enable = "avx512f")]
fn load64(from: &[u8; 64]) -> __m512i {
    // SAFETY: the reference covers the 64 bytes; the load has no alignment.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(from: &[f32; 16]) -> __m512 {
    // SAFETY: the reference covers the 16 numbers; the load has no alignment.
    unsafe { _mm512_loadu_ps(from.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [f32; 16], v: __m512) {
    // SAFETY: the reference covers the 16 numbers; the store has no alignment.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
}
