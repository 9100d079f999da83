//! The checked content of the tables: extents, tensors and spec that agree with each other.

use std::collections::{HashMap, HashSet};

use crate::error::Region;
use crate::extent::{Codec, ExtentKind, ExtentRecord, NO_LAYER, padded_len};
use crate::limits::{MAX_EXTENT_BYTES, MAX_EXTENTS, MAX_TENSORS};
use crate::schema::TensorShape;
use crate::spec::{ModelSpec, NgramSpec};
use crate::stripes::{ExtentTable, Stripe};
use crate::superblock::Superblock;
use crate::tensor::{ANY_INDEX, Layout, TensorRecord, next_tensor_offset};
use sluice_weights::WeightType;

type ExtentKey = (ExtentKind, u32, u32);

/// A broken rule: where, and which.
pub(crate) type Problem = (Region, String);

/// Extents and tensors of a model with their indices.
#[derive(Debug)]
pub(crate) struct Catalog {
    pub(crate) table: ExtentTable,
    pub(crate) tensors: Vec<TensorRecord>,
    pub(crate) spec: ModelSpec,
    by_key: HashMap<ExtentKey, usize>,
    tensors_by_key: HashMap<ExtentKey, std::ops::Range<usize>>,
}

impl Catalog {
    /// Checks the tables against each other and against the spec, which must be valid. The work is linear in the number of
    /// records and layers, whatever numbers the spec claims.
    pub(crate) fn new(
        page_size: u32,
        table: ExtentTable,
        tensors: Vec<TensorRecord>,
        spec: ModelSpec,
    ) -> Result<Self, Problem> {
        let by_key = index_extents(page_size, &table).map_err(|e| (Region::ExtentTable, e))?;
        let tensors_by_key = index_tensors(&tensors).map_err(|e| (Region::TensorTable, e))?;
        let catalog = Catalog { table, tensors, spec, by_key, tensors_by_key };
        catalog.check_lengths().map_err(|e| (Region::TensorTable, e))?;
        catalog.check_against_spec()?;
        Ok(catalog)
    }

    pub(crate) fn extent(&self, kind: ExtentKind, layer: u32, index: u32) -> Option<&ExtentRecord> {
        self.by_key.get(&(kind, layer, index)).map(|&i| &self.table.extents[i])
    }

    /// The stripes of one of these extents.
    pub(crate) fn stripes(&self, extent: &ExtentRecord) -> &[Stripe] {
        let number = self.by_key.get(&(extent.kind, extent.layer, extent.index));
        number.map_or(&[], |&number| self.table.stripes(number))
    }

    /// The tensors that describe an extent with this name, in the order of their offsets.
    pub(crate) fn tensors_in(&self, kind: ExtentKind, layer: u32, index: u32) -> &[TensorRecord] {
        let index = if kind == ExtentKind::Expert { ANY_INDEX } else { index };
        self.tensors_by_key.get(&(kind, layer, index)).map_or(&[], |range| &self.tensors[range.clone()])
    }

    /// Every extent is as long as its tensors, and every record describes an extent.
    fn check_lengths(&self) -> Result<(), String> {
        let mut described = HashSet::with_capacity(self.tensors_by_key.len());
        for e in &self.table.extents {
            let tensors = self.tensors_in(e.kind, e.layer, e.index);
            let last = tensors.last().ok_or_else(|| format!("{} has no tensors", e.name()))?;
            let end = last.offset + last.len;
            if end != e.logical_len {
                return Err(format!("the tensors of {} end at {end}, its bytes at {}", e.name(), e.logical_len));
            }
            described.insert((last.kind, last.layer, last.index));
        }
        match self.tensors.iter().find(|t| !described.contains(&(t.kind, t.layer, t.index))) {
            Some(t) => Err(format!("{} belongs to no extent", describe(t))),
            None => Ok(()),
        }
    }

