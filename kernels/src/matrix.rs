//! Weight types, the sizes of their planes, and matrices whose length has been checked.

use std::fmt;
use std::ops::Range;

/// Rows that are stored and computed together.
pub const ROW_GROUP: usize = 8;
/// Columns that share one scale in the `q8`, `int4` and `mxfp4` types, and in quantised activations.
pub const BLOCK: usize = 32;
/// Columns that share one scale in the `fp8` type.
pub const FP8_BLOCK: usize = 128;

/// Planes begin on multiples of this many bytes.
const PLANE_ALIGN: usize = 64;

/// How the weights of a matrix are stored; `docs/LAYOUT.md` gives the bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum WeightType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// e4m3fn with one f32 scale per row group and 128 columns.
    Fp8,
    /// int8 with one f16 scale per row and 32 columns.
    Q8,
    /// 4-bit integers −8..7 with one bf16 scale per row and 32 columns.
    Int4,
    /// e2m1 with one e8m0 scale per row and 32 columns.
    Mxfp4,
    /// Four bits, one byte per row and 32 columns, one f32 per row; see `docs/QUANTISATION.md`.
    Q4,
    /// Three bits, one byte per row and 16 columns, one f32 per row.
    Q3,
}

impl WeightType {
    /// Every type.
    pub const ALL: [WeightType; 9] =
        [Self::F32, Self::F16, Self::Bf16, Self::Fp8, Self::Q8, Self::Int4, Self::Mxfp4, Self::Q4, Self::Q3];

    /// Whether values are stored in blocks of 32 columns, for which there are integer kernels.
    pub fn is_blocked(self) -> bool {
        matches!(self, Self::Q8 | Self::Int4 | Self::Mxfp4 | Self::Q4 | Self::Q3)
    }
}

/// Byte lengths of the two planes of one row group, without and with padding.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planes {
    pub(crate) scales: usize,
    pub(crate) scales_padded: usize,
    pub(crate) values: usize,
    pub(crate) total: usize,
}

impl Planes {
    pub(crate) fn new(ty: WeightType, cols: usize) -> Option<Planes> {
        let blocks = cols.div_ceil(BLOCK);
        let (scales, values) = match ty {
            WeightType::F32 => (0, cols.checked_mul(32)?),
            WeightType::F16 | WeightType::Bf16 => (0, cols.checked_mul(16)?),
            WeightType::Fp8 => (cols.div_ceil(FP8_BLOCK).checked_mul(4)?, cols.checked_mul(8)?),
            WeightType::Q8 => (blocks.checked_mul(16)?, blocks.checked_mul(256)?),
            WeightType::Int4 => (blocks.checked_mul(16)?, blocks.checked_mul(128)?),
            WeightType::Mxfp4 => (blocks.checked_mul(8)?, blocks.checked_mul(128)?),
            WeightType::Q4 => (blocks.checked_mul(8)?.checked_add(32)?, blocks.checked_mul(128)?),
            WeightType::Q3 => (blocks.checked_mul(16)?.checked_add(32)?, blocks.checked_mul(96)?),
        };
        let scales_padded = scales.checked_next_multiple_of(PLANE_ALIGN)?;
        let total = scales_padded.checked_add(values.checked_next_multiple_of(PLANE_ALIGN)?)?;
        Some(Planes { scales, scales_padded, values, total })
    }
}

/// Bytes of one packed row group, a multiple of 64; `None` if it does not fit in a `usize`.
pub fn row_group_len(ty: WeightType, cols: usize) -> Option<usize> {
    Planes::new(ty, cols).map(|p| p.total)
}

/// Bytes of a packed `rows` × `cols` matrix, a multiple of 64; `None` if it does not fit in a `usize`.
pub fn packed_len(ty: WeightType, rows: usize, cols: usize) -> Option<usize> {
    row_group_len(ty, cols)?.checked_mul(rows.div_ceil(ROW_GROUP))
}

/// Why bytes are not a matrix of the stated shape.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShapeError {
    /// The packed size of the shape exceeds the address space.
    #[error("a {rows} × {cols} matrix of type {ty:?} is too large")]
    TooLarge {
        /// The type asked for.
        ty: WeightType,
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
    },
    /// The data are longer or shorter than the packed size of the shape.
    #[error("a {rows} × {cols} matrix of type {ty:?} takes {expected} bytes, but there are {actual}")]
    Length {
        /// The type asked for.
        ty: WeightType,
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
        /// Bytes that the shape takes, over the whole batch if there is one.
        expected: usize,
        /// Bytes given.
        actual: usize,
    },
    /// The index of a batched matrix is not below the size of the batch.
    #[error("matrix {index} of a batch of {batch}")]
    Index {
        /// The index asked for.
        index: usize,
        /// Matrices in the batch.
        batch: usize,
    },
}

/// Is told what is read of a matrix, to do something else with the same bytes while they are in a cache.
pub trait Watch: Sync {
    /// The calling thread has just multiplied these bytes of the matrix, whole row groups.
    fn seen(&self, bytes: Range<usize>);
}

