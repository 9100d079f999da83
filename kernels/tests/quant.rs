//! The types that are quantised by minimising an error: `q4`, `q3` and `q2`.

use crate::common::*;
use sluice_kernels::*;

const TYPES: [WeightType; 3] = [WeightType::Q4, WeightType::Q3, WeightType::Q2];

/// Levels, step of the offsets and columns of a block, as `docs/QUANTISATION.md` gives them.
fn book(ty: WeightType) -> (&'static [f32], f32, usize) {
    match ty {
        WeightType::Q4 => {
            let levels =
                &[-64.0, -48.0, -38.0, -30.0, -23.0, -16.0, -9.0, -3.0, 3.0, 9.0, 16.0, 23.0, 30.0, 39.0, 49.0, 64.0];
            (levels, 2.0, 32)
        }
        WeightType::Q2 => {
            let levels =
                &[-64.0, -8.0, 46.0, 16.0, -8.0, 31.0, 9.0, -26.0, 26.0, -9.0, -31.0, 8.0, -16.0, -46.0, 8.0, 64.0];
            (levels, 4.0, 16)
        }
        _ => (&[-64.0, -39.0, -22.0, -7.0, 7.0, 22.0, 39.0, 64.0], 4.0, 16),
    }
}

/// The integer that the low five bits of a byte represent.
fn scale(byte: u8) -> f32 {
    let (e, m) = (byte >> 3 & 3, f32::from(byte & 7));
    if e == 0 { m } else { (8.0 + m) * f32::from(1u8 << (e - 1)) }
}

fn pack(ty: WeightType, src: &[f32], cols: usize, importance: Option<&[f32]>) -> Vec<u8> {
    let mut out = vec![0xaa; packed_len(ty, src.len() / cols, cols).unwrap()];
    for (group, rows) in out.chunks_exact_mut(row_group_len(ty, cols).unwrap()).zip(src.chunks(ROW_GROUP * cols)) {
        pack_row_group_weighted(ty, rows, rows.len() / cols, cols, importance, group);
    }
    out
}

fn round_trip(ty: WeightType, src: &[f32], cols: usize, importance: Option<&[f32]>) -> Vec<f32> {
    unpack(Matrix::new(ty, src.len() / cols, cols, &pack(ty, src, cols, importance)).unwrap())
}

fn error(got: &[f32], want: &[f32], importance: impl Fn(usize) -> f64) -> f64 {
    got.iter().zip(want).enumerate().map(|(k, (g, w))| importance(k) * (f64::from(*g) - f64::from(*w)).powi(2)).sum()
}

/// The sum of twelve uniform numbers is nearly normal.
fn normal(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| (0..12).map(|_| rng.f32() * 0.5).sum()).collect()
}

#[test]
fn relative_error_on_normal_weights() {
    let src = normal(&mut Rng(1), 64 * 1024);
    for (ty, most) in [(WeightType::Q4, 0.0715), (WeightType::Q3, 0.124), (WeightType::Q2, 0.2525)] {
        let got = round_trip(ty, &src, 1024, None);
        let relative = (error(&got, &src, |_| 1.0) / error(&vec![0.0; src.len()], &src, |_| 1.0)).sqrt();
        assert!(relative < most, "{ty:?}: {relative}");
    }
}

