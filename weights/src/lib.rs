//! How the numbers of a matrix are stored: weight types, their codes in the file, their names and sizes.
//!
//! `docs/LAYOUT.md` gives the bytes. The types in [`WeightType::OWN`] have a form of their own; all other published
//! forms are [`Grouped`]: codes of a few bits with scales per group of columns, one description for all of them.
//!
//! Both sides use this crate: `format`, which writes codes and lengths into files, and `kernels`, which multiply.

mod grouped;
mod published;

use std::fmt;
use std::str::FromStr;

pub use grouped::{Codes, GroupSize, Grouped, SUPER_BLOCK, ScaleType, Scales, Super, Zero};

/// Rows that lie interleaved in one row group.
pub const ROW_GROUP: usize = 8;
/// Columns of one quantisation block, and of one block of codes.
pub const BLOCK: usize = 32;
/// Columns that share one fp8 scale.
pub const FP8_BLOCK: usize = 128;
/// Alignment, in bytes, of each plane of a row group and of each tensor inside its extent.
pub const PLANE_ALIGN: usize = 64;

/// How the numbers of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WeightType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// e4m3fn with one f32 scale per 128×128 block (DeepSeek FP8), carried bit for bit.
    Fp8,
    /// int8, one f16 scale per row and 32 columns. GGUF's Q8_0 is this, bit for bit.
    Q8,
    /// Symmetric int4, one bf16 scale per row and 32 columns (compressed-tensors), carried bit for bit.
    Int4,
    /// e2m1, one e8m0 scale per row and 32 columns (OCP MX), carried bit for bit.
    Mxfp4,
    /// Four-bit codebook, one scale byte per row and 32 columns, one f32 per row (`docs/QUANTISATION.md`).
    Q4,
    /// Three-bit codebook, one scale byte per row and 16 columns, one f32 per row (`docs/QUANTISATION.md`).
    Q3,
    /// Two bits per weight that neighbours share, one scale byte per row and 16 columns, one f32 per row
    /// (`docs/QUANTISATION.md`).
    Q2,
    /// A published form, carried bit for bit.
    Grouped(Grouped),
}

/// Codes from here on are those of [`Grouped`].
const GROUPED: u16 = 0x8000;

/// Byte lengths of the two planes of one row group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planes {
    /// Bytes of the scale plane.
    pub scales: usize,
    /// The same with padding: where the value plane begins.
    pub scales_padded: usize,
    /// Bytes of the value plane.
    pub values: usize,
    /// Bytes of the row group, a multiple of [`PLANE_ALIGN`].
    pub total: usize,
}

impl WeightType {
    /// The types that have a form of their own, by their codes in the file, which begin with 1.
    pub const OWN: [WeightType; 10] = [
        WeightType::F32,
        WeightType::F16,
        WeightType::Bf16,
        WeightType::Fp8,
        WeightType::Q8,
        WeightType::Int4,
        WeightType::Mxfp4,
        WeightType::Q4,
        WeightType::Q3,
        WeightType::Q2,
    ];

    /// Every type that real models use: those of [`WeightType::OWN`] and [`Grouped::PUBLISHED`].
    pub fn all() -> impl Iterator<Item = WeightType> {
        let published = Grouped::PUBLISHED.iter().map(|&(_, grouped)| WeightType::Grouped(grouped));
        Self::OWN.into_iter().chain(published)
    }

    /// The code in the file.
    pub fn code(self) -> u16 {
        match self {
            WeightType::Grouped(grouped) => GROUPED | grouped.code(),
            own => 1 + Self::OWN.iter().position(|t| *t == own).expect("all others are listed") as u16,
        }
    }

