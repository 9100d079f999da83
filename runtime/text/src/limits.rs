//! Limits on what a tokenizer may take: time, size, and steps of its patterns.
//!
//! tokenizer.json is a small program. Real ones lengthen a text a little (by white space that becomes `▁`, by characters
//! that are taken apart) and take microseconds per word. A few lines in one can double the text twenty times, or backtrack
//! for ever, so everything that the file decides runs under these limits, which are far above what any published
//! tokenizer needs.

use std::time::{Duration, Instant};

use onig::{MatchParam, Regex, Region, SearchOptions};
use tokenizers::Offsets;
use tokenizers::tokenizer::pattern::Pattern;

use super::TextError;

/// Longest text that is turned into tokens at once. Doing that takes some hundred times the text's size in memory.
pub const MAX_TEXT_BYTES: usize = 64 << 20;

/// How many times its length a text may have after normalising, besides [`SPARE_BYTES`]. White space that becomes `▁` takes
/// three times its length; the longest expansion of a character in Unicode, that of U+FDFA, eleven times.
const MAX_GROWTH: usize = 16;
const SPARE_BYTES: usize = 64 << 10;
const SPARE_TOKEN_BYTES: usize = 256;

/// Time for one text, whatever its length.
pub(super) const BASE_TIME: Duration = Duration::from_secs(3);
/// Additional time for each byte of it: a minute per MiB. Published tokenizers take about a second; emulated
/// processors are slow.
const TIME_PER_BYTE: Duration = Duration::from_micros(57);

/// Longest explanation of another library that is passed on, in characters. Some quote the file.
const MAX_REASON_CHARS: usize = 300;

/// The least number of times that a pattern may try again at one place of a text. With it, a search at all places of a text
/// takes at worst about a second per MiB.
const LEAST_PATIENCE: u32 = 200;

/// A limit that was reached.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Stopped(String);

/// The limits of one piece of work.
#[derive(Debug)]
pub(super) struct Limits {
    until: Instant,
    time: Duration,
    bytes: usize,
}

impl Limits {
    /// Limits for work on a text of this many bytes.
    pub(super) fn of(text_bytes: usize) -> Self {
        Self::with_spare(text_bytes, SPARE_BYTES)
    }

    /// Limits for turning tokens whose spellings have this many bytes into text. This is done for every token, so the limits
    /// are tighter.
    pub(super) fn of_tokens(bytes: usize) -> Self {
        Self::with_spare(bytes, SPARE_TOKEN_BYTES)
    }

    fn with_spare(text_bytes: usize, spare: usize) -> Self {
        let time =
            TIME_PER_BYTE.saturating_mul(u32::try_from(text_bytes).unwrap_or(u32::MAX)).saturating_add(BASE_TIME);
        let bytes = text_bytes.saturating_mul(MAX_GROWTH).saturating_add(spare);
        let now = Instant::now();
        Self { until: now.checked_add(time).unwrap_or(now), time, bytes }
    }

    /// Whether there is time left.
    pub(super) fn check_time(&self) -> Result<(), Stopped> {
        match Instant::now() < self.until {
            true => Ok(()),
            false => Err(Stopped(format!("it has taken more than {} seconds", self.time.as_secs()))),
        }
    }

    /// Whether the text may become this long.
    pub(super) fn check_size(&self, bytes: usize) -> Result<(), Stopped> {
        match bytes <= self.bytes {
            true => Ok(()),
            false => Err(Stopped(format!("it makes more than {} bytes of the text", self.bytes))),
        }
    }
}

/// A library's explanation, short enough for a message.
pub(super) fn clip(reason: &str) -> String {
    match reason.char_indices().nth(MAX_REASON_CHARS) {
        Some((at, _)) => format!("{}…", &reason[..at]),
        None => reason.to_owned(),
    }
}

/// The error for a failure in the library: the limit that was reached, or what `otherwise` makes of the library's
/// message.
pub(super) fn explain(error: &tokenizers::Error, otherwise: impl FnOnce(String) -> TextError) -> TextError {
    match error.downcast_ref::<Stopped>() {
        Some(Stopped(what)) => TextError::Stopped { what: what.clone() },
        None => otherwise(clip(&error.to_string())),
    }
}

/// A pattern of tokenizer.json. The search is that of the `tokenizers` crate, but under limits.
#[derive(Debug)]
pub(super) struct Search {
    regex: Regex,
    /// Whether the pattern depends on where the search began, so that a search must not be divided.
    asks_for_start: bool,
}

impl Search {
    /// Compiles a pattern: a regular expression, or literal text.
    pub(super) fn new(pattern: &str, literal: bool) -> Result<Self, TextError> {
        let regex = match literal {
            true => Regex::new(&regex::escape(pattern)),
            false => Regex::new(pattern),
        };
        let bad = |e: onig::Error| TextError::BadTokenizer {
            reason: clip(&format!("the pattern {pattern:?} is not one: {}", e.description())),
        };
        Ok(Self { regex: regex.map_err(bad)?, asks_for_start: !literal && pattern.contains(r"\G") })
    }

    /// Calls `found` with all matches from left to right.
    pub(super) fn each(
        &self,
        text: &str,
        limits: &Limits,
        found: &mut dyn FnMut(usize, usize) -> Result<(), Stopped>,
    ) -> tokenizers::Result<()> {
        let (mut from, mut last_end) = (0, None);
        while from <= text.len() {
            let Some((start, end)) = self.next(text, from, limits)? else { break };
            limits.check_time()?;
            // As in the crate: an empty match does not count where another one has just ended.
            if start == end && last_end == Some(end) {
                from += text[from..].chars().next().map_or(1, char::len_utf8);
                continue;
            }
            found(start, end)?;
            from = end;
            last_end = Some(end);
        }
        Ok(())
    }

