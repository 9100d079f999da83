//! The norms of the residual stream: before the parts of a layer, before the head, and after the parts.

use sluice_format::ModelSpec;
use sluice_kernels::rms_norm;

use super::ModelError;
use super::weights::{ExtentTensors, VectorRef};

/// A norm of rows of the residual stream, as places in its extent.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    weight: VectorRef,
    /// With a bias, the norm is a layer norm; otherwise it is an RMS norm.
    bias: Option<VectorRef>,
    eps: f32,
}

/// Buffers for the weights of norms.
#[derive(Debug, Default)]
pub struct NormScratch {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Norm {
    /// A norm before a part of a layer or before the head.
    pub(super) fn before(
        spec: &ModelSpec,
        tensors: &ExtentTensors<'_>,
        weight: &'static str,
        bias: &'static str,
    ) -> Result<Self, ModelError> {
        let bias = spec.norms.centred.then(|| tensors.vector(bias)).transpose()?;
        Ok(Norm { bias, ..Norm::rms(spec.norm_eps, tensors, weight)? })
    }

    /// An RMS norm.
    pub(super) fn rms(eps: f32, tensors: &ExtentTensors<'_>, weight: &'static str) -> Result<Self, ModelError> {
        Ok(Norm { weight: tensors.vector(weight)?, bias: None, eps })
    }

    /// Numbers of a row.
    pub fn width(&self) -> usize {
        self.weight.count()
    }

    /// `out` = the rows `x` `[n, width]`, normalised.
    pub fn apply(&self, extent: &[u8], x: &[f32], scratch: &mut NormScratch, out: &mut [f32]) {
        let (width, NormScratch { weight, bias }) = (self.width(), scratch);
        self.weight.read(extent, weight);
        let rows = x.chunks_exact(width).zip(out.chunks_exact_mut(width));
        match &self.bias {
            None => rows.for_each(|(x, out)| rms_norm(x, weight, self.eps, out)),
            Some(place) => {
                place.read(extent, bias);
                rows.for_each(|(x, out)| layer_norm(x, weight, bias, self.eps, out));
            }
        }
    }

    /// Normalises the rows `x` `[n, width]` in place, through the buffer `room`, which has the same length.
    pub fn apply_in_place(&self, extent: &[u8], x: &mut [f32], scratch: &mut NormScratch, room: &mut [f32]) {
        self.apply(extent, x, scratch, room);
        x.copy_from_slice(room);
    }
}

/// `out[i] = weight[i] · (x[i] − mean) / sqrt(variance + eps) + bias[i]` over one row (arXiv:1607.06450).
pub(super) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let n = x.len() as f32;
    let mean = x.iter().sum::<f32>() / n;
    let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / n;
    let factor = 1.0 / (variance + eps).sqrt();
    for (((out, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        *out = (x - mean) * factor * w + b;
    }
}