    /// Every extent and tensor that the spec implies exists, with the right shape, and there are no others.
    fn check_against_spec(&self) -> Result<(), Problem> {
        let tensor_table = |e| (Region::TensorTable, e);
        let mut expected = self.check_parts(ExtentKind::Embedding, NO_LAYER).map_err(tensor_table)?;
        expected += self.check_parts(ExtentKind::Head, NO_LAYER).map_err(tensor_table)?;
        expected += self.check_kind(ExtentKind::FinalNorm, usize::MAX, NO_LAYER)?;
        let of_layer =
            [ExtentKind::Prediction, ExtentKind::Attention, ExtentKind::Router, ExtentKind::Dense, ExtentKind::Expert];
        for layer in 0..self.spec.all_layers().count() {
            for kind in of_layer {
                expected += self.check_kind(kind, layer, layer as u32)?;
            }
        }
        if let (Some(prediction), Some(layer)) = (&self.spec.prediction, self.spec.prediction_layer()) {
            let own = [(ExtentKind::Embedding, prediction.own_embedding), (ExtentKind::Head, prediction.own_head)];
            for (kind, _) in own.into_iter().filter(|(_, own)| *own) {
                expected += self.check_parts(kind, layer as u32).map_err(tensor_table)?;
            }
        }
        for ngrams in &self.spec.ngrams {
            expected += self.check_table(ngrams).map_err(tensor_table)?;
        }
        if expected != self.table.extents.len() {
            let problem = format!("the file has {} extents, its spec implies {expected}", self.table.extents.len());
            return Err((Region::ExtentTable, problem));
        }
        Ok(())
    }

    /// Checks the extents of one kind and layer; returns their number.
    fn check_kind(&self, kind: ExtentKind, spec_layer: usize, layer: u32) -> Result<usize, Problem> {
        let count = self.spec.extent_count(kind, spec_layer);
        // The first missing extent ends the loop, so a spec cannot make it longer than the extent table.
        for index in 0..count as u32 {
            if self.extent(kind, layer, index).is_none() {
                let name = crate::extent_name(kind, layer, index);
                return Err((Region::ExtentTable, format!("{name} is missing, which its spec implies")));
            }
        }
        if count > 0 {
            // Experts share their records, so checking the first is enough.
            let found = self.tensors_in(kind, layer, 0);
            let wanted = self.spec.tensors(kind, spec_layer);
            check_shapes(found, &wanted, || crate::extent_name(kind, layer, 0))
                .map_err(|e| (Region::TensorTable, e))?;
        }
        Ok(count)
    }

    /// The parts of an embedding or head, of a layer or of the model, cover the vocabulary; returns their number.
    fn check_parts(&self, kind: ExtentKind, layer: u32) -> Result<usize, String> {
        let wanted = |rows, ty| self.spec.part_tensor(kind, rows, ty);
        let (rows, count) = self.cover(kind, layer, &wanted)?;
        if rows != self.spec.vocab_size as u64 {
            let whose = if layer == NO_LAYER { String::new() } else { format!(" of layer {layer}") };
            return Err(format!("the {kind}{whose} has {rows} rows, the vocabulary {}", self.spec.vocab_size));
        }
        Ok(count)
    }

    /// The parts of a table cover its rows, and none is compressed; returns their number.
    fn check_table(&self, ngrams: &NgramSpec) -> Result<usize, String> {
        let layer = ngrams.layer as u32;
        let (rows, count) = self.cover(ExtentKind::Table, layer, &|rows, _| Some(ngrams.part_tensor(rows)))?;
        if rows != ngrams.table_rows {
            return Err(format!("the table of layer {layer} has {rows} rows, its spec implies {}", ngrams.table_rows));
        }
        for e in (0..count as u32).filter_map(|index| self.extent(ExtentKind::Table, layer, index)) {
            if e.codec != Codec::Raw {
                return Err(format!("{} is compressed, so that its rows cannot be read", e.name()));
            }
            if self.stripes(e).len() > 1 {
                return Err(format!("{} has several stripes, so that its rows cannot be read", e.name()));
            }
        }
        Ok(count)
    }

