//! Codes of a few bits with scales per group, against the formulas of the tools that publish them.

use crate::common::*;
use sluice_kernels::*;
use sluice_weights::{Codes, GroupSize, Grouped, SUPER_BLOCK, ScaleType, Scales, Super, Zero};

/// The published types, and every other pair of codes and scales that there can be. Codes of grids have a test of their own.
fn types() -> impl Iterator<Item = Grouped> {
    let published = Grouped::PUBLISHED.iter().map(|&(_, ty)| ty);
    let codes = [2, 3, 4, 5, 6, 8].map(Codes::Uint).into_iter().chain([Codes::E2m1, Codes::E4m3, Codes::Iq4nl]);
    let columns = [16, 32, 64, 128].map(GroupSize::Columns).into_iter().chain([GroupSize::Row]);
    let scale = [ScaleType::F16, ScaleType::Bf16, ScaleType::F32, ScaleType::E4m3, ScaleType::E8m0];
    let zero = [Zero::None, Zero::Byte, Zero::Bias, Zero::Float];
    let scales = columns.flat_map(move |columns| {
        let zeros = move |scale| zero.map(|zero| Scales::Groups { columns, scale, zero });
        scale.into_iter().flat_map(zeros)
    });
    let scales: Vec<_> = scales.collect();
    let all = codes.flat_map(move |codes| scales.clone().into_iter().filter_map(move |s| Grouped::new(codes, s)));
    published.filter(|ty| !ty.codes().is_grid()).chain(all)
}

fn half(bytes: &[u8], i: usize) -> f64 {
    f64::from(f16_to_f32(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])))
}

fn scale(ty: ScaleType, bytes: &[u8]) -> f64 {
    f64::from(match ty {
        ScaleType::F16 => f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]])),
        ScaleType::Bf16 => bf16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]])),
        ScaleType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        ScaleType::E4m3 => e4m3_to_f32(bytes[0]),
        ScaleType::E8m0 => e8m0_to_f32(bytes[0]),
    })
}

/// The weight of column `k` of row `r`, as the format defines it, from what the source holds.
fn weight(ty: Grouped, rows: &Rows, cols: usize, r: usize, k: usize) -> f64 {
    const IQ4NL: [i32; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
    let code = rows.codes[r * cols + k];
    let row = &rows.scales[r * ty.scale_row(cols).unwrap()..];
    let c = match ty.codes() {
        Codes::Uint(_) => f64::from(code),
        Codes::E2m1 => f64::from(E2M1[usize::from(code)]),
        Codes::E4m3 => f64::from(e4m3_to_f32(code)),
        _ => f64::from(IQ4NL[usize::from(code)]),
    };
    match ty.scales() {
        Scales::Groups { columns, scale: of, zero } => {
            let group = match columns {
                GroupSize::Columns(columns) => k / usize::from(columns),
                GroupSize::Row => 0,
            };
            let beside = [0, 1, of.len(), of.len()][zero as usize];
            let group = &row[group * (of.len() + beside)..];
            let (s, z) = (scale(of, group), &group[of.len()..]);
            let factor = rows.factors.get(r).map_or(1.0, |f| f64::from(*f));
            match (zero, ty.codes()) {
                (Zero::None, Codes::Uint(bits)) => s * (c - f64::from(1 << (bits - 1))),
                (Zero::None, _) => factor * s * c,
                (Zero::Byte, _) => s * (c - f64::from(z[0])),
                (Zero::Bias, _) => s * c + scale(of, z),
                (Zero::Float, _) => s * (c - scale(of, z)),
            }
        }
        Scales::Super(scales) => {
            let (block, k) = (&row[k / SUPER_BLOCK * scales.row_len()..], k % SUPER_BLOCK);
            let (d, dmin) = (half(block, 0), if scales.has_min() { half(block, 1) } else { 0.0 });
            match scales {
                Super::Plain => d * (c - 1.0),
                Super::SixMin => {
                    let (s, m) = (f64::from(block[4 + k / 32 * 2]), f64::from(block[5 + k / 32 * 2]));
                    d * s * c - dmin * m
                }
                Super::FourMin => {
                    let byte = block[4 + k / 16];
                    d * f64::from(byte & 15) * c - dmin * f64::from(byte >> 4)
                }
                Super::SixBy16 => d * f64::from(i32::from(block[2 + k / 16]) - 32) * (c - 4.0),
                Super::SixBy32 => d * f64::from(i32::from(block[2 + k / 32]) - 32) * c,
                Super::Signed => d * f64::from(block[2 + k / 16] as i8) * (c - 32.0),
                _ => unreachable!("{scales:?} belongs to a grid"),
            }
        }
    }
}

struct Packed {
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
    /// Row-major.
    weights: Vec<f64>,
}

impl Packed {
    fn new(ty: Grouped, rows: usize, cols: usize, rng: &mut Rng) -> Self {
        let mut bytes = vec![0xaa; packed_len(WeightType::Grouped(ty), rows, cols).unwrap()];
        let (len, mut weights) = (row_group_len(WeightType::Grouped(ty), cols).unwrap(), Vec::new());
        for (i, group) in bytes.chunks_exact_mut(len).enumerate() {
            let n = (rows - i * ROW_GROUP).min(ROW_GROUP);
            let source = Rows::new(ty, n, cols, rng);
            pack_row_group_grouped(ty, &source.codes, n, cols, &source.scales, &source.factors, group);
            weights.extend((0..n * cols).map(|j| weight(ty, &source, cols, j / cols, j % cols)));
        }
        Packed { rows, cols, bytes, weights }
    }

    fn matrix(&self, ty: Grouped) -> Matrix<'_> {
        Matrix::new(WeightType::Grouped(ty), self.rows, self.cols, &self.bytes).unwrap()
    }
}

