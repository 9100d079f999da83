//! Codes that are numbers of points of a grid, with signs (ggml's i-quants).

#[cfg(target_arch = "x86_64")]
pub(crate) mod digits;
mod points;
#[rustfmt::skip]
mod sets;
#[cfg(target_arch = "aarch64")]
mod unpack;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) use points::{IQ1, IQ2S, IQ2XS, IQ2XXS, IQ3S, IQ3XXS};
#[cfg(target_arch = "x86_64")]
pub(crate) use points::{IQ1_LEVELS, IQ2_LEVELS, IQ3S_LEVELS, IQ3XXS_LEVELS};
#[cfg(target_arch = "aarch64")]
pub(crate) use unpack::unpack;

use crate::matrix::{BLOCK, ROW_GROUP};
use crate::scalar::Rows;
use sluice_weights::Codes;

/// The numbers that the codes of column `k` represent, one per row.
pub(crate) fn numbers(codes: Codes, values: &[u8], k: usize) -> Rows {
    let block = of_block(codes, values, k / BLOCK);
    std::array::from_fn(|r| f32::from(number(codes, &Record { codes, block, r }, k % BLOCK)))
}

/// The odd integer `2s + 1` of the scale in the record of the columns from `first` on.
pub(crate) fn scale(codes: Codes, values: &[u8], first: usize, r: usize) -> i32 {
    let record = Record { codes, block: of_block(codes, values, first / BLOCK), r };
    let s = match codes {
        Codes::Iq1s => record.u16_at(4) >> 12 & 7,
        Codes::Iq2xxs => record.u16_at(6) >> 12,
        _ => record.u16_at(10) >> 12,
    };
    2 * i32::from(s) + 1
}

/// The records of block `b` of a row group.
fn of_block(codes: Codes, values: &[u8], b: usize) -> &[u8] {
    let len = ROW_GROUP * codes.block_len();
    &values[b * len..][..len]
}

/// The record of one row among those of a row group.
struct Record<'a> {
    codes: Codes,
    block: &'a [u8],
    r: usize,
}

impl Record<'_> {
    /// Byte `i` of the record.
    fn byte(&self, i: usize) -> u8 {
        let mut first = 0;
        for &width in self.codes.fields() {
            if i < first + width {
                return self.block[first * ROW_GROUP + self.r * width + i - first];
            }
            first += width;
        }
        unreachable!("a record has no byte {i}")
    }

    fn u16_at(&self, i: usize) -> u16 {
        u16::from_le_bytes([self.byte(i), self.byte(i + 1)])
    }

    /// Seven bits, from bit `first` of the four bytes at `i` on.
    fn seven_bits(&self, i: usize, first: usize) -> u8 {
        let word = u32::from(self.u16_at(i)) | u32::from(self.u16_at(i + 2)) << 16;
        (word >> first & 127) as u8
    }
}

/// The number that column `k` of a record represents.
fn number(codes: Codes, record: &Record<'_>, k: usize) -> i8 {
    let (eight, four) = (k / 8, k / 4);
    let ninth = |byte: u8, bit: usize| u16::from(byte >> bit & 1) << 8;
    let signed = |magnitude: i8, signs: u8| if signs >> (k % 8) & 1 == 1 { -magnitude } else { magnitude };
    let index = u16::from(record.byte(if matches!(codes, Codes::Iq3s | Codes::Iq3xxs) { four } else { eight }));
    match codes {
        Codes::Iq3s => signed(points::IQ3S.column(index | ninth(record.byte(12), four), k), record.byte(8 + eight)),
        Codes::Iq3xxs => signed(points::IQ3XXS.column(index, k), with_parity(record.seven_bits(8, 7 * eight))),
        Codes::Iq2s => {
            let high = u16::from(record.byte(8) >> (2 * eight) & 3) << 8;
            signed(points::IQ2S.column(index | high, k), record.byte(4 + eight))
        }
        Codes::Iq2xs => {
            let word = record.u16_at(2 * eight);
            signed(points::IQ2XS.column(word & 511, k), with_parity((word >> 9) as u8))
        }
        Codes::Iq2xxs => signed(points::IQ2XXS.column(index, k), with_parity(record.seven_bits(4, 7 * eight))),
        Codes::Iq1s => {
            let word = record.u16_at(4);
            let point = points::IQ1.column(index | (word >> (3 * eight) & 7) << 8, k);
            if word >> 15 == 1 { point - 1 } else { point + 1 }
        }
        Codes::Iq1m => {
            let nibble = record.byte(4 + eight / 2) >> (eight % 2 * 4) & 15;
            let point = points::IQ1.column(index | u16::from(nibble & 7) << 8, k);
            if nibble >> 3 == 1 { point - 1 } else { point + 1 }
        }
        _ => unreachable!("the caller has chosen grids"),
    }
}

/// Seven signs, and an eighth that makes the number of minuses even.
fn with_parity(signs: u8) -> u8 {
    signs | ((signs.count_ones() % 2) as u8) << 7
}
