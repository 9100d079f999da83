//! The places of tensors inside their extents.

use std::ops::Range;

use sluice_format::{ExtentKind, Layout, ModelFile, TensorRecord, order_len};
use sluice_kernels::{Activations, Matrix, ROW_GROUP, WeightType, packed_len};

use super::ModelError;

/// Identifies a matrix of the model; an expert's matrix represents those of all experts of its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixPlace {
    /// Kind of the extent.
    pub kind: ExtentKind,
    /// Layer, or [`sluice_format::NO_LAYER`].
    pub layer: u32,
    /// Canonical name of the tensor.
    pub name: &'static str,
}

/// A matrix, or a batch of equal ones, inside an extent.
#[derive(Clone, Copy, Debug)]
pub struct MatrixRef {
    place: MatrixPlace,
    ty: WeightType,
    rows: usize,
    cols: usize,
    /// Byte of the extent at which the first matrix of the batch begins.
    offset: usize,
    /// Bytes of one matrix of the batch.
    len: usize,
    /// Byte at which the order of the columns begins, if they have one of their own: before the first matrix.
    order: Option<usize>,
}

impl MatrixRef {
    /// Which matrix of the model this is.
    pub fn place(&self) -> MatrixPlace {
        self.place
    }

    /// Rows of one matrix of the batch.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row groups of one matrix of the batch.
    pub fn groups(&self) -> usize {
        self.rows.div_ceil(ROW_GROUP)
    }

    /// Row groups that lie within the first `bytes` of the extent.
    pub fn groups_within(&self, bytes: usize) -> usize {
        (bytes.saturating_sub(self.offset) / self.group_len()).min(self.groups())
    }

    /// Some row groups, as a matrix of their rows. Bytes of the extent after them need not have arrived.
    pub fn view_of_groups<'a>(&self, extent: &'a [u8], groups: Range<usize>) -> Matrix<'a> {
        let rows = (groups.end * ROW_GROUP).min(self.rows) - groups.start * ROW_GROUP;
        self.matrix(rows, &extent[self.group_start(groups.start)..self.group_start(groups.end)])
    }

    /// Byte of the extent at which row group `group` of the first matrix of the batch begins.
    pub fn group_start(&self, group: usize) -> usize {
        self.offset + group * self.group_len()
    }

    /// Byte of the extent at which the first matrix of the batch ends.
    pub fn end(&self) -> usize {
        self.offset + self.len
    }

    /// Bytes of one row group.
    fn group_len(&self) -> usize {
        self.len / self.groups()
    }

    /// Whether the columns have an order of their own.
    pub fn is_ordered(&self) -> bool {
        self.order.is_some()
    }

    /// The order of the columns, if they have one of their own: bytes of the extent before the first row group.
    pub fn order<'a>(&self, extent: &'a [u8]) -> Option<&'a [u8]> {
        self.order.map(|start| &extent[start..start + 2 * self.cols])
    }

    /// The tokens `x` in the form that this matrix takes: unchanged, or in `scratch` with their columns in the order of the matrix.
    /// A damaged order gives other numbers or NaN.
    pub fn input<'x>(&self, extent: &[u8], x: &'x Activations, scratch: &'x mut Activations) -> &'x Activations {
        let Some(order) = self.order(extent) else { return x };
        scratch.reorder(x, 0..x.n(), order);
        scratch
    }

    /// The result of [`MatrixRef::input`] for the same tokens, which it left in `scratch`.
    pub fn same_input<'x>(&self, x: &'x Activations, scratch: &'x Activations) -> &'x Activations {
        if self.order.is_some() { scratch } else { x }
    }

    /// The matrix inside its extent's bytes.
    pub fn view<'a>(&self, extent: &'a [u8]) -> Matrix<'a> {
        self.view_of_batch(extent, 0)
    }

    /// Matrix `index` of a batch.
    pub fn view_of_batch<'a>(&self, extent: &'a [u8], index: usize) -> Matrix<'a> {
        let start = self.offset + index * self.len;
        self.matrix(self.rows, &extent[start..start + self.len])
    }

    fn matrix<'a>(&self, rows: usize, bytes: &'a [u8]) -> Matrix<'a> {
        Matrix::new(self.ty, rows, self.cols, bytes)
            .expect("the file's reader has checked this tensor's length against its shape")
    }

    /// `None` if the record is not a matrix, or is larger than memory can be.
    pub(super) fn from_record(place: MatrixPlace, t: &TensorRecord) -> Option<Self> {
        let [_, rows, cols] = t.shape.map(|d| d as usize);
        let rows = match t.layout {
            Layout::Tiled | Layout::TiledOrdered => rows,
            Layout::TiledPair | Layout::TiledPairOrdered => 2 * rows.next_multiple_of(ROW_GROUP),
            Layout::Plain | Layout::Sectors => return None,
        };
        let (ty, start) = (t.weight_type, t.offset as usize);
        let (order, before) = if t.layout.is_ordered() { (Some(start), order_len(cols)?) } else { (None, 0) };
        Some(MatrixRef { place, ty, rows, cols, offset: start + before, len: packed_len(ty, rows, cols)?, order })
    }
}

