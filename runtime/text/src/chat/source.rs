//! Reads a template's source before `minijinja` does: makes small rewrites that compensate for differences from
//! Jinja2, and lists the template's own words, to tell them from the user's words.

use std::collections::HashSet;

use super::TextError;

/// Largest template accepted. The largest published ones have about 30 KB.
pub(super) const MAX_TEMPLATE_BYTES: usize = 1 << 20;

/// Most pieces of a single tag: names, numbers, signs. The engine's stack grows with them. Real
/// templates stay below 300.
const MAX_PIECES: usize = 2_000;

/// Name of the test that stands in for the operator `in`; see [`rewrite_in`].
pub(super) const IN_TEST: &str = "__in";

/// Name of the filter that is added to values whose size matters; see [`guard`].
pub(super) const GUARD_FILTER: &str = "__paid";

/// A template's source, ready for the engine, and the words in it.
#[derive(Debug, Clone)]
pub(super) struct Source {
    /// The rewritten source. Lines are where they were.
    pub(super) text: String,
    /// Every string literal, without its quotes and escapes.
    pub(super) literals: HashSet<String>,
    /// Every name, keyword or attribute.
    pub(super) words: HashSet<String>,
    /// Every piece of text that may stand directly beside a value in the output: literals, and the
    /// text between tags.
    fragments: Vec<String>,
}

/// The kind of a piece of a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Literal,
    Word,
    Other,
}

/// A piece of a tag, by its place in the source.
#[derive(Debug, Clone, Copy)]
struct Piece {
    kind: Kind,
    start: usize,
    end: usize,
}

impl Source {
    /// Reads a template.
    pub(super) fn read(source: &str) -> Result<Self, TextError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(TextError::ChatTemplate {
                line: None,
                reason: format!("it has {} bytes, more than the {MAX_TEMPLATE_BYTES} accepted", source.len()),
            });
        }
        // As Jinja2 does before anything else.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let mut read = Self {
            text: String::with_capacity(source.len() + 256),
            literals: HashSet::new(),
            words: HashSet::new(),
            fragments: Vec::new(),
        };
        read.scan(&source)?;
        Ok(read)
    }

    /// Whether the template can write `left` directly before a value and `right` directly after it, or the parts of
    /// them next to the value, if other values supply the rest.
    pub(super) fn can_enclose(&self, left: &str, right: &str) -> bool {
        let any = |fits: &dyn Fn(&str) -> bool| self.fragments.iter().any(|f| fits(f));
        (left.is_empty() || any(&|f| !f.is_empty() && (f.ends_with(left) || left.ends_with(f))))
            && (right.is_empty() || any(&|f| !f.is_empty() && (f.starts_with(right) || right.starts_with(f))))
    }

    fn scan(&mut self, source: &str) -> Result<(), TextError> {
        let mut at = 0;
        while let Some(open) = next_tag(source, at) {
            self.add_data(&source[at..open]);
            if source[open..].starts_with("{#") {
                let end = source[open..].find("#}").map_or(source.len(), |n| open + n + 2);
                self.text.push_str(&source[open..end]);
                at = end;
                continue;
            }
            let close = if source[open..].starts_with("{%") { "%}" } else { "}}" };
            let (pieces, end) = pieces(source, open + 2, close);
            if pieces.len() > MAX_PIECES {
                return Err(TextError::ChatTemplate {
                    line: Some(1 + source[..open].matches('\n').count()),
                    reason: format!("a tag consists of more than {MAX_PIECES} names, numbers and signs"),
                });
            }
            self.add_tag(source, open, end, &pieces);
            at = end;
            if is_word(source, &pieces, "raw") && pieces.len() == 1 && close == "%}" {
                let end = end_of_raw(source, at);
                self.add_data(&source[at..end]);
                at = end;
            }
        }
        self.add_data(&source[at..]);
        Ok(())
    }

    fn add_data(&mut self, data: &str) {
        self.text.push_str(data);
        if !data.is_empty() {
            self.fragments.push(data.to_owned());
            self.fragments.push(data.trim().to_owned());
        }
    }

    fn add_tag(&mut self, source: &str, open: usize, end: usize, pieces: &[Piece]) {
        for piece in pieces {
            let text = &source[piece.start..piece.end];
            match piece.kind {
                Kind::Literal => {
                    let inner = unescape(text.get(1..text.len().max(2) - 1).unwrap_or(""));
                    self.fragments.push(inner.clone());
                    self.literals.insert(inner);
                }
                Kind::Word => {
                    self.words.insert(text.to_owned());
                }
                Kind::Other => {}
            }
        }
        let mut edits = Vec::new();
        if pieces.len() == 1 && source[open..].starts_with("{%") {
            // A mark for training code; everywhere else, a block that does nothing.
            for (from, to) in [("generation", "with"), ("endgeneration", "endwith")] {
                if is_word(source, pieces, from) {
                    edits.push((pieces[0].start, pieces[0].end, to.to_owned()));
                }
            }
        }
        for at in 0..pieces.len() {
            rewrite_in(source, pieces, at, &mut edits);
            guard(source, pieces, at, &mut edits);
        }
        if is_word(source, pieces, "set") && source[open..].starts_with("{%") {
            guard_assignment(source, pieces, &mut edits);
        }
        // Edits that insert at the same place stay in their order: from the inside out.
        edits.sort_by_key(|edit| edit.0);
        let mut at = open;
        for (from, to, text) in edits {
            self.text.push_str(&source[at..from]);
            self.text.push_str(&text);
            at = to;
        }
        self.text.push_str(&source[at..end]);
    }
}

