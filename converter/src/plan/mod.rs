//! The plan: which extent holds which tensor, as what, where, and from where. Nothing is written here.

mod arrangement;
pub(crate) mod build;
pub(crate) mod form;
mod harmless;
mod inventory;
mod naming;
mod prediction;
pub(crate) mod resolve;
pub(crate) mod scheme;
mod stored;
mod types;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;
use sluice_checksum::Xxh3;
use sluice_format::{
    ExtentKind, ExtentRecord, FORMAT_VERSION, FileLayout, Importance, Layout, Metadata, ModelSpec, PROVENANCE_BLOB,
    SOURCE_CONFIG_BLOB, SOURCE_DIGESTS_BLOB, SPEC_BLOB, TEXT_FILES, TensorRecord, WeightType,
};

use crate::encoding::Selection;
use crate::error::ConvertError;
use crate::family::{self, config::Config};
use crate::options::{Options, TypeChoice};
use crate::source::{self, CONFIG, Checkpoint, RowOrder, recognise, side_file};
use crate::steps;
use crate::striping::Destination;
use naming::Naming;
use prediction::Found;

/// Name and version of this converter, part of every file that it writes.
pub(crate) const CONVERTER: &str = concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"));

/// Room for the parts of tables whose length is only known at the end, in the estimate of the file's length.
const PROVENANCE_ROOM: u64 = 64 << 10;

/// The same, for each file of the checkpoint.
const FILE_ROOM: u64 = 512;

/// One tensor of an extent.
#[derive(Clone, Debug)]
pub(crate) struct TensorPlan {
    /// Number in [`Plan::groups`].
    pub(crate) group: usize,
    /// Canonical name.
    pub(crate) name: &'static str,
    pub(crate) weight_type: WeightType,
    pub(crate) layout: Layout,
    /// `[batch, rows, cols]`.
    pub(crate) shape: [usize; 3],
    /// Offset inside the extent.
    pub(crate) offset: u64,
    /// One source, or gate and up.
    pub(crate) sources: Vec<Selection>,
}

/// Tensors left out of the file, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// Why.
    pub reason: String,
    /// How many tensors.
    pub tensors: usize,
    /// Their bytes in the checkpoint.
    pub bytes: u64,
}

/// Extents of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KindSize {
    /// The kind's name.
    pub kind: String,
    /// How many extents.
    pub extents: usize,
    /// Their bytes in the file.
    pub bytes: u64,
}

/// Extents and bytes by kind, in file order; kinds that do not occur are left out.
pub(crate) fn kind_sizes(extents: &[ExtentRecord]) -> Vec<KindSize> {
    let size = |kind: ExtentKind| {
        let of_kind = extents.iter().filter(|e| e.kind == kind);
        let (extents, bytes) = of_kind.fold((0, 0), |(n, bytes), e| (n + 1, bytes + e.stored_len));
        KindSize { kind: kind.to_string(), extents, bytes }
    };
    ExtentKind::ALL.into_iter().map(size).filter(|s| s.extents > 0).collect()
}

/// What a conversion will do.
#[derive(Debug)]
pub struct Plan {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) spec: ModelSpec,
    pub(crate) options: Options,
    pub(crate) importance: Option<Importance>,
    /// How the layers are written to be executed, if the model is measured.
    pub(crate) reading: Option<build::Built>,
    pub(crate) layout: FileLayout,
    /// The tensors of each extent of the layout.
    pub(crate) extents: Vec<Vec<TensorPlan>>,
    pub(crate) records: Vec<TensorRecord>,
    /// Names for reports: the same tensor of all layers and experts, such as `expert.gate_up`.
    pub(crate) groups: Vec<String>,
    pub(crate) types: BTreeMap<String, Vec<String>>,
    pub(crate) widened: Vec<String>,
    pub(crate) left_out: Vec<LeftOut>,
    pub(crate) notes: Vec<String>,
    /// `config.json` and the side files, verbatim.
    pub(crate) blobs: Vec<(&'static str, Vec<u8>)>,
    pub(crate) hash: u128,
}

/// Plans the conversion of the checkpoint in `src` without writing anything.
///
/// # Errors
/// Everything that can be known beforehand: unsupported models and options, missing and unknown tensors, damaged headers.
pub fn plan(src: &Path, options: &Options) -> Result<Plan, ConvertError> {
    options.check()?;
    // Before any other file is missed: without this one, a folder is something else.
    if src.is_dir() && side_file(src, CONFIG)?.is_none() {
        let problem = recognise::no_config(src);
        return Err(ConvertError::NotACheckpoint { path: src.to_owned(), problem });
    }
    of_checkpoint(source::open(src)?, options)
}

