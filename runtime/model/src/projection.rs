//! A projection that is one matrix or the product of two narrow ones.

use sluice_kernels::Activations;

use super::ModelError;
use super::compute::{Compute, Step, sized};
use super::weights::{ExtentTensors, MatrixRef};

/// A projection of a layer's input.
#[derive(Debug)]
pub enum Projection {
    /// One matrix `[width, hidden]`.
    Full(MatrixRef),
    /// `up · down`, `[width, rank]` and `[rank, hidden]`.
    LowRank {
        /// The first matrix, which meets the input.
        down: MatrixRef,
        /// The second matrix, which meets the product with `down`.
        up: MatrixRef,
    },
}

/// Buffers that projections reuse from call to call.
#[derive(Debug)]
pub struct ProjectionScratch {
    low: Vec<f32>,
    activations: Activations,
}

impl ProjectionScratch {
    /// Empty buffers; they grow to the size that the first call needs.
    pub fn new(compute: &Compute) -> Self {
        ProjectionScratch { low: Vec::new(), activations: Activations::new(compute.precision) }
    }
}

/// f32 values of scratch per token for a projection of this rank.
pub fn scratch_width(rank: Option<usize>) -> usize {
    2 * rank.unwrap_or(0)
}

impl Projection {
    /// The matrix `whole`, or `down` and `up` if there is a rank.
    pub(super) fn new(
        tensors: &ExtentTensors<'_>,
        rank: Option<usize>,
        whole: &'static str,
        [down, up]: [&'static str; 2],
    ) -> Result<Self, ModelError> {
        Ok(match rank {
            None => Projection::Full(tensors.matrix(whole)?),
            Some(_) => Projection::LowRank { down: tensors.matrix(down)?, up: tensors.matrix(up)? },
        })
    }

    /// `out` `[n, width]` = the projection of `x` `[n, hidden]`.
    pub fn apply(&self, step: Step<'_>, x: &Activations, scratch: &mut ProjectionScratch, out: &mut [f32]) {
        match self {
            Projection::Full(matrix) => step.multiply(matrix, x, out),
            Projection::LowRank { down, up } => {
                let (n, rank) = (x.n(), down.rows());
                let low = sized(&mut scratch.low, n * rank);
                step.multiply(down, x, low);
                scratch.activations.set(low, n, rank);
                step.multiply(up, &scratch.activations, out);
            }
        }
    }
}
