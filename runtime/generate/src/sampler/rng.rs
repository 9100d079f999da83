//! The random numbers of sampling: xoshiro256**, seeded by splitmix64.
//!
//! This is our own code, because users note down seeds: the same seed must give the same draws on every platform and after every
//! update of a dependency. Both algorithms are by David Blackman and Sebastiano Vigna, in the public domain:
//! <https://prng.di.unimi.it/> (`xoshiro256starstar.c`, `splitmix64.c`).

/// A stream of random numbers, fully described by four words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rng {
    state: [u64; 4],
}

impl Rng {
    /// The stream of a seed. All seeds are good, 0 included.
    pub fn from_seed(mut seed: u64) -> Self {
        Self { state: std::array::from_fn(|_| splitmix64(&mut seed)) }
    }

    /// The stream of a seed after its first `skipped` numbers. Takes about a nanosecond for each of them.
    pub fn at(seed: u64, skipped: u64) -> Self {
        let mut rng = Self::from_seed(seed);
        for _ in 0..skipped {
            rng.next_u64();
        }
        rng
    }

    /// Continues a stream; `None` for the one state, all zeros, that yields only zeros.
    pub fn from_state(state: [u64; 4]) -> Option<Self> {
        (state != [0; 4]).then_some(Self { state })
    }

    /// The position in the stream: everything that is needed to continue it later.
    pub fn state(&self) -> [u64; 4] {
        self.state
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.state;
        let result = b.wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        result
    }

    /// The next number in [0, 1): the 53 upper bits, so all values are equally far apart.
    pub fn next_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn splitmix64(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Output of the reference C code for these states.
    #[test]
    fn agrees_with_the_reference() {
        let mut rng = Rng::from_state([1, 2, 3, 4]).unwrap();
        let first: [u64; 10] = std::array::from_fn(|_| rng.next_u64());
        assert_eq!(
            first,
            [
                11520,
                0,
                1509978240,
                1215971899390074240,
                1216172134540287360,
                607988272756665600,
                16172922978634559625,
                8476171486693032832,
                10595114339597558777,
                2904607092377533576,
            ]
        );
        let mut seed = 1234567;
        let first: [u64; 5] = std::array::from_fn(|_| splitmix64(&mut seed));
        assert_eq!(
            first,
            [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,]
        );
    }

    #[test]
    fn continues_from_its_state() {
        let mut rng = Rng::from_seed(0);
        rng.next_u64();
        let mut again = Rng::from_state(rng.state()).unwrap();
        assert_eq!(rng.next_f64(), again.next_f64());
        assert_eq!(rng, again);
        assert_eq!(Rng::from_state([0; 4]), None);
    }

    #[test]
    fn fractions_stay_below_one() {
        let mut rng = Rng::from_seed(3);
        let mean =
            (0..10_000).map(|_| rng.next_f64()).inspect(|x| assert!((0.0..1.0).contains(x))).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
    }
}
