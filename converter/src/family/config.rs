//! Reading `config.json` with errors that name the key.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::ConvertError;

/// A JSON object of the configuration: the whole or a section.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    path: PathBuf,
    /// Names of the enclosing sections, each followed by a dot.
    prefix: String,
    keys: Map<String, Value>,
}

impl Config {
    /// Parses the file's bytes; `path` is for messages.
    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self, ConvertError> {
        // Editors of some systems write a byte order mark, which JSON does not have.
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let keys = sluice_format::json::from_slice(bytes).map_err(|e| ConvertError::Damaged {
            path: path.to_owned(),
            problem: format!("it is not a JSON object: {e}"),
        })?;
        Ok(Config { path: path.to_owned(), prefix: String::new(), keys })
    }

    /// An error about a key of this section. What is wrong with the default of a key that is missing is said as such: `problem` then begins
    /// with "is" and the value, as if the value were there.
    pub(crate) fn refuse(&self, key: &str, problem: impl Into<String>) -> ConvertError {
        let problem = problem.into();
        let written = key.split(['.', '[']).next().is_some_and(|key| self.keys.contains_key(key));
        let problem = match problem.strip_prefix("is ") {
            Some(value) if !written && !value.starts_with("missing") => {
                format!("is missing, which means that it is {value}")
            }
            _ => problem,
        };
        ConvertError::Config { path: self.path.clone(), key: format!("{}{key}", self.prefix), problem }
    }

    /// An error about values that are each possible, but not together.
    pub(crate) fn impossible(&self, problem: String) -> ConvertError {
        ConvertError::Impossible { path: self.path.clone(), problem }
    }

