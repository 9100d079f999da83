//! Attention: its definition, and the same bits however its work is split.

use crate::common::*;
use sluice_kernels::*;
use std::ops::Range;

/// A query: what it sees, its sink and its numbers.
#[derive(Clone, Debug)]
struct Query {
    sees: Range<usize>,
    sink: Option<f32>,
    numbers: Vec<f32>,
}

/// Keys and values, by position.
struct Cached {
    keys: KvBuffer,
    /// `None`: the first numbers of the keys.
    values: Option<KvBuffer>,
    key: usize,
    value: usize,
}

impl Cached {
    fn random(ty: KvType, positions: usize, key: usize, value: usize, rng: &mut Rng) -> Self {
        let mut filled = |width: usize| {
            let mut buffer = KvBuffer::new(ty, positions, width);
            (0..positions).for_each(|row| buffer.set(row, &rng.vec(width)));
            buffer
        };
        let latent = value <= key && key.is_multiple_of(3);
        Cached { keys: filled(key), values: (!latent).then(|| filled(value)), key, value }
    }

    fn block(&self, positions: Range<usize>) -> KeyBlock<'_> {
        let keys = self.keys.rows(positions.clone());
        let values = self.values.as_ref().map_or(keys, |values| values.rows(positions.clone()));
        KeyBlock::new(positions, keys, values).before(Some(values))
    }

    /// The numbers of the key and the value at a position.
    fn numbers(&self, position: usize) -> (Vec<f32>, Vec<f32>) {
        let block = |buffer: &KvBuffer, width: usize| {
            let mut numbers = vec![0.0; width];
            buffer.rows(position..position + 1).read(0, &mut numbers);
            numbers
        };
        (block(&self.keys, self.key), block(self.values.as_ref().unwrap_or(&self.keys), self.value))
    }
}

const SCALE: f32 = 0.37;

/// The results of `queries` as one tile, `[n, value]`.
fn attend(k: Kernels, queries: &[Query], cached: &Cached) -> Vec<f32> {
    let mut tile = QueryTile::default();
    attend_in(&mut tile, k, queries, cached);
    tile.results().to_vec()
}

fn attend_in(tile: &mut QueryTile, k: Kernels, queries: &[Query], cached: &Cached) {
    tile.begin(cached.key, cached.value, SCALE);
    for query in queries {
        tile.add(query.sees.clone(), query.sink).copy_from_slice(&query.numbers);
    }
    for positions in key_blocks(tile.positions()) {
        k.attend_block(tile, &cached.block(positions));
    }
    tile.finish();
}

/// The definition, written a second time: one query, in plain numbers, without tiles.
fn defined(query: &Query, cached: &Cached) -> Vec<f32> {
    let or_zero = |m: f32| if m == f32::NEG_INFINITY { 0.0 } else { m };
    let (mut m, mut l, mut o) = (f32::NEG_INFINITY, 0.0f32, vec![0.0f32; cached.value]);
    for positions in key_blocks(query.sees.clone()) {
        let rows: Vec<_> = positions.clone().map(|j| cached.numbers(j)).collect();
        let scores: Vec<f32> = rows.iter().map(|(key, _)| Kernels::scalar().dot(&query.numbers, key) * SCALE).collect();
        let m_b = scores.iter().copied().filter(|s| !s.is_nan()).fold(f32::NEG_INFINITY, f32::max);
        let p: Vec<f32> = scores.iter().map(|s| exp(s - or_zero(m_b))).collect();
        let mut lanes = [0.0f32; 16];
        positions.zip(&p).for_each(|(j, p)| lanes[j % 16] += p);
        for half in [8, 4, 2, 1] {
            (0..half).for_each(|i| lanes[i] += lanes[i + half]);
        }
        let largest = m.max(m_b);
        let (alpha, beta) = (exp(m - or_zero(largest)), exp(m_b - or_zero(largest)));
        (m, l) = (largest, l.mul_add(alpha, lanes[0] * beta));
        for (i, o) in o.iter_mut().enumerate() {
            let o_b = rows.iter().zip(&p).fold(0.0f32, |sum, ((_, value), p)| p.mul_add(value[i], sum));
            *o = o.mul_add(alpha, o_b * beta);
        }
    }
    if let Some(sink) = query.sink {
        let largest = m.max(sink);
        let alpha = exp(m - or_zero(largest));
        l = l.mul_add(alpha, exp(sink - or_zero(largest)));
        o.iter_mut().for_each(|o| *o *= alpha);
    } else if query.sees.is_empty() {
        return o;
    }
    o.iter().map(|o| o / l).collect()
}

