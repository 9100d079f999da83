//! The same bits from every instruction set, thread count, and batch.

mod common;

use common::*;
use sluice_kernels::*;

/// Every combination of a few odd sizes with every type.
fn for_shapes(mut f: impl FnMut(WeightType, usize, usize, usize, &mut Rng)) {
    let mut rng = Rng(7);
    for ty in WeightType::ALL {
        for cols in [1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 131, 255, 257, 300] {
            for _ in 0..3 {
                let (rows, n) = (1 + rng.below(40), 1 + rng.below(9));
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
            for sign in [1.0, -1.0] {
                let x = activations(&vec![sign * 127.0; 9 * cols], 9, cols, Precision::Int8);
                let want: f32 = unpack(w)[..cols].iter().sum::<f32>() * 127.0 * sign;
                for k in Kernels::available() {
                    let y = matmul(k, &pool, w, &x);
                    assert!(y.iter().all(|&v| v == want), "{} {ty:?} {byte:#x}: {y:?} {want}", k.isa_name());
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
    for ty in WeightType::ALL {
        for (rows, cols, n) in [(203, 1030, 3), (1025, 700, 1), (77, 515, 70)] {
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
    for ty in WeightType::ALL {
        for (width, cols, n) in [(1usize, 7, 1), (8, 64, 3), (21, 130, 9), (40, 300, 2), (300, 512, 2)] {
            let rows = 2 * width.div_ceil(8) * 8;
            let data = matrix(ty, rows, cols, &mut rng);
            let w = Matrix::new(ty, rows, cols, &data).unwrap();
            let x = activations(&rng.vec(n * cols), n, cols, Precision::Int8);
            for act in [Activation::Silu, Activation::SwigluOai { alpha: 1.702, limit: 0.5 }] {
                let y = matmul(Kernels::scalar(), &pool, w, &x);
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
        for precision in PRECISIONS {
            // Half a step of 1/127 per activation, or the rounding of f32.
            let tolerance = if precision == Precision::Exact { 1e-6 } else { 0.5 / 127.0 + 1e-6 };
            let y = matmul(Kernels::scalar(), &pool, w, &activations(&x, n, cols, precision));
            for (i, &y) in y.iter().enumerate() {
                let (x, w) = (&x[i / rows * cols..][..cols], &numbers[i % rows * cols..][..cols]);
                let want: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                let size: f64 = w.iter().map(|&w| f64::from(w.abs())).sum();
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

/// Cached rows, length of a key and of a value, width of a row.
const ATTENTION_SHAPES: [(usize, usize, usize, usize); 12] = [
    (0, 8, 8, 8),
    (1, 5, 3, 9),
    (2, 1, 1, 1),
    (3, 31, 30, 31),
    (4, 32, 8, 32),
    (5, 48, 17, 65),
    (6, 96, 200, 200),
    (9, 33, 17, 40),
    (7, 128, 131, 131),
    (11, 250, 129, 251),
    (37, 64, 64, 80),
    (130, 576, 512, 576),
];

#[test]
fn attention_is_what_it_says() {
    let mut rng = Rng(6);
    for (s, k_dim, v_dim, stride) in ATTENTION_SHAPES {
        let (q, cache) = (rng.vec(k_dim), rng.vec(s * stride));
        let rows = KvRows::plain(&cache, stride);
        for sink in [None, Some(0.3f32)] {
            let (mut scores, mut out) = (vec![0.0; s + 1], vec![f32::NAN; v_dim]);
            Kernels::scalar().attend(&q, rows, rows, s, 0.2, sink, &mut scores, &mut out);
            let mut scores: Vec<f64> = (0..s)
                .map(|j| (0..k_dim).map(|i| f64::from(q[i]) * f64::from(cache[j * stride + i])).sum::<f64>() * 0.2)
                .map(f64::exp)
                .collect();
            let sum: f64 = scores.iter().sum::<f64>() + sink.map_or(0.0, |s| f64::from(s).exp());
            scores.iter_mut().for_each(|p| *p /= sum);
            for i in 0..v_dim {
                let want: f64 = (0..s).map(|j| scores[j] * f64::from(cache[j * stride + i])).sum();
                assert!((f64::from(out[i]) - want).abs() < 1e-5);
            }
        }
    }
}

/// Attention over `rows` on every instruction set is scalar attention over the f32 numbers that they stand for.
#[track_caller]
fn check_attention(q: &[f32], rows: KvRows<'_>, shape: (usize, usize, usize, usize), chosen: &[u32]) {
    let (s, _, v_dim, stride) = shape;
    let mut numbers = vec![0.0; s * stride];
    for j in 0..s {
        rows.read(j, &mut numbers[j * stride..][..stride]);
    }
    let plain = KvRows::plain(&numbers, stride);
    let attend = |k: Kernels, rows: KvRows<'_>, s: usize, sink| {
        let (mut scores, mut out) = (vec![0.0; s + 1], vec![f32::NAN; v_dim]);
        k.attend(q, rows, rows, s, 0.2, sink, &mut scores, &mut out);
        out
    };
    for sink in [None, Some(-0.4)] {
        let want = attend(Kernels::scalar(), plain, s, sink);
        let gathered: Vec<f32> =
            chosen.iter().flat_map(|&j| &numbers[j as usize * stride..][..stride]).copied().collect();
        let want_chosen = attend(Kernels::scalar(), KvRows::plain(&gathered, stride), chosen.len(), sink);
        for k in Kernels::available() {
            let what = format!("{} {} {shape:?}", k.isa_name(), rows.ty());
            assert_same(&attend(k, rows, s, sink), &want, &what);
            assert_same(&attend(k, rows.only(chosen), chosen.len(), sink), &want_chosen, &what);
        }
    }
    for k in Kernels::available() {
        check_queries_together(k, q, rows, s, v_dim);
        check_queries_together(k, q, rows.only(chosen), chosen.len(), v_dim);
    }
}

/// Several queries together have the bits that each has alone.
#[track_caller]
fn check_queries_together(k: Kernels, q: &[f32], rows: KvRows<'_>, s: usize, v_dim: usize) {
    for n in [1, 2, 5] {
        let queries: Vec<f32> = (0..n).flat_map(|i| q.iter().map(move |v| v * (i as f32 - 1.3))).collect();
        for sinks in [&[][..], &[0.2, -0.4, 0.1, 3.0, 0.0][..n]] {
            let (mut scores, mut together) = (vec![f32::NAN; n * (s + 1)], vec![f32::NAN; n * v_dim]);
            k.attend_together(&queries, n, rows, rows, s, 0.2, sinks, &mut scores, &mut together);
            for (i, (q, together)) in queries.chunks(q.len()).zip(together.chunks(v_dim)).enumerate() {
                let mut alone = vec![f32::NAN; v_dim];
                k.attend(q, rows, rows, s, 0.2, sinks.get(i).copied(), &mut scores, &mut alone);
                assert_same(together, &alone, &format!("{} {} query {i} of {n}, {s} rows", k.isa_name(), rows.ty()));
            }
        }
    }
}

#[test]
fn attention_over_every_type_equals_attention_over_its_numbers() {
    let mut rng = Rng(8);
    for shape in ATTENTION_SHAPES {
        let (s, k_dim, _, stride) = shape;
        let q = rng.vec(k_dim);
        let chosen: Vec<u32> = (0..s as u32).filter(|_| rng.below(3) > 0).collect();
        for ty in KvType::ALL {
            let mut buffer = KvBuffer::new(ty, s + 2, stride);
            for row in 0..s + 2 {
                buffer.set(row, &rng.vec(stride));
            }
            check_attention(&q, buffer.rows(1..s + 1), shape, &chosen);
        }
    }
}

#[test]
fn attention_over_arbitrary_bytes() {
    let mut rng = Rng(9);
    for shape in ATTENTION_SHAPES {
        let (s, k_dim, _, stride) = shape;
        let q = rng.vec(k_dim);
        for ty in [KvType::F16, KvType::Bf16, KvType::Q8] {
            let (values, scales) = packed_row(ty, stride);
            let (values, scales) = (rng.bytes(s * values), rng.bytes(s * scales));
            check_attention(&q, KvRows::packed(ty, stride, &values, &scales), shape, &[]);
        }
    }
}
