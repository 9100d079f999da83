//! Attention over cached rows of every type, whatever the width of a vector.

/// The kernel `attend_block` for one instruction set.
///
/// A macro, since functions take on the target features that they are written with, not those of their type parameters. Who
/// calls it provides `WIDTH` (numbers of a vector), `VECS` (vectors of the lanes of one product), `ALONE` and `PAIRED` (keys that
/// are multiplied together with one query, and with two; both divide 4), `SHARED` (queries that values are loaded for once: 4 or
/// 2), `COLUMNS` (of values that are summed together for these; for one query twice as many), `load` and `store` of a vector,
/// `halve` (the first steps of folding the lanes of a product, down to one vector), `fold` (the others, for four products
/// at once), and `vectors` (the numbers of a row of any type).
macro_rules! attention {
    ($features:tt, $vector:ty, zero: $zero:ident, fmadd: $fmadd:ident, mul: $mul:ident, splat: $splat:ident) => {
        #[target_feature(enable = $features)]
        pub(super) fn attend_block(tile: &mut QueryTile, block: &KeyBlock<'_>) {
            let n = tile.len();
            if tile.scores.len() < n {
                tile.scores.resize(n, [0.0; KEY_BLOCK]);
            }
            tile.factors.resize(n, [0.0; 2]);
            match block.keys.ty() {
                KvType::F32 => scores::<F32>(tile, block),
                KvType::F16 => scores::<F16>(tile, block),
                KvType::Bf16 => scores::<BF16>(tile, block),
                KvType::Q8 => scores::<Q8>(tile, block),
            }
            tile.weigh(block.place(0));
            match block.values.ty() {
                KvType::F32 => add_values::<F32>(tile, block),
                KvType::F16 => add_values::<F16>(tile, block),
                KvType::Bf16 => add_values::<BF16>(tile, block),
                KvType::Q8 => add_values::<Q8>(tile, block),
            }
        }

        /// Leaves in `tile.scores` the products of all queries with the rows that they see, and of some with more.
        #[target_feature(enable = $features)]
        fn scores<const TY: u8>(tile: &mut QueryTile, block: &KeyBlock<'_>) {
            let QueryTile { key, queries, parts, scores, .. } = tile;
            let (key, n) = (*key, parts.len());
            let query = |i: usize| &queries[i * key..][..key];
            let (place, portion) = (block.place(0), near_rows(key, n));
            for first in (0..block.len()).step_by(portion) {
                let here = |part: Part| Part { from: part.from.max(first), to: part.to.min(first + portion) };
                let mut i = 0;
                while i < n {
                    let together = if n - i > 1 && key.is_multiple_of(DOT_LANES) { 2 } else { 1 };
                    match (together, &mut scores[i..][..together]) {
                        (2, [one, other]) => {
                            let part = here(parts[i]).or(here(parts[i + 1]));
                            let out = [&mut one[place..], &mut other[place..]];
                            products::<TY, 2, PAIRED>([query(i), query(i + 1)], &block.keys, part, out);
                        }
                        (_, [one]) if key.is_multiple_of(DOT_LANES) => {
                            products::<TY, 1, ALONE>([query(i)], &block.keys, here(parts[i]), [&mut one[place..]]);
                        }
                        (_, one) => {
                            for row in here(parts[i]).rows() {
                                let keys = block.keys.part(const { kv_type(TY) }, row, 0, key);
                                one[0][place + row] = odd_dot::<TY>(query(i), keys);
                            }
                        }
                    }
                    i += together;
                }
            }
        }

        /// Products of `Q` queries with the rows `part`, `T` rows at a time, for widths of whole lanes.
        #[inline]
        #[target_feature(enable = $features)]
        fn products<const TY: u8, const Q: usize, const T: usize>(
            queries: [&[f32]; Q],
            keys: &KvRows<'_>,
            part: Part,
            out: [&mut [f32]; Q],
        ) {
            let ty = const { kv_type(TY) };
            let mut row = part.from;
            while row + 4 <= part.to {
                let mut halves = [[$zero(); 4]; Q];
                for round in 0..4 / T {
                    let at = row + round * T;
                    let keys = each!(Row::NONE; T, t => keys.part(ty, at + t, 0, queries[0].len()));
                    let sums = several_dots::<TY, Q, T>(queries, keys);
                    for q in 0..Q {
                        for t in 0..T {
                            halves[q][round * T + t] = halve(sums[q][t]);
                        }
                    }
                }
                for q in 0..Q {
                    out[q][row..row + 4].copy_from_slice(&fold(halves[q]));
                }
                row += 4;
            }
            for row in row..part.to {
                let sums = several_dots::<TY, Q, 1>(queries, [keys.part(ty, row, 0, queries[0].len())]);
                for q in 0..Q {
                    out[q][row] = fold([halve(sums[q][0]), $zero(), $zero(), $zero()])[0];
                }
            }
        }

        /// The lanes of the products of `Q` queries with `T` rows, without what is behind the last whole lanes.
        #[inline]
        #[target_feature(enable = $features)]
        fn several_dots<const TY: u8, const Q: usize, const T: usize>(
            queries: [&[f32]; Q],
            keys: [Row<'_>; T],
        ) -> [[[$vector; VECS]; T]; Q] {
            let mut s = [[[$zero(); VECS]; T]; Q];
            let whole = queries[0].len() / DOT_LANES;
            let queries = each!(&[][..]; Q, q => &queries[q].as_chunks::<DOT_LANES>().0[..whole]);
            for c in 0..whole {
                for t in 0..T {
                    let key = vectors::<TY, VECS>(&keys[t], c * DOT_LANES);
                    for q in 0..Q {
                        let query = queries[q][c].as_chunks::<WIDTH>().0;
                        for j in 0..VECS {
                            s[q][t][j] = $fmadd(load(&query[j]), key[j], s[q][t][j]);
                        }
                    }
                }
            }
            s
        }

        /// The product with a row of any length.
        #[target_feature(enable = $features)]
        fn odd_dot<const TY: u8>(a: &[f32], key: Row<'_>) -> f32 {
            let [[sums]] = several_dots::<TY, 1, 1>([a], [key]);
            let mut lanes = [0.0; DOT_LANES];
            for (lanes, sum) in lanes.as_chunks_mut::<WIDTH>().0.iter_mut().zip(sums) {
                store(lanes, sum);
            }
            let rest = a.as_chunks::<DOT_LANES>().1;
            let first = a.len() - rest.len();
            for (i, (lane, a)) in lanes.iter_mut().zip(rest).enumerate() {
                *lane = a.mul_add(key.value(const { kv_type(TY) }, first + i), *lane);
            }
            fold_lanes(lanes)
        }

        /// Takes the weighted values of a block into `tile.out`.
        #[target_feature(enable = $features)]
        fn add_values<const TY: u8>(tile: &mut QueryTile, block: &KeyBlock<'_>) {
            let value = tile.value;
            let wide = if tile.len() == 1 { 2 * COLUMNS } else { COLUMNS };
            let mut at = 0;
            while at < value {
                let left = value - at;
                let taken = if left >= wide {
                    wide
                } else if left >= COLUMNS {
                    COLUMNS
                } else {
                    left.min(WIDTH)
                };
                for_groups::<TY>(tile, block, at, taken);
                at += taken;
            }
        }

        /// The columns `at..at + columns` of all queries; those that see the same rows share the loads.
        #[target_feature(enable = $features)]
        fn for_groups<const TY: u8>(tile: &mut QueryTile, block: &KeyBlock<'_>, at: usize, columns: usize) {
            let n = tile.len();
            let mut i = 0;
            while i < n {
                let part = tile.parts[i];
                if part.is_empty() {
                    i += 1;
                    continue;
                }
                let most = if columns < WIDTH { 1 } else { SHARED.min(n - i) };
                let alike = 1 + tile.parts[i + 1..i + most].iter().take_while(|other| **other == part).count();
                i += match (alike, columns) {
                    (_, c) if c < WIDTH => odd_columns::<TY>(tile, block, i, at, columns),
                    (4.., COLUMNS) => weighted::<TY, 4, { COLUMNS / WIDTH }>(tile, block, i, at),
                    (2.., COLUMNS) => weighted::<TY, 2, { COLUMNS / WIDTH }>(tile, block, i, at),
                    (_, COLUMNS) => weighted::<TY, 1, { COLUMNS / WIDTH }>(tile, block, i, at),
                    (2.., WIDTH) => weighted::<TY, 2, 1>(tile, block, i, at),
                    (_, WIDTH) => weighted::<TY, 1, 1>(tile, block, i, at),
                    _ => weighted::<TY, 1, { 2 * COLUMNS / WIDTH }>(tile, block, i, at),
                };
            }
        }

        /// `N` vectors of columns from `at` on of `Q` queries from `first` on. Returns `Q`.
        #[target_feature(enable = $features)]
        fn weighted<const TY: u8, const Q: usize, const N: usize>(
            tile: &mut QueryTile,
            block: &KeyBlock<'_>,
            first: usize,
            at: usize,
        ) -> usize {
            let part = tile.parts[first];
            let places = block.place(part.from)..block.place(part.to);
            let p = each!(&[][..]; Q, q => &tile.scores[first + q][places.clone()]);
            let mut sums = [[$zero(); N]; Q];
            for j in 0..places.len() {
                let row = block.values.part(const { kv_type(TY) }, part.from + j, at, WIDTH * N);
                let values = vectors::<TY, N>(&row, 0);
                for q in 0..Q {
                    let p = $splat(p[q][j]);
                    for i in 0..N {
                        sums[q][i] = $fmadd(p, values[i], sums[q][i]);
                    }
                }
            }
            for q in 0..Q {
                let [alpha, beta] = tile.factors[first + q];
                let (alpha, beta) = ($splat(alpha), $splat(beta));
                let out = &mut tile.out[(first + q) * tile.value + at..][..WIDTH * N].as_chunks_mut::<WIDTH>().0[..N];
                for i in 0..N {
                    let sum = $fmadd(load(&out[i]), alpha, $mul(sums[q][i], beta));
                    store(&mut out[i], sum);
                }
            }
            Q
        }

        /// Fewer columns than a vector has, of one query. Returns 1.
        #[target_feature(enable = $features)]
        fn odd_columns<const TY: u8>(
            tile: &mut QueryTile,
            block: &KeyBlock<'_>,
            i: usize,
            at: usize,
            columns: usize,
        ) -> usize {
            let ty = const { kv_type(TY) };
            let [alpha, beta] = tile.factors[i];
            for column in at..at + columns {
                let mut sum = 0.0;
                for row in tile.parts[i].rows() {
                    let value = block.values.part(ty, row, column, 1).value(ty, 0);
                    sum = tile.scores[i][block.place(row)].mul_add(value, sum);
                }
                let out = &mut tile.out[i * tile.value + column];
                *out = out.mul_add(alpha, sum * beta);
            }
            1
        }
    };
}
