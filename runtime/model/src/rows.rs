//! The rows that one pass runs through the layers; each is a token of some sequence at its position.
//!
//! A caller describes work as [`Span`]s. A pass takes as many of their tokens as memory has rows for. The layers see rows. They ask
//! a row for its sequence and position, and the pass for the phase of its spans. Nothing is inferred from the number of rows.

use super::cache::{LayerCache, LayerCacheMut};
use super::control::Progress;
use super::sequence::Sequence;

/// The kind of a span's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Phase {
    /// A part of a prompt: many tokens that are known in advance.
    Prompt,
    /// The last sampled token.
    #[default]
    Decode,
    /// Tokens that were proposed and are to be checked.
    Draft,
    /// Tokens that were generated before, and are read again as a prompt is: many at once, with the numbers of generated tokens.
    Again,
}

impl Phase {
    /// Whether tokens are read that are known beforehand, so that a pass has many of them.
    pub fn reads(self) -> bool {
        matches!(self, Phase::Prompt | Phase::Again)
    }
}

/// The tokens of a span whose logits the caller wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Want {
    /// None.
    Nothing,
    /// The last one.
    #[default]
    Last,
    /// All.
    All,
}

impl Want {
    /// Whether the logits of token `index` of `count` are wanted.
    pub fn includes(self, index: usize, count: usize) -> bool {
        match self {
            Want::Nothing => false,
            Want::Last => index + 1 == count,
            Want::All => true,
        }
    }
}

/// What a step appends to one sequence.
#[derive(Debug)]
pub struct Span<'a> {
    /// The sequence that grows.
    pub sequence: &'a mut Sequence,
    /// Its next tokens, at least one.
    pub tokens: &'a [u32],
    /// The kind of the tokens.
    pub phase: Phase,
    /// Which of their logits are wanted.
    pub logits: Want,
}

impl<'a> Span<'a> {
    /// The next tokens of a prompt.
    pub fn prompt(sequence: &'a mut Sequence, tokens: &'a [u32], logits: Want) -> Self {
        Span { sequence, tokens, phase: Phase::Prompt, logits }
    }

    /// The last sampled token; its logits are wanted.
    pub fn decode(sequence: &'a mut Sequence, token: &'a u32) -> Self {
        Span { sequence, tokens: std::slice::from_ref(token), phase: Phase::Decode, logits: Want::Last }
    }
}

/// One row of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Number of its span in the step.
    pub span: usize,
    /// Position in the span's sequence.
    pub position: usize,
}

/// The rows of one span in a pass: `count` rows from row `first` on, for its tokens from `token` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanRows {
    /// Number of the span in the step.
    pub span: usize,
    /// First row.
    pub first: usize,
    /// Rows.
    pub count: usize,
    /// Index of the first row's token in the span.
    pub token: usize,
    /// Position of the first row in its sequence.
    pub start: usize,
    /// The kind of its tokens.
    pub phase: Phase,
}

impl SpanRows {
    /// The rows.
    pub fn rows(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.count
    }
}

/// The rows of a pass, span by span.
#[derive(Debug, Default)]
pub struct Rows {
    rows: Vec<Row>,
    /// The token of each row.
    ids: Vec<u32>,
    spans: Vec<SpanRows>,
    /// Rows of the step that earlier passes have taken.
    before: usize,
    /// Rows of the step.
    total: usize,
}

/// The first token of a step that no pass has taken yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    span: usize,
    token: usize,
    /// Tokens of its span before it.
    taken: usize,
}

