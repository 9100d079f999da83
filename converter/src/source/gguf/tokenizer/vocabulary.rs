//! The tokens of a GGUF file and their kinds.

use std::collections::HashMap;

use super::super::metadata::{Metadata, Problem};
use super::pre;

pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";

/// Most tokens accepted; published vocabularies have fewer than 300 000, and the runtime accepts no more than this.
const MOST_TOKENS: usize = 1 << 24;

/// Longest token accepted, in bytes, as in the runtime.
const LONGEST_TOKEN: usize = 16 << 10;

/// The kind of a token (`LLAMA_TOKEN_TYPE_*` of llama.cpp, with SentencePiece's numbers).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    /// The token for characters that no other token spells.
    Unknown,
    /// A special token, which is not part of the visible text.
    Control,
    /// An added token that is part of the text.
    UserDefined,
    Unused,
    /// A byte, spelled `<0x0A>`, in a vocabulary whose other tokens are text.
    Byte,
}

impl Kind {
    fn of(number: i128) -> Self {
        match number {
            2 => Kind::Unknown,
            3 => Kind::Control,
            4 => Kind::UserDefined,
            5 => Kind::Unused,
            6 => Kind::Byte,
            // llama.cpp treats 0, "undefined", and all other numbers as tokens without properties.
            _ => Kind::Normal,
        }
    }

    /// Whether tokens of this kind are found in a text before the algorithm runs.
    pub(super) fn is_added(self) -> bool {
        matches!(self, Kind::Control | Kind::UserDefined | Kind::Unknown)
    }
}

/// A token.
#[derive(Clone, Debug)]
pub(super) struct Token {
    pub(super) text: String,
    pub(super) kind: Kind,
}

/// The tokens by their ids, and those with a special role.
#[derive(Clone, Debug)]
pub(super) struct Vocabulary {
    pub(super) tokens: Vec<Token>,
    by_text: HashMap<String, u32>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) unknown: Option<u32>,
    /// Whether a begin-of-sequence token comes before every text. Only if there is one.
    pub(super) add_bos: bool,
    /// Whether an end-of-sequence token comes after every text. Only if there is one.
    pub(super) add_eos: bool,
}

impl Vocabulary {
    /// Reads tokens, kinds and ids. `sentencepiece`: spaces are `▁` in the tokens, and missing keys have SentencePiece's defaults.
    pub(super) fn read(metadata: &Metadata, sentencepiece: bool) -> Result<Self, Problem> {
        let tokens = read_tokens(metadata, sentencepiece)?;
        let mut by_text = HashMap::with_capacity(tokens.len());
        for (id, token) in (0..).zip(&tokens) {
            if let Some(other) = by_text.insert(token.text.clone(), id) {
                let problem = format!("gives the token {} two ids, {other} and {id}", shortened(&token.text));
                return Err(Problem::new(TOKENS, problem));
            }
        }
        let mut vocabulary =
            Vocabulary { tokens, by_text, bos: None, eos: None, unknown: None, add_bos: false, add_eos: false };
        let default = |id: u32| sentencepiece.then_some(id).filter(|&id| (id as usize) < vocabulary.tokens.len());
        let bos = vocabulary.id_under(metadata, BOS)?;
        let eos = vocabulary.id_under(metadata, EOS)?;
        (vocabulary.bos, vocabulary.eos) = (bos.or(default(1)), eos.or(default(2)));
        // A file may name tokens here that it does not have, and nothing needs them.
        let unknown = metadata.uint(UNKNOWN)?.and_then(|id| u32::try_from(id).ok());
        vocabulary.unknown = unknown.filter(|&id| (id as usize) < vocabulary.tokens.len()).or_else(|| {
            let marked = vocabulary.tokens.iter().position(|t| t.kind == Kind::Unknown);
            marked.and_then(|id| u32::try_from(id).ok()).or(default(0))
        });
        let bos_by_default = sentencepiece || pre::puts_bos(metadata.text(pre::PRE)?.unwrap_or_default());
        vocabulary.add_bos = around(metadata, ADD_BOS, BOS, vocabulary.bos, bos_by_default)?;
        vocabulary.add_eos = around(metadata, ADD_EOS, EOS, vocabulary.eos, false)?;
        Ok(vocabulary)
    }

    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.by_text.get(text).copied()
    }

    /// The token with an id that has been checked.
    pub(super) fn token(&self, id: u32) -> &Token {
        &self.tokens[id as usize]
    }

    /// The tokens with their ids.
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = (u32, &Token)> {
        self.tokens.iter().enumerate().map(|(id, token)| (id as u32, token))
    }

    /// The id of a token under a key, if the key exists.
    pub(super) fn id_under(&self, metadata: &Metadata, key: &str) -> Result<Option<u32>, Problem> {
        let Some(id) = metadata.uint(key)? else { return Ok(None) };
        let count = self.tokens.len();
        let known = u32::try_from(id).ok().filter(|&id| (id as usize) < count);
        known.map(Some).ok_or_else(|| Problem::new(key, format!("is {id}, and there are {count} tokens")))
    }

    /// Whether a token only pads the vocabulary to the rows of the embedding: `[PAD151700]`, the converter's spelling of ids that
    /// the tokenizer does not have. Earlier versions of it marked them as user-defined.
    pub(super) fn is_padding(&self, id: u32) -> bool {
        let Token { text, kind } = self.token(id);
        let number = text.strip_prefix("[PAD").and_then(|text| text.strip_suffix(']'));
        matches!(kind, Kind::Unused | Kind::UserDefined) && number == Some(id.to_string().as_str())
    }

    /// The number of the model's tokens, which come first; those after them are added tokens or padding. `least`: tokens below it
    /// belong to the model in any case.
    ///
    /// In a tokenizer.json, an added token that the model does not have gets the next free id. So the added tokens after the
    /// model's must have consecutive ids.
    pub(super) fn model_tokens(&self, least: u32) -> u32 {
        let behind = |id: u32| id >= least && self.token(id).kind.is_added() && !self.is_padding(id);
        let mut end = self.tokens.len() as u32;
        while end > least && self.is_padding(end - 1) {
            end -= 1;
        }
        while end > 0 && behind(end - 1) {
            end -= 1;
        }
        end
    }
}

