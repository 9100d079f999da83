//! Operations on one row of activations: norms, rotary positions, gated activations, softmax.

use crate::math::{exp, gelu_tanh, sigmoid, silu};

/// Lanes of long sums; they are folded in halves at the end.
const LANES: usize = 16;

/// How a feed-forward network combines gate and up.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Activation {
    /// `silu(gate) · up`.
    Silu,
    /// gpt-oss: `gate = min(gate, limit)`, `up = clamp(up, ±limit)`, `(up + 1) · gate · sigmoid(alpha · gate)`.
    SwigluOai {
        /// Slope inside the sigmoid.
        alpha: f32,
        /// Bound on both operands.
        limit: f32,
    },
    /// `silu(min(gate, limit)) · clamp(up, ±limit)`.
    SiluClamped {
        /// Bound on both operands.
        limit: f32,
    },
    /// `gelu(gate) · up`, with the approximation by tanh.
    GeluTanh,
    /// `min(silu(gate), limit) · clamp(up, ±limit)`.
    SiluBounded {
        /// Bound on both factors.
        limit: f32,
    },
    /// `max(up, 0)²`, whatever the gate: networks with this activation have none.
    ReluSquared,
}

impl Activation {
    /// The activation of one gate and one up value. NaN in, NaN out.
    #[inline(always)]
    pub fn apply(self, gate: f32, up: f32) -> f32 {
        match self {
            Activation::Silu => silu(gate) * up,
            Activation::SwigluOai { alpha, limit } => {
                let gate = at_most(gate, limit);
                (within(up, limit) + 1.0) * (gate * sigmoid(alpha * gate))
            }
            Activation::SiluClamped { limit } => silu(at_most(gate, limit)) * within(up, limit),
            Activation::GeluTanh => gelu_tanh(gate) * up,
            Activation::SiluBounded { limit } => at_most(silu(gate), limit) * within(up, limit),
            // A comparison, so that NaN stays NaN.
            Activation::ReluSquared => {
                if up < 0.0 {
                    0.0
                } else {
                    up * up
                }
            }
        }
    }

    /// Does what [`apply`](Self::apply) does for as many gates and ups, with the same bits.
    #[inline]
    pub(crate) fn apply_all<const N: usize>(self, gate: &[f32; N], up: &[f32; N]) -> [f32; N] {
        // With the variant known outside the loop, the loop is pure arithmetic, which compilers vectorise.
        match self {
            Activation::Silu => join(gate, up, |g, u| Activation::Silu.apply(g, u)),
            Activation::SwigluOai { alpha, limit } => {
                join(gate, up, |g, u| Activation::SwigluOai { alpha, limit }.apply(g, u))
            }
            Activation::SiluClamped { limit } => join(gate, up, |g, u| Activation::SiluClamped { limit }.apply(g, u)),
            Activation::GeluTanh => join(gate, up, |g, u| Activation::GeluTanh.apply(g, u)),
            Activation::SiluBounded { limit } => join(gate, up, |g, u| Activation::SiluBounded { limit }.apply(g, u)),
            Activation::ReluSquared => join(gate, up, |g, u| Activation::ReluSquared.apply(g, u)),
        }
    }
}

/// `f` of each gate and up. Its calls are inlined whatever their size, since compilers do not vectorise a loop with a call;
/// `array::from_fn` makes such calls.
#[inline(always)]
fn join<const N: usize>(gate: &[f32; N], up: &[f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; N] {
    let mut out = [0.0; N];
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = f(gate, up);
    }
    out
}

/// `min`, but NaN stays NaN.
#[inline(always)]
fn at_most(x: f32, limit: f32) -> f32 {
    if x > limit { limit } else { x }
}

#[inline(always)]
fn within(x: f32, limit: f32) -> f32 {
    if x < -limit { -limit } else { at_most(x, limit) }
}

/// Sum in [`LANES`] lanes, with element `i` in lane `i mod LANES`; then the lanes are folded in halves.
fn lane_sum(x: &[f32], value: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for (lane, &v) in lanes.iter_mut().zip(block) {
            *lane += value(v);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane += value(v);
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// `out[i] = weight[i] · x[i] / sqrt(mean(x²) + eps)` over one row.
///
/// # Panics
/// If the three lengths differ.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len(), "rms_norm takes three rows of one length");
    let mean = lane_sum(x, |v| v * v) / x.len().max(1) as f32;
    let inverse = 1.0 / (mean + eps).sqrt();
    for ((o, &v), &w) in out.iter_mut().zip(x).zip(weight) {
        *o = w * (v * inverse);
    }
}

/// Replaces `x` by `exp(x − max) / Σ exp(x − max)`. An empty row stays empty; a row of −∞ alone becomes NaN.
pub fn softmax(x: &mut [f32]) {
    // NaN never wins a comparison, but it reaches every element through the sum.
    let max = x.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m });
    for v in x.iter_mut() {
        *v = exp(*v - max);
    }
    let sum = lane_sum(x, |v| v);
    for v in x.iter_mut() {
        *v /= sum;
    }
}

/// Pairs of elements that a rotary position turns together; `R` is twice the number of angles.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RopePairing {
    /// `i` and `i + R/2`.
    Half,
    /// `2i` and `2i + 1`.
    Interleaved,
}

