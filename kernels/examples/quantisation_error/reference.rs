//! What llama.cpp's quantisers do without an importance matrix, from their definitions in ggml-quants.c: the numbers
//! after a round trip, without the packing of bits. Rounding is to nearest even as there.

use sluice_kernels::{f16_to_f32, f32_to_f16};

type RoundTrip = fn(&[f32]) -> Vec<f32>;

/// Name and round trip; whole blocks of 256 numbers.
pub(crate) const TYPES: [(&str, RoundTrip); 4] = [("Q4_0", q4_0), ("Q4_K", q4_k), ("IQ4_XS", iq4_xs), ("Q3_K", q3_k)];

fn f16(x: f32) -> f32 {
    f16_to_f32(f32_to_f16(x))
}

/// The number of largest magnitude, the first of several.
fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |m: f32, &v| if v.abs() > m.abs() { v } else { m })
}

/// 4.5 bits: f16 scale per 32, `(q − 8)·d`, from the largest magnitude.
fn q4_0(x: &[f32]) -> Vec<f32> {
    let block = |x: &[f32]| {
        let d = extreme(x) / -8.0;
        let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
        let d = f16(d);
        x.iter().map(|v| d * ((v * inverse + 8.5).floor().min(15.0) - 8.0)).collect::<Vec<_>>()
    };
    x.chunks(32).flat_map(block).collect()
}

/// 4.5 bits: per 32 a 6-bit scale and a 6-bit minimum, over f16 factors per 256.
fn q4_k(x: &[f32]) -> Vec<f32> {
    let block = |x: &[f32]| {
        let pairs: Vec<(f32, f32)> = x.chunks(32).map(scale_and_minimum).collect();
        let largest = |f: fn(&(f32, f32)) -> f32| pairs.iter().map(f).fold(0.0, f32::max);
        let (scale, minimum) = (largest(|p| p.0), largest(|p| p.1));
        let code = |v: f32, largest: f32| {
            if largest > 0.0 { (63.0 / largest * v).round_ties_even().min(63.0) } else { 0.0 }
        };
        let (d, dmin) = (f16(scale / 63.0), f16(minimum / 63.0));
        let mut out = Vec::new();
        for (x, &(s, m)) in x.chunks(32).zip(&pairs) {
            let (d, m) = (d * code(s, scale), dmin * code(m, minimum));
            let level = |v: &f32| if d == 0.0 { 0.0 } else { ((v + m) / d).round_ties_even().clamp(0.0, 15.0) };
            out.extend(x.iter().map(|v| d * level(v) - m));
        }
        out
    };
    x.chunks(256).flat_map(block).collect()
}

/// `make_qkx2_quants` as called for Q4_K.
fn scale_and_minimum(x: &[f32]) -> (f32, f32) {
    let mean_square = x.iter().map(|v| v * v).sum::<f32>() / 32.0;
    let w: Vec<f32> = x.iter().map(|v| mean_square.sqrt() + v.abs()).collect();
    let low = x.iter().fold(x[0], |m, &v| m.min(v)).min(0.0);
    let high = x.iter().fold(x[0], |m, &v| m.max(v));
    if high == low {
        return (0.0, -low);
    }
    let sum = |term: &dyn Fn(usize) -> f32| (0..x.len()).map(term).sum::<f32>();
    let levels = |inverse: f32| -> Vec<f32> {
        x.iter().map(|v| (inverse * (v - low)).round_ties_even().clamp(0.0, 15.0)).collect()
    };
    let error = |l: &[f32], d: f32, m: f32| sum(&|i| w[i] * (d * l[i] + m - x[i]).powi(2));
    let first = 15.0 / (high - low);
    let mut best = (error(&levels(first), 1.0 / first, low), 1.0 / first, low);
    let (sum_w, sum_x) = (sum(&|i| w[i]), sum(&|i| w[i] * x[i]));
    for step in 0..=20 {
        let l = levels((-1.0 + 0.1 * step as f32 + 15.0) / (high - low));
        let (sum_l, sum_l2) = (sum(&|i| w[i] * l[i]), sum(&|i| w[i] * l[i] * l[i]));
        let sum_xl = sum(&|i| w[i] * l[i] * x[i]);
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant > 0.0 {
            let mut d = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut m = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if m > 0.0 {
                (d, m) = (sum_xl / sum_l2, 0.0);
            }
            let e = error(&l, d, m);
            if e < best.0 {
                best = (e, d, m);
            }
        }
    }
    (best.1, -best.2)
}

