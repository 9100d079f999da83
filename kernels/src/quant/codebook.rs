//! The constants of the three types.

use crate::matrix::{BLOCK, WeightType};
use crate::number::f16_to_f32;

/// Shifted left by seven bits, the scale of a block is a binary16 number, `1/UNIT` of the integer that it represents.
pub(crate) const UNIT: f32 = 131_072.0;

/// The largest value of a scale.
pub(super) const SCALE_MAX: f32 = 60.0;

/// The constants in which `q4`, `q3` and `q2` differ.
#[derive(Debug)]
pub(crate) struct Codebook {
    /// Levels, −64 to 64, by number. Those of `q4` and `q3` ascend; three-bit levels occur twice, so a fourth bit has no effect.
    pub(crate) levels: [i8; 16],
    /// Number of different levels.
    pub(super) len: usize,
    /// Distance between two offsets.
    pub(crate) step: i32,
    /// Columns that share a byte.
    pub(crate) block: usize,
}

impl Codebook {
    /// 4 bits and 8 per 32.
    pub(crate) const Q4: Codebook = Codebook {
        levels: [-64, -48, -38, -30, -23, -16, -9, -3, 3, 9, 16, 23, 30, 39, 49, 64],
        len: 16,
        step: 2,
        block: BLOCK,
    };

    /// 3 bits and 8 per 16.
    pub(crate) const Q3: Codebook = Codebook {
        levels: [-64, -39, -22, -7, 7, 22, 39, 64, -64, -39, -22, -7, 7, 22, 39, 64],
        len: 8,
        step: 4,
        block: BLOCK / 2,
    };

    /// 2 bits and 8 per 16. The number of a level is a column's own two bits, and, two bits further up, those of its neighbour.
    /// Whatever the bits of one of them are, the four levels that the other can choose lie far apart.
    pub(crate) const Q2: Codebook = Codebook {
        levels: [-64, -8, 46, 16, -8, 31, 9, -26, 26, -9, -31, 8, -16, -46, 8, 64],
        len: 16,
        step: 4,
        block: BLOCK / 2,
    };

    /// The codebook of a type.
    ///
    /// # Panics
    /// If the type has none.
    pub(crate) const fn of(ty: WeightType) -> &'static Codebook {
        match ty {
            WeightType::Q4 => &Self::Q4,
            WeightType::Q3 => &Self::Q3,
            WeightType::Q2 => &Self::Q2,
            _ => panic!("only q4, q3 and q2 have a codebook"),
        }
    }

    /// The offset that the byte of a block adds to each level.
    pub(crate) const fn offset(&self, byte: u8) -> i32 {
        self.step * (byte >> 5) as i32 - self.step * 7 / 2
    }
}

/// The scale in the byte of a block, times `1/UNIT`.
pub(crate) fn scale_over_unit(byte: u8) -> f32 {
    f16_to_f32(u16::from(byte & 31) << 7)
}

/// Place of column `k` in `q2`'s word for a row and 16 columns, in units of two bits. The codes of a chain lie side by side, and
/// columns that meet the activations together lie in neighbouring bytes.
pub(crate) const fn place(k: usize) -> usize {
    k % 4 * 4 + k / 4 % 4
}
