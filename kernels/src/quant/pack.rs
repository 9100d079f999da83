//! Packing of `q4`, `q3` and `q2` row groups.

use super::codebook::{Codebook, place};
use super::search::Table;
use super::trellis::Trellis;
use crate::isa::Kernels;
use crate::matrix::{BLOCK, ROW_GROUP, WeightType};
use crate::pack::{pack_row_group, planes, put_nibbles};
use std::sync::LazyLock;

static Q4: LazyLock<Table> = LazyLock::new(|| Table::new(&Codebook::Q4));
static Q3: LazyLock<Table> = LazyLock::new(|| Table::new(&Codebook::Q3));
static Q2: LazyLock<Trellis> = LazyLock::new(|| Trellis::new(&Codebook::Q2));

/// What searches are compiled for. All instruction sets find the same, so a name that nobody can have is not reported here.
static SEARCHING: LazyLock<Kernels> = LazyLock::new(|| Kernels::detect().unwrap_or(Kernels::scalar()));

/// As [`pack_row_group`], with the importance of each input column for the types that minimise an error, `q4`, `q3` and `q2`.
///
/// They minimise `Σ ω_j (x_j − x̂_j)²` over a row. `ω_j` is the importance of column `j`, ideally the mean square of the
/// activations that meet it, because then the sum estimates the mean square error of the output; without importance it is 1. Only
/// ratios matter. If it is zero throughout a block, the block's weights count equally.
///
/// A row with a NaN or an infinity has scale NaN, so it cannot be mistaken for numbers. Other types round each weight separately;
/// their importance is checked and ignored.
///
/// # Panics
/// Like [`pack_row_group`], or if `importance` does not have one number per column, or one is negative or not finite.
pub fn pack_row_group_weighted(
    ty: WeightType,
    src: &[f32],
    n_rows: usize,
    cols: usize,
    importance: Option<&[f32]>,
    out: &mut [u8],
) {
    let weight = importance.map(|importance| {
        assert_eq!(importance.len(), cols, "one importance per column");
        assert!(importance.iter().all(|w| w.is_finite() && *w >= 0.0), "an importance is finite and not negative");
        normalise(importance)
    });
    match ty {
        _ if ty.is_fitted() => pack(*SEARCHING, ty, src, n_rows, cols, weight.as_deref(), out),
        _ => pack_row_group(ty, src, n_rows, cols, out),
    }
}

/// Packs a row group of `q4`, `q3` or `q2` with equal importance for all columns.
pub(crate) fn pack_unweighted(ty: WeightType, src: &[f32], n_rows: usize, cols: usize, out: &mut [u8]) {
    pack(*SEARCHING, ty, src, n_rows, cols, None, out);
}

/// Divides by the largest, so that sums stay in range; values that are then below 2^-100 are as good as zero.
fn normalise(importance: &[f32]) -> Vec<f32> {
    let largest = importance.iter().fold(0.0f32, |m, &w| m.max(w));
    let divisor = if largest > 0.0 { f64::from(largest) } else { 1.0 };
    let floor = 2f64.powi(-100);
    importance.iter().map(|&w| f64::from(w) / divisor).map(|w| if w < floor { 0.0 } else { w as f32 }).collect()
}

/// The codebook of `q4` or `q3` in the form that searches read.
pub(super) fn table(ty: WeightType) -> &'static Table {
    if ty == WeightType::Q4 { &Q4 } else { &Q3 }
}

/// The codebook of `q2`.
pub(super) fn trellis() -> &'static Trellis {
    &Q2
}

/// Rows of `q4`, `q3` or `q2` before they are interleaved.
#[derive(Debug)]
pub struct Quantised {
    ty: WeightType,
    cols: usize,
    /// One per row.
    pub(super) scales: Vec<f32>,
    /// One per block, row after row.
    bytes: Vec<u8>,
    /// The number of the level of each weight, or its own code for `q2`, `[rows, cols]`.
    numbers: Vec<u8>,
}

/// One of them.
pub(super) struct QuantisedRow<'a> {
    pub(super) bytes: &'a mut [u8],
    pub(super) numbers: &'a mut [u8],
}

impl Quantised {
    /// So many rows of zeros.
    ///
    /// # Panics
    /// For types without a codebook.
    pub(super) fn new(ty: WeightType, rows: usize, cols: usize) -> Self {
        let blocks = cols.div_ceil(Codebook::of(ty).block);
        Quantised { ty, cols, scales: vec![0.0; rows], bytes: vec![0; rows * blocks], numbers: vec![0; rows * cols] }
    }

