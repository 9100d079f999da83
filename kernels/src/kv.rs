//! Rows of a key-value cache: how their numbers are stored, and how attention reads them.
//!
//! `f32` keeps numbers as they are. The other types round once, when a row is stored: `f16` and `bf16` to nearest, ties to even;
//! `q8` like the weight type of that name, int8 with one f16 scale per row and 32 columns, `scale = absmax/127`. Reading is exact:
//! every stored number is an f32, even the product of an int8 and a binary16. So attention over a cache is, bit for bit, attention
//! over the f32 numbers that it holds.

use std::ops::Range;
use std::str::FromStr;

use crate::matrix::BLOCK;
use crate::number::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::pack::{q8_scale, q8_values};

/// How the numbers of a cache are stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum KvType {
    /// IEEE binary32, as computed.
    #[default]
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// int8 with one f16 scale per row and 32 columns.
    Q8,
}

impl KvType {
    /// Every type.
    pub const ALL: [KvType; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Q8];

    /// `f32`, `f16`, `bf16` or `q8`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
        }
    }

    /// Whether numbers read from a cache can differ from those that were stored.
    pub fn is_lossy(self) -> bool {
        self != Self::F32
    }

    /// Bytes of a number, without its scale.
    const fn value_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8 => 1,
        }
    }

    /// Bytes of the scales of `width` numbers.
    const fn scale_bytes(self, width: usize) -> usize {
        match self {
            Self::Q8 => 2 * width.div_ceil(BLOCK),
            _ => 0,
        }
    }
}

impl std::fmt::Display for KvType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// No type of a cache has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("keys and values cannot be kept in `{0}`: choose f32, f16, bf16 or q8")]
pub struct UnknownKvType(pub String);

impl FromStr for KvType {
    type Err = UnknownKvType;

    fn from_str(name: &str) -> Result<Self, UnknownKvType> {
        Self::ALL.into_iter().find(|ty| ty.name() == name).ok_or_else(|| UnknownKvType(name.to_owned()))
    }
}

/// Rows of a cache, `[rows, width]`, allocated once.
#[derive(Clone, Debug)]
pub struct KvBuffer {
    ty: KvType,
    width: usize,
    plain: Vec<f32>,
    values: Vec<u8>,
    scales: Vec<u8>,
}

impl KvBuffer {
    /// `rows` rows of zeros.
    pub fn new(ty: KvType, rows: usize, width: usize) -> Self {
        let plain = if ty == KvType::F32 { rows * width } else { 0 };
        let values = if ty == KvType::F32 { 0 } else { rows * width * ty.value_bytes() };
        KvBuffer {
            ty,
            width,
            plain: vec![0.0; plain],
            values: vec![0; values],
            scales: vec![0; rows * ty.scale_bytes(width)],
        }
    }

    /// Bytes of a row of `width` numbers.
    pub const fn row_bytes(ty: KvType, width: usize) -> usize {
        width * ty.value_bytes() + ty.scale_bytes(width)
    }

    /// Bytes that are allocated.
    pub fn bytes(&self) -> usize {
        4 * self.plain.len() + self.values.len() + self.scales.len()
    }

    /// Copies rows from a buffer of the same type and width.
    ///
    /// # Panics
    /// If either buffer lacks one of the rows, or they differ in type or width.
    pub fn copy_rows(&mut self, from: &KvBuffer, rows: Range<usize>) {
        assert_eq!((self.ty, self.width), (from.ty, from.width), "rows are copied between buffers of one kind");
        let part = |per_row: usize| rows.start * per_row..rows.end * per_row;
        if self.ty == KvType::F32 {
            self.plain[part(self.width)].copy_from_slice(&from.plain[part(self.width)]);
            return;
        }
        let (values, scales) = (part(self.width * self.ty.value_bytes()), part(self.ty.scale_bytes(self.width)));
        self.values[values.clone()].copy_from_slice(&from.values[values]);
        self.scales[scales.clone()].copy_from_slice(&from.scales[scales]);
    }

    /// Whether rows have this type and width.
    pub fn is_like(&self, rows: &KvRows<'_>) -> bool {
        (self.ty, self.width) == (rows.ty, rows.stride)
    }

