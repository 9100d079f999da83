//! Codes of a few bits, and scales for groups of columns: the forms in which quantised models are published.
//!
//! A weight is `A·(v − z) + B`, where `v` is the number that its code stands for, and `A`, `z` and `B` belong to its row and
//! group of columns; [`Scales`] says how they are stored. All are carried from the source bit for bit, so a row group is a
//! permutation of the source's bits, with the exceptions that [`Super`] names.
//!
//! # Scale plane of a row group
//! - [`Scales::Groups`]: for [`ScaleType::E4m3`] first 8 × f32, a factor for each row. Then for each group of columns 8 scales,
//!   one per row, and behind them 8 zeros or biases if the type has them. Groups of 16 come in pairs: if a row ends within the
//!   first half of 32 columns, the scales of the second half are zero.
//! - [`Scales::Super`]: for each 256 columns 8 × f16, `d`; with minima 8 × f16, `dmin`; then for each unit of
//!   [`Super::unit`] columns, in ascending order, 8 bytes for each of its [`Super::unit_len`] bytes.
//!
//! # Value plane of a row group
//! For each 32 columns, 8 times [`Codes::block_len`] bytes. With `k = 32g + 4q + i` and `r` the row within the group:
//! - Integers of `b` bits are cut into planes, low bits first: 4 bits if `b ≥ 4`, then 2 bits if `b mod 4 ≥ 2`, then 1 bit if `b` is
//!   odd; 8 bits are one plane. The plane of 8 bits has byte `q·32 + r·4 + i`; that of 4 bits byte `(q mod 4)·32 + r·4 + i`, low
//!   nibble where `q < 4`; that of 2 bits byte `(q mod 2)·32 + r·4 + i`, bits `2·⌊q/2⌋` and up; that of 1 bit byte `r·4 + i`, bit `q`.
//! - e2m1 and iq4nl: as the plane of 4 bits. e4m3: byte `(k mod 32)·8 + r`.
//! - Grids: records of [`Codes::fields`], field by field: field `f` of row `r` at `8·(bytes of the fields before) + r·width`.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::LazyLock;

use crate::{BLOCK, ROW_GROUP};

/// Columns of a super-block.
pub const SUPER_BLOCK: usize = 256;

/// What the codes of a matrix are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Codes {
    /// Unsigned integers of 2, 3, 4, 5, 6 or 8 bits.
    Uint(u8),
    /// The float e2m1 (OCP MX).
    E2m1,
    /// The float e4m3fn.
    E4m3,
    /// Indices of the sixteen levels of ggml's IQ4_NL.
    Iq4nl,
    /// ggml's grids: indices of points of a lattice, and signs (<https://github.com/ggml-org/llama.cpp>, `ggml-common.h`,
    /// `ggml-quants.c`). A record holds the bytes that ggml's block has for 32 columns, in ggml's own order of bits; numbers
    /// of several bytes are little-endian. Eight columns are columns `8l..8l + 8`, with `l` below 4; bit `j` of eight signs
    /// is set where column `8l + j` is negative. If seven signs are stored, the eighth is the one that makes the number of
    /// negative signs even.
    ///
    /// IQ3_S: bytes 0..8 are eight bits of the index of columns `4i..4i + 4` each; bytes 8..12 eight signs each; bit `i` of
    /// byte 12 (ggml's `qh`) is the ninth bit of index `i`.
    Iq3s,
    /// IQ3_XXS: bytes 0..8 as above, eight bits are all of an index; then a `u32`: bits `7l..7l + 7` are seven signs, bits
    /// 28..32 the scale.
    Iq3xxs,
    /// IQ2_S: bytes 0..4 are eight bits of the index of eight columns each; bytes 4..8 eight signs each; bits `2l` and `2l + 1`
    /// of byte 8 (ggml's `qh`) are bits 8 and 9 of index `l`.
    Iq2s,
    /// IQ2_XS: four `u16`, each for eight columns: bits 0..9 are the index, bits 9..16 seven signs.
    Iq2xs,
    /// IQ2_XXS: bytes 0..4 are an index each; then a `u32` as in IQ3_XXS.
    Iq2xxs,
    /// IQ1_S: bytes 0..4 are eight bits of the index of eight columns each; then a `u16` (ggml's `qh`): bits `3l..3l + 3` are
    /// bits 8..11 of index `l`, bits 12..15 the scale, bit 15 is set where ⅛ is subtracted, not added.
    Iq1s,
    /// IQ1_M: bytes 0..4 as in IQ1_S; then two bytes (ggml's `qh`) of four nibbles, the low one first, one for each `l`: bits
    /// 0..3 are bits 8..11 of the index, bit 3 is set where ⅛ is subtracted, not added.
    Iq1m,
}

