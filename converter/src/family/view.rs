//! Which part of a source tensor becomes a tensor of the model.

/// Elements of a tensor, row-major, that become the rows of a matrix, or of a batch of matrices one after the other.
///
/// Strides are in elements, so the same three can describe every case: for a transposed matrix the steps of row and column are
/// exchanged, for every other row the row's step is doubled, and one of many experts has another start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Strides {
    /// The element that is row 0, column 0.
    pub(crate) start: usize,
    /// Rows come in runs of this many, such as the rows of one head.
    pub(crate) run: usize,
    /// Elements from the first row of a run to the first row of the next.
    pub(crate) run_step: usize,
    /// Elements from row to row within a run.
    pub(crate) row_step: usize,
    /// Elements from column to column.
    pub(crate) col_step: usize,
}

impl Strides {
    /// `rows` rows of `cols` columns from `first_row` on, as in memory.
    pub(crate) fn rows(first_row: usize, rows: usize, cols: usize) -> Self {
        Strides { start: first_row * cols, run: rows, run_step: 0, row_step: cols, col_step: 1 }
    }

    /// Index of an element.
    pub(crate) fn at(&self, row: usize, col: usize) -> usize {
        self.start + row / self.run * self.run_step + row % self.run * self.row_step + col * self.col_step
    }
}

/// A part of a source tensor. The last dimension of the source is its columns; the others together are its rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    /// The source tensor.
    pub(crate) tensor: String,
    /// The expected shape.
    pub(crate) source_shape: Vec<usize>,
    /// Which of its elements.
    pub(crate) strides: Strides,
    /// Whether 1 is added to each element: for norms that the family stores around zero.
    pub(crate) plus_one: bool,
    /// For integers, such as expert ids: they must be less than this, and all different in a row of the source.
    pub(crate) below: Option<usize>,
}

/// Where a tensor comes from: the first alternative that the checkpoint has. Each alternative is one view, or gate and up of a
/// pair, or the whole tensors that form a vector.
pub(crate) type Origin = Vec<Vec<View>>;

impl View {
    /// Any part of a tensor.
    pub(crate) fn new(tensor: String, source_shape: &[usize], strides: Strides) -> Self {
        View { tensor, source_shape: source_shape.to_vec(), strides, plus_one: false, below: None }
    }

    /// A whole matrix.
    pub(crate) fn whole(tensor: String, rows: usize, cols: usize) -> Self {
        View::new(tensor, &[rows, cols], Strides::rows(0, rows, cols))
    }

    /// A whole vector.
    pub(crate) fn vector(tensor: String, len: usize) -> Self {
        View::new(tensor, &[len], Strides::rows(0, 1, len))
    }

    /// A whole table of integers less than `below`, row by row.
    pub(crate) fn table(tensor: String, rows: usize, cols: usize, below: usize) -> Self {
        View { below: Some(below), ..View::new(tensor, &[rows, cols], Strides::rows(0, 1, rows * cols)) }
    }

    /// The rows from `first` to `first + rows` of matrix `index` in a stack of shape `stack`.
    pub(crate) fn of_stack(tensor: String, stack: [usize; 3], index: usize, first: usize, rows: usize) -> Self {
        View::new(tensor, &stack, Strides::rows(index * stack[1] + first, rows, stack[2]))
    }
}
