//! Random weights, written directly into the packed layout of `docs/LAYOUT.md`.
//!
//! Values are uniform over what their type can represent, symmetric about zero, and never NaN or infinite; one scale for the whole
//! matrix gives them the requested standard deviation. The mean must be zero: products of matrices with any other mean would soon
//! all point the same way.

use sluice_format::{BLOCK, ROW_GROUP, WeightType};

use super::random::Random;

/// Bytes of the row scales of `q4`, `q3` and `q2`.
const ROW_SCALES: usize = 4 * ROW_GROUP;

/// Types in which weights can be made, in the order of help texts.
pub const TYPES: [WeightType; 9] = [
    WeightType::Q2,
    WeightType::Q3,
    WeightType::Q4,
    WeightType::Int4,
    WeightType::Mxfp4,
    WeightType::Q8,
    WeightType::Fp8,
    WeightType::Bf16,
    WeightType::F32,
];

/// How a matrix is filled.
#[derive(Clone, Copy, Debug)]
pub(super) struct Filler {
    ty: WeightType,
    cols: usize,
    /// Standard deviation of the weights.
    deviation: f32,
}

/// Mean squares of the unscaled values: int4 −7..=7 with zero twice as often, e2m1, int8 −127..=127 with zero twice as
/// often, e4m3 with exponents −3..=0. A test compares them with what is written.
const INT4_MEAN_SQUARE: f32 = 17.5;
const E2M1_MEAN_SQUARE: f32 = 8.5625;
const Q8_MEAN_SQUARE: f32 = 5397.5;
const FP8_MEAN_SQUARE: f32 = 0.713_37;
/// The levels of `docs/QUANTISATION.md` with all eight shifts.
const Q4_MEAN_SQUARE: f32 = 1234.25;
const Q3_MEAN_SQUARE: f32 = 1621.5;
const Q2_MEAN_SQUARE: f32 = 1123.25;
const UNIFORM_MEAN_SQUARE: f32 = 1.0 / 3.0;

/// Why a published form cannot be requested.
const NOT_MADE: &str = "only the types of `TYPES` are made";

impl Filler {
    /// Prepares matrices of `cols` columns; `ty` is one of [`TYPES`].
    pub(super) fn new(ty: WeightType, cols: usize, deviation: f32) -> Self {
        Filler { ty, cols, deviation }
    }

    /// Fills one row group, in which the first `rows` rows exist. `out` has the length of a row group.
    pub(super) fn row_group(&self, random: &mut Random, rows: usize, out: &mut [u8]) {
        let planes = self.ty.planes(self.cols).expect("the layout has computed its length");
        let (scales, values) = out.split_at_mut(planes.scales_padded);
        let (scales, scale_padding) = scales.split_at_mut(planes.scales);
        let (values, value_padding) = values.split_at_mut(planes.values);
        scale_padding.fill(0);
        value_padding.fill(0);
        self.scales(random, rows, scales);
        self.values(random, values);
        self.clear_padding(rows, values);
    }

    fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// The same scale everywhere; rows that do not exist have none.
    fn scales(&self, random: &mut Random, rows: usize, out: &mut [u8]) {
        let halves = |out: &mut [u8], bits: u16| {
            for (i, slot) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                *slot = if i % ROW_GROUP < rows { bits } else { 0 }.to_le_bytes();
            }
        };
        match self.ty {
            WeightType::Int4 => halves(out, sluice_kernels::f32_to_bf16(self.deviation / INT4_MEAN_SQUARE.sqrt())),
            WeightType::Q8 => halves(out, sluice_kernels::f32_to_f16(self.deviation / Q8_MEAN_SQUARE.sqrt())),
            WeightType::Fp8 => {
                let scale = self.deviation / FP8_MEAN_SQUARE.sqrt();
                out.as_chunks_mut::<4>().0.iter_mut().for_each(|slot| *slot = scale.to_le_bytes());
            }
            WeightType::Mxfp4 => {
                let (low, high_of_256) = powers_of_two(self.deviation * self.deviation / E2M1_MEAN_SQUARE);
                random.fill(out, |bits| bits);
                for (i, slot) in out.iter_mut().enumerate() {
                    let high = u16::from(*slot) < high_of_256;
                    *slot = if i % ROW_GROUP < rows { low + u8::from(high) } else { 0 };
                }
            }
            WeightType::Q4 => self.shifted_scales(random, rows, BLOCK, Q4_MEAN_SQUARE, out),
            WeightType::Q3 => self.shifted_scales(random, rows, BLOCK / 2, Q3_MEAN_SQUARE, out),
            WeightType::Q2 => self.shifted_scales(random, rows, BLOCK / 2, Q2_MEAN_SQUARE, out),
            WeightType::F32 | WeightType::F16 | WeightType::Bf16 => {}
            WeightType::Grouped(_) => unreachable!("{NOT_MADE}"),
        }
    }

    /// Scales of `q4`, `q3` and `q2`: one for each row; all blocks have the same scale, and a random shift of their levels.
    fn shifted_scales(&self, random: &mut Random, rows: usize, block: usize, mean_square: f32, out: &mut [u8]) {
        /// A scale of 12: of the five lower bits, e = 1 and m = 4.
        const CODE: (u8, f32) = (12, 12.0);
        let (row_scales, bytes) = out.split_at_mut(ROW_SCALES);
        let scale = self.deviation / (CODE.1 * mean_square.sqrt());
        for (r, slot) in row_scales.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *slot = if r < rows { scale } else { 0.0 }.to_le_bytes();
        }
        random.fill(bytes, |bits| bits);
        for (i, byte) in bytes.iter_mut().enumerate() {
            let exists = i % ROW_GROUP < rows && i / ROW_GROUP * block < self.cols;
            *byte = if exists { *byte & 0xe0 | CODE.0 } else { 0 };
        }
    }

    fn values(&self, random: &mut Random, out: &mut [u8]) {
        let factor = self.deviation / UNIFORM_MEAN_SQUARE.sqrt();
        match self.ty {
            WeightType::Int4 => random.fill(out, without_zero_nibbles),
            WeightType::Mxfp4 | WeightType::Q4 | WeightType::Q3 | WeightType::Q2 => random.fill(out, |bits| bits),
            WeightType::Q8 => random.fill(out, without_least_bytes),
            WeightType::Fp8 => random.fill(out, small_exponents),
            WeightType::F32 => {
                for four in out.as_chunks_mut::<16>().0 {
                    for (slot, v) in four.as_chunks_mut::<4>().0.iter_mut().zip(random.uniform()) {
                        *slot = (v * factor).to_le_bytes();
                    }
                }
            }
            WeightType::F16 => {
                for four in out.as_chunks_mut::<8>().0 {
                    for (slot, v) in four.as_chunks_mut::<2>().0.iter_mut().zip(random.uniform()) {
                        *slot = sluice_kernels::f32_to_f16(v * factor).to_le_bytes();
                    }
                }
            }
            WeightType::Bf16 => {
                for four in out.as_chunks_mut::<8>().0 {
                    for (slot, v) in four.as_chunks_mut::<2>().0.iter_mut().zip(random.uniform()) {
                        *slot = truncate_to_bf16(v * factor).to_le_bytes();
                    }
                }
            }
            WeightType::Grouped(_) => unreachable!("{NOT_MADE}"),
        }
    }

    /// Writes zeros to rows and columns that do not exist.
    fn clear_padding(&self, rows: usize, values: &mut [u8]) {
        let each = matches!(self.ty, WeightType::F32 | WeightType::F16 | WeightType::Bf16 | WeightType::Fp8);
        let stored_cols = if each { self.cols } else { self.blocks() * BLOCK };
        for k in 0..stored_cols {
            let first = if k < self.cols { rows } else { 0 };
            (first..ROW_GROUP).for_each(|r| self.clear(values, r, k));
            // A whole group without padding columns has nothing to clear, and the loop would only cost time.
            if rows == ROW_GROUP && k < self.cols && stored_cols == self.cols {
                return;
            }
        }
    }

    fn clear(&self, values: &mut [u8], r: usize, k: usize) {
        let (g, q, i) = (k / BLOCK, k % BLOCK / 4, k % 4);
        let element = k * ROW_GROUP + r;
        match self.ty {
            WeightType::F32 => values[element * 4..][..4].fill(0),
            WeightType::F16 | WeightType::Bf16 => values[element * 2..][..2].fill(0),
            WeightType::Fp8 => values[element] = 0,
            WeightType::Q8 => values[g * 256 + q * 32 + r * 4 + i] = 0,
            WeightType::Q3 => {
                let nibble: u8 = if q < 4 { 0x0f } else { 0xf0 };
                let at = |vector: usize| g * 96 + vector * 32 + r * 4 + i;
                match q % 4 {
                    // Its bits are the top bits of the nibbles of the three other vectors.
                    3 => (0..3).for_each(|vector| values[at(vector)] &= !(nibble & 0x88)),
                    vector => values[at(vector)] &= !(nibble & 0x77),
                }
            }
            WeightType::Q2 => {
                let at = 2 * (k % 4 * 4 + k / 4 % 4);
                values[g * 64 + k % BLOCK / 16 * 32 + r * 4 + at / 8] &= !(3 << (at % 8));
            }
            WeightType::Grouped(_) => unreachable!("{NOT_MADE}"),
            WeightType::Int4 | WeightType::Mxfp4 | WeightType::Q4 => {
                let zero = if self.ty == WeightType::Int4 { 8 } else { 0 };
                let byte = &mut values[g * 128 + q % 4 * 32 + r * 4 + i];
                *byte = if q < 4 { *byte & 0xf0 | zero } else { *byte & 0x0f | zero << 4 };
            }
        }
    }
}

