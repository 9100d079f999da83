//! The extent table: one fixed-size record per extent.

use std::fmt;

use crate::bytes::{get_u16, get_u32, get_u64, put, round_up};
use crate::fields::{extent as at, reserved_in_use};

/// `layer` of an extent that belongs to no layer.
pub const NO_LAYER: u32 = u32::MAX;

/// What an extent holds. The discriminant is the code in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u16)]
pub enum ExtentKind {
    /// A range of rows of the token embedding; `index` is the part.
    Embedding = 1,
    /// A range of rows of the output head, tiled layout; `index` is the part.
    Head = 2,
    /// The norm before the output head.
    FinalNorm = 3,
    /// Attention of one layer, with the norm before it.
    Attention = 4,
    /// Router of one layer with its biases, and the norm before the feed-forward part.
    Router = 5,
    /// What is computed for every token in the feed-forward part: the shared expert, or the dense feed-forward
    /// network.
    Dense = 6,
    /// One routed expert; `index` is its number.
    Expert = 7,
    /// What only a prediction layer has; prediction layers are numbered after the layers of the model.
    Prediction = 8,
    /// A range of rows of a table of which a token needs single rows, in sectors; `index` is the part.
    Table = 9,
}

impl ExtentKind {
    /// Every kind of this format version.
    pub const ALL: [ExtentKind; 9] = [
        ExtentKind::Embedding,
        ExtentKind::Head,
        ExtentKind::FinalNorm,
        ExtentKind::Attention,
        ExtentKind::Router,
        ExtentKind::Dense,
        ExtentKind::Expert,
        ExtentKind::Prediction,
        ExtentKind::Table,
    ];

    /// The kind with this code in the file, if this version knows it.
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|k| *k as u16 == code)
    }

    /// The name used in reports and errors.
    pub fn name(self) -> &'static str {
        match self {
            ExtentKind::Embedding => "embedding",
            ExtentKind::Head => "head",
            ExtentKind::FinalNorm => "final-norm",
            ExtentKind::Attention => "attention",
            ExtentKind::Router => "router",
            ExtentKind::Dense => "dense",
            ExtentKind::Expert => "expert",
            ExtentKind::Prediction => "prediction",
            ExtentKind::Table => "table",
        }
    }
}

impl fmt::Display for ExtentKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the stored bytes encode the logical bytes. The discriminant is the code in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Codec {
    /// Stored bytes are the logical bytes, then zero padding up to the page.
    Raw = 0,
    /// The bytes of numbers are separated into planes by their place in the number; planes that get shorter are
    /// compressed ([`crate::planes`]).
    Planes = 1,
}

impl Codec {
    /// Every codec of this format version.
    pub const ALL: [Codec; 2] = [Codec::Raw, Codec::Planes];

    /// The codec with this code in the file, if this version knows it.
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|c| *c as u16 == code)
    }

    /// The name used in reports.
    pub fn name(self) -> &'static str {
        match self {
            Codec::Raw => "raw",
            Codec::Planes => "planes",
        }
    }
}

/// One extent: where it is, what it is, and what its bytes hash to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentRecord {
    /// What the extent holds.
    pub kind: ExtentKind,
    /// Encoding of the stored bytes.
    pub codec: Codec,
    /// Layer, or [`NO_LAYER`].
    pub layer: u32,
    /// Expert number, or part of the embedding or head; else 0.
    pub index: u32,
    /// Volume that holds it, or its first stripe, `0..volume_count`.
    pub volume: u16,
    /// Byte offset in that volume: a multiple of the page size.
    pub offset: u64,
    /// Stored bytes, of all its stripes, a multiple of the page size.
    pub stored_len: u64,
    /// Bytes that mean something.
    pub logical_len: u64,
    /// xxh3-64 of the stored bytes, padding included; 0 for a compressed extent with several stripes, which have checksums of their own.
    pub checksum: u64,
    /// xxh3-64 of the padded bytes; equal to `checksum` if the extent is not compressed.
    pub logical_checksum: u64,
    /// Bytes in memory: the logical bytes, then zeros up to the page. Not in the table, which implies it.
    pub padded_len: u64,
}