    /// The first match that begins at `from` or later.
    fn next(&self, text: &str, from: usize, limits: &Limits) -> tokenizers::Result<Option<(usize, usize)>> {
        let mut region = Region::new();
        let mut search = |param: MatchParam| {
            let options = SearchOptions::SEARCH_OPTION_NONE;
            self.regex.search_with_param(text, from, text.len(), options, Some(&mut region), param)
        };
        // Onig cannot be interrupted. A search with so few tries needs no interruption, and nearly all searches succeed
        // with it.
        if let Ok(found) = search(patience(0)) {
            return Ok(found.and_then(|_| region.pos(0)));
        }
        if self.asks_for_start {
            let found = search(patience(text.len())).map_err(|e| too_many_steps(&e))?;
            return Ok(found.and_then(|_| region.pos(0)));
        }
        // Search one place after the other, and check the clock in between.
        for at in (from..=text.len()).filter(|&at| text.is_char_boundary(at)) {
            limits.check_time()?;
            let options = SearchOptions::SEARCH_OPTION_NONE;
            let mut region = Region::new();
            let found = self.regex.match_with_param(text, at, options, Some(&mut region), patience(text.len()));
            if found.map_err(|e| too_many_steps(&e))?.is_some() {
                return Ok(region.pos(0));
            }
        }
        Ok(None)
    }
}

fn too_many_steps(error: &onig::Error) -> Stopped {
    Stopped(format!("one of its patterns takes too many steps ({})", error.description()))
}

/// How often a pattern may try again at one place, for a text of this many bytes. A pattern that looks at the whole text a
/// few times stays below that.
fn patience(text_bytes: usize) -> MatchParam {
    let bytes = u32::try_from(text_bytes).unwrap_or(u32::MAX);
    let mut param = MatchParam::default();
    param.set_retry_limit_in_match(bytes.saturating_mul(16).saturating_add(LEAST_PATIENCE));
    // Loops that never fail fill the stack instead.
    param.set_match_stack_limit(bytes.saturating_mul(16).saturating_add(100_000));
    param
}

/// A pattern whose matches split a text, or are each replaced by this many bytes.
pub(super) struct Cutting<'a> {
    pub(super) search: &'a Search,
    pub(super) limits: &'a Limits,
    /// Bytes that replace a match.
    pub(super) replacement: usize,
    /// Whether matches and what lies between them change places.
    pub(super) invert: bool,
}

impl Pattern for Cutting<'_> {
    fn find_matches(&self, inside: &str) -> tokenizers::Result<Vec<(Offsets, bool)>> {
        if inside.is_empty() {
            return Ok(vec![((0, 0), self.invert)]);
        }
        let (mut parts, mut done, mut added) = (Vec::new(), 0, 0);
        self.search.each(inside, self.limits, &mut |start, end| {
            if done != start {
                parts.push(((done, start), self.invert));
            }
            parts.push(((start, end), !self.invert));
            done = end;
            added += self.replacement;
            self.limits.check_size(added)
        })?;
        if done != inside.len() {
            parts.push(((done, inside.len()), self.invert));
        }
        Ok(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::utils::SysRegex;

    #[test]
    fn patterns_that_never_end_are_stopped() {
        let text = "a".repeat(2000) + "!";
        // The last ones never fail, so only the size of the stack can stop them.
        for pattern in [
            "(a+)+$",
            "(?:a|a)*b",
            "(a*)*b",
            "(?:(?:){9999}){9999}",
            "(((a?){999}){999}){999}",
            "((((){999}){999}){999}){999}",
        ] {
            let search = Search::new(pattern, false).unwrap();
            let started = Instant::now();
            let limits = Limits::of(text.len());
            let outcome = search.each(&text, &limits, &mut |_, _| limits.check_time());
            assert!(started.elapsed() < Duration::from_secs(8), "{pattern} {:?}", started.elapsed());
            if let Err(e) = outcome {
                let error = explain(&e, |reason| panic!("{reason}"));
                assert!(matches!(error, TextError::Stopped { .. }));
            }
        }
    }

    #[test]
    fn long_texts_are_no_reason_to_stop() {
        let text = " ".repeat(300_000) + "x";
        let search = Search::new(r"\s*[\r\n]+|\s+(?!\S)|\s+|\S", false).unwrap();
        let mut count = 0;
        search
            .each(&text, &Limits::of(text.len()), &mut |_, _| {
                count += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(count, 3);
    }

    #[test]
    fn reasons_are_cut_at_characters() {
        assert_eq!(clip("short"), "short");
        let long = clip(&"é".repeat(10_000));
        assert_eq!(long.chars().count(), MAX_REASON_CHARS + 1);
    }

    #[test]
    fn damaged_patterns_are_named() {
        let error = Search::new(&("(".repeat(10_000)), false).unwrap_err();
        assert!(matches!(error, TextError::BadTokenizer { reason } if reason.len() < 1000));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn matches_are_the_crate_s(
            text in prop_oneof!["[ab \n12]{0,40}", "\\PC{0,20}", "(é|中| |b){100,300}", "[ \n]{250,400}x"],
            pattern in prop::sample::select(vec![
                r"\p{N}{1,3}", "b*", r"(?=b)", r"\s+(?!\S)|\s+", r"\b", "$", "^", r"\G[ab]", "[^b]+", "(?<=a)b|1", r"\z",
            ]),
        ) {
            let ours = Search::new(pattern, false).unwrap();
            let limits = Limits::of(text.len());
            let cutting = Cutting { search: &ours, limits: &limits, replacement: 0, invert: false };
            let theirs = SysRegex::new(pattern).unwrap();
            prop_assert_eq!(cutting.find_matches(&text).unwrap(), (&theirs).find_matches(&text).unwrap());
        }
    }
}
