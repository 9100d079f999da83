//! f32, f16 and bf16: numbers without scales.

use sluice_format::{ROW_GROUP, WeightType};
use sluice_kernels as kernels;

use super::reader::{halves, widen};
use super::{Decoder, Encoding, Groups, Reader, Rows, Selection};
use crate::error::ConvertError;
use crate::source::Dtype;

/// A wide format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plain {
    F32,
    F16,
    Bf16,
}

/// The encoding of tensors of that format, if it is a wide one.
pub(super) fn of(dtype: &Dtype) -> Option<Plain> {
    match dtype {
        Dtype::F32 => Some(Plain::F32),
        Dtype::F16 => Some(Plain::F16),
        Dtype::Bf16 => Some(Plain::Bf16),
        Dtype::F8E4M3 | Dtype::Ggml(_) | Dtype::Other(_) => None,
    }
}

impl Plain {
    fn element_len(self) -> usize {
        if self == Plain::F32 { 4 } else { 2 }
    }

    fn dtype(self) -> Dtype {
        match self {
            Plain::F32 => Dtype::F32,
            Plain::F16 => Dtype::F16,
            Plain::Bf16 => Dtype::Bf16,
        }
    }

    /// Whether the bits of an f16 or bf16 are a finite number: an exponent of all ones is not.
    fn is_finite(self, bits: u16) -> bool {
        let exponent = if self == Plain::F16 { 0x7c00 } else { 0x7f80 };
        bits & exponent != exponent
    }
}

impl Encoding for Plain {
    fn others(&self) -> Vec<usize> {
        Vec::new()
    }

    fn carried(&self) -> Option<WeightType> {
        Some(match self {
            Plain::F32 => WeightType::F32,
            Plain::F16 => WeightType::F16,
            Plain::Bf16 => WeightType::Bf16,
        })
    }

    fn fits(&self, _selection: &Selection, _shape: [usize; 3]) -> bool {
        true
    }

    fn open<'s>(
        &'s self,
        selection: &'s Selection,
        _reader: &mut Reader<'_>,
    ) -> Result<Box<dyn Decoder + 's>, ConvertError> {
        Ok(Box::new(PlainDecoder { ty: *self, selection }))
    }
}

struct PlainDecoder<'s> {
    ty: Plain,
    selection: &'s Selection,
}

impl Decoder for PlainDecoder<'_> {
    fn values(&self, rows: Rows, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError> {
        widen(reader.raw(self.selection, self.ty.element_len(), rows)?, &self.ty.dtype(), out);
        Ok(())
    }

    fn carry(&self, rows: Rows, reader: &mut Reader<'_>, mut groups: Groups<'_>) -> Result<(), ConvertError> {
        if self.ty == Plain::F32 {
            let mut values = Vec::new();
            self.values(rows, reader, &mut values)?;
            for (g, values) in values.chunks(ROW_GROUP * rows.cols).enumerate() {
                let n = values.len() / rows.cols;
                kernels::pack_row_group(kernels::WeightType::F32, values, n, rows.cols, groups.slot(g));
            }
            let finite = values.iter().all(|v| v.is_finite());
            return if finite { Ok(()) } else { Err(reader.not_finite(self.selection.tensor)) };
        }
        let values: Vec<u16> = halves(reader.raw(self.selection, 2, rows)?).collect();
        if !values.iter().all(|&h| self.ty.is_finite(h)) {
            return Err(reader.not_finite(self.selection.tensor));
        }
        for (g, values) in values.chunks(ROW_GROUP * rows.cols).enumerate() {
            kernels::pack_row_group_u16(values, values.len() / rows.cols, rows.cols, groups.slot(g));
        }
        Ok(())
    }

    fn carry_plain(&self, rows: Rows, reader: &mut Reader<'_>, out: &mut Vec<u8>) -> Result<(), ConvertError> {
        let raw = reader.raw(self.selection, self.ty.element_len(), rows)?;
        let finite = match self.ty {
            Plain::F32 => raw.as_chunks::<4>().0.iter().all(|b| f32::from_le_bytes(*b).is_finite()),
            _ => halves(raw).all(|h| self.ty.is_finite(h)),
        };
        out.extend_from_slice(raw);
        if finite { Ok(()) } else { Err(reader.not_finite(self.selection.tensor)) }
    }

    fn skim(&self, rows: Rows, _carried: bool, reader: &mut Reader<'_>) -> Result<(), ConvertError> {
        reader.raw(self.selection, self.ty.element_len(), rows).map(drop)
    }
}
