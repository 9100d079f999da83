//! GGUF files, as llama.cpp has them, presented as the Hugging Face checkpoint that they were made of.

#![allow(dead_code, reason = "the source that reads these is not connected yet")]

pub(crate) mod metadata;
pub(crate) mod tokenizer;
