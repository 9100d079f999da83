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
            held: Vec::new(),
            matched: None,
        }
    }
}

/// What may be shown after some text was added.
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
/// same character, the one that began first counts. What comes out is the text before it, and depends only on
/// the text that went in, not on how it was cut into pieces.
///
/// Pieces can be hidden: special tokens that a reader does not see. They never come out, but stop strings are looked for in the
/// text with them and in the text without them, and end either.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    /// The end of the text so far that may be the beginning of a stop string, hidden pieces included.
    held: Vec<Held>,
    /// Which stop string was found.
    matched: Option<usize>,
}

/// A byte that is held back.
#[derive(Debug, Clone, Copy)]
struct Held {
    byte: u8,
    hidden: bool,
}

/// A stop string for the search of Knuth, Morris and Pratt: constant time per byte, however the stop string repeats
/// itself.
#[derive(Debug, Clone)]
struct Pattern {
    bytes: Vec<u8>,
    /// `border[n]`: length of the longest proper prefix of the first `n` bytes that also ends them.
    border: Vec<usize>,
    /// With how many bytes of the pattern the text so far ends: the whole text, and the text without hidden pieces.
    state: [usize; 2],
}

/// Index of [`Pattern::state`] for the text with hidden pieces, and for the text without them.
const ALL: usize = 0;
const SHOWN: usize = 1;

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
        Self { bytes, border, state: [0; 2] }
    }

    /// Takes one byte of one of the texts; true when the pattern is complete, after which it must not be
    /// called again.
    fn step(&mut self, text: usize, byte: u8) -> bool {
        let state = &mut self.state[text];
        while *state > 0 && self.bytes[*state] != byte {
            *state = self.border[*state];
        }
        if self.bytes[*state] == byte {
            *state += 1;
        }
        *state == self.bytes.len()
    }
}

impl StopMatcher {
    /// Adds a piece of text. After a stop, text is swallowed.
    pub fn push(&mut self, piece: &str) -> Emit {
        self.take(piece, false)
    }

    /// Adds a piece that a reader does not see: the spelling of a special token.
    pub fn push_hidden(&mut self, piece: &str) -> Emit {
        self.take(piece, true)
    }

    fn take(&mut self, piece: &str, hidden: bool) -> Emit {
        if self.matched.is_some() {
            return Emit { text: String::new(), stopped: true };
        }
        for &byte in piece.as_bytes() {
            self.held.push(Held { byte, hidden });
            let mut start = None;
            for index in 0..self.patterns.len() {
                let pattern = &mut self.patterns[index];
                let length = pattern.bytes.len();
                let in_all = pattern.step(ALL, byte);
                let in_shown = !hidden && pattern.step(SHOWN, byte);
                let begins = [in_all.then(|| self.held.len() - length), in_shown.then(|| self.last_shown(length))];
                for at in begins.into_iter().flatten() {
                    if start.is_none_or(|earlier| at < earlier) {
                        start = Some(at);
                        self.matched = Some(index);
                    }
                }
            }
            if let Some(start) = start {
                self.held.truncate(start);
                return Emit { text: shown(&std::mem::take(&mut self.held)), stopped: true };
            }
        }
        // A stop string begins with the first byte of a character, and so does its beginning in
        // the text: this never cuts a character.
        let longest = |text: usize| self.patterns.iter().map(|p| p.state[text]).max().unwrap_or(0);
        let keep = (self.held.len() - longest(ALL)).min(self.last_shown(longest(SHOWN)));
        let rest = self.held.split_off(keep);
        Emit { text: shown(&std::mem::replace(&mut self.held, rest)), stopped: false }
    }

    /// Where the last `count` visible bytes begin.
    fn last_shown(&self, count: usize) -> usize {
        let mut left = count;
        let mut at = self.held.len();
        while left > 0 && at > 0 {
            at -= 1;
            left -= usize::from(!self.held[at].hidden);
        }
        at
    }

    /// Ends the text and returns what was held back: it turned out not to be a stop string. The
    /// matcher can then be used for another text.
    pub fn finish(&mut self) -> String {
        self.matched = None;
        for pattern in &mut self.patterns {
            pattern.state = [0; 2];
        }
        shown(&std::mem::take(&mut self.held))
    }

    /// Which stop string ended the text, as its position in [`StopCondition::strings`].
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }
}

/// The text of the visible bytes. They are whole characters, because pieces are, and cuts are made between characters.
fn shown(held: &[Held]) -> String {
    let bytes = held.iter().filter(|held| !held.hidden).map(|held| held.byte).collect();
    String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned())
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
    fn hidden_pieces_stop_and_do_not_show() {
        let run = |strings: &[&str], pieces: &[(&str, bool)]| {
            let mut matcher = condition(strings).matcher();
            let mut text = String::new();
            for &(piece, hidden) in pieces {
                let emit = if hidden { matcher.push_hidden(piece) } else { matcher.push(piece) };
                text += &emit.text;
                if emit.stopped {
                    return (text, true);
                }
            }
            (text + &matcher.finish(), false)
        };
        let pieces = [("Hello", false), ("<end>", true), ("\nUser", false), ("<end>", true)];
        assert_eq!(run(&["<end>"], &pieces), ("Hello".into(), true));
        assert_eq!(run(&["lo<end>\nU"], &pieces), ("Hel".into(), true));
        assert_eq!(run(&["User<end>"], &pieces), ("Hello\n".into(), true));
        // In the text that a reader sees, `lo` and the line end are neighbours.
        assert_eq!(run(&["lo\nUs"], &pieces), ("Hel".into(), true));
        assert_eq!(run(&["<end><end>", "<end>x"], &pieces), ("Hello\nUser".into(), false));
        assert_eq!(run(&[], &pieces), ("Hello\nUser".into(), false));
        // The possible beginning of a stop string is held back across a hidden piece too.
        let mut matcher = condition(&["lo there"]).matcher();
        assert_eq!(matcher.push("Hello").text, "Hel");
        assert_eq!(matcher.push_hidden("<end>").text, "");
        assert_eq!(matcher.push(" they").text, "lo they");
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
