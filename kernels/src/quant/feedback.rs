//! Error feedback: what rounding one column has cost is made good in the columns that are still to be rounded.
//!
//! With `e = ŵ − w`, the expected square error of an output is `e H eᵀ`, `H` being the mean products of inputs. `H = Cᵀ D C`, `C`
//! lower triangular with ones on its diagonal, makes it `Σ_k D_k (e_k + Σ_{j<k} C_kj e_j)²`: once the errors of the columns before
//! `k` are known, `w_k − Σ_{j<k} C_kj e_j` is what column `k` should be rounded to, and `D_k` is what a deviation from it costs
//! (E. Frantar et al., "GPTQ", arXiv:2210.17323; in this form J. Chee et al., "QuIP", arXiv:2307.13304, as LDLQ).

use super::codebook::{SCALE_MAX, place};
use super::moments::{Moments, pack_f32};
use super::pack::{Quantised, QuantisedRow, table, trellis};
use super::search::{Block, Table, normalising};
use super::trellis::{Ring, RingFeedback, Trellis};
use crate::activations::{Activations, Precision};
use crate::isa::Kernels;
use crate::matrix::{BLOCK, Matrix, WeightType};
use crate::threads::ThreadPool;
use std::ops::Range;

/// Columns whose errors are propagated one by one; beyond them they are propagated together, by a matrix product.
const STRIP: usize = 4 * BLOCK;

/// What is added to the diagonal of `H`, as a fraction of its mean: directions that the text did not show have some weight too.
const DAMPING: f64 = 0.01;

/// In what order the columns of a matrix are rounded, and what an error in one of them means for the later ones.
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
    /// `D`, over its largest.
    weight: Vec<f32>,
    strips: Vec<Strip>,
}

#[derive(Debug)]
struct Strip {
    /// Place in the order, and columns.
    begin: usize,
    width: usize,
    /// `[width, width]`: in row `j`, `C_kj` for the columns `k` of this strip.
    within: Vec<f32>,
    /// `C_kj` for the columns behind this strip, as a matrix of as many rows and `width` columns.
    beyond: Vec<u8>,
}

/// One row of a strip while it is quantised.
struct StripRow<'a> {
    /// `S`.
    scale: f32,
    /// What the columns are to be rounded to, after all errors so far.
    targets: &'a mut [f32],
    /// What they have been rounded to, less the weights.
    errors: &'a mut [f32],
    out: QuantisedRow<'a>,
}

/// What a thread that quantises needs besides.
#[derive(Debug)]
pub struct FeedbackScratch {
    serial: ThreadPool,
    errors: Activations,
    product: Vec<f32>,
}

impl Default for FeedbackScratch {
    fn default() -> Self {
        let (errors, product) = (Activations::new(Precision::Exact), Vec::new());
        FeedbackScratch { serial: ThreadPool::new(1), errors, product }
    }
}

impl Feedback {
    /// Factors the moments of a matrix's inputs. `None` where nothing was seen, or something that is not finite.
    ///
    /// What few tokens show of the products of different columns is mostly chance, so of a panel of `w` columns that `n` tokens have
    /// met, the share `n/(n + w)` of them counts.
    pub fn new(kernels: Kernels, moments: &Moments) -> Option<Feedback> {
        let tokens = moments.tokens() as f64;
        let own = |width: usize| tokens / (tokens + width as f64);
        let panels = moments.panels().map(|(begin, width, sums)| Panel::new(begin, width, sums, own(width)));
        Some(Feedback { kernels, cols: moments.cols(), panels: panels.collect::<Option<_>>()? })
    }

