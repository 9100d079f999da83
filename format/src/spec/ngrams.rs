//! Tables of n-grams.

use serde::{Deserialize, Serialize};

use super::{check_range, check_width};
use crate::limits::{MAX_LENGTH, MAX_TABLE_ROWS};

/// Most tokens of an n-gram.
const MAX_TOKENS: usize = 16;
/// Most heads.
const MAX_HEADS: usize = 1 << 12;

/// A table of n-grams before one layer's attention (Qwen4-Exp, `Qwen4ExpPLE` of transformers; the idea is Engram's,
/// arXiv:2601.07372): the last tokens name rows of a large table, which enter the residual through a gate and a convolution.
///
/// Each head looks at the last `n` tokens, with `n` from 2 to the number of multipliers, and the same number of heads for each
/// `n`. With `t_0` the token, `t_1` the one before it and so on, its row is
/// `first + (t_0·m_0 xor … xor t_{n-1}·m_{n-1}) mod rows`, in 64-bit integers that wrap, with a remainder that is not negative.
/// Tokens before the sequence count as `separator`, and so do all tokens before the last `separator`. The rows of all heads, one
/// behind the other, are `e` `[width]`.
///
/// For each of the `S_i` of the residual (itself, or its streams), with norms by root mean square that have weights of their own
/// and the model's epsilon: `g = norm(key_i · e) · norm(S_i) / sqrt(hidden)`, `v_i = sigmoid(sign(g)·sqrt(max(|g|, 1e-6))) · (value · e)`,
/// and `S_i += v_i + silu(conv(norm(v_i)))`. The convolution is causal, by channel, over `conv_width` tokens that are as many tokens
/// apart as there are multipliers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NgramSpec {
    /// The layer.
    pub layer: usize,
    /// Numbers of the rows of all heads together.
    pub width: usize,
    /// What tokens are multiplied with, the last one's first: as many as the longest n-gram has tokens.
    pub multipliers: Vec<i64>,
    /// The shortest n-grams' first.
    pub heads: Vec<NgramHead>,
    /// Rows of the table.
    pub table_rows: u64,
    /// The token that n-grams do not reach across.
    pub separator: u32,
    /// Taps of the convolution.
    pub conv_width: usize,
}

/// The rows of the table that one head of n-grams uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NgramHead {
    /// The first.
    pub first: u64,
    /// How many.
    pub rows: u64,
}

impl NgramSpec {
    /// Tokens of the longest n-gram.
    pub fn tokens(&self) -> usize {
        self.multipliers.len()
    }

    /// Numbers of a row of the table.
    pub fn row_width(&self) -> usize {
        self.width / self.heads.len()
    }

    /// How many tokens before a token its convolution sees.
    pub fn conv_reach(&self) -> usize {
        (self.conv_width - 1) * self.tokens()
    }

    /// `residual`: numbers of the residual of a token; `layers`: of the model.
    pub(super) fn validate(&self, residual: usize, layers: usize) -> Result<(), String> {
        let (tokens, heads) = (self.tokens(), self.heads.len());
        if self.layer >= layers {
            return Err(format!("layer {} of {layers} has a table of n-grams", self.layer));
        }
        check_width("ngrams.width", self.width)?;
        check_width("ngrams.conv_width", self.conv_width)?;
        if !(2..=MAX_TOKENS).contains(&tokens) {
            return Err(format!("its n-grams have up to {tokens} tokens, outside 2..={MAX_TOKENS}"));
        }
        if heads == 0 || heads > MAX_HEADS || !heads.is_multiple_of(tokens - 1) || !self.width.is_multiple_of(heads) {
            let width = self.width;
            return Err(format!("{heads} heads of n-grams of 2 to {tokens} tokens have {width} numbers together"));
        }
        if self.table_rows == 0 || self.table_rows > MAX_TABLE_ROWS {
            return Err(format!("ngrams.table_rows is {}, outside 1..={MAX_TABLE_ROWS}", self.table_rows));
        }
        let outside = |head: &&NgramHead| {
            head.rows == 0 || head.first.checked_add(head.rows).is_none_or(|end| end > self.table_rows)
        };
        if let Some(NgramHead { first, rows }) = self.heads.iter().find(outside) {
            return Err(format!("a head of n-grams has {rows} rows from {first} on, of {}", self.table_rows));
        }
        check_range("ngrams: residual × conv_width", residual.saturating_mul(self.conv_width), MAX_LENGTH)?;
        let reach = self.conv_width.saturating_mul(tokens);
        check_range("ngrams: residual × tokens of the convolution", residual.saturating_mul(reach), MAX_LENGTH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> NgramSpec {
        let heads = [0, 5, 12, 23].map(|first| NgramHead { first, rows: 5 }).to_vec();
        NgramSpec {
            layer: 1,
            width: 8,
            multipliers: vec![3, -5, i64::MAX],
            heads,
            table_rows: 28,
            separator: 1,
            conv_width: 4,
        }
    }

    #[test]
    fn sizes_fit_together() {
        assert_eq!(spec().validate(32, 2), Ok(()));
        assert_eq!((spec().tokens(), spec().row_width(), spec().conv_reach()), (3, 2, 9));
        let bad = |change: fn(&mut NgramSpec)| {
            let mut spec = spec();
            change(&mut spec);
            assert!(spec.validate(32, 2).is_err(), "{spec:?}");
        };
        bad(|s| s.layer = 2);
        bad(|s| s.width = 9);
        bad(|s| s.width = 0);
        bad(|s| s.multipliers.truncate(1));
        bad(|s| s.multipliers = vec![1; 17]);
        bad(|s| s.heads.truncate(3));
        bad(|s| s.heads.clear());
        bad(|s| s.table_rows = 27);
        bad(|s| s.table_rows = u64::MAX);
        bad(|s| s.heads[0].rows = 0);
        bad(|s| s.heads[0] = NgramHead { first: u64::MAX, rows: 2 });
        bad(|s| s.conv_width = 0);
        bad(|s| s.conv_width = 1 << 20);
    }
}
