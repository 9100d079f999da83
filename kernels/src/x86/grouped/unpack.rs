//! From codes to bytes, for vectors of any width.

/// `block`, which unpacks 32 columns of `N` row groups, and `strip`, which unpacks 256.
///
/// The module that uses it provides everything that `terms` needs, `shuffle` and `broadcast` for tables of 16 bytes, shifts of 16
/// bits, and `grid_blocks`, which does for grids what `blocks` does for other codes.
macro_rules! unpack {
    ($features:tt, $integers:ty) => {
        /// Unpacks a strip, or as much of it as exists.
        #[inline(never)]
        #[target_feature(enable = $features)]
        pub(super) fn strip(ty: Grouped, w: &[Group<'_>; N], strip: usize, out: &mut [Bytes; STRIP]) {
            match ty.codes() {
                Codes::Uint(2) => blocks::<2>(w, strip, out),
                Codes::Uint(3) => blocks::<3>(w, strip, out),
                Codes::Uint(4) => blocks::<4>(w, strip, out),
                Codes::Uint(5) => blocks::<5>(w, strip, out),
                Codes::Uint(6) => blocks::<6>(w, strip, out),
                Codes::Uint(_) => blocks::<8>(w, strip, out),
                Codes::E2m1 => blocks::<E2M1>(w, strip, out),
                Codes::Iq4nl => blocks::<IQ4NL>(w, strip, out),
                codes => grid_blocks(codes, w, strip, out),
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn blocks<const C: u8>(w: &[Group<'_>; N], strip: usize, out: &mut [Bytes; STRIP]) {
            let len = const { block_len(C) };
            let n = (w[0].values.len() / len - strip * STRIP).min(STRIP);
            let values = each!(w[0].values; N, i => &w[i].values[strip * STRIP * len..][..n * len]);
            for (g, out) in out[..n].iter_mut().enumerate() {
                *out = block::<C>(&each!(values[0]; N, i => &values[i][g * len..][..len]));
            }
        }

        /// Unpacks one block.
        #[inline]
        #[target_feature(enable = $features)]
        pub(super) fn block<const C: u8>(w: &[&[u8]; N]) -> Bytes {
            let mut bytes = [setzero(); 8];
            if matches!(C, E2M1 | IQ4NL) {
                let table = broadcast(load16(&const { table(C) }, 0));
                for q in 0..8 {
                    bytes[q] = shuffle(table, field::<4, 0>(w, 0, q));
                }
                return bytes;
            }
            for q in 0..8 {
                bytes[q] = match C {
                    2 => field::<2, 0>(w, 0, q),
                    3 => or(field::<2, 0>(w, 0, q), field::<1, 2>(w, 64, q)),
                    4 => field::<4, 0>(w, 0, q),
                    5 => or(field::<4, 0>(w, 0, q), field::<1, 4>(w, 128, q)),
                    6 => or(field::<4, 0>(w, 0, q), field::<2, 4>(w, 128, q)),
                    _ if const { bias(Codes::Uint(8)) == 0 } => wide(w, 32 * q),
                    _ => xor(wide(w, 32 * q), set1_epi8(-128)),
                };
            }
            bytes
        }

        /// The integers of nibbles.
        const fn table(codes: u8) -> [u8; 16] {
            if codes == E2M1 {
                return e2m1_table(bias(Codes::E2m1) as i8);
            }
            let mut table = [0; 16];
            let mut i = 0;
            while i < 16 {
                table[i] = (LEVELS[i] as i32 + bias(Codes::Iq4nl)) as u8;
                i += 1;
            }
            table
        }

        /// Vector `q` of a plane of `WIDTH` bits that begins at `at`, moved to bit `TO` of each byte.
        #[inline]
        #[target_feature(enable = $features)]
        fn field<const WIDTH: usize, const TO: usize>(w: &[&[u8]; N], at: usize, q: usize) -> $integers {
            let vector = wide(w, at + 32 * (q % WIDTH));
            // Constants once the loop over vectors is unrolled.
            let moved = match (q / WIDTH * WIDTH) as i32 - TO as i32 {
                -4 => slli_epi16::<4>(vector),
                -3 => slli_epi16::<3>(vector),
                -2 => slli_epi16::<2>(vector),
                -1 => slli_epi16::<1>(vector),
                1 => srli_epi16::<1>(vector),
                2 => srli_epi16::<2>(vector),
                3 => srli_epi16::<3>(vector),
                4 => srli_epi16::<4>(vector),
                5 => srli_epi16::<5>(vector),
                6 => srli_epi16::<6>(vector),
                7 => srli_epi16::<7>(vector),
                _ => vector,
            };
            and(moved, set1_epi8(const { (((1 << WIDTH) - 1) << TO) as i8 }))
        }
    };
}
