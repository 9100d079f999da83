//! Rotary position embedding: frequencies and the cosines and sines of a range of positions.

use std::f64::consts::PI;

use sluice_format::{RopePairing as StoredPairing, RopeScaling, RopeSpec};
use sluice_kernels::{RopePairing, rope};

/// Frequencies of a [`RopeSpec`] (RoFormer, arXiv:2104.09864; YaRN, arXiv:2309.00071).
#[derive(Clone, Debug)]
pub struct Rope {
    pairing: RopePairing,
    /// `dim / 2` angular frequencies in radians per position.
    inv_freq: Vec<f32>,
    /// Factor of cosine and sine.
    attention_factor: f32,
}

/// Cosines and sines of some positions, `[positions, dim / 2]` each. Owned by the caller's scratch.
#[derive(Clone, Debug, Default)]
pub struct RopeAngles {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    /// Frequencies in f32, as the reference computes them, because differences of one unit in the last place grow with the
    /// position.
    pub fn new(spec: &RopeSpec) -> Self {
        let plain = (0..spec.dim).step_by(2).map(|i| {
            let exponent = i as f32 / spec.dim as f32;
            1.0 / (spec.theta.powf(f64::from(exponent)) as f32)
        });
        let pairing = match spec.pairing {
            StoredPairing::Half => RopePairing::Half,
            StoredPairing::Interleaved => RopePairing::Interleaved,
        };
        let (inv_freq, attention_factor) = match &spec.scaling {
            RopeScaling::None => (plain.collect(), 1.0),
            RopeScaling::Linear { factor } => (plain.map(|inv| (f64::from(inv) / factor) as f32).collect(), 1.0),
            RopeScaling::Divided { divisors, attention_factor } => {
                (plain.zip(divisors).map(|(inv, d)| inv / d).collect(), *attention_factor as f32)
            }
            // An angle of zero turns nothing, to the bit.
            RopeScaling::Partial { pairs } => {
                (plain.enumerate().map(|(i, inv)| if i < *pairs { inv } else { 0.0 }).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, attention_factor, .. } => {
                let ramp = yarn_ramp(spec);
                let scaled = plain.zip(ramp).map(|(inv, ramp)| {
                    let inv = f64::from(inv);
                    (inv / factor * ramp + inv * (1.0 - ramp)) as f32
                });
                (scaled.collect(), *attention_factor as f32)
            }
            RopeScaling::Llama3 { .. } => (plain.map(|inv| llama3_frequency(&spec.scaling, inv)).collect(), 1.0),
        };
        Rope { pairing, inv_freq, attention_factor }
    }

    /// Fills `angles` for `positions`.
    pub fn angles(&self, positions: impl Iterator<Item = usize>, angles: &mut RopeAngles) {
        angles.cos.clear();
        angles.sin.clear();
        for position in positions {
            for inv in &self.inv_freq {
                let angle = f64::from(position as f32 * inv);
                angles.cos.push(angle.cos() as f32 * self.attention_factor);
                angles.sin.push(angle.sin() as f32 * self.attention_factor);
            }
        }
    }

    /// Fills `back` with the angles that undo `angles`.
    pub fn reverse(angles: &RopeAngles, back: &mut RopeAngles) {
        back.cos.clone_from(&angles.cos);
        back.sin.clear();
        back.sin.extend(angles.sin.iter().map(|sin| -sin));
    }

    /// Rotates the last elements of `x`, as many as the spec says, by the angles of position number `index`.
    pub fn rotate_end(&self, x: &mut [f32], angles: &RopeAngles, index: usize) {
        let first = x.len() - 2 * self.inv_freq.len();
        self.rotate(&mut x[first..], angles, index);
    }

    /// Rotates `x` by the angles of position number `index`.
    pub fn rotate(&self, x: &mut [f32], angles: &RopeAngles, index: usize) {
        let half = self.inv_freq.len();
        let range = index * half..(index + 1) * half;
        rope(x, &angles.cos[range.clone()], &angles.sin[range], self.pairing);
    }
}

/// How much each frequency is interpolated, 0 (kept) to 1 (divided by the factor).
fn yarn_ramp(spec: &RopeSpec) -> impl Iterator<Item = f64> {
    let dim = spec.dim as f64;
    let (mut low, mut high) = (0.0, 1.0);
    if let RopeScaling::Yarn { original_max_positions, beta_fast, beta_slow, truncate, .. } = spec.scaling {
        // The dimension whose frequency makes `rotations` turns over the original context.
        let correction = |rotations: f64| {
            dim * (original_max_positions as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * spec.theta.ln())
        };
        (low, high) = (correction(beta_fast), correction(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
    }
    (0..spec.dim / 2).map(move |i| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0))
}

/// Llama 3.1's change of one frequency (formula at [`RopeScaling::Llama3`]).
fn llama3_frequency(scaling: &RopeScaling, inv: f32) -> f32 {
    let RopeScaling::Llama3 { factor, original_max_positions, low_freq_factor, high_freq_factor } = *scaling else {
        return inv;
    };
    let inv = f64::from(inv);
    let turns = original_max_positions as f64 * inv / (2.0 * PI);
    // Both may be the same; then no frequency lies between those that stay and those that are divided.
    let smooth = match turns >= high_freq_factor {
        true => 1.0,
        false => ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).max(0.0),
    };
    ((1.0 - smooth) * inv / factor + smooth * inv) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(scaling: RopeScaling) -> RopeSpec {
        RopeSpec { pairing: StoredPairing::Interleaved, theta: 10000.0, dim: 8, scaling }
    }

    #[test]
    fn llama_3_may_have_nothing_between_its_factors() {
        let scaling = |high_freq_factor| RopeScaling::Llama3 {
            factor: 16.0,
            original_max_positions: 8192,
            low_freq_factor: 1.0,
            high_freq_factor,
        };
        // Wavelengths of half and twice the original positions, and of those themselves.
        let [short, long, border] = [0.5, 2.0, 1.0].map(|waves| (2.0 * PI / (8192.0 * waves)) as f32);
        assert_eq!(llama3_frequency(&scaling(1.0), short), short);
        assert!((llama3_frequency(&scaling(1.0), long) / long - 1.0 / 16.0).abs() < 1e-6);
        assert!(llama3_frequency(&scaling(1.0), border).is_finite());
        let between = llama3_frequency(&scaling(4.0), short) / short;
        assert!((between - (1.0 / 3.0 + 2.0 / 3.0 / 16.0)).abs() < 1e-6, "{between}");
    }

    #[test]
    fn yarn_keeps_fast_and_divides_slow_frequencies() {
        let plain = Rope::new(&spec(RopeScaling::None));
        let yarn = Rope::new(&spec(RopeScaling::Yarn {
            factor: 4.0,
            original_max_positions: 64,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: 1.0,
        }));
        assert_eq!(plain.inv_freq[0], yarn.inv_freq[0]);
        assert_eq!(plain.inv_freq[3] / 4.0, yarn.inv_freq[3]);
        assert!(yarn.inv_freq[1] < plain.inv_freq[1] && yarn.inv_freq[1] > plain.inv_freq[1] / 4.0);
    }

    #[test]
    fn the_end_rotates_there_and_back() {
        let rope = Rope::new(&spec(RopeScaling::None));
        let (mut angles, mut back) = (RopeAngles::default(), RopeAngles::default());
        rope.angles([7].into_iter(), &mut angles);
        Rope::reverse(&angles, &mut back);
        let x: Vec<f32> = (1..=11).map(|i| i as f32).collect();
        let mut y = x.clone();
        rope.rotate_end(&mut y, &angles, 0);
        assert_eq!(x[..3], y[..3]);
        assert!(x[3..].iter().zip(&y[3..]).all(|(x, y)| x != y), "{y:?}");
        rope.rotate_end(&mut y, &back, 0);
        assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() < 1e-5), "{y:?}");
    }

    #[test]
    fn plain_changes_divide_frequencies() {
        let plain = Rope::new(&spec(RopeScaling::None)).inv_freq;
        let linear = Rope::new(&spec(RopeScaling::Linear { factor: 2.5 })).inv_freq;
        assert!(plain.iter().zip(&linear).all(|(p, l)| (p / l - 2.5).abs() < 1e-6), "{plain:?} {linear:?}");
        let divided =
            Rope::new(&spec(RopeScaling::Divided { divisors: vec![1.0, 2.0, 0.5, 8.0], attention_factor: 1.0 }))
                .inv_freq;
        assert_eq!(divided, [plain[0], plain[1] / 2.0, plain[2] * 2.0, plain[3] / 8.0]);
    }

    #[test]
    fn position_zero_rotates_nothing_and_rotation_keeps_length() {
        let rope = Rope::new(&spec(RopeScaling::None));
        let mut angles = RopeAngles::default();
        rope.angles(0..3, &mut angles);
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        let mut y = x;
        rope.rotate(&mut y, &angles, 0);
        assert_eq!(x, y);
        rope.rotate(&mut y, &angles, 2);
        let norm = |v: &[f32]| v.iter().map(|a| a * a).sum::<f32>();
        assert!((norm(&x) - norm(&y)).abs() < 1e-4);
        assert_ne!(x, y);
    }
}
