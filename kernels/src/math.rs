//! Elementary functions in plain multiplications and additions, so that they give the same bits on every platform.

/// Adding and subtracting this number rounds a number below 2^22 to the nearest integer, ties to even: 1.5 · 2^23 leaves no room
/// for fraction bits. Unlike `round_ties_even`, this needs no instruction beyond the baseline of any target.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// e^x within 2 ulp; infinite above 88.73, zero below −104, NaN for NaN. Identical on every platform.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Comparisons instead of clamp, because they keep NaN.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let t = x * std::f32::consts::LOG2_E + ROUND;
    let n = (t.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let nf = t - ROUND;
    let r = x - nf * LN2_HI - nf * LN2_LO;
    let mut p = 1.987_569_1e-4_f32;
    for c in [1.398_2e-3_f32, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let y = p * (r * r) + r + 1.0;
    // 2^n in two factors, because n itself may lie outside the exponents of normal numbers.
    let half = n >> 1;
    y * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// 1 / (1 + e^−x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// x · sigmoid(x).
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// tanh(x), within 2^-23 of it.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    2.0 * sigmoid(2.0 * x) - 1.0
}

/// x · Φ(x) by the approximation with tanh (arXiv:1606.08415, section 2): `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`. Half of 1
/// plus the tanh is the sigmoid of twice the argument.
#[inline(always)]
pub fn gelu_tanh(x: f32) -> f32 {
    const TWICE_ROOT: f32 = 1.595_769;
    x * sigmoid(TWICE_ROOT * (x + 0.044_715 * (x * x * x)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut x = -87.0f32;
        while x < 88.7 {
            let want = f64::from(x).exp();
            let ulp = f64::from(f32::from_bits((want as f32).to_bits() + 1)) - f64::from(want as f32);
            assert!((f64::from(exp(x)) - want).abs() <= 2.0 * ulp, "exp({x}) = {}, not {want}", exp(x));
            x += 0.001_37;
        }
    }

    #[test]
    fn exp_at_the_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(100.0), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-100.0) > 0.0, "subnormal results are kept");
    }

    #[test]
    fn tanh_and_gelu_are_near() {
        let mut x = -9.0f32;
        while x < 9.0 {
            assert!((f64::from(tanh(x)) - f64::from(x).tanh()).abs() < 2.4e-7, "tanh({x}) = {}", tanh(x));
            let wide = f64::from(x);
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
            let want = 0.5 * wide * (1.0 + inner.tanh());
            let error = (f64::from(gelu_tanh(x)) - want).abs();
            assert!(error < 1e-6 * want.abs().max(0.1), "gelu({x}) = {}, not {want}", gelu_tanh(x));
            x += 0.001_37;
        }
        assert_eq!((tanh(100.0), tanh(-100.0), gelu_tanh(100.0), gelu_tanh(-100.0)), (1.0, -1.0, 100.0, 0.0));
    }

    #[test]
    fn sigmoid_and_silu_saturate() {
        assert_eq!(sigmoid(0.0), 0.5);
        assert_eq!(sigmoid(-1000.0), 0.0);
        assert_eq!(sigmoid(1000.0), 1.0);
        assert_eq!(silu(1000.0), 1000.0);
        assert_eq!(silu(-1000.0), 0.0);
    }
}
