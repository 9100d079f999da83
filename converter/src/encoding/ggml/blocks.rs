//! Converts blocks of ggml, whose codes are in the order of its kernels, to codes and scales in the order of columns. The bits stay
//! the same. Layouts: `ggml-common.h` and `dequantize_row_*` in `ggml-quants.c` (<https://github.com/ggml-org/llama.cpp>).

use sluice_weights::SUPER_BLOCK;

use crate::source::GgmlType;

/// Codes of rows, one per byte, or records of grids; and scales, in the form of `sluice_weights`.
#[derive(Debug, Default)]
pub(super) struct Canonical {
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<u8>,
}

/// Columns of a small block, and half of that: a byte holds two columns with this distance.
const SMALL: usize = 32;
const HALF: usize = SMALL / 2;

impl Canonical {
    /// Converts whole rows of a type that [`super::weight_type`] names.
    pub(super) fn new(ty: GgmlType, rows: &[u8]) -> Self {
        let blocks = rows.len() / ty.block_bytes();
        let (codes, scales) = (Vec::with_capacity(blocks * ty.block_cols()), Vec::with_capacity(blocks * 20));
        let mut canonical = Canonical { codes, scales };
        canonical.push(ty, rows);
        canonical
    }

    fn push(&mut self, ty: GgmlType, blocks: &[u8]) {
        let each = blocks.chunks_exact(ty.block_bytes());
        match ty {
            GgmlType::Q4_0 | GgmlType::IQ4_NL => each.for_each(|b| self.small(&b[..2], &b[2..])),
            GgmlType::Q4_1 => each.for_each(|b| self.small(&b[..4], &b[4..])),
            GgmlType::Q5_0 => each.for_each(|b| self.small_5(&b[..2], &b[2..])),
            GgmlType::Q5_1 => each.for_each(|b| self.small_5(&b[..4], &b[4..])),
            GgmlType::MXFP4 => each.for_each(|b| self.small(&b[..1], &b[1..])),
            GgmlType::Q8_0 => each.for_each(|b| {
                self.scales.extend_from_slice(&b[..2]);
                self.codes.extend_from_slice(&b[2..]);
            }),
            GgmlType::NVFP4 => each.for_each(|b| self.nvfp4(b)),
            GgmlType::Q2_K => each.for_each(|b| self.q2_k(b)),
            GgmlType::Q3_K => each.for_each(|b| self.q3_k(b)),
            GgmlType::Q4_K => each.for_each(|b| self.q4_k(b)),
            GgmlType::Q5_K => each.for_each(|b| self.q5_k(b)),
            GgmlType::Q6_K => each.for_each(|b| self.q6_k(b)),
            GgmlType::IQ4_XS => each.for_each(|b| self.iq4_xs(b)),
            GgmlType::TQ1_0 => each.for_each(|b| self.tq1_0(b)),
            GgmlType::TQ2_0 => each.for_each(|b| self.tq2_0(b)),
            _ => each.for_each(|b| self.grid(ty, b)),
        }
    }

    /// Each byte has two columns, half a block apart.
    fn small(&mut self, scales: &[u8], nibbles: &[u8]) {
        self.scales.extend_from_slice(scales);
        self.halves(nibbles);
    }

    fn halves(&mut self, nibbles: &[u8]) {
        self.codes.extend(nibbles.iter().map(|b| b & 15));
        self.codes.extend(nibbles.iter().map(|b| b >> 4));
    }

    /// The same, with the fifth bits of all columns before them.
    fn small_5(&mut self, scales: &[u8], rest: &[u8]) {
        let (high, nibbles) = rest.split_at(4);
        let first = self.codes.len();
        self.small(scales, nibbles);
        let high = word(high, 0);
        for (k, code) in self.codes[first..].iter_mut().enumerate() {
            *code |= ((high >> k & 1) as u8) << 4;
        }
    }

    /// Four groups of sixteen, each with a scale in e4m3 without a sign; ggml treats NaN as zero.
    fn nvfp4(&mut self, b: &[u8]) {
        let scale = |s: &u8| if s & 0x7f == 0x7f { 0 } else { s & 0x7f };
        self.scales.extend(b[..4].iter().map(scale));
        b[4..].chunks_exact(HALF / 2).for_each(|nibbles| self.halves(nibbles));
    }

    /// The codes of a super-block of two bits: in each half, a byte holds four columns, 32 apart.
    fn twos(&mut self, bytes: &[u8]) {
        for half in bytes.chunks_exact(SMALL) {
            for shift in [0, 2, 4, 6] {
                self.codes.extend(half.iter().map(|b| b >> shift & 3));
            }
        }
    }

    /// The codes of a super-block of four bits: of every 64 columns, a byte holds two, 32 apart.
    fn fours(&mut self, bytes: &[u8]) {
        bytes.chunks_exact(SMALL).for_each(|nibbles| self.halves(nibbles));
    }

    /// Adds one more bit to the last super-block: bit `i` of byte `j` belongs to column `32i + j`.
    fn add_bits(&mut self, bits: &[u8], place: u32) {
        let first = self.codes.len() - SUPER_BLOCK;
        for (i, codes) in self.codes[first..].chunks_exact_mut(SMALL).enumerate() {
            codes.iter_mut().zip(bits).for_each(|(code, b)| *code |= (b >> i & 1) << place);
        }
    }

    fn q2_k(&mut self, b: &[u8]) {
        self.scales.extend_from_slice(&b[80..84]);
        self.scales.extend_from_slice(&b[..16]);
        self.twos(&b[16..80]);
    }

    fn q3_k(&mut self, b: &[u8]) {
        let packed = &b[96..108];
        self.scales.extend_from_slice(&b[108..110]);
        self.scales.extend((0..16).map(|i| {
            let low = packed[i % 8] >> (i / 8 * 4) & 15;
            let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
            low | high << 4
        }));
        self.twos(&b[32..96]);
        self.add_bits(&b[..32], 2);
    }

