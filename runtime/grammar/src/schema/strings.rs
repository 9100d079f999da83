//! Regular expressions for the written form of JSON strings.
//!
//! Each character is written in only one way: as it is, or with the shortest escape if JSON demands one. So two strings are equal
//! exactly if they are written the same, and one set of strings can be subtracted from another.

use regex_syntax::hir::{Capture, Class, Hir, HirKind, Look, Repetition};

/// A character inside a string.
pub(crate) const CHARACTER: &str = r#"(?:[^"\\\x00-\x1F\x7F]|\\["\\bfnrt]|\\u00(?:0[0-7be-f]|1[0-9a-f]|7f))"#;

/// Longest pattern, in bytes.
const MAX_PATTERN_BYTES: usize = 4096;

/// Most alternatives with anchors of their own.
const MAX_ALTERNATIVES: usize = 64;

/// Any string with this many characters.
pub(crate) fn of_length(least: u64, most: Option<u64>) -> String {
    let most = most.map_or(String::new(), |most| most.to_string());
    format!("\"{CHARACTER}{{{least},{most}}}\"")
}

/// A string as it is written.
pub(crate) fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// Strings of which a part matches a pattern of JSON Schema (ECMA 262).
///
/// # Errors
/// The reason, if the pattern needs more than a regular language can express, or is not valid.
pub(crate) fn matching(pattern: &str) -> Result<String, String> {
    let hir = parse(&ecma(pattern))?;
    let mut parts = Vec::new();
    for Anchored { start, end, inner } in anchored(&hir)? {
        let before = if start { String::new() } else { format!("{CHARACTER}*") };
        let behind = if end { String::new() } else { format!("{CHARACTER}*") };
        parts.push(format!("{before}{}{behind}", quoted(&inner)?));
    }
    Ok(format!("\"(?:{})\"", parts.join("|")))
}

/// A regular expression for a whole text in Rust's syntax, in the form that the library takes: without anchors.
pub(crate) fn whole(regex: &str) -> Result<String, String> {
    let hir = parse(regex)?;
    let mut parts = Vec::new();
    for Anchored { inner, .. } in anchored(&hir)? {
        if has_look(&inner) {
            return Err("it has an assertion, such as `\\b` or an anchor in the middle".into());
        }
        parts.push(format!("(?:{inner})"));
    }
    Ok(parts.join("|"))
}

fn parse(pattern: &str) -> Result<Hir, String> {
    if pattern.len() > MAX_PATTERN_BYTES * 8 {
        return Err(format!("it has {} bytes, more than {MAX_PATTERN_BYTES}", pattern.len()));
    }
    let mut parser = regex_syntax::ParserBuilder::new().nest_limit(64).build();
    parser.parse(pattern).map_err(|e| match e {
        regex_syntax::Error::Parse(e) => e.kind().to_string(),
        regex_syntax::Error::Translate(e) => e.kind().to_string(),
        _ => "it is not a regular expression".to_owned(),
    })
}

/// Part of a pattern, and whether it stands at the beginning and at the end of the text.
struct Anchored {
    start: bool,
    end: bool,
    inner: Hir,
}

/// A pattern as alternatives without anchors inside.
fn anchored(hir: &Hir) -> Result<Vec<Anchored>, String> {
    let plain = |inner: &Hir| vec![Anchored { start: false, end: false, inner: inner.clone() }];
    if !has_look(hir) {
        return Ok(plain(hir));
    }
    let nested = || "an anchor or another assertion stands inside it".to_owned();
    match hir.kind() {
        HirKind::Look(Look::Start) => Ok(vec![Anchored { start: true, end: false, inner: Hir::empty() }]),
        HirKind::Look(Look::End) => Ok(vec![Anchored { start: false, end: true, inner: Hir::empty() }]),
        HirKind::Capture(Capture { sub, .. }) => anchored(sub),
        HirKind::Alternation(subs) => {
            let parts: Vec<Vec<Anchored>> = subs.iter().map(anchored).collect::<Result<_, _>>()?;
            Ok(parts.into_iter().flatten().collect())
        }
        HirKind::Concat(subs) => {
            let mut whole = vec![Anchored { start: false, end: false, inner: Hir::empty() }];
            for sub in subs {
                let parts = anchored(sub)?;
                if whole.len() * parts.len() > MAX_ALTERNATIVES {
                    return Err("it has too many anchors".into());
                }
                let mut next = Vec::new();
                for before in &whole {
                    for part in &parts {
                        let empty = |hir: &Hir| matches!(hir.kind(), HirKind::Empty);
                        // An anchor in the middle can hold only if everything on its other side is empty.
                        if (before.end && !empty(&part.inner)) || (part.start && !empty(&before.inner)) {
                            return Err(nested());
                        }
                        next.push(Anchored {
                            start: before.start || part.start,
                            end: before.end || part.end,
                            inner: Hir::concat(vec![before.inner.clone(), part.inner.clone()]),
                        });
                    }
                }
                whole = next;
            }
            Ok(whole)
        }
        _ => Err(nested()),
    }
}