/// The positions that a query at `position` may see: all, a window, or (rarely) none.
fn sees(position: usize, window: Option<usize>, rng: &mut Rng) -> Range<usize> {
    let end = if rng.below(20) == 0 { 0 } else { position + 1 };
    window.map_or(0, |window| end.saturating_sub(window))..end
}

/// Tiles of random size, width, type and window over random keys.
fn for_tiles(seed: u64, cases: usize, mut f: impl FnMut(&[Query], &Cached, &str, &mut Rng)) {
    let mut rng = Rng(seed);
    let widths = [1, 5, 16, 31, 32, 33, 64, 80, 96, 128, 130, 192, 576];
    for case in 0..cases {
        let ty = KvType::ALL[case % KvType::ALL.len()];
        let (key, value) = (widths[rng.below(widths.len())], [1, 8, 17, 32, 64, 96, 128, 200, 512][rng.below(9)]);
        let most = [10, 64, 65, 200, 400][rng.below(5)];
        let positions = 1 + rng.below(most);
        let cached = Cached::random(ty, positions, key, value, &mut rng);
        let window = (rng.below(2) == 0).then(|| 1 + rng.below(150));
        // Some have so many queries that these are put into panels.
        let (heads, rows) = if rng.below(4) == 0 {
            (1 + rng.below(17), 1 + rng.below(9))
        } else {
            (1 + rng.below(5), 1 + rng.below(4))
        };
        let rows = rows.min(positions);
        let first = rng.below(positions - rows + 1);
        let mut queries = Vec::new();
        for position in first..first + rows {
            let sees = sees(position, window, &mut rng);
            for _ in 0..heads {
                let sink = (rng.below(3) == 0).then(|| 4.0 * rng.f32());
                queries.push(Query { sees: sees.clone(), sink, numbers: rng.vec(key) });
            }
        }
        let what =
            format!("case {case}: {ty}, {key}/{value} wide, {rows} rows from {first}, {heads} heads, {window:?}");
        f(&queries, &cached, &what, &mut rng);
    }
}

#[test]
fn every_isa_follows_the_definition() {
    for_tiles(6, 400, |queries, cached, what, _| {
        let want: Vec<f32> = queries.iter().flat_map(|query| defined(query, cached)).collect();
        for k in Kernels::available() {
            assert_same(&attend(k, queries, cached), &want, &format!("{} {what}", k.isa_name()));
        }
    });
}

#[test]
fn results_are_those_of_a_softmax_over_all_keys() {
    for_tiles(7, 60, |queries, cached, what, _| {
        for (query, got) in queries.iter().zip(attend(Kernels::scalar(), queries, cached).chunks(cached.value)) {
            let rows: Vec<_> = query.sees.clone().map(|j| cached.numbers(j)).collect();
            let score = |key: &[f32]| -> f64 {
                key.iter().zip(&query.numbers).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>()
                    * f64::from(SCALE)
            };
            let weights: Vec<f64> = rows.iter().map(|(key, _)| score(key).exp()).collect();
            let sum = weights.iter().sum::<f64>() + query.sink.map_or(0.0, |sink| f64::from(sink).exp());
            for (i, got) in got.iter().enumerate() {
                let want: f64 = rows.iter().zip(&weights).map(|((_, v), p)| p * f64::from(v[i])).sum();
                let want = if query.sees.is_empty() { 0.0 } else { want / sum };
                assert!((f64::from(*got) - want).abs() < 2e-6, "{what}: {got}, not {want}");
            }
        }
    });
}

