//! `sluice inspect`: the contents and the needs of a model file.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use clap::value_parser;
use serde::Serialize;
use serde_json::Value;
use sluice_format::{ExtentKind, ModelFile, PROVENANCE_BLOB, TOKENIZER_BLOB};
use sluice_model::KvType;
use sluice_model::Sequence;
use sluice_model::memory::{Bytes, Demand, MemoryPlan};
use sluice_text::ChatTemplate;

use crate::engine_args::kv_type_parser;
use crate::error::CliError;
use crate::terminal::{counted, each, note, print, print_json};

const EXAMPLES: &str = "\
Reads the tables, not the weights: an instant even for a file of a terabyte.

Examples:
  sluice inspect r1.sluice
  sluice inspect r1.sluice --context 16384
  sluice inspect r1.sluice --extents | less
  sluice inspect r1.sluice --json | jq .token_cycle_bytes";

/// Show what a model file holds: sizes, types, bytes per token, least memory
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model file, its name in the folder of models, or hf:NAME
    pub(crate) file: PathBuf,

    /// List every extent
    #[arg(long)]
    extents: bool,

    /// Context, in tokens, for the memory figures [default: 4096, or the model's limit]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    context: Option<u32>,

    /// Type of keys and values, for the memory figures
    #[arg(long, value_name = "TYPE", default_value_t, value_parser = kv_type_parser())]
    kv_type: KvType,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The report. All sizes in bytes.
#[derive(Debug, Serialize)]
struct Report {
    file: String,
    family: String,
    model_id: String,
    /// Identifies weights, specification and tokenizer.
    state_id: String,
    format_version: u32,
    page_size: u32,
    /// The files, if there are several.
    volumes: Vec<String>,
    /// If extents are striped over them: the part of the experts' bytes that lies in each.
    #[serde(skip_serializing_if = "Option::is_none")]
    expert_shares: Option<Vec<f64>>,
    /// And the fewest volumes that have a part of an expert, and the most.
    #[serde(skip_serializing_if = "Option::is_none")]
    volumes_per_expert: Option<(usize, usize)>,
    /// Of all of them.
    file_bytes: u64,
    compressed_extents: usize,
    /// Total of all extents, as they are in the files, and as they would be without compression.
    stored_bytes: u64,
    bytes_before_compression: u64,
    layers: usize,
    moe_layers: usize,
    hidden_size: usize,
    vocab_size: usize,
    max_positions: usize,
    /// Number in the largest layer.
    experts_per_layer: usize,
    top_k: usize,
    expert_count: usize,
    /// Size of the largest expert.
    expert_bytes: u64,
    /// And of the smallest: layers can have experts of different types.
    smallest_expert_bytes: u64,
    /// Experts that one token routes to, over all layers.
    experts_per_token: usize,
    /// Their size: what a token reads if none is in memory.
    token_cycle_bytes: u64,
    /// Size of all extents of the layer for multi-token prediction, if there is one. Only the sizes of the file and by kind include
    /// it.
    #[serde(skip_serializing_if = "Option::is_none")]
    prediction_bytes: Option<u64>,
    kinds: Vec<Kind>,
    /// Least budget for `context` tokens.
    least_budget: u64,
    context: usize,
    /// Keys, values and states of `context` tokens, and how keys and values are kept.
    kv_cache_bytes: u64,
    kv_type: &'static str,
    has_tokenizer: bool,
    has_chat_template: bool,
    /// Why the existing chat template cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    broken_chat_template: Option<String>,
    provenance: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extents: Option<Vec<Extent>>,
}

/// All extents of a kind.
#[derive(Debug, Serialize)]
struct Kind {
    kind: &'static str,
    extents: usize,
    bytes: u64,
    /// Bytes of tensors by type; norms and biases are f32.
    types: BTreeMap<&'static str, u64>,
}

#[derive(Debug, Serialize)]
struct Extent {
    name: String,
    kind: &'static str,
    /// The number of its file, counted from 0.
    volume: u16,
    codec: &'static str,
    offset: u64,
    stored_bytes: u64,
    logical_bytes: u64,
    /// Of the stored bytes; of an extent with several stripes, of the bytes in memory.
    checksum: String,
    /// If it has several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stripes: Vec<StripePlace>,
}

/// A part of an extent in one of the files.
#[derive(Debug, Serialize)]
struct StripePlace {
    volume: u16,
    offset: u64,
    stored_bytes: u64,
    checksum: String,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let file = ModelFile::open(&args.file)?;
    let report = examine(args, &file);
    if args.json { print_json(&report) } else { print(&describe(&report)) }
}

