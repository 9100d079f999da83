//! `sluice compare`: compares two models on a text.

use std::path::{Path, PathBuf};

use clap::value_parser;
use serde_json::json;
use sluice_format::ModelFile;
use sluice_lab::compare::Comparison;
use sluice_model::Engine;
use sluice_model::memory::available_memory;

use super::perplexity::read_ids;
use crate::engine_args::{EngineArgs, tokenizer};
use crate::error::CliError;
use crate::feed::feed;
use crate::input::read_text;
use crate::profile::{lossy, prompt_attention};
use crate::progress::step_bar;
use crate::terminal::{print, print_json};

const EXAMPLES: &str = "\
A is the reference, such as a conversion without loss, and B another conversion of the same model. The text is cut \
into windows as by `sluice perplexity`, and both predict every token but the first of each. The divergence is \
Kullback-Leibler's, of what B says from what A says: 0 where both say the same. Both models are open at once, and \
share the budget by the sizes of their files. --expert-preference and --top-k-experts count for B alone, which can be A's \
file: so what they cost is measured.

Examples:
  sluice compare model-f32.sluice model-q4.sluice --text eval.txt
  sluice compare model-q8.sluice model-q3.sluice --text eval.txt --window 512 --json
  sluice compare model.sluice model.sluice --text eval.txt --top-k-experts 6";

/// Logits of the reference that are kept until the other model has computed its own: with few rows at a time, many experts would be
/// read repeatedly.
const KEPT_BYTES: usize = 256 << 20;

/// Measure how far one model's predictions are from another's
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The reference
    #[arg(value_name = "A")]
    pub(crate) reference: PathBuf,

    /// The model to compare with it
    #[arg(value_name = "B")]
    pub(crate) other: PathBuf,

    /// The text, UTF-8
    #[arg(long, value_name = "FILE")]
    text: PathBuf,

    /// Tokens scored in each window
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = value_parser!(u32).range(1..))]
    window: u32,

    /// Print JSON: tokens, divergence, max_divergence, agreement, max_logit_difference; perplexity and nll, each of both
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    engine: EngineArgs,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let window = args.window as usize;
    let ids = read_ids(&args.reference, &args.text, window)?;
    check_other(args, &ids)?;
    let [first, second] = budgets(args)?;
    let mut reference = args.engine.open_exactly(&args.reference, window, first)?;
    let mut other = args.engine.open_within(&args.other, window, second)?;
    args.engine.say_what_is_lossy();
    let comparison = compare(&mut reference, &mut other, &ids, window)?;
    for (nll, file) in comparison.nll.iter().zip([&args.reference, &args.other]) {
        if !nll.is_finite() {
            return Err(CliError::NotANumber { file: file.clone() });
        }
    }
    report(args, &comparison, lossy(&other), prompt_attention(&other))
}

/// Refuses a model that reads the text as different tokens, or has a different vocabulary. A model without a tokenizer uses the
/// reference's.
fn check_other(args: &Args, ids: &[u32]) -> Result<(), CliError> {
    let (reference, other) = (ModelFile::open(&args.reference)?, ModelFile::open(&args.other)?);
    let [a, b] = [&args.reference, &args.other].map(|path| path.display());
    let (of_a, of_b) = (reference.spec().vocab_size, other.spec().vocab_size);
    if of_a != of_b {
        return Err(CliError::Usage(format!(
            "{a} predicts {of_a} tokens and {b} {of_b}: only conversions of the same model, or of models with the same \
             tokens, can be compared"
        )));
    }
    let Some(tokenizer) = tokenizer(&other)? else { return Ok(()) };
    let text = read_text(&args.text, "read the text")?;
    if tokenizer.encode(&text, true)? != ids {
        return Err(CliError::Usage(format!(
            "{a} and {b} read the text as different tokens, so what they predict cannot be compared"
        )));
    }
    Ok(())
}

/// Memory for each of the two, by the sizes of their files. A tenth of the available memory is left to the system.
fn budgets(args: &Args) -> Result<[u64; 2], CliError> {
    let total = args.engine.budget.unwrap_or_else(|| available_memory() / 10 * 9);
    let len = |path: &Path| {
        Ok::<u64, CliError>(ModelFile::open(path)?.extents().iter().map(|e| e.logical_len).sum::<u64>().max(1))
    };
    let (a, b) = (len(&args.reference)?, len(&args.other)?);
    let first = (u128::from(total) * u128::from(a) / (u128::from(a) + u128::from(b))) as u64;
    Ok([first, total - first])
}

/// Both models predict the same tokens, window after window, with as many rows at a time as there is room for.
fn compare(reference: &mut Engine, other: &mut Engine, ids: &[u32], window: usize) -> Result<Comparison, CliError> {
    let vocab = reference.spec().vocab_size;
    let rows = (KEPT_BYTES / (vocab * size_of::<f32>())).clamp(1, window);
    let mut kept = Vec::with_capacity(rows.min(ids.len()) * vocab);
    let (mut of_reference, mut of_other) = (reference.new_sequence(), other.new_sequence());
    let mut comparison = Comparison::default();
    let bar = step_bar("comparing", ids.len() as u64 - 1);
    for start in (0..ids.len() - 1).step_by(window) {
        let ids = &ids[start..ids.len().min(start + window + 1)];
        let (given, targets) = (&ids[..ids.len() - 1], &ids[1..]);
        of_reference.clear();
        of_other.clear();
        for (given, targets) in given.chunks(rows).zip(targets.chunks(rows)) {
            kept.clear();
            reference.forward_all(&mut of_reference, given, &mut |_, row| kept.extend_from_slice(row))?;
            feed(other, &mut of_other, given, &mut |i, row| {
                comparison.add(&kept[i * vocab..(i + 1) * vocab], row, targets[i]);
                bar.inc(1);
            })?;
        }
    }
    bar.finish_and_clear();
    Ok(comparison)
}

/// `lossy`: how the experts of B were chosen otherwise than its routers say. `form`: in which B's prompts were read, if not in the usual one.
fn report(
    args: &Args,
    comparison: &Comparison,
    lossy: Option<String>,
    form: Option<&'static str>,
) -> Result<(), CliError> {
    let &Comparison { tokens, nll, max_divergence, max_difference, .. } = comparison;
    let (divergence, agreement) = (comparison.mean_divergence(), comparison.agreement());
    let [of_reference, of_other] = comparison.perplexity();
    if args.json {
        return print_json(&json!({
            "tokens": tokens,
            "divergence": divergence,
            "max_divergence": max_divergence,
            "agreement": agreement,
            "max_logit_difference": max_difference,
            "perplexity": [of_reference, of_other],
            "nll": nll,
            "lossy": lossy,
            "prompt_attention": form,
        }));
    }
    let lossy = lossy.map(|lossy| format!("B is lossy        {lossy}\n")).unwrap_or_default();
    let form =
        form.map(|form| format!("B reads prompts   in the {form} form of latent attention\n")).unwrap_or_default();
    let change = (of_other / of_reference - 1.0) * 100.0;
    print(&format!(
        "divergence        {divergence:.6} nats per token (at most {max_divergence:.4})\n\
         same first choice {:.2} % of {tokens} tokens in windows of {}\n\
         perplexity        {of_reference:.4} and {of_other:.4} ({change:+.2} %)\n\
         logits            differ by {max_difference:.4} at most\n{lossy}{form}",
        agreement * 100.0,
        args.window,
    ))
}
