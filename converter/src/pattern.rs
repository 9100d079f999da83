//! Patterns for names of files, as in the hub's programs, and for names of tensors, as in recipes.

/// A pattern that must match a whole name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(Vec<Piece>);

/// A part of a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    /// Any text, including `/` and dots.
    Any,
    /// Any character.
    One,
    /// A character in one of these ranges, or in none of them.
    Set {
        ranges: Vec<(char, char)>,
        negated: bool,
    },
    /// All digits at this place, if they are a number from the first to the last.
    Number(usize, usize),
}

impl Pattern {
    /// A pattern of file names: `*` matches any text, `?` one character, `[a-c]` one of these, `[!a]` one that is not one of these.
    /// A bracket that is not closed matches itself.
    pub fn of_files(text: &str) -> Self {
        let mut pieces = Pieces::default();
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            rest = &rest[c.len_utf8()..];
            match c {
                '*' => pieces.push(Piece::Any),
                '?' => pieces.push(Piece::One),
                '[' => match set(rest) {
                    Some((piece, behind)) => {
                        pieces.push(piece);
                        rest = behind;
                    }
                    None => pieces.add(c),
                },
                other => pieces.add(other),
            }
        }
        Pattern(pieces.0)
    }

    /// A pattern of names of tensors: `*` matches any text, `{3}` a number, `{0-2}` a number from the first to the last.
    ///
    /// # Errors
    /// A sentence about a brace that is not such a range.
    pub fn of_tensors(text: &str) -> Result<Self, String> {
        let mut pieces = Pieces::default();
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            rest = &rest[c.len_utf8()..];
            match c {
                '*' => pieces.push(Piece::Any),
                '{' => {
                    let wrong = || format!("`{text}` has a brace that is not a range of numbers such as {{0-3}}");
                    let (range, behind) = rest.split_once('}').ok_or_else(wrong)?;
                    let (first, last) = range.split_once('-').unwrap_or((range, range));
                    match (first.parse(), last.parse()) {
                        (Ok(first), Ok(last)) if first <= last => pieces.push(Piece::Number(first, last)),
                        _ => return Err(wrong()),
                    }
                    rest = behind;
                }
                other => pieces.add(other),
            }
        }
        Ok(Pattern(pieces.0))
    }

    /// Whether the whole name matches. The work is at most that of comparing the pattern at each place of the name.
    ///
    /// Only the last `*` is ever extended. That is enough: a piece between two `*` never ends earlier if it begins later (a number
    /// takes all digits at its place), so its first match leaves the most for the rest.
    pub fn matches(&self, name: &str) -> bool {
        let (mut piece, mut at) = (0, 0);
        // The piece after the last `*`, and the place where that `*` ends for now.
        let mut star = None;
        loop {
            let taken = match self.0.get(piece) {
                None if at == name.len() => return true,
                None => None,
                Some(Piece::Any) => {
                    star = Some((piece + 1, at));
                    Some(0)
                }
                Some(other) => other.taken(&name[at..]),
            };
            if let Some(taken) = taken {
                (piece, at) = (piece + 1, at + taken);
                continue;
            }
            let Some((behind, end)) = star else { return false };
            let Some(swallowed) = name[end..].chars().next() else { return false };
            (piece, at) = (behind, end + swallowed.len_utf8());
            star = Some((behind, at));
        }
    }
}

impl Piece {
    /// How many bytes at the beginning of a text this matches; `None` if it does not match. Not for [`Piece::Any`].
    fn taken(&self, text: &str) -> Option<usize> {
        match self {
            Piece::Text(own) => text.starts_with(own.as_str()).then_some(own.len()),
            Piece::Any => Some(0),
            Piece::One => text.chars().next().map(char::len_utf8),
            Piece::Set { ranges, negated } => {
                let c = text.chars().next()?;
                let found = ranges.iter().any(|&(first, last)| (first..=last).contains(&c));
                (found != *negated).then_some(c.len_utf8())
            }
            Piece::Number(first, last) => {
                let digits = text.bytes().take_while(u8::is_ascii_digit).count();
                text[..digits].parse().is_ok_and(|n: usize| (*first..=*last).contains(&n)).then_some(digits)
            }
        }
    }
}

/// Pieces under construction.
#[derive(Default)]
struct Pieces(Vec<Piece>);