impl ExtentRecord {
    /// Serialises to the table's record of a file of this version of the format.
    pub fn to_bytes(self, version: u32) -> [u8; at::LEN] {
        self.to_bytes_of_stripe(version, 0)
    }

    /// As [`ExtentRecord::to_bytes`], where place, stored bytes and checksum are those of stripe number `stripe`.
    pub(crate) fn to_bytes_of_stripe(self, version: u32, stripe: u16) -> [u8; at::LEN] {
        let mut b = [0; at::LEN];
        put(&mut b, at::KIND, &(self.kind as u16).to_le_bytes());
        put(&mut b, at::CODEC, &(self.codec as u16).to_le_bytes());
        put(&mut b, at::LAYER, &self.layer.to_le_bytes());
        put(&mut b, at::INDEX, &self.index.to_le_bytes());
        put(&mut b, at::VOLUME, &self.volume.to_le_bytes());
        put(&mut b, at::STRIPE, &stripe.to_le_bytes());
        put(&mut b, at::OFFSET, &self.offset.to_le_bytes());
        put(&mut b, at::STORED_LEN, &self.stored_len.to_le_bytes());
        put(&mut b, at::LOGICAL_LEN, &self.logical_len.to_le_bytes());
        put(&mut b, at::CHECKSUM, &self.checksum.to_le_bytes());
        if version > 1 {
            put(&mut b, at::LOGICAL_CHECKSUM, &self.logical_checksum.to_le_bytes());
        }
        b
    }

    /// Parses one record of a file of this version and page size, and the number of the stripe that it describes; `Err` says which field
    /// is unknown to that version.
    pub(crate) fn parse(b: &[u8], version: u32, page_size: u32) -> Result<(Self, u16), String> {
        let kind = get_u16(b, at::KIND);
        let code = get_u16(b, at::CODEC);
        let logical_checksum = get_u64(b, at::LOGICAL_CHECKSUM);
        let stripe = get_u16(b, at::STRIPE);
        if reserved_in_use(&at::FIELDS, b) || (version == 1 && (logical_checksum != 0 || stripe != 0)) {
            return Err("its reserved bytes are in use".into());
        }
        let codec = Codec::from_code(code).filter(|codec| version > 1 || *codec == Codec::Raw);
        let checksum = get_u64(b, at::CHECKSUM);
        let logical_len = get_u64(b, at::LOGICAL_LEN);
        let record = ExtentRecord {
            kind: ExtentKind::from_code(kind).ok_or_else(|| format!("its kind {kind} is unknown"))?,
            codec: codec.ok_or_else(|| format!("its codec {code} is unknown"))?,
            layer: get_u32(b, at::LAYER),
            index: get_u32(b, at::INDEX),
            volume: get_u16(b, at::VOLUME),
            offset: get_u64(b, at::OFFSET),
            stored_len: get_u64(b, at::STORED_LEN),
            logical_len,
            checksum,
            logical_checksum: if version == 1 { checksum } else { logical_checksum },
            // The check of the lengths refuses one that overflows.
            padded_len: padded_len(logical_len, page_size).unwrap_or(u64::MAX),
        };
        Ok((record, stripe))
    }

    /// The extent's name in reports and errors, such as `layer 3 expert 17`.
    pub fn name(&self) -> String {
        extent_name(self.kind, self.layer, self.index)
    }
}

/// Bytes in memory of an extent with this many logical bytes; `None` on overflow.
pub(crate) fn padded_len(logical_len: u64, page_size: u32) -> Option<u64> {
    round_up(logical_len.max(1), u64::from(page_size))
}

/// The name of an extent in reports and errors, such as `layer 3 expert 17`.
pub fn extent_name(kind: ExtentKind, layer: u32, index: u32) -> String {
    match kind {
        ExtentKind::Embedding | ExtentKind::Head | ExtentKind::Table if layer == NO_LAYER => {
            format!("{kind} part {index}")
        }
        ExtentKind::Embedding | ExtentKind::Head | ExtentKind::Table => format!("layer {layer} {kind} part {index}"),
        ExtentKind::FinalNorm => kind.to_string(),
        ExtentKind::Expert => format!("layer {layer} expert {index}"),
        ExtentKind::Attention | ExtentKind::Router | ExtentKind::Dense | ExtentKind::Prediction => {
            format!("layer {layer} {kind}")
        }
    }
}