/// The codebook of IQ4_NL and IQ4_XS.
const IQ4: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

fn nearest(v: f32) -> f32 {
    let after = IQ4.partition_point(|&level| level <= v);
    match after {
        0 => IQ4[0],
        16 => IQ4[15],
        i => {
            if v - IQ4[i - 1] < IQ4[i] - v {
                IQ4[i - 1]
            } else {
                IQ4[i]
            }
        }
    }
}

/// 4.25 bits: per 32 a 6-bit scale with sign, over an f16 factor per 256.
fn iq4_xs(x: &[f32]) -> Vec<f32> {
    let block = |x: &[f32]| {
        let scales: Vec<f32> = x.chunks(32).map(iq4_scale).collect();
        let d = -extreme(&scales) / 32.0;
        let (inverse, d) = (if d == 0.0 { 0.0 } else { 1.0 / d }, f16(d));
        let mut out = Vec::new();
        for (x, scale) in x.chunks(32).zip(scales) {
            let d = d * (inverse * scale).round_ties_even().clamp(-32.0, 31.0);
            out.extend(x.iter().map(|v| if d == 0.0 { 0.0 } else { d * nearest(v / d) }));
        }
        out
    };
    x.chunks(256).flat_map(block).collect()
}

/// The search for a scale of 32 numbers, whose weights are their squares.
fn iq4_scale(x: &[f32]) -> f32 {
    let max = extreme(x);
    if max.abs() < 1e-15 {
        return 0.0;
    }
    let sums = |inverse: f32| {
        x.iter().fold((0.0f32, 0.0f32), |(qx, q2), v| {
            let q = nearest(v * inverse);
            (qx + v * v * q * v, q2 + v * v * q * q)
        })
    };
    let (qx, q2) = sums(-IQ4[0] / max);
    let mut best = (qx / q2, qx * qx / q2);
    for step in -7..=7 {
        let (qx, q2) = sums((step as f32 + IQ4[0]) / max);
        if q2 > 0.0 && qx * qx > best.1 * q2 {
            best = (qx / q2, qx * qx / q2);
        }
    }
    best.0
}

/// 3.4375 bits: per 16 a 6-bit scale with sign, over an f16 factor per 256.
fn q3_k(x: &[f32]) -> Vec<f32> {
    let block = |x: &[f32]| {
        let scales: Vec<f32> = x.chunks(16).map(q3_scale).collect();
        let largest = extreme(&scales);
        let inverse = if largest == 0.0 { 0.0 } else { -32.0 / largest };
        let d = if largest == 0.0 { 0.0 } else { f16(1.0 / inverse) };
        let mut out = Vec::new();
        for (x, scale) in x.chunks(16).zip(scales) {
            let d = d * (inverse * scale).round_ties_even().clamp(-32.0, 31.0);
            let level = |v: &f32| if d == 0.0 { 0.0 } else { (v / d).round_ties_even().clamp(-4.0, 3.0) };
            out.extend(x.iter().map(|v| d * level(v)));
        }
        out
    };
    x.chunks(256).flat_map(block).collect()
}

/// `make_q3_quants` with least squares.
fn q3_scale(x: &[f32]) -> f32 {
    let max = extreme(x);
    if max.abs() < 1e-15 {
        return 0.0;
    }
    let level = |v: f32| v.round_ties_even().clamp(-4.0, 3.0);
    let mut l: Vec<f32> = x.iter().map(|v| level(-4.0 / max * v)).collect();
    let mut xl: f32 = x.iter().zip(&l).map(|(v, l)| v * v * v * l).sum();
    let mut l2: f32 = x.iter().zip(&l).map(|(v, l)| v * v * l * l).sum();
    for _ in 0..5 {
        let mut changed = false;
        for (v, l) in x.iter().zip(&mut l) {
            let w = v * v;
            let (mut slx, mut sl2) = (xl - w * v * *l, l2 - w * *l * *l);
            let new = if slx > 0.0 { level(v * sl2 / slx) } else { *l };
            if new != *l {
                (slx, sl2) = (slx + w * v * new, sl2 + w * new * new);
                if sl2 > 0.0 && slx * slx * l2 > xl * xl * sl2 {
                    (*l, xl, l2, changed) = (new, slx, sl2, true);
                }
            }
        }
        if !changed {
            break;
        }
    }
    if l2 > 0.0 { xl / l2 } else { 0.0 }
}
