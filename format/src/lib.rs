//! The Sluice model file: bytes ↔ meaning.
//!
//! A file is a superblock, a set of checksummed, page-aligned **extents**, and three tables that say what they hold.
//! `docs/FORMAT.md` describes it byte by byte; a test compares that document with the constants of this crate.
//!
//! This crate has no policy and no threads: it does not choose types or places, it does not cache, and it does not know how a
//! kernel multiplies. Writing goes through [`FileLayout`] and [`FileWriter`], reading through [`ModelFile`], which is a
//! ladder of checks with one typed error each; no length is used for an allocation before it has been checked. Both sides
//! share those checks, so the writer refuses what the reader would refuse.
//!
//! A model can consist of several such files, its volumes. An extent can be compressed ([`planes`]), and divided among volumes
//! ([`Stripe`]).
//!
//! ```text
//! | superblock | extent | extent | ... | extent | extent table | tensor table | metadata |
//! | one page   |      each whole pages          |          each whole pages              |
//! ```

mod bytes;
mod catalog;
mod durable;
mod error;
mod extent;
pub mod fields;
mod importance;
mod inspect;
pub mod json;
pub mod limits;
mod metadata;
mod placing;
pub mod planes;
mod reader;
mod rewrite;
mod schema;
pub mod sectors;
mod spec;
mod state_id;
mod stripes;
mod superblock;
mod tensor;
mod verify;
mod volumes;
mod writer;
mod zstandard;

pub use durable::{Syncer, may_replace, remove_leftovers, replace_file, replace_file_with, replace_private_file_with};
pub use error::{FormatError, Region};
pub use extent::{Codec, ExtentKind, ExtentRecord, NO_LAYER, extent_name};
pub use fields::extent::LEN as EXTENT_RECORD_LEN;
pub use fields::tensor::LEN as TENSOR_RECORD_LEN;
pub use importance::{ColumnMeans, IMPORTANCE_MAGIC, IMPORTANCE_VERSION, Importance, ImportanceError, MatrixKey};
pub use inspect::{KindSize, TypeSize};
pub use metadata::{
    Metadata, PROVENANCE_BLOB, SOURCE_CONFIG_BLOB, SOURCE_DIGESTS_BLOB, SPEC_BLOB, TEXT_FILES, TOKENIZER_BLOB,
    TOKENIZER_BLOBS, TOKENIZER_CONFIG_BLOB,
};
pub use placing::{FileLayout, PlannedExtent};
pub use reader::{ModelFile, open_no_link, open_regular};
pub use rewrite::{REWRITE_MAGIC, REWRITE_VERSION, Recovery, recover, rewrite_metadata};
pub use schema::TensorShape;
pub use sluice_weights::{BLOCK, FP8_BLOCK, Grouped, PLANE_ALIGN, ROW_GROUP, WeightType};
pub use spec::*;
pub use state_id::StateId;
pub use stripes::{MAX_SHARE, Placed, Shares, Stripe};
pub use superblock::{FORMAT_VERSION, MAGIC, ModelId, PAGE_SIZES, READ_VERSIONS, Superblock, TableRef};
pub use tensor::{ANY_INDEX, Layout, MAX_ORDERED_COLS, TensorRecord, order_len, pack_tensors};
pub use volumes::{Volume, VolumeName, first_volumes, model_path};
pub use writer::{ExtentWriter, FileWriter, Written};

/// Checksum of every region of the file: xxh3-64, seed 0 (<https://github.com/Cyan4973/xxHash>).
pub fn checksum(bytes: &[u8]) -> u64 {
    sluice_checksum::xxh3_64(bytes)
}
