//! The tokens that a tokenizer puts around every text: the `post_processor` of tokenizer.json.

use serde_json::Value;
use tokenizers::PostProcessorWrapper;

use super::TextError;
use super::pipeline::part;
use super::tokenizer::MAX_TOKEN_ID;

/// Most tokens that may be put around a text. Real tokenizers put one or two.
const MAX_AROUND: usize = 64;

/// Tokens before and after every text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Around {
    /// Before the text, such as a begin-of-sequence token.
    pub(super) before: Vec<u32>,
    /// After the text.
    pub(super) after: Vec<u32>,
}

impl Around {
    /// Reads the `post_processor` of a tokenizer.json.
    pub(super) fn read(value: &Value) -> Result<Self, TextError> {
        let mut around = Self::default();
        if !value.is_null() {
            let processor: PostProcessorWrapper = part("post_processor", value)?;
            // Serialised again, in the one form that the crate itself writes.
            let value = serde_json::to_value(&processor).map_err(|e| bad(e.to_string()))?;
            around.add(&value)?;
        }
        Ok(around)
    }

    /// Adds one more layer of tokens around the text.
    fn add(&mut self, processor: &Value) -> Result<(), TextError> {
        let (mut before, mut after) = (Vec::new(), Vec::new());
        match processor["type"].as_str() {
            Some("Sequence") => {
                let inner = processor["processors"].as_array();
                return inner.into_iter().flatten().try_for_each(|inner| self.add(inner));
            }
            Some("TemplateProcessing") => {
                let mut text_is_behind = false;
                for piece in processor["single"].as_array().into_iter().flatten() {
                    let Some(name) = piece["SpecialToken"]["id"].as_str() else {
                        if std::mem::replace(&mut text_is_behind, true) {
                            return Err(unsupported("a template that repeats the text"));
                        }
                        continue;
                    };
                    let list = if text_is_behind { &mut after } else { &mut before };
                    let ids = processor["special_tokens"][name]["ids"].as_array();
                    let ids = ids.ok_or_else(|| bad(format!("post_processor: it does not say what {name:?} is")))?;
                    self.check(ids.len() + list.len())?;
                    for id in ids {
                        list.push(token_id(id)?);
                    }
                }
                if !text_is_behind {
                    return Err(unsupported("a template without the text"));
                }
            }
            Some("BertProcessing" | "RobertaProcessing") => {
                before.push(token_id(&processor["cls"][1])?);
                after.push(token_id(&processor["sep"][1])?);
            }
            // The other kinds change no tokens.
            _ => {}
        }
        self.check(before.len() + after.len())?;
        before.append(&mut self.before);
        self.before = before;
        self.after.append(&mut after);
        Ok(())
    }

    fn check(&self, more: usize) -> Result<(), TextError> {
        match self.before.len() + self.after.len() + more <= MAX_AROUND {
            true => Ok(()),
            false => {
                Err(unsupported(&format!("a post_processor that adds more than {MAX_AROUND} tokens to every text")))
            }
        }
    }
}

fn token_id(value: &Value) -> Result<u32, TextError> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|&id| id <= MAX_TOKEN_ID);
    id.ok_or_else(|| bad(format!("post_processor: {value} is no token id")))
}

fn bad(reason: String) -> TextError {
    TextError::BadTokenizer { reason: super::limits::clip(&reason) }
}

fn unsupported(what: &str) -> TextError {
    TextError::UnsupportedTokenizer { what: what.to_owned() }
}