fn next_tag(source: &str, from: usize) -> Option<usize> {
    let mut at = from;
    while let Some(n) = source[at..].find('{') {
        at += n;
        if matches!(source.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#')) {
            return Some(at);
        }
        at += 1;
    }
    None
}

/// Whether a tag begins with `word`.
fn is_word(source: &str, pieces: &[Piece], word: &str) -> bool {
    pieces.first().is_some_and(|p| p.kind == Kind::Word && &source[p.start..p.end] == word)
}

/// Where the tag that ends a raw block begins.
fn end_of_raw(source: &str, from: usize) -> usize {
    let mut at = from;
    while let Some(n) = source[at..].find("{%") {
        at += n;
        let (pieces, _) = pieces(source, at + 2, "%}");
        if is_word(source, &pieces, "endraw") {
            return at;
        }
        at += 2;
    }
    source.len()
}

/// The pieces of a tag whose inside starts at `from`, and where the tag ends. The signs for
/// whitespace control beside the delimiters are left out.
fn pieces(source: &str, from: usize, close: &str) -> (Vec<Piece>, usize) {
    let bytes = source.as_bytes();
    let mut pieces = Vec::new();
    let mut at = from;
    let mut depth = 0usize;
    if matches!(bytes.get(at), Some(b'-' | b'+')) {
        at += 1;
    }
    while at < bytes.len() {
        // Within brackets, `}}` closes two mappings and not the tag.
        if depth == 0 && source[at..].starts_with(close) {
            if let Some(last) = pieces.last()
                && matches!(*last, Piece { start, end, .. } if end == at
                    && matches!(&source[start..end], "-" | "+"))
            {
                pieces.pop();
            }
            return (pieces, at + 2);
        }
        let start = at;
        let kind = match bytes[at] {
            quote @ (b'"' | b'\'') => {
                at += 1;
                while at < bytes.len() && bytes[at] != quote {
                    at += 1 + usize::from(bytes[at] == b'\\');
                }
                at = (at + 1).min(bytes.len());
                while !source.is_char_boundary(at) {
                    at += 1;
                }
                Kind::Literal
            }
            b if b.is_ascii_alphanumeric() || b == b'_' => {
                while bytes.get(at).is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_') {
                    at += 1;
                }
                Kind::Word
            }
            b => {
                match b {
                    b'{' | b'[' | b'(' => depth += 1,
                    b'}' | b']' | b')' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                at += source[at..].chars().next().map_or(1, char::len_utf8);
                if b.is_ascii_whitespace() {
                    continue;
                }
                Kind::Other
            }
        };
        pieces.push(Piece { kind, start, end: at });
    }
    (pieces, source.len())
}

