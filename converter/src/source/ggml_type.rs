//! The number formats of GGUF files, by their numbers in the file.

/// A number format of ggml whose blocks this program knows.
///
/// Numbers, names and sizes: `enum ggml_type` and `type_traits` of ggml (<https://github.com/ggml-org/llama.cpp>, `ggml.h` and
/// `ggml.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "these are the names that everybody knows")]
#[repr(u32)]
pub(crate) enum GgmlType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ2_XXS = 16,
    IQ2_XS = 17,
    IQ3_XXS = 18,
    IQ1_S = 19,
    IQ4_NL = 20,
    IQ3_S = 21,
    IQ2_S = 22,
    IQ4_XS = 23,
    I8 = 24,
    I16 = 25,
    I32 = 26,
    I64 = 27,
    F64 = 28,
    IQ1_M = 29,
    BF16 = 30,
    TQ1_0 = 34,
    TQ2_0 = 35,
    MXFP4 = 39,
    NVFP4 = 40,
}

/// Name, columns of a block, and bytes of a block.
type Traits = (&'static str, usize, usize);

impl GgmlType {
    /// Every format.
    pub(crate) const ALL: [GgmlType; 31] = [
        GgmlType::F32,
        GgmlType::F16,
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q8_0,
        GgmlType::Q2_K,
        GgmlType::Q3_K,
        GgmlType::Q4_K,
        GgmlType::Q5_K,
        GgmlType::Q6_K,
        GgmlType::IQ2_XXS,
        GgmlType::IQ2_XS,
        GgmlType::IQ3_XXS,
        GgmlType::IQ1_S,
        GgmlType::IQ4_NL,
        GgmlType::IQ3_S,
        GgmlType::IQ2_S,
        GgmlType::IQ4_XS,
        GgmlType::I8,
        GgmlType::I16,
        GgmlType::I32,
        GgmlType::I64,
        GgmlType::F64,
        GgmlType::IQ1_M,
        GgmlType::BF16,
        GgmlType::TQ1_0,
        GgmlType::TQ2_0,
        GgmlType::MXFP4,
        GgmlType::NVFP4,
    ];

    /// The format with this number in a file; the error says what it is instead.
    pub(crate) fn from_id(id: u32) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|ty| *ty as u32 == id);
        known.ok_or_else(|| match id {
            // Formats that ggml itself has dropped, or uses only in memory.
            4 | 5 => format!("Q4_2 or Q4_3 (type {id}), which llama.cpp gave up in 2023"),
            9 => "Q8_1 (type 9), which is a format of activations".to_owned(),
            15 => "Q8_K (type 15), which is a format of activations".to_owned(),
            31..=33 | 36..=38 => format!("an interleaved format that llama.cpp has given up (type {id})"),
            _ => format!("a format that this program does not know (type {id})"),
        })
    }

    fn traits(self) -> Traits {
        match self {
            GgmlType::F32 => ("F32", 1, 4),
            GgmlType::F16 => ("F16", 1, 2),
            GgmlType::Q4_0 => ("Q4_0", 32, 18),
            GgmlType::Q4_1 => ("Q4_1", 32, 20),
            GgmlType::Q5_0 => ("Q5_0", 32, 22),
            GgmlType::Q5_1 => ("Q5_1", 32, 24),
            GgmlType::Q8_0 => ("Q8_0", 32, 34),
            GgmlType::Q2_K => ("Q2_K", 256, 84),
            GgmlType::Q3_K => ("Q3_K", 256, 110),
            GgmlType::Q4_K => ("Q4_K", 256, 144),
            GgmlType::Q5_K => ("Q5_K", 256, 176),
            GgmlType::Q6_K => ("Q6_K", 256, 210),
            GgmlType::IQ2_XXS => ("IQ2_XXS", 256, 66),
            GgmlType::IQ2_XS => ("IQ2_XS", 256, 74),
            GgmlType::IQ3_XXS => ("IQ3_XXS", 256, 98),
            GgmlType::IQ1_S => ("IQ1_S", 256, 50),
            GgmlType::IQ4_NL => ("IQ4_NL", 32, 18),
            GgmlType::IQ3_S => ("IQ3_S", 256, 110),
            GgmlType::IQ2_S => ("IQ2_S", 256, 82),
            GgmlType::IQ4_XS => ("IQ4_XS", 256, 136),
            GgmlType::I8 => ("I8", 1, 1),
            GgmlType::I16 => ("I16", 1, 2),
            GgmlType::I32 => ("I32", 1, 4),
            GgmlType::I64 => ("I64", 1, 8),
            GgmlType::F64 => ("F64", 1, 8),
            GgmlType::IQ1_M => ("IQ1_M", 256, 56),
            GgmlType::BF16 => ("BF16", 1, 2),
            GgmlType::TQ1_0 => ("TQ1_0", 256, 54),
            GgmlType::TQ2_0 => ("TQ2_0", 256, 66),
            GgmlType::MXFP4 => ("MXFP4", 32, 17),
            GgmlType::NVFP4 => ("NVFP4", 64, 36),
        }
    }

    /// Its name in llama.cpp.
    pub(crate) fn name(self) -> &'static str {
        self.traits().0
    }

    /// Columns of a block: a row consists of whole blocks.
    pub(crate) fn block_cols(self) -> usize {
        self.traits().1
    }

    /// Bytes of a block.
    pub(crate) fn block_bytes(self) -> usize {
        self.traits().2
    }

    /// Bytes of a row; `None` if it is not a whole number of blocks, or too long.
    pub(crate) fn row_bytes(self, cols: usize) -> Option<usize> {
        let (_, block_cols, block_bytes) = self.traits();
        if cols.is_multiple_of(block_cols) { (cols / block_cols).checked_mul(block_bytes) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_name_formats_and_back() {
        for ty in GgmlType::ALL {
            assert_eq!(GgmlType::from_id(ty as u32), Ok(ty));
        }
        let refused: Vec<u32> = (0..=40).filter(|&id| GgmlType::from_id(id).is_err()).collect();
        assert_eq!(refused, [4, 5, 9, 15, 31, 32, 33, 36, 37, 38]);
        assert!(GgmlType::from_id(u32::MAX).unwrap_err().contains("4294967295"));
        assert_eq!(GgmlType::Q4_K.row_bytes(512), Some(288));
        assert_eq!(GgmlType::Q4_K.row_bytes(128), None);
        assert_eq!(GgmlType::F64.row_bytes(usize::MAX), None);
    }
}
