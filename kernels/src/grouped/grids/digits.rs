//! The points of the grids as the numbers of their levels, for look-ups of bytes: two bits for each of eight columns, or three bits
//! for each of four. Column 0 is the lowest.

use super::points::is_member;
use super::sets;

/// The low bytes of all points, then their high bytes.
#[repr(align(64))]
pub(crate) struct Digits<const N: usize>(pub(crate) [[u8; N]; 2]);

impl<const N: usize> Digits<N> {
    /// Points with `columns` columns: eight with three levels each, or four with eight.
    const fn new(set: &[u64], columns: usize) -> Self {
        let (mut digits, mut i, mut n) = ([[0; N]; 2], 0, 0);
        while i < N {
            if is_member(set, n) {
                let bits = if columns == 4 { n } else { two_bits(n) };
                digits[0][i] = bits as u8;
                digits[1][i] = (bits >> 8) as u8;
                i += 1;
            }
            n += 1;
        }
        Digits(digits)
    }
}

/// The digits of `n` in base 3, two bits each.
const fn two_bits(n: usize) -> usize {
    let (mut bits, mut rest, mut c) = (0, n, 0);
    while c < 8 {
        bits |= (rest % 3) << (2 * c);
        rest /= 3;
        c += 1;
    }
    bits
}

pub(crate) static IQ3S: Digits<512> = Digits::new(&sets::IQ3S, 4);
pub(crate) static IQ3XXS: Digits<256> = Digits::new(&sets::IQ3XXS, 4);
pub(crate) static IQ2S: Digits<1024> = Digits::new(&sets::IQ2S, 8);
pub(crate) static IQ2XS: Digits<512> = Digits::new(&sets::IQ2XS, 8);
pub(crate) static IQ2XXS: Digits<256> = Digits::new(&sets::IQ2XXS, 8);
pub(crate) static IQ1: Digits<2048> = Digits::new(&sets::IQ1S, 8);
