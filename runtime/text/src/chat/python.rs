//! Values as Python prints them: `str`, `repr`, and `json.dumps`.

use std::fmt::Write;

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

use super::marks::Marks;

/// Charges for work: gives an error when the template has used up its budget.
pub(super) type Pay<'p> = &'p dyn Fn(u64) -> Result<(), Error>;

/// Deepest nesting of a value, which is more than the users' JSON can have.
const MAX_DEPTH: usize = 160;

/// Widest indentation of JSON.
const MAX_INDENT: usize = 64;

/// Whether Python's `str.strip` and `str.split` take a character for white space.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// An error in what a template does.
pub(super) fn invalid(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

/// Charges for printing a value. Lists may be far longer than the memory that they take, so each item is charged when
/// its turn comes.
fn charge(pay: Pay<'_>, value: &Value) -> Result<(), Error> {
    pay(1 + value.as_str().map_or(0, str::len) as u64 / 64)
}

/// A value's items, with a charge for each.
pub(super) fn items(pay: Pay<'_>, value: &Value) -> Result<Vec<Value>, Error> {
    let mut items = Vec::new();
    for item in value.try_iter()?.checked() {
        pay(1)?;
        items.push(item?);
    }
    Ok(items)
}

/// Charges for all of a value, which must be printable.
pub(super) fn charge_all(pay: Pay<'_>, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(invalid("a value is nested too deeply"));
    }
    charge(pay, value)?;
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            for item in value.try_iter()?.checked() {
                charge_all(pay, &item?, depth + 1)?;
            }
        }
        ValueKind::Map => {
            for (key, item) in value.as_object().and_then(|o| o.try_iter_pairs()).into_iter().flatten() {
                charge_all(pay, &key, depth + 1)?;
                charge_all(pay, &item, depth + 1)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// A value as `str` gives it and `{{ value }}` prints it.
pub(super) fn to_str(marks: &Marks, pay: Pay<'_>, value: &Value) -> Result<String, Error> {
    if let Some(s) = value.as_str() {
        return Ok(s.to_owned());
    }
    let mut out = String::new();
    if !value.is_undefined() {
        repr(marks, pay, value, &mut out, 0)?;
    }
    Ok(out)
}

fn repr(marks: &Marks, pay: Pay<'_>, value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
    charge(pay, value)?;
    if depth > MAX_DEPTH {
        return Err(invalid("a value is nested too deeply to be printed"));
    }
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value, ["nan", "inf", "-inf"])),
        ValueKind::String => repr_str(marks, value.as_str().unwrap_or(""), out),
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            let mut len = 0;
            for item in value.try_iter()?.checked() {
                if len > 0 {
                    out.push_str(", ");
                }
                repr(marks, pay, &item?, out, depth + 1)?;
                len += 1;
            }
            if value.is_tuple() && len == 1 {
                out.push(',');
            }
            out.push(close);
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.checked().enumerate() {
                let key = key?;
                if i > 0 {
                    out.push_str(", ");
                }
                repr(marks, pay, &key, out, depth + 1)?;
                out.push_str(": ");
                repr(marks, pay, &value.get_item(&key)?, out, depth + 1)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// A string between quotes, as Python shows one inside a list.
fn repr_str(marks: &Marks, s: &str, out: &mut String) {
    let plain = marks.plain_text(s);
    let quote = if plain.contains('\'') && !plain.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in s.chars() {
        match marks.plain(c) {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.extend(['\\', c]),
            p if p == quote => out.extend(['\\', c]),
            p if p.is_control() => push_hex(out, u32::from(p)),
            '\u{ad}' => out.push_str("\\xad"),
            p if p != ' ' && p.is_whitespace() => push_hex(out, u32::from(p)),
            _ => out.push(c),
        }
    }
    out.push(quote);
}

fn push_hex(out: &mut String, code: u32) {
    // Writing to a string cannot fail.
    let _ = match code {
        0..=0xff => write!(out, "\\x{code:02x}"),
        _ => write!(out, "\\u{code:04x}"),
    };
}

/// A number as Python prints it, with the given names for infinities and NaN.
fn number(value: &Value, [nan, inf, minus_inf]: [&str; 3]) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(x) = f64::try_from(value.clone()) else {
        return value.to_string();
    };
    if x.is_nan() {
        return nan.to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { inf } else { minus_inf }.to_owned();
    }
    // Both print the shortest digits that read back as the same number; they differ in when they use an exponent.
    let short = format!("{x:e}");
    let (digits, exponent) = short.split_once('e').unwrap_or((&short, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = x.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// Options of `json.dumps`.
pub(super) struct Json<'m> {
    marks: &'m Marks,
    pay: Pay<'m>,
    ensure_ascii: bool,
    sort_keys: bool,
    /// The text of one level of indentation.
    indent: Option<String>,
    /// Separators between items, and between a key and its value.
    separators: (String, String),
}

impl<'m> Json<'m> {
    /// Options from the arguments of Hugging Face's `tojson` filter.
    pub(super) fn new(
        marks: &'m Marks,
        pay: Pay<'m>,
        ensure_ascii: Option<bool>,
        indent: Option<Value>,
        separators: Option<Value>,
        sort_keys: Option<bool>,
    ) -> Result<Self, Error> {
        let given = |v: &Value| !v.is_none() && !v.is_undefined();
        let indent = match indent.filter(given) {
            None => None,
            Some(v) => match (v.as_str(), i64::try_from(v.clone())) {
                (Some(s), _) if s.len() <= MAX_INDENT => Some(s.to_owned()),
                // Python treats a negative width as no indentation, and still starts lines.
                (None, Ok(n)) if n <= MAX_INDENT as i64 => Some(" ".repeat(n.max(0) as usize)),
                _ => return Err(invalid("`indent` of `tojson` is not a small number or a short string")),
            },
        };
        let separators = match separators.filter(given) {
            None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
            None => (", ".to_owned(), ": ".to_owned()),
            Some(pair) => {
                let text = |at| -> Result<String, Error> {
                    let item = pair.get_item_by_index(at)?;
                    let text = item.as_str().filter(|s| s.len() <= MAX_INDENT);
                    Ok(text.ok_or_else(|| invalid("`separators` of `tojson` are not short strings"))?.to_owned())
                };
                (text(0)?, text(1)?)
            }
        };
        Ok(Self {
            marks,
            pay,
            ensure_ascii: ensure_ascii.unwrap_or(false),
            sort_keys: sort_keys.unwrap_or(false),
            indent,
            separators,
        })
    }

    /// A value as JSON.
    pub(super) fn write(&self, value: &Value) -> Result<String, Error> {
        let mut out = String::new();
        self.value(value, &mut out, 0)?;
        Ok(out)
    }

    fn value(&self, value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid("a value is nested too deeply for JSON"));
        }
        charge(self.pay, value)?;
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value, ["NaN", "Infinity", "-Infinity"])),
            ValueKind::String => self.string(value.as_str().unwrap_or(""), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = items(self.pay, value)?;
                self.items('[', ']', items.len(), out, depth, |i, out| self.value(&items[i], out, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys = items(self.pay, value)?;
                if self.sort_keys {
                    keys.sort();
                }
                self.items('{', '}', keys.len(), out, depth, |i, out| {
                    self.key(&keys[i], out)?;
                    out.push_str(&self.separators.1);
                    self.value(&value.get_item(&keys[i])?, out, depth + 1)
                })?;
            }
            kind => return Err(invalid(format!("{kind} cannot be written as JSON"))),
        }
        Ok(())
    }

    fn items(
        &self,
        open: char,
        close: char,
        len: usize,
        out: &mut String,
        depth: usize,
        mut item: impl FnMut(usize, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for i in 0..len {
            if i > 0 {
                out.push_str(&self.separators.0);
            }
            self.line(out, depth + 1)?;
            item(i, out)?;
        }
        if len > 0 {
            self.line(out, depth)?;
        }
        out.push(close);
        Ok(())
    }

    fn line(&self, out: &mut String, depth: usize) -> Result<(), Error> {
        if let Some(indent) = &self.indent {
            (self.pay)((depth * indent.len()) as u64 / 64)?;
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
        Ok(())
    }

    fn key(&self, key: &Value, out: &mut String) -> Result<(), Error> {
        if let Some(s) = key.as_str() {
            charge(self.pay, key)?;
            self.string(s, out);
            return Ok(());
        }
        // Python turns these into strings.
        out.push('"');
        match key.kind() {
            ValueKind::None | ValueKind::Bool | ValueKind::Number => self.value(key, out, 0)?,
            kind => return Err(invalid(format!("{kind} cannot be a key in JSON"))),
        }
        out.push('"');
        Ok(())
    }

    fn string(&self, s: &str, out: &mut String) {
        out.push('"');
        for c in s.chars() {
            match self.marks.plain(c) {
                '"' | '\\' => out.extend(['\\', c]),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                p if p < ' ' || (self.ensure_ascii && p > '~') => {
                    for unit in p.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                _ => out.push(c),
            }
        }
        out.push('"');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_print_as_in_python() {
        for (x, want) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (123_456_789_012_345_680.0, "1.2345678901234568e+17"),
            (1e15, "1000000000000000.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (2.5e-7, "2.5e-07"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(number(&Value::from(x), ["nan", "inf", "-inf"]), want);
        }
    }

    #[test]
    fn values_print_as_in_python() {
        let marks = Marks::default();
        let value = Value::from(vec![
            Value::from("a'b"),
            Value::from("a\n\\\u{7f}'\""),
            Value::from(()),
            Value::from(true),
            Value::from_pairs([("k", 1.5)]),
        ]);
        assert_eq!(to_str(&marks, &|_| Ok(()), &value).unwrap(), r#"["a'b", 'a\n\\\x7f\'"', None, True, {'k': 1.5}]"#);
        assert_eq!(to_str(&marks, &|_| Ok(()), &Value::UNDEFINED).unwrap(), "");
    }
}