impl Rows {
    /// Takes the next tokens of `spans` from `cursor` on, up to `most` rows, and moves the cursor past them. False if none are
    /// left.
    pub fn take(&mut self, spans: &[Span<'_>], cursor: &mut Cursor, most: usize) -> bool {
        self.total = spans.iter().map(|span| span.tokens.len()).sum();
        self.before = cursor.taken;
        self.rows.clear();
        self.ids.clear();
        self.spans.clear();
        while let Some(span) = spans.get(cursor.span) {
            let left = span.tokens.len() - cursor.token;
            let count = left.min(most - self.rows.len());
            if count > 0 {
                let start = span.sequence.position();
                let (first, token) = (self.rows.len(), cursor.token);
                self.spans.push(SpanRows { span: cursor.span, first, count, token, start, phase: span.phase });
                self.rows.extend((start..start + count).map(|position| Row { span: cursor.span, position }));
                self.ids.extend_from_slice(&span.tokens[token..token + count]);
            }
            if count < left {
                cursor.token += count;
                break;
            }
            (cursor.span, cursor.token) = (cursor.span + 1, 0);
        }
        cursor.taken += self.rows.len();
        !self.rows.is_empty()
    }

    /// Rows of the pass.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// The pass is complete: adds its tokens to the sequences.
    pub fn advance(&self, spans: &mut [Span<'_>]) {
        for part in &self.spans {
            let Span { sequence, tokens, .. } = &mut spans[part.span];
            sequence.advance(&tokens[part.token..][..part.count], part.phase);
            if part.phase.reads() {
                sequence.mark_prompt();
            }
        }
    }

    /// The progress of the step before the pass goes through the first layer.
    pub fn progress(&self) -> Progress {
        Progress { layers: 0, rows: self.rows.len(), rows_before: self.before, rows_total: self.total }
    }

    /// Rows of the step that earlier passes have taken.
    pub fn before(&self) -> usize {
        self.before
    }

    /// Whether the pass has no rows, as before the first one.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The token of every row.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Row `index`.
    pub fn get(&self, index: usize) -> Row {
        self.rows[index]
    }

    /// Span of a row, and its token's index there.
    pub fn token(&self, row: usize) -> (usize, usize) {
        let span = self.spans[self.spans.partition_point(|span| span.first <= row) - 1];
        (span.span, span.token + row - span.first)
    }

    /// The spans that have any of these rows, and which of them each has.
    pub fn parts(&self, rows: std::ops::Range<usize>) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
        let begun = self.spans.partition_point(|span| span.rows().end <= rows.start);
        self.spans[begun..]
            .iter()
            .map(move |span| (span.span, span.first.max(rows.start)..span.rows().end.min(rows.end)))
            .take_while(|(_, part)| !part.is_empty())
    }

    /// Position of every row in its sequence.
    pub fn positions(&self) -> impl Iterator<Item = usize> {
        self.rows.iter().map(|row| row.position)
    }

    /// The spans that have rows in this pass.
    pub fn spans(&self) -> &[SpanRows] {
        &self.spans
    }

    /// Whether products with the rows wait for memory more than they compute, which is the case when one sequence decodes one
    /// token. With more rows, computing takes longer than loading the weights.
    pub fn wait_for_memory(&self) -> bool {
        matches!(self.spans.as_slice(), [span] if span.phase == Phase::Decode)
    }

    /// Whether all rows decode or check drafts. The experts of such a pass predict those of the next, and it waits for the drive
    /// more than it computes. A prompt uses most experts, and computes for a long time.
    pub fn generate(&self) -> bool {
        self.spans.iter().all(|span| !span.phase.reads())
    }
}

/// The tokens of a sequence up to the end of a pass.
#[derive(Clone, Copy, Debug)]
pub struct SpanTokens<'a> {
    /// Tokens that the sequence has.
    pub before: &'a [u32],
    /// Tokens of the pass.
    pub new: &'a [u32],
}

impl<'a> SpanTokens<'a> {
    /// The tokens of the sequence to which these rows of the pass belong.
    pub fn of(spans: &'a [Span<'_>], part: SpanRows) -> Self {
        let span = &spans[part.span];
        SpanTokens { before: span.sequence.tokens(), new: &span.tokens[part.token..][..part.count] }
    }

    /// The token at a position.
    ///
    /// # Panics
    /// If the pass does not reach that position.
    pub fn at(self, position: usize) -> u32 {
        match position.checked_sub(self.before.len()) {
            None => self.before[position],
            Some(new) => self.new[new],
        }
    }
}

/// What one layer remembers of every sequence of a step.
pub struct Caches<'a, 's> {
    spans: &'a mut [Span<'s>],
    layer: usize,
}

