//! The same bits from every instruction set, thread count, and batch.

use crate::common::*;
use sluice_kernels::*;

/// Every combination of a few odd sizes with every type.
fn for_shapes(mut f: impl FnMut(WeightType, usize, usize, usize, &mut Rng)) {
    let mut rng = Rng(7);
    for ty in WeightType::all() {
        for cols in [1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 131, 255, 257, 300] {
            for _ in 0..3 {
                let (rows, n) = (1 + rng.below(40), 1 + rng.below(9));
                let cols = cols_of(ty, cols);
                f(ty, rows, cols, n, &mut rng);
            }
        }
    }
}

#[test]
fn every_isa_equals_scalar() {
    let pool = ThreadPool::new(1);
    for_shapes(|ty, rows, cols, n, rng| {
        let data = matrix(ty, rows, cols, rng);
        let w = Matrix::new(ty, rows, cols, &data).unwrap();
        let x = rng.vec(n * cols);
        for precision in PRECISIONS {
            let x = activations(&x, n, cols, precision);
            let want = matmul(Kernels::scalar(), &pool, w, &x);
            assert!(want.iter().all(|v| v.is_finite()));
            for k in Kernels::available() {
                let what = format!("{} {ty:?} {precision:?} {rows}x{cols}, {n} tokens", k.isa_name());
                assert_same(&matmul(k, &pool, w, &x), &want, &what);
            }
        }
    });
}

#[test]
fn every_isa_equals_scalar_on_arbitrary_bytes() {
    let pool = ThreadPool::new(1);
    for_shapes(|ty, rows, cols, n, rng| {
        let data = rng.bytes(packed_len(ty, rows, cols).unwrap());
        let w = Matrix::new(ty, rows, cols, &data).unwrap();
        let mut x = rng.vec(n * cols);
        let at = rng.below(x.len());
        x[at] = [f32::NAN, f32::INFINITY, 1e-42, 0.0][rng.below(4)];
        for precision in PRECISIONS {
            let x = activations(&x, n, cols, precision);
            let want = matmul(Kernels::scalar(), &pool, w, &x);
            for k in Kernels::available() {
                let what = format!("{} {ty:?} {precision:?} {rows}x{cols}, {n} tokens", k.isa_name());
                assert_same(&matmul(k, &pool, w, &x), &want, &what);
            }
        }
    });
}

#[test]
fn extreme_integers_do_not_saturate() {
    let pool = ThreadPool::new(1);
    let cols = 64;
    for ty in [WeightType::Q8, WeightType::Int4, WeightType::Mxfp4] {
        for byte in 0..=255u8 {
            let mut data = vec![byte; packed_len(ty, 16, cols).unwrap()];
            let len = data.len() / 2;
            for group in data.chunks_mut(len) {
                // Scales of 1, so that sums are whole numbers.
                match ty {
                    WeightType::Q8 => group[..64].copy_from_slice(&0x3c00u16.to_le_bytes().repeat(32)),
                    WeightType::Int4 => group[..64].copy_from_slice(&0x3f80u16.to_le_bytes().repeat(32)),
                    _ => group[..64].fill(127),
                }
            }
            let w = Matrix::new(ty, 16, cols, &data).unwrap();
            // One token, a few and many take different paths.
            for (sign, n) in [(1.0, 1), (-1.0, 1), (1.0, 3), (-1.0, 3), (1.0, 9), (-1.0, 9)] {
                let x = activations(&vec![sign * 127.0; n * cols], n, cols, Precision::Int8);
                let want: f32 = unpack(w)[..cols].iter().sum::<f32>() * 127.0 * sign;
                for k in Kernels::available() {
                    let y = matmul(k, &pool, w, &x);
                    assert!(y.iter().all(|&v| v == want), "{} {ty:?} {byte:#x}: {y:?} {want}", k.isa_name());
                }
            }
        }
    }
}

