//! Narrow number formats, decoded one value at a time.

use half::{bf16, f16};

/// The eight magnitudes and their negatives that 4-bit e2m1 codes represent; bit 3 is the sign.
pub const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Twice [`E2M1`], which are integers; kernels multiply these and halve the sum.
pub(crate) const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Decodes fp8 e4m3fn: 4 exponent bits with bias 7, no infinities, 0x7f and 0xff are NaN. Exact.
pub fn e4m3_to_f32(code: u8) -> f32 {
    e4m3_over_256(code) * 256.0
}

/// The value of an e4m3fn code divided by 256.
///
/// Shifted into binary16, the code keeps its meaning except for the exponent bias, 15 instead of 7, which is this factor. Kernels
/// leave it in and multiply the block's scale by 256.
pub(crate) fn e4m3_over_256(code: u8) -> f32 {
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    let bits = (u16::from(code & 0x80) << 8) | (u16::from(code & 0x7f) << 7);
    f16_to_f32(bits)
}

/// Decodes an e8m0 scale: `2^(code - 127)`, 255 is NaN. Exact; code 0 is the subnormal 2^-127.
pub fn e8m0_to_f32(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        e => f32::from_bits(u32::from(e) << 23),
    }
}

/// Decodes the bits of a binary16 number. Exact.
#[inline]
pub fn f16_to_f32(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

/// Decodes the bits of a bfloat16 number. Exact.
#[inline]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounds to binary16, ties to even; numbers that are too large become infinite.
#[inline]
pub fn f32_to_f16(x: f32) -> u16 {
    f16::from_f32(x).to_bits()
}

/// Rounds to bfloat16, ties to even.
#[inline]
pub fn f32_to_bf16(x: f32) -> u16 {
    bf16::from_f32(x).to_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_agrees_with_its_definition_for_all_codes() {
        for code in 0..=255u8 {
            let (e, m) = (i32::from(code >> 3 & 15), f64::from(code & 7));
            let magnitude = match (e, code & 7) {
                (15, 7) => f64::NAN,
                (0, _) => m / 8.0 * 2f64.powi(-6),
                _ => (1.0 + m / 8.0) * 2f64.powi(e - 7),
            };
            let want = (if code & 0x80 != 0 { -magnitude } else { magnitude }) as f32;
            let got = e4m3_to_f32(code);
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{code:#x}: {got} {want}");
        }
        assert_eq!(e4m3_to_f32(0x7e), 448.0);
    }

    #[test]
    fn e8m0_is_a_power_of_two() {
        for code in 0..255u8 {
            assert_eq!(f64::from(e8m0_to_f32(code)), 2f64.powi(i32::from(code) - 127));
        }
        assert!(e8m0_to_f32(255).is_nan());
    }

    #[test]
    fn doubled_e2m1_is_twice_e2m1() {
        for code in 0..16 {
            assert_eq!(f32::from(E2M1_DOUBLED[code]), 2.0 * E2M1[code]);
        }
    }
}
