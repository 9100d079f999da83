//! Activations in the form that kernels consume.

use std::ops::Range;

use crate::BLOCK;
use crate::math::ROUND;
use crate::quant::UNIT;

/// The numbers in which activations are multiplied.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Precision {
    /// f32 activations with every weight type.
    Exact,
    /// int8 activations with the weight types whose codes are integers, f32 with the types of floats (`f32`, `f16`, `bf16`, and all
    /// whose codes are e4m3).
    Int8,
}

/// Blocks whose largest magnitude is below this count as zero, since their scale would be subnormal.
const SMALLEST: f32 = 1.0 / (1u128 << 100) as f32;

/// Activations of `n` tokens, each `cols` wide; owns its buffers and reuses them.
///
/// Rows are f32, padded with zeros to a multiple of 32. With [`Precision::Int8`] each 32-column block also has 32 int8
/// values and a scale: `scale = absmax / 127`, `value = round_ties_even(x · (127 / absmax))`. A block whose absmax is
/// below 2^-100 has scale 0 and values 0; one that holds a NaN or an infinity has scale NaN and values 0.
#[derive(Clone, Debug)]
pub struct Activations {
    precision: Precision,
    n: usize,
    cols: usize,
    rows: Vec<f32>,
    /// Whether `blocks` was computed from `rows`.
    quantised: bool,
    /// The int8 form, per token and block.
    blocks: Vec<QuantisedBlock>,
}

/// The int8 form of 32 columns of one token. Everything that belongs to a block lies together, so a kernel needs one address per
/// token.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub(crate) struct QuantisedBlock {
    /// Eight words of four values, the lowest column in the lowest byte.
    pub(crate) words: [i32; 8],
    pub(crate) scale: f32,
    /// `scale` times [`UNIT`]: what the block scales of a codebook, which are stored over `UNIT`, are multiplied by.
    pub(crate) scale_times_unit: f32,
    /// The sum of all values.
    pub(crate) sum: i32,
    /// The sums of the first half of the columns and of the second.
    pub(crate) halves: Packed,
    /// The sums of columns 0 and 1 of each word, and of columns 2 and 3, each negated.
    pub(crate) minus_pairs: Packed,
}

/// Two numbers of 16 bits, the first in the lower half: an operand of instructions that multiply pairs of such numbers.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub(crate) struct Packed(pub(crate) i32);

impl Packed {
    fn new(first: i32, second: i32) -> Self {
        Packed(first & 0xffff | second << 16)
    }

    #[inline(always)]
    pub(crate) fn first(self) -> i32 {
        i32::from(self.0 as i16)
    }

    #[inline(always)]
    pub(crate) fn second(self) -> i32 {
        self.0 >> 16
    }
}

impl Activations {
    /// Empty activations of this precision.
    pub fn new(precision: Precision) -> Self {
        Activations { precision, n: 0, cols: 0, rows: Vec::new(), quantised: false, blocks: Vec::new() }
    }

    /// Copies `x`, row-major `[n, cols]`. Allocates only to grow.
    ///
    /// # Panics
    /// If `x.len() != n * cols`.
    pub fn set(&mut self, x: &[f32], n: usize, cols: usize) {
        self.set_rows(x, n, cols);
        if self.precision == Precision::Int8 {
            self.quantise();
        }
    }

    /// Like [`set`](Self::set), but in f32 alone, whatever the precision.
    pub(crate) fn set_rows(&mut self, x: &[f32], n: usize, cols: usize) {
        assert_eq!(Some(x.len()), n.checked_mul(cols), "{n} rows of {cols}");
        self.shape(n, cols);
        if cols > 0 {
            let padded = self.padded();
            for (to, from) in self.rows.chunks_exact_mut(padded).zip(x.chunks_exact(cols)) {
                to[..cols].copy_from_slice(from);
                to[cols..].fill(0.0);
            }
        }
    }

