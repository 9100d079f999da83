//! Places and sizes of everything in a model file, computed from the spec and the types alone.

use std::ops::Range;

use sluice_format::{
    ANY_INDEX, ExtentKind, ExtentRecord, FileLayout, FormatError, ModelSpec, NO_LAYER, NgramSpec, PlannedExtent,
    TensorRecord, TensorShape, WeightType, pack_tensors,
};

use super::values::TYPES;
use crate::error::ConvertError;
use crate::plan::build::{embedding_part_rows, head_part_rows};

/// Bytes of the rows in a part of a table, about as in a release.
const TABLE_PART: u64 = 192 << 20;

/// Types of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightTypes {
    /// For the routed experts.
    pub experts: WeightType,
    /// For all other matrices. Router and embedding are bf16, or f32 if this is; norms and biases are f32.
    pub dense: WeightType,
}

impl WeightTypes {
    /// The type with this name, if it can be requested.
    pub fn parse(name: &str) -> Result<WeightType, String> {
        TYPES.into_iter().find(|t| t.name() == name).ok_or_else(|| {
            let names: Vec<_> = TYPES.iter().map(|t| t.name()).collect();
            format!("unknown type `{name}`: use one of {}", names.join(", "))
        })
    }

    /// The same by kind of contents.
    pub fn by_kind(self) -> KindTypes {
        let plain = if self.dense == WeightType::F32 { WeightType::F32 } else { WeightType::Bf16 };
        KindTypes { experts: self.experts, dense: self.dense, head: self.dense, plain }
    }
}

/// Types by kind of contents, as a conversion may carry them from a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KindTypes {
    /// For the routed experts.
    pub experts: WeightType,
    /// For attention, shared experts and dense feed-forward networks.
    pub dense: WeightType,
    /// For the output head.
    pub head: WeightType,
    /// For routers and the embedding: f32, f16 or bf16.
    pub plain: WeightType,
}

impl KindTypes {
    fn of(self, kind: ExtentKind) -> WeightType {
        match kind {
            ExtentKind::Expert => self.experts,
            ExtentKind::Embedding | ExtentKind::Router | ExtentKind::Table => self.plain,
            ExtentKind::Head => self.head,
            _ => self.dense,
        }
    }
}

/// The extents of a file and their contents, placed as in a conversion to these types.
#[derive(Clone, Debug)]
pub struct Layout {
    pub(super) file: FileLayout,
    pub(super) records: Vec<TensorRecord>,
    /// The records of each extent.
    pub(super) tensors: Vec<Range<usize>>,
}

impl Layout {
    /// Lays out a file.
    ///
    /// # Errors
    /// [`ConvertError::Options`] for a type in which weights cannot be made; [`ConvertError::Format`] for a page size that the
    /// format does not allow, or a model that it cannot hold.
    pub fn new(spec: &ModelSpec, types: WeightTypes, page_size: u32) -> Result<Self, ConvertError> {
        for ty in [types.experts, types.dense] {
            WeightTypes::parse(ty.name()).map_err(ConvertError::Options)?;
        }
        Self::by_kind(spec, types.by_kind(), page_size)
    }

    /// Lays out a file with types in which weights can be carried, even if they cannot be made.
    ///
    /// # Errors
    /// [`ConvertError::Format`] as [`Layout::new`].
    pub fn by_kind(spec: &ModelSpec, types: KindTypes, page_size: u32) -> Result<Self, ConvertError> {
        let mut b = Builder { spec, types, planned: Vec::new(), records: Vec::new(), tensors: Vec::new() };
        b.extents(ExtentKind::FinalNorm, NO_LAYER, usize::MAX)?;
        b.parts(ExtentKind::Embedding)?;
        b.parts(ExtentKind::Head)?;
        for layer in 0..spec.layers.len() {
            for kind in [ExtentKind::Attention, ExtentKind::Router, ExtentKind::Dense] {
                b.extents(kind, layer as u32, layer)?;
            }
        }
        for layer in 0..spec.layers.len() {
            b.extents(ExtentKind::Expert, layer as u32, layer)?;
        }
        for ngrams in &spec.ngrams {
            b.table(ngrams)?;
        }
        let file = FileLayout::new(page_size, &b.planned)?;
        file.check(&b.records, spec)?;
        Ok(Layout { file, records: b.records, tensors: b.tensors })
    }

    /// The extents with their places; their checksums are 0.
    pub fn extents(&self) -> &[ExtentRecord] {
        self.file.extents()
    }