/// The bits of the bf16 next to `value` towards zero, so that neither sign is preferred; and a shift.
#[inline]
pub(super) fn truncate_to_bf16(value: f32) -> u16 {
    (value.to_bits() >> 16) as u16
}

/// Nibble 0 is −8, which has no counterpart; it becomes 8, which is 0.
#[inline]
fn without_zero_nibbles(bits: u64) -> u64 {
    const ONES: u64 = 0x1111_1111_1111_1111;
    let pairs = bits | bits >> 1;
    let occupied = (pairs | pairs >> 2) & ONES;
    bits | (occupied ^ ONES) << 3
}

/// −128 has no counterpart; it becomes 0.
#[inline]
fn without_least_bytes(bits: u64) -> u64 {
    const TOPS: u64 = 0x8080_8080_8080_8080;
    let rest = bits & !TOPS;
    // The top bit of each byte: whether any of the other seven is set.
    let occupied = (rest + !TOPS) & TOPS;
    bits & !(TOPS & !occupied)
}

/// e4m3 with exponents −3 to 0: sign, the two lower bits of the exponent and the mantissa stay random.
#[inline]
fn small_exponents(bits: u64) -> u64 {
    bits & 0x9f9f_9f9f_9f9f_9f9f | 0x2020_2020_2020_2020
}

