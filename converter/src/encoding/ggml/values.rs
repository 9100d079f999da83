//! Values of ggml's blocks as f32, in the order of operations of `gguf-py/gguf/quants.py`, which gives the same bits.

use sluice_format::WeightType;
use sluice_kernels::{self as kernels, IQ4NL, bf16_to_f32, e4m3_to_f32, f16_to_f32};
use sluice_weights::{Codes, Grouped, SUPER_BLOCK, ScaleType, Scales, Super, Zero};

use super::blocks::Canonical;
use crate::source::GgmlType;

/// e2m1, doubled; ggml has no negative zero.
const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Appends the values of whole rows of `cols` columns, of a type that [`super::weight_type`] names.
pub(super) fn rows(ty: GgmlType, canonical: &Canonical, cols: usize, out: &mut Vec<f32>) {
    match super::weight_type(ty) {
        Some(WeightType::Q8) => {
            let scales = canonical.scales.as_chunks::<2>().0;
            for (codes, scale) in canonical.codes.chunks_exact(32).zip(scales) {
                let d = f16_to_f32(u16::from_le_bytes(*scale));
                out.extend(codes.iter().map(|&c| f32::from(c as i8) * d));
            }
        }
        Some(WeightType::Mxfp4) => {
            for (codes, &scale) in canonical.codes.chunks_exact(32).zip(&canonical.scales) {
                let d = half_power(scale);
                out.extend(codes.iter().map(|&c| d * f32::from(E2M1_DOUBLED[usize::from(c & 15)])));
            }
        }
        Some(WeightType::Grouped(grouped)) => match grouped.scales() {
            _ if grouped.codes().is_grid() => grid(grouped, canonical, cols, out),
            Scales::Groups { scale, zero, .. } => groups(grouped, scale, zero, canonical, out),
            Scales::Super(scales) => super_blocks(grouped, scales, canonical, out),
        },
        other => unreachable!("{ty:?} is carried as {other:?}"),
    }
}

/// 2^(e − 128); the smallest results are subnormal.
fn half_power(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { u32::from(e - 1) << 23 })
}

/// The value of a code, doubled for e2m1.
fn number(ty: Grouped, code: u8) -> f32 {
    match ty.codes() {
        Codes::Iq4nl => f32::from(IQ4NL[usize::from(code & 15)]),
        Codes::E2m1 => f32::from(E2M1_DOUBLED[usize::from(code & 15)]),
        _ => (i32::from(code) - ty.middle()) as f32,
    }
}

