//! The tokens that were actually read and sampled, so that the next turn of a conversation continues exactly those.
//!
//! A client sends an answer back as text. The tokenizer's tokens for that text need not be those that the model sampled, and the
//! kept sequence would match only up to the first difference. So if a rendered prompt begins with the text of a transcript, the
//! transcript's tokens replace the prompt's own. A template that changes a message (it drops old thinking, for example) renders
//! another text, and from there on the prompt's own tokens are used.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use sluice_text::Tokenizer;

/// Most tokens of all transcripts together.
const MOST_TOKENS: usize = 4 << 20;

/// The tokens of the latest conversations.
#[derive(Debug, Default)]
pub struct Transcripts {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The latest is last.
    all: VecDeque<Arc<[u32]>>,
    tokens: usize,
}

impl Transcripts {
    /// Remembers a prompt and the tokens generated after it. A transcript that this one continues is forgotten.
    pub fn remember(&self, tokens: Vec<u32>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.all.retain(|other| !tokens.starts_with(other));
        state.all.push_back(tokens.into());
        state.tokens = state.all.iter().map(|tokens| tokens.len()).sum();
        while state.tokens > MOST_TOKENS
            && let Some(oldest) = state.all.pop_front()
        {
            state.tokens -= oldest.len();
        }
    }

    /// Forgets all transcripts.
    pub fn clear(&self) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = State::default();
    }

    /// The tokens of a prompt, in which the tokens of the transcript that it continues replace its own.
    ///
    /// `own` are the tokenizer's tokens for the prompt; `text` is its text.
    pub fn continue_from(&self, tokenizer: &Tokenizer, text: &str, own: Vec<u32>) -> Vec<u32> {
        let all = self.state.lock().unwrap_or_else(PoisonError::into_inner).all.clone();
        if all.is_empty() {
            return own;
        }
        // Positions at which tokens begin. They cannot be found if the tokenizer changes the text (Unicode forms, a space before
        // it).
        let Some(starts) = starts(tokenizer, &own, text) else { return own };
        let prompt = Rendered { tokenizer, text: text.as_bytes(), own: &own, starts: &starts };
        let best = all.iter().filter_map(|transcript| Some((prompt.common(transcript)?, transcript)));
        match best.max_by_key(|((_, used), _)| *used) {
            Some(((taken, used), transcript)) => [&transcript[..taken], &own[used..]].concat(),
            None => own,
        }
    }
}

/// The offset in the text at which each token begins, and the length of the text; `None` if the tokens are not exactly the text.
fn starts(tokenizer: &Tokenizer, ids: &[u32], text: &str) -> Option<Vec<usize>> {
    let mut starts = Vec::with_capacity(ids.len() + 1);
    let mut at = 0;
    for &id in ids {
        starts.push(at);
        let bytes = tokenizer.token_bytes(id).ok()??;
        if !text.as_bytes()[at..].starts_with(&bytes) {
            return None;
        }
        at += bytes.len();
    }
    starts.push(at);
    (at == text.len()).then_some(starts)
}

/// A prompt with the tokenizer's tokens.
struct Rendered<'a> {
    tokenizer: &'a Tokenizer,
    text: &'a [u8],
    own: &'a [u32],
    starts: &'a [usize],
}