/// Plans the conversion of a checkpoint whose files come from somewhere else than a folder, without writing anything. Headers
/// and the few tensors whose values decide something are read through the source.
///
/// # Errors
/// As [`plan`].
pub fn plan_source(source: Box<dyn source::Source>, options: &Options) -> Result<Plan, ConvertError> {
    options.check()?;
    of_checkpoint(source::open_source(source)?, options)
}

fn of_checkpoint(mut checkpoint: Checkpoint, options: &Options) -> Result<Plan, ConvertError> {
    let config_bytes = checkpoint.source().text_file(CONFIG)?.ok_or_else(|| {
        let problem = recognise::no_config(&checkpoint.dir);
        ConvertError::NotACheckpoint { path: checkpoint.dir.clone(), problem }
    })?;
    let config = Config::parse(&checkpoint.source().text_path(CONFIG), &config_bytes)?;
    let family = family::find(&config)?;
    let text = family::text(family, &config)?;
    let text = text.as_ref().unwrap_or(&config);
    let scheme = scheme::read(text, &config, &checkpoint)?;
    checkpoint.has_zero_points = scheme.asymmetric;
    let (mut spec, table_parts) = (family::spec(family, text)?, family.table_parts(text)?);
    let importance = options.importance.as_deref().map(|path| Importance::load(path, &spec)).transpose()?;
    let tied = inventory::Tied::read(text, &config, family.tied_by_default())?;
    let names = arrangement::names(&checkpoint, family, &spec)?;
    let found = match options.mtp {
        true => prediction::find(&checkpoint, family, names, &mut spec, tied)?,
        false => Found::None,
    };
    let (prediction, left_out) = match &found {
        Found::Layer(prediction) => (Some(&**prediction), None),
        Found::LeftOut(why) => (None, Some(why)),
        Found::None => (None, None),
    };
    let inventory = inventory::take(&checkpoint, Naming { family, names, spec: &spec, table_parts, prediction }, tied)?;
    let spec = family::complete(family, text, names, spec, table_parts, &stored::Tensors(&checkpoint))?;
    let naming = Naming { family, names, spec: &spec, table_parts, prediction };
    let built = build::build(&checkpoint, naming, options, scheme, &inventory.head)?;
    let layout = FileLayout::new(options.page_size, &built.planned)?;
    let weighted = built.records.iter().any(|r| r.weight_type.is_fitted());
    let measured = options.measured.is_some() && weighted && importance.is_none();
    // What predicts is not measured.
    let decoder = ModelSpec { prediction: None, ..spec.clone() };
    let naming = Naming { spec: &decoder, prediction: None, ..naming };
    let reading = measured.then(|| reading(&checkpoint, naming, options, scheme, &inventory.head)).transpose()?;
    let mut notes = inventory.notes;
    notes.extend(left_out.cloned());
    notes.extend(built.obstacles.iter().map(|why| {
        format!("weights are stored as f32, which takes much more space, because {why}. `--type q8` makes them small")
    }));
    notes.extend(options.recipe.iter().flat_map(|recipe| recipe.idle(&built.effects)));
    let mut blobs = vec![(SOURCE_CONFIG_BLOB, config_bytes)];
    for name in TEXT_FILES {
        blobs.extend(checkpoint.side_file(name)?.map(|bytes| (name, bytes)));
    }
    let types = built.types();
    let mut plan = Plan {
        checkpoint,
        spec,
        options: options.clone(),
        importance,
        reading,
        layout,
        extents: built.extents,
        records: built.records,
        types,
        groups: built.groups,
        widened: built.widened,
        left_out: inventory.left_out,
        notes,
        blobs,
        hash: 0,
    };
    plan.layout = plan.in_volumes(options)?;
    plan.hash = plan.digest();
    Ok(plan)
}

/// How the layers are written to be executed while the model is measured.
fn reading(
    checkpoint: &Checkpoint,
    naming: Naming<'_>,
    options: &Options,
    scheme: scheme::Scheme,
    head: &str,
) -> Result<build::Built, ConvertError> {
    let built = |expert_type, dense_type| {
        let options = Options { expert_type, dense_type, recipe: None, ..options.clone() };
        build::build(checkpoint, naming, &options, scheme, head)
    };
    let carried = built(TypeChoice::Keep, TypeChoice::Keep)?;
    // Products with integers take half the time of those with floats, and tell the same.
    match [true, false].map(|experts| integers(&carried.records, experts)) {
        [TypeChoice::Keep, TypeChoice::Keep] => Ok(carried),
        [experts, others] => built(experts, others),
    }
}

