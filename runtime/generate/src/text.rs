//! Turns tokens into text, up to a stop string.

use sluice_text::{Detokenizer, Emit, Special, StopCondition, StopMatcher, TextError, Tokenizer};

/// The text of one generation, as it becomes certain.
#[derive(Debug)]
pub(super) struct TextStream {
    detokenizer: Option<(Tokenizer, Detokenizer)>,
    special: Special,
    stop: StopCondition,
    matcher: StopMatcher,
    stopped: bool,
}

impl TextStream {
    pub(super) fn new(tokenizer: Option<&Tokenizer>, special: Special, stop: StopCondition) -> Self {
        let detokenizer = tokenizer.map(|t| (t.clone(), Detokenizer::with_special(t, special)));
        TextStream { detokenizer, special, matcher: stop.matcher(), stop, stopped: false }
    }

    /// Whether this token ends the generation.
    pub(super) fn is_end(&self, id: u32) -> bool {
        self.stop.is_eos(id)
    }

    /// Adds a token; returns the text that became certain with it, and whether a stop string was found.
    pub(super) fn push(&mut self, id: u32) -> Result<Emit, TextError> {
        let emit = match &mut self.detokenizer {
            None => Emit::default(),
            Some((tokenizer, detokenizer)) if detokenizer.hides(id) => {
                // The token is not shown, but its text may contain a stop string.
                let spelling = tokenizer.token_text(id).unwrap_or_default();
                let mut emit = self.matcher.push_hidden(&spelling);
                let length = self.matcher.matched().map_or(usize::MAX, |index| self.stop.strings()[index].len());
                if emit.stopped && length <= spelling.len() {
                    // The whole stop string is in the token, so all text before it counts.
                    emit.text += &detokenizer.finish()?;
                }
                emit
            }
            Some((_, detokenizer)) => self.matcher.push(&detokenizer.push(id)?),
        };
        self.stopped |= emit.stopped;
        Ok(emit)
    }

    /// Adds a token that ends the generation. It gives text only if special tokens are shown.
    pub(super) fn push_end(&mut self, id: u32) -> Result<Emit, TextError> {
        match self.special {
            Special::Shown => self.push(id),
            Special::Markup | Special::Hidden => Ok(Emit::default()),
        }
    }

    /// Ends the text: returns the text that was held back, and whether a stop string was found, now or earlier.
    pub(super) fn finish(&mut self) -> Result<Emit, TextError> {
        if self.stopped {
            return Ok(Emit { text: String::new(), stopped: true });
        }
        let piece = self.detokenizer.as_mut().map_or(Ok(String::new()), |(_, d)| d.finish())?;
        let mut emit = self.matcher.push(&piece);
        if !emit.stopped {
            emit.text += &self.matcher.finish();
        }
        self.stopped = emit.stopped;
        Ok(emit)
    }
}
