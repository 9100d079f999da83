//! Laying out the extents: final norm, embedding, head, then the layers' dense parts, then the experts layer by layer.

use std::collections::{BTreeMap, BTreeSet};

use sluice_format::{
    ANY_INDEX, ExtentKind, Layout, ModelSpec, NO_LAYER, NgramSpec, PLANE_ALIGN, PlannedExtent, ROW_GROUP, TensorRecord,
    TensorShape, WeightType,
};

use super::TensorPlan;
use super::naming::Naming;
use super::resolve::{pick, resolve};
use super::scheme::Scheme;
use super::stored::rows_of;
use super::types::{Chosen, choose};
use crate::encoding::Selection;
use crate::error::ConvertError;
use crate::family::{Origin, Place, Strides, View};
use crate::fp8::SCALE_BLOCK;
use crate::options::{Options, TypeChoice};
use crate::recipe::{self, Effect};
use crate::source::Checkpoint;

/// Longest part of the embedding: a token reads one part, so parts are small.
const EMBEDDING_PART: usize = 256 << 10;
/// Longest part of the head: every token reads all of them, so parts are large.
const HEAD_PART: usize = 16 << 20;

/// Extents and records of a planned file.
#[derive(Debug)]
pub(crate) struct Built {
    pub(crate) planned: Vec<PlannedExtent>,
    pub(crate) extents: Vec<Vec<TensorPlan>>,
    pub(crate) records: Vec<TensorRecord>,
    pub(crate) groups: Vec<String>,
    pub(crate) widened: Vec<String>,
    /// Why some tensors could not be carried.
    pub(crate) obstacles: BTreeSet<&'static str>,
    /// For each rule of the recipe that matches anything, by index: its strongest effect.
    pub(crate) effects: BTreeMap<usize, Effect>,
}

impl Built {
    /// Types by group.
    pub(crate) fn types(&self) -> BTreeMap<String, Vec<String>> {
        let mut types: BTreeMap<usize, BTreeSet<WeightType>> = BTreeMap::new();
        for tensor in self.extents.iter().flatten() {
            types.entry(tensor.group).or_default().insert(tensor.weight_type);
        }
        let names = |set: BTreeSet<WeightType>| set.into_iter().map(|t| t.to_string()).collect();
        types.into_iter().map(|(group, set)| (self.groups[group].clone(), names(set))).collect()
    }
}

/// The extents of all layers in file order: dense parts, then experts.
pub(crate) fn places(spec: &ModelSpec) -> impl Iterator<Item = Place> {
    let layers = 0..spec.all_layers().count();
    dense_places(spec).chain(layers.flat_map(|layer| expert_places(spec, layer)))
}

/// The extents of one layer in file order.
pub(crate) fn places_of(spec: &ModelSpec, layer: usize) -> impl Iterator<Item = Place> {
    dense_places_of(spec, layer).chain(expert_places(spec, layer))
}

fn dense_places(spec: &ModelSpec) -> impl Iterator<Item = Place> {
    (0..spec.all_layers().count()).flat_map(|layer| dense_places_of(spec, layer))
}

fn dense_places_of(spec: &ModelSpec, layer: usize) -> impl Iterator<Item = Place> {
    let kinds = [ExtentKind::Prediction, ExtentKind::Attention, ExtentKind::Router, ExtentKind::Dense];
    let all = kinds.into_iter().map(move |kind| Place { kind, layer, index: 0 });
    all.filter(|p| !spec.tensors(p.kind, p.layer).is_empty())
}

fn expert_places(spec: &ModelSpec, layer: usize) -> impl Iterator<Item = Place> + use<> {
    let count = spec.layer(layer).and_then(|layer| layer.ffn.moe.as_ref()).map_or(0, |m| m.experts);
    (0..count).map(move |index| Place { kind: ExtentKind::Expert, layer, index })
}

