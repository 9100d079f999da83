//! The blocks of GGUF files: every row is whole blocks of a [`GgmlType`].

mod blocks;

use sluice_format::WeightType;

use super::checks::{dtype_error, shape_error};
use super::lines::{Lines, pick, pieces};
use super::{Decoder, Encoding, Groups, Reader, Rows, Selection};
use crate::error::ConvertError;
use crate::source::{Checkpoint, GgmlType};

/// A matrix, or a stack of them, of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ggml {
    ty: GgmlType,
    /// Bytes of a row.
    row_bytes: usize,
}

/// Checks that a tensor has the bytes of its rows, and that its type is one whose values are known.
pub(super) fn resolve(
    checkpoint: &Checkpoint,
    tensor: usize,
    shape: &[usize],
    ty: GgmlType,
) -> Result<Ggml, ConvertError> {
    if blocks::values_of(ty).is_none() {
        return Err(dtype_error(checkpoint, tensor, blocks::SUPPORTED));
    }
    let (cols, lead) = shape.split_last().expect("a view has columns");
    let rows = lead.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let row_bytes = ty.row_bytes(*cols).filter(|row| {
        let bytes = rows.and_then(|rows| rows.checked_mul(*row));
        bytes.is_some_and(|bytes| bytes as u64 == checkpoint.tensors[tensor].len)
    });
    let whole = cols.next_multiple_of(ty.block_cols());
    let row_bytes = row_bytes.ok_or_else(|| shape_error(checkpoint, tensor, &[lead, &[whole]].concat()))?;
    Ok(Ggml { ty, row_bytes })
}

impl Encoding for Ggml {
    fn others(&self) -> Vec<usize> {
        Vec::new()
    }

    fn carried(&self) -> Option<WeightType> {
        None
    }

    fn fits(&self, selection: &Selection, shape: [usize; 3]) -> bool {
        selection.whole_rows(shape[2])
    }

    fn open<'s>(
        &'s self,
        selection: &'s Selection,
        _reader: &mut Reader<'_>,
    ) -> Result<Box<dyn Decoder + 's>, ConvertError> {
        Ok(Box::new(GgmlDecoder { layout: *self, selection }))
    }
}

struct GgmlDecoder<'s> {
    layout: Ggml,
    selection: &'s Selection,
}

impl GgmlDecoder<'_> {
    fn lines(&self, lines: Lines, reader: &mut Reader<'_>) -> Result<Vec<u8>, ConvertError> {
        reader.lines(self.selection.tensor, self.layout.row_bytes, lines)
    }
}

impl Decoder for GgmlDecoder<'_> {
    fn values(&self, rows: Rows, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError> {
        let ty = self.layout.ty;
        let values_of = blocks::values_of(ty).expect("the plan has looked");
        let mut values = Vec::new();
        out.clear();
        out.resize(rows.count * rows.cols, 0.0);
        let mut row = 0;
        for piece in pieces(self.selection, rows) {
            let bytes = self.lines(piece, reader)?;
            values.clear();
            values.resize(piece.count * self.selection.cols, 0.0);
            let blocks = bytes.chunks_exact(ty.block_bytes()).zip(values.chunks_exact_mut(ty.block_cols()));
            blocks.for_each(|(block, values)| values_of(block, values));
            row = pick(self.selection, piece, &values, 1, (out, rows.cols, row));
        }
        Ok(())
    }

    fn carry(&self, _rows: Rows, _reader: &mut Reader<'_>, _groups: Groups<'_>) -> Result<(), ConvertError> {
        unreachable!("no type carries it")
    }

    fn skim(&self, rows: Rows, _carried: bool, reader: &mut Reader<'_>) -> Result<(), ConvertError> {
        pieces(self.selection, rows).into_iter().try_for_each(|lines| self.lines(lines, reader).map(drop))
    }
}
