//! Attention of one query over cached keys and values.

use crate::elementwise::softmax;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::isa::Isa;
use crate::isa::Kernels;
use crate::kv::{KvRows, KvType};
use crate::scalar;

/// Bytes of rows, taken as f32, that all queries meet before the next ones: they have to stay in a near cache.
const ROWS_BYTES: usize = 32 << 10;

impl Kernels {
    /// `out = Σⱼ softmaxⱼ(scale · q·kⱼ) vⱼ` over the first `s` rows of `keys` and `values`, on the calling thread.
    ///
    /// `q` is as long as a key, `out` as long as a value; rows may be longer, and both may be the same, as with latent
    /// attention. A `sink` is one more logit, already scaled, that takes its part of the softmax and has no value (gpt-oss).
    /// `scores` is scratch. Products are [`dot`](Self::dot), sums over positions run in order of `j`, one fused multiply-add
    /// each. The result is, bit for bit, that of plain rows with the same numbers. With `s = 0` the output is zero.
    ///
    /// # Panics
    /// If `keys` or `values` end before row `s`, or `scores` is shorter than `s`, or than `s + 1` with a sink.
    #[expect(clippy::too_many_arguments, reason = "two sets of rows, a query, and where to put the result")]
    pub fn attend(
        &self,
        q: &[f32],
        keys: KvRows<'_>,
        values: KvRows<'_>,
        s: usize,
        scale: f32,
        sink: Option<f32>,
        scores: &mut [f32],
        out: &mut [f32],
    ) {
        self.attend_together(q, 1, keys, values, s, scale, sink.as_slice(), scores, out);
    }

    /// [`attend`](Self::attend) of several `queries`, `[n, key]`, over the same rows: the same bits, but the rows come from
    /// memory once. `sinks`: none, or one per query; `scores` has room for those of all queries; `out` is `[n, value]`.
    ///
    /// # Panics
    /// As [`attend`](Self::attend), or if `queries` or `out` are not `n` of equal length, or `n` is 0.
    #[expect(clippy::too_many_arguments, reason = "two sets of rows, queries, and where to put the result")]
    pub fn attend_together(
        &self,
        queries: &[f32],
        n: usize,
        keys: KvRows<'_>,
        values: KvRows<'_>,
        s: usize,
        scale: f32,
        sinks: &[f32],
        scores: &mut [f32],
        out: &mut [f32],
    ) {
        assert!(sinks.is_empty() || sinks.len() == n, "{} sinks for {n} queries", sinks.len());
        assert!(queries.len().is_multiple_of(n) && out.len().is_multiple_of(n), "{n} queries");
        out.fill(0.0);
        if queries.is_empty() || out.is_empty() {
            return;
        }
        let (key, value) = (queries.len() / n, out.len() / n);
        let seen = s + usize::from(!sinks.is_empty());
        let scores = &mut scores[..n * seen];
        // One query alone gains nothing from portions.
        let portion = |width: usize| if n == 1 { s.max(1) } else { (ROWS_BYTES / (4 * width)).max(8) };
        for first in (0..s).step_by(portion(key)) {
            let rows = keys.skip(first);
            let end = (first + portion(key)).min(s);
            for (q, scores) in queries.chunks_exact(key).zip(scores.chunks_exact_mut(seen)) {
                self.dots(q, &rows, &mut scores[first..end]);
            }
        }
        for (i, scores) in scores.chunks_exact_mut(seen.max(1)).enumerate() {
            scores[..s].iter_mut().for_each(|score| *score *= scale);
            if let Some(sink) = sinks.get(i) {
                scores[s] = *sink;
            }
            softmax(scores);
        }
        for first in (0..s).step_by(portion(value)) {
            let rows = values.skip(first);
            let end = (first + portion(value)).min(s);
            for (p, out) in scores.chunks_exact(seen).zip(out.chunks_exact_mut(value)) {
                self.add_weighted(&p[first..end], &rows, out);
            }
        }
    }

    /// [`dot`](Self::dot) of `a` with the beginning of each row, one per element of `out`. An instruction set without
    /// kernels of its own for this has its `dot` for plain rows and the scalar ones for others.
    ///
    /// # Panics
    /// If the rows end before `out` does.
    fn dots(&self, a: &[f32], rows: &KvRows<'_>, out: &mut [f32]) {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.dots(a, rows, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.dots(a, rows, out),
            _ if rows.ty() == KvType::F32 => {
                for (j, out) in out.iter_mut().enumerate() {
                    *out = self.dot(a, rows.row(j, a.len()).plain);
                }
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => match rows.all_plain() {
                Some((numbers, stride)) => isa.dots(a, numbers, stride, out),
                None => scalar::dots(a, rows, out),
            },
            _ => scalar::dots(a, rows, out),
        }
    }

    /// [`axpy`](Self::axpy) of `p[j]` and the beginning of row `j` to `out`, for `j` ascending.
    ///
    /// # Panics
    /// If the rows end before `p` does.
    fn add_weighted(&self, p: &[f32], rows: &KvRows<'_>, out: &mut [f32]) {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.add_weighted(p, rows, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.add_weighted(p, rows, out),
            _ if rows.ty() == KvType::F32 => {
                for (j, &p) in p.iter().enumerate() {
                    self.axpy(p, rows.row(j, out.len()).plain, out);
                }
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => match rows.all_plain() {
                Some((numbers, stride)) => isa.add_weighted(p, numbers, stride, out),
                None => scalar::add_weighted(p, rows, out),
            },
            _ => scalar::add_weighted(p, rows, out),
        }
    }
}
