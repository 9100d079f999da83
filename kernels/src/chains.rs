//! Products of matrices in chains of fused multiply-adds, for operands as attention over expanded keys has them: rows that are multiplied
//! with panels, and rows that are added up with weights. The functions at the end are the specification.
//!
//! Like those of the `update` module, every element is one chain, for ascending `k`, so that tiles and instruction sets cannot change a bit.
//! But no operand has to be copied into tiles first.

use crate::isa::{Isa, Kernels};
use crate::update::{Stripes, WIDE};

/// Adjacent rows of a matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a> {
    /// The numbers, beginning with the first row.
    pub(crate) numbers: &'a [f32],
    /// Distance between rows.
    pub(crate) stride: usize,
    /// Rows.
    pub(crate) count: usize,
}

impl<'a> Rows<'a> {
    /// Numbers `at..at + len` of row `j`.
    #[inline(always)]
    pub(crate) fn part(&self, j: usize, at: usize, len: usize) -> &'a [f32] {
        &self.numbers[j * self.stride + at..][..len]
    }
}

impl Kernels {
    /// `out[j][i]` gets the products of row `j` with column `i` of `columns`: `out[j][i] = fma(rows[j][k], columns[k][i], out[j][i])` for `k`
    /// ascending, from 0 or, with `go_on`, from what is there. Rows of `out` are `stride` apart and have place for whole stripes.
    pub(crate) fn row_products(
        &self,
        rows: Rows<'_>,
        columns: &Stripes<WIDE>,
        (out, stride): (&mut [f32], usize),
        go_on: bool,
    ) {
        match self.isa {
            Isa::Scalar => row_products(rows, columns, (out, stride), go_on),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.row_products(rows, columns, (out, stride), go_on),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.row_products(rows, columns, (out, stride), go_on),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => isa.row_products(rows, columns, (out, stride), go_on),
        }
    }

    /// For each row `q` of `out`, which has `width` numbers: `out[q] = out[q]·alpha[q]`, then `out[q] = fma(weights[j][q], rows[j], out[q])`
    /// for `j` ascending.
    pub(crate) fn add_weighted_rows(
        &self,
        weights: Rows<'_>,
        rows: Rows<'_>,
        alpha: &[f32],
        (out, width): (&mut [f32], usize),
    ) {
        match self.isa {
            Isa::Scalar => add_weighted_rows(weights, rows, alpha, (out, width)),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.add_weighted_rows(weights, rows, alpha, (out, width)),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.add_weighted_rows(weights, rows, alpha, (out, width)),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => isa.add_weighted_rows(weights, rows, alpha, (out, width)),
        }
    }
}

fn row_products(rows: Rows<'_>, columns: &Stripes<WIDE>, (out, stride): (&mut [f32], usize), go_on: bool) {
    for j in 0..rows.count {
        let row = rows.part(j, 0, columns.depth());
        for (s, out) in out[j * stride..][..columns.count() * WIDE].as_chunks_mut::<WIDE>().0.iter_mut().enumerate() {
            if !go_on {
                *out = [0.0; WIDE];
            }
            for (&number, columns) in row.iter().zip(columns.stripe(s)) {
                out.iter_mut().zip(columns).for_each(|(out, &column)| *out = number.mul_add(column, *out));
            }
        }
    }
}

fn add_weighted_rows(weights: Rows<'_>, rows: Rows<'_>, alpha: &[f32], (out, width): (&mut [f32], usize)) {
    for (q, (out, &alpha)) in out.chunks_exact_mut(width).zip(alpha).enumerate() {
        out.iter_mut().for_each(|out| *out *= alpha);
        for j in 0..rows.count {
            let weight = weights.part(j, q, 1)[0];
            out.iter_mut().zip(rows.part(j, 0, width)).for_each(|(out, &number)| *out = weight.mul_add(number, *out));
        }
    }
}

