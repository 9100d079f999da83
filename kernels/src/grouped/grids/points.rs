//! The points of the grids, expanded at first use.

use super::sets;
use std::sync::LazyLock;

/// Points of four columns, a byte each, column 0 the lowest.
#[derive(Debug)]
pub(crate) struct Points4<const N: usize>([u32; N]);

/// Points of eight columns.
#[derive(Debug)]
pub(crate) struct Points8<const N: usize>([u64; N]);

impl<const N: usize> Points4<N> {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(crate) fn words(&self) -> &[u32; N] {
        &self.0
    }

    fn new(set: &[u64], levels: [i8; 8]) -> Self {
        let mut points = [0; N];
        for (point, n) in points.iter_mut().zip(members(set)) {
            *point = u32::from_le_bytes(std::array::from_fn(|c| levels[n >> (3 * c) & 7] as u8));
        }
        Points4(points)
    }

    /// Column `k mod 4` of a point.
    pub(super) fn column(&self, index: u16, k: usize) -> i8 {
        self.0[usize::from(index)].to_le_bytes()[k % 4] as i8
    }
}

impl<const N: usize> Points8<N> {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(crate) fn words(&self) -> &[u64; N] {
        &self.0
    }

    fn new(set: &[u64], levels: [i8; 3]) -> Self {
        let mut points = [0; N];
        for (point, n) in points.iter_mut().zip(members(set)) {
            *point = u64::from_le_bytes(std::array::from_fn(|c| levels[n / 3usize.pow(c as u32) % 3] as u8));
        }
        Points8(points)
    }

    /// Column `k mod 8` of a point.
    pub(super) fn column(&self, index: u16, k: usize) -> i8 {
        self.0[usize::from(index)].to_le_bytes()[k % 8] as i8
    }
}

/// The numbers that a set holds, in ascending order.
fn members(set: &[u64]) -> impl Iterator<Item = usize> {
    (0..64 * set.len()).filter(|&n| set[n / 64] >> (n % 64) & 1 == 1)
}

/// The levels of the two-bit grids.
const TWO_BITS: [i8; 3] = [8, 25, 43];

pub(crate) fn iq3s() -> &'static Points4<512> {
    static POINTS: LazyLock<Points4<512>> = LazyLock::new(|| Points4::new(&sets::IQ3S, [1, 3, 5, 7, 9, 11, 13, 15]));
    &POINTS
}

pub(crate) fn iq3xxs() -> &'static Points4<256> {
    static POINTS: LazyLock<Points4<256>> =
        LazyLock::new(|| Points4::new(&sets::IQ3XXS, [4, 12, 20, 28, 36, 44, 52, 62]));
    &POINTS
}

pub(crate) fn iq2s() -> &'static Points8<1024> {
    static POINTS: LazyLock<Points8<1024>> = LazyLock::new(|| Points8::new(&sets::IQ2S, TWO_BITS));
    &POINTS
}

pub(crate) fn iq2xs() -> &'static Points8<512> {
    static POINTS: LazyLock<Points8<512>> = LazyLock::new(|| Points8::new(&sets::IQ2XS, TWO_BITS));
    &POINTS
}

pub(crate) fn iq2xxs() -> &'static Points8<256> {
    static POINTS: LazyLock<Points8<256>> = LazyLock::new(|| Points8::new(&sets::IQ2XXS, TWO_BITS));
    &POINTS
}

/// The grid of IQ1_S and IQ1_M, times 8: what is added to its points is an eighth.
pub(crate) fn iq1() -> &'static Points8<2048> {
    static POINTS: LazyLock<Points8<2048>> = LazyLock::new(|| Points8::new(&sets::IQ1S, [-8, 0, 8]));
    &POINTS
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The points as the public decoder has them.
    const PUBLIC: &[u8] = include_bytes!("../../../tests/ggml/grids.bin");

    #[test]
    fn points_are_those_of_ggml() {
        // Behind the points of each grid are 16 rows of records, scales and values.
        let rows = |record: usize, scales: usize| 16 * (8 * record + scales + 1024);
        let mut at = 0;
        let mut next = |points: Vec<u8>, unit: i8, skip: usize| {
            let public: Vec<u8> = PUBLIC[at..][..points.len()].iter().map(|&b| (b as i8 * unit) as u8).collect();
            assert!(points == public, "the grid at {at}");
            at += points.len() + skip;
        };
        let fours = |words: &[u32]| words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let eights = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect();
        next(fours(&iq3s().0), 1, rows(13, 6));
        next(fours(&iq3xxs().0), 1, rows(12, 2));
        next(eights(&iq2s().0), 1, rows(9, 10));
        next(eights(&iq2xs().0), 1, rows(8, 10));
        next(eights(&iq2xxs().0), 1, rows(8, 2));
        next(eights(&iq1().0), 8, rows(6, 2));
    }
}