/// Lays out the whole file; `head` is the tensor that becomes the output head.
pub(crate) fn build(
    checkpoint: &Checkpoint,
    naming: Naming<'_>,
    options: &Options,
    scheme: Scheme,
    head: &str,
) -> Result<Built, ConvertError> {
    let empty = Built {
        planned: Vec::new(),
        extents: Vec::new(),
        records: Vec::new(),
        groups: Vec::new(),
        widened: Vec::new(),
        obstacles: BTreeSet::new(),
        effects: BTreeMap::new(),
    };
    let Naming { family, names, spec, table_parts, .. } = naming;
    let mut b = Builder { checkpoint, options, scheme, out: empty };
    let norm = spec.tensors(ExtentKind::FinalNorm, usize::MAX);
    b.extents(ExtentKind::FinalNorm, NO_LAYER, &[0], &norm, |_, t| family.final_origin(names, spec, t))?;
    b.parts(ExtentKind::Embedding, NO_LAYER, &names.embedding(), spec)?;
    b.parts(ExtentKind::Head, NO_LAYER, head, spec)?;
    for place in dense_places(spec) {
        if place.kind == ExtentKind::Prediction {
            for (kind, tensor) in naming.own_parts() {
                b.parts(kind, place.layer as u32, tensor, spec)?;
            }
        }
        let tensors = spec.tensors(place.kind, place.layer);
        b.extents(place.kind, place.layer as u32, &[0], &tensors, |_, t| naming.origin(place, t))?;
    }
    for layer in 0..spec.all_layers().count() {
        let indices: Vec<u32> = expert_places(spec, layer).map(|p| p.index as u32).collect();
        let tensors = spec.tensors(ExtentKind::Expert, layer);
        let origin = |index: u32, t: &TensorShape| {
            naming.origin(Place { kind: ExtentKind::Expert, layer, index: index as usize }, t)
        };
        b.extents(ExtentKind::Expert, layer as u32, &indices, &tensors, origin)?;
    }
    for ngrams in &spec.ngrams {
        let parts: Vec<String> = (0..table_parts).map(|part| family.table_part(names, ngrams.layer, part)).collect();
        b.table(ngrams, &parts)?;
    }
    Ok(b.out)
}

struct Builder<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a Options,
    scheme: Scheme,
    out: Built,
}

