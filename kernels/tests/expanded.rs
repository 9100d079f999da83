//! Attention over expanded keys and values: what it is, and the same bits whatever is in a tile.

use crate::common::*;
use sluice_kernels::*;

const SCALE: f32 = 0.37;

/// Latents of one sequence, and the weights of one head.
struct Case {
    rank: usize,
    rotated: usize,
    plain: usize,
    value: usize,
    /// `[rank, plain]`.
    keys: Vec<f32>,
    /// `[value, rank]`.
    values: Vec<f32>,
    /// `[positions, rank + rotated]`.
    latents: Vec<f32>,
}

impl Case {
    fn random(positions: usize, rng: &mut Rng) -> Self {
        let rank = [1, 7, 16, 64, 256, 300, 512][rng.below(7)];
        let (rotated, plain) = ([0, 4, 16, 64][rng.below(4)], [1, 8, 24, 64, 128][rng.below(5)]);
        let value = [1, 12, 16, 33, 128][rng.below(5)];
        let small = |n: usize, rng: &mut Rng| rng.vec(n).iter().map(|v| v / (rank as f32).sqrt()).collect();
        Case {
            keys: small(rank * plain, rng),
            values: small(value * rank, rng),
            latents: rng.vec(positions * (rank + rotated)),
            rank,
            rotated,
            plain,
            value,
        }
    }

    fn key(&self) -> usize {
        self.plain + self.rotated
    }

    fn latent(&self, position: usize) -> &[f32] {
        &self.latents[position * (self.rank + self.rotated)..][..self.rank + self.rotated]
    }

    /// The key and the value at a position, as the definition says.
    fn key_and_value(&self, position: usize) -> (Vec<f32>, Vec<f32>) {
        let latent = self.latent(position);
        let sum = |weight: &dyn Fn(usize) -> f32| (0..self.rank).fold(0.0f32, |s, r| latent[r].mul_add(weight(r), s));
        let mut key: Vec<f32> = (0..self.plain).map(|i| sum(&|r| self.keys[r * self.plain + i])).collect();
        key.extend_from_slice(&latent[self.rank..]);
        (key, (0..self.value).map(|i| sum(&|r| self.values[i * self.rank + r])).collect())
    }

    /// The definition, one query in plain numbers.
    fn defined(&self, query: &[f32], sees: usize) -> Vec<f32> {
        let or_zero = |m: f32| if m == f32::NEG_INFINITY { 0.0 } else { m };
        let (mut m, mut l, mut o) = (f32::NEG_INFINITY, 0.0f32, vec![0.0f32; self.value]);
        for start in (0..sees).step_by(EXPANDED_BLOCK) {
            let rows: Vec<_> =
                (start..(start + EXPANDED_BLOCK).min(sees)).map(|position| self.key_and_value(position)).collect();
            let score = |key: &[f32]| key.iter().zip(query).fold(0.0f32, |s, (k, q)| k.mul_add(*q, s)) * SCALE;
            let scores: Vec<f32> = rows.iter().map(|(key, _)| score(key)).collect();
            let before = m;
            m = scores.iter().copied().filter(|s| !s.is_nan()).fold(m, f32::max);
            let alpha = exp(before - or_zero(m));
            let weights: Vec<f32> = scores.iter().map(|s| exp(s - or_zero(m))).collect();
            l = weights.iter().fold(l * alpha, |l, p| l + p);
            for (i, o) in o.iter_mut().enumerate() {
                *o = rows.iter().zip(&weights).fold(*o * alpha, |o, ((_, value), p)| p.mul_add(value[i], o));
            }
        }
        o.iter().map(|o| o / l + 0.0).collect()
    }

