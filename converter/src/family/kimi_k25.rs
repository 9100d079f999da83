//! Kimi K2.5 and K2.6: a vision model around Kimi K2. Only the text part is converted.

use sluice_format::ModelSpec;

use super::config::Config;
use super::deepseek_v3::DeepSeekV3;
use super::names::Names;
use super::{Family, Unused, usually_unused};
use crate::error::ConvertError;

/// The family.
pub(crate) struct KimiK25;

impl Family for KimiK25 {
    fn model_types(&self) -> &'static [&'static str] {
        &["kimi_k25"]
    }

    fn text_section(&self) -> Option<&'static str> {
        Some("text_config")
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        config.require_str("model_type", DeepSeekV3.model_types())?;
        DeepSeekV3.spec(config)
    }

    fn names(&self) -> Names {
        Names { prefix: "language_model.model.", head: "language_model.lm_head.weight", ..Names::USUAL }
    }

    fn unused(&self, name: &str) -> Option<Unused> {
        let vision = ["vision_tower.", "vision_model.", "mm_projector.", "multi_modal_projector."]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        if vision { Some(Unused::Vision) } else { usually_unused(name) }
    }
}