/// The choice of types that has integers for the matrices of experts, or for all others: as they are carried, if these are integers.
fn integers(carried: &[TensorRecord], experts: bool) -> TypeChoice {
    let looked_up = |kind| matches!(kind, ExtentKind::Router | ExtentKind::Table);
    let mut matrices = carried.iter().filter(|r| r.layout != Layout::Plain && !looked_up(r.kind));
    let floats = matrices.any(|r| (r.kind == ExtentKind::Expert) == experts && !r.weight_type.is_blocked());
    if floats { TypeChoice::Type(WeightType::Q8) } else { TypeChoice::Keep }
}

impl Plan {
    /// Where the model goes, if it is called `path`.
    pub(crate) fn destination<'a>(&'a self, path: &'a Path) -> Destination<'a> {
        Destination::new(path, self.options.striping.as_ref())
    }

    /// The layout in the volumes that are asked for.
    fn in_volumes(&self, options: &Options) -> Result<FileLayout, ConvertError> {
        let layout = self.layout.clone();
        if let Some(striping) = &options.striping {
            return Ok(layout.stripe(striping.shares().clone())?);
        }
        let Some(most) = options.split_size else { return Ok(layout) };
        let tail = self.tail_bytes().next_multiple_of(u64::from(options.page_size));
        Ok(layout.split(most, tail)?)
    }

    /// What the model computes.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Bytes of all extents.
    pub fn extent_bytes(&self) -> u64 {
        self.layout.extent_bytes()
    }

    /// Length of the finished file, or of all volumes together, a few KiB too much at most; before compression.
    pub fn file_bytes(&self) -> u64 {
        let volumes = self.layout.ends().len() as u64;
        self.layout.ends().iter().sum::<u64>()
            + self.tail_bytes()
            + (volumes - 1) * self.layout.table_bytes(self.records.len())
    }

    /// Bytes of tables and metadata, a few KiB too much at most.
    pub(crate) fn tail_bytes(&self) -> u64 {
        let page = u64::from(self.layout.page_size());
        let blobs: u64 = self.blobs.iter().map(|(_, b)| b.len() as u64).sum();
        let provenance = PROVENANCE_ROOM + FILE_ROOM * self.checkpoint.files().len() as u64;
        let digests = (self.checkpoint.parts.len() * size_of::<u128>()) as u64;
        let metadata = blobs + self.spec.to_json().len() as u64 + provenance + digests;
        // A frame of what cannot be compressed is longer by less than a page for a megabyte.
        metadata.next_multiple_of(page) + metadata / 256 + page + self.layout.table_bytes(self.records.len())
    }

    /// The extents of the file; their checksums are 0.
    pub fn extents(&self) -> &[ExtentRecord] {
        self.layout.extents()
    }

    /// Types of the matrices in extents of these kinds.
    pub fn weight_types(&self, kinds: &[ExtentKind]) -> BTreeSet<WeightType> {
        let matrices = self.records.iter().filter(|r| kinds.contains(&r.kind) && r.layout != Layout::Plain);
        matrices.map(|r| r.weight_type).collect()
    }

    /// Bytes of all files of the checkpoint.
    pub fn source_bytes(&self) -> u64 {
        self.checkpoint.files().iter().map(|f| f.len).sum()
    }

    /// Extents and bytes by kind, in file order; kinds that do not occur are left out.
    pub fn sizes(&self) -> Vec<KindSize> {
        kind_sizes(self.layout.extents())
    }

    /// Types by tensor group, such as `expert.gate_up`: more than one where layers differ.
    pub fn types(&self) -> &BTreeMap<String, Vec<String>> {
        &self.types
    }

    /// Tensors that could not be carried as they are and are stored as f32 instead, which holds the same values.
    pub fn widened(&self) -> &[String] {
        &self.widened
    }

