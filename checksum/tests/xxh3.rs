//! Every way to a checksum gives what the library `xxhash-rust` gives.

use proptest::prelude::*;
use sluice_checksum::*;
use xxhash_rust::xxh3 as library;

/// Bytes that look random, always the same.
fn bytes(len: usize) -> Vec<u8> {
    let mut word = 1u64;
    let next = || {
        word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (word >> 56) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

const SEEDS: [u64; 5] = [0, 1, 0x9e37_79b9_7f4a_7c15, u64::MAX, 1 << 63];

#[test]
fn every_length_up_to_four_kibibytes_and_some_beyond() {
    let bytes = bytes((1 << 20) + 77);
    let longer = [8191, 8192, 8193, 65_536, 100_000, 1 << 20, bytes.len()];
    for len in (0..=4096).chain(longer) {
        let input = &bytes[..len];
        for seed in SEEDS {
            assert_eq!(xxh3_64_with_seed(input, seed), library::xxh3_64_with_seed(input, seed), "{len}, seed {seed}");
            let mut stream = Xxh3::with_seed(seed);
            stream.update(input);
            assert_eq!(stream.digest(), library::xxh3_64_with_seed(input, seed), "{len} as a stream, seed {seed}");
            assert_eq!(stream.digest128(), library::xxh3_128_with_seed(input, seed), "{len} as a stream, seed {seed}");
        }
        assert_eq!((xxh3_64(input), xxh3_128(input)), (library::xxh3_64(input), library::xxh3_128(input)), "{len}");
    }
}

proptest! {
    #[test]
    fn any_bytes_with_any_seed(bytes in proptest::collection::vec(any::<u8>(), 0..3000), seed: u64) {
        prop_assert_eq!(xxh3_64_with_seed(&bytes, seed), library::xxh3_64_with_seed(&bytes, seed));
        prop_assert_eq!(xxh3_128(&bytes), library::xxh3_128(&bytes));
    }

    /// In whatever pieces they come, also looked at in between.
    #[test]
    fn a_stream_in_pieces(lens in proptest::collection::vec(0usize..3000, 0..12), seed: u64) {
        let bytes = bytes(lens.iter().sum());
        let mut stream = Xxh3::with_seed(seed);
        let mut at = 0;
        for len in lens {
            stream.update(&bytes[at..at + len]);
            at += len;
            prop_assert_eq!(stream.digest(), library::xxh3_64_with_seed(&bytes[..at], seed));
            prop_assert_eq!(stream.digest128(), library::xxh3_128_with_seed(&bytes[..at], seed));
        }
    }

    /// Sums of pieces in any order; the first blocks possibly in order, as bytes.
    #[test]
    fn blocks_in_any_order(
        cuts in proptest::collection::vec(0usize..40, 0..6),
        blocks in 1usize..40,
        before in 0usize..40,
        order: u64,
    ) {
        let bytes = bytes(blocks * BLOCK_BYTES);
        let before = before.min(blocks - 1);
        let mut ends: Vec<usize> = cuts.into_iter().map(|cut| cut.clamp(before, blocks)).collect();
        ends.extend([before, blocks]);
        ends.sort_unstable();
        let mut pieces: Vec<_> = ends.windows(2).map(|ends| ends[0]..ends[1]).collect();
        let count = pieces.len();
        pieces.rotate_left(order as usize % count);
        if order & (1 << 40) != 0 {
            pieces.reverse();
        }
        let mut sums = vec![[0; 8]; blocks];
        for piece in pieces {
            let ends = piece.end == blocks && !piece.is_empty();
            block_sums(&bytes[piece.start * BLOCK_BYTES..piece.end * BLOCK_BYTES], ends, &mut sums[piece]);
        }
        let mut hash = BlockHash::default();
        hash.update(&bytes[..before * BLOCK_BYTES]);
        let (last, others) = sums[before..].split_last().expect("the last block is among them");
        others.chunks(3).for_each(|sums| hash.absorb(sums));
        prop_assert_eq!(hash.blocks(), blocks - 1);
        prop_assert_eq!(hash.finish(*last), library::xxh3_64(&bytes));
    }
}

#[test]
fn every_bit_counts() {
    let mut bytes = bytes(4 * BLOCK_BYTES);
    let of_blocks = |bytes: &[u8]| {
        let mut sums = [[0; 8]; 4];
        block_sums(bytes, true, &mut sums);
        let mut hash = BlockHash::default();
        hash.absorb(&sums[..3]);
        hash.finish(sums[3])
    };
    let right = of_blocks(&bytes);
    assert_eq!(right, xxh3_64(&bytes));
    for bit in 0..8 * bytes.len() {
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert_ne!(of_blocks(&bytes), right, "bit {bit}");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}
