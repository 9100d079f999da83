//! The shape of a model without its weights.

use std::path::{Path, PathBuf};

use serde_json::Value;
use sluice_format::{ExtentKind, ModelSpec, PAGE_SIZES, WeightType};

use super::layout::{Layout, WeightTypes};
use super::release::{self, Release};
use crate::error::ConvertError;
use crate::family::{self, config::Config};
use crate::nearest::nearest;
use crate::source::{CONFIG, read_side_file, recognise};

/// A model that is known by name.
struct Preset {
    name: &'static str,
    config: &'static str,
}

macro_rules! presets {
    ($($name:literal),+ $(,)?) => {
        [$(Preset { name: $name, config: include_str!(concat!("presets/", $name, ".json")) }),+]
    };
}

static PRESETS: [Preset; 47] = presets![
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-r1",
    "deepseek-v3.2",
    "deepseek-v4-flash",
    "deepseek-v4-pro",
    "kimi-k2",
    "kimi-k2-thinking",
    "kimi-linear-48b",
    "glm-4.5-air",
    "glm-4.6",
    "glm-4.7-flash",
    "glm-5",
    "glm-5.2",
    "qwen1.5-moe",
    "qwen2-57b",
    "qwen3-30b",
    "qwen3-235b",
    "qwen3-coder-480b",
    "qwen3-next-80b",
    "qwen3.5-35b",
    "qwen3.5-122b",
    "qwen3.5-397b",
    "gpt-oss-20b",
    "gpt-oss-120b",
    "minimax-m2",
    "minimax-m3",
    "mixtral-8x7b",
    "mixtral-8x22b",
    "olmoe-7b",
    "granite-3.1-1b-a400m",
    "granite-3.1-3b-a800m",
    "ernie-4.5-0.3b",
    "ernie-4.5-21b",
    "ernie-4.5-300b",
    "hunyuan-a13b",
    "hy3",
    "llama-4-scout",
    "llama-4-maverick",
    "mimo-v2-flash",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "llama-3.1-405b",
    "mistral-7b",
    "qwen3-8b",
    "qwen3-32b",
    "bench-34x128",
];

/// Numbers of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weights {
    /// In the whole model; a head that is the token embedding counts once.
    pub all: u64,
    /// Multiplied for every token: all except the routed experts and the embedding.
    pub every_token: u64,
}

/// The shape of a model: its configuration, and what follows from it.
#[derive(Clone, Debug)]
pub struct Geometry {
    name: String,
    spec: ModelSpec,
    config: Vec<u8>,
}

impl Geometry {
    /// Names of the models that need no file.
    pub fn presets() -> impl Iterator<Item = &'static str> {
        PRESETS.iter().map(|p| p.name)
    }

    /// Loads a preset by its name, or a `config.json`, or the one in a folder. `layers` keeps only that many layers, the first
    /// ones.
    ///
    /// # Errors
    /// [`ConvertError::Options`] if `source` is neither, or has fewer layers; [`ConvertError::Config`] for a family that is not
    /// supported, and everything else that a conversion would refuse in a configuration.
    pub fn load(source: &str, layers: Option<usize>) -> Result<Self, ConvertError> {
        match PRESETS.iter().find(|p| p.name == source) {
            Some(preset) => {
                let path = PathBuf::from(format!("preset {source}"));
                Self::parse(source, &path, preset.config.as_bytes().to_vec(), layers)
            }
            None => {
                let path = config_path(source)?;
                let bytes = read_side_file(&path)?;
                Self::parse(source, &path, bytes, layers)
            }
        }
    }

    fn parse(name: &str, path: &Path, mut config: Vec<u8>, layers: Option<usize>) -> Result<Self, ConvertError> {
        let mut spec = read_spec(path, &config)?;
        if let Some(layers) = layers.filter(|&l| l != spec.layers.len()) {
            let all = spec.layers.len();
            if layers == 0 || layers > all {
                return Err(ConvertError::Options(format!("{name} has {all} layers: --layers can be 1 to {all}")));
            }
            config = with_layers(&config, all, layers);
            spec = read_spec(path, &config)?;
        }
        Ok(Geometry { name: name.to_owned(), spec, config })
    }

    /// The name or path from which it was loaded.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the model computes.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Its `config.json`.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// How many weights it has, norms and biases included.
    ///
    /// # Panics
    /// Never for a loaded geometry, because its specification is one that a file can have.
    pub fn weights(&self) -> Weights {
        let types = WeightTypes { experts: WeightType::Bf16, dense: WeightType::Bf16 };
        let layout = Layout::new(&self.spec, types, PAGE_SIZES[0]).expect("it was parsed before");
        let of = |wanted: &dyn Fn(ExtentKind) -> bool| layout.weights(wanted);
        let head = if self.is_tied() { of(&|kind| kind == ExtentKind::Head) } else { 0 };
        Weights {
            all: of(&|_| true) - head,
            every_token: of(&|kind| !matches!(kind, ExtentKind::Expert | ExtentKind::Embedding)),
        }
    }

    /// Whether the configuration says that the head is the token embedding.
    fn is_tied(&self) -> bool {
        let config: Value = sluice_format::json::from_slice(&self.config).expect("it was parsed before");
        let said = |config: &Value| config.get("tie_word_embeddings").and_then(Value::as_bool);
        said(&config).or_else(|| said(config.get("text_config")?)).unwrap_or(false)
    }

    /// The types of the model's own release, which a conversion keeps; `None` if it was never released.
    pub fn release(&self) -> Option<Release> {
        let config = sluice_format::json::from_slice(&self.config).expect("it was parsed before");
        let release = release::read(&config);
        let made_up = PRESETS.iter().any(|p| p.name == self.name) && !release.said;
        (!made_up).then_some(release)
    }

    /// The default type of routed experts: four bits, as in the family's own releases.
    pub fn usual_expert_type(&self) -> WeightType {
        if self.spec.family == "gpt_oss" { WeightType::Mxfp4 } else { WeightType::Int4 }
    }
}

