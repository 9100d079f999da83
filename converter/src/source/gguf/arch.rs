//! The supported architectures, by the names of llama.cpp.

use super::keys::{ARCHITECTURE, Keys};
use super::metadata::{Metadata, Problem};
use crate::nearest;

/// An architecture of llama.cpp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arch {
    /// Llama and Mistral; with experts Mixtral.
    Llama,
    /// Mistral since Ministral 3.
    Mistral3,
    Qwen3,
    Qwen2Moe,
    Qwen3Moe,
    Qwen3Next,
    Qwen35Moe,
    /// DeepSeek-V2 and V3, and models with the same computation: Kimi K2, GLM-4.7-Flash.
    DeepSeek2,
    /// DeepSeek-V3.2.
    DeepSeek32,
    /// GLM-5.
    GlmDsa,
    Glm4Moe,
    GptOss,
    MiniMaxM2,
    MiniMaxM3,
    KimiLinear,
    Olmoe,
    /// Granite 3 with experts.
    GraniteMoe,
    Ernie45,
    Ernie45Moe,
    /// Hunyuan-A13B.
    HunyuanMoe,
    HyV3,
    /// dots.llm1.
    Dots1,
    /// Llama 4.
    Llama4,
    /// MiMo-V2-Flash.
    MiMo2,
    /// DeepSeek-V4.
    DeepSeek4,
    /// Ling and Ring of the first generation.
    BailingMoe,
    /// Ling and Ring of the second generation.
    BailingMoe2,
    /// Nemotron-H; with experts Nemotron 3.
    NemotronH,
    /// Step 3.5.
    Step35,
    /// Phi-3.5-MoE.
    PhiMoe,
    Gemma3,
    Gemma4,
    /// Qwen3.8-Flash-Next.
    Qwen4Exp,
}

const NAMES: [(&str, Arch); 34] = [
    ("llama", Arch::Llama),
    ("mistral3", Arch::Mistral3),
    ("qwen3", Arch::Qwen3),
    ("qwen2moe", Arch::Qwen2Moe),
    ("qwen3moe", Arch::Qwen3Moe),
    ("qwen3next", Arch::Qwen3Next),
    ("qwen35moe", Arch::Qwen35Moe),
    ("deepseek2", Arch::DeepSeek2),
    ("deepseek32", Arch::DeepSeek32),
    ("glm-dsa", Arch::GlmDsa),
    ("glm4moe", Arch::Glm4Moe),
    ("gpt-oss", Arch::GptOss),
    ("minimax-m2", Arch::MiniMaxM2),
    ("minimax-m3", Arch::MiniMaxM3),
    ("kimi-linear", Arch::KimiLinear),
    ("olmoe", Arch::Olmoe),
    ("granitemoe", Arch::GraniteMoe),
    ("ernie4_5", Arch::Ernie45),
    ("ernie4_5-moe", Arch::Ernie45Moe),
    ("hunyuan-moe", Arch::HunyuanMoe),
    ("hy_v3", Arch::HyV3),
    ("dots1", Arch::Dots1),
    ("llama4", Arch::Llama4),
    ("mimo2", Arch::MiMo2),
    ("deepseek4", Arch::DeepSeek4),
    ("bailingmoe", Arch::BailingMoe),
    ("bailingmoe2", Arch::BailingMoe2),
    ("nemotron_h", Arch::NemotronH),
    ("nemotron_h_moe", Arch::NemotronH),
    ("step35", Arch::Step35),
    ("phimoe", Arch::PhiMoe),
    ("gemma3", Arch::Gemma3),
    ("gemma4", Arch::Gemma4),
    ("qwen4exp", Arch::Qwen4Exp),
];