/// Turns `'…' in text` into `'…' is __in(text)` (and so with a plain name on the left), so that our own code
/// evaluates it. This is done only if both sides are simple and their ends are certain; otherwise the engine's
/// operator stays.
fn rewrite_in(source: &str, pieces: &[Piece], at: usize, edits: &mut Vec<(usize, usize, String)>) {
    let text = |i: usize| pieces.get(i).map_or("", |p| &source[p.start..p.end]);
    let before = |i: usize| i.checked_sub(1).map_or("", text);
    if text(at) != "in" || pieces[at].kind != Kind::Word || at == 0 {
        return;
    }
    let negated = before(at) == "not" && at >= 2;
    let left = if negated { at - 2 } else { at - 1 };
    if pieces[left].kind == Kind::Other
        || !matches!(before(left), "" | "if" | "elif" | "and" | "or" | "not" | "(" | "=" | "else")
        // An assignment, but no comparison.
        || (before(left) == "=" && left >= 2 && pieces[left - 2].kind != Kind::Word)
        || matches!(text(left), "not" | "for")
    {
        return;
    }
    let first = text(at + 1);
    let is_name = first.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    let Some(end) = end_of_chain(source, pieces, at + 1).filter(|_| is_name) else {
        return;
    };
    if !matches!(text(end), "" | "and" | "or" | "else" | "if" | ")" | "," | "]" | "}") {
        return;
    }
    // Other `in`s within would be rewritten as well; leave such chains alone.
    if (at + 1..end).any(|i| text(i) == "in") {
        return;
    }
    let from = pieces[left + 1].start;
    let not = if negated { "not " } else { "" };
    edits.push((from, pieces[at + 1].start, format!("is {not}{IN_TEST}(")));
    edits.push((pieces[end - 1].end, pieces[end - 1].end, ")".to_owned()));
}

/// Puts a filter after the right side of sums, products and comparisons, and before filters that compare. The filter
/// charges for the whole value. The engine charges nothing for what is nested in a value, and nothing for joining
/// lists without copying them, up to a depth where it copies everything: 33 times `x = x + x` would exhaust memory.
fn guard(source: &str, pieces: &[Piece], at: usize, edits: &mut Vec<(usize, usize, String)>) {
    let text = |i: usize| pieces.get(i).map_or("", |p| &source[p.start..p.end]);
    let before = at.checked_sub(1).map_or("", text);
    let guarded = match text(at) {
        "|" => {
            let compares = ["sort", "unique", "groupby", "min", "max", "select", "reject", "selectattr", "rejectattr"];
            if compares.contains(&text(at + 1)) {
                edits.push((pieces[at].start, pieces[at].start, format!("|{GUARD_FILTER}")));
            }
            false
        }
        "+" | "*" => true,
        "=" => matches!(before, "=" | "!" | "<" | ">"),
        "<" | ">" => text(at + 1) != "=",
        _ => false,
    };
    if !guarded || text(at + 1).starts_with(|c: char| c.is_ascii_digit()) {
        return;
    }
    if let Some(end) = end_of_chain(source, pieces, at + 1) {
        let end = pieces[end - 1].end;
        edits.push((end, end, format!("|{GUARD_FILTER}")));
    }
}

/// Charges for everything that is assigned, so that no loop can build a value that is too large, or nested too deeply
/// to be dropped.
fn guard_assignment(source: &str, pieces: &[Piece], edits: &mut Vec<(usize, usize, String)>) {
    let text = |i: usize| &source[pieces[i].start..pieces[i].end];
    let mut depth = 0usize;
    for at in 1..pieces.len().saturating_sub(1) {
        match text(at) {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            "=" if depth == 0 => {
                let (from, to) = (pieces[at + 1].start, pieces[pieces.len() - 1].end);
                edits.push((from, from, "(".to_owned()));
                edits.push((to, to, format!(")|{GUARD_FILTER}")));
                return;
            }
            _ => {}
        }
    }
}

/// The index behind `name.attribute['item'](arguments)…`, or behind something in brackets and what
/// follows it.
fn end_of_chain(source: &str, pieces: &[Piece], from: usize) -> Option<usize> {
    let text = |i: usize| pieces.get(i).map_or("", |p| &source[p.start..p.end]);
    let mut at = match (pieces.get(from)?.kind, text(from)) {
        (Kind::Word, "not" | "in" | "is" | "if") => return None,
        (Kind::Word, _) => from + 1,
        (Kind::Other, "(" | "[") => from,
        _ => return None,
    };
    loop {
        match text(at) {
            "." => at += 2,
            "[" | "(" => {
                let mut depth = 0usize;
                loop {
                    match text(at) {
                        "" => return None,
                        "[" | "(" | "{" => depth += 1,
                        "]" | ")" | "}" => depth = depth.saturating_sub(1),
                        _ => {}
                    }
                    at += 1;
                    if depth == 0 {
                        break;
                    }
                }
            }
            _ => return (at <= pieces.len()).then_some(at),
        }
    }
}

