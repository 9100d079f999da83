//! The terms of a strip, decoded: eight rows at a time.

use super::super::{block_scales, e4m3_to_f16, load16, load32, widen_bf16};
use crate::grouped::unit;
use crate::matrix::Group;
use crate::x86::grouped::{STRIP, Terms, has_halves};
use crate::x86::{MXFP4, bytes};
use sluice_weights::{Codes, GroupSize, Grouped, ROW_GROUP, SUPER_BLOCK, ScaleType, Scales, Super, Zero};
use std::arch::x86_64::*;
use std::ops::Range;

/// Where the terms of a strip go.
struct Places<'a> {
    terms: &'a mut Terms,
    /// Row group of the terms.
    group: usize,
    halves: bool,
}

impl Places<'_> {
    /// `A`, and bits of `B`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn biased(&mut self, block: usize, a: __m256, b: __m256) {
        self.terms.a[block][self.group] = a;
        self.terms.rest[block][self.group] = _mm256_castps_si256(b);
    }

    /// `A`, and what the sum of the activations is multiplied by, below 2^15.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn moved(&mut self, block: usize, a: __m256, by: __m256i) {
        self.terms.a[block][self.group] = a;
        self.terms.rest[block][self.group] = if self.halves && block % 2 == 1 {
            _mm256_slli_epi32::<16>(by)
        } else {
            _mm256_and_si256(by, _mm256_set1_epi32(0xffff))
        };
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn biased_all(&mut self, blocks: &Range<usize>, a: __m256, b: __m256) {
        for block in blocks.clone() {
            self.biased(block, a, b);
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn moved_all(&mut self, blocks: &Range<usize>, a: __m256, by: __m256i) {
        for block in blocks.clone() {
            self.moved(block, a, by);
        }
    }
}

/// Decodes the terms of a strip of a row group, the `group`-th of those in `terms`. Integers will have `bias` added.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::x86) fn fill(ty: Grouped, w: &Group<'_>, strip: usize, bias: i32, terms: &mut Terms, group: usize) {
    let mut places = Places { terms, group, halves: has_halves(ty) };
    match ty.scales() {
        // One group is all there is, and it stays.
        Scales::Groups { columns: GroupSize::Row, .. } if strip > 0 => {}
        Scales::Groups { columns, scale, zero } => {
            let plane = if ty.has_row_factor() { &w.scales[4 * ROW_GROUP..] } else { w.scales };
            let len = ROW_GROUP * group_len(scale, zero);
            let (first, blocks) = match columns {
                GroupSize::Columns(columns) => {
                    (SUPER_BLOCK / usize::from(columns) * strip, usize::from(columns) / ty.block())
                }
                GroupSize::Row => (0, SUPER_BLOCK / ty.block()),
            };
            let groups = plane[first * len..].chunks_exact(len).take(SUPER_BLOCK / ty.block() / blocks);
            fill_groups(ty, groups, blocks, bias, &mut places);
        }
        Scales::Super(scales @ (Super::InCodes | Super::Shift)) => {
            let records = &w.values[strip * STRIP * ROW_GROUP * ty.codes().block_len()..];
            let scales = &w.scales[strip * ROW_GROUP * scales.row_len()..];
            fill_from_records(ty, scales, records, bias, &mut places);
        }
        Scales::Super(scales) => {
            let len = ROW_GROUP * scales.row_len();
            let block = &w.scales[strip * len..][..len];
            match scales {
                Super::SixMin => fill_minima::<false>(block, &mut places),
                Super::FourMin => fill_minima::<true>(block, &mut places),
                _ => fill_super_block(ty, scales, block, bias, &mut places),
            }
        }
    }
}

/// Bytes of scale and zero of one group of one row.
fn group_len(scale: ScaleType, zero: Zero) -> usize {
    scale.len()
        + match zero {
            Zero::None => 0,
            Zero::Byte => 1,
            Zero::Bias | Zero::Float => scale.len(),
        }
}

/// Groups that hold for `blocks` blocks each.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fill_groups<'a>(
    ty: Grouped,
    groups: impl Iterator<Item = &'a [u8]>,
    blocks: usize,
    bias: i32,
    places: &mut Places<'_>,
) {
    let Scales::Groups { scale, zero, .. } = ty.scales() else { unreachable!("the caller has looked") };
    let unit = _mm256_set1_ps(unit(ty));
    let middle = _mm256_set1_epi32(-(ty.middle() + bias));
    for (i, group) in groups.enumerate() {
        let a = _mm256_mul_ps(numbers(group, scale), unit);
        let zeros = &group[ROW_GROUP * scale.len()..];
        match zero {
            Zero::None => places.moved_all(&(blocks * i..blocks * (i + 1)), a, middle),
            Zero::Byte => {
                let by = _mm256_sub_epi32(middle, eight_bytes(zeros, 0));
                places.moved_all(&(blocks * i..blocks * (i + 1)), a, by);
            }
            Zero::Bias => {
                let b = numbers(zeros, scale);
                places.biased_all(&(blocks * i..blocks * (i + 1)), a, b);
            }
            Zero::Float => {
                let b = minus(_mm256_mul_ps(a, numbers(zeros, scale)));
                places.biased_all(&(blocks * i..blocks * (i + 1)), a, b);
            }
        }
    }
}

