//! `sluice perplexity`: how well the model predicts a text.

use std::path::{Path, PathBuf};

use clap::value_parser;
use serde::Serialize;
use sluice_format::ModelFile;
use sluice_lab::compare::LogProbabilities;
use sluice_model::Engine;

use crate::engine_args::{EngineArgs, tokenizer};
use crate::error::CliError;
use crate::feed::feed;
use crate::input::read_text;
use crate::profile::{lossy, prompt_attention};
use crate::progress::step_bar;
use crate::terminal::{print, print_json};

const EXAMPLES: &str = "\
The text is cut into windows of N + 1 tokens that overlap by one. Each window starts without memory of the \
one before; its first token is given, the N others are scored. `nll` is the sum of -ln p in nats. With \
--expert-preference, tokens go through the model one by one, as text is generated.

Examples:
  sluice perplexity model.sluice --text eval.txt
  sluice perplexity model.sluice --text eval.txt --window 512 --exact --json";

/// Measure how well the model predicts a text
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model file, its name in the folder of models, or hf:NAME
    pub(crate) file: PathBuf,

    /// The text, UTF-8
    #[arg(long, value_name = "FILE")]
    text: PathBuf,

    /// Tokens scored in each window
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = value_parser!(u32).range(1..))]
    window: u32,

    /// Print JSON: perplexity, nll, tokens
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Debug, Serialize)]
struct Score {
    perplexity: f64,
    nll: f64,
    tokens: u64,
    /// How experts were chosen otherwise than by the model's routers, in words.
    lossy: Option<String>,
    prompt_attention: Option<&'static str>,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let window = args.window as usize;
    let ids = read_ids(&args.file, &args.text, window)?;
    let mut engine = args.engine.open(&args.file, window)?;
    let score = score(&mut engine, &ids, window)?;
    if !score.nll.is_finite() {
        return Err(CliError::NotANumber { file: args.file.clone() });
    }
    if args.json {
        return print_json(&score);
    }
    let Score { perplexity, nll, tokens, lossy, prompt_attention } = score;
    let lossy = lossy.map(|lossy| format!("lossy: {lossy}\n")).unwrap_or_default();
    let form = prompt_attention.map(|form| format!("prompts: {form} form of latent attention\n")).unwrap_or_default();
    print(&format!(
        "perplexity {perplexity:.4} over {tokens} tokens in windows of {window} (nll {nll:.3} nats)\n{lossy}{form}"
    ))
}

/// The tokens of a text: at least two, for windows that the model must be able to take.
pub(crate) fn read_ids(model: &Path, text_file: &Path, window: usize) -> Result<Vec<u32>, CliError> {
    let text = read_text(text_file, "read the text")?;
    let file = ModelFile::open(model)?;
    if window > file.spec().max_positions {
        let most = file.spec().max_positions;
        return Err(CliError::Usage(format!("--window is {window}, the model takes at most {most} tokens")));
    }
    let mute = || {
        let name = model.display();
        CliError::Failure(format!(
            "{name} has no tokenizer, so it cannot read text: add one with `sluice set {name} --tokenizer FILE`"
        ))
    };
    let ids = tokenizer(&file)?.ok_or_else(mute)?.encode(&text, true)?;
    if ids.len() < 2 {
        return Err(CliError::Failure(format!(
            "{} has {} tokens: at least two are needed, one to start from and one to score",
            text_file.display(),
            ids.len()
        )));
    }
    Ok(ids)
}

fn score(engine: &mut Engine, ids: &[u32], window: usize) -> Result<Score, CliError> {
    let (mut nll, mut tokens) = (0.0, 0);
    let mut sequence = engine.new_sequence();
    let bar = step_bar("scoring", ids.len() as u64 - 1);
    for start in (0..ids.len() - 1).step_by(window) {
        let ids = &ids[start..ids.len().min(start + window + 1)];
        let targets = &ids[1..];
        sequence.clear();
        feed(engine, &mut sequence, &ids[..ids.len() - 1], &mut |i, row| {
            nll -= LogProbabilities::new(row).of(targets[i]);
            tokens += 1;
            bar.inc(1);
        })?;
    }
    bar.finish_and_clear();
    let perplexity = (nll / tokens as f64).exp();
    Ok(Score { perplexity, nll, tokens, lossy: lossy(engine), prompt_attention: prompt_attention(engine) })
}