    /// Copies row `from` of `rows`, which have the same type and width, to row `to`.
    ///
    /// # Panics
    /// If either row does not exist, or the rows differ in type or width.
    pub fn copy_row(&mut self, to: usize, rows: &KvRows<'_>, from: usize) {
        assert!(self.is_like(rows), "rows are copied between buffers of one kind");
        let row = rows.row(from, self.width);
        if self.ty == KvType::F32 {
            self.plain[to * self.width..][..self.width].copy_from_slice(row.plain);
            return;
        }
        self.values[to * row.values.len()..][..row.values.len()].copy_from_slice(row.values);
        self.scales[to * row.scales.len()..][..row.scales.len()].copy_from_slice(row.scales);
    }

    /// Bytes of one row, as [`KvBuffer::row_to_bytes`] gives them.
    pub fn row_len(&self) -> usize {
        Self::row_bytes(self.ty, self.width)
    }

    /// Writes a row as it is stored, the same on every machine: its numbers, little-endian, then for `q8` its scales.
    ///
    /// # Panics
    /// If `out` is not [`KvBuffer::row_len`] long, or there is no row `row`.
    pub fn row_to_bytes(&self, row: usize, out: &mut [u8]) {
        let (values, scales) = out.split_at_mut(self.width * self.ty.value_bytes());
        if self.ty == KvType::F32 {
            let numbers = &self.plain[row * self.width..][..self.width];
            values.as_chunks_mut::<4>().0.iter_mut().zip(numbers).for_each(|(out, v)| *out = v.to_le_bytes());
            return;
        }
        values.copy_from_slice(&self.values[row * values.len()..][..values.len()]);
        scales.copy_from_slice(&self.scales[row * scales.len()..][..scales.len()]);
    }

    /// Restores what [`KvBuffer::row_to_bytes`] gave: the same bits, not rounded a second time.
    ///
    /// # Panics
    /// If `bytes` is not [`KvBuffer::row_len`] long, or there is no row `row`.
    pub fn row_from_bytes(&mut self, row: usize, bytes: &[u8]) {
        let (values, scales) = bytes.split_at(self.width * self.ty.value_bytes());
        if self.ty == KvType::F32 {
            let numbers = &mut self.plain[row * self.width..][..self.width];
            numbers.iter_mut().zip(values.as_chunks::<4>().0).for_each(|(v, bytes)| *v = f32::from_le_bytes(*bytes));
            return;
        }
        self.values[row * values.len()..][..values.len()].copy_from_slice(values);
        self.scales[row * scales.len()..][..scales.len()].copy_from_slice(scales);
    }

    /// Stores a row; this is where numbers are rounded. A number that is not finite makes its block of a `q8` row NaN.
    ///
    /// # Panics
    /// If `x` is not as long as a row, or there is no row `row`.
    pub fn set(&mut self, row: usize, x: &[f32]) {
        assert_eq!(x.len(), self.width, "a row is put in as a whole");
        let values = row * self.width * self.ty.value_bytes();
        match self.ty {
            KvType::F32 => self.plain[row * self.width..][..self.width].copy_from_slice(x),
            KvType::F16 => put_u16(&mut self.values[values..][..2 * x.len()], x, f32_to_f16),
            KvType::Bf16 => put_u16(&mut self.values[values..][..2 * x.len()], x, f32_to_bf16),
            KvType::Q8 => {
                let scales = self.ty.scale_bytes(self.width);
                let scales = self.scales[row * scales..][..scales].as_chunks_mut::<2>().0;
                let values = &mut self.values[values..][..x.len()];
                for ((block, values), scale) in x.chunks(BLOCK).zip(values.chunks_mut(BLOCK)).zip(scales) {
                    let bits = q8_scale(block);
                    *scale = bits.to_le_bytes();
                    values.copy_from_slice(&q8_values(block, f16_to_f32(bits))[..block.len()]);
                }
            }
        }
    }

    /// Some adjacent rows.
    ///
    /// # Panics
    /// If any of them does not exist.
    pub fn rows(&self, rows: Range<usize>) -> KvRows<'_> {
        let part = |per_row: usize| rows.start * per_row..rows.end * per_row;
        let values = self.width * self.ty.value_bytes();
        let (plain, values) = match self.ty {
            KvType::F32 => (&self.plain[part(self.width)], &self.values[..]),
            _ => (&self.plain[..], &self.values[part(values)]),
        };
        let scales = &self.scales[part(self.ty.scale_bytes(self.width))];
        KvRows { ty: self.ty, stride: self.width, plain, values, scales }
    }
}

