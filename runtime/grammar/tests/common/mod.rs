//! A model that writes at random, and vocabularies for it.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use sluice_generate::Constraint;
use sluice_grammar::{Grammar, Vocabulary};
use sluice_text::Tokenizer;

/// A published kind of tokenizer from the fixtures, with a row more than it has tokens.
pub(crate) fn published(kind: &str) -> (Tokenizer, Vocabulary) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tokenizers").join(kind);
    let files: BTreeMap<String, Vec<u8>> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap()))
        .collect();
    let tokenizer = Tokenizer::find(|name| files.get(name).map(Vec::as_slice)).unwrap().unwrap();
    let end: Vec<u32> = tokenizer.end_token().into_iter().collect();
    let vocabulary = Vocabulary::new(&tokenizer, tokenizer.vocab_size() + 1, &end).unwrap();
    (tokenizer, vocabulary)
}

/// All kinds.
pub(crate) const KINDS: [&str; 7] = ["qwen2", "llama3", "deepseek", "mixtral", "mistral", "gpt_oss", "kimi"];

/// A hash as good as chance (SplitMix64).
pub(crate) fn hash(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Chooses tokens by chance. The more it has written, the rather it chooses those that close what is open.
pub(crate) struct Random<'t> {
    pub(crate) tokenizer: &'t Tokenizer,
    pub(crate) vocabulary: &'t Vocabulary,
    /// Tokens by how they help to end, from 0.
    ranks: Vec<u8>,
}

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The text ended by itself.
    Ended(String),
    /// There were too many tokens.
    Cut(String),
    /// Nothing could follow.
    Failed(String),
}

impl<'t> Random<'t> {
    pub(crate) fn new(tokenizer: &'t Tokenizer, vocabulary: &'t Vocabulary) -> Self {
        let end = tokenizer.end_token();
        let rank = |id: u32| match tokenizer.token_bytes(id).unwrap().as_deref() {
            _ if Some(id) == end => 9,
            Some(b"\"") => 8,
            Some(b"}" | b"]") => 7,
            Some(b"\"}" | b"\"]" | b"}}" | b"]}" | b"\",") => 6,
            Some(b":" | b",") => 3,
            Some([digit]) if digit.is_ascii_digit() => 2,
            Some(bytes) if bytes.len() > 1 => 1,
            _ => 0,
        };
        let ranks = (0..tokenizer.vocab_size() as u32).map(rank).collect();
        Random { tokenizer, vocabulary, ranks }
    }

    /// Writes one text of up to `most` tokens.
    pub(crate) fn write(&self, grammar: &Grammar, seed: u64, most: usize) -> (Vec<u32>, Outcome) {
        self.write_with(grammar.constraint().as_mut(), seed, most)
    }

    pub(crate) fn write_with(&self, constraint: &mut dyn Constraint, seed: u64, most: usize) -> (Vec<u32>, Outcome) {
        let (mut ids, end) = (Vec::new(), self.tokenizer.end_token());
        let mut logits = vec![0.0; self.ranks.len() + 1];
        for step in 0..most as u64 {
            // Half of the texts hurry from the beginning.
            let hurry = (step as f32 / most as f32 * 3.0).max(if seed.is_multiple_of(2) { 0.5 } else { 0.0 });
            for (id, logit) in logits.iter_mut().enumerate() {
                let chance = hash(seed << 40 ^ step << 20 ^ id as u64) as f32 / u64::MAX as f32;
                let rank = self.ranks.get(id).copied().unwrap_or(0);
                *logit = chance + f32::from(rank) * hurry;
            }
            constraint.mask(&mut logits);
            let best = logits.iter().enumerate().filter(|(_, l)| l.is_finite()).max_by(|a, b| a.1.total_cmp(b.1));
            let Some((id, _)) = best else { return (ids.clone(), Outcome::Failed(self.text(&ids))) };
            let id = id as u32;
            constraint.accept(id);
            if Some(id) == end {
                return (ids.clone(), Outcome::Ended(self.text(&ids)));
            }
            ids.push(id);
            if constraint.is_complete() {
                return (ids.clone(), Outcome::Ended(self.text(&ids)));
            }
        }
        (ids.clone(), Outcome::Cut(self.text(&ids)))
    }

    fn text(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, false).unwrap()
    }
}