    /// Rows and number of the parts of `kind` in `layer`; `wanted` gives what a part with a number of rows of a type
    /// holds.
    fn cover(
        &self,
        kind: ExtentKind,
        layer: u32,
        wanted: &dyn Fn(usize, WeightType) -> Option<TensorShape>,
    ) -> Result<(u64, usize), String> {
        let (mut rows, mut count) = (0u64, 0);
        let mut first: Option<(u64, WeightType)> = None;
        while let Some(e) = self.extent(kind, layer, count as u32) {
            let found = self.tensors_in(kind, layer, e.index);
            let (part_rows, ty) = found.first().map_or((0, WeightType::F32), |t| (t.shape[1], t.weight_type));
            let wanted = usize::try_from(part_rows).ok().and_then(|rows| wanted(rows, ty));
            check_shapes(found, wanted.as_slice(), || e.name())?;
            let (uniform, first_type) = *first.get_or_insert((part_rows, ty));
            // A part shorter than the first anywhere but at the end would break "row / rows per part = part".
            if part_rows == 0 || part_rows > uniform || !rows.is_multiple_of(uniform) {
                return Err(format!("{} has {part_rows} rows, the first part {uniform}", e.name()));
            }
            if ty != first_type {
                return Err(format!("{} is {ty}, the first part {first_type}", e.name()));
            }
            // Cannot overflow: extents do not overlap, and each row takes at least two bytes of the file.
            rows += part_rows;
            count += 1;
        }
        Ok((rows, count))
    }
}

/// Superblock, extents and tables tile the file of every volume in this order: no gap, no overlap, no byte that no checksum covers.
pub(crate) fn check_tiling(superblocks: &[&Superblock], table: &ExtentTable) -> Result<(), String> {
    let mut ends: Vec<u64> = superblocks.iter().map(|superblock| u64::from(superblock.page_size)).collect();
    for (e, stripes) in table.iter() {
        for &Stripe { volume, offset, len, .. } in stripes {
            let end =
                ends.get_mut(usize::from(volume)).ok_or_else(|| format!("{} lies in volume {volume}", e.name()))?;
            *end = next_region(*end, offset, len)?;
        }
    }
    superblocks.iter().zip(ends).try_for_each(|(superblock, end)| check_tables(superblock, end))
}

/// Where the next region begins after the one at `offset`.
fn next_region(end: u64, offset: u64, len: u64) -> Result<u64, String> {
    if offset != end {
        return Err(format!("a region begins at offset {offset}, the one before it ends at {end}"));
    }
    end.checked_add(len).ok_or_else(|| "a region runs past 2^64".into())
}

/// The tables tile the end of a file, from `end` on.
fn check_tables(superblock: &Superblock, mut end: u64) -> Result<(), String> {
    let tables = [superblock.extents, superblock.tensors, superblock.metadata].map(|t| (t.offset, t.stored_len));
    for (offset, len) in tables {
        end = next_region(end, offset, len)?;
    }
    if end != superblock.file_len {
        return Err(format!("the regions end at {end}, the file at {}", superblock.file_len));
    }
    Ok(())
}

/// Each extent has a length that its codec allows, and occurs once.
fn index_extents(page_size: u32, table: &ExtentTable) -> Result<HashMap<ExtentKey, usize>, String> {
    let extents = &table.extents;
    if extents.len() > MAX_EXTENTS {
        return Err(format!("it has {} records, more than {MAX_EXTENTS}", extents.len()));
    }
    let mut by_key = HashMap::with_capacity(extents.len());
    for (i, (e, stripes)) in table.iter().enumerate() {
        let has_pages = |stripe: &Stripe| stripe.len > 0 && stripe.len.is_multiple_of(u64::from(page_size));
        if stripes.len() > 1 && !stripes.iter().all(has_pages) {
            return Err(format!("a stripe of {} does not consist of whole pages", e.name()));
        }
        if !has_possible_length(e, page_size) {
            return Err(format!(
                "{} has an impossible stored length {} for logical length {}",
                e.name(),
                e.stored_len,
                e.logical_len
            ));
        }
        if e.codec == Codec::Raw && e.logical_checksum != e.checksum {
            return Err(format!("{} is not compressed, and has another checksum in memory", e.name()));
        }
        if by_key.insert((e.kind, e.layer, e.index), i).is_some() {
            return Err(format!("{} appears twice", e.name()));
        }
    }
    Ok(by_key)
}

