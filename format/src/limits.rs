//! Every bound of the format. They keep a hostile file from making a reader allocate, loop or overflow; real models stay
//! far below all of them. `docs/FORMAT.md` lists them, and a test compares.

use crate::fields;

/// Most extents of a file. A trillion-parameter model has about 25 thousand.
pub const MAX_EXTENTS: usize = 1 << 20;
/// Most records of the tensor table. A model has about ten per layer.
pub const MAX_TENSORS: usize = 1 << 17;
/// Most stored bytes of the metadata, and most before compression. Tokenizers take up to about 40 MB.
pub const MAX_METADATA_BYTES: u64 = 128 << 20;
/// Most blobs of the metadata.
pub const MAX_BLOBS: usize = 1024;
/// Longest name of a blob, in bytes.
pub const MAX_BLOB_NAME: usize = 255;
/// Most bytes of the blob that holds the spec: 4096 layers take about 6 MB.
pub const MAX_SPEC_BYTES: usize = 16 << 20;
/// Most stored bytes of one extent, and most padded ones: what [`crate::ModelFile::read_extent`] may allocate. The largest dense feed-forward
/// networks of one layer take less than 1 GiB.
pub const MAX_EXTENT_BYTES: u64 = 8 << 30;
/// Most logical bytes of one frame of a compressed extent.
pub const MAX_FRAME_BYTES: usize = 1 << 20;
/// Most volumes of a model.
pub const MAX_VOLUMES: usize = 1 << 10;
/// Most stripes of an extent, and most volumes over which a model can be striped.
pub const MAX_STRIPES: usize = 16;

/// Most layers of a model.
pub const MAX_LAYERS: usize = 4096;
/// Most experts of a layer.
pub const MAX_EXPERTS: usize = 1 << 16;
/// Most experts of all layers together: the plan of a conversion keeps the source of each in memory. Models of a trillion
/// parameters have about 23 thousand.
pub const MAX_MODEL_EXPERTS: usize = 1 << 18;
/// Largest width inside a layer: hidden size, ranks, feed-forward widths, heads times head width.
pub const MAX_WIDTH: usize = 1 << 20;
/// Largest vocabulary, and longest context.
pub const MAX_LENGTH: usize = 1 << 24;
/// Most rows of a table: a row has at least two bytes, and at most `4 · MAX_WIDTH`.
pub const MAX_TABLE_ROWS: u64 = 1 << 40;
/// Longest name of a model family, in bytes.
pub const MAX_FAMILY_NAME: usize = 64;

/// Most bytes of the extent table, padding included.
pub(crate) const MAX_EXTENT_TABLE_BYTES: u64 = (MAX_EXTENTS * fields::extent::LEN) as u64;
/// Most bytes of the tensor table, padding included.
pub(crate) const MAX_TENSOR_TABLE_BYTES: u64 = (MAX_TENSORS * fields::tensor::LEN) as u64;

// A tensor has at most 2^40 elements of at most 16 stored bytes (one column, one row, a padded plane each), the vocabulary
// at most 2^44; a cache entry per token and layer has at most 2^21 values. None of these products nears 2^63.
const _: () = assert!(MAX_WIDTH.ilog2() + MAX_LENGTH.ilog2() <= 44);
const _: () = assert!(MAX_LENGTH.ilog2() + MAX_LAYERS.ilog2() + MAX_WIDTH.ilog2() + 1 + 2 < 63);
