//! Forms in which models are published, by name. Tests and benchmarks use this list.

use crate::grouped::{Codes, GroupSize, Grouped, ScaleType, Scales, Super, Zero};

const fn groups(codes: Codes, columns: GroupSize, scale: ScaleType, zero: Zero) -> Grouped {
    Grouped::new(codes, Scales::Groups { columns, scale, zero }).expect("it is published")
}

const fn columns(codes: Codes, columns: u8, scale: ScaleType, zero: Zero) -> Grouped {
    groups(codes, GroupSize::Columns(columns), scale, zero)
}

const fn super_blocks(codes: Codes, scales: Super) -> Grouped {
    Grouped::new(codes, Scales::Super(scales)).expect("it is published")
}

impl Grouped {
    /// GGUF's types under ggml's names, and those of other tools under names that list their parts. GGUF's Q8_0 and MXFP4 are
    /// `q8` and `mxfp4`; TQ1_0 holds the same numbers as `tq2_0`, and becomes it.
    pub const PUBLISHED: &[(&'static str, Grouped)] = &[
        ("q4_0", columns(Codes::Uint(4), 32, ScaleType::F16, Zero::None)),
        ("q4_1", columns(Codes::Uint(4), 32, ScaleType::F16, Zero::Bias)),
        ("q5_0", columns(Codes::Uint(5), 32, ScaleType::F16, Zero::None)),
        ("q5_1", columns(Codes::Uint(5), 32, ScaleType::F16, Zero::Bias)),
        ("q2_k", super_blocks(Codes::Uint(2), Super::FourMin)),
        ("q3_k", super_blocks(Codes::Uint(3), Super::SixBy16)),
        ("q4_k", super_blocks(Codes::Uint(4), Super::SixMin)),
        ("q5_k", super_blocks(Codes::Uint(5), Super::SixMin)),
        ("q6_k", super_blocks(Codes::Uint(6), Super::Signed)),
        ("iq4_nl", columns(Codes::Iq4nl, 32, ScaleType::F16, Zero::None)),
        ("iq4_xs", super_blocks(Codes::Iq4nl, Super::SixBy32)),
        ("iq3_s", super_blocks(Codes::Iq3s, Super::Odd)),
        ("iq3_xxs", super_blocks(Codes::Iq3xxs, Super::InCodes)),
        ("iq2_s", super_blocks(Codes::Iq2s, Super::Half)),
        ("iq2_xs", super_blocks(Codes::Iq2xs, Super::Half)),
        ("iq2_xxs", super_blocks(Codes::Iq2xxs, Super::InCodes)),
        ("iq1_s", super_blocks(Codes::Iq1s, Super::Shift)),
        ("iq1_m", super_blocks(Codes::Iq1m, Super::ShiftBy16)),
        ("tq2_0", super_blocks(Codes::Uint(2), Super::Plain)),
        ("nvfp4", columns(Codes::E2m1, 16, ScaleType::E4m3, Zero::None)),
        ("mxfp8", columns(Codes::E4m3, 32, ScaleType::E8m0, Zero::None)),
        ("fp8-row", groups(Codes::E4m3, GroupSize::Row, ScaleType::F32, Zero::None)),
        ("u2-g64-bf16-bias", columns(Codes::Uint(2), 64, ScaleType::Bf16, Zero::Bias)),
        ("u3-g64-bf16-bias", columns(Codes::Uint(3), 64, ScaleType::Bf16, Zero::Bias)),
        ("u3-g128-f16-zero", columns(Codes::Uint(3), 128, ScaleType::F16, Zero::Byte)),
        ("u4-g64-bf16-bias", columns(Codes::Uint(4), 64, ScaleType::Bf16, Zero::Bias)),
        ("u4-g64-bf16-float-zero", columns(Codes::Uint(4), 64, ScaleType::Bf16, Zero::Float)),
        ("u4-g16-f32-zero", columns(Codes::Uint(4), 16, ScaleType::F32, Zero::Byte)),
        ("u4-g128-f16-zero", columns(Codes::Uint(4), 128, ScaleType::F16, Zero::Byte)),
        ("u4-g128-bf16", columns(Codes::Uint(4), 128, ScaleType::Bf16, Zero::None)),
        ("u5-g64-bf16-bias", columns(Codes::Uint(5), 64, ScaleType::Bf16, Zero::Bias)),
        ("u6-g64-bf16-bias", columns(Codes::Uint(6), 64, ScaleType::Bf16, Zero::Bias)),
        ("u8-g64-bf16-bias", columns(Codes::Uint(8), 64, ScaleType::Bf16, Zero::Bias)),
        ("u8-g128-f16-zero", columns(Codes::Uint(8), 128, ScaleType::F16, Zero::Byte)),
        ("u8-row-f32", groups(Codes::Uint(8), GroupSize::Row, ScaleType::F32, Zero::None)),
    ];
}
