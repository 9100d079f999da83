//! What is packed comes out again.

use crate::common::*;
use sluice_kernels::*;

/// Packs row-major numbers group by group.
fn pack(ty: WeightType, src: &[f32], rows: usize, cols: usize) -> Vec<u8> {
    let mut out = vec![0xaa; packed_len(ty, rows, cols).unwrap()];
    for (group, rows) in out.chunks_exact_mut(row_group_len(ty, cols).unwrap()).zip(src.chunks(ROW_GROUP * cols)) {
        pack_row_group(ty, rows, rows.len() / cols, cols, group);
    }
    out
}

fn round_trip(ty: WeightType, src: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    unpack(Matrix::new(ty, rows, cols, &pack(ty, src, rows, cols)).unwrap())
}

#[test]
fn float_types_round_once() {
    let mut rng = Rng(1);
    for (rows, cols) in [(1, 1), (8, 32), (9, 33), (23, 130)] {
        let src = rng.vec(rows * cols);
        assert_eq!(round_trip(WeightType::F32, &src, rows, cols), src);
        let bf16: Vec<f32> = src.iter().map(|&v| bf16_to_f32(f32_to_bf16(v))).collect();
        assert_eq!(round_trip(WeightType::Bf16, &src, rows, cols), bf16);
        let f16: Vec<f32> = src.iter().map(|&v| f16_to_f32(f32_to_f16(v))).collect();
        assert_eq!(round_trip(WeightType::F16, &src, rows, cols), f16);
    }
}

#[test]
fn u16_bits_are_carried() {
    let cols = 8192;
    let src: Vec<u16> = (0..=u16::MAX).collect();
    let mut out = vec![0; row_group_len(WeightType::Bf16, cols).unwrap()];
    pack_row_group_u16(&src, 8, cols, &mut out);
    for (i, &bits) in src.iter().enumerate() {
        let at = (i % cols * 8 + i / cols) * 2;
        assert_eq!([out[at], out[at + 1]], bits.to_le_bytes());
    }
}

#[test]
fn q8_is_within_half_a_step() {
    let mut rng = Rng(2);
    for (rows, cols) in [(1, 1), (9, 33), (23, 130)] {
        for magnitude in [1e-8, 1e-7, 3e-6, 1e-4, 1.0, 1e5, 8.3e6] {
            let src: Vec<f32> = rng.vec(rows * cols).iter().map(|v| v * magnitude).collect();
            let got = round_trip(WeightType::Q8, &src, rows, cols);
            for (got, want) in got.chunks(cols).zip(src.chunks(cols)) {
                for (got, want) in got.chunks(BLOCK).zip(want.chunks(BLOCK)) {
                    let absmax = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                    // The step is the scale, which is at least the smallest f16 and rounded by at most one unit.
                    let step = (absmax / 127.0 * 1.001 + 6e-8).min(65504.0);
                    for (got, want) in got.iter().zip(want) {
                        assert!((got - want).abs() <= 0.502 * step, "{got} {want}, step {step}");
                    }
                }
            }
        }
    }
}

#[test]
fn q8_scales_at_the_ends_of_f16() {
    let mut src = [0.0; 32];
    assert_eq!(round_trip(WeightType::Q8, &src, 1, 32), [0.0; 32]);
    src[5] = -1e30;
    src[6] = 1e29;
    let got = round_trip(WeightType::Q8, &src, 1, 32);
    assert_eq!((got[5], got[6]), (-127.0 * 65504.0, 127.0 * 65504.0), "saturates");
    src = [1e-42; 32];
    assert_eq!(round_trip(WeightType::Q8, &src, 1, 32), [0.0; 32], "nearer to 0 than to the smallest f16");
    src = [0.0; 32];
    src[0] = 1.4 * 127.0 * 2f32.powi(-24);
    let got = round_trip(WeightType::Q8, &src, 1, 32)[0];
    assert!((got - src[0]).abs() <= 2f32.powi(-24), "a scale rounded down would clamp: {got} {}", src[0]);
    for bad in [f32::NAN, f32::INFINITY] {
        src[31] = bad;
        assert!(round_trip(WeightType::Q8, &src, 1, 32).iter().all(|v| v.is_nan()));
    }
}

