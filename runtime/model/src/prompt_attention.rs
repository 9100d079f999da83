//! In which form the latent attention of prompts is computed.

use std::fmt;

use sluice_format::{AttentionSpec, ModelSpec};

/// The form of latent attention (MLA) for the tokens of prompts. Both forms are the same mathematically; their last bits differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PromptAttention {
    /// Queries meet latents, as those of generated tokens do: a token has the same bits whether it was read or generated.
    #[default]
    Absorbed,
    /// Latents are expanded to keys and values of each head, block by block: fewer operations where a pass has many rows. A token that
    /// was read has other bits than one that was generated, so both are told apart wherever a sequence is used again.
    Expanded,
}

impl PromptAttention {
    /// What of it makes a difference in a model: models without latent attention have one form.
    #[must_use]
    pub fn in_model(self, spec: &ModelSpec) -> PromptAttention {
        let is_latent = spec.all_layers().any(|layer| matches!(layer.attention, AttentionSpec::Mla(_)));
        if is_latent { self } else { PromptAttention::Absorbed }
    }

    /// Whether a token that was read differs from one that was generated.
    pub fn tells_phases_apart(self) -> bool {
        self == PromptAttention::Expanded
    }

    /// `absorbed` or `expanded`.
    pub fn name(self) -> &'static str {
        match self {
            PromptAttention::Absorbed => "absorbed",
            PromptAttention::Expanded => "expanded",
        }
    }

    /// Its number in a session.
    pub fn code(self) -> u16 {
        match self {
            PromptAttention::Absorbed => 0,
            PromptAttention::Expanded => 1,
        }
    }

    /// The form of a number; `None` if none has it.
    pub fn from_code(code: u16) -> Option<Self> {
        [PromptAttention::Absorbed, PromptAttention::Expanded].into_iter().find(|form| form.code() == code)
    }
}

impl fmt::Display for PromptAttention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The highest bit of a token that was generated, in what tells a sequence from others where phases are told apart. No vocabulary has so
/// many tokens.
pub const GENERATED: u32 = 1 << 31;
