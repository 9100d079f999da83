//! Number formats of checkpoints.

use super::GgmlType;

/// Formats whose numbers this program can read.
pub(crate) const FLOATS: &str = "BF16, F16, F32, F8_E4M3 with scales, and the packed formats listed in docs/MODELS.md";
/// Formats of vectors and scales.
pub(crate) const WIDE_FLOATS: &str = "BF16, F16 and F32";

/// The number format of a tensor, as named in its header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// e4m3fn.
    F8E4M3,
    /// Blocks of ggml: never F32, F16 or BF16, which are the formats above.
    Ggml(GgmlType),
    /// A format that no family uses yet; the name is kept for messages.
    Other(String),
}

impl Dtype {
    pub(crate) fn from_name(name: &str) -> Self {
        match name {
            "F32" => Dtype::F32,
            "F16" => Dtype::F16,
            "BF16" => Dtype::Bf16,
            "F8_E4M3" => Dtype::F8E4M3,
            other => Dtype::Other(other.to_owned()),
        }
    }

    /// The format of a tensor of a GGUF file.
    #[allow(dead_code, reason = "GGUF files")]
    pub(crate) fn from_ggml(ty: GgmlType) -> Self {
        match ty {
            GgmlType::F32 => Dtype::F32,
            GgmlType::F16 => Dtype::F16,
            GgmlType::BF16 => Dtype::Bf16,
            other => Dtype::Ggml(other),
        }
    }

    pub(crate) fn name(&self) -> &str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
            Dtype::F8E4M3 => "F8_E4M3",
            Dtype::Ggml(ty) => ty.name(),
            Dtype::Other(name) => name,
        }
    }

    /// Bits of one element; `None` for blocks, and for a name that safetensors does not define.
    pub(crate) fn bits(&self) -> Option<u64> {
        if matches!(self, Dtype::Ggml(_)) {
            return None;
        }
        match self.name() {
            "F4" => Some(4),
            "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => Some(8),
            "U16" | "I16" | "F16" | "BF16" => Some(16),
            "U32" | "I32" | "F32" => Some(32),
            "U64" | "I64" | "F64" | "C64" => Some(64),
            _ => None,
        }
    }
}