/// An f32 vector inside an extent.
#[derive(Clone, Copy, Debug)]
pub struct VectorRef {
    offset: usize,
    len: usize,
}

impl VectorRef {
    pub(super) fn from_record(t: &TensorRecord) -> Self {
        VectorRef { offset: t.offset as usize, len: t.shape[2] as usize }
    }

    /// Its numbers.
    pub fn count(&self) -> usize {
        self.len
    }

    /// Some of its numbers.
    pub fn part<'a>(&self, extent: &'a [u8], part: Range<usize>) -> impl Iterator<Item = f32> + use<'a> {
        let bytes = &extent[self.offset..self.offset + 4 * self.len][4 * part.start..4 * part.end];
        bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes))
    }

    /// Byte of the extent at which it ends.
    pub fn end(&self) -> usize {
        self.offset + 4 * self.len
    }

    /// Copies the vector out of its extent's bytes.
    pub fn read(&self, extent: &[u8], out: &mut Vec<f32>) {
        let bytes = &extent[self.offset..self.offset + 4 * self.len];
        out.clear();
        out.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
    }
}

/// Finds the tensors of one extent by their canonical names.
pub(super) struct ExtentTensors<'a> {
    pub(super) file: &'a ModelFile,
    pub(super) kind: ExtentKind,
    pub(super) layer: u32,
    pub(super) index: u32,
}

impl ExtentTensors<'_> {
    fn record(&self, name: &'static str) -> Result<&TensorRecord, ModelError> {
        self.file.tensor(self.kind, self.layer, self.index, name).ok_or_else(|| ModelError::MissingTensor {
            path: self.file.path().to_owned(),
            extent: sluice_format::extent_name(self.kind, self.layer, self.index),
            tensor: name,
        })
    }

    pub(super) fn matrix(&self, name: &'static str) -> Result<MatrixRef, ModelError> {
        self.part_of(name, name)
    }

    /// Whether there is a tensor with that name.
    pub(super) fn has(&self, name: &'static str) -> bool {
        self.file.tensor(self.kind, self.layer, self.index, name).is_some()
    }

    /// The matrix `name`, which is part of what the spec calls `whole`.
    pub(super) fn part_of(&self, whole: &'static str, name: &'static str) -> Result<MatrixRef, ModelError> {
        let record = self.record(name)?;
        let place = MatrixPlace { kind: self.kind, layer: self.layer, name: whole };
        MatrixRef::from_record(place, record).ok_or_else(|| ModelError::MissingTensor {
            path: self.file.path().to_owned(),
            extent: sluice_format::extent_name(self.kind, self.layer, self.index),
            tensor: name,
        })
    }

    /// Bytes that the extent takes in memory.
    pub(super) fn extent_len(&self) -> usize {
        self.file.extent(self.kind, self.layer, self.index).map_or(0, |extent| extent.padded_len as usize)
    }

    pub(super) fn vector(&self, name: &'static str) -> Result<VectorRef, ModelError> {
        Ok(VectorRef::from_record(self.record(name)?))
    }
}
