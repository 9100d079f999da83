//! The settings of answers, which `/set` changes.

use serde::{Deserialize, Serialize};
use sluice_generate::Penalties;
use sluice_server::ask::{Settings, Thinking};

use crate::chat::nearest;
use crate::sampling::SamplingArgs;

/// How thinking appears on a terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Shown {
    /// It is shown as it arrives.
    #[default]
    Open,
    /// One line reports its length.
    Folded,
}

/// The settings of answers. Those that are not given are as the model's authors recommend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Choices {
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_k: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    repetition_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    presence_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    frequency_penalty: Option<f32>,
    /// `None`: a different seed for each answer.
    seed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stop: Vec<String>,
    /// `on`, `off`, or how hard; `None`: as the template decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    thinking: Option<String>,
    /// How thinking appears on a terminal.
    show_thinking: Shown,
}

impl Default for Choices {
    fn default() -> Self {
        Choices {
            temperature: None,
            top_k: None,
            top_p: None,
            min_p: None,
            repetition_penalty: None,
            presence_penalty: None,
            frequency_penalty: None,
            seed: Some(0),
            max_tokens: None,
            stop: Vec::new(),
            thinking: None,
            show_thinking: Shown::Open,
        }
    }
}

/// A setting: its name, and what it does.
type Described = (&'static str, &'static str);

/// All settings, in the order in which they are listed.
pub(crate) const SETTINGS: [Described; 12] = [
    ("temperature", "0 takes the likeliest token; below 1 sharpens, above 1 flattens"),
    ("top_k", "only the K likeliest tokens; 0 keeps all"),
    ("top_p", "the likeliest tokens until their probabilities add up to P"),
    ("min_p", "only tokens at least P times as probable as the likeliest"),
    ("repetition_penalty", "makes tokens that have occurred less likely (above 1)"),
    ("presence_penalty", "subtracted once for each token of the answer so far, -2 to 2"),
    ("frequency_penalty", "subtracted as often as a token has occurred in the answer, -2 to 2"),
    ("seed", "seed of the random numbers: a number, or `random`"),
    ("max_tokens", "most tokens of an answer"),
    ("stop", "ends an answer before this text; may be set several times"),
    ("thinking", "on, off, or how hard: low, medium, high"),
    ("show_thinking", "open, or folded into a line"),
];

impl Choices {
    /// Takes the settings of the command line.
    ///
    /// # Errors
    /// If a value is invalid.
    pub(crate) fn take(
        &mut self,
        sampling: &SamplingArgs,
        max_tokens: Option<usize>,
        stop: &[String],
    ) -> Result<(), String> {
        self.temperature = sampling.temperature.or(self.temperature);
        self.top_k = sampling.top_k.or(self.top_k);
        self.top_p = sampling.top_p.or(self.top_p);
        self.min_p = sampling.min_p.or(self.min_p);
        self.repetition_penalty = sampling.repetition_penalty.or(self.repetition_penalty);
        self.seed = sampling.seed.or(self.seed);
        self.max_tokens = max_tokens.or(self.max_tokens);
        if !stop.is_empty() {
            self.stop = stop.to_vec();
        }
        self.server(0).check().map_err(|error| error.to_string())
    }

    /// How thinking appears on a terminal.
    pub(crate) fn shown(&self) -> Shown {
        self.show_thinking
    }

    /// Whether the user has chosen the likeliest tokens.
    pub(crate) fn is_greedy(&self) -> bool {
        self.temperature == Some(0.0)
    }

