//! Attention over cached rows of every type, whatever the width of a vector.

/// The kernels `dots` and `add_weighted` for one instruction set.
///
/// A macro, since functions take on the target features that they are written with, not those of their type parameters. Who
/// calls it provides `WIDTH` (numbers of a vector), `VECS` (vectors of the lanes of one product), `TOGETHER` (keys that are
/// multiplied together), `COLUMNS` (of values that are summed together), `load` and `store` of a vector, `fold_sums` (the lanes
/// of a product, folded in halves), and `vectors` (the numbers of a row of any type).
macro_rules! attention {
    ($features:tt, $vector:ty, zero: $zero:ident, fmadd: $fmadd:ident, splat: $splat:ident) => {
        #[target_feature(enable = $features)]
        pub(super) fn dots(a: &[f32], rows: &KvRows<'_>, out: &mut [f32]) {
            match rows.ty() {
                KvType::F32 => dots_of::<F32>(a, rows, out),
                KvType::F16 => dots_of::<F16>(a, rows, out),
                KvType::Bf16 => dots_of::<BF16>(a, rows, out),
                KvType::Q8 => dots_of::<Q8>(a, rows, out),
            }
        }

        #[target_feature(enable = $features)]
        pub(super) fn add_weighted(p: &[f32], rows: &KvRows<'_>, out: &mut [f32]) {
            match rows.ty() {
                KvType::F32 => add_weighted_of::<F32>(p, rows, out),
                KvType::F16 => add_weighted_of::<F16>(p, rows, out),
                KvType::Bf16 => add_weighted_of::<BF16>(p, rows, out),
                KvType::Q8 => add_weighted_of::<Q8>(p, rows, out),
            }
        }

        #[target_feature(enable = $features)]
        fn dots_of<const TY: u8>(a: &[f32], rows: &KvRows<'_>, out: &mut [f32]) {
            let ty = const { kv_type(TY) };
            if !a.len().is_multiple_of(DOT_LANES) {
                for (j, out) in out.iter_mut().enumerate() {
                    *out = odd_dot::<TY>(a, rows.part(ty, j, 0, a.len()));
                }
                return;
            }
            let (several, rest) = out.as_chunks_mut::<TOGETHER>();
            let first_of_rest = TOGETHER * several.len();
            for (i, out) in several.iter_mut().enumerate() {
                let keys = each!(Row::NONE; TOGETHER, t => rows.part(ty, TOGETHER * i + t, 0, a.len()));
                let sums = several_dots::<TY, TOGETHER>(a, keys);
                *out = each!(0.0; TOGETHER, t => fold_sums(sums[t]));
            }
            for (j, out) in rest.iter_mut().enumerate() {
                let [sums] = several_dots::<TY, 1>(a, [rows.part(ty, first_of_rest + j, 0, a.len())]);
                *out = fold_sums(sums);
            }
        }

        /// The lanes of the products with several rows, without what is behind the last whole lanes: `a` is loaded once for all.
        #[inline]
        #[target_feature(enable = $features)]
        fn several_dots<const TY: u8, const T: usize>(a: &[f32], keys: [Row<'_>; T]) -> [[$vector; VECS]; T] {
            let mut s = [[$zero(); VECS]; T];
            for (c, a) in a.as_chunks::<DOT_LANES>().0.iter().enumerate() {
                let a = a.as_chunks::<WIDTH>().0;
                for t in 0..T {
                    let key = vectors::<TY, VECS>(&keys[t], c * DOT_LANES);
                    for j in 0..VECS {
                        s[t][j] = $fmadd(load(&a[j]), key[j], s[t][j]);
                    }
                }
            }
            s
        }

        /// The product with a row of any length.
        #[target_feature(enable = $features)]
        fn odd_dot<const TY: u8>(a: &[f32], key: Row<'_>) -> f32 {
            let [sums] = several_dots::<TY, 1>(a, [key]);
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

        #[target_feature(enable = $features)]
        fn add_weighted_of<const TY: u8>(p: &[f32], rows: &KvRows<'_>, out: &mut [f32]) {
            let mut at = 0;
            let (wide, rest) = out.as_chunks_mut::<COLUMNS>();
            for out in wide {
                weighted_columns::<TY, { COLUMNS / WIDTH }>(p, rows, at, out);
                at += COLUMNS;
            }
            let (narrow, rest) = rest.as_chunks_mut::<WIDTH>();
            for out in narrow {
                weighted_columns::<TY, 1>(p, rows, at, out);
                at += WIDTH;
            }
            for (i, out) in rest.iter_mut().enumerate() {
                for (j, &p) in p.iter().enumerate() {
                    *out = p.mul_add(rows.part(const { kv_type(TY) }, j, at + i, 1).value(const { kv_type(TY) }, 0), *out);
                }
            }
        }

        /// `N` vectors of columns from `at` on, whose sums stay in registers.
        #[inline]
        #[target_feature(enable = $features)]
        fn weighted_columns<const TY: u8, const N: usize>(p: &[f32], rows: &KvRows<'_>, at: usize, out: &mut [f32]) {
            let out = &mut out.as_chunks_mut::<WIDTH>().0[..N];
            let mut sums = each!($zero(); N, i => load(&out[i]));
            for (j, &p) in p.iter().enumerate() {
                let values = vectors::<TY, N>(&rows.part(const { kv_type(TY) }, j, at, WIDTH * N), 0);
                let p = $splat(p);
                for i in 0..N {
                    sums[i] = $fmadd(p, values[i], sums[i]);
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                store(out, sum);
            }
        }
    };
}