fn groups(ty: Grouped, scale: ScaleType, zero: Zero, canonical: &Canonical, out: &mut Vec<f32>) {
    let width = scale.len() * if zero == Zero::Bias { 2 } else { 1 };
    let columns = ty.block();
    for (codes, scales) in canonical.codes.chunks_exact(columns).zip(canonical.scales.chunks_exact(width)) {
        let d = match scale {
            // The values are doubled.
            ScaleType::E4m3 => e4m3_to_f32(scales[0]) * 0.5,
            _ => half(scales, 0),
        };
        match zero {
            Zero::Bias => {
                let bias = half(scales, 2);
                out.extend(codes.iter().map(|&c| d * number(ty, c) + bias));
            }
            _ => out.extend(codes.iter().map(|&c| d * number(ty, c))),
        }
    }
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

fn super_blocks(ty: Grouped, scales: Super, canonical: &Canonical, out: &mut Vec<f32>) {
    let columns = if scales == Super::Plain { SUPER_BLOCK } else { scales.unit() };
    let blocks = canonical.codes.chunks_exact(SUPER_BLOCK).zip(canonical.scales.chunks_exact(scales.row_len()));
    for (codes, of_block) in blocks {
        let d = half(of_block, 0);
        let (dmin, units) = match scales.has_min() {
            true => (half(of_block, 2), &of_block[4..]),
            false => (0.0, &of_block[2..]),
        };
        for (i, codes) in codes.chunks_exact(columns).enumerate() {
            let [s, m] = match scales {
                Super::Plain => [1.0, 0.0],
                Super::SixMin => [f32::from(units[2 * i]), f32::from(units[2 * i + 1])],
                Super::FourMin => [f32::from(units[i] & 15), f32::from(units[i] >> 4)],
                Super::Signed => [f32::from(units[i] as i8), 0.0],
                _ => [f32::from(units[i]) - 32.0, 0.0],
            };
            let scale = d * s;
            match scales.has_min() {
                true => {
                    let min = dmin * m;
                    out.extend(codes.iter().map(|&c| scale * number(ty, c) - min));
                }
                false => out.extend(codes.iter().map(|&c| scale * number(ty, c))),
            }
        }
    }
}

/// Uses a row group, because the kernels know the grids.
fn grid(ty: Grouped, canonical: &Canonical, cols: usize, out: &mut Vec<f32>) {
    let record = ty.codes().block_len() * cols / 32;
    let scale_row = ty.scale_row(cols).expect("rows are whole super-blocks");
    let weight_type = WeightType::Grouped(ty);
    let mut packed = vec![0; weight_type.row_group_len(cols).expect("the plan has computed its length")];
    let groups = canonical.codes.chunks(record * kernels::ROW_GROUP);
    for (codes, scales) in groups.zip(canonical.scales.chunks(scale_row * kernels::ROW_GROUP)) {
        let rows = codes.len() / record;
        kernels::pack_row_group_grouped(ty, codes, rows, cols, scales, &[], &mut packed);
        let matrix = kernels::Matrix::new(weight_type, rows, cols, &packed);
        out.extend(kernels::unpack(matrix.expect("the length is a row group's")));
    }
}

/// Values of formats without blocks.
pub(super) fn plain(ty: GgmlType, bytes: &[u8], out: &mut Vec<f32>) {
    let halves = || bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
    match ty {
        GgmlType::F32 => out.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))),
        GgmlType::F16 => out.extend(halves().map(f16_to_f32)),
        GgmlType::BF16 => out.extend(halves().map(bf16_to_f32)),
        GgmlType::F64 => out.extend(bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b) as f32)),
        GgmlType::I8 => out.extend(bytes.iter().map(|&b| f32::from(b as i8))),
        GgmlType::I16 => out.extend(halves().map(|h| f32::from(h as i16))),
        GgmlType::I32 => out.extend(bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b) as f32)),
        GgmlType::I64 => out.extend(bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as f32)),
        other => unreachable!("{other:?} has blocks"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::source::header;

    /// Blocks, and the values that the public `gguf` package computes for them, by type (`converter/tests/ggml/make_blocks.py`).
    fn fixture() -> BTreeMap<String, Vec<u8>> {
        let file = include_bytes!("../../../tests/ggml/blocks.safetensors");
        let (field, _) = file.split_first_chunk().unwrap();
        let len = header::header_len(*field, file.len() as u64).unwrap() as usize;
        let entries = header::parse(&file[8..8 + len], file.len() as u64).unwrap();
        let bytes = |e: &header::HeaderEntry| file[e.start as usize..][..e.len as usize].to_vec();
        entries.iter().map(|e| (e.name.clone(), bytes(e))).collect()
    }

    /// The same except for the sign of zero: kernels have a negative zero where ggml has none.
    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || a == 0.0 && b == 0.0
    }

    #[test]
    fn values_are_those_of_the_public_decoder_bit_for_bit() {
        let fixture = fixture();
        let mut checked = 0;
        for ty in GgmlType::ALL.into_iter().filter(|ty| ty.block_cols() > 1) {
            let (blocks, values) =
                (&fixture[&format!("{}.blocks", ty.name())], &fixture[&format!("{}.values", ty.name())]);
            let expected: Vec<f32> = values.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            for rows in [1, 2, 4] {
                let mut found = Vec::new();
                super::rows(ty, &Canonical::new(ty, blocks), expected.len() / rows, &mut found);
                assert_eq!(found.len(), expected.len(), "{ty:?}");
                for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
                    assert!(same(*a, *b), "{ty:?} in {rows} rows, number {i}: {a:e}, expected {b:e}");
                }
            }
            checked += 1;
        }
        assert_eq!(checked, 23);
    }

    /// The packed form for the kernels has the same values.
    #[test]
    fn carried_types_stand_for_the_same_numbers() {
        let fixture = fixture();
        for ty in GgmlType::ALL.into_iter().filter(|ty| ty.block_cols() > 1) {
            let weight_type = super::super::weight_type(ty).unwrap_or_else(|| panic!("{ty:?} is carried"));
            let blocks = &fixture[&format!("{}.blocks", ty.name())];
            let (mut expected, canonical) = (Vec::new(), Canonical::new(ty, blocks));
            let cols = blocks.len() / ty.block_bytes() * ty.block_cols() / 2;
            super::rows(ty, &canonical, cols, &mut expected);
            let mut packed = vec![0; weight_type.row_group_len(cols).unwrap()];
            super::super::pack(ty, &canonical, cols, &[1.0; 2], &mut packed);
            let found = kernels::unpack(kernels::Matrix::new(weight_type, 2, cols, &packed).unwrap());
            for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
                // The two may round a sum of two products at different places.
                let near = (a - b).abs() <= 1e-6 * b.abs().max(1e-30);
                assert!(same(*a, *b) || near, "{ty:?}, number {i}: {a:e}, expected {b:e}");
            }
        }
    }
}
