//! Embeddings and token streams with which random routers route like real ones.
//!
//! Early in the model, a random router sees a hidden state that is nearly the token's embedding. So routing has the structure of
//! the embeddings and of the order of tokens. An embedding here is the sum of three random vectors: one that all tokens share,
//! which makes some experts popular; one of the token's **topic**, which makes consecutive tokens use the same experts; and the
//! token's own. A text stays with a topic for a few tokens, then moves to another, and within a topic uses the first words most.

use super::random::Random;

/// Topics of a large vocabulary.
const TOPICS: usize = 128;
/// Fewest tokens of a topic.
const TOPIC_TOKENS: usize = 8;
/// Mean length of a run of tokens of one topic.
const RUN: usize = 4;
/// Variances of the shared part and of the topic's part at skew 1, relative to the token's own: with them, a model that uses 8 of
/// 128 experts routes like Qwen3-30B (`docs/USAGE.md` has the figures).
const SHARED_VARIANCE: f32 = 0.2;
const TOPIC_VARIANCE: f32 = 2.0;
/// Marks the random bits of topics and streams, in addition to the codes of extents.
const TOPIC_BITS: u32 = u32::MAX;
const STREAM_BITS: u32 = u32::MAX - 1;

fn topics(vocab: usize) -> usize {
    (vocab / TOPIC_TOKENS).clamp(1, TOPICS)
}

/// The topic of a token: topics alternate, because in real vocabularies too, frequent words of all topics come first.
fn topic_of(token: usize, vocab: usize) -> usize {
    token % topics(vocab)
}

/// A stream of `n` token ids below `vocab` with the statistics of text: runs of one topic, and in each topic a few frequent words
/// (roughly Zipf's law). On a file from [`super::synth`], it routes like a real model on real text; greedy decoding with random
/// weights would soon go in circles. The same seed gives the same stream, and a longer stream continues a shorter one.
///
/// # Panics
/// If the vocabulary is empty.
pub fn token_stream(seed: u64, n: usize, vocab: usize) -> Vec<u32> {
    assert!(vocab > 0, "an empty vocabulary has no tokens");
    let mut random = Random::new(seed, [STREAM_BITS, 0, 0]);
    let topics = topics(vocab);
    let mut topic = random.below(topics);
    let token = |_| {
        if random.below(RUN) == 0 {
            topic = random.below(topics);
        }
        // Each octave of ranks is equally likely, and each rank in an octave.
        let words = (vocab - topic).div_ceil(topics);
        let octave = 1 << random.below(words.ilog2() as usize + 1);
        let rank = octave + random.below((words + 1 - octave).min(octave)) - 1;
        (rank * topics + topic) as u32
    };
    (0..n).map(token).collect()
}

/// The token embedding, row by row.
#[derive(Debug)]
pub(super) struct Embeddings {
    seed: u64,
    vocab: usize,
    hidden: usize,
    /// Shared part and topic's part, scaled, `[topics, hidden]`.
    by_topic: Vec<f32>,
    /// Factor on the token's own part.
    own: f32,
}

impl Embeddings {
    /// Rows have a mean square of 1. `skew` scales what tokens share: at 0 they share nothing.
    pub(super) fn new(seed: u64, vocab: usize, hidden: usize, skew: f32) -> Self {
        let own = (1.0 + skew * skew * (SHARED_VARIANCE + TOPIC_VARIANCE)).sqrt().recip() * 3f32.sqrt();
        let (shared, topic) = (own * skew * SHARED_VARIANCE.sqrt(), own * skew * TOPIC_VARIANCE.sqrt());
        let mut common = vec![0.0; hidden];
        add_uniform(&mut Random::new(seed, [TOPIC_BITS, 0, 0]), shared, &mut common);
        let mut by_topic = Vec::with_capacity(topics(vocab) * hidden);
        for t in 0..topics(vocab) {
            let mut row = common.clone();
            add_uniform(&mut Random::new(seed, [TOPIC_BITS, 1, t as u32]), topic, &mut row);
            by_topic.extend(row);
        }
        Embeddings { seed, vocab, hidden, by_topic, own }
    }

    /// Writes the row of `token` to `out`, `[hidden]`.
    pub(super) fn row(&self, token: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.by_topic[topic_of(token, self.vocab) * self.hidden..][..self.hidden]);
        add_uniform(&mut Random::new(self.seed, [TOPIC_BITS, 2, token as u32]), self.own, out);
    }
}

fn add_uniform(random: &mut Random, factor: f32, out: &mut [f32]) {
    for four in out.chunks_mut(4) {
        four.iter_mut().zip(random.uniform()).for_each(|(o, v)| *o += v * factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_reproducible_and_stay_in_the_vocabulary() {
        for vocab in [1, 2, 7, 9, 1000, 1024, 151_936] {
            let stream = token_stream(5, 500, vocab);
            assert!(stream.iter().all(|&t| (t as usize) < vocab), "{vocab}");
            assert_eq!(stream[..100], token_stream(5, 100, vocab));
            assert!(vocab < 9 || stream != token_stream(6, 500, vocab));
        }
        assert!(token_stream(0, 0, 9).is_empty());
    }

    #[test]
    fn streams_have_runs_and_frequent_words() {
        let (vocab, n) = (32_768, 20_000);
        let stream = token_stream(0, n, vocab);
        let same = stream.windows(2).filter(|w| topic_of(w[0] as usize, vocab) == topic_of(w[1] as usize, vocab));
        let same = same.count() as f64 / n as f64;
        assert!((0.73..0.78).contains(&same), "{same}");
        let first_words = stream.iter().filter(|&&t| (t as usize) < TOPICS).count() as f64 / n as f64;
        assert!((0.09..0.13).contains(&first_words), "{first_words}");
    }

    #[test]
    fn embeddings_have_unit_variance_and_share_their_topic() {
        let (vocab, hidden) = (4096, 512);
        let cosine = |skew: f32, a: usize, b: usize| {
            let embeddings = Embeddings::new(3, vocab, hidden, skew);
            let mut rows = [vec![0.0; hidden], vec![0.0; hidden]];
            embeddings.row(a, &mut rows[0]);
            embeddings.row(b, &mut rows[1]);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>() / hidden as f32;
            assert!((0.8..1.2).contains(&dot(&rows[0], &rows[0])));
            dot(&rows[0], &rows[1])
        };
        assert!((0.55..0.85).contains(&cosine(1.0, 5, 5 + TOPICS)));
        assert!((-0.1..0.25).contains(&cosine(1.0, 5, 6)));
        assert!(cosine(0.0, 5, 5 + TOPICS).abs() < 0.15);
    }
}