/// Packed weights of known shape, borrowed; the length of the data has been checked.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    ty: WeightType,
    rows: usize,
    cols: usize,
    planes: Planes,
    data: &'a [u8],
    watch: Option<&'a dyn Watch>,
}

impl fmt::Debug for Matrix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Matrix { ty, rows, cols, .. } = self;
        f.debug_struct("Matrix").field("ty", ty).field("rows", rows).field("cols", cols).finish_non_exhaustive()
    }
}

impl<'a> Matrix<'a> {
    /// A matrix of `rows` output and `cols` input features over its packed bytes.
    ///
    /// # Errors
    /// `TooLarge` or `Length` if `data.len()` is not [`packed_len`].
    pub fn new(ty: WeightType, rows: usize, cols: usize, data: &'a [u8]) -> Result<Self, ShapeError> {
        Self::batched(ty, 1, rows, cols, data, 0)
    }

    /// The `index`-th of `batch` equally shaped matrices that are stored one after another in `data`.
    ///
    /// # Errors
    /// `Index` if `index >= batch`; `TooLarge` or `Length` if `data.len()` is not `batch` times [`packed_len`].
    pub fn batched(
        ty: WeightType,
        batch: usize,
        rows: usize,
        cols: usize,
        data: &'a [u8],
        index: usize,
    ) -> Result<Self, ShapeError> {
        if index >= batch {
            return Err(ShapeError::Index { index, batch });
        }
        let too_large = ShapeError::TooLarge { ty, rows, cols };
        let planes = Planes::new(ty, cols).ok_or(too_large)?;
        let one = packed_len(ty, rows, cols).ok_or(too_large)?;
        let expected = one.checked_mul(batch).ok_or(too_large)?;
        if data.len() != expected {
            return Err(ShapeError::Length { ty, rows, cols, expected, actual: data.len() });
        }
        Ok(Matrix { ty, rows, cols, planes, data: &data[index * one..(index + 1) * one], watch: None })
    }

    /// The same matrix, but `watch` is told of every byte of it, once for every product.
    #[must_use]
    pub fn watched_by(self, watch: Option<&'a dyn Watch>) -> Self {
        Matrix { watch, ..self }
    }

    pub(crate) fn watch(&self) -> Option<&'a dyn Watch> {
        self.watch
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the weights are stored.
    pub fn ty(&self) -> WeightType {
        self.ty
    }

    /// Row groups, the last of which may be padded.
    pub(crate) fn groups(&self) -> usize {
        self.rows.div_ceil(ROW_GROUP)
    }

    /// Bytes of one row group.
    pub(crate) fn group_bytes(&self) -> usize {
        self.planes.total
    }

    /// The planes of row group `g`, without their padding.
    pub(crate) fn group(&self, g: usize) -> Group<'a> {
        let p = &self.planes;
        let bytes = &self.data[g * p.total..(g + 1) * p.total];
        let (scales, values) = bytes.split_at(p.scales_padded);
        Group { ty: self.ty, scales: &scales[..p.scales], values: &values[..p.values] }
    }
}

/// Eight rows of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct Group<'a> {
    pub(crate) ty: WeightType,
    /// `Planes::scales` bytes.
    pub(crate) scales: &'a [u8],
    /// `Planes::values` bytes.
    pub(crate) values: &'a [u8],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_the_layout() {
        assert_eq!(row_group_len(WeightType::F32, 3), Some(128));
        assert_eq!(row_group_len(WeightType::Bf16, 5), Some(128));
        assert_eq!(row_group_len(WeightType::Fp8, 129), Some(64 + 1088));
        assert_eq!(row_group_len(WeightType::Q8, 33), Some(64 + 512));
        assert_eq!(row_group_len(WeightType::Int4, 32), Some(64 + 128));
        assert_eq!(row_group_len(WeightType::Mxfp4, 32 * 9), Some(128 + 128 * 9));
        assert_eq!(row_group_len(WeightType::Q4, 33), Some(64 + 256));
        assert_eq!(row_group_len(WeightType::Q3, 32 * 3), Some(128 + 320));
        assert_eq!(packed_len(WeightType::Q8, 9, 32), Some(2 * 320));
    }

    #[test]
    fn hostile_shapes_are_refused() {
        for ty in WeightType::ALL {
            assert_eq!(packed_len(ty, usize::MAX, usize::MAX), None);
            let e = Matrix::new(ty, usize::MAX, usize::MAX, &[]).unwrap_err();
            assert!(matches!(e, ShapeError::TooLarge { .. }));
            let e = Matrix::new(ty, 1, 1, &[0; 63]).unwrap_err();
            assert!(matches!(e, ShapeError::Length { actual: 63, .. }));
        }
        let e = Matrix::batched(WeightType::F32, 2, 1, 1, &[0; 128], 2).unwrap_err();
        assert_eq!(e, ShapeError::Index { index: 2, batch: 2 });
    }
}
