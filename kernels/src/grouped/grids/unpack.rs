//! Takes records apart for vector kernels, eight rows at a time, in plain loops that become vector instructions.
#![allow(clippy::needless_range_loop, reason = "one index runs over several arrays that must stay in registers")]

use crate::vector::bytes;
use sluice_weights::{Codes, ROW_GROUP};

/// The contents of the records of one row group, for 32 columns.
pub(crate) struct Unpacked {
    /// Indices of the points, which have four columns or eight, one per row; the points of columns 0.. come first.
    pub(crate) indices: [[u16; ROW_GROUP]; 8],
    /// For each eight columns the signs of each row; for IQ1_S and IQ1_M the number that is added to a point times 8, 1 or −1.
    pub(crate) signs: [[u8; ROW_GROUP]; 4],
}

/// The contents of `records`, which are 8 times [`Codes::block_len`] bytes. Indices are below the size of the grid, whatever the
/// bytes.
#[inline(always)]
pub(crate) fn unpack(codes: Codes, records: &[u8]) -> Unpacked {
    let mut unpacked = Unpacked { indices: [[0; ROW_GROUP]; 8], signs: [[0; ROW_GROUP]; 4] };
    let Unpacked { indices, signs } = &mut unpacked;
    match codes {
        Codes::Iq3s => {
            let ninth: &[u8; ROW_GROUP] = bytes(records, 96);
            for p in 0..8 {
                low_bits(&mut indices[p], records, p);
                add_bits(&mut indices[p], ninth, 8 - p as u32, 0x100);
            }
            *signs = eights(records, 64);
        }
        Codes::Iq3xxs => {
            for p in 0..8 {
                low_bits(&mut indices[p], records, p);
            }
            *signs = seven_bits(records, 64);
        }
        Codes::Iq2s => {
            let high: &[u8; ROW_GROUP] = bytes(records, 64);
            for l in 0..4 {
                low_bits(&mut indices[l], records, l);
                add_bits(&mut indices[l], high, 8 - 2 * l as u32, 0x300);
            }
            *signs = eights(records, 32);
        }
        Codes::Iq2xs => {
            for l in 0..4 {
                let words: &[u8; 2 * ROW_GROUP] = bytes(records, 16 * l);
                for r in 0..ROW_GROUP {
                    let word = u16::from_le_bytes([words[2 * r], words[2 * r + 1]]);
                    indices[l][r] = word & 511;
                    signs[l][r] = (word >> 9) as u8;
                }
                with_parity(&mut signs[l]);
            }
        }
        Codes::Iq2xxs => {
            for l in 0..4 {
                low_bits(&mut indices[l], records, l);
            }
            *signs = seven_bits(records, 32);
        }
        Codes::Iq1s => iq1s(records, indices, signs),
        _ => {
            for l in 0..4 {
                let nibbles: &[u8; ROW_GROUP] = bytes(records, 32 + l / 2 * 8);
                low_bits(&mut indices[l], records, l);
                add_bits(&mut indices[l], nibbles, 8 - l as u32 % 2 * 4, 0x700);
                for r in 0..ROW_GROUP {
                    signs[l][r] = one_or_minus(nibbles[r] >> (l % 2 * 4 + 3) & 1);
                }
            }
        }
    }
    unpacked
}

#[inline(always)]
fn iq1s(records: &[u8], indices: &mut [[u16; ROW_GROUP]; 8], signs: &mut [[u8; ROW_GROUP]; 4]) {
    let words: &[u8; 2 * ROW_GROUP] = bytes(records, 32);
    for l in 0..4 {
        low_bits(&mut indices[l], records, l);
        for r in 0..ROW_GROUP {
            let word = u16::from_le_bytes([words[2 * r], words[2 * r + 1]]);
            indices[l][r] |= (word >> (3 * l) & 7) << 8;
            signs[l][r] = one_or_minus((word >> 15) as u8);
        }
    }
}

