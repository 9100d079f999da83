//! Sums of outer products, `C += Aᵀ B`: what moments, their factorisation, error feedback, and attention over expanded keys are made of.
//!
//! Every element is one chain of fused multiply-adds, `c[i][j] = fma(a[k][i], b[k][j], c[i][j])` for `k` ascending. So neither
//! tiles, nor the number of `k` that are taken at once, nor threads, nor instruction sets can change a bit.

use std::ops::Range;

use crate::isa::{Isa, Kernels};

/// Rows of a tile.
pub(crate) const TALL: usize = 12;
/// Columns of a tile.
pub(crate) const WIDE: usize = 16;

/// Numbers of each column that are put in order at once.
const PART: usize = 16;

/// A tile of `C`.
pub(crate) type UpdateTile = [[f32; WIDE]; TALL];

/// A row-major matrix of `depth` rows, cut into stripes of `W` columns, so that what a kernel reads in sequence lies together.
/// Columns beyond the last are zeros.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stripes<const W: usize> {
    depth: usize,
    data: Vec<[f32; W]>,
}

impl<const W: usize> Stripes<W> {
    /// Copies the rows that `row` gives, each of `width` numbers.
    pub(crate) fn set<'a>(&mut self, depth: usize, width: usize, row: impl Fn(usize) -> &'a [f32]) {
        self.depth = depth;
        self.data.clear();
        self.data.resize(width.div_ceil(W) * depth, [0.0; W]);
        for k in 0..depth {
            for (stripe, values) in row(k).chunks(W).enumerate() {
                self.data[stripe * depth + k][..values.len()].copy_from_slice(values);
            }
        }
    }

    /// Takes the columns that `column` gives, `width` of them, each of `depth` numbers.
    pub(crate) fn set_transposed<'a>(&mut self, depth: usize, width: usize, column: impl Fn(usize) -> &'a [f32]) {
        self.depth = depth;
        self.data.clear();
        self.data.resize(width.div_ceil(W) * depth, [0.0; W]);
        for (stripe, data) in self.data.chunks_exact_mut(depth.max(1)).enumerate() {
            let first = stripe * W;
            if first + W <= width {
                let columns: [&[f32]; W] = std::array::from_fn(|i| &column(first + i)[..depth]);
                let (parts, rest) = data.as_chunks_mut::<PART>();
                let whole = parts.len() * PART;
                for (part, data) in parts.iter_mut().enumerate() {
                    // Numbers of known count need no checks.
                    let part = columns.map(|column| column[part * PART..].first_chunk::<PART>().expect("a whole part"));
                    for (k, row) in data.iter_mut().enumerate() {
                        *row = part.map(|column| column[k]);
                    }
                }
                for (k, row) in rest.iter_mut().enumerate() {
                    *row = columns.map(|column| column[whole + k]);
                }
            } else {
                for i in first..width {
                    data.iter_mut().zip(column(i)).for_each(|(row, &number)| row[i - first] = number);
                }
            }
        }
    }

    /// Stripes.
    pub(crate) fn count(&self) -> usize {
        self.data.len() / self.depth.max(1)
    }

    /// Rows of the matrix.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    pub(crate) fn stripe(&self, number: usize) -> &[[f32; W]] {
        &self.data[number * self.depth..][..self.depth]
    }
}

/// Part of a row-major matrix to which products are added.
pub(crate) struct Target<'a> {
    /// The values, beginning with the first row.
    pub(crate) values: &'a mut [f32],
    /// Distance between rows.
    pub(crate) stride: usize,
    /// Columns of the matrix that belong to the first stripe of `B`, and the columns after those.
    pub(crate) columns: Range<usize>,
}

