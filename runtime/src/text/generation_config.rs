//! What the model's authors recommend: generation_config.json, and config.json's end tokens.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::TextError;

const GENERATION: &str = "generation_config.json";
const CONFIG: &str = "config.json";

/// The model's own defaults for generating text. Absent fields were absent from the files.
///
/// Values are those of the files, checked for their types only; whether they make sense together
/// is decided where a sampler is configured from them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end a generation: those of all files together. A list in one file and a single
    /// id in the other is common, and each alone may miss one that the model really emits.
    pub eos: BTreeSet<u32>,
    /// Whether to draw at random, rather than to take the likeliest token.
    pub do_sample: Option<bool>,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Nucleus sampling's share of probability.
    pub top_p: Option<f32>,
    /// How many of the likeliest tokens stay; 0 for all of them.
    pub top_k: Option<u32>,
    /// Smallest probability relative to the likeliest token's.
    pub min_p: Option<f32>,
    /// Penalty on tokens that have occurred.
    pub repetition_penalty: Option<f32>,
}

impl GenerationDefaults {
    /// Reads the files' bytes; a file that does not exist is `None`. Sampling values come from
    /// generation_config.json alone, end tokens from both (and from config.json's `text_config`,
    /// where models that also see keep them). Unknown fields and nulls are skipped.
    ///
    /// # Errors
    /// When a file is not a JSON object, or one of these fields has the wrong type.
    pub fn parse(generation_config: Option<&[u8]>, config: Option<&[u8]>) -> Result<Self, TextError> {
        let mut defaults = Self::default();
        if let Some(bytes) = generation_config {
            let map = object(GENERATION, bytes)?;
            add_eos(GENERATION, &map, &mut defaults.eos)?;
            defaults.do_sample = field(&map, "do_sample", "true or false", Value::as_bool)?;
            defaults.temperature = number(&map, "temperature")?;
            defaults.top_p = number(&map, "top_p")?;
            defaults.min_p = number(&map, "min_p")?;
            defaults.repetition_penalty = number(&map, "repetition_penalty")?;
            defaults.top_k = field(&map, "top_k", "a whole number", |v| match v.as_i64() {
                // Written by tools for which 0 would mean something else.
                Some(-1) => Some(0),
                Some(k) => u32::try_from(k).ok(),
                None => None,
            })?;
        }
        if let Some(bytes) = config {
            let map = object(CONFIG, bytes)?;
            add_eos(CONFIG, &map, &mut defaults.eos)?;
            if let Some(Value::Object(inner)) = map.get("text_config") {
                add_eos(CONFIG, inner, &mut defaults.eos)?;
            }
        }
        Ok(defaults)
    }

    /// The temperature to use unless the user says otherwise: 0 (the likeliest token) if the files
    /// say not to sample or say nothing about it. Unlike transformers, a file that gives sampling
    /// values but forgets `do_sample` means to sample.
    pub fn effective_temperature(&self) -> f32 {
        let hinted = self.temperature.is_some() || self.top_p.is_some() || self.top_k.is_some();
        match self.do_sample.unwrap_or(hinted) {
            true => self.temperature.unwrap_or(1.0),
            false => 0.0,
        }
    }
}

fn object(file: &'static str, bytes: &[u8]) -> Result<Map<String, Value>, TextError> {
    serde_json::from_slice(bytes).map_err(|e| TextError::BadConfig { file, reason: e.to_string() })
}

/// A field of generation_config.json; absent and null are the same.
fn field<T>(
    map: &Map<String, Value>,
    name: &'static str,
    expected: &'static str,
    read: impl FnOnce(&Value) -> Option<T>,
) -> Result<Option<T>, TextError> {
    match map.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(bad_field(GENERATION, name, expected, value)),
        },
    }
}

fn number(map: &Map<String, Value>, name: &'static str) -> Result<Option<f32>, TextError> {
    field(map, name, "a number", |v| v.as_f64().map(|n| n as f32).filter(|n| n.is_finite()))
}

fn add_eos(file: &'static str, map: &Map<String, Value>, eos: &mut BTreeSet<u32>) -> Result<(), TextError> {
    let values = match map.get("eos_token_id") {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(list)) => list.as_slice(),
        Some(single) => std::slice::from_ref(single),
    };
    for value in values {
        match value.as_i64() {
            // Some configurations say "none" like this.
            Some(-1) => {}
            Some(id) if u32::try_from(id).is_ok() => {
                eos.extend(u32::try_from(id));
            }
            _ => {
                let expected = "a token id or a list of them";
                return Err(bad_field(file, "eos_token_id", expected, value));
            }
        }
    }
    Ok(())
}

fn bad_field(file: &'static str, field: &'static str, expected: &'static str, value: &Value) -> TextError {
    let mut found: String = value.to_string().chars().take(60).collect();
    if found.chars().count() == 60 {
        found.push('…');
    }
    TextError::BadConfigField { file, field, expected, found }
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
    fn wrong_types_are_named() {
        for (json, wrong) in [
            (r#"{"eos_token_id": "2"}"#, "eos_token_id"),
            (r#"{"eos_token_id": [1, 4294967296]}"#, "eos_token_id"),
            (r#"{"eos_token_id": 1.5}"#, "eos_token_id"),
            (r#"{"temperature": "hot"}"#, "temperature"),
            (r#"{"temperature": 1e300}"#, "temperature"),
            (r#"{"top_k": -2}"#, "top_k"),
            (r#"{"do_sample": 1}"#, "do_sample"),
        ] {
            match parse(json, "{}") {
                Err(TextError::BadConfigField { field, .. }) => assert_eq!(field, wrong),
                other => panic!("{json}: {other:?}"),
            }
        }
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