    /// The results of adjacent queries as one tile, of which the first sees `first` keys; `present` latents are there.
    fn attend(&self, k: Kernels, queries: &[f32], first: usize, present: usize) -> Vec<f32> {
        let (mut expander, mut block, mut tile) =
            (Expander::default(), ExpandedKeys::default(), ExpandedTile::default());
        expander.set_keys(self.rank, &self.keys);
        expander.set_values(self.rank, &self.values);
        let n = queries.len() / self.key();
        tile.set(self.key(), SCALE, first..first + n, |i, query| {
            query.copy_from_slice(&queries[i * self.key()..][..self.key()]);
        });
        let (mut max, mut sum, mut out) = (vec![f32::NEG_INFINITY; n], vec![0.0; n], vec![0.0; n * self.value]);
        for start in (0..present).step_by(EXPANDED_BLOCK) {
            let len = EXPANDED_BLOCK.min(present - start);
            expander.expand(
                &k,
                (start, len),
                self.rotated,
                |i, row| row.copy_from_slice(self.latent(start + i)),
                &mut block,
            );
            assert_eq!(block.start(), start);
            k.attend_expanded(&mut tile, &block, Gathered { max: &mut max, sum: &mut sum, out: &mut out });
        }
        Gathered { max: &mut max, sum: &mut sum, out: &mut out }.finish();
        out
    }
}

/// Random cases: queries that see ever more of the latents.
fn for_cases(seed: u64, cases: usize, mut f: impl FnMut(&Case, &[f32], usize, usize, &mut Rng)) {
    let mut rng = Rng(seed);
    for _ in 0..cases {
        let n = [1, 2, 11, 12, 17, 40, 96][rng.below(7)];
        let first = 1 + rng.below(250);
        let case = Case::random(first + n + 100, &mut rng);
        let queries = rng.vec(n * case.key());
        f(&case, &queries, first, n, &mut rng);
    }
}

#[test]
fn every_isa_follows_the_definition() {
    for_cases(3, 14, |case, queries, first, n, _| {
        let want: Vec<f32> =
            queries.chunks(case.key()).enumerate().flat_map(|(i, query)| case.defined(query, first + i)).collect();
        for k in Kernels::available() {
            assert_same(&case.attend(k, queries, first, first + n - 1), &want, &k.isa_name());
        }
    });
}

#[test]
fn a_query_depends_on_nothing_but_what_it_sees() {
    let k = Kernels::detect().unwrap();
    for_cases(4, 40, |case, queries, first, n, rng| {
        let all = case.attend(k, queries, first, first + n - 1);
        // More latents are there than anyone sees.
        assert_same(&case.attend(k, queries, first, first + n + rng.below(100)), &all, &"more keys");
        let at = rng.below(n);
        let alone = case.attend(k, &queries[at * case.key()..][..case.key()], first + at, first + at);
        assert_same(&alone, &all[at * case.value..][..case.value], &"alone");
    });
}

#[test]
fn what_is_not_finite_stays_with_those_who_see_it() {
    for_cases(5, 14, |case, queries, first, n, rng| {
        let at = rng.below(first + n - 1);
        let mut bad =
            Case { latents: case.latents.clone(), keys: case.keys.clone(), values: case.values.clone(), ..*case };
        bad.latents[at * (case.rank + case.rotated)] = if rng.below(2) == 0 { f32::NAN } else { f32::INFINITY };
        for k in Kernels::available() {
            let (good, bad) =
                (case.attend(k, queries, first, first + n - 1), bad.attend(k, queries, first, first + n - 1));
            for (i, (good, bad)) in good.chunks(case.value).zip(bad.chunks(case.value)).enumerate() {
                match first + i > at {
                    true => assert!(bad.iter().all(|v| !v.is_finite()), "{bad:?}"),
                    false => assert_same(bad, good, &k.isa_name()),
                }
            }
        }
    });
}

#[test]
fn it_is_attention() {
    let k = Kernels::detect().unwrap();
    for_cases(6, 30, |case, queries, first, n, _| {
        let rows: Vec<_> = (0..first + n - 1).map(|position| case.key_and_value(position)).collect();
        let (keys, values): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        let (keys, values) = (keys.concat(), values.concat());
        let mut tile = QueryTile::default();
        tile.begin(case.key(), case.value, SCALE);
        for (i, query) in queries.chunks(case.key()).enumerate() {
            tile.add(0..first + i, None).copy_from_slice(query);
        }
        for positions in key_blocks(tile.positions()) {
            let keys = KvRows::plain(&keys[positions.start * case.key()..], case.key());
            let values = KvRows::plain(&values[positions.start * case.value..], case.value);
            k.attend_block(&mut tile, &KeyBlock::new(positions, keys, values));
        }
        tile.finish();
        for (got, want) in case.attend(k, queries, first, first + n - 1).iter().zip(tile.results()) {
            assert!((got - want).abs() < 1e-5, "{got} instead of {want}");
        }
    });
}
