//! The choice of row scale, block bytes and levels that makes the weighted squared error small.
#![allow(clippy::needless_range_loop, reason = "one index runs over several arrays that must stay in registers")]

use super::codebook::{Codebook, SCALE_MAX, scale_over_unit};
use crate::isa::Kernels;
use crate::math::ROUND;

/// Cells of a [`Table`], half an integer wide; a power of two, so that indices can be masked.
const CELLS: usize = 1024;

/// A codebook in the form that the search reads.
///
/// Levels are integers, so the border between two neighbours is a multiple of ½, and all numbers in `[h/2, (h + 1)/2)` have the
/// same nearest level.
pub(super) struct Table {
    book: &'static Codebook,
    /// Number of the level nearest to the numbers in a cell; cell 0 begins at `−CELLS/4`.
    number: [u8; CELLS],
    /// For each cell, the sum of its nearest level and the offset, for each of the eight offsets.
    values: Vec<[f32; OFFSETS]>,
    /// The integer that the low five bits of a byte stand for.
    scales: [f32; 32],
}

/// Offsets of a codebook.
const OFFSETS: usize = 8;

/// One block: numbers and the weights of their errors, both zero beyond the row's end.
pub(super) struct Block<const B: usize> {
    x: [f32; B],
    weight: [f32; B],
    absmax: f32,
}

impl<const B: usize> Block<B> {
    /// Numbers and their weights, at most `B`.
    #[inline(always)]
    pub(super) fn new(x: &[f32], weight: &[f32]) -> Self {
        let mut block = Block { x: [0.0; B], weight: [0.0; B], absmax: 0.0 };
        block.x[..x.len()].copy_from_slice(x);
        block.weight[..x.len()].copy_from_slice(weight);
        block.absmax = x.iter().fold(0.0, |m, x| m.max(x.abs()));
        block
    }
}

/// The numbers that a block with a certain byte can represent.
#[derive(Clone, Copy, Default)]
pub(super) struct Grid {
    step: f32,
    inverse: f32,
    byte: u8,
    /// Mask for the numbers of levels.
    mask: u8,
}

/// A quantised row.
pub(super) struct Row {
    /// `S`.
    pub(super) scale: f32,
    /// One per block.
    pub(super) bytes: Vec<u8>,
}

/// Row scales that are tried first, as a fraction of the one that puts the largest weight of the row on the last level with the
/// largest block scale.
const FIRST: [f32; 3] = [0.8, 0.9, 1.0];

/// Scales that are tried in each direction without improvement before the search of a block ends.
pub(super) const PATIENCE: usize = 2;

/// Rounds of least squares for the row scale.
const REFINEMENTS: usize = 2;

impl Table {
    pub(super) fn new(book: &'static Codebook) -> Table {
        let levels = &book.levels[..book.len];
        let number: [u8; CELLS] = std::array::from_fn(|cell| {
            // Compares twice the number at the middle of the cell, times two, with twice the sum of two neighbours.
            let middle = 2 * (cell as i32 - CELLS as i32 / 2) + 1;
            levels.windows(2).filter(|w| 2 * (i32::from(w[0]) + i32::from(w[1])) < middle).count() as u8
        });
        let value = |cell: usize, k: usize| {
            let offset = book.offset((k as u8) << 5);
            i32::from(levels[usize::from(number[moved(cell as u32, offset)])]) + offset
        };
        Table {
            book,
            values: (0..CELLS).map(|cell| std::array::from_fn(|k| value(cell, k) as f32)).collect(),
            number,
            scales: std::array::from_fn(|code| scale_over_unit(code as u8) * super::UNIT),
        }
    }

    /// Quantises a row, whose weights of error are `weight` or all equal, and writes the number of each level.
    pub(super) fn row(&self, kernels: Kernels, x: &[f32], weight: Option<&[f32]>, numbers: &mut [u8]) -> Row {
        if self.book.block == 16 {
            self.row_by::<16>(kernels, x, weight, numbers)
        } else {
            self.row_by::<32>(kernels, x, weight, numbers)
        }
    }