    /// Number of elements in the tensors of all extents of these kinds.
    pub(super) fn weights(&self, wanted: &dyn Fn(ExtentKind) -> bool) -> u64 {
        let extents = self.extents().iter().zip(&self.tensors).filter(|(extent, _)| wanted(extent.kind));
        extents.flat_map(|(_, tensors)| &self.records[tensors.clone()]).map(TensorRecord::weights).sum()
    }

    /// Bytes of all extents.
    pub fn extent_bytes(&self) -> u64 {
        self.file.extent_bytes()
    }

    /// Length of the file with `metadata_bytes` of metadata.
    pub fn file_bytes(&self, metadata_bytes: usize) -> u64 {
        let metadata = metadata_bytes.next_multiple_of(self.file.page_size() as usize) as u64;
        self.file.ends().iter().sum::<u64>() + self.file.table_bytes(self.records.len()) + metadata
    }
}

struct Builder<'a> {
    spec: &'a ModelSpec,
    types: KindTypes,
    planned: Vec<PlannedExtent>,
    records: Vec<TensorRecord>,
    tensors: Vec<Range<usize>>,
}

impl Builder<'_> {
    fn record(&self, kind: ExtentKind, layer: u32, index: u32, tensor: TensorShape) -> TensorRecord {
        let vector = tensor.layout == sluice_format::Layout::Plain && kind != ExtentKind::Embedding;
        TensorRecord {
            kind,
            weight_type: if vector || tensor.joins_streams() { WeightType::F32 } else { self.types.of(kind) },
            layout: tensor.layout,
            layer,
            index,
            shape: tensor.shape.map(|d| d as u64),
            offset: 0,
            len: 0,
            name: tensor.name.to_owned(),
        }
    }

    /// All extents of a kind in a layer, with equal tensors.
    fn extents(&mut self, kind: ExtentKind, layer: u32, spec_layer: usize) -> Result<(), ConvertError> {
        let count = self.spec.extent_count(kind, spec_layer);
        if count == 0 {
            return Ok(());
        }
        let index = if kind == ExtentKind::Expert { ANY_INDEX } else { 0 };
        let tensors = self.spec.tensors(kind, spec_layer);
        let records = tensors.into_iter().map(|t| self.record(kind, layer, index, t)).collect();
        let (range, logical_len) = self.add(records)?;
        for index in 0..count as u32 {
            self.planned.push(PlannedExtent { kind, layer, index, logical_len });
            self.tensors.push(range.clone());
        }
        Ok(())
    }

    /// Embedding or head, in parts.
    fn parts(&mut self, kind: ExtentKind) -> Result<(), ConvertError> {
        let (vocab, hidden) = (self.spec.vocab_size, self.spec.hidden_size);
        let ty = self.types.of(kind);
        let height =
            if kind == ExtentKind::Embedding { embedding_part_rows(ty, hidden)? } else { head_part_rows(ty, hidden)? };
        for (part, first) in (0..vocab).step_by(height).enumerate() {
            let Some(tensor) = self.spec.part_tensor(kind, height.min(vocab - first), ty) else { return Ok(()) };
            let index = part as u32;
            let (range, logical_len) = self.add(vec![self.record(kind, NO_LAYER, index, tensor)])?;
            self.planned.push(PlannedExtent { kind, layer: NO_LAYER, index, logical_len });
            self.tensors.push(range);
        }
        Ok(())
    }

    /// The table of n-grams of a layer, in parts.
    fn table(&mut self, ngrams: &NgramSpec) -> Result<(), ConvertError> {
        let kind = ExtentKind::Table;
        let row = self.types.of(kind).plain_element_len().unwrap_or(1) * ngrams.row_width();
        let height = (TABLE_PART / row as u64).max(1);
        for part in 0..ngrams.table_rows.div_ceil(height) {
            let rows = height.min(ngrams.table_rows - part * height) as usize;
            let (layer, index) = (ngrams.layer as u32, part as u32);
            let (range, logical_len) = self.add(vec![self.record(kind, layer, index, ngrams.part_tensor(rows))])?;
            self.planned.push(PlannedExtent { kind, layer, index, logical_len });
            self.tensors.push(range);
        }
        Ok(())
    }

    /// Packs the tensors of an extent; returns their records and the extent's logical length.
    fn add(&mut self, mut records: Vec<TensorRecord>) -> Result<(Range<usize>, u64), ConvertError> {
        let len = pack_tensors(&mut records).map_err(FormatError::Layout)?;
        let first = self.records.len();
        self.records.extend(records);
        Ok((first..self.records.len(), len))
    }
}