/// Integers and activations that alternate between both ends, so that pairs of products are as far from zero as they can be, on either
/// side; and counts of tokens of which every path has some, with and without a rest.
#[test]
fn alternating_extremes_equal_scalar() {
    let pool = ThreadPool::new(1);
    let cols = 64;
    for ty in [WeightType::Q8, WeightType::Q4, WeightType::Q3, WeightType::Q2, WeightType::Int4, WeightType::Mxfp4] {
        for bytes in [[0x80, 0x7f], [0x7f, 0x80], [0xf0, 0x0f], [0xff, 0x00]] {
            let mut data: Vec<u8> = bytes.into_iter().cycle().take(packed_len(ty, 16, cols).unwrap()).collect();
            let len = data.len() / 2;
            // Scales that are numbers, and codes of blocks that differ by row and half.
            data.chunks_mut(len)
                .for_each(|group| group[..64].iter_mut().enumerate().for_each(|(i, b)| *b = 0x24 ^ (i % 7) as u8));
            let w = Matrix::new(ty, 16, cols, &data).unwrap();
            for n in [1, 3, 5, 7, 38] {
                let x: Vec<f32> = (0..n * cols).map(|i| if (i + i / cols) % 2 == 0 { 127.0 } else { -127.0 }).collect();
                let x = activations(&x, n, cols, Precision::Int8);
                let want = matmul(Kernels::scalar(), &pool, w, &x);
                assert!(want.iter().all(|v| v.is_finite()));
                for k in Kernels::available() {
                    assert_same(
                        &matmul(k, &pool, w, &x),
                        &want,
                        &format!("{} {ty:?} {bytes:?}, {n} tokens", k.isa_name()),
                    );
                }
            }
        }
    }
}

#[test]
fn a_batch_equals_its_tokens() {
    let pool = ThreadPool::new(2);
    for_shapes(|ty, rows, cols, n, rng| {
        let n = n + 60 * rng.below(3);
        let data = matrix(ty, rows, cols, rng);
        let w = Matrix::new(ty, rows, cols, &data).unwrap();
        let x = rng.vec(n * cols);
        for precision in PRECISIONS {
            for k in Kernels::available().into_iter().skip(1) {
                let batch = matmul(k, &pool, w, &activations(&x, n, cols, precision));
                for (t, want) in batch.chunks_exact(rows).enumerate() {
                    let one = activations(&x[t * cols..][..cols], 1, cols, precision);
                    let what = format!("{} {ty:?} {precision:?} {rows}x{cols}, token {t} of {n}", k.isa_name());
                    assert_same(&matmul(k, &pool, w, &one), want, &what);
                }
            }
        }
    });
}

#[test]
fn threads_do_not_matter() {
    let mut rng = Rng(3);
    let pools = [1, 2, 3].map(ThreadPool::new);
    for ty in WeightType::all() {
        // Work is distributed without regard to the type, so one shape that takes several tasks is enough for published forms,
        // whose scalar code is slow.
        let shapes: &[_] = match ty {
            WeightType::Grouped(_) => &[(77, 515, 17)],
            _ => &[(203, 1030, 3), (1025, 700, 1), (77, 515, 70)],
        };
        for &(rows, cols, n) in shapes {
            let cols = cols_of(ty, cols);
            let data = matrix(ty, rows, cols, &mut rng);
            let w = Matrix::new(ty, rows, cols, &data).unwrap();
            let x = activations(&rng.vec(n * cols), n, cols, Precision::Int8);
            for k in Kernels::available() {
                let want = matmul(k, &pools[0], w, &x);
                for pool in &pools[1..] {
                    assert_same(&matmul(k, pool, w, &x), &want, &format!("{} threads", pool.threads()));
                }
            }
        }
    }
}