    /// The type with this code in the file, if this version knows it.
    pub fn from_code(code: u16) -> Option<Self> {
        match code.checked_sub(GROUPED) {
            Some(code) => Grouped::from_code(code).map(WeightType::Grouped),
            None => Self::OWN.get(usize::from(code).checked_sub(1)?).copied(),
        }
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
            WeightType::Q2 => "q2",
            WeightType::Grouped(grouped) => grouped.name(),
        }
    }

    /// Whether values are stored in blocks of 32 columns for which there are integer kernels.
    pub fn is_blocked(self) -> bool {
        match self {
            WeightType::F32 | WeightType::F16 | WeightType::Bf16 | WeightType::Fp8 => false,
            WeightType::Grouped(grouped) => grouped.codes() != Codes::E4m3,
            _ => true,
        }
    }

    /// Whether the quantiser chooses its numbers to make a weighted error small: `q4`, `q3` and `q2`, which have a scale for
    /// each row and a byte for each block.
    pub const fn is_fitted(self) -> bool {
        matches!(self, WeightType::Q4 | WeightType::Q3 | WeightType::Q2)
    }

    /// Byte lengths of the planes of one row group of `cols` columns; `None` on overflow, or if the type has no such rows.
    pub fn planes(self, cols: usize) -> Option<Planes> {
        let blocks = cols.div_ceil(BLOCK);
        let (scales, values) = match self {
            WeightType::F32 => (0, cols.checked_mul(4 * ROW_GROUP)?),
            WeightType::F16 | WeightType::Bf16 => (0, cols.checked_mul(2 * ROW_GROUP)?),
            WeightType::Fp8 => (cols.div_ceil(FP8_BLOCK).checked_mul(4)?, cols.checked_mul(ROW_GROUP)?),
            WeightType::Q8 => (blocks.checked_mul(2 * ROW_GROUP)?, blocks.checked_mul(BLOCK * ROW_GROUP)?),
            WeightType::Int4 => (blocks.checked_mul(2 * ROW_GROUP)?, nibbles(blocks)?),
            WeightType::Mxfp4 => (blocks.checked_mul(ROW_GROUP)?, nibbles(blocks)?),
            WeightType::Q4 => (blocks.checked_mul(ROW_GROUP)?.checked_add(4 * ROW_GROUP)?, nibbles(blocks)?),
            WeightType::Q3 | WeightType::Q2 => {
                let bits = if self == WeightType::Q3 { 3 } else { 2 };
                (
                    blocks.checked_mul(2 * ROW_GROUP)?.checked_add(4 * ROW_GROUP)?,
                    nibbles(blocks)?.checked_div(4)?.checked_mul(bits)?,
                )
            }
            WeightType::Grouped(grouped) => {
                (grouped.scale_plane(cols)?, blocks.checked_mul(ROW_GROUP * grouped.codes().block_len())?)
            }
        };
        let scales_padded = scales.checked_next_multiple_of(PLANE_ALIGN)?;
        let total = scales_padded.checked_add(values.checked_next_multiple_of(PLANE_ALIGN)?)?;
        Some(Planes { scales, scales_padded, values, total })
    }

    /// Bytes of one row group of `cols` columns, planes padded; `None` on overflow, or if the type has no such rows.
    pub fn row_group_len(self, cols: usize) -> Option<usize> {
        self.planes(cols).map(|p| p.total)
    }

    /// Bytes of a tiled matrix of `rows` × `cols`; `None` on overflow, or if the type has no such rows.
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

/// Bytes of four-bit codes of eight rows.
fn nibbles(blocks: usize) -> Option<usize> {
    blocks.checked_mul(BLOCK * ROW_GROUP / 2)
}

impl fmt::Display for WeightType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for WeightType {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Self::all().find(|t| t.name() == s).ok_or_else(|| {
            let names: Vec<_> = Self::all().map(Self::name).collect();
            format!("unknown weight type `{s}`: use one of {}", names.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_come_back() {
        for code in 0..=u16::MAX {
            if let Some(ty) = WeightType::from_code(code) {
                assert_eq!(ty.code(), code, "{ty}");
            }
        }
        for ty in WeightType::all() {
            assert_eq!(WeightType::from_code(ty.code()), Some(ty), "{ty}");
            assert_eq!(ty.name().parse(), Ok(ty));
        }
        assert_eq!(WeightType::from_code(0), None);
        assert_eq!(WeightType::from_code(11), None);
    }

    #[test]
    fn sizes_do_not_overflow() {
        for ty in WeightType::all() {
            assert_eq!(ty.matrix_len(usize::MAX, usize::MAX / 256 * 256), None, "{ty}");
        }
    }
}