fn examine(args: &Args, file: &ModelFile) -> Report {
    let spec = file.spec();
    let superblock = file.superblock();
    let moe: Vec<_> = spec.layers.iter().filter_map(|l| l.ffn.moe.as_ref()).collect();
    let context = (args.context.unwrap_or(4096) as usize).clamp(1, spec.max_positions.max(1));
    if args.context.is_some_and(|asked| asked as usize > context) {
        note(&format_args!("note: this is for {context} tokens of context, the most that the model takes"));
    }
    let experts = || file.extents().iter().filter(|e| e.kind == ExtentKind::Expert && spec.decodes(e));
    let expert_sizes = || experts().map(|e| e.padded_len);
    let template = ChatTemplate::find(|name| file.metadata().get(name));
    let provenance = file.metadata().get(PROVENANCE_BLOB).and_then(|b| serde_json::from_slice(b).ok());
    Report {
        file: args.file.display().to_string(),
        family: spec.family.clone(),
        model_id: superblock.model_id.to_string(),
        state_id: file.state_id().to_string(),
        format_version: superblock.version,
        page_size: superblock.page_size,
        volumes: file.volumes().iter().map(|volume| volume.path().display().to_string()).collect(),
        expert_shares: file.is_striped().then(|| file.expert_shares()),
        volumes_per_expert: file.volumes_per_expert().filter(|_| file.is_striped()),
        file_bytes: file.file_bytes(),
        compressed_extents: file.compressed_extents(),
        bytes_before_compression: file.extents().iter().map(|e| e.padded_len).sum(),
        stored_bytes: file.extent_bytes(),
        layers: spec.layers.len(),
        moe_layers: moe.len(),
        hidden_size: spec.hidden_size,
        vocab_size: spec.vocab_size,
        max_positions: spec.max_positions,
        experts_per_layer: moe.iter().map(|m| m.experts).max().unwrap_or(0),
        top_k: moe.iter().map(|m| m.top_k).max().unwrap_or(0),
        expert_count: moe.iter().map(|m| m.experts).sum(),
        expert_bytes: expert_sizes().max().unwrap_or(0),
        smallest_expert_bytes: expert_sizes().min().unwrap_or(0),
        experts_per_token: spec.routed_per_token(),
        token_cycle_bytes: file.token_cycle_bytes(),
        prediction_bytes: prediction_bytes(file),
        kinds: kinds(file),
        least_budget: least_budget(file, context, args.kv_type),
        context,
        kv_cache_bytes: Sequence::memory(spec, context, args.kv_type),
        kv_type: args.kv_type.name(),
        has_tokenizer: [TOKENIZER_BLOB, "tiktoken.model"].iter().any(|name| file.metadata().get(name).is_some()),
        has_chat_template: matches!(&template, Ok(Some(_))),
        broken_chat_template: template.err().map(|problem| problem.to_string()),
        provenance,
        extents: args.extents.then(|| extents(file)),
    }
}

/// The smallest budget with which the model can be opened: the error for a budget of zero names it.
fn least_budget(file: &ModelFile, context: usize, kv_type: KvType) -> u64 {
    MemoryPlan::new(file, Some(0), Demand::one(context, kv_type))
        .map_or_else(|refused| refused.least, |plan| plan.effective)
}

fn prediction_bytes(file: &ModelFile) -> Option<u64> {
    let spec = file.spec();
    spec.prediction.as_ref()?;
    Some(file.extents().iter().filter(|extent| !spec.decodes(extent)).map(|extent| extent.stored_len).sum())
}

fn kinds(file: &ModelFile) -> Vec<Kind> {
    let kind = |size: sluice_format::KindSize| Kind {
        kind: size.kind.name(),
        extents: size.extents,
        bytes: size.bytes,
        types: file.weight_types(size.kind).into_iter().map(|t| (t.weight_type.name(), t.bytes)).collect(),
    };
    file.bytes_by_kind().into_iter().map(kind).collect()
}

fn extents(file: &ModelFile) -> Vec<Extent> {
    let place = |s: &sluice_format::Stripe| StripePlace {
        volume: s.volume,
        offset: s.offset,
        stored_bytes: s.len,
        checksum: format!("{:016x}", s.checksum),
    };
    let one = |e: &sluice_format::ExtentRecord| Extent {
        name: e.name(),
        kind: e.kind.name(),
        volume: e.volume,
        codec: e.codec.name(),
        offset: e.offset,
        stored_bytes: e.stored_len,
        logical_bytes: e.logical_len,
        checksum: format!("{:016x}", if file.stripes(e).len() > 1 { e.logical_checksum } else { e.checksum }),
        stripes: if file.stripes(e).len() > 1 { file.stripes(e).iter().map(place).collect() } else { Vec::new() },
    };
    file.extents().iter().map(one).collect()
}