#[test]
fn bytes_mean_what_the_documents_say() {
    let mut rng = Rng(2);
    for ty in TYPES {
        let (levels, step, block) = book(ty);
        for (rows, cols) in [(8, 64), (3, 33), (8, 131), (1, 1usize)] {
            let mut data = rng.bytes(packed_len(ty, rows, cols).unwrap());
            for r in 0..8 {
                data[4 * r..][..4].copy_from_slice(&rng.f32().to_le_bytes());
            }
            let scales = 32 + 8 * cols.div_ceil(32) * (32 / block);
            let values = &data[scales.next_multiple_of(64)..];
            let want = |r: usize, k: usize| {
                let (g, q, i) = (k / 32, k % 32 / 4, k % 4);
                let nibble = |v: usize, len: usize| values[g * len + v * 32 + r * 4 + i] >> (q / 4 * 4) & 15;
                let word =
                    |half: usize| u32::from_le_bytes(*values[g * 64 + half * 32 + r * 4..].first_chunk().unwrap());
                let number = match (ty, q % 4) {
                    // Two bits for each place of the ring; four bits form a number.
                    (WeightType::Q2, v) => (word(q / 4).rotate_right((8 * i + 2 * v) as u32) & 15) as u8,
                    (WeightType::Q4, v) => nibble(v, 128),
                    (_, 3) => (0..3).map(|v| nibble(v, 96) >> 3 << v).sum(),
                    (_, v) => nibble(v, 96) & 7,
                };
                let byte = data[32 + k / block * 8 + r];
                let integer = levels[usize::from(number)] + step * (f32::from(byte >> 5) - 3.5);
                let row = f32::from_le_bytes(*data[4 * r..].first_chunk().unwrap());
                row * (scale(byte) * integer)
            };
            let want: Vec<f32> = (0..rows * cols).map(|j| want(j / cols, j % cols)).collect();
            assert_same(&unpack(Matrix::new(ty, rows, cols, &data).unwrap()), &want, &format!("{ty:?} {cols}"));
        }
    }
}

/// Rounding to the nearest level, with scales that just reach the largest weight of row and block.
fn nearest(ty: WeightType, row: &[f32]) -> Vec<f32> {
    let (levels, step, block) = book(ty);
    let absmax = |x: &[f32]| x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let unit = absmax(row) / (64.0 * 60.0);
    let mut out = Vec::new();
    for x in row.chunks(block) {
        let byte = (0..32).find(|&b| scale(b) * unit * 64.0 >= absmax(x)).unwrap_or(31);
        let d = scale(byte) * unit;
        for &x in x {
            let values = levels.iter().map(|level| d * (level + 0.5 * step));
            out.push(values.min_by(|a, b| (a - x).abs().total_cmp(&(b - x).abs())).unwrap());
        }
    }
    out
}

/// For the types whose levels represent one number each.
#[test]
fn never_worse_than_rounding_to_nearest() {
    let mut rng = Rng(3);
    for ty in [WeightType::Q4, WeightType::Q3] {
        for cols in [1, 5, 16, 31, 33, 128, 300] {
            for i in 0..40 {
                let mut row = normal(&mut rng, cols);
                let outlier = rng.below(cols);
                row[outlier] *= [1.0, 4.0, 50.0, 1e4][i % 4];
                let got = error(&round_trip(ty, &row, cols, None), &row, |_| 1.0);
                let plain = error(&nearest(ty, &row), &row, |_| 1.0);
                assert!(got <= plain * 1.000_01, "{ty:?}, {cols} columns: {got} {plain}");
            }
        }
    }
}

#[test]
fn importance_lowers_the_error_that_it_weighs() {
    let mut rng = Rng(4);
    for ty in TYPES {
        let cols = 256;
        let importance: Vec<f32> = normal(&mut rng, cols).iter().map(|v| 1e6 * (2.0 * v).exp()).collect();
        let weigh = |k: usize| f64::from(importance[k % cols]);
        let (mut with, mut without) = (0.0, 0.0);
        for _ in 0..50 {
            let row = normal(&mut rng, cols);
            let a = error(&round_trip(ty, &row, cols, Some(&importance)), &row, weigh);
            let b = error(&round_trip(ty, &row, cols, None), &row, weigh);
            assert!(a <= b * 1.02, "{ty:?}: {a} {b}");
            (with, without) = (with + a, without + b);
        }
        assert!(with < 0.9 * without, "{ty:?}: {with} of {without}");
    }
}

#[test]
fn equal_importance_is_no_importance() {
    let src = normal(&mut Rng(5), 9 * 100);
    for ty in TYPES {
        let plain = pack(ty, &src, 100, None);
        for value in [0.0, 1e-45, 1.0, 3e38] {
            assert_eq!(pack(ty, &src, 100, Some(&[value; 100])), plain, "{ty:?} {value}");
        }
    }
    let q8 = pack(WeightType::Q8, &src, 100, None);
    assert_eq!(pack(WeightType::Q8, &src, 100, Some(&[2.0; 100])), q8);
}

