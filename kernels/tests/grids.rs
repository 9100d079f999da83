//! ggml's grids stand for what the public decoder says they do.

use crate::common::*;
use sluice_kernels::*;
use sluice_weights::{Codes, Grouped};

/// For each type the points of its grid, if it has one of its own, then 16 rows of records, scales and values
/// (`ggml/make_grids.py`).
const PUBLIC: &[u8] = include_bytes!("ggml/grids.bin");
const ROWS: usize = 16;
const COLS: usize = 256;

/// Types in the order of the fixture, and bytes of their grids.
const TYPES: [(&str, usize); 7] = [
    ("iq3_s", 512 * 4),
    ("iq3_xxs", 256 * 4),
    ("iq2_s", 1024 * 8),
    ("iq2_xs", 512 * 8),
    ("iq2_xxs", 256 * 8),
    ("iq1_s", 2048 * 8),
    ("iq1_m", 0),
];

/// What the fixture has of one type.
struct Public {
    ty: Grouped,
    packed: Vec<u8>,
    values: Vec<f32>,
}

fn public() -> Vec<Public> {
    let mut rest = PUBLIC;
    let mut take = |len: usize| {
        let (head, tail) = rest.split_at(len);
        rest = tail;
        head
    };
    let all = TYPES.map(|(name, points)| {
        let WeightType::Grouped(ty) = name.parse().unwrap() else { panic!("{name} is grouped") };
        take(points);
        let records = take(ROWS * ty.codes().block_len() * COLS / BLOCK);
        let scales = take(ROWS * ty.scale_row(COLS).unwrap());
        let values = take(ROWS * COLS * 4).as_chunks().0.iter().map(|&v| f32::from_le_bytes(v)).collect();
        Public { ty, packed: pack(ty, records, scales), values }
    });
    assert!(rest.is_empty());
    all.into()
}

fn pack(ty: Grouped, records: &[u8], scales: &[u8]) -> Vec<u8> {
    let mut packed = vec![0; packed_len(WeightType::Grouped(ty), ROWS, COLS).unwrap()];
    let half = |bytes: &[u8], g: usize| bytes[g * bytes.len() / 2..][..bytes.len() / 2].to_vec();
    let len = packed.len() / 2;
    for (g, group) in packed.chunks_mut(len).enumerate() {
        pack_row_group_grouped(ty, &half(records, g), 8, COLS, &half(scales, g), &[], group);
    }
    packed
}

#[test]
fn values_are_those_of_the_public_decoder() {
    for Public { ty, packed, values } in public() {
        let ty = WeightType::Grouped(ty);
        assert_same(&unpack(Matrix::new(ty, ROWS, COLS, &packed).unwrap()), &values, &ty);
    }
}

#[test]
fn products_are_those_of_the_values() {
    let pool = ThreadPool::new(1);
    let mut rng = Rng(23);
    for Public { ty, packed, values } in public() {
        let ty = WeightType::Grouped(ty);
        let w = Matrix::new(ty, ROWS, COLS, &packed).unwrap();
        let x = rng.vec(3 * COLS);
        for precision in PRECISIONS {
            let tolerance = if precision == Precision::Exact { 1e-6 } else { 0.5 / 127.0 + 1e-6 };
            for k in Kernels::available() {
                let y = matmul(k, &pool, w, &activations(&x, 3, COLS, precision));
                for (i, &y) in y.iter().enumerate() {
                    let (x, w) = (&x[i / ROWS * COLS..][..COLS], &values[i % ROWS * COLS..][..COLS]);
                    let want: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                    let size: f64 = w.iter().map(|&w| f64::from(w.abs())).sum();
                    assert!((f64::from(y) - want).abs() <= tolerance * size, "{} {ty} {precision:?}", k.isa_name());
                }
            }
        }
    }
}

#[test]
fn all_records_are_valid() {
    let mut rng = Rng(29);
    for (name, _) in TYPES {
        let ty: WeightType = name.parse().unwrap();
        let WeightType::Grouped(grouped) = ty else { panic!("{name} is grouped") };
        assert!(grouped.codes().is_grid() && grouped.codes() != Codes::Iq4nl);
        let data = rng.bytes(packed_len(ty, 64, 512).unwrap());
        assert_eq!(unpack(Matrix::new(ty, 64, 512, &data).unwrap()).len(), 64 * 512);
    }
}