fn read_tokens(metadata: &Metadata, sentencepiece: bool) -> Result<Vec<Token>, Problem> {
    let missing = || Problem::new(TOKENS, "is missing: the file says which tokenizer it has, but not its tokens");
    let texts = metadata.strings(TOKENS)?.ok_or_else(missing)?;
    if texts.len() == 0 || texts.len() > MOST_TOKENS {
        let problem = format!("has {} tokens, expected 1 to {MOST_TOKENS}", texts.len());
        return Err(Problem::new(TOKENS, problem));
    }
    let kinds = metadata.integers(TYPES)?;
    if let Some(kinds) = kinds.as_ref().filter(|kinds| kinds.len() < texts.len()) {
        let problem = format!("has {} entries for {} tokens", kinds.len(), texts.len());
        return Err(Problem::new(TYPES, problem));
    }
    let mut tokens = Vec::with_capacity(texts.len());
    for (id, text) in texts.iter().enumerate() {
        let kind = kinds.as_ref().map_or(Kind::Normal, |kinds| Kind::of(kinds[id]));
        let text = std::str::from_utf8(text)
            .map_err(|_| Problem::new(TOKENS, format!("is not UTF-8 in token {id}")))
            .map(str::to_owned)?;
        if text.len() > LONGEST_TOKEN {
            let problem = format!("has a token of {} bytes, {id}; expected at most {LONGEST_TOKEN}", text.len());
            return Err(Problem::new(TOKENS, problem));
        }
        let text = match text.is_empty() {
            // In llama.cpp's spelling.
            true => format!("[EMPTY_{id}]"),
            // In these, the converter has replaced `▁` with spaces, because llama.cpp searches for them in the original text.
            false if sentencepiece && kind == Kind::UserDefined && text.bytes().all(|b| b == b' ') => {
                text.replace(' ', "\u{2581}")
            }
            false => text,
        };
        tokens.push(Token { text, kind });
    }
    Ok(tokens)
}

/// Whether a token is put around every text.
fn around(metadata: &Metadata, flag: &str, key: &str, id: Option<u32>, default: bool) -> Result<bool, Problem> {
    match metadata.bool(flag)? {
        Some(true) if id.is_none() => Err(Problem::new(key, format!("is missing, and `{flag}` is true"))),
        Some(add) => Ok(add),
        None => Ok(default && id.is_some()),
    }
}

/// The beginning of a text from the file, in quotes.
pub(super) fn shortened(text: &str) -> String {
    const SHOWN: usize = 60;
    match text.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{:?}…", &text[..at]),
        None => format!("{text:?}"),
    }
}
