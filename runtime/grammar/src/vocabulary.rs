//! A model's tokens in the form that the grammar library needs: bytes in a tree.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use llguidance::ParserFactory;
use sluice_text::Tokenizer;
use toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

use crate::GrammarError;
use crate::places::Places;

/// Longest token that a grammar allows, in bytes. The library's tree has room for 1,024.
const MAX_TOKEN_BYTES: usize = 1000;

/// Most tokens. The library packs ids into 24 bits.
const MAX_TOKENS: usize = (1 << 24) - 2;

/// Most states of a grammar's lexer. One takes up to 2 KB; with more, a generation fails.
const MAX_LEXER_STATES: usize = 50_000;
/// Most ways at a time in which a grammar's parser may read a text, and most of them in a step. Ordinary forms have tens;
/// ambiguous grammars have thousands, and would keep all other requests waiting.
const MAX_ITEMS_IN_ROW: usize = 500;
const MAX_ITEMS_IN_STEP: usize = 20_000;

/// Parts of JSON strings for which the library keeps the sets of tokens ready: white space, and text that needs no escape.
const SLICES: [&str; 4] =
    [r"[\x20\x0A\x0D\x09]+", r#"[^"\\\x00-\x1F\x7F]{1,10}"#, r#"[^"\\\x00-\x1F\x7F]{1,30}"#, r#"[^"\\\x00-\x1F\x7F]+"#];

/// The vocabulary of a model, prepared once for all grammars. Cheap to clone, usable from many threads.
#[derive(Clone)]
pub struct Vocabulary {
    inner: Arc<Inner>,
}

struct Inner {
    factory: ParserFactory,
    environment: TokEnv,
    tokenizer: Tokenizer,
    end: Vec<u32>,
    /// Bit `id % 32` of word `id / 32`: whether the token exists at all.
    known: Vec<u32>,
    /// For the grammars that are being compiled.
    places: Arc<Places>,
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { end, .. } = &*self.inner;
        f.debug_struct("Vocabulary")
            .field("tokens", &self.trie().vocab_size())
            .field("end", end)
            .finish_non_exhaustive()
    }
}

