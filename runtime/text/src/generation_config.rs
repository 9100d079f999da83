//! The settings that the model's authors recommend: generation_config.json, and config.json's end tokens.

use std::collections::BTreeSet;
use std::fmt;

use serde_json::{Map, Value};
use sluice_format::{Metadata, SOURCE_CONFIG_BLOB, json};

use super::TextError;

const GENERATION: &str = "generation_config.json";
const CONFIG: &str = "config.json";

/// The model's own defaults for generating text. Absent fields were absent from the files.
///
/// The fields hold only values that make sense. All others are in [`remarks`](Self::remarks): a file with such a value is
/// still useful, and whether the value matters depends on the user's request.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end a generation, from all files together. Often one file has a list and the other a single id,
    /// and each alone may miss a token that the model really emits.
    pub eos: BTreeSet<u32>,
    /// Whether to draw at random, rather than to take the likeliest token.
    pub do_sample: Option<bool>,
    /// Sampling temperature, 0 or more.
    pub temperature: Option<f32>,
    /// Nucleus sampling's share of probability, above 0 and at most 1.
    pub top_p: Option<f32>,
    /// How many of the likeliest tokens stay; 0 for all of them.
    pub top_k: Option<u32>,
    /// Smallest probability relative to the likeliest token's, from 0 to 1.
    pub min_p: Option<f32>,
    /// Penalty on tokens that have occurred, above 0.
    pub repetition_penalty: Option<f32>,
    /// Values of the files that cannot be used as they are.
    pub remarks: Vec<Remark>,
}

/// A value in a model's files that cannot be used as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remark {
    /// Which file.
    pub file: &'static str,
    /// Which field.
    pub field: &'static str,
    /// What it is, shortened.
    pub found: String,
    /// What it should be.
    pub expected: &'static str,
    /// What happens instead, such as `1 is used`.
    pub instead: &'static str,
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Remark { file, field, found, expected, instead } = self;
        write!(f, "{file} of the model says {field} {found}, but it should be {expected}: {instead}")
    }
}

/// What happens to a value that makes no sense.
const IGNORED: &str = "it is ignored";

impl GenerationDefaults {
    /// [`GenerationDefaults::parse`] for the blobs that a model file keeps of its checkpoint.
    ///
    /// # Errors
    /// As there.
    pub fn of(metadata: &Metadata) -> Result<Self, TextError> {
        Self::parse(metadata.get(GENERATION), metadata.get(SOURCE_CONFIG_BLOB))
    }

    /// Reads the files' bytes; a file that does not exist is `None`. Sampling values come only from generation_config.json,
    /// and end tokens from both (and from config.json's `text_config`, where vision models keep them). Unknown fields and
    /// nulls are skipped. Values that transformers accepts, such as a `top_p` above 1, are treated as transformers treats
    /// them, with a remark.
    ///
    /// # Errors
    /// When a file is not a JSON object.
    pub fn parse(generation_config: Option<&[u8]>, config: Option<&[u8]>) -> Result<Self, TextError> {
        let mut defaults = Self::default();
        if let Some(bytes) = generation_config {
            let map = object(GENERATION, bytes)?;
            defaults.add_eos(GENERATION, &map);
            defaults.read_sampling(&map);
        }
        if let Some(bytes) = config {
            let map = object(CONFIG, bytes)?;
            defaults.add_eos(CONFIG, &map);
            if let Some(Value::Object(inner)) = map.get("text_config") {
                defaults.add_eos(CONFIG, inner);
            }
        }
        Ok(defaults)
    }

    fn read_sampling(&mut self, map: &Map<String, Value>) {
        self.do_sample = self.field(map, "do_sample", "true or false", |v| match v {
            // What Python considers true.
            Value::Number(n) => n.as_f64().map(|n| n != 0.0),
            other => other.as_bool(),
        });
        self.temperature = self.number(map, "temperature", "0 or more", |t| t >= 0.0);
        self.min_p = self.number(map, "min_p", "from 0 to 1", |p| (0.0..=1.0).contains(&p));
        self.repetition_penalty = self.number(map, "repetition_penalty", "above 0", |r| r > 0.0);
        self.top_k = self.field(map, "top_k", "a whole number, 0 or more", |v| match v.as_f64() {
            // Written by tools for which 0 would mean something else.
            Some(-1.0) => Some(0),
            // Tools without whole numbers write 20.0. A number larger than the vocabulary means all tokens.
            Some(k) if k >= 0.0 && k.fract() == 0.0 => Some(k as u32),
            _ => None,
        });
        let between = "above 0 and at most 1";
        self.top_p = self.number(map, "top_p", between, |p| p >= 0.0);
        match self.top_p {
            Some(p) if p > 1.0 => {
                self.remark(GENERATION, map, "top_p", between, "1 is used, which is off");
                self.top_p = Some(1.0);
            }
            // Transformers keeps one token, however small the share.
            Some(0.0) => {
                self.remark(GENERATION, map, "top_p", between, "only the likeliest token is kept");
                self.top_p = Some(f32::MIN_POSITIVE);
            }
            _ => {}
        }
    }

