//! Common parts of the Qwen families.

use sluice_format::FfnSpec;
use sluice_format::limits::MAX_WIDTH;

use super::decoder::Decoder;
use crate::error::ConvertError;

/// Qwen's configurations have a window, but no published model switches it on.
pub(crate) fn require_full_attention(decoder: &Decoder<'_>) -> Result<(), ConvertError> {
    decoder.config.require_bool("use_sliding_window", false)
}

/// Adds the shared expert, whose output is multiplied by the sigmoid of a projection of the input.
pub(crate) fn with_gated_shared(
    decoder: &Decoder<'_>,
    ffn: FfnSpec,
    default_width: usize,
) -> Result<FfnSpec, ConvertError> {
    let key = "shared_expert_intermediate_size";
    let dense_width = decoder.config.usize_or(key, default_width)?;
    if dense_width > 0 {
        decoder.config.check_size(key, dense_width, MAX_WIDTH)?;
    }
    Ok(FfnSpec { dense_width, dense_gate: dense_width > 0, ..ffn })
}