fn config_path(source: &str) -> Result<PathBuf, ConvertError> {
    let path = PathBuf::from(source);
    let path = if path.is_dir() { path.join(CONFIG) } else { path };
    if path.exists() {
        return Ok(path);
    }
    if Path::new(source).is_dir() {
        let problem = recognise::no_config(Path::new(source));
        return Err(ConvertError::NotACheckpoint { path: PathBuf::from(source), problem });
    }
    if let Some(hint) = recognise::on_hub(Path::new(source), Some(CONFIG)) {
        return Err(ConvertError::Options(format!("`{source}`: {hint}")));
    }
    let names: Vec<&str> = Geometry::presets().collect();
    let near = nearest(source, &names).map_or_else(|| ".".to_owned(), |near| format!("; did you mean {near}?"));
    Err(ConvertError::Options(format!(
        "`{source}` is neither a file nor a known model{near} Use a config.json or one of {}",
        names.join(", ")
    )))
}

fn read_spec(path: &Path, bytes: &[u8]) -> Result<ModelSpec, ConvertError> {
    let config = Config::parse(path, bytes)?;
    let family = family::find(&config)?;
    let text = family::text(family, &config)?;
    family::spec(family, text.as_ref().unwrap_or(&config))
}

/// The configuration of a model that is cut to its first `layers` of `all` layers: their number, and the lists with one entry per
/// layer or with numbers of layers, here and in sections.
fn with_layers(config: &[u8], all: usize, layers: usize) -> Vec<u8> {
    fn cut(value: &mut Value, all: usize, layers: usize) {
        let Value::Object(keys) = value else { return };
        for (key, value) in keys {
            match value {
                // Kimi's lists hold numbers of layers, from one on.
                Value::Array(list) if matches!(key.as_str(), "kda_layers" | "full_attn_layers") => {
                    list.retain(|number| number.as_u64().is_some_and(|number| number <= layers as u64));
                }
                Value::Array(list) if list.len() == all => list.truncate(layers),
                Value::Number(_) if key == "num_hidden_layers" => *value = layers.into(),
                section => cut(section, all, layers),
            }
        }
    }
    let mut value: Value = sluice_format::json::from_slice(config).expect("it was parsed before");
    // Without the key, the family's default number of layers would apply.
    if value.get("text_config").is_none() {
        value["num_hidden_layers"] = layers.into();
    }
    cut(&mut value, all, layers);
    serde_json::to_vec_pretty(&value).expect("a JSON value serialises")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Millions of weights in all routed experts and in one: layers × experts × 3 × hidden size × width as published.
    #[test]
    fn presets_are_the_models_that_they_name() {
        for (name, experts, one) in [
            ("deepseek-r1", 653_909, 44.04),
            ("deepseek-v4-flash", 277_025, 25.17),
            ("deepseek-v4-pro", 1_547_396, 66.06),
            ("kimi-k2", 1_014_686, 44.04),
            ("glm-4.6", 335_964, 23.59),
            ("qwen3-235b", 227_096, 18.87),
            ("qwen3-30b", 28_991, 4.72),
            ("gpt-oss-120b", 114_662, 24.88),
            ("mixtral-8x7b", 45_097, 176.16),
            ("bench-34x128", 20_535, 4.72),
        ] {
            let geometry = Geometry::load(name, None).unwrap();
            let spec = geometry.spec();
            let moe: Vec<_> = spec.layers.iter().filter_map(|l| l.ffn.moe.as_ref()).collect();
            let weights = |width: usize| 3.0 * (width * spec.hidden_size) as f64 / 1e6;
            let all: f64 = moe.iter().map(|m| m.experts as f64 * weights(m.width)).sum();
            assert_eq!(all.round(), f64::from(experts), "{name}");
            assert!((weights(moe[0].width) - one).abs() < 0.005, "{name}");
        }
    }

    /// Billions of weights, according to the authors or to the sums of the published tensors, without prediction layers and image
    /// encoders.
    #[test]
    fn presets_have_as_many_weights_as_the_models() {
        let published = [
            ("deepseek-v2", 235.7),
            ("deepseek-v2-lite", 15.7),
            ("deepseek-r1", 671.0),
            ("deepseek-v3.2", 671.9),
            ("deepseek-v4-flash", 284.3),
            ("deepseek-v4-pro", 1573.0),
            ("kimi-k2", 1026.4),
            ("kimi-k2-thinking", 1026.4),
            ("kimi-linear-48b", 49.1),
            ("glm-4.5-air", 106.9),
            ("glm-4.6", 352.8),
            ("glm-4.7-flash", 29.9),
            ("glm-5", 743.9),
            ("glm-5.2", 743.4),
            ("qwen1.5-moe", 14.3),
            ("qwen2-57b", 57.4),
            ("qwen3-30b", 30.5),
            ("qwen3-235b", 235.1),
            ("qwen3-coder-480b", 480.2),
            ("qwen3-next-80b", 79.7),
            ("qwen3.5-35b", 34.7),
            ("qwen3.5-122b", 122.1),
            ("qwen3.5-397b", 396.3),
            ("gpt-oss-20b", 20.9),
            ("gpt-oss-120b", 116.8),
            ("minimax-m2", 228.7),
            ("minimax-m3", 426.2),
            ("mixtral-8x7b", 46.7),
            ("mixtral-8x22b", 140.6),
            ("olmoe-7b", 6.9),
            ("granite-3.1-1b-a400m", 1.3),
            ("granite-3.1-3b-a800m", 3.3),
            ("ernie-4.5-0.3b", 0.4),
            ("ernie-4.5-21b", 21.8),
            ("ernie-4.5-300b", 299.5),
            ("hunyuan-a13b", 80.4),
            ("hy3", 295.0),
            ("llama-4-scout", 107.8),
            ("llama-4-maverick", 400.7),
            ("mimo-v2-flash", 308.8),
            ("llama-3.1-8b", 8.0),
            ("llama-3.1-70b", 70.6),
            ("llama-3.1-405b", 405.9),
            ("mistral-7b", 7.2),
            ("qwen3-8b", 8.2),
            ("qwen3-32b", 32.8),
            ("bench-34x128", 21.3),
        ];
        let of = |(name, billions): &(&'static str, f64)| {
            (*name, *billions, Geometry::load(name, None).unwrap().weights().all as f64 / 1e9)
        };
        let other: Vec<_> = published.iter().map(of).filter(|(_, said, all)| (all - said).abs() >= 0.051).collect();
        assert!(other.is_empty(), "name, billions said and found: {other:.2?}");
    }

    #[test]
    fn layers_are_cut_from_the_end() {
        let cut = Geometry::load("deepseek-r1", Some(5)).unwrap();
        let whole = Geometry::load("deepseek-r1", None).unwrap();
        assert_eq!(cut.spec().layers, whole.spec().layers[..5]);
        assert_eq!(serde_json::from_slice::<Value>(cut.config()).unwrap()["num_hidden_layers"], 5);
        for layers in [0, 62] {
            assert!(Geometry::load("deepseek-r1", Some(layers)).unwrap_err().to_string().contains("1 to 61"));
        }
        let lists = serde_json::json!({"kda_layers": [1, 2, 4], "full_attn_layers": [3]});
        let config =
            serde_json::json!({"model_type": "kimi_linear", "num_hidden_layers": 4, "linear_attn_config": lists});
        let parse = |layers| Geometry::parse("kimi", Path::new("config.json"), config.to_string().into_bytes(), layers);
        assert_eq!(parse(Some(2)).unwrap().spec().layers, parse(None).unwrap().spec().layers[..2]);
    }

    #[test]
    fn unknown_names_list_the_known_ones() {
        let message = Geometry::load("no-such-model", None).unwrap_err().to_string();
        assert!(message.contains("no-such-model") && message.contains("deepseek-r1"), "{message}");
    }
}