    /// The object under `key`; `None` if it is missing or null.
    pub(crate) fn section(&self, key: &str) -> Result<Option<Config>, ConvertError> {
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(keys)) => Ok(Some(Config {
                path: self.path.clone(),
                prefix: format!("{}{key}.", self.prefix),
                keys: keys.clone(),
            })),
            Some(other) => Err(self.refuse(key, format!("is {other}, expected an object"))),
        }
    }

    /// Refuses a value of this section that differs from that of `other`, the section called `name`. `type` is the older name of
    /// `rope_type`.
    pub(crate) fn check_repeats(&self, other: &Config, name: &str) -> Result<(), ConvertError> {
        let same = |one: &Value, other: &Value| match (one.as_f64(), other.as_f64()) {
            (Some(one), Some(other)) => one == other,
            _ => one == other,
        };
        for (key, value) in self.keys.iter().filter(|(_, value)| !value.is_null()) {
            let found = match key.as_str() {
                "type" | "rope_type" => other.keys.get("rope_type").or_else(|| other.keys.get("type")),
                key => other.keys.get(key),
            };
            if found.is_none_or(|found| !same(value, found)) {
                let there = found.map_or("missing".to_owned(), Value::to_string);
                let problem = format!(
                    "is {value}, but {there} in `{name}`: keep the one that is meant, and remove the other section"
                );
                return Err(self.refuse(key, problem));
            }
        }
        Ok(())
    }

    /// Whether there is a value under `key`; null does not count.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.keys.get(key).is_some_and(|value| !value.is_null())
    }

    /// The object under `key`; `None` if there is none or something else.
    pub(crate) fn object(&self, key: &str) -> Option<Config> {
        self.section(key).ok().flatten()
    }

    /// Names of the keys.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.keys.keys().map(String::as_str)
    }

    /// The value under `key`, read with `read`, or `default` if the key is missing. Null is not a value.
    fn read<T>(
        &self,
        key: &str,
        default: T,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<T, ConvertError> {
        let Some(value) = self.keys.get(key) else { return Ok(default) };
        read(value).ok_or_else(|| self.refuse(key, format!("is {value}, expected {expected}")))
    }

    /// A count, or `default` if the key is missing.
    pub(crate) fn usize_or(&self, key: &str, default: usize) -> Result<usize, ConvertError> {
        self.read(key, default, "a whole number", as_usize)
    }

    /// The first of `keys` that has a value, otherwise the first: families spell some keys differently.
    pub(crate) fn first_of<'k>(&self, keys: &[&'k str]) -> &'k str {
        keys.iter().find(|key| self.has(key)).unwrap_or(&keys[0])
    }

    /// A count from 1 to `most`, or `default` if the key is missing.
    pub(crate) fn size_or(&self, key: &str, default: usize, most: usize) -> Result<usize, ConvertError> {
        self.check_size(key, self.usize_or(key, default)?, most)
    }

    /// A count from 1 to `most` that may be null; `default` if the key is missing.
    pub(crate) fn opt_size_or(
        &self,
        key: &str,
        default: Option<usize>,
        most: usize,
    ) -> Result<Option<usize>, ConvertError> {
        self.opt_usize_or(key, default)?.map(|value| self.check_size(key, value, most)).transpose()
    }

    /// Refuses a count under `key` that is not from 1 to `most`.
    pub(crate) fn check_size(&self, key: &str, value: usize, most: usize) -> Result<usize, ConvertError> {
        if value == 0 || value > most {
            return Err(self.refuse(key, format!("is {value}, expected 1 to {most}")));
        }
        Ok(value)
    }

    /// A count that may be null; `default` if the key is missing.
    pub(crate) fn opt_usize_or(&self, key: &str, default: Option<usize>) -> Result<Option<usize>, ConvertError> {
        self.read(key, default, "a whole number or null", |v| match v {
            Value::Null => Some(None),
            v => as_usize(v).map(Some),
        })
    }

    /// A number, or `default` if the key is missing.
    pub(crate) fn f64_or(&self, key: &str, default: f64) -> Result<f64, ConvertError> {
        self.read(key, default, "a number", Value::as_f64)
    }

    /// A number that is not negative and fits into f32, or `default` if the key is missing.
    pub(crate) fn f32_or(&self, key: &str, default: f64) -> Result<f32, ConvertError> {
        let value = self.f64_or(key, default)?;
        let narrow = value as f32;
        if narrow.is_finite() && narrow >= 0.0 {
            return Ok(narrow);
        }
        Err(self.refuse(key, format!("is {value}, expected a number that is not negative and not too large for f32")))
    }

    /// Refuses a number under `key` unless it is greater than `least`.
    pub(crate) fn check_above(&self, key: &str, value: f64, least: f64) -> Result<f64, ConvertError> {
        if value.is_finite() && value > least {
            return Ok(value);
        }
        Err(self.refuse(key, format!("is {value}, expected more than {least}")))
    }

    /// A number that may be missing or null.
    pub(crate) fn opt_f64(&self, key: &str) -> Result<Option<f64>, ConvertError> {
        self.opt_f64_or(key, None)
    }

    /// A number that may be null; `default` if the key is missing.
    pub(crate) fn opt_f64_or(&self, key: &str, default: Option<f64>) -> Result<Option<f64>, ConvertError> {
        self.read(key, default, "a number or null", |v| match v {
            Value::Null => Some(None),
            v => v.as_f64().map(Some),
        })
    }

    /// A Boolean, or `default` if the key is missing.
    pub(crate) fn bool_or(&self, key: &str, default: bool) -> Result<bool, ConvertError> {
        self.read(key, default, "true or false", Value::as_bool)
    }

    /// A Boolean that may be written as a number; only 0 is false.
    pub(crate) fn flag_or(&self, key: &str, default: bool) -> Result<bool, ConvertError> {
        self.read(key, default, "true or false", |v| v.as_bool().or_else(|| v.as_f64().map(|n| n != 0.0)))
    }

    /// A text that may be missing or null.
    pub(crate) fn opt_str(&self, key: &str) -> Result<Option<&str>, ConvertError> {
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.refuse(key, format!("is {other}, expected a text"))),
        }
    }

    /// The list under `key`; `None` if there is none or something else.
    pub(crate) fn list(&self, key: &str) -> Option<&[Value]> {
        self.keys.get(key)?.as_array().map(Vec::as_slice)
    }

    /// A list that may be missing or null.
    pub(crate) fn opt_list(&self, key: &str) -> Result<Option<&[Value]>, ConvertError> {
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(self.refuse(key, format!("is {other}, expected a list"))),
        }
    }

    /// Refuses any value of `key` except the supported ones; the key may be missing.
    pub(crate) fn require_str(&self, key: &str, supported: &[&str]) -> Result<(), ConvertError> {
        match self.opt_str(key)? {
            Some(found) if !supported.contains(&found) => {
                Err(self.refuse(key, format!("is \"{found}\"; supported: {}", supported.join(", "))))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a switch that changes the computation in a way that is not supported.
    pub(crate) fn require_bool(&self, key: &str, supported: bool) -> Result<(), ConvertError> {
        if self.bool_or(key, supported)? == supported {
            return Ok(());
        }
        Err(self.refuse(key, format!("is {}; only {supported} is supported", !supported)))
    }
}

/// Integers, also in the form `64.0` of some tools.
fn as_usize(value: &Value) -> Option<usize> {
    let whole = value.as_u64().or_else(|| {
        let f = value.as_f64()?;
        // 2^53: beyond it, f64 cannot represent every integer.
        (f >= 0.0 && f.fract() == 0.0 && f < 9_007_199_254_740_992.0).then_some(f as u64)
    });
    usize::try_from(whole?).ok()
}
