//! Python's string methods, for which marks make no difference: `split('</think>')` finds the user's `</think>` as
//! well, and its results are still marked as the user's.

use minijinja::value::{Kwargs, Rest, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind};

use super::marks::Marks;
use super::python::{Pay, invalid, is_space, to_str};

/// A string's characters, and the characters for which they stand.
pub(super) struct Text<'m> {
    marks: &'m Marks,
    pay: Pay<'m>,
    chars: Vec<char>,
    plain: Vec<char>,
}

impl<'m> Text<'m> {
    /// Reads a string.
    pub(super) fn new(marks: &'m Marks, pay: Pay<'m>, s: &str) -> Self {
        let chars: Vec<char> = s.chars().collect();
        let plain = chars.iter().map(|&c| marks.plain(c)).collect();
        Self { marks, pay, chars, plain }
    }

    fn slice(&self, from: usize, to: usize) -> Value {
        Value::from(self.chars[from..to].iter().collect::<String>())
    }

    fn needle(&self, value: &Value) -> Result<Vec<char>, Error> {
        let s = value.as_str();
        let s = s.ok_or_else(|| invalid(format!("expected a string, got {}", value.kind())))?;
        // A search takes at most as many steps as the product of both lengths.
        let (hay, needle) = (self.plain.len() as u64 / 64, s.len() as u64 / 64);
        (self.pay)((hay + 1) * (needle + 1))?;
        Ok(s.chars().map(|c| self.marks.plain(c)).collect())
    }

    fn find(&self, needle: &[char], from: usize) -> Option<usize> {
        let last = self.plain.len().checked_sub(needle.len())?;
        (from..=last).find(|&at| self.plain[at..].starts_with(needle))
    }

    fn rfind(&self, needle: &[char], to: usize) -> Option<usize> {
        let last = to.checked_sub(needle.len())?;
        (0..=last).rev().find(|&at| self.plain[at..].starts_with(needle))
    }

    /// Whether `needle` occurs.
    pub(super) fn contains(&self, needle: &Value) -> Result<bool, Error> {
        Ok(self.find(&self.needle(needle)?, 0).is_some())
    }

    /// Without the given characters, or white space, at the start and the end.
    pub(super) fn strip(&self, chars: Option<&Value>, start: bool, end: bool) -> Result<Value, Error> {
        let set = match chars.filter(|v| !v.is_none()) {
            Some(chars) => Some(self.needle(chars)?),
            None => None,
        };
        let stripped = |c: &char| set.as_ref().map_or_else(|| is_space(*c), |set| set.contains(c));
        let mut from = 0;
        let mut to = self.plain.len();
        while start && from < to && stripped(&self.plain[from]) {
            from += 1;
        }
        while end && from < to && stripped(&self.plain[to - 1]) {
            to -= 1;
        }
        Ok(self.slice(from, to))
    }

    /// Every occurrence of `old`, or the first `count`, replaced.
    pub(super) fn replace(&self, old: &Value, new: &Value, count: Option<i64>) -> Result<Value, Error> {
        let old = self.needle(old)?;
        let new = new.as_str().ok_or_else(|| invalid("`replace` needs strings"))?;
        let mut left = match count {
            Some(n) if n >= 0 => n as u64,
            _ => u64::MAX,
        };
        let mut out = String::new();
        let mut at = 0;
        while at <= self.plain.len() {
            if left > 0 && self.plain[at..].starts_with(&old) {
                (self.pay)(1 + new.len() as u64 / 64)?;
                out.push_str(new);
                left -= 1;
                at += old.len();
                if !old.is_empty() {
                    continue;
                }
            }
            out.extend(self.chars.get(at));
            at += 1;
        }
        Ok(Value::from(out))
    }

    fn split(&self, separator: Option<&Value>, max: Option<i64>) -> Result<Value, Error> {
        let mut left = max.filter(|n| *n >= 0).unwrap_or(i64::MAX);
        let mut parts = Vec::new();
        let mut from = 0;
        let Some(separator) = separator.filter(|v| !v.is_none()) else {
            loop {
                while self.plain.get(from).is_some_and(|c| is_space(*c)) {
                    from += 1;
                }
                if from == self.plain.len() {
                    break;
                }
                let rest = &self.plain[from..];
                let len = rest.iter().position(|c| is_space(*c)).filter(|_| left > 0);
                let to = from + len.unwrap_or(rest.len());
                parts.push(self.slice(from, to));
                left -= 1;
                from = to;
            }
            return Ok(Value::from(parts));
        };
        let needle = self.needle(separator)?;
        if needle.is_empty() {
            return Err(invalid("empty separator"));
        }
        while let Some(at) = self.find(&needle, from).filter(|_| left > 0) {
            parts.push(self.slice(from, at));
            from = at + needle.len();
            left -= 1;
        }
        parts.push(self.slice(from, self.plain.len()));
        Ok(Value::from(parts))
    }

