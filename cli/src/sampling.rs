//! Sampling options, and the settings that follow from them and the model's own recommendations.

use sluice_generate::sampler::SamplerConfig;
use sluice_text::{GenerationDefaults, Remark};

/// How the next token is chosen. Settings that are not given come from the model's generation_config.json; without that file, and
/// with --ids, the likeliest token is taken.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// 0 takes the likeliest token (greedy); below 1 sharpens, above 1 flattens [default: the model's own, else 0; with --ids 0]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub(crate) temperature: Option<f32>,

    /// Keep only the K likeliest tokens; 0 keeps all
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub(crate) top_k: Option<u32>,

    /// Keep the likeliest tokens until their probabilities add up to P; 1 keeps all
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,

    /// Keep only tokens at least P times as probable as the likeliest; 0 keeps all
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) min_p: Option<f32>,

    /// Make tokens that have occurred less likely (above 1); 1 is off
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub(crate) repetition_penalty: Option<f32>,

    /// Seed of the random numbers: the same seed gives the same text [default: 0]
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
}

impl SamplingArgs {
    /// The settings in effect.
    pub(crate) fn config(&self, model: &GenerationDefaults) -> SamplerConfig {
        let neutral = SamplerConfig::default();
        // A user who narrows the choice wants sampling, even if the model's authors recommend none.
        let narrowed = self.top_k.is_some() || self.top_p.is_some() || self.min_p.is_some();
        let temperature = match (self.temperature, model.effective_temperature()) {
            (Some(asked), _) => asked,
            (None, own) if own > 0.0 => own,
            (None, _) if narrowed => model.temperature.filter(|&t| t > 0.0).unwrap_or(1.0),
            (None, _) => 0.0,
        };
        SamplerConfig {
            temperature,
            top_k: self.top_k.or(model.top_k).unwrap_or(neutral.top_k),
            top_p: self.top_p.or(model.top_p).unwrap_or(neutral.top_p),
            min_p: self.min_p.or(model.min_p).unwrap_or(neutral.min_p),
            repetition_penalty: self
                .repetition_penalty
                .or(model.repetition_penalty)
                .unwrap_or(neutral.repetition_penalty),
            seed: self.seed.unwrap_or(neutral.seed),
        }
    }

    /// Settings in the model's files that have no effect but would matter to this run, with the option that overrides each, if
    /// there is one.
    pub(crate) fn remarks<'a>(&self, model: &'a GenerationDefaults) -> Vec<(&'a Remark, Option<&'static str>)> {
        let greedy = self.config(model).temperature == 0.0;
        let matters = |remark: &&Remark| match remark.field {
            "temperature" => !greedy && self.temperature.is_none(),
            "top_k" => !greedy && self.top_k.is_none(),
            "top_p" => !greedy && self.top_p.is_none(),
            "min_p" => !greedy && self.min_p.is_none(),
            "repetition_penalty" => self.repetition_penalty.is_none(),
            "do_sample" => self.temperature.is_none(),
            _ => true,
        };
        let option = |remark: &Remark| match remark.field {
            "temperature" | "do_sample" => Some("--temperature"),
            "top_k" => Some("--top-k"),
            "top_p" => Some("--top-p"),
            "min_p" => Some("--min-p"),
            "repetition_penalty" => Some("--repetition-penalty"),
            _ => None,
        };
        model.remarks.iter().filter(matters).map(|remark| (remark, option(remark))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_unless_somebody_asks() {
        let silent = GenerationDefaults::default();
        assert_eq!(SamplingArgs::default().config(&silent), SamplerConfig::default());
        let seeded = SamplingArgs { seed: Some(7), ..SamplingArgs::default() };
        assert_eq!(seeded.config(&silent).temperature, 0.0);
        let narrowed = SamplingArgs { top_p: Some(0.9), ..SamplingArgs::default() };
        assert_eq!(narrowed.config(&silent).temperature, 1.0);
    }

    #[test]
    fn remarks_only_of_what_matters() {
        let model = |json: &str| GenerationDefaults::parse(Some(json.as_bytes()), None).unwrap();
        let fields = |args: &SamplingArgs, json: &str| -> Vec<_> {
            let model = model(json);
            args.remarks(&model).into_iter().map(|(remark, option)| (remark.field, option.unwrap_or(""))).collect()
        };
        let own = SamplingArgs::default();
        let sampled = r#"{"do_sample": true, "top_p": 1.2, "min_p": 2, "temperature": -1}"#;
        let all = [("min_p", "--min-p"), ("temperature", "--temperature"), ("top_p", "--top-p")];
        let mut found = fields(&own, sampled);
        found.sort_unstable();
        assert_eq!(found, all);
        assert_eq!(fields(&own, r#"{"do_sample": false, "top_p": 1.2}"#), []);
        let greedy = SamplingArgs { temperature: Some(0.0), ..SamplingArgs::default() };
        assert_eq!(fields(&greedy, sampled), []);
        let given = SamplingArgs { top_p: Some(0.9), min_p: Some(0.0), ..SamplingArgs::default() };
        assert_eq!(fields(&given, sampled), [("temperature", "--temperature")]);
        let penalty = r#"{"do_sample": false, "repetition_penalty": 0}"#;
        assert_eq!(fields(&greedy, penalty), [("repetition_penalty", "--repetition-penalty")]);
        assert!(own.config(&model(penalty)).validate().is_ok());
    }

    #[test]
    fn the_model_recommends_and_the_user_decides() {
        let model = GenerationDefaults {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_p: Some(0.95),
            ..GenerationDefaults::default()
        };
        let own = SamplingArgs::default().config(&model);
        assert_eq!((own.temperature, own.top_p), (0.6, 0.95));
        let greedy = SamplingArgs { temperature: Some(0.0), ..SamplingArgs::default() };
        assert_eq!(greedy.config(&model).temperature, 0.0);
        let wide = SamplingArgs { top_p: Some(1.0), ..SamplingArgs::default() };
        assert_eq!((wide.config(&model).temperature, wide.config(&model).top_p), (0.6, 1.0));
    }
}