#[test]
fn scores_are_products_by_place() {
    for_tiles(12, 60, |queries, cached, what, _| {
        for k in Kernels::available() {
            let mut tile = QueryTile::default();
            tile.begin(cached.key, 0, 1.0);
            for query in queries {
                tile.add(query.sees.clone(), None).copy_from_slice(&query.numbers);
            }
            for positions in key_blocks(tile.positions()) {
                let scores = k.score_block(&mut tile, &cached.block(positions.clone()));
                for (query, scores) in queries.iter().zip(scores) {
                    for j in positions.clone().filter(|j| query.sees.contains(j)) {
                        let want = Kernels::scalar().dot(&query.numbers, &cached.numbers(j).0);
                        assert_same(&[scores[j % KEY_BLOCK]], &[want], &format!("{} {what}", k.isa_name()));
                    }
                }
            }
        }
    });
}

#[test]
fn a_query_has_its_result_in_any_company() {
    let mut tile = QueryTile::default();
    for_tiles(8, 200, |queries, cached, what, rng| {
        for k in Kernels::available() {
            let together = attend(k, queries, cached);
            let (mut split, mut left) = (Vec::new(), queries);
            while !left.is_empty() {
                let (part, rest) = left.split_at(1 + rng.below(left.len()));
                attend_in(&mut tile, k, part, cached);
                split.extend_from_slice(tile.results());
                left = rest;
            }
            assert_same(&split, &together, &format!("{} {what}", k.isa_name()));
            let backwards: Vec<Query> = queries.iter().rev().cloned().collect();
            let backwards: Vec<f32> =
                attend(k, &backwards, cached).chunks(cached.value).rev().flatten().copied().collect();
            assert_same(&backwards, &together, &format!("{} {what}, backwards", k.isa_name()));
        }
    });
}

#[test]
fn a_cache_of_any_type_counts_as_the_numbers_in_it() {
    for_tiles(9, 100, |queries, cached, what, _| {
        let positions = queries.iter().map(|query| query.sees.end).max().unwrap_or(0);
        let mut keys = KvBuffer::new(KvType::F32, positions, cached.key);
        let mut values = KvBuffer::new(KvType::F32, positions, cached.value);
        for row in 0..positions {
            let (key, value) = cached.numbers(row);
            keys.set(row, &key);
            values.set(row, &value);
        }
        let plain = Cached { keys, values: Some(values), ..*cached };
        for k in Kernels::available() {
            assert_same(&attend(k, queries, cached), &attend(k, queries, &plain), &format!("{} {what}", k.isa_name()));
        }
    });
}