    /// `d` and `dmin`, then the scale and the minimum of every 32 columns, six bits each.
    fn six_bit_scales(&mut self, b: &[u8]) {
        self.scales.extend_from_slice(&b[..4]);
        let packed = &b[4..16];
        for i in 0..8 {
            let [scale, min] = if i < 4 {
                [packed[i] & 63, packed[i + 4] & 63]
            } else {
                let (low, j) = (packed[i + 4], i - 4);
                [low & 15 | packed[j] >> 6 << 4, low >> 4 | packed[j + 4] >> 6 << 4]
            };
            self.scales.extend_from_slice(&[scale, min]);
        }
    }

    fn q4_k(&mut self, b: &[u8]) {
        self.six_bit_scales(b);
        self.fours(&b[16..]);
    }

    fn q5_k(&mut self, b: &[u8]) {
        self.six_bit_scales(b);
        self.fours(&b[48..]);
        self.add_bits(&b[16..48], 4);
    }

    fn q6_k(&mut self, b: &[u8]) {
        self.scales.extend_from_slice(&b[208..210]);
        self.scales.extend_from_slice(&b[192..208]);
        let first = self.codes.len();
        for half in b[..128].chunks_exact(2 * SMALL) {
            self.halves(half);
        }
        let halves = self.codes[first..].chunks_exact_mut(SUPER_BLOCK / 2);
        for (half, high) in halves.zip(b[128..192].chunks_exact(SMALL)) {
            for (i, codes) in half.chunks_exact_mut(SMALL).enumerate() {
                codes.iter_mut().zip(high).for_each(|(code, h)| *code |= (h >> (2 * i) & 3) << 4);
            }
        }
    }

    fn iq4_xs(&mut self, b: &[u8]) {
        self.scales.extend_from_slice(&b[..2]);
        let high = u16::from_le_bytes([b[2], b[3]]);
        self.scales.extend((0..8).map(|i| {
            let low = b[4 + i / 2] >> (i % 2 * 4) & 15;
            low | ((high >> (2 * i) & 3) as u8) << 4
        }));
        b[8..].chunks_exact(HALF).for_each(|nibbles| self.halves(nibbles));
    }

    /// Five digits of base three in a byte, or four at the end, as a fraction of 256.
    fn tq1_0(&mut self, b: &[u8]) {
        self.scales.extend_from_slice(&b[52..54]);
        for (bytes, digits) in [(&b[..32], 5), (&b[32..48], 5), (&b[48..52], 4)] {
            let mut power = 1u8;
            for _ in 0..digits {
                let digit = |b: &u8| ((u16::from(b.wrapping_mul(power)) * 3) >> 8) as u8;
                self.codes.extend(bytes.iter().map(digit));
                power = power.wrapping_mul(3);
            }
        }
    }

    fn tq2_0(&mut self, b: &[u8]) {
        self.scales.extend_from_slice(&b[64..66]);
        self.twos(&b[..64]);
    }

    /// A super-block with numbers of grid points: records as described at `sluice_weights::Codes`.
    fn grid(&mut self, ty: GgmlType, b: &[u8]) {
        match ty {
            GgmlType::IQ3_S => {
                let (indices, bits, signs) = (&b[2..66], &b[66..74], &b[74..106]);
                self.scales.extend_from_slice(&b[..2]);
                self.scales.extend_from_slice(&b[106..110]);
                self.records(&[(indices, 8), (signs, 4), (bits, 1)]);
            }
            GgmlType::IQ3_XXS => {
                self.scales.extend_from_slice(&b[..2]);
                self.records(&[(&b[2..66], 8), (&b[66..98], 4)]);
            }
            GgmlType::IQ2_S => {
                let (indices, signs, bits) = (&b[2..34], &b[34..66], &b[66..74]);
                self.scales.extend_from_slice(&b[..2]);
                self.scales.extend_from_slice(&b[74..82]);
                self.records(&[(indices, 4), (signs, 4), (bits, 1)]);
            }
            GgmlType::IQ2_XS => {
                self.scales.extend_from_slice(&b[..2]);
                self.scales.extend_from_slice(&b[66..74]);
                self.codes.extend_from_slice(&b[2..66]);
            }
            GgmlType::IQ2_XXS => {
                self.scales.extend_from_slice(&b[..2]);
                self.codes.extend_from_slice(&b[2..66]);
            }
            GgmlType::IQ1_S => {
                self.scales.extend_from_slice(&b[..2]);
                self.records(&[(&b[2..34], 4), (&b[34..50], 2)]);
            }
            GgmlType::IQ1_M => {
                let words: [u16; 4] = std::array::from_fn(|i| u16::from_le_bytes([b[48 + 2 * i], b[49 + 2 * i]]));
                // `d` is divided among the top four bits of the words, the lowest part first.
                let d = words.iter().rev().fold(0, |d, word| d << 4 | word >> 12);
                self.scales.extend(d.to_le_bytes());
                self.scales.extend(words.iter().flat_map(|w| [(w & 63) as u8, (w >> 6 & 63) as u8]));
                self.records(&[(&b[..32], 4), (&b[32..48], 2)]);
            }
            other => unreachable!("{other:?} has codes of its own"),
        }
    }

    /// Eight records of a super-block, with this many bytes from each array.
    fn records(&mut self, arrays: &[(&[u8], usize)]) {
        for i in 0..SUPER_BLOCK / SMALL {
            for (bytes, width) in arrays {
                self.codes.extend_from_slice(&bytes[i * width..][..*width]);
            }
        }
    }
}

/// The 32-bit word at a byte.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