    fn rsplit(&self, separator: Option<&Value>, max: Option<i64>) -> Result<Value, Error> {
        let (Some(separator), Some(mut left)) = (separator, max.filter(|n| *n >= 0)) else {
            return self.split(separator, None);
        };
        let needle = self.needle(separator)?;
        if needle.is_empty() {
            return Err(invalid("empty separator"));
        }
        let mut parts = Vec::new();
        let mut to = self.plain.len();
        while let Some(at) = self.rfind(&needle, to).filter(|_| left > 0) {
            parts.push(self.slice(at + needle.len(), to));
            to = at;
            left -= 1;
        }
        parts.push(self.slice(0, to));
        parts.reverse();
        Ok(Value::from(parts))
    }

    fn splitlines(&self, keep: bool) -> Value {
        let breaks =
            |c: char| matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
        let mut lines = Vec::new();
        let mut from = 0;
        while from < self.plain.len() {
            let len = self.plain[from..].iter().position(|c| breaks(*c));
            let to = from + len.unwrap_or(self.plain.len() - from);
            let next = match self.plain.get(to..) {
                Some(['\r', '\n', ..]) => to + 2,
                _ => (to + 1).min(self.plain.len()),
            };
            lines.push(self.slice(from, if keep { next } else { to }));
            from = next;
        }
        Value::from(lines)
    }

    fn partition(&self, separator: &Value, last: bool) -> Result<Value, Error> {
        let needle = self.needle(separator)?;
        let len = self.plain.len();
        let at = if last { self.rfind(&needle, len) } else { self.find(&needle, 0) };
        Ok(Value::from(match (at, last) {
            (Some(at), _) => {
                vec![self.slice(0, at), self.slice(at, at + needle.len()), self.slice(at + needle.len(), len)]
            }
            (None, false) => vec![self.slice(0, len), Value::from(""), Value::from("")],
            (None, true) => vec![Value::from(""), Value::from(""), self.slice(0, len)],
        }))
    }

    fn has_affix(&self, affix: &Value, at_end: bool) -> Result<bool, Error> {
        if matches!(affix.kind(), ValueKind::Seq | ValueKind::Iterable) {
            for affix in affix.try_iter()?.checked() {
                if self.has_affix(&affix?, at_end)? {
                    return Ok(true);
                }
            }
            return Ok(false);
        }
        let affix = self.needle(affix)?;
        Ok(if at_end { self.plain.ends_with(&affix) } else { self.plain.starts_with(&affix) })
    }

    fn count(&self, needle: &Value) -> Result<usize, Error> {
        let needle = self.needle(needle)?;
        let (mut at, mut count) = (0, 0);
        while let Some(found) = self.find(&needle, at) {
            count += 1;
            at = found + needle.len().max(1);
        }
        Ok(count)
    }

    /// Changes the case of each character; `upper` decides by whether a letter stands before it.
    pub(super) fn cased(&self, upper: impl Fn(Option<char>) -> bool) -> Value {
        let mut out = String::with_capacity(self.chars.len());
        for (at, (&c, &p)) in self.chars.iter().zip(&self.plain).enumerate() {
            let before = at.checked_sub(1).map(|i| self.plain[i]);
            let mark = |new: char| if c == p { new } else { self.marks.mark(new) };
            if upper(before) {
                out.extend(p.to_uppercase().map(mark));
            } else {
                out.extend(p.to_lowercase().map(mark));
            }
        }
        Value::from(out)
    }

    fn all(&self, is: impl Fn(char) -> bool) -> Value {
        Value::from(!self.plain.is_empty() && self.plain.iter().all(|c| is(*c)))
    }

    fn has_case(&self, is: impl Fn(char) -> bool, is_other: impl Fn(char) -> bool) -> Value {
        Value::from(self.plain.iter().any(|c| is(*c)) && !self.plain.iter().any(|c| is_other(*c)))
    }
}

