//! The output of heads whose shared keys are also values: it is rotated back, then projected in groups.

use sluice_format::CompressedSpec;
use sluice_kernels::Activations;

use crate::ModelError;
use crate::compute::{Step, sized};
use crate::rope::{Rope, RopeAngles};
use crate::tasks::Tasks;
use crate::weights::{ExtentTensors, MatrixRef};

/// The two projections.
#[derive(Debug)]
pub struct Output {
    groups: usize,
    /// Numbers of a head, of all heads of a group, and of a group's projection.
    head_dim: usize,
    group: usize,
    rank: usize,
    a: MatrixRef,
    o: MatrixRef,
}

/// Buffers that outputs reuse from call to call.
#[derive(Debug, Default)]
pub struct OutputScratch {
    /// `[rows, heads, head_dim]`.
    by_row: Vec<f32>,
    back: RopeAngles,
    /// The results of one group, `[rows, group]`.
    group: Vec<f32>,
    projected: Vec<f32>,
    /// `[rows, groups, rank]`.
    joined: Vec<f32>,
}

/// f32 values of scratch per token.
pub fn scratch_width(spec: &CompressedSpec) -> usize {
    let heads = spec.heads() * spec.head_dim;
    heads + 2 * spec.group_heads * spec.head_dim + 2 * spec.output_groups * spec.output_rank + spec.output_rank
}

impl Output {
    pub(super) fn new(spec: &CompressedSpec, tensors: &ExtentTensors<'_>) -> Result<Self, ModelError> {
        Ok(Output {
            groups: spec.output_groups,
            head_dim: spec.head_dim,
            group: spec.group_heads * spec.head_dim,
            rank: spec.output_rank,
            a: tensors.matrix("o_a")?,
            o: tensors.matrix("o")?,
        })
    }

    /// Puts the results of tasks in the order of rows.
    pub fn gather(&self, (by_task, tasks): (&[f32], &Tasks), n: usize, scratch: &mut OutputScratch) {
        let width = self.groups * self.group;
        tasks.by_row(by_task, width / self.head_dim, sized(&mut scratch.by_row, n * width));
    }

    /// Undoes the rotation of values, by `angles` of the rows' own positions, so that only the distance to each value remains.
    pub fn rotate_back(&self, step: Step<'_>, rope: &Rope, angles: &RopeAngles, scratch: &mut OutputScratch) {
        let OutputScratch { by_row, back, .. } = scratch;
        Rope::reverse(angles, back);
        let (width, back) = (self.groups * self.group, &*back);
        step.compute.threads.for_each_piece(&mut by_row[..step.n() * width], width, &|row, heads| {
            heads.chunks_exact_mut(self.head_dim).for_each(|head| rope.rotate_end(head, back, row));
        });
    }

    /// Projects the groups one by one, then projects all of them together to `out` `[rows, hidden]`.
    pub fn project(&self, step: Step<'_>, activations: &mut Activations, scratch: &mut OutputScratch, out: &mut [f32]) {
        let OutputScratch { by_row, group, projected, joined, .. } = scratch;
        let n = step.n();
        let (width, joined_width) = (self.groups * self.group, self.groups * self.rank);
        let (group, projected) = (sized(group, n * self.group), sized(projected, n * self.rank));
        let joined = sized(joined, n * joined_width);
        for g in 0..self.groups {
            for (group, row) in group.chunks_exact_mut(self.group).zip(by_row.chunks_exact(width)) {
                group.copy_from_slice(&row[g * self.group..][..self.group]);
            }
            activations.set(group, n, self.group);
            step.compute.observe(&self.a, g as u32, activations);
            let matrix = self.a.view_of_batch(step.extent, g);
            step.compute.kernels.matmul(&step.compute.threads, matrix, activations, projected);
            for (joined, projected) in joined.chunks_exact_mut(joined_width).zip(projected.chunks_exact(self.rank)) {
                joined[g * self.rank..][..self.rank].copy_from_slice(projected);
            }
        }
        activations.set(joined, n, joined_width);
        step.multiply(&self.o, activations, out);
    }
}