    /// Tensors of the checkpoint that the file will not hold.
    pub fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }

    /// The bytes of a file of the checkpoint that the model file will hold too, such as `tokenizer.json`, by its name.
    pub fn side_file(&self, name: &str) -> Option<&[u8]> {
        self.blobs.iter().find(|(blob, _)| *blob == name).map(|(_, bytes)| bytes.as_slice())
    }

    /// Whether what meets the matrices is measured on the way.
    pub fn is_measured(&self) -> bool {
        self.reading.is_some()
    }

    /// Most bytes of temporary files beside the model file, if measuring keeps so many bytes from layer to layer ([`measure::Measure`]).
    ///
    /// [`measure::Measure`]: crate::measure::Measure
    pub fn measuring_bytes(&self, kept: u64) -> u64 {
        let Some(reading) = &self.reading else { return 0 };
        let page = u64::from(self.options.page_size);
        let mut layers = vec![0u64; self.spec.layers.len()];
        for extent in &reading.planned {
            let bytes = extent.logical_len.next_multiple_of(page);
            let of = layers.iter_mut().enumerate();
            of.filter(|(layer, _)| crate::layer_file::reads(self, *layer, extent.kind, extent.layer))
                .for_each(|(_, sum)| *sum += bytes);
        }
        let tables = self.tail_bytes();
        // What is kept lies there twice while it is replaced.
        layers.into_iter().max().map_or(0, |layer| layer + tables) + 2 * kept.next_multiple_of(page)
    }

    /// Remarks for the user.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// When a conversion from its beginning reads each file of the source: what a source that is fetched will be told.
    pub fn file_uses(&self) -> Vec<source::FileUse> {
        let all = |_| true;
        let steps =
            if self.is_measured() { steps::measured(self, None, &all, &all) } else { steps::of(self, &all, &all) };
        steps::uses(self, &steps)
    }

    /// Numbers of the source's files that an extent is made of.
    pub(crate) fn files_of(&self, extent: usize) -> BTreeSet<usize> {
        let tensors = self.extents[extent].iter().flat_map(|t| &t.sources).flat_map(Selection::tensors);
        tensors.map(|tensor| self.checkpoint.tensors[tensor].file).collect()
    }

    /// Most tensors in one extent.
    pub(crate) fn tensors_per_extent(&self) -> usize {
        self.extents.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// The blobs of the file.
    pub(crate) fn metadata(&self, provenance: Vec<u8>, source_digests: &[u128]) -> Metadata {
        let mut metadata = Metadata::default();
        metadata.insert(SPEC_BLOB, self.spec.to_json());
        metadata.insert(PROVENANCE_BLOB, provenance);
        metadata.insert(SOURCE_DIGESTS_BLOB, source_digests.iter().flat_map(|d| d.to_le_bytes()).collect());
        for (name, blob) in &self.blobs {
            metadata.insert(name, blob.clone());
        }
        metadata
    }

    /// What a resumed conversion must share with the one that was interrupted: everything that the extents of the file depend on but
    /// the bytes of the weights. `tokens`: those that are measured, if any are, whatever tokenizer has made them of whichever text.
    pub(crate) fn hash_with(&self, tokens: Option<&[u32]>) -> u128 {
        let Some(tokens) = tokens else { return self.hash };
        let mut hash = Xxh3::new();
        hash.update(&self.hash.to_le_bytes());
        tokens.iter().for_each(|token| hash.update(&token.to_le_bytes()));
        hash.digest128()
    }

    /// A hash of everything that the plan decides.
    fn digest(&self) -> u128 {
        let mut hash = Xxh3::new();
        let mut add = |bytes: &[u8]| {
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        add(CONVERTER.as_bytes());
        add(&self.options.page_size.to_le_bytes());
        add(self.options.expert_type.to_string().as_bytes());
        add(self.options.dense_type.to_string().as_bytes());
        if let Some(recipe) = &self.options.recipe {
            recipe.lines().iter().for_each(|line| add(line.as_bytes()));
        }
        add(&[u8::from(self.options.compress)]);
        add(&self.options.split_size.unwrap_or(u64::MAX).to_le_bytes());
        if let Some(striping) = &self.options.striping {
            striping.shares().shares().iter().for_each(|share| add(&share.to_le_bytes()));
            striping.folders().iter().for_each(|folder| add(folder.as_os_str().as_encoded_bytes()));
        }
        add(&self.importance.as_ref().map_or(0, Importance::digest).to_le_bytes());
        if let (Some(_), Some(measured)) = (&self.reading, self.options.measured) {
            add(&measured.to_le_bytes());
        }
        for (f, header) in self.checkpoint.files().iter().zip(&self.checkpoint.header_digests) {
            add(f.name.as_bytes());
            add(&f.len.to_le_bytes());
            add(&header.to_le_bytes());
        }
        // Which file a tensor is read from: an index that is mended can name another one that holds its name too.
        for t in &self.checkpoint.tensors {
            add(t.name.as_bytes());
            add(&(t.file as u64).to_le_bytes());
            add(&t.start.to_le_bytes());
            if t.order != RowOrder::AsStored {
                add(format!("{:?}", t.order).as_bytes());
            }
            if let Some(bytes) = &t.derived {
                add(bytes);
            }
        }
        // What it says of the weights, such as their quantisation, is not all in what follows. The other files are only carried.
        add(self.side_file(SOURCE_CONFIG_BLOB).unwrap_or_default());
        add(&self.spec.to_json());
        self.layout.extents().iter().for_each(|e| add(&e.to_bytes(FORMAT_VERSION)));
        self.records.iter().for_each(|r| add(&r.to_bytes()));
        // What is read for each tensor: the same files can be understood in another way, by another configuration or version.
        for source in self.extents.iter().flatten().flat_map(|tensor| &tensor.sources) {
            add(self.checkpoint.tensors[source.tensor].name.as_bytes());
            add(format!("{:?}", (&source.encoding, source.strides, source.plus_one)).as_bytes());
        }
        hash.digest128()
    }
}
