//! Which type a tensor is stored in.

use sluice_format::{ExtentKind, Layout, TensorShape, WeightType};
use sluice_weights::Codes;

use crate::encoding::Selection;
use crate::options::TypeChoice;

/// The type of a tensor, and whether it had to be widened although the choice was to carry it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) weight_type: WeightType,
    /// Whether the order of the columns is stored.
    pub(crate) ordered: bool,
    pub(crate) widened: bool,
}

/// Chooses the type of a tensor that comes from `sources`, those of each extent: two for a pair, and several extents for the experts
/// of a layer, which share one description.
pub(crate) fn choose(kind: ExtentKind, tensor: &TensorShape, choice: TypeChoice, sources: &[Vec<Selection>]) -> Chosen {
    let TensorShape { layout, shape, .. } = *tensor;
    let exact = |weight_type| Chosen { weight_type, ordered: false, widened: false };
    let stored = || carried(shape, sources);
    match (kind, layout, choice) {
        // What is looked up row by row costs no time: it loses nothing unless the checkpoint has it smaller.
        (ExtentKind::Embedding, ..) => match choice {
            TypeChoice::Type(ty @ (WeightType::F32 | WeightType::Bf16)) => exact(ty),
            _ => by_row(stored()),
        },
        // A table too, and its rows must be found.
        (_, Layout::Sectors, TypeChoice::Type(ty @ (WeightType::F32 | WeightType::Bf16))) => exact(ty),
        (_, Layout::Sectors, _) => floats_only(stored()),
        (_, Layout::Plain, _) => exact(WeightType::F32),
        // A router decides; its precision costs nothing.
        (.., TypeChoice::Type(WeightType::F32)) if tensor.decides(kind) => exact(WeightType::F32),
        _ if tensor.decides(kind) => floats_only(stored()),
        (.., TypeChoice::Keep) => stored(),
        (.., TypeChoice::Type(WeightType::Fp8)) => {
            let stored = stored();
            if is_e4m3(stored.weight_type) {
                stored
            } else if sources.iter().flatten().any(|s| is_torn_fp8(s, shape)) {
                WIDENED
            } else {
                exact(WeightType::Fp8)
            }
        }
        (.., TypeChoice::Type(ty)) => exact(ty),
    }
}

const WIDENED: Chosen = Chosen { weight_type: WeightType::F32, ordered: false, widened: true };

fn floats_only(chosen: Chosen) -> Chosen {
    match chosen.weight_type {
        WeightType::F32 | WeightType::F16 | WeightType::Bf16 => chosen,
        _ => WIDENED,
    }
}

/// Parts of the embedding are cut at any row group, through the scales of 128 rows, and their rows are looked up as they are.
fn by_row(chosen: Chosen) -> Chosen {
    if chosen.weight_type == WeightType::Fp8 || chosen.ordered { WIDENED } else { chosen }
}

/// The type that carries all sources bit for bit, or f32 where there is none: it holds all their values exactly.
fn carried(shape: [usize; 3], sources: &[Vec<Selection>]) -> Chosen {
    let mut all = sources.iter().flatten();
    let Some(first) = all.next().and_then(|s| s.carrier(shape)) else { return WIDENED };
    if !all.all(|s| s.carrier(shape) == Some(first)) {
        return WIDENED;
    }
    // The matrices of a pair meet one input. Those of several extents have an order each.
    let alike = |sources: &Vec<Selection>| sources.iter().all(|s| s.order() == sources[0].order());
    if !sources.iter().all(alike) {
        return WIDENED;
    }
    let ordered = sources.iter().flatten().any(|s| s.order().is_some());
    Chosen { weight_type: first, ordered, widened: false }
}

/// Whether a source has fp8 codes that the file's type cannot hold: making new ones of them would lose more than the type does.
fn is_torn_fp8(source: &Selection, shape: [usize; 3]) -> bool {
    source.encoding.carried().is_some_and(is_e4m3) && source.carrier(shape) != Some(WeightType::Fp8)
}

/// Whether a type has e4m3 codes, whatever their scales are.
fn is_e4m3(ty: WeightType) -> bool {
    match ty {
        WeightType::Grouped(grouped) => grouped.codes() == Codes::E4m3,
        other => other == WeightType::Fp8,
    }
}
