//! The tokenizer of a GGUF file, as the files that Hugging Face's transformers would have made it of.
//!
//! llama.cpp's converter (`conversion/base.py`, `gguf-py/gguf/vocab.py`) writes down of a tokenizer its tokens, their types,
//! and its merges or scores. The steps before and after it leaves out, and writes a name for the pre-tokenizer
//! (`tokenizer.ggml.pre`) that llama.cpp (`src/llama-vocab.cpp`) knows. What is made here is the tokenizer.json that the file
//! was converted from, as far as that can be known: not what llama.cpp computes, which is the same for most texts.
//!
//! What a GGUF file does not say, and what is taken instead:
//!
//! * Whether a token eats the white space beside it: it does not.
//! * Whether SentencePiece's space is put before each piece of text between special tokens, or before the first: each.
//! * Unicode normalisation: what the published tokenizers of that name do.

mod bpe;
mod config;
mod json;
mod pre;
mod sentencepiece;
#[cfg(test)]
mod tests;
mod tiktoken;
mod vocabulary;

use super::metadata::{Metadata, Problem};
use vocabulary::Vocabulary;

/// Which algorithm the tokens are for.
pub(super) const MODEL: &str = "tokenizer.ggml.model";

/// Files of a checkpoint, by their names.
pub(crate) type TextFiles = Vec<(&'static str, Vec<u8>)>;

/// The tokenizer's files (`tokenizer.json`, or for Kimi `tiktoken.model`; `tokenizer_config.json` with the chat templates) and
/// `generation_config.json`. None at all if the file says that it has no tokenizer.
///
/// # Errors
/// When the metadata is damaged or contradicts itself, or the tokenizer is of a kind that is not supported.
pub(crate) fn text_files(metadata: &Metadata) -> Result<TextFiles, Problem> {
    let model = match metadata.text(MODEL)? {
        None | Some("no_vocab" | "none") => return Ok(Vec::new()),
        Some(model) => model,
    };
    let (vocabulary, (name, bytes)) = match model {
        "gpt2" | "gemma4" => {
            let vocabulary = Vocabulary::read(metadata, false)?;
            let file = bpe::file(metadata, model, &vocabulary)?;
            (vocabulary, file)
        }
        "llama" => {
            let vocabulary = Vocabulary::read(metadata, true)?;
            let file = ("tokenizer.json", sentencepiece::tokenizer_json(metadata, &vocabulary)?);
            (vocabulary, file)
        }
        other => {
            let problem = format!(
                "is {other:?}, which is not supported (`gpt2`, `gemma4` and `llama` are): convert the checkpoint that this \
                 file was made of instead"
            );
            return Err(Problem::new(MODEL, problem));
        }
    };
    Ok(vec![
        (name, bytes),
        ("tokenizer_config.json", config::tokenizer_config(metadata, &vocabulary)?),
        ("generation_config.json", config::generation_config(metadata, &vocabulary)?),
    ])
}