    /// Changes a setting; `default` undoes the change.
    ///
    /// # Errors
    /// If the name or the value is invalid. Nothing is changed then.
    pub(crate) fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let mut changed = self.clone();
        changed.change(&name.replace('-', "_"), value)?;
        changed.server(0).check().map_err(|error| error.to_string())?;
        *self = changed;
        Ok(())
    }

    fn change(&mut self, name: &str, value: &str) -> Result<(), String> {
        let wrong = |what: &str| format!("`{name}={value}`: {what}");
        match name {
            "temperature" => self.temperature = number(name, value)?,
            "top_k" => self.top_k = number(name, value)?,
            "top_p" => self.top_p = number(name, value)?,
            "min_p" => self.min_p = number(name, value)?,
            "repetition_penalty" => self.repetition_penalty = number(name, value)?,
            "presence_penalty" => self.presence_penalty = number(name, value)?,
            "frequency_penalty" => self.frequency_penalty = number(name, value)?,
            "max_tokens" => self.max_tokens = number(name, value)?,
            "seed" if value == "random" => self.seed = None,
            "seed" => self.seed = Some(number(name, value)?.unwrap_or(0)),
            "stop" if value == "default" => self.stop.clear(),
            "stop" => self.stop.push(value.to_owned()),
            "thinking" => {
                self.thinking = match value {
                    "default" => None,
                    "on" | "off" | "minimal" | "low" | "medium" | "high" => Some(value.to_owned()),
                    _ => return Err(wrong("give on, off, minimal, low, medium, high or default")),
                }
            }
            "show_thinking" => {
                self.show_thinking = match value {
                    "open" | "default" => Shown::Open,
                    "folded" => Shown::Folded,
                    _ => return Err(wrong("give open or folded")),
                }
            }
            _ => {
                let names = SETTINGS.map(|setting| setting.0);
                let nearest = nearest(name, &names).map_or(String::new(), |near| format!("; is it `{near}`?"));
                return Err(format!("there is no setting `{name}`{nearest} /set lists all of them"));
            }
        }
        Ok(())
    }

    /// A line for each setting: its name, its value, and its meaning.
    pub(crate) fn list(&self) -> Vec<String> {
        SETTINGS.iter().map(|(name, what)| format!("{name:<19} {:<9} {what}", self.value(name))).collect()
    }

    fn value(&self, name: &str) -> String {
        fn given<T: ToString>(value: Option<T>) -> String {
            value.map_or_else(|| "default".into(), |value| value.to_string())
        }
        match name {
            "temperature" => given(self.temperature),
            "top_k" => given(self.top_k),
            "top_p" => given(self.top_p),
            "min_p" => given(self.min_p),
            "repetition_penalty" => given(self.repetition_penalty),
            "presence_penalty" => given(self.presence_penalty),
            "frequency_penalty" => given(self.frequency_penalty),
            "max_tokens" => given(self.max_tokens),
            "seed" => self.seed.map_or_else(|| "random".into(), |seed| seed.to_string()),
            "stop" => match self.stop.as_slice() {
                [] => "default".into(),
                stop => stop.iter().map(|text| format!("{text:?}")).collect::<Vec<_>>().join(" "),
            },
            "thinking" => given(self.thinking.as_ref()),
            _ => match self.show_thinking {
                Shown::Open => "open".into(),
                Shown::Folded => "folded".into(),
            },
        }
    }

    /// The settings of the answer with this number. Each answer has its own seed, so that another answer to the same question
    /// differs.
    pub(crate) fn server(&self, answer: u64) -> Settings {
        Settings {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            penalties: Penalties {
                presence: self.presence_penalty.unwrap_or(0.0),
                frequency: self.frequency_penalty.unwrap_or(0.0),
            },
            seed: self.seed.map(|seed| seed.wrapping_add(answer)),
            stop: self.stop.clone(),
            ..Settings::default()
        }
    }

    /// Whether and how hard the model should think.
    pub(crate) fn thinking(&self) -> Thinking {
        match self.thinking.as_deref() {
            None => Thinking::default(),
            Some("on") => Thinking { enabled: Some(true), effort: None },
            Some("off") => Thinking { enabled: Some(false), effort: None },
            Some(effort) => Thinking { enabled: Some(true), effort: Some(effort.to_owned()) },
        }
    }
}

/// A number, or `None` for `default`.
fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<Option<T>, String> {
    match value {
        "default" => Ok(None),
        value => value.parse().map(Some).map_err(|_| format!("`{name}={value}`: give a number, or default")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_can_be_set_listed_and_taken_back() {
        let values = ["0.7", "40", "0.9", "0.05", "1.1", "0.5", "-0.5", "7", "100", "END", "low", "folded"];
        let mut choices = Choices::default();
        for ((name, _), value) in SETTINGS.iter().zip(values) {
            choices.set(name, value).unwrap();
            let shown = choices.list().into_iter().find(|line| line.starts_with(&format!("{name} "))).unwrap();
            assert!(shown.contains(value), "{shown}");
        }
        let settings = choices.server(3);
        assert_eq!((settings.temperature, settings.top_k, settings.max_tokens), (Some(0.7), Some(40), Some(100)));
        assert_eq!((settings.seed, settings.stop), (Some(10), vec!["END".to_owned()]));
        assert_eq!(choices.thinking(), Thinking { enabled: Some(true), effort: Some("low".into()) });
        let kept: Choices = serde_json::from_str(&serde_json::to_string(&choices).unwrap()).unwrap();
        assert_eq!(kept, choices);
        SETTINGS.iter().for_each(|(name, _)| choices.set(name, "default").unwrap());
        assert_eq!(choices, Choices::default());
    }

    #[test]
    fn what_makes_no_sense_changes_nothing() {
        let mut choices = Choices::default();
        for (name, value, word) in [
            ("temperature", "hot", "number"),
            ("temperature", "9", "between"),
            ("top_p", "1.5", "between"),
            ("top_k", "-1", "number"),
            ("stop", "", "empty"),
            ("thinking", "maybe", "high"),
            ("temperatur", "1", "`temperature`"),
        ] {
            let refused = choices.set(name, value).unwrap_err();
            assert!(refused.contains(word), "{refused}");
        }
        assert_eq!(choices, Choices::default());
        choices.set("top-k", "5").unwrap();
        assert_eq!(choices.server(0).top_k, Some(5), "as the option is written");
    }
}