impl Builder<'_> {
    /// The type from the recipe, or otherwise from the option for all tensors of its kind. `sources`: for each extent.
    fn choice(&mut self, kind: ExtentKind, layer: u32, tensor: &TensorShape, sources: &[Vec<Selection>]) -> TypeChoice {
        let usual = if kind == ExtentKind::Expert { self.options.expert_type } else { self.options.dense_type };
        let Some(recipe) = &self.options.recipe else { return usual };
        let matching: Vec<_> = recipe.matching(&recipe::name(kind, layer, tensor.name)).collect();
        let Some(&(first, choice)) = matching.first() else { return usual };
        let otherwise = matching.get(1).map_or(usual, |&(_, choice)| choice);
        let is_other = choose(kind, tensor, choice, sources) != choose(kind, tensor, otherwise, sources);
        let first = (first, if is_other { Effect::Changes } else { Effect::Nothing });
        let others = matching[1..].iter().map(|&(rule, _)| (rule, Effect::Overridden));
        for (rule, effect) in others.chain([first]) {
            let most = self.out.effects.entry(rule).or_insert(effect);
            *most = effect.max(*most);
        }
        choice
    }

    fn group(&mut self, kind: ExtentKind, tensor: &str) -> usize {
        let whole = matches!(kind, ExtentKind::Embedding | ExtentKind::Head);
        let name = if whole { tensor.to_owned() } else { format!("{kind}.{tensor}") };
        self.out.groups.iter().position(|g| *g == name).unwrap_or_else(|| {
            self.out.groups.push(name);
            self.out.groups.len() - 1
        })
    }

    /// Adds the extents of `indices`, which hold equal tensors of equal types. If there are several, they share one description.
    fn extents(
        &mut self,
        kind: ExtentKind,
        layer: u32,
        indices: &[u32],
        tensors: &[TensorShape],
        origin: impl Fn(u32, &TensorShape) -> Origin,
    ) -> Result<(), ConvertError> {
        let first = self.out.extents.len();
        self.out.extents.resize_with(first + indices.len(), Vec::new);
        let mut offset = 0u64;
        for tensor in tensors {
            let sources = self.sources(indices, tensor, &origin)?;
            let choice = self.choice(kind, layer, tensor, &sources);
            for part in parts_of(kind, tensor, choice, sources) {
                let (tensor, chosen) = (part.tensor, part.chosen);
                self.note_widened(kind, layer, tensor.name, chosen);
                let all = part.sources.iter().flatten().filter(|_| chosen.widened);
                self.out.obstacles.extend(all.filter_map(|s| s.encoding.obstacle()));
                let group = self.group(kind, tensor.name);
                for (extent, sources) in self.out.extents[first..].iter_mut().zip(part.sources) {
                    let (TensorShape { name, layout, shape }, weight_type) = (tensor.clone(), chosen.weight_type);
                    extent.push(TensorPlan { group, name, weight_type, layout, shape, offset, sources });
                }
                let index = if kind == ExtentKind::Expert { ANY_INDEX } else { indices[0] };
                let record = record(kind, layer, index, &tensor, chosen.weight_type, offset)?;
                offset = (record.offset + record.len).next_multiple_of(PLANE_ALIGN as u64);
                if !indices.is_empty() {
                    self.out.records.push(record);
                }
            }
        }
        // Without the padding after the last tensor.
        let logical_len = match self.out.records.last() {
            Some(last) if !indices.is_empty() => last.offset + last.len,
            _ => 0,
        };
        self.out.planned.extend(indices.iter().map(|&index| PlannedExtent { kind, layer, index, logical_len }));
        Ok(())
    }

    /// Where a tensor comes from, for each extent of `indices`.
    fn sources(
        &self,
        indices: &[u32],
        tensor: &TensorShape,
        origin: &impl Fn(u32, &TensorShape) -> Origin,
    ) -> Result<Vec<Vec<Selection>>, ConvertError> {
        let plain = tensor.layout == Layout::Plain;
        let of_extent = |&index: &u32| {
            let views = pick(self.checkpoint, origin(index, tensor));
            // There are many of these lists, so they have no spare capacity.
            let mut sources = Vec::with_capacity(views.len());
            for view in &views {
                sources.push(resolve(self.checkpoint, self.scheme, view, plain)?);
            }
            Ok(sources)
        };
        indices.iter().map(of_extent).collect()
    }

    /// Adds embedding or head of the model or of a prediction layer, split by rows into parts of equal height.
    fn parts(&mut self, kind: ExtentKind, layer: u32, tensor: &str, spec: &ModelSpec) -> Result<(), ConvertError> {
        let (rows, cols) = (spec.vocab_size, spec.hidden_size);
        let whole = resolve(self.checkpoint, self.scheme, &View::whole(tensor.to_owned(), rows, cols), false)?;
        let described = TensorShape { name: kind.name(), layout: Layout::Tiled, shape: [1, rows, cols] };
        let sources = [vec![whole]];
        let choice = self.choice(kind, layer, &described, &sources);
        let chosen = choose(kind, &described, choice, &sources);
        let [whole] = &sources[0][..] else { unreachable!("it has one source") };
        self.note_widened(kind, layer, kind.name(), chosen);
        let shape = spec.part_tensor(kind, rows, chosen.weight_type).expect("embedding and head have parts");
        let layout = layout_of(shape.layout, chosen);
        let height = if kind == ExtentKind::Embedding {
            embedding_part_rows(chosen.weight_type, cols)?
        } else {
            head_part_rows(chosen.weight_type, cols)?
        };
        let group = self.group(kind, kind.name());
        for (part, first_row) in (0..rows).step_by(height).enumerate() {
            let shape = [1, height.min(rows - first_row), cols];
            let described = TensorShape { name: kind.name(), layout, shape };
            let record = record(kind, layer, part as u32, &described, chosen.weight_type, 0)?;
            let planned = PlannedExtent { kind, layer, index: part as u32, logical_len: record.len };
            self.out.planned.push(planned);
            self.out.records.push(record);
            let strides = Strides::rows(first_row, shape[1], cols);
            let sources = vec![Selection { strides, ..whole.clone() }];
            let (name, weight_type) = (kind.name(), chosen.weight_type);
            self.out.extents.push(vec![TensorPlan { group, name, weight_type, layout, shape, offset: 0, sources }]);
        }
        Ok(())
    }

    /// Adds the table of n-grams of a layer. Each of the `parts` in the checkpoint becomes a part here too.
    fn table(&mut self, ngrams: &NgramSpec, parts: &[String]) -> Result<(), ConvertError> {
        let (kind, layer) = (ExtentKind::Table, ngrams.layer as u32);
        let height = |part: &String| rows_of(self.checkpoint, part).unwrap_or(0);
        let heights: Vec<usize> = parts.iter().map(height).collect();
        let usual = heights.first().copied().unwrap_or(0);
        let mut sources = Vec::with_capacity(parts.len());
        for (number, (part, &rows)) in parts.iter().zip(&heights).enumerate() {
            // The part of a row is its number divided by the parts' height, so only the last part may be shorter.
            let rows = if number + 1 == parts.len() { rows.min(usual) } else { usual };
            let view = View::whole(part.clone(), rows, ngrams.row_width());
            sources.push(vec![resolve(self.checkpoint, self.scheme, &view, false)?]);
        }
        let described = ngrams.part_tensor(usual);
        let choice = self.choice(kind, layer, &described, &sources);
        let chosen = choose(kind, &described, choice, &sources);
        self.note_widened(kind, layer, kind.name(), chosen);
        let group = self.group(kind, kind.name());
        for (part, (rows, sources)) in heights.into_iter().zip(sources).enumerate() {
            let TensorShape { name, layout, shape } = ngrams.part_tensor(rows);
            let described = TensorShape { name, layout, shape };
            let record = record(kind, layer, part as u32, &described, chosen.weight_type, 0)?;
            self.out.planned.push(PlannedExtent { kind, layer, index: part as u32, logical_len: record.len });
            self.out.records.push(record);
            let weight_type = chosen.weight_type;
            self.out.extents.push(vec![TensorPlan { group, name, weight_type, layout, shape, offset: 0, sources }]);
        }
        Ok(())
    }

    fn note_widened(&mut self, kind: ExtentKind, layer: u32, tensor: &str, chosen: Chosen) {
        if chosen.widened {
            let name = if layer == NO_LAYER { tensor.to_owned() } else { format!("layer {layer} {kind}.{tensor}") };
            self.out.widened.push(name);
        }
    }
}

