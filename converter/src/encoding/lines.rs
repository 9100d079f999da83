//! Which rows of a source hold which rows of a matrix.

use super::{Rows, Selection};
use crate::error::ConvertError;

/// Whole rows of a source, and which part of them is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lines {
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) step: usize,
    /// First column that is needed.
    pub(super) column: usize,
    /// Rows of the result that they hold.
    pub(super) rows: usize,
}

impl Lines {
    /// Their numbers.
    pub(super) fn numbers(self) -> impl Iterator<Item = usize> {
        (0..self.count).map(move |i| self.first + i * self.step)
    }
}

/// The source rows that hold `rows`.
pub(super) fn pieces(selection: &Selection, rows: Rows) -> Vec<Lines> {
    if selection.is_transposed() { of_columns(selection, rows) } else { of_rows(selection, rows) }
}

/// The source rows that hold `rows` of an untransposed source: one piece per run.
pub(super) fn of_rows(selection: &Selection, rows: Rows) -> Vec<Lines> {
    by_run(selection, rows, |first, column, rows| Lines {
        first,
        count: rows,
        step: (selection.strides.row_step / selection.cols).max(1),
        column,
        rows,
    })
}

/// The source rows that hold all columns of `rows` of a transposed source: one piece per run.
fn of_columns(selection: &Selection, rows: Rows) -> Vec<Lines> {
    by_run(selection, rows, |first, column, count| Lines {
        first,
        count: rows.cols,
        step: (selection.strides.col_step / selection.cols).max(1),
        column,
        rows: count,
    })
}

fn by_run(selection: &Selection, rows: Rows, piece: impl Fn(usize, usize, usize) -> Lines) -> Vec<Lines> {
    let mut pieces = Vec::new();
    let mut done = 0;
    while done < rows.count {
        let first = rows.first + done;
        let count = (selection.strides.run - first % selection.strides.run).min(rows.count - done);
        let (line, column) = selection.locate(first, 0);
        pieces.push(piece(line, column, count));
        done += count;
    }
    pieces
}

/// The elements of `rows`, row-major, in `out`. `read` returns the values of whole source rows, one piece after the other.
pub(super) fn gather(
    selection: &Selection,
    rows: Rows,
    out: &mut Vec<f32>,
    mut read: impl FnMut(Lines, &mut Vec<f32>) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    out.clear();
    out.resize(rows.count * rows.cols, 0.0);
    let (mut row, mut values) = (0, Vec::new());
    for piece in pieces(selection, rows) {
        read(piece, &mut values)?;
        row = pick(selection, piece, &values, 1, (out, rows.cols, row));
    }
    Ok(())
}

/// Copies the matrix's elements of the source rows `lines` to its rows from `row` on, and returns the first row after them.
/// `values` are whole source rows, with `width` values for each element.
pub(super) fn pick<T: Copy>(
    selection: &Selection,
    lines: Lines,
    values: &[T],
    width: usize,
    to: (&mut [T], usize, usize),
) -> usize {
    let (out, cols, mut row) = to;
    let values = values.chunks_exact(selection.cols * width);
    if selection.is_transposed() {
        // A piece has all columns of some rows, and these rows are columns of the source.
        for (c, line) in values.enumerate() {
            for r in 0..lines.rows {
                let from = (lines.column + r * selection.strides.row_step) * width;
                out[((row + r) * cols + c) * width..][..width].copy_from_slice(&line[from..][..width]);
            }
        }
        return row + lines.rows;
    }
    for line in values {
        out[row * cols * width..][..cols * width].copy_from_slice(&line[lines.column * width..][..cols * width]);
        row += 1;
    }
    row
}
