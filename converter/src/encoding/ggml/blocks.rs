//! Values of blocks, as llama.cpp's `dequantize_row_*` computes them (<https://github.com/ggml-org/llama.cpp>,
//! `ggml-quants.c`).

use sluice_kernels::f16_to_f32;

use crate::source::GgmlType;

/// Types whose values are known here, for messages.
pub(super) const SUPPORTED: &str = "F32, F16, BF16, Q8_0 and Q4_0";

/// Writes the values of one block, given its bytes.
pub(super) type Values = fn(&[u8], &mut [f32]);

/// How blocks of a type become values; `None`: it is not known.
pub(super) fn values_of(ty: GgmlType) -> Option<Values> {
    match ty {
        GgmlType::Q4_0 => Some(q4_0),
        GgmlType::Q8_0 => Some(q8_0),
        _ => None,
    }
}

/// The f16 number at a place of a block.
fn f16_at(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// f16 scale, then 16 bytes: the low nibbles are the first half of the block, the high ones the second; eight is zero.
fn q4_0(block: &[u8], out: &mut [f32]) {
    let scale = f16_at(block, 0);
    let (low, high) = out.split_at_mut(16);
    for ((byte, low), high) in block[2..].iter().zip(low).zip(high) {
        *low = (f32::from(byte & 15) - 8.0) * scale;
        *high = (f32::from(byte >> 4) - 8.0) * scale;
    }
}

/// f16 scale, then 32 integers of eight bits.
fn q8_0(block: &[u8], out: &mut [f32]) {
    let scale = f16_at(block, 0);
    block[2..].iter().zip(out).for_each(|(&byte, out)| *out = f32::from(byte as i8) * scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_by_hand() {
        // 0.5 as f16.
        let half = 0x3800u16.to_le_bytes();
        let mut out = [0.0; 32];
        let nibbles: Vec<u8> = half.into_iter().chain((0..16).map(|i| i | (15 - i) << 4)).collect();
        q4_0(&nibbles, &mut out);
        assert_eq!((out[0], out[3], out[16], out[31]), (-4.0, -2.5, 3.5, -4.0));
        let bytes: Vec<u8> = half.into_iter().chain((0..32).map(|i| i as u8 ^ 0x80)).collect();
        q8_0(&bytes, &mut out);
        assert_eq!((out[0], out[31]), (-64.0, -48.5));
    }
}