impl Codes {
    /// All of them, by their numbers in the file.
    const ALL: [Codes; 16] = [
        Codes::Uint(2),
        Codes::Uint(3),
        Codes::Uint(4),
        Codes::Uint(5),
        Codes::Uint(6),
        Codes::Uint(8),
        Codes::E2m1,
        Codes::E4m3,
        Codes::Iq4nl,
        Codes::Iq3s,
        Codes::Iq3xxs,
        Codes::Iq2s,
        Codes::Iq2xs,
        Codes::Iq2xxs,
        Codes::Iq1s,
        Codes::Iq1m,
    ];

    /// Bytes of the codes of one row and 32 columns.
    pub const fn block_len(self) -> usize {
        match self {
            Codes::Uint(bits) => 4 * bits as usize,
            Codes::E2m1 | Codes::Iq4nl => 16,
            Codes::E4m3 => 32,
            Codes::Iq3s => 13,
            Codes::Iq3xxs => 12,
            Codes::Iq2s => 9,
            Codes::Iq2xs | Codes::Iq2xxs => 8,
            Codes::Iq1s | Codes::Iq1m => 6,
        }
    }

    /// Widths, in bytes, of the fields of a record of 32 columns of one row, which lie beside those of the other rows; empty for
    /// codes that stand for one weight each. The indices or signs of eight rows lie side by side, as kernels use them.
    pub const fn fields(self) -> &'static [usize] {
        match self {
            Codes::Uint(_) | Codes::E2m1 | Codes::E4m3 | Codes::Iq4nl => &[],
            Codes::Iq3s => &[1; 13],
            Codes::Iq3xxs => &[1, 1, 1, 1, 1, 1, 1, 1, 4],
            Codes::Iq2s => &[1; 9],
            Codes::Iq2xs => &[2; 4],
            Codes::Iq2xxs => &[1, 1, 1, 1, 4],
            Codes::Iq1s => &[1, 1, 1, 1, 2],
            Codes::Iq1m => &[1; 6],
        }
    }

    /// Whether a record of 32 columns holds indices of points of a grid.
    pub const fn is_grid(self) -> bool {
        !self.fields().is_empty()
    }

    fn name(self) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Codes::Uint(bits) => return Cow::Owned(format!("u{bits}")),
            Codes::E2m1 => "e2m1",
            Codes::E4m3 => "e4m3",
            Codes::Iq4nl => "iq4nl",
            Codes::Iq3s => "iq3s",
            Codes::Iq3xxs => "iq3xxs",
            Codes::Iq2s => "iq2s",
            Codes::Iq2xs => "iq2xs",
            Codes::Iq2xxs => "iq2xxs",
            Codes::Iq1s => "iq1s",
            Codes::Iq1m => "iq1m",
        })
    }
}

/// Columns that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GroupSize {
    /// This many: 16, 32, 64 or 128.
    Columns(u8),
    /// All of a row.
    Row,
}

impl GroupSize {
    const ALL: [GroupSize; 5] = [
        GroupSize::Columns(16),
        GroupSize::Columns(32),
        GroupSize::Columns(64),
        GroupSize::Columns(128),
        GroupSize::Row,
    ];

    /// Groups of a row of `cols` columns.
    pub fn count(self, cols: usize) -> usize {
        match self {
            GroupSize::Columns(columns) => cols.div_ceil(usize::from(columns)),
            GroupSize::Row => 1,
        }
    }
}

/// Format of the scales of groups, and of their biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ScaleType {
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE binary32.
    F32,
    /// e4m3fn, times an f32 of the row (NVFP4).
    E4m3,
    /// A power of two (OCP MX).
    E8m0,
}

impl ScaleType {
    const ALL: [ScaleType; 5] = [ScaleType::F16, ScaleType::Bf16, ScaleType::F32, ScaleType::E4m3, ScaleType::E8m0];