/// Turns the first `R` elements of one head by `R/2` angles, given by their cosines and sines; the rest stay.
///
/// # Panics
/// If `cos` and `sin` differ in length, or `x` has fewer than `R` elements.
pub fn rope(x: &mut [f32], cos: &[f32], sin: &[f32], pairing: RopePairing) {
    let half = cos.len();
    assert_eq!(half, sin.len(), "one sine per cosine");
    assert!(x.len() >= 2 * half, "{} elements cannot be turned by {half} angles", x.len());
    let turned = &mut x[..2 * half];
    let turn = |a: f32, b: f32, c: f32, s: f32| (a * c - b * s, b * c + a * s);
    match pairing {
        RopePairing::Half => {
            let (low, high) = turned.split_at_mut(half);
            for i in 0..half {
                (low[i], high[i]) = turn(low[i], high[i], cos[i], sin[i]);
            }
        }
        RopePairing::Interleaved => {
            for (i, [a, b]) in turned.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                (*a, *b) = turn(*a, *b, cos[i], sin[i]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::array;

    #[test]
    fn rms_norm_of_a_known_row() {
        let mut out = [0.0; 4];
        rms_norm(&[1.0, -1.0, 1.0, -1.0], &[1.0, 2.0, 3.0, 4.0], 0.0, &mut out);
        assert_eq!(out, [1.0, -2.0, 3.0, -4.0]);
        rms_norm(&[0.0; 4], &[1.0; 4], 1e-6, &mut out);
        assert_eq!(out, [0.0; 4]);
    }

    #[test]
    fn softmax_sums_to_one() {
        for n in 1..70 {
            let mut x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin() * 20.0).collect();
            softmax(&mut x);
            assert!((x.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        }
        let mut x = [f32::NEG_INFINITY, 1.0];
        softmax(&mut x);
        assert_eq!(x, [0.0, 1.0]);
        let mut x = [f32::NAN, 1.0];
        softmax(&mut x);
        assert!(x.iter().all(|v| v.is_nan()));
        softmax(&mut []);
    }

    #[test]
    fn rope_turns_pairs_and_leaves_the_rest() {
        let (cos, sin) = ([0.0, 1.0], [1.0, 0.0]);
        let mut x = [1.0, 2.0, 3.0, 4.0, 5.0];
        rope(&mut x, &cos, &sin, RopePairing::Half);
        assert_eq!(x, [-3.0, 2.0, 1.0, 4.0, 5.0]);
        let mut x = [1.0, 2.0, 3.0, 4.0, 5.0];
        rope(&mut x, &cos, &sin, RopePairing::Interleaved);
        assert_eq!(x, [-2.0, 1.0, 3.0, 4.0, 5.0]);
    }

    #[test]
    fn activations_follow_their_formulas_and_keep_nan() {
        let oai = Activation::SwigluOai { alpha: 1.702, limit: 7.0 };
        assert_eq!(Activation::Silu.apply(2.0, 3.0), silu(2.0) * 3.0);
        assert_eq!(oai.apply(9.0, -9.0), -6.0 * (7.0 * sigmoid(1.702 * 7.0)));
        let clamped = Activation::SiluClamped { limit: 7.0 };
        assert_eq!(clamped.apply(9.0, 9.0), silu(7.0) * 7.0);
        let bounded = Activation::SiluBounded { limit: 7.0 };
        assert_eq!(bounded.apply(9.0, -9.0), 7.0 * -7.0);
        assert_eq!(bounded.apply(2.0, 3.0), silu(2.0) * 3.0);
        assert_eq!([-2.0, 3.0].map(|up| Activation::ReluSquared.apply(f32::NAN, up)), [0.0, 9.0]);
        assert!(Activation::ReluSquared.apply(1.0, f32::NAN).is_nan());
        for act in [Activation::Silu, oai, clamped, bounded] {
            assert!(act.apply(f32::NAN, 1.0).is_nan());
            assert!(act.apply(1.0, f32::NAN).is_nan());
        }
    }

    #[test]
    fn activations_of_many_are_those_of_each() {
        let odd = [0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-40, f32::MAX, -104.5];
        let steps = |i: i32| (i as f32).mul_add(0.37, -90.0);
        let values: Vec<f32> = odd.into_iter().chain((0..500).map(steps)).collect();
        let oai = Activation::SwigluOai { alpha: 1.702, limit: 7.0 };
        let (clamped, bounded) = (Activation::SiluClamped { limit: 7.0 }, Activation::SiluBounded { limit: 7.0 });
        for act in [Activation::Silu, oai, clamped, bounded, Activation::ReluSquared] {
            for shift in 0..values.len() {
                let at = |i: usize| values[i % values.len()];
                let (gate, up): ([f32; 8], [f32; 8]) = (array::from_fn(at), array::from_fn(|i| at(i + shift)));
                let gate = if shift % 2 == 0 { gate } else { array::from_fn(|i| at(i * 61 + shift)) };
                for (i, v) in act.apply_all(&gate, &up).into_iter().enumerate() {
                    let one = act.apply(gate[i], up[i]);
                    let same = v.to_bits() == one.to_bits() || v.is_nan() && one.is_nan();
                    assert!(same, "{act:?} of {} and {}: {v}, not {one}", gate[i], up[i]);
                }
            }
        }
    }
}