    fn row_by<const B: usize>(&self, kernels: Kernels, x: &[f32], weight: Option<&[f32]>, numbers: &mut [u8]) -> Row {
        numbers.fill(0);
        let zero = vec![0; x.len().div_ceil(B)];
        let (absmax, exponent) = match normalising(x) {
            Ok(found) => found,
            Err(scale) => return Row { scale, bytes: zero },
        };
        let power = |e: i64| f64::from_bits(((1023 + e) as u64) << 52);
        let blocks = blocks::<B>(x, weight, power(-exponent));
        let (scale, bytes) = self.fit(kernels, &blocks, (f64::from(absmax) * power(-exponent)) as f32);
        for ((block, numbers), &byte) in blocks.iter().zip(numbers.chunks_mut(B)).zip(&bytes) {
            self.choose(block, scale, byte, numbers);
        }
        // The represented numbers must be finite, even if the weights are the largest that there are.
        let largest = f64::from(self.largest(&blocks, scale, &bytes));
        let scale = (f64::from(scale) * power(exponent)).min(f64::from(f32::MAX) / largest);
        let rounded = scale as f32;
        let fits = f64::from(rounded) * largest <= f64::from(f32::MAX);
        Row { scale: if fits { rounded } else { rounded.next_down() }, bytes }
    }

    /// Row scale and bytes of a row whose largest magnitude is `absmax`.
    fn fit<const B: usize>(&self, kernels: Kernels, blocks: &[Block<B>], absmax: f32) -> (f32, Vec<u8>) {
        let mut best = (f64::INFINITY, 0.0, vec![0; blocks.len()]);
        let mut bytes = vec![0; blocks.len()];
        for first in FIRST {
            let scale = first * absmax / (self.reach() * SCALE_MAX);
            let error = kernels.compiled(|| self.bytes(blocks, scale, None, &mut bytes));
            if error < best.0 {
                best = (error, scale, bytes.clone());
            }
        }
        for _ in 0..REFINEMENTS {
            let Some(scale) = self.least_squares(blocks, best.1, &best.2) else { break };
            let error = kernels.compiled(|| self.bytes(blocks, scale, Some(&best.2), &mut bytes));
            if error >= best.0 {
                break;
            }
            best = (error, scale, bytes.clone());
        }
        (best.1, best.2)
    }

    /// The last level.
    fn reach(&self) -> f32 {
        f32::from(self.book.levels[self.book.len - 1])
    }

    /// The best byte of every block and the sum of their errors. Beside `near`, only neighbouring scales are tried.
    #[inline(always)]
    fn bytes<const B: usize>(&self, blocks: &[Block<B>], scale: f32, near: Option<&[u8]>, bytes: &mut [u8]) -> f64 {
        let mut sum = 0.0;
        for (i, (block, byte)) in blocks.iter().zip(bytes).enumerate() {
            let error;
            (error, *byte) = match near {
                None => self.byte(block, scale, PATIENCE),
                Some(near) => self.byte_near(block, scale, near[i]),
            };
            sum += f64::from(error);
        }
        sum
    }

    /// The grid of a block with this byte, in a row of scale `scale`.
    #[inline(always)]
    pub(super) fn grid(&self, scale: f32, byte: u8) -> Grid {
        let step = scale * self.scales[usize::from(byte & 31)];
        // If the step is zero, all results are zero, and so are their numbers.
        let inverse = if step == 0.0 { 0.0 } else { 1.0 / step };
        Grid { step, inverse, byte, mask: if step == 0.0 { 0 } else { 255 } }
    }

    /// Number and value of the level nearest to each of `x`, each in its own grid.
    #[inline(always)]
    pub(super) fn nearest<const L: usize>(&self, x: &[f32; L], grids: &[Grid; L]) -> ([u8; L], [f32; L]) {
        let values: &[[f32; OFFSETS]; CELLS] = self.values[..].try_into().expect("one element per cell");
        let mut y = [0.0; L];
        for l in 0..L {
            y[l] = x[l] * grids[l].inverse;
        }
        let (cells, mut numbers, mut rounded) = (cells_of(&y), [0; L], [0.0; L]);
        for l in 0..L {
            let Grid { step, byte, mask, .. } = grids[l];
            numbers[l] = self.number[moved(cells[l], self.book.offset(byte))] & mask;
            rounded[l] = step * values[cells[l] as usize % CELLS][usize::from(byte >> 5)];
        }
        (numbers, rounded)
    }

