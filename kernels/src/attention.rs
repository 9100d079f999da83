//! Attention of one query over cached keys and values.

use crate::elementwise::softmax;
use crate::isa::Kernels;

impl Kernels {
    /// `out = Σⱼ softmaxⱼ(scale · q·kⱼ) vⱼ` over `s` cached positions, on the calling thread.
    ///
    /// `q` is as long as a key, `out` as long as a value. Row `j` of `keys` begins at `j·k_stride`, row `j` of `values`
    /// at `j·v_stride`; both may be the same buffer, as with latent attention. `scores` is scratch. Products are
    /// [`dot`](Self::dot), sums over positions run in order of `j`, one fused multiply-add each. With `s = 0` the
    /// output is zero.
    ///
    /// # Panics
    /// If `keys` or `values` end before row `s`, or `scores` is shorter than `s`.
    #[expect(clippy::too_many_arguments, reason = "two strided matrices, a query, and where to put the result")]
    pub fn attend(
        &self,
        q: &[f32],
        keys: &[f32],
        k_stride: usize,
        values: &[f32],
        v_stride: usize,
        s: usize,
        scale: f32,
        scores: &mut [f32],
        out: &mut [f32],
    ) {
        self.attend_with_sink(q, keys, k_stride, values, v_stride, s, scale, None, scores, out);
    }

    /// As [`attend`](Self::attend); a `sink` is one more logit, already scaled, that takes its part of the softmax and has no
    /// value (gpt-oss).
    ///
    /// # Panics
    /// As [`attend`](Self::attend), where `scores` needs one more element with a sink.
    #[expect(clippy::too_many_arguments, reason = "two strided matrices, a query, and where to put the result")]
    pub fn attend_with_sink(
        &self,
        q: &[f32],
        keys: &[f32],
        k_stride: usize,
        values: &[f32],
        v_stride: usize,
        s: usize,
        scale: f32,
        sink: Option<f32>,
        scores: &mut [f32],
        out: &mut [f32],
    ) {
        let scores = &mut scores[..s + usize::from(sink.is_some())];
        self.dots(q, keys, k_stride, &mut scores[..s]);
        scores[..s].iter_mut().for_each(|score| *score *= scale);
        if let Some(sink) = sink {
            scores[s] = sink;
        }
        softmax(scores);
        self.weighted_sum(&scores[..s], values, v_stride, out);
    }
}
