//! The order in which a tensor's rows are stored.

/// The order in which the rows of a tensor are stored, if it differs from that of the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// That of the model.
    #[default]
    AsStored,
    /// The two halves of each head alternate: row `h·head_rows + half·head_rows/2 + j` of the model is the stored row `h·head_rows
    /// + 2j + half`. llama.cpp's converter stores queries and keys of some families like this, because it rotates adjacent elements
    /// together (`permute` in `convert_hf_to_gguf.py`).
    Interleaved {
        /// Rows of a head, an even number that divides the tensor's rows.
        head_rows: usize,
    },
}

impl RowOrder {
    /// The index of the stored row that is the model's row `row`; rows are numbered across a stack.
    pub(crate) fn stored(self, row: usize) -> usize {
        match self {
            RowOrder::AsStored => row,
            RowOrder::Interleaved { head_rows } => {
                let (head, row) = (row / head_rows * head_rows, row % head_rows);
                let (half, j) = (row / (head_rows / 2), row % (head_rows / 2));
                head + 2 * j + half
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_heads_alternate() {
        let order = RowOrder::Interleaved { head_rows: 6 };
        let stored: Vec<usize> = (0..12).map(|row| order.stored(row)).collect();
        assert_eq!(stored, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
        assert_eq!(RowOrder::AsStored.stored(7), 7);
    }
}
