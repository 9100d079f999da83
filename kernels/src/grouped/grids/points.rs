//! The points of the grids, expanded by the compiler.

use super::sets;

/// Points of four columns, a byte each, column 0 the lowest.
pub(crate) struct Points4<const N: usize>([u32; N]);

/// Points of eight columns.
pub(crate) struct Points8<const N: usize>([u64; N]);

impl<const N: usize> Points4<N> {
    const fn new(set: &[u64], levels: [i8; 8]) -> Self {
        let (mut points, mut i, mut n) = ([0; N], 0, 0);
        while i < N {
            if is_member(set, n) {
                let mut c = 0;
                while c < 4 {
                    points[i] |= (levels[n >> (3 * c) & 7] as u8 as u32) << (8 * c);
                    c += 1;
                }
                i += 1;
            }
            n += 1;
        }
        Points4(points)
    }

    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(crate) const fn words(&self) -> &[u32; N] {
        &self.0
    }

    /// Column `k mod 4` of a point.
    pub(super) fn column(&self, index: u16, k: usize) -> i8 {
        self.0[usize::from(index)].to_le_bytes()[k % 4] as i8
    }
}

impl<const N: usize> Points8<N> {
    const fn new(set: &[u64], levels: [i8; 3]) -> Self {
        let (mut points, mut i, mut n) = ([0; N], 0, 0);
        while i < N {
            if is_member(set, n) {
                let (mut c, mut digits) = (0, n);
                while c < 8 {
                    points[i] |= (levels[digits % 3] as u8 as u64) << (8 * c);
                    digits /= 3;
                    c += 1;
                }
                i += 1;
            }
            n += 1;
        }
        Points8(points)
    }

    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(crate) const fn words(&self) -> &[u64; N] {
        &self.0
    }

    /// Column `k mod 8` of a point.
    pub(super) fn column(&self, index: u16, k: usize) -> i8 {
        self.0[usize::from(index)].to_le_bytes()[k % 8] as i8
    }
}

/// Points are numbered in ascending order.
pub(super) const fn is_member(set: &[u64], n: usize) -> bool {
    set[n / 64] >> (n % 64) & 1 == 1
}

/// The levels of IQ3_S.
pub(crate) const IQ3S_LEVELS: [i8; 8] = [1, 3, 5, 7, 9, 11, 13, 15];
/// The levels of IQ3_XXS.
pub(crate) const IQ3XXS_LEVELS: [i8; 8] = [4, 12, 20, 28, 36, 44, 52, 62];
/// The levels of IQ2_S, IQ2_XS and IQ2_XXS.
pub(crate) const IQ2_LEVELS: [i8; 3] = [8, 25, 43];
/// The levels of IQ1_S and IQ1_M, times 8, because the number added to them is an eighth.
pub(crate) const IQ1_LEVELS: [i8; 3] = [-8, 0, 8];

pub(crate) static IQ3S: Points4<512> = Points4::new(&sets::IQ3S, IQ3S_LEVELS);
pub(crate) static IQ3XXS: Points4<256> = Points4::new(&sets::IQ3XXS, IQ3XXS_LEVELS);
pub(crate) static IQ2S: Points8<1024> = Points8::new(&sets::IQ2S, IQ2_LEVELS);
pub(crate) static IQ2XS: Points8<512> = Points8::new(&sets::IQ2XS, IQ2_LEVELS);
pub(crate) static IQ2XXS: Points8<256> = Points8::new(&sets::IQ2XXS, IQ2_LEVELS);
pub(crate) static IQ1: Points8<2048> = Points8::new(&sets::IQ1S, IQ1_LEVELS);

#[cfg(test)]
mod tests {
    use super::*;

    /// The points as the public decoder has them.
    const PUBLIC: &[u8] = include_bytes!("../../../tests/ggml/grids.bin");

    #[test]
    fn points_are_those_of_ggml() {
        // After the points of each grid come 16 rows of records, scales and values.
        let rows = |record: usize, scales: usize| 16 * (8 * record + scales + 1024);
        let mut at = 0;
        let mut next = |points: Vec<u8>, unit: i8, skip: usize| {
            let public: Vec<u8> = PUBLIC[at..][..points.len()].iter().map(|&b| (b as i8 * unit) as u8).collect();
            assert!(points == public, "the grid at {at}");
            at += points.len() + skip;
        };
        let fours = |words: &[u32]| words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let eights = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect();
        next(fours(&IQ3S.0), 1, rows(13, 6));
        next(fours(&IQ3XXS.0), 1, rows(12, 2));
        next(eights(&IQ2S.0), 1, rows(9, 10));
        next(eights(&IQ2XS.0), 1, rows(8, 10));
        next(eights(&IQ2XXS.0), 1, rows(8, 2));
        next(eights(&IQ1.0), 8, rows(6, 2));
    }
}