/// Items with a string between them.
pub(super) fn join(marks: &Marks, pay: Pay<'_>, items: &Value, between: &str) -> Result<Value, Error> {
    let mut out = String::new();
    for (i, item) in items.try_iter()?.checked().enumerate() {
        if i > 0 {
            pay(1 + between.len() as u64 / 64)?;
            out.push_str(between);
        }
        let item = to_str(marks, pay, &item?)?;
        pay(item.len() as u64 / 64)?;
        out.push_str(&item);
    }
    Ok(Value::from(out))
}

/// A method of a string.
pub(super) fn method(marks: &Marks, pay: Pay<'_>, s: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let text = Text::new(marks, pay, s);
    pay(1 + text.chars.len() as u64 / 64)?;
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<Value>,) = from_args(args)?;
            text.strip(chars.as_ref(), name != "rstrip", name != "lstrip")
        }
        "split" | "rsplit" => {
            let (sep, max, named): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
            let sep = sep.or(named.get("sep")?);
            let max = max.or(named.get("maxsplit")?);
            named.assert_all_used()?;
            if name == "split" { text.split(sep.as_ref(), max) } else { text.rsplit(sep.as_ref(), max) }
        }
        "splitlines" => {
            let (keep, named): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = keep.or(named.get("keepends")?);
            Ok(text.splitlines(keep.unwrap_or(false)))
        }
        "partition" | "rpartition" => {
            let (sep,): (Value,) = from_args(args)?;
            text.partition(&sep, name == "rpartition")
        }
        "startswith" | "endswith" => {
            let (affix,): (Value,) = from_args(args)?;
            Ok(Value::from(text.has_affix(&affix, name == "endswith")?))
        }
        "removeprefix" | "removesuffix" => {
            let (affix,): (Value,) = from_args(args)?;
            let (at_end, len) = (name == "removesuffix", text.plain.len());
            let cut = if text.has_affix(&affix, at_end)? { text.needle(&affix)?.len() } else { 0 };
            Ok(if at_end { text.slice(0, len - cut) } else { text.slice(cut, len) })
        }
        "replace" => {
            let (old, new, count): (Value, Value, Option<i64>) = from_args(args)?;
            text.replace(&old, &new, count)
        }
        "find" | "rfind" | "index" | "rindex" => {
            let (needle,): (Value,) = from_args(args)?;
            let needle = text.needle(&needle)?;
            let at = match name.starts_with('r') {
                true => text.rfind(&needle, text.plain.len()),
                false => text.find(&needle, 0),
            };
            match at {
                None if name.ends_with("index") => Err(invalid("substring not found")),
                at => Ok(Value::from(at.map_or(-1, |at| at as i64))),
            }
        }
        "count" => {
            let (needle,): (Value,) = from_args(args)?;
            Ok(Value::from(text.count(&needle)?))
        }
        "join" => {
            let (items,): (Value,) = from_args(args)?;
            join(marks, pay, &items, s)
        }
        "format" => {
            let (args,): (Rest<Value>,) = from_args(args)?;
            // Field names are read from the text, so it must be readable.
            let plain = marks.plain_text(s);
            minijinja::formatting::format(minijinja::formatting::FormatStyle::StrFormat, &plain, &args).map(Value::from)
        }
        _ => without_arguments(&text, name, args),
    }
}

/// The methods without arguments.
fn without_arguments(text: &Text<'_>, name: &str, args: &[Value]) -> Result<Value, Error> {
    let () = match name {
        "upper" | "lower" | "title" | "capitalize" | "casefold" | "isdigit" | "isnumeric" | "isdecimal" | "isalpha"
        | "isalnum" | "isspace" | "isascii" | "isupper" | "islower" => from_args(args)?,
        _ => return Err(Error::from(ErrorKind::UnknownMethod)),
    };
    Ok(match name {
        "upper" => text.cased(|_| true),
        "title" => text.cased(|before| !before.is_some_and(char::is_alphabetic)),
        "capitalize" => text.cased(|before| before.is_none()),
        "isdigit" | "isdecimal" | "isnumeric" => text.all(char::is_numeric),
        "isalpha" => text.all(char::is_alphabetic),
        "isalnum" => text.all(char::is_alphanumeric),
        "isspace" => text.all(is_space),
        "isascii" => Value::from(text.plain.iter().all(char::is_ascii)),
        "isupper" => text.has_case(char::is_uppercase, char::is_lowercase),
        "islower" => text.has_case(char::is_lowercase, char::is_uppercase),
        _ => text.cased(|_| false),
    })
}