fn has_look(hir: &Hir) -> bool {
    !hir.properties().look_set().is_empty()
}

/// Turns a pattern for texts into one for their written form inside a JSON string.
fn quoted(hir: &Hir) -> Result<String, String> {
    Ok(match hir.kind() {
        HirKind::Empty => "(?:)".to_owned(),
        HirKind::Literal(literal) => {
            let text = std::str::from_utf8(&literal.0).map_err(|_| "it has bytes that are not text".to_owned())?;
            text.chars().map(quoted_character).collect()
        }
        HirKind::Class(Class::Unicode(class)) => quoted_class(class.ranges().iter().map(|r| (r.start(), r.end()))),
        HirKind::Class(Class::Bytes(class)) => {
            if !class.is_ascii() {
                return Err("it has bytes that are not text".into());
            }
            quoted_class(class.ranges().iter().map(|r| (char::from(r.start()), char::from(r.end()))))
        }
        HirKind::Look(_) => return Err("it has an assertion, such as `\\b` or an anchor in the middle".into()),
        HirKind::Repetition(Repetition { min, max, sub, .. }) => {
            let max = max.map_or(String::new(), |max| max.to_string());
            format!("(?:{}){{{min},{max}}}", quoted(sub)?)
        }
        HirKind::Capture(Capture { sub, .. }) => quoted(sub)?,
        HirKind::Concat(subs) => subs.iter().map(quoted).collect::<Result<String, _>>()?,
        HirKind::Alternation(subs) => {
            let parts: Vec<String> = subs.iter().map(quoted).collect::<Result<_, _>>()?;
            format!("(?:{})", parts.join("|"))
        }
    })
}

fn needs_escape(c: char) -> bool {
    matches!(c, '"' | '\\' | '\0'..='\x1f' | '\x7f')
}

fn quoted_character(c: char) -> String {
    let written = quote(&c.to_string());
    regex_syntax::escape(&written[1..written.len() - 1])
}

fn quoted_class(ranges: impl Iterator<Item = (char, char)>) -> String {
    let (mut plain, mut escaped) = (String::new(), Vec::new());
    let mut add = |from: u32, to: u32| {
        if from <= to {
            plain.push_str(&format!("\\x{{{from:X}}}-\\x{{{to:X}}}"));
        }
    };
    for (start, end) in ranges {
        let mut from = u32::from(start);
        for code in (0..=0x7f).filter_map(char::from_u32).filter(|&c| needs_escape(c) && start <= c && c <= end) {
            if u32::from(code) > 0 {
                add(from, u32::from(code) - 1);
            }
            from = u32::from(code) + 1;
            escaped.push(quoted_character(code));
        }
        add(from, u32::from(end));
    }
    match (plain.is_empty(), escaped.is_empty()) {
        (true, true) => "[a&&b]".to_owned(),
        (false, true) => format!("[{plain}]"),
        (true, false) => format!("(?:{})", escaped.join("|")),
        (false, false) => format!("(?:[{plain}]|{})", escaped.join("|")),
    }
}

/// Rewrites a pattern of ECMA 262 in Rust's syntax, where the two differ.
pub(crate) fn ecma(pattern: &str) -> String {
    const SPACE: &str = r"\t\n\x0B\f\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff";
    let mut out = String::with_capacity(pattern.len() + 16);
    let mut chars = pattern.chars().peekable();
    let mut in_class = false;
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('d') => out.push_str("[0-9]"),
                Some('D') => out.push_str("[^0-9]"),
                Some('w') => out.push_str("[0-9A-Za-z_]"),
                Some('W') => out.push_str("[^0-9A-Za-z_]"),
                Some('s') => out.push_str(&format!("[{SPACE}]")),
                Some('S') => out.push_str(&format!("[^{SPACE}]")),
                Some('/') => out.push('/'),
                Some('c') if chars.peek().is_some_and(char::is_ascii_alphabetic) => {
                    let letter = chars.next().map_or(0, |c| u32::from(c) % 32);
                    out.push_str(&format!("\\x{letter:02X}"));
                }
                Some(c) => out.extend(['\\', c]),
                None => out.push('\\'),
            },
            '[' if in_class => out.push_str("\\["),
            '[' => {
                in_class = true;
                out.push('[');
                if chars.peek() == Some(&'^') {
                    out.extend(chars.next());
                }
            }
            ']' if in_class => {
                in_class = false;
                out.push(']');
            }
            '&' | '~' | '-' if in_class && chars.peek() == Some(&c) => out.extend(['\\', c]),
            '.' if !in_class => out.push_str(r"[^\n\r\u2028\u2029]"),
            c => out.push(c),
        }
    }
    out
}