    /// Quantises rows, `[n, cols]`, to `q4`, `q3` or `q2`.
    ///
    /// # Panics
    /// For other types, or if `src` is not of whole rows.
    pub fn quantise(&self, ty: WeightType, src: &[f32], scratch: &mut FeedbackScratch) -> Quantised {
        let rows = src.len() / self.cols.max(1);
        assert_eq!(src.len(), rows * self.cols, "whole rows");
        let mut out = Quantised::new(ty, rows, self.cols);
        // A power of two brings the largest of a row to 1..2; rows of zeros, or of what is no number, are done already.
        let factors: Vec<Option<(f64, f32)>> =
            (0..rows).map(|r| out.begin(r, &src[r * self.cols..][..self.cols])).collect();
        for panel in &self.panels {
            match ty {
                WeightType::Q4 => panel.quantise(self, &Levels::<32>(table(ty)), src, &factors, &mut out, scratch),
                WeightType::Q3 => panel.quantise(self, &Levels::<16>(table(ty)), src, &factors, &mut out, scratch),
                _ => panel.quantise(self, trellis(), src, &factors, &mut out, scratch),
            }
        }
        out
    }
}

impl Quantised {
    /// Chooses the row scale. Returns the factor that brings the row to 1..2 and the row scale of the result, if there is something to
    /// round. The scale need not be searched: it only moves the grid of the blocks' scales a little, and feedback makes that good.
    fn begin(&mut self, row: usize, x: &[f32]) -> Option<(f64, f32)> {
        let (absmax, exponent) = match normalising(x) {
            Ok(found) => found,
            Err(scale) => {
                self.scales[row] = scale;
                return None;
            }
        };
        let power = |e: i64| f64::from_bits(((1023 + e) as u64) << 52);
        let reach = f32::from(self.book().levels[self.book().len - 1]);
        let scale = (f64::from(absmax) * power(-exponent)) as f32 / (reach * SCALE_MAX);
        // The largest integer that a level, its offset and a scale give must stay finite.
        let largest = f64::from(SCALE_MAX * (reach + (self.book().step * 7 / 2) as f32));
        let stored = (f64::from(scale) * power(exponent)).min(f64::from(f32::MAX) / largest) as f32;
        self.scales[row] = if f64::from(stored) * largest > f64::from(f32::MAX) { stored.next_down() } else { stored };
        Some((power(-exponent), scale))
    }
}

impl Panel {
    fn new(begin: usize, width: usize, sums: &[f32], own: f64) -> Option<Panel> {
        let diagonal = |i: usize| f64::from(sums[i * width + i]);
        let mean = (0..width).map(diagonal).sum::<f64>() / width as f64;
        if !(mean > 0.0 && mean.is_finite()) {
            return None;
        }
        // The most important block first: its errors can be made good in all others. A block that is not whole stays last.
        let mut blocks: Vec<usize> = (0..width / BLOCK).collect();
        let of_block = |b: &usize| (b * BLOCK..(b + 1) * BLOCK).map(diagonal).sum::<f64>();
        blocks.sort_by(|a, b| of_block(b).total_cmp(&of_block(a)));
        let columns = blocks.iter().flat_map(|b| b * BLOCK..(b + 1) * BLOCK).chain(width - width % BLOCK..width);
        let mut places: Vec<usize> = columns.collect();
        // Within 16 columns in the order of a ring of `q2`; the other types do not care.
        places.chunks_mut(BLOCK / 2).for_each(|half| half.sort_by_key(|column| place(column % (BLOCK / 2))));
        let entry = |i: usize, j: usize| {
            let sum = f64::from(sums[places[i] * width + places[j]]);
            let value = if i == j { sum / mean + DAMPING } else { own * sum / mean };
            value as f32
        };
        let (c, mut weight) = factor(width, entry)?;
        let largest = weight.iter().fold(0.0f32, |m, &d| m.max(d));
        weight.iter_mut().for_each(|d| *d /= largest);
        let strips = (0..width).step_by(STRIP).map(|first| {
            let (strip, end) = (STRIP.min(width - first), (first + STRIP).min(width));
            let mut within = vec![0.0; strip * strip];
            for j in 0..strip {
                (j + 1..strip).for_each(|k| within[j * strip + k] = c[(first + k) * width + first + j]);
            }
            let rest: Vec<f32> = (end..width).flat_map(|k| &c[k * width + first..][..strip]).copied().collect();
            Strip { begin: first, width: strip, within, beyond: pack_f32(&rest, width - end, strip) }
        });
        let strips = strips.collect();
        Some(Panel { order: places.into_iter().map(|place| begin + place).collect(), weight, strips })
    }