impl Vocabulary {
    /// Prepares the vocabulary of a model whose rows of logits have `vocab_size` elements. A text may end with any of the `end`
    /// tokens, which appear nowhere else; if there are none, a text ends only where its grammar allows nothing to follow.
    ///
    /// # Errors
    /// When the tokenizer's decoder is broken, when it is of a kind where the text of a token depends on others, or when an
    /// end token does not exist.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize, end: &[u32]) -> Result<Self, GrammarError> {
        let bad = |reason: String| GrammarError::Vocabulary { reason };
        if vocab_size > MAX_TOKENS {
            return Err(bad(format!("there are {vocab_size} of them, more than {MAX_TOKENS}")));
        }
        if let Some(id) = end.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(bad(format!("the end token {id} is not one of the model's {vocab_size}")));
        }
        let size = u32::try_from(vocab_size).map_err(|_| bad("there are too many".into()))?;
        let words: Vec<Vec<u8>> = (0..size).map(|id| word(tokenizer, id, end)).collect::<Result<_, _>>()?;
        if words.iter().all(Vec::is_empty) {
            return Err(bad("the text of a token depends on those around it, or there are none".into()));
        }
        let mut known = vec![0_u32; vocab_size.div_ceil(32)];
        let texts = words.iter().enumerate().filter(|(_, word)| !word.is_empty()).map(|(id, _)| id);
        for id in texts.chain(end.iter().map(|&id| id as usize)) {
            known[id / 32] |= 1 << (id % 32);
        }
        // The library checks its own assumptions by panicking.
        let factory = catch_unwind(AssertUnwindSafe(|| factory(&words, size, end)));
        let (factory, environment) = match factory {
            Ok(Ok(both)) => both,
            Ok(Err(reason)) => return Err(bad(crate::error::clip(&reason))),
            Err(_) => return Err(bad("they take more room than any real model's".into())),
        };
        let inner = Inner {
            factory,
            environment,
            tokenizer: tokenizer.clone(),
            end: end.to_vec(),
            known,
            places: Arc::default(),
        };
        Ok(Vocabulary { inner: Arc::new(inner) })
    }

    /// Writes a text for a Lark grammar: special tokens whose spellings it contains as tokens, everything else as string
    /// literals. This is how to write markers such as `<tool_call>`, which some models have as special tokens and others as text.
    pub fn lark_text(&self, text: &str) -> String {
        let trie = self.trie();
        let (mut parts, mut plain) = (Vec::new(), String::new());
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            match self.special_at(rest) {
                Some((id, length)) if trie.is_special_token(id) => {
                    flush(&mut plain, &mut parts);
                    parts.push(format!("<[{id}]>"));
                    rest = &rest[length..];
                }
                _ => {
                    plain.push(first);
                    rest = &rest[first.len_utf8()..];
                }
            }
        }
        flush(&mut plain, &mut parts);
        match parts.is_empty() {
            true => "\"\"".to_owned(),
            false => parts.join(" "),
        }
    }

    /// The longest special token at the beginning of a text, and its length in bytes.
    fn special_at(&self, text: &str) -> Option<(u32, usize)> {
        let trie = self.trie();
        let mut node = trie.child_at_byte(trie.root(), TokTrie::SPECIAL_TOKEN_MARKER)?;
        let mut found = None;
        for (at, &byte) in text.as_bytes().iter().enumerate() {
            let Some(child) = trie.child_at_byte(node, byte) else { break };
            node = child;
            found = node.token_id().map(|id| (id, at + 1)).or(found);
        }
        found
    }

    pub(crate) fn factory(&self) -> &ParserFactory {
        &self.inner.factory
    }

    pub(crate) fn trie(&self) -> &TokTrie {
        self.inner.environment.tok_trie()
    }

    /// The bytes that a token adds to a text; for a special token, the bytes of its name.
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        let bytes = self.trie().token(id);
        bytes.strip_prefix(&[TokTrie::SPECIAL_TOKEN_MARKER]).filter(|_| bytes.len() > 1).unwrap_or(bytes)
    }

    /// The tokens that end a text.
    pub(crate) fn end(&self) -> &[u32] {
        &self.inner.end
    }

    /// Which tokens exist, as bits of words.
    pub(crate) fn known(&self) -> &[u32] {
        &self.inner.known
    }

    /// Places for the grammars that are being compiled.
    pub(crate) fn places(&self) -> &Arc<Places> {
        &self.inner.places
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.inner.tokenizer
    }
}

/// The bytes by which the library identifies a token: its text, or, for a token that is not text, a marker that is not UTF-8 and
/// the token's name.
fn word(tokenizer: &Tokenizer, id: u32, end: &[u32]) -> Result<Vec<u8>, GrammarError> {
    let bytes = tokenizer.token_bytes(id)?.unwrap_or_default();
    let is_text = !tokenizer.is_special(id) && !end.contains(&id);
    Ok(match is_text {
        _ if bytes.is_empty() || bytes.len() > MAX_TOKEN_BYTES => Vec::new(),
        // This would look like a special token. The byte occurs in no text.
        true if bytes[0] == TokTrie::SPECIAL_TOKEN_MARKER => Vec::new(),
        true => bytes,
        false => {
            let name = tokenizer.token_text(id).unwrap_or_default();
            [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat()
        }
    })
}

fn factory(words: &[Vec<u8>], size: u32, end: &[u32]) -> Result<(ParserFactory, TokEnv), String> {
    let mut trie = TokTrie::from(&TokRxInfo::new(size, end.first().copied().unwrap_or(toktrie::INVALID_TOKEN)), words);
    if !end.is_empty() {
        trie = trie.with_eos_tokens(end);
    }
    let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let slices = SLICES.map(str::to_owned);
    let mut factory =
        ParserFactory::new(&environment, InferenceCapabilities::default(), &slices).map_err(|e| e.to_string())?;
    factory.quiet();
    let limits = factory.limits_mut();
    limits.verbose_errors = false;
    limits.max_lexer_states = MAX_LEXER_STATES;
    limits.max_items_in_row = MAX_ITEMS_IN_ROW;
    limits.step_max_items = MAX_ITEMS_IN_STEP;
    Ok((factory, environment))
}

fn flush(plain: &mut String, parts: &mut Vec<String>) {
    if !plain.is_empty() {
        parts.push(crate::lark::literal(&std::mem::take(plain)));
    }
}