/// Patterns for the standard formats. Every string that matches has the format, but a pattern may cover only a part
/// of it.
pub(crate) fn format(name: &str) -> Option<String> {
    const DATE: &str = "[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))";
    const TIME: &str =
        r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])";
    const OCTET: &str = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])";
    const LABEL: &str = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,30}[A-Za-z0-9])?";
    const ATOM: &str = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,32}";
    const PATH: &str = "(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})*";
    let uri = || {
        format!(
            r"(?:https?|ftp|file|ws|wss)://{LABEL}(?:\.{LABEL}){{0,5}}(?::[0-9]{{1,4}})?(?:/{PATH})*(?:\?{PATH})?(?:#{PATH})?"
        )
    };
    let regex = match name {
        "date" => DATE.to_owned(),
        "time" => TIME.to_owned(),
        "date-time" => format!("{DATE}T{TIME}"),
        "duration" => "P(?:[0-9]{1,9}W|[0-9]{1,9}D(?:T[0-9]{1,9}[HMS])?|[0-9]{1,9}Y(?:[0-9]{1,9}M)?|T(?:[0-9]{1,9}H(?:[0-9]{1,9}M(?:[0-9]{1,9}S)?)?|[0-9]{1,9}M(?:[0-9]{1,9}S)?|[0-9]{1,9}S))".to_owned(),
        "email" => format!(r"{ATOM}(?:\.{ATOM}){{0,3}}@{LABEL}(?:\.{LABEL}){{1,5}}"),
        "hostname" => format!(r"{LABEL}(?:\.{LABEL}){{0,5}}"),
        "ipv4" => format!(r"{OCTET}(?:\.{OCTET}){{3}}"),
        "ipv6" => "(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}|(?:[0-9a-fA-F]{1,4}:){1,6}:[0-9a-fA-F]{1,4}|::(?:[0-9a-fA-F]{1,4})?".to_owned(),
        "uuid" => "[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}".to_owned(),
        "uri" => uri(),
        _ => return None,
    };
    Some(format!("\"(?:{regex})\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_match(regex: &str, text: &str) -> bool {
        regex::Regex::new(&format!("^(?:{regex})$")).unwrap().is_match(&quote(text))
    }

    #[test]
    fn strings_are_matched_as_they_are_written() {
        for (pattern, yes, no) in [
            ("^a+$", vec!["a", "aa"], vec!["", "ab", "ba"]),
            ("a|^b", vec!["xay", "bx"], vec!["xb", ""]),
            ("^(a|b)c$|^$", vec!["ac", ""], vec!["c", "acx"]),
            (r#"^["\\]$"#, vec!["\"", "\\"], vec!["a", "\\\\"]),
            (r"^[^a]$", vec!["\n", "\u{7f}", "\"", "中"], vec!["a", ""]),
            (r"^.$", vec!["x", "\t"], vec!["\n", "\u{2028}"]),
            (r"^\d\w\s$", vec!["1a ", "0_\u{feff}"], vec!["١a ", "1é "]),
            (r"^\cA$", vec!["\u{1}"], vec!["cA"]),
            (r"^[[a&&b]$", vec!["[", "a", "&"], vec!["", "c"]),
            ("", vec!["", "anything \n\u{0}"], vec![]),
        ] {
            let regex = matching(pattern).unwrap();
            for text in yes {
                assert!(is_match(&regex, text), "{pattern}: {text:?} by {regex}");
            }
            for text in no {
                assert!(!is_match(&regex, text), "{pattern}: {text:?} by {regex}");
            }
        }
        for bad in ["(", "(?=a)", "a^b", r"\bword", r"(a)\1", "(^a)*"] {
            assert!(matching(bad).is_err(), "{bad}");
        }
        assert!(is_match(&of_length(2, Some(2)), "\u{1}🦀"));
        assert!(!is_match(&of_length(2, Some(2)), "🦀"));
        let every: String = (0..=0x100).filter_map(char::from_u32).collect();
        assert!(is_match(&of_length(0, None), &every));
    }

    #[test]
    fn formats_are_regular_expressions() {
        for (name, yes) in [
            ("date", "2024-02-28"),
            ("date-time", "2024-12-31T23:59:59.5Z"),
            ("email", "a.b@example.com"),
            ("ipv4", "255.0.10.1"),
            ("ipv6", "::1"),
            ("uuid", "00000000-0000-0000-0000-000000000000"),
            ("uri", "https://example.com/a?b=c#d"),
            ("duration", "P1Y2M"),
            ("hostname", "a-b.example"),
        ] {
            let regex = format(name).unwrap();
            assert!(is_match(&regex, yes), "{name}");
            assert!(!is_match(&regex, &format!("{yes} ")), "{name}");
        }
        assert_eq!(format("colour"), None);
    }
}