    /// Error and byte of a block for a given row scale. `patience`: scales in each direction that may bring no improvement.
    #[inline(always)]
    pub(super) fn byte<const B: usize>(&self, block: &Block<B>, scale: f32, patience: usize) -> (f32, u8) {
        let mut best = (self.error_of_zero(block), 0);
        if block.absmax == 0.0 {
            return best;
        }
        let covers = |&s: &f32| s * scale * self.reach() >= block.absmax;
        let start = self.scales.iter().position(covers).unwrap_or(31).max(1);
        self.walk(block, scale, start..32, patience, &mut best);
        self.walk(block, scale, (1..start).rev(), patience, &mut best);
        best
    }

    /// Tries scales until several in a row bring no improvement.
    #[inline(always)]
    fn walk<const B: usize>(
        &self,
        block: &Block<B>,
        scale: f32,
        codes: impl Iterator<Item = usize>,
        patience: usize,
        best: &mut (f32, u8),
    ) {
        let mut misses = 0;
        for code in codes {
            let before = best.0;
            self.try_scale(block, scale, code, best);
            misses = if best.0 < before { 0 } else { misses + 1 };
            if misses > patience {
                break;
            }
        }
    }

    #[inline(always)]
    fn byte_near<const B: usize>(&self, block: &Block<B>, scale: f32, near: u8) -> (f32, u8) {
        let mut best = (self.error_of_zero(block), 0);
        let code = usize::from(near & 31);
        for code in code.saturating_sub(1).max(1)..(code + 2).min(32) {
            self.try_scale(block, scale, code, &mut best);
        }
        best
    }

    #[inline(always)]
    fn error_of_zero<const B: usize>(&self, block: &Block<B>) -> f32 {
        sum(|j| block.weight[j] * block.x[j] * block.x[j], &block.x)
    }

    /// Tries all offsets with one scale.
    #[inline(always)]
    fn try_scale<const B: usize>(&self, block: &Block<B>, scale: f32, code: usize, best: &mut (f32, u8)) {
        let step = scale * self.scales[code];
        let (y, cells) = cells(&block.x, 1.0 / step);
        let wanted = |sum: f32| step * step * sum < best.0;
        let Some(errors) = self.errors(&y, &cells, &block.weight, wanted) else { return };
        for (k, error) in errors.into_iter().enumerate() {
            let error = step * step * error;
            if error < best.0 {
                *best = (error, (k as u8) << 5 | code as u8);
            }
        }
    }

    /// The weighted squared error with each offset, in steps; lanes are offsets. None once no offset has an error that is `wanted`:
    /// terms are not negative, so sums do not become smaller again, rounded or not.
    #[inline(always)]
    fn errors<const B: usize>(
        &self,
        y: &[f32; B],
        cells: &[u32; B],
        weight: &[f32; B],
        wanted: impl Fn(f32) -> bool,
    ) -> Option<[f32; OFFSETS]> {
        const PART: usize = 8;
        let values: &[[f32; OFFSETS]; CELLS] = self.values[..].try_into().expect("one element per cell");
        let mut sums = [[0.0; OFFSETS]; 2];
        for part in 0..B / PART {
            for j in part * PART..(part + 1) * PART {
                let value = &values[cells[j] as usize % CELLS];
                for k in 0..OFFSETS {
                    let distance = y[j] - value[k];
                    sums[j % 2][k] += weight[j] * distance * distance;
                }
            }
            let mut any = false;
            for k in 0..OFFSETS {
                any |= wanted(sums[0][k] + sums[1][k]);
            }
            if !any {
                return None;
            }
        }
        Some(std::array::from_fn(|k| sums[0][k] + sums[1][k]))
    }

    /// The largest magnitude of the values chosen in a row, divided by the row scale; at least 1.
    fn largest<const B: usize>(&self, blocks: &[Block<B>], scale: f32, bytes: &[u8]) -> f32 {
        let values = blocks.iter().zip(bytes).flat_map(|(block, &byte)| self.chosen(block, scale, byte));
        values.fold(1.0, |m, v| m.max(v.abs()))
    }

    /// The values chosen in a block, divided by the row scale.
    #[inline]
    fn chosen<const B: usize>(&self, block: &Block<B>, scale: f32, byte: u8) -> [f32; B] {
        let (s, k) = (self.scales[usize::from(byte & 31)], usize::from(byte >> 5));
        if s == 0.0 {
            return [0.0; B];
        }
        let (_, cells) = cells(&block.x, 1.0 / (scale * s));
        cells.map(|cell| s * self.values[cell as usize % CELLS][k])
    }

