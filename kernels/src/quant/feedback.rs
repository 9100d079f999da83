//! Error feedback: columns that are still to be rounded compensate for the error of rounding one column.
//!
//! With `e = ŵ − w`, the expected square error of an output is `e H eᵀ`, where `H` is the matrix of the inputs' mean products. With
//! `H = Cᵀ D C`, where `C` is lower triangular with ones on its diagonal, it is `Σ_k D_k (e_k + Σ_{j<k} C_kj e_j)²`. So once the
//! errors of the columns before `k` are known, column `k` should be rounded to `w_k − Σ_{j<k} C_kj e_j`, and `D_k` is the cost of a
//! deviation from it (E. Frantar et al., "GPTQ", arXiv:2210.17323; in this form J. Chee et al., "QuIP", arXiv:2307.13304, as LDLQ).
//!
//! Errors reach columns of the same block one by one, those of the same strip once a block is done, and all others once a strip is
//! done, through sums of outer products.
#![allow(clippy::needless_range_loop, reason = "one index runs over several arrays that must stay in registers")]

use super::codebook::{SCALE_MAX, place};
use super::factor::Factors;
use super::moments::Moments;
use super::pack::{Quantised, table, trellis};
use super::search::{Block, Grid, Table, normalising};
use super::trellis::{Ring, RingFeedback, Trellis};
use crate::isa::Kernels;
use crate::matrix::{BLOCK, WeightType};
use crate::update::{Stripes, TALL, Target, WIDE};
use std::ops::Range;

/// Columns whose errors are propagated block by block; beyond them they are propagated together.
const STRIP: usize = 4 * BLOCK;

/// Columns of a ring of `q2`.
const RING: usize = BLOCK / 2;

/// Rows that are rounded together.
const LANES: usize = 16;

/// The search of a block ends when more scales than this bring nothing in a row. Feedback compensates for what a longer search
/// would bring.
const PATIENCE: usize = 1;

/// Fraction of the mean of `H`'s diagonal that is added to the diagonal, so that directions that did not occur in the text have
/// some weight too.
const DAMPING: f64 = 0.01;

/// The order in which the columns of a matrix are rounded, and the effect of an error in one of them on the later ones.
#[derive(Debug)]
pub struct Feedback {
    kernels: Kernels,
    cols: usize,
    panels: Vec<Panel>,
}

#[derive(Debug)]
struct Panel {
    /// Columns of the matrix in the order in which they are rounded; blocks stay together.
    order: Vec<usize>,
    /// `D`, divided by its largest element.
    weight: Vec<f32>,
    strips: Vec<Strip>,
}

#[derive(Debug)]
struct Strip {
    blocks: Vec<BlockFactors>,
    /// Places in the order: of the first column, and after the last.
    begin: usize,
    end: usize,
    /// In row `j`, `C_kj` for the columns `k` after this strip.
    beyond: Stripes<WIDE>,
}

/// [`BLOCK`] columns.
#[derive(Debug)]
struct BlockFactors {
    /// Place of the first column in the order.
    begin: usize,
    width: usize,
    /// `[BLOCK, BLOCK]`: in row `j`, `C_kj` for the columns `k` of this block.
    within: Vec<f32>,
    /// In row `j`, `C_kj` for the columns `k` after this block in its strip.
    rest: Stripes<WIDE>,
}

/// The buffers of a thread that quantises.
#[derive(Debug, Default)]
pub struct FeedbackScratch {
    /// Rows in which something has to be rounded.
    rows: Vec<Row>,
    /// Their weights in the order of a panel, scaled to 1..2, `[rows, width]`.
    exact: Vec<f32>,
    /// The numbers to which they should be rounded, after all errors so far.
    targets: Vec<f32>,
    /// The negated rounding errors of the columns of a strip: `[columns, rows]`.
    errors: Vec<f32>,
    tall: Stripes<TALL>,
}

#[derive(Clone, Copy, Debug)]
struct Row {
    number: usize,
    /// The factor that scales it to 1..2.
    factor: f64,
    /// `S` of the result.
    scale: f32,
}

