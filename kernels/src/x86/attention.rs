//! Attention over cached rows of every type, whatever the width of a vector.

/// The kernels `score` and `attend_block` for one instruction set, and `widen`, which turns the beginning of a row into f32 numbers.
///
/// It is a macro because functions take on the target features that they are written with, not those of their type parameters. The
/// module that uses it provides `WIDTH` (numbers of a vector), `VECS` (vectors of the lanes of one product), `ALONE` and `PAIRED`
/// (keys that are multiplied together with one query, and with two; both divide 4), `PAIRED_VECS` (how many of the `VECS` are
/// summed at once for two queries), `SHARED` (queries that share one load of values: 4 or 2), `COLUMNS` (columns of values that are
/// summed together for these; twice as many for one query), `load` and `store` of a vector, `fold` (the remaining steps of folding
/// the lanes of four products, once each is one vector), and `vectors` (the numbers of a row of any type).
macro_rules! attention {
    ($features:tt, $vector:ty, zero: $zero:ident, add: $add:ident, fmadd: $fmadd:ident, mul: $mul:ident, splat: $splat:ident) => {
        #[target_feature(enable = $features)]
        pub(super) fn attend_block(tile: &mut QueryTile, block: &KeyBlock<'_>) {
            scores_of(tile, block, block.has_values().then_some(&block.values));
            tile.weigh(block.place(0));
            match block.values.ty() {
                KvType::F32 => add_values::<F32>(tile, block),
                KvType::F16 => add_values::<F16>(tile, block),
                KvType::Bf16 => add_values::<BF16>(tile, block),
                KvType::Q8 => add_values::<Q8>(tile, block),
            }
        }

        #[target_feature(enable = $features)]
        pub(super) fn score(tile: &mut QueryTile, block: &KeyBlock<'_>) {
            scores_of(tile, block, None);
        }

        #[target_feature(enable = $features)]
        fn scores_of(tile: &mut QueryTile, block: &KeyBlock<'_>, wanted: Option<&KvRows<'_>>) {
            match block.keys.ty() {
                KvType::F32 => scores::<F32>(tile, block, wanted),
                KvType::F16 => scores::<F16>(tile, block, wanted),
                KvType::Bf16 => scores::<BF16>(tile, block, wanted),
                KvType::Q8 => scores::<Q8>(tile, block, wanted),
            }
        }

        /// Stores in `tile.scores` the products of all queries with the rows that they see, and of some queries with additional
        /// rows. Asks for the rows of `wanted` meanwhile, which are read afterwards.
        #[target_feature(enable = $features)]
        fn scores<const TY: u8>(tile: &mut QueryTile, block: &KeyBlock<'_>, wanted: Option<&KvRows<'_>>) {
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
                            let wanted = wanted.filter(|_| i == 0);
                            products::<TY, 2, PAIRED, PAIRED_VECS>([query(i), query(i + 1)], &block.keys, part, out, wanted);
                        }
                        (_, [one]) if key.is_multiple_of(DOT_LANES) => {
                            let wanted = wanted.filter(|_| i == 0);
                            products::<TY, 1, ALONE, VECS>([query(i)], &block.keys, here(parts[i]), [&mut one[place..]], wanted);
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

        /// Products of `Q` queries with the rows `part`, `T` rows at a time, for widths of whole lanes. `V`: vectors of a product
        /// that are summed at once. Asks for the same rows of `wanted`.
        #[inline]
        #[target_feature(enable = $features)]
        fn products<const TY: u8, const Q: usize, const T: usize, const V: usize>(
            queries: [&[f32]; Q],
            keys: &KvRows<'_>,
            part: Part,
            out: [&mut [f32]; Q],
            wanted: Option<&KvRows<'_>>,
        ) {
            let ty = const { kv_type(TY) };
            let mut row = part.from;
            while row + 4 <= part.to {
                if let Some(wanted) = wanted {
                    ahead::cached(wanted, row..row + 4);
                }
                let mut halves = [[$zero(); 4]; Q];
                for round in 0..4 / T {
                    let at = row + round * T;
                    let keys = each!(Row::NONE; T, t => keys.part(ty, at + t, 0, queries[0].len()));
                    let sums = several_dots::<TY, Q, T, V>(queries, keys);
                    for q in 0..Q {
                        for t in 0..T {
                            halves[q][round * T + t] = sums[q][t];
                        }
                    }
                }
                for q in 0..Q {
                    out[q][row..row + 4].copy_from_slice(&fold(halves[q]));
                }
                row += 4;
            }
            for row in row..part.to {
                let sums = several_dots::<TY, Q, 1, V>(queries, [keys.part(ty, row, 0, queries[0].len())]);
                for q in 0..Q {
                    out[q][row] = fold([sums[q][0], $zero(), $zero(), $zero()])[0];
                }
            }
        }

        /// The lanes of the products of `Q` queries with `T` rows, each folded down to one vector: `V` vectors of them at once, and
        /// the others afterwards if the registers do not hold all.
        #[inline]
        #[target_feature(enable = $features)]
        fn several_dots<const TY: u8, const Q: usize, const T: usize, const V: usize>(
            queries: [&[f32]; Q],
            keys: [Row<'_>; T],
        ) -> [[$vector; T]; Q] {
            let passes = const { VECS / V };
            let mut halves = [[$zero(); T]; Q];
            let whole = queries[0].len() / DOT_LANES;
            let queries = each!(&[][..]; Q, q => &queries[q].as_chunks::<DOT_LANES>().0[..whole]);
            for pass in 0..passes {
                let mut s = [[[$zero(); V]; T]; Q];
                for c in 0..whole {
                    for j in 0..V {
                        // Folding begins with vectors that lie half of all vectors apart: a pass has both.
                        let vec = pass + j * passes;
                        let query = each!($zero(); Q, q => load(&queries[q][c].as_chunks::<WIDTH>().0[vec]));
                        for t in 0..T {
                            let [key] = vectors::<TY, 1>(&keys[t], c * DOT_LANES + vec * WIDTH);
                            for q in 0..Q {
                                s[q][t][j] = $fmadd(query[q], key, s[q][t][j]);
                            }
                        }
                    }
                }
                for q in 0..Q {
                    for t in 0..T {
                        let half = halve(s[q][t]);
                        halves[q][t] = if pass == 0 { half } else { $add(halves[q][t], half) };
                    }
                }
            }
            halves
        }

        /// The first steps of folding the lanes of a product: vectors that lie half of all vectors apart, then the remaining ones.
        #[inline]
        #[target_feature(enable = $features)]
        fn halve<const V: usize>(s: [$vector; V]) -> $vector {
            if V == 2 { $add(s[0], s[1]) } else { $add($add(s[0], s[V / 2]), $add(s[1], s[1 + V / 2])) }
        }

        /// The product with a row of any length.
        #[target_feature(enable = $features)]
        fn odd_dot<const TY: u8>(a: &[f32], key: Row<'_>) -> f32 {
            let (chunks, rest) = a.as_chunks::<DOT_LANES>();
            let mut sums = [$zero(); VECS];
            for (c, a) in chunks.iter().enumerate() {
                let key = vectors::<TY, VECS>(&key, c * DOT_LANES);
                for j in 0..VECS {
                    sums[j] = $fmadd(load(&a.as_chunks::<WIDTH>().0[j]), key[j], sums[j]);
                }
            }
            let mut lanes = [0.0; DOT_LANES];
            for (lanes, sum) in lanes.as_chunks_mut::<WIDTH>().0.iter_mut().zip(sums) {
                store(lanes, sum);
            }
            let first = a.len() - rest.len();
            for (i, (lane, a)) in lanes.iter_mut().zip(rest).enumerate() {
                *lane = a.mul_add(key.value(const { kv_type(TY) }, first + i), *lane);
            }
            fold_lanes(lanes)
        }

        /// Adds the weighted values of a block to `tile.out`.
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
                // The processor does not know where the next block is, and its keys take as long to read as all columns to sum.
                if let Some(next) = &block.next {
                    let rows = |column: usize| block.len() * column / value;
                    ahead::cached(next, rows(at)..rows(at + taken));
                }
                for_groups::<TY>(tile, block, at, taken);
                at += taken;
            }
        }

        /// The columns `at..at + columns` of all queries; queries that see the same rows share the loads.
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

        /// `N` vectors of columns, from column `at` on, of `Q` queries from `first` on. Returns `Q`.
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
                let p = each!($zero(); Q, q => $splat(p[q][j]));
                // One vector of values at a time: more would force sums out of the registers.
                for i in 0..N {
                    let [values] = vectors::<TY, 1>(&row, WIDTH * i);
                    for q in 0..Q {
                        sums[q][i] = $fmadd(p[q], values, sums[q][i]);
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

        /// Fewer columns than a vector has, for one query. Returns 1.
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

        /// The first numbers of row `j`, as many as `out` has.
        #[target_feature(enable = $features)]
        pub(super) fn widen(rows: &KvRows<'_>, j: usize, out: &mut [f32]) {
            match rows.ty() {
                KvType::F32 => widen_from::<F32>(rows, j, out),
                KvType::F16 => widen_from::<F16>(rows, j, out),
                KvType::Bf16 => widen_from::<BF16>(rows, j, out),
                KvType::Q8 => widen_from::<Q8>(rows, j, out),
            }
        }

        #[target_feature(enable = $features)]
        fn widen_from<const TY: u8>(rows: &KvRows<'_>, j: usize, out: &mut [f32]) {
            let row = rows.row(j, out.len());
            let whole = out.len() / DOT_LANES * DOT_LANES;
            let (wide, rest) = out.split_at_mut(whole);
            for (c, out) in wide.as_chunks_mut::<DOT_LANES>().0.iter_mut().enumerate() {
                let numbers = vectors::<TY, { DOT_LANES / WIDTH }>(&row, c * DOT_LANES);
                for (out, numbers) in out.as_chunks_mut::<WIDTH>().0.iter_mut().zip(numbers) {
                    store(out, numbers);
                }
            }
            for (i, out) in rest.iter_mut().enumerate() {
                *out = row.value(const { kv_type(TY) }, whole + i);
            }
        }
    };
}