    /// Copies the tokens `indices` of `src`, in that order; an index may occur more than once.
    ///
    /// # Panics
    /// If an index is not below `src.n()`.
    pub fn gather(&mut self, src: &Activations, indices: &[u32]) {
        self.shape(indices.len(), src.cols);
        let (padded, stride) = (self.padded(), self.stride());
        for (i, &from) in indices.iter().enumerate() {
            let from = from as usize;
            assert!(from < src.n, "token {from} of {}", src.n);
            self.rows[i * padded..][..padded].copy_from_slice(&src.rows[from * padded..][..padded]);
        }
        if self.precision == Precision::Exact {
            return;
        }
        if !src.quantised {
            return self.quantise();
        }
        self.resize_blocks();
        for (i, &from) in indices.iter().enumerate() {
            self.blocks[i * stride..][..stride].copy_from_slice(&src.blocks[from as usize * stride..][..stride]);
        }
        self.quantised = true;
    }

    /// Like [`gather`](Self::gather), with each token multiplied by its factor.
    ///
    /// # Panics
    /// If an index is not below `src.n()`, or there are fewer factors than indices.
    pub fn gather_scaled(&mut self, src: &Activations, indices: &[u32], factors: &[f32]) {
        self.shape(indices.len(), src.cols);
        let padded = self.padded();
        for (i, (&from, &factor)) in indices.iter().zip(&factors[..indices.len()]).enumerate() {
            let from = src.padded_row(from as usize);
            self.rows[i * padded..][..padded].iter_mut().zip(from).for_each(|(to, x)| *to = factor * x);
        }
        if self.precision == Precision::Int8 {
            self.quantise();
        }
    }

    /// Copies the tokens `tokens` of `src`, with their columns in the order of a matrix: column `k` is column `order[k]` of `src`;
    /// `order` has two bytes per column, little-endian. Blocks are rounded to int8 again, because they now consist of other
    /// columns. A column that `src` does not have becomes NaN, and so does every product with it.
    ///
    /// # Panics
    /// If a token is not below `src.n()`, or `order` does not have two bytes for each column.
    pub fn reorder(&mut self, src: &Activations, tokens: Range<usize>, order: &[u8]) {
        assert_eq!(order.len(), 2 * src.cols, "a number for each of {} columns", src.cols);
        self.shape(tokens.len(), src.cols);
        let padded = self.padded();
        for (i, token) in tokens.enumerate() {
            let from = src.row(token);
            let (to, rest) = self.rows[i * padded..][..padded].split_at_mut(from.len());
            for (to, column) in to.iter_mut().zip(order.as_chunks::<2>().0) {
                *to = from.get(usize::from(u16::from_le_bytes(*column))).copied().unwrap_or(f32::NAN);
            }
            rest.fill(0.0);
        }
        if self.precision == Precision::Int8 {
            self.quantise();
        }
    }

    /// Tokens.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Width of a token, without padding.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The numbers in which the activations are multiplied.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Token `i`, without padding.
    ///
    /// # Panics
    /// If `i >= n`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.padded_row(i)[..self.cols]
    }

    /// Token `i` with its padding.
    pub(crate) fn padded_row(&self, i: usize) -> &[f32] {
        assert!(i < self.n, "token {i} of {}", self.n);
        let padded = self.padded();
        &self.rows[i * padded..][..padded]
    }

    /// Whether the int8 form has been computed.
    pub(crate) fn quantised(&self) -> bool {
        self.quantised
    }

    /// The int8 form of token `i`.
    pub(crate) fn quantised_row(&self, i: usize) -> &[QuantisedBlock] {
        assert!(i < self.n && self.quantised, "token {i} of {}, quantised: {}", self.n, self.quantised);
        &self.blocks[i * self.stride()..][..self.blocks_per_row()]
    }

    fn blocks_per_row(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// Number of blocks from one token to the next. It is odd, so that blocks of the same columns lie in different sets of a cache,
    /// however many tokens are multiplied together.
    fn stride(&self) -> usize {
        self.blocks_per_row() | 1
    }

    fn padded(&self) -> usize {
        self.blocks_per_row() * BLOCK
    }

    fn shape(&mut self, n: usize, cols: usize) {
        (self.n, self.cols, self.quantised) = (n, cols, false);
        self.rows.resize(n * self.padded(), 0.0);
    }

    fn resize_blocks(&mut self) {
        self.blocks.resize(self.n * self.stride(), QuantisedBlock::default());
    }

    fn quantise(&mut self) {
        self.resize_blocks();
        self.quantised = true;
        if self.cols == 0 {
            return;
        }
        let (stride, padded) = (self.stride(), self.padded());
        for (to, row) in self.blocks.chunks_exact_mut(stride).zip(self.rows.chunks_exact(padded)) {
            for (to, block) in to.iter_mut().zip(row.as_chunks().0) {
                *to = quantise_block(block);
            }
        }
    }
}

