//! Error feedback: packing that knows how inputs vary together.

use crate::common::*;
use sluice_kernels::*;

/// Twelve uniform numbers make a normal one.
fn normal(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| (0..12).map(|_| rng.f32() * 0.5).sum()).collect()
}

/// Inputs whose columns vary together, as they do in models: a few directions carry most of them.
fn correlated(tokens: usize, cols: usize, seed: u64) -> Activations {
    let mut rng = Rng(seed);
    let directions = normal(&mut rng, 8 * cols);
    let mut x = Vec::new();
    for _ in 0..tokens {
        let (amounts, noise) = (normal(&mut rng, 8), normal(&mut rng, cols));
        x.extend((0..cols).map(|j| {
            let sum: f32 = amounts.iter().enumerate().map(|(d, a)| 2.0 * a * directions[d * cols + j]).sum();
            sum + noise[j]
        }));
    }
    let mut inputs = Activations::new(Precision::Exact);
    inputs.set(&x, tokens, cols);
    inputs
}

fn packed(ty: WeightType, rows: &Quantised, n: usize, cols: usize) -> Vec<f32> {
    let mut values = Vec::new();
    for first in (0..n).step_by(8) {
        let count = (n - first).min(8);
        let mut group = vec![0; row_group_len(ty, cols).unwrap()];
        rows.pack_row_group(first, count, &mut group);
        values.extend(unpack(Matrix::new(ty, count, cols, &group).unwrap()));
    }
    values
}

/// Mean square error of the outputs.
fn output_error(x: &Activations, w: &[f32], stored: &[f32]) -> f64 {
    let cols = x.cols();
    let of_row = |(w, stored): (&[f32], &[f32])| -> f64 {
        let error = |t: usize| -> f64 {
            x.row(t).iter().zip(w.iter().zip(stored)).map(|(&x, (&w, &s))| f64::from(x) * f64::from(w - s)).sum()
        };
        (0..x.n()).map(|t| error(t).powi(2)).sum()
    };
    w.chunks_exact(cols).zip(stored.chunks_exact(cols)).map(of_row).sum()
}

#[test]
fn feedback_lowers_the_error_of_outputs() {
    let kernels = Kernels::detect().unwrap();
    let pool = ThreadPool::new(2);
    for (cols, panel) in [(288, 2048), (304, 96), (40, 64)] {
        let all = correlated(1800, cols, 5);
        let half = |first: usize| {
            let mut half = Activations::new(Precision::Exact);
            half.gather(&all, &(first as u32..first as u32 + 900).collect::<Vec<_>>());
            half
        };
        let (seen, unseen) = (half(0), half(900));
        let mut moments = Moments::new(cols, panel);
        moments.add(&kernels, &pool, &seen);
        let feedback = Feedback::new(kernels, &moments).unwrap();
        let w: Vec<f32> = normal(&mut Rng(9), 12 * cols).iter().map(|w| 0.02 * w).collect();
        for (ty, share) in [(WeightType::Q4, 0.8), (WeightType::Q3, 0.8), (WeightType::Q2, 0.8)] {
            let mut scratch = FeedbackScratch::default();
            let rows = feedback.quantise(ty, &w, &mut scratch);
            let plain: Vec<f32> = w
                .chunks(8 * cols)
                .flat_map(|w| {
                    let mut group = vec![0; row_group_len(ty, cols).unwrap()];
                    let importance = moments.mean_squares();
                    pack_row_group_weighted(ty, w, w.len() / cols, cols, Some(&importance), &mut group);
                    unpack(Matrix::new(ty, w.len() / cols, cols, &group).unwrap())
                })
                .collect();
            let stored = packed(ty, &rows, 12, cols);
            let (before, after) = (output_error(&unseen, &w, &plain), output_error(&unseen, &w, &stored));
            println!("{ty:?} {cols} columns, panels of {panel}: {:.3}", after / before);
            assert!(after < share * before, "{ty:?} {cols}: {after} beside {before}");
            // A row does not depend on those that are quantised with it.
            let alone = feedback.quantise(ty, &w[5 * cols..6 * cols], &mut scratch);
            assert_eq!(packed(ty, &alone, 1, cols), stored[5 * cols..6 * cols]);
        }
    }
}

#[test]
fn feedback_takes_any_numbers() {
    let kernels = Kernels::detect().unwrap();
    let cols = 64;
    let mut moments = Moments::new(cols, 64);
    assert!(Feedback::new(kernels, &moments).is_none(), "nothing was seen");
    moments.add(&kernels, &ThreadPool::new(1), &correlated(10, cols, 1));
    let feedback = Feedback::new(kernels, &moments).unwrap();
    let mut w = vec![0.0f32; 5 * cols];
    w[..cols].iter_mut().enumerate().for_each(|(i, w)| *w = if i % 2 == 0 { f32::MAX } else { -f32::MAX });
    w[cols] = f32::NAN;
    w[2 * cols..3 * cols].fill(f32::MIN_POSITIVE);
    w[4 * cols + 3] = f32::from_bits(1);
    for ty in [WeightType::Q4, WeightType::Q3, WeightType::Q2] {
        let stored = packed(ty, &feedback.quantise(ty, &w, &mut FeedbackScratch::default()), 5, cols);
        assert!(stored[..cols].iter().all(|v| v.is_finite()));
        assert!(stored[cols..2 * cols].iter().all(|v| v.is_nan()));
        assert!(stored[2 * cols..].iter().all(|v| v.is_finite()));
        assert!(stored[3 * cols..4 * cols].iter().all(|&v| v == 0.0));
    }
    let mut nothing = Moments::new(cols, 64);
    let mut bad = Activations::new(Precision::Exact);
    bad.set(&vec![f32::NAN; cols], 1, cols);
    nothing.add(&kernels, &ThreadPool::new(1), &bad);
    assert!(Feedback::new(kernels, &nothing).is_none());
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let cols = 200;
    let x = correlated(300, cols, 3);
    let w = normal(&mut Rng(4), 21 * cols);
    for ty in [WeightType::Q4, WeightType::Q3] {
        let of = |kernels: Kernels| {
            let mut moments = Moments::new(cols, 160);
            moments.add(&kernels, &ThreadPool::new(2), &x);
            let feedback = Feedback::new(kernels, &moments).unwrap();
            packed(ty, &feedback.quantise(ty, &w, &mut FeedbackScratch::default()), 21, cols)
        };
        let all: Vec<Vec<f32>> = Kernels::available().into_iter().map(of).collect();
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{ty:?}");
    }
}