/// Names of the types, by descending bytes; small parts (norms, biases) are left out.
fn types(bytes: &BTreeMap<&'static str, u64>) -> String {
    let all: u64 = bytes.values().sum();
    let mut large: Vec<_> = bytes.iter().filter(|&(_, &b)| b * 50 >= all).collect();
    large.sort_by_key(|&(_, &b)| std::cmp::Reverse(b));
    large.into_iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

/// Every extent, one line each.
fn list(out: &mut String, extents: &[Extent]) {
    let _ = writeln!(out, "\n{:<24} {:>16} {:>14} {:>14}  checksum (xxh3-64)", "extent", "offset", "stored", "used");
    for e in extents {
        let (name, offset) = (&e.name, e.offset);
        let _ = writeln!(out, "{name:<24} {offset:>16} {:>14} {:>14}  {}", e.stored_bytes, e.logical_bytes, e.checksum);
        for s in &e.stripes {
            let name = format!("  in volume {}", s.volume + 1);
            let _ = writeln!(out, "{name:<24} {:>16} {:>14} {:>14}  {}", s.offset, s.stored_bytes, "", s.checksum);
        }
    }
}

/// Lines about experts.
fn experts(r: &Report) -> Vec<(&'static str, String)> {
    if r.moe_layers == 0 {
        return vec![("experts", "none: every token reads what does not fit in memory".into())];
    }
    let (layer, token) = (r.experts_per_layer, r.top_k);
    let each = each(Bytes(r.smallest_expert_bytes).to_string(), Bytes(r.expert_bytes).to_string());
    let (cycle, all) = (Bytes(r.token_cycle_bytes), r.experts_per_token);
    vec![
        ("experts", format!("{layer} in each of those layers, {token} per token; {each}")),
        (
            "token cycle",
            format!("{cycle}: the {} of one token, read from the drive when none is in memory", counted(all, "expert")),
        ),
    ]
}

/// Which volumes a read of an expert uses, where that is not all: between `least` and `most` of `all`.
fn uses_of_few(least: usize, most: usize, all: usize, page_size: u32) -> String {
    let number = if least == most { least.to_string() } else { format!("{least} to {most}") };
    format!(
        "a read of an expert uses {number} of {all} volumes, because experts are divided in whole pages of {page_size} bytes and have too \
         few for their shares"
    )
}

/// For people.
fn describe(r: &Report) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(out, "{name:<13} {value}");
    };
    let volumes = if r.volumes.len() > 1 { format!(" in {} volumes", r.volumes.len()) } else { String::new() };
    let (size, version) = (Bytes(r.file_bytes), r.format_version);
    line("file", format!("{}, {size}{volumes} in pages of {} bytes, format version {version}", r.file, r.page_size));
    if let Some(shares) = &r.expert_shares {
        let parts: Vec<String> = shares.iter().map(|share| format!("{:.1} %", 100.0 * share)).collect();
        let uses = match r.volumes_per_expert {
            Some((least, most)) if least < shares.len() => uses_of_few(least, most, shares.len(), r.page_size),
            _ => "each read uses all volumes".into(),
        };
        line("striped", format!("{uses}; of the experts they have {}", parts.join(", ")));
        for path in &r.volumes {
            line("  volume", path.clone());
        }
    }
    if r.compressed_extents > 0 {
        let part = 100.0 * r.stored_bytes as f64 / r.bytes_before_compression.max(1) as f64;
        line(
            "compression",
            format!("{}; all take {part:.1} % of what they would without", counted(r.compressed_extents, "extent")),
        );
    }
    line("model", format!("{}, id {}", r.family, r.model_id));
    let with_experts = match r.moe_layers {
        0 => "none with experts".to_owned(),
        n => format!("of which {n} with experts"),
    };
    line(
        "layers",
        format!(
            "{}, {with_experts}; hidden {}, vocabulary {}, up to {} tokens",
            r.layers, r.hidden_size, r.vocab_size, r.max_positions
        ),
    );
    experts(r).into_iter().for_each(|(name, value)| line(name, value));
    if let Some(bytes) = r.prediction_bytes {
        line(
            "prediction",
            format!("a layer for multi-token prediction, {}; not in memory unless it is used", Bytes(bytes)),
        );
    }
    let tokens = r.context;
    line("least budget", format!("{} for a context of {tokens} tokens", Bytes::at_least(r.least_budget)));
    line("of which", format!("{} for their keys and values in {}", Bytes(r.kv_cache_bytes), r.kv_type));
    line("tokenizer", if r.has_tokenizer { "yes".into() } else { "none: token ids only".into() });
    line(
        "chat template",
        match (&r.broken_chat_template, r.has_chat_template) {
            (Some(problem), _) => format!("none that works: {problem}"),
            (None, true) => "yes".into(),
            (None, false) => "none".into(),
        },
    );
    let _ = writeln!(out, "\n{:<12} {:>8} {:>12}  types", "part", "extents", "size");
    for kind in &r.kinds {
        let types = types(&kind.types);
        let _ = writeln!(out, "{:<12} {:>8} {:>12}  {types}", kind.kind, kind.extents, Bytes(kind.bytes).to_string());
    }
    if let Some(extents) = &r.extents {
        list(&mut out, extents);
    }
    out
}