/// The e8m0 code of the largest power of two whose square is at most `square`, and in how many of 256 cases the next power must be
/// used so that the mean square is `square`.
fn powers_of_two(square: f32) -> (u8, u16) {
    let exponent = (square.log2() / 2.0).floor().clamp(-126.0, 126.0);
    let low = exponent.exp2().powi(2);
    let part = ((square / low - 1.0) / 3.0).clamp(0.0, 1.0);
    ((exponent + 127.0) as u8, (part * 256.0).round() as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_format::FP8_BLOCK;
    use sluice_kernels::{Matrix, unpack};

    fn filled(ty: WeightType, rows: usize, cols: usize, deviation: f32) -> Vec<u8> {
        let mut random = Random::new(1, [u32::from(ty.code()), rows as u32, cols as u32]);
        let len = ty.row_group_len(cols).unwrap();
        let mut out = vec![0xff; len * rows.div_ceil(ROW_GROUP)];
        for (g, group) in out.chunks_mut(len).enumerate() {
            Filler::new(ty, cols, deviation).row_group(&mut random, (rows - g * ROW_GROUP).min(ROW_GROUP), group);
        }
        out
    }

    #[test]
    fn weights_have_the_deviation_that_was_asked_for() {
        for ty in TYPES {
            for deviation in [0.02, 0.013, 0.3] {
                let packed = filled(ty, 64, 2048, deviation);
                let values = unpack(Matrix::new(ty, 64, 2048, &packed).unwrap());
                assert!(values.iter().all(|v| v.is_finite()));
                let n = values.len() as f64;
                let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n / f64::from(deviation);
                let square = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
                let ratio = square.sqrt() / f64::from(deviation);
                assert!((0.98..1.02).contains(&ratio), "{ty} {deviation}: {ratio}");
                assert!(mean.abs() < 0.015, "{ty} {deviation}: {mean}");
            }
        }
    }

    /// What the packer leaves zero is zero here too.
    #[test]
    fn padding_is_as_the_packer_writes_it() {
        /// As f32, f16 and bf16.
        const NO_BYTE_ZERO: f32 = 1.234_5;
        for (rows, cols) in [(8usize, 64usize), (3, 64), (8, 40), (5, 33), (1, 1)] {
            for ty in TYPES {
                let (n, blocks) = (rows * cols, cols.div_ceil(BLOCK));
                let mut packed = vec![0; ty.row_group_len(cols).unwrap()];
                match ty {
                    WeightType::Int4 => {
                        let scales = vec![0xffff; rows * blocks];
                        sluice_kernels::pack_row_group_int4(&vec![3; n], rows, cols, &scales, &mut packed);
                    }
                    WeightType::Mxfp4 => {
                        let scales = vec![0xff; rows * blocks];
                        sluice_kernels::pack_row_group_mxfp4(&vec![3; n], rows, cols, &scales, &mut packed);
                    }
                    WeightType::Fp8 => {
                        let scales = vec![NO_BYTE_ZERO; cols.div_ceil(FP8_BLOCK)];
                        sluice_kernels::pack_row_group_fp8(&vec![0x7e; n], rows, cols, &scales, &mut packed);
                    }
                    _ => {
                        let values = vec![if ty == WeightType::Q8 { 127.0 * NO_BYTE_ZERO } else { NO_BYTE_ZERO }; n];
                        sluice_kernels::pack_row_group(ty, &values, rows, cols, &mut packed);
                    }
                }
                let ours = filled(ty, rows, cols, 0.1);
                let scales = ty.planes(cols).unwrap().scales_padded;
                for (at, (&ours, &packed)) in ours.iter().zip(&packed).enumerate() {
                    let four_bits = matches!(ty, WeightType::Int4 | WeightType::Mxfp4 | WeightType::Q4);
                    let nibbles = at >= scales && four_bits;
                    let zero = if ty == WeightType::Int4 { 8 } else { 0 };
                    if nibbles {
                        for shift in [0, 4] {
                            assert!(packed >> shift & 15 != zero || ours >> shift & 15 == zero, "{ty} {at}");
                        }
                    } else if packed == 0 && (at < scales || !matches!(ty, WeightType::Q3 | WeightType::Q2)) {
                        assert_eq!(ours, 0, "{ty} {rows}x{cols} byte {at}");
                    }
                }
                // Columns that do not exist have the first level, whatever its value in their block.
                if matches!(ty, WeightType::Q3 | WeightType::Q4) {
                    let stored = blocks * BLOCK;
                    let all = unpack(Matrix::new(ty, 8, stored, &ours).unwrap());
                    for padding in all.chunks(stored).flat_map(|row| row[cols..].rchunks(16)) {
                        assert!(padding.iter().all(|v| v == &padding[0]), "{ty} {rows}x{cols}");
                    }
                }
                let whole = unpack(Matrix::new(ty, 8, cols, &ours).unwrap());
                assert!(whole[n..].iter().all(|&v| v == 0.0), "{ty} {rows}x{cols}");
            }
        }
    }

    #[test]
    fn words_without_the_lonely_values() {
        assert_eq!(without_zero_nibbles(0x0000_0000_1234_08f0), 0x8888_8888_1234_88f8);
        assert_eq!(without_least_bytes(0x8001_7f80_ff00_8180), 0x0001_7f00_ff00_8100);
        let nan = |code: u8| code & 0x7f == 0x7f;
        assert!((0..=255u8).all(|b| !nan(small_exponents(u64::from(b)) as u8)));
    }
}