    pub(super) fn book(&self) -> &'static Codebook {
        Codebook::of(self.ty)
    }

    fn blocks(&self) -> usize {
        self.cols.div_ceil(self.book().block)
    }

    pub(super) fn row(&mut self, row: usize) -> QuantisedRow<'_> {
        let (blocks, cols) = (self.blocks(), self.cols);
        QuantisedRow {
            bytes: &mut self.bytes[row * blocks..][..blocks],
            numbers: &mut self.numbers[row * cols..][..cols],
        }
    }

    /// Writes a row group, the `n_rows` rows from `first` on, as [`pack_row_group`] does.
    ///
    /// # Panics
    /// Like [`pack_row_group`].
    pub fn pack_row_group(&self, first: usize, n_rows: usize, out: &mut [u8]) {
        let (cols, blocks) = (self.cols, self.blocks());
        let (scales, values) = planes(self.ty, n_rows, cols, n_rows * cols, out);
        for r in 0..n_rows {
            scales[r * 4..][..4].copy_from_slice(&self.scales[first + r].to_le_bytes());
            for (b, &byte) in self.bytes[(first + r) * blocks..][..blocks].iter().enumerate() {
                scales[(4 + b) * ROW_GROUP + r] = byte;
            }
        }
        let numbers = &self.numbers[first * cols..][..n_rows * cols];
        match self.ty {
            WeightType::Q4 => put_nibbles(numbers, n_rows, cols, values),
            WeightType::Q3 => put_threes(numbers, n_rows, cols, values),
            _ => put_rings(numbers, n_rows, cols, values),
        }
    }
}

fn pack(
    kernels: Kernels,
    ty: WeightType,
    src: &[f32],
    n_rows: usize,
    cols: usize,
    weight: Option<&[f32]>,
    out: &mut [u8],
) {
    assert_eq!(Some(src.len()), n_rows.checked_mul(cols), "{n_rows} rows of {cols} columns");
    let mut rows = Quantised::new(ty, n_rows, cols);
    if cols > 0 {
        for (r, x) in src.chunks_exact(cols).enumerate() {
            let row = rows.row(r);
            let found = match ty {
                WeightType::Q2 => trellis().row(x, weight, row.numbers),
                _ => table(ty).row(kernels, x, weight, row.numbers),
            };
            row.bytes.copy_from_slice(&found.bytes);
            rows.scales[r] = found.scale;
        }
    }
    rows.pack_row_group(0, n_rows, out);
}

/// Three vectors of nibbles per 32 columns: their low three bits are fours 0..3 and 4..7 of columns, their top bits fours 3 and 7.
fn put_threes(numbers: &[u8], n_rows: usize, cols: usize, values: &mut [u8]) {
    for r in 0..n_rows {
        for (k, &number) in numbers[r * cols..][..cols].iter().enumerate() {
            let (vector, high) = (k / 4 % 4, k % BLOCK / 16 * 4);
            let mut or = |v: usize, bits: u8| values[k / BLOCK * 96 + v * 32 + r * 4 + k % 4] |= bits << high;
            if vector < 3 {
                or(vector, number);
            } else {
                (0..3).for_each(|bit| or(bit, (number >> bit & 1) << 3));
            }
        }
    }
}

/// A word per row and 16 columns, with two bits for each place.
fn put_rings(codes: &[u8], n_rows: usize, cols: usize, values: &mut [u8]) {
    const HALF: usize = BLOCK / 2;
    for r in 0..n_rows {
        for (h, codes) in codes[r * cols..][..cols].chunks(HALF).enumerate() {
            let word = codes.iter().enumerate().fold(0, |word, (k, &code)| word | u32::from(code) << (2 * place(k)));
            values[h * 4 * ROW_GROUP + 4 * r..][..4].copy_from_slice(&word.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row_group_len;

    #[test]
    fn every_instruction_set_rounds_alike() {
        let mut state = 5u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        for ty in [WeightType::Q4, WeightType::Q3] {
            for cols in [1, 31, 48, 512] {
                let src: Vec<f32> = (0..ROW_GROUP * cols).map(|_| random().powi(3)).collect();
                let weight: Vec<f32> = (0..cols).map(|_| random().abs()).collect();
                for weight in [None, Some(&weight[..])] {
                    let packed = |kernels| {
                        let mut out = vec![0; row_group_len(ty, cols).unwrap()];
                        pack(kernels, ty, &src, ROW_GROUP, cols, weight, &mut out);
                        out
                    };
                    let want = packed(Kernels::scalar());
                    for kernels in Kernels::available() {
                        assert_eq!(packed(kernels), want, "{} {ty:?} {cols} columns", kernels.isa_name());
                    }
                }
            }
        }
    }
}
