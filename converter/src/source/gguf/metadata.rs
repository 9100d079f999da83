//! The metadata of a GGUF file: values by key (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).
//!
//! Lists keep the bytes of the file, so a list never needs more memory than it takes on the drive.

use std::collections::BTreeMap;

/// A value under a key.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    /// Any of the integer types; i128 holds all of u64 and of i64.
    Integer(i128),
    /// f32 or f64.
    Float(f64),
    /// A Boolean.
    Bool(bool),
    /// A text as in the file. It should be UTF-8, but has not been checked.
    String(Vec<u8>),
    /// A list of integers, floats or Booleans.
    Numbers(Numbers),
    /// A list of texts.
    Strings(Strings),
    /// A list of this many lists. No known key has one, so the contents are not kept: they would take more memory than the file has
    /// bytes.
    Lists(usize),
}

/// The type of the numbers in a list, or of a single value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F32,
    F64,
    Bool,
}

impl Kind {
    /// Bytes of one number.
    pub(crate) fn len(self) -> usize {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::U64 | Kind::I64 | Kind::F64 => 8,
        }
    }

    /// One number from its [`Kind::len`] bytes.
    pub(crate) fn value(self, bytes: &[u8]) -> Value {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        let word = u64::from_le_bytes(word);
        match self {
            Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => Value::Integer(word.into()),
            Kind::I8 => Value::Integer((word as i8).into()),
            Kind::I16 => Value::Integer((word as i16).into()),
            Kind::I32 => Value::Integer((word as i32).into()),
            Kind::I64 => Value::Integer((word as i64).into()),
            Kind::F32 => Value::Float(f32::from_bits(word as u32).into()),
            Kind::F64 => Value::Float(f64::from_bits(word)),
            Kind::Bool => Value::Bool(word != 0),
        }
    }
}

/// A list of numbers, as in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Numbers {
    kind: Kind,
    bytes: Vec<u8>,
}

impl Numbers {
    /// From little-endian bytes, a multiple of [`Kind::len`].
    pub(crate) fn new(kind: Kind, bytes: Vec<u8>) -> Self {
        debug_assert!(bytes.len().is_multiple_of(kind.len()), "whole numbers");
        Numbers { kind, bytes }
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len() / self.kind.len()
    }

    /// Each as a value.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Value> {
        self.bytes.chunks_exact(self.kind.len()).map(|b| self.kind.value(b))
    }

    /// Each as an integer; `None` for a list of floats or Booleans.
    pub(crate) fn integers(&self) -> Option<impl Iterator<Item = i128>> {
        let integer = |value| if let Value::Integer(i) = value { Some(i) } else { None };
        (!matches!(self.kind, Kind::F32 | Kind::F64 | Kind::Bool)).then(|| self.iter().filter_map(integer))
    }

    /// Each as a float; `None` for a list of integers or Booleans.
    pub(crate) fn floats(&self) -> Option<impl Iterator<Item = f64>> {
        let float = |value| if let Value::Float(f) = value { Some(f) } else { None };
        matches!(self.kind, Kind::F32 | Kind::F64).then(|| self.iter().filter_map(float))
    }
}

/// A list of texts, which should be UTF-8 but have not been checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Strings {
    bytes: Vec<u8>,
    /// Where each text ends; the whole head of a file is shorter than 4 GiB.
    ends: Vec<u32>,
}

impl Strings {
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Appends a text.
    pub(crate) fn push(&mut self, text: &[u8]) {
        self.bytes.extend_from_slice(text);
        self.ends.push(u32::try_from(self.bytes.len()).expect("the head of a file is shorter than 4 GiB"));
    }

    /// Text `i`; `None` if there are not that many.
    pub(crate) fn get(&self, i: usize) -> Option<&[u8]> {
        let start = if i == 0 { 0 } else { *self.ends.get(i - 1)? };
        self.bytes.get(start as usize..*self.ends.get(i)? as usize)
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        (0..self.len()).map(|i| self.get(i).expect("as many as there are ends"))
    }
}

impl<T: AsRef<[u8]>> FromIterator<T> for Strings {
    fn from_iter<I: IntoIterator<Item = T>>(texts: I) -> Self {
        let mut strings = Strings::default();
        texts.into_iter().for_each(|text| strings.push(text.as_ref()));
        strings
    }
}

impl Value {
    /// Describes a value for messages; long ones in short.
    pub(crate) fn describe(&self) -> String {
        const SHOWN: usize = 60;
        match self {
            Value::Integer(i) => i.to_string(),
            Value::Float(f) => f.to_string(),
            Value::Bool(b) => b.to_string(),
            Value::String(s) => {
                let text = String::from_utf8_lossy(s);
                let shown: String = text.chars().take(SHOWN).collect();
                let more = if shown.len() < text.len() { "…" } else { "" };
                format!("{shown:?}{more}")
            }
            Value::Numbers(n) => format!("a list of {} numbers", n.len()),
            Value::Strings(s) => format!("a list of {} texts", s.len()),
            Value::Lists(count) => format!("a list of {count} lists"),
        }
    }
}

/// What is wrong with a key of the metadata.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{key}` {problem}")]
pub(crate) struct Problem {
    /// The key.
    pub(crate) key: String,
    /// What is wrong with it, and what is supported: "is missing", "is 7, expected …".
    pub(crate) problem: String,
}