fn put_u16(out: &mut [u8], x: &[f32], narrow: impl Fn(f32) -> u16) {
    out.as_chunks_mut::<2>().0.iter_mut().zip(x).for_each(|(out, &x)| *out = narrow(x).to_le_bytes());
}

/// Cached rows as attention reads them: of one type, at equal distances.
#[derive(Clone, Copy, Debug)]
pub struct KvRows<'a> {
    ty: KvType,
    stride: usize,
    plain: &'a [f32],
    values: &'a [u8],
    scales: &'a [u8],
}

impl<'a> KvRows<'a> {
    /// Rows of f32 numbers; row `j` begins at `j·stride`.
    pub fn plain(numbers: &'a [f32], stride: usize) -> Self {
        KvRows { ty: KvType::F32, stride, plain: numbers, values: &[], scales: &[] }
    }

    /// Rows of `width` numbers of a narrower type, as [`KvBuffer`] stores them: `values` are little-endian binary16 or bfloat16
    /// numbers or int8 codes, row after row; `scales`, for `q8` only, are little-endian binary16 numbers, one for each 32 columns
    /// (the last may have fewer), row after row.
    ///
    /// # Panics
    /// For `f32`, which is not stored in bytes.
    pub fn packed(ty: KvType, width: usize, values: &'a [u8], scales: &'a [u8]) -> Self {
        assert_ne!(ty, KvType::F32, "f32 rows are plain");
        KvRows { ty, stride: width, plain: &[], values, scales }
    }

    /// The type.
    pub fn ty(&self) -> KvType {
        self.ty
    }

    /// Numbers of a row.
    pub fn width(&self) -> usize {
        self.stride
    }

    /// All rows as f32 numbers and the distance between them, if that is how they are stored.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(crate) fn all_plain(&self) -> Option<(&'a [f32], usize)> {
        (self.ty == KvType::F32).then_some((self.plain, self.stride))
    }

    /// Whether `others` are the first numbers of these rows, from the first row on.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(crate) fn begin_with(&self, others: &KvRows<'_>) -> bool {
        let alike = (self.ty, self.stride) == (others.ty, others.stride);
        let plain = std::ptr::eq(self.plain.as_ptr(), others.plain.as_ptr());
        alike && plain && std::ptr::eq(self.values.as_ptr(), others.values.as_ptr())
    }

    /// The first `len` numbers of row `j`.
    ///
    /// # Panics
    /// If the row does not have them.
    pub(crate) fn row(&self, j: usize, len: usize) -> Row<'a> {
        self.part(self.ty, j, 0, len)
    }

    /// Numbers `at..at + len` of row `j`, for a type that is known at compile time. They lie in one block, or a block begins at
    /// `at`.
    #[inline(always)]
    pub(crate) fn part(&self, ty: KvType, j: usize, at: usize, len: usize) -> Row<'a> {
        let first = j * self.stride + at;
        if ty == KvType::F32 {
            return Row { plain: &self.plain[first..][..len], ..Row::NONE };
        }
        let (value, scales) = (ty.value_bytes(), ty.scale_bytes(self.stride));
        Row {
            values: &self.values[first * value..][..len * value],
            scales: &self.scales[j * scales + ty.scale_bytes(at / BLOCK * BLOCK)..][..ty.scale_bytes(len)],
            ..Row::NONE
        }
    }

    /// Where the numbers of a row begin, and bytes from one row to the next. There may be fewer rows.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(crate) fn place(&self, row: usize) -> (*const u8, usize) {
        let (first, bytes) = match self.ty {
            KvType::F32 => (self.plain.as_ptr().cast(), 4 * self.stride),
            ty => (self.values.as_ptr(), ty.value_bytes() * self.stride),
        };
        (first.wrapping_add(row * bytes), bytes)
    }

    /// The first numbers of row `j`, as many as `out` has.
    ///
    /// # Panics
    /// If the row does not have them.
    pub fn read(&self, j: usize, out: &mut [f32]) {
        let row = self.row(j, out.len());
        if self.ty == KvType::F32 {
            out.copy_from_slice(row.plain);
            return;
        }
        out.iter_mut().enumerate().for_each(|(i, out)| *out = row.value(self.ty, i));
    }
}

