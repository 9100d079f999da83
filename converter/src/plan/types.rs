//! Which type a tensor is stored in.

use sluice_format::{ExtentKind, Layout, WeightType};

use crate::encoding::Selection;
use crate::options::TypeChoice;

/// The type of a tensor, and whether it had to be widened although the choice was to carry it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) weight_type: WeightType,
    pub(crate) widened: bool,
}

/// Chooses the type of a tensor that comes from `sources`: several for a pair, and for the experts of a layer, which share
/// one description.
pub(crate) fn choose<'a>(
    kind: ExtentKind,
    layout: Layout,
    shape: [usize; 3],
    choice: TypeChoice,
    sources: impl Iterator<Item = &'a Selection> + Clone,
) -> Chosen {
    let exact = |weight_type| Chosen { weight_type, widened: false };
    let stored = || carried(shape, sources.clone());
    match (kind, layout, choice) {
        // The embedding is looked up row by row: its layout knows no scales, so quantised types cannot apply.
        (ExtentKind::Embedding, ..) => match choice {
            TypeChoice::Type(ty @ (WeightType::F32 | WeightType::Bf16)) => exact(ty),
            _ => floats_only(stored()),
        },
        (_, Layout::Plain, _) => exact(WeightType::F32),
        // A router decides; its precision costs nothing.
        (ExtentKind::Router, _, TypeChoice::Type(WeightType::F32)) => exact(WeightType::F32),
        (ExtentKind::Router, ..) => floats_only(stored()),
        (.., TypeChoice::Keep) => stored(),
        (.., TypeChoice::Type(WeightType::Fp8)) => {
            let any_torn = sources.clone().any(|s| is_torn_fp8(s, shape));
            if any_torn { WIDENED } else { exact(WeightType::Fp8) }
        }
        (.., TypeChoice::Type(ty)) => exact(ty),
    }
}

const WIDENED: Chosen = Chosen { weight_type: WeightType::F32, widened: true };

fn floats_only(chosen: Chosen) -> Chosen {
    match chosen.weight_type {
        WeightType::F32 | WeightType::F16 | WeightType::Bf16 => chosen,
        _ => WIDENED,
    }
}

/// The type that carries all sources bit for bit, or f32 where there is none: it holds all their values exactly.
fn carried<'a>(shape: [usize; 3], mut sources: impl Iterator<Item = &'a Selection>) -> Chosen {
    let Some(first) = sources.next().and_then(|s| s.carrier(shape)) else { return WIDENED };
    if sources.all(|s| s.carrier(shape) == Some(first)) {
        Chosen { weight_type: first, widened: false }
    } else {
        WIDENED
    }
}

/// Whether a source has fp8 codes that the file's type cannot hold: making new ones of them would lose more than the type does.
fn is_torn_fp8(source: &Selection, shape: [usize; 3]) -> bool {
    source.encoding.carried() == Some(WeightType::Fp8) && !source.encoding.fits(source, shape)
}
