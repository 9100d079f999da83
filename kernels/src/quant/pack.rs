//! Packing of `q4` and `q3` row groups.

use super::codebook::Codebook;
use super::search::Table;
use crate::matrix::{BLOCK, ROW_GROUP, WeightType};
use crate::pack::{pack_row_group, planes, put_nibbles};
use std::sync::LazyLock;

static Q4: LazyLock<Table> = LazyLock::new(|| Table::new(&Codebook::Q4));
static Q3: LazyLock<Table> = LazyLock::new(|| Table::new(&Codebook::Q3));

/// As [`pack_row_group`], with the importance of each input column for the types that minimise an error, `q4` and `q3`.
///
/// They minimise `Σ ω_j (x_j − x̂_j)²` over a row. `ω_j` is the importance of column `j`, best the mean square of the
/// activations that meet it, for then the sum estimates the mean square error of the output; without importance it is 1.
/// Only ratios matter. Where it is zero throughout a block, the block's weights count alike.
///
/// A row with a NaN or an infinity has scale NaN, so that it is not mistaken for numbers. Other types round each weight
/// for itself; their importance is checked and ignored.
///
/// # Panics
/// As [`pack_row_group`], or if `importance` has not one number per column, or one that is negative or not finite.
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
        WeightType::Q4 | WeightType::Q3 => pack(ty, src, n_rows, cols, weight.as_deref(), out),
        _ => pack_row_group(ty, src, n_rows, cols, out),
    }
}

/// Packs a row group of `q4` or `q3` with all columns alike.
pub(crate) fn pack_unweighted(ty: WeightType, src: &[f32], n_rows: usize, cols: usize, out: &mut [u8]) {
    pack(ty, src, n_rows, cols, None, out);
}

/// Divided by the largest, so that sums stay in range; what is then below 2^-100 is as good as zero.
fn normalise(importance: &[f32]) -> Vec<f32> {
    let largest = importance.iter().fold(0.0f32, |m, &w| m.max(w));
    let divisor = if largest > 0.0 { f64::from(largest) } else { 1.0 };
    let floor = 2f64.powi(-100);
    importance.iter().map(|&w| f64::from(w) / divisor).map(|w| if w < floor { 0.0 } else { w as f32 }).collect()
}

fn pack(ty: WeightType, src: &[f32], n_rows: usize, cols: usize, weight: Option<&[f32]>, out: &mut [u8]) {
    let (scales, values) = planes(ty, n_rows, cols, src.len(), out);
    let table: &Table = if ty == WeightType::Q4 { &Q4 } else { &Q3 };
    let mut numbers = vec![0; n_rows * cols];
    if cols > 0 {
        for (r, (x, numbers)) in src.chunks_exact(cols).zip(numbers.chunks_exact_mut(cols)).enumerate() {
            let row = table.row(x, weight, numbers);
            scales[r * 4..][..4].copy_from_slice(&row.scale.to_le_bytes());
            for (b, byte) in row.bytes.into_iter().enumerate() {
                scales[(4 + b) * ROW_GROUP + r] = byte;
            }
        }
    }
    if ty == WeightType::Q4 {
        put_nibbles(&numbers, n_rows, cols, values);
    } else {
        put_threes(&numbers, n_rows, cols, values);
    }
}

/// Three vectors of nibbles per 32 columns: the low three bits are quads 0..3 and 4..7, the top bits quads 3 and 7.
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