impl Feedback {
    /// Factors the moments of a matrix's inputs. `None` if no inputs were seen, or some were not finite.
    ///
    /// With few tokens, the products of different columns are mostly chance. So in a panel of `w` columns that has seen `n` tokens,
    /// they are multiplied by `n/(n + w)`.
    pub fn new(kernels: Kernels, moments: &Moments) -> Option<Feedback> {
        let tokens = moments.tokens() as f64;
        let own = |width: usize| tokens / (tokens + width as f64);
        let panels = moments.panels().map(|(begin, width, sums)| Panel::new(&kernels, begin, width, sums, own(width)));
        let panels = panels.collect::<Option<_>>()?;
        Some(Feedback { kernels, cols: moments.cols(), panels })
    }

    /// Quantises rows, `[n, cols]`, to `q4`, `q3` or `q2`. The result of a row does not depend on the others.
    ///
    /// # Panics
    /// For other types, or if `src` does not consist of whole rows.
    pub fn quantise(&self, ty: WeightType, src: &[f32], scratch: &mut FeedbackScratch) -> Quantised {
        let n = src.len() / self.cols.max(1);
        assert_eq!(src.len(), n * self.cols, "whole rows");
        let mut out = Quantised::new(ty, n, self.cols);
        let row = |number: usize| out.begin(number, &src[number * self.cols..][..self.cols]);
        // Rows of zeros, and rows with a NaN or an infinity, are done already.
        scratch.rows = (0..n).filter_map(row).collect();
        for panel in &self.panels {
            panel.take(src, self.cols, scratch);
            for strip in &panel.strips {
                panel.strip(&self.kernels, strip, ty, &mut out, scratch);
            }
        }
        out
    }
}

impl Quantised {
    /// Chooses the row scale; `None` if there is nothing to round. No search is needed: the row scale only moves the grid of the
    /// blocks' scales a little, and feedback compensates for that.
    fn begin(&mut self, number: usize, x: &[f32]) -> Option<Row> {
        let (absmax, exponent) = match normalising(x) {
            Ok(found) => found,
            Err(scale) => {
                self.scales[number] = scale;
                return None;
            }
        };
        let power = |e: i64| f64::from_bits(((1023 + e) as u64) << 52);
        let reach = f32::from(self.book().levels[self.book().len - 1]);
        let scale = (f64::from(absmax) * power(-exponent)) as f32 / (reach * SCALE_MAX);
        // The largest integer of a level, its offset and a scale must give a finite number.
        let largest = f64::from(SCALE_MAX * (reach + (self.book().step * 7 / 2) as f32));
        let stored = (f64::from(scale) * power(exponent)).min(f64::from(f32::MAX) / largest) as f32;
        let fits = f64::from(stored) * largest <= f64::from(f32::MAX);
        self.scales[number] = if fits { stored } else { stored.next_down() };
        Some(Row { number, factor: power(-exponent), scale })
    }
}

impl Panel {
    fn new(kernels: &Kernels, begin: usize, width: usize, sums: &[f32], own: f64) -> Option<Panel> {
        let diagonal = |i: usize| f64::from(sums[i * width + i]);
        let mean = (0..width).map(diagonal).sum::<f64>() / width as f64;
        if !(mean > 0.0 && mean.is_finite()) {
            return None;
        }
        // The most important block comes first, because all others can compensate for its errors. A block that is not whole stays
        // last.
        let mut blocks: Vec<usize> = (0..width / BLOCK).collect();
        let of_block = |b: &usize| (b * BLOCK..(b + 1) * BLOCK).map(diagonal).sum::<f64>();
        blocks.sort_by(|a, b| of_block(b).total_cmp(&of_block(a)));
        let columns = blocks.iter().flat_map(|b| b * BLOCK..(b + 1) * BLOCK).chain(width - width % BLOCK..width);
        let mut places: Vec<usize> = columns.collect();
        // Within 16 columns, the order is that of a ring of `q2`; the other types work with any order.
        places.chunks_mut(RING).for_each(|half| half.sort_by_key(|column| place(column % RING)));
        let factors = Factors::new(kernels, width, |i, j| {
            // The sum of two columns is stored with the later one.
            let (a, b) = (places[i].max(places[j]), places[i].min(places[j]));
            let sum = f64::from(sums[a * width + b]);
            let value = if i == j { sum / mean + DAMPING } else { own * sum / mean };
            value as f32
        })?;
        let mut weight: Vec<f32> = (0..width).map(|k| factors.weight(k)).collect();
        let largest = weight.iter().fold(0.0f32, |m, &d| m.max(d));
        weight.iter_mut().for_each(|d| *d /= largest);
        let strips =
            (0..width).step_by(STRIP).map(|first| Strip::new(&factors, first, (first + STRIP).min(width), width));
        let strips = strips.collect();
        Some(Panel { order: places.into_iter().map(|place| begin + place).collect(), weight, strips })
    }