fn quantise_block(block: &[f32; BLOCK]) -> QuantisedBlock {
    // Magnitudes have the same order as their bits, with NaN above all, so an integer maximum is exact.
    let top = block.iter().fold(0, |m: i32, v| m.max((v.to_bits() & 0x7fff_ffff) as i32));
    let absmax = f32::from_bits(top as u32);
    if !absmax.is_finite() {
        return QuantisedBlock { scale: f32::NAN, scale_times_unit: f32::NAN, ..QuantisedBlock::default() };
    }
    if absmax < SMALLEST {
        return QuantisedBlock::default();
    }
    let inverse = 127.0 / absmax;
    // Each loop does one thing, so compilers turn them into vector instructions.
    let mut values = [0i32; BLOCK];
    for (i, &v) in values.iter_mut().zip(block) {
        *i = (v * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
    }
    let (first, second) = values.split_at(BLOCK / 2);
    let (first, second) = (sums_of_fours(first), sums_of_fours(second));
    let fours: [i32; 4] = std::array::from_fn(|i| first[i] + second[i]);
    let (halves, pairs) = ([first.iter().sum(), second.iter().sum()], [fours[0] + fours[1], fours[2] + fours[3]]);
    let mut bytes = [0u8; BLOCK];
    for (byte, &i) in bytes.iter_mut().zip(&values) {
        *byte = i as u8;
    }
    let mut words = [0; 8];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = i32::from_le_bytes(*bytes);
    }
    let scale = absmax / 127.0;
    QuantisedBlock {
        words,
        scale,
        scale_times_unit: scale * UNIT,
        sum: pairs[0] + pairs[1],
        halves: Packed::new(halves[0], halves[1]),
        minus_pairs: Packed::new(-pairs[0], -pairs[1]),
    }
}

