//! Every field of the fixed-size records: name, offset, length. Readers and writers take offsets from here, and a test
//! compares these tables with the ones in `docs/FORMAT.md`.

/// One field of a fixed-size record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name in `docs/FORMAT.md`; [`RESERVED`] for bytes that must be zero.
    pub name: &'static str,
    /// First byte, from the beginning of the record.
    pub offset: usize,
    /// Bytes.
    pub len: usize,
}

/// Name of bytes that must be zero in this version.
pub const RESERVED: &str = "reserved";

const fn field(name: &'static str, offset: usize, len: usize) -> Field {
    Field { name, offset, len }
}

/// Whether the fields cover `record_len` bytes in order, without gap or overlap.
const fn tile(fields: &[Field], record_len: usize) -> bool {
    let (mut i, mut end) = (0, 0);
    while i < fields.len() {
        if fields[i].offset != end {
            return false;
        }
        end += fields[i].len;
        i += 1;
    }
    end == record_len
}

/// Whether any reserved byte of the record is not zero.
pub(crate) fn reserved_in_use(fields: &[Field], record: &[u8]) -> bool {
    let reserved = fields.iter().filter(|f| f.name == RESERVED);
    reserved.into_iter().any(|f| record[f.offset..f.offset + f.len].iter().any(|&b| b != 0))
}

/// The superblock, without the zeros that fill its page.
pub mod superblock {
    use super::{Field, field, table_ref, tile};

    pub(crate) const MAGIC: usize = 0;
    pub(crate) const VERSION: usize = 8;
    pub(crate) const PAGE_SIZE: usize = 12;
    pub(crate) const MODEL_ID: usize = 16;
    pub(crate) const VOLUME: usize = 32;
    pub(crate) const VOLUME_COUNT: usize = 34;
    pub(crate) const FILE_LEN: usize = 40;
    pub(crate) const EXTENTS: usize = 48;
    pub(crate) const TENSORS: usize = EXTENTS + table_ref::LEN;
    pub(crate) const METADATA: usize = TENSORS + table_ref::LEN;
    pub(crate) const CHECKSUM: usize = METADATA + table_ref::LEN;
    /// Bytes that carry fields.
    pub const LEN: usize = CHECKSUM + 8;

    /// All fields in file order.
    pub const FIELDS: [Field; 12] = [
        field("magic", MAGIC, 8),
        field("version", VERSION, 4),
        field("page_size", PAGE_SIZE, 4),
        field("model_id", MODEL_ID, 16),
        field("volume", VOLUME, 2),
        field("volume_count", VOLUME_COUNT, 2),
        field(super::RESERVED, 36, 4),
        field("file_len", FILE_LEN, 8),
        field("extents", EXTENTS, table_ref::LEN),
        field("tensors", TENSORS, table_ref::LEN),
        field("metadata", METADATA, table_ref::LEN),
        field("checksum", CHECKSUM, 8),
    ];
    const _: () = assert!(tile(&FIELDS, LEN));
}

/// The superblock's reference to a table.
pub mod table_ref {
    use super::{Field, field, tile};

    pub(crate) const OFFSET: usize = 0;
    pub(crate) const STORED_LEN: usize = 8;
    pub(crate) const LOGICAL_LEN: usize = 16;
    pub(crate) const CHECKSUM: usize = 24;
    /// Bytes of a reference.
    pub const LEN: usize = 32;

    /// All fields in file order.
    pub const FIELDS: [Field; 4] = [
        field("offset", OFFSET, 8),
        field("stored_len", STORED_LEN, 8),
        field("logical_len", LOGICAL_LEN, 8),
        field("checksum", CHECKSUM, 8),
    ];
    const _: () = assert!(tile(&FIELDS, LEN));
}

/// The footer of a log of new metadata ([`crate::rewrite_metadata`]): the last bytes of a file that is being changed.
pub mod rewrite_footer {
    use super::{Field, field, tile};

    pub(crate) const MAGIC: usize = 0;
    pub(crate) const VERSION: usize = 8;
    pub(crate) const PAGE_SIZE: usize = 12;
    pub(crate) const LOG_OFFSET: usize = 16;
    pub(crate) const METADATA_LEN: usize = 24;
    pub(crate) const LOG_CHECKSUM: usize = 32;
    pub(crate) const CHECKSUM: usize = 56;
    /// Bytes of the footer.
    pub const LEN: usize = 64;

    /// All fields in file order.
    pub const FIELDS: [Field; 8] = [
        field("magic", MAGIC, 8),
        field("version", VERSION, 4),
        field("page_size", PAGE_SIZE, 4),
        field("log_offset", LOG_OFFSET, 8),
        field("metadata_len", METADATA_LEN, 8),
        field("log_checksum", LOG_CHECKSUM, 8),
        field(super::RESERVED, 40, 16),
        field("checksum", CHECKSUM, 8),
    ];
    const _: () = assert!(tile(&FIELDS, LEN));
}

/// A record of the extent table.
pub mod extent {
    use super::{Field, field, tile};

    pub(crate) const KIND: usize = 0;
    pub(crate) const CODEC: usize = 2;
    pub(crate) const LAYER: usize = 4;
    pub(crate) const INDEX: usize = 8;
    pub(crate) const VOLUME: usize = 12;
    pub(crate) const STRIPE: usize = 14;
    pub(crate) const OFFSET: usize = 16;
    pub(crate) const STORED_LEN: usize = 24;
    pub(crate) const LOGICAL_LEN: usize = 32;
    pub(crate) const CHECKSUM: usize = 40;
    /// Zero in version 1.
    pub(crate) const LOGICAL_CHECKSUM: usize = 48;
    /// Bytes of a record.
    pub const LEN: usize = 64;

