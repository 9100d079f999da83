//! Thrift: experts are chosen otherwise than by the model's routers, so that fewer are read. This changes the model's output, so it
//! happens only on request, and results with thrift are never mixed with results without it.

use std::fmt;
use std::num::NonZeroU16;
use std::str::FromStr;

use sluice_format::{ModelSpec, MoeSpec};

/// How experts are chosen otherwise than by the routers. The default is to choose as the routers do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Thrift {
    /// Experts in memory are preferred while tokens are generated; prompts follow the routers, because they need most experts
    /// anyway. What is in memory depends on everything that was computed before, so the same request can give another text the next
    /// time.
    pub preference: Preference,
    /// Most experts of a token in each layer. They have the weights that the model would give them if it had no more. A layer whose
    /// experts are listed by token keeps all of them.
    pub top_k: Option<NonZeroU16>,
}

impl Thrift {
    /// The part of it that makes a difference in a model.
    #[must_use]
    pub fn in_model(self, spec: &ModelSpec) -> Thrift {
        let routers = || spec.all_layers().filter_map(|layer| layer.ffn.moe.as_ref()).filter(|moe| scores_decide(moe));
        let has_choice = routers().any(|moe| moe.experts > moe.top_k);
        Thrift {
            preference: if has_choice { self.preference } else { Preference::default() },
            top_k: self.top_k.filter(|most| routers().any(|moe| moe.top_k > most.get().into())),
        }
    }

    /// Whether experts are chosen as the routers say.
    pub fn is_exact(self) -> bool {
        self == Thrift::default()
    }

    /// Removes the experts that a token may not have from the layers of a model.
    pub(crate) fn limit(self, spec: &mut ModelSpec) {
        let Some(most) = self.top_k else { return };
        let prediction = spec.prediction.as_mut().map(|prediction| &mut prediction.layer);
        let routers = spec.layers.iter_mut().chain(prediction).filter_map(|layer| layer.ffn.moe.as_mut());
        routers.filter(|moe| scores_decide(moe)).for_each(|moe| moe.top_k = moe.top_k.min(most.get().into()));
    }
}

fn scores_decide(moe: &MoeSpec) -> bool {
    moe.router.token_table.is_none()
}

impl fmt::Display for Thrift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let preferred = "experts in memory replace others that score better by up to";
        let fewer = |most: NonZeroU16| match most.get() {
            1 => "at most 1 expert per token and layer".to_owned(),
            most => format!("at most {most} experts per token and layer"),
        };
        match (self.preference.is_none(), self.top_k) {
            (true, None) => f.write_str("experts are chosen as the model's routers say"),
            (true, Some(most)) => f.write_str(&fewer(most)),
            (false, None) => write!(f, "{preferred} {} of the range", self.preference),
            (false, Some(most)) => write!(f, "{preferred} {} of the range; {}", self.preference, fewer(most)),
        }
    }
}

/// How much better an expert's score must be for it to be read instead of one that is in memory: a part of the distance between the
/// token's best score and its lowest, in ten-thousandths. So it has the same meaning whatever a model's scores are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Preference(u16);

/// The number for the whole distance.
const WHOLE: u16 = 10_000;

impl Preference {
    /// `part` of the distance, from 0, which prefers none, to 1, with which any expert in memory is preferred to any other. `None`
    /// for other numbers.
    pub fn new(part: f64) -> Option<Self> {
        (0.0..=1.0).contains(&part).then(|| Preference((part * f64::from(WHOLE)).round() as u16))
    }

    /// From ten-thousandths, as in a session; `None` if that is more than the whole.
    pub fn from_code(code: u16) -> Option<Self> {
        (code <= WHOLE).then_some(Preference(code))
    }

    /// In ten-thousandths.
    pub fn code(self) -> u16 {
        self.0
    }

    /// Whether no expert is preferred.
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    /// As a part of the distance.
    pub(crate) fn part(self) -> f32 {
        f32::from(self.0) / f32::from(WHOLE)
    }
}

impl fmt::Display for Preference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", f64::from(self.0) / 100.0)
    }
}

impl FromStr for Preference {
    type Err = &'static str;

    /// Reads a part such as `0.05`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let part = text.parse().ok().and_then(Preference::new);
        part.filter(|part| !part.is_none()).ok_or("write a part of the range of scores, from 0.0001 to 1, such as 0.05")
    }
}

/// The experts of a layer that are in memory, and how much they are preferred.
pub struct Preferred<'a> {
    /// By how much their scores are raised, as a part of the distance between the best score and the lowest.
    pub part: f32,
    /// Whether an expert is in memory, or on its way.
    pub in_memory: &'a dyn Fn(u32) -> bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_and_kept_to_four_digits() {
        assert_eq!("0.05".parse::<Preference>(), Ok(Preference(500)));
        assert_eq!("1".parse::<Preference>(), Ok(Preference(WHOLE)));
        for wrong in ["0", "0.00001", "1.1", "-0.1", "nan", "", "5%"] {
            assert!(wrong.parse::<Preference>().is_err(), "{wrong}");
        }
        assert_eq!(Preference::from_code(WHOLE + 1), None);
        assert_eq!(Preference(500).to_string(), "5 %");
    }
}
