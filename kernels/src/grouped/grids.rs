//! Codes that are numbers of points of a grid, with signs (ggml's i-quants).

use crate::matrix::ROW_GROUP;
use crate::scalar::Rows;
use sluice_weights::Codes;

/// What the codes of column `k` stand for, one number per row.
pub(crate) fn numbers(_codes: Codes, _values: &[u8], _k: usize) -> Rows {
    [0.0; ROW_GROUP]
}

/// The odd integer `2s + 1` of the scale that is in the record of the columns from `first` on.
pub(crate) fn scale(_codes: Codes, _values: &[u8], _first: usize, _r: usize) -> i32 {
    1
}