/// A tensor of some extents, in the form in which it will be stored.
struct Part {
    tensor: TensorShape,
    chosen: Chosen,
    /// For each extent.
    sources: Vec<Vec<Selection>>,
}

impl Part {
    fn new(kind: ExtentKind, tensor: TensorShape, choice: TypeChoice, sources: Vec<Vec<Selection>>) -> Part {
        let chosen = choose(kind, &tensor, choice, &sources);
        let layout = layout_of(tensor.layout, chosen);
        Part { tensor: TensorShape { layout, ..tensor }, chosen, sources }
    }
}

/// The stored parts of a tensor: the tensor itself, or the separate matrices of a pair, if one description fits only one of them.
fn parts_of(kind: ExtentKind, tensor: &TensorShape, choice: TypeChoice, sources: Vec<Vec<Selection>>) -> Vec<Part> {
    let whole = Part::new(kind, tensor.clone(), choice, sources);
    let Some(halves) = tensor.apart().filter(|_| whole.chosen.widened) else { return vec![whole] };
    let of_half = |(which, half): (usize, TensorShape)| {
        let sources = whole.sources.iter().map(|s| s.get(which).map(|s| vec![s.clone()]));
        Some(Part::new(kind, half, choice, sources.collect::<Option<_>>()?))
    };
    let halves: Option<Vec<Part>> = halves.into_iter().enumerate().map(of_half).collect();
    match halves {
        Some(halves) if halves.iter().any(|half| !half.chosen.widened) => halves,
        _ => vec![whole],
    }
}

/// The arrangement of a tensor of this type.
fn layout_of(layout: Layout, chosen: Chosen) -> Layout {
    if chosen.ordered { layout.ordered().expect("what is row-major is not carried in order") } else { layout }
}

/// Rows of a part of the embedding: as many as fit, in whole row groups unless its elements are independent.
pub(crate) fn embedding_part_rows(ty: WeightType, cols: usize) -> Result<usize, ConvertError> {
    if let Some(element) = ty.plain_element_len() {
        return Ok((EMBEDDING_PART / (cols * element)).max(1));
    }
    let group = ty.row_group_len(cols).ok_or_else(|| too_large("embedding"))?;
    Ok((EMBEDDING_PART / group).max(1) * ROW_GROUP)
}

/// Rows of a part of the head: as many as fit, in whole scale blocks if there is room for one, otherwise in whole row groups.
pub(crate) fn head_part_rows(ty: WeightType, cols: usize) -> Result<usize, ConvertError> {
    let group = ty.row_group_len(cols).ok_or_else(|| too_large("head"))?;
    let rows = (HEAD_PART / group).max(1) * ROW_GROUP;
    Ok(if rows >= SCALE_BLOCK { rows - rows % SCALE_BLOCK } else { rows })
}

fn record(
    kind: ExtentKind,
    layer: u32,
    index: u32,
    tensor: &TensorShape,
    weight_type: WeightType,
    offset: u64,
) -> Result<TensorRecord, ConvertError> {
    let shape = tensor.shape.map(|d| d as u64);
    let (layout, name) = (tensor.layout, tensor.name.to_owned());
    let mut record = TensorRecord { kind, weight_type, layout, layer, index, shape, offset, len: 0, name };
    record.len = record.expected_len().ok_or_else(|| too_large(tensor.name))?;
    Ok(record)
}

fn too_large(tensor: &str) -> ConvertError {
    sluice_format::FormatError::Layout(format!("`{tensor}` is too large for this machine")).into()
}
