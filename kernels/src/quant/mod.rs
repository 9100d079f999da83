//! The types `q4`, `q3` and `q2`: a codebook of integers, one byte per block, one f32 per row.
//!
//! A weight is `S · s(b) · (C[n] + o(b))`:
//! - `S`, f32, belongs to the row;
//! - `b`, a byte, belongs to a block: 32 columns of a row for `q4`, 16 for `q3` and `q2`. Its low five bits are a small float
//!   without sign, `s(b) = m` for exponent 0 and `(8 + m)·2^(e−1)` for exponent `e` in 1..4, so 0..60; its high three
//!   bits `k` move the codebook, `o(b) = step·(k − 7/2)`;
//! - `n`, four or three bits, belongs to the weight and selects a level of the codebook `C`. For `q2` it is four bits: two belong
//!   to the weight, and two to its neighbour as well (the `trellis` module).
//!
//! Levels and offsets are integers, so a block and int8 activations have an exact integer dot product.
//!
//! # Why so
//!
//! A codebook with unequal steps that fit the density of weights is the idea of `IQ4_NL` in llama.cpp's ggml. One scale per row,
//! and a few bits per block that choose among shifted codebooks, are the idea of `IQ4_KS` in ik_llama.cpp. Eight shifts turn out to
//! be worth more than additional scale bits: the largest weight of a block lies on one side, and with the shift the levels follow
//! it. The levels come from Lloyd's algorithm (S. Lloyd, "Least squares quantization in PCM", 1982), run over blocks that choose
//! scale and shift themselves, and were then rounded to integers by coordinate descent.
//!
//! Scales are not derived from the largest weight. For a given `S`, each block takes the byte with the least `Σ ω_j (x_j − x̂_j)²`,
//! found by trying; for given bytes, `S` is the weighted least-squares solution; a few candidates for the first `S` are tried. `ω`
//! is the importance of a column.

mod codebook;
mod factor;
mod feedback;
mod moments;
mod pack;
mod product;
mod search;
mod trellis;

pub(crate) use codebook::{Codebook, UNIT};
pub use feedback::{Feedback, FeedbackScratch};
pub use moments::Moments;
pub(crate) use pack::pack_unweighted;
pub use pack::{Quantised, pack_row_group_weighted};
pub(crate) use product::{group_f32, group_int8, unpack_column};
