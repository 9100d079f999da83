//! Orthogonal maps that spread the contents of one column over many: random signs, then Hadamard's matrix in blocks (incoherence
//! processing: J. Chee et al., "QuIP", arXiv:2307.13304; with Hadamard's matrix A. Tseng et al., "QuIP#", arXiv:2402.04396).

/// `Q x` for rows of some width.
pub struct Rotation {
    block: usize,
    /// ±1/√block, one for each column.
    signs: Vec<f32>,
}

impl Rotation {
    /// Blocks whose size is a power of two that divides the columns, with signs that are the same in each run.
    pub fn new(cols: usize, block: usize) -> Self {
        assert!(block.is_power_of_two() && cols.is_multiple_of(block), "blocks of {block} in {cols} columns");
        let size = 1.0 / (block as f32).sqrt();
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut sign = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            if state >> 63 == 0 { size } else { -size }
        };
        Rotation { block, signs: (0..cols).map(|_| sign()).collect() }
    }

    /// Rotates rows, `[n, cols]`, one after the other.
    pub fn apply(&self, rows: &mut [f32]) {
        for row in rows.chunks_exact_mut(self.signs.len()) {
            row.iter_mut().zip(&self.signs).for_each(|(x, sign)| *x *= sign);
            self.mix(row);
        }
    }

    /// Rotates rows back: Hadamard's matrix is symmetric.
    pub fn undo(&self, rows: &mut [f32]) {
        for row in rows.chunks_exact_mut(self.signs.len()) {
            self.mix(row);
            row.iter_mut().zip(&self.signs).for_each(|(x, sign)| *x *= sign);
        }
    }

    /// Sums and differences, `block · log₂ block` of them for each block.
    fn mix(&self, row: &mut [f32]) {
        let mut half = 1;
        while half < self.block {
            for pair in row.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
    }
}
