//! Finds out which of a family's arrangements a checkpoint has.
//!
//! Qwen3-Next and Qwen3.5 multiply by one more than the stored norm. mlx-lm adds the one before it saves a model, under the same
//! names, and stores convolutions as `[channels, width, 1]` and experts stacked. Norms have the same shape in both forms, so two
//! signs must agree before they are read: the numbers, and the program that wrote the file.

use sluice_checksum::Xxh3;
use sluice_format::{AttentionSpec, ModelSpec};
use sluice_kernels::{bf16_to_f32, f16_to_f32};

use super::form;
use crate::error::ConvertError;
use crate::family::names::Names;
use crate::family::{Family, delta};
use crate::source::{Checkpoint, Dtype};

/// Elements of one norm that are read: enough for any hidden size.
const MAX_ELEMENTS: u64 = 1 << 20;

/// The result from the numbers of all norms together. Factors are positive, with few exceptions, because training begins with one.
/// If one was subtracted, those below one are negative, and the mean is near zero, towards which weight decay pulls them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Norms {
    /// The norms are what is added to one.
    Centred,
    /// The norms are the factors.
    Whole,
    /// There are both.
    Mixed,
    /// The numbers do not decide.
    Unclear,
}

/// Names and arrangement of the checkpoint's tensors.
pub(super) fn names(checkpoint: &Checkpoint, family: &dyn Family, spec: &ModelSpec) -> Result<Names, ConvertError> {
    let spellings = family.spellings();
    let exists = |names: &&Names| form::find(checkpoint, &names.embedding()).is_some();
    let names = *spellings.iter().find(exists).unwrap_or(&spellings[0]);
    let shape_of = |name: &str| Some(checkpoint.tensors[checkpoint.find(name)?].shape.clone());
    let names = family.arranged(names, spec, &shape_of);
    if !names.zero_centred {
        return Ok(names);
    }
    if checkpoint.whole_norms {
        return Ok(Names { zero_centred: false, ..names });
    }
    if !names.mlx_adds_one {
        return Ok(names);
    }
    let refuse =
        |problem: &str| Err(ConvertError::Mixture { path: checkpoint.dir.clone(), problem: problem.to_owned() });
    let conv_last = match convolutions(checkpoint, names, spec) {
        Some([_, 0]) | None => false,
        Some([0, _]) => true,
        Some(_) => return refuse("some convolutions are arranged as MLX arranges them, and some are not"),
    };
    let stacked = (0..spec.layers.len())
        .any(|layer| form::find(checkpoint, &names.layer(layer, "mlp.switch_mlp.down_proj.weight")).is_some());
    let named_by_mlx = stacked || names.prefix != spellings[0].prefix;
    let zero_centred = match (norms(checkpoint, names, spec)?, conv_last, named_by_mlx) {
        (Norms::Centred, false, _) | (Norms::Unclear, false, false) => true,
        (Norms::Whole, true, _) | (Norms::Whole, _, true) | (Norms::Unclear, true, true) => false,
        (Norms::Centred, true, _) => {
            return refuse(
                "convolutions are arranged as MLX arranges them, but norms are not stored as MLX stores them",
            );
        }
        (Norms::Whole, false, false) => {
            return refuse("norms look as MLX stores them, but nothing else is named or arranged as MLX does it");
        }
        (Norms::Mixed, ..) => return refuse("some norms look as MLX stores them, and some do not"),
        (Norms::Unclear, ..) => {
            return refuse("experts and convolutions are not both as MLX stores them, and norms can be either");
        }
    };
    Ok(Names { zero_centred, conv_last, ..names })
}

/// How many convolutions are `[channels, 1, width]` and `[channels, width, 1]`; `None`: there are none.
fn convolutions(checkpoint: &Checkpoint, names: Names, spec: &ModelSpec) -> Option<[usize; 2]> {
    let mut counts = [0; 2];
    for (layer, of_layer) in spec.layers.iter().enumerate() {
        let AttentionSpec::Delta(delta) = &of_layer.attention else { continue };
        let Some(tensor) = checkpoint.find(&delta::conv(|rest| names.layer(layer, rest))) else { continue };
        // Any other shape is an error later.
        let shape = &checkpoint.tensors[tensor].shape;
        counts[usize::from(*shape == [delta.conv_channels(), delta.conv_width, 1] && delta.conv_width > 1)] += 1;
    }
    (counts != [0, 0]).then_some(counts)
}

fn norms(checkpoint: &Checkpoint, names: Names, spec: &ModelSpec) -> Result<Norms, ConvertError> {
    let (mut elements, mut negative, mut sum) = (0usize, 0usize, 0f64);
    let mut mostly_negative = false;
    for name in names.centred_norms(spec) {
        let Some(tensor) = checkpoint.find(&name) else { continue };
        let values = vector(checkpoint, tensor)?;
        let below = values.iter().filter(|v| **v < 0.0).count();
        mostly_negative |= below * 4 > values.len();
        elements += values.len();
        negative += below;
        sum += values.iter().map(|&v| f64::from(v)).sum::<f64>();
    }
    let mean = sum / elements.max(1) as f64;
    Ok(if negative * 100 > elements || mean.abs() < 0.05 {
        Norms::Centred
    } else if mostly_negative {
        Norms::Mixed
    } else if negative * 1000 <= elements && mean > 0.25 {
        Norms::Whole
    } else {
        Norms::Unclear
    })
}

/// The numbers of a vector; empty for a type that no vector has, which is an error later.
fn vector(checkpoint: &Checkpoint, tensor: usize) -> Result<Vec<f32>, ConvertError> {
    let t = &checkpoint.tensors[tensor];
    let width = match t.dtype {
        Dtype::F32 => 4,
        Dtype::F16 | Dtype::Bf16 => 2,
        _ => return Ok(Vec::new()),
    };
    let mut bytes = vec![0; (t.len.min(MAX_ELEMENTS * width)) as usize];
    checkpoint.read(tensor, 0, &mut bytes, &mut Xxh3::new())?;
    let halves = || bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
    Ok(match t.dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => halves().map(f16_to_f32).collect(),
        _ => halves().map(bf16_to_f32).collect(),
    })
}
