//! Tables of integers, such as expert ids. The valid ones are known, and any other is an error here, before a token needs it.

use sluice_format::WeightType;

use super::{Decoder, Encoding, Groups, Reader, Rows, Selection};
use crate::error::ConvertError;
use crate::source::Dtype;

/// The formats that such tensors may have.
pub(super) const SUPPORTED: &str = "I64, I32, and F32 with whole numbers";

/// The largest number up to which f32 holds all integers.
const MOST: usize = 1 << 24;

/// The format of an integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    I64,
    I32,
    F32,
}

/// A table of integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Numbers {
    word: Word,
    /// All of them are less than this.
    below: usize,
}

/// The encoding of tables of that type, if it is one for integers.
pub(super) fn of(dtype: &Dtype, below: usize) -> Option<Numbers> {
    let word = match dtype.name() {
        "I64" => Word::I64,
        "I32" => Word::I32,
        "F32" => Word::F32,
        _ => return None,
    };
    Some(Numbers { word, below: below.min(MOST + 1) })
}

impl Word {
    fn bytes(self) -> usize {
        if self == Word::I64 { 8 } else { 4 }
    }

    /// The numbers in some bytes. Those beyond 2^53, which are never valid, may be rounded.
    fn read(self, raw: &[u8]) -> impl Iterator<Item = f64> {
        let four = |bytes: &[u8]| [bytes[0], bytes[1], bytes[2], bytes[3]];
        raw.chunks_exact(self.bytes()).map(move |bytes| match self {
            Word::I64 => i64::from_le_bytes(bytes.try_into().expect("eight bytes")) as f64,
            Word::I32 => f64::from(i32::from_le_bytes(four(bytes))),
            Word::F32 => f64::from(f32::from_le_bytes(four(bytes))),
        })
    }
}

impl Numbers {
    /// The numbers in some bytes, starting with element `first` of a table with `cols` columns. The error names row and value of an
    /// invalid number.
    fn read(self, raw: &[u8], first: usize, cols: usize) -> Result<Vec<f32>, String> {
        let mut out: Vec<f32> = Vec::with_capacity(raw.len() / self.word.bytes());
        for (at, number) in self.word.read(raw).enumerate() {
            let (row, col) = ((first + at) / cols, (first + at) % cols);
            let is_one = number.fract() == 0.0 && (0.0..self.below as f64).contains(&number);
            let before = &out[at.saturating_sub(col)..];
            if !is_one || before.contains(&(number as f32)) {
                let (what, most) = (if is_one { " twice" } else { "" }, self.below.saturating_sub(1));
                return Err(format!(
                    "has {number}{what} in row {row}, where all are different numbers from 0 to {most}"
                ));
            }
            out.push(number as f32);
        }
        Ok(out)
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
        Ok(Box::new(NumbersDecoder { numbers: *self, selection }))
    }
}

struct NumbersDecoder<'s> {
    numbers: Numbers,
    selection: &'s Selection,
}

impl Decoder for NumbersDecoder<'_> {
    fn values(&self, rows: Rows, reader: &mut Reader<'_>, out: &mut Vec<f32>) -> Result<(), ConvertError> {
        let (first, cols) = (self.selection.strides.at(rows.first, 0), self.selection.cols);
        let raw = reader.raw(self.selection, self.numbers.word.bytes(), rows)?;
        let numbers = self.numbers.read(raw, first, cols);
        *out = numbers.map_err(|problem| reader.damaged(self.selection.tensor, &problem))?;
        Ok(())
    }

    fn carry(&self, _rows: Rows, _reader: &mut Reader<'_>, _groups: Groups<'_>) -> Result<(), ConvertError> {
        unreachable!("no type of matrices carries whole numbers")
    }

    fn skim(&self, rows: Rows, _carried: bool, reader: &mut Reader<'_>) -> Result<(), ConvertError> {
        reader.raw(self.selection, self.numbers.word.bytes(), rows).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_meant_is_a_number() {
        let read = |name: &str, bytes: &[u8]| {
            let numbers = of(&Dtype::from_name(name), 256).unwrap();
            numbers.read(bytes, 12, 3)
        };
        let wide = |values: &[i64]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        // A number may occur again in another row.
        assert_eq!(read("I64", &wide(&[0, 255, 7, 7, 0, 1])).unwrap(), [0.0, 255.0, 7.0, 7.0, 0.0, 1.0]);
        assert!(read("I64", &wide(&[0, 1, 2, 3, 256])).unwrap_err().contains("has 256 in row 5"));
        assert!(read("I64", &wide(&[-1])).unwrap_err().contains("has -1 in row 4, where all are different"));
        assert!(read("I64", &wide(&[i64::MAX])).unwrap_err().contains("numbers from 0 to 255"));
        assert!(read("I64", &wide(&[0, 1, 2, 9, 3, 9])).unwrap_err().contains("has 9 twice in row 5"));
        let narrow: Vec<u8> = [3i32, -3].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(read("I32", &narrow[..4]).unwrap(), [3.0]);
        assert!(read("I32", &narrow).unwrap_err().contains("has -3 in row 4"));
        for wrong in [5.5, f32::NAN, f32::INFINITY, -2.0] {
            let floats: Vec<u8> = [5.0, wrong].iter().flat_map(|v| v.to_le_bytes()).collect();
            assert_eq!(read("F32", &floats[..4]).unwrap(), [5.0]);
            assert!(read("F32", &floats).unwrap_err().contains(&format!("has {wrong} in row 4")));
        }
    }
}
