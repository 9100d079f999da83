//! Factorisation of the mean products of a matrix's inputs.

use crate::isa::Kernels;
use crate::update::{Stripes, Target};

/// Columns that are eliminated from each other one by one; from the other columns they are eliminated together.
const TOGETHER: usize = 64;

/// `H = Cᵀ D C` of a symmetric positive matrix: `C` is lower triangular with ones on its diagonal, `D` diagonal.
pub(super) struct Factors {
    n: usize,
    /// Row-major `[n, n]`: on and below the diagonal `√D_k C_kj`.
    scaled: Vec<f32>,
}

impl Factors {
    /// Factors a matrix, whose elements on and below the diagonal `entry` gives; `None` if it is not positive. It goes column by
    /// column from the last to the first (Cholesky's method with rows and columns in reverse order): `√D_k C_kj = H_kj / √H_kk`,
    /// then `H_ij = fma(−√D_k C_ki, √D_k C_kj, H_ij)` for `j ≤ i < k`.
    pub(super) fn new(kernels: &Kernels, n: usize, entry: impl Fn(usize, usize) -> f32) -> Option<Factors> {
        let mut scaled = vec![0.0; n * n];
        for (i, row) in scaled.chunks_mut(n.max(1)).enumerate() {
            row[..=i].iter_mut().enumerate().for_each(|(j, to)| *to = entry(i, j));
        }
        let (mut tall, mut wide) = (Stripes::default(), Stripes::default());
        let mut negated = Vec::new();
        let mut end = n;
        while end > 0 {
            let first = end.saturating_sub(TOGETHER);
            for k in (first..end).rev() {
                let (above, row) = scaled.split_at_mut(k * n);
                eliminate(kernels, n, first, above, &mut row[..=k])?;
            }
            let (above, rows) = scaled.split_at_mut(first * n);
            let count = end - first;
            negated.clear();
            negated.extend((0..count).rev().flat_map(|k| &rows[k * n..][..first]).map(|x| -x));
            tall.set(count, first, |k| &negated[k * first..][..first]);
            wide.set(count, first, |k| &rows[(count - 1 - k) * n..][..first]);
            if first > 0 {
                let mut to = Target { values: above, stride: n, columns: 0..first };
                kernels.update(&tall, 0..tall.count(), &wide, &mut to, true);
            }
            end = first;
        }
        Some(Factors { n, scaled })
    }

    /// `D_k`.
    pub(super) fn weight(&self, k: usize) -> f32 {
        let root = self.scaled[k * self.n + k];
        root * root
    }

    /// Columns `from..to` of `C`, each as a row that begins with row `from` of the matrix: `[to − from, n − from]`.
    pub(super) fn columns(&self, from: usize, to: usize) -> Vec<f32> {
        let (n, width) = (self.n, self.n - from);
        let mut columns = vec![0.0; (to - from) * width];
        for k in from..n {
            let row = &self.scaled[k * n..][..=k];
            for (j, &value) in row[from..(k + 1).min(to)].iter().enumerate() {
                columns[j * width + k - from] = value / row[k];
            }
        }
        columns
    }
}

/// Finishes a row, the last of the remaining ones, and eliminates it from the rows from `first` on. `None` if its diagonal is not
/// positive.
fn eliminate(kernels: &Kernels, n: usize, first: usize, above: &mut [f32], row: &mut [f32]) -> Option<()> {
    let (diagonal, row) = row.split_last_mut()?;
    if !(*diagonal > 0.0 && diagonal.is_finite()) {
        return None;
    }
    *diagonal = diagonal.sqrt();
    row.iter_mut().for_each(|x| *x /= *diagonal);
    for (i, other) in above.chunks_mut(n).enumerate().skip(first) {
        kernels.axpy(-row[i], &row[..=i], &mut other[..=i]);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factors_give_the_matrix() {
        for n in [1, 2, 31, 64, 65, 150] {
            // A few random rows and a diagonal make it positive.
            let rows: Vec<f32> = (0..9 * n).map(|i| (i as f32 * 1.37).sin()).collect();
            let entry = |i: usize, j: usize| {
                let sum: f32 = rows.chunks(n).map(|row| row[i] * row[j]).sum();
                sum + if i == j { 1.0 } else { 0.0 }
            };
            let mut bits = Vec::new();
            for kernels in Kernels::available() {
                let factors = Factors::new(&kernels, n, entry).unwrap();
                let c = factors.columns(0, n);
                for i in 0..n {
                    for j in 0..=i {
                        // C_ki is at place k of row i of the columns.
                        let product = |k: usize| c[i * n + k] * factors.weight(k) * c[j * n + k];
                        let found: f32 = (i..n).map(product).sum();
                        assert!((found - entry(i, j)).abs() < 1e-4, "{n}: {i}, {j}");
                    }
                }
                let cut = factors.columns(n / 2, n);
                assert!(
                    (0..n - n / 2)
                        .all(|j| cut[j * (n - n / 2)..][..n - n / 2] == c[(n / 2 + j) * n + n / 2..][..n - n / 2])
                );
                bits.push(factors.scaled);
            }
            assert!(bits.windows(2).all(|b| b[0] == b[1]));
        }
    }

    #[test]
    fn what_is_not_positive_has_none() {
        let kernels = Kernels::scalar();
        assert!(Factors::new(&kernels, 2, |_, _| 1.0).is_none());
        assert!(Factors::new(&kernels, 1, |_, _| f32::NAN).is_none());
        assert!(Factors::new(&kernels, 1, |_, _| f32::INFINITY).is_none());
        assert!(Factors::new(&kernels, 3, |i, j| if i == j { -1.0 } else { 0.0 }).is_none());
    }
}
