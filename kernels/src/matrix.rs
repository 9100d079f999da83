//! Matrices whose length has been checked.

use std::fmt;
use std::ops::Range;

pub(crate) use sluice_weights::Planes;
pub use sluice_weights::{BLOCK, FP8_BLOCK, ROW_GROUP, WeightType};

/// Bytes of one packed row group, a multiple of 64; `None` if it does not fit in a `usize`, or if the type has no such rows.
pub fn row_group_len(ty: WeightType, cols: usize) -> Option<usize> {
    ty.row_group_len(cols)
}

/// Bytes of a packed `rows` × `cols` matrix, a multiple of 64; `None` as for [`row_group_len`].
pub fn packed_len(ty: WeightType, rows: usize, cols: usize) -> Option<usize> {
    ty.matrix_len(rows, cols)
}

/// Why bytes are not a matrix of the stated shape.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShapeError {
    /// The packed size of the shape exceeds the address space.
    #[error("a {rows} × {cols} matrix of type {ty:?} is too large")]
    TooLarge {
        /// The requested type.
        ty: WeightType,
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
    },
    /// The data are longer or shorter than the packed size of the shape.
    #[error("a {rows} × {cols} matrix of type {ty:?} takes {expected} bytes, but there are {actual}")]
    Length {
        /// The requested type.
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
        /// The requested index.
        index: usize,
        /// Matrices in the batch.
        batch: usize,
    },
}

/// Learns which bytes of a matrix have been read, so that it can use them while they are in a cache.
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
        let planes = ty.planes(cols).ok_or(too_large)?;
        let one = packed_len(ty, rows, cols).ok_or(too_large)?;
        let expected = one.checked_mul(batch).ok_or(too_large)?;
        if data.len() != expected {
            return Err(ShapeError::Length { ty, rows, cols, expected, actual: data.len() });
        }
        Ok(Matrix { ty, rows, cols, planes, data: &data[index * one..(index + 1) * one], watch: None })
    }

    /// The same matrix, except that `watch` is told of every byte of it, once for every product.
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
        for ty in WeightType::all() {
            assert_eq!(packed_len(ty, usize::MAX, usize::MAX), None);
            let e = Matrix::new(ty, usize::MAX, usize::MAX, &[]).unwrap_err();
            assert!(matches!(e, ShapeError::TooLarge { .. }));
            let e = Matrix::new(ty, 1, 256, &[0; 63]).unwrap_err();
            assert!(matches!(e, ShapeError::Length { actual: 63, .. }));
        }
        let e = Matrix::batched(WeightType::F32, 2, 1, 1, &[0; 128], 2).unwrap_err();
        assert_eq!(e, ShapeError::Index { index: 2, batch: 2 });
    }
}
