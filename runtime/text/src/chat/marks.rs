//! Telling the user's characters from the template's after rendering; see [`super`] for the idea.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Range;

use minijinja::value::Value;
use serde_json::{Map, Value as Json};

use super::TextError;
use super::python;
use super::source::Source;

/// Stand-ins come from these ranges: planes that Unicode has left empty, and its private planes.
const STAND_INS: [Range<u32>; 2] = [0x4_0000..0xE_0000, 0xF_0000..0x11_0000];

/// Roles that never count as the user's text, whatever the template does with them.
const ROLES: [&str; 9] =
    ["system", "developer", "user", "assistant", "tool", "function", "ipython", "observation", "model"];

/// A one-to-one exchange of the user's characters for stand-ins that occur nowhere else.
#[derive(Debug, Clone, Default)]
pub(super) struct Marks {
    to: HashMap<char, char>,
    from: HashMap<char, char>,
}

impl Marks {
    /// Marks for all characters of the `user`'s strings but white space, so that the engine can still trim and split
    /// lines. No mark occurs in `text`. Marks have the order of the characters, so sorting gives the same result.
    pub(super) fn new(user: &[&str], text: &str) -> Result<Self, TextError> {
        let mut chars = BTreeSet::new();
        for c in user.iter().flat_map(|s| s.chars()) {
            if !python::is_space(c) && chars.insert(c) {
                chars.extend(c.to_lowercase().chain(c.to_uppercase()));
            }
        }
        let taken: HashSet<char> = text.chars().filter(|&c| u32::from(c) >= 0x4_0000).collect();
        let mut free = STAND_INS
            .into_iter()
            .flatten()
            .filter_map(char::from_u32)
            .filter(|c| !taken.contains(c) && !chars.contains(c));
        let mut marks = Self::default();
        for &c in &chars {
            let Some(stand_in) = free.next() else {
                return Err(TextError::ChatRefused { reason: "the messages use too many different characters".into() });
            };
            marks.to.insert(c, stand_in);
            marks.from.insert(stand_in, c);
        }
        Ok(marks)
    }

    /// The stand-in of a character, or itself.
    pub(super) fn mark(&self, c: char) -> char {
        self.to.get(&c).copied().unwrap_or(c)
    }

    /// The character that `c` stands for, or itself.
    pub(super) fn plain(&self, c: char) -> char {
        self.from.get(&c).copied().unwrap_or(c)
    }

    /// Whether `c` is a stand-in.
    pub(super) fn is_mark(&self, c: char) -> bool {
        self.from.contains_key(&c)
    }

    /// `text` without stand-ins.
    pub(super) fn plain_text<'t>(&self, text: &'t str) -> Cow<'t, str> {
        if self.from.is_empty() || !text.chars().any(|c| self.is_mark(c)) {
            return Cow::Borrowed(text);
        }
        Cow::Owned(text.chars().map(|c| self.plain(c)).collect())
    }

    /// `text` without stand-ins, and the ranges of it that they stood for.
    pub(super) fn separate(&self, text: &str) -> (String, Vec<Range<usize>>) {
        let mut plain = String::with_capacity(text.len());
        let mut spans: Vec<Range<usize>> = Vec::new();
        for c in text.chars() {
            let start = plain.len();
            plain.push(self.plain(c));
            if self.is_mark(c) {
                match spans.last_mut() {
                    Some(last) if last.end == start => last.end = plain.len(),
                    _ => spans.push(start..plain.len()),
                }
            }
        }
        (plain, spans)
    }
}

/// Decides which of the user's strings are marked, and passes all of them to the engine.
pub(super) struct Marker<'a> {
    marks: &'a Marks,
    source: &'a Source,
    /// Spellings of the control tokens, and the characters with which they begin or end.
    controls: &'a [String],
    edges: HashSet<char>,
    /// Whether to mark only characters with which a control token begins or ends, and text between two of them (or
    /// the ends of a string) that is part of a control token.
    relaxed: bool,
}

impl<'a> Marker<'a> {
    /// For one rendering.
    pub(super) fn new(marks: &'a Marks, source: &'a Source, controls: &'a [String], relaxed: bool) -> Self {
        let ends = |token: &'a String| [token.chars().next(), token.chars().next_back()];
        let edges = controls.iter().flat_map(ends).flatten().collect();
        Self { marks, source, controls, edges, relaxed }
    }

