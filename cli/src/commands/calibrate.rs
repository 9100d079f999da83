//! `sluice calibrate`: measures which columns of the weights matter.

use std::path::PathBuf;
use std::sync::Arc;

use clap::value_parser;
use serde_json::json;
use sluice_format::{ExtentKind, Importance};
use sluice_lab::calibrate::Calibration;
use sluice_model::{Control, Engine, Span, Want};

use super::perplexity::read_ids;
use crate::engine_args::EngineArgs;
use crate::error::CliError;
use crate::progress::step_bar;
use crate::terminal::{print, print_json};

const EXAMPLES: &str = "\
The text runs through the model in windows of N tokens that do not remember each other. Any text of the kind that \
the model will see will do; tens of thousands of tokens are better than thousands, so that every expert is reached. \
Calibrate with the best conversion that runs here, then convert again.

Examples:
  sluice calibrate model-q8.sluice --text book.txt --out model.imatrix
  sluice convert checkpoint/ model-q3.sluice --type q3 --importance model.imatrix";

/// Measure on a text which weights matter, for `convert --importance`
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model file, its name in the folder of models, or hf:NAME
    pub(crate) file: PathBuf,

    /// The text, UTF-8
    #[arg(long, value_name = "FILE")]
    text: PathBuf,

    /// Importance file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,

    /// Tokens of each window
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = value_parser!(u32).range(1..))]
    window: u32,

    /// Print JSON: tokens, matrices, experts, experts_reached
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    engine: EngineArgs,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let window = args.window as usize;
    CliError::refuse_output(&args.out, &[&args.file, &args.text])?;
    args.engine.refuse_thrift("calibrate")?;
    args.engine.refuse_expanded("calibrate")?;
    let ids = read_ids(&args.file, &args.text, window)?;
    let mut engine = args.engine.open(&args.file, window)?;
    let importance = measure(&mut engine, &ids, window)?;
    importance.save(&args.out)?;
    let spec = engine.spec();
    let experts: usize = (0..spec.layers.len()).map(|layer| spec.extent_count(ExtentKind::Expert, layer)).sum();
    let reached = importance.matrices().keys().filter(|k| k.kind == ExtentKind::Expert && k.name != "down").count();
    let (tokens, matrices) = (importance.tokens(), importance.matrices().len());
    if args.json {
        return print_json(&json!({
            "tokens": tokens,
            "matrices": matrices,
            "experts": experts,
            "experts_reached": reached,
        }));
    }
    print(&format!(
        "{}: {matrices} matrices measured over {tokens} tokens; {reached} of {experts} experts were reached\n",
        args.out.display()
    ))
}

fn measure(engine: &mut Engine, ids: &[u32], window: usize) -> Result<Importance, CliError> {
    let calibration = Arc::new(Calibration::new());
    let mut sequence = engine.new_sequence();
    let bar = step_bar("calibrating", ids.len() as u64);
    for ids in ids.chunks(window) {
        sequence.clear();
        let mut control = Control { inputs: Some(calibration.clone()), ..Control::default() };
        let span = Span::prompt(&mut sequence, ids, Want::Nothing);
        engine.step(&mut [span], &mut control, &mut |_, _, _| ())?;
        bar.inc(ids.len() as u64);
    }
    bar.finish_and_clear();
    calibration.importance(engine.spec(), ids.len() as u64).map_err(|problem| {
        CliError::Failure(format!("the model computes what is not a number ({problem}); check it with `sluice verify`"))
    })
}