impl Pieces {
    fn push(&mut self, piece: Piece) {
        // Two adjacent `*` are the same as one.
        if piece != Piece::Any || self.0.last() != Some(&Piece::Any) {
            self.0.push(piece);
        }
    }

    /// Adds a character that matches itself.
    fn add(&mut self, c: char) {
        match self.0.last_mut() {
            Some(Piece::Text(text)) => text.push(c),
            _ => self.0.push(Piece::Text(c.into())),
        }
    }
}

/// The set whose opening bracket is before `text`, and the rest; `None` if no bracket closes it. A closing bracket in first place
/// belongs to the set.
fn set(text: &str) -> Option<(Piece, &str)> {
    let (negated, text) = match text.strip_prefix(['!', '^']) {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let end = text.char_indices().skip(1).find(|(_, c)| *c == ']')?.0;
    let chars: Vec<char> = text[..end].chars().collect();
    let mut ranges = Vec::new();
    let mut left = chars.as_slice();
    while let Some((&first, rest)) = left.split_first() {
        (left, ranges) = match rest {
            ['-', last, after @ ..] => (after, [ranges, vec![(first, *last)]].concat()),
            _ => (rest, [ranges, vec![(first, first)]].concat()),
        };
    }
    Some((Piece::Set { ranges, negated }, &text[end + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_match_as_in_shells() {
        let matches = |pattern: &str, path: &str| Pattern::of_files(pattern).matches(path);
        let yes = [
            ("*.json", "config.json"),
            ("*", ""),
            ("", ""),
            ("a*b*c", "aXbYbZc"),
            ("*.gguf", "Q4/x.gguf"),
            ("?.[jt]*", "a.txt"),
            ("[a-c]x", "bx"),
            ("[!a]x", "bx"),
            ("[]a]", "]"),
            ("[", "["),
            ("**", "x"),
            ("a]", "a]"),
            ("{0-3}", "{0-3}"),
            ("?é*", "üé"),
        ];
        for (pattern, path) in yes {
            assert!(matches(pattern, path), "{pattern} {path}");
        }
        let no = [
            ("*.json", "config.jsonl"),
            ("", "x"),
            ("a*b", "ac"),
            ("?", ""),
            ("[!a]x", "ax"),
            ("[a-c]", "d"),
            ("[c-a]", "b"),
            ("ab", "a"),
            ("é", "è"),
        ];
        for (pattern, path) in no {
            assert!(!matches(pattern, path), "{pattern} {path}");
        }
        assert!(!matches(&"*a".repeat(40), &"a".repeat(39)));
        assert!(matches(&"*a".repeat(40), &"ba".repeat(40)));
    }

    /// The meaning of a pattern in its simplest form: every length of each `*` is tried.
    fn plainly(pieces: &[Piece], name: &str) -> bool {
        let Some((piece, others)) = pieces.split_first() else { return name.is_empty() };
        match piece {
            Piece::Any => (0..=name.len()).any(|end| plainly(others, &name[end..])),
            other => other.taken(name).is_some_and(|taken| plainly(others, &name[taken..])),
        }
    }

    #[test]
    fn matching_is_the_plain_meaning() {
        let mut state = 1u64;
        let mut next = |n: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % n
        };
        let mut found = 0;
        for _ in 0..20_000 {
            let parts = ["a", "1", "2", "*", "*", "{1}", "{2-12}", "{0-300}"];
            let pattern: String = (0..next(7)).map(|_| parts[next(parts.len())]).collect();
            let name: String = (0..next(9)).map(|_| ["a", "1", "2"][next(3)]).collect();
            let pattern = Pattern::of_tensors(&pattern).unwrap();
            let want = plainly(&pattern.0, &name);
            assert_eq!(pattern.matches(&name), want, "{pattern:?} {name}");
            found += usize::from(want);
        }
        assert!(found > 1000, "{found}");
    }

    /// Trying all lengths of each `*` would not end here.
    #[test]
    fn many_stars_do_not_make_it_long() {
        let pattern = Pattern::of_tensors(&("*a".repeat(300) + "*b")).unwrap();
        assert!(!pattern.matches(&"a".repeat(20_000)));
        let pattern = Pattern::of_files(&("*[a]?".repeat(200) + "b"));
        assert!(!pattern.matches(&"a".repeat(20_000)));
    }
}