#[test]
fn chosen_keys_count_by_their_place_in_the_list() {
    let mut rng = Rng(10);
    for ty in KvType::ALL {
        for positions in [1, 40, 300] {
            let cached = Cached::random(ty, positions, 96, 64, &mut rng);
            let chosen: Vec<usize> = (0..positions).filter(|_| rng.below(3) > 0).collect();
            // The same as if only the chosen rows had ever existed.
            let mut gathered = Cached::random(ty, chosen.len(), 96, 64, &mut rng);
            for (to, &from) in chosen.iter().enumerate() {
                let row = from..from + 1;
                gathered.keys.copy_row(to, &cached.keys.rows(row.clone()), 0);
                if let (Some(to_values), Some(values)) = (&mut gathered.values, &cached.values) {
                    to_values.copy_row(to, &values.rows(row), 0);
                }
            }
            let query = Query { sees: 0..chosen.len(), sink: None, numbers: rng.vec(96) };
            let want = defined(&query, &gathered);
            for (to, &from) in chosen.iter().enumerate() {
                assert_eq!(gathered.numbers(to), cached.numbers(from));
            }
            for k in Kernels::available() {
                // Block by block through a buffer of one block, as a layer does.
                let mut block = Cached::random(ty, KEY_BLOCK, 96, 64, &mut rng);
                let mut tile = QueryTile::default();
                tile.begin(96, 64, SCALE);
                tile.add(query.sees.clone(), None).copy_from_slice(&query.numbers);
                for places in key_blocks(query.sees.clone()) {
                    for (to, &from) in chosen[places.clone()].iter().enumerate() {
                        block.keys.copy_row(to, &cached.keys.rows(0..positions), from);
                        if let (Some(to_values), Some(values)) = (&mut block.values, &cached.values) {
                            to_values.copy_row(to, &values.rows(0..positions), from);
                        }
                    }
                    let keys = block.keys.rows(0..places.len());
                    let values = block.values.as_ref().map_or(keys, |values| values.rows(0..places.len()));
                    k.attend_block(&mut tile, &KeyBlock::new(places, keys, values));
                }
                tile.finish();
                assert_same(tile.results(), &want, &format!("{} {ty}, {} of {positions}", k.isa_name(), chosen.len()));
            }
        }
    }
}

#[test]
fn arbitrary_bytes_give_the_same_bits() {
    let mut rng = Rng(11);
    for ty in [KvType::F16, KvType::Bf16, KvType::Q8] {
        for width in [32, 33, 96, 131] {
            let (values, scales) = packed_row(ty, width);
            let (values, scales) = (rng.bytes(KEY_BLOCK * values), rng.bytes(KEY_BLOCK * scales));
            let rows = KvRows::packed(ty, width, &values, &scales);
            let queries: Vec<Vec<f32>> = (0..31).map(|_| rng.vec(width)).collect();
            let results = |k: Kernels, queries: &[Vec<f32>]| {
                let mut tile = QueryTile::default();
                tile.begin(width, width, 0.1);
                for (i, query) in queries.iter().enumerate() {
                    tile.add(0..[3, 3, 64, 64, 17][i % 5], None).copy_from_slice(query);
                }
                k.attend_block(&mut tile, &KeyBlock::new(0..KEY_BLOCK, rows, rows));
                tile.finish();
                tile.results().to_vec()
            };
            for queries in [&queries[..5], &queries] {
                let want = results(Kernels::scalar(), queries);
                for k in Kernels::available() {
                    let what = format!("{} {ty} {width}, {} queries", k.isa_name(), queries.len());
                    assert_same(&results(k, queries), &want, &what);
                }
            }
        }
    }
}

/// One query over `scores.len()` keys that have these scores; the values count from 1.
fn with_scores(k: Kernels, scores: &[f32], values: impl Fn(usize) -> f32, sink: Option<f32>) -> [f32; 2] {
    let (mut keys, mut rows) = (vec![0.0; scores.len() * 32], vec![0.0; scores.len() * 2]);
    for (j, &score) in scores.iter().enumerate() {
        keys[j * 32] = score;
        rows[2 * j..][..2].copy_from_slice(&[values(j), 1.0]);
    }
    let mut tile = QueryTile::default();
    tile.begin(32, 2, 1.0);
    tile.add(0..scores.len(), sink)[0] = 1.0;
    for positions in key_blocks(0..scores.len()) {
        let (keys, values) = (&keys[positions.start * 32..], &rows[positions.start * 2..]);
        k.attend_block(&mut tile, &KeyBlock::new(positions, KvRows::plain(keys, 32), KvRows::plain(values, 2)));
    }
    tile.finish();
    [tile.results()[0], tile.results()[1]]
}