    /// The row scale with the least error for the levels that `scale` and `bytes` choose; `None` if they are all zero.
    fn least_squares<const B: usize>(&self, blocks: &[Block<B>], scale: f32, bytes: &[u8]) -> Option<f32> {
        let (mut xv, mut vv) = (0.0, 0.0);
        for (block, &byte) in blocks.iter().zip(bytes) {
            let value = self.chosen(block, scale, byte);
            xv += f64::from(sum(|j| block.weight[j] * block.x[j] * value[j], &block.x));
            vv += f64::from(sum(|j| block.weight[j] * value[j] * value[j], &block.x));
        }
        (xv > 0.0 && vv > 0.0).then(|| (xv / vv) as f32)
    }

    /// Writes the number of the nearest level of each weight.
    fn choose<const B: usize>(&self, block: &Block<B>, scale: f32, byte: u8, numbers: &mut [u8]) {
        let s = self.scales[usize::from(byte & 31)];
        if s > 0.0 {
            let offset = self.book.offset(byte);
            let (_, cells) = cells(&block.x, 1.0 / (scale * s));
            for (number, cell) in numbers.iter_mut().zip(cells) {
                *number = self.number[moved(cell, offset)];
            }
        }
    }
}

/// Largest magnitude of a row, and the exponent of the largest power of two that is not above it, exact for every magnitude. If
/// nothing has to be chosen for the row, its scale instead: 0 if all numbers are zero, NaN if one is not finite.
pub(super) fn normalising(x: &[f32]) -> Result<(f32, i64), f32> {
    if x.iter().any(|x| !x.is_finite()) {
        return Err(f32::NAN);
    }
    let absmax = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    if absmax == 0.0 { Err(0.0) } else { Ok((absmax, (f64::from(absmax).to_bits() >> 52) as i64 - 1023)) }
}

/// The cell of a number from which `offset` is subtracted.
#[inline(always)]
fn moved(cell: u32, offset: i32) -> usize {
    cell.wrapping_sub((2 * offset) as u32) as usize % CELLS
}

/// Blocks of a row, scaled; if all error weights of a block are zero, they become one.
fn blocks<const B: usize>(x: &[f32], weight: Option<&[f32]>, factor: f64) -> Vec<Block<B>> {
    let mut blocks = Vec::with_capacity(x.len().div_ceil(B));
    for (b, x) in x.chunks(B).enumerate() {
        let mut block = Block { x: [0.0; B], weight: [0.0; B], absmax: 0.0 };
        for (to, &from) in block.x.iter_mut().zip(x) {
            *to = (f64::from(from) * factor) as f32;
        }
        block.absmax = block.x.iter().fold(0.0, |m, x| m.max(x.abs()));
        match weight {
            Some(weight) => block.weight[..x.len()].copy_from_slice(&weight[b * B..][..x.len()]),
            None => block.weight[..x.len()].fill(1.0),
        }
        if block.weight.iter().all(|&w| w == 0.0) {
            block.weight[..x.len()].fill(1.0);
        }
        blocks.push(block);
    }
    blocks
}

/// Numbers divided by the step, and the cell of each. Far beyond the last level, the exact distance makes no difference.
#[inline(always)]
fn cells<const B: usize>(x: &[f32; B], inverse: f32) -> ([f32; B], [u32; B]) {
    let mut y = *x;
    y.iter_mut().for_each(|y| *y *= inverse);
    (y, cells_of(&y))
}

/// The cell of each number, in units of the step.
#[inline(always)]
fn cells_of<const B: usize>(y: &[f32; B]) -> [u32; B] {
    const FAR: f32 = CELLS as f32 / 2.0 - 64.0;
    let mut cells = [0; B];
    for (cell, y) in cells.iter_mut().zip(y) {
        let half = 2.0 * y - 0.5;
        let half = if half < -FAR { -FAR } else { half };
        let half = if half > FAR { FAR } else { half };
        *cell = (half + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(CELLS as u32 / 2);
    }
    cells
}

/// The sum of a term over a block, in eight lanes that can be added as vectors.
#[inline(always)]
fn sum<const B: usize>(term: impl Fn(usize) -> f32, _: &[f32; B]) -> f32 {
    let mut lanes = [0.0f32; 8];
    for j in (0..B).step_by(8) {
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane += term(j + i);
        }
    }
    ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))
}