/// The kernels `row_products` and `add_weighted_rows` for one instruction set.
///
/// It is a macro for the same reason as `attention` in `x86/`. The module that uses it provides `WIDTH` (numbers of a vector), `ROWS` and
/// `TOGETHER` (rows and stripes whose sums stay in the registers), `QUERIES` and `VECTORS` (rows of results and vectors of their columns,
/// for which the same is true), and `load` and `store` of a vector.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! chains {
    ($features:tt, $vector:ty, zero: $zero:ident, fmadd: $fmadd:ident, mul: $mul:ident, splat: $splat:ident) => {
        /// Vectors of a stripe.
        const ACROSS: usize = WIDE / WIDTH;

        #[target_feature(enable = $features)]
        pub(super) fn row_products(
            rows: Rows<'_>,
            columns: &Stripes<WIDE>,
            (out, stride): (&mut [f32], usize),
            go_on: bool,
        ) {
            let mut stripe = 0;
            // The stripes stay in the nearest cache, and the rows pass by.
            while stripe < columns.count() {
                stripe += match columns.count() - stripe {
                    left if left >= TOGETHER => in_stripes::<TOGETHER>(rows, columns, stripe, (&mut *out, stride), go_on),
                    _ => in_stripes::<1>(rows, columns, stripe, (&mut *out, stride), go_on),
                };
            }
        }

        /// The products of all rows with `P` stripes, from `stripe` on. Returns `P`.
        #[target_feature(enable = $features)]
        fn in_stripes<const P: usize>(
            rows: Rows<'_>,
            columns: &Stripes<WIDE>,
            stripe: usize,
            (out, stride): (&mut [f32], usize),
            go_on: bool,
        ) -> usize {
            let columns = each!(&[][..]; P, p => columns.stripe(stripe + p));
            let mut j = 0;
            while j < rows.count {
                let to = (&mut out[j * stride + stripe * WIDE..], stride);
                j += match rows.count - j {
                    left if left >= ROWS => product_tile::<ROWS, P>(rows, j, columns, to, go_on),
                    left if left >= 4 => product_tile::<4, P>(rows, j, columns, to, go_on),
                    left if left >= 2 => product_tile::<2, P>(rows, j, columns, to, go_on),
                    _ => product_tile::<1, P>(rows, j, columns, to, go_on),
                };
            }
            P
        }

        /// The products of `T` rows, from row `j` on, with `P` stripes. Returns `T`.
        #[target_feature(enable = $features)]
        fn product_tile<const T: usize, const P: usize>(
            rows: Rows<'_>,
            j: usize,
            columns: [&[[f32; WIDE]]; P],
            (out, stride): (&mut [f32], usize),
            go_on: bool,
        ) -> usize {
            let depth = columns[0].len();
            let columns = each!(&[][..]; P, p => &columns[p][..depth]);
            let rows = each!(&[][..]; T, t => rows.part(j + t, 0, depth));
            let mut sums = [[[$zero(); ACROSS]; P]; T];
            if go_on {
                for t in 0..T {
                    let out = out[t * stride..][..P * WIDE].as_chunks::<WIDTH>().0;
                    for p in 0..P {
                        for v in 0..ACROSS {
                            sums[t][p][v] = load(&out[p * ACROSS + v]);
                        }
                    }
                }
            }
            for k in 0..depth {
                let mut column = [[$zero(); ACROSS]; P];
                for p in 0..P {
                    for v in 0..ACROSS {
                        column[p][v] = load(&columns[p][k].as_chunks::<WIDTH>().0[v]);
                    }
                }
                for t in 0..T {
                    let number = $splat(rows[t][k]);
                    for p in 0..P {
                        for v in 0..ACROSS {
                            sums[t][p][v] = $fmadd(number, column[p][v], sums[t][p][v]);
                        }
                    }
                }
            }
            for t in 0..T {
                let out = out[t * stride..][..P * WIDE].as_chunks_mut::<WIDTH>().0;
                for p in 0..P {
                    for v in 0..ACROSS {
                        store(&mut out[p * ACROSS + v], sums[t][p][v]);
                    }
                }
            }
            T
        }

        #[target_feature(enable = $features)]
        pub(super) fn add_weighted_rows(
            weights: Rows<'_>,
            rows: Rows<'_>,
            alpha: &[f32],
            (out, width): (&mut [f32], usize),
        ) {
            let mut at = 0;
            while width - at >= VECTORS * WIDTH {
                add_columns::<VECTORS>(weights, rows, alpha, (&mut *out, width), at);
                at += VECTORS * WIDTH;
            }
            while width - at >= WIDTH {
                add_columns::<1>(weights, rows, alpha, (&mut *out, width), at);
                at += WIDTH;
            }
            for q in 0..alpha.len() {
                for i in at..width {
                    let out = &mut out[q * width + i];
                    *out *= alpha[q];
                    for j in 0..rows.count {
                        *out = weights.part(j, q, 1)[0].mul_add(rows.part(j, i, 1)[0], *out);
                    }
                }
            }
        }

        /// `N` vectors of columns, from column `at` on.
        #[target_feature(enable = $features)]
        fn add_columns<const N: usize>(
            weights: Rows<'_>,
            rows: Rows<'_>,
            alpha: &[f32],
            (out, width): (&mut [f32], usize),
            at: usize,
        ) {
            let mut q = 0;
            while q < alpha.len() {
                let to = (&mut out[q * width + at..], width);
                q += match alpha.len() - q {
                    left if left >= QUERIES => weighted_tile::<QUERIES, N>(weights, rows, &alpha[q..], to, (q, at)),
                    left if left >= 4 => weighted_tile::<4, N>(weights, rows, &alpha[q..], to, (q, at)),
                    left if left >= 2 => weighted_tile::<2, N>(weights, rows, &alpha[q..], to, (q, at)),
                    _ => weighted_tile::<1, N>(weights, rows, &alpha[q..], to, (q, at)),
                };
            }
        }

        /// `N` vectors of columns, from column `at` on, of `Q` results, from `first` on. Returns `Q`.
        #[target_feature(enable = $features)]
        fn weighted_tile<const Q: usize, const N: usize>(
            weights: Rows<'_>,
            rows: Rows<'_>,
            alpha: &[f32],
            (out, width): (&mut [f32], usize),
            (first, at): (usize, usize),
        ) -> usize {
            let mut sums = [[$zero(); N]; Q];
            for q in 0..Q {
                let (out, alpha) = (out[q * width..][..N * WIDTH].as_chunks::<WIDTH>().0, $splat(alpha[q]));
                for v in 0..N {
                    sums[q][v] = $mul(load(&out[v]), alpha);
                }
            }
            for j in 0..rows.count {
                let (weights, row) = (weights.part(j, first, Q), rows.part(j, at, N * WIDTH).as_chunks::<WIDTH>().0);
                let row = each!($zero(); N, v => load(&row[v]));
                for q in 0..Q {
                    let weight = $splat(weights[q]);
                    for v in 0..N {
                        sums[q][v] = $fmadd(weight, row[v], sums[q][v]);
                    }
                }
            }
            for q in 0..Q {
                let out = out[q * width..][..N * WIDTH].as_chunks_mut::<WIDTH>().0;
                for v in 0..N {
                    store(&mut out[v], sums[q][v]);
                }
            }
            Q
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| ((i as f32 + 1.0) * seed).sin()).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_products_of_the_specification() {
        for (count, depth, width) in [(1, 1, 1), (5, 12, 16), (29, 33, 50), (13, 64, 17), (96, 7, 33)] {
            let (left, right) = (numbers(count * (depth + 3), 0.37), numbers(depth * width, 0.71));
            let stride = width.next_multiple_of(WIDE) + 5;
            let rows = Rows { numbers: &left, stride: depth + 3, count };
            let mut columns = Stripes::default();
            columns.set(depth, width, |k| &right[k * width..][..width]);
            for go_on in [false, true] {
                let begin = numbers(count * stride, 0.13);
                let mut expected = begin.clone();
                for (j, row) in expected.chunks_mut(stride).enumerate() {
                    for (i, out) in row[..width.next_multiple_of(WIDE)].iter_mut().enumerate() {
                        let right = |k: usize| if i < width { right[k * width + i] } else { 0.0 };
                        let begin = if go_on { *out } else { 0.0 };
                        *out = (0..depth).fold(begin, |sum, k| left[j * (depth + 3) + k].mul_add(right(k), sum));
                    }
                }
                for kernels in Kernels::available() {
                    let mut out = begin.clone();
                    kernels.row_products(rows, &columns, (&mut out, stride), go_on);
                    assert!(out == expected, "{} {count} {depth} {width} {go_on}", kernels.isa_name());
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_adds_weighted_rows_as_specified() {
        for (count, n, width) in [(1, 1, 1), (5, 12, 16), (29, 33, 50), (96, 96, 128), (13, 7, 23), (3, 15, 40)] {
            let (weights, numbers_of_rows) = (numbers(count * (n + 2), 0.37), numbers(count * (width + 1), 0.71));
            let (alpha, begin) = (numbers(n, 0.29), numbers(n * width, 0.13));
            let weights = Rows { numbers: &weights, stride: n + 2, count };
            let rows = Rows { numbers: &numbers_of_rows, stride: width + 1, count };
            let mut expected = begin.clone();
            add_weighted_rows(weights, rows, &alpha, (&mut expected, width));
            for kernels in Kernels::available() {
                let mut out = begin.clone();
                kernels.add_weighted_rows(weights, rows, &alpha, (&mut out, width));
                assert!(out == expected, "{} {count} {n} {width}", kernels.isa_name());
            }
        }
    }
}