    /// The messages as the template sees them.
    pub(super) fn messages(&self, messages: &[Map<String, Json>]) -> Value {
        let message = |fields: &Map<String, Json>| {
            Value::from_pairs(fields.iter().map(|(name, value)| {
                let role = value.as_str().filter(|role| name == "role" && ROLES.contains(role));
                let value = role.map_or_else(|| self.value(value), Value::from);
                let known = matches!(name.as_str(), "role" | "content");
                (if known { name.clone() } else { self.string(name, true) }, value)
            }))
        };
        messages.iter().map(message).collect()
    }

    /// Any JSON as the template sees it.
    pub(super) fn value(&self, json: &Json) -> Value {
        match json {
            Json::Null => Value::from(()),
            Json::Bool(b) => Value::from(*b),
            Json::Number(n) => match (n.as_i64(), n.as_u64()) {
                (Some(n), _) => Value::from(n),
                (_, Some(n)) => Value::from(n),
                _ => Value::from(n.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(s) => self.string(s, false).into(),
            Json::Array(items) => items.iter().map(|item| self.value(item)).collect(),
            Json::Object(fields) => {
                Value::from_pairs(fields.iter().map(|(key, value)| (self.string(key, true), self.value(value))))
            }
        }
    }

    fn string(&self, s: &str, is_key: bool) -> String {
        let own = self.source.literals.contains(s) || is_key && self.source.words.contains(s);
        if own && !self.is_dangerous(s) {
            return s.to_owned();
        }
        let mark = |c: char| self.marks.mark(c);
        if !self.relaxed {
            return s.chars().map(mark).collect();
        }
        let mut marked = String::with_capacity(s.len() * 2);
        for run in s.split_inclusive(|c| self.is_edge(c)) {
            let inner = run.trim_end_matches(|c| self.is_edge(c));
            if self.controls.iter().any(|token| token.contains(inner)) {
                marked.extend(inner.chars().map(mark));
            } else {
                marked.push_str(inner);
            }
            marked.extend(run[inner.len()..].chars().map(mark));
        }
        marked
    }

    /// Whether a string that the template also contains might help to form a control token: it contains one, or it is
    /// a part of one and the template can write the parts beside it.
    fn is_dangerous(&self, s: &str) -> bool {
        self.controls.iter().any(|token| {
            let inside = |(at, part): (usize, &str)| self.source.can_enclose(&token[..at], &token[at + part.len()..]);
            let starts = s.char_indices().skip(1).map(|(at, _)| &s[at..]);
            let ends = s.char_indices().skip(1).map(|(at, _)| &s[..at]);
            s.contains(token.as_str())
                || (!s.is_empty() && token.match_indices(s).any(inside))
                || starts.filter(|end| token.starts_with(end)).any(|end| inside((0, end)))
                || ends.filter(|start| token.ends_with(start)).any(|start| inside((token.len() - start.len(), start)))
        })
    }

    fn is_edge(&self, c: char) -> bool {
        self.edges.contains(&c)
    }
}

/// Every string in some JSON, keys included.
pub(super) fn strings<'j>(json: &'j Json, found: &mut Vec<&'j str>) {
    match json {
        Json::String(s) => found.push(s),
        Json::Array(items) => items.iter().for_each(|item| strings(item, found)),
        Json::Object(fields) => strings_of(fields, found),
        _ => {}
    }
}

/// Every string in a JSON object, keys included.
pub(super) fn strings_of<'j>(fields: &'j Map<String, Json>, found: &mut Vec<&'j str>) {
    for (key, value) in fields {
        found.push(key);
        strings(value, found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_one_to_one_and_in_order() {
        let user = ["zebra <|a|> É\u{40000}", "\u{40001} tab\t"];
        let marks = Marks::new(&user, "template \u{40002}").unwrap();
        for s in user {
            let marked: String = s.chars().map(|c| marks.mark(c)).collect();
            assert_eq!(marked.chars().count(), s.chars().count());
            assert_eq!(marks.plain_text(&marked), s);
            let visible = marked.chars().filter(|c| !c.is_whitespace());
            for c in visible {
                assert!(marks.is_mark(c) && !"\u{40000}\u{40001}\u{40002}".contains(c));
            }
        }
        assert!(marks.mark('a') < marks.mark('b') && marks.mark('z') < marks.mark('É'));
        assert_eq!(marks.mark(' '), ' ');
    }

    #[test]
    fn spans_are_those_of_the_marked_characters() {
        let marks = Marks::new(&["<é>"], "").unwrap();
        let user: String = "<é>".chars().map(|c| marks.mark(c)).collect();
        let (text, spans) = marks.separate(&format!("<a>{user}<b>{user}"));
        assert_eq!(text, "<a><é><b><é>");
        assert_eq!(spans, [3..7, 10..14]);
    }
}
