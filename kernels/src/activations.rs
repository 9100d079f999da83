//! Activations in the form that kernels consume.

use crate::BLOCK;
use crate::math::ROUND;

/// What the activations are multiplied as.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Precision {
    /// f32 activations with every weight type.
    Exact,
    /// int8 activations with the weight types that have integer kernels (`q8`, `int4`, `mxfp4`, `q4`, `q3`), f32 with the others.
    Int8,
}

/// Blocks whose largest magnitude is below this count as zero: their scale would leave the normal numbers.
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
    /// Whether the three below belong to `rows`.
    quantised: bool,
    /// Per token and block, eight words of four int8 values, the lowest column in the lowest byte.
    words: Vec<[i32; 8]>,
    scales: Vec<f32>,
    /// Per token and block, the sum of all values and that of the first half.
    sums: Vec<[i32; 2]>,
}

impl Activations {
    /// Empty activations of this precision.
    pub fn new(precision: Precision) -> Self {
        Activations {
            precision,
            n: 0,
            cols: 0,
            rows: Vec::new(),
            quantised: false,
            words: Vec::new(),
            scales: Vec::new(),
            sums: Vec::new(),
        }
    }

    /// Takes `x`, row-major `[n, cols]`. Allocates only to grow.
    ///
    /// # Panics
    /// If `x.len() != n * cols`.
    pub fn set(&mut self, x: &[f32], n: usize, cols: usize) {
        self.set_rows(x, n, cols);
        if self.precision == Precision::Int8 {
            self.quantise();
        }
    }

    /// As [`set`](Self::set) but in f32 alone, whatever the precision.
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
        let (padded, blocks) = (self.padded(), self.blocks());
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
            let (to, from) = (i * blocks..(i + 1) * blocks, from as usize * blocks..(from as usize + 1) * blocks);
            self.words[to.clone()].copy_from_slice(&src.words[from.clone()]);
            self.scales[to.clone()].copy_from_slice(&src.scales[from.clone()]);
            self.sums[to].copy_from_slice(&src.sums[from]);
        }
        self.quantised = true;
    }

    /// Tokens.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Width of a token, without padding.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// What the activations are multiplied as.
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

    /// Whether the int8 form is there.
    pub(crate) fn quantised(&self) -> bool {
        self.quantised
    }

    /// The int8 form of token `i`.
    pub(crate) fn quantised_row(&self, i: usize) -> QuantisedRow<'_> {
        assert!(i < self.n && self.quantised, "token {i} of {}, quantised: {}", self.n, self.quantised);
        let blocks = self.blocks();
        let at = i * blocks..(i + 1) * blocks;
        QuantisedRow { words: &self.words[at.clone()], scales: &self.scales[at.clone()], sums: &self.sums[at] }
    }

    fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    fn padded(&self) -> usize {
        self.blocks() * BLOCK
    }

    fn shape(&mut self, n: usize, cols: usize) {
        (self.n, self.cols, self.quantised) = (n, cols, false);
        self.rows.resize(n * self.padded(), 0.0);
    }

    fn resize_blocks(&mut self) {
        let len = self.n * self.blocks();
        self.words.resize(len, [0; 8]);
        self.scales.resize(len, 0.0);
        self.sums.resize(len, [0; 2]);
    }

    fn quantise(&mut self) {
        self.resize_blocks();
        let (blocks, _) = self.rows.as_chunks::<BLOCK>();
        for (b, block) in blocks.iter().enumerate() {
            (self.words[b], self.scales[b], self.sums[b]) = quantise_block(block);
        }
        self.quantised = true;
    }
}

/// Words, scale, and the sums of all values and of the first half, of one block.
fn quantise_block(block: &[f32; BLOCK]) -> ([i32; 8], f32, [i32; 2]) {
    // Magnitudes order as their bits do, and NaN above all, so an integer maximum loses nothing.
    let top = block.iter().fold(0, |m: i32, v| m.max((v.to_bits() & 0x7fff_ffff) as i32));
    let absmax = f32::from_bits(top as u32);
    if !absmax.is_finite() {
        return ([0; 8], f32::NAN, [0; 2]);
    }
    if absmax < SMALLEST {
        return ([0; 8], 0.0, [0; 2]);
    }
    let inverse = 127.0 / absmax;
    // One thing per loop: these become vector instructions, a loop that also sorts values into halves does not.
    let mut values = [0i32; BLOCK];
    for (i, &v) in values.iter_mut().zip(block) {
        *i = (v * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
    }
    let (first, second) = values.split_at(BLOCK / 2);
    let sums = [first.iter().sum::<i32>(), second.iter().sum::<i32>()];
    let mut bytes = [0u8; BLOCK];
    for (byte, &i) in bytes.iter_mut().zip(&values) {
        *byte = i as u8;
    }
    let mut words = [0; 8];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = i32::from_le_bytes(*bytes);
    }
    (words, absmax / 127.0, [sums[0] + sums[1], sums[0]])
}

/// The int8 form of one token, by 32-column blocks.
#[derive(Clone, Copy)]
pub(crate) struct QuantisedRow<'a> {
    pub(crate) words: &'a [[i32; 8]],
    pub(crate) scales: &'a [f32],
    #[cfg_attr(
        not(any(target_arch = "x86_64", target_arch = "aarch64")),
        expect(dead_code, reason = "only integers without their bias or offset need it")
    )]
    /// The sum of each block and that of its first half.
    pub(crate) sums: &'a [[i32; 2]],
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
        let (words, scale, sums) = quantise_block(&block);
        assert_eq!(scale, 1.0);
        assert_eq!(values(&words)[..6], [127, 0, 2, -2, -127, 3]);
        assert_eq!(sums, [3; 2]);
    }

    #[test]
    fn odd_blocks() {
        assert_eq!(quantise_block(&[0.0; BLOCK]), ([0; 8], 0.0, [0; 2]));
        assert_eq!(quantise_block(&[1e-38; BLOCK]), ([0; 8], 0.0, [0; 2]));
        for bad in [f32::NAN, f32::INFINITY, -f32::NAN] {
            let mut block = [1.0; BLOCK];
            block[31] = bad;
            let (words, scale, _) = quantise_block(&block);
            assert!(scale.is_nan() && words == [0; 8]);
        }
        let (words, scale, _) = quantise_block(&[f32::MAX; BLOCK]);
        assert!(scale.is_finite() && values(&words) == [127; BLOCK]);
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
            assert_eq!((a.rows, a.words, a.scales, a.sums), (b.rows, b.words, b.scales, b.sums));
        }
    }

    #[test]
    fn buffers_are_reused() {
        let mut a = Activations::new(Precision::Int8);
        a.set(&[1.0; 640], 4, 160);
        let before = (a.rows.as_ptr(), a.words.as_ptr(), a.scales.as_ptr(), a.sums.as_ptr());
        a.set(&[2.0; 66], 2, 33);
        assert!(a.padded_row(1)[33..].iter().all(|&v| v == 0.0), "padding is zero, not an old value");
        a.set(&[3.0; 640], 4, 160);
        assert_eq!(before, (a.rows.as_ptr(), a.words.as_ptr(), a.scales.as_ptr(), a.sums.as_ptr()));
    }
}
