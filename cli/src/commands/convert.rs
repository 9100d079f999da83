//! `sluice convert`: a Hugging Face checkpoint becomes one model file.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::builder::PossibleValuesParser;
use clap::builder::TypedValueParser as _;
use indicatif::ProgressBar;
use serde_json::{Value, json};
use sluice_converter::{KindSize, LeftOut, Options, Plan, Progress, Summary, TypeChoice, convert, plan};
use sluice_format::WeightType;
use sluice_runtime::memory::Bytes;

use crate::error::CliError;
use crate::terminal::{byte_bar, note, print, print_json, seconds};

const EXAMPLES: &str = "\
Types: keep carries the weights bit for bit; q8 is int8 with one f16 scale per 32 weights, half of bf16 and
close to lossless; fp8 is DeepSeek's (e4m3, one scale per 128x128); bf16 and f32 are for reference. Norms,
biases and routers are never quantised.

Interrupted? Run the same command again: it goes on where it stopped, and the file is the same to the bit.

Examples:
  sluice convert DeepSeek-R1/ r1.sluice
  sluice convert DeepSeek-R1/ r1.sluice --dry-run
  sluice convert my-moe-bf16/ my-moe.sluice --type q8 --dense-type bf16
  sluice convert tiny/ tiny.sluice --type f32 --dense-type f32 --overwrite";

/// Convert a Hugging Face checkpoint (a folder with config.json and safetensors) into a model file
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder of the checkpoint
    src: PathBuf,

    /// Model file to write
    dst: PathBuf,

    /// Type of the routed experts [default: keep if the checkpoint is quantised (8 bits or fewer), else q8]
    #[arg(long = "type", value_name = "TYPE", value_parser = type_parser())]
    expert_type: Option<TypeChoice>,

    /// Type of everything else [default: as for --type]
    #[arg(long, value_name = "TYPE", value_parser = type_parser())]
    dense_type: Option<TypeChoice>,

    /// Alignment of everything in the file, in bytes; 16384 for Apple silicon
    #[arg(long, value_name = "BYTES", default_value = "4096", value_parser = page_size_parser())]
    page_size: u32,

    /// Replace the model file if it exists, once the new one is complete
    #[arg(long)]
    overwrite: bool,

    /// Only say what would be written
    #[arg(long)]
    dry_run: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn type_parser() -> impl clap::builder::TypedValueParser<Value = TypeChoice> {
    PossibleValuesParser::new(["keep", "q8", "fp8", "bf16", "f32"]).try_map(|name| name.parse::<TypeChoice>())
}

fn page_size_parser() -> impl clap::builder::TypedValueParser<Value = u32> {
    PossibleValuesParser::new(["4096", "16384"]).try_map(|size| size.parse::<u32>())
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let default = default_type(&args.src);
    let options = Options {
        expert_type: args.expert_type.unwrap_or(default),
        dense_type: args.dense_type.unwrap_or(default),
        page_size: args.page_size,
        overwrite: args.overwrite,
        ..Options::default()
    };
    if args.dry_run {
        let plan = plan(&args.src, &options)?;
        return if args.json { print_json(&plan_json(&plan, &options)) } else { print(&describe_plan(&plan)) };
    }
    let started = Instant::now();
    let bar = Bar(byte_bar("converting", 0));
    let outcome = convert(&args.src, &args.dst, &options, &bar);
    bar.0.finish_and_clear();
    let summary = outcome?;
    if args.json {
        return print_json(&summary);
    }
    print(&describe(&args.dst, &summary, started.elapsed().as_secs_f64()))
}

/// What users expect who name no type: quantised weights stay as they are, others become q8.
fn default_type(src: &Path) -> TypeChoice {
    // Whatever is wrong with the file, the converter says it better.
    let config = std::fs::read(src.join("config.json")).unwrap_or_default();
    let config: Value = serde_json::from_slice(&config).unwrap_or_default();
    if config["quantization_config"].is_object() { TypeChoice::Keep } else { TypeChoice::Type(WeightType::Q8) }
}

/// The converter's progress on the terminal.
#[derive(Debug)]
pub(crate) struct Bar(pub(crate) ProgressBar);

impl Progress for Bar {
    fn started(&self, total_bytes: u64, already_done: u64) {
        self.0.set_length(total_bytes);
        self.0.set_position(already_done);
        // A rate that counted bytes of an earlier run would promise too much.
        self.0.reset_eta();
        if already_done > 0 {
            self.note(&format!("resuming: {} of {} are there already", Bytes(already_done), Bytes(total_bytes)));
        }
    }

    fn advanced(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    fn note(&self, text: &str) {
        self.0.suspend(|| note(&text));
    }
}
