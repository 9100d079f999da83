//! The extent table: one fixed-size record per extent.

use std::fmt;

use crate::bytes::{get_u16, get_u32, get_u64, put};

/// Bytes of one record of the extent table.
pub const EXTENT_RECORD_LEN: usize = 64;
/// `layer` of an extent that belongs to no layer.
pub const NO_LAYER: u32 = u32::MAX;

/// What an extent holds. The discriminant is the code in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u16)]
pub enum ExtentKind {
    /// A range of rows of the token embedding, plain layout; `index` is the part.
    Embedding = 1,
    /// A range of rows of the output head, tiled layout; `index` is the part.
    Head = 2,
    /// The norm before the output head.
    FinalNorm = 3,
    /// Attention of one layer, with the norm before it.
    Attention = 4,
    /// Router of one layer with its biases, and the norm before the feed-forward part.
    Router = 5,
    /// What every token computes in the feed-forward part: the shared expert, or the dense feed-forward network.
    Dense = 6,
    /// One routed expert; `index` is its number.
    Expert = 7,
}

impl ExtentKind {
    /// Every kind of this format version.
    pub const ALL: [ExtentKind; 7] = [
        ExtentKind::Embedding,
        ExtentKind::Head,
        ExtentKind::FinalNorm,
        ExtentKind::Attention,
        ExtentKind::Router,
        ExtentKind::Dense,
        ExtentKind::Expert,
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
    /// Volume that holds it, `0..volume_count`.
    pub volume: u16,
    /// Byte offset in its volume: a multiple of the page size.
    pub offset: u64,
    /// Bytes in the file, a multiple of the page size: what one read moves and what the checksum covers.
    pub stored_len: u64,
    /// Bytes that mean something.
    pub logical_len: u64,
    /// xxh3-64 of the stored bytes, padding included.
    pub checksum: u64,
}

impl ExtentRecord {
    /// Serialises to the table's record.
    pub fn to_bytes(&self) -> [u8; EXTENT_RECORD_LEN] {
        let mut b = [0; EXTENT_RECORD_LEN];
        put(&mut b, 0, &(self.kind as u16).to_le_bytes());
        put(&mut b, 2, &(self.codec as u16).to_le_bytes());
        put(&mut b, 4, &self.layer.to_le_bytes());
        put(&mut b, 8, &self.index.to_le_bytes());
        put(&mut b, 12, &self.volume.to_le_bytes());
        // 14..16 and 48..64 are reserved for striping and stay zero.
        put(&mut b, 16, &self.offset.to_le_bytes());
        put(&mut b, 24, &self.stored_len.to_le_bytes());
        put(&mut b, 32, &self.logical_len.to_le_bytes());
        put(&mut b, 40, &self.checksum.to_le_bytes());
        b
    }

    /// Parses one record; `Err` says which field is unknown to this version.
    pub(crate) fn parse(b: &[u8]) -> Result<Self, String> {
        let kind = get_u16(b, 0);
        let codec = get_u16(b, 2);
        if b[14..16].iter().chain(&b[48..64]).any(|&x| x != 0) {
            return Err("its reserved bytes are in use".into());
        }
        Ok(ExtentRecord {
            kind: ExtentKind::from_code(kind).ok_or_else(|| format!("its kind {kind} is unknown"))?,
            codec: match codec {
                0 => Codec::Raw,
                other => return Err(format!("its codec {other} is unknown")),
            },
            layer: get_u32(b, 4),
            index: get_u32(b, 8),
            volume: get_u16(b, 12),
            offset: get_u64(b, 16),
            stored_len: get_u64(b, 24),
            logical_len: get_u64(b, 32),
            checksum: get_u64(b, 40),
        })
    }

    /// The extent's name in reports and errors, such as `layer 3 expert 17`.
    pub fn name(&self) -> String {
        extent_name(self.kind, self.layer, self.index)
    }
}

/// The name of an extent in reports and errors, such as `layer 3 expert 17`.
pub fn extent_name(kind: ExtentKind, layer: u32, index: u32) -> String {
    match kind {
        ExtentKind::Embedding | ExtentKind::Head => format!("{kind} part {index}"),
        ExtentKind::FinalNorm => kind.to_string(),
        ExtentKind::Expert => format!("layer {layer} expert {index}"),
        ExtentKind::Attention | ExtentKind::Router | ExtentKind::Dense => format!("layer {layer} {kind}"),
    }
}