#[test]
fn gate_up_equals_two_products_and_an_activation() {
    let mut rng = Rng(11);
    let pool = ThreadPool::new(2);
    for ty in WeightType::all() {
        for (width, cols, n) in [(1usize, 7, 1), (8, 64, 3), (21, 130, 9), (40, 300, 2), (300, 512, 2)] {
            let cols = cols_of(ty, cols);
            let rows = 2 * width.div_ceil(8) * 8;
            let data = matrix(ty, rows, cols, &mut rng);
            let w = Matrix::new(ty, rows, cols, &data).unwrap();
            let x = activations(&rng.vec(n * cols), n, cols, Precision::Int8);
            let y = matmul(Kernels::scalar(), &pool, w, &x);
            for act in [Activation::Silu, Activation::SwigluOai { alpha: 1.702, limit: 0.5 }, Activation::GeluTanh] {
                let value = |t: usize, i: usize, up: usize| y[t * rows + (2 * (i / 8) + up) * 8 + i % 8];
                let want: Vec<f32> = (0..n * width)
                    .map(|j| act.apply(value(j / width, j % width, 0), value(j / width, j % width, 1)))
                    .collect();
                for k in Kernels::available() {
                    let mut h = vec![f32::NAN; n * width];
                    k.gate_up(&pool, w, width, act, &x, &mut h);
                    assert_same(&h, &want, &format!("{} {ty:?} width {width}", k.isa_name()));
                }
            }
        }
    }
}

#[test]
fn matvec_f32_equals_the_exact_product() {
    let pool = ThreadPool::new(1);
    let mut scratch = Activations::new(Precision::Int8);
    for_shapes(|ty, rows, cols, _, rng| {
        let data = matrix(ty, rows, cols, rng);
        let w = Matrix::new(ty, rows, cols, &data).unwrap();
        let x = rng.vec(cols);
        let want = matmul(Kernels::scalar(), &pool, w, &activations(&x, 1, cols, Precision::Exact));
        for k in Kernels::available() {
            let mut y = vec![f32::NAN; rows];
            k.matvec_f32(w, &x, &mut y, &mut scratch);
            assert_same(&y, &want, &format!("{} {ty:?} {rows}x{cols}", k.isa_name()));
        }
    });
}

#[test]
fn products_are_close_to_f64() {
    let pool = ThreadPool::new(1);
    for_shapes(|ty, rows, cols, n, rng| {
        let data = matrix(ty, rows, cols, rng);
        let w = Matrix::new(ty, rows, cols, &data).unwrap();
        let x = rng.vec(n * cols);
        let numbers = unpack(w);
        // If a scaled code and a bias cancel, a weight is smaller than the numbers that were rounded in between.
        let cancels = matches!(ty, WeightType::Grouped(_));
        let largest = numbers.iter().fold(0.0f32, |m, w| m.max(w.abs()));
        let least = if cancels { 0.1 * largest } else { 0.0 };
        for precision in PRECISIONS {
            // Half a step of 1/127 per activation, or the rounding of f32.
            let tolerance = if precision == Precision::Exact { 1e-6 } else { 0.5 / 127.0 + 1e-6 };
            let y = matmul(Kernels::scalar(), &pool, w, &activations(&x, n, cols, precision));
            for (i, &y) in y.iter().enumerate() {
                let (x, w) = (&x[i / rows * cols..][..cols], &numbers[i % rows * cols..][..cols]);
                let want: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                let size: f64 = w.iter().map(|&w| f64::from(w.abs().max(least))).sum();
                assert!((f64::from(y) - want).abs() <= tolerance * size + 1e-30, "{ty:?} {precision:?}: {y} {want}");
            }
        }
    });
}

#[test]
fn dot_and_axpy() {
    let mut rng = Rng(5);
    for len in (0..140).chain([576, 1001]) {
        let (a, b) = (rng.vec(len), rng.vec(len));
        let mut y = rng.vec(len);
        let before = y.clone();
        let want = Kernels::scalar().dot(&a, &b);
        Kernels::scalar().axpy(0.7, &a, &mut y);
        for k in Kernels::available() {
            assert_same(&[k.dot(&a, &b)], &[want], &len);
            let mut got = before.clone();
            k.axpy(0.7, &a, &mut got);
            assert_same(&got, &y, &len);
        }
    }
}