    /// Bytes of one.
    #[expect(clippy::len_without_is_empty, reason = "no number has no bytes")]
    pub const fn len(self) -> usize {
        match self {
            ScaleType::F16 | ScaleType::Bf16 => 2,
            ScaleType::F32 => 4,
            ScaleType::E4m3 | ScaleType::E8m0 => 1,
        }
    }

    fn name(self) -> &'static str {
        match self {
            ScaleType::F16 => "f16",
            ScaleType::Bf16 => "bf16",
            ScaleType::F32 => "f32",
            ScaleType::E4m3 => "e4m3",
            ScaleType::E8m0 => "e8m0",
        }
    }
}

/// What a group has beside its scale `s`; `c` is the number for which a code stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Zero {
    /// Nothing: `s·(c − 2^(b−1))` for integers of `b` bits, `s·c` for all others.
    None,
    /// A byte: `s·(c − z)` (GPTQ, AWQ).
    Byte,
    /// A number of the scale's type: `s·c + z` (MLX, GGUF's Q4_1).
    Bias,
    /// A number of the scale's type: `s·(c − z)` (HQQ).
    Float,
}

impl Zero {
    const ALL: [Zero; 4] = [Zero::None, Zero::Byte, Zero::Bias, Zero::Float];
}

/// How the scales of a super-block of 256 columns are stored beside its `d`, an f16: ggml's k- and i-quants
/// (<https://github.com/ggml-org/llama.cpp>, `ggml-common.h`). Six-bit scales, which ggml packs, have a byte each here, and
/// so have the two three-bit scales of IQ1_M.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Super {
    /// Nothing: `d·(c − 1)` (TQ1_0, TQ2_0).
    Plain,
    /// Per 32 columns a byte `s` and a byte `m`, both below 64: `d·s·c − dmin·m` (Q4_K, Q5_K).
    SixMin,
    /// Per 16 columns a byte, `s` its low nibble, `m` its high one: `d·s·c − dmin·m` (Q2_K).
    FourMin,
    /// Per 16 columns a byte below 64: `d·(s − 32)·(c − 4)` (Q3_K).
    SixBy16,
    /// Per 32 columns a byte below 64: `d·(s − 32)·c` (IQ4_XS).
    SixBy32,
    /// Per 16 columns a signed byte: `d·s·(c − 32)` (Q6_K).
    Signed,
    /// In the top four bits of each record: `d·(s + ½)·c`, times ½ for IQ3_XXS and ¼ for IQ2_XXS.
    InCodes,
    /// Per 64 columns a byte, two nibbles for 32 columns each, the low one first: `d·(2s + 1)·c` (IQ3_S).
    Odd,
    /// Per 32 columns a byte, two nibbles for 16 columns each, the low one first: `d·(s + ½)·c/4` (IQ2_XS, IQ2_S).
    Half,
    /// In bits 12..15 of the last field of each record: `d·(2s + 1)·(c ± ⅛)`, minus where bit 15 is set (IQ1_S).
    Shift,
    /// Per 32 columns a byte, three bits for the first 16 columns in bits 0..3, three for the others in bits 3..6:
    /// `d·(2s + 1)·(c ± ⅛)`, the sign per 8 columns in the codes (IQ1_M).
    ShiftBy16,
}

impl Super {
    const ALL: [Super; 11] = [
        Super::Plain,
        Super::SixMin,
        Super::FourMin,
        Super::SixBy16,
        Super::SixBy32,
        Super::Signed,
        Super::InCodes,
        Super::Odd,
        Super::Half,
        Super::Shift,
        Super::ShiftBy16,
    ];

    /// Whether a super-block has `dmin` beside `d`.
    pub const fn has_min(self) -> bool {
        matches!(self, Super::SixMin | Super::FourMin)
    }

    /// Columns of a unit; 0: there are none.
    pub const fn unit(self) -> usize {
        match self {
            Super::Plain | Super::InCodes | Super::Shift => 0,
            Super::FourMin | Super::SixBy16 | Super::Signed => 16,
            Super::SixMin | Super::SixBy32 | Super::Half | Super::ShiftBy16 => 32,
            Super::Odd => 64,
        }
    }

    /// Bytes of a unit, for one row.
    pub const fn unit_len(self) -> usize {
        match self {
            Super::Plain | Super::InCodes | Super::Shift => 0,
            Super::SixMin => 2,
            _ => 1,
        }
    }