#[test]
fn numbers_that_are_not_finite_are_seen_or_count_nothing() {
    let (none, nan) = (f32::NEG_INFINITY, f32::NAN);
    let value = |j: usize| j as f32;
    for k in Kernels::available() {
        for n in [1, 63, 64, 65, 200] {
            for at in [0, n / 2, n - 1] {
                let with = |odd: f32| {
                    let mut scores = vec![0.0; n];
                    scores[at] = odd;
                    scores
                };
                // A NaN in a key makes everything NaN.
                assert!(
                    with_scores(k, &with(nan), value, None).iter().all(|v| v.is_nan()),
                    "{} {n} {at}",
                    k.isa_name()
                );
                assert!(with_scores(k, &with(f32::INFINITY), value, None).iter().all(|v| v.is_nan()));
                // A NaN in a value makes its column NaN, however small its weight.
                let mut scores = vec![0.0; n];
                scores[at] = -1e30;
                if n > 1 {
                    let [odd, even] = with_scores(k, &scores, |j| if j == at { nan } else { 1.0 }, None);
                    assert!(odd.is_nan() && even == 1.0, "{} {n} {at}: {odd} {even}", k.isa_name());
                    // A score of −∞ has no weight, even if it is alone in its block.
                    let [odd, even] = with_scores(k, &with(none), |j| if j == at { 7.0 } else { 2.0 }, None);
                    assert!(odd == 2.0 && even == 1.0, "{} {n} {at}: {odd} {even}", k.isa_name());
                }
            }
            assert!(with_scores(k, &vec![none; n], value, None).iter().all(|v| v.is_nan()));
            assert_eq!(with_scores(k, &vec![none; n], value, Some(0.0)), [0.0; 2]);
            assert!(with_scores(k, &vec![0.0; n], value, Some(nan)).iter().all(|v| v.is_nan()));
        }
        assert_eq!(with_scores(k, &[], value, None), [0.0; 2]);
        assert_eq!(with_scores(k, &[], value, Some(1.0)), [0.0; 2]);
        // Blocks may rise and fall by more than an exponent holds.
        let rising: Vec<f32> = (0..300).map(|j| (j / 64) as f32 * 300.0).collect();
        assert_eq!(with_scores(k, &rising, |j| (j / 64) as f32, None), [4.0, 1.0]);
        let falling: Vec<f32> = rising.iter().rev().copied().collect();
        assert_eq!(with_scores(k, &falling, |j| ((299 - j) / 64) as f32, None), [4.0, 1.0]);
    }
}

#[test]
fn blocks_are_cut_at_multiples() {
    let blocks = |positions| key_blocks(positions).map(|block| (block.start, block.end)).collect::<Vec<_>>();
    assert_eq!(blocks(0..0), []);
    assert_eq!(blocks(70..70), []);
    assert_eq!(blocks(0..64), [(0, 64)]);
    assert_eq!(blocks(3..130), [(3, 64), (64, 128), (128, 130)]);
    assert_eq!(blocks(64..65), [(64, 65)]);
}

#[test]
#[should_panic(expected = "blocks are met in ascending order")]
fn a_block_is_met_once() {
    let numbers = [0.0; KEY_BLOCK];
    let rows = KvRows::plain(&numbers, 1);
    let mut tile = QueryTile::default();
    tile.begin(1, 1, 1.0);
    tile.add(0..64, None);
    for _ in 0..2 {
        Kernels::scalar().attend_block(&mut tile, &KeyBlock::new(0..64, rows, rows));
    }
}

#[test]
#[should_panic(expected = "is seen, and")]
fn a_block_is_met_as_a_whole() {
    let numbers = [0.0; KEY_BLOCK];
    let rows = KvRows::plain(&numbers, 1);
    let mut tile = QueryTile::default();
    tile.begin(1, 1, 1.0);
    tile.add(0..64, None);
    Kernels::scalar().attend_block(&mut tile, &KeyBlock::new(0..30, rows, rows));
}
