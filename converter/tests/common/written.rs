//! Compares GGUF files that a test writes from a golden checkpoint, as llama.cpp's converter would, with that checkpoint.

use std::fs;

use serde_json::Value as Json;
use sluice_converter::{Options, convert, plan};
use sluice_format::{AttentionSpec, ExtentKind, ModelSpec};

use super::gguf::{Value, Written, file};
use super::safetensors::{Tensors, read_dir, values, write_dir};
use super::{Content, content, fixture, joined};

/// The type number.
pub const F32: u32 = 0;

pub fn floats(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

/// `config.json` and tensors of a golden checkpoint.
pub fn golden(family: &str) -> (Json, Tensors) {
    let folder = fixture(&format!("golden/{family}"));
    // Some writers use `Infinity` for no bound, which is not valid JSON.
    let config = fs::read_to_string(folder.join("config.json")).unwrap().replace("Infinity", "1e9");
    (serde_json::from_str(&config).unwrap(), read_dir(&folder))
}

/// Metadata with the architecture before each key; the values of counts come from the named keys of `config`.
pub fn metadata(
    arch: &'static str,
    config: &Json,
    counts: &[(&str, &str)],
    others: &[(&str, Value)],
) -> Vec<(String, Value)> {
    let count = |(own, hub): &(&str, &str)| {
        let n = config.pointer(&format!("/{hub}")).and_then(Json::as_u64).unwrap_or_else(|| panic!("{hub}"));
        (format!("{arch}.{own}"), Value::U32(n as u32))
    };
    let mut all = vec![("general.architecture".to_owned(), Value::Text(arch))];
    all.extend(counts.iter().map(count));
    all.extend(others.iter().map(|(own, value)| (format!("{arch}.{own}"), value.clone())));
    all
}

pub fn float(config: &Json, key: &str) -> Value {
    Value::F32(config[key].as_f64().unwrap() as f32)
}

/// Which tensors of a checkpoint a file has, and under which names.
pub struct Renaming<'a> {
    pub tensors: &'a Tensors,
    /// The prefix before `layers` on the hub.
    pub prefix: &'static str,
    /// Names in the file and on the hub, outside of layers.
    pub outside: &'a [(&'a str, &'a str)],
    /// Names in the file and on the hub, in a layer.
    pub in_layers: &'a [(&'a str, &'a str)],
    /// Names in the file, and those of an expert on the hub with `{}` for its number.
    pub experts: &'a [(&'a str, &'a str)],
    pub layers: usize,
}

impl Renaming<'_> {
    /// The tensors as written; for each, `edit` changes its numbers and its shape by its name in the file.
    pub fn written(&self, edit: impl Fn(&str, &mut Vec<f32>, &mut Vec<usize>)) -> Vec<Written> {
        let mut all = Vec::new();
        let mut add = |name: String, mut numbers: Vec<f32>, mut shape: Vec<usize>| {
            edit(&name, &mut numbers, &mut shape);
            assert_eq!(shape.iter().product::<usize>(), numbers.len(), "{name}");
            all.push((name, F32, shape, floats(&numbers)));
        };
        for (own, hub) in self.outside {
            add((*own).to_owned(), values(self.tensors, hub), self.tensors[*hub].shape.clone());
        }
        for layer in 0..self.layers {
            let hub = |rest: &str| format!("{}layers.{layer}.{rest}", self.prefix);
            let there = self.in_layers.iter().map(|(own, rest)| (own, hub(rest)));
            for (own, name) in there.filter(|(_, name)| self.tensors.contains_key(name)) {
                add(format!("blk.{layer}.{own}"), values(self.tensors, &name), self.tensors[&name].shape.clone());
            }
            for (own, rest) in self.experts {
                let names = (0..).map(|expert: usize| hub(&rest.replace("{}", &expert.to_string())));
                let names: Vec<String> = names.take_while(|name| self.tensors.contains_key(name)).collect();
                let Some(first) = names.first() else { continue };
                let shape = [&[names.len()], &self.tensors[first].shape[..]].concat();
                add(
                    format!("blk.{layer}.{own}"),
                    names.iter().flat_map(|name| values(self.tensors, name)).collect(),
                    shape,
                );
            }
        }
        all
    }
}

/// What the converter adds if norms are stored around zero.
pub fn add_one(numbers: &mut [f32]) {
    numbers.iter_mut().for_each(|n| *n += 1.0);
}

/// In a file of llama.cpp, value heads of linear attention have another order.
fn in_order_of_the_hub(mut spec: ModelSpec) -> ModelSpec {
    for layer in &mut spec.layers {
        if let AttentionSpec::Delta(delta) = &mut layer.attention {
            delta.value_heads_tiled = false;
        }
    }
    spec
}

/// The models of the file and of the checkpoint are the same.
pub fn check(family: &str, config: &Json, tensors: &Tensors, metadata: &[(String, Value)], written: &[Written]) {
    let folder = tempfile::tempdir().unwrap();
    let (checkpoint, path) = (folder.path().join("hub"), folder.path().join("m.gguf"));
    fs::create_dir(&checkpoint).unwrap();
    write_dir(&checkpoint, config, tensors, 1);
    fs::write(&path, file(metadata, written)).unwrap();
    let model = |source: &std::path::Path, name: &str| -> (ModelSpec, Content) {
        let out = folder.path().join(name);
        convert(source, &out, &Options::default(), &()).unwrap_or_else(|e| panic!("{family}: {e}"));
        (plan(source, &Options::default()).unwrap().spec().clone(), content(&out))
    };
    let ((found, numbers), (spec, expected)) = (model(&path, "a"), model(&checkpoint, "b"));
    assert_eq!(in_order_of_the_hub(found), spec, "{family}");
    let tiled = config["text_config"]["model_type"] == "qwen4_exp_text";
    // Parts of embedding, head and table may have another height.
    let whole = |content: &Content| -> Vec<_> {
        let is_whole = |kind| !matches!(kind, ExtentKind::Embedding | ExtentKind::Head | ExtentKind::Table);
        let parts = content.iter().filter(|(key, _)| is_whole(key.0));
        let parts = parts.map(|(key, (_, numbers))| (key.clone(), numbers.clone()));
        let joined = [ExtentKind::Embedding, ExtentKind::Head, ExtentKind::Table]
            .map(|kind| ((kind, 0, 0, String::new()), joined(content, kind)));
        parts.chain(joined).collect()
    };
    let (numbers, expected) = (whole(&numbers), whole(&expected));
    assert_eq!(numbers.len(), expected.len(), "{family}");
    for ((key, ours), (expected_key, theirs)) in numbers.iter().zip(&expected) {
        assert_eq!((key, ours.len()), (expected_key, theirs.len()), "{family}");
        // The logarithm of an exponential is the number, except for rounding.
        let tolerance = if key.3 == "a_log" { 1e-6 } else { 0.0 };
        let (mut ours, mut theirs) = (ours.clone(), theirs.clone());
        if tiled && key.0 == ExtentKind::Attention {
            // In another order.
            [&mut ours, &mut theirs].into_iter().for_each(|numbers| numbers.sort_by(f32::total_cmp));
        }
        let same = |(a, b): (&f32, &f32)| (a - b).abs() <= tolerance * b.abs();
        assert!(ours.iter().zip(&theirs).all(same), "{family}: {key:?}");
    }
}
