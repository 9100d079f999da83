//! Puts rows of a matrix beside each other, as packing does, in pieces of fixed size that compilers turn into vectors.

use crate::matrix::ROW_GROUP;

/// Columns of a tile.
const TILE: usize = 8;

/// Puts element `k` of row `r` at place `8k + r`, converted by `to`. `rows` is row-major, with rows of `cols` elements, at most
/// eight; the places of missing rows keep their contents.
pub(crate) fn interleave<T: Copy, U>(rows: &[T], cols: usize, out: &mut [U], to: impl Fn(T) -> U) {
    if rows.len() != ROW_GROUP * cols || cols == 0 {
        rows.chunks(cols.max(1)).enumerate().for_each(|(r, row)| put_column(row, r, out, &to));
        return;
    }
    let all: [&[T]; ROW_GROUP] = std::array::from_fn(|r| &rows[r * cols..][..cols]);
    let (whole, rest) = out.as_chunks_mut::<{ TILE * ROW_GROUP }>();
    for (t, out) in whole.iter_mut().enumerate() {
        let tile: [[T; TILE]; ROW_GROUP] =
            std::array::from_fn(|r| *all[r][t * TILE..].first_chunk().expect("a whole tile"));
        for (k, out) in out.as_chunks_mut::<ROW_GROUP>().0.iter_mut().enumerate() {
            *out = std::array::from_fn(|r| to(tile[r][k]));
        }
    }
    let done = whole.len() * TILE;
    all.into_iter().enumerate().for_each(|(r, row)| put_column(&row[done..], r, rest, &to));
}

fn put_column<T: Copy, U>(row: &[T], r: usize, out: &mut [U], to: &impl Fn(T) -> U) {
    out.iter_mut().skip(r).step_by(ROW_GROUP).zip(row).for_each(|(slot, &value)| *slot = to(value));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_has_its_place() {
        for (n_rows, cols) in [(8, 8), (8, 21), (8, 7), (8, 1), (3, 20), (1, 8), (0, 5), (8, 0)] {
            let rows: Vec<u16> = (1..=(n_rows * cols) as u16).collect();
            let mut out = vec![[0xff; 2]; ROW_GROUP * cols];
            interleave(&rows, cols, &mut out, u16::to_le_bytes);
            for (at, found) in out.into_iter().enumerate() {
                let (k, r) = (at / ROW_GROUP, at % ROW_GROUP);
                let want = if r < n_rows { rows[r * cols + k].to_le_bytes() } else { [0xff; 2] };
                assert_eq!(found, want, "{n_rows} x {cols}: {at}");
            }
        }
    }
}
