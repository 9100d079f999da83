//! What the Qwen families share.

use sluice_format::FfnSpec;

use super::decoder::Decoder;
use crate::error::ConvertError;

/// Qwen's configurations carry a window that no published model switches on.
pub(crate) fn require_full_attention(decoder: &Decoder<'_>) -> Result<(), ConvertError> {
    decoder.config.require_bool("use_sliding_window", false)
}

/// Adds the shared expert, whose output is multiplied by the sigmoid of a projection of the input.
pub(crate) fn with_gated_shared(
    decoder: &Decoder<'_>,
    ffn: FfnSpec,
    default_width: usize,
) -> Result<FfnSpec, ConvertError> {
    let dense_width = decoder.config.usize_or("shared_expert_intermediate_size", default_width)?;
    Ok(FfnSpec { dense_width, dense_gate: dense_width > 0, ..ffn })
}
