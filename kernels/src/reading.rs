//! Loops that only read memory: a product that reads its weights once cannot be faster.

use crate::Kernels;

/// Bytes that a loop reads in one step: eight registers of 256 bits, so that none waits for the one before.
const STEP: usize = 256;
const WORDS: usize = STEP / 8;

/// The numbers of places of the memory that a loop can read alternately, one loop for each; which is best differs between machines.
pub const READING_STREAMS: [usize; 3] = [1, 2, 4];

impl Kernels {
    /// Reads all bytes, alternating between `streams` places ([`READING_STREAMS`]; another number counts as 1). The result depends
    /// on all of them.
    pub fn look_at(&self, data: &[u8], streams: usize) -> u64 {
        match streams {
            2 => self.compiled(|| look_at::<2>(data)),
            4 => self.compiled(|| look_at::<4>(data)),
            _ => self.compiled(|| look_at::<1>(data)),
        }
    }
}

#[inline(always)]
fn look_at<const STREAMS: usize>(data: &[u8]) -> u64 {
    let steps = data.len() / STREAMS / STEP;
    let (even, rest) = data.split_at(steps * STREAMS * STEP);
    let mut streams: [&[[u8; STEP]]; STREAMS] = [&[]; STREAMS];
    for (stream, part) in streams.iter_mut().zip(even.chunks_exact((steps * STEP).max(1))) {
        *stream = &part.as_chunks().0[..steps];
    }
    let mut sums = [0; WORDS];
    for step in 0..steps {
        for stream in streams {
            add(&mut sums, &stream[step]);
        }
    }
    let mut last = [0; STEP];
    for part in rest.chunks(STEP) {
        last[..part.len()].copy_from_slice(part);
        last[part.len()..].fill(0);
        add(&mut sums, &last);
    }
    sums.iter().fold(0, |all, sum| all ^ sum)
}

#[inline(always)]
fn add(sums: &mut [u64; WORDS], bytes: &[u8; STEP]) {
    for (sum, word) in sums.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *sum ^= u64::from_le_bytes(*word);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_looked_at_once() {
        for kernels in Kernels::available() {
            for streams in READING_STREAMS {
                for len in [0, 1, 255, 256, 257, 1024, 1500, 4096 + 8] {
                    let mut data = vec![0; len];
                    assert_eq!(kernels.look_at(&data, streams), 0);
                    for at in 0..len {
                        data[at] = 0xa5;
                        let seen = kernels.look_at(&data, streams);
                        assert_eq!(seen.count_ones(), 4, "{streams} streams, byte {at} of {len}");
                        data[at] = 0;
                    }
                }
            }
        }
    }
}