#[test]
fn what_is_packed_is_the_weight_that_the_format_defines() {
    let mut rng = Rng(1);
    for ty in types() {
        for (rows, cols) in [(1, 1), (3, 31), (8, 64), (9, 131), (17, 300)] {
            let cols = cols_of(WeightType::Grouped(ty), cols);
            let packed = Packed::new(ty, rows, cols, &mut rng);
            for (i, (got, want)) in unpack(packed.matrix(ty)).iter().zip(&packed.weights).enumerate() {
                // Products and sums are rounded two or three times; a difference may be small beside its terms.
                let error = (f64::from(*got) - want).abs();
                assert!(error <= 1e-6 * want.abs().max(0.3), "{ty:?}, weight {i} of {rows}x{cols}: {got} {want}");
            }
        }
    }
}

#[test]
fn products_are_those_of_the_weights() {
    let (mut rng, pool) = (Rng(2), ThreadPool::new(1));
    for ty in types() {
        for (rows, cols, n) in [(5, 33, 2), (9, 300, 1), (16, 129, 3)] {
            let cols = cols_of(WeightType::Grouped(ty), cols);
            let packed = Packed::new(ty, rows, cols, &mut rng);
            let x = rng.vec(n * cols);
            for precision in PRECISIONS {
                let tolerance = if precision == Precision::Exact { 1e-6 } else { 0.5 / 127.0 + 1e-6 };
                let y = matmul(Kernels::scalar(), &pool, packed.matrix(ty), &activations(&x, n, cols, precision));
                for (i, &y) in y.iter().enumerate() {
                    let (x, w) = (&x[i / rows * cols..][..cols], &packed.weights[i % rows * cols..][..cols]);
                    let want: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * w).sum();
                    // Terms of a weight may be larger than their difference.
                    let size: f64 = w.iter().map(|w| w.abs().max(0.5)).sum();
                    assert!((f64::from(y) - want).abs() <= tolerance * size, "{ty:?} {precision:?}: {y} {want}");
                }
            }
        }
    }
}

/// Of all types, not the published ones alone: `same_bits` has those, with more shapes.
#[test]
fn every_isa_equals_scalar() {
    let (mut rng, pool) = (Rng(4), ThreadPool::new(1));
    for ty in types() {
        for (rows, cols, n) in [(8, 33, 1), (23, 300, 1), (16, 515, 11), (24, 64, 2)] {
            let cols = cols_of(WeightType::Grouped(ty), cols);
            let mut bytes = Packed::new(ty, rows, cols, &mut rng).bytes;
            if rng.below(2) == 0 {
                bytes = rng.bytes(bytes.len());
            }
            let w = Matrix::new(WeightType::Grouped(ty), rows, cols, &bytes).unwrap();
            let x = rng.vec(n * cols);
            for precision in PRECISIONS {
                let x = activations(&x, n, cols, precision);
                let want = matmul(Kernels::scalar(), &pool, w, &x);
                for k in Kernels::available() {
                    let what = format!("{} {ty:?} {precision:?} {rows}x{cols}, {n} tokens", k.isa_name());
                    assert_same(&matmul(k, &pool, w, &x), &want, &what);
                }
            }
        }
    }
}

