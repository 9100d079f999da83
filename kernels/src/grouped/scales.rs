//! Scales, zeros and biases of a block of columns.

use super::unit;
use crate::matrix::{Group, ROW_GROUP};
use crate::number::{bf16_to_f32, e4m3_to_f32, e8m0_to_f32, f16_to_f32};
use crate::scalar::Rows;
use sluice_weights::{Codes, GroupSize, Grouped, ROW_GROUP as ROWS, SUPER_BLOCK, ScaleType, Scales, Super, Zero};

/// The numbers that the rows of a group multiply, subtract and add in one block: `A·(n − z) + B`.
pub(crate) struct Block {
    /// `A`, including the unit.
    pub(crate) a: Rows,
    /// `z`, an integer.
    pub(crate) zero: Rows,
    /// `B`, if the type has it.
    pub(crate) b: Option<Rows>,
}

impl Block {
    /// The numbers of block `b`, which has [`Grouped::block`] columns.
    pub(crate) fn new(ty: Grouped, w: &Group<'_>, b: usize) -> Block {
        let first = b * ty.block();
        let mut block = match ty.scales() {
            Scales::Groups { columns, scale, zero } => {
                let group = match columns {
                    GroupSize::Columns(columns) => first / usize::from(columns),
                    GroupSize::Row => 0,
                };
                of_group(w.scales, group, scale, zero)
            }
            Scales::Super(scales) => of_super_block(ty.codes(), scales, w, first),
        };
        block.a.iter_mut().for_each(|a| *a *= unit(ty));
        block
    }
}

fn of_group(plane: &[u8], group: usize, scale: ScaleType, zero: Zero) -> Block {
    let factors = if scale == ScaleType::E4m3 { 4 * ROWS } else { 0 };
    let beside = match zero {
        Zero::None => 0,
        Zero::Byte => 1,
        Zero::Bias | Zero::Float => scale.len(),
    };
    let at = factors + group * ROWS * (scale.len() + beside);
    let a = numbers(&plane[at..], scale);
    let zeros = &plane[at + ROWS * scale.len()..];
    let none = [0.0; ROW_GROUP];
    match zero {
        Zero::None => Block { a, zero: none, b: None },
        Zero::Byte => Block { a, zero: std::array::from_fn(|r| f32::from(zeros[r])), b: None },
        Zero::Bias => Block { a, zero: none, b: Some(numbers(zeros, scale)) },
        Zero::Float => {
            let z = numbers(zeros, scale);
            Block { a, zero: none, b: Some(std::array::from_fn(|r| -(a[r] * z[r]))) }
        }
    }
}

/// Eight numbers of a scale type.
fn numbers(bytes: &[u8], ty: ScaleType) -> Rows {
    let half = |r: usize| u16::from_le_bytes([bytes[2 * r], bytes[2 * r + 1]]);
    match ty {
        ScaleType::F32 => std::array::from_fn(|r| crate::scalar::f32_at(bytes, r)),
        ScaleType::F16 => std::array::from_fn(|r| f16_to_f32(half(r))),
        ScaleType::Bf16 => std::array::from_fn(|r| bf16_to_f32(half(r))),
        ScaleType::E4m3 => std::array::from_fn(|r| e4m3_to_f32(bytes[r])),
        ScaleType::E8m0 => std::array::from_fn(|r| e8m0_to_f32(bytes[r])),
    }
}

/// The numbers of the columns from `first` on, which are in one super-block.
fn of_super_block(codes: Codes, scales: Super, w: &Group<'_>, first: usize) -> Block {
    let plane = &w.scales[first / SUPER_BLOCK * ROWS * scales.row_len()..];
    let d = numbers(plane, ScaleType::F16);
    let units = &plane[if scales.has_min() { 4 * ROWS } else { 2 * ROWS }..];
    let column = first % SUPER_BLOCK;
    let byte = |r: usize| match scales.unit() {
        0 => 0,
        unit => units[column / unit * scales.unit_len() * ROWS + r],
    };
    let integer: [i32; ROW_GROUP] = std::array::from_fn(|r| match scales {
        Super::Plain => 1,
        Super::SixMin => i32::from(byte(r)),
        Super::FourMin => i32::from(byte(r) & 15),
        Super::SixBy16 | Super::SixBy32 => i32::from(byte(r)) - 32,
        Super::Signed => i32::from(byte(r) as i8),
        Super::Odd => 2 * i32::from(byte(r) >> (column % 64 / 32 * 4) & 15) + 1,
        Super::Half => 2 * i32::from(byte(r) >> (column % 32 / 16 * 4) & 15) + 1,
        Super::ShiftBy16 => 2 * i32::from(byte(r) >> (column % 32 / 16 * 3) & 7) + 1,
        Super::InCodes | Super::Shift => super::grids::scale(codes, w.values, first, r),
    });
    let min = scales.has_min().then(|| {
        let dmin = numbers(&plane[2 * ROWS..], ScaleType::F16);
        let m = |r: usize| match scales {
            Super::FourMin => byte(r) >> 4,
            _ => units[column / 32 * 2 * ROWS + ROWS + r],
        };
        std::array::from_fn(|r| -(dmin[r] * f32::from(m(r))))
    });
    Block { a: std::array::from_fn(|r| d[r] * integer[r] as f32), zero: [0.0; ROW_GROUP], b: min }
}