    /// Copies this panel's columns of the rows.
    fn take(&self, src: &[f32], cols: usize, scratch: &mut FeedbackScratch) {
        scratch.exact.clear();
        for row in &scratch.rows {
            let src = &src[row.number * cols..][..cols];
            scratch.exact.extend(self.order.iter().map(|&column| (f64::from(src[column]) * row.factor) as f32));
        }
        scratch.targets.clone_from(&scratch.exact);
    }

    /// Rounds the columns of a strip, and passes their errors on to the columns after it.
    fn strip(
        &self,
        kernels: &Kernels,
        strip: &Strip,
        ty: WeightType,
        out: &mut Quantised,
        scratch: &mut FeedbackScratch,
    ) {
        let (n, stride) = (scratch.rows.len(), self.order.len());
        let errors = (strip.end - strip.begin) * n;
        scratch.errors.resize(errors.max(scratch.errors.len()), 0.0);
        for block in &strip.blocks {
            for first in (0..n).step_by(LANES) {
                kernels.compiled(|| match ty {
                    WeightType::Q4 => self.block::<32>(strip, block, table(ty), first, out, scratch),
                    WeightType::Q3 => self.block::<16>(strip, block, table(ty), first, out, scratch),
                    _ => self.rings(strip, block, trellis(), first, out, scratch),
                });
            }
            let made = (block.begin - strip.begin)..(block.begin - strip.begin + block.width);
            scratch.pass_on(kernels, made, &block.rest, block.begin + block.width..strip.end, stride);
        }
        scratch.pass_on(kernels, 0..strip.end - strip.begin, &strip.beyond, strip.end..stride, stride);
    }

    /// Rounds the columns of a block in a few of the rows to be rounded, from number `first` on.
    #[inline(always)]
    fn block<const B: usize>(
        &self,
        strip: &Strip,
        block: &BlockFactors,
        table: &Table,
        first: usize,
        out: &mut Quantised,
        scratch: &mut FeedbackScratch,
    ) {
        let (n, stride, width) = (scratch.rows.len(), self.order.len(), block.width);
        let rows = &scratch.rows[first..n.min(first + LANES)];
        let columns = &self.order[block.begin..][..width];
        // Lanes are rows.
        let (mut exact, mut targets) = ([[0.0f32; LANES]; BLOCK], [[0.0f32; LANES]; BLOCK]);
        for l in 0..rows.len() {
            let at = (first + l) * stride + block.begin;
            for j in 0..width {
                exact[j][l] = scratch.exact[at + j];
                targets[j][l] = scratch.targets[at + j];
            }
        }
        let mut grids = [Grid::default(); LANES];
        let mut numbers = [[0u8; LANES]; BLOCK];
        for j in 0..width {
            if j % B == 0 {
                let count = B.min(width - j);
                let weight = &self.weight[block.begin + j..][..count];
                for (l, row) in rows.iter().enumerate() {
                    let mut x = [0.0; B];
                    for (x, targets) in x[..count].iter_mut().zip(&targets[j..]) {
                        *x = targets[l];
                    }
                    let byte = table.byte(&Block::<B>::new(&x[..count], weight), row.scale, PATIENCE).1;
                    grids[l] = table.grid(row.scale, byte);
                    out.row(row.number).bytes[columns[j] / B] = byte;
                }
            }
            let (found, values) = table.nearest(&targets[j], &grids);
            numbers[j] = found;
            let mut errors = [0.0; LANES];
            for l in 0..LANES {
                errors[l] = exact[j][l] - values[l];
            }
            scratch.errors[(block.begin - strip.begin + j) * n + first..][..rows.len()]
                .copy_from_slice(&errors[..rows.len()]);
            for k in j + 1..width {
                let c = block.within[j * BLOCK + k];
                for l in 0..LANES {
                    targets[k][l] += c * errors[l];
                }
            }
        }
        for (l, row) in rows.iter().enumerate() {
            let to = out.row(row.number).numbers;
            columns.iter().zip(&numbers).for_each(|(&column, numbers)| to[column] = numbers[l]);
        }
    }