#[test]
fn columns_of_no_importance_do_not_decide() {
    let mut rng = Rng(6);
    for ty in TYPES {
        let mut row = normal(&mut rng, 64);
        let importance: Vec<f32> = (0..64).map(|k| if k % 16 == 3 { 0.0 } else { 1.0 }).collect();
        let weigh = |k: usize| f64::from(importance[k]);
        let before = error(&round_trip(ty, &row, 64, Some(&importance)), &row, weigh);
        (3..64).step_by(16).for_each(|k| row[k] = 5.0);
        let after = error(&round_trip(ty, &row, 64, Some(&importance)), &row, weigh);
        assert!(after <= 1.5 * before, "{ty:?}: {after} {before}");
    }
}

#[test]
fn zero_stays_zero() {
    let mut rng = Rng(7);
    for ty in TYPES {
        let mut src = normal(&mut rng, 3 * 70);
        src[70..140].fill(0.0);
        src[32..64].fill(0.0);
        let got = round_trip(ty, &src, 70, None);
        assert!(got[70..140].iter().chain(&got[32..64]).all(|&v| v == 0.0), "{ty:?}");
        assert!(got[..32].iter().chain(&got[140..]).any(|&v| v != 0.0));
        assert_eq!(pack(ty, &src, 70, None).len(), packed_len(ty, 3, 70).unwrap());
        pack_row_group(ty, &[], 0, 70, &mut vec![1; row_group_len(ty, 70).unwrap()]);
        pack_row_group(ty, &[], 5, 0, &mut vec![1; row_group_len(ty, 0).unwrap()]);
    }
}

#[test]
fn any_magnitude() {
    let mut rng = Rng(8);
    for ty in TYPES {
        let src = normal(&mut rng, 8 * 96);
        let want = error(&round_trip(ty, &src, 96, None), &src, |_| 1.0);
        for e in [-149, -140, -126, -100, -30, 0, 60, 100, 124] {
            let factor = 2f64.powi(e);
            let moved: Vec<f32> = src.iter().map(|&v| (f64::from(v) * factor) as f32).collect();
            let got = round_trip(ty, &moved, 96, None);
            assert!(got.iter().all(|v| v.is_finite()), "{ty:?} 2^{e}");
            if e >= -100 {
                assert_eq!(error(&got, &moved, |_| 1.0) / factor / factor, want, "{ty:?} 2^{e}");
            }
        }
        assert!(round_trip(ty, &[f32::MAX; 48], 48, None).iter().all(|v| (v / f32::MAX - 1.0).abs() < 0.02));
        assert!(round_trip(ty, &[f32::MIN_POSITIVE, f32::MAX, -f32::MAX], 3, None).iter().all(|v| v.is_finite()));
    }
}

#[test]
fn what_is_no_number_is_not_mistaken_for_one() {
    for ty in TYPES {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut src = vec![1.0; 3 * 40];
            src[79] = bad;
            let got = round_trip(ty, &src, 40, None);
            assert!(got[40..80].iter().all(|v| v.is_nan()), "{ty:?}");
            assert!(got[..40].iter().chain(&got[80..]).all(|v| v.is_finite()));
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let src = normal(&mut Rng(9), 8 * 77);
    for ty in TYPES {
        let all = round_trip(ty, &src, 77, None);
        assert_eq!(all, round_trip(ty, &src, 77, None));
        for r in 0..8 {
            let row = &src[r * 77..][..77];
            assert_eq!(round_trip(ty, row, 77, None), all[r * 77..][..77]);
        }
    }
}

#[test]
fn extreme_integers_do_not_saturate() {
    let pool = ThreadPool::new(1);
    let cols = 64;
    for ty in TYPES {
        for byte in [0u8, 0x07, 0x70, 0x77, 0x80, 0x88, 0xf0, 0x0f, 0xff, 0x3c] {
            for code in [8, 7 << 5 | 8, 3 << 5 | 31] {
                let mut data = vec![byte; packed_len(ty, 16, cols).unwrap()];
                let group = data.len() / 2;
                for r in 0..16 {
                    data[r / 8 * group + r % 8 * 4..][..4].copy_from_slice(&1f32.to_le_bytes());
                }
                (0..2).for_each(|g| data[g * group + 32..][..8 * 64 / book(ty).2].fill(code));
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
}