    fn quantise(
        &self,
        whole: &Feedback,
        types: &impl Rounding,
        src: &[f32],
        factors: &[Option<(f64, f32)>],
        out: &mut Quantised,
        scratch: &mut FeedbackScratch,
    ) {
        let (rows, cols, width) = (factors.len(), whole.cols, self.order.len());
        let mut targets = vec![0.0f32; rows * width];
        for ((targets, factor), src) in targets.chunks_exact_mut(width).zip(factors).zip(src.chunks_exact(cols)) {
            if let Some((factor, _)) = factor {
                let scaled = |&column: &usize| (f64::from(src[column]) * factor) as f32;
                targets.iter_mut().zip(&self.order).for_each(|(to, column)| *to = scaled(column));
            }
        }
        let mut errors = Vec::new();
        for strip in &self.strips {
            errors.clear();
            errors.resize(rows * strip.width, 0.0);
            for (r, factor) in factors.iter().enumerate() {
                let Some((factor, scale)) = *factor else { continue };
                let targets = &mut targets[r * width + strip.begin..][..strip.width];
                let errors = &mut errors[r * strip.width..][..strip.width];
                let exact = |column: usize| (f64::from(src[r * cols + column]) * factor) as f32;
                let mut row = StripRow { scale, targets, errors, out: out.row(r) };
                for first in (0..strip.width).step_by(BLOCK / 2 * types.halves()) {
                    let places = first..(first + BLOCK / 2 * types.halves()).min(strip.width);
                    types.round(self, strip, places, &mut row, exact);
                }
            }
            let (behind, rest) = (strip.begin + strip.width, width - strip.begin - strip.width);
            if rest > 0 {
                scratch.errors.set(&errors, rows, strip.width);
                scratch.product.resize(rows * rest, 0.0);
                let beyond =
                    Matrix::new(WeightType::F32, rest, strip.width, &strip.beyond).expect("packed to this shape");
                whole.kernels.matmul(&scratch.serial, beyond, &scratch.errors, &mut scratch.product);
                for (targets, product) in targets.chunks_exact_mut(width).zip(scratch.product.chunks_exact(rest)) {
                    targets[behind..].iter_mut().zip(product).for_each(|(t, p)| *t -= p);
                }
            }
        }
    }

    /// The columns at these places of a strip, in the order of rounding.
    fn columns(&self, strip: &Strip, places: &Range<usize>) -> &[usize] {
        &self.order[strip.begin..][places.clone()]
    }
}

impl Strip {
    /// Takes what an error at a place means for later places, from `first` on, off their targets.
    fn feed_back(&self, place: usize, error: f32, first: usize, targets: &mut [f32]) {
        let within = &self.within[place * self.width..][..self.width];
        targets[first..].iter_mut().zip(&within[first..]).for_each(|(t, c)| *t -= c * error);
    }
}

/// How the blocks of a type are rounded.
trait Rounding {
    /// Halves of 32 columns in a block.
    fn halves(&self) -> usize;

    /// Rounds a block, whose places in its strip are `places`; `exact`: the weights by column.
    fn round(
        &self,
        panel: &Panel,
        strip: &Strip,
        places: Range<usize>,
        row: &mut StripRow<'_>,
        exact: impl Fn(usize) -> f32,
    );
}