    /// Like [`Panel::block`], for `q2`: rings are rounded as a whole, with the feedback inside them.
    #[inline(always)]
    fn rings(
        &self,
        strip: &Strip,
        block: &BlockFactors,
        trellis: &Trellis,
        first: usize,
        out: &mut Quantised,
        scratch: &mut FeedbackScratch,
    ) {
        let (n, stride, width) = (scratch.rows.len(), self.order.len(), block.width);
        for number in first..n.min(first + LANES) {
            let (row, at) = (scratch.rows[number], number * stride + block.begin);
            let (exact, targets) = (&scratch.exact[at..][..width], &mut scratch.targets[at..][..width]);
            for begin in (0..width).step_by(RING) {
                let end = (begin + RING).min(width);
                let on_ring = |i: usize| place(self.order[block.begin + i] % RING);
                let weight = &self.weight[block.begin..];
                let ring = Ring::new((begin..end).map(|i| (on_ring(i), targets[i], weight[i])));
                let mut inner = RingFeedback { within: [[0.0; RING]; RING], exact: [0.0; RING] };
                for i in begin..end {
                    inner.exact[on_ring(i)] = exact[i];
                    for later in i + 1..end {
                        inner.within[on_ring(i)][on_ring(later)] = block.within[i * BLOCK + later];
                    }
                }
                let byte = trellis.byte(&ring, row.scale);
                let found = trellis.codes(&ring, row.scale, byte, Some(&inner));
                let to = out.row(row.number);
                to.bytes[self.order[block.begin + begin] / RING] = byte;
                for i in begin..end {
                    to.numbers[self.order[block.begin + i]] = found.codes[on_ring(i)];
                    let error = exact[i] - found.values[on_ring(i)];
                    scratch.errors[(block.begin - strip.begin + i) * n + number] = error;
                    let within = &block.within[i * BLOCK..][..width];
                    targets[end..].iter_mut().zip(&within[end..]).for_each(|(t, c)| *t += c * error);
                }
            }
        }
    }
}

impl FeedbackScratch {
    /// Passes errors of some columns on to other columns of their strip.
    fn pass_on(
        &mut self,
        kernels: &Kernels,
        made: Range<usize>,
        factors: &Stripes<WIDE>,
        columns: Range<usize>,
        stride: usize,
    ) {
        let n = self.rows.len();
        if n > 0 && !columns.is_empty() {
            let errors = &self.errors[made.start * n..made.end * n];
            self.tall.set(made.len(), n, |j| &errors[j * n..][..n]);
            let mut to = Target { values: &mut self.targets, stride, columns };
            kernels.update(&self.tall, 0..self.tall.count(), factors, &mut to, false);
        }
    }
}

impl Strip {
    fn new(factors: &Factors, begin: usize, end: usize, of: usize) -> Strip {
        let columns = factors.columns(begin, end);
        let row = |j: usize| &columns[j * (of - begin)..][..of - begin];
        let stripes = |rows: Range<usize>, from: usize, to: usize| {
            let mut stripes = Stripes::default();
            stripes.set(rows.len(), to - from, |j| &row(rows.start + j)[from..to]);
            stripes
        };
        let width = end - begin;
        let blocks = (0..width).step_by(BLOCK).map(|first| {
            let behind = (first + BLOCK).min(width);
            let mut within = vec![0.0; BLOCK * BLOCK];
            for j in first..behind {
                within[(j - first) * BLOCK..][..behind - first].copy_from_slice(&row(j)[first..behind]);
            }
            let rest = stripes(first..behind, behind, width);
            BlockFactors { begin: begin + first, width: behind - first, within, rest }
        });
        Strip { begin, end, blocks: blocks.collect(), beyond: stripes(0..width, width, of - begin) }
    }
}
