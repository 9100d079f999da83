//! From rows as the source has them to a row group: a permutation.

use crate::matrix::{BLOCK, ROW_GROUP, WeightType};
use sluice_weights::{Codes, Grouped, Scales, Zero};

/// Packs up to eight rows. `codes` is `[n_rows, cols]`, one code per byte, or for grids `[n_rows, cols / 32]` records of
/// [`Codes::block_len`] bytes; `scales` is `[n_rows]` times [`Grouped::scale_row`] bytes, `factors` one number per row where
/// [`Grouped::has_row_factor`], else empty. Rows that are not there become zeros.
///
/// # Panics
/// For more than 8 rows, lengths that do not fit the shape, or codes of more bits than the type has.
pub fn pack_row_group_grouped(
    ty: Grouped,
    codes: &[u8],
    n_rows: usize,
    cols: usize,
    scales: &[u8],
    factors: &[f32],
    out: &mut [u8],
) {
    let planes = WeightType::Grouped(ty).planes(cols).expect("the plan has computed its length");
    assert!(n_rows <= ROW_GROUP, "a row group has {ROW_GROUP} rows");
    assert_eq!(out.len(), planes.total, "the length of a row group");
    out.fill(0);
    let (scale_plane, values) = out.split_at_mut(planes.scales_padded);
    let scale_row = ty.scale_row(cols).expect("its planes have a length");
    assert_eq!(scales.len(), n_rows * scale_row, "scales of {n_rows} rows");
    let mut plane = &mut scale_plane[..];
    if ty.has_row_factor() {
        assert_eq!(factors.len(), n_rows, "one factor per row");
        let (head, rest) = plane.split_at_mut(4 * ROW_GROUP);
        head.as_chunks_mut::<4>().0.iter_mut().zip(factors).for_each(|(to, f)| *to = f.to_le_bytes());
        plane = rest;
    }
    if scale_row > 0 {
        for (r, row) in scales.chunks_exact(scale_row).enumerate() {
            interleave(row, &mut scale_fields(ty), r, plane);
        }
    }
    if ty.codes().is_grid() {
        let record = ty.codes().block_len() * cols.div_ceil(BLOCK);
        assert_eq!(codes.len(), n_rows * record, "records of {n_rows} rows");
        for (r, row) in codes.chunks_exact(record.max(1)).enumerate() {
            interleave(row, &mut ty.codes().fields().iter().copied().cycle(), r, values);
        }
    } else {
        assert_eq!(codes.len(), n_rows * cols, "codes of {n_rows} rows");
        for (r, row) in codes.chunks_exact(cols.max(1)).enumerate() {
            match ty.codes() {
                Codes::Uint(bits) => put_integers(row, usize::from(bits), r, values),
                Codes::E4m3 => row.iter().enumerate().for_each(|(k, &code)| values[k * ROW_GROUP + r] = code),
                _ => put_integers(row, 4, r, values),
            }
        }
    }
}

/// Widths of the numbers of a row's scales, in their order, over and over.
fn scale_fields(ty: Grouped) -> Box<dyn Iterator<Item = usize>> {
    match ty.scales() {
        Scales::Groups { scale, zero, .. } => {
            let beside = match zero {
                Zero::None => None,
                Zero::Byte => Some(1),
                Zero::Bias | Zero::Float => Some(scale.len()),
            };
            let fields: Vec<usize> = [Some(scale.len()), beside].into_iter().flatten().collect();
            Box::new(fields.into_iter().cycle())
        }
        Scales::Super(scales) => {
            let halves = 1 + usize::from(scales.has_min());
            let bytes = scales.row_len() - 2 * halves;
            let fields: Vec<usize> = std::iter::repeat_n(2, halves).chain(std::iter::repeat_n(1, bytes)).collect();
            Box::new(fields.into_iter().cycle())
        }
    }
}

/// Puts the fields of row `r` beside those of the other rows.
fn interleave(row: &[u8], widths: &mut dyn Iterator<Item = usize>, r: usize, plane: &mut [u8]) {
    let mut at = 0;
    while at < row.len() {
        let width = widths.next().expect("widths go on for ever");
        plane[at * ROW_GROUP + r * width..][..width].copy_from_slice(&row[at..at + width]);
        at += width;
    }
}

/// Puts the codes of row `r` into planes of 4, 2 and 1 bits, or one of 8.
fn put_integers(row: &[u8], bits: usize, r: usize, values: &mut [u8]) {
    for (k, &code) in row.iter().enumerate() {
        assert!(bits == 8 || code >> bits == 0, "{code} does not fit in {bits} bits");
        let (q, i) = (k % BLOCK / 4, k % 4);
        let block = &mut values[k / BLOCK * 32 * bits..][..32 * bits];
        if bits == 8 {
            block[q * 32 + r * 4 + i] = code;
            continue;
        }
        let (mut rest, mut plane) = (code, 0);
        for width in [4, 2, 1].into_iter().filter(|width| bits & width != 0) {
            let low = rest & ((1 << width) - 1);
            block[plane + q % width * 32 + r * 4 + i] |= low << (q / width * width);
            (rest, plane) = (rest >> width, plane + 32 * width);
        }
    }
}