impl Rendered<'_> {
    /// How many tokens of a transcript can be used, and how many of the prompt's own they replace. Both have the same text and the
    /// same control tokens at the same places, and end beside a control token, where tokenizers start afresh.
    fn common(&self, transcript: &[u32]) -> Option<(usize, usize)> {
        let (mut at, mut own) = (0, 0);
        let mut best = None;
        for (taken, &id) in transcript.iter().enumerate() {
            let boundary = self.boundary(at, &mut own);
            let control = self.tokenizer.is_control(id);
            let own_control = boundary && self.own.get(own).is_some_and(|&id| self.tokenizer.is_control(id));
            if own_control && taken > 0 {
                best = Some((taken, own));
            }
            // A control token stands only for itself, in both.
            if (control || own_control) && !(boundary && self.own.get(own) == Some(&id)) {
                return best;
            }
            let Ok(Some(bytes)) = self.tokenizer.token_bytes(id) else { return best };
            if !self.text[at..].starts_with(&bytes) || self.hides_control(at, at + bytes.len(), own) {
                return best;
            }
            at += bytes.len();
            if control {
                best = Some((taken + 1, own + 1));
            }
        }
        let boundary = self.boundary(at, &mut own);
        let next_is_control = self.own.get(own).is_some_and(|&id| self.tokenizer.is_control(id));
        if boundary && next_is_control { Some((transcript.len(), own)) } else { best }
    }

    /// Whether one of the prompt's own tokens begins at `at`; moves `own` to the first that does not begin before.
    fn boundary(&self, at: usize, own: &mut usize) -> bool {
        while *own < self.own.len() && self.starts[*own] < at {
            *own += 1;
        }
        self.starts[*own] == at
    }

    /// Whether one of the prompt's own control tokens begins inside this range of the text.
    fn hides_control(&self, from: usize, to: usize, own: usize) -> bool {
        let inside = (own..self.own.len()).take_while(|&i| self.starts[i] < to);
        inside.filter(|&i| self.starts[i] > from).any(|i| self.tokenizer.is_control(self.own[i]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes are tokens, `ab` is also a token, and `<end>` is a control token.
    fn tokenizer() -> Tokenizer {
        let mut vocab = serde_json::Map::new();
        for (id, c) in ('!'..='~').chain(['Ġ', 'Ċ']).enumerate() {
            vocab.insert(c.to_string(), id.into());
        }
        let next = vocab.len();
        vocab.insert("ab".into(), next.into());
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": [{"id": next + 1, "content": "<end>", "special": true, "normalized": false,
                              "single_word": false, "lstrip": false, "rstrip": false}],
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true, "trim_offsets": true},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true, "trim_offsets": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "dropout": null, "unk_token": null},
        });
        Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
    }

    struct Fixture {
        tokenizer: Tokenizer,
        transcripts: Transcripts,
    }

    impl Fixture {
        fn new() -> Self {
            Fixture { tokenizer: tokenizer(), transcripts: Transcripts::default() }
        }

        /// One token for each character; `$` represents the control token.
        fn ids(&self, text: &str) -> Vec<u32> {
            let id = |c: char| match c {
                '$' => self.tokenizer.token_id("<end>").unwrap(),
                c => self.tokenizer.token_id(&c.to_string()).unwrap(),
            };
            text.chars().map(id).collect()
        }

        fn prompt(&self, text: &str) -> (String, Vec<u32>) {
            let text = text.replace('$', "<end>");
            let own = self.tokenizer.encode(&text, false).unwrap();
            (text, own)
        }

        fn continued(&self, text: &str) -> Vec<u32> {
            let (text, own) = self.prompt(text);
            self.transcripts.continue_from(&self.tokenizer, &text, own)
        }

        fn own(&self, text: &str) -> Vec<u32> {
            self.prompt(text).1
        }
    }

    #[test]
    fn sampled_tokens_take_the_place_of_rendered_ones() {
        let fixture = Fixture::new();
        // Sampled as `a`, `b`; the tokenizer makes `ab`.
        fixture.transcripts.remember(fixture.ids("hi$ab$"));
        assert_eq!(fixture.own("ab").len(), 1);
        let expected = [fixture.ids("hi$ab$"), fixture.own("abc")].concat();
        assert_eq!(fixture.continued("hi$ab$abc"), expected);
        // Without the end token, which a sequence has not seen if it was sampled last.
        let fixture = Fixture::new();
        fixture.transcripts.remember(fixture.ids("hi$ab"));
        let expected = [fixture.ids("hi$ab"), fixture.own("$abc")].concat();
        assert_eq!(fixture.continued("hi$ab$abc"), expected);
    }

    #[test]
    fn what_a_template_changes_counts() {
        let fixture = Fixture::new();
        fixture.transcripts.remember(fixture.ids("hi$thinking$ab$"));
        assert_eq!(fixture.continued("hi$ab$abc"), fixture.own("hi$ab$abc"));
        // Only up to the last control token: after it, texts are tokenised together.
        let expected = [fixture.ids("hi$"), fixture.own("thinker$ab")].concat();
        assert_eq!(fixture.continued("hi$thinker$ab"), expected);
        assert_eq!(fixture.continued("other"), fixture.own("other"));
    }

    #[test]
    fn the_longest_of_several_counts() {
        let fixture = Fixture::new();
        fixture.transcripts.remember(fixture.ids("ab$c$"));
        fixture.transcripts.remember(fixture.ids("ab$c$ab$"));
        fixture.transcripts.remember(fixture.ids("ab$d$"));
        let expected = [fixture.ids("ab$c$ab$"), fixture.own("x")].concat();
        assert_eq!(fixture.continued("ab$c$ab$x"), expected);
    }

    #[test]
    fn text_that_spells_a_control_token_is_not_one() {
        let fixture = Fixture::new();
        fixture.transcripts.remember(fixture.ids("hi$x$"));
        let text = "hi<end>x<end>y".to_owned();
        // A user wrote the second one, not the template, so it is text in the prompt.
        let own = fixture.tokenizer.encode_untrusted(&text, std::slice::from_ref(&(8..13))).unwrap();
        let continued = fixture.transcripts.continue_from(&fixture.tokenizer, &text, own.clone());
        assert_eq!(continued, own);
        // The model wrote it as text, and the template writes it as a token.
        let fixture = Fixture::new();
        let spelled = [fixture.ids("hi$x"), fixture.ids("<end>"), fixture.ids("y$")].concat();
        fixture.transcripts.remember(spelled);
        assert_eq!(fixture.continued("hi$x$y$z"), fixture.own("hi$x$y$z"));
    }
}
