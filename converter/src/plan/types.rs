//! Which type a tensor is stored in.

use sluice_format::{BLOCK, ExtentKind, FP8_BLOCK, Layout, ROW_GROUP, WeightType};

use super::resolve::{Code, ScaleType, Source, Storage};
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
    sources: impl Iterator<Item = &'a Source> + Clone,
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
            let any_torn = sources.clone().any(|s| is_fp8(s) && !fits_tiles(s, shape));
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
fn carried<'a>(shape: [usize; 3], mut sources: impl Iterator<Item = &'a Source>) -> Chosen {
    let Some(first) = sources.next().and_then(|s| carrier(s, shape)) else { return WIDENED };
    if sources.all(|s| carrier(s, shape) == Some(first)) {
        Chosen { weight_type: first, widened: false }
    } else {
        WIDENED
    }
}

/// The type that carries one source bit for bit.
fn carrier(source: &Source, shape: [usize; 3]) -> Option<WeightType> {
    let (fits, ty) = match source.storage {
        Storage::F32 => (true, WeightType::F32),
        Storage::F16 => (true, WeightType::F16),
        Storage::Bf16 => (true, WeightType::Bf16),
        Storage::Fp8(_) => (fits_tiles(source, shape), WeightType::Fp8),
        Storage::Grouped(g) => {
            // A scale of more columns is repeated for each block of the file.
            let blocks = g.group.is_multiple_of(BLOCK) && g.global.is_none() && source.whole_rows(shape[2]);
            match (g.code, g.scale_type) {
                (Code::Offset4, ScaleType::Bf16) => (blocks, WeightType::Int4),
                (Code::E2m1, ScaleType::E8m0) => (blocks, WeightType::Mxfp4),
                _ => return None,
            }
        }
        Storage::Columnar(_) => return None,
    };
    (fits && !source.plus_one).then_some(ty)
}

fn is_fp8(s: &Source) -> bool {
    matches!(s.storage, Storage::Fp8(_))
}

/// Whether every tile of 8 rows and 128 columns, which has one scale here, has one scale in the source.
pub(crate) fn fits_tiles(source: &Source, [batch, rows, cols]: [usize; 3]) -> bool {
    let Storage::Fp8(scales) = source.storage else { return false };
    let s = &source.strides;
    // The common case: 8 divides the rows of a block, so row groups that begin on multiples of 8 of untransposed rows never
    // straddle one.
    let eights = |n: usize| n.is_multiple_of(source.cols * ROW_GROUP);
    let [block_rows, block_cols] = scales.block;
    let grid = block_rows.is_multiple_of(ROW_GROUP) && scales.matrix_rows.is_multiple_of(ROW_GROUP);
    let same_rows = s.row_step == source.cols && s.col_step == 1 && s.run.is_multiple_of(ROW_GROUP);
    if grid && block_cols.is_multiple_of(FP8_BLOCK) && same_rows && eights(s.start) && eights(s.run_step) {
        return true;
    }
    let scale = |row, col| scales.index(source.locate(row, col));
    (0..batch).all(|b| {
        (0..rows).step_by(ROW_GROUP).all(|first| {
            let group = first..(first + ROW_GROUP).min(rows);
            (0..cols).step_by(FP8_BLOCK).all(|c| {
                let of_tile = scale(b * rows + first, c);
                let last_col = (c + FP8_BLOCK).min(cols) - 1;
                group.clone().all(|r| {
                    let row = b * rows + r;
                    scale(row, c) == of_tile && scale(row, last_col) == of_tile
                })
            })
        })
    })
}

/// Whether values may change on the way from `storage` to `ty`. Carrying and widening do not change them.
pub(crate) fn is_lossy(storage: Storage, ty: WeightType) -> bool {
    !matches!(
        (storage, ty),
        (_, WeightType::F32)
            | (Storage::F16, WeightType::F16)
            | (Storage::Bf16, WeightType::Bf16)
            | (Storage::Fp8(_), WeightType::Fp8)
            | (Storage::Grouped(_), WeightType::Int4 | WeightType::Mxfp4)
    )
}