    /// Bytes of the scales of a super-block of one row.
    pub const fn row_len(self) -> usize {
        let units = if self.unit() == 0 { 0 } else { SUPER_BLOCK / self.unit() };
        2 + 2 * self.has_min() as usize + units * self.unit_len()
    }

    /// Whether these scales belong to these codes.
    const fn takes(self, codes: Codes) -> bool {
        match self {
            Super::Plain | Super::FourMin => matches!(codes, Codes::Uint(2)),
            Super::SixMin => matches!(codes, Codes::Uint(4 | 5)),
            Super::SixBy16 => matches!(codes, Codes::Uint(3)),
            Super::SixBy32 => matches!(codes, Codes::Iq4nl),
            Super::Signed => matches!(codes, Codes::Uint(6)),
            Super::InCodes => matches!(codes, Codes::Iq3xxs | Codes::Iq2xxs),
            Super::Odd => matches!(codes, Codes::Iq3s),
            Super::Half => matches!(codes, Codes::Iq2xs | Codes::Iq2s),
            Super::Shift => matches!(codes, Codes::Iq1s),
            Super::ShiftBy16 => matches!(codes, Codes::Iq1m),
        }
    }
}

/// Where the scales are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scales {
    /// Each group of columns has its own.
    Groups {
        /// Columns of a group.
        columns: GroupSize,
        /// Format of the scales.
        scale: ScaleType,
        /// What a group has beside its scale.
        zero: Zero,
    },
    /// Each super-block has a scale, and small integers for its parts.
    Super(Super),
}

/// Codes of a few bits and their scales; only what belongs together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Grouped {
    codes: Codes,
    scales: Scales,
}

/// Set in the code of types with super-blocks.
const SUPER: u16 = 1 << 9;

impl Grouped {
    /// The type of these codes and scales; `None` where nothing of the kind exists: a grid has super-blocks; only integers have
    /// zeros; small floats have no bias; e4m3 scales and powers of two belong to codes that are floats.
    pub const fn new(codes: Codes, scales: Scales) -> Option<Self> {
        let fits = match scales {
            Scales::Super(scales) => scales.takes(codes),
            Scales::Groups { columns, scale, zero } => {
                let size = matches!(columns, GroupSize::Columns(16 | 32 | 64 | 128) | GroupSize::Row);
                let float = matches!(scale, ScaleType::F16 | ScaleType::Bf16 | ScaleType::F32);
                size && match codes {
                    Codes::Uint(2 | 3 | 4 | 5 | 6 | 8) => float,
                    Codes::E2m1 | Codes::E4m3 => matches!(zero, Zero::None),
                    Codes::Iq4nl => float && matches!(zero, Zero::None),
                    _ => false,
                }
            }
        };
        if fits { Some(Grouped { codes, scales }) } else { None }
    }

    /// What the codes are.
    pub const fn codes(self) -> Codes {
        self.codes
    }

    /// Where the scales are.
    pub const fn scales(self) -> Scales {
        self.scales
    }

    /// What is subtracted from an integer code before it is multiplied with its scale, if groups do not store that
    /// themselves.
    pub const fn middle(self) -> i32 {
        match (self.codes, self.scales) {
            (Codes::Uint(bits), Scales::Groups { zero: Zero::None, .. }) => 1 << (bits - 1),
            (_, Scales::Super(Super::Plain)) => 1,
            (_, Scales::Super(Super::SixBy16)) => 4,
            (_, Scales::Super(Super::Signed)) => 32,
            _ => 0,
        }
    }

    /// Columns whose weights share scale, zero and bias, at most 32: what a kernel computes before it applies them.
    pub const fn block(self) -> usize {
        match self.scales {
            Scales::Groups { columns: GroupSize::Columns(16), .. } => 16,
            Scales::Super(Super::FourMin | Super::SixBy16 | Super::Signed | Super::Half | Super::ShiftBy16) => 16,
            _ => 32,
        }
    }