/// Bits 0..8 of the indices of point `p`.
#[inline(always)]
fn low_bits(indices: &mut [u16; ROW_GROUP], records: &[u8], p: usize) {
    let low: &[u8; ROW_GROUP] = bytes(records, ROW_GROUP * p);
    for r in 0..ROW_GROUP {
        indices[r] = u16::from(low[r]);
    }
}

/// Adds the bits of `mask`, which come from `high` when it is shifted.
#[inline(always)]
fn add_bits(indices: &mut [u16; ROW_GROUP], high: &[u8; ROW_GROUP], shift: u32, mask: u16) {
    for r in 0..ROW_GROUP {
        indices[r] |= u16::from(high[r]) << shift & mask;
    }
}

#[inline(always)]
fn eights(records: &[u8], at: usize) -> [[u8; ROW_GROUP]; 4] {
    let mut signs = [[0; ROW_GROUP]; 4];
    for l in 0..4 {
        signs[l] = *bytes(records, at + ROW_GROUP * l);
    }
    signs
}

/// Four times seven signs from each of the words at `at`, each with its eighth sign.
#[inline(always)]
fn seven_bits(records: &[u8], at: usize) -> [[u8; ROW_GROUP]; 4] {
    let words: &[u8; 4 * ROW_GROUP] = bytes(records, at);
    let mut signs = [[0; ROW_GROUP]; 4];
    for l in 0..4 {
        for r in 0..ROW_GROUP {
            let word = u32::from_le_bytes([words[4 * r], words[4 * r + 1], words[4 * r + 2], words[4 * r + 3]]);
            signs[l][r] = (word >> (7 * l)) as u8 & 127;
        }
        with_parity(&mut signs[l]);
    }
    signs
}

/// Adds the eighth sign, which makes the number of minuses even.
#[inline(always)]
fn with_parity(signs: &mut [u8; ROW_GROUP]) {
    for r in 0..ROW_GROUP {
        let four = signs[r] ^ signs[r] >> 4;
        let two = four ^ four >> 2;
        signs[r] |= (two ^ two >> 1) << 7;
    }
}

/// 1, or −1 where the bit is set.
#[inline(always)]
fn one_or_minus(bit: u8) -> u8 {
    1u8.wrapping_sub(2 * bit)
}

#[cfg(test)]
mod tests {
    use super::super::{Record, number, points};
    use super::*;

    #[test]
    fn numbers_are_those_of_the_specification() {
        let mut state = 1u32;
        for codes in [Codes::Iq3s, Codes::Iq3xxs, Codes::Iq2s, Codes::Iq2xs, Codes::Iq2xxs, Codes::Iq1s, Codes::Iq1m] {
            for _ in 0..100 {
                let records: Vec<u8> = (0..ROW_GROUP * codes.block_len())
                    .map(|_| {
                        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        (state >> 24) as u8
                    })
                    .collect();
                let unpacked = unpack(codes, &records);
                for k in 0..32 {
                    for r in 0..ROW_GROUP {
                        let sign = unpacked.signs[k / 8][r];
                        let signed = |v: i8| if sign >> (k % 8) & 1 == 1 { -v } else { v };
                        let (eight, four) = (unpacked.indices[k / 8][r], unpacked.indices[k / 4][r]);
                        let got = match codes {
                            Codes::Iq3s => signed(points::IQ3S.column(four, k)),
                            Codes::Iq3xxs => signed(points::IQ3XXS.column(four, k)),
                            Codes::Iq2s => signed(points::IQ2S.column(eight, k)),
                            Codes::Iq2xs => signed(points::IQ2XS.column(eight, k)),
                            Codes::Iq2xxs => signed(points::IQ2XXS.column(eight, k)),
                            _ => points::IQ1.column(eight, k) + sign as i8,
                        };
                        let record = Record { codes, block: &records, r };
                        assert_eq!(got, number(codes, &record, k), "{codes:?} row {r} column {k}");
                    }
                }
            }
        }
    }
}
