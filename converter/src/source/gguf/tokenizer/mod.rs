//! The tokenizer of a GGUF file, as the files of Hugging Face's transformers from which it was made.
//!
//! llama.cpp's converter (`conversion/base.py`, `gguf-py/gguf/vocab.py`) stores a tokenizer's tokens, their types, and its merges
//! or scores. It leaves out the steps before and after these, and writes a name for the pre-tokenizer (`tokenizer.ggml.pre`) that
//! llama.cpp (`src/llama-vocab.cpp`) knows. The result here is the tokenizer.json from which the file was converted, as far as that
//! can be known. It is not what llama.cpp computes, although that is the same for most texts.
//!
//! What a GGUF file does not say, and what is assumed instead:
//!
//! * Whether a token removes the white space beside it: it does not.
//! * Whether SentencePiece's space comes before each piece of text between special tokens, or before the first: before each.
//! * Unicode normalisation: that of the published tokenizers with the same name.

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

/// The algorithm of the tokens.
pub(super) const MODEL: &str = "tokenizer.ggml.model";

/// Files of a checkpoint, with their names.
pub(crate) type TextFiles = Vec<(&'static str, Vec<u8>)>;

/// The tokenizer's files (`tokenizer.json`, or for Kimi `tiktoken.model`; `tokenizer_config.json` with the chat templates) and
/// `generation_config.json`. Empty if the file says that it has no tokenizer.
///
/// # Errors
/// If the metadata is damaged or contradicts itself, or the kind of tokenizer is not supported.
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