/// A literal's text, with the escapes that templates use.
fn unescape(literal: &str) -> String {
    let mut text = String::with_capacity(literal.len());
    let mut chars = literal.chars();
    while let Some(c) = chars.next() {
        match (c, c == '\\') {
            (_, false) => text.push(c),
            _ => match chars.next() {
                Some('n') => text.push('\n'),
                Some('t') => text.push('\t'),
                Some('r') => text.push('\r'),
                Some(digits @ ('x' | 'u')) => {
                    let len = if digits == 'x' { 2 } else { 4 };
                    let hex: String = chars.by_ref().take(len).collect();
                    let code = u32::from_str_radix(&hex, 16).ok();
                    text.extend(code.and_then(char::from_u32));
                }
                Some(other) => text.push(other),
                None => {}
            },
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(source: &str) -> String {
        Source::read(source).unwrap().text
    }

    #[test]
    fn containment_is_rewritten_where_it_is_simple() {
        for (from, to) in [
            ("{% if '</t>' in m.content %}", "{% if '</t>' is __in(m.content) %}"),
            ("{%- if '<' not in c[0]['x'] and y -%}", "{%- if '<' is not __in(c[0]['x']) and y -%}"),
            ("{{ 1 if (tag in c.strip()) else 2 }}", "{{ 1 if (tag is __in(c.strip())) else 2 }}"),
            ("{% if not 'a' in b or 'c' in d %}", "{% if not 'a' is __in(b) or 'c' is __in(d) %}"),
            ("{% set x = 'a' in b %}", "{% set x = ('a' is __in(b))|__paid %}"),
        ] {
            assert_eq!(text(from), to);
        }
        for same in [
            "{% for x in y %}",
            "{% for a, b in c.items() if d %}",
            "{% if 'a' ~ 'b' in c %}",
            "{% if 'a' in b | lower %}",
            "{% if 'a' in b ~ c %}",
            "{% if x.y in ['a', 'b'] %}",
            "{% if 'a' in ['a', 'b'] %}",
            "{{ \"'a' in b\" }}",
            "'a' in b {# 'a' in b #}",
            "{% raw %}{% if 'a' in b %}{% endraw %}",
        ] {
            assert_eq!(text(same), same);
        }
    }

    #[test]
    fn costs_are_guarded() {
        for (from, to) in [
            ("{{ a + b.c[0](d) }}", "{{ a + b.c[0](d)|__paid }}"),
            ("{{ a + 'b' + [c] * 2 }}", "{{ a + 'b' + [c]|__paid * 2 }}"),
            ("{{ 2 * (a + b) | list }}", "{{ 2 * (a + b|__paid)|__paid | list }}"),
            ("{%+ if a + b +%}", "{%+ if a + b|__paid +%}"),
            ("{% set n.x = [1] + n.y -%}", "{% set n.x = ([1] + n.y|__paid)|__paid -%}"),
            ("{% set x | f(a=1) %}", "{% set x | f(a=1) %}"),
            ("{% set a, b = 1, c == d %}", "{% set a, b = (1, c == d|__paid)|__paid %}"),
            ("{{ a <= b | sort and c > 2 }}", "{{ a <= b|__paid |__paid| sort and c > 2 }}"),
            ("{{ f(*x, a ** b) -}}", "{{ f(*x|__paid, a ** b|__paid) -}}"),
        ] {
            assert_eq!(text(from), to);
        }
    }

    #[test]
    fn generation_marks_become_blocks_that_do_nothing() {
        assert_eq!(
            text("{%- generation -%}a{% endgeneration %}{{ generation }}"),
            "{%- with -%}a{% endwith %}{{ generation }}"
        );
    }

    #[test]
    fn the_template_s_words_are_found() {
        let source = Source::read("<|{{ m['ro\\'le'] }}|>{% if x.y == \"a\\nb\" %}").unwrap();
        assert!(source.literals.contains("ro'le") && source.literals.contains("a\nb"));
        assert!(source.words.contains("y") && !source.words.contains("role"));
        assert!(source.can_enclose("<|", "|>") && !source.can_enclose("<|", ">") && source.can_enclose("<|", "|>x"));
    }

    #[test]
    fn unfinished_sources_are_read_without_a_panic() {
        for source in ["{", "{{", "{%", "{#", "{{ 'a", "{{ '\\", "{{ '\\é", "{% raw %}", "{{ é", "{%-"] {
            assert_eq!(text(source), source);
        }
        assert!(Source::read(&" ".repeat(MAX_TEMPLATE_BYTES + 1)).is_err());
    }
}