/// Adjacent numbers of one row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row<'a> {
    pub(crate) plain: &'a [f32],
    pub(crate) values: &'a [u8],
    pub(crate) scales: &'a [u8],
}

impl Row<'_> {
    /// An empty row.
    pub(crate) const NONE: Self = Row { plain: &[], values: &[], scales: &[] };

    /// Number `i`, exactly as stored.
    #[inline(always)]
    pub(crate) fn value(&self, ty: KvType, i: usize) -> f32 {
        match ty {
            KvType::F32 => self.plain[i],
            KvType::F16 => f16_to_f32(u16_at(self.values, i)),
            KvType::Bf16 => bf16_to_f32(u16_at(self.values, i)),
            KvType::Q8 => f32::from(self.values[i] as i8) * f16_to_f32(u16_at(self.scales, i / BLOCK)),
        }
    }
}

/// The `i`-th little-endian u16.
#[inline(always)]
pub(crate) fn u16_at(bytes: &[u8], i: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for ty in KvType::ALL {
            assert_eq!(ty.name().parse(), Ok(ty));
            assert_eq!(ty.is_lossy(), ty != KvType::F32);
        }
        assert_eq!("q4".parse::<KvType>(), Err(UnknownKvType("q4".into())));
    }

    #[test]
    fn rows_take_the_bytes_that_are_stated() {
        let per_row = |ty| KvBuffer::row_bytes(ty, 70);
        assert_eq!(KvType::ALL.map(per_row), [280, 140, 140, 70 + 3 * 2]);
        for ty in KvType::ALL {
            assert_eq!(KvBuffer::new(ty, 5, 70).bytes(), 5 * per_row(ty));
        }
    }

    #[test]
    fn rows_come_out_rounded_once() {
        let x: Vec<f32> = (0..70).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        for ty in KvType::ALL {
            let mut buffer = KvBuffer::new(ty, 3, 70);
            buffer.set(1, &x);
            let (mut out, mut twice) = (vec![0.0; 70], vec![0.0; 70]);
            buffer.rows(1..3).read(0, &mut out);
            let step = [0.0, 2f32.powi(-11), 2f32.powi(-8), 0.5 / 127.0][ty as usize];
            for (block, (x, out)) in x.chunks(BLOCK).zip(out.chunks(BLOCK)).enumerate() {
                let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                for (x, out) in x.iter().zip(out) {
                    let size = if ty == KvType::Q8 { largest * 1.001 } else { x.abs() };
                    assert!((x - out).abs() <= step * size, "{ty}, block {block}: {x} became {out}");
                }
            }
            buffer.set(2, &out);
            buffer.rows(2..3).read(0, &mut twice);
            if ty != KvType::Q8 {
                assert_eq!(out, twice);
            }
            buffer.rows(0..3).read(0, &mut twice);
            assert_eq!(twice, [0.0; 70]);
        }
    }

    #[test]
    fn rows_move_between_buffers_as_they_are() {
        let x: Vec<f32> = (0..70).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        for ty in KvType::ALL {
            let mut buffer = KvBuffer::new(ty, 4, 70);
            buffer.set(1, &x);
            let (mut copied, mut restored) = (KvBuffer::new(ty, 4, 70), KvBuffer::new(ty, 4, 70));
            copied.copy_rows(&buffer, 1..3);
            let mut bytes = vec![0; buffer.row_len()];
            buffer.row_to_bytes(1, &mut bytes);
            restored.row_from_bytes(1, &bytes);
            let read = |buffer: &KvBuffer| {
                let mut out = vec![0.0; 70];
                buffer.rows(0..4).read(1, &mut out);
                out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            };
            assert_eq!(read(&copied), read(&buffer), "{ty}");
            assert_eq!(read(&restored), read(&buffer), "{ty}");
        }
    }

    #[test]
    fn what_is_not_finite_stays_visible() {
        for ty in KvType::ALL {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut buffer = KvBuffer::new(ty, 1, 40);
                let mut x = [1.0; 40];
                x[3] = bad;
                buffer.set(0, &x);
                let mut out = [0.0; 40];
                buffer.rows(0..1).read(0, &mut out);
                assert!(!out[3].is_finite() && (out[39] - 1.0).abs() < 1e-3, "{ty}: {out:?}");
            }
        }
    }
}
