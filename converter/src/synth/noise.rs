//! An expert of pure noise, which a simulated drive has in place of a model's own.

use sluice_format::{ExtentKind, Layout, ModelFile, PROVENANCE_BLOB, ROW_GROUP, TensorRecord};

use super::random::Random;
use super::write::{DOWN, NO_EXPERTS, matrix, usual_deviation, vector};
use crate::error::ConvertError;

/// Row groups of a matrix that are sampled to find the magnitude of its weights.
const SAMPLE_GROUPS: usize = 64;
/// Marks the random bits of noise, in addition to the codes of extents.
const NOISE_BITS: u32 = u32::MAX - 2;

/// The bytes of an expert with random weights that can replace every expert of the file. Its matrices have the root mean square of
/// those of the file's first expert, or of what [`super::synth`] would write if that one is missing or zero. So what a layer adds
/// to the residual stream is as large as in the model. The last matrix is smaller by √k for k experts per token: if all of them are
/// the same one, their outputs do not cancel as those of different experts do.
///
/// # Errors
/// [`ConvertError::Options`] for a file without experts or whose experts differ in length, types or shapes;
/// [`ConvertError::Format`] if the first expert cannot be read.
pub fn expert_noise(file: &ModelFile) -> Result<Vec<u8>, ConvertError> {
    let layers = file.spec().layers.iter().enumerate();
    let mut routed = layers.filter_map(|(layer, spec)| Some((layer as u32, spec.ffn.moe.as_ref()?)));
    let refuse = |why: String| Err(ConvertError::Options(format!("{}: {why}", file.path().display())));
    let Some((first, moe)) = routed.next() else {
        return refuse("this model has no experts that a drive could bring".into());
    };
    let stored_len = |layer| file.extent(ExtentKind::Expert, layer, 0).map(|extent| extent.padded_len);
    for (layer, _) in routed {
        if stored_len(layer) != stored_len(first) || !tensors(file, layer).eq(tensors(file, first)) {
            return refuse(format!(
                "experts of layers {first} and {layer} differ in type or shape: one expert's bytes cannot replace all"
            ));
        }
    }
    let own = own_bytes(file, first)?;
    let mut random = Random::new(0, [NOISE_BITS, 0, 0]);
    let mut noise = Vec::new();
    for tensor in file.tensors_in(ExtentKind::Expert, first, 0) {
        noise.resize(tensor.offset as usize, 0);
        let mut bytes = Vec::new();
        if tensor.layout == Layout::Plain {
            vector(tensor, &[], &mut random, &mut bytes);
        } else {
            let size = own.as_deref().and_then(|own| root_mean_square(tensor, own)).filter(|size| *size > 0.0);
            let shrink = if tensor.name == DOWN { (moe.top_k as f32).sqrt().recip() } else { 1.0 };
            let deviation = shrink * size.unwrap_or_else(|| usual_deviation(tensor));
            matrix(tensor, deviation, &mut random, &mut bytes, &mut |batch| {
                noise.append(batch);
                Ok(())
            })?;
        }
        noise.append(&mut bytes);
    }
    noise.resize(stored_len(first).unwrap_or(0) as usize, 0);
    Ok(noise)
}

/// The tensors of a layer's experts.
fn tensors(file: &ModelFile, layer: u32) -> impl Iterator<Item = impl PartialEq> {
    let shape = |t: &TensorRecord| (t.weight_type, t.layout, t.shape, t.offset, t.name.clone());
    file.tensors_in(ExtentKind::Expert, layer, 0).map(shape)
}

/// The first expert of a layer, unless the file says that it has none.
fn own_bytes(file: &ModelFile, layer: u32) -> Result<Option<Vec<u8>>, ConvertError> {
    let provenance = file.metadata().get(PROVENANCE_BLOB).and_then(|blob| sluice_format::json::from_slice(blob).ok());
    let missing = provenance.is_some_and(|provenance: serde_json::Value| provenance[NO_EXPERTS] == true);
    let Some(extent) = file.extent(ExtentKind::Expert, layer, 0).filter(|_| !missing) else { return Ok(None) };
    let mut bytes = Vec::new();
    file.read_extent(extent, &mut bytes)?;
    Ok(Some(bytes))
}

/// The root mean square of the weights in the first row groups of a matrix; `None` if it is not finite.
fn root_mean_square(tensor: &TensorRecord, expert: &[u8]) -> Option<f32> {
    let [_, rows, cols] = tensor.shape.map(|d| d as usize);
    let twins = if tensor.layout == Layout::TiledPair { 2 } else { 1 };
    let groups = (twins * rows.div_ceil(ROW_GROUP)).min(SAMPLE_GROUPS);
    let len = groups * tensor.weight_type.row_group_len(cols)?;
    let bytes = expert.get(tensor.offset as usize..tensor.offset as usize + len)?;
    let sample = sluice_kernels::Matrix::new(tensor.weight_type, groups * ROW_GROUP, cols, bytes).ok()?;
    let weights = sluice_kernels::unpack(sample);
    let square = weights.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>() / weights.len() as f64;
    square.is_finite().then_some(square.sqrt() as f32)
}