    /// Bytes of the scales of one row of `cols` columns as the source has them, in the order of the scale plane: scale and zero
    /// of each group, or `d`, `dmin` and units of each super-block. The factor of an [`ScaleType::E4m3`] row is not among them.
    /// `None` on overflow, or if the rows of a type with super-blocks do not have whole super-blocks.
    pub fn scale_row(self, cols: usize) -> Option<usize> {
        match self.scales {
            Scales::Groups { columns, scale, zero } => {
                let beside = match zero {
                    Zero::None => 0,
                    Zero::Byte => 1,
                    Zero::Bias | Zero::Float => scale.len(),
                };
                columns.count(cols).checked_mul(scale.len() + beside)
            }
            Scales::Super(scales) => {
                cols.is_multiple_of(SUPER_BLOCK).then(|| (cols / SUPER_BLOCK).checked_mul(scales.row_len()))?
            }
        }
    }

    /// Bytes of the scale plane of a row group, before padding; `None` as for [`Grouped::scale_row`].
    pub fn scale_plane(self, cols: usize) -> Option<usize> {
        let factors = if self.has_row_factor() { 4 } else { 0 };
        // Only rows that exist, but with scales for the columns that pad their last block.
        self.scale_row(cols)?;
        self.scale_row(cols.checked_next_multiple_of(BLOCK)?)?.checked_add(factors)?.checked_mul(ROW_GROUP)
    }

    /// Whether each row has an f32 that multiplies its scales.
    pub const fn has_row_factor(self) -> bool {
        matches!(self.scales, Scales::Groups { scale: ScaleType::E4m3, .. })
    }

    /// The code in the file, without the bit that marks this kind of type. Bits 10 to 14 give the codes, and bit 9 says
    /// whether there are super-blocks. If so, bits 0 to 3 say which; otherwise bits 6 to 8 give the columns of a group, 3 to
    /// 5 the scale and 0 to 2 the zero.
    pub(crate) fn code(self) -> u16 {
        let codes = number(&Codes::ALL, &self.codes) << 10;
        codes
            | match self.scales {
                Scales::Super(scales) => SUPER | number(&Super::ALL, &scales),
                Scales::Groups { columns, scale, zero } => {
                    number(&GroupSize::ALL, &columns) << 6
                        | number(&ScaleType::ALL, &scale) << 3
                        | number(&Zero::ALL, &zero)
                }
            }
    }

    pub(crate) fn from_code(code: u16) -> Option<Self> {
        let field = |shift: u32, bits: u32| usize::from(code >> shift & ((1 << bits) - 1));
        let codes = *Codes::ALL.get(field(10, 5))?;
        let scales = if code & SUPER != 0 {
            Scales::Super(*Super::ALL.get(field(0, 9))?)
        } else {
            let (columns, scale) = (*GroupSize::ALL.get(field(6, 3))?, *ScaleType::ALL.get(field(3, 3))?);
            Scales::Groups { columns, scale, zero: *Zero::ALL.get(field(0, 3))? }
        };
        Grouped::new(codes, scales)
    }

    /// The name of a published form, such as `q4_k`; otherwise a name that lists its parts, such as
    /// `u4-g128-f16-zero`.
    pub(crate) fn name(self) -> &'static str {
        static NAMES: LazyLock<HashMap<u16, String>> = LazyLock::new(|| {
            let all = (0..=u16::MAX).filter_map(Grouped::from_code);
            all.map(|grouped| (grouped.code(), grouped.made_name().into_owned())).collect()
        });
        &NAMES[&self.code()]
    }

    fn made_name(self) -> Cow<'static, str> {
        if let Some((name, _)) = Self::PUBLISHED.iter().find(|(_, grouped)| *grouped == self) {
            return Cow::Borrowed(name);
        }
        let Scales::Groups { columns, scale, zero } = self.scales else {
            return Cow::Owned(format!("{}-super", self.codes.name()));
        };
        let columns = match columns {
            GroupSize::Columns(columns) => format!("g{columns}"),
            GroupSize::Row => "row".to_owned(),
        };
        let zero = match zero {
            Zero::None => "",
            Zero::Byte => "-zero",
            Zero::Bias => "-bias",
            Zero::Float => "-float-zero",
        };
        Cow::Owned(format!("{}-{columns}-{}{zero}", self.codes.name(), scale.name()))
    }
}

fn number<T: PartialEq>(all: &[T], one: &T) -> u16 {
    all.iter().position(|t| t == one).expect("only what is listed can be made") as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_make_up_a_record() {
        for codes in Codes::ALL {
            assert!(!codes.is_grid() || codes.fields().iter().sum::<usize>() == codes.block_len(), "{codes:?}");
        }
    }
}