impl Kernels {
    /// Adds the products of the rows of `A` in the stripes `tall`, which are the rows of `to`, with all of `B`. With `lower`, only
    /// elements on or below the diagonal are needed, and those above it may be wrong.
    pub(crate) fn update(
        &self,
        a: &Stripes<TALL>,
        tall: Range<usize>,
        b: &Stripes<WIDE>,
        to: &mut Target<'_>,
        lower: bool,
    ) {
        let rows = to.values.len().div_ceil(to.stride);
        for (wide, first) in to.columns.clone().step_by(WIDE).enumerate() {
            let columns = first..(first + WIDE).min(to.columns.end);
            for (i, stripe) in tall.clone().enumerate() {
                if lower && wide * WIDE >= (stripe + 1) * TALL {
                    continue;
                }
                let mut tile = [[0.0; WIDE]; TALL];
                let places = i * TALL..((i + 1) * TALL).min(rows);
                for (tile, row) in tile.iter_mut().zip(places.clone()) {
                    let row = &to.values[row * to.stride..][columns.clone()];
                    // Of a length that is known when compiling, a copy is one instruction or two.
                    match row.first_chunk() {
                        Some(all) => *tile = *all,
                        None => tile[..row.len()].copy_from_slice(row),
                    }
                }
                self.update_tile(a.stripe(stripe), b.stripe(wide), &mut tile);
                for (tile, row) in tile.iter().zip(places) {
                    let row = &mut to.values[row * to.stride..][columns.clone()];
                    match row.first_chunk_mut() {
                        Some(all) => *all = *tile,
                        None => row.copy_from_slice(&tile[..row.len()]),
                    }
                }
            }
        }
    }

    fn update_tile(&self, a: &[[f32; TALL]], b: &[[f32; WIDE]], tile: &mut UpdateTile) {
        match self.isa {
            Isa::Scalar => update_tile(a, b, tile),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.update_tile(a, b, tile),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.update_tile(a, b, tile),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => isa.update_tile(a, b, tile),
        }
    }
}

/// The specification.
fn update_tile(a: &[[f32; TALL]], b: &[[f32; WIDE]], tile: &mut UpdateTile) {
    for (a, b) in a.iter().zip(b) {
        for (row, &a) in tile.iter_mut().zip(a) {
            row.iter_mut().zip(b).for_each(|(c, &b)| *c = a.mul_add(b, *c));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| ((i as f32 + 1.0) * seed).sin()).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_chain_of_multiply_adds() {
        for (depth, m, n) in [(1, 1, 1), (5, 12, 16), (33, 29, 50), (64, 13, 17)] {
            let (a, b, c) = (numbers(depth * m, 0.37), numbers(depth * n, 0.71), numbers(m * (n + 3), 0.13));
            let mut expected = c.clone();
            for (i, row) in expected.chunks_mut(n + 3).enumerate() {
                for j in 0..n {
                    row[2 + j] = (0..depth).fold(row[2 + j], |c, k| a[k * m + i].mul_add(b[k * n + j], c));
                }
            }
            for kernels in Kernels::available() {
                // The result is the same, however many are taken at once.
                for step in [1, 7, depth] {
                    let mut out = c.clone();
                    for from in (0..depth).step_by(step) {
                        let (mut tall, mut wide) = (Stripes::default(), Stripes::default());
                        let count = step.min(depth - from);
                        tall.set(count, m, |k| &a[(from + k) * m..][..m]);
                        wide.set(count, n, |k| &b[(from + k) * n..][..n]);
                        let mut to = Target { values: &mut out, stride: n + 3, columns: 2..2 + n };
                        kernels.update(&tall, 0..m.div_ceil(TALL), &wide, &mut to, false);
                    }
                    assert!(out == expected, "{} {depth} {m} {n}", kernels.isa_name());
                }
            }
        }
    }

    #[test]
    fn what_is_below_the_diagonal_is_all_there() {
        let (depth, n) = (9, 53);
        let x = numbers(depth * n, 0.57);
        let product = |kernels: &Kernels, lower| {
            let (mut tall, mut wide, mut out) = (Stripes::default(), Stripes::default(), vec![0.0; n * n]);
            tall.set(depth, n, |k| &x[k * n..][..n]);
            wide.set(depth, n, |k| &x[k * n..][..n]);
            let mut to = Target { values: &mut out, stride: n, columns: 0..n };
            kernels.update(&tall, 0..n.div_ceil(TALL), &wide, &mut to, lower);
            out
        };
        for kernels in Kernels::available() {
            let (all, some) = (product(&kernels, false), product(&kernels, true));
            assert!((0..n).all(|i| (0..=i).all(|j| all[i * n + j] == some[i * n + j])));
            assert!((0..n).all(|i| (0..n).all(|j| all[i * n + j] == all[j * n + i])), "products commute");
        }
    }
}
