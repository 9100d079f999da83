//! `sluice synth`: a model file with random weights in the geometry of a real model.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::value_parser;
use sluice_converter::synth::{Geometry, SynthOptions, SynthSummary, TYPES, WeightTypes, synth};
use sluice_format::WeightType;
use sluice_model::memory::Bytes;

use super::convert::{Bar, explain};
use crate::error::CliError;
use crate::progress::byte_bar;
use crate::terminal::{print, print_json, seconds};

const EXAMPLES: &str = "\
GEOMETRY is the name of a published model (deepseek-r1, kimi-k2, glm-5, qwen3-30b, gpt-oss-120b, minimax-m3, llama-4-scout and so on; the \
error for an unknown name lists them all), bench-34x128 (34 layers of 128 experts of 2.65 MB, 12 GB in all), or a config.json or the \
folder with one.

The weights are random and say nothing, but everything is as large as in the real model and takes as long, so that a \
machine can be measured before the download. There is no tokenizer: give ids.

Examples:
  sluice synth qwen3-30b q30.sluice
  sluice synth deepseek-r1 r1-8.sluice --layers 8
  sluice synth bench-34x128 bench.sluice
  sluice run bench.sluice --prompt-ids 1,2,3 --ids --profile
  sluice synth deepseek-r1 r1-holes.sluice --sparse
  sluice synth deepseek-r1 r1-shape.sluice --no-experts
  sluice bench decode r1-shape.sluice --drive 7GB/s --budget 24GiB";

/// Write a model file with random weights in the geometry of a real model, to measure a machine
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A known model, or a config.json
    geometry: String,

    /// Model file to write
    dst: PathBuf,

    /// Only this many layers, the first ones
    #[arg(long, value_name = "N")]
    layers: Option<usize>,

    /// Type of the routed experts [default: int4; for gpt-oss mxfp4]
    #[arg(long = "type", value_name = "TYPE", value_parser = type_parser())]
    expert_type: Option<WeightType>,

    /// Type of everything else; routers and the embedding stay bf16, or f32
    #[arg(long, value_name = "TYPE", default_value = "q8", value_parser = type_parser())]
    dense_type: WeightType,

    /// How much routing repeats itself from token to token: 0 as little as chance, 1 like a real model
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    skew: f32,

    /// Seed of the random numbers: the same seed makes the same file
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = value_parser!(u64))]
    seed: u64,

    /// Holes instead of weights: takes almost no space, and all weights are zero
    #[arg(long)]
    sparse: bool,

    /// Holes instead of experts, to measure a large model on a small disk with `bench decode --drive`; no other command can run it
    #[arg(long, conflicts_with = "sparse")]
    no_experts: bool,

    /// Replace the model file if it exists, once the new one is complete
    #[arg(long)]
    overwrite: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Names of the types in which weights can be made.
pub(super) fn type_parser() -> impl TypedValueParser<Value = WeightType> {
    PossibleValuesParser::new(TYPES.map(WeightType::name)).try_map(|name| WeightTypes::parse(&name))
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let config = Path::new(&args.geometry).join("config.json");
    CliError::refuse_inputs(&args.dst, &[args.geometry.as_ref(), &config])?;
    let geometry = Geometry::load(&args.geometry, args.layers)?;
    let experts = args.expert_type.unwrap_or_else(|| geometry.usual_expert_type());
    let options = SynthOptions {
        skew: args.skew,
        seed: args.seed,
        sparse: args.sparse,
        no_experts: args.no_experts,
        overwrite: args.overwrite,
        ..SynthOptions::new(WeightTypes { experts, dense: args.dense_type })
    };
    let started = Instant::now();
    let bar = Bar(byte_bar("writing", 0));
    let outcome = synth(&geometry, &args.dst, &options, &bar);
    bar.0.finish_and_clear();
    let summary = outcome.map_err(explain)?;
    if args.json {
        return print_json(&summary);
    }
    print(&describe(args, &options, &summary, started.elapsed().as_secs_f64()))
}

/// For people.
fn describe(args: &Args, options: &SynthOptions, s: &SynthSummary, elapsed: f64) -> String {
    let mut out = format!(
        "{}: random weights in the geometry of {} ({}), experts {}, the rest {}; {} in {}\n",
        args.dst.display(),
        s.geometry,
        s.family,
        options.types.experts,
        options.types.dense,
        Bytes(s.file_bytes),
        seconds(elapsed),
    );
    if s.hole_bytes > 0 {
        let _ = writeln!(out, "{} of it are holes, which take no space", Bytes(s.hole_bytes));
    }
    if options.no_experts {
        out += "the experts are missing: only `sluice bench decode --drive` can use this file\n";
    }
    let _ = writeln!(out, "\n{:<12} {:>8} {:>12}", "part", "extents", "size");
    for size in &s.sizes {
        let _ = writeln!(out, "{:<12} {:>8} {:>12}", size.kind, size.extents, Bytes(size.bytes).to_string());
    }
    out
}