#[test]
fn fp8_carries_every_code() {
    let cols = 256;
    let codes: Vec<u8> = (0..8 * cols).map(|i| (i % 256) as u8).collect();
    let mut out = vec![0; packed_len(WeightType::Fp8, 8, cols).unwrap()];
    pack_row_group_fp8(&codes, 8, cols, &[0.5, 3.0], &mut out);
    let got = unpack(Matrix::new(WeightType::Fp8, 8, cols, &out).unwrap());
    let want: Vec<f32> =
        (0..8 * cols).map(|i| e4m3_to_f32(codes[i]) * if i % cols < 128 { 0.5 } else { 3.0 }).collect();
    assert_same(&got, &want, &"fp8");
}

#[test]
fn every_isa_decodes_every_code() {
    let pool = ThreadPool::new(1);
    for (ty, cols) in [(WeightType::Fp8, 128), (WeightType::F16, 64), (WeightType::Bf16, 64)] {
        // A one-hot input reads a single column, unless another one holds NaN or an infinity; so one column per matrix.
        for high in (0..=255u8).step_by(if ty == WeightType::Fp8 { 256 } else { 1 }) {
            for low in 0..=255u8 {
                let mut out = vec![0; packed_len(ty, 16, 1).unwrap()];
                let group = out.len() / 2;
                for i in 0..16 {
                    let at = i / 8 * group + i % 8;
                    match ty {
                        WeightType::Fp8 => out[at + 64] = low,
                        _ => out[i / 8 * group + i % 8 * 2..][..2].copy_from_slice(&[low, high]),
                    }
                }
                if ty == WeightType::Fp8 {
                    out[..4].copy_from_slice(&1f32.to_le_bytes());
                    out[group..group + 4].copy_from_slice(&1f32.to_le_bytes());
                }
                let bits = u16::from_le_bytes([low, high]);
                let want = match ty {
                    WeightType::Fp8 => e4m3_to_f32(low),
                    WeightType::F16 => f16_to_f32(bits),
                    _ => bf16_to_f32(bits),
                };
                let w = Matrix::new(ty, 16, 1, &out).unwrap();
                let x = activations(&[1.0], 1, 1, Precision::Exact);
                for k in Kernels::available() {
                    let y = matmul(k, &pool, w, &x);
                    assert!(
                        y.iter().all(|&v| v == want || v.is_nan() && want.is_nan()),
                        "{ty:?} {bits:#x}, cols {cols}"
                    );
                }
            }
        }
    }
}

#[test]
fn nibbles_are_carried() {
    let mut rng = Rng(4);
    for (rows, cols) in [(1, 1usize), (3, 31), (8, 64), (8, 131)] {
        let blocks = cols.div_ceil(BLOCK);
        let codes: Vec<u8> = (0..rows * cols).map(|_| rng.below(16) as u8).collect();
        let scales: Vec<u16> = (0..rows * blocks).map(|_| f32_to_bf16(rng.f32())).collect();
        let mut out = vec![0; packed_len(WeightType::Int4, rows, cols).unwrap()];
        pack_row_group_int4(&codes, rows, cols, &scales, &mut out);
        let scale = |i: usize| i / cols * blocks + i % cols / BLOCK;
        let want: Vec<f32> =
            (0..codes.len()).map(|i| (f32::from(codes[i]) - 8.0) * bf16_to_f32(scales[scale(i)])).collect();
        assert_eq!(unpack(Matrix::new(WeightType::Int4, rows, cols, &out).unwrap()), want);

        let scales: Vec<u8> = (0..rows * blocks).map(|_| rng.below(256) as u8).collect();
        pack_row_group_mxfp4(
            &codes,
            rows,
            cols,
            &scales,
            &mut vec![0; packed_len(WeightType::Mxfp4, rows, cols).unwrap()],
        );
        let mut out = vec![0; packed_len(WeightType::Mxfp4, rows, cols).unwrap()];
        pack_row_group_mxfp4(&codes, rows, cols, &scales, &mut out);
        let want: Vec<f32> =
            (0..codes.len()).map(|i| E2M1[codes[i] as usize] * e8m0_to_f32(scales[scale(i)])).collect();
        assert_same(&unpack(Matrix::new(WeightType::Mxfp4, rows, cols, &out).unwrap()), &want, &"mxfp4");
    }
}

#[test]
fn batched_matrices_follow_one_another() {
    let mut rng = Rng(6);
    let parts: Vec<_> = (0..3).map(|_| matrix(WeightType::Q8, 9, 40, &mut rng)).collect();
    let all = parts.concat();
    for (i, part) in parts.iter().enumerate() {
        let w = Matrix::batched(WeightType::Q8, 3, 9, 40, &all, i).unwrap();
        assert_eq!(unpack(w), unpack(Matrix::new(WeightType::Q8, 9, 40, part).unwrap()));
    }
}