/// `d·s` and `−dmin·m`: six bits per 32 columns in bytes of their own, or four per 16 in one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fill_minima<const FOUR: bool>(block: &[u8], places: &mut Places<'_>) {
    let (d, dmin) = (numbers(block, ScaleType::F16), numbers(&block[2 * ROW_GROUP..], ScaleType::F16));
    let units = &block[4 * ROW_GROUP..];
    for i in 0..2 * STRIP {
        let at = ROW_GROUP * i;
        let (i, s, m) = if FOUR {
            let byte = eight_bytes(units, at);
            (i, _mm256_and_si256(byte, _mm256_set1_epi32(15)), _mm256_srli_epi32::<4>(byte))
        } else if i % 2 == 0 {
            (i / 2, eight_bytes(units, at), eight_bytes(units, at + ROW_GROUP))
        } else {
            continue;
        };
        let a = _mm256_mul_ps(d, _mm256_cvtepi32_ps(s));
        places.biased(i, a, minus(_mm256_mul_ps(dmin, _mm256_cvtepi32_ps(m))));
    }
}

/// `d` times an integer.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fill_super_block(ty: Grouped, scales: Super, block: &[u8], bias: i32, places: &mut Places<'_>) {
    let d = numbers(block, ScaleType::F16);
    let units = &block[2 * ROW_GROUP..];
    let unit = _mm256_set1_ps(unit(ty));
    let middle = _mm256_set1_epi32(-(ty.middle() + bias));
    let (per_unit, bits) = match scales {
        Super::Odd | Super::Half => (2, 4),
        Super::ShiftBy16 => (2, 3),
        _ => (1, 8),
    };
    for i in 0..SUPER_BLOCK / ty.block() {
        let integer = if scales == Super::Plain {
            _mm256_set1_epi32(1)
        } else {
            let byte = eight_bytes(units, ROW_GROUP * (i / per_unit));
            match scales {
                Super::SixBy16 | Super::SixBy32 => _mm256_sub_epi32(byte, _mm256_set1_epi32(32)),
                Super::Signed => _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(byte)),
                _ => {
                    let moved = _mm256_srl_epi32(byte, _mm_cvtsi32_si128((i % per_unit * bits) as i32));
                    let s = _mm256_and_si256(moved, _mm256_set1_epi32((1 << bits) - 1));
                    _mm256_add_epi32(_mm256_add_epi32(s, s), _mm256_set1_epi32(1))
                }
            }
        };
        let a = _mm256_mul_ps(_mm256_mul_ps(d, _mm256_cvtepi32_ps(integer)), unit);
        places.moved(i, a, middle);
    }
}

/// `d` times odd integers that are in the records of grids: bits 12..15 of the last field of IQ1_S, else 28..32.
#[target_feature(enable = "avx2,fma,f16c")]
fn fill_from_records(ty: Grouped, scales: &[u8], records: &[u8], bias: i32, places: &mut Places<'_>) {
    let (d, unit) = (numbers(scales, ScaleType::F16), _mm256_set1_ps(unit(ty)));
    let len = ROW_GROUP * ty.codes().block_len();
    for (i, record) in records.chunks_exact(len).enumerate().take(STRIP) {
        let s = if ty.codes() == Codes::Iq1s {
            let words = _mm256_cvtepu16_epi32(load16(record, len - 2 * ROW_GROUP));
            _mm256_and_si256(_mm256_srli_epi32::<12>(words), _mm256_set1_epi32(7))
        } else {
            _mm256_srli_epi32::<28>(load32(record, len - 4 * ROW_GROUP))
        };
        let integer = _mm256_add_epi32(_mm256_add_epi32(s, s), _mm256_set1_epi32(1));
        let a = _mm256_mul_ps(_mm256_mul_ps(d, _mm256_cvtepi32_ps(integer)), unit);
        places.moved(i, a, _mm256_set1_epi32(-bias));
    }
}

/// Eight numbers of a scale type.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn numbers(from: &[u8], ty: ScaleType) -> __m256 {
    match ty {
        ScaleType::F16 => _mm256_cvtph_ps(load16(from, 0)),
        ScaleType::Bf16 => _mm256_castsi256_ps(widen_bf16(load16(from, 0))),
        ScaleType::F32 => _mm256_castsi256_ps(load32(from, 0)),
        ScaleType::E8m0 => block_scales::<MXFP4>(from, 0),
        ScaleType::E4m3 => {
            let codes = _mm_cvtsi64_si128(i64::from_le_bytes(*bytes(from, 0)));
            let over_256 = _mm256_cvtph_ps(_mm256_castsi256_si128(e4m3_to_f16(codes)));
            _mm256_mul_ps(over_256, _mm256_set1_ps(256.0))
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eight_bytes(from: &[u8], at: usize) -> __m256i {
    _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(*bytes(from, at))))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn minus(v: __m256) -> __m256 {
    _mm256_xor_ps(v, _mm256_set1_ps(-0.0))
}

/// The factors of the rows, or ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::x86) fn row_factors(ty: Grouped, w: &Group<'_>) -> __m256 {
    if ty.has_row_factor() { _mm256_castsi256_ps(load32(w.scales, 0)) } else { _mm256_set1_ps(1.0) }
}
