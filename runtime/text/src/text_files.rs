//! The text files of a model together: tokenizer, chat template, and the settings that its authors recommend.

use sluice_format::Metadata;

use super::{ChatTemplate, GenerationDefaults, StopCondition, TextError, Tokenizer};

/// What a model's own text files say. Cheap to clone: the tokenizer and the template are shared.
#[derive(Debug, Clone)]
pub struct TextFiles {
    /// The tokenizer, if the model has one.
    pub tokenizer: Option<Tokenizer>,
    /// The chat template, if the model has one.
    pub template: Option<ChatTemplate>,
    /// What its authors recommend.
    pub defaults: GenerationDefaults,
    /// The tokens that end an answer.
    pub stop: StopCondition,
}

impl TextFiles {
    /// Reads the files that a model file keeps of its checkpoint.
    ///
    /// # Errors
    /// What is wrong with one of them.
    pub fn of(metadata: &Metadata) -> Result<Self, TextError> {
        Self::with_tokenizer(Tokenizer::of(metadata)?, metadata)
    }

    /// The same with the [`Tokenizer::of`] these files, which somebody has built already: a large one takes some tenths of a second.
    ///
    /// # Errors
    /// What is wrong with one of the other files.
    pub fn with_tokenizer(tokenizer: Option<Tokenizer>, metadata: &Metadata) -> Result<Self, TextError> {
        let template = ChatTemplate::find(|name| metadata.get(name))?;
        let defaults = GenerationDefaults::of(metadata)?;
        // Fine-tuned models often name a new end token only in the tokenizer's files.
        let own_end = tokenizer.as_ref().and_then(Tokenizer::end_token);
        let stop = StopCondition::new(defaults.eos.iter().copied().chain(own_end), Vec::new())?;
        Ok(TextFiles { tokenizer, template, defaults, stop })
    }
}
