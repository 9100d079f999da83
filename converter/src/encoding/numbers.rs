//! Whole numbers that stand for themselves, such as those of experts in a table. f32 holds all that can be meant.

use sluice_format::WeightType;

use super::{Decoder, Encoding, Groups, Reader, Rows, Selection};
use crate::error::ConvertError;
use crate::source::Dtype;

/// What such tensors may be.
pub(super) const SUPPORTED: &str = "I64, I32, and F32 with whole numbers";

/// The largest number up to which f32 holds all whole ones.
const MOST: i64 = 1 << 24;

/// How they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Numbers {
    I64,
    I32,
    F32,
}

/// The encoding of tensors of that type, if it is one for whole numbers.
pub(super) fn of(dtype: &Dtype) -> Option<Numbers> {
    match dtype.name() {
        "I64" => Some(Numbers::I64),
        "I32" => Some(Numbers::I32),
        "F32" => Some(Numbers::F32),
        _ => None,
    }
}

impl Numbers {
    fn element_len(self) -> usize {
        if self == Numbers::I64 { 8 } else { 4 }
    }

    /// The numbers of some bytes; `None` for one that cannot be meant.
    fn read(self, raw: &[u8]) -> impl Iterator<Item = Option<f32>> {
        let four = |bytes: &[u8]| [bytes[0], bytes[1], bytes[2], bytes[3]];
        raw.chunks_exact(self.element_len()).map(move |bytes| {
            let number = match self {
                Numbers::I64 => i64::from_le_bytes(bytes.try_into().expect("eight bytes")),
                Numbers::I32 => i64::from(i32::from_le_bytes(four(bytes))),
                Numbers::F32 => {
                    let number = f32::from_le_bytes(four(bytes));
                    if number.fract() == 0.0 { number as i64 } else { -1 }
                }
            };
            (0..=MOST).contains(&number).then_some(number as f32)
        })
    }
}

impl Encoding for Numbers {
    fn others(&self) -> Vec<usize> {
        Vec::new()
    }

    fn carried(&self) -> Option<WeightType> {
        None
    }

    fn fits(&self, _selection: &Selection, _shape: [usize; 3]) -> bool {
        false
    }

    fn open<'s>(
        &'s self,
        selection: &'s Selection,
        _reader: &mut Reader<'_>,
    ) -> Result<Box<dyn Decoder + 's>, ConvertError> {
        Ok(Box::new(NumbersDecoder { ty: *self, selection }))
    }
}

struct NumbersDecoder<'s> {
    ty: Numbers,
    selection: &'s Selection,
}

impl Decoder for NumbersDecoder<'_> {
    fn values(&self, rows: Rows, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError> {
        let raw = reader.raw(self.selection, self.ty.element_len(), rows)?;
        let numbers: Option<Vec<f32>> = self.ty.read(raw).collect();
        let problem = "has a number that is negative, not whole or larger than any model has of anything";
        *out = numbers.ok_or_else(|| reader.damaged(self.selection.tensor, problem))?;
        Ok(())
    }

    fn carry(&self, _rows: Rows, _reader: &mut Reader<'_>, _groups: Groups<'_>) -> Result<(), ConvertError> {
        unreachable!("no type of matrices carries whole numbers")
    }

    fn skim(&self, rows: Rows, _carried: bool, reader: &mut Reader<'_>) -> Result<(), ConvertError> {
        reader.raw(self.selection, self.ty.element_len(), rows).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_meant_is_a_number() {
        let read = |ty: Numbers, bytes: &[u8]| ty.read(bytes).collect::<Vec<_>>();
        let wide: Vec<u8> = [0i64, 7, MOST, MOST + 1, -1, i64::MAX].iter().flat_map(|v| v.to_le_bytes()).collect();
        let most = Some(MOST as f32);
        assert_eq!(read(Numbers::I64, &wide), [Some(0.0), Some(7.0), most, None, None, None]);
        let narrow: Vec<u8> = [3i32, -3].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(read(Numbers::I32, &narrow), [Some(3.0), None]);
        let floats: Vec<u8> =
            [5.0f32, 5.5, f32::NAN, f32::INFINITY, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(read(Numbers::F32, &floats), [Some(5.0), None, None, None, None]);
    }
}
