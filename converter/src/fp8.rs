//! The fp8 type: e4m3fn codes with a scale per block.

use std::sync::LazyLock;

use sluice_format::FP8_BLOCK;
use sluice_kernels::e4m3_to_f32;

/// Rows and columns that share one scale, in the source and in the file's fp8 type.
pub(crate) const SCALE_BLOCK: usize = 128;

/// The largest e4m3fn number.
pub(crate) const E4M3_MAX: f32 = 448.0;

/// The value of every code; NaN for the two codes without a value.
pub(crate) static E4M3: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|code| e4m3_to_f32(code as u8)));

/// Whether a code is one of the two NaNs.
pub(crate) fn is_nan(code: u8) -> bool {
    code & 0x7f == 0x7f
}

/// Rounds to e4m3fn, ties to even; larger magnitudes become the largest. `x` is not NaN.
pub(crate) fn f32_to_e4m3(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let magnitude = x.abs();
    // 464 is halfway between 448 and 480, which the format does not have.
    if magnitude >= 464.0 {
        return sign | 0x7e;
    }
    // Below the smallest normal number, 2^-6, steps are 2^-9: after scaling by 2^9, the code is the rounded integer. Rounding up to
    // 8 gives the code of the smallest normal number.
    if magnitude < 1.0 / 64.0 {
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    let bits = magnitude.to_bits();
    // Rounds 23 bits of mantissa to 3, ties to even; a carry correctly increments the exponent.
    let rounded = (bits + 0x7_ffff + ((bits >> 20) & 1)) >> 20;
    // f32's exponent bias is 127, e4m3's is 7.
    sign | (rounded - ((127 - 7) << 3)) as u8
}

/// Quantises a strip of at most 128 rows, row-major `[rows, cols]`: one scale per 128 columns. Returns codes and scales.
pub(crate) fn quantise_strip(values: &[f32], cols: usize) -> (Vec<u8>, Vec<f32>) {
    debug_assert!(values.len() <= SCALE_BLOCK * cols);
    let mut absmax = vec![0f32; cols.div_ceil(FP8_BLOCK)];
    for row in values.chunks_exact(cols) {
        for (max, block) in absmax.iter_mut().zip(row.chunks(FP8_BLOCK)) {
            *max = block.iter().fold(*max, |m, v| m.max(v.abs()));
        }
    }
    // A block of zeros, or of numbers too small for a normal scale, still needs a divisor.
    let scales: Vec<f32> = absmax.iter().map(|max| (max / E4M3_MAX).max(f32::MIN_POSITIVE)).collect();
    let mut codes = Vec::with_capacity(values.len());
    for row in values.chunks_exact(cols) {
        for (scale, block) in scales.iter().zip(row.chunks(FP8_BLOCK)) {
            codes.extend(block.iter().map(|v| f32_to_e4m3(v / scale)));
        }
    }
    (codes, scales)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every code with a value is reproduced, and everything between two neighbours is rounded to the nearer one.
    #[test]
    fn rounds_to_the_nearest_code_ties_to_even() {
        for code in 0..0x7eu8 {
            let (low, high) = (E4M3[code as usize], E4M3[code as usize + 1]);
            let middle = (low + high) / 2.0;
            let even = if code % 2 == 0 { code } else { code + 1 };
            for sign in [1.0, -1.0] {
                let bit = if sign < 0.0 { 0x80 } else { 0 };
                assert_eq!(f32_to_e4m3(sign * low), code | bit);
                assert_eq!(f32_to_e4m3(sign * middle), even | bit);
                assert_eq!(f32_to_e4m3(sign * middle.next_down()), code | bit);
                assert_eq!(f32_to_e4m3(sign * middle.next_up()), (code + 1) | bit);
            }
        }
        assert_eq!(f32_to_e4m3(448.0), 0x7e);
        assert_eq!(f32_to_e4m3(1e30), 0x7e);
        assert_eq!(f32_to_e4m3(-f32::INFINITY), 0xfe);
    }

    #[test]
    fn tiny_and_zero_blocks_have_a_usable_scale() {
        for value in [0.0, 1e-45, -3e-39] {
            let (codes, scales) = quantise_strip(&[value; 130], 130);
            assert!(scales.iter().all(|s| s.is_finite() && *s > 0.0));
            assert!(codes.iter().all(|&c| !is_nan(c)));
        }
    }
}
