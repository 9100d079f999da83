//! Weight types and the size of a matrix in the tiled layout (`docs/LAYOUT.md`).

use std::fmt;
use std::str::FromStr;

/// Rows that lie interleaved in one row group.
pub const ROW_GROUP: usize = 8;
/// Columns of one quantisation block.
pub const BLOCK: usize = 32;
/// Columns that share one fp8 scale.
pub const FP8_BLOCK: usize = 128;
/// Alignment, in bytes, of each plane of a row group and of each tensor inside its extent.
pub const PLANE_ALIGN: usize = 64;

/// How the numbers of a tensor are stored. The discriminant is the code in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u16)]
pub enum WeightType {
    /// IEEE binary32.
    F32 = 1,
    /// IEEE binary16.
    F16 = 2,
    /// bfloat16.
    Bf16 = 3,
    /// e4m3fn with one f32 scale per 128×128 block (DeepSeek FP8), carried bit for bit.
    Fp8 = 4,
    /// int8, one f16 scale per row and 32 columns.
    Q8 = 5,
    /// Symmetric int4, one bf16 scale per row and 32 columns (compressed-tensors), carried bit for bit.
    Int4 = 6,
    /// e2m1, one e8m0 scale per row and 32 columns (OCP MX), carried bit for bit.
    Mxfp4 = 7,
    /// Four-bit codebook, one scale byte per row and 32 columns, one f32 per row (`docs/QUANTISATION.md`).
    Q4 = 8,
    /// Three-bit codebook, one scale byte per row and 16 columns, one f32 per row (`docs/QUANTISATION.md`).
    Q3 = 9,
}

impl WeightType {
    /// Every type of this format version.
    pub const ALL: [WeightType; 9] = [
        WeightType::F32,
        WeightType::F16,
        WeightType::Bf16,
        WeightType::Fp8,
        WeightType::Q8,
        WeightType::Int4,
        WeightType::Mxfp4,
        WeightType::Q4,
        WeightType::Q3,
    ];

    /// The type with this code in the file, if this version knows it.
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|t| *t as u16 == code)
    }

    /// The name used on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            WeightType::F32 => "f32",
            WeightType::F16 => "f16",
            WeightType::Bf16 => "bf16",
            WeightType::Fp8 => "fp8",
            WeightType::Q8 => "q8",
            WeightType::Int4 => "int4",
            WeightType::Mxfp4 => "mxfp4",
            WeightType::Q4 => "q4",
            WeightType::Q3 => "q3",
        }
    }

    /// Bytes of the scale plane of one row group, before padding.
    fn scale_plane(self, cols: usize) -> Option<usize> {
        let blocks = cols.div_ceil(BLOCK);
        match self {
            WeightType::F32 | WeightType::F16 | WeightType::Bf16 => Some(0),
            WeightType::Fp8 => cols.div_ceil(FP8_BLOCK).checked_mul(4),
            WeightType::Q8 | WeightType::Int4 => blocks.checked_mul(2 * ROW_GROUP),
            WeightType::Mxfp4 => blocks.checked_mul(ROW_GROUP),
            WeightType::Q4 => blocks.checked_mul(ROW_GROUP)?.checked_add(4 * ROW_GROUP),
            WeightType::Q3 => blocks.checked_mul(2 * ROW_GROUP)?.checked_add(4 * ROW_GROUP),
        }
    }

    /// Bytes of the value plane of one row group, before padding.
    fn value_plane(self, cols: usize) -> Option<usize> {
        let padded = cols.div_ceil(BLOCK).checked_mul(BLOCK)?;
        match self {
            WeightType::F32 => cols.checked_mul(4 * ROW_GROUP),
            WeightType::F16 | WeightType::Bf16 => cols.checked_mul(2 * ROW_GROUP),
            WeightType::Fp8 => cols.checked_mul(ROW_GROUP),
            WeightType::Q8 => padded.checked_mul(ROW_GROUP),
            WeightType::Int4 | WeightType::Mxfp4 | WeightType::Q4 => padded.checked_mul(ROW_GROUP / 2),
            WeightType::Q3 => padded.checked_mul(ROW_GROUP / 8 * 3),
        }
    }

    /// Bytes of one row group of `cols` columns, planes padded; `None` on overflow.
    pub fn row_group_len(self, cols: usize) -> Option<usize> {
        let pad = |n: usize| n.checked_next_multiple_of(PLANE_ALIGN);
        pad(self.scale_plane(cols)?)?.checked_add(pad(self.value_plane(cols)?)?)
    }

    /// Bytes of a tiled matrix of `rows` × `cols`; `None` on overflow.
    pub fn matrix_len(self, rows: usize, cols: usize) -> Option<usize> {
        self.row_group_len(cols)?.checked_mul(rows.div_ceil(ROW_GROUP))
    }

    /// Bytes per element of a plain (untiled) tensor; `None` for types that only exist tiled.
    pub fn plain_element_len(self) -> Option<usize> {
        match self {
            WeightType::F32 => Some(4),
            WeightType::F16 | WeightType::Bf16 => Some(2),
            _ => None,
        }
    }
}

impl fmt::Display for WeightType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for WeightType {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|t| t.name() == s).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|t| t.name()).collect();
            format!("unknown weight type `{s}`: use one of {}", names.join(", "))
        })
    }
}
