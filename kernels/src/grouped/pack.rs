//! From rows in the form of the source to a row group: a permutation.
//!
//! Four codes of a row are a word, and words of eight rows lie side by side in a vector of the value plane, so packing needs only
//! shifts and ORs of words.

use crate::matrix::{BLOCK, ROW_GROUP, WeightType};
use sluice_weights::{Codes, Grouped, Scales, Zero};

/// The codes of one row and 32 columns: eight words of four codes, the lowest column in the lowest byte.
type Words = [u32; BLOCK / 4];

/// Words of eight rows.
type Block = [Words; ROW_GROUP];

/// Packs up to eight rows. `codes` is `[n_rows, cols]`, one code per byte, or for grids `[n_rows, cols / 32]` records of
/// [`Codes::block_len`] bytes; `scales` is `[n_rows]` times [`Grouped::scale_row`] bytes; `factors` has one number per row if
/// [`Grouped::has_row_factor`], and is empty otherwise. Missing rows become zeros.
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
    let values = pack_scales(ty, n_rows, cols, scales, factors, out);
    if ty.codes().is_grid() {
        let record = ty.codes().block_len() * cols.div_ceil(BLOCK);
        assert_eq!(codes.len(), n_rows * record, "records of {n_rows} rows");
        return interleave(codes, record, ty.codes().fields(), values);
    }
    assert_eq!(codes.len(), n_rows * cols, "codes of {n_rows} rows");
    let bits = code_bits(ty);
    let over =
        put_blocks(
            ty,
            values,
            |r, g| {
                if r < n_rows { words_of(&codes[r * cols..][..cols], g) } else { [0; BLOCK / 4] }
            },
        );
    assert!(over.to_le_bytes().iter().all(|&code| bits == 8 || code >> bits == 0), "codes have {bits} bits");
}

/// Like [`pack_row_group_grouped`], from rows of nibbles: `nibbles` is `[n_rows, ⌈cols/2⌉]`, two codes per byte, the lower column
/// in the low nibble. If the last byte holds only one code, its high nibble is 0.
///
/// # Panics
/// Like [`pack_row_group_grouped`], and if the codes of the type do not have four bits.
pub fn pack_row_group_nibbles(
    ty: Grouped,
    nibbles: &[u8],
    n_rows: usize,
    cols: usize,
    scales: &[u8],
    factors: &[f32],
    out: &mut [u8],
) {
    let row = cols.div_ceil(2);
    assert_eq!(nibbles.len(), n_rows * row, "nibbles of {n_rows} rows");
    assert!(code_bits(ty) == 4 && !ty.codes().is_grid(), "{:?} are no nibbles", ty.codes());
    let values = pack_scales(ty, n_rows, cols, scales, factors, out);
    put_blocks(
        ty,
        values,
        |r, g| {
            if r < n_rows { spread_nibbles(&nibbles[r * row..][..row], g) } else { [0; BLOCK / 4] }
        },
    );
}

/// Fills the scale plane, and returns the value plane, zeroed where [`put_blocks`] and [`interleave`] do not write.
fn pack_scales<'a>(
    ty: Grouped,
    n_rows: usize,
    cols: usize,
    scales: &[u8],
    factors: &[f32],
    out: &'a mut [u8],
) -> &'a mut [u8] {
    let planes = WeightType::Grouped(ty).planes(cols).expect("the plan has computed its length");
    assert!(n_rows <= ROW_GROUP, "a row group has {ROW_GROUP} rows");
    assert_eq!(out.len(), planes.total, "the length of a row group");
    let (mut plane, values) = out.split_at_mut(planes.scales_padded);
    plane.fill(0);
    if ty.codes().is_grid() {
        values.fill(0);
    } else {
        values[planes.values..].fill(0);
    }
    let row = ty.scale_row(cols).expect("its planes have a length");
    assert_eq!(scales.len(), n_rows * row, "scales of {n_rows} rows");
    assert_eq!(factors.len(), if ty.has_row_factor() { n_rows } else { 0 }, "one factor per row that has one");
    if ty.has_row_factor() {
        let (head, rest) = plane.split_at_mut(4 * ROW_GROUP);
        head.as_chunks_mut::<4>().0.iter_mut().zip(factors).for_each(|(to, f)| *to = f.to_le_bytes());
        plane = rest;
    }
    interleave(scales, row, &scale_fields(ty), plane);
    &mut values[..planes.values]
}

/// Widths of the numbers in a row's scales, in order; the list repeats.
fn scale_fields(ty: Grouped) -> Vec<usize> {
    match ty.scales() {
        Scales::Groups { scale, zero, .. } => match zero {
            Zero::None => vec![scale.len()],
            Zero::Byte => vec![scale.len(), 1],
            Zero::Bias | Zero::Float => vec![scale.len(); 2],
        },
        Scales::Super(scales) => {
            let halves = 1 + usize::from(scales.has_min());
            let mut fields = vec![2; halves];
            fields.resize(halves + scales.row_len() - 2 * halves, 1);
            fields
        }
    }
}

