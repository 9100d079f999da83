//! The keys of one architecture, and the related tensors.

use std::collections::BTreeMap;

use serde_json::Value as Json;

use super::container::Tensor;
use super::metadata::{Metadata, Problem, Value};

/// The architecture's key.
pub(super) const ARCHITECTURE: &str = "general.architecture";

/// What a file says about its model.
pub(super) struct Keys<'a> {
    /// The architecture, which is the prefix of most keys.
    pub(super) arch: &'a str,
    pub(super) metadata: &'a Metadata,
    /// Tensors by their names in the file.
    pub(super) tensors: BTreeMap<&'a str, &'a Tensor>,
}

/// A float as a person wrote it: files store most of them as f32, which cannot represent 0.000001 exactly.
pub(super) fn decimal(value: f64) -> f64 {
    let narrow = value as f32;
    let exact = f64::from(narrow) == value;
    if exact { narrow.to_string().parse().unwrap_or(value) } else { value }
}

impl<'a> Keys<'a> {
    /// The full name of a key.
    pub(super) fn key(&self, end: &str) -> String {
        format!("{}.{end}", self.arch)
    }

    /// An error about a key of the architecture.
    pub(super) fn refuse(&self, end: &str, problem: impl Into<String>) -> Problem {
        Problem::new(&self.key(end), problem)
    }

    /// An integer. If the key has a list with one for each layer, all must be equal.
    pub(super) fn uint(&self, end: &str) -> Result<Option<u64>, Problem> {
        let key = self.key(end);
        let Some(Value::Numbers(_)) = self.metadata.get(&key) else { return self.metadata.uint(&key) };
        let all = self.metadata.integers(&key)?.unwrap_or_default();
        match all.first() {
            Some(first) if all.iter().all(|n| n == first) => match u64::try_from(*first) {
                Ok(n) => Ok(Some(n)),
                Err(_) => Err(Problem::new(&key, format!("holds {first}, expected whole numbers from 0 on"))),
            },
            Some(_) => Err(Problem::new(&key, "differs from layer to layer, which is not supported")),
            None => Err(Problem::new(&key, "is an empty list")),
        }
    }

    /// An integer that must exist.
    pub(super) fn need(&self, end: &str) -> Result<u64, Problem> {
        self.uint(end)?.ok_or_else(|| self.refuse(end, "is missing"))
    }

    /// The largest of a key's numbers for `layers` layers, or its only number. Longer lists continue with layers that predict
    /// further tokens.
    pub(super) fn most(&self, end: &str, layers: usize) -> Result<Option<u64>, Problem> {
        Ok(self.counts(end, layers)?.into_iter().flatten().max())
    }

    /// An integer for each of `layers` layers, from a list, or one for all of them.
    pub(super) fn counts(&self, end: &str, layers: usize) -> Result<Option<Vec<u64>>, Problem> {
        let key = self.key(end);
        let Some(Value::Numbers(_)) = self.metadata.get(&key) else {
            return Ok(self.metadata.uint(&key)?.map(|count| vec![count; layers]));
        };
        let all = self.metadata.integers(&key)?.unwrap_or_default();
        let Some(of_layers) = all.get(..layers) else {
            return Err(Problem::new(&key, format!("has {} entries for {layers} layers", all.len())));
        };
        let count = |n: &i128| {
            u64::try_from(*n).map_err(|_| Problem::new(&key, format!("holds {n}, expected whole numbers from 0 on")))
        };
        of_layers.iter().map(count).collect::<Result<_, _>>().map(Some)
    }

    /// A number for each of `layers` layers, from a list, or one for all of them.
    pub(super) fn numbers(&self, end: &str, layers: usize) -> Result<Option<Vec<f64>>, Problem> {
        let key = self.key(end);
        let Some(Value::Numbers(_)) = self.metadata.get(&key) else {
            return Ok(self.float(end)?.map(|number| vec![number; layers]));
        };
        let all = self.metadata.floats(&key)?.unwrap_or_default();
        match all.get(..layers) {
            Some(numbers) => Ok(Some(numbers.iter().copied().map(decimal).collect())),
            None => Err(Problem::new(&key, format!("has {} entries for {layers} layers", all.len()))),
        }
    }

    /// A number.
    pub(super) fn float(&self, end: &str) -> Result<Option<f64>, Problem> {
        Ok(self.metadata.float(&self.key(end))?.map(decimal))
    }

    /// A Boolean.
    pub(super) fn bool(&self, end: &str) -> Result<Option<bool>, Problem> {
        self.metadata.bool(&self.key(end))
    }

    /// A Boolean for each of `layers` layers; longer lists continue with layers that predict further tokens.
    pub(super) fn per_layer(&self, end: &str, layers: usize) -> Result<Option<Vec<bool>>, Problem> {
        let key = self.key(end);
        let list: Vec<bool> = match self.metadata.get(&key) {
            None => return Ok(None),
            Some(Value::Numbers(numbers)) => {
                let truth = |value| match value {
                    Value::Bool(b) => b,
                    Value::Integer(i) => i != 0,
                    _ => false,
                };
                numbers.iter().map(truth).collect()
            }
            Some(other) => {
                return Err(Problem::new(&key, format!("is {}, expected one truth value per layer", other.describe())));
            }
        };
        if list.len() < layers {
            return Err(Problem::new(&key, format!("has {} entries for {layers} layers", list.len())));
        }
        Ok(Some(list[..layers].to_vec()))
    }

    /// A tensor of a layer; `rest` is its name after `blk.N.`.
    pub(super) fn of_layer(&self, layer: usize, rest: &str) -> Option<&'a Tensor> {
        self.tensors.get(format!("blk.{layer}.{rest}").as_str()).copied()
    }

    /// The first tensor with that name in any of `layers` layers.
    pub(super) fn of_any_layer(&self, layers: usize, rest: &str) -> Option<&'a Tensor> {
        (0..layers).find_map(|layer| self.of_layer(layer, rest))
    }

    /// The pre-tokenizer: the only difference between some families that share an architecture.
    pub(super) fn pre_tokenizer(&self) -> Result<&'a str, Problem> {
        Ok(self.metadata.text("tokenizer.ggml.pre")?.unwrap_or_default())
    }
}

/// Keys of a configuration under construction.
#[derive(Default)]
pub(super) struct Synthesised(pub(super) serde_json::Map<String, Json>);

impl Synthesised {
    /// Sets a key; `None` is null.
    pub(super) fn set(&mut self, key: &str, value: impl Into<Json>) {
        self.0.insert(key.to_owned(), value.into());
    }

    /// Sets a key if there is a value.
    pub(super) fn set_some(&mut self, key: &str, value: Option<impl Into<Json>>) {
        if let Some(value) = value {
            self.set(key, value);
        }
    }
}
