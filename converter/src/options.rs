//! The caller's options.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use sluice_format::WeightType;

use crate::error::ConvertError;
use crate::recipe::Recipe;
use crate::striping::Striping;

/// Types that a conversion can produce; f16 and the four-bit types are only carried by `keep`.
const OUTPUT_TYPES: [WeightType; 7] = [
    WeightType::F32,
    WeightType::Bf16,
    WeightType::Fp8,
    WeightType::Q8,
    WeightType::Q4,
    WeightType::Q3,
    WeightType::Q2,
];

/// The type in which a group of weights is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum TypeChoice {
    /// As the checkpoint has it, bit for bit.
    #[default]
    Keep,
    /// Converted.
    Type(WeightType),
}

impl fmt::Display for TypeChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TypeChoice::Keep => f.write_str("keep"),
            TypeChoice::Type(ty) => ty.fmt(f),
        }
    }
}

impl FromStr for TypeChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        if s == "keep" {
            return Ok(TypeChoice::Keep);
        }
        let ty = OUTPUT_TYPES.into_iter().find(|t| t.name() == s);
        ty.map(TypeChoice::Type).ok_or_else(|| format!("unknown output type `{s}`: use one of {}", output_types()))
    }
}

impl Serialize for TypeChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

fn output_types() -> String {
    OUTPUT_TYPES.iter().fold("keep".to_owned(), |list, t| format!("{list}, {t}"))
}

/// The caller's options.
#[derive(Clone, Debug)]
pub struct Options {
    /// Type of the routed experts.
    pub expert_type: TypeChoice,
    /// Type of everything else. Norms, biases and routers are never quantised, nor is the token embedding.
    pub dense_type: TypeChoice,
    /// Types by pattern, which take precedence over the two above.
    pub recipe: Option<Recipe>,
    /// Page size of the file, one of [`sluice_format::PAGE_SIZES`].
    pub page_size: u32,
    /// An importance file (`sluice calibrate`), which weights the errors of `q4`, `q3` and `q2`.
    pub importance: Option<PathBuf>,
    /// Whether extents are compressed where that saves enough.
    pub compress: bool,
    /// Most bytes of one file: a larger model becomes several volumes.
    pub split_size: Option<u64>,
    /// The folders over which the model is striped, rather than written beside the destination, which is in the first of them.
    pub striping: Option<Striping>,
    /// Whether the inputs of matrices that are rounded to `q4`, `q3` and `q2` are measured on the way ([`mod@crate::measure`]), and on what: a
    /// digest of the text and of how it is run. An importance file takes its place.
    pub measured: Option<u64>,
    /// Whether a layer for multi-token prediction is carried, where the checkpoint has one.
    pub mtp: bool,
    /// Whether an existing destination is replaced, once the new file is complete.
    pub overwrite: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            expert_type: TypeChoice::Keep,
            dense_type: TypeChoice::Keep,
            recipe: None,
            page_size: sluice_format::PAGE_SIZES[0],
            importance: None,
            compress: false,
            split_size: None,
            striping: None,
            measured: None,
            mtp: true,
            overwrite: false,
        }
    }
}

impl Options {
    pub(crate) fn check(&self) -> Result<(), ConvertError> {
        if self.split_size.is_some() && self.striping.is_some() {
            let problem = "a model that is striped has a volume for each folder: it cannot be split by size as well";
            return Err(ConvertError::Options(problem.into()));
        }
        for (option, choice) in [("expert type", self.expert_type), ("dense type", self.dense_type)] {
            if let TypeChoice::Type(ty) = choice
                && !OUTPUT_TYPES.contains(&ty)
            {
                let allowed = output_types();
                return Err(ConvertError::Options(format!("the {option} cannot be {ty}: use one of {allowed}")));
            }
        }
        Ok(())
    }
}
