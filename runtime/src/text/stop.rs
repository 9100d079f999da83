//! Where a generation ends: end tokens and stop strings.

use std::collections::BTreeSet;

use super::TextError;

/// Longest stop string accepted, in bytes. Text that may be the beginning of a stop string is held
/// back, so a stop string of a page would look like a hang.
const MAX_STOP_BYTES: usize = 4096;

/// What ends a generation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopCondition {
    eos: BTreeSet<u32>,
    strings: Vec<String>,
}

impl StopCondition {
    /// Ends at any token of `eos` and before any of `strings`.
    ///
    /// # Errors
    /// When a string is empty or too long.
    pub fn new(eos: impl IntoIterator<Item = u32>, strings: Vec<String>) -> Result<Self, TextError> {
        for (index, string) in strings.iter().enumerate() {
            if string.is_empty() {
                return Err(TextError::EmptyStopString { index });
            }
            if string.len() > MAX_STOP_BYTES {
                return Err(TextError::StopStringTooLong { index, bytes: string.len(), limit: MAX_STOP_BYTES });
            }
        }
        Ok(Self { eos: eos.into_iter().collect(), strings })
    }

    /// Whether this token ends the generation. Its text is not part of the answer.
    pub fn is_eos(&self, id: u32) -> bool {
        self.eos.contains(&id)
    }

    /// The end tokens.
    pub fn eos(&self) -> &BTreeSet<u32> {
        &self.eos
    }

    /// The stop strings.
    pub fn strings(&self) -> &[String] {
        &self.strings
    }

    /// A matcher for one stream of text.
    pub fn matcher(&self) -> StopMatcher {
        StopMatcher {
            patterns: self.strings.iter().map(|s| Pattern::new(s)).collect(),
            held: String::new(),
            matched: None,
        }
    }
}

/// What may be shown after some text went in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Emit {
    /// Text that is certainly not part of a stop string.
    pub text: String,
    /// Whether a stop string was found: nothing more will come.
    pub stopped: bool,
}

/// Looks for stop strings in a stream of text pieces.
///
/// The text ends at the first stop string to be *complete*; of several that are complete at the
/// same character, the longest counts. What comes out is the text before it, and depends only on
/// the text that went in, not on how it was cut into pieces.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    /// The end of the text so far that may be the beginning of a stop string.
    held: String,
    /// Which stop string was found.
    matched: Option<usize>,
}

/// Knuth-Morris-Pratt: constant time per byte, however the stop string repeats itself.
#[derive(Debug, Clone)]
struct Pattern {
    bytes: Vec<u8>,
    /// `border[n]`: length of the longest proper prefix of the first `n` bytes that also ends them.
    border: Vec<usize>,
    /// How many bytes of the pattern the text so far ends with.
    state: usize,
}

impl Pattern {
    fn new(string: &str) -> Self {
        let bytes = string.as_bytes().to_vec();
        let mut border = vec![0; bytes.len() + 1];
        let mut length = 0;
        for at in 1..bytes.len() {
            while length > 0 && bytes[at] != bytes[length] {
                length = border[length];
            }
            if bytes[at] == bytes[length] {
                length += 1;
            }
            border[at + 1] = length;
        }
        Self { bytes, border, state: 0 }
    }

    /// Takes one byte of text; true when the pattern is complete, after which it must not be
    /// called again.
    fn step(&mut self, byte: u8) -> bool {
        while self.state > 0 && self.bytes[self.state] != byte {
            self.state = self.border[self.state];
        }
        if self.bytes[self.state] == byte {
            self.state += 1;
        }
        self.state == self.bytes.len()
    }
}