/// The sums of the first of every four values, of the second, and so on.
fn sums_of_fours(values: &[i32]) -> [i32; 4] {
    let mut sums = [0; 4];
    for four in values.as_chunks::<4>().0 {
        for i in 0..4 {
            sums[i] += four[i];
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(words: &[i32; 8]) -> Vec<i8> {
        words.iter().flat_map(|w| w.to_le_bytes().map(|b| b as i8)).collect()
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        let mut block = [0.0; BLOCK];
        block[..6].copy_from_slice(&[127.0, 0.5, 1.5, -2.5, -126.6, 3.2]);
        let block = quantise_block(&block);
        assert_eq!(block.scale, 1.0);
        assert_eq!(values(&block.words)[..6], [127, 0, 2, -2, -127, 3]);
    }

    #[test]
    fn sums_belong_to_their_columns() {
        let mut block = [0.0; BLOCK];
        (block[0], block[3], block[13], block[18], block[30]) = (127.0, -2.0, -5.0, 40.0, -99.0);
        let block = quantise_block(&block);
        assert_eq!(block.sum, 61);
        assert_eq!((block.halves.first(), block.halves.second()), (120, -59));
        assert_eq!((block.minus_pairs.first(), block.minus_pairs.second()), (-122, 61));
        let lowest = quantise_block(&[-1.0; BLOCK]);
        assert_eq!((lowest.sum, lowest.halves.first(), lowest.minus_pairs.second()), (-4064, -2032, 2032));
    }

    #[test]
    fn odd_blocks() {
        assert_eq!(quantise_block(&[0.0; BLOCK]), QuantisedBlock::default());
        assert_eq!(quantise_block(&[1e-38; BLOCK]), QuantisedBlock::default());
        for bad in [f32::NAN, f32::INFINITY, -f32::NAN] {
            let mut block = [1.0; BLOCK];
            block[31] = bad;
            let block = quantise_block(&block);
            assert!(block.scale.is_nan() && block.words == [0; 8]);
        }
        let block = quantise_block(&[f32::MAX; BLOCK]);
        assert!(block.scale.is_finite() && values(&block.words) == [127; BLOCK]);
    }

    #[test]
    fn gather_equals_set() {
        let x: Vec<f32> = (0..5 * 45).map(|i| (i as f32).sin()).collect();
        for from in [Precision::Exact, Precision::Int8] {
            let mut src = Activations::new(from);
            src.set(&x, 5, 45);
            let picked: Vec<f32> = [4, 0, 4].iter().flat_map(|&i| src.row(i).to_vec()).collect();
            let (mut a, mut b) = (Activations::new(Precision::Int8), Activations::new(Precision::Int8));
            a.gather(&src, &[4, 0, 4]);
            b.set(&picked, 3, 45);
            assert_eq!((a.rows, a.blocks), (b.rows, b.blocks));
        }
    }

    #[test]
    fn gather_scaled_equals_set() {
        let x: Vec<f32> = (0..5 * 45).map(|i| (i as f32).sin()).collect();
        let mut src = Activations::new(Precision::Int8);
        src.set(&x, 5, 45);
        let (indices, factors) = ([4, 0, 4], [0.5, 3.0, -1.5]);
        let of = |(&i, &factor): (&u32, &f32)| src.row(i as usize).iter().map(move |x| factor * x).collect::<Vec<_>>();
        let scaled: Vec<f32> = indices.iter().zip(&factors).flat_map(of).collect();
        let (mut a, mut b) = (Activations::new(Precision::Int8), Activations::new(Precision::Int8));
        a.gather_scaled(&src, &indices, &factors);
        b.set(&scaled, 3, 45);
        assert_eq!((a.rows, a.blocks), (b.rows, b.blocks));
    }

    #[test]
    fn reorder_equals_set() {
        let x: Vec<f32> = (0..3 * 45).map(|i| (i as f32).sin()).collect();
        let order: Vec<u16> = (0..45).map(|k| (k * 7 + 3) % 45).collect();
        let bytes = |order: &[u16]| order.iter().flat_map(|k| k.to_le_bytes()).collect::<Vec<u8>>();
        let moved: Vec<f32> = x.chunks(45).flat_map(|row| order.iter().map(|&k| row[usize::from(k)])).collect();
        for precision in [Precision::Exact, Precision::Int8] {
            let (mut src, mut a, mut b) =
                (Activations::new(precision), Activations::new(precision), Activations::new(precision));
            src.set(&x, 3, 45);
            a.set(&[f32::MAX; 4 * 64], 4, 64);
            a.reorder(&src, 1..3, &bytes(&order));
            b.set(&moved[45..], 2, 45);
            assert_eq!((&a.rows, &a.blocks, a.quantised), (&b.rows, &b.blocks, b.quantised));
        }
        // A damaged order gives NaN, never a number of another place.
        let mut damaged = order;
        damaged[40] = 45;
        let (mut src, mut a) = (Activations::new(Precision::Int8), Activations::new(Precision::Int8));
        src.set(&x, 3, 45);
        a.reorder(&src, 0..3, &bytes(&damaged));
        assert!(a.row(1)[40].is_nan() && a.quantised_row(2)[1].scale.is_nan() && !a.quantised_row(2)[0].scale.is_nan());
    }

    #[test]
    fn buffers_are_reused() {
        let mut a = Activations::new(Precision::Int8);
        a.set(&[1.0; 640], 4, 160);
        let before = (a.rows.as_ptr(), a.blocks.as_ptr());
        a.set(&[2.0; 66], 2, 33);
        assert!(a.padded_row(1)[33..].iter().all(|&v| v == 0.0), "padding is zero, not an old value");
        a.set(&[3.0; 640], 4, 160);
        assert_eq!(before, (a.rows.as_ptr(), a.blocks.as_ptr()));
    }
}