/// Keys that change what a model computes and that few families have, with the value that changes nothing.
const NEUTRAL: [(&str, f64); 10] = [
    ("attention.temperature_scale", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("router_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("embedding_scale", 1.0),
    ("attention.value_scale", 1.0),
    ("rope.scaling.attn_factor", 1.0),
];

/// Which families have which of them.
const OF_FAMILIES: [(Arch, &str); 7] = [
    (Arch::GraniteMoe, "logit_scale"),
    (Arch::GraniteMoe, "residual_scale"),
    (Arch::GraniteMoe, "embedding_scale"),
    (Arch::MiMo2, "attention.value_scale"),
    (Arch::Gemma3, "final_logit_softcapping"),
    (Arch::Gemma4, "final_logit_softcapping"),
    (Arch::PhiMoe, "rope.scaling.attn_factor"),
];

impl Arch {
    /// The architecture in the metadata, and its name.
    pub(super) fn find(metadata: &Metadata) -> Result<(Self, &str), Problem> {
        if let Some(other) = metadata.text("general.type")?.filter(|ty| *ty != "model") {
            let problem = format!("is \"{other}\": the file is not a model, but goes with one");
            return Err(Problem::new("general.type", problem));
        }
        let supported = NAMES.map(|(name, _)| name);
        let Some(name) = metadata.text(ARCHITECTURE)? else {
            return Err(Problem::new(ARCHITECTURE, format!("is missing; supported: {}", supported.join(", "))));
        };
        let known = NAMES.into_iter().find(|(known, _)| *known == name);
        let known = known.map(|(_, arch)| (arch, name));
        known.ok_or_else(|| Problem::new(ARCHITECTURE, nearest::refusal(name, &supported)))
    }

    /// Whether llama.cpp's converter stores rows of queries and keys in the order of its rotation.
    pub(super) fn interleaves(self) -> bool {
        matches!(self, Arch::Llama | Arch::Mistral3 | Arch::GraniteMoe | Arch::BailingMoe | Arch::NemotronH)
    }

    /// Whether the attention is latent.
    pub(super) fn is_latent(self) -> bool {
        matches!(self, Arch::DeepSeek2 | Arch::DeepSeek32 | Arch::GlmDsa | Arch::KimiLinear)
    }

    /// Whether some layers have linear attention.
    pub(super) fn is_hybrid(self) -> bool {
        matches!(self, Arch::Qwen3Next | Arch::Qwen35Moe | Arch::Qwen4Exp | Arch::KimiLinear)
    }

    /// Whether every layer has experts if any has.
    pub(super) fn is_all_sparse(self) -> bool {
        matches!(
            self,
            Arch::Llama
                | Arch::Mistral3
                | Arch::GptOss
                | Arch::MiniMaxM2
                | Arch::Olmoe
                | Arch::GraniteMoe
                | Arch::HunyuanMoe
                | Arch::DeepSeek4
                | Arch::PhiMoe
        )
    }

    /// Whether layers have different numbers of heads.
    pub(super) fn differs_in_heads(self) -> bool {
        matches!(self, Arch::MiMo2 | Arch::NemotronH | Arch::Step35 | Arch::Gemma4)
    }

    /// The module of the shared expert.
    pub(super) fn shared(self) -> &'static str {
        match self {
            Arch::Qwen2Moe | Arch::Qwen3Next | Arch::Qwen35Moe | Arch::Qwen4Exp => "shared_expert",
            _ => "shared_experts",
        }
    }

    /// Refuses keys whose values change the computation in a way that the family does not support.
    pub(super) fn refuse_unknown_computation(self, keys: &Keys<'_>) -> Result<(), Problem> {
        let known = |end: &str| OF_FAMILIES.contains(&(self, end));
        for (end, neutral) in NEUTRAL.into_iter().filter(|(end, _)| !known(end)) {
            if let Some(found) = keys.float(end)?.filter(|&f| f != neutral) {
                return Err(
                    keys.refuse(end, format!("is {found}, which changes what the model computes; not supported"))
                );
            }
        }
        if keys.bool("attention.causal")? == Some(false) {
            return Err(keys.refuse("attention.causal", "is false; only causal attention is supported"));
        }
        Ok(())
    }
}