impl StopMatcher {
    /// Adds a piece of text. After a stop, text is swallowed.
    pub fn push(&mut self, piece: &str) -> Emit {
        if self.matched.is_some() {
            return Emit { text: String::new(), stopped: true };
        }
        let before = self.held.len();
        self.held.push_str(piece);
        for (at, &byte) in piece.as_bytes().iter().enumerate() {
            let mut longest = 0;
            for (index, pattern) in self.patterns.iter_mut().enumerate() {
                if pattern.step(byte) && pattern.bytes.len() > longest {
                    longest = pattern.bytes.len();
                    self.matched = Some(index);
                }
            }
            if self.matched.is_some() {
                self.held.truncate(before + at + 1 - longest);
                return Emit { text: std::mem::take(&mut self.held), stopped: true };
            }
        }
        // A stop string begins with the first byte of a character, and so does its beginning in
        // the text: this never cuts a character.
        let keep = self.patterns.iter().map(|p| p.state).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Emit { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// Ends the text and returns what was held back: it turned out not to be a stop string. The
    /// matcher can then be used for another text.
    pub fn finish(&mut self) -> String {
        self.matched = None;
        for pattern in &mut self.patterns {
            pattern.state = 0;
        }
        std::mem::take(&mut self.held)
    }

    /// Which stop string ended the text, as its position in [`StopCondition::strings`].
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn condition(strings: &[&str]) -> StopCondition {
        StopCondition::new([], strings.iter().map(|s| (*s).to_owned()).collect()).unwrap()
    }

    fn run(condition: &StopCondition, pieces: &[&str]) -> (String, bool) {
        let mut matcher = condition.matcher();
        let mut text = String::new();
        for piece in pieces {
            let emit = matcher.push(piece);
            text.push_str(&emit.text);
            if emit.stopped {
                return (text, true);
            }
        }
        (text + &matcher.finish(), false)
    }

    /// The definition, by looking at every beginning of the text.
    fn naive(strings: &[String], text: &str) -> (String, bool) {
        for end in (0..=text.len()).filter(|&e| text.is_char_boundary(e)) {
            let hit = strings.iter().filter(|s| text[..end].ends_with(s.as_str()));
            if let Some(longest) = hit.map(String::len).max() {
                return (text[..end - longest].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    #[test]
    fn found_wherever_the_text_is_cut() {
        let condition = condition(&["\n\nUser:", "停止"]);
        for text in ["hello\n\n\nUser: more", "你好停停止了", "nothing \n\nUse", "停"] {
            let want = naive(condition.strings(), text);
            let cuts: Vec<usize> = (0..=text.len()).filter(|&i| text.is_char_boundary(i)).collect();
            for &a in &cuts {
                for &b in cuts.iter().filter(|&&b| b >= a) {
                    let pieces = [&text[..a], &text[a..b], &text[b..]];
                    assert_eq!(run(&condition, &pieces), want, "{pieces:?}");
                }
            }
        }
    }

    #[test]
    fn holds_back_no_more_than_needed() {
        let mut matcher = condition(&["stop"]).matcher();
        assert_eq!(matcher.push("a st").text, "a ");
        assert_eq!(matcher.push("arts").text, "start");
        let emit = matcher.push("top it");
        assert_eq!((emit.text.as_str(), emit.stopped), ("", true));
        assert_eq!(matcher.matched(), Some(0));
        assert_eq!(matcher.push("more"), Emit { text: String::new(), stopped: true });
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn without_strings_everything_passes() {
        let stop = StopCondition::new([7, 9], Vec::new()).unwrap();
        assert_eq!(stop.matcher().push("abc").text, "abc");
        assert!(stop.is_eos(7) && stop.is_eos(9) && !stop.is_eos(8));
        assert_eq!(stop.eos().len(), 2);
    }

    #[test]
    fn senseless_strings_are_refused() {
        let new = |s: String| StopCondition::new([], vec!["ok".into(), s]).unwrap_err();
        assert_eq!(new(String::new()), TextError::EmptyStopString { index: 1 });
        assert!(matches!(new("x".repeat(5000)), TextError::StopStringTooLong { index: 1, .. }));
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(
            strings in prop::collection::vec("[ab中]{1,5}", 0..4),
            pieces in prop::collection::vec("[ab中国]{0,6}", 0..8),
        ) {
            let condition = StopCondition::new([], strings.clone()).unwrap();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (text, stopped) = run(&condition, &pieces);
            prop_assert!(strings.iter().all(|s| !text.contains(s.as_str())));
            prop_assert_eq!((text, stopped), naive(&strings, &pieces.concat()));
        }
    }
}
