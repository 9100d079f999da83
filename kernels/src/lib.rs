//! Arithmetic on slices: matrix products over packed weights, attention, norms, and a thread pool to run them on.
//!
//! The crate knows no file and no model. Weights arrive as bytes in the layout of `docs/LAYOUT.md`, wrapped in a
//! [`Matrix`] whose length has been checked once; activations arrive as f32 and are put into kernel form by
//! [`Activations`]; [`Kernels`] multiplies the two on a [`ThreadPool`].
//!
//! # One order of operations
//!
//! Every output element is the result of one fixed sequence of floating-point operations, written down in the
//! `scalar` module. It does not depend on the instruction set, the number of threads, how rows are split over them,
//! how many tokens are in the batch or where in the batch a token stands. So a batch of `n` tokens gives, bit for bit,
//! what `n` single calls give, and a result can be compared across machines.
//!
//! # Instruction sets
//!
//! The safe scalar code is the specification. AVX2 (with or without AVX-VNNI), AVX-512 and NEON kernels (with or without i8mm)
//! must agree with it bit for bit (NaN payloads excepted) and are chosen once, by [`Kernels::detect`], through tokens that can
//! only be made where the CPU has the instructions. `unsafe` is confined to `x86/`, `neon/`, `threads.rs` and `par_slice.rs`.

mod activations;
mod attention;
mod elementwise;
mod expanded;
mod grouped;
mod interleave;
mod isa;
mod kv;
mod math;
mod matmul;
mod matrix;
pub mod number;

/// Version of the numbers that the kernels and the layers above them compute. Saved sequences are bound to it: raise it whenever a
/// change can give a different bit for the same weights, tokens, precision and key-value type.
pub const NUMERICS_VERSION: u32 = 2;

mod pack;
mod par_slice;
mod quant;
mod reading;
mod scalar;
mod threads;
mod top_k;
mod update;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[macro_use]
mod vector;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[macro_use]
mod panels;
#[macro_use]
mod chains;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use activations::{Activations, Precision};
pub use attention::{KEY_BLOCK, KeyBlock, QueryTile, Scores, key_blocks};
pub use elementwise::{Activation, RopePairing, rms_norm, rope, softmax};
pub use expanded::{EXPANDED_BLOCK, EXPANDED_TILE, ExpandedKeys, ExpandedTile, Expander, Gathered, expansion_bytes};
pub use grouped::{IQ4NL, pack_row_group_grouped, pack_row_group_nibbles};
pub use isa::{IsaError, Kernels};
pub use kv::{KvBuffer, KvRows, KvType, UnknownKvType};
pub use math::{exp, sigmoid, silu, tanh};
pub use matmul::{Work, Works};
pub use matrix::{BLOCK, FP8_BLOCK, Matrix, ROW_GROUP, ShapeError, Watch, WeightType, packed_len, row_group_len};
pub use number::{E2M1, bf16_to_f32, e4m3_to_f32, e8m0_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
pub use pack::{
    pack_row_group, pack_row_group_fp8, pack_row_group_int4, pack_row_group_mxfp4, pack_row_group_q8,
    pack_row_group_u16, unpack, unpack_into, unpack_row,
};
pub use quant::{Feedback, FeedbackScratch, Moments, Quantised, pack_row_group_weighted};
pub use reading::READING_STREAMS;
pub use threads::ThreadPool;
pub use top_k::{TopK, top_k};