fn has_possible_length(e: &ExtentRecord, page_size: u32) -> bool {
    let pages = e.stored_len > 0 && e.stored_len.is_multiple_of(u64::from(page_size));
    let fits = padded_len(e.logical_len, page_size) == Some(e.padded_len) && e.padded_len <= MAX_EXTENT_BYTES;
    fits && match e.codec {
        Codec::Raw => e.stored_len == e.padded_len,
        Codec::Planes => pages && e.stored_len < e.padded_len,
    }
}

/// The records of an extent stand together, in order, packed; each has the length that its shape implies.
fn index_tensors(tensors: &[TensorRecord]) -> Result<HashMap<ExtentKey, std::ops::Range<usize>>, String> {
    if tensors.len() > MAX_TENSORS {
        return Err(format!("it has {} records, more than {MAX_TENSORS}", tensors.len()));
    }
    let key = |t: &TensorRecord| (t.kind, t.layer, t.index);
    let mut index = HashMap::new();
    let mut start = 0;
    for group in tensors.chunk_by(|a, b| key(a) == key(b)) {
        let mut end = 0u64;
        for t in group {
            if (t.index == ANY_INDEX) != (t.kind == ExtentKind::Expert) {
                return Err(format!("{} has index {}", describe(t), t.index));
            }
            if t.expected_len() != Some(t.len) {
                return Err(format!("{} has {} bytes, which is not what its shape implies", describe(t), t.len));
            }
            if Some(t.offset) != next_tensor_offset(end) {
                return Err(format!("{} begins at {}, the tensor before it ends at {end}", describe(t), t.offset));
            }
            end = t.offset.checked_add(t.len).ok_or_else(|| format!("{} runs past 2^64", describe(t)))?;
        }
        if index.insert(key(&group[0]), start..start + group.len()).is_some() {
            return Err(format!("{} stands apart from the others of its extent", describe(&group[0])));
        }
        start += group.len();
    }
    Ok(index)
}

fn describe(t: &TensorRecord) -> String {
    match (t.layer, t.index) {
        (NO_LAYER, index) => format!("`{}` of {} {index}", t.name, t.kind),
        (layer, index) if matches!(t.kind, ExtentKind::Embedding | ExtentKind::Head) => {
            format!("`{}` of layer {layer} {} {index}", t.name, t.kind)
        }
        (layer, _) => format!("`{}` of layer {layer} {}", t.name, t.kind),
    }
}

/// The tensors that the spec implies, with the two matrices of a pair apart where `found` has them apart.
fn as_found(found: &[TensorRecord], wanted: &[TensorShape]) -> Vec<TensorShape> {
    let mut all = Vec::with_capacity(wanted.len() + 1);
    for w in wanted {
        match w.apart() {
            Some(halves) if found.get(all.len()).is_some_and(|t| t.name == halves[0].name) => all.extend(halves),
            _ => all.push(w.clone()),
        }
    }
    all
}

fn check_shapes(found: &[TensorRecord], wanted: &[TensorShape], extent: impl Fn() -> String) -> Result<(), String> {
    let wanted = as_found(found, wanted);
    if found.len() != wanted.len() {
        return Err(format!("{} holds {} tensors, its spec implies {}", extent(), found.len(), wanted.len()));
    }
    for (t, w) in found.iter().zip(&wanted) {
        if t.name != w.name {
            return Err(format!("{} holds `{}` where its spec implies `{}`", extent(), t.name, w.name));
        }
        // Vectors are f32, so that no kernel needs a second path for a few bytes.
        let vector = t.kind != ExtentKind::Embedding && t.layout == Layout::Plain;
        // Tables that are looked up row by row, and tensors that make decisions, keep their columns in the source's
        // order.
        let in_order = matches!(t.kind, ExtentKind::Embedding | ExtentKind::Router);
        let layout = if in_order { t.layout } else { t.layout.unordered() };
        if t.shape != w.shape.map(|d| d as u64) || layout != w.layout || (vector && t.weight_type != WeightType::F32) {
            return Err(format!(
                "{} is {} {} {:?}, its spec implies {} {:?}",
                describe(t),
                t.layout.name(),
                t.weight_type,
                t.shape,
                w.layout.name(),
                w.shape
            ));
        }
    }
    Ok(())
}