    /// All fields in file order.
    pub const FIELDS: [Field; 12] = [
        field("kind", KIND, 2),
        field("codec", CODEC, 2),
        field("layer", LAYER, 4),
        field("index", INDEX, 4),
        field("volume", VOLUME, 2),
        field("stripe", STRIPE, 2),
        field("offset", OFFSET, 8),
        field("stored_len", STORED_LEN, 8),
        field("logical_len", LOGICAL_LEN, 8),
        field("checksum", CHECKSUM, 8),
        field("logical_checksum", LOGICAL_CHECKSUM, 8),
        field(super::RESERVED, 56, 8),
    ];
    const _: () = assert!(tile(&FIELDS, LEN));
}

/// The head of an extent that is compressed by planes.
pub mod planes_head {
    use super::{Field, field, tile};

    pub(crate) const FRAMES: usize = 0;
    pub(crate) const CODED_LEN: usize = 8;
    /// Bytes of the head.
    pub const LEN: usize = 16;

    /// All fields in file order.
    pub const FIELDS: [Field; 3] =
        [field("frames", FRAMES, 4), field(super::RESERVED, 4, 4), field("coded_len", CODED_LEN, 8)];
    const _: () = assert!(tile(&FIELDS, LEN));
}

/// The record of one frame of such an extent.
pub mod planes_frame {
    use super::{Field, field, tile};

    pub(crate) const BYTES: usize = 0;
    pub(crate) const WIDTH: usize = 4;
    pub(crate) const PLANES: usize = 8;
    /// Bytes of a record.
    pub const LEN: usize = 24;

    /// All fields in file order.
    pub const FIELDS: [Field; 7] = [
        field("len", BYTES, 4),
        field("width", WIDTH, 1),
        field(super::RESERVED, 5, 3),
        field("plane_0", PLANES, 4),
        field("plane_1", PLANES + 4, 4),
        field("plane_2", PLANES + 8, 4),
        field("plane_3", PLANES + 12, 4),
    ];
    const _: () = assert!(tile(&FIELDS, LEN));
}

/// A record of the tensor table.
pub mod tensor {
    use super::{Field, field, tile};

    pub(crate) const KIND: usize = 0;
    pub(crate) const WEIGHT_TYPE: usize = 2;
    pub(crate) const LAYOUT: usize = 4;
    pub(crate) const LAYER: usize = 8;
    pub(crate) const INDEX: usize = 12;
    pub(crate) const BATCH: usize = 16;
    pub(crate) const ROWS: usize = 24;
    pub(crate) const COLS: usize = 32;
    pub(crate) const OFFSET: usize = 40;
    pub(crate) const BYTES: usize = 48;
    pub(crate) const NAME: usize = 64;
    /// Longest canonical tensor name, in bytes.
    pub const NAME_LEN: usize = 48;
    /// Bytes of a record.
    pub const LEN: usize = 128;

    /// All fields in file order.
    pub const FIELDS: [Field; 14] = [
        field("kind", KIND, 2),
        field("weight_type", WEIGHT_TYPE, 2),
        field("layout", LAYOUT, 2),
        field(super::RESERVED, 6, 2),
        field("layer", LAYER, 4),
        field("index", INDEX, 4),
        field("batch", BATCH, 8),
        field("rows", ROWS, 8),
        field("cols", COLS, 8),
        field("offset", OFFSET, 8),
        field("len", BYTES, 8),
        field(super::RESERVED, 56, 8),
        field("name", NAME, NAME_LEN),
        field(super::RESERVED, NAME + NAME_LEN, 16),
    ];
    const _: () = assert!(tile(&FIELDS, LEN));
}

/// The header of an importance file.
pub mod importance {
    use super::{Field, field, tile};

    pub(crate) const MAGIC: usize = 0;
    pub(crate) const VERSION: usize = 8;
    pub(crate) const ENTRIES: usize = 12;
    pub(crate) const GEOMETRY: usize = 16;
    pub(crate) const TOKENS: usize = 24;
    pub(crate) const BODY_LEN: usize = 32;
    pub(crate) const CHECKSUM: usize = 40;
    /// Bytes of the header.
    pub const LEN: usize = 64;

    /// All fields in file order.
    pub const FIELDS: [Field; 8] = [
        field("magic", MAGIC, 8),
        field("version", VERSION, 4),
        field("entries", ENTRIES, 4),
        field("geometry", GEOMETRY, 8),
        field("tokens", TOKENS, 8),
        field("body_len", BODY_LEN, 8),
        field("checksum", CHECKSUM, 8),
        field(super::RESERVED, 48, 16),
    ];
    const _: () = assert!(tile(&FIELDS, LEN));
}

/// The head of one matrix in an importance file; its columns follow, f32 each.
pub mod importance_entry {
    use super::{Field, field, tensor, tile};

    pub(crate) const KIND: usize = 0;
    pub(crate) const LAYER: usize = 4;
    pub(crate) const INDEX: usize = 8;
    pub(crate) const COLUMNS: usize = 12;
    pub(crate) const TOKENS: usize = 16;
    pub(crate) const NAME: usize = 24;
    pub(crate) const NAME_LEN: usize = tensor::NAME_LEN;
    /// Bytes of the head.
    pub const LEN: usize = NAME + NAME_LEN;

    /// All fields in file order.
    pub const FIELDS: [Field; 7] = [
        field("kind", KIND, 2),
        field(super::RESERVED, 2, 2),
        field("layer", LAYER, 4),
        field("index", INDEX, 4),
        field("columns", COLUMNS, 4),
        field("tokens", TOKENS, 8),
        field("name", NAME, NAME_LEN),
    ];
    const _: () = assert!(tile(&FIELDS, LEN));
}
