//! Model families: what `config.json` means and what the tensors are called.
//!
//! A family is one file that implements [`Family`] and says only what differs; what several share stands in `config`,
//! `rope` and `names`. To add one: write the file, list it in [`FAMILIES`].

pub(crate) mod config;
mod deepseek_v3;
mod names;
mod rope;

use serde_json::Value;
use sluice_format::{ExtentKind, ModelSpec, TensorShape};

use crate::error::ConvertError;
use config::Config;
use names::DecoderNames;

/// Every family that can be converted.
static FAMILIES: &[&dyn Family] = &[&deepseek_v3::DeepSeekV3];

/// What the converter must know about a family.
pub(crate) trait Family: Sync {
    /// Values of `model_type` that mean this family.
    fn model_types(&self) -> &'static [&'static str];

    /// What the model computes.
    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError>;

    /// How the decoder's tensors are called.
    fn names(&self) -> DecoderNames {
        DecoderNames::USUAL
    }

    /// Where a tensor of an extent comes from: one view, or gate and up of a pair. Asked for what
    /// [`ModelSpec::tensors`] lists in layers, not for embedding, head and final norm.
    fn origin(&self, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Vec<View>;

    /// Why a tensor that no extent uses may be left out; `None`: it is unknown.
    fn unused(&self, spec: &ModelSpec, name: &str) -> Option<Unused> {
        usually_unused(self.names(), spec, name)
    }
}

/// An extent, by what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// What it holds.
    pub(crate) kind: ExtentKind,
    /// Layer.
    pub(crate) layer: usize,
    /// Expert, or 0.
    pub(crate) index: usize,
}

/// Rows of a source tensor, seen as a matrix or as a batch of matrices. The last dimension of the source is its columns,
/// the others together are its rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    /// The source tensor.
    pub(crate) tensor: String,
    /// The shape that it must have.
    pub(crate) source_shape: Vec<usize>,
    /// Its first row that belongs to matrix 0.
    pub(crate) first_row: usize,
    /// Rows from one matrix of the batch to the next.
    pub(crate) batch_stride: usize,
    /// Whether the matrix is the transpose of those rows.
    pub(crate) transposed: bool,
}

impl View {
    /// All of a matrix.
    pub(crate) fn whole(tensor: String, rows: usize, cols: usize) -> Self {
        View { tensor, source_shape: vec![rows, cols], first_row: 0, batch_stride: 0, transposed: false }
    }

    /// All of a vector.
    pub(crate) fn vector(tensor: String, len: usize) -> Self {
        View { tensor, source_shape: vec![len], first_row: 0, batch_stride: 0, transposed: false }
    }
}

/// Why a tensor is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Unused {
    /// Layers that predict further tokens: not needed to generate.
    MultiTokenPrediction,
    /// Constants that follow from the configuration.
    Derived,
}

impl Unused {
    /// Its name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Unused::MultiTokenPrediction => "multi-token prediction layers",
            Unused::Derived => "constants that follow from the configuration",
        }
    }
}

/// Prediction layers stand behind the decoder's layers or under `mtp.`; old checkpoints carry rotary frequencies.
fn usually_unused(names: DecoderNames, spec: &ModelSpec, name: &str) -> Option<Unused> {
    let beyond = names.layer_of(name).is_some_and(|layer| layer >= spec.layers.len());
    if beyond || name.starts_with("mtp.") || name.starts_with("model.mtp.") {
        return Some(Unused::MultiTokenPrediction);
    }
    name.ends_with("rotary_emb.inv_freq").then_some(Unused::Derived)
}

/// The family that `config.json` names.
pub(crate) fn find(config: &Config) -> Result<&'static dyn Family, ConvertError> {
    let supported = || FAMILIES.iter().flat_map(|f| f.model_types()).copied().collect::<Vec<_>>().join(", ");
    let Some(model_type) = config.opt_str("model_type")? else {
        return Err(config.refuse("model_type", format!("is missing; supported: {}", supported())));
    };
    let found = FAMILIES.iter().find(|f| f.model_types().contains(&model_type)).copied();
    found.ok_or_else(|| config.refuse("model_type", format!("is \"{model_type}\"; supported: {}", supported())))
}

/// Checks that stored weights are quantised in no other way than one that the reader of sources knows.
pub(crate) fn check_quantisation(config: &Config) -> Result<(), ConvertError> {
    let Some(section) = config.section("quantization_config")? else { return Ok(()) };
    section.require_str("quant_method", &["fp8"])?;
    section.require_str("fmt", &["e4m3"])?;
    if let Some(block) = section.opt_list("weight_block_size")?
        && block != [Value::from(128), Value::from(128)]
    {
        let found = Value::from(block.to_vec());
        return Err(section.refuse("weight_block_size", format!("is {found}; only [128,128] is supported")));
    }
    Ok(())
}