impl<'a, 's> Caches<'a, 's> {
    /// The caches of `layer`.
    pub fn new(spans: &'a mut [Span<'s>], layer: usize) -> Self {
        Caches { spans, layer }
    }

    /// The cache of a span's sequence.
    pub fn of(&self, span: usize) -> LayerCache<'_> {
        self.store(span, 0)
    }

    /// The cache of a span's sequence, to extend it.
    pub fn of_mut(&mut self, span: usize) -> LayerCacheMut<'_> {
        self.store_mut(span, 0)
    }

    /// The last store of the layer for a span's sequence, to extend it.
    pub fn last_mut(&mut self, span: usize) -> LayerCacheMut<'_> {
        let sequence = &mut self.spans[span].sequence;
        let store = sequence.last_store_of(self.layer);
        sequence.store_mut(store)
    }

    /// The tokens of the sequence to which these rows of the pass belong.
    pub fn tokens_of(&self, part: SpanRows) -> SpanTokens<'_> {
        SpanTokens::of(self.spans, part)
    }

    /// One of the layer's stores for a span's sequence.
    pub fn store(&self, span: usize, number: usize) -> LayerCache<'_> {
        let sequence = &self.spans[span].sequence;
        sequence.store(sequence.store_of(self.layer, number))
    }

    /// The same, to extend it.
    pub fn store_mut(&mut self, span: usize, number: usize) -> LayerCacheMut<'_> {
        let sequence = &mut self.spans[span].sequence;
        let store = sequence.store_of(self.layer, number);
        sequence.store_mut(store)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans<'a>(sequences: &'a mut [Sequence], tokens: &'a [u32], counts: &[usize]) -> Vec<Span<'a>> {
        let spans = sequences.iter_mut().zip(counts);
        spans
            .map(|(sequence, &count)| Span {
                sequence,
                tokens: &tokens[..count],
                phase: Phase::Prompt,
                logits: Want::Last,
            })
            .collect()
    }

    #[test]
    fn passes_take_every_token_once_and_in_order() {
        let tokens: Vec<u32> = (0..20).collect();
        for most in 1..20 {
            let counts = [5, 1, 7, 1];
            let mut sequences: Vec<Sequence> = (0..4).map(|_| Sequence::without_layers(20)).collect();
            let mut spans = spans(&mut sequences, &tokens, &counts);
            let (mut rows, mut cursor, mut seen) = (Rows::default(), Cursor::default(), Vec::new());
            while rows.take(&spans, &mut cursor, most) {
                assert!(rows.len() <= most);
                for part in rows.spans().to_vec() {
                    assert_eq!(part.start, part.token, "the sequences were empty");
                    assert!(
                        part.rows()
                            .enumerate()
                            .all(|(i, row)| { rows.get(row) == Row { span: part.span, position: part.start + i } })
                    );
                    assert!(rows.parts(part.rows()).eq([(part.span, part.rows())]));
                    seen.extend((part.token..part.token + part.count).map(|token| (part.span, token)));
                }
                let parts = rows.spans().iter().map(|part| (part.span, part.rows()));
                assert!(rows.parts(0..rows.len()).eq(parts));
                rows.advance(&mut spans);
            }
            let all = counts.iter().enumerate().flat_map(|(span, &n)| (0..n).map(move |token| (span, token)));
            assert_eq!(seen, all.collect::<Vec<_>>(), "{most} rows at a time");
        }
    }

    #[test]
    fn a_pass_with_a_prompt_in_it_does_not_only_generate() {
        let tokens = [1];
        let mut sequences: Vec<Sequence> = (0..2).map(|_| Sequence::without_layers(4)).collect();
        let mut spans = spans(&mut sequences, &tokens, &[1, 1]);
        let (mut rows, mut cursor) = (Rows::default(), Cursor::default());
        spans[0].phase = Phase::Decode;
        assert!(rows.take(&spans[..1], &mut cursor, 8) && rows.wait_for_memory());
        for (phases, generates) in [
            ([Phase::Decode, Phase::Draft], true),
            ([Phase::Decode, Phase::Prompt], false),
            ([Phase::Prompt, Phase::Prompt], false),
        ] {
            spans.iter_mut().zip(phases).for_each(|(span, phase)| span.phase = phase);
            cursor = Cursor::default();
            assert!(rows.take(&spans, &mut cursor, 8));
            assert_eq!(rows.generate(), generates, "{phases:?}");
            assert!(!rows.wait_for_memory());
        }
        assert!(!rows.take(&spans, &mut cursor, 8));
    }
}