impl Problem {
    pub(crate) fn new(key: &str, problem: impl Into<String>) -> Self {
        Problem { key: key.to_owned(), problem: problem.into() }
    }
}

/// Values by key.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Metadata(BTreeMap<String, Value>);

impl Metadata {
    /// Adds a value, and returns whether the key was new. If it was not, the old value stays.
    pub(crate) fn insert(&mut self, key: String, value: Value) -> bool {
        match self.0.entry(key) {
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(value);
                true
            }
            std::collections::btree_map::Entry::Occupied(_) => false,
        }
    }

    /// The value under `key`.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    fn read<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Problem> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || Problem::new(key, format!("is {}, expected {expected}", value.describe()));
        read(value).map(Some).ok_or_else(wrong)
    }

    /// An integer from 0 on, if the key is there.
    pub(crate) fn uint(&self, key: &str) -> Result<Option<u64>, Problem> {
        self.read(key, "a whole number from 0 on", |v| match v {
            Value::Integer(i) => u64::try_from(*i).ok(),
            _ => None,
        })
    }

    /// A float, or an integer converted to one, if the key exists.
    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>, Problem> {
        self.read(key, "a number", |v| match v {
            Value::Float(f) if f.is_finite() => Some(*f),
            Value::Integer(i) => Some(*i as f64),
            _ => None,
        })
    }

    /// A Boolean, if the key exists.
    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>, Problem> {
        self.read(key, "true or false", |v| if let Value::Bool(b) = v { Some(*b) } else { None })
    }

    /// A text in UTF-8, if the key is there.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>, Problem> {
        self.read(key, "a text in UTF-8", |v| if let Value::String(s) = v { std::str::from_utf8(s).ok() } else { None })
    }

    /// A list of texts, if the key is there.
    pub(crate) fn strings(&self, key: &str) -> Result<Option<&Strings>, Problem> {
        self.read(key, "a list of texts", |v| if let Value::Strings(s) = v { Some(s) } else { None })
    }

    /// A list of integers, if the key is there.
    pub(crate) fn integers(&self, key: &str) -> Result<Option<Vec<i128>>, Problem> {
        self.read(key, "a list of whole numbers", |v| match v {
            Value::Numbers(n) => Some(n.integers()?.collect()),
            _ => None,
        })
    }

    /// A list of floats, if the key is there.
    pub(crate) fn floats(&self, key: &str) -> Result<Option<Vec<f64>>, Problem> {
        self.read(key, "a list of numbers", |v| match v {
            Value::Numbers(n) => Some(n.floats()?.collect()),
            _ => None,
        })
    }
}

impl FromIterator<(String, Value)> for Metadata {
    fn from_iter<I: IntoIterator<Item = (String, Value)>>(entries: I) -> Self {
        Metadata(entries.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_every_kind() {
        for (kind, bytes, expected) in [
            (Kind::U8, &[0xff][..], Value::Integer(255)),
            (Kind::I8, &[0xff], Value::Integer(-1)),
            (Kind::U16, &[0xff, 0xff], Value::Integer(65_535)),
            (Kind::I16, &[0xfe, 0xff], Value::Integer(-2)),
            (Kind::U32, &[0, 0, 0, 0x80], Value::Integer(1 << 31)),
            (Kind::I32, &[0, 0, 0, 0x80], Value::Integer(-(1 << 31))),
            (Kind::U64, &[0xff; 8], Value::Integer(u64::MAX.into())),
            (Kind::I64, &[0xff; 8], Value::Integer(-1)),
            (Kind::F32, &1.5f32.to_le_bytes(), Value::Float(1.5)),
            (Kind::F64, &(-2.5f64).to_le_bytes(), Value::Float(-2.5)),
            (Kind::Bool, &[1], Value::Bool(true)),
        ] {
            assert_eq!(kind.len(), bytes.len());
            assert_eq!(kind.value(bytes), expected);
            let two = Numbers::new(kind, [bytes, bytes].concat());
            assert_eq!((two.len(), two.iter().collect::<Vec<_>>()), (2, vec![expected.clone(), expected]));
        }
    }

    #[test]
    fn values_by_key_of_the_type_that_is_asked_for() {
        let texts: Strings = ["a", "", "ccc"].into_iter().collect();
        assert_eq!(texts.iter().collect::<Vec<_>>(), [&b"a"[..], b"", b"ccc"]);
        assert_eq!(texts.get(3), None);
        let metadata: Metadata = [
            ("i".to_owned(), Value::Integer(7)),
            ("s".to_owned(), Value::String(b"x".to_vec())),
            ("t".to_owned(), Value::Strings(texts)),
            ("n".to_owned(), Value::Numbers(Numbers::new(Kind::U8, vec![1, 2]))),
        ]
        .into_iter()
        .collect();
        assert_eq!(metadata.uint("i"), Ok(Some(7)));
        assert_eq!(metadata.float("i"), Ok(Some(7.0)));
        assert_eq!(metadata.uint("none"), Ok(None));
        assert_eq!(metadata.text("s"), Ok(Some("x")));
        assert_eq!(metadata.integers("n"), Ok(Some(vec![1, 2])));
        assert_eq!(metadata.strings("t").unwrap().unwrap().len(), 3);
        let wrong = metadata.uint("s").unwrap_err();
        assert_eq!(wrong.to_string(), "`s` is \"x\", expected a whole number from 0 on");
    }
}
