//! The exponential function, in additions and multiplications only.
//!
//! The standard library's `exp` comes from the platform, and platforms differ in the last bit, which is enough to change a draw.
//! IEEE 754 additions and multiplications are the same everywhere.

/// 1/n! for n from 0 to 13.
const TAYLOR: [f64; 14] = {
    let mut terms = [1.0; 14];
    let mut factorial = 1.0;
    let mut n = 1;
    while n < terms.len() {
        factorial *= n as f64;
        terms[n] = 1.0 / factorial;
        n += 1;
    }
    terms
};

/// e to the `x`, for `x` up to 0, to about one unit in the last place; 0 below the range of
/// normal numbers (about -708).
pub(super) fn exp_nonpositive(x: f64) -> f64 {
    // ln 2 in two parts: the first has so few bits that its multiples up to 2^11 are exact.
    // Constants as in FreeBSD's e_exp.c.
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    if x < -708.0 {
        return 0.0;
    }
    // x = k ln 2 + r with |r| <= ln 2 / 2, so that e^x = 2^k e^r.
    let k = (x * std::f64::consts::LOG2_E).round();
    let r = (x - k * LN2_HIGH) - k * LN2_LOW;
    // Taylor's series: for |r| < 0.35, the first term left out is below 5e-18.
    let sum = TAYLOR.iter().rev().fold(0.0, |sum, c| sum * r + c);
    // 2^k by writing the exponent; -1022 <= k <= 0 keeps it a normal number.
    sum * f64::from_bits(((k as i64 + 1023) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_to_the_platform() {
        for step in 0..=70_700 {
            let x = -f64::from(step) / 100.0;
            let (ours, theirs) = (exp_nonpositive(x), x.exp());
            assert!((ours / theirs - 1.0).abs() < 1e-15, "{x}: {ours} {theirs}");
        }
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(-1e-300), 1.0);
        assert!(exp_nonpositive(-708.0) > 0.0);
        assert_eq!(exp_nonpositive(-709.0), 0.0);
        assert_eq!(exp_nonpositive(f64::NEG_INFINITY), 0.0);
    }
}