#[test]
fn rows_of_nibbles_are_rows_of_codes() {
    let mut rng = Rng(3);
    for ty in types().filter(|ty| matches!(ty.codes(), Codes::Uint(4) | Codes::E2m1 | Codes::Iq4nl)) {
        for (rows, cols) in [(1, 1), (8, 64), (5, 131)] {
            let cols = cols_of(WeightType::Grouped(ty), cols);
            let source = Rows::new(ty, rows, cols, &mut rng);
            let pairs =
                |row: &[u8]| row.chunks(2).map(|two| two[0] | two.get(1).unwrap_or(&0) << 4).collect::<Vec<_>>();
            let nibbles: Vec<u8> = source.codes.chunks(cols).flat_map(pairs).collect();
            let [mut want, mut got] =
                [0xaa, 0x55].map(|fill| vec![fill; row_group_len(WeightType::Grouped(ty), cols).unwrap()]);
            pack_row_group_grouped(ty, &source.codes, rows, cols, &source.scales, &source.factors, &mut want);
            pack_row_group_nibbles(ty, &nibbles, rows, cols, &source.scales, &source.factors, &mut got);
            assert_eq!(got, want, "{ty:?} {rows}x{cols}");
        }
    }
}

#[test]
#[should_panic(expected = "codes have 3 bits")]
fn codes_that_are_too_large_are_refused() {
    let scales = Scales::Groups { columns: GroupSize::Row, scale: ScaleType::F16, zero: Zero::None };
    let ty = Grouped::new(Codes::Uint(3), scales).unwrap();
    let mut out = vec![0; row_group_len(WeightType::Grouped(ty), 33).unwrap()];
    let mut codes = [7; 33];
    codes[32] = 8;
    pack_row_group_grouped(ty, &codes, 1, 33, &[0, 0], &[], &mut out);
}

/// Sums of 16 bits and signed bytes have room for the largest products, whatever the zero.
#[test]
fn extreme_integers_do_not_saturate() {
    let (pool, cols) = (ThreadPool::new(1), SUPER_BLOCK);
    for (name, ty) in Grouped::PUBLISHED.iter().filter(|(_, ty)| !ty.codes().is_grid()) {
        let top = match ty.codes() {
            Codes::Uint(8) => 255,
            Codes::E4m3 => 0x7e,
            Codes::Uint(bits) => (1 << bits) - 1,
            _ => 15,
        };
        for code in [0, top / 2, top] {
            // Scales of no more bits than make every sum exact.
            for zero in [0u8, 255] {
                let scales = tame_scales(*ty, cols, zero);
                let mut out = vec![0; packed_len(WeightType::Grouped(*ty), 16, cols).unwrap()];
                let len = out.len() / 2;
                for group in out.chunks_exact_mut(len) {
                    let factors = if ty.has_row_factor() { vec![1.0; 8] } else { Vec::new() };
                    pack_row_group_grouped(*ty, &vec![code; 8 * cols], 8, cols, &scales.repeat(8), &factors, group);
                }
                let w = Matrix::new(WeightType::Grouped(*ty), 16, cols, &out).unwrap();
                for sign in [1.0, -1.0] {
                    let x = activations(&vec![sign * 127.0; 9 * cols], 9, cols, Precision::Int8);
                    let want: f32 = unpack(w)[..cols].iter().sum::<f32>() * 127.0 * sign;
                    for k in Kernels::available() {
                        let y = matmul(k, &pool, w, &x);
                        assert!(y.iter().all(|&v| v == want), "{} {name} {code} {zero}: {y:?} {want}", k.isa_name());
                    }
                }
            }
        }
    }
}

/// Scales of a row that are powers of two or small integers.
fn tame_scales(ty: Grouped, cols: usize, zero: u8) -> Vec<u8> {
    let group: Vec<u8> = match ty.scales() {
        Scales::Groups { scale, zero: beside, .. } => {
            let one: &[u8] = match scale {
                ScaleType::F16 => &[0, 0x3c],
                ScaleType::Bf16 => &[0x80, 0x3f],
                ScaleType::F32 => &[0, 0, 0x80, 0x3f],
                ScaleType::E4m3 => &[0x38],
                ScaleType::E8m0 => &[127],
            };
            match beside {
                Zero::None => one.to_vec(),
                Zero::Byte => [one, &[zero]].concat(),
                Zero::Bias | Zero::Float => one.repeat(2),
            }
        }
        Scales::Super(scales) => {
            let mut row = [0, 0x3c].repeat(1 + usize::from(scales.has_min()));
            row.resize(scales.row_len(), 33);
            row
        }
    };
    group.into_iter().cycle().take(ty.scale_row(cols).unwrap()).collect()
}
