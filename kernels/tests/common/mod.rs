//! Random matrices and inputs for the tests of this crate.
#![allow(dead_code, reason = "each test program uses a part")]

use sluice_kernels::*;
use sluice_weights::{Codes, Grouped, SUPER_BLOCK, ScaleType, Scales, Super, Zero};

/// SplitMix64.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Uniform in −1..1.
    pub(crate) fn f32(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.f32()).collect()
    }

    pub(crate) fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.bits() as u8).collect()
    }
}

/// A packed matrix of plausible numbers.
pub(crate) fn matrix(ty: WeightType, rows: usize, cols: usize, rng: &mut Rng) -> Vec<u8> {
    let len = row_group_len(ty, cols).unwrap();
    let mut out = vec![0xaa; packed_len(ty, rows, cols).unwrap()];
    let blocks = cols.div_ceil(BLOCK);
    for (i, group) in out.chunks_exact_mut(len).enumerate() {
        let n = (rows - i * ROW_GROUP).min(ROW_GROUP);
        match ty {
            WeightType::Fp8 => {
                let scales: Vec<f32> = (0..cols.div_ceil(FP8_BLOCK)).map(|_| rng.f32() * 0.01).collect();
                let codes: Vec<u8> =
                    rng.bytes(n * cols).iter().map(|&b| if b & 0x7f == 0x7f { 0 } else { b }).collect();
                pack_row_group_fp8(&codes, n, cols, &scales, group);
            }
            WeightType::Int4 => {
                let scales: Vec<u16> = (0..n * blocks).map(|_| f32_to_bf16(rng.f32() * 0.1)).collect();
                let nibbles: Vec<u8> = rng.bytes(n * cols).iter().map(|b| b & 15).collect();
                pack_row_group_int4(&nibbles, n, cols, &scales, group);
            }
            WeightType::Mxfp4 => {
                let scales: Vec<u8> = (0..n * blocks).map(|_| 115 + rng.below(16) as u8).collect();
                let codes: Vec<u8> = rng.bytes(n * cols).iter().map(|b| b & 15).collect();
                pack_row_group_mxfp4(&codes, n, cols, &scales, group);
            }
            WeightType::Grouped(ty) => {
                let rows = Rows::new(ty, n, cols, rng);
                pack_row_group_grouped(ty, &rows.codes, n, cols, &rows.scales, &rows.factors, group);
            }
            _ => pack_row_group(ty, &rng.vec(n * cols), n, cols, group),
        }
    }
    out
}

/// At least `cols` columns, as many as rows of the type can have.
pub(crate) fn cols_of(ty: WeightType, cols: usize) -> usize {
    if row_group_len(ty, cols).is_some() { cols } else { cols.next_multiple_of(SUPER_BLOCK) }
}

/// Rows of a grouped type in the form of a source, as `pack_row_group_grouped` takes them.
pub(crate) struct Rows {
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Vec<u8>,
    pub(crate) factors: Vec<f32>,
}

impl Rows {
    /// Random codes, and scales of plausible size.
    pub(crate) fn new(ty: Grouped, n: usize, cols: usize, rng: &mut Rng) -> Self {
        let codes = match ty.codes() {
            Codes::Uint(bits) => rng.bytes(n * cols).iter().map(|b| b >> (8 - bits)).collect(),
            Codes::E2m1 | Codes::Iq4nl => rng.bytes(n * cols).iter().map(|b| b >> 4).collect(),
            Codes::E4m3 => rng.bytes(n * cols).iter().map(|&b| if b & 0x7f == 0x7f { 0 } else { b }).collect(),
            grid => rng.bytes(n * grid.block_len() * cols.div_ceil(BLOCK)),
        };
        let len = n * ty.scale_row(cols).unwrap();
        let mut scales = Vec::with_capacity(len);
        while scales.len() < len {
            put_scales(ty, rng, &mut scales);
        }
        let factors = if ty.has_row_factor() { rng.vec(n) } else { Vec::new() };
        Rows { codes, scales, factors }
    }
}

/// The scales of one group or super-block of one row.
fn put_scales(ty: Grouped, rng: &mut Rng, out: &mut Vec<u8>) {
    match ty.scales() {
        Scales::Groups { scale, zero, .. } => {
            put_scale(scale, rng, out);
            match zero {
                Zero::None => {}
                // Zeros near the middle of the range of the codes.
                Zero::Byte => {
                    out.push(if let Codes::Uint(bits) = ty.codes() { rng.bits() as u8 >> (8 - bits) } else { 0 })
                }
                Zero::Bias | Zero::Float => put_scale(scale, rng, out),
            }
        }
        Scales::Super(scales) => {
            for _ in 0..1 + usize::from(scales.has_min()) {
                out.extend(f32_to_f16(rng.f32() * 0.01).to_le_bytes());
            }
            let six = matches!(scales, Super::SixMin | Super::SixBy16 | Super::SixBy32);
            let len = scales.row_len() - 2 - 2 * usize::from(scales.has_min());
            out.extend(rng.bytes(len).iter().map(|b| if six { b >> 2 } else { *b }));
        }
    }
}

fn put_scale(ty: ScaleType, rng: &mut Rng, out: &mut Vec<u8>) {
    let value = rng.f32() * 0.1;
    match ty {
        ScaleType::F16 => out.extend(f32_to_f16(value).to_le_bytes()),
        ScaleType::Bf16 => out.extend(f32_to_bf16(value).to_le_bytes()),
        ScaleType::F32 => out.extend(value.to_le_bytes()),
        ScaleType::E4m3 => out.push(rng.below(0x60) as u8),
        ScaleType::E8m0 => out.push(115 + rng.below(16) as u8),
    }
}

pub(crate) fn activations(x: &[f32], n: usize, cols: usize, precision: Precision) -> Activations {
    let mut a = Activations::new(precision);
    a.set(x, n, cols);
    a
}

pub(crate) fn matmul(k: Kernels, pool: &ThreadPool, w: Matrix<'_>, x: &Activations) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.n() * w.rows()];
    k.matmul(pool, w, x, &mut y);
    y
}

/// Asserts equal bits; all NaNs count as equal.
#[track_caller]
pub(crate) fn assert_same(got: &[f32], want: &[f32], what: &dyn std::fmt::Display) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(g.to_bits() == w.to_bits() || g.is_nan() && w.is_nan(), "{what}: element {i} is {g:e}, not {w:e}");
    }
}

pub(crate) const PRECISIONS: [Precision; 2] = [Precision::Exact, Precision::Int8];

/// Bytes of values and of scales of one cached row.
pub(crate) fn packed_row(ty: KvType, width: usize) -> (usize, usize) {
    let values = if ty == KvType::Q8 { width } else { 2 * width };
    (values, KvBuffer::row_bytes(ty, width) - values)
}

/// Values of cached rows, finite and no larger than a few.
pub(crate) fn small_numbers(ty: KvType, bytes: usize, rng: &mut Rng) -> Vec<u8> {
    let narrow = if ty == KvType::F16 { f32_to_f16 } else { f32_to_bf16 };
    match ty {
        KvType::Q8 => rng.bytes(bytes),
        _ => (0..bytes / 2).flat_map(|_| narrow(3.0 * rng.f32()).to_le_bytes()).collect(),
    }
}

/// Scales of cached rows.
pub(crate) fn small_scales(bytes: usize, rng: &mut Rng) -> Vec<u8> {
    (0..bytes / 2).flat_map(|_| f32_to_f16(0.02 * rng.f32()).to_le_bytes()).collect()
}