/// Types with a level for each number, in blocks of `B` columns: each column is rounded for itself.
struct Levels<const B: usize>(&'static Table);

impl<const B: usize> Rounding for Levels<B> {
    fn halves(&self) -> usize {
        2 * B / BLOCK
    }

    fn round(
        &self,
        panel: &Panel,
        strip: &Strip,
        places: Range<usize>,
        row: &mut StripRow<'_>,
        exact: impl Fn(usize) -> f32,
    ) {
        let columns = panel.columns(strip, &places);
        let weight = &panel.weight[strip.begin..][places.clone()];
        let byte = self.0.byte(&Block::<B>::new(&row.targets[places.clone()], weight), row.scale).1;
        row.out.bytes[columns[0] / B] = byte;
        for (place, &column) in places.zip(columns) {
            let (number, value) = self.0.nearest(row.targets[place], row.scale, byte);
            row.out.numbers[column] = number;
            row.errors[place] = value - exact(column);
            strip.feed_back(place, row.errors[place], place + 1, row.targets);
        }
    }
}

/// `q2`: a block is rounded as a whole, with the feedback inside it.
impl Rounding for Trellis {
    fn halves(&self) -> usize {
        1
    }

    fn round(
        &self,
        panel: &Panel,
        strip: &Strip,
        places: Range<usize>,
        row: &mut StripRow<'_>,
        exact: impl Fn(usize) -> f32,
    ) {
        const RING: usize = BLOCK / 2;
        let columns = panel.columns(strip, &places);
        let on_ring = |column: usize| place(column % RING);
        let weight = &panel.weight[strip.begin..];
        let ring = Ring::new(places.clone().zip(columns).map(|(i, &k)| (on_ring(k), row.targets[i], weight[i])));
        let mut inner = RingFeedback { within: [[0.0; RING]; RING], exact: [0.0; RING] };
        for (i, &column) in places.clone().zip(columns) {
            inner.exact[on_ring(column)] = exact(column);
            for (later, &other) in (i + 1..places.end).zip(&columns[i + 1 - places.start..]) {
                inner.within[on_ring(column)][on_ring(other)] = strip.within[i * strip.width + later];
            }
        }
        let byte = self.byte(&ring, row.scale);
        row.out.bytes[columns[0] / RING] = byte;
        let found = self.codes(&ring, row.scale, byte, Some(&inner));
        for (i, &column) in places.clone().zip(columns) {
            row.out.numbers[column] = found.codes[on_ring(column)];
            row.errors[i] = found.values[on_ring(column)] - exact(column);
            strip.feed_back(i, row.errors[i], places.end, row.targets);
        }
    }
}

/// `C`, row-major `[n, n]`, and `D` of a symmetric positive matrix `H = Cᵀ D C`; `None` if it is not positive.
fn factor(n: usize, entry: impl Fn(usize, usize) -> f32) -> Option<(Vec<f32>, Vec<f32>)> {
    // Cholesky's L of the matrix with its columns in reverse order, row by row.
    let mut l = vec![0.0f32; n * n];
    for i in 0..n {
        let (above, row) = l.split_at_mut(i * n);
        for j in 0..=i {
            let value = entry(n - 1 - i, n - 1 - j);
            let other = if j < i { &above[j * n..][..j] } else { &[] };
            if j < i {
                row[j] = (value - dot(&row[..j], other)) / above[j * n + j];
            } else {
                let rest = value - dot(&row[..i], &row[..i]);
                if !(rest > 0.0 && rest.is_finite()) {
                    return None;
                }
                row[i] = rest.sqrt();
            }
        }
    }
    let mut c = vec![0.0f32; n * n];
    let mut d = vec![0.0f32; n];
    for i in 0..n {
        let of = n - 1 - i;
        let root = l[of * n + of];
        d[i] = root * root;
        (0..=i).for_each(|j| c[i * n + j] = l[(n - 1 - j) * n + of] / root);
    }
    Some((c, d))
}

/// A dot product in sixteen lanes.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (a, b) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.0.iter().zip(b.0) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += a * b;
        }
    }
    a.1.iter().zip(b.1).fold(lanes.iter().sum(), |sum, (a, b)| sum + a * b)
}