/// Puts the fields of each row of `row` bytes beside those of the other rows; their widths repeat.
fn interleave(rows: &[u8], row: usize, widths: &[usize], plane: &mut [u8]) {
    if row == 0 {
        return;
    }
    let record: usize = widths.iter().sum();
    for (r, row) in rows.chunks_exact(row).enumerate() {
        for (from, to) in row.chunks(record).zip(plane.chunks_mut(record * ROW_GROUP)) {
            let mut at = 0;
            for &width in widths {
                let Some(from) = from.get(at..at + width) else { break };
                let to = &mut to[at * ROW_GROUP + r * width..][..width];
                // If lengths are known, each copy becomes a single move.
                match (<[u8; 1]>::try_from(from), <[u8; 2]>::try_from(from), <[u8; 4]>::try_from(from)) {
                    (Ok(byte), ..) => to.copy_from_slice(&byte),
                    (_, Ok(half), _) => to.copy_from_slice(&half),
                    (.., Ok(word)) => to.copy_from_slice(&word),
                    _ => to.copy_from_slice(from),
                }
                at += width;
            }
        }
    }
}

/// Bits of a code, for codes that represent one weight each.
fn code_bits(ty: Grouped) -> u32 {
    match ty.codes() {
        Codes::Uint(bits) => u32::from(bits),
        Codes::E4m3 => 8,
        _ => 4,
    }
}

/// Codes `32·g..` of a row; codes beyond its end are zero.
fn words_of(row: &[u8], g: usize) -> Words {
    let mut padded = [0; BLOCK];
    let block = match row[g * BLOCK..].first_chunk() {
        Some(block) => block,
        None => {
            let rest = &row[g * BLOCK..];
            padded[..rest.len()].copy_from_slice(rest);
            &padded
        }
    };
    words_of_block(block)
}

fn words_of_block(block: &[u8; BLOCK]) -> Words {
    let words = block.as_chunks::<4>().0;
    std::array::from_fn(|q| u32::from_le_bytes(words[q]))
}

/// Codes `32·g..` of a row of nibbles, one byte each.
fn spread_nibbles(row: &[u8], g: usize) -> Words {
    let mut block = [0; BLOCK / 2];
    let rest = &row[g * BLOCK / 2..];
    let len = rest.len().min(BLOCK / 2);
    block[..len].copy_from_slice(&rest[..len]);
    let halves = block.as_chunks::<2>().0;
    std::array::from_fn(|q| {
        let two = u32::from(u16::from_le_bytes(halves[q]));
        let two = (two | two << 8) & 0x00ff_00ff;
        (two | two << 4) & 0x0f0f_0f0f
    })
}

/// Writes the whole value plane, for codes that represent one weight each, and returns the OR of all words.
fn put_blocks(ty: Grouped, values: &mut [u8], words: impl Fn(usize, usize) -> Words) -> u32 {
    match ty.codes() {
        Codes::Uint(2) => put_integers::<2>(values, words),
        Codes::Uint(3) => put_integers::<3>(values, words),
        Codes::Uint(5) => put_integers::<5>(values, words),
        Codes::Uint(6) => put_integers::<6>(values, words),
        Codes::Uint(8) => put_integers::<8>(values, words),
        Codes::E4m3 => put_bytes(values, words),
        _ => put_integers::<4>(values, words),
    }
}

fn put_integers<const BITS: usize>(values: &mut [u8], words: impl Fn(usize, usize) -> Words) -> u32 {
    let mut over = 0;
    for (g, out) in values.chunks_exact_mut(const { 32 * BITS }).enumerate() {
        let block: Block = std::array::from_fn(|r| words(r, g));
        over = block.as_flattened().iter().fold(over, |over, word| over | word);
        let out = out.as_chunks_mut::<4>().0;
        if BITS == 8 {
            plane::<8>(&block, 0, out);
            continue;
        }
        let (mut shift, mut at) = (0, 0);
        if BITS & 4 != 0 {
            plane::<4>(&block, shift, &mut out[at..]);
            (shift, at) = (shift + 4, at + 4 * ROW_GROUP);
        }
        if BITS & 2 != 0 {
            plane::<2>(&block, shift, &mut out[at..]);
            (shift, at) = (shift + 2, at + 2 * ROW_GROUP);
        }
        if BITS & 1 != 0 {
            plane::<1>(&block, shift, &mut out[at..]);
        }
    }
    over
}

/// Writes one plane: `WIDTH` bits of each code, from bit `shift` on. A word of the plane holds words that lie `WIDTH` words apart.
#[inline(always)]
fn plane<const WIDTH: usize>(block: &Block, shift: usize, out: &mut [[u8; 4]]) {
    let mask = const { 0x0101_0101 * ((1u32 << WIDTH) - 1) };
    for (v, out) in out.as_chunks_mut::<ROW_GROUP>().0.iter_mut().take(WIDTH).enumerate() {
        for (out, words) in out.iter_mut().zip(block) {
            let mut word = 0;
            for j in 0..8 / WIDTH {
                word |= (words[v + j * WIDTH] >> shift & mask) << (j * WIDTH);
            }
            *out = word.to_le_bytes();
        }
    }
}

/// Bytes, column by column.
fn put_bytes(values: &mut [u8], words: impl Fn(usize, usize) -> Words) -> u32 {
    for (g, out) in values.chunks_exact_mut(BLOCK * ROW_GROUP).enumerate() {
        let block: Block = std::array::from_fn(|r| words(r, g));
        for (q, out) in out.as_chunks_mut::<{ 4 * ROW_GROUP }>().0.iter_mut().enumerate() {
            for (i, out) in out.as_chunks_mut::<ROW_GROUP>().0.iter_mut().enumerate() {
                *out = std::array::from_fn(|r| (block[r][q] >> (8 * i)) as u8);
            }
        }
    }
    0
}