    /// A field of generation_config.json; absent and null are the same.
    fn field<T>(
        &mut self,
        map: &Map<String, Value>,
        name: &'static str,
        expected: &'static str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Option<T> {
        let value = map.get(name).filter(|v| !v.is_null())?;
        let read = read(value);
        if read.is_none() {
            self.remark(GENERATION, map, name, expected, IGNORED);
        }
        read
    }

    fn number(
        &mut self,
        map: &Map<String, Value>,
        name: &'static str,
        expected: &'static str,
        good: impl FnOnce(f32) -> bool,
    ) -> Option<f32> {
        let read = |v: &Value| v.as_f64().map(|n| n as f32).filter(|&n| n.is_finite() && good(n));
        self.field(map, name, expected, read)
    }

    fn add_eos(&mut self, file: &'static str, map: &Map<String, Value>) {
        let values = match map.get("eos_token_id") {
            None | Some(Value::Null) => return,
            Some(Value::Array(list)) => list.as_slice(),
            Some(single) => std::slice::from_ref(single),
        };
        for value in values {
            match value.as_f64() {
                // Some configurations say "none" like this.
                Some(-1.0) => {}
                Some(id) if (0.0..=f64::from(u32::MAX)).contains(&id) && id.fract() == 0.0 => {
                    self.eos.insert(id as u32);
                }
                _ => return self.remark(file, map, "eos_token_id", "a token id or a list of them", IGNORED),
            }
        }
    }

    fn remark(
        &mut self,
        file: &'static str,
        map: &Map<String, Value>,
        field: &'static str,
        expected: &'static str,
        instead: &'static str,
    ) {
        let found = map.get(field).map(shortened).unwrap_or_default();
        self.remarks.push(Remark { file, field, found, expected, instead });
    }

    /// The temperature to use unless the user says otherwise: 0 (the likeliest token) if the files say not to sample
    /// or say nothing about it. Unlike in transformers, a file that gives sampling values but forgets `do_sample`
    /// means to sample.
    pub fn effective_temperature(&self) -> f32 {
        let hinted = self.temperature.is_some() || self.top_p.is_some() || self.top_k.is_some();
        match self.do_sample.unwrap_or(hinted) {
            true => self.temperature.unwrap_or(1.0),
            false => 0.0,
        }
    }
}

fn object(file: &'static str, bytes: &[u8]) -> Result<Map<String, Value>, TextError> {
    json::from_slice(bytes).map_err(|e| TextError::BadConfig { file, reason: e.to_string() })
}

