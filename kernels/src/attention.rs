//! Attention of one query over cached keys and values.

use crate::elementwise::softmax;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::isa::Isa;
use crate::isa::Kernels;
use crate::kv::{KvRows, KvType};
use crate::scalar;

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
        let scores = &mut scores[..s + usize::from(sink.is_some())];
        self.dots(q, &keys, &mut scores[..s]);
        scores[..s].iter_mut().for_each(|score| *score *= scale);
        if let Some(sink) = sink {
            scores[s] = sink;
        }
        softmax(scores);
        self.weighted_sum(&scores[..s], &values, out);
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

    /// `out` becomes zero, then [`axpy`](Self::axpy) adds `p[j]` times the beginning of row `j`, for `j` ascending.
    ///
    /// # Panics
    /// If the rows end before `p` does.
    fn weighted_sum(&self, p: &[f32], rows: &KvRows<'_>, out: &mut [f32]) {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.weighted_sum(p, rows, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.weighted_sum(p, rows, out),
            _ if rows.ty() == KvType::F32 => {
                out.fill(0.0);
                for (j, &p) in p.iter().enumerate() {
                    self.axpy(p, rows.row(j, out.len()).plain, out);
                }
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => match rows.all_plain() {
                Some((numbers, stride)) => isa.weighted_sum(p, numbers, stride, out),
                None => scalar::weighted_sum(p, rows, out),
            },
            _ => scalar::weighted_sum(p, rows, out),
        }
    }
}