/// A value as its file has it, or its beginning.
fn shortened(value: &Value) -> String {
    const MOST: usize = 60;
    let json = value.to_string();
    match json.char_indices().nth(MOST) {
        Some((cut, _)) => format!("{}…", &json[..cut]),
        None => json,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(generation: &str, config: &str) -> Result<GenerationDefaults, TextError> {
        GenerationDefaults::parse(Some(generation.as_bytes()), Some(config.as_bytes()))
    }

    #[test]
    fn missing_files_are_fine() {
        let defaults = GenerationDefaults::parse(None, None).unwrap();
        assert_eq!(defaults, GenerationDefaults::default());
        assert_eq!(defaults.effective_temperature(), 0.0);
    }

    #[test]
    fn end_tokens_of_all_files_count() {
        let config = r#"{"eos_token_id": 2, "text_config": {"eos_token_id": [7, 2]}}"#;
        let both = parse(r#"{"eos_token_id": [5, 2]}"#, config).unwrap();
        assert_eq!(both.eos, BTreeSet::from([2, 5, 7]));
        let none = parse(r#"{"eos_token_id": null}"#, r#"{"eos_token_id": -1}"#).unwrap();
        assert!(none.eos.is_empty());
    }

    #[test]
    fn sampling_values_are_read() {
        let json = r#"{"do_sample": true, "temperature": 0.6, "top_p": 1, "top_k": 20,
            "repetition_penalty": 1.05, "transformers_version": "4.51.0"}"#;
        let defaults = parse(json, "{}").unwrap();
        assert_eq!(defaults.do_sample, Some(true));
        assert_eq!(defaults.temperature, Some(0.6));
        assert_eq!(defaults.top_p, Some(1.0));
        assert_eq!(defaults.top_k, Some(20));
        assert_eq!(defaults.min_p, None);
        assert_eq!(defaults.repetition_penalty, Some(1.05));
        assert_eq!(defaults.effective_temperature(), 0.6);
    }

    #[test]
    fn whether_to_sample() {
        let temperature = |json| parse(json, "{}").unwrap().effective_temperature();
        assert_eq!(temperature(r#"{"do_sample": false, "temperature": 0.6}"#), 0.0);
        assert_eq!(temperature(r#"{"do_sample": true}"#), 1.0);
        assert_eq!(temperature(r#"{"temperature": 0.6}"#), 0.6);
        assert_eq!(temperature(r#"{"top_k": -1}"#), 1.0);
        assert_eq!(temperature("{}"), 0.0);
    }

    #[test]
    fn values_that_cannot_be_used_are_named_and_the_others_stay() {
        for (json, wrong, instead) in [
            (r#"{"eos_token_id": "2"}"#, "eos_token_id", IGNORED),
            (r#"{"eos_token_id": [1, 4294967296]}"#, "eos_token_id", IGNORED),
            (r#"{"eos_token_id": 1.5}"#, "eos_token_id", IGNORED),
            (r#"{"temperature": "hot"}"#, "temperature", IGNORED),
            (r#"{"temperature": 1e300}"#, "temperature", IGNORED),
            (r#"{"temperature": Infinity}"#, "temperature", IGNORED),
            (r#"{"temperature": -0.5}"#, "temperature", IGNORED),
            (r#"{"top_k": -2}"#, "top_k", IGNORED),
            (r#"{"top_k": 2.5}"#, "top_k", IGNORED),
            (r#"{"do_sample": "yes"}"#, "do_sample", IGNORED),
            (r#"{"min_p": 1.5}"#, "min_p", IGNORED),
            (r#"{"repetition_penalty": 0.0}"#, "repetition_penalty", IGNORED),
            (r#"{"top_p": -1}"#, "top_p", IGNORED),
            (r#"{"top_p": 0.0}"#, "top_p", "only the likeliest token is kept"),
            (r#"{"top_p": 1.2}"#, "top_p", "1 is used, which is off"),
        ] {
            let whole = json.replacen('{', r#"{"length_penalty": Infinity, "#, 1);
            let defaults = parse(&whole, "{}").unwrap();
            let [remark] = defaults.remarks.as_slice() else { panic!("{json}: {:?}", defaults.remarks) };
            assert_eq!((remark.field, remark.instead), (wrong, instead), "{json}");
            assert!(remark.to_string().starts_with(&format!("generation_config.json of the model says {wrong} ")));
        }
        let good = parse(r#"{"top_k": 20.0, "do_sample": 1, "eos_token_id": 7.0, "top_p": 1}"#, "{}").unwrap();
        assert_eq!((good.top_k, good.do_sample, good.top_p), (Some(20), Some(true), Some(1.0)));
        assert_eq!((good.eos, good.remarks), (BTreeSet::from([7]), vec![]));
        let clamped = |json| parse(json, "{}").unwrap().top_p;
        assert_eq!(clamped(r#"{"top_p": 7}"#), Some(1.0));
        assert_eq!(clamped(r#"{"top_p": 0}"#), Some(f32::MIN_POSITIVE));
        for json in ["", "[]", "nul", "{\"a\": }"] {
            assert!(matches!(parse("{}", json), Err(TextError::BadConfig { file: CONFIG, .. })));
        }
    }

    proptest! {
        #[test]
        fn noise_never_panics(
            bytes in prop::collection::vec(any::<u8>(), 0..64),
            value in "[\\[\\]{}0-9eE.,\"nulltrue-]{0,20}",
        ) {
            let _ = GenerationDefaults::parse(Some(&bytes), Some(&bytes));
            let json = format!("{{\"eos_token_id\": {value}, \"top_k\": {value}, \"top_p\": {value}}}");
            let _ = parse(&json, &json);
        }
    }
}
